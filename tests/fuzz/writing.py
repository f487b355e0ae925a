"""What a drawn model is written with: values of known symbolic shape, lines of forward, members of a module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from autopar.graph.size import BATCH, SEQ, Size

T = TypeVar("T")
Dim = int | Size
Draw = Callable[[Sequence[T]], T]
"""Chooses one of several things; the first is the simplest."""

WIDTHS = (4, 8, 6, 12, 2, 3, 5, 7, 16)
"""Sizes of features: those that 2 and 4 ranks divide, and some that they do not."""


@dataclass(frozen=True)
class Value:
    """A floating-point tensor with the name it has in forward. ``samples`` stand on its first dim."""

    name: str
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return self.name

    @property
    def last(self) -> Dim:
        return self.shape[-1]

    @property
    def rank(self) -> int:
        return len(self.shape)

    def own_dims(self) -> list[int]:
        """The dims along which samples are not mixed."""
        return [dim for dim, size in enumerate(self.shape) if not of_batch(size)]

    def wide_dims(self) -> list[int]:
        """Those of a fixed size of two or more."""
        return [dim for dim, size in enumerate(self.shape) if isinstance(size, int) and size > 1]


def of_batch(size: Dim) -> bool:
    return isinstance(size, Size) and any(b > 0 for (b, _), _ in size.terms)


def text(size: Dim) -> str:
    """A size as forward writes it, where ``b`` and ``s`` are known."""
    return str(size).replace("*", " * ")


def shape_text(shape: Sequence[Dim]) -> str:
    return ", ".join(map(text, shape))


def swapped(shape: Sequence[Dim], dim: int, size: Dim) -> tuple[Dim, ...]:
    """``shape`` with another size at ``dim``."""
    return (*shape[:dim], size, *shape[dim + 1 :])


def without(shape: Sequence[Dim], dim: int) -> tuple[Dim, ...]:
    return (*shape[:dim], *shape[dim + 1 :])


@dataclass
class Members:
    """A class of modules in the making: the lines of ``__init__``."""

    pick: Draw[Any]
    lines: list[str] = field(default_factory=list)
    shared: dict[tuple[int, ...], list[str]] = field(default_factory=dict)

    def parameter(self, *shape: int) -> str:
        """A parameter of this shape, now and then one there is, or one that does not train."""
        known = self.shared.setdefault(shape, [])
        if known and self.pick((False, False, False, True)):
            return self.pick(known)
        name = f"self.p{len(self.lines)}"
        frozen = ", requires_grad=False" if self.pick((False,) * 7 + (True,)) else ""
        scale = 1.0 if len(shape) < 2 else round(shape[0] ** -0.5, 3)
        self.lines.append(f"{name} = nn.Parameter(torch.randn({shape_text(shape) or '()'}) * {scale}{frozen})")
        known.append(name)
        return name

    def module(self, made: str) -> str:
        name = f"self.m{len(self.lines)}"
        self.lines.append(f"{name} = nn.{made}")
        return name

    def buffer(self, values: str) -> str:
        name = f"n{len(self.lines)}"
        self.lines.append(f'self.register_buffer("{name}", torch.tensor({values}))')
        return f"self.{name}"


@dataclass
class Body:
    """A forward in the making. ``sizes``: what it can write of "b" and "s"; ``ids``: a tensor of token ids [b, s]."""

    pick: Draw[Any]
    members: Members
    sizes: frozenset[str]
    ids: str = ""
    values: list[Value] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    used: list[str] = field(default_factory=list)

    def emit(self, expression: str, *shape: Dim) -> Value:
        """One more line; its value is what later steps may read."""
        value = Value(f"x{len(self.lines)}", tuple(shape))
        self.lines.append(f"{value} = {expression}")
        self.values.append(value)
        return value

    def aside(self, expression: str, *shape: Dim) -> Value:
        """A line whose value no later step reads."""
        value = self.emit(expression, *shape)
        self.values.pop()
        return value

    def width(self) -> int:
        return self.pick(WIDTHS)

    def writes(self, *sizes: Dim) -> bool:
        """Whether these sizes can be written here."""
        return all(isinstance(size, int) or set(str(size)) & set("bs") <= self.sizes for size in sizes)

    def others(self, x: Value, fits: Callable[[Value], bool]) -> list[Value]:
        return [value for value in self.values if value != x and fits(value)]

    def partner(self, x: Value) -> Value | str:
        """Something that adds to ``x``: another value of its shape, or a parameter that is broadcast."""
        others = self.others(x, lambda y: y.shape == x.shape or y.shape == swapped(x.shape, -1 % x.rank, 1))
        if others and self.pick((True, False)):
            return self.pick(others[::-1])
        return self.along(x)

    def along(self, x: Value) -> str:
        """A parameter that is broadcast to ``x``, whose last dims of fixed size it may have."""
        shape: list[int] = []
        for size in reversed(x.shape):
            if not isinstance(size, int) or (shape and not self.pick((False, True))):
                break
            shape.insert(0, size if self.pick((True, True, True, False)) else 1)
        return self.members.parameter(*shape)


BS = (BATCH, SEQ)
