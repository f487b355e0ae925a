"""Functions that tracing does not look into: each call is one operator, ``leaf.<module>.<name>``.

A leaf is an ordinary function, or the ``apply`` of a `torch.autograd.Function` (whose own backward tracing would lose).
Outside of tracing it runs as it is.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from autopar.errors import BadInputError, UnsupportedError
from autopar.graph.functions import PLAIN_APPLY, annotation_of, backward_is_plain
from autopar.graph.ir import Ref, substitute
from autopar.graph.ops import CALLS

NAMESPACE = "leaf"


@dataclass(frozen=True, slots=True)
class Leaf:
    """One leaf: the function as it was, the module it is in, and what it is called there."""

    call: Callable[..., torch.Tensor]
    module: str
    name: str

    @property
    def op(self) -> str:
        return f"{NAMESPACE}.{self.module}.{self.name}"


LEAVES: dict[str, Leaf] = {}
"""All leaves by operator."""

_tracing = False
_arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
"""Of the calls traced so far, arguments with `Ref` to "0", "1", ... in place of tensors."""

_library = torch.library.Library("autopar", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("leaf(str op, Tensor[] tensors, int call) -> Tensor")  # type: ignore[no-untyped-call]


@torch.library.register_fake("autopar::leaf", lib=_library)  # type: ignore[untyped-decorator]
def _run(op: str, tensors: list[torch.Tensor], call: int) -> torch.Tensor:
    args, kwargs = arguments_of(call, tensors)
    result = LEAVES[op].call(*args, **kwargs)
    if not isinstance(result, torch.Tensor):
        raise UnsupportedError(f"the leaf {op} returns a {type(result).__name__}; a leaf returns one tensor")
    return result.clone()


def arguments_of(call: int, tensors: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a traced call, with ``tensors`` in their places."""
    args, kwargs = _arguments[call]
    found: tuple[tuple[Any, ...], dict[str, Any]] = substitute((args, kwargs), lambda name: tensors[int(name)])
    return found


def make_leaf(target: Any) -> tuple[Any, Leaf]:
    """``target`` so that tracing stops at it, and its `Leaf`. Raises BadInputError for what is no function."""
    if isinstance(target, type) and issubclass(target, torch.autograd.Function):
        leaf = Leaf(target.apply, target.__module__, f"{target.__qualname__}.apply")
        stop = _stopping(leaf)

        def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            # A subclass computes something else.
            return stop(*args, **kwargs) if cls is target else super(target, cls).apply(*args, **kwargs)

        target.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
        made: Any = target
    elif callable(target) and not isinstance(target, type) and hasattr(target, "__qualname__"):
        leaf = Leaf(target, target.__module__, target.__qualname__)
        made = _stopping(leaf)
    else:
        raise BadInputError(
            f"a leaf is a function or a torch.autograd.Function, not {target!r}; of a module, make the function that "
            "its forward calls a leaf"
        )
    if "<locals>" in leaf.name:
        raise BadInputError(f"the leaf {leaf.name} is defined inside a function: emitted code could not import it")
    LEAVES[leaf.op] = leaf
    CALLS[leaf.op] = leaf.call
    return made, leaf


def _stopping(leaf: Leaf) -> Callable[..., torch.Tensor]:
    @functools.wraps(leaf.call)
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        if not _tracing:
            return leaf.call(*args, **kwargs)
        tensors: list[torch.Tensor] = []

        def place(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                tensors.append(value)
                return Ref(str(len(tensors) - 1))
            if isinstance(value, tuple | list):
                return tuple(place(item) for item in value)
            return value

        _arguments.append((tuple(place(value) for value in args), {key: place(value) for key, value in kwargs.items()}))
        result: torch.Tensor = torch.ops.autopar.leaf(leaf.op, tensors, len(_arguments) - 1)
        return result

    return call


FOUND: dict[str, str] = {}
"""Annotations of autograd Functions that nobody has told of, by operator: found by running them."""


def _found_leaf(cls: Any, args: tuple[Any, ...]) -> Callable[..., torch.Tensor] | None:
    """The ``apply`` of a Function as an operator of its own, if it can be: importable, called with tensors and plain
    values, and found to compute something."""
    plain = all(value is None or isinstance(value, bool | int | float | str | torch.Tensor) for value in args)
    if not plain or "<locals>" in cls.__qualname__:
        return None
    leaf = Leaf(PLAIN_APPLY.__get__(None, cls), cls.__module__, f"{cls.__qualname__}.apply")
    annotation = annotation_of(cls, args)
    if annotation is None or FOUND.get(leaf.op, annotation) != annotation:
        return None  # calls of different forms would need several annotations
    FOUND[leaf.op] = annotation
    LEAVES[leaf.op] = leaf
    CALLS[leaf.op] = leaf.call
    return _stopping(leaf)


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """While open, leaves are recorded as operators, and so are other autograd Functions than torch's whose backward
    tracing would lose: by what is found of them, or they refuse to be traced."""
    global _tracing

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith("torch.") and not backward_is_plain(cls, args):
            if (call := _found_leaf(cls, args)) is not None:
                return call(*args)
            raise UnsupportedError(
                f"{cls.__module__}.{cls.__qualname__} is a torch.autograd.Function whose backward is not that of the "
                "operators in its forward, so that tracing would lose it: make it a leaf, with its sharding rule: "
                f"autopar.leaf({cls.__qualname__}, 'b s d -> b s d')"
            )
        return PLAIN_APPLY.__get__(None, cls)(*args, **kwargs)

    _tracing = True
    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        _tracing = False
        torch.autograd.Function.apply = PLAIN_APPLY  # type: ignore[method-assign]
