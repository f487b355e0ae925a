"""Measured operators of one device, as a cluster carries them: enough to price by, small enough to go into every plan.

A table is the measurements of one operator, dtype and direction, as text: a line of "sizes seconds spread" for each,
such as ``4096 4096 4096 0.000214 0.01``. `autopar.profiler.attach` makes them and `autopar.solver.measured_ops` reads
them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Measured:
    """``digest``: of the profile; ``title``: its device and date; ``tables``: by "operator dtype direction".

    ``host_s``: seconds the host takes to start one operator, where the device runs behind it (0 where the time of a
    call has that in it). ``slowdown``: factor on all seconds (ranks that take turns on the cores of one machine).
    """

    digest: str
    title: str
    tables: dict[str, str] = field(hash=False)
    host_s: float = 0.0
    slowdown: float = 1.0

    def rows(self, name: str) -> list[tuple[tuple[int, ...], float, float]]:
        """(sizes, seconds, spread) of each measurement of a table; none if there is no such table. Raises ValueError
        where its text is damaged."""
        found = []
        for line in self.tables.get(name, "").splitlines():
            *sizes, seconds, spread = line.split()
            found.append((tuple(map(int, sizes)), float(seconds), float(spread)))
        return found

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Measured:
        """Inverse of `to_json`. Raises KeyError, TypeError or ValueError for anything else."""
        measured = Measured(**{**data, "tables": dict(data["tables"])})
        for name in measured.tables:
            measured.rows(name)
        return measured
