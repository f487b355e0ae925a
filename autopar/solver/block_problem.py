"""From block kinds to one abstract problem and back: strategies and conversions priced on all model axes at once.

A layout of the abstract problem is a `Layout`; a choice is one strategy on each axis (`axis_choices`). Every kind's
nodes are named "kind/node". The layout of what passes between blocks is one tie per tensor that is handed on (found by
following the blocks' inputs), so that one layout holds along the whole chain; parameters of different kinds that are
one tensor are tied as well.

What the tables of `fix` mean here: with ``tp`` fixed, every matmul with a feature factor that divides splits one
(`feature_splits`); ``sp`` fixes the layout between blocks, split by sequence or invariant (`boundary_layouts`).

A conversion changes one axis, and leads to a layout in the standard order of splits (`sharding.local.standard`): on a
dim that several axes split, the innermost changes first. Layouts through which a tensor may pass are products of the
types it is made, stored or read in on each axis, of R, and of I and P where it has a gradient; over the axes that tp is
made of such a product changes type once at most.

Of a kind that is recomputed, backward runs the operators up to the last one that saves something again, and the
conversions that these read (`recompute.runs_again`): they count twice. A tensor that is read there and behind is two
tensors, the second for the readers behind: it starts as any layout that the first has, and its conversions count once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod

from autopar.graph.ir import BlockKind, ModelGraph, Node
from autopar.sharding.check import fits
from autopar.sharding.conversions import convertible, direct, plain, same
from autopar.sharding.layout import CONTEXT, I, Layout, P, R, SpmdType
from autopar.sharding.local import local_shape, produced_layouts, standard
from autopar.solver.axis_choices import (
    NO_DEMANDS,
    AxesChoice,
    Demands,
    boundary_layouts,
    check_axes,
    choices_of,
    feature_splits,
    sequence_split,
    stored_layouts,
    tensor_axes,
)
from autopar.solver.prices import AxisPrices, Price
from autopar.solver.problem import Choice, Op, Output, Problem, Source
from autopar.solver.recompute import NOTHING_AGAIN, runs_again

__all__ = ["Demands", "ModelProblem", "Ties", "feature_splits", "model_problem", "name_now", "ties_of"]

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


@dataclass(frozen=True, slots=True)
class Ties:
    """``boundary``: (kind, input node) and (kind, "out", index) to the name of the layout they share; ``parameters``:
    (kind, parameter node) to the tied tensor's name; ``first``: the kind that owns each tied tensor's memory."""

    boundary: dict[tuple[str, ...], str]
    parameters: dict[tuple[str, str], str]


def ties_of(model: ModelGraph) -> Ties:
    """The layouts that must agree between blocks."""
    parent: dict[tuple[str, ...], tuple[str, ...]] = {}

    def find(x: tuple[str, ...]) -> tuple[str, ...]:
        while parent.setdefault(x, x) != x:
            x = parent[x]
        return x

    for block in model.blocks:
        for node, source in block.inputs.items():
            if source.origin == "block":
                made = (model.blocks[source.block].kind, "out", str(source.index))
                parent[find((block.kind, node))] = find(made)
    roots = {x: find(x) for x in list(parent)}
    names = {root: f"boundary{index}" for index, root in enumerate(dict.fromkeys(roots.values()))}
    group_of = {name: group[0] for group in model.tied for name in group}
    parameters: dict[tuple[str, str], str] = {}
    for block in model.blocks:
        for parameter in model.kinds[block.kind].graph.of("parameter"):
            full = block.parameters[parameter.target]
            if full in group_of:
                parameters[block.kind, parameter.name] = f"tied {group_of[full]}"
    return Ties({x: names[root] for x, root in roots.items()}, parameters)


@dataclass(frozen=True, slots=True)
class ModelProblem:
    """The abstract problem of all block kinds on these axes, and the strategies its choices stand for."""

    problem: Problem
    choices: dict[str, tuple[AxesChoice, ...]]
    axes: dict[str, int]


def model_problem(
    model: ModelGraph,
    prices: AxisPrices,
    ties: Ties,
    demands: Demands = NO_DEMANDS,
    resident_price: float = 0.0,
    again: frozenset[str] = frozenset(),
) -> ModelProblem:
    """All kinds of ``model``, each weighted with how many blocks it has.

    ``resident_price``: seconds per micro-batch that each parameter element that trains costs. ``again``: kinds that are
    recomputed in backward. Raises UnsupportedError where sequences cannot be split over cp.
    """
    check_axes(model, prices.axes, prices.job.seq_len, demands.sequence)
    sources: list[Source] = []
    ops: list[Op] = []
    outputs: list[Output] = []
    conversions: dict[str, dict[tuple[Layout, Layout], float]] = {}
    hubs: dict[str, frozenset[Layout]] = {}
    choices: dict[str, tuple[AxesChoice, ...]] = {}
    weights = {kind: float(sum(block.kind == kind for block in model.blocks)) for kind in model.kinds}
    for kind in model.kinds.values():
        build = _KindProblem(kind, prices, ties, demands, resident_price, kind.name in again)
        sources += build.sources
        outputs += build.outputs
        choices |= build.choices
        ways = build.conversions()
        conversions |= ways
        ops += build.later(ways)
        hubs |= build.hubs
    problem = Problem(tuple(sources), tuple(ops), conversions, tuple(outputs), weights, hubs)  # type: ignore[arg-type]
    return ModelProblem(problem, choices, dict(prices.axes))


class _KindProblem:
    """One kind's part of the problem."""

    def __init__(
        self, kind: BlockKind, prices: AxisPrices, ties: Ties, demands: Demands, resident: float, again: bool
    ) -> None:
        self.kind, self.graph, self.prices, self.ties = kind, kind.graph, prices, ties
        self.axes, self.batch, self.seq = prices.axes, prices.batch, prices.job.seq_len
        self.demands, self.resident = demands, resident
        self.again = runs_again(kind) if again else NOTHING_AGAIN
        self.choices: dict[str, tuple[AxesChoice, ...]] = {}
        self.held: dict[str, dict[Layout, None]] = {name: {} for name in self.graph.nodes}
        self.hubs: dict[str, frozenset[Layout]] = {}
        self._operands = {node.name: node.operands() for node in self.graph.of("op")}
        self._readers = {name: frozenset(users) for name, users in self.graph.users().items()}
        self._possible = {node.name: self._choices(node) for node in self.graph.of("op")}
        self._layouts = {
            name: [produced_layouts(self.graph.nodes[name], choice) for choice in possible]
            for name, possible in self._possible.items()
        }
        self._tables: dict[object, tuple[dict[tuple[Layout, Layout], float], frozenset[Layout]]] = {}
        self._parted = {name for name in self.graph.nodes if self._is_parted(name)} if again else set()
        self.sources = [self._source(node) for node in self.graph.nodes.values() if node.kind != "op"]
        self.ops = [self._op(node) for node in self.graph.of("op")]
        self.outputs = [self._output(index, name) for index, name in enumerate(self.graph.outputs)]

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

    def _plain(self, node: str, layout: Layout) -> Layout:
        """``layout`` as the problem's layout of ``node``: equal for what holds it alike, and noted as held."""
        meta = self.graph.nodes[node].meta
        if len(self.axes) > 1:
            types = {axis: plain(layout[axis], meta.requires_grad) for axis in self.axes}
            found = standard(types, meta.shape)
            assert same(found, layout, meta.requires_grad), (node, found, layout)
            layout = found
        elif not meta.requires_grad:
            layout = Layout(tuple((axis, plain(kind, False)) for axis, kind in layout.types))
        self.held[node].setdefault(layout)
        return layout

    def _whole(self) -> Layout:
        return Layout(tuple((axis, I) for axis in self.axes))

    def _source(self, node: Node) -> Source:
        tie = self.ties.boundary.get((self.kind.name, node.name), "")
        options: dict[Layout, tuple[float, float]]
        if tie:
            options = {self._plain(node.name, layout): (0.0, 0.0) for layout in self._boundary(node)}
        elif node.kind == "parameter":
            tie = self.ties.parameters.get((self.kind.name, node.name), "")
            share = (1.0 if not tie else 0.5) if node.meta.requires_grad else 0.0
            options = {}
            for layout in stored_layouts(node.meta, self.axes, self._read_as(node.name)):
                held = prod(local_shape(node.meta.at(1, 1), layout, self.axes))
                options[self._plain(node.name, layout)] = (self.resident * held * share, 0.0)
        else:
            options = {self._plain(node.name, self._whole()): (0.0, 0.0)}
        return Source(self._name(node.name), options, tie)  # type: ignore[arg-type]

    def _boundary(self, node: Node) -> tuple[Layout, ...]:
        return boundary_layouts(node.meta, self.axes, self.batch, self.seq, self.demands.sequence)

    def _read_as(self, name: str) -> list[Layout]:
        """The layouts in which some operator may read a tensor."""
        found: dict[Layout, None] = {}
        for user, operands in self._operands.items():
            for place in (index for index, operand in enumerate(operands) if operand == name):
                found |= {inputs[place]: None for inputs, _ in self._layouts[user]}
        return list(found)

    def _choices(self, node: Node) -> list[AxesChoice]:
        return choices_of(node, self.graph, self.axes, self.batch, self.seq, self.demands.split_matmuls)

    def _op(self, node: Node) -> Op:
        possible = self._possible[node.name]
        choices = []
        names = self._operands[node.name]
        for choice, (layouts, made) in zip(possible, self._layouts[node.name], strict=True):
            price, _ = self.prices.operator(node, self.graph, choice)
            inputs = tuple(self._plain(n, t) for n, t in zip(names, layouts, strict=True))
            output = self._plain(node.name, made)
            label = ", ".join(dict.fromkeys(strategy.name for strategy in choice.values()))
            seconds = _seconds(price, node.name in self.again.runs)
            choices.append(Choice(label, inputs, output, seconds, self._kept(node, layouts)))
        kept = _undominated(choices)
        self.choices[self._name(node.name)] = tuple(possible[index] for index in kept)
        operands = tuple(self._read_name(name, node.name) for name in names)
        return Op(self._name(node.name), operands, tuple(choices[index] for index in kept))

    def _kept(self, node: Node, layouts: tuple[Layout, ...]) -> float:
        """About how many bytes the operator keeps for backward; a tensor that several read counts once for each."""
        if node.op in _KEEP_NOTHING or not node.meta.requires_grad:
            return 0.0
        kept = 0.0
        for name, layout in zip(self._operands[node.name], layouts, strict=True):
            operand = self.graph.nodes[name]
            if operand.kind != "parameter":
                kept += self.prices.local(operand.meta, layout).nbytes
        return kept

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

    def conversions(self) -> dict[str, dict[tuple[Layout, Layout], float]]:
        """Per tensor, the direct conversions between the layouts it may be made, held or read in or pass through."""
        found = {}
        for name, held in self.held.items():
            parts = {self._name(name): bool(self._readers[name] & self.again.reads)}
            if name in self._parted:
                parts[self._name(name) + _LATER] = False
            for part, again in parts.items():
                key = (self.graph.nodes[name].meta, tuple(held), again)
                if key not in self._tables:
                    self._tables[key] = self._table(self.graph.nodes[name], list(held), again)
                found[part], hubs = self._tables[key]
                if len(tensor_axes(self.axes)) > 1:
                    self.hubs[part] = hubs
        return found

    def later(self, conversions: Mapping[str, Mapping[tuple[Layout, Layout], float]]) -> list[Op]:
        """The operators, and before each that reads a tensor behind what runs again, the one that hands it on."""
        ops: list[Op] = []
        handed: set[str] = set()
        for operands, op in [*((op.operands, op) for op in self.ops), *(((o.tensor,), None) for o in self.outputs)]:
            for name in operands:
                if name.endswith(_LATER) and name not in handed:
                    handed.add(name)
                    first = name.removesuffix(_LATER)
                    ways = conversions[first]
                    layouts = dict.fromkeys([*self.held[name_now(first)], *(x for pair in ways for x in pair)])
                    choices = (Choice("", (layout,), layout, 0.0) for layout in layouts)
                    ops.append(Op(name, (first,), tuple(choices)))
            if op is not None:
                ops.append(op)
        return ops

    def _table(
        self, node: Node, held: list[Layout], again: bool
    ) -> tuple[dict[tuple[Layout, Layout], float], frozenset[Layout]]:
        """Direct conversions, and of the layouts those at which the way to several readers may part. ``again``:
        conversions run twice."""
        meta, grad = node.meta, node.meta.requires_grad
        between = (R, I, P) if grad else (R,)
        kinds: dict[str, dict[SpmdType, None]] = {}
        for axis in self.axes:
            kinds[axis] = dict.fromkeys(layout[axis] for layout in held)
            if axis != CONTEXT:
                kinds[axis] |= dict.fromkeys(between)
        universe = dict.fromkeys(held) | dict.fromkeys(
            standard(dict(zip(kinds, types, strict=True)), meta.shape) for types in product(*kinds.values())
        )
        inner = tuple(tensor_axes(self.axes))
        universe = {
            x: None
            for x in universe
            if (x in held or _changes(x, inner) < 2) and fits(meta.shape, x, self.axes, self.batch, self.seq)
        }
        hubs = {x for x in universe if inner and not _changes(x, inner) and x[inner[0]] in between}
        table = {}
        for a in universe:
            for axis, ways in kinds.items():
                if not convertible(a, axis):
                    continue
                tensor = self.prices.across(meta, a, axis)
                for kind in ways:
                    step = direct(a[axis], kind, grad)
                    if step is None:
                        continue
                    after = b = a.with_type(axis, kind)
                    if len(self.axes) > 1:
                        b = standard({name: after[name] for name in self.axes}, meta.shape)
                    if b in universe and (b is after or same(b, after, grad)):
                        table[a, b] = _seconds(self.prices.moved(tensor, axis, step), again)
        return table, frozenset(hubs | set(held))


_LATER = " later"
"""Ends the names of tensors as they are read behind what runs again."""


def name_now(tensor: str) -> str:
    """The node that a tensor of the problem is, whoever reads it; without its kind."""
    return tensor.rpartition("/")[2].removesuffix(_LATER)


def _seconds(price: Price, again: bool) -> float:
    return price.seconds + (price.forward_s if again else 0.0)


def _changes(layout: Layout, axes: tuple[str, ...]) -> int:
    """How often the type changes from each axis to the next: once on the way from one type on all axes to another."""
    return sum(layout[a] != layout[b] for a, b in pairwise(axes))


def _undominated(choices: list[Choice]) -> list[int]:
    """Indices without choices that another one with the same layouts beats or equals in seconds and bytes."""
    best: dict[tuple[object, ...], int] = {}
    kept: list[int] = []
    for index, choice in enumerate(choices):
        key = (choice.inputs, choice.output)
        other = best.get(key)
        if other is not None and choices[other].seconds <= choice.seconds and choices[other].bytes <= choice.bytes:
            continue
        best.setdefault(key, index)
        kept.append(index)
    return kept
