"""Buffers in emitted code: by their formula where it gives the very same numbers, else as literals, or from a file."""

from __future__ import annotations

import torch

from autopar.codegen.source import Binary, Call, Expr, Method, Text, Value, literal
from autopar.errors import UnsupportedError
from autopar.graph.buffers import LARGEST_FILED
from autopar.graph.interpret import torch_dtype
from autopar.graph.ir import ModelGraph, TensorMeta

_MOST_LITERAL = 512


def buffer_expr(name: str, meta: TensorMeta, values: tuple[float, ...] | None, double: bool) -> Expr:
    """The buffer ``name`` as an expression on ``device``; ``double``: floating-point values are computed in float64.

    Raises UnsupportedError when its values are unknown.
    """
    shape = meta.at(1, 1)
    if values is None:
        raise UnsupportedError(
            f"buffer {name}: its values are not known, so emitted code cannot recreate it; hand over a model that "
            f"holds them (is not on meta), at most {LARGEST_FILED:,} in a buffer"
        )
    floating = _is_floating(meta)
    if (theta := _theta(meta, values)) is not None:
        size = 2 * len(values)
        steps: Expr = Call("torch.arange", (literal(0), literal(size), literal(2), ("device", Value("device"))))
        exponent = Binary("/", Method(steps, "float"), literal(size))
        # In float32 also for a float64 job: the numbers are the model's own.
        return Binary("/", literal(1.0), Binary("**", literal(theta), exponent))
    if in_file(meta, values):
        options = dict(_where(meta, double))
        return Call("held", (literal(name), options["device"], options["dtype"]))
    if len(set(values)) == 1 and len(values) > 1:
        filled = literal(values[0] if floating else int(values[0]))
        return Call("torch.full", (literal(shape), filled, *_where(meta, double)))
    if meta.dtype == "int64" and len(values) > 2 and values == tuple(range(len(values))):
        counted: Expr = Call("torch.arange", (literal(len(values)), ("device", Value("device"))))
        return counted if len(shape) <= 1 else Method(counted, "reshape", tuple(literal(size) for size in shape))
    numbers = values if floating else tuple(int(value) for value in values)
    listed = Call("", tuple(literal(number) for number in numbers)) if len(numbers) > 1 else literal(numbers)
    if shape == ():
        listed = literal(numbers[0])
    tensor: Expr = Call("torch.tensor", (listed, *_where(meta, double)))
    return tensor if len(shape) <= 1 else Method(tensor, "reshape", tuple(literal(size) for size in shape))


def in_file(meta: TensorMeta, values: tuple[float, ...]) -> bool:
    """Whether the values are too many to write down."""
    return len(values) > _MOST_LITERAL and _theta(meta, values) is None


def _is_floating(meta: TensorMeta) -> bool:
    return meta.dtype in ("compute", "float32", "float64", "bfloat16", "float16")


def _theta(meta: TensorMeta, values: tuple[float, ...]) -> float | None:
    """The base of rotary frequencies, if these are such."""
    return _rotary_base(values) if _is_floating(meta) and len(meta.shape) == 1 else None


def filed(model: ModelGraph) -> dict[str, torch.Tensor]:
    """The buffers, by full name, that emitted code reads from its file."""
    return {
        name: torch.tensor(values, dtype=torch_dtype(meta.dtype, torch.float32)).reshape(meta.at(1, 1))
        for name, meta in model.buffers.items()
        if (values := model.buffer_values.get(name)) is not None and in_file(meta, values)
    }


def _where(meta: TensorMeta, double: bool) -> tuple[tuple[str, Expr], ...]:
    device: tuple[str, Expr] = ("device", Value("device"))
    if meta.dtype == "compute":
        return ("dtype", Value("dtype")), device
    name = "float64" if double and meta.dtype == "float32" else meta.dtype
    return ("dtype", Text(f"torch.{name}")), device


def _rotary_base(values: tuple[float, ...]) -> float | None:
    """theta if the values are exactly 1 / theta ** (arange(0, d, 2) / d) in float32, else None."""
    size = 2 * len(values)
    if len(values) < 2 or values[0] != 1.0 or not 0 < values[-1] < 1:
        return None
    # The last value has the exponent nearest to 1, and so the least rounding error left in theta.
    theta = float(round(values[-1] ** (-size / (size - 2))))
    formula = 1.0 / theta ** (torch.arange(0, size, 2).float() / size)
    return theta if torch.equal(formula, torch.tensor(values, dtype=torch.float32)) else None
