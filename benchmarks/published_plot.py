"""The scatter of predicted over measured seconds as one HTML file, drawn as SVG: no library, no network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from math import floor, log10
from pathlib import Path
from typing import Any

SIDE, EDGE = 720, 60
"""Pixels of the square, and of its margin."""
COLOURS = ("#3366cc", "#dc3912", "#109618", "#ff9900", "#990099", "#0099c6", "#dd4477", "#66aa00", "#b82e2e", "#316395")


def write_scatter(path: Path, rows: Iterable[Mapping[str, Any]], title: str) -> None:
    """Write the file: measured seconds to the right, predicted upwards, both logarithmic; a point tells its record."""
    timed = [row for row in rows if row.get("measured_s")]
    groups = sorted({row["group"] for row in timed})
    colours = {group: COLOURS[place % len(COLOURS)] for place, group in enumerate(groups)}
    values = [row[name] for row in timed for name in ("measured_s", "predicted_s")] or [1.0]
    low, high = floor(log10(min(values))), floor(log10(max(values))) + 1

    def at(seconds: float) -> float:
        return EDGE + (log10(seconds) - low) / (high - low) * (SIDE - 2 * EDGE)

    parts = []
    for power in range(low, high + 1):
        x = at(10.0**power)
        parts.append(f'<path d="M{x:.1f} {EDGE}V{SIDE - EDGE}M{EDGE} {SIDE - x:.1f}H{SIDE - EDGE}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{SIDE - EDGE + 18}" text-anchor="middle">{10.0**power:g} s</text>')
        parts.append(f'<text x="{EDGE - 6}" y="{SIDE - x + 4:.1f}" text-anchor="end">{10.0**power:g} s</text>')
    for factor in (0.8, 1.0, 1.25):
        ends = ((10.0**low, 10.0**low * factor), (10.0**high, 10.0**high * factor))
        points = " ".join(f"{at(x):.1f},{SIDE - at(y):.1f}" for x, y in ends)
        parts.append(
            f'<polyline points="{points}" stroke="#888" stroke-dasharray="{0 if factor == 1 else 4}" fill="none"/>'
        )
    for row in timed:
        x, y = at(row["measured_s"]), SIDE - at(row["predicted_s"])
        told = f"{row['id']}: measured {row['measured_s']:.3g} s, predicted {row['predicted_s']:.3g} s"
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colours[row["group"]]}" fill-opacity="0.6">'
            f"<title>{escape(told)}</title></circle>"
        )
    legend = "".join(
        f'<li style="color:{colours[group]}">{escape(group)} ({sum(row["group"] == group for row in timed)})</li>'
        for group in groups
    )
    path.write_text(
        f'<!doctype html><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>body{{font:14px sans-serif}}text{{font-size:12px}}ul{{columns:3;list-style:square}}</style>"
        f"<h1>{escape(title)}</h1><p>Measured to the right, predicted upwards; dashed: 20 % either way.</p>"
        f'<ul>{legend}</ul><svg width="{SIDE}" height="{SIDE}">{"".join(parts)}</svg>\n'
    )
