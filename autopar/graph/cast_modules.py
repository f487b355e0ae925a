"""Modules that a model casts while it runs (``self.router.to(torch.float32)``), as casts of their parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn


@contextlib.contextmanager
def casts_traced() -> Iterator[None]:
    """While open, ``module.to(...)`` puts what a cast makes of a parameter in its place: torch's would exchange the
    parameter itself, which is not an operator, and which fake parameters do not allow."""
    plain = nn.Module._apply

    def apply(self: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        for child in self.children() if recurse else ():
            apply(child, function)
        for held in (self._parameters, self._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = function(tensor)  # type: ignore[assignment]
        return self

    nn.Module._apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = plain  # type: ignore[method-assign]
