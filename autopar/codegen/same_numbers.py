"""Random numbers that are the same wherever they are drawn, so that two runs which draw them apart can be compared.

Of a model that draws numbers other than for dropout, evaluation may compute something else (no noise for a router): it
is compared as it trains, with every number drawn replaced by one and the same, and nothing dropped.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

NUMBERS = {"uniform": 0.375, "normal": 0.625, "exponential": 1.25}
"""Drawn each time, of the plain distributions; the same in every dtype."""

_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout)


def _uniform(x: torch.Tensor, low: float = 0.0, high: float = 1.0, **options: Any) -> torch.Tensor:
    low, high = options.get("from", low), options.get("to", high)
    return x.fill_(low + (high - low) * NUMBERS["uniform"])


def _normal(x: torch.Tensor, mean: float = 0.0, std: float = 1.0, **_: Any) -> torch.Tensor:
    return x.fill_(mean + std * NUMBERS["normal"])


def _exponential(x: torch.Tensor, lambd: float = 1.0, **_: Any) -> torch.Tensor:
    return x.fill_(NUMBERS["exponential"] / lambd)


_FUNCTIONS: dict[Any, Callable[..., torch.Tensor]] = {
    torch.Tensor.uniform_: _uniform,
    torch.Tensor.normal_: _normal,
    torch.Tensor.exponential_: _exponential,
    torch.rand_like: lambda x, **options: torch.full_like(x, NUMBERS["uniform"], **options),
    torch.randn_like: lambda x, **options: torch.full_like(x, NUMBERS["normal"], **options),
    torch.rand: lambda *size, **options: torch.full(_size(size), NUMBERS["uniform"], **options),
    torch.randn: lambda *size, **options: torch.full(_size(size), NUMBERS["normal"], **options),
    torch.randint: lambda *bounds, **options: _whole(*_bounds(bounds, options), **options),
    torch.randint_like: lambda x, *bounds, **options: _whole(*_bounds((*bounds, x.shape), options), **options),
    torch.bernoulli: lambda chance, **_: (chance > NUMBERS["uniform"]).to(chance.dtype),
    **{dropout: lambda x, *_, **__: x for dropout in _DROPOUTS},
}


def _bounds(given: tuple[Any, ...], options: dict[str, Any]) -> tuple[int, int, tuple[int, ...]]:
    """The least number, the one after the largest, and the size: by place, or taken out of ``options``."""
    size = tuple(given[-1]) if given and not isinstance(given[-1], int) else tuple(options.pop("size"))
    numbers = [each for each in given if isinstance(each, int)]
    high = options.pop("high", None)
    high = numbers.pop() if high is None else high
    return options.pop("low", numbers[0] if numbers else 0), high, size


def _whole(low: int, high: int, size: tuple[int, ...], **options: Any) -> torch.Tensor:
    options.setdefault("dtype", torch.int64)
    return torch.full(size, low + int(NUMBERS["uniform"] * (high - low)), **options)


def _size(size: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(size[0]) if size and not isinstance(size[0], int) else size


@functools.cache
def _body(func: Any) -> Callable[..., Any] | None:
    """A function of `F` that is written in Python and asks for a mode first (`gumbel_softmax`), without that question:
    torch turns a mode off while it handles a function, and what this one draws inside would not be seen."""
    if not isinstance(func, types.FunctionType) or func.__globals__ is not vars(F):
        return None
    asked = [name for name in func.__globals__ if name.startswith("has_torch_function")]
    known = func.__globals__ | dict.fromkeys(asked, lambda *_: False)
    body = types.FunctionType(func.__code__, known, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body


class SameNumbers(TorchFunctionMode):
    """Inside it, `NUMBERS` are what is drawn."""

    def __torch_function__(
        self, func: Any, _: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func in _FUNCTIONS and "generator" not in options:
            return _FUNCTIONS[func](*args, **options)
        if getattr(func, "__name__", "") == "drawn":  # the runtime that travels with emitted code has its own
            return torch.full_like(args[0], NUMBERS[args[1]])
        if func is F.scaled_dot_product_attention:
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            options |= {"dropout_p": 0.0} if "dropout_p" in options else {}
        body = _body(func)
        if body is not None:
            with self:
                return body(*args, **options)
        return func(*args, **options)
