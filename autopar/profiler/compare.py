"""`autopar profile diff A B`: what two profiles measured differently, by operator and dtype, and by collective."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import expm1
from statistics import median
from typing import Any

from autopar.profiler.database import CollectiveRecord, OpRecord, Profile
from autopar.profiler.links import fit_links
from autopar.profiler.shapes import WIDTHS, family
from autopar.profiler.surface import Surface


def difference(a: Profile, b: Profile) -> dict[str, Any]:
    """Plain JSON values: ``device`` (properties that differ), ``tables`` (of shapes in both: how many, seconds of B
    over those of A: median, least, most, and where most), ``figures``, ``links``."""
    names = sorted({*a.device, *b.device})
    device = {
        name: [a.device.get(name), b.device.get(name)] for name in names if a.device.get(name) != b.device.get(name)
    }
    figures = {
        name: [a.figures.get(name), b.figures.get(name)]
        for name in sorted({*a.figures, *b.figures})
        if a.figures.get(name) != b.figures.get(name)
    }
    return {
        "dates": [a.date, b.date],
        "device": device,
        "tables": _tables(a.ops, b.ops, lambda r: f"{r.op} {r.dtype} {r.direction}" + _threads(r))
        + _tables(a.collectives, b.collectives, lambda r: f"{r.kind} {r.size}/{r.stride} {r.transport}"),
        "figures": figures,
        "links": [_links(a), _links(b)],
    }


def difference_text(a: Profile, b: Profile, names: tuple[str, str] = ("A", "B")) -> str:
    """The same as text."""
    found = difference(a, b)
    lines = [f"A  {names[0]}: {a.title}", f"B  {names[1]}: {b.title}"]
    lines += [f"{name}: {left!r} in A, {right!r} in B" for name, (left, right) in found["device"].items()]
    if found["tables"]:
        head = ("", "both", "A only", "B only", "median B/A", "least", "most", "most at")
        rows: list[tuple[str, ...]] = [head]
        for row in found["tables"]:
            told = ["-"] * 4
            if row["both"]:
                told = [f"{row[name]:.2f}" for name in ("median", "least", "most")] + [row["at"]]
            rows.append((row["name"], str(row["both"]), str(row["only_a"]), str(row["only_b"]), *told))
        lines += ["", *_aligned(rows)]
    for name, (left, right) in found["figures"].items():
        lines.append(f"{name}: {_figure(left)} in A, {_figure(right)} in B")
    for mark, fits in zip("AB", found["links"], strict=True):
        lines += [f"{mark} {line}" for line in fits]
    if a.digest == b.digest:
        lines.append("the two are the same")
    return "\n".join(lines)


def summary_text(profile: Profile) -> str:
    """What a profile holds. For each operator: shapes, median spread of the repeats, and the median error with which a
    shape is read off the others when it is left out."""
    device = profile.device
    lines = [
        f"{device['name']} ({device['backend']}), {device['memory_bytes'] / 2**30:.1f} GiB, "
        f"{device['processors']} processors, driver {device['driver']}, torch {device['torch']}",
        f"measured until {profile.date}, {sum(profile.spent_s.values()) / 60:.1f} minutes, digest {profile.digest}",
    ]
    counts: dict[str, list[OpRecord]] = {}
    for record in profile.ops:
        counts.setdefault(f"{record.op} {record.dtype}" + _threads(record), []).append(record)
    if counts:
        rows = [("", "points", "spread", "left out")]
        rows += [
            (
                name,
                str(len({r.at for r in records})),
                f"{100 * median(r.spread for r in records):.1f} %",
                f"{100 * _left_out(records):.1f} %",
            )
            for name, records in counts.items()
        ]
        lines += ["", *_aligned(rows)]
    lines += [f"{name}: {_figure(value)}" for name, value in sorted(profile.figures.items())]
    return "\n".join(lines + _links(profile))


def _left_out(records: list[OpRecord]) -> float:
    errors: list[float] = []
    each, width = family(records[0].op), WIDTHS.get(records[0].dtype, 1)
    for direction in each.directions:
        some = [record for record in records if record.direction == direction]
        if some:
            flops, nbytes = zip(*(each.cost(r.at, direction, width) for r in some), strict=True)
            surface = Surface([r.at for r in some], [r.seconds for r in some], flops, nbytes, [r.spread for r in some])
            errors += [abs(expm1(error)) for error in surface.left_out]
    return median(errors)


def _tables(a: Iterable[Any], b: Iterable[Any], name_of: Any) -> list[dict[str, Any]]:
    left = {record.key: record for record in a}
    right = {record.key: record for record in b}
    groups: dict[str, list[tuple[object, ...]]] = {}
    for key, record in {**left, **right}.items():
        groups.setdefault(name_of(record), []).append(key)
    rows = []
    for name, keys in sorted(groups.items()):
        both = [key for key in keys if key in left and key in right]
        row: dict[str, Any] = {
            "name": name,
            "both": len(both),
            "only_a": sum(key not in right for key in keys),
            "only_b": sum(key not in left for key in keys),
        }
        if both:
            ratios = {key: right[key].seconds / left[key].seconds for key in both}
            worst = max(both, key=lambda key: ratios[key])
            row |= {"median": median(ratios.values()), "least": min(ratios.values()), "most": ratios[worst]}
            row["at"] = _place(left[worst])
        rows.append(row)
    return rows


def _links(profile: Profile) -> list[str]:
    return [
        f"{fit.transport} {fit.tier} {fit.kind}: {fit.latency_s * 1e6:.1f} us a step, "
        f"{fit.start_s * 1e6:.1f} us to begin, "
        f"{fit.bandwidth / 1e9:.2f} GB/s; residual {100 * fit.residual:.0f} % (worst {100 * fit.worst:.0f} %) "
        f"of {fit.points} points"
        for fit in fit_links(profile.collectives)
    ]


def _place(record: OpRecord | CollectiveRecord) -> str:
    return "x".join(map(str, record.at)) if isinstance(record, OpRecord) else f"{record.nbytes:,} bytes"


def _threads(record: OpRecord) -> str:
    return f" on {record.threads} threads" if record.threads > 1 else ""


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1e6:.2f} us" if value < 0.01 else f"{value:.2f}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
