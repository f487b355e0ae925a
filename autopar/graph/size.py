"""Tensor sizes as polynomials in the batch size ``b`` and the sequence length ``s``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import total_ordering


@total_ordering
@dataclass(frozen=True, slots=True, eq=False)
class Size:
    """A polynomial in ``b`` (samples) and ``s`` (positions) with integer coefficients.

    ``terms`` maps are stored as sorted tuples ``((b_power, s_power), coefficient)``. Plain integers stand for
    constants everywhere, so arithmetic returns an ``int`` whenever the result has no symbol.
    """

    terms: tuple[tuple[tuple[int, int], int], ...]

    @staticmethod
    def make(terms: Mapping[tuple[int, int], int]) -> int | Size:
        """Normalise: drop zero terms and fall back to ``int`` for constants."""
        kept = {powers: coefficient for powers, coefficient in terms.items() if coefficient}
        if not kept:
            return 0
        if set(kept) == {(0, 0)}:
            return kept[(0, 0)]
        return Size(tuple(sorted(kept.items(), reverse=True)))

    @staticmethod
    def parse(text: str) -> int | Size:
        """Read what ``str`` prints, such as ``"2*b*s + 1"``."""
        terms: dict[tuple[int, int], int] = {}
        for term in re.findall(r"[+-]?[^+-]+", text.replace(" ", "")):
            sign = -1 if term.startswith("-") else 1
            b = s = 0
            coefficient = sign
            for factor in term.lstrip("+-").split("*"):
                symbol, _, power = factor.partition("^")
                if symbol == "b":
                    b += int(power or 1)
                elif symbol == "s":
                    s += int(power or 1)
                else:
                    coefficient *= int(factor)
            terms[(b, s)] = terms.get((b, s), 0) + coefficient
        return Size.make(terms)

    def at(self, batch: int, seq: int) -> int:
        """The value for ``batch`` samples of ``seq`` positions."""
        return sum(c * batch**b * seq**s for (b, s), c in self.terms)

    @property
    def is_monomial(self) -> bool:
        return len(self.terms) == 1

    def _combine(self, other: int | Size, sign: int) -> int | Size:
        terms = dict(self.terms)
        for powers, coefficient in _terms(other).items():
            terms[powers] = terms.get(powers, 0) + sign * coefficient
        return Size.make(terms)

    def __add__(self, other: int | Size) -> int | Size:
        return self._combine(other, 1)

    __radd__ = __add__

    def __sub__(self, other: int | Size) -> int | Size:
        return self._combine(other, -1)

    def __rsub__(self, other: int | Size) -> int | Size:
        return (self * -1) + other

    def __mul__(self, other: int | Size) -> int | Size:
        terms: dict[tuple[int, int], int] = {}
        for (b1, s1), c1 in self.terms:
            for (b2, s2), c2 in _terms(other).items():
                key = (b1 + b2, s1 + s2)
                terms[key] = terms.get(key, 0) + c1 * c2
        return Size.make(terms)

    __rmul__ = __mul__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Size) and self.terms == other.terms

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, Size):
            return NotImplemented
        return self.terms < other.terms

    def __hash__(self) -> int:
        return hash(self.terms)

    def __str__(self) -> str:
        parts = []
        for (b, s), coefficient in self.terms:
            symbols = ["b" if b == 1 else f"b^{b}"] * (b > 0) + ["s" if s == 1 else f"s^{s}"] * (s > 0)
            if abs(coefficient) != 1 or not symbols:
                symbols.insert(0, str(abs(coefficient)))
            parts.append(("- " if coefficient < 0 else "+ ") + "*".join(symbols))
        text = " ".join(parts)
        return text.removeprefix("+ ") if text.startswith("+") else "-" + text.removeprefix("- ")

    __repr__ = __str__


BATCH = Size((((1, 0), 1),))
SEQ = Size((((0, 1), 1),))


def _terms(value: int | Size) -> dict[tuple[int, int], int]:
    return dict(value.terms) if isinstance(value, Size) else {(0, 0): value}


def size_at(value: int | Size, batch: int, seq: int) -> int:
    """``value`` as an integer for ``batch`` samples of ``seq`` positions."""
    return value.at(batch, seq) if isinstance(value, Size) else value


def divide(value: int | Size, by: int | Size) -> int | Size | None:
    """``value / by`` when it is a whole polynomial (``by`` a monomial), else None."""
    if by == 1:
        return value
    divisor = _terms(by)
    if len(divisor) != 1:
        return 1 if value == by else None
    (powers, coefficient), *_ = divisor.items()
    quotient: dict[tuple[int, int], int] = {}
    for (b, s), c in _terms(value).items():
        if c % coefficient or b < powers[0] or s < powers[1]:
            return None
        quotient[(b - powers[0], s - powers[1])] = c // coefficient
    return Size.make(quotient)
