"""Layers that are skipped at random in training ("LayerDrop", arXiv 1909.11556).

Such a model draws one number for each layer and, where it is below a rate, goes on without the layer. What is run then
differs from step to step, and between ranks; a plan is for one program. While a model is traced (or is the reference of
a proof), a number drawn alone is one, which no rate exceeds: every layer runs.

The same holds for SpecAugment (arXiv 1904.08779), which masks stretches of sound, chosen with numpy for a batch of
known size: models whose config speaks of it (``mask_time_prob``, ``apply_spec_augment``) go without.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

NOTE = "layers that the model skips at random are not skipped"
STRETCHES = "stretches of sound that the model masks at random (SpecAugment) are not masked"


def every_stretch(model: nn.Module) -> tuple[str, ...]:
    """Let ``model`` (a copy) mask no stretches of sound; what to tell of it."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    asked = [c for c in configs if getattr(c, "apply_spec_augment", True) is True and hasattr(c, "mask_time_prob")]
    for config in asked:
        config.apply_spec_augment = False  # type: ignore[union-attr]
    return (STRETCHES,) if asked else ()


def _alone(size: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Whether `torch.rand` is asked for one number of no dims."""
    shape = size[0] if len(size) == 1 and isinstance(size[0], list | tuple) else size
    return len(shape) == 0 and "size" not in options


@contextlib.contextmanager
def every_layer() -> Iterator[set[str]]:
    """While open, `torch.rand([])` is one. Collects the names of the functions that asked for it."""
    plain = torch.rand
    places: set[str] = set()

    def rand(*size: Any, **options: Any) -> torch.Tensor:
        if not _alone(size, options):
            return plain(*size, **options)
        places.add(sys._getframe(1).f_code.co_qualname)
        return torch.tensor(1.0)

    torch.rand = rand
    try:
        yield places
    finally:
        torch.rand = plain
