"""RMS norm as the fused kernel of GPUs holds it: one operator that keeps its input and a float32 number per row.

On CPUs torch makes it of plain operators, which keep two float32 copies of the input besides; on GPUs it is
`aten._fused_rms_norm`. Memory measured on CPU ranks would be that of CPUs otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("proof::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.double() if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight, scale


@torch.library.custom_op("proof::rms_norm_backward", mutates_args=())
def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    normed = x.to(scale.dtype) * scale
    scaled = (grad * weight).to(scale.dtype)
    of_x = scale * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    of_weight = (grad.to(scale.dtype) * normed).flatten(0, -2).sum(0)
    return of_x.to(x.dtype), of_weight.to(weight.dtype)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
    return (*_rms_norm_backward(grad, *ctx.saved_tensors), None)


_rms_norm.register_autograd(_backward, setup_context=_keep)


@contextmanager
def fused_rms_norm() -> Iterator[None]:
    """Inside, `F.rms_norm` over the last dim is one operator."""
    plain = F.rms_norm

    def fused(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        if weight is None or eps is None or len(shape) != 1:
            raise ValueError("only RMS norm over the last dim, with a weight and eps")
        return _rms_norm(x, weight, eps)[0]

    F.rms_norm = fused  # type: ignore[assignment]
    try:
        yield
    finally:
        F.rms_norm = plain
