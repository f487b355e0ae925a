"""Draws plans: a mesh, stages, recomputation, and for every operator any legal strategy on each model axis.

Legal is what `autopar.sharding.check.check_decision` passes, not only what the search would pick: strategies of one
operator differ from axis to axis, tensors arrive, are stored and leave in any layout, and are converted from any of
those they are held in.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from autopar.cluster import Cluster
from autopar.errors import UnsupportedError
from autopar.graph.ir import BlockKind, ModelGraph, Node
from autopar.graph.size import SEQ, size_at
from autopar.job import Job
from autopar.mesh import Mesh
from autopar.plan import SAVEABLE, Candidate, Plan, Predicted, Run, Stage
from autopar.sharding.check import check_decision, fits, refusal
from autopar.sharding.conversions import same
from autopar.sharding.data_parallel import samples_mixed
from autopar.sharding.decision import BlockDecision, Conversion
from autopar.sharding.layout import CONTEXT, I, Layout, P, R, S, SpmdType
from autopar.sharding.local import produced_layouts, settled, standard
from autopar.sharding.rules import Strategy, strategies_of
from autopar.solver.axis_choices import choices_of, sequence_split, stored_layouts, tensor_axes
from autopar.solver.ties import Ties, ties_of
from fuzz.writing import Draw

MESHES = (
    Mesh(tp=2),
    Mesh(dp=2),
    Mesh(tp=4),
    Mesh(dp=2, tp=2),
    Mesh(tp=4, tp_parts=(2, 2)),
    Mesh(cp=2),
    Mesh(cp=2, tp=2),
    Mesh(pp=2, tp=2),
    Mesh(tp=3),
    Mesh(dp=2, cp=2),
    Mesh(cp=4),
    Mesh(dp=3),
    Mesh(dp=2, tp=4, tp_parts=(2, 2)),
    Mesh(pp=2, dp=2),
    Mesh(cp=2, tp=4, tp_parts=(2, 2)),
    Mesh(dp=2, cp=2, tp=2),
    Mesh(pp=2, cp=2, tp=2),
    Mesh(tp=8, tp_parts=(2, 4)),
    Mesh(tp=6, tp_parts=(3, 2)),
    Mesh(pp=3, tp=2),
)
LENGTHS = (8, 12, 16)


class DeadEndError(Exception):
    """``node`` leaves in a layout that some reader cannot take."""

    def __init__(self, node: str) -> None:
        self.node = node


def drawn_plan(pick: Draw[Any], model: ModelGraph, length: int) -> Plan:
    """A plan for the model; ``length``: of the sequences it was traced with."""
    mixed = _mixes_samples(model)
    has_sequence = any(SEQ in meta.shape for meta in model.batch.values())
    mesh = pick(
        [
            mesh
            for mesh in MESHES
            if mesh.pp <= len(model.blocks) and (mesh.dp == 1 or not mixed) and (mesh.cp == 1 or has_sequence)
        ]
    )
    most = model.max_seq or max(LENGTHS)
    seq = pick([n for n in LENGTHS if n <= most and n % mesh.cp == 0] or [mesh.cp]) if has_sequence else length
    micro_batch = pick((1, 2, 3, 4))
    micro_batches = 1 if mixed else max(pick((1, 1, 2)), mesh.pp)
    candidates: dict[str, Candidate] = {}
    kinds = _Decisions(pick, model, mesh.model_axes(), micro_batch, seq).all()
    for name, decisions in kinds.items():
        for index, decision in enumerate(decisions):
            how = pick(("none", "none", "full", "selective"))
            saved = tuple(x for x in SAVEABLE if pick((True, False))) if how == "selective" else ()
            key = f"{name}{index or ''}"
            candidates[key] = Candidate(key, decision, how, 0.0, 0.0, 0.0, 0, 0, 0, 0, saved)
    runs = []
    for index, block in enumerate(model.blocks):
        several = [f"{block.kind}{place or ''}" for place in range(len(kinds[block.kind]))]
        runs.append(Run(index, index + 1, pick(several)))
    cuts = sorted(pick(list(itertools.combinations(range(1, len(runs)), mesh.pp - 1))))
    stages = [Stage(tuple(runs[a:b]), 0.0, 0.0, 0.0, {}) for a, b in itertools.pairwise((0, *cuts, len(runs)))]
    return Plan(
        model=model.name,
        fingerprint=model.fingerprint(),
        cluster=Cluster.parse(f"1x{mesh.size}:h100"),
        job=Job(micro_batch * micro_batches * mesh.dp, seq, "fp64"),
        mesh=mesh,
        micro_batch=micro_batch,
        micro_batches=micro_batches,
        schedule="none" if mesh.pp == 1 else "1f1b",
        zero=0,
        candidates=candidates,
        stages=tuple(stages),
        predicted=Predicted(1.0, 1.0, 0.0, (1.0, 1.0), {}),
        bound=1.0,
        gap=0.0,
        status="feasible",
    )


def _mixes_samples(model: ModelGraph) -> bool:
    """Whether samples cannot be split over data ranks and micro-batches."""
    try:
        return bool(samples_mixed(model))
    except UnsupportedError:
        return True


@dataclass
class _Decisions:
    """Decisions for all kinds of a model that agree at their ends."""

    pick: Draw[Any]
    model: ModelGraph
    axes: Mapping[str, int]
    batch: int
    seq: int
    ends: dict[str, Layout] = field(default_factory=dict)
    stored: dict[str, Layout] = field(default_factory=dict)

    def all(self) -> dict[str, list[BlockDecision]]:
        """For each kind one or two decisions, the second for some of its blocks."""
        ties = ties_of(self.model)
        found = {}
        for name, kind in self.model.kinds.items():
            count = sum(block.kind == name for block in self.model.blocks)
            several = 2 if count > 1 and self.axes and self.pick((False, False, True)) else 1
            found[name] = [self.one(kind, ties) for _ in range(several)]
        return found

    def one(self, kind: BlockKind, ties: Ties) -> BlockDecision:
        even: set[str] = set()
        while True:
            try:
                decision = _Drawing(self, kind, ties, frozenset(even)).decision()
            except DeadEndError as end:
                if end.node in even:
                    raise
                even.add(end.node)
                continue
            check_decision(kind, decision, self.batch, self.seq)
            return decision

    def end(self, tie: str, node: Node) -> Layout:
        """How a tensor passes between blocks."""
        if tie not in self.ends:
            kinds = {axis: self._end_types(axis, node) for axis in self.axes}
            while True:
                layout = standard({axis: self.pick(kinds[axis]) for axis in self.axes}, node.meta.shape)
                if fits(node.meta.shape, layout, self.axes, self.batch, self.seq):
                    break
            self.ends[tie] = layout
        return self.ends[tie]

    def _end_types(self, axis: str, node: Node) -> list[SpmdType]:
        shape, grad = node.meta.shape, node.meta.requires_grad
        if axis == CONTEXT:
            along = sequence_split(shape)
            return [along] if along else [R, P] if grad else [R]
        splits = [S(dim) for dim, size in enumerate(shape) if size_at(size, self.batch, self.seq) > 1]
        return [I, *splits, R, *([P] if grad else [])]


class _Drawing:
    """One decision in the making. ``even``: operators that may not split unevenly."""

    def __init__(self, decisions: _Decisions, kind: BlockKind, ties: Ties, even: frozenset[str]) -> None:
        self.all, self.kind, self.graph, self.ties, self.even = decisions, kind, kind.graph, ties, even
        self.pick, self.axes = decisions.pick, decisions.axes
        self.held: dict[str, list[Layout]] = {}
        self.arrives: dict[str, Layout] = {}
        self.conversions: list[Conversion] = []
        self.whole = Layout(tuple((axis, I) for axis in self.axes))

    def decision(self) -> BlockDecision:
        strategies = {}
        for node in self.graph.nodes.values():
            if node.kind == "op":
                choice = self._choice(node)
                inputs, output = produced_layouts(node, settled(choice, self.axes))
                for name, need in zip(node.operands(), inputs, strict=True):
                    self._convert(name, need)
                self.held[node.name] = [output]
                strategies[node.name] = {axis: choice[axis].name for axis in self.axes}
            elif node.kind != "parameter":
                tie = self.ties.boundary.get((self.kind.name, node.name), "")
                self._arrive(node.name, self.all.end(tie, node) if tie else self.whole)
        outputs = {}
        for index, name in enumerate(self.graph.outputs):
            outputs[name] = self._leaves(index, name)
            if not self._reachable(name, outputs[name]):
                raise DeadEndError(name)
            self._convert(name, outputs[name])
        for node in self.graph.of("parameter"):
            if node.name not in self.held:
                self._store(node, [])
        order = {name: place for place, name in enumerate(self.graph.nodes)}
        moves = tuple(sorted(self.conversions, key=lambda move: order[move.tensor]))
        return BlockDecision(self.kind.name, dict(self.axes), self.arrives, strategies, moves, outputs)

    def _leaves(self, index: int, name: str) -> Layout:
        node = self.graph.nodes[name]
        tie = self.ties.boundary.get((self.kind.name, "out", str(index)), "")
        if tie:
            return self.all.end(tie, node)
        if CONTEXT in self.axes and node.meta.requires_grad:
            return self.whole.with_type(CONTEXT, sequence_split(node.meta.shape) or P)
        return self.whole

    def _arrive(self, name: str, layout: Layout) -> None:
        self.arrives[name] = layout
        self.held[name] = [layout]

    def _store(self, node: Node, read: list[Layout]) -> None:
        """A parameter is stored as its first reader takes it, if it can be, or in any other way."""
        tie = self.ties.parameters.get((self.kind.name, node.name), "")
        if tie and tie in self.all.stored:
            return self._arrive(node.name, self.all.stored[tie])
        options = list(stored_layouts(node.meta, self.axes, read if not tie and node.name not in self.even else ()))
        wanted = [layout for layout in options if any(same(layout, need, True) for need in read)]
        layout = self.pick(wanted) if wanted and self.pick((True, False)) else self.pick(options)
        if tie:
            self.all.stored[tie] = layout
        return self._arrive(node.name, layout)

    def _choice(self, node: Node) -> dict[str, Strategy]:
        """Strategies that follow from how the operands are held, or any others."""
        options = {axis: self._strategies(node, axis) for axis in self.axes}
        follows = self.pick((True, False))
        for attempt in range(12):
            choice = {}
            for axis, strategies in options.items():
                if follows and attempt < 4:
                    least = min(self._misfits(node, axis, strategy) for strategy in strategies)
                    strategies = [s for s in strategies if self._misfits(node, axis, s) == least]
                choice[axis] = self.pick(strategies)
            if self._possible(node, choice):
                return choice
        for name in ("R", "I"):
            choice = {}
            for axis, strategies in options.items():
                choice[axis] = next((s for s in strategies if s.name == name), strategies[0])
            if self._possible(node, choice):
                return choice
        raise DeadEndError(next(name for name in node.operands() if not self._reachable(name, None)))

    def _strategies(self, node: Node, axis: str) -> list[Strategy]:
        """What the operator may do on one axis alone."""
        batch, seq = self.all.batch, self.all.seq
        if axis == CONTEXT:
            found = choices_of(node, self.graph, {axis: self.axes[axis]}, batch, seq)
            return [choice[axis] for choice in found]
        return [
            strategy
            for strategy in strategies_of(node, self.graph)
            if strategy.variant != "context"
            and not refusal(node, self.graph, {axis: strategy}, {axis: self.axes[axis]}, batch, seq)
            and not (node.name in self.even and self._uneven(strategy, axis))
        ]

    def _uneven(self, strategy: Strategy, axis: str) -> bool:
        ranks = 1
        for size in tensor_axes(self.axes).values():
            ranks *= size
        return strategy.extent is not None and size_at(strategy.extent, self.all.batch, self.all.seq) % ranks != 0

    def _misfits(self, node: Node, axis: str, strategy: Strategy) -> int:
        return sum(
            all(layout[axis] != kind for layout in self.held[name])
            for name, kind in zip(node.operands(), strategy.inputs, strict=True)
            if name in self.held
        )

    def _possible(self, node: Node, choice: Mapping[str, Strategy]) -> bool:
        choice = settled(choice, self.axes)
        if refusal(node, self.graph, choice, self.axes, self.all.batch, self.all.seq):
            return False
        inputs, _ = produced_layouts(node, choice)
        for name, need in zip(node.operands(), inputs, strict=True):
            if name not in self.held:
                self._store(self.graph.nodes[name], [need])
        return all(self._reachable(name, need) for name, need in zip(node.operands(), inputs, strict=True))

    def _sources(self, name: str, need: Layout | None) -> Iterator[Layout]:
        """The layouts in which a tensor is held and from which it can be converted; all but uneven ones."""
        node = self.graph.nodes[name]
        if need is None or fits(node.meta.shape, need, self.axes, self.all.batch, self.all.seq):
            for layout in self.held[name]:
                if fits(node.meta.shape, layout, self.axes, self.all.batch, self.all.seq):
                    yield layout

    def _reachable(self, name: str, need: Layout | None) -> bool:
        grad = self.graph.nodes[name].meta.requires_grad
        if need is not None and any(same(layout, need, grad) for layout in self.held[name]):
            return True
        return any(True for _ in self._sources(name, need))

    def _convert(self, name: str, need: Layout) -> None:
        grad = self.graph.nodes[name].meta.requires_grad
        if not any(same(layout, need, grad) for layout in self.held[name]):
            source = self.pick(list(self._sources(name, need)))
            self.conversions.append(Conversion(name, source, need))
            self.held[name].append(need)
