"""What devices draw: seconds in which they compute, their power then and else, and the search for the least of it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from dense_decoder import decoder
from small_plan import small_plan
from small_spaces import drawn, enumerated
from test_exhaustive_tp import drawn as drawn_tp
from test_exhaustive_tp import every_decision

from autopar.cluster import Cluster
from autopar.errors import AutoparError, BadInputError
from autopar.job import Job
from autopar.objective import Objective
from autopar.plan import Plan
from autopar.report.record import plan_record
from autopar.solver.computing import LeastComputing
from autopar.solver.context import Context
from autopar.solver.decision_costs import decision_price
from autopar.solver.fix import parse_fix
from autopar.solver.objectives import search_parts
from autopar.solver.reprice import check_price, price_plan, reprice
from autopar.solver.search import search
from autopar.solver.shardings import KnownShardings
from autopar.solver.space import shapes
from autopar.solver.steps import Step

ROUNDING = 1 + 1e-9
WAITING = 0.2
PROBLEMS = (0, 9, 24, 39, 48, 51, 54, 66, 72, 84, 90, 102)
"""Of `small_spaces`: some in which the fastest plan draws the least, and some in which it draws far more."""


def drawn_s(seconds: float, computing: float, waiting: float = WAITING) -> float:
    return waiting * seconds + (1 - waiting) * computing


@cache
def outcome(seed: int) -> tuple[float, float, float, Plan]:
    """Of a small space with ample memory: the least that any plan draws, what the fastest draws, the least seconds; and
    what the search finds."""
    trial = drawn(seed)
    plans = list(enumerated(trial))
    least = min(drawn_s(plan.seconds, plan.computing) for plan in plans)
    fastest = min(plans, key=lambda plan: plan.seconds)
    plan = search(trial.model, trial.job, trial.cluster, trial.fix, waiting=WAITING)
    return least, drawn_s(fastest.seconds, fastest.computing), fastest.seconds, plan


@pytest.mark.parametrize("seed", PROBLEMS)
def test_no_plan_draws_less_than_the_bound(seed: int) -> None:
    least, _, fastest, plan = outcome(seed)
    found = drawn_s(plan.predicted.step_time, plan.predicted.computing_s)
    assert plan.bound <= least * ROUNDING
    assert least <= found * ROUNDING
    assert found <= least * 1.01
    assert plan.bound <= fastest * ROUNDING


def test_the_search_chooses_by_what_is_drawn() -> None:
    """Here and there the plan that draws least is not the fastest one."""
    every = [outcome(seed) for seed in PROBLEMS]
    assert sum(least < 0.8 * fastest for least, fastest, _, _ in every) >= 5
    assert sum(least == fastest for least, fastest, _, _ in every) >= 3


@pytest.mark.parametrize("seed", [0, 2])
def test_no_sharding_computes_for_less(seed: int) -> None:
    model, job, cluster = drawn_tp(seed)
    context = Context.of(model, job, cluster, parse_fix({"cp": 1, "offload": "none"}), waiting=WAITING)
    known, bounds = KnownShardings(context), LeastComputing(context)
    least: dict[object, float] = {}
    for shape in shapes(model, job, cluster, context.fix):
        outline = shape.outline
        if outline.tp == 1 or outline.pad_heads > 1:
            continue
        if outline.sharding not in least:
            shardings = known.of(outline.sharding)
            least[outline.sharding] = sum(
                count
                * min(
                    decision_price(model.kinds[name], decision, shardings.prices)[0].computing_s
                    for decision in every_decision(model, shardings, name)
                )
                for name, count in context.counts.items()
            )
        computing = outline.micro_batches * least[outline.sharding] / outline.pp
        steps = (Step.ARITHMETIC, Step.OPERATORS, Step.KINDS)
        told = [bounds.bound(shape, step, 0.0) / (1 - WAITING) for step in steps]
        assert told == sorted(told)
        assert told[-1] <= computing * ROUNDING
        assert told[-1] >= 0.5 * computing
        assert bounds.seconds(shape, Step.KINDS, bounds.bound(shape, Step.KINDS, 7.0)) == pytest.approx(7.0)
    assert least


MODEL, JOB = decoder(3), Job(16, 1024)


def planned(**fix: object) -> Plan:
    return search(MODEL, JOB, Cluster.parse("1x4:h100"), fix)


def test_waiting_is_not_computing() -> None:
    """Without a pipeline: operators and the optimizer, not what data ranks send. With one: not its bubbles. On model
    axes: not their communication."""
    flat = planned(pp=1, tp=1, cp=1, zero=3, recompute="full", micro_batch=4).predicted
    told = flat.breakdown
    assert flat.computing_s == pytest.approx(told["computation"] + told["recomputation"] + told["optimizer"], rel=1e-6)
    assert flat.computing_s < flat.step_time
    staged = planned(pp=4, tp=1, zero=0, schedule="gpipe", micro_batch=4).predicted
    assert staged.computing_s < staged.step_time - staged.breakdown["pipeline wait"]
    split = planned(tp=4, sp=True).predicted
    assert split.computing_s < split.breakdown["computation"] + split.breakdown["optimizer"] + 1e-12
    assert split.computing_s < split.step_time - split.breakdown["model axis communication"]


def test_energy_by_hand() -> None:
    plan = planned(pp=4, tp=1, schedule="gpipe")
    found = plan.predicted
    by_hand = 4 * (700 * found.computing_s + 140 * (found.step_time - found.computing_s))
    assert found.energy_j == pytest.approx(by_hand)
    record = plan_record(plan)["energy"]
    assert record["step_j"] == found.energy_j
    assert record["token_j"] == pytest.approx(by_hand / JOB.tokens)
    assert (record["power_w"], record["wait_w"]) == (700, 140)
    assert "each 700 W while it computes" in str(plan)
    assert Plan.from_json(plan.to_json()) == plan


def test_where_power_is_not_known() -> None:
    """What a device draws while it waits: board power all the time. What it draws at all: nothing is told."""
    cluster = Cluster.parse("1x4:l40s")
    assert cluster.device.waiting == 1.0
    assert cluster.joules(2.0, 0.5) == 4 * 350 * 2.0
    plan = search(MODEL, JOB, cluster, {"tp": 1, "pp": 1})
    assert "350 W all the time, what it draws while it waits is not known" in " ".join(str(plan).split())
    dark = Cluster(tuple(replace(g, device=replace(g.device, power_w=0.0)) for g in cluster.groups))
    unknown = search(MODEL, JOB, dark, {"tp": 1, "pp": 1})
    assert unknown.predicted.energy_j is None
    assert "energy" not in str(unknown)
    assert small_plan().predicted.energy_j is None


def test_energy_is_priced_anew() -> None:
    for fix in ({"pp": 4, "tp": 1, "recompute": "full"}, {"tp": 4, "recompute": "selective"}, {"cp": 2, "zero": 3}):
        plan = planned(**fix)
        priced = price_plan(plan, MODEL)
        assert priced.computing_s == pytest.approx(plan.predicted.computing_s, rel=1e-9)
        assert reprice(plan, MODEL).energy_j == pytest.approx(plan.predicted.energy_j)
        check_price(plan, MODEL)
        wrong = replace(plan.predicted, energy_j=1.01 * (plan.predicted.energy_j or 0.0))
        with pytest.raises(AutoparError, match="energy of a step"):
            check_price(replace(plan, predicted=wrong), MODEL)


def test_waiting_power_in_a_cluster_file(tmp_path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('device = "l40s"\nnodes = 1\ndevices_per_node = 4\nwait_w = 70\n')
    cluster = Cluster.load(path)
    assert cluster.device.waiting == 70 / 350
    assert cluster.device.sources["wait_w"] == "cluster file mine.toml"
    cluster.save(tmp_path / "whole.toml")
    assert Cluster.load(tmp_path / "whole.toml") == cluster
    path.write_text('device = "l40s"\nnodes = 1\ndevices_per_node = 4\nwait_w = 400\n')
    with pytest.raises(BadInputError, match="wait_w 400 is above power_w 350"):
        Cluster.load(path)


def test_energy_is_no_worse_than_that_of_the_fastest_plan() -> None:
    cluster = Cluster.parse("1x4:a100-80g")
    least = search_parts(MODEL, JOB, cluster, Objective("energy"))
    fastest = search(MODEL, JOB, cluster)
    assert least.objective is not None
    assert least.objective.value == pytest.approx((least.predicted.energy_j or 0.0) / JOB.tokens)
    assert least.objective.bound <= least.objective.value
    assert (least.predicted.energy_j or 0.0) <= (fastest.predicted.energy_j or 0.0) * 1.0001
