"""Scans of state-space models: samples, channels and heads go apart; positions need the ones before them."""

from __future__ import annotations

from autopar.sharding.rules.entry import Entry

ENTRIES = [
    Entry("autopar.selective_scan", ("b d s^, b d s^, d n^, b n^ s^, b n^ s^ -> b d s^",)),
    Entry(
        "autopar.state_space_scan",
        ("b s^ (g k) p, b s^ (g k), (g k), b s^ g n^, b s^ g n^ -> b s^ (g k) p",),
    ),
]
