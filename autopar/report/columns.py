"""Pieces of text that reports are made of: labelled paragraphs, tables, spans, percentages, counted nouns."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Sequence

WIDTH = 100
LABEL = 13
"""Columns of the left-hand labels."""


def item(label: str, text: str) -> list[str]:
    """A labelled paragraph, wrapped to the width under its own start."""
    lines = [""]
    for word in re.split(r" (?!(?:s|ms|µs)\b)", text):
        if lines[-1] and LABEL + len(lines[-1]) + 1 + len(word) > WIDTH:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return [f"{label if index == 0 else '':<{LABEL}}{line}".rstrip() for index, line in enumerate(lines)]


def paragraph(text: str, indent: int = 4) -> list[str]:
    """Text wrapped to the width, the lines after the first indented."""
    return textwrap.wrap(text, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def indented(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 0) -> list[str]:
    """Columns two spaces apart, right-aligned but for the first ``left``."""
    whole = [list(head), *map(list, rows)]
    widths = [max(len(row[column]) for row in whole) for column in range(len(head))]
    return ["  ".join(_cells(row, widths, left)).rstrip() for row in whole]


def _cells(row: Sequence[str], widths: Sequence[int], left: int) -> Iterable[str]:
    for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
        yield cell.ljust(width) if column < left else cell.rjust(width)


def span(start: int, stop: int) -> str:
    """Blocks ``start`` up to ``stop``: ``3-7``, or ``3`` for one."""
    return f"{start}-{stop - 1}" if stop - start > 1 else str(start)


def percent(share: float) -> str:
    """A share of one: ``55.2%``, ``0.082%``."""
    if abs(share) < 1e-6:  # rounding of the solver, not a difference
        return "0"
    return f"{100 * share:.1f}%" if abs(share) >= 0.001 else f"{100 * share:.2g}%"


def signed(value: float, told: Callable[[float], str]) -> str:
    """A difference with its sign, as ``told`` writes amounts."""
    return "0" if value == 0 else ("+" if value > 0 else "-") + told(abs(value))


def pairs(values: dict[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


def value_text(value: object) -> str:
    """A value as `fix` writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def counted(number: int, plural: str) -> str:
    """``12 meshes``, ``1 mesh``, for a plural written with spaces or underscores."""
    noun = plural.replace("_", " ")
    if number == 1:
        noun = noun.removesuffix("es") if noun.endswith("shes") else noun.removesuffix("s")
    return f"{number:,} {noun}"
