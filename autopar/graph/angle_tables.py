"""Tables of rotary or sinusoidal angles, as many models keep them in a buffer, become the operator that computes them.

Which of the forms a table has, and its base, is read off its first rows; then the whole must be equal, bit for bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch

from autopar.graph.buffers import SMALLEST

DIGITS = (1, 2, 3, 4, 6)
"""To how many significant digits a base is round."""


def angles_of(buffer: torch.Tensor | None) -> tuple[Any, ...] | None:
    """(rows, rates, base, form, rising) with which `angle_table` gives the very numbers of ``buffer``, complex ones as
    pairs and without dims of size 1; None if there are none."""
    if buffer is None or buffer.is_meta or buffer.numel() < SMALLEST:
        return None
    from autopar.codegen.runtime.position_tables import ANGLE_FORMS, angle_table

    table = buffer.reshape([size for size in buffer.shape if size != 1])
    table = torch.view_as_real(table) if table.is_complex() else table
    if table.ndim not in (2, 3) or table.shape[0] < 3 or not table.is_floating_point():
        return None
    for form, numbers in ANGLE_FORMS.items():
        rates = table[0].numel() // numbers
        if rates < 2 or rates * numbers != table[0].numel() or (table.ndim == 3) != form.startswith("pairs"):
            continue
        for base, rising in itertools.product(_bases(table[1], form, rates), (False, True)):
            # Three rows tell most buffers apart before the whole is computed.
            for rows in (3, table.shape[0]):
                found = angle_table(rows, rates, base, form, rising, dtype=table.dtype, device=None)
                if not torch.equal(found, table[:rows]):
                    break
            else:
                return table.shape[0], rates, base, form, rising
    return None


def _bases(row: torch.Tensor, form: str, rates: int) -> Iterator[float]:
    """Round numbers near the base that the second rate of the second row speaks of."""
    number = float(row[1, 0] if row.ndim == 2 else row[2 if form in ("waves", "cos twice", "sin twice") else 1])
    if not 0 < number < 1:
        return
    angle = math.asin(number) if form.startswith(("sin", "waves")) else math.acos(number)
    bases = (float(f"{angle**-rates:.{digits}g}") for digits in DIGITS)
    yield from dict.fromkeys(base for base in bases if math.isfinite(base) and base > 1)
