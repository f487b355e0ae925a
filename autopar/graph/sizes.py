"""From torch's symbolic sizes to `Size`: every batch tensor's dim 0 is b, its sequence dims are s."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from sympy.polys.polyerrors import BasePolynomialError
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod

from autopar.errors import UnsupportedError
from autopar.graph.size import Size

SYMBOLS = {name: sympy.Symbol(name, integer=True, positive=True) for name in ("b", "s")}


DOUBTS = 4
"""Bounds up to this come from torch, which takes sizes of none and one for special."""

PROBED = (1, 2, 4)
"""Times the example's length: if other code is run for one of these, which side of a number it is on is no answer."""


class FixedSequenceError(UnsupportedError):
    """The model can be traced for one sequence length only; tracing falls back to that of the example inputs.
    ``of_all_lengths``: whatever that length is."""

    def __init__(self, text: str, of_all_lengths: bool = False) -> None:
        super().__init__(text)
        self.of_all_lengths = of_all_lengths


class SizeOfValuesError(UnsupportedError):
    """A tensor's size follows from the values of others; ``placed``: its text says where."""

    def __init__(self, text: str, placed: bool = False) -> None:
        super().__init__(text)
        self.placed = placed


class Sizes:
    """Reads torch symbols as b or s; ``roles`` maps symbols of the export to "b" or "s". ``length``: of the example's
    sequence, if sequences are to be as long: on which side of a number it is decides what min(8, s) is."""

    def __init__(self, roles: Mapping[sympy.Symbol, str], length: int | None = None) -> None:
        self._roles = {symbol: SYMBOLS[role] for symbol, role in roles.items()}
        self._cache: dict[Any, int | Size] = {}
        self._length = length
        self._least, self._most = 1, sympy.oo

    def read(self, value: int | torch.SymInt) -> int | Size:
        """``value`` as a polynomial. Raises FixedSequenceError when it is not one, SizeOfValuesError when it is no
        function of b and s at all."""
        if isinstance(value, int):
            return value
        expression = value.node.expr
        if expression not in self._cache:
            self._cache[expression] = self._polynomial(expression)
        return self._cache[expression]

    def lengths(self, ranges: Mapping[sympy.Symbol, Any], guards: Sequence[Any] = ()) -> tuple[int, int | None]:
        """The shortest and the longest sequence (None: any) for which the code that was traced is run, and for which
        the sizes read so far are what they were read as. ``guards``: what is true where that code is run. Raises
        FixedSequenceError where they tell that it is not run for all of these."""
        shortest, longest = self._least, int(self._most) if self._most.is_finite else None
        for symbol, within in ranges.items():
            if self._roles.get(symbol) == SYMBOLS["s"]:
                if within.lower > DOUBTS:
                    shortest = max(shortest, int(within.lower))
                if within.upper.is_Integer:
                    longest = min(longest or int(within.upper), int(within.upper))
        decided = self._length if self._least > 1 or self._most.is_finite else None
        for length in (decided * times for times in PROBED) if decided else ():
            if length <= (longest or length) and any(self._fails(guard, length) for guard in guards):
                raise FixedSequenceError(f"the model runs other code for sequences of {length}")
        if longest is not None and longest < shortest:
            raise FixedSequenceError(f"the model runs other code for sequences longer than {longest}")
        return shortest, longest

    def _fails(self, guard: Any, length: int) -> bool:
        """Whether a guard of the sequence alone that counts pieces of it is known to be false where it is ``length``.

        Bounds are in ranges, and that it is *not* some length, as long as a table, says no more than they do."""
        symbols = guard.free_symbols
        if not guard.has(FloorDiv, Mod) or any(self._roles.get(symbol) != SYMBOLS["s"] for symbol in symbols):
            return False
        return bool(guard.subs(dict.fromkeys(symbols, length)) == sympy.false)

    def _polynomial(self, expression: sympy.Expr) -> int | Size:
        if expression.is_Integer:
            return int(expression)
        if unbacked := free_unbacked_symbols(expression):
            raise SizeOfValuesError(f"a tensor size follows from values ({', '.join(map(str, unbacked))})")
        # sympy's own maximum knows that b and s are positive.
        renamed = expression.xreplace(self._roles).replace(Max, sympy.Max).replace(Min, sympy.Min)
        renamed = renamed.replace(lambda part: isinstance(part, sympy.Min | sympy.Max), self._decided)
        try:
            terms = sympy.Poly(renamed, *SYMBOLS.values(), domain="ZZ").terms()
        except BasePolynomialError:
            rests = expression.has(Mod, FloorDiv)
            told = f"the model computes a tensor size {renamed}, no polynomial in b and s"
            raise FixedSequenceError(told, of_all_lengths=rests) from None
        return Size.make({(int(b), int(s)): int(coefficient) for (b, s), coefficient in terms})

    def _decided(self, choice: sympy.Expr) -> sympy.Expr:
        """Of the least or the greatest of several sizes the one that it is at the example's length, and at all lengths
        on its side; unchanged where these are not told by one bound."""
        s = SYMBOLS["s"]
        if self._length is None or choice.free_symbols != {s}:
            return choice
        least = isinstance(choice, sympy.Min)
        pick = min if least else max
        chosen = pick(choice.args, key=lambda size: (size.subs(s, self._length), not size.is_Integer))
        lower, upper = sympy.Integer(1), sympy.oo
        for other in choice.args:
            ahead = sympy.expand(other - chosen if least else chosen - other)  # never negative
            slope = ahead.coeff(s)
            if sympy.expand(ahead - slope * s).free_symbols or not slope.is_Rational:
                return choice
            if slope:
                edge = -ahead.subs(s, 0) / slope
                lower, upper = (max(lower, edge), upper) if slope > 0 else (lower, min(upper, edge))
        self._least, self._most = max(self._least, int(sympy.ceiling(lower))), min(self._most, sympy.floor(upper))
        return chosen

    def shape(self, tensor: torch.Tensor) -> tuple[int | Size, ...]:
        return tuple(self.read(size) for size in tensor.shape)
