"""What waits for what in a step of a schedule, transfers left out: how long the longest path is, and what it passes.

An action waits for the one before it on its rank and for what it receives; both are known without any seconds. Actions
are kept in levels, each of which waits for earlier ones alone, so that a level of many steps at once is a few
operations on arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from autopar.schedule import SCHEDULES
from autopar.solver.chain import Floats
from autopar.solver.orders import orders

LANES = 5
"""What a stage takes: forward, input half of the backward (all of it, if backwards are not halved), weight half, and
what its first forward and its last backward take more."""

FORWARD, INPUT, WEIGHT, FIRST, LAST = range(LANES)

EACH = FIRST
"""The first so many lanes are of every micro-batch."""

Ints = NDArray[np.int64]

AT_ONCE = 256
"""Steps whose lengths are found together."""

MOST_ACTIONS = 12_000
"""Longer schedules are not walked through: they have so many micro-batches that little is waited for."""


@dataclass(frozen=True, slots=True)
class Walk:
    """Actions in an order in which each comes after what it waits for: ``lanes``: up to three of what it takes, as lane
    * stages + stage, or the number of all for none; ``before``, ``sender``: the actions waited for, -1 for none.
    ``levels``: where each begins, and the end; ``arrays``: ``lanes``, ``before`` and ``sender``."""

    stages: int
    lanes: list[tuple[int, int, int]]
    before: list[int]
    sender: list[int]
    levels: list[int]
    arrays: tuple[Ints, Ints, Ints]

    def longest(self, seconds: Floats) -> tuple[float, Floats]:
        """The longest path if lanes take so many ``seconds``: its length, and how often it passes every lane."""
        each = [*seconds.tolist(), 0.0]
        ends = [0.0] * (len(self.lanes) + 1)  # the last place stands for -1
        came = [-1] * len(self.lanes)
        for place, ((a, b, c), before, sender) in enumerate(zip(self.lanes, self.before, self.sender, strict=True)):
            came[place] = last = before if ends[before] >= ends[sender] else sender
            ends[place] = ends[last] + each[a] + each[b] + each[c]
        place = int(np.argmax(ends))
        length, counts = ends[place], np.zeros(len(each))
        while place != -1:
            for lane in self.lanes[place]:
                counts[lane] += 1
            place = came[place]
        return length, counts[:-1]

    def lengths(self, stages: Floats) -> Floats:
        """How long the longest paths of several steps are; ``stages``: seconds by step, stage and lane."""
        seconds = stages.transpose(0, 2, 1).reshape(len(stages), LANES * self.stages)
        parts = [self._ends(seconds[start : start + AT_ONCE]) for start in range(0, len(seconds), AT_ONCE)]
        return np.concatenate([part.max(axis=0) for part in parts]) if parts else np.zeros(0)

    def _ends(self, seconds: Floats) -> Floats:
        """When each action ends, by action and step; the last row stands for none."""
        of, before, sender = self.arrays
        lanes = np.concatenate([seconds.T, np.zeros((1, len(seconds)))])
        ends = np.concatenate([lanes[of[:, 0]], lanes[-1:]])
        ends[:-1] += lanes[of[:, 1]]
        ends[:-1] += lanes[of[:, 2]]
        for start, end in pairwise(self.levels):
            ends[start:end] += np.maximum(ends[before[start:end]], ends[sender[start:end]])
        return ends


def is_long(stages: int, micro_batches: int) -> bool:
    """Whether a schedule has too many actions to be walked through."""
    return 2 * micro_batches * stages > MOST_ACTIONS


def step_lengths(schedule: str, ranks: int, vpp: int, micro_batches: int, stages: Floats) -> Floats:
    """`Walk.lengths` of a schedule; of a long one what the rank with most work takes, which says most."""
    if not is_long(ranks * vpp, micro_batches):
        return walk_of(schedule, ranks, vpp, micro_batches).lengths(stages)
    owned = np.eye(ranks)[[SCHEDULES[schedule].rank_of(stage, ranks) for stage in range(ranks * vpp)]]
    works = micro_batches * stages[:, :, :EACH].sum(axis=2) + stages[:, :, EACH:].sum(axis=2)
    return np.asarray((works @ owned).max(axis=1))


@lru_cache(maxsize=16)
def walk_of(schedule: str, ranks: int, vpp: int, micro_batches: int) -> Walk:
    """The actions of a schedule on so many ranks with ``vpp`` stages each."""
    stages, halved = ranks * vpp, SCHEDULES[schedule].splits_backward
    programs = orders(schedule, ranks, vpp, micro_batches)
    none, backwards = LANES * stages, [micro_batches] * stages
    done: dict[tuple[bool, int, int], int] = {}
    next_of, last_of = [0] * ranks, [-1] * ranks
    lanes: list[tuple[int, int, int]] = []
    waited: list[tuple[int, int]] = []
    level: list[int] = []

    def takes(kind: str, stage: int, micro: int) -> tuple[int, int, int]:
        if kind == "F":
            return FORWARD * stages + stage, none if micro else FIRST * stages + stage, none
        inputs, weights = INPUT * stages + stage, WEIGHT * stages + stage if halved else none
        if kind == "I":
            return inputs if stage else none, none, none  # torch leaves all of it to "W" on stage 0
        backwards[stage] -= 1
        end = none if backwards[stage] else LAST * stages + stage
        return (weights, none, end) if kind == "W" and stage else (inputs, weights, end)

    left = sum(map(len, programs))
    while left:
        for rank, program in enumerate(programs):
            while next_of[rank] < len(program):
                kind, stage, micro, _ = program[next_of[rank]]
                ahead = kind == "F"
                source = stage - 1 if ahead else stage + 1
                sender = -1
                if kind != "W" and 0 <= source < stages:
                    found = done.get((ahead, source, micro))
                    if found is None:
                        break
                    sender = found
                place, before = len(lanes), last_of[rank]
                lanes.append(takes(kind, stage, micro))
                waited.append((before, sender))
                level.append(1 + max(level[one] if one >= 0 else -1 for one in (before, sender)))
                if kind != "W":
                    done[ahead, stage, micro] = place
                next_of[rank] += 1
                last_of[rank] = place
                left -= 1
    return _by_level(stages, lanes, waited, np.array(level))


def _by_level(stages: int, lanes: list[tuple[int, int, int]], waited: list[tuple[int, int]], level: Ints) -> Walk:
    order = np.argsort(level, kind="stable")
    place = np.append(np.empty_like(order), -1)  # what waits for none still does
    place[order] = np.arange(len(order))
    before, sender = place[np.array(waited)[order]].T
    starts = np.searchsorted(level[order], np.arange(int(level.max()) + 2))
    of = np.array(lanes)[order]
    arrays = of, np.ascontiguousarray(before), np.ascontiguousarray(sender)
    ordered = [lanes[place] for place in order]
    return Walk(stages, ordered, before.tolist(), sender.tolist(), starts.tolist(), arrays)
