"""Timing a function: warm-up, repeats within a budget; the median, and the least where others use the machine too."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Timing:
    """Median ``seconds`` of ``repeats`` runs, the ``least`` of them, and their relative ``spread`` (interquartile range
    over median)."""

    seconds: float
    least: float
    spread: float
    repeats: int

    @staticmethod
    def of(samples: Sequence[float]) -> Timing:
        """Of the seconds of each run."""
        ordered = sorted(samples)
        middle, quarter = median(ordered), len(ordered) // 4
        spread = (ordered[-1 - quarter] - ordered[quarter]) / middle if middle else 0.0
        return Timing(middle, ordered[0], spread, len(ordered))


def timed(function: Callable[[], object], budget_s: float = 0.1, least: int = 5, most: int = 10_000) -> Timing:
    """Run once to warm up, then between ``least`` and ``most`` times, stopping once ``budget_s`` seconds are spent."""
    function()
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < least or (len(samples) < most and time.perf_counter() - begin < budget_s):
        start = time.perf_counter()
        function()
        samples.append(time.perf_counter() - start)
    return Timing.of(samples)
