"""Shared tables that every block reads by its part of the sequence: the stage takes that part once, for all blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from autopar.graph.ir import ModelGraph, OpGraph
from autopar.graph.size import SEQ
from autopar.plan import Plan
from autopar.sharding.check import chosen
from autopar.sharding.conversions import path, same
from autopar.sharding.decision import BlockDecision
from autopar.sharding.layout import CONTEXT, Layout
from autopar.sharding.local import produced_layouts


def split_once(plan: Plan, model: ModelGraph) -> tuple[Plan, dict[str, int]]:
    """The plan with these tables arriving split, and the dim that each is split on over cp.

    A table is one of them if all blocks that read it want it so, and none reads it whole; where blocks of one kind read
    different tables in one place (masks of sliding and of full attention), all of these or none.
    """
    dims: dict[str, int] = {}
    candidates = dict(plan.candidates)
    runs = (run for stage in plan.stages for run in stage.runs)
    of_block = {block: run.candidate for run in runs for block in range(run.start, run.stop)}
    if plan.mesh.cp == 1:
        return plan, dims
    for keys, readers in _together(model, of_block):
        graphs = {name: model.kinds[candidates[name].decision.kind].graph for name, _ in readers}
        wanted = {_wanted(graphs[name], candidates[name].decision, node) for name, node in readers}
        if len(wanted) != 1 or None in wanted:
            continue
        dims |= dict.fromkeys(keys, *wanted)  # type: ignore[arg-type]
        for name, node in readers:
            candidates[name] = replace(candidates[name], decision=_arriving(candidates[name].decision, node))
    return replace(plan, candidates=candidates), dims


Reader = tuple[str, str]
"""A candidate, and the input of its kind that is a table."""


def _together(model: ModelGraph, of_block: Mapping[int, str]) -> list[tuple[list[str], dict[Reader, None]]]:
    """Tables in groups that share readers, with their readers."""
    groups: list[tuple[list[str], dict[Reader, None]]] = []
    for key in model.constants.outputs:
        readers = dict.fromkeys(
            (of_block[index], name)
            for index, block in enumerate(model.blocks)
            for name, source in block.inputs.items()
            if source.origin == "constant" and source.key == key
        )
        joined = [group for group in groups if group[1].keys() & readers.keys()]
        keys = [other for group in joined for other in group[0]] + [key]
        everyone = {reader: None for group in joined for reader in group[1]} | readers
        groups = [group for group in groups if group not in joined] + [(keys, everyone)]
    return groups


def _wanted(graph: OpGraph, decision: BlockDecision, name: str) -> int | None:
    """The dim of the sequence that cp splits of input ``name`` before anything reads it; None if something does."""
    first = [step for step in decision.conversions if step.tensor == name and step.source == decision.inputs[name]]
    if len(first) != 1 or name in graph.outputs:
        return None
    steps = path(first[0].source, first[0].target, False)
    kind = first[0].target[CONTEXT]
    if [axis for axis, _ in steps] != [CONTEXT] or kind.kind != "S" or kind.blocks != 1:
        return None
    if graph.nodes[name].meta.shape[kind.dim] != SEQ:
        return None
    whole = any(same(need, first[0].source, False) for need in _needs(graph, decision, name))
    return None if whole else kind.dim


def _needs(graph: OpGraph, decision: BlockDecision, name: str) -> Iterator[Layout]:
    for node in graph.of("op"):
        if name in node.operands():
            read, _ = produced_layouts(node, chosen(node, graph, decision))
            yield from (need for operand, need in zip(node.operands(), read, strict=True) if operand == name)


def _arriving(decision: BlockDecision, name: str) -> BlockDecision:
    """The decision for a block whose input ``name`` comes as its only first conversion would make it."""
    (first,) = [step for step in decision.conversions if step.tensor == name and step.source == decision.inputs[name]]
    rest = tuple(step for step in decision.conversions if step is not first)
    return replace(decision, inputs={**decision.inputs, name: first.target}, conversions=rest)
