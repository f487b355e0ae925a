"""The choice inside one block as an abstract problem: operators with strategies, tensors with layouts, conversions.

Nothing here knows what an operator or a layout is; layouts are any hashable values that print. `block_problem` makes
such a problem of a block kind, `intra_block` solves it, tests solve small ones by enumeration.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import inf

Layout = Hashable


@dataclass(frozen=True, slots=True)
class Choice:
    """One strategy of an operator: the layouts it reads (operand order) and makes, its seconds and its bytes.

    ``seconds``: forward and backward, internal collectives included. ``bytes``: what it keeps in memory, for problems
    that trade bytes against seconds.
    """

    name: str
    inputs: tuple[Layout, ...]
    output: Layout
    seconds: float
    bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Op:
    """An operator; the tensor it makes has its name. ``operands`` are tensor names, repeats allowed."""

    name: str
    operands: tuple[str, ...]
    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor that no operator makes: a boundary, batch tensor or parameter, in one of ``layouts``.

    ``layouts`` maps each layout it may arrive in to (seconds, bytes). Sources with the same ``tie`` arrive alike.
    """

    name: str
    layouts: dict[Layout, tuple[float, float]]
    tie: str = ""


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor that must leave in one of ``layouts``; the same as all sources and outputs of the same ``tie``."""

    tensor: str
    layouts: tuple[Layout, ...]
    tie: str = ""


@dataclass(frozen=True, slots=True)
class Problem:
    """Operators in execution order, sources, outputs, and per tensor the seconds of each direct conversion (from, to).

    ``conversions`` holds what is possible; anything else is not. Several outputs or operands may name one tensor.
    ``weights``: how often each operator and source counts in the objective (a block that occurs 32 times: 32), by the
    part of its name before the first "/"; 1 where nothing is said. ``hubs``: per tensor the layouts whose copies may be
    converted further for several readers; all, for a tensor that is not named.
    """

    sources: tuple[Source, ...]
    ops: tuple[Op, ...]
    conversions: dict[str, dict[tuple[Layout, Layout], float]]
    outputs: tuple[Output, ...]
    weights: dict[str, float] = field(default_factory=dict)
    hubs: dict[str, frozenset[Layout]] = field(default_factory=dict)

    def weight(self, name: str) -> float:
        """How often the part of the problem that ``name`` belongs to occurs."""
        return self.weights.get(name.partition("/")[0], 1.0) if self.weights else 1.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A feasible answer: strategy index per operator, layout per source and output, conversions in a valid order.

    ``seconds`` and ``bytes`` are exact sums. ``bound``: no answer has a lower ``seconds + price * bytes``.
    """

    strategies: dict[str, int]
    sources: dict[str, Layout]
    outputs: tuple[Layout, ...]
    conversions: tuple[tuple[str, Layout, Layout], ...]
    seconds: float
    bytes: float
    bound: float
    status: str = "optimal"
    statistics: dict[str, float] = field(default_factory=dict)


class Paths(Mapping[tuple[Layout, Layout], tuple[float, Layout]]):
    """All cheapest conversion paths: (from, to) to (seconds, the layout before ``to``); no pair of equal layouts.

    ``place``: of each layout in the rows and columns of ``seconds``, which are infinite where no path leads.
    """

    __slots__ = ("_before", "_layouts", "place", "seconds")

    def __init__(self, layouts: tuple[Layout, ...], seconds: list[list[float]], before: list[list[int]]) -> None:
        self._layouts, self._before = layouts, before
        self.place = {layout: index for index, layout in enumerate(layouts)}
        self.seconds = seconds

    def __getitem__(self, pair: tuple[Layout, Layout]) -> tuple[float, Layout]:
        i, j = self.place[pair[0]], self.place[pair[1]]
        if i == j or self.seconds[i][j] == inf:
            raise KeyError(pair)
        return self.seconds[i][j], self._layouts[self._before[i][j]]

    def __iter__(self) -> Iterator[tuple[Layout, Layout]]:
        for a, row in zip(self._layouts, self.seconds, strict=True):
            for b, each in zip(self._layouts, row, strict=True):
                if each < inf and a is not b:
                    yield a, b

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def ends(self) -> dict[Layout, None]:
        """The layouts that some path leads to, in order."""
        return dict.fromkeys(b for _, b in self)

    def between(self, starts: Iterable[Layout], ends: Iterable[Layout]) -> list[list[float]]:
        """Seconds from each of some layouts to each of others: zero for equal ones, infinite where no path leads."""
        place, none = self.place, len(self._layouts)
        columns = [place.get(b, none) for b in ends]
        found = []
        for a in starts:
            index = place.get(a, none)
            row = [*self.seconds[index], inf] if index < none else [inf] * (none + 1)
            found.append([row[column] for column in columns])
        return found


def layouts_of(direct: Iterable[tuple[Layout, Layout]]) -> tuple[Layout, ...]:
    """The layouts between which conversions lead, in order."""
    return tuple(dict.fromkeys([layout for pair in direct for layout in pair]))


def shortest(direct: Mapping[tuple[Layout, Layout], float]) -> Paths:
    """All cheapest conversion paths (Floyd-Warshall); seconds are not negative."""
    nodes = layouts_of(direct)
    place = {layout: index for index, layout in enumerate(nodes)}
    seconds = [[inf] * len(nodes) for _ in nodes]
    before = [[index] * len(nodes) for index in range(len(nodes))]
    for (a, b), each in direct.items():
        seconds[place[a]][place[b]] = each
    for index, row in enumerate(seconds):
        row[index] = 0.0
    for via, (tails, last) in enumerate(zip(seconds, before, strict=True)):
        reached = [(end, tail) for end, tail in enumerate(tails) if tail < inf and end != via]
        for row, ends in zip(seconds, before, strict=True):
            head = row[via]
            if head == inf or row is tails:
                continue
            for end, tail in reached:
                if head + tail < row[end]:
                    row[end] = head + tail
                    ends[end] = last[end]
    return Paths(nodes, seconds, before)


def path(best: Mapping[tuple[Layout, Layout], tuple[float, Layout]], a: Layout, b: Layout) -> list[Layout]:
    """The layouts of the cheapest path from ``a`` to ``b``, both included."""
    found = [b]
    while found[-1] != a:
        found.append(best[a, found[-1]][1])
    return found[::-1]


def price(problem: Problem, answer: Answer) -> tuple[float, float]:
    """(seconds, bytes) of an answer, checked from scratch. Raises ValueError where it is not a valid one."""
    seconds = size = 0.0
    held: dict[str, set[Layout]] = {}
    ties: dict[str, Layout] = {}
    for source in problem.sources:
        layout = answer.sources[source.name]
        _check_tie(source.name, source.tie, layout, ties)
        held[source.name] = {layout}
        seconds += problem.weight(source.name) * source.layouts[layout][0]
        size += problem.weight(source.name) * source.layouts[layout][1]
    moves: dict[str, list[tuple[Layout, Layout]]] = {}
    for tensor, a, b in answer.conversions:
        moves.setdefault(tensor, []).append((a, b))
    for op in problem.ops:
        for tensor in op.operands:
            seconds += _move(problem, tensor, moves.pop(tensor, ()), held)
        choice = op.choices[answer.strategies[op.name]]
        for tensor, layout in zip(op.operands, choice.inputs, strict=True):
            if layout not in held[tensor]:
                raise ValueError(f"{op.name} reads {tensor} as {layout}, which nothing makes")
        held[op.name] = {choice.output}
        seconds += problem.weight(op.name) * choice.seconds
        size += problem.weight(op.name) * choice.bytes
    for output, layout in zip(problem.outputs, answer.outputs, strict=True):
        _check_tie(f"output {output.tensor}", output.tie, layout, ties)
        seconds += _move(problem, output.tensor, moves.pop(output.tensor, ()), held)
        if layout not in held[output.tensor] or layout not in output.layouts:
            raise ValueError(f"output {output.tensor} never takes layout {layout}")
    if moves:
        raise ValueError(f"conversions of tensors that nothing reads: {sorted(moves)}")
    return seconds, size


def _check_tie(name: str, tie: str, layout: Layout, ties: dict[str, Layout]) -> None:
    if tie and ties.setdefault(tie, layout) != layout:
        raise ValueError(f"{name} is held as {layout}, what it is tied to as {ties[tie]}")


def _move(problem: Problem, tensor: str, moves: Iterable[tuple[Layout, Layout]], held: dict[str, set[Layout]]) -> float:
    seconds = 0.0
    for a, b in moves:
        if a not in held[tensor]:
            raise ValueError(f"{tensor} is converted from {a}, which nothing made")
        held[tensor].add(b)
        seconds += problem.conversions[tensor][a, b]
    return problem.weight(tensor) * seconds
