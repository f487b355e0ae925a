"""Buffers of the model that follow no formula, from the file ``buffers.pt`` beside module.py."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

FILE = Path(__file__).parents[1] / "buffers.pt"
_held: dict[str, Tensor] = {}
_placed: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}


def held(name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The buffer of this full name; read and copied to the device once."""
    if not _held:
        hold(torch.load(FILE, weights_only=True))
    key = name, device, dtype
    if key not in _placed:
        _placed[key] = _held[name].to(device, dtype)
    return _placed[key]


def hold(values: Mapping[str, Tensor]) -> None:
    """Take these in place of what the file has."""
    _held.clear()
    _placed.clear()
    _held.update(values)
