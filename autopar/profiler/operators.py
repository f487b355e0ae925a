"""How each operator that is measured is run: calls for each direction of a family at one point.

Matmuls are measured as the three products that a linear layer's training runs, in the memory layouts that autograd
hands to the library: x w^T forward, g w for the gradient of the input, g^T x for that of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autopar.profiler.shapes import Family, Point

Buffers = Mapping[str, Callable[[int], object]]
"""For each direction, a function that runs it on the buffers with an index."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
Build = Callable[[Point, torch.dtype, torch.device, int], Buffers]
"""Calls at a point in a dtype on a device, with so many sets of buffers."""


BLOCK = 1 << 20


def _tensors(shape: Sequence[int], dtype: torch.dtype, device: torch.device, sets: int) -> list[Tensor]:
    """Normal numbers, a block of them again and again: constants would draw less power, and all new ones take long."""
    elements = prod(shape)
    block = torch.randn(min(elements, BLOCK), device=device).to(dtype)
    made = block.repeat(-(-elements // len(block)))[:elements].view(tuple(shape))
    return [made.clone() for _ in range(sets)]


def _trained(function: Callable[[int], Tensor], wanted: Callable[[int], Sequence[Tensor]]) -> Buffers:
    """Forward as training runs it (autograd records), and the backward of a graph that was recorded once."""
    graphs: dict[int, tuple[Tensor, Tensor]] = {}

    def backward(index: int) -> object:
        if index not in graphs:
            output = function(index)
            graphs[index] = (output, torch.ones_like(output))
        output, gradient = graphs[index]
        return torch.autograd.grad(output, tuple(wanted(index)), gradient, retain_graph=True)

    return {"forward": function, "backward": backward}


def _matmul(point: Point, dtype: torch.dtype, device: torch.device, sets: int) -> Buffers:
    m, n, k = point
    if dtype == DTYPES["fp8"]:
        return _scaled_matmul(point, dtype, device, sets)
    x, w, g = (_tensors(shape, dtype, device, sets) for shape in ((m, k), (n, k), (m, n)))
    return {
        "forward": lambda i: torch.mm(x[i], w[i].t()),
        "input_grad": lambda i: torch.mm(g[i], w[i]),
        "weight_grad": lambda i: torch.mm(g[i].t(), x[i]),
    }


def _scaled_matmul(point: Point, dtype: torch.dtype, device: torch.device, sets: int) -> Buffers:
    """float8 with one scale for each tensor. The library wants the right operand column-major; the copies that make it
    so are the business of what casts to float8, and are not timed."""
    m, n, k = point
    one = torch.ones((), device=device)
    pairs = {"forward": (m, k, n), "input_grad": (m, n, k), "weight_grad": (n, m, k)}
    made = {
        name: (_tensors((a, b), dtype, device, sets), _tensors((c, b), dtype, device, sets))
        for name, (a, b, c) in pairs.items()
    }

    def product(name: str) -> Callable[[int], object]:
        left, right = made[name]
        kind = F.ScalingType.TensorWise

        def run(index: int) -> object:
            return F.scaled_mm(
                left[index], right[index].t(), one, kind, one, kind, output_dtype=torch.bfloat16, use_fast_accum=True
            )

        return run

    return {name: product(name) for name in pairs}


def _batched(point: Point, dtype: torch.dtype, device: torch.device, sets: int) -> Buffers:
    batch, m, n, k = point
    x, y, g = (_tensors((batch, *shape), dtype, device, sets) for shape in ((m, k), (k, n), (m, n)))
    return {
        "forward": lambda i: torch.bmm(x[i], y[i]),
        "input_grad": lambda i: torch.bmm(g[i], y[i].transpose(1, 2)),
        "weight_grad": lambda i: torch.bmm(x[i].transpose(1, 2), g[i]),
    }


def _grouped(point: Point, dtype: torch.dtype, device: torch.device, sets: int) -> Buffers:
    """``rows`` rows shared out evenly over the groups, as balanced experts have them; in sixteens, since kernels want
    groups that begin at an aligned address."""
    groups, rows, n, k = point
    x, w = (_tensors(shape, dtype, device, sets) for shape in ((rows, k), (groups, n, k)))
    ends = torch.tensor(
        [rows * (g + 1) // groups // 16 * 16 for g in range(groups - 1)] + [rows], dtype=torch.int32, device=device
    )
    for tensor in (*x, *w):
        tensor.requires_grad_()
    return _trained(lambda i: F.grouped_mm(x[i], w[i].transpose(1, 2), offs=ends), lambda i: (x[i], w[i]))


def _attention(causal: bool) -> Build:
    def build(point: Point, dtype: torch.dtype, device: torch.device, sets: int) -> Buffers:
        problems, group, length, head_dim = point
        q = _tensors((1, problems, length, head_dim), dtype, device, sets)
        k, v = (_tensors((1, problems // group, length, head_dim), dtype, device, sets) for _ in range(2))
        for tensor in (*q, *k, *v):
            tensor.requires_grad_()

        def run(index: int) -> Tensor:
            return F.scaled_dot_product_attention(q[index], k[index], v[index], is_causal=causal, enable_gqa=group > 1)

        return _trained(run, lambda i: (q[i], k[i], v[i]))

    return build


def _norm(layer: bool) -> Build:
    def build(point: Point, dtype: torch.dtype, device: torch.device, sets: int) -> Buffers:
        x, w, b = (_tensors(shape, dtype, device, sets) for shape in (point, point[1:], point[1:]))
        for tensor in (*x, *w, *b):
            tensor.requires_grad_()
        width = point[1:]
        if layer:
            return _trained(lambda i: F.layer_norm(x[i], width, w[i], b[i]), lambda i: (x[i], w[i], b[i]))
        return _trained(lambda i: F.rms_norm(x[i], width, w[i], 1e-6), lambda i: (x[i], w[i]))

    return build


def _unary(function: Callable[[Tensor], Tensor]) -> Build:
    def build(point: Point, dtype: torch.dtype, device: torch.device, sets: int) -> Buffers:
        x = _tensors(point, dtype, device, sets)
        for tensor in x:
            tensor.requires_grad_()
        return _trained(lambda i: function(x[i]), lambda i: (x[i],))

    return build


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Build:
    def build(point: Point, dtype: torch.dtype, device: torch.device, sets: int) -> Buffers:
        x, y = (_tensors(point, dtype, device, sets) for _ in range(2))
        for tensor in (*x, *y):
            tensor.requires_grad_()
        return _trained(lambda i: function(x[i], y[i]), lambda i: (x[i], y[i]))

    return build


def _cross_entropy(point: Point, dtype: torch.dtype, device: torch.device, sets: int) -> Buffers:
    """Of logits widened to float32, as models compute it."""
    rows, vocabulary = point
    x = _tensors(point, dtype, device, sets)
    labels = torch.arange(rows, device=device) % vocabulary
    for tensor in x:
        tensor.requires_grad_()
    return _trained(lambda i: F.cross_entropy(x[i].float(), labels), lambda i: (x[i],))


def _embedding(point: Point, dtype: torch.dtype, device: torch.device, sets: int) -> Buffers:
    rows, vocabulary, width = point
    tables = _tensors((vocabulary, width), dtype, device, sets)
    ids = [torch.randint(vocabulary, (rows,), device=device) for _ in range(sets)]
    for table in tables:
        table.requires_grad_()
    return _trained(lambda i: F.embedding(ids[i], tables[i]), lambda i: (tables[i],))


def _adamw(fused: bool) -> Build:
    """A step over eight parameters (an optimizer sees many: one kernel for all, or a few, is what is measured)."""

    def build(point: Point, dtype: torch.dtype, device: torch.device, sets: int) -> Buffers:
        optimizers = []
        for _ in range(sets):
            parameters = []
            for _ in range(8):
                parameter = torch.zeros(-(-point[0] // 8), dtype=dtype, device=device, requires_grad=True)
                parameter.grad = torch.ones_like(parameter)
                parameters.append(parameter)
            optimizers.append(torch.optim.AdamW(parameters, fused=fused, foreach=not fused))
        return {"step": lambda i: optimizers[i].step()}

    return build


def _copied(to_host: bool) -> Build:
    """Between the device and pinned memory of its host (on the CPU: within its memory)."""

    def build(point: Point, dtype: torch.dtype, device: torch.device, sets: int) -> Buffers:
        pinned = device.type != "cpu"
        host = [torch.zeros(point, dtype=torch.uint8, pin_memory=pinned) for _ in range(sets)]
        here = [torch.zeros(point, dtype=torch.uint8, device=device) for _ in range(sets)]
        source, target = (here, host) if to_host else (host, here)
        return {"copy": lambda i: target[i].copy_(source[i], non_blocking=True)}

    return build


BUILD: dict[str, Build] = {
    "matmul": _matmul,
    "batched_matmul": _batched,
    "grouped_matmul": _grouped,
    "attention": _attention(False),
    "causal_attention": _attention(True),
    "layer_norm": _norm(True),
    "rms_norm": _norm(False),
    "softmax": _unary(lambda x: F.softmax(x, -1)),
    "silu": _unary(F.silu),
    "gelu": _unary(F.gelu),
    "multiply": _binary(torch.mul),
    "add": _binary(torch.add),
    "copy": _unary(torch.clone),
    "cross_entropy": _cross_entropy,
    "embedding": _embedding,
    "adamw_fused": _adamw(True),
    "adamw_foreach": _adamw(False),
    "copy_to_device": _copied(False),
    "copy_to_host": _copied(True),
}
"""By name of the family."""


def supported(each: Family, dtype: str, device: torch.device) -> str:
    """Why the device does not run the family in the dtype, or "" if it does: tried at a small point."""
    point = tuple(max(low, min(high, 64)) for low, high in zip(each.low, each.high, strict=True))
    if each.fixed:
        point = tuple(each.fixed[i][0] if i in each.fixed else size for i, size in enumerate(point))
    try:
        calls: Any = BUILD[each.name](point, DTYPES.get(dtype, torch.uint8), device, 1)
        for call in calls.values():
            call(0)
        if device.type != "cpu":
            getattr(torch, device.type).synchronize(device)
    # Torch refuses in all of these ways: no kernel, no such function in this version, no such dtype or argument there.
    except (RuntimeError, NotImplementedError, ValueError, AttributeError, TypeError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return ""
