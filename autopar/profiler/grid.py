"""Where to measure next: an adaptive grid over the shapes of each operator.

Sizes go up by powers of two, with one between each pair (1.5 times), so that no surface is read at powers of two alone.
A table begins with points far apart; then the point is taken where the interpolation deviates most from what it would
measure (`Surface.predict`), weighted by how wrong it was around there when points were left out. So time goes to the
tables, and in them to the places, that are known worst.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import sqrt

import numpy as np
import numpy.typing as npt

from autopar.profiler.shapes import WIDTHS, Family, Point
from autopar.profiler.surface import Surface
from autopar.profiler.timing import Timing

CANDIDATES = 256
"""Points looked at each time, drawn at random from all that are small enough."""

ENOUGH = {1: 32, 2: 72, 3: 160, 4: 240}
"""Points after which a table is left as it is, by dims: more only make it slow to read."""

NEAR = 2.0
"""Octaves within which errors of left-out points speak for a place."""

ROUGH = {"cpu": (1e9, 1e9, 1e-6), "cuda": (2e13, 3e11, 1e-6)}
"""FLOP/s, bytes/s and seconds per call that any device of the kind reaches: what is assumed before the first points,
low so that a guess is not too small."""


@dataclass(slots=True)
class Table:
    """One family in one dtype: what was measured, by point and direction."""

    family: Family
    dtype: str
    samples: dict[Point, dict[str, Timing]] = field(default_factory=dict)
    refused: set[Point] = field(default_factory=set)
    _surfaces: dict[str, Surface] = field(default_factory=dict)

    @property
    def width(self) -> int:
        return WIDTHS.get(self.dtype, 1)

    @property
    def initial(self) -> int:
        """Points before the table is refined."""
        return 2 + len(self.family.dims)

    def add(self, point: Point, samples: dict[str, Timing]) -> None:
        self.samples[point] = {**self.samples.get(point, {}), **samples}
        self._surfaces.clear()

    def surface(self, direction: str) -> Surface | None:
        """The surface of a direction, None before its first point."""
        if direction not in self._surfaces:
            points = [point for point, found in self.samples.items() if direction in found]
            if not points:
                return None
            costs = [self.family.cost(point, direction, self.width) for point in points]
            found = [self.samples[point][direction] for point in points]
            self._surfaces[direction] = Surface(
                points,
                [sample.seconds for sample in found],
                [flops for flops, _ in costs],
                [nbytes for _, nbytes in costs],
                [sample.spread for sample in found],
            )
        return self._surfaces[direction]

    def predict(self, points: list[Point], direction: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """(seconds, relative deviation) of each point. Raises KeyError before the first."""
        surface = self.surface(direction)
        if surface is None:
            raise KeyError(direction)
        costs = np.array([self.family.cost(point, direction, self.width) for point in points])
        return surface.predict(points, costs[:, 0], costs[:, 1])

    def next(self, rng: np.random.Generator, limits: Limits) -> tuple[float, Point] | None:
        """(how much is to be learnt there, point) of the best point to measure; None if none is left."""
        if len(self.samples) >= ENOUGH[len(self.family.dims)]:
            return None
        points = [
            point for point in _drawn(self.family, rng) if point not in self.samples and point not in self.refused
        ]
        points = [point for point in points if self._fits(point, limits)]
        if len(self.samples) >= self.initial:
            points = [p for p, s in zip(points, self._seconds(points), strict=True) if s <= limits.seconds]
        if not points:
            return None
        if not self.samples:
            return float("inf"), min(points, key=lambda point: self._rough(point, limits))
        at = np.log2(np.array(points, dtype=np.float64))
        if len(self.samples) < self.initial and len(self.samples) % 2:  # each raises what the next may be
            return 1e3 / len(self.samples), max(points, key=lambda point: self._rough(point, limits))
        if len(self.samples) < self.initial:
            known = np.log2(np.array(list(self.samples), dtype=np.float64))
            apart = np.sum((at[:, None, :] - known[None, :, :]) ** 2, axis=2).min(axis=1)
            return 1e3 / len(self.samples), points[int(np.argmax(apart))]
        doubt = np.zeros(len(points))
        for direction in self.family.directions:
            surface = self.surface(direction)
            if surface is not None:
                _, deviation = self.predict(points, direction)
                doubt = np.maximum(doubt, deviation * (0.5 + _around(surface, at)))
        best = int(np.argmax(doubt))
        # Where more points help little (a library that changes its mind often), others deserve the time.
        return float(doubt[best]) * self.family.weight / sqrt(len(self.samples)), points[best]

    def _fits(self, point: Point, limits: Limits) -> bool:
        if self.family.resident(point, self.width) * 2 > limits.nbytes:
            return False
        if len(self.samples) >= self.initial:
            return True
        return self._rough(point, limits) * self._faster(limits) <= limits.seconds

    def _rough(self, point: Point, limits: Limits) -> float:
        rate, bandwidth, call = ROUGH[limits.backend]
        costs = [self.family.cost(point, direction, self.width) for direction in self.family.directions]
        return max(call + flops / rate + nbytes / bandwidth for flops, nbytes in costs)

    def _faster(self, limits: Limits) -> float:
        """Seconds of the points so far against those assumed, at the best; larger points are no slower for their
        size, and the factor leaves room."""
        ratios = [
            max(sample.seconds for sample in found.values()) / self._rough(point, limits)
            for point, found in self.samples.items()
        ]
        return 1.5 * min(ratios, default=1.0)

    def _seconds(self, points: list[Point]) -> npt.NDArray[np.float64]:
        """What the slowest direction takes; the doubt of the surface counts against a point."""
        found = np.zeros(len(points))
        for direction in self.family.directions if points else ():
            if self.surface(direction) is not None:
                seconds, deviation = self.predict(points, direction)
                found = np.maximum(found, seconds * np.exp(np.minimum(deviation, 2.0)))
        return found


@dataclass(frozen=True, slots=True)
class Limits:
    """What one point may take: ``seconds`` for one run, ``nbytes`` of buffers. ``backend``: "cpu" or "cuda"."""

    seconds: float
    nbytes: int
    backend: str


def _around(surface: Surface, at: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Error of left-out points near each place, against that of the whole surface."""
    errors = np.abs(surface.left_out)
    usual = float(np.sqrt(np.mean(errors**2))) or 1.0
    squared = np.sum((at[:, None, :] - surface.coordinates[None, :, :]) ** 2, axis=2)
    near = np.exp(-squared / (2 * NEAR**2)) + 1e-9
    found: npt.NDArray[np.float64] = (near @ errors) / near.sum(axis=1) / usual
    return found


def sizes(family: Family, dim: int) -> list[int]:
    """The sizes that a dim is measured at, ascending."""
    if family.fixed and dim in family.fixed:
        return list(family.fixed[dim])
    found, size = [], family.low[dim]
    while size <= family.high[dim]:
        found.append(size)
        if size * 3 // 2 < family.high[dim] and size >= 2:
            found.append(size * 3 // 2)
        size *= 2
    return found


def _drawn(family: Family, rng: np.random.Generator) -> Iterator[Point]:
    choices = [sizes(family, dim) for dim in range(len(family.dims))]
    seen: set[Point] = set()
    for place in range(CANDIDATES):
        # Small points too, often enough to find some where large ones take too long; the smallest always.
        part = rng.random() if place else 0.0
        point = tuple(int(choice[rng.integers(1 + int(part * len(choice)))]) for choice in choices)
        if point not in seen and family.valid(point):
            seen.add(point)
            yield point
