"""How far gradients are off, and how far they may be.

The error of a gradient g against its reference r is ‖g - r‖ / max(‖r‖, 1e-3 ‖all gradients‖ / √(number of
parameters)): some true gradients are zero, such as that of a key projection's bias.

In float64 and float32 a plan's errors have fixed limits (`TOLERANCES`). Under 16 bits what rounding does depends on the
model, so the limit is taken from the model itself: one device runs it in the job's dtype too, several times with
weights rounded differently, and a plan may be off by `MULTIPLE` times the most that device is off, parameter by
parameter, and by `WHOLE_MULTIPLE` times over all gradients together. A device that was lucky counts as if it had
rounded each result once (`UNIT_ROUNDOFF`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

TOLERANCES = {"fp64": 1e-10, "fp32": 1e-5}
"""Largest error of the loss, of every gradient and of the gradient norm, by the job's dtype."""

ROUNDED = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtypes of jobs whose limits come from what one device in that dtype is off."""

UNIT_ROUNDOFF = {name: torch.finfo(dtype).eps / 2 for name, dtype in ROUNDED.items()}
"""Largest relative error of rounding a number once: half the distance to the next one."""

MULTIPLE = 2.0
"""How many times one device's error a plan's may be, of the loss and of each gradient: where one device rounds a result
once, a plan that splits it rounds the partial results, and rounds their sum again."""

WHOLE_MULTIPLE = 1.5
"""The same for all gradients as one vector, where the luck of single parameters averages out."""


def gradient_errors(
    found: Mapping[str, Tensor], reference: Mapping[str, Tensor], floor: float = 1e-3
) -> dict[str, float]:
    """The error of each gradient of ``reference`` (see the module's text), with ``floor`` for 1e-3.

    A gradient of ``found`` has the reference's shape, or one dim more in front, on which copies are stacked: the worst
    counts. One that is missing, of another shape or not a number is infinitely wrong.
    """
    return relative({name: distance(found.get(name), right) for name, right in reference.items()}, reference, floor)


def distance(gradient: Tensor | None, right: Tensor) -> float:
    """‖g - r‖, of stacked copies the largest; infinite where it is not a number or shapes differ."""
    if gradient is None:
        return math.inf
    copies = gradient.unsqueeze(0) if gradient.ndim == right.ndim else gradient
    if copies.shape[1:] != right.shape:
        return math.inf
    found = [float((copy.double() - right.double()).norm()) for copy in copies]
    return math.inf if any(map(math.isnan, found)) else max(found)


def relative(distances: Mapping[str, float], reference: Mapping[str, Tensor], floor: float = 1e-3) -> dict[str, float]:
    """The errors of gradients that are so far (`distance`) from those of ``reference``."""
    norms = {name: float(right.double().norm()) for name, right in reference.items()}
    least = floor * math.hypot(*norms.values()) / math.sqrt(len(norms))
    return {name: far / max(norms[name], least, 1e-300) for name, far in distances.items()}


def whole_error(distances: Mapping[str, float], reference: Mapping[str, Tensor]) -> float:
    """The error of all gradients taken as one vector: ‖G - R‖ / ‖R‖."""
    right = math.hypot(*(float(gradient.double().norm()) for gradient in reference.values()))
    return math.hypot(*distances.values()) / max(right, 1e-300)


def limit(dtype: str, own: float | None, multiple: float = MULTIPLE) -> float:
    """How far a job in ``dtype`` may be off where one device in that dtype is off by ``own`` (16 bits only)."""
    if dtype in TOLERANCES:
        return TOLERANCES[dtype]
    assert own is not None, dtype
    return multiple * max(own, UNIT_ROUNDOFF[dtype])
