"""The state of a search: the best plan so far, and the bounds of what is not refined further."""

from __future__ import annotations

from dataclasses import dataclass, field

from autopar.solver.evaluate import Assessment
from autopar.solver.shardings import KnownShardings
from autopar.solver.space import Config

INFINITE = float("inf")

HOPE = 0.05
"""How much above the best plan an estimate may be that is still worth a look."""


@dataclass(slots=True)
class Found:
    """The state of a search: the best plan so far, and bounds of all that is not refined further: ``priced``
    configurations each with its own, and ``rest``, the least of all others. All seconds are of what is sought
    (`Assessment.sought_s`): the step time, or seconds at full power."""

    gap: float
    known: KnownShardings
    best: Assessment | None = None
    priced: dict[Config, float] = field(default_factory=dict)
    rest: float = INFINITE

    @property
    def enough(self) -> float:
        """The bound from which on nothing may beat the best plan by more than the gap."""
        return INFINITE if self.best is None else self.best.sought_s / (1 + self.gap)

    def promising(self, bound: float) -> bool:
        """Whether what has this bound may beat the best plan by more than the gap."""
        return self.best is None or bound < self.enough

    def near(self, seconds: float) -> bool:
        """Whether this many may still become the best plan."""
        return self.best is None or seconds <= self.best.sought_s * (1 + HOPE)

    def keep(self, assessed: Assessment | None) -> None:
        """Take a plan if it is the best so far."""
        if assessed is not None and (self.best is None or assessed.sought_s < self.best.sought_s * (1 - 1e-9)):
            self.best = assessed

    @property
    def bound(self) -> float:
        """No plan in the space takes less."""
        known = min(self.rest, min(self.priced.values(), default=INFINITE))
        return known if self.best is None else min(known, self.best.sought_s)
