"""The choice inside one block as an abstract problem: operators with strategies, tensors with layouts, conversions.

Nothing here knows what an operator or a layout is; layouts are any hashable values that print. `block_problem` makes
such a problem of a block kind, `intra_block` solves it, tests solve small ones by enumeration.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
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


def produced(problem: Problem) -> dict[str, tuple[Layout, ...]]:
    """For each tensor, the layouts its producer can make, in a fixed order."""
    made: dict[str, tuple[Layout, ...]] = {source.name: tuple(source.layouts) for source in problem.sources}
    for op in problem.ops:
        made[op.name] = tuple(dict.fromkeys(choice.output for choice in op.choices))
    return made


def shortest(direct: Mapping[tuple[Layout, Layout], float]) -> dict[tuple[Layout, Layout], tuple[float, Layout]]:
    """All cheapest conversion paths (Floyd-Warshall): (from, to) to (seconds, the layout before ``to``)."""
    nodes = tuple(dict.fromkeys(layout for pair in direct for layout in pair))
    place = {layout: index for index, layout in enumerate(nodes)}
    seconds = [[inf] * len(nodes) for _ in nodes]
    before = [[index] * len(nodes) for index in range(len(nodes))]
    for (a, b), each in direct.items():
        if a != b:
            seconds[place[a]][place[b]] = each
    for via, (tails, last) in enumerate(zip(seconds, before, strict=True)):
        reached = [index for index, tail in enumerate(tails) if tail < inf]
        for start, row in enumerate(seconds):
            head = row[via]
            if head == inf:
                continue
            ends = before[start]
            for end in reached:
                if head + tails[end] < row[end] and end != start:
                    row[end] = head + tails[end]
                    ends[end] = last[end]
    return {
        (a, b): (seconds[i][j], nodes[before[i][j]])
        for i, a in enumerate(nodes)
        for j, b in enumerate(nodes)
        if seconds[i][j] < inf
    }


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
