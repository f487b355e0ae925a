"""Scans of state-space models and the gated delta rule: samples, channels and heads go apart; positions need the ones
before them."""

from __future__ import annotations

from autopar.sharding.rules.entry import Entry

ENTRIES = [
    Entry("autopar.selective_scan", ("b d s^, b d s^, d n^, b n^ s^, b n^ s^ -> b d s^",)),
    Entry(
        "autopar.state_space_scan",
        ("b s^ (g k) p, b s^ (g k), (g k), b s^ g n^, b s^ g n^ -> b s^ (g k) p",),
    ),
    Entry(
        "autopar.gated_delta_rule",
        (
            "b s^ g n^, b s^ g n^, b s^ (g k) p, b s^ (g k), b s^ (g k) -> b s^ (g k) p",
            "b s^ g n^, b s^ g n^, b s^ (g k) p, b s^ (g k) n^, b s^ (g k) -> b s^ (g k) p",
        ),
        linear="0 2",
    ),
]
