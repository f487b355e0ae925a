"""Fourier transforms are in float32 where a model is in 16 bits.

No kernel transforms bfloat16, few transform float16. Real numbers that are made of the result have the dtype of what
was transformed again, as under autocast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_NARROW = (torch.bfloat16, torch.float16)
_TRANSFORMS = frozenset(
    getattr(torch.fft, f"{kind}fft{dims}") for kind in ("", "i", "r", "ir") for dims in ("", "2", "n")
)


class WideTransforms(TorchFunctionMode):
    """While open, Fourier transforms of 16 bits are computed in float32."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[Tensor, torch.dtype]] = {}
        """Complex tensors that come of one, and its dtype."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        dtype = next((self._made[id(arg)][1] for arg in args if id(arg) in self._made), None)
        if func in _TRANSFORMS and args and args[0].dtype in _NARROW:
            dtype = args[0].dtype
            args = (args[0].float(), *args[1:])
        result = func(*args, **(kwargs or {}))
        if dtype is None or not isinstance(result, Tensor):
            return result
        if result.is_complex():
            self._made[id(result)] = (result, dtype)
            return result
        return result.to(dtype) if result.dtype == torch.float32 else result
