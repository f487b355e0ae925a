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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autopar.graph.ir import EXPERTS, BlockKind, ModelGraph
from autopar.sharding.layout import Layout
from autopar.solver.axis_choices import NO_DEMANDS, AxesChoice, Demands, check_axes, feature_splits
from autopar.solver.kind_structure import KindStructures, name_now
from autopar.solver.prices import AxisPrices
from autopar.solver.problem import Choice, Op, Output, Problem, Source
from autopar.solver.shared_bounds import Shared, Sharing, least_of
from autopar.solver.structure import Structure, Ways
from autopar.solver.ties import Ties, ties_of

__all__ = ["Demands", "ModelProblem", "Ties", "feature_splits", "model_problem", "name_now", "ties_of"]


@dataclass(frozen=True, slots=True)
class ModelProblem:
    """The abstract problem of all block kinds on these axes, and the strategies its choices stand for. ``shared``: of
    experts that may be shared, all that they may do; ``held``: of their parameters, the seconds that holding them takes
    at least if none are; ``least``: of other operators, the least seconds forward and the least backward of any
    choice."""

    problem: Problem
    choices: dict[str, tuple[AxesChoice, ...]]
    axes: dict[str, int]
    shared: dict[str, list[Shared]]
    held: dict[str, float]
    least: dict[str, tuple[float, float]]


def model_problem(
    model: ModelGraph,
    prices: AxisPrices,
    ties: Ties,
    demands: Demands = NO_DEMANDS,
    resident_price: float = 0.0,
    again: frozenset[str] = frozenset(),
    memo: dict[Any, Any] | None = None,
    sharing: Sharing | None = None,
) -> ModelProblem:
    """All kinds of ``model``, each weighted with how many blocks it has.

    ``resident_price``: seconds per micro-batch that each parameter element that trains costs. ``again``: kinds that are
    recomputed in backward. ``memo``: where to remember structures, of one model and its ties only. ``sharing``: the
    problem is that of `shared_bounds`. Raises UnsupportedError where sequences cannot be split over cp.
    """
    check_axes(model, prices.axes, prices.job.seq_len, demands.sequence)
    memo = {} if memo is None else memo
    sources: list[Source] = []
    ops: list[Op] = []
    outputs: list[Output] = []
    conversions: dict[str, dict[tuple[Layout, Layout], float]] = {}
    hubs: dict[str, frozenset[Layout]] = {}
    choices: dict[str, tuple[AxesChoice, ...]] = {}
    shared: dict[str, list[Shared]] = {}
    held: dict[str, float] = {}
    least: dict[str, tuple[float, float]] = {}
    weights = {kind: float(sum(block.kind == kind for block in model.blocks)) for kind in model.kinds}
    for kind in model.kinds.values():
        structure = _structure(kind, prices, ties, demands, kind.name in again, memo)
        priced = _Priced(structure, prices, sharing)
        sources += priced.sources(resident_price, held)
        outputs += structure.outputs
        conversions |= priced.conversions()
        ops += priced.ops(choices, shared, least)
        hubs |= structure.hubs
    problem = Problem(tuple(sources), tuple(ops), conversions, tuple(outputs), weights, hubs)  # type: ignore[arg-type]
    return ModelProblem(problem, choices, dict(prices.axes), shared, held, least)


def _structure(
    kind: BlockKind, prices: AxisPrices, ties: Ties, demands: Demands, again: bool, memo: dict[Any, Any]
) -> Structure:
    key = ("structures", kind.name, demands)
    if key not in memo:
        memo[key] = KindStructures(kind, ties, demands)
    structures = memo[key]
    assert isinstance(structures, KindStructures)
    return structures.of(prices.axes, prices.batch, prices.job.seq_len, again)


class _Priced:
    """A structure with the seconds and bytes of axes of one size and one micro-batch."""

    def __init__(self, structure: Structure, prices: AxisPrices, sharing: Sharing | None) -> None:
        self.structure, self.prices, self.sharing = structure, prices, sharing
        self.parts = {place: prices.held(part) for place, part in structure.parts}

    def sources(self, resident: float, held: dict[str, float]) -> list[Source]:
        """``resident``: seconds that an element of a parameter that trains costs; notes in ``held`` what that class
        says of them."""
        found = []
        free = self.sharing.held if self.sharing else frozenset()
        for source in self.structure.sources:
            share = source.share
            if source.name in free:
                elements = min(self.parts[part].elements for part in source.layouts.values())
                held[source.name], share = resident * elements * share, 0.0
            options = {
                layout: (resident * self.parts[part].elements * share if share else 0.0, 0.0)
                for layout, part in source.layouts.items()
            }
            found.append(Source(source.name, options, source.tie))  # type: ignore[arg-type]
        return found

    def ops(
        self,
        choices: dict[str, tuple[AxesChoice, ...]],
        shared: dict[str, list[Shared]],
        least: dict[str, tuple[float, float]],
    ) -> list[Op]:
        """The operators; notes in ``choices`` what theirs stand for, and in ``shared`` and ``least`` what that class
        says of them."""
        parts = self.parts
        experts: dict[int, Shared] = {}
        once: dict[int, float] = {}
        twice: dict[int, float] = {}
        halves: dict[int, tuple[float, float]] = {}
        for place, each in self.structure.operations:
            inside = [(inner, parts[part]) for inner, part in each.inside]
            inputs = [parts[part] for part in each.inputs]
            if self.sharing and each.node.op == EXPERTS:
                experts[place] = self.sharing.prices(self.prices, each.node, inputs, parts[each.output], each.grads)
                once[place], twice[place] = (least_of(experts[place], again) for again in (False, True))
                continue
            price, _ = self.prices.timed(each.node, inputs, parts[each.output], each.grads, inside)
            once[place] = price.seconds
            twice[place] = price.seconds + price.forward_s
            halves[place] = price.forward_s, price.backward_s
        sizes = {place: part.nbytes for place, part in parts.items()}
        found = []
        for op in self.structure.ops:
            if isinstance(op, Ways):
                seconds = twice if op.again else once
                if op.ways[0].operation in experts:
                    shared[op.name] = [experts[way.operation] for way in op.ways]
                priced = tuple(
                    [
                        Choice(
                            way.name,
                            way.inputs,
                            way.output,
                            seconds[way.operation],
                            float(sum([sizes[part] for part in way.kept])),
                        )
                        for way in op.ways
                    ]
                )
                # Of experts that may be shared another way may be the best for each number of ranks.
                kept = _undominated(priced) if op.alike and op.name not in shared else range(len(priced))
                priced = tuple([priced[index] for index in kept])
                choices[op.name] = tuple([op.choices[index] for index in kept])
                if op.name not in shared:
                    forward, backward = zip(*(halves[op.ways[index].operation] for index in kept), strict=True)
                    least[op.name] = min(forward), min(backward)
                found.append(Op(op.name, op.operands, priced))
            else:
                found.append(op)
        return found

    def conversions(self) -> dict[str, dict[tuple[Layout, Layout], float]]:
        """Per tensor, the seconds of its direct conversions; tensors alike share one table."""
        once: dict[int, float] = {}
        twice: dict[int, float] = {}
        for place, (part, axis, step) in self.structure.moves:
            price = self.prices.moved(self.parts[part], axis, step)
            once[place] = price.seconds
            twice[place] = price.seconds + price.forward_s
        tables = []
        for table in self.structure.tables:
            seconds = twice if table.again else once
            tables.append({pair: seconds[move] for pair, move in table.moves.items()})
        return {name: tables[place] for name, place in self.structure.conversions.items()}


def _undominated(choices: Sequence[Choice]) -> list[int]:
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
