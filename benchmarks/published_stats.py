"""How far predictions of published runs are off, by group: errors of time and memory, ranking of sweeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from statistics import fmean, median
from typing import Any

PEAK_SHARE = 0.45
"""Of the trivial formula: FLOP/s reached of the peak."""


def trivial_seconds(parameters: float, tokens: float, peak: float, devices: int) -> float:
    """6 N T / (0.45 peak): the formula that any model must beat (`shared/published/README.md`)."""
    return 6 * parameters * tokens / (PEAK_SHARE * peak * devices)


def errors(pairs: Iterable[tuple[float, float]]) -> list[float]:
    """Signed relative errors of (predicted, measured)."""
    return [predicted / measured - 1 for predicted, measured in pairs]


def summary(signed: Sequence[float]) -> dict[str, float | None]:
    """Mean absolute, median signed and 90th percentile absolute error."""
    if not signed:
        return {"mape": None, "median": None, "p90": None}
    absolute = sorted(map(abs, signed))
    return {
        "mape": fmean(absolute),
        "median": median(signed),
        "p90": absolute[min(len(absolute) - 1, int(0.9 * len(absolute)))],
    }


def kendall_tau(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Kendall's tau-b of (predicted, measured), or None where one of them has no order."""
    agree = tied_first = tied_second = total = 0
    for (a, b), (c, d) in combinations(pairs, 2):
        total += 1
        first, second = (a > c) - (a < c), (b > d) - (b < d)
        agree += first * second
        tied_first += first == 0
        tied_second += second == 0
    scale = ((total - tied_first) * (total - tied_second)) ** 0.5
    return agree / scale if scale else None


def regret(pairs: Sequence[tuple[float, float]]) -> float:
    """Measured time of the predicted best, over the measured best, less 1."""
    return min(pairs)[1] / min(measured for _, measured in pairs) - 1


def sweep_figures(sweeps: Iterable[Mapping[str, Any]], rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean tau and regret of sweeps with at least two runs that were predicted, and how many such sweeps there are."""
    taus, regrets = [], []
    for sweep in sweeps:
        found = [rows[name] for name in sweep.get("ids") or () if isinstance(name, str | int) and name in rows]
        pairs = [(row["predicted_s"], row["measured_s"]) for row in found if row.get("measured_s")]
        if len(pairs) < 2:
            continue
        tau = kendall_tau(pairs)
        if tau is not None:
            taus.append(tau)
        regrets.append(regret(pairs))
    return {
        "tau": fmean(taus) if taus else None,
        "regret": fmean(regrets) if regrets else None,
        "sweeps": len(regrets),
    }


LOW, HIGH = 0.1, 0.9
"""Percentiles that an 80 % interval lies between."""


ENOUGH = 10
"""Runs from which on a group counts fully in an interval."""


def quantile(weighted: Sequence[tuple[float, float]], share: float) -> float:
    """The value below which so much of the weight lies, of (value, weight)."""
    ordered = sorted(weighted)
    total, passed = sum(weight for _, weight in ordered), 0.0
    for value, weight in ordered:
        passed += weight
        if passed >= share * total:
            return value
    return ordered[-1][0]


def spread(groups: Iterable[Sequence[float]]) -> dict[str, float]:
    """Low and high ends of an interval from ratios of measured over predicted, each group with the same weight, or as
    much less as it has fewer runs than `ENOUGH`: a handful says little of how such runs spread."""
    weighted = [(ratio, min(1.0, len(ratios) / ENOUGH) / len(ratios)) for ratios in groups for ratio in ratios]
    return {"low": round(quantile(weighted, LOW), 3), "high": round(quantile(weighted, HIGH), 3)}


def left_out(ratios: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Per group, the share of its runs inside the interval that the other groups make."""
    found = {}
    for name, mine in ratios.items():
        ends = spread([other for key, other in ratios.items() if key != name])
        found[name] = fmean(ends["low"] <= ratio <= ends["high"] for ratio in mine)
    return found
