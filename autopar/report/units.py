"""Numbers as people read them: seconds, bytes, counts."""

from __future__ import annotations

GIB = 2**30
MIB = 2**20


def seconds_text(value: float) -> str:
    """Three significant digits in s, ms or µs: ``9.41 s``, ``12.3 ms``."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if abs(value) >= scale:
            return f"{significant(value / scale)} {unit}"
    return "0 s" if value == 0 else f"{significant(value / 1e-6)} µs"


def energy_text(joules: float) -> str:
    """Three significant digits in J, kJ, MJ or GJ: ``31.2 MJ``."""
    for scale, unit in ((1e9, "GJ"), (1e6, "MJ"), (1e3, "kJ")):
        if joules >= scale:
            return f"{significant(joules / scale)} {unit}"
    return f"{significant(joules)} J"


def memory_unit(largest: float) -> tuple[str, int]:
    """The unit in which a table of bytes up to ``largest`` reads well: ("GiB", bytes of one) or ("MiB", ...)."""
    return ("GiB", GIB) if largest >= GIB else ("MiB", MIB)


def bytes_text(value: float, unit: int = GIB) -> str:
    """Bytes in ``unit``, without its name: ``12.3``, ``0.25``; ``0`` only for nothing at all."""
    scaled = value / unit
    if value == 0 or scaled >= 100:
        return f"{scaled:,.0f}"
    if scaled < 0.01:
        return "<0.01"
    return f"{scaled:.1f}" if scaled >= 1 else f"{scaled:.2f}"


def significant(value: float, digits: int = 3) -> str:
    """``value`` to ``digits`` significant digits, never in powers of ten."""
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    places = digits - 1
    magnitude = abs(value)
    while magnitude < 1 and places < 9:
        magnitude *= 10
        places += 1
    while magnitude >= 10:
        magnitude /= 10
        places -= 1
    return f"{value:.{max(places, 0)}f}"
