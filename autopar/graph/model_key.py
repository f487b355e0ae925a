"""What the trace of a module depends on, as a key: modules with equal keys have equal graphs.

A key describes the module tree (classes, attributes, shapes and sharing of parameters, values of buffers), the code
that it runs (of each class, down to what it overrides of torch's, with the plain global values that it names) and the
example inputs and loss. Code is told by its identity; once it is gone, and other code may come to have the same one,
the key equals none. What cannot be described so (an open file, a generator, a large buffer) leaves a module without a
key.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import hashlib
import inspect
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autopar.graph.leaves import FOUND, LEAVES

MOST = 1 << 22
"""Bytes of a tensor whose values are compared."""

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, enum.Enum)
_STATE = frozenset(nn.Module().__dict__) - {"training"}


class _OpaqueError(Exception):
    """Something that has no description."""


class ModelKey:
    """Equal for modules that trace alike."""

    def __init__(self, text: bytes, code: Iterable[Any]) -> None:
        self._digest, self._code = hashlib.sha256(text).digest(), tuple(map(weakref.ref, code))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelKey) and self._digest == other._digest and self._lives() and other._lives()

    def _lives(self) -> bool:
        return all(code() is not None for code in self._code)

    def __hash__(self) -> int:
        return hash(self._digest)


def model_key(model: nn.Module, inputs: Mapping[str, Any] | None, loss: Callable[..., Any] | None) -> ModelKey | None:
    """The key of a module traced with these; None if there is none."""
    description = _Description()
    try:
        told = tuple(op for op in LEAVES if op not in FOUND)  # tracing itself finds the others
        description.add((torch.get_default_dtype(), told))
        description.add(model)
        description.add([(name, _example(value)) for name, value in (inputs or {}).items()])
        description.add((inputs is None, loss))
    except (_OpaqueError, RecursionError):
        return None
    return ModelKey("\n".join(description.parts).encode(), description.code.values())


def _example(value: Any) -> Any:
    """Of an example input only its shape and dtype count."""
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


class _Description:
    """``parts``: the description so far; ``code``: what it tells by identity."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.code: dict[int, Any] = {}
        self._seen: dict[int, tuple[int, Any]] = {}

    def add(self, value: Any) -> None:
        if isinstance(value, _PLAIN):
            self.parts.append(f"{type(value).__name__} {value!r}")
        elif isinstance(value, tuple | list):
            self._each(type(value).__name__, value)
        elif isinstance(value, set | frozenset):
            self._each("set", sorted(value, key=repr))
        elif isinstance(value, Mapping):
            self._each("mapping", (part for item in value.items() for part in item))
        elif self._again(value):
            return
        elif isinstance(value, nn.Module):
            self._module(value)
        elif isinstance(value, Tensor):
            self._tensor(value, values=True)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, functools.partial):
            self._each("partial", (value.func, value.args, value.keywords))
        elif isinstance(value, types.MethodType):
            self._each("method", (value.__func__, value.__self__))
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.BuiltinFunctionType | types.ModuleType):
            self._by_identity(value)
        else:
            self._object(value)

    def _each(self, what: str, values: Any) -> None:
        self.parts.append(f"{what} (")
        for value in values:
            self.add(value)
        self.parts.append(")")

    def _again(self, value: Any) -> bool:
        """Whether it was described before, which is then told."""
        before = len(self._seen)
        place, _ = self._seen.setdefault(id(value), (before, value))
        if place < before:
            self.parts.append(f"again {place}")
        return place < before

    def _by_identity(self, value: Any) -> None:
        self.code[id(value)] = value
        self.parts.append(f"{type(value).__name__} {id(value)}")

    def _module(self, module: nn.Module) -> None:
        self.add(type(module))
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        for hook in (hook for some in hooks for hook in some.values()):
            self.add(hook)
        for name, parameter in module._parameters.items():
            self._named(name, parameter, values=False)
        for name, buffer in module._buffers.items():
            self._named(name, buffer, values=True)
        self._each("attributes", ((name, value) for name, value in vars(module).items() if name not in _STATE))
        for name, child in module._modules.items():
            self.parts.append(f"child {name}")
            self.add(child)

    def _named(self, name: str, tensor: Tensor | None, values: bool) -> None:
        self.parts.append(f"tensor {name}")
        if tensor is None or not self._again(tensor):
            self._tensor(tensor, values)

    def _tensor(self, tensor: Tensor | None, values: bool) -> None:
        if tensor is None:
            self.parts.append("none")
            return
        self.add((type(tensor).__name__, tuple(tensor.shape), tensor.dtype, tensor.device.type, tensor.requires_grad))
        if values and not tensor.is_meta:
            if tensor.numel() * tensor.element_size() > MOST or tensor.layout != torch.strided:
                raise _OpaqueError
            raw = tensor.detach().cpu().contiguous().view(torch.uint8 if tensor.ndim else tensor.dtype)
            self.parts.append(hashlib.sha256(repr(raw.tolist()).encode()).hexdigest())

    def _class(self, kind: type) -> None:
        """A class by identity, and what may have been changed of it and of those it is made of."""
        self._by_identity(kind)
        for base in kind.__mro__:
            if base is nn.Module or base.__module__.split(".")[0] in ("builtins", "torch", "enum", "abc", "typing"):
                continue
            for name, value in vars(base).items():
                code = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                if isinstance(code, types.FunctionType):
                    self.parts.append(name)
                    self._function(code)
                    self._function(inspect.unwrap(code))
                elif isinstance(value, _PLAIN) and not name.startswith("__"):
                    self.add((name, value))

    def _function(self, function: types.FunctionType) -> None:
        self._by_identity(function)
        self.parts += list(_plain_around(function))

    def _object(self, value: Any) -> None:
        try:
            state = vars(value)
        except TypeError:
            raise _OpaqueError from None
        self._by_identity(type(value))
        self._each("object", (part for item in state.items() for part in item))


def _plain_around(function: types.FunctionType) -> Iterator[str]:
    """The plain values among the globals and the outer variables that a function names."""
    found = {name: function.__globals__.get(name) for name in function.__code__.co_names}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not bound yet
            found[name] = cell.cell_contents
    for name, value in found.items():
        if isinstance(value, _PLAIN) and value is not None:
            yield f"{name} {value!r}"
