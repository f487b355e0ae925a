"""Buffers in emitted code: by their formula where it gives the very same numbers, else as literals."""

from __future__ import annotations

import torch

from autopar.codegen.source import Binary, Call, Expr, Method, Text, Value, literal
from autopar.errors import UnsupportedError
from autopar.graph.ir import TensorMeta

_MOST_LITERAL = 512


def buffer_expr(name: str, meta: TensorMeta, values: tuple[float, ...] | None, double: bool) -> Expr:
    """The buffer ``name`` as an expression on ``device``; ``double``: floating-point values are computed in float64.

    Raises UnsupportedError when its values are unknown or too many to write down.
    """
    shape = meta.at(1, 1)
    if values is None:
        raise UnsupportedError(f"buffer {name}: its values are not known, so emitted code cannot recreate it")
    floating = meta.dtype in ("compute", "float32", "float64", "bfloat16", "float16")
    theta = _rotary_base(values) if floating and len(shape) == 1 else None
    if theta is not None:
        size = 2 * len(values)
        steps: Expr = Call("torch.arange", (literal(0), literal(size), literal(2), ("device", Value("device"))))
        exponent = Binary("/", Method(steps, "float"), literal(size))
        # In float32 also for a float64 job: the numbers are the model's own.
        return Binary("/", literal(1.0), Binary("**", literal(theta), exponent))
    if len(values) > _MOST_LITERAL:
        raise UnsupportedError(
            f"buffer {name} of {len(values)} values has no formula that autopar knows; compute it in forward, or make "
            "it a parameter"
        )
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
