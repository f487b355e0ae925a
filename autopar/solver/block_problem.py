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

from autopar.graph.ir import ModelGraph
from autopar.sharding.layout import Layout
from autopar.solver.axis_choices import NO_DEMANDS, AxesChoice, Demands, check_axes, feature_splits
from autopar.solver.kind_prices import KindPrices
from autopar.solver.kind_structure import name_now, structure_of
from autopar.solver.prices import AxisPrices
from autopar.solver.problem import Choice, Op, Output, Problem, Source
from autopar.solver.shared_bounds import Sharing
from autopar.solver.ties import Ties, ties_of

__all__ = ["Demands", "ModelProblem", "Ties", "feature_splits", "model_problem", "name_now", "ties_of"]


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
    weights = {kind: float(sum(block.kind == kind for block in model.blocks)) for kind in model.kinds}
    for kind in model.kinds.values():
        structure = structure_of(kind, prices, ties, demands, kind.name in again, memo)
        priced = KindPrices(structure, prices, resident_price, sharing)
        sources += _sources(priced)
        outputs += structure.outputs
        conversions |= _conversions(priced)
        ops += _ops(priced, choices)
        hubs |= structure.hubs
    problem = Problem(tuple(sources), tuple(ops), conversions, tuple(outputs), weights, hubs)  # type: ignore[arg-type]
    return ModelProblem(problem, choices, dict(prices.axes))


def _sources(prices: KindPrices) -> list[Source]:
    return [
        Source(
            source.name,
            {layout: (float(each), 0.0) for layout, each in zip(source.layouts, seconds, strict=True)},
            source.tie,
        )
        for source, seconds in zip(prices.structure.sources, prices.sources(), strict=True)
    ]


def _ops(prices: KindPrices, choices: dict[str, tuple[AxesChoice, ...]]) -> list[Op]:
    """The operators; notes in ``choices`` what theirs stand for."""
    structure = prices.structure
    sizes = {place: part.nbytes for place, part in prices.parts.items()}
    places = [place for place, _ in structure.operations]
    once = dict(zip(places, prices.once.tolist(), strict=True))
    twice = dict(zip(places, prices.twice.tolist(), strict=True))
    found = []
    for op in structure.ops:
        if isinstance(op, Op):
            found.append(op)
            continue
        seconds = twice if op.again else once
        priced = [
            Choice(
                way.name, way.inputs, way.output, seconds[way.operation], float(sum([sizes[part] for part in way.kept]))
            )
            for way in op.ways
        ]
        # Of experts that may be shared another way may be the best for each number of ranks.
        kept = _undominated(priced) if op.alike and not prices.experts else range(len(priced))
        choices[op.name] = tuple([op.choices[index] for index in kept])
        found.append(Op(op.name, op.operands, tuple([priced[index] for index in kept])))
    return found


def _conversions(prices: KindPrices) -> dict[str, dict[tuple[Layout, Layout], float]]:
    """Per tensor, the seconds of its direct conversions; tensors alike share one table."""
    structure = prices.structure
    places = [place for place, _ in structure.moves]
    once = dict(zip(places, prices.moved.tolist(), strict=True))
    twice = dict(zip(places, prices.moved_twice.tolist(), strict=True))
    tables = []
    for table in structure.tables:
        seconds = twice if table.again else once
        tables.append({pair: seconds[move] for pair, move in table.moves.items()})
    return {name: tables[place] for name, place in structure.conversions.items()}


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
