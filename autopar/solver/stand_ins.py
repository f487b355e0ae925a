"""The buffers that conversions, the cross-entropy of a split vocabulary and ring attention make, on one rank's fake
tensors.

Each does without communication what its function in `codegen/runtime` makes and frees, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from autopar.sharding.conversions import Step
from autopar.sharding.layout import SpmdType


class Conversion(torch.autograd.Function):
    """A conversion with the buffers that the emitted code makes for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Step, ranks: int, balanced: bool) -> Tensor:
        ctx.step, ctx.ranks, ctx.balanced = step, ranks, balanced
        return (
            x.view_as(x) if step.forward == "none" else _act(x, step.forward, step.source, step.target, ranks, balanced)
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        step = ctx.step
        if step.backward != "none":
            grad = _act(grad, step.backward, step.target.gradient, step.source.gradient, ctx.ranks, ctx.balanced)
        return grad, None, None, None


def _act(x: Tensor, action: str, source: SpmdType, target: SpmdType, ranks: int, balanced: bool) -> Tensor:
    return _ACTIONS[action](x, source.dim, target.dim, ranks, balanced)


def _gathered(x: Tensor, dim: int, _: int, ranks: int, balanced: bool) -> Tensor:
    shape = (*x.shape[:dim], ranks * x.size(dim), *x.shape[dim + 1 :])
    x = x.contiguous()
    stacked = x.new_empty((ranks * x.size(0), *x.shape[1:]) if x.ndim else (ranks,))
    whole = stacked.view(shape) if _leads(x, dim) else torch.cat(stacked.chunk(ranks), dim)
    del stacked
    return whole.clone() if balanced else whole


def _reduced_slice(x: Tensor, _: int, dim: int, ranks: int, balanced: bool) -> Tensor:
    shape = (*x.shape[:dim], x.size(dim) // ranks, *x.shape[dim + 1 :])
    if balanced:
        x = x.clone(memory_format=torch.contiguous_format)
    stacked = x.contiguous() if _leads(x, dim) else torch.cat(x.chunk(ranks, dim))
    return stacked.new_empty(shape)


def _exchanged(x: Tensor, source: int, target: int, ranks: int, balanced: bool) -> Tensor:
    if balanced:
        x = x.clone(memory_format=torch.contiguous_format)
    stacked = torch.cat(x.chunk(ranks, target))
    received = stacked.new_empty(stacked.shape)
    return torch.cat(received.chunk(ranks), source)


def _own_slice(x: Tensor, _: int, dim: int, ranks: int, balanced: bool) -> Tensor:
    return x.narrow(dim, 0, x.size(dim) // ranks).clone(memory_format=torch.contiguous_format)


def _padded(x: Tensor, dim: int, _: int, ranks: int, balanced: bool) -> Tensor:
    return x.new_zeros((*x.shape[:dim], ranks * x.size(dim), *x.shape[dim + 1 :]))


def _first_only(x: Tensor, *_: Any) -> Tensor:
    zeros = torch.zeros_like(x)
    return zeros.new_empty(zeros.shape)


def _reduced(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x.contiguous())


_ACTIONS: Mapping[str, Callable[..., Tensor]] = {
    "all_gather": _gathered,
    "reduce_scatter": _reduced_slice,
    "all_to_all": _exchanged,
    "all_reduce": _reduced,
    "slice": _own_slice,
    "pad": _padded,
    "keep": _first_only,
}


def _leads(x: Tensor, dim: int) -> bool:
    return x.shape[:dim].numel() == 1


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def all_reduced(x: Tensor, axis: str, operation: str) -> Tensor:
    return torch.empty_like(x) if operation == "max" else _Summed.apply(x)  # type: ignore[no-untyped-call]


class VocabCrossEntropy(torch.autograd.Function):
    """The tensors of `codegen/runtime/operators._VocabCrossEntropy`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        wide = _wide(logits)
        largest = wide.amax(-1)
        log_total = (wide - largest.unsqueeze(-1)).exp().sum(-1)
        ctx.save_for_backward(logits, labels, log_total)
        return log_total.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        logits, labels, log_total = ctx.saved_tensors
        result = (_wide(logits) - log_total.unsqueeze(-1)).exp()
        result = result.masked_fill((labels == 0).unsqueeze(-1), 0) * grad
        return result.to(logits.dtype), None


class RingAttention(torch.autograd.Function):
    """The tensors of `codegen/runtime/ring._Ring`: keys and values as one message, another one coming in, results of
    a turn and their sum in float32; backward two more messages, with gradients. Later turns are like the third.
    ``halves``: whether turns after the first have half of the queries or half of the keys."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ranks: int, halves: bool) -> Tensor:
        ctx.turns, ctx.halves = min(ranks, 3), halves
        held = torch.cat((key.flatten(), value.flatten()))
        for turn in range(ctx.turns):
            coming = torch.empty_like(held) if turn < ctx.turns - 1 else held
            made = _heads_beside(query)
            sums = query.new_empty(query.shape[:-1], dtype=_wide_type(query))
            if turn == 0:
                whole, total = _wide(made), sums
            else:
                more, wider = torch.empty_like(sums), _wide(made)
                share = more.new_empty(more.shape)
                del more, wider, share
            del made, sums
            held = coming
        made = _heads_beside(query).copy_(whole)
        ctx.save_for_backward(query, key, value, made, total)
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value = ctx.saved_tensors[:3]
        of_query = query.new_zeros(query.shape, dtype=_wide_type(query))
        held = torch.cat((key.flatten(), value.flatten()))
        returning = sent = None
        for turn in range(ctx.turns):
            coming = torch.empty_like(held) if turn < ctx.turns - 1 else held
            made = [torch.empty_like(x) for x in _larger_half(query, key, value, ctx.halves and turn > 0)]
            made.pop(0)
            sent = torch.zeros_like(held) if returning is None else returning
            made.clear()
            returning = torch.empty_like(sent)
            held = coming
        del sent
        assert returning is not None
        return of_query.to(query.dtype), key.new_empty(key.shape), value.new_empty(value.shape), None, None


def _larger_half(query: Tensor, key: Tensor, value: Tensor, halved: bool) -> tuple[Tensor, Tensor, Tensor]:
    """All of them, or with half of the positions of the queries or of the others, whichever leaves more."""
    if not halved:
        return query, key, value
    if query.numel() > key.numel() + value.numel():
        return query, key.chunk(2, -2)[0], value.chunk(2, -2)[0]
    return query.chunk(2, -2)[0], key, value


def _heads_beside(query: Tensor) -> Tensor:
    return query.new_empty(query.transpose(1, 2).shape).transpose(1, 2)


class InPlaceCrossEntropy(torch.autograd.Function):
    """The tensors of Megatron-Core's `_VocabParallelCrossEntropy`: logits widened, all else in their place, kept; the
    gradient in the same place, then narrowed."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        wide = logits.to(_wide_type(logits), copy=True)
        ctx.save_for_backward(wide, labels)
        ctx.dtype = logits.dtype
        return wide.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.saved_tensors[0].to(ctx.dtype, copy=True), None


class CompiledInPlaceCrossEntropy(InPlaceCrossEntropy):
    """The same under torch.compile, which makes what is summed in a tensor of its own, and copies it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        total = InPlaceCrossEntropy.forward(ctx, logits, labels)
        return total + logits.new_empty(logits.shape, dtype=_wide_type(logits)).sum()


class CompiledCrossEntropy(torch.autograd.Function):
    """The tensors of a compiled cross-entropy: logits as they came are kept, their gradient is made in one kernel."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        total = logits.new_empty(logits.shape[:-1], dtype=_wide_type(logits))
        ctx.save_for_backward(logits, labels, total)
        return total.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return torch.empty_like(ctx.saved_tensors[0]), None


LOSSES: Mapping[str, type[torch.autograd.Function]] = {
    "compiled": CompiledCrossEntropy,
    "in-place": InPlaceCrossEntropy,
    "in-place-compiled": CompiledInPlaceCrossEntropy,
}
"""Of stacks (`Stack.loss`); what is plain is run as it is."""


def _wide_type(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype == torch.float64 else torch.float32


def _wide(x: Tensor) -> Tensor:
    return x.to(_wide_type(x))
