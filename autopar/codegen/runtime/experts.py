"""The experts of a mixture: all rows that chose an expert go through its matrices together.

Where ranks share the experts (expert parallelism), rows are sent to the rank that holds their expert and come back; how
many go where is known only as they are sent, so that every rank tells the others first. None is dropped.
"""

from math import prod
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._local_tensor import LocalTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import handle_torch_function, has_torch_function

from .collectives import all_gather, reduce_scatter
from .operators import Axes


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
    gate: str = "halves",
    transposed: bool = False,
    activation: str = "silu",
    alpha: float = 1.0,
    limit: float = 0.0,
    axis: Axes | None = None,
    ep: DeviceMesh | None = None,
) -> Tensor:
    """For each token of ``hidden`` [..., d], the sum over the experts e that it chose of weight * down_e(act(up_e(x))).

    ``index``, ``weights`` [..., k]: the chosen experts and their weights. ``up`` [e, n, d], ``down`` [e, d, f] (with
    ``transposed`` [e, d, n] and [e, f, d]); biases [e, n], [e, d]. ``gate``: the n rows of ``up`` are the gate, then
    the values ("halves"), both in turn ("pairs"), values alone ("none"), or the gate alone ("apart"), and those of
    ``values`` and ``values_bias``, of the same shapes, the values. ``axis``: the experts are split over it, and this
    rank adds up what its own contribute; the result is partial then, as it is where f is split. ``ep``: each
    of its ranks has tokens of its own and the next part of the experts, which ``axis`` may split again.
    """
    if has_torch_function((hidden,)):  # recomputation and type checks see it as one function
        tensors = (hidden, index, weights, up, down, up_bias, down_bias, values, values_bias)
        form = {"gate": gate, "transposed": transposed, "activation": activation, "alpha": alpha, "limit": limit}
        result: Tensor = handle_torch_function(experts, (hidden,), *tensors, **form, axis=axis, ep=ep)
        return result
    tokens, slots, count = hidden.flatten(0, -2), index.flatten(), up.size(0)
    ranks = 1 if ep is None else ep.size()
    if axis is not None:
        # Counted among the experts of all ranks of ep with this place on ``axis``; others are sorted behind these.
        own = slots % (count * _size(axis)) - _rank(axis, slots.device) * count
        slots = slots // (count * _size(axis)) * count + own
        slots = slots.masked_fill((own < 0) | (own >= count), count * ranks)
    act = (gate, activation, alpha, limit)
    if not transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
        values = None if values is None else values.transpose(1, 2)
    if isinstance(hidden, LocalTensor):
        matrices = (up, down, up_bias, down_bias, values, values_bias)
        return _by_masks(tokens, slots, weights, matrices, act, ep).view_as(hidden)
    sizes = torch.zeros(count * ranks + 1, dtype=torch.int32, device=slots.device)
    sizes = sizes.scatter_add_(0, slots, torch.ones_like(slots, dtype=torch.int32))[: count * ranks]
    order = slots.argsort(stable=True)
    if axis is not None:
        order = order[: int(sizes.sum())]
    expert, token = slots[order], order // index.size(-1)
    rows, weight = tokens[token], weights.flatten()[order].unsqueeze(-1)
    if ep is not None:
        routes = _Routes(sizes, count, ep)
        rows, weight, expert, sizes = routes.there(rows), routes.there(weight), routes.expert, routes.sizes
    value_rows = None if values is None else _biased(grouped(rows, values, sizes), values_bias, expert)
    rows = _biased(grouped(rows, up, sizes), up_bias, expert)
    # The weight is applied before the last product, not after: what is kept for backward is f wide, not d.
    weight = weight.to(rows.dtype)
    rows = grouped(activated(rows, *act, values=value_rows) * weight, down, sizes)
    if down_bias is not None:
        rows = rows + down_bias[expert] * weight
    if ep is not None:
        rows = routes.back(rows)
    return torch.zeros_like(tokens).index_add(0, token, rows).view_as(hidden)


class _Routes:
    """Where rows go: from order by expert of all ranks here, to order by expert of this rank there. ``expert``: of each
    row that came; ``sizes``: rows of each expert."""

    def __init__(self, sizes: Tensor, count: int, ep: DeviceMesh) -> None:
        sent = sizes.view(ep.size(), count)
        came = _exchange(sent, None, None, ep)
        self.ep, self.sent, self.came = ep, sent.sum(1).tolist(), came.sum(1).tolist()
        expert = torch.arange(count, device=sizes.device).repeat(ep.size()).repeat_interleave(came.flatten())
        self.order = expert.argsort(stable=True)
        self.expert, self.sizes = expert[self.order], came.sum(0, dtype=torch.int32)

    def there(self, rows: Tensor) -> Tensor:
        return _Exchange.apply(rows, self.sent, self.came, self.ep)[self.order]

    def back(self, rows: Tensor) -> Tensor:
        rows = torch.empty_like(rows).index_copy(0, self.order, rows)
        return _Exchange.apply(rows, self.came, self.sent, self.ep)


class _Exchange(torch.autograd.Function):
    """Every rank sends ``sent[r]`` rows to rank r, and gets ``came[r]`` from it; gradients go back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], came: list[int], ep: DeviceMesh) -> Tensor:
        ctx.way = (came, sent, ep)
        return _exchange(rows, sent, came, ep)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _exchange(gradient, *ctx.way), None, None, None


def _exchange(x: Tensor, sent: list[int] | None, came: list[int] | None, ep: DeviceMesh) -> Tensor:
    result = x.new_empty(x.size(0) if came is None else sum(came), *x.shape[1:])
    dist.all_to_all_single(result, x.contiguous(), came, sent, group=ep.get_group())
    return result


def _biased(rows: Tensor, bias: Tensor | None, expert: Tensor | int) -> Tensor:
    return rows if bias is None else rows + bias[expert]


def activated(rows: Tensor, gate: str, activation: str, alpha: float, limit: float, values: Tensor | None) -> Tensor:
    """The activation, times the values where there is a gate."""
    if gate == "none":
        return _act(rows, activation)
    first = rows
    if values is None:
        first, values = rows.chunk(2, -1) if gate == "halves" else (rows[..., ::2], rows[..., 1::2])
    if activation == "clamped_silu":
        return F.silu(first.clamp(max=limit)) * values.clamp(-limit, limit)
    if activation == "clamped_swish":
        first, values = first.clamp(max=limit), values.clamp(-limit, limit)
        return (values + 1) * first * torch.sigmoid(first * alpha)
    return _act(first, activation) * values


def _act(x: Tensor, activation: str) -> Tensor:
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "relu2":
        return F.relu(x).square()
    function = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}[activation]
    return function(x)


def grouped(rows: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    """``rows`` [n, k] in groups of ``sizes``, each times its own of ``weight`` [groups, k, m]."""
    # The kernel wants rows of whole 16 bytes.
    if rows.is_cuda and rows.dtype == torch.bfloat16 and rows.size(1) % 8 == 0 and weight.size(2) % 8 == 0:
        return F.grouped_mm(rows, weight, offs=sizes.cumsum(0, dtype=torch.int32))
    return _OneByOne.apply(rows, weight, sizes)


class _OneByOne(torch.autograd.Function):
    """A product for each group."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
        ctx.sizes = sizes.tolist()
        ctx.save_for_backward(rows, weight)
        return torch.cat([part @ weight[group] for group, part in enumerate(rows.split(ctx.sizes))])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        rows, weight = ctx.saved_tensors
        pairs = list(zip(rows.split(ctx.sizes), gradient.split(ctx.sizes), strict=True))
        to_rows = torch.cat([part @ weight[group].t() for group, (_, part) in enumerate(pairs)])
        return to_rows, torch.stack([part.t() @ grad for part, grad in pairs]), None


def _by_masks(
    tokens: Tensor,
    slots: Tensor,
    weights: Tensor,
    matrices: tuple[Tensor | None, ...],
    act: tuple[str, str, float, float],
    ep: DeviceMesh | None,
) -> Tensor:
    """The same, every expert on every token: for ranks simulated at once, which hold different numbers of rows."""
    up, down, up_bias, down_bias, values, values_bias = matrices
    assert up is not None
    assert down is not None
    slots, weights = slots.view(tokens.size(0), -1), weights.flatten(0, -2)
    if ep is not None:
        tokens, slots, weights = (all_gather(x, ep, 0) for x in (tokens, slots, weights))
        slots = slots - _rank(ep, slots.device) * up.size(0)
    result = torch.zeros_like(tokens)
    for expert in range(up.size(0)):
        rows = _biased(tokens @ up[expert], up_bias, expert)
        value_rows = None if values is None else _biased(tokens @ values[expert], values_bias, expert)
        rows = _biased(activated(rows, *act, values=value_rows) @ down[expert], down_bias, expert)
        share = weights.masked_fill(slots != expert, 0).sum(-1, keepdim=True)
        result = result + rows * share.to(rows.dtype)
    return result if ep is None else reduce_scatter(result, ep, 0)


def _size(axis: Axes) -> int:
    return prod(each.size() for each in (axis if isinstance(axis, tuple) else (axis,)))


def _rank(axis: Axes, device: torch.device) -> Tensor:
    """This rank's place along ``axis``, a tensor of one number: on simulated ranks it is not one integer."""
    place = torch.zeros(1, dtype=torch.int64, device=device)
    for each in axis if isinstance(axis, tuple) else (axis,):
        place = place * each.size() + torch.arange(each.size(), device=device).narrow(0, each.get_local_rank(), 1)
    return place
