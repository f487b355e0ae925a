"""Offload as a choice of the search, against enumeration of small spaces: state on the host or not, and for every block
whether what it saves waits there, beside how it is recomputed; with several sizes of both memories.
Where blocks are split over tp, the bounds alone are compared, with decisions of all kinds."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from functools import cache

import pytest
from small_spaces import AMPLE, Priced, drawn, enumerated, with_memory
from test_exhaustive_tp import every_decision
from tiny_models import thin

from autopar.cluster import Cluster
from autopar.errors import InfeasibleError
from autopar.job import Job
from autopar.plan import Plan
from autopar.solver import recompute
from autopar.solver.context import Context
from autopar.solver.fix import parse_fix
from autopar.solver.limits import GAP
from autopar.solver.search import search
from autopar.solver.shardings import Shardings

PROBLEMS = 24
ROUNDING = 1 + 1e-9
SMALL = 256
"""Bytes below which nothing is sent, for blocks as small as these."""


@pytest.fixture(autouse=True)
def little_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "SMALL", SMALL)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the search and the enumeration say at one size of memory. ``here``: the fastest without offload."""

    memory: int
    host: int
    plan: Plan | None
    best: Priced | None
    here: Priced | None
    fitting: tuple[Priced, ...]


@cache
def outcomes(seed: int) -> tuple[Outcome, ...]:
    """Of one problem: ample memory, and twice too little for the fastest, with a host that has room or may not have."""
    trial = drawn(seed, offload=True)
    plans = list(enumerated(trial))
    draw = random.Random(-seed - 1)
    fastest = min(plans, key=lambda plan: plan.seconds)
    less = sorted({plan.nbytes for plan in plans if plan.nbytes < fastest.nbytes}) or [fastest.nbytes]
    hosted = sorted({plan.host for plan in plans if plan.host}) or [0]
    sizes = [(AMPLE, 0), (draw.choice(less), 0), (draw.choice(less[: len(less) // 2 + 1]), draw.choice(hosted))]
    return tuple(outcome(trial, plans, max(memory, trial.cluster.device.reserve_bytes + 1), h) for memory, h in sizes)


def outcome(trial, plans: list[Priced], memory: int, host: int) -> Outcome:
    fitting = tuple(plan for plan in plans if plan.nbytes <= memory and (not host or plan.host <= host))
    here = [plan for plan in fitting if "offload" not in plan.told]
    try:
        plan = search(trial.model, trial.job, with_memory(trial.cluster, memory, host), trial.fix)
    except InfeasibleError:
        plan = None
    best, without = (min(some, key=lambda plan: plan.seconds, default=None) for some in (fitting, here))
    return Outcome(memory, host, plan, best, without, fitting)


@pytest.mark.parametrize("seed", range(PROBLEMS))
def test_bound_gap_and_plan_agree_with_enumeration(seed: int) -> None:
    for one in outcomes(seed):
        if one.plan is None:
            continue
        assert one.best is not None, "a plan is found where none fits"
        step = one.plan.predicted.step_time
        assert one.plan.bound <= one.best.seconds * ROUNDING, f"the bound {one.plan.bound} is above {one.best}"
        assert any(abs(other.seconds - step) <= 1e-9 * step for other in one.fitting), "it is none of the space"
        assert step <= one.best.seconds * (1 + one.plan.gap) * ROUNDING


def test_where_memory_is_ample_nothing_waits_on_the_host() -> None:
    for seed in range(PROBLEMS):
        one = outcomes(seed)[0]
        assert one.plan is not None
        assert one.best is not None
        assert one.plan.predicted.step_time <= one.best.seconds * (1 + GAP)
        assert not any(candidate.offload for candidate in one.plan.candidates.values())


def test_what_only_offload_makes_fast_or_fit_is_found() -> None:
    every = [one for seed in range(PROBLEMS) for one in outcomes(seed)]
    pays = [one for one in every if one.best and (not one.here or one.best.seconds < one.here.seconds * (1 - GAP))]
    blocks = [one for one in pays if "/offload" in one.best.told]
    found = [one for one in pays if one.plan and one.plan.predicted.step_time <= one.best.seconds * (1 + GAP)]
    assert len(pays) >= 15, len(pays)
    assert len(blocks) >= 6, len(blocks)
    # Of the others some only just fit, and what fits at all is sought by heuristics (`test_exhaustive`).
    assert len(found) >= 0.75 * len(pays), [(one.memory, one.host, one.best) for one in pays if one not in found]
    assert any(one.here is None and one.plan is not None for one in blocks)


def test_no_decision_beats_the_bounds_of_offload() -> None:
    """Seconds of each way, bytes sent and kept of every decision over tp, under every choice."""
    cluster, seen = Cluster.parse("1x4:h100"), 0
    device = dataclasses.replace(cluster.device, host_bandwidth=cluster.device.memory_bandwidth / 100)
    cluster = Cluster((dataclasses.replace(cluster.groups[0], device=device),))
    for job, axes in ((Job(4, 64, "bf16"), {"tp": 2}), (Job(4, 16, "bf16"), {"tp": 4}), (Job(4, 64, "bf16"), {})):
        model = thin(2, 16, 64)
        context = Context.of(model, job, cluster, parse_fix({}))
        shardings = Shardings(context, axes.items(), 2)
        for kind in model.kinds:
            names = context.choices_of(kind)
            for cost in costs(context, shardings, kind, names):
                for name, one in cost.items():
                    seen += one.offload
                    forward, backward = shardings.least_parts(kind, name)
                    assert forward <= one.forward_s * ROUNDING, (kind, name)
                    assert backward <= one.backward_s * ROUNDING, (kind, name)
                    handed = context.gradient_price() * one.trains
                    for sharp in (False, True):
                        least = shardings.least_seconds(kind, name, sharp)
                        assert least <= (one.forward_s + one.backward_s + handed) * ROUNDING, (kind, name)
                    assert shardings.least_kept(kind, name) <= one.inflight * ROUNDING, (kind, name)
                    assert not one.offload or shardings.least_moved(kind, name) <= one.hosted * ROUNDING, (kind, name)
    assert seen > 200


def costs(context: Context, shardings: Shardings, kind: str, names: tuple[str, ...]) -> Iterator[dict]:
    if shardings.size == 1:
        yield shardings.fastest().costs[kind]
        return
    decisions = list(every_decision(context.model, shardings, kind))
    for decision in decisions[:: max(1, len(decisions) // 40)]:
        yield context.costs.of(context.model.kinds[kind], decision, shardings.prices, names)
