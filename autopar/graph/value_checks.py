"""Checks of values that only raise or warn: passed while a model is traced, since no graph can hold them.

``if labels.max() >= size: raise``, ``assert (ids >= 0).all()`` and the like ask for the value of a tensor, which a
graph of fixed shape does not know. Where the statement that asks is seen in the source to do nothing else, it is taken
to be satisfied. So is ``if not mask.any(): mask = None``, a shorter way for a mask that masks nothing: it is kept.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import linecache
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode


def checks_told(places: set[str]) -> tuple[str, ...]:
    """What to tell of the checks that passed."""
    what = "checks of values that only raise, warn or drop a mask that masks nothing are left out"
    return (f"{what} ({', '.join(sorted(places))})",) if places else ()


@contextlib.contextmanager
def checks_passed() -> Iterator[set[str]]:
    """While open, such checks pass. Collects the names of the functions that made them."""
    plain: Any = torch.SymBool.__bool__
    places: set[str] = set()

    def known(self: torch.SymBool) -> bool:
        try:
            return plain(self)  # type: ignore[no-any-return]
        except GuardOnDataDependentSymNode:  # of a size that follows from values
            frame = _caller()
            passed = passing_value(frame)
            if passed is None:
                raise
            places.add(frame.f_code.co_qualname)
            return passed

    torch.SymBool.__bool__ = known  # type: ignore[method-assign]
    try:
        with _Passing(places):
            yield places
    finally:
        torch.SymBool.__bool__ = plain  # type: ignore[method-assign]


class _Passing(TorchFunctionMode):
    def __init__(self, places: set[str]) -> None:
        super().__init__()
        self.places = places

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        asks = func in (torch.Tensor.__bool__, torch.Tensor.item) and args[0].dtype == torch.bool
        if asks and args[0].numel() == 1:
            frame = _caller()
            passed = passing_value(frame)
            if passed is not None:
                self.places.add(frame.f_code.co_qualname)
                return passed
        return func(*args, **(kwargs or {}))


def _caller() -> FrameType:
    """The innermost frame that is neither torch's machinery nor ours."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith("torch.distributions.") or module.partition(".")[0] not in ("torch", "autopar"):
            break
        frame = frame.f_back
    assert frame is not None
    return frame


def passing_value(frame: FrameType) -> bool | None:
    """What the condition that ``frame`` is at must be for its check to pass; None if it is part of no such check."""
    code = frame.f_code
    first, last, start, end = list(code.co_positions())[frame.f_lasti // 2]
    if first is None or last is None or start is None or end is None:
        return None
    for statement in _checks(code.co_filename):
        condition = statement.test
        whole = (statement.lineno, statement.col_offset) == (first, start)  # where the test begins with `not`
        if not whole and not any((node.lineno, node.col_offset) == (first, start) for node in _expressions(condition)):
            continue
        begin = (condition.lineno, condition.col_offset) if whole else (first, start)
        stop = (condition.end_lineno, condition.end_col_offset) if whole else (last, end)
        negated = sum(
            (node.lineno, node.col_offset) <= begin and (node.end_lineno, node.end_col_offset) >= stop
            for node in _expressions(condition)
            if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
        )
        return isinstance(statement, ast.Assert) != bool(negated % 2)
    return None


def _expressions(condition: ast.expr) -> Iterator[ast.expr]:
    return (node for node in ast.walk(condition) if isinstance(node, ast.expr))


@functools.cache
def _checks(filename: str) -> tuple[ast.If | ast.Assert, ...]:
    """The statements of a file that only check."""
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:
        return ()
    return tuple(
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
        or (isinstance(node, ast.If) and not node.orelse and all(_only_tells(each) for each in node.body))
        or (isinstance(node, ast.If) and not node.orelse and _drops_mask(node))
    )


def _only_tells(statement: ast.stmt) -> bool:
    """Whether a statement raises or warns."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        called = statement.value.func
        name = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
        return name.startswith("warn")
    return isinstance(statement, ast.Raise)


def _drops_mask(statement: ast.If) -> bool:
    """``if not mask.any(): mask = None``, the same with ``all`` or ``torch.any(mask)``, or ``return None`` after it."""
    test = statement.test.operand if isinstance(statement.test, ast.UnaryOp) else statement.test
    if not (isinstance(test, ast.Call) and isinstance(test.func, ast.Attribute) and test.func.attr in ("any", "all")):
        return False
    asked = test.args[0] if test.args else test.func.value
    match statement.body:
        case [ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=None))]:
            return isinstance(asked, ast.Name) and asked.id == name
        case [ast.Return(value=ast.Constant(value=None))]:
            return isinstance(asked, ast.Name)
    return False
