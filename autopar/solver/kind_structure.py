"""How the operators of one block kind may be split on model axes (`structure`), found once for all that divides alike.

A structure follows from the kind, the names of the axes and what divides (`divisors`). Structures of other sizes have
most of their pieces in common: what an operator may do, and the table of a tensor's conversions, depend on the sizes
that they split only, and operators that are alike share theirs.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, Generic, TypeVar

from autopar.graph.ir import BlockKind, Node, TensorMeta
from autopar.graph.size import size_at
from autopar.sharding.check import fits
from autopar.sharding.conversions import convertible, direct, plain, same
from autopar.sharding.layout import CONTEXT, I, Layout, P, R, SpmdType
from autopar.sharding.local import produced_layouts, standard
from autopar.sharding.rules import strategies_of
from autopar.solver.axis_choices import (
    AxesChoice,
    Demands,
    boundary_layouts,
    choices_of,
    sequence_split,
    stored_layouts,
    tensor_axes,
)
from autopar.solver.divisors import Answers, Divisors, blocks_of
from autopar.solver.prices import Action, AxisPrices, Inside, Part
from autopar.solver.problem import Choice, Op, Output
from autopar.solver.recompute import NOTHING_AGAIN, runs_again
from autopar.solver.structure import Act, Held, Move, Operation, Structure, Table, Way, Ways
from autopar.solver.ties import Ties
from autopar.solver.work import variant

_KEEP_NOTHING = frozenset(
    f"aten.{name}"
    for name in (
        "add",
        "sub",
        "view",
        "reshape",
        "unflatten",
        "flatten",
        "transpose",
        "permute",
        "expand",
        "slice",
        "select",
        "cat",
        "neg",
        "unsqueeze",
        "squeeze",
        "clone",
        "sum",
        "mean",
    )
) | {"autopar.cast", "aten.embedding"}
"""Operators that keep none of their operands for backward (used to lean answers towards memory; never for totals)."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Choices:
    """What an operator may do: its ways, the strategies and the layouts of operands and output that they stand for."""

    ways: tuple[Way, ...]
    choices: tuple[AxesChoice, ...]
    layouts: tuple[tuple[tuple[Layout, ...], Layout], ...]
    alike: bool


class _Places(Generic[T]):
    """Things in the order in which they were first met."""

    def __init__(self) -> None:
        self.things: list[T] = []
        self._place: dict[Hashable, int] = {}

    def of(self, key: Hashable, thing: T) -> int:
        place = self._place.setdefault(key, len(self.things))
        if place == len(self.things):
            self.things.append(thing)
        return place


class KindStructures:
    """The structures of one kind; what is the same in several is found once."""

    def __init__(self, kind: BlockKind, ties: Ties, demands: Demands) -> None:
        self.kind, self.graph, self.ties, self.demands = kind, kind.graph, ties, demands
        self.divisors = Divisors(kind.graph)
        self.operands = {node.name: node.operands() for node in self.graph.of("op")}
        self.readers = {name: frozenset(users) for name, users in self.graph.users().items()}
        self.parts, self.operations, self.moves = _Places[Part](), _Places[Operation](), _Places[Move]()
        self.acts = _Places[Act]()
        self.choices: dict[Hashable, _Choices] = {}
        self.tables: dict[Hashable, tuple[Table, frozenset[Layout]]] = {}
        self.fitting: dict[Hashable, dict[Layout, bool]] = {}
        self.like = self._alike()
        self._found: dict[Hashable, Structure] = {}

    def of(self, axes: Mapping[str, int], batch: int, seq: int, again: bool) -> Structure:
        """The structure on axes of these sizes, for ``batch`` samples of ``seq`` positions a micro-batch. ``again``:
        the kind is recomputed in backward."""
        answers = self.divisors.answers(axes, batch, seq)
        key = (answers.names, answers.sizes, answers.nested(self.divisors.blocks), again)
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = _Build(self, axes, batch, seq, answers, again).structure()
        return found

    def _alike(self) -> dict[str, str]:
        """For each op node the first that may do the same."""
        first: dict[object, str] = {}
        like = {}
        for node in self.graph.of("op"):
            operands = [self.graph.nodes[name] for name in self.operands[node.name]]
            metas = tuple((operand.meta, operand.kind == "parameter") for operand in operands)
            key = (node.op, variant(node), strategies_of(node, self.graph), metas, node.meta)
            like[node.name] = first.setdefault(key, node.name)
        return like


def structure_of(
    kind: BlockKind, prices: AxisPrices, ties: Ties, demands: Demands, again: bool, memo: dict[Any, Any]
) -> Structure:
    """The structure of ``kind`` on axes of these sizes; ``memo``: see `block_problem.model_problem`."""
    key = ("structures", kind.name, demands)
    if key not in memo:
        memo[key] = KindStructures(kind, ties, demands)
    structures = memo[key]
    assert isinstance(structures, KindStructures)
    return structures.of(prices.axes, prices.batch, prices.job.seq_len, again)


class _Build:
    """One structure in the making."""

    def __init__(
        self, known: KindStructures, axes: Mapping[str, int], batch: int, seq: int, answers: Answers, again: bool
    ) -> None:
        self.known, self.kind, self.graph, self.ties = known, known.kind, known.graph, known.ties
        self.axes, self.batch, self.seq, self.answers = axes, batch, seq, answers
        self.demands = known.demands
        self.again = runs_again(self.kind) if again else NOTHING_AGAIN
        self.held: dict[str, dict[Layout, None]] = {name: {} for name in self.graph.nodes}
        self._operands, self._readers = known.operands, known.readers
        self._possible = {node.name: self._choices(node) for node in self.graph.of("op")}
        self._parted = {name for name in self.graph.nodes if self._is_parted(name)} if again else set()

    def structure(self) -> Structure:
        known = self.known
        sources = tuple(self._source(node) for node in self.graph.nodes.values() if node.kind != "op")
        ops = [self._op(node) for node in self.graph.of("op")]
        outputs = tuple(self._output(index, name) for index, name in enumerate(self.graph.outputs))
        tables, conversions, hubs = self._conversions()
        later = self._later(ops, outputs, {name: tables[place] for name, place in conversions.items()})

        ways = [way for op in ops for way in op.ways]
        operations = _used((way.operation for way in ways), known.operations.things)
        moves = _used((move for table in tables for move in table.moves.values()), known.moves.things)
        parts = [part for source in sources for part in source.layouts.values()]
        acts = _used((act for _, move in moves for act in move), known.acts.things)
        parts += [part for way in ways for part in way.kept] + [whole for _, (whole, _) in acts]
        for _, each in operations:
            parts += (*each.inputs, each.output, *(part for _, part in each.inside))
        used = _used(parts, known.parts.things)
        return Structure(used, operations, moves, acts, sources, tuple(later), outputs, tables, conversions, hubs)

    def _name(self, node: str) -> str:
        return f"{self.kind.name}/{node}"

    def _is_parted(self, name: str) -> bool:
        """Whether a tensor is read by what runs again and also behind it."""
        readers = self._readers[name]
        return bool(readers & self.again.reads) and (name in self.graph.outputs or not readers <= self.again.reads)

    def _read_name(self, name: str, reader: str | None) -> str:
        """What ``reader`` (None: the block behind) reads as ``name``."""
        behind = name in self._parted and reader not in self.again.reads
        return self._name(name) + (_LATER if behind else "")

    def _part(self, meta: TensorMeta, types: Iterable[tuple[str, SpmdType]]) -> int:
        part = Part.of(meta, types)
        return self.known.parts.of(part, part)

    def _plain(self, node: str, layout: Layout) -> Layout:
        """``layout`` as the problem's layout of ``node``: equal for what holds it alike, and noted as held."""
        layout = self._as_plain(self.graph.nodes[node].meta, layout)
        self.held[node].setdefault(layout)
        return layout

    def _as_plain(self, meta: TensorMeta, layout: Layout) -> Layout:
        if len(self.axes) > 1:
            types = {axis: plain(layout[axis], meta.requires_grad) for axis in self.axes}
            found = standard(types, meta.shape)
            assert same(found, layout, meta.requires_grad), (meta, found, layout)
            layout = found
        elif not meta.requires_grad:
            layout = Layout(tuple((axis, plain(kind, False)) for axis, kind in layout.types))
        return layout

    def _whole(self) -> Layout:
        return Layout(tuple((axis, I) for axis in self.axes))

    def _source(self, node: Node) -> Held:
        tie = self.ties.boundary.get((self.kind.name, node.name), "")
        whole = TensorMeta(tuple(size_at(size, 1, 1) for size in node.meta.shape), node.meta.dtype)
        if tie:
            layouts, share = self._boundary(node), 0.0
        elif node.kind == "parameter":
            tie = self.ties.parameters.get((self.kind.name, node.name), "")
            share = (1.0 if not tie else 0.5) if node.meta.requires_grad else 0.0
            layouts = stored_layouts(node.meta, self.axes, self._read_as(node.name))
        else:
            layouts, share = (self._whole(),), 0.0
        held = {self._plain(node.name, layout): self._part(whole, layout.types) for layout in layouts}
        return Held(self._name(node.name), held, share, tie)

    def _boundary(self, node: Node) -> tuple[Layout, ...]:
        return boundary_layouts(node.meta, self.axes, self.batch, self.seq, self.demands.sequence)

    def _read_as(self, name: str) -> list[Layout]:
        """The layouts in which some operator may read a tensor."""
        found: dict[Layout, None] = {}
        for user, operands in self._operands.items():
            for place in (index for index, operand in enumerate(operands) if operand == name):
                found |= {inputs[place]: None for inputs, _ in self._possible[user].layouts}
        return list(found)

    def _choices(self, node: Node) -> _Choices:
        key = (self.known.like[node.name], self.answers.of(*self.known.divisors.of_node(node)))
        found = self.known.choices.get(key)
        if found is None:
            found = self.known.choices[key] = self._find_choices(node)
        return found

    def _find_choices(self, node: Node) -> _Choices:
        possible = choices_of(node, self.graph, self.axes, self.batch, self.seq, self.demands)
        metas = [self.graph.nodes[name].meta for name in self._operands[node.name]]
        produced = tuple(produced_layouts(node, choice) for choice in possible)
        ways = []
        for choice, (layouts, made) in zip(possible, produced, strict=True):
            operation, kept = self._operation(node, choice, layouts, made)
            inputs = tuple(self._as_plain(meta, layout) for meta, layout in zip(metas, layouts, strict=True))
            label = ", ".join(dict.fromkeys(strategy.name for strategy in choice.values()))
            ways.append(Way(label, inputs, self._as_plain(node.meta, made), operation, kept))
        alike = len({(way.inputs, way.output) for way in ways}) < len(ways)
        return _Choices(tuple(ways), tuple(possible), produced, alike)

    def _op(self, node: Node) -> Ways:
        names = self._operands[node.name]
        possible = self._possible[node.name]
        for way in possible.ways:
            for name, layout in zip(names, way.inputs, strict=True):
                self.held[name].setdefault(layout)
            self.held[node.name].setdefault(way.output)
        operands = tuple(self._read_name(name, node.name) for name in names)
        again = node.name in self.again.runs
        return Ways(self._name(node.name), operands, possible.ways, possible.choices, again, possible.alike)

    def _operation(
        self, node: Node, choice: AxesChoice, layouts: tuple[Layout, ...], made: Layout
    ) -> tuple[int, tuple[int, ...]]:
        """The operator on what each rank holds, and which of its operands it keeps for backward, roughly: a tensor that
        several read counts once for each."""
        operands = [self.graph.nodes[name] for name in self._operands[node.name]]
        inputs = tuple(
            self._part(operand.meta, layout.types) for operand, layout in zip(operands, layouts, strict=True)
        )
        output = self._part(node.meta, made.types)
        inside = []
        for axis, strategy in choice.items():
            for inner in strategy.inner:
                each = Inside.of(inner, axis, layouts[inner.like])
                inside.append((each, self.known.parts.of(each.part, each.part)))
        grads = tuple(operand.meta.requires_grad for operand in operands)
        keeps = node.op not in _KEEP_NOTHING and node.meta.requires_grad
        kept = tuple(
            part for part, operand in zip(inputs, operands, strict=True) if keeps and operand.kind != "parameter"
        )
        key = (node.op, variant(node), inputs, output, grads, tuple(inside))
        return self.known.operations.of(key, Operation(node, inputs, output, grads, tuple(inside))), kept

    def _output(self, index: int, name: str) -> Output:
        tie = self.ties.boundary.get((self.kind.name, "out", str(index)), "")
        node = self.graph.nodes[name]
        if tie:
            layouts = self._boundary(node)
            plain = tuple(dict.fromkeys(self._plain(name, each) for each in layouts))
            return Output(self._read_name(name, None), plain, tie)
        layout = self._whole()
        if CONTEXT in self.axes and node.meta.requires_grad:  # the loss of this rank's positions
            layout = layout.with_type(CONTEXT, sequence_split(node.meta.shape) or P)
        return Output(self._read_name(name, None), (self._plain(name, layout),))

    def _conversions(self) -> tuple[tuple[Table, ...], dict[str, int], dict[str, frozenset[Layout]]]:
        """Per tensor, the direct conversions between the layouts it may be made, held or read in or pass through."""
        places: dict[Hashable, int] = {}
        found: list[tuple[Table, frozenset[Layout]]] = []
        conversions, hubs = {}, {}
        for name, held in self.held.items():
            parts = {self._name(name): bool(self._readers[name] & self.again.reads)}
            if name in self._parted:
                parts[self._name(name) + _LATER] = False
            meta = self.graph.nodes[name].meta
            for part, again in parts.items():
                key = (meta, tuple(held), again)
                if key not in places:
                    places[key] = len(found)
                    found.append(self._table(meta, held, again))
                conversions[part] = places[key]
                if len(tensor_axes(self.axes)) > 1:
                    hubs[part] = found[places[key]][1]
        return tuple(table for table, _ in found), conversions, hubs

    def _later(self, ops: list[Ways], outputs: Iterable[Output], conversions: Mapping[str, Table]) -> list[Ways | Op]:
        """The operators, and before each that reads a tensor behind what runs again, the one that hands it on."""
        found: list[Ways | Op] = []
        handed: set[str] = set()
        for operands, op in [*((op.operands, op) for op in ops), *(((o.tensor,), None) for o in outputs)]:
            for name in operands:
                if name.endswith(_LATER) and name not in handed:
                    handed.add(name)
                    first = name.removesuffix(_LATER)
                    ways = conversions[first].moves
                    layouts = dict.fromkeys([*self.held[name_now(first)], *(x for pair in ways for x in pair)])
                    choices = (Choice("", (layout,), layout, 0.0) for layout in layouts)
                    found.append(Op(name, (first,), tuple(choices)))
            if op is not None:
                found.append(op)
        return found

    def _table(self, meta: TensorMeta, held: dict[Layout, None], again: bool) -> tuple[Table, frozenset[Layout]]:
        """Direct conversions, and of the layouts those at which the way to several readers may part. ``again``:
        conversions run twice."""
        blocks = blocks_of(kind for layout in held for _, kind in layout.types)
        decides = self.answers.of(self.known.divisors.of_shape(meta.shape, blocks), blocks)
        key = (meta, tuple(held), again, decides)
        found = self.known.tables.get(key)
        if found is None:
            fitting = self.known.fitting.setdefault((meta.shape, decides), {})
            found = self.known.tables[key] = self._find_table(meta, held, again, fitting)
        return found

    def _find_table(
        self, meta: TensorMeta, held: dict[Layout, None], again: bool, fitting: dict[Layout, bool]
    ) -> tuple[Table, frozenset[Layout]]:
        grad = meta.requires_grad
        between = (R, I, P) if grad else (R,)
        kinds: dict[str, dict[SpmdType, None]] = {}
        for axis in self.axes:
            kinds[axis] = dict.fromkeys(layout[axis] for layout in held)
            if axis != CONTEXT:
                kinds[axis] |= dict.fromkeys(between)
        universe = held | dict.fromkeys(
            standard(dict(zip(kinds, types, strict=True)), meta.shape) for types in product(*kinds.values())
        )
        inner = tuple(tensor_axes(self.axes))
        for x in universe:
            if x not in fitting:
                fitting[x] = fits(meta.shape, x, self.axes, self.batch, self.seq)
        one = len(inner) < 2
        universe = {x: None for x in universe if fitting[x] and (one or x in held or _changes(x, inner) < 2)}
        hubs = {x for x in universe if inner and not _changes(x, inner) and x[inner[0]] in between}
        table = {}
        for a in universe:
            for axis, ways in kinds.items():
                if not convertible(a, axis):
                    continue
                whole = self._part(meta, [(other, kind) for other, kind in a.types if other != axis])
                for kind in ways:
                    step = direct(a[axis], kind, grad)
                    if step is None:
                        continue
                    after = b = a.with_type(axis, kind)
                    if len(self.axes) > 1:
                        b = standard({name: after[name] for name in self.axes}, meta.shape)
                    if b in universe and (b is after or same(b, after, grad)):
                        ahead, back = ((whole, action) for action in Action.of(axis, step))
                        move = (self.known.acts.of(ahead, ahead), self.known.acts.of(back, back))
                        table[a, b] = self.known.moves.of(move, move)
        return Table(table, again), frozenset(hubs | set(held))


_LATER = " later"
"""Ends the names of tensors as they are read behind what runs again."""


def name_now(tensor: str) -> str:
    """The node that a tensor of the problem is, whoever reads it; without its kind."""
    return tensor.rpartition("/")[2].removesuffix(_LATER)


def _used(places: Iterable[int], things: Sequence[T]) -> tuple[tuple[int, T], ...]:
    return tuple((place, things[place]) for place in dict.fromkeys(places))


def _changes(layout: Layout, axes: tuple[str, ...]) -> int:
    """How often the type changes from each axis to the next: once on the way from one type on all axes to another."""
    return sum(layout[a] != layout[b] for a, b in pairwise(axes))
