"""Python expressions as small trees, and their layout as formatted source lines.

Lines are laid out so that `ruff format` and `black` leave them alone at any line length from `WIDTH` up: what does not
fit is exploded, one argument per line, with a trailing comma.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass

WIDTH = 88
INDENT = "    "

_PRECEDENCE = {"==": 1, "!=": 1, "<": 1, ">": 1, "<=": 1, ">=": 1, "|": 2, "&": 3, "+": 4, "-": 4}
_PRECEDENCE |= {"*": 5, "/": 5, "@": 5, "//": 5, "%": 5, "neg": 6, "**": 7}
_ATOM = 9


@dataclass(frozen=True, slots=True)
class Value:
    """A computed value, printed as the name it gets or as its own expression where it is written inline."""

    key: str


@dataclass(frozen=True, slots=True)
class Text:
    """Source text that binds tightly: a name, a literal, an attribute."""

    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """``function(arguments)``; an argument may be a (keyword, expression) pair."""

    function: str
    arguments: tuple[Argument, ...]


@dataclass(frozen=True, slots=True)
class Method:
    """``object.name(arguments)``, or ``object[...]`` for the name "[]"."""

    object: Expr
    name: str
    arguments: tuple[Argument, ...] = ()


@dataclass(frozen=True, slots=True)
class Binary:
    """``left operator right``; the operator "neg" is the unary minus on ``left``."""

    operator: str
    left: Expr
    right: Expr


Expr = Value | Text | Call | Method | Binary
Argument = Expr | tuple[str, Expr]
Resolve = Callable[[str], "Expr | str"]
"""For a value's key, its name, or the expression written in its place."""


def text_of(expr: Expr, resolve: Resolve) -> str:
    """The expression on one line."""
    return _text(expr, resolve)[0]


def _text(expr: Expr, resolve: Resolve) -> tuple[str, int]:
    if isinstance(expr, Value):
        found = resolve(expr.key)
        return (found, _ATOM) if isinstance(found, str) else _text(found, resolve)
    if isinstance(expr, Text):
        return expr.text, _ATOM
    if isinstance(expr, Call):
        inner = ", ".join(_argument(a, resolve) for a in expr.arguments)
        return f"{expr.function}({inner.removesuffix(' ')})", _ATOM  # one item and nothing: a tuple of one
    if isinstance(expr, Method):
        target = _grouped(expr.object, resolve, _ATOM)
        arguments = ", ".join(_argument(a, resolve) for a in expr.arguments)
        return (f"{target}[{arguments}]" if expr.name == "[]" else f"{target}.{expr.name}({arguments})"), _ATOM
    level = _PRECEDENCE[expr.operator]
    if expr.operator == "neg":
        return f"-{_grouped(expr.left, resolve, level)}", level
    # Left to right, but for the power, which binds to the right; comparisons do not chain.
    left = _grouped(expr.left, resolve, level + (expr.operator == "**" or level == 1))
    right = _grouped(expr.right, resolve, level + (expr.operator != "**"))
    tight = expr.operator == "**" and left.replace(".", "").isidentifier() and right.isdigit()
    return (f"{left}**{right}" if tight else f"{left} {expr.operator} {right}"), level


def _grouped(expr: Expr, resolve: Resolve, level: int) -> str:
    text, own = _text(expr, resolve)
    return text if own >= level else f"({text})"


def _argument(argument: Argument, resolve: Resolve) -> str:
    if isinstance(argument, tuple):
        return f"{argument[0]}={text_of(argument[1], resolve)}"
    return text_of(argument, resolve)


def _walk(expr: Expr) -> Iterator[Expr]:
    """An expression and all that it is made of, in order, repeats included."""
    yield expr
    parts: tuple[Argument, ...] = ()
    if isinstance(expr, Call):
        parts = expr.arguments
    elif isinstance(expr, Method):
        parts = (expr.object, *expr.arguments)
    elif isinstance(expr, Binary):
        parts = (expr.left, expr.right)
    for part in parts:
        yield from _walk(part[1] if isinstance(part, tuple) else part)


def values_in(expr: Expr) -> Iterator[str]:
    """Keys of the values an expression reads, in order, repeats included."""
    return (part.key for part in _walk(expr) if isinstance(part, Value))


def functions_in(expr: Expr) -> Iterator[str]:
    """The names that calls of an expression begin with: a function's own, or its module's."""
    return (part.function.partition(".")[0] for part in _walk(expr) if isinstance(part, Call))


_ROW = re.compile(r" +(-?[\d.]+(e[+-]?\d+)?, )+-?[\d.]+(e[+-]?\d+)?,$")
"""A line with several numbers of a table."""


def statement(prefix: str, expr: Expr, resolve: Resolve, indent: int) -> list[str]:
    """``prefix`` ("x = ", "return ", "") and the expression as lines at ``indent`` levels. Long tables of numbers fill
    their lines, which formatters are told to leave alone."""
    lines = _statement(prefix, expr, resolve, indent)
    if any(_ROW.match(line) for line in lines):
        lines[-1] += "  # fmt: skip"
    return lines


def _statement(prefix: str, expr: Expr, resolve: Resolve, indent: int) -> list[str]:
    margin = INDENT * indent
    line = f"{margin}{prefix}{text_of(expr, resolve)}"
    if len(line) <= WIDTH:
        return [line]
    while isinstance(expr, Value):
        found = resolve(expr.key)
        if isinstance(found, str):
            break
        expr = found
    if isinstance(expr, Call) and not expr.function and len(expr.arguments) > 2 and _are_numbers(expr.arguments):
        numbers = ", ".join(_argument(argument, resolve) for argument in expr.arguments)
        inner = textwrap.wrap(numbers + ",", WIDTH, initial_indent=margin + INDENT, subsequent_indent=margin + INDENT)
        return [f"{margin}{prefix}(", *inner, f"{margin})"]
    if isinstance(expr, Call) and expr.arguments:
        return [
            f"{margin}{prefix}{expr.function}(",
            *_exploded(expr.arguments, resolve, indent + 1),
            f"{margin})",
        ]
    if isinstance(expr, Method) and expr.arguments and expr.name != "[]":
        target = _grouped(expr.object, resolve, _ATOM)
        if isinstance(expr.object, Call) and len(margin + prefix + target) > WIDTH:
            behind = text_of(Method(Text(""), expr.name, expr.arguments), resolve)
            *first, last = _statement(prefix, expr.object, resolve, indent)
            return [*first, last + behind]
        if len(margin + prefix + target) + len(expr.name) + 2 <= WIDTH:
            return [
                f"{margin}{prefix}{target}.{expr.name}(",
                *_exploded(expr.arguments, resolve, indent + 1),
                f"{margin})",
            ]
    return [line]


def _exploded(arguments: tuple[Argument, ...], resolve: Resolve, indent: int) -> list[str]:
    lines: list[str] = []
    for argument in arguments:
        prefix, expr = (f"{argument[0]}=", argument[1]) if isinstance(argument, tuple) else ("", argument)
        *first, last = _statement(prefix, expr, resolve, indent)
        lines += [*first, last + ","]
    return lines


def _are_numbers(arguments: tuple[Argument, ...]) -> bool:
    return all(isinstance(argument, Text) and re.match(r"-?\d", argument.text) for argument in arguments)


def literal(value: object) -> Text:
    """A Python literal: numbers, strings, None and tuples of these."""
    if isinstance(value, tuple | list):
        inner = ", ".join(literal(item).text for item in value)
        return Text(f"({inner},)" if len(value) == 1 else f"({inner})")
    if isinstance(value, str):
        return Text('"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"')
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return Text(f'float("{value}")')
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e6:
        return Text(f"{value:.1f}")
    return Text(repr(value).replace("e-0", "e-").replace("e+", "e"))
