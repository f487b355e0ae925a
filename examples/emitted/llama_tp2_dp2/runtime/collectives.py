"""The communication a sharded forward pass is written with, one function per change of layout.

How the ranks of a mesh axis hold a tensor, and what that says about its gradient:

    R      replicate: all ranks hold the same whole, and use it differently; each rank's gradient is a summand
    I      invariant: all ranks hold the same whole, and do the same with it; each rank has the whole gradient
    P      partial:   the whole is the sum over the ranks; each rank has the whole gradient
    S(d)   sharded:   rank r holds the r-th slice of dim d; the gradient is sharded the same way

Every function takes the local tensor and the axis (a one-dimensional `DeviceMesh`), and has its backward built in:

    function                 forward                       backward
    all_gather               S -> R  all-gather            reduce-scatter
    all_gather_invariant     S -> I  all-gather            slice
    all_reduce               P -> R  all-reduce            all-reduce
    all_reduce_invariant     P -> I  all-reduce            nothing
    reduce_scatter           P -> S  reduce-scatter        all-gather
    replicate                I -> R  nothing               all-reduce
    shard                    R -> S  slice                 zero-pad
    shard_invariant          I -> S  slice                 all-gather
    all_to_all               S(i) -> S(j)  all-to-all      all-to-all
    zero_pad                 S -> P  zero-pad              slice
    keep_first               R -> P  zero but on rank 0    zero but on rank 0
    keep_first_invariant     I -> P  zero but on rank 0    nothing

All of them compile without graph breaks. A sharded dim must divide evenly by the axis.

``balanced``: the dim is a sequence that n ranks hold in balanced order: seen as 2n chunks, rank r has chunks r and
2n - 1 - r, one early and one late, so that causal attention is the same work for every rank.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

# Functional: they return new tensors, so that autograd and torch.compile can see through them.
_functional = torch.ops._c10d_functional


def all_gather(x: Tensor, axis: DeviceMesh, dim: int, balanced: bool = False) -> Tensor:
    """S(dim) -> R: concatenate the shards. Backward: reduce-scatter."""
    return _AllGather.apply(x, axis, dim, balanced)


def all_gather_invariant(x: Tensor, axis: DeviceMesh, dim: int, balanced: bool = False) -> Tensor:
    """S(dim) -> I: concatenate the shards. Backward: each rank takes its slice of the (whole) gradient."""
    return _AllGatherInvariant.apply(x, axis, dim, balanced)


def all_reduce(x: Tensor, axis: DeviceMesh) -> Tensor:
    """P -> R: add the summands. Backward: all-reduce."""
    return _AllReduce.apply(x, axis)


def all_reduce_invariant(x: Tensor, axis: DeviceMesh) -> Tensor:
    """P -> I: add the summands. Backward: nothing."""
    return _AllReduceInvariant.apply(x, axis)


def reduce_scatter(x: Tensor, axis: DeviceMesh, dim: int, balanced: bool = False) -> Tensor:
    """P -> S(dim): add the summands, each rank keeps its slice. Backward: all-gather."""
    return _ReduceScatter.apply(x, axis, dim, balanced)


def replicate(x: Tensor, axis: DeviceMesh) -> Tensor:
    """I -> R: the same tensor, from here on used differently by each rank. Backward: all-reduce."""
    return _Replicate.apply(x, axis)


def shard(x: Tensor, axis: DeviceMesh, dim: int, balanced: bool = False) -> Tensor:
    """R -> S(dim): keep this rank's slice. Backward: zero-pad."""
    return _Shard.apply(x, axis, dim, balanced)


def shard_invariant(x: Tensor, axis: DeviceMesh, dim: int, balanced: bool = False) -> Tensor:
    """I -> S(dim): keep this rank's slice. Backward: all-gather."""
    return _ShardInvariant.apply(x, axis, dim, balanced)


def all_to_all(x: Tensor, axis: DeviceMesh, source: int, target: int, balanced: int | None = None) -> Tensor:
    """S(source) -> S(target): each rank sends every other its part. Backward: the other way.

    ``balanced``: which of the two dims is a sequence in balanced order.
    """
    return _AllToAll.apply(x, axis, source, target, balanced)


def zero_pad(x: Tensor, axis: DeviceMesh, dim: int, balanced: bool = False) -> Tensor:
    """S(dim) -> P: this rank's slice at its place in zeros. Backward: slice."""
    return _ZeroPad.apply(x, axis, dim, balanced)


def keep_first(x: Tensor, axis: DeviceMesh) -> Tensor:
    """R -> P: zeros on all ranks but the first. Backward: the same."""
    return _KeepFirst.apply(x, axis)


def keep_first_invariant(x: Tensor, axis: DeviceMesh) -> Tensor:
    """I -> P: zeros on all ranks but the first. Backward: nothing."""
    return _KeepFirstInvariant.apply(x, axis)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: DeviceMesh, dim: int, balanced: bool) -> Tensor:
        ctx.axis, ctx.dim, ctx.balanced = axis, dim, balanced
        return _gathered(x, axis, dim, balanced)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _reduced_slice(gradient, ctx.axis, ctx.dim, ctx.balanced), None, None, None


class _AllGatherInvariant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: DeviceMesh, dim: int, balanced: bool) -> Tensor:
        ctx.axis, ctx.dim, ctx.balanced = axis, dim, balanced
        return _gathered(x, axis, dim, balanced)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _own_slice(gradient, ctx.axis, ctx.dim, ctx.balanced), None, None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: DeviceMesh) -> Tensor:
        ctx.axis = axis
        return _reduced(x, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _reduced(gradient, ctx.axis), None


class _AllReduceInvariant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: DeviceMesh) -> Tensor:
        return _reduced(x, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: DeviceMesh, dim: int, balanced: bool) -> Tensor:
        ctx.axis, ctx.dim, ctx.balanced = axis, dim, balanced
        return _reduced_slice(x, axis, dim, balanced)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _gathered(gradient, ctx.axis, ctx.dim, ctx.balanced), None, None, None


class _Replicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: DeviceMesh) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _reduced(gradient, ctx.axis), None


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: DeviceMesh, dim: int, balanced: bool) -> Tensor:
        ctx.axis, ctx.dim, ctx.balanced = axis, dim, balanced
        return _own_slice(x, axis, dim, balanced)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _padded(gradient, ctx.axis, ctx.dim, ctx.balanced), None, None, None


class _ShardInvariant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: DeviceMesh, dim: int, balanced: bool) -> Tensor:
        ctx.axis, ctx.dim, ctx.balanced = axis, dim, balanced
        return _own_slice(x, axis, dim, balanced)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _gathered(gradient, ctx.axis, ctx.dim, ctx.balanced), None, None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: DeviceMesh, source: int, target: int, balanced: int | None) -> Tensor:
        ctx.axis, ctx.source, ctx.target, ctx.balanced = axis, source, target, balanced
        return _exchanged(x, axis, source, target, balanced)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _exchanged(gradient, ctx.axis, ctx.target, ctx.source, ctx.balanced), None, None, None, None


class _ZeroPad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: DeviceMesh, dim: int, balanced: bool) -> Tensor:
        ctx.axis, ctx.dim, ctx.balanced = axis, dim, balanced
        return _padded(x, axis, dim, balanced)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _own_slice(gradient, ctx.axis, ctx.dim, ctx.balanced), None, None, None


class _KeepFirst(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: DeviceMesh) -> Tensor:
        ctx.axis = axis
        return _first_only(x, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _first_only(gradient, ctx.axis), None


class _KeepFirstInvariant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: DeviceMesh) -> Tensor:
        return _first_only(x, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


def _gathered(x: Tensor, axis: DeviceMesh, dim: int, balanced: bool) -> Tensor:
    ranks = axis.size()
    stacked = _functional.all_gather_into_tensor(x.contiguous(), ranks, axis.get_group().group_name)
    stacked = _functional.wait_tensor(stacked)
    if _leads(x, dim):
        whole = stacked.view(*x.shape[:dim], ranks * x.size(dim), *x.shape[dim + 1 :])
    else:
        whole = torch.cat(stacked.chunk(ranks), dim)
    return _in_sequence(whole, ranks, dim) if balanced else whole


def _reduced(x: Tensor, axis: DeviceMesh) -> Tensor:
    return _functional.wait_tensor(_functional.all_reduce(x.contiguous(), "sum", axis.get_group().group_name))


def _reduced_slice(x: Tensor, axis: DeviceMesh, dim: int, balanced: bool) -> Tensor:
    ranks = axis.size()
    size = x.size(dim) // ranks
    if balanced:
        x = _by_rank(x, ranks, dim)
    stacked = x.contiguous().flatten(0, dim) if _leads(x, dim) else torch.cat(x.chunk(ranks, dim))
    piece = _functional.reduce_scatter_tensor(stacked, "sum", ranks, axis.get_group().group_name)
    return _functional.wait_tensor(piece).view(*x.shape[:dim], size, *x.shape[dim + 1 :])


def _leads(x: Tensor, dim: int) -> bool:
    """Whether the slices of ``dim`` follow one another in memory, so that nothing need be copied."""
    return x.shape[:dim].numel() == 1


def _exchanged(x: Tensor, axis: DeviceMesh, source: int, target: int, balanced: int | None) -> Tensor:
    ranks = axis.size()
    if balanced == target:
        x = _by_rank(x, ranks, target)
    stacked = torch.cat(x.chunk(ranks, target))
    sizes = [stacked.size(0) // ranks] * ranks
    received = _functional.all_to_all_single(stacked, sizes, sizes, axis.get_group().group_name)
    whole = torch.cat(_functional.wait_tensor(received).chunk(ranks), source)
    return _in_sequence(whole, ranks, source) if balanced == source else whole


def _own_slice(x: Tensor, axis: DeviceMesh, dim: int, balanced: bool) -> Tensor:
    ranks, rank = axis.size(), axis.get_local_rank()
    if balanced:
        size = x.size(dim) // (2 * ranks)
        return torch.cat([x.narrow(dim, chunk * size, size) for chunk in (rank, 2 * ranks - 1 - rank)], dim)
    size = x.size(dim) // ranks
    # A copy, so that the whole can be freed.
    return x.narrow(dim, rank * size, size).clone(memory_format=torch.contiguous_format)


def _padded(x: Tensor, axis: DeviceMesh, dim: int, balanced: bool) -> Tensor:
    ranks, rank = axis.size(), axis.get_local_rank()
    whole = x.new_zeros((*x.shape[:dim], x.size(dim) * ranks, *x.shape[dim + 1 :]))
    chunks = (rank, 2 * ranks - 1 - rank) if balanced else (rank,)
    for chunk, part in zip(chunks, x.chunk(len(chunks), dim), strict=True):
        whole.narrow(dim, chunk * part.size(dim), part.size(dim)).copy_(part)
    return whole


def _in_sequence(x: Tensor, ranks: int, dim: int) -> Tensor:
    """The chunks of ``dim``, held in balanced order rank after rank, in the order of the sequence."""
    chunks = x.chunk(2 * ranks, dim)
    return torch.cat([*chunks[::2], *reversed(chunks[1::2])], dim)


def _by_rank(x: Tensor, ranks: int, dim: int) -> Tensor:
    """The inverse of `_in_sequence`."""
    chunks = x.chunk(2 * ranks, dim)
    return torch.cat(
        [part for pair in zip(chunks[:ranks], reversed(chunks[ranks:]), strict=True) for part in pair], dim
    )


def _first_only(x: Tensor, axis: DeviceMesh) -> Tensor:
    is_first = torch.arange(axis.size(), device=x.device).narrow(0, axis.get_local_rank(), 1) == 0
    return torch.where(is_first, x, torch.zeros_like(x))
