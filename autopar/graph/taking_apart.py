"""Models that take a batch apart sample by sample while they are traced, where its size is no number.

``len(x)`` must be a number for Python, and a loop over ``x`` as many rounds. Both would fix the batch size. While a
model is exported, ``len`` of a tensor of unknown length is that unknown, and iteration gives one stand-in for all the
samples: it may be joined again (``cat``, ``stack``), which is what such models do, and nothing else.
"""

from __future__ import annotations

import builtins
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from autopar.errors import UnsupportedError
from autopar.graph.value_checks import passing_value


class Samples:
    """Stands for the samples of ``whole``, in a list of its own."""

    def __init__(self, whole: torch.Tensor) -> None:
        self.__dict__["_whole"] = whole

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> torch.Tensor:
        tensors, *rest = args
        options = dict(kwargs or {})
        dim = rest[0] if rest else options.get("dim", 0)
        alone = isinstance(tensors, list | tuple) and len(tensors) == 1 and dim == 0
        if alone and func is torch.cat:
            return tensors[0]._whole.flatten(0, 1)  # type: ignore[no-any-return]
        if alone and func is torch.stack:
            return tensors[0]._whole  # type: ignore[no-any-return]
        raise _refusal(getattr(func, "__name__", str(func)))

    def __getattr__(self, name: str) -> Any:
        raise _refusal(name)

    def __getitem__(self, index: Any) -> Any:
        raise _refusal("indexing")


def _refusal(what: str) -> UnsupportedError:
    return UnsupportedError(
        f"the model takes a batch apart in a loop over its samples and calls {what} on each; write it for the whole "
        "batch at once (joining the samples again by cat or stack along dim 0 is understood)"
    )


def refused_samples(error: Exception) -> str | None:
    """What to say of a function that refused a stand-in for samples by its type (as ``error`` tells); None of others.

    As with sizes of images that differ by sample, ``interpolate(x, size=(height, width))``.
    """
    if isinstance(error, TypeError) and f"{Samples.__module__}.{Samples.__qualname__}" in str(error):
        return str(_refusal("a function that takes numbers"))
    return None


def _unknown(x: Any) -> bool:
    """Whether dim 0 of ``x`` has a symbolic size; not one that follows from values, which nothing can stand for."""
    return _symbolic(x) and not free_unbacked_symbols(x.shape[0])


def _symbolic(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.ndim > 0 and isinstance(x.shape[0], torch.SymInt)


@contextlib.contextmanager
def unknown_lengths() -> Iterator[None]:
    """While open, Python's ``len`` and iteration do not turn a symbolic size of a tensor into a number."""
    plain_len, plain_iter, plain_size = builtins.len, torch.Tensor.__iter__, torch.Tensor.__len__

    def length(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return plain_len(x)
        checked = _symbolic(x) and passing_value(sys._getframe(1)) is not None  # no matter what it follows from
        return x.shape[0] if checked or _unknown(x) else plain_len(x)

    def iterate(x: torch.Tensor) -> Iterator[Any]:
        return iter([Samples(x)]) if _unknown(x) else plain_iter(x)  # type: ignore[no-untyped-call]

    def size(x: torch.Tensor) -> int:
        if _unknown(x):
            raise TypeError("the length of this tensor is not known")  # so that list(x) goes on without it
        return plain_size(x)  # type: ignore[no-untyped-call, no-any-return]

    builtins.len = length
    torch.Tensor.__len__ = size  # type: ignore[method-assign]
    torch.Tensor.__iter__ = iterate  # type: ignore[method-assign]
    try:
        yield
    finally:
        builtins.len = plain_len
        torch.Tensor.__iter__ = plain_iter  # type: ignore[method-assign]
        torch.Tensor.__len__ = plain_size  # type: ignore[method-assign]
