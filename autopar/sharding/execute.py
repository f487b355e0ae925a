"""Runs a block kind as a `BlockDecision` says, on local shards, without process groups.

`run` executes on any `World`: all ranks in one process (`run_sharded`), which proves rules and decisions forward and
backward, or a single rank (`run_local`), which under `FakeTensorMode` shows what is saved for backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from autopar.errors import VerificationError
from autopar.graph.ir import BlockKind, Node, OpGraph, substitute
from autopar.graph.ops import callable_of
from autopar.graph.size import size_at
from autopar.sharding.check import chosen
from autopar.sharding.conversions import Step, path, same
from autopar.sharding.decision import BlockDecision
from autopar.sharding.layout import Layout
from autopar.sharding.local import (
    blocks_at,
    local_shape,
    localize,
    part_of,
    produced_layouts,
    shard,
    split_order,
    unshard,
)
from autopar.sharding.rules import Strategy
from autopar.sharding.simulate import LocalWorld, SimulatedWorld, Values, World
from autopar.sharding.variants import VARIANTS, Part

__all__ = ["convert_values", "local_shape", "localize", "run", "run_local", "run_op", "run_sharded", "shard", "unshard"]


def run_op(
    node: Node, choice: Mapping[str, Strategy], operands: list[Values], world: World, batch: int, seq: int, compute: Any
) -> Values:
    """One operator on each rank of the world. ``operands``: the ranks' values of each operand, as the choice asks."""
    _, output = produced_layouts(node, choice)
    args, kwargs = localize(node, output, world.axes, batch, seq)
    if node.op == "autopar.cast":
        kwargs = {**kwargs, "compute": compute}
    calls = []
    for rank in range(len(world.ranks)):
        calls.append(_called_with(args, kwargs, [values[rank] for values in operands]))
    special = [axis for axis in split_order(choice) if choice[axis].variant]
    if not special:
        function = callable_of(node.op)
        return [function(*a, **k) for a, k in calls]
    variants = {choice[axis].variant for axis in special}
    if len(variants) > 1:
        raise VerificationError(f"{node.name} ({node.op}) runs several variants: {', '.join(sorted(variants))}")
    variant = VARIANTS[node.op, variants.pop()]
    whole = size_at(choice[special[0]].extent or 0, batch, seq)
    starts = [part_of(whole, [(world.axes[axis], rank[axis]) for axis in special])[0] for rank in world.ranks]
    runs = [variant(Part(start, whole), *a, **k) for start, (a, k) in zip(starts, calls, strict=True)]
    sent: list[Any] = [None] * len(runs)
    done: Values = []
    while not done:
        asked = []
        for generator, value in zip(runs, sent, strict=True):
            try:
                asked.append(generator.send(value))
            except StopIteration as stop:
                done.append(stop.value)
        if asked:
            sent = [x for _, x in asked]
            for axis in special:
                op = asked[0][0]
                sent = world.shift(sent, axis) if op == "shift" else world.all_reduce(sent, axis, op)
    return done


def _called_with(args: Any, kwargs: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """The arguments with each `Ref` replaced by the next tensor."""
    rest = iter(tensors)
    return substitute((args, kwargs), lambda _: next(rest))


def convert_values(
    values: Values, source: Layout, target: Layout, world: World, batch: int, seq: int, grad: bool = True
) -> Values:
    """What the ranks hold after the shortest path of conversions from ``source`` to ``target``."""
    layout = source
    for axis, step in path(source, target, grad):
        after = layout.with_type(axis, step.target)
        here, there = (blocks_at(where, axis, world.axes, batch, seq) for where in (layout, after))
        values = world.convert(values, Step(here, there, step.forward, step.backward), axis)
        layout = after
    return values


def run(
    graph: OpGraph,
    decision: BlockDecision,
    values: Mapping[str, Values],
    world: World,
    batch: int,
    seq: int,
    compute: Any,
) -> tuple[Values, ...]:
    """The outputs of ``graph``, in the decision's output layouts, from its inputs in the decision's input layouts.

    ``values``: for each input, parameter and buffer node, what the ranks hold. ``compute``: the job's dtype. Raises
    VerificationError when an operand was not made available in the layout its strategy asks for.
    """
    held: dict[str, list[tuple[Layout, Values]]] = {}

    def find(name: str, layout: Layout, why: str) -> Values:
        grad = graph.nodes[name].meta.requires_grad
        for have, there in held[name]:
            if same(have, layout, grad):
                return there
        have_text = "; ".join(str(have) for have, _ in held[name])
        raise VerificationError(f"{why} needs {name} as {layout}, which is held as {have_text} only")

    for node in graph.nodes.values():
        if node.kind == "op":
            choice = chosen(node, graph, decision)
            needs, layout = produced_layouts(node, choice)
            pairs = zip(node.operands(), needs, strict=True)
            operands = [find(name, need, f"{node.name} ({node.op})") for name, need in pairs]
            made = run_op(node, choice, operands, world, batch, seq, compute)
        else:
            made, layout = list(values[node.name]), decision.inputs[node.name]
        held[node.name] = [(layout, made)]
        for conversion in decision.conversions:
            if conversion.tensor == node.name:
                start = find(node.name, conversion.source, "a conversion")
                grad = node.meta.requires_grad
                there = convert_values(start, conversion.source, conversion.target, world, batch, seq, grad)
                held[node.name].append((conversion.target, there))
    return tuple(find(name, decision.outputs[name], "the output") for name in graph.outputs)


def run_sharded(
    kind: BlockKind,
    decision: BlockDecision,
    values: Mapping[str, Values],
    batch: int,
    seq: int,
    compute: torch.dtype = torch.float64,
) -> tuple[Values, ...]:
    """Run on all ranks of the decision's axes in this process, in rank order, differentiably."""
    return run(kind.graph, decision, values, SimulatedWorld(decision.axes), batch, seq, compute)


def run_local(
    kind: BlockKind,
    decision: BlockDecision,
    values: Mapping[str, torch.Tensor],
    batch: int,
    seq: int,
    compute: torch.dtype = torch.bfloat16,
    world: LocalWorld | None = None,
) -> tuple[torch.Tensor, ...]:
    """Run one rank on its local tensors, with conversions of the right shapes (see `LocalWorld`)."""
    world = world or LocalWorld(decision.axes)
    outputs = run(kind.graph, decision, {n: [x] for n, x in values.items()}, world, batch, seq, compute)
    return tuple(out[0] for out in outputs)
