"""Sizes that a model divides as numbers: ``batch = int(windows.shape[0] / (rows * columns / window**2))``.

The quotient of a symbolic size is a floating-point number, and `int` of that is one number: the size would be fixed.
While a model is traced, what its modules call `int` gives the size itself where the division leaves no rest.
"""

from __future__ import annotations

import builtins
import contextlib
import inspect
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import nn

_OTHERS = ("torch", "transformers", "autopar", "builtins")
"""Packages whose `int` is left alone."""


class _Whole(type):
    """The type of `int` as models see it: what is an int is one of it."""

    def __call__(cls, *args: Any, **options: Any) -> Any:
        whole = _quotient(args[0]) if len(args) == 1 else None
        return builtins.int(*args, **options) if whole is None else whole

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, builtins.int)

    def __subclasscheck__(cls, other: type) -> bool:
        return issubclass(other, builtins.int)


class _Int(int, metaclass=_Whole):
    pass


def _quotient(value: Any) -> torch.SymInt | None:
    """The size that ``value`` is a whole part of, divided."""
    size, divisor = getattr(value, "divided", (None, 0))
    if size is None or divisor < 1 or divisor != builtins.int(divisor):
        return None
    divisor = builtins.int(divisor)
    return size // divisor if (size.node.expr / divisor).is_integer else None


@contextlib.contextmanager
def quotients_whole(model: nn.Module) -> Iterator[None]:
    """While open, `int` of a quotient of a size is a size in the code of ``model``."""
    plain: Any = torch.SymInt.__truediv__

    def divided(self: torch.SymInt, other: Any) -> Any:
        result = plain(self, other)
        if isinstance(result, torch.SymFloat) and isinstance(other, builtins.int | float):
            result.divided = (self, other)  # type: ignore[attr-defined]
        return result

    modules = [module for module in _modules(model) if "int" not in vars(module) and _divides(module)]
    torch.SymInt.__truediv__ = divided  # type: ignore[method-assign]
    for module in modules:
        vars(module)["int"] = _Int
    try:
        yield
    finally:
        torch.SymInt.__truediv__ = plain  # type: ignore[method-assign]
        for module in modules:
            del vars(module)["int"]


def _modules(model: nn.Module) -> list[ModuleType]:
    """Where the code of ``model`` is: of its classes, and of functions that are used there."""
    names = dict.fromkeys(base.__module__ for child in model.modules() for base in type(child).__mro__)
    held = [sys.modules[name] for name in names if name in sys.modules and name.partition(".")[0] not in _OTHERS]
    used = dict.fromkeys(
        value.__module__ for module in held for value in vars(module).values() if inspect.isfunction(value)
    )
    more = [sys.modules[name] for name in used if name in sys.modules and name.partition(".")[0] not in _OTHERS]
    return list(dict.fromkeys([*held, *more]))


def _divides(module: ModuleType) -> bool:
    """Whether its source calls `int`, and does not ask whether something is that very class."""
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):
        return False
    return "int(" in source and "is int" not in source
