"""What becomes of a model when data ranks and micro-batches each hold some of the samples.

Most models compute samples apart: their loss is a sum over them, whoever holds them. Some do not: a contrastive loss
compares every sample with every other. Such a model means something per micro-batch, on one device too: each
micro-batch of each data rank is contrasted within itself (as under DistributedDataParallel), and the loss is their
mean. How many samples that are is then part of the model, and must be given.
"""

from __future__ import annotations

from collections.abc import Callable

from autopar.errors import UnsupportedError
from autopar.graph.ir import ModelGraph, Node, OpGraph
from autopar.graph.size import BATCH, Size
from autopar.sharding.layout import P, R, S, SpmdType
from autopar.sharding.rules import has_rule, strategies_of

Type = SpmdType | None
"""How data ranks hold a tensor; None: each has one of its own, of its own samples."""


def check_data_parallel(model: ModelGraph, micro_batch: bool = False) -> None:
    """Check that the batch may be split everywhere. ``micro_batch``: whether its size is fixed.

    Raises UnsupportedError naming the first operator that mixes samples, where that has no meaning or no size.
    """
    mixing = samples_mixed(model)
    if mixing and not micro_batch:
        raise UnsupportedError(
            f"{mixing[0]} mixes the samples of a micro-batch, so that its size is part of what is computed: fix it "
            '(--fix micro_batch=8, fix={"micro_batch": 8})'
        )


def samples_mixed(model: ModelGraph) -> tuple[str, ...]:
    """The operators that mix samples, in words. Raises UnsupportedError where that has no meaning."""
    outputs: list[tuple[Type, ...]] = []
    known: dict[tuple[str, tuple[Type, ...]], tuple[Type, ...]] = {}
    mixing: list[str] = []
    for block in model.blocks:
        graph = model.kinds[block.kind].graph
        given: dict[str, Type] = {}
        for node in graph.of("input"):
            source = block.inputs[node.name]
            if source.origin == "block":
                given[node.name] = outputs[source.block][source.index]
            elif source.origin == "batch":
                given[node.name] = _batch_type(model.batch[source.key].shape)
            else:
                given[node.name] = R
        key = (block.kind, tuple(given.values()))
        if key not in known:
            known[key] = _split_batch(graph, given, f"{model.name}, {block.path or block.kind}", mixing.append)
        outputs.append(known[key])
    if outputs and outputs[-1][0] not in (P, None):
        raise UnsupportedError(
            f"{model.name}: the loss is not a sum over samples (its type over the batch is {outputs[-1][0]}), so it "
            "cannot be trained data-parallel; return a sum over targets, or a sum over a count"
        )
    given = {node.name: _batch_type(model.batch[node.target].shape) for node in model.count.of("input")}
    where = f"{model.name}, count of targets"
    counts = _split_batch(model.count, given, where, lambda _: None)  # none for a plain sum
    if any(count not in (P, R) for count in counts) or (mixing and not _counts_samples(model.count)):
        raise UnsupportedError(f"{model.name}: the count the loss is divided by is not a sum over samples")
    return tuple(mixing)


def _counts_samples(count: OpGraph) -> bool:
    """Whether numbers in ``count`` grow with the samples, not with their square."""
    sizes = [arg for node in count.of("op") for arg in (*node.args, *node.meta.shape) if isinstance(arg, Size)]
    return all(power <= 1 for size in sizes for (power, _), _ in size.terms)


def _batch_type(shape: tuple[int | Size, ...]) -> SpmdType:
    return S(0) if shape and shape[0] == BATCH else R


def _repeats_at(node: Node, operands: tuple[Type, ...]) -> int | None:
    """The dim along which ``node`` gives every sample of the batch the same: a rank makes as many as it has samples."""
    grown = [dim for dim, size in enumerate(node.meta.shape) if size == BATCH]
    same = node.op in ("aten.expand", "aten.full", "aten.zeros", "aten.ones")
    if node.op == "aten.repeat":  # b copies of the whole, one after the other
        grown = [dim for dim, count in enumerate(node.args[1]) if count == BATCH]
        same = all(count in (1, BATCH) for count in node.args[1])
    return grown[0] if same and len(grown) == 1 and all(kind == R for kind in operands) else None


def _split_batch(graph: OpGraph, given: dict[str, Type], where: str, mixes: Callable[[str], None]) -> tuple[Type, ...]:
    """The types of a graph's outputs over an axis that splits the batch, with no conversions; parameters are R.
    ``mixes`` is told of operators that mix samples."""
    types: dict[str, Type] = {}
    for node in graph.nodes.values():
        if node.kind != "op":
            types[node.name] = given.get(node.name, R)
            continue
        operands = tuple(types[name] for name in node.operands())
        if None in operands:
            types[node.name] = None
            continue
        if node.op == "autopar.cast" and operands == (P,):
            types[node.name] = P  # a sum that is cast before it is reduced is still a sum
            continue
        if (dim := _repeats_at(node, operands)) is not None:
            types[node.name] = S(dim)
            continue
        match = next((s for s in strategies_of(node, graph) if s.inputs == operands), None)
        if match is None:
            place = f" in {node.module}" if node.module else ""
            told = f"{where}: {node.op} ({node.name}{place})"
            if not has_rule(node, graph):
                raise UnsupportedError(
                    f"{told} mixes samples of the batch: no rule computes it from {', '.join(map(str, operands))}; "
                    "register a rule for it (autopar.register_rule)"
                )
            mixes(told)
        types[node.name] = match.output if match else None
    return tuple(types[name] for name in graph.outputs)
