"""What a trace in a narrow dtype would lose or could not decide: numbers, and whether all is finite.

``torch.tensor(32**0.5, dtype=x.dtype)`` would be a constant rounded to the dtype of the trace; a tensor filled with the
number keeps it. ``if not torch.isfinite(x).all(): ...`` asks for values that no trace has: models do so to clamp what
has overflowed, and are traced as if nothing had.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_ANSWERS = {"isfinite": ("all", True), "isinf": ("any", False), "isnan": ("any", False)}
"""Tests of elements: how a model asks about all of them, and what it is told."""


class _Marks:
    """Something known of each of some tensors, by identity."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[Tensor, Any]] = {}

    def put(self, x: Tensor, value: Any) -> None:
        self._held[id(x)] = (x, value)  # kept alive, so that ids are not reused

    def of(self, x: Any) -> Any:
        return self._held.get(id(x), (None, None))[1]


@contextlib.contextmanager
def numbers_kept() -> Iterator[None]:
    """While open, numbers made tensors of 16 bits are not rounded, and all is finite."""
    asked, answers = _Marks(), _Marks()
    replaced: list[tuple[Any, str, Any]] = []

    def put(owner: Any, name: str, made: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        plain = getattr(owner, name)
        replaced.append((owner, name, plain))
        setattr(owner, name, made(plain))

    def number(plain: Callable[..., Any]) -> Callable[..., Any]:
        def tensor(data: Any, *args: Any, **options: Any) -> Any:
            if type(data) is float and options.get("dtype") in (torch.bfloat16, torch.float16):
                return torch.full((), data, **options)
            return plain(data, *args, **options)

        return tensor

    def test(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def made(plain: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(plain)
            def call(x: Any, *args: Any, **options: Any) -> Any:
                result = plain(x, *args, **options)
                if isinstance(result, Tensor):
                    asked.put(result, name)
                return result

            return call

        return made

    def whole(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def made(plain: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(plain)
            def call(x: Any, *args: Any, **options: Any) -> Any:
                result = plain(x, *args, **options)
                how, answer = _ANSWERS.get(asked.of(x), ("", False))
                if how == name and not args and not options:
                    answers.put(result, answer)
                return result

            return call

        return made

    def truth(plain: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plain)
        def call(x: Tensor) -> bool:
            answer: bool | None = answers.of(x)
            return plain(x) if answer is None else answer

        return call

    put(torch, "tensor", number)
    for owner in (torch, Tensor):
        for name in _ANSWERS:
            put(owner, name, test(name))
        for name in ("all", "any"):
            put(owner, name, whole(name))
    put(Tensor, "__bool__", truth)
    try:
        yield
    finally:
        for owner, name, plain in reversed(replaced):
            setattr(owner, name, plain)
