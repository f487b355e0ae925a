"""Where a model turns a symbolic size into a number, so that a refusal can say so."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[dict[int, str]]:
    """While open, collects for each number that a symbolic size becomes the place in ``model`` that made it so.

    torch.export builds its own shape environment, so the class is watched; the hook is torch's own and private, hence
    only used for messages: without it they say less.
    """
    places: dict[int, str] = {}
    paths = {id(module): path for path, module in model.named_modules()}
    original = getattr(ShapeEnv, "_set_replacement", None)
    if original is None:
        yield places
        return

    def record(self: ShapeEnv, symbol: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(value, "is_Integer", False):
            places.setdefault(int(value), _place(paths))
        return original(self, symbol, value, *args, **kwargs)

    ShapeEnv._set_replacement = record  # type: ignore[method-assign, assignment]
    try:
        yield places
    finally:
        ShapeEnv._set_replacement = original  # type: ignore[method-assign]


def place_of(model: nn.Module) -> str:
    """The place in ``model`` that is being run."""
    return _place({id(module): path for path, module in model.named_modules()})


def raised_in(error: BaseException) -> str:
    """Path, class, file and line of the innermost forward that ``error`` came through; "" if none."""
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append((trace.tb_frame, trace.tb_lineno))
        trace = trace.tb_next
    found, paths = "", dict[int, str]()
    for frame, line in frames:
        if (module := _forward_of(frame)) is None:
            continue
        paths = paths or {id(child): path for path, child in module.named_modules()}
        _, inside, path = paths.get(id(module), "").partition("model")  # as `LossOf` calls the user's model
        if inside:
            where = f"({type(module).__name__}, {frame.f_code.co_filename}:{line})"
            found = f"module {path.lstrip('.')!r} {where}" if path else f"the model {where}"
    return found


def _forward_of(frame: FrameType) -> nn.Module | None:
    """The module whose forward ``frame`` runs."""
    names = frame.f_code.co_varnames
    module = frame.f_locals.get(names[0]) if names else None
    return module if frame.f_code.co_name == "forward" and isinstance(module, nn.Module) else None


def _place(paths: dict[int, str]) -> str:
    """Path, class, file and line of the innermost forward of the user's model on the stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = _forward_of(frame)
        if module is not None and id(module) in paths:
            path = paths[id(module)]
            where = f"{type(module).__name__}.forward, {frame.f_code.co_filename}:{frame.f_lineno}"
            return f"module {path!r} ({where})" if path else f"the model ({where})"
        frame = frame.f_back
    return "the loss"
