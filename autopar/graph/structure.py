"""Repeated modules of a model, by structure: which children of a container are the same but for their weights."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

_MODULE_STATE = frozenset(nn.Module().__dict__) | {"_is_hf_initialized"}


def repeats(model: nn.Module) -> dict[str, str]:
    """Path of each repeated layer → its structure key (equal keys: equal but for weights and integer attributes).

    Layers are the numbered children, with children of their own, of the outermost containers in which at least two have
    the same structure; children of the same class with another structure (a dense layer among expert layers) count too.
    Where nothing has the same structure, the same class will do.
    """
    return _search(model, "", same_structure=True) or _search(model, "", same_structure=False)


def _search(module: nn.Module, path: str, same_structure: bool) -> dict[str, str]:
    found: dict[str, str] = {}
    numbered = {name: child for name, child in module.named_children() if name.isdigit()}
    deep = {name: child for name, child in numbered.items() if next(child.children(), None) is not None}
    keys = {name: structure(child) for name, child in deep.items()}
    same = {name: key if same_structure else str(type(deep[name])) for name, key in keys.items()}
    counts = Counter(same.values())
    classes = {type(deep[name]) for name, key in same.items() if counts[key] > 1}
    for name, child in module.named_children():
        full = f"{path}.{name}" if path else name
        if name in deep and type(child) in classes:
            found[full] = keys[name]
        else:
            found.update(_search(child, full, same_structure))
    return found


def structure(module: nn.Module) -> str:
    """A text equal for modules with the same classes, parameter shapes and attributes, integers left out.

    Integer attributes are compared apart (`integers`): most often they are the position, which forward may not use.
    """
    parts: list[str] = []
    for path, child in module.named_modules():
        parts.append(f"{path}:{type(child).__module__}.{type(child).__qualname__}")
        for name, tensor in (*child._parameters.items(), *child._buffers.items()):
            if tensor is not None:
                parts.append(f"{name}{tuple(tensor.shape)}{tensor.dtype}{tensor.requires_grad}")
        parts.extend(f"{name}={text}" for name, text in _attributes(child))
        hooks = (child._forward_hooks, child._forward_pre_hooks, child._backward_hooks)
        if any(hooks):
            parts.append(f"hooks of {id(child)}")
    return "\n".join(parts)


def integers(module: nn.Module) -> dict[tuple[str, str], int]:
    """(module path, attribute) → value, for every integer attribute of ``module`` and its children."""
    return {
        (path, name): value
        for path, child in module.named_modules()
        for name, value in child.__dict__.items()
        if isinstance(value, int) and not isinstance(value, bool) and name not in _MODULE_STATE
    }


def _attributes(module: nn.Module) -> Iterator[tuple[str, str]]:
    for name, value in sorted(module.__dict__.items()):
        if name in _MODULE_STATE or (isinstance(value, int) and not isinstance(value, bool)):
            continue
        yield name, _text(value)


def _text(value: Any) -> str:
    """Equal for equal values; objects without a value of their own are told apart by identity."""
    if value is None or isinstance(value, str | int | float | bytes):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}({','.join(_text(item) for item in value)})"
    if isinstance(value, dict):
        return f"dict({','.join(f'{_text(k)}:{_text(v)}' for k, v in value.items())})"
    if isinstance(value, set | frozenset):
        return f"set({','.join(sorted(_text(item) for item in value))})"
    if isinstance(value, functools.partial):
        return f"partial({_text(value.func)},{_text(value.args)},{_text(value.keywords)})"
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return f"{value.__module__}.{value.__qualname__}@{id(value)}"
    return f"{type(value).__name__}@{id(value)}"


def layer_of(path: str, layers: Mapping[str, str]) -> str | None:
    """The layer (with ``@k`` of a repeated call) that module ``path`` lies in, or None."""
    parts = path.split(".")
    for count in range(1, len(parts) + 1):
        called = ".".join(parts[:count])
        if re.sub(r"@\d+", "", called) in layers:
            return called
    return None
