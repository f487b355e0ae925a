"""From one value per operator to the statements a person would write: what goes inline, what gets which name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from autopar.codegen.source import (
    INDENT,
    WIDTH,
    Binary,
    Call,
    Expr,
    Resolve,
    Value,
    functions_in,
    statement,
    text_of,
    values_in,
)

_RESERVED = {
    "self",
    "torch",
    "nn",
    "F",
    "Tensor",
    "tp",
    "dtype",
    "device",
    "return",
    "in",
    "is",
    "not",
    "lambda",
    "index",
    "angle_table",
    "sinusoids",
}


@dataclass(frozen=True, slots=True)
class Step:
    """One value: its expression over other values, the name it would like, and what it is.

    ``group``: "weight" (written at each use), "shape" (views, casts), "elementwise", "operator", or "exchange" (a
    collective; always a statement of its own unless what it converts is a weight). ``comments`` go above its statement.
    """

    key: str
    expr: Expr
    hint: str
    group: str
    comments: tuple[str, ...] = ()


_INLINE = {
    "shape": {"shape", "elementwise", "operator", "exchange", "return"},
    "elementwise": {"shape", "elementwise", "operator", "return"},
    "operator": {"elementwise", "return"},
    "exchange": {"elementwise", "return"},
    "preamble": set(),
    "return": set(),
}
"""A value of the first group, read once, may be written inside a statement of the groups behind it."""

_WEIGHT = {"shape": 1, "elementwise": 1, "operator": 2, "exchange": 2}
_MOST_INLINE = 5


@dataclass(slots=True)
class Program:
    """The body of one function: names of its arguments by key, steps in execution order, keys of what it returns."""

    arguments: Mapping[str, str]
    steps: list[Step]
    outputs: tuple[str, ...]
    reserved: frozenset[str] = frozenset()
    _inline: dict[str, Expr] = field(default_factory=dict)
    _weight: dict[str, int] = field(default_factory=dict)
    _comments: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def lines(self, indent: int) -> list[str]:
        """The body as formatted source lines."""
        result = self.outputs
        returned = Value(result[0]) if len(result) == 1 else Call("", tuple(Value(key) for key in result))
        steps = [*self.steps, Step("return", returned, "return", "return")]
        roots = self._choose_inline(steps, indent)
        names = self._name(roots)

        def resolve(key: str) -> Expr | str:
            return self._inline[key] if key in self._inline else names[key]

        lines: list[str] = []
        for step, alike in _alike(roots, self._comments):
            also = f" ({_listed([names[key] for key in alike])} each)" if len(alike) > 1 else ""
            above = self._comments[step.key] if alike else ()
            comments = [line for comment in above for line in wrap_comment(comment + also, indent)]
            if comments and lines and not lines[-1].lstrip().startswith("#"):
                lines.append("")
            lines += comments
            if step.group == "return":
                lines += _return(step.expr, resolve, indent)
            else:
                lines += statement(f"{names[step.key]} = ", step.expr, resolve, indent)
        return lines

    def _choose_inline(self, steps: list[Step], indent: int) -> list[Step]:
        """The steps that stay statements; the others are in ``_inline``."""
        by_key = {step.key: step for step in steps}
        uses = Counter(key for step in steps for key in values_in(step.expr))
        hints = {**self.arguments, **{step.key: step.hint for step in steps}}
        self._inline = {step.key: step.expr for step in steps if step.group == "weight"}
        self._weight = {step.key: _WEIGHT.get(step.group, 0) for step in steps}
        self._comments = {step.key: step.comments for step in steps}

        def resolve(key: str) -> Expr | str:
            return self._inline[key] if key in self._inline else hints[key]

        for step in steps:
            if step.group == "weight":
                continue
            read = [key for key in values_in(step.expr) if key in by_key]
            for key in read:
                inner = by_key[key]
                if inner.group == "weight":
                    self._comments[step.key] = (*self._comments[key], *self._comments[step.key])
                    continue
                allowed = uses[key] == 1 and step.group in _INLINE[inner.group]
                adds_exchange = inner.group == "exchange" and isinstance(step.expr, Binary | Value)
                if self._comments[key] and not adds_exchange and step.group != "return":
                    continue
                if not allowed or self._weight[step.key] + self._weight[key] > _MOST_INLINE:
                    continue
                # A product is written inside a sum only: `hidden = hidden + F.linear(...)`.
                adds = isinstance(step.expr, Binary) and step.expr.operator == "+"
                if inner.group == "operator" and step.group == "elementwise" and not adds:
                    continue
                # A chain of views as an argument hides the call it is for.
                if inner.group == "shape" and step.group in ("operator", "exchange") and self._weight[key] > 1:
                    continue
                self._inline[key] = inner.expr
                # A call that is returned is written over several lines.
                returned = step.group == "return" and isinstance(step.expr, Value) and isinstance(inner.expr, Call)
                prefix = "return " if step.group == "return" else f"{step.hint} = "
                if len(INDENT * indent + prefix + text_of(step.expr, resolve)) > WIDTH and not returned:
                    del self._inline[key]
                else:
                    self._weight[step.key] += self._weight[key]
                    self._comments[step.key] = (*self._comments[key], *self._comments[step.key])
        return [step for step in steps if step.key not in self._inline]

    def _name(self, roots: list[Step]) -> dict[str, str]:
        """A name for each statement's value: its hint, as soon as no other value that is still read has it. A function
        that is called keeps its name."""
        exprs = [*(step.expr for step in roots), *self._inline.values()]
        reserved = {*_RESERVED, *self.reserved, *(name for expr in exprs for name in functions_in(expr))}
        last: dict[str, int] = {}
        for place, step in enumerate(roots):
            for key in self._read(step.expr):
                last[key] = place
        names = dict(self.arguments)
        holder = {name: key for key, name in self.arguments.items()}
        for place, step in enumerate(roots):
            if step.group == "return":
                continue
            stem, number = (f"{step.hint}_" if step.hint in reserved else step.hint), 1
            name = stem
            while name in holder and last.get(holder[name], -1) > place:
                number += 1
                name = f"{stem}_{number}"
            names[step.key], holder[name] = name, step.key
        return names

    def _read(self, expr: Expr) -> Iterable[str]:
        for key in values_in(expr):
            if key in self._inline:
                yield from self._read(self._inline[key])
            else:
                yield key


def _alike(roots: list[Step], comments: Mapping[str, tuple[str, ...]]) -> Iterable[tuple[Step, list[str]]]:
    """Each statement, and the keys that its comments are for: its own and those of the statements right below that
    have the very same; none for these."""
    place = 0
    while place < len(roots):
        texts = comments[roots[place].key]
        group = [roots[place]]
        while texts and place + len(group) < len(roots) and roots[place].group != "return":
            following = roots[place + len(group)]
            if comments[following.key] != texts or following.group == "return":
                break
            group.append(following)
        for step in group:
            yield step, [member.key for member in group] if step is group[0] else []
        place += len(group)


def _listed(names: list[str]) -> str:
    return " and ".join(", ".join(names).rsplit(", ", 1))


def _return(expr: Expr, resolve: Resolve, indent: int) -> list[str]:
    if isinstance(expr, Call) and not expr.function:
        inner = ", ".join(text_of(a, resolve) for a in expr.arguments if not isinstance(a, tuple))
        return [f"{INDENT * indent}return {inner}"]
    return statement("return ", expr, resolve, indent)


def wrap_comment(text: str, indent: int) -> list[str]:
    """A comment as lines of at most `WIDTH` columns."""
    margin = f"{INDENT * indent}# "
    lines, line = [], margin
    for word in text.split():
        if len(line) + len(word) > WIDTH and line != margin:
            lines.append(line.rstrip())
            line = margin
        line += word + " "
    return [*lines, line.rstrip()]
