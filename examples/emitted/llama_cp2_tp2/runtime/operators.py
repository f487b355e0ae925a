"""Operators that PyTorch has no function for, on whole tensors and over a split vocabulary."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention.bias import causal_lower_right
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._python_dispatch import _disable_current_modes

_functional = torch.ops._c10d_functional


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding on the last dim, halves paired (RoFormer, arXiv 2104.09864)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def cross_entropy(logits: Tensor, labels: Tensor, ignore: int = -100) -> Tensor:
    """Cross-entropy summed over the targets, in float32 or wider; targets equal to ``ignore`` count nothing."""
    return F.cross_entropy(_wide(logits).flatten(0, -2), labels.flatten(), ignore_index=ignore, reduction="sum")


Axes = DeviceMesh | tuple[DeviceMesh, ...]
"""A mesh axis, or several that split the same dim, outermost first."""


def vocab_embedding(
    ids: Tensor, weight: Tensor, axis: Axes, padding_idx: int | None = None, vocabulary: int | None = None
) -> Tensor:
    """Embedding by a vocabulary split over ``axis``: zeros for the ids of other ranks, so the result is partial.

    ``padding_idx``: the id whose row gets no gradient. ``vocabulary``: its size, where it does not divide evenly (the
    last ranks then hold fewer rows).
    """
    local, is_own = _own_ids(ids, weight.size(0), axis, vocabulary)
    rows = F.embedding(local, weight)
    if padding_idx is not None:
        rows = torch.where((ids == padding_idx).unsqueeze(-1), rows.detach(), rows)
    return rows.masked_fill(~is_own.unsqueeze(-1), 0)


def vocab_cross_entropy(
    logits: Tensor, labels: Tensor, axis: Axes, ignore: int = -100, vocabulary: int | None = None
) -> Tensor:
    """`cross_entropy` of logits whose last dim, the vocabulary, is split over ``axis``; every rank gets the whole.

    The maximum, the sum of exponentials and the target's logit are all-reduced: three numbers per target.
    ``vocabulary``: its size, where it does not divide evenly.
    """
    return _VocabCrossEntropy.apply(logits, labels, axis, ignore, vocabulary)


class _VocabCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, axis: Axes, ignore: int, vocabulary: int | None) -> Tensor:
        wide = _wide(logits)
        largest = _all_reduce(wide.amax(-1), "max", axis)
        total = _all_reduce((wide - largest.unsqueeze(-1)).exp().sum(-1), "sum", axis)
        local, is_own = _own_ids(labels, logits.size(-1), axis, vocabulary)
        target = wide.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(~is_own, 0)
        target = _all_reduce(target, "sum", axis)
        log_total = total.log() + largest
        ctx.axis, ctx.ignore, ctx.vocabulary = axis, ignore, vocabulary
        ctx.save_for_backward(logits, labels, log_total)
        return (log_total - target).masked_fill(labels == ignore, 0).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        logits, labels, log_total = ctx.saved_tensors
        local, is_own = _own_ids(labels, logits.size(-1), ctx.axis, ctx.vocabulary)
        # softmax - one_hot(label), on this rank's part of the vocabulary
        result = (_wide(logits) - log_total.unsqueeze(-1)).exp()
        result.scatter_add_(-1, local.unsqueeze(-1), -is_own.unsqueeze(-1).to(result.dtype))
        result = result.masked_fill((labels == ctx.ignore).unsqueeze(-1), 0) * gradient
        return result.to(logits.dtype), None, None, None, None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def context_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axis: Axes,
    balanced: bool = False,
    dropout_p: float = 0.0,
    split: Axes | None = None,
    **options: Any,
) -> Tensor:
    """Causal attention of queries split by position over ``axis``, to the whole sequence's keys and values.

    ``balanced``: the first axis holds the sequence in balanced order (see `runtime.collectives`). Each run of
    consecutive queries attends to the keys up to its last one, so that no rank computes what the mask would drop.
    ``split``: the axes that split the result, along which dropout masks differ. ``options``: as in
    `F.scaled_dot_product_attention`.
    """
    axes = _tuple(axis)
    with _own_random_numbers(_tuple(split), dropout_p > 0):
        if not all(isinstance(axis.get_local_rank(), int) for axis in axes):
            # All ranks simulated at once: their runs differ in length, a mask over all keys does not.
            positions = _own_positions(key.size(-2), axes, balanced, query.device)
            mask = positions.unsqueeze(-1) >= torch.arange(key.size(-2), device=query.device)
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p, **options)
        heads, runs = [], _own_runs(key.size(-2), axes, balanced)
        for rows, (start, stop) in zip(query.split([b - a for a, b in runs], -2), runs, strict=True):
            keys, values = key.narrow(-2, 0, stop), value.narrow(-2, 0, stop)
            mask = _last_rows_causal(stop - start, stop, query.device)
            heads.append(F.scaled_dot_product_attention(rows, keys, values, mask, dropout_p=dropout_p, **options))
        return torch.cat(heads, -2) if len(heads) > 1 else heads[0]


def _last_rows_causal(rows: int, keys: int, device: torch.device) -> Tensor:
    """The causal mask of the last ``rows`` of ``keys`` positions. Attention kernels know it without its values; only
    torch.compile, which cannot build such a mask inside a graph, has them written out."""
    if torch.compiler.is_compiling():
        return torch.ones(rows, keys, dtype=torch.bool, device=device).tril(keys - rows)
    # A mode that watches operators (selective recomputation) cannot see such a mask being made either.
    with _disable_current_modes():
        return causal_lower_right(rows, keys)


def _own_runs(size: int, axes: tuple[DeviceMesh, ...], balanced: bool) -> list[tuple[int, int]]:
    """The (start, stop) of the runs of consecutive positions that this rank holds of a sequence of ``size``."""
    runs = [(0, size)]
    for place, axis in enumerate(axes):
        ranks, rank = axis.size(), axis.get_local_rank()
        parts = (rank, 2 * ranks - 1 - rank) if balanced and place == 0 else (rank,)
        length = sum(stop - start for start, stop in runs) // (ranks * len(parts))
        runs = [run for part in parts for run in _between(runs, part * length, (part + 1) * length)]
    return runs


def _between(runs: list[tuple[int, int]], first: int, last: int) -> list[tuple[int, int]]:
    """The part of ``runs``, one after another, from its element ``first`` up to ``last``."""
    found, before = [], 0
    for start, stop in runs:
        low, high = max(first - before, 0), min(last - before, stop - start)
        if low < high:
            found.append((start + low, start + high))
        before += stop - start
    return found


def _own_positions(size: int, axes: tuple[DeviceMesh, ...], balanced: bool, device: torch.device) -> Tensor:
    """The positions that this rank holds of a sequence of ``size``, on all ranks at once."""
    positions = torch.arange(size, device=device)
    for place, axis in enumerate(axes):
        ranks, rank = axis.size(), axis.get_local_rank()
        parts = (rank, 2 * ranks - 1 - rank) if balanced and place == 0 else (rank,)
        length = positions.size(0) // (ranks * len(parts))
        positions = torch.cat([positions.narrow(0, part * length, length) for part in parts])
    return positions


def dropout(x: Tensor, p: float, training: bool, axis: Axes) -> Tensor:
    """Dropout of a tensor that is split over ``axis``: every rank draws a mask of its own."""
    with _own_random_numbers(_tuple(axis), training):
        return F.dropout(x, p, training)


def drawn(x: Tensor, kind: str, axis: Axes = ()) -> Tensor:
    """Random numbers in the shape of ``x``: "uniform" in [0, 1), "normal" or "exponential". Where that is split over
    ``axis``, every rank draws its own."""
    if has_torch_function((x,)):
        result: Tensor = handle_torch_function(drawn, (x,), x, kind, axis=axis)
        return result
    with _own_random_numbers(_tuple(axis), True):
        numbers = torch.empty_like(x)
        return {"uniform": numbers.uniform_, "normal": numbers.normal_, "exponential": numbers.exponential_}[kind]()


def attention(query: Tensor, key: Tensor, value: Tensor, axis: Axes, dropout_p: float, **options: Any) -> Tensor:
    """Attention with dropout, its result split over ``axis``: every rank draws a mask of its own."""
    with _own_random_numbers(_tuple(axis), dropout_p > 0):
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, **options)


@contextmanager
def _own_random_numbers(axes: tuple[DeviceMesh, ...], active: bool) -> Iterator[None]:
    """Inside, random numbers differ between ranks that differ on one of ``axes``; after it, they agree again.

    The seed is drawn from the numbers the ranks share, so that recomputation (which restores those) draws it again.
    """
    if not active or not axes:
        yield
        return
    seed = int(torch.randint(2**62, ()).item())
    devices = [torch.cuda.current_device()] if axes[0].device_type == "cuda" else []
    own = 0
    for axis in axes:
        own = own * axis.size() + axis.get_local_rank()
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed + own)
        yield


def _own_ids(ids: Tensor, size: int, axis: Axes, vocabulary: int | None) -> tuple[Tensor, Tensor]:
    """Ids counted from this rank's first one (0 for those of other ranks), and which ids are this rank's."""
    axes = _tuple(axis)
    first: Tensor | int = 0
    left: Tensor | int = size * prod(axis.size() for axis in axes) if vocabulary is None else vocabulary
    for axis in axes:
        # Tensors of one number: on simulated ranks the rank is not one integer.
        rank = torch.arange(axis.size(), device=ids.device).narrow(0, axis.get_local_rank(), 1)
        chunk = (left + axis.size() - 1) // axis.size()
        first, left = first + rank * chunk, (left - rank * chunk).clamp(min=0).minimum(torch.zeros_like(rank) + chunk)
    is_own = (ids >= first) & (ids < first + left)
    return (ids - first).masked_fill(~is_own, 0), is_own


def _all_reduce(x: Tensor, operation: str, axis: Axes) -> Tensor:
    for each in _tuple(axis):
        reduced = _functional.all_reduce(x.contiguous(), operation, each.get_group().group_name)
        x = _functional.wait_tensor(reduced)
    return x


def _tuple(axis: Axes | None) -> tuple[DeviceMesh, ...]:
    return () if axis is None else axis if isinstance(axis, tuple) else (axis,)
