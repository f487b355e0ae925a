"""The cheapest conversions that make several layouts of one tensor out of one: each is paid once, whoever reads it.

From the layout that is held a tree leads to all that are wanted (a Steiner arborescence). For few of them it is found
by dynamic programming over their subsets (Dreyfus and Wagner, Networks 1, 1971): with c the seconds of conversions,
closed under composition,

    tree(v, {w}) = c(v, w)
    tree(v, W)   = min over u and W = A + B of  c(v, u) + tree(u, A) + tree(u, B)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import inf

import numpy as np

from autopar.solver.linear import Floats


class Trees:
    """Those of one tensor. ``seconds``: [from, to] of its layouts, closed, infinite where no path leads; ``via``: the
    layouts in which a tree may branch, among them all that may be held or wanted."""

    def __init__(self, seconds: Floats, via: Sequence[int]) -> None:
        self.seconds, self.via = seconds, via

    def one(self, held: Sequence[int], wanted: Sequence[int]) -> Floats:
        """[held, wanted]: seconds of the conversion."""
        return self.seconds[np.ix_(held, wanted)]

    def two(self, held: Sequence[int], one: Sequence[int], other: Sequence[int]) -> Floats:
        """[held, one, other]: seconds to make both."""
        onward = self.one(self.via, one)[:, :, None] + self.one(self.via, other)[:, None, :]
        found: Floats = (self.one(held, self.via)[:, :, None, None] + onward[None]).min(1)
        return found

    def sets(self, held: Sequence[int], wanted: Sequence[int], most: int) -> tuple[list[int], Floats]:
        """Sets of up to ``most`` of the wanted layouts, none empty, as bits of their places, and [held, set]: seconds
        to make all of one."""
        every = self._every(wanted, most)
        onward = np.stack(list(every.values()))
        return list(every), (self.one(held, self.via)[:, None, :] + onward[None]).min(2)

    def _every(self, wanted: Sequence[int], most: int) -> dict[int, Floats]:
        """Of each set of up to ``most``, seconds from each layout of ``via``."""
        first, between = self.one(self.via, wanted), self.one(self.via, self.via)
        found: dict[int, Floats] = {}
        for each in _subsets(len(wanted), most):
            if each & (each - 1) == 0:
                found[each] = first[:, each.bit_length() - 1]
                continue
            split = np.min([found[a] + found[b] for a, b in _parts(each)], axis=0)
            found[each] = (between + split).min(1)
        return found

    def edges(self, held: int, wanted: Iterable[int]) -> list[tuple[int, int]]:
        """The conversions of the cheapest tree, in an order in which each starts at what is there."""
        goals = [each for each in dict.fromkeys(wanted) if each != held]
        if not goals:
            return []
        every = self._every(goals, len(goals))
        found: list[tuple[int, int]] = []

        def grow(start: int, left: int) -> None:
            if left & (left - 1) == 0:
                goal = goals[left.bit_length() - 1]
                if goal != start:
                    found.append((start, goal))
                return
            branch, a, b = min(
                ((index, a, b) for a, b in _parts(left) for index in range(len(self.via))),
                key=lambda way: self.seconds[start, self.via[way[0]]] + every[way[1]][way[0]] + every[way[2]][way[0]],
            )
            branch = self.via[branch]
            if branch != start:
                found.append((start, branch))
            grow(branch, a)
            grow(branch, b)

        grow(held, (1 << len(goals)) - 1)
        return found


@lru_cache(maxsize=64)
def _subsets(count: int, most: int) -> tuple[int, ...]:
    """Of so many, the sets of up to ``most``, as bits, the smaller first."""
    every = (each for each in range(1, 1 << count) if each.bit_count() <= most)
    return tuple(sorted(every, key=lambda each: (each.bit_count(), each)))


@lru_cache(maxsize=4096)
def _parts(whole: int) -> tuple[tuple[int, int], ...]:
    """All ways to part a set in two."""
    lowest = whole & -whole
    rest, found, part = whole ^ lowest, [], whole ^ lowest
    while part:
        part = (part - 1) & rest
        found.append((lowest | part, rest ^ part))
    return tuple(found)


def useful(sets: Sequence[int], seconds: Floats) -> list[int]:
    """Places of sets of which no larger one is as cheap, whatever is held; ``seconds``: [held, set]."""
    bits = np.array(sets)
    larger = (bits[:, None] & bits[None, :] == bits[:, None]) & (bits[:, None] != bits[None, :])
    cheaper = (seconds[:, None, :] <= seconds[:, :, None]).all(0)
    possible = (seconds < inf).any(0)
    return np.flatnonzero(possible & ~(larger & cheaper).any(1)).tolist()
