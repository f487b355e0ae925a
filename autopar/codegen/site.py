"""Where an operator call is written: the node, what its arguments are called, and what sizes are on this rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from autopar.codegen.source import Binary, Call, Expr, Method, Text, Value, literal
from autopar.errors import UnsupportedError
from autopar.graph.ir import Node, Ref
from autopar.graph.size import BATCH, SEQ, Size
from autopar.sharding.layout import Layout


@dataclass(frozen=True, slots=True)
class Sizes:
    """What sizes are on this rank. ``axes``: sizes of the model axes. ``symbols``: expressions of b and s (local in
    the batch, global in the sequence); asking for one that is missing raises UnsupportedError. ``double``: a float64
    job, which computes "float32" tensors in float64."""

    axes: Mapping[str, int]
    symbols: Mapping[Size, Expr]
    double: bool = False

    def ways(self, layout: Layout, dim: int) -> int:
        """In how many parts ``layout`` splits ``dim``."""
        parts = 1
        for axis in layout.splits(dim):
            parts *= self.axes[axis]
        return parts

    def expr(self, size: int | Size, parts: int = 1) -> Expr:
        """A global size over ``parts``, as an expression."""
        if isinstance(size, int):
            return literal(size // parts)
        total: Expr | None = None
        for (b, s), coefficient in size.terms:
            factors = [self._symbol(symbol) for symbol, power in ((BATCH, b), (SEQ, s)) for _ in range(power)]
            term: Expr | None = None
            for factor in factors:
                term = factor if term is None else Binary("*", term, factor)
            if term is None:
                term = literal(abs(coefficient))
            elif abs(coefficient) != 1:
                term = Binary("*", literal(abs(coefficient)), term)
            if total is None:
                total = term if coefficient > 0 else Binary("neg", term, term)
            else:
                total = Binary("+" if coefficient > 0 else "-", total, term)
        assert total is not None
        return total if parts == 1 else Binary("//", total, literal(parts))

    def _symbol(self, symbol: Size) -> Expr:
        if symbol not in self.symbols:
            raise UnsupportedError(
                f"its sizes depend on {symbol}, but no input of its block has a dim of that size; "
                "keep samples and positions in dims of their own between modules, or make what needs the size one "
                "operator (autopar.leaf)"
            )
        return self.symbols[symbol]


@dataclass(frozen=True, slots=True)
class Site:
    """One operator call to be written: the node, its arguments (expressions for tensors), the operands' global shapes,
    the output layout, and sizes."""

    node: Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: tuple[tuple[int | Size, ...], ...]
    output: Layout
    sizes: Sizes

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)


Renderer = Callable[[Site], Expr]
_EXPRESSION = Value | Text | Call | Method | Binary


def argument(value: Any, sizes: Sizes) -> Expr:
    """An argument as an expression: tensors are expressions already."""
    if isinstance(value, _EXPRESSION):
        return value
    if isinstance(value, Size):
        return sizes.expr(value)
    if isinstance(value, tuple | list) and any(
        isinstance(v, Value | Text | Call | Method | Binary | Size) for v in value
    ):
        return tuple_of(tuple(argument(item, sizes) for item in value))
    return literal(value)


def tuple_of(items: tuple[Expr, ...]) -> Expr:
    """A parenthesised tuple: a call without a name prints as one; a single item needs its comma."""
    return Call("", (*items, Text("")) if len(items) == 1 else items)


def is_tensor(value: Any) -> bool:
    return isinstance(value, Value | Call | Method | Binary | Ref)
