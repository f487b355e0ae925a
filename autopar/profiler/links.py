"""Latency and bandwidth of each link tier, fitted to measured collectives, with residuals.

The terms are those that the cost model prices collectives by (`autopar.solver.collective_costs`), so that the fitted
figures can be put into it as they are:

    seconds = start + steps * latency + bytes moved per rank / bandwidth

Large messages say the bandwidth, small ones the latency; what is between them (protocols that trade one for the other)
is in the residual, which is told. A tier is "intra_node" or "inter_node" (groups that leave their node).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from autopar.profiler.database import CollectiveRecord
from autopar.profiler.surface import relative_fit

KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send_recv")


@dataclass(frozen=True, slots=True)
class LinkFit:
    """One tier (or one collective on it: ``kind``), from ``points`` measurements. Seconds to begin and per step;
    bytes/s per rank and direction; ``residual``: root mean square of log(fitted / measured), ``worst`` the
    largest."""

    tier: str
    transport: str
    kind: str
    start_s: float
    latency_s: float
    bandwidth: float
    residual: float
    worst: float
    points: int


def fit_links(records: Iterable[CollectiveRecord]) -> list[LinkFit]:
    """A fit for every tier and transport over all collectives (kind "all"), and for each kind of them alone.

    What could not be told (no message large enough for a bandwidth) is left out.
    """
    groups: dict[tuple[str, str, str], list[CollectiveRecord]] = {}
    for record in records:
        for kind in ("all", record.kind):
            groups.setdefault((record.tier, record.transport, kind), []).append(record)
    fits = [_fit(*key, group) for key, group in sorted(groups.items())]
    return [fit for fit in fits if fit is not None]


def _fit(tier: str, transport: str, kind: str, records: list[CollectiveRecord]) -> LinkFit | None:
    columns = np.array([_terms(record) for record in records])
    seconds = np.array([record.seconds for record in records])
    if len(records) < 2:
        return None
    start, latency, inverse = relative_fit(columns, seconds)
    if inverse <= 0:
        return None
    errors = np.log(np.maximum(columns @ np.array([start, latency, inverse]), 1e-12) / seconds)
    return LinkFit(
        tier,
        transport,
        kind,
        float(start),
        float(latency),
        float(1 / inverse),
        float(np.sqrt(np.mean(errors**2))),
        float(np.max(np.abs(errors))),
        len(records),
    )


def _terms(record: CollectiveRecord) -> tuple[float, float, float]:
    """(1, steps, bytes each rank moves): between nodes, bytes over the ranks of a node that carry them together."""
    n, full = record.size, float(record.nbytes)
    carriers = record.per_node if record.nodes > 1 else 1
    if record.kind == "send_recv":
        return 1.0, 1.0, full
    if record.kind == "all_to_all":
        piece = full / n / n
        return 1.0, float(n - 1), piece * (n - 1 if record.nodes == 1 else n - record.per_node)
    passes = 2 if record.kind == "all_reduce" or (record.kind == "reduce_scatter" and record.transport == "gloo") else 1
    return 1.0, float(passes * (n - 1)), passes * full * (n - 1) / n / carriers
