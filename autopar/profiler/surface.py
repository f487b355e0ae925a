"""The efficiency surface of one operator: seconds at any shape, from those measured at some.

A baseline of three physical terms, fitted to all points, carries the orders of magnitude:

    baseline = start + FLOP / rate + bytes / bandwidth

What remains, log(measured / baseline), varies slowly over the logarithms of the sizes, and is interpolated by kriging
(a Gaussian process; Rasmussen and Williams, "Gaussian Processes for Machine Learning", MIT Press 2006: algorithm 2.1
for the mean and variance, equations 5.10 to 5.12 for the residuals with one point left out). The deviation that comes
with each figure says where the interpolation is worst: `autopar.profiler.grid` measures there next.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

LENGTHS = (1.0, 2.0, 4.0, 8.0)
"""Octaves over which efficiencies stay alike; the one whose left-out points are predicted best is taken."""

NOISE = 0.02
"""Least relative deviation of one measurement from the next."""

PRIOR = 0.05
"""Least relative deviation expected between points, so that a few points that agree do not claim certainty."""


class Surface:
    """Seconds over sizes. ``points``: (n, dims) sizes; ``seconds``, ``flops``, ``nbytes``, ``spread``: (n,) each.

    Raises ValueError for fewer than one point.
    """

    def __init__(
        self,
        points: Sequence[Sequence[float]],
        seconds: Sequence[float],
        flops: Sequence[float],
        nbytes: Sequence[float],
        spread: Sequence[float] | None = None,
    ) -> None:
        if not len(points):
            raise ValueError("a surface needs at least one point")
        self.coordinates = np.log2(np.asarray(points, dtype=np.float64))
        self.seconds = np.asarray(seconds, dtype=np.float64)
        self.low, self.high = self.coordinates.min(axis=0), self.coordinates.max(axis=0)
        self.terms = relative_fit(_terms(flops, nbytes), self.seconds)
        self._logs = np.log(self.seconds / self._baseline(flops, nbytes))
        noise = np.zeros(len(self.seconds)) if spread is None else np.asarray(spread, dtype=np.float64)
        self._noise = np.maximum(NOISE, noise / 2) ** 2
        fits = [self._fitted(length) for length in LENGTHS]
        self.length, self._scale, self._inverse, self.left_out = min(fits, key=lambda fit: float(np.sum(fit[3] ** 2)))
        self._weights = self._inverse @ self._logs

    def predict(self, points: npt.ArrayLike, flops: npt.ArrayLike, nbytes: npt.ArrayLike) -> tuple[Array, Array]:
        """(seconds, relative deviation) at each of the points. Outside the measured range of a size, the efficiency is
        that at its border."""
        coordinates = np.log2(np.asarray(points, dtype=np.float64))
        at = np.clip(coordinates, self.low, self.high)
        kernel = self._kernel(at, self.coordinates, self.length) * self._scale
        variance = self._scale - np.sum((kernel @ self._inverse) * kernel, axis=1)
        beyond = np.sqrt(np.sum((coordinates - at) ** 2, axis=1)) / self.length
        deviation: Array = np.sqrt(np.maximum(variance, 0.0)) * (1 + beyond)
        return self._seconds(kernel, flops, nbytes), deviation

    def read(self, point: Sequence[float], flops: float, nbytes: float) -> float:
        """The seconds of `predict` at one point."""
        at = np.clip(np.log2(np.asarray([point], dtype=np.float64)), self.low, self.high)
        kernel = self._kernel(at, self.coordinates, self.length) * self._scale
        return float(self._seconds(kernel, [flops], [nbytes])[0])

    def _seconds(self, kernel: Array, flops: npt.ArrayLike, nbytes: npt.ArrayLike) -> Array:
        logs = np.clip(kernel @ self._weights, self._logs.min(), self._logs.max())
        found: Array = np.exp(logs) * self._baseline(flops, nbytes)
        return found

    def _baseline(self, flops: npt.ArrayLike, nbytes: npt.ArrayLike) -> Array:
        found: Array = _terms(flops, nbytes) @ self.terms
        return np.maximum(found, 1e-12)

    def _fitted(self, length: float) -> tuple[float, float, Array, Array]:
        """(length, variance between points, inverse covariance, error of each point when it is left out)."""
        kernel = self._kernel(self.coordinates, self.coordinates, length)
        scale = max(PRIOR**2, float(np.mean(self._logs**2)))
        inverse: Array = np.asarray(np.linalg.inv(kernel * scale + np.diag(self._noise)), dtype=np.float64)
        left_out: Array = (inverse @ self._logs) / np.diag(inverse)
        return length, scale, inverse, left_out

    @staticmethod
    def _kernel(left: Array, right: Array, length: float) -> Array:
        """Matern 3/2: continuous with its slope, without the ripples of smoother kernels."""
        squared = np.sum((left[:, None, :] - right[None, :, :]) ** 2, axis=2)
        distance = np.sqrt(3.0 * squared) / length
        found: Array = (1.0 + distance) * np.exp(-distance)
        return found


def _terms(flops: npt.ArrayLike, nbytes: npt.ArrayLike) -> Array:
    flops, nbytes = np.asarray(flops, dtype=np.float64), np.asarray(nbytes, dtype=np.float64)
    return np.stack([np.ones_like(flops), flops, nbytes], axis=-1)


def relative_fit(columns: Array, target: Array) -> Array:
    """x >= 0 with columns x near the target by ratio, up or down alike: least squares of errors over the geometric mean
    of both, which is iterated."""
    found = nonnegative(columns / target[:, None], np.ones(len(target)))
    for _ in range(10):
        mean = np.sqrt(np.maximum(columns @ found, 1e-3 * target) * target)
        found = nonnegative(columns / mean[:, None], target / mean)
    return found


def nonnegative(columns: Array, target: Array) -> Array:
    """x >= 0 that makes |columns x - target| least, for a handful of columns (all subsets are tried)."""
    best, least = np.zeros(columns.shape[1]), float("inf")
    for count in range(1, columns.shape[1] + 1):
        for chosen in combinations(range(columns.shape[1]), count):
            part = columns[:, chosen]
            scale = np.maximum(np.abs(part).max(axis=0), 1e-300)
            found = np.linalg.lstsq(part / scale, target, rcond=None)[0] / scale
            error = float(np.sum((part @ found - target) ** 2))
            if (found >= 0).all() and error < least * (1 - 1e-9):
                best, least = np.zeros(columns.shape[1]), error
                best[list(chosen)] = found
    return best
