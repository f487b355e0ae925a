"""From torch's symbolic sizes to `Size`: every batch tensor's dim 0 is b, its sequence dims are s."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from sympy.polys.polyerrors import BasePolynomialError

from autopar.errors import UnsupportedError
from autopar.graph.size import Size

SYMBOLS = {"b": sympy.Symbol("b"), "s": sympy.Symbol("s")}


class FixedSequenceError(UnsupportedError):
    """The model can be traced for one sequence length only; tracing falls back to that of the example inputs."""


class Sizes:
    """Reads torch symbols as b or s; ``roles`` maps symbols of the export to "b" or "s"."""

    def __init__(self, roles: Mapping[sympy.Symbol, str]) -> None:
        self._roles = {symbol: SYMBOLS[role] for symbol, role in roles.items()}
        self._cache: dict[Any, int | Size] = {}

    def read(self, value: int | torch.SymInt) -> int | Size:
        """``value`` as a polynomial. Raises FixedSequenceError when it is not one."""
        if isinstance(value, int):
            return value
        expression = value.node.expr
        if expression not in self._cache:
            self._cache[expression] = self._polynomial(expression)
        return self._cache[expression]

    def _polynomial(self, expression: sympy.Expr) -> int | Size:
        if expression.is_Integer:
            return int(expression)
        renamed = expression.xreplace(self._roles)
        try:
            terms = sympy.Poly(renamed, *SYMBOLS.values(), domain="ZZ").terms()
        except BasePolynomialError:
            raise FixedSequenceError(f"the model computes a tensor size {renamed}, no polynomial in b and s") from None
        return Size.make({(int(b), int(s)): int(coefficient) for (b, s), coefficient in terms})

    def shape(self, tensor: torch.Tensor) -> tuple[int | Size, ...]:
        return tuple(self.read(size) for size in tensor.shape)
