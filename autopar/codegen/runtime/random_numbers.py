"""Random numbers that a model draws beside dropout: noise, augmentation, masks that are chosen by it.

While a module is not training they are all the middle of what may be drawn, so that runs can be compared.
"""

import torch
from torch import Tensor

from .operators import Axes, _own_random_numbers, _tuple


def uniform(x: Tensor, low: float, high: float, training: bool, axis: Axes | None = None) -> Tensor:
    """Numbers drawn evenly from [low, high), in the shape of ``x``; ranks of ``axis``, which split it, draw their own.

    Ranks that hold the same draw the same.
    """
    if not training:
        return torch.full_like(x, (low + high) / 2)
    with _own_random_numbers(_tuple(axis), True):
        return torch.empty_like(x).uniform_(low, high)


def normal(x: Tensor, mean: float, deviation: float, training: bool, axis: Axes | None = None) -> Tensor:
    """Normally distributed numbers, as `uniform` draws its."""
    if not training:
        return torch.full_like(x, mean)
    with _own_random_numbers(_tuple(axis), True):
        return torch.empty_like(x).normal_(mean, deviation)
