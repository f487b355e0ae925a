"""``tensor.data`` while a model is traced: torch.export takes it for a tensor from nowhere, and loses what it is of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def data_followed() -> Iterator[None]:
    """While open, ``tensor.data`` is ``tensor.detach()``, which tracing records; it shares the tensor's memory too."""
    plain: Any = torch.Tensor.data

    def read(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach()

    torch.Tensor.data = property(read, lambda tensor, value: plain.__set__(tensor, value))  # type: ignore[assignment]
    try:
        yield
    finally:
        del torch.Tensor.data


__all__ = ["data_followed"]
