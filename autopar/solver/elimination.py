"""The least of a sum of tables, each of a few variables, by eliminating one variable after the other.

All tables that depend on a variable are added up, and of the sum the least over the variable is kept: a table of its
neighbours. This is exact (nonserial dynamic programming: Bertelè and Brioschi, 1972; bucket elimination: Dechter,
Artificial Intelligence 113, 1999). What it takes is the number of entries of the sums, which depends on the order:
finding the best is NP-hard; ours are greedy, by the pairs of variables that an elimination brings together anew, each
by how many bits its values have (weighted least fill), and of several such, ties and near ties broken differently, the
one with fewest entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush
from itertools import combinations
from math import inf, log2, prod
from random import Random
from typing import Any

import numpy as np

from autopar.solver.linear import Floats

TRIES = ((3_000_000, 5), (20_000_000, 15))
"""Where orders have more entries than so many, so many more are tried."""

MANY = 64
"""Neighbours of a variable beyond which it is left for later."""

BLUR = 0.8
"""By how much of themselves scores may differ between tries."""

LARGE = 100_000
"""Entries of a sum from which on it is found in parts."""

Scope = tuple[int, ...]
"""The variables of a table, ascending: its axes."""


@dataclass(frozen=True, slots=True)
class Sum:
    """The ``tables`` (places: those given, then those made) that are added up, reshaped to ``shapes``: axes meet.
    ``grown``: as many of the first as give the sum its shape."""

    tables: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    grown: int

    def of(self, held: Sequence[Floats]) -> Floats:
        found: Floats = np.zeros(())
        for index, (place, shape) in enumerate(zip(self.tables, self.shapes, strict=True)):
            each = held[place].reshape(shape)
            if index < self.grown:
                found = found + each
            else:
                found += each
        return found


@dataclass(frozen=True, slots=True)
class Step:
    """``variable`` is eliminated, at ``axis`` of a sum of so many ``entries``; ``rest`` are its other axes."""

    variable: int
    sum: Sum
    axis: int
    rest: Scope
    entries: int


@dataclass(frozen=True, slots=True)
class Order:
    """All steps, what is ``left`` at the end, the entries of all sums, and how many variables there are."""

    steps: tuple[Step, ...]
    left: Sum
    entries: int
    variables: int


def least(order: Order, tables: Sequence[Floats]) -> Floats:
    """The least sum, infinite where none is possible: [value of each variable that is kept]. ``tables`` in the order of
    the scopes that ``order`` is of."""
    return order.left.of(_made(order, tables))


def best(order: Order, tables: Sequence[Floats]) -> tuple[float, list[int]]:
    """The least sum, and the value of each variable there (0 of one of no table), of equals the first in the order of
    elimination; none of them kept."""
    held = _made(order, tables)
    values = [0] * order.variables
    for step in reversed(order.steps):
        # What was eliminated later is known, so of the sum one line is left.
        place: list[Any] = [values[variable] for variable in step.rest]
        place.insert(step.axis, slice(None))
        line: Floats = np.zeros(())
        for table, shape in zip(step.sum.tables, step.sum.shapes, strict=True):
            at = tuple([one if size > 1 or one == slice(None) else 0 for one, size in zip(place, shape, strict=True)])
            line = np.add(line, held[table].reshape(shape)[at])
        values[step.variable] = int(line.argmin())
    return float(order.left.of(held)), values


def _made(order: Order, tables: Sequence[Floats]) -> list[Floats]:
    """The tables, and those that eliminating makes."""
    held = [*tables]
    for step in order.steps:
        in_parts = step.entries >= LARGE and step.rest
        held.append(_least_of_lines(step, held) if in_parts else step.sum.of(held).min(step.axis))
    return held


def _least_of_lines(step: Step, held: Sequence[Floats]) -> Floats:
    """The same, value by value of the variable: of a large sum a part at a time, which stays in a processor's cache."""
    tables = [held[place].reshape(shape) for place, shape in zip(step.sum.tables, step.sum.shapes, strict=True)]
    ahead: tuple[Any, ...] = (slice(None),) * step.axis
    found: Floats | None = None
    for value in range(max(table.shape[step.axis] for table in tables)):
        lines = [table[(*ahead, value if table.shape[step.axis] > 1 else 0)] for table in tables]
        total = lines[0] + lines[1] if len(lines) > 1 else lines[0].copy()
        for index, line in enumerate(lines[2:], 2):
            total = total + line if index < step.sum.grown else np.add(total, line, out=total)
        found = total if found is None else np.minimum(found, total, out=found)
    assert found is not None
    return found


@lru_cache(maxsize=1024)
def order_of(sizes: tuple[int, ...], scopes: tuple[Scope, ...], kept: Scope = ()) -> Order:
    """A good order for variables of these sizes and tables of these scopes. Those that are ``kept`` are not eliminated,
    and those of no table need not be."""
    rough = tuple(1 << round(log2(size)) for size in sizes)  # what is good for sizes is good for others like them
    return _order(sizes, scopes, kept, _variables(rough, scopes, kept))


@lru_cache(maxsize=1024)
def _variables(sizes: tuple[int, ...], scopes: tuple[Scope, ...], kept: Scope) -> list[int]:
    entries, variables = _greedy(sizes, scopes, kept, None)
    for seed, (many, tries) in enumerate(TRIES):
        drawn = Random(seed)
        if entries > many:
            entries, variables = min((entries, variables), *(_greedy(sizes, scopes, kept, drawn) for _ in range(tries)))
    return variables


def _greedy(sizes: Sequence[int], scopes: Sequence[Scope], kept: Scope, drawn: Random | None) -> tuple[int, list[int]]:
    """Entries, and the variables in the order that they are eliminated in."""
    near: dict[int, set[int]] = {variable: set() for scope in (*scopes, kept) for variable in scope}
    for scope in (*scopes, kept):
        for variable in scope:
            near[variable].update(scope)
    for variable, others in near.items():
        others.discard(variable)

    bits = [log2(size) for size in sizes]
    latest: dict[int, tuple[float, int, int]] = {}
    queue: list[tuple[float, int, int]] = []

    def score(variable: int) -> None:
        others = near[variable]
        fill = inf  # of one with very many it would take long to say
        if len(others) <= MANY:
            fill = sum([bits[a] * bits[b] for a, b in combinations(others, 2) if b not in near[a]], 0.0)
        blur = 1 + BLUR * drawn.random() if drawn else 1.0
        latest[variable] = fill * blur, prod([sizes[a] for a in others]) * sizes[variable], variable
        heappush(queue, latest[variable])

    for variable in near:
        if variable not in kept:
            score(variable)
    entries, found = 0, []
    while latest:
        first = heappop(queue)
        one = first[2]
        if latest.get(one) != first:
            continue  # scored anew meanwhile
        del latest[one]
        entries += first[1]
        found.append(one)
        others = near.pop(one)
        changed = set(others)
        for a in others:
            near[a].update(others)
            near[a] -= {a, one}
            changed |= near[a]
        for variable in sorted(changed):
            if variable not in kept:
                score(variable)
    return entries, found


def _order(sizes: Sequence[int], scopes: Sequence[Scope], kept: Scope, variables: Sequence[int]) -> Order:
    held = [set(scope) for scope in scopes]
    having: dict[int, set[int]] = {variable: set() for variable in range(len(sizes))}
    for place, scope in enumerate(scopes):
        for variable in scope:
            having[variable].add(place)

    def summed(places: Iterable[int], axes: Sequence[int]) -> Sum:
        # The smallest first: sums grow as late as can be.
        ordered = sorted(places, key=lambda place: (prod([sizes[a] for a in held[place]]), place))
        shapes = tuple(tuple(sizes[a] if a in held[p] else 1 for a in axes) for p in ordered)
        first = {a: min([place for place, p in enumerate(ordered) if a in held[p]], default=0) for a in axes}
        return Sum(tuple(ordered), shapes, 1 + max(first.values(), default=0))

    steps, left = [], set(range(len(scopes)))
    for variable in variables:
        places = having[variable]
        axes = sorted({variable}.union(*(held[place] for place in places)))
        rest = tuple(a for a in axes if a != variable)
        entries = prod([sizes[a] for a in axes])
        steps.append(Step(variable, summed(places, axes), axes.index(variable), rest, entries))
        left = (left - places) | {len(held)}
        for place in tuple(places):
            for a in held[place]:
                having[a].discard(place)
        for a in rest:
            having[a].add(len(held))
        held.append(set(rest))
    return Order(tuple(steps), summed(left, kept), sum(step.entries for step in steps), len(sizes))
