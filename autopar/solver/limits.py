"""When a search may stop, and what it tells while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from autopar.errors import BadInputError

GAP = 0.01
"""How close to the bound a plan is close enough, unless told otherwise."""

OPTIMAL = 1e-3
"""A plan this close to the bound is called optimal."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a search is: seconds since it began, its steps, the best step time so far (None: nothing fits yet), the
    ``bound`` of all that is left, and how many meshes are ``done`` of all ``meshes``."""

    seconds: float
    steps: int
    best: float | None
    bound: float
    done: int
    meshes: int

    @property
    def gap(self) -> float | None:
        """(best - bound) / bound, if there is a plan."""
        return None if self.best is None else max(0.0, self.best / self.bound - 1.0)

    def __str__(self) -> str:
        found = "nothing that fits yet"
        if self.best is not None:
            found = f"best {self.best:.4g} s a step, at most {self.gap:.1%} from the fastest"
        return f"{self.done} of {self.meshes} meshes, {found}"


@dataclass(frozen=True, slots=True)
class Limits:
    """``gap``: stop at a plan at most this far from the bound. ``time_s``: seconds of wall time, checked between
    steps. ``work``: steps (a bound refined, a configuration priced), the same on every machine. Whatever stops the
    search, plan, bound and gap are honest; before the first plan is found, time and work do not.

    Raises BadInputError for values that make no sense."""

    gap: float = GAP
    time_s: float | None = None
    work: int | None = None
    progress: Callable[[Progress], None] | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.gap < 1.0:
            raise BadInputError(f"gap: {self.gap!r} is not in [0, 1); 0.01 stops at a plan within 1 % of the bound")
        if self.time_s is not None and not self.time_s > 0.0:
            raise BadInputError(f"time limit: {self.time_s!r} s is not a positive time; leave it out for none")
        if self.work is not None and self.work < 1:
            raise BadInputError(f"work limit: {self.work!r} is not a positive number of steps; leave it out for none")


INTERRUPTED = "stopped by Ctrl-C"
"""Stands in `Plan.searched` of a search that was."""


@dataclass(slots=True)
class Watch:
    """Counts the steps of one search against its limits. ``stopped``: what stopped it early, or ""."""

    limits: Limits
    begin: float = field(default_factory=time.perf_counter)
    steps: int = 0
    stopped: str = ""

    def over(self, found: bool) -> bool:
        """One more step; whether the search has to stop before it. ``found``: there is a plan."""
        limits = self.limits
        if found and limits.work is not None and self.steps >= limits.work:
            self.stopped = "stopped by work limit"
        elif found and limits.time_s is not None and time.perf_counter() - self.begin >= limits.time_s:
            self.stopped = "stopped by time limit"
        if self.stopped:
            return True
        self.steps += 1
        return False

    @property
    def told(self) -> dict[str, int]:
        """For `Plan.searched`: the steps, and what stopped them early."""
        return {"steps": self.steps, **({self.stopped: 1} if self.stopped else {})}
