"""The least of a block kind's problem without the problem: a structure's tables (`block_tables`) are made once, and
filled with the seconds of each size of axes and each micro-batch (`kind_prices`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from autopar.graph.ir import EXPERTS
from autopar.solver.block_tables import BlockTables, Costs
from autopar.solver.kind_prices import KindPrices
from autopar.solver.linear import Floats
from autopar.solver.problem import Choice, Op, Problem, Source, layouts_of
from autopar.solver.structure import Structure, Ways

Places = np.ndarray[tuple[int, ...], np.dtype[np.intp]]


@dataclass(frozen=True, slots=True)
class _Ways:
    """The operations of an operator's ways, and of each which of its choices it is one of."""

    operations: Places
    choice: Places
    choices: int
    again: bool

    def of(self, prices: KindPrices) -> Floats:
        """The least seconds of each choice."""
        seconds: Floats = (prices.twice if self.again else prices.once)[self.operations]
        if self.choices < len(seconds):
            found = np.full(self.choices, inf)
            np.minimum.at(found, self.choice, seconds)
            return found
        return seconds


@dataclass(frozen=True, slots=True)
class _Alike:
    """Tables of conversions between equally many layouts: their places, and [table, from, to] the place of a direct
    conversion among those of the structure, once and twice, that of nothing behind them, and last that of none."""

    tables: list[int]
    moves: Places


class KindTables:
    """Those of one structure. Of ways of an operator with equal layouts the fastest stands for all, but of experts each
    stands for itself (`shared_bounds`). Raises TooWideError."""

    def __init__(self, structure: Structure) -> None:
        place = {of: index for index, (of, _) in enumerate(structure.operations)}
        self._ways: dict[str, _Ways] = {}
        ops: list[Op] = []
        for op in structure.ops:
            if isinstance(op, Op):
                ops.append(op)
                continue
            operations = [place[way.operation] for way in op.ways]
            apart = any(structure.operations[each][1].node.op == EXPERTS for each in operations)
            kept, choice = _choices(op, apart or not op.alike)
            self._ways[op.name] = _Ways(np.array(operations), np.array(choice), len(kept), op.again)
            named = tuple(Choice(op.ways[k].name, op.ways[k].inputs, op.ways[k].output, 0.0) for k in kept)
            ops.append(Op(op.name, op.operands, named))
        sources = tuple(Source(one.name, dict.fromkeys(one.layouts, (0.0, 0.0)), one.tie) for one in structure.sources)
        # In place of seconds, which `_by_size` finds by them, the places of moves.
        conversions = {name: structure.tables[of].moves for name, of in structure.conversions.items()}
        self._tables = BlockTables(
            Problem(sources, tuple(ops), conversions, structure.outputs, hubs=structure.hubs)  # type: ignore[arg-type]
        )
        self._alike = self._by_size(structure)

    def least(self, prices: KindPrices, operators: Sequence[str] = ()) -> Floats:
        """The least seconds of all answers, infinite where there is none: [way of each of some operators]. Raises
        TooWideError."""
        ops = [
            self._ways[op.name].of(prices) if op.name in self._ways else np.zeros(len(op.choices))
            for op in self._tables.problem.ops
        ]
        return self._tables.least(Costs(prices.sources(), ops, self._closed(prices)), operators)

    def _by_size(self, structure: Structure) -> list[_Alike]:
        twice = {id(table.moves): table.again for table in structure.tables}
        place = {of: index for index, (of, _) in enumerate(structure.moves)}
        found: dict[int, _Alike] = {}
        count = len(structure.moves)
        grouped: dict[int, list[tuple[int, Places]]] = {}
        for table, direct in enumerate(self._tables.direct):
            layouts = {layout: index for index, layout in enumerate(layouts_of(direct))}
            moves = np.full((len(layouts),) * 2, 2 * count + 1)
            np.fill_diagonal(moves, 2 * count)
            more = count if twice.get(id(direct), False) else 0
            for (a, b), move in direct.items():
                moves[layouts[a], layouts[b]] = place[int(move)] + more
            grouped.setdefault(len(layouts), []).append((table, moves))
        for size, some in grouped.items():
            found[size] = _Alike([table for table, _ in some], np.stack([moves for _, moves in some]))
        return list(found.values())

    def _closed(self, prices: KindPrices) -> list[Floats]:
        """Seconds of the cheapest conversions (Floyd-Warshall, all tables of a size at once)."""
        seconds = np.concatenate([prices.moved, prices.moved_twice, (0.0, inf)])
        closed: list[Floats] = [np.zeros((0, 0))] * len(self._tables.direct)
        for alike in self._alike:
            found = seconds[alike.moves]
            for via in range(found.shape[1]):
                np.minimum(found, found[:, :, via, None] + found[:, None, via, :], out=found)
            for place, table in zip(alike.tables, found, strict=True):
                closed[place] = table
        return closed


def _choices(op: Ways, apart: bool) -> tuple[list[int], list[int]]:
    """The first ways of those with equal layouts, and for each way which of these it is like."""
    if apart:
        return list(range(len(op.ways))), list(range(len(op.ways)))
    kept: dict[object, int] = {}
    choice = [kept.setdefault((way.inputs, way.output), len(kept)) for way in op.ways]
    return [choice.index(index) for index in range(len(kept))], choice
