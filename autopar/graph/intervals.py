"""Arithmetic of ranges: between which numbers the result of an operator lies, given those of its operands."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

Range = tuple[float, float]
"""The least and the greatest number there may be; not a number: nothing is known."""

FALSE, TRUE, EITHER = (0.0, 0.0), (1.0, 1.0), (0.0, 1.0)


def union(one: Range, other: Range) -> Range:
    return min(one[0], other[0]), max(one[1], other[1])


def _as(x: Range, dtype: torch.dtype | None) -> Range:
    if dtype == torch.bool:
        return _truth(x)
    whole = dtype is not None and not dtype.is_floating_point and all(map(math.isfinite, x))
    return (float(math.trunc(x[0])), float(math.trunc(x[1]))) if whole else x


def _truth(x: Range) -> Range:
    return FALSE if x == FALSE else TRUE if x[0] > 0 or x[1] < 0 else EITHER


def _each(function: Callable[[float], float]) -> Callable[[Range, Any], Range]:
    """Of a function that grows with its argument."""
    return lambda x, _: (
        function(x[0]) if math.isfinite(x[0]) else x[0],
        function(x[1]) if math.isfinite(x[1]) else x[1],
    )


def _corners(function: Callable[[float, float], float]) -> Callable[[Range, Range], Range]:
    def found(x: Range, y: Range) -> Range:
        numbers = [function(a, b) for a in x for b in y]
        return (math.nan, math.nan) if any(map(math.isnan, numbers)) else (min(numbers), max(numbers))

    return found


def _quotient(x: Range, y: Range) -> Range:
    return (math.nan, math.nan) if y[0] <= 0 <= y[1] else _corners(lambda a, b: a / b)(x, y)


def _less(x: Range, y: Range) -> Range:
    return TRUE if x[1] < y[0] else FALSE if x[0] >= y[1] else EITHER


def _less_or_equal(x: Range, y: Range) -> Range:
    return TRUE if x[1] <= y[0] else FALSE if x[0] > y[1] else EITHER


def _equal(x: Range, y: Range) -> Range:
    if x[1] < y[0] or y[1] < x[0]:
        return FALSE
    return TRUE if x[0] == x[1] == y[0] == y[1] else EITHER


def _not(x: Range, _: Any = None) -> Range:
    return {FALSE: TRUE, TRUE: FALSE}.get(_truth(x), EITHER)


def _and(x: Range, y: Range) -> Range:
    return FALSE if FALSE in (x, y) else TRUE if x == y == TRUE else EITHER if _truths(x, y) else (math.nan, math.nan)


def _or(x: Range, y: Range) -> Range:
    return TRUE if TRUE in (x, y) and _truths(x, y) else FALSE if x == y == FALSE else _and_unknown(x, y)


def _and_unknown(x: Range, y: Range) -> Range:
    return EITHER if _truths(x, y) else (math.nan, math.nan)


def _truths(x: Range, y: Range) -> bool:
    return all(0 <= number <= 1 for number in (*x, *y))


KEPT = frozenset(
    [
        "to",
        "type",
        "clone",
        "contiguous",
        "expand",
        "expand_as",
        "view",
        "view_as",
        "reshape",
        "flatten",
        "unflatten",
        "transpose",
        "permute",
        "movedim",
        "unsqueeze",
        "squeeze",
        "select",
        "narrow",
        "__getitem__",
        "repeat",
        "repeat_interleave",
        "tile",
        "broadcast_to",
        "detach",
        "flip",
        "roll",
        "index_select",
        "gather",
        "max",
        "min",
        "amax",
        "amin",
        "mean",
        "any",
        "all",
        "float",
        "double",
        "half",
        "bfloat16",
        "long",
        "int",
        "bool",
        "t",
    ]
)
"""Functions that keep a tensor's range, whatever else they are given (or change it by its dtype)."""
OF_ONE: dict[str, Callable[[Range, Any], Range]] = {
    **dict.fromkeys(KEPT, lambda x, _: x),
    "to": _as,
    "type": _as,
    "bool": lambda x, _: _truth(x),
    "any": lambda x, _: _truth(x),
    "all": lambda x, _: _truth(x),
    **dict.fromkeys(("long", "int"), lambda x, _: _as(x, torch.int64)),
    "neg": lambda x, _: (-x[1], -x[0]),
    "abs": lambda x, _: x if x[0] >= 0 else (-x[1], -x[0]) if x[1] <= 0 else (0.0, max(-x[0], x[1])),
    "ceil": _each(math.ceil),
    "floor": _each(math.floor),
    "trunc": _each(math.trunc),
    **dict.fromkeys(("logical_not", "invert"), _not),
}
OF_TWO: dict[str, Callable[[Range, Range], Range]] = {
    "add": _corners(lambda a, b: a + b),
    "sub": _corners(lambda a, b: a - b),
    "rsub": _corners(lambda a, b: b - a),
    "mul": _corners(lambda a, b: a * b),
    "div": _quotient,
    "rdiv": lambda x, y: _quotient(y, x),
    "maximum": lambda x, y: (max(x[0], y[0]), max(x[1], y[1])),
    "minimum": lambda x, y: (min(x[0], y[0]), min(x[1], y[1])),
    "lt": _less,
    "le": _less_or_equal,
    "gt": lambda x, y: _less(y, x),
    "ge": lambda x, y: _less_or_equal(y, x),
    "eq": _equal,
    "ne": lambda x, y: _not(_equal(x, y)),
    "and": _and,
    "or": _or,
}
