"""How far the search is with something: the sharpest of its bounds that is known, each dearer than the one before."""

from __future__ import annotations

from enum import IntEnum


class Step(IntEnum):
    """Bounds of a shape, of its families, of their configurations (`space`)."""

    ARITHMETIC = 0
    """Shape: its arithmetic, evenly shared out, and what its schedule surely waits."""
    OPERATORS = 1
    """Every operator at the fastest of its strategies, no layout ever converted."""
    KINDS = 2
    """Every kind of block at its own optimum (a wide one at that of its linear relaxation)."""
    STAGES = 3
    """Stages over the least seconds and the least bytes of every kind, whatever the data ranks do."""
    FAMILY = 4
    """Family: the same, at one ZeRO level, its state offloaded or not."""
    DATA = 5
    """Configuration: as `KINDS`, and what its data ranks surely add."""
    SPREAD = 6
    """As `STAGES`, with the bytes and seconds of its data ranks. What comes next is its price."""
