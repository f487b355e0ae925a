"""The moments of a rank (`orders.moments`) as arrays, so that the bytes of all of them are found at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from autopar.solver.orders import moments

SHARES = ("none", "one", "some", "all")
"""How many of its backwards a stage has done (`orders.Moment.done`)."""

Begun = tuple[str, int, str, bool]
"""What begins at a moment: the kind of a backward, its stage's place on the rank, what that has done, if it is last."""

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class MomentTable:
    """A row for each moment of a rank, a column for each of its stages: micro-batches ``alive``, ``waiting`` between
    the halves of a backward, backwards ``done``, and ``share``, the place of that in `SHARES`. ``begun``: what begins,
    each once, and ``which`` of them a moment is; ``place``: the stage of it."""

    alive: Ints
    waiting: Ints
    done: Ints
    share: Ints
    which: Ints
    place: Ints
    begun: tuple[Begun, ...]


@lru_cache(maxsize=256)
def moment_tables(schedule: str, ranks: int, vpp: int, micro_batches: int) -> tuple[MomentTable, ...]:
    """For each rank."""
    tables = []
    for own in moments(schedule, ranks, vpp, micro_batches):
        held = np.array([moment.held for moment in own], dtype=np.int64)
        share = np.array([[SHARES.index(one) for one in moment.done] for moment in own])
        begun = [(moment.kind, moment.place, moment.done[moment.place], moment.last) for moment in own]
        known = {one: which for which, one in enumerate(dict.fromkeys(begun))}
        which = np.array([known[one] for one in begun])
        place = np.array([moment.place for moment in own])
        tables.append(MomentTable(held[:, :, 0], held[:, :, 1], held[:, :, 2], share, which, place, tuple(known)))
    return tuple(tables)
