"""Operators that PyTorch has no function for, on whole tensors and over a split vocabulary."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

_functional = torch.ops._c10d_functional


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding on the last dim, halves paired (RoFormer, arXiv 2104.09864)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def cross_entropy(logits: Tensor, labels: Tensor, ignore: int = -100) -> Tensor:
    """Cross-entropy summed over the targets, in float32 or wider; targets equal to ``ignore`` count nothing."""
    return F.cross_entropy(_wide(logits).flatten(0, -2), labels.flatten(), ignore_index=ignore, reduction="sum")


def vocab_embedding(ids: Tensor, weight: Tensor, axis: DeviceMesh) -> Tensor:
    """Embedding by a vocabulary split over ``axis``: zeros for the ids of other ranks, so the result is partial."""
    local, is_own = _own_ids(ids, weight.size(0), axis)
    return F.embedding(local, weight).masked_fill(~is_own.unsqueeze(-1), 0)


def vocab_cross_entropy(logits: Tensor, labels: Tensor, axis: DeviceMesh, ignore: int = -100) -> Tensor:
    """`cross_entropy` of logits whose last dim, the vocabulary, is split over ``axis``; every rank gets the whole.

    The maximum, the sum of exponentials and the target's logit are all-reduced: three numbers per target.
    """
    return _VocabCrossEntropy.apply(logits, labels, axis, ignore)


class _VocabCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, axis: DeviceMesh, ignore: int) -> Tensor:
        wide = _wide(logits)
        largest = _all_reduce(wide.amax(-1), "max", axis)
        total = _all_reduce((wide - largest.unsqueeze(-1)).exp().sum(-1), "sum", axis)
        local, is_own = _own_ids(labels, logits.size(-1), axis)
        target = wide.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(~is_own, 0)
        target = _all_reduce(target, "sum", axis)
        log_total = total.log() + largest
        ctx.axis, ctx.ignore = axis, ignore
        ctx.save_for_backward(logits, labels, log_total)
        return (log_total - target).masked_fill(labels == ignore, 0).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        logits, labels, log_total = ctx.saved_tensors
        local, is_own = _own_ids(labels, logits.size(-1), ctx.axis)
        # softmax - one_hot(label), on this rank's part of the vocabulary
        result = (_wide(logits) - log_total.unsqueeze(-1)).exp()
        result.scatter_add_(-1, local.unsqueeze(-1), -is_own.unsqueeze(-1).to(result.dtype))
        result = result.masked_fill((labels == ctx.ignore).unsqueeze(-1), 0) * gradient
        return result.to(logits.dtype), None, None, None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def dropout(x: Tensor, p: float, training: bool, axis: DeviceMesh) -> Tensor:
    """Dropout of a tensor that is split over ``axis``: every rank draws a mask of its own."""
    with _own_random_numbers(axis, training):
        return F.dropout(x, p, training)


def attention(query: Tensor, key: Tensor, value: Tensor, axis: DeviceMesh, dropout_p: float, **options: Any) -> Tensor:
    """Attention with dropout, its heads split over ``axis``: every rank draws a mask of its own."""
    with _own_random_numbers(axis, dropout_p > 0):
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, **options)


@contextmanager
def _own_random_numbers(axis: DeviceMesh, active: bool) -> Iterator[None]:
    """Inside, random numbers differ between the ranks of ``axis``; after it, they agree again.

    The seed is drawn from the numbers the ranks share, so that recomputation (which restores those) draws it again.
    """
    if not active:
        yield
        return
    seed = int(torch.randint(2**62, ()).item())
    devices = [torch.cuda.current_device()] if axis.device_type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed + axis.get_local_rank())
        yield


def _own_ids(ids: Tensor, size: int, axis: DeviceMesh) -> tuple[Tensor, Tensor]:
    """Ids counted from this rank's first one (0 for those of other ranks), and which ids are this rank's."""
    first = torch.arange(axis.size(), device=ids.device).narrow(0, axis.get_local_rank(), 1) * size
    is_own = (ids >= first) & (ids < first + size)
    return (ids - first).masked_fill(~is_own, 0), is_own


def _all_reduce(x: Tensor, operation: str, axis: DeviceMesh) -> Tensor:
    return _functional.wait_tensor(_functional.all_reduce(x.contiguous(), operation, axis.get_group().group_name))
