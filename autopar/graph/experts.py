"""The experts of a mixture, as one operator: what `autopar.experts` computes.

    autopar.experts(hidden [..., d], index [..., k], weights [..., k], up, down, up_bias?, down_bias?, values?,
                    values_bias?)  -> [..., d]

For each token, the sum over its k chosen experts e (``index``) of ``weight * (down_e @ act(up_e @ x + b) + c)``.
Weights of all experts are stacked: ``up`` [e, n, d] and ``down`` [e, d, f], or with ``transposed`` [e, d, n] and
[e, f, d]; biases [e, n] and [e, d]. ``gate`` says how the n rows of ``up`` hold the gate and the values: "none"
(n = f), "halves" (n = 2 f, the gate first), "pairs" (n = 2 f, gate and value in turn) or "apart" (n = f, the gate; the
values are ``values`` of the same shape). ``activation`` is one of `ACTIVATIONS`;
"clamped_swish" (the experts of gpt-oss, arXiv 2508.10925) has ``alpha`` and ``limit``, "clamped_silu" (the same
without ``alpha``, and without one added to the values) ``limit``. Indices outside of the experts
count nothing.

The routing weight multiplies what goes into ``down``, not what comes out: the same number, and a tensor [tokens k, f]
rather than [tokens k, d] is kept for backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from autopar.graph.dispatch import fullest_rows, sent_rows

GATES = ("halves", "pairs", "none")
"""What one tensor of three dims holds; "apart" takes two."""

_library = torch.library.Library("autopar", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "experts(Tensor hidden, Tensor index, Tensor weights, Tensor up, Tensor down, Tensor? up_bias=None, "
    "Tensor? down_bias=None, Tensor? values=None, Tensor? values_bias=None, *, int experts, str gate, "
    "bool transposed, str activation, float alpha=1.0, float limit=0.0) -> Tensor"
)
_library.impl(  # type: ignore[no-untyped-call]
    "experts", lambda hidden, *rest, **options: torch.empty_like(hidden), "CompositeExplicitAutograd"
)


def _clamped_swish(gate: Tensor, value: Tensor, alpha: float, limit: float) -> Tensor:
    gate, value = gate.clamp(max=limit), value.clamp(min=-limit, max=limit)
    return (value + 1) * gate * torch.sigmoid(gate * alpha)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}
"""What acts on the gate (or, without one, on the values)."""


def activated(
    rows: Tensor,
    gate: str,
    activation: str,
    alpha: float = 1.0,
    limit: float = 0.0,
    values: Tensor | None = None,
) -> Tensor:
    """What goes into ``down``, from what comes out of ``up`` (and of ``values``, where these are apart)."""
    if gate == "none":
        return ACTIVATIONS[activation](rows)
    if values is not None:
        first, second = rows, values
    else:
        first, second = rows.chunk(2, -1) if gate == "halves" else (rows[..., ::2], rows[..., 1::2])
    if activation == "clamped_silu":
        return F.silu(first.clamp(max=limit)) * second.clamp(min=-limit, max=limit)
    if activation == "clamped_swish":
        return _clamped_swish(first, second, alpha, limit)
    return ACTIVATIONS[activation](first) * second


def experts(
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    values: Tensor | None = None,
    values_bias: Tensor | None = None,
    *,
    experts: int,
    gate: str,
    transposed: bool = False,
    activation: str,
    alpha: float = 1.0,
    limit: float = 0.0,
    first: int = 0,
    ep: int = 1,
) -> Tensor:
    """The operator; with fewer experts than ``experts`` in ``up``, what those from ``first`` on contribute.

    On fake and meta tensors, whose indices are unknown, each expert gets its equal share of the tokens, or where others
    hold some of the experts, what the fullest rank gets (`IMBALANCE`). ``ep``: as many ranks send each other their
    tokens; ``up`` has the experts of one of them (such tensors only).
    """
    tokens, slots, own = hidden.flatten(0, -2), index.flatten() - first, up.size(0)
    if _unknown(hidden):
        each = slots.numel() // max(1, index.size(0))
        rows = fullest_rows(each, own, experts, ep) * index.size(0)
        sent = sent_rows(each, own, experts, ep) * index.size(0) if ep > 1 else rows
        order, counts = slots.argsort()[:sent], [rows]
    else:
        slots = slots.masked_fill((slots < 0) | (slots >= own), own)
        sizes = torch.bincount(slots, minlength=own + 1)[:own]
        order, counts = slots.argsort(stable=True)[: int(sizes.sum())], sizes.tolist()
    token = order // index.size(-1)
    groups = (counts, transposed)
    given, weight, expert = tokens[token], weights.flatten()[order].unsqueeze(-1), slots[order]
    if ep > 1:
        given, weight = _Sent.apply(given, rows), _Sent.apply(weight, rows)  # type: ignore[no-untyped-call]
        expert = slots.new_empty(rows)
    rows_up = _biased(_grouped(given, up, *groups), up_bias, expert)
    rows_values = None if values is None else _biased(_grouped(given, values, *groups), values_bias, expert)
    rows_down = _grouped(activated(rows_up, gate, activation, alpha, limit, rows_values) * weight, down, *groups)
    if down_bias is not None:
        rows_down = rows_down + down_bias[expert] * weight
    if ep > 1:
        rows_down = _Sent.apply(rows_down, order.numel())  # type: ignore[no-untyped-call]
    return torch.zeros_like(tokens).index_add(0, token, rows_down.to(tokens.dtype)).view_as(hidden)


def _biased(rows: Tensor, bias: Tensor | None, expert: Tensor) -> Tensor:
    return rows if bias is None else rows + bias[expert]


def _unknown(x: Tensor) -> bool:
    return x.is_meta or isinstance(x, FakeTensor)


def _grouped(rows: Tensor, weight: Tensor, counts: list[int], transposed: bool) -> Tensor:
    """Rows in groups of ``counts``, each times its own matrix."""
    return _Grouped.apply(rows, weight if transposed else weight.transpose(1, 2), counts)  # type: ignore[no-any-return, no-untyped-call]


class _Sent(torch.autograd.Function):
    """Rows that others send, in place of those sent to them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int) -> Tensor:
        ctx.rows = x.size(0)
        return x.new_empty(rows, *x.shape[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.new_empty(ctx.rows, *grad.shape[1:]), None


class _Grouped(torch.autograd.Function):
    """One kernel on a GPU; here one product for each group, and nothing at all where values are unknown."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.counts = counts
        if len(counts) != weight.size(0) or _unknown(rows):
            return rows.new_empty(rows.size(0), weight.size(2))
        parts = [part @ weight[group] for group, part in enumerate(torch.split(rows, counts))]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        rows, weight = ctx.saved_tensors
        if len(ctx.counts) != weight.size(0) or _unknown(rows):
            return torch.empty_like(rows), torch.empty_like(weight), None
        pairs = list(zip(torch.split(rows, ctx.counts), torch.split(grad, ctx.counts), strict=True))
        rows_grad = torch.cat([out @ weight[group].t() for group, (_, out) in enumerate(pairs)])
        return rows_grad, torch.stack([part.t() @ out for part, out in pairs]), None
