"""Searches that are stopped: the plan so far, with what is honestly known of it."""

from dataclasses import replace
from itertools import permutations

import pytest
from dense_decoder import decoder

import autopar
from autopar.cluster import Cluster
from autopar.errors import BadInputError
from autopar.job import Job
from autopar.objective import Objective
from autopar.solver import explore as explore_module
from autopar.solver.config_bounds import quick_bound
from autopar.solver.context import Context
from autopar.solver.explore import explore
from autopar.solver.fix import Fix
from autopar.solver.found import INFINITE
from autopar.solver.limits import OPTIMAL, Limits, Progress, Watch
from autopar.solver.objectives import search_parts
from autopar.solver.search import search
from autopar.solver.space import open_configs_of, shapes

MODEL, JOB, CLUSTER = decoder(4), Job(16, 64), Cluster.parse("2x4:h100")


def test_a_work_limit_stops_at_the_same_plan_every_time():
    whole = search(MODEL, JOB, CLUSTER, limits=Limits(gap=1e-4))
    first, second = (search(MODEL, JOB, CLUSTER, limits=Limits(gap=1e-4, work=1)) for _ in range(2))
    assert first.searched["stopped by work limit"] == 1
    assert (first.predicted, first.bound, first.stages) == (second.predicted, second.bound, second.stages)
    assert first.searched["steps"] < whole.searched["steps"]
    assert first.bound <= whole.predicted.step_time <= first.predicted.step_time
    assert first.gap == pytest.approx(first.predicted.step_time / first.bound - 1)
    assert first.status == ("optimal" if first.gap <= OPTIMAL else "feasible")


def test_a_time_limit_waits_for_a_plan():
    plan = search(MODEL, JOB, CLUSTER, limits=Limits(gap=1e-6, time_s=1e-9))
    assert plan.searched["stopped by time limit"] == 1
    assert plan.bound <= plan.predicted.step_time


def test_interrupts_take_the_best_so_far():
    told: list[Progress] = []

    def interrupt(progress: Progress) -> None:
        told.append(progress)
        if progress.best is not None:
            raise KeyboardInterrupt

    plan = search(MODEL, JOB, CLUSTER, limits=Limits(progress=interrupt))
    assert plan.searched["stopped by Ctrl-C"] == 1
    assert told[-1].best >= plan.predicted.step_time
    assert plan.bound <= plan.predicted.step_time
    assert str(told[-1]).startswith(f"{told[-1].done} of {told[-1].meshes} meshes, best ")
    assert str(told[0]) == f"0 of {told[0].meshes} meshes, nothing that fits yet"


def test_the_bound_of_what_an_interrupt_cuts_short_still_stands(monkeypatch):
    """Of two configurations the first is priced, and the second interrupted in the middle of its refinement."""
    context = Context.of(MODEL, JOB, CLUSTER, Fix())
    real, cut = explore_module.stage_bound, []

    def interrupted(of, config, shardings, **options):
        if not options.get("paths", True) and config == second and told[-1].best is not None:
            cut.append(max(real(of, config, shardings), quick_bound(of, config, shardings.least_work())))
            raise KeyboardInterrupt
        return real(of, config, shardings, **options)

    monkeypatch.setattr(explore_module, "stage_bound", interrupted)
    space = [shape for shape in shapes(MODEL, JOB, CLUSTER, Fix()) if shape.outline.micro_batch == 1]
    some = [config for shape in space for config in open_configs_of(shape, JOB, CLUSTER, Fix())][::7]
    checked = 0
    for first, second in permutations(some[:12], 2):
        told: list[Progress] = [Progress(0.0, 0, None, 1.0, 0, 1)]
        pair = {first, second}
        try:
            found = explore(context, space, Watch(Limits(gap=0.0, progress=told.append)), pair.__contains__)
        except KeyboardInterrupt:
            continue
        if found.priced.keys() == {first} and cut:
            assert found.bound <= cut.pop() * (1 + 1e-9)
            checked += 1
    assert checked


def test_an_interrupt_ends_the_search_of_parts():
    def interrupt(progress: Progress) -> None:
        if progress.best is not None:
            raise KeyboardInterrupt

    plan = search_parts(MODEL, JOB, CLUSTER, Objective("throughput_per_device"), limits=Limits(progress=interrupt))
    assert plan.searched["cluster sizes searched"] == 1
    assert plan.objective.gap >= 0.0


def test_an_interrupt_before_any_plan_is_one():
    def interrupt(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(MODEL, JOB, CLUSTER, limits=Limits(progress=interrupt))


def test_a_gap_that_is_asked_for_is_reached_or_more_is_tried():
    loose, close = (search(MODEL, JOB, CLUSTER, limits=Limits(gap=gap)) for gap in (0.5, 1e-3))
    assert loose.searched["steps"] <= close.searched["steps"]
    assert close.predicted.step_time <= loose.predicted.step_time
    assert loose.bound <= close.bound * (1 + 1e-9)


@pytest.mark.parametrize(
    ("limits", "message"),
    [({"gap": -0.1}, "gap: -0.1"), ({"time_limit": 0.0}, "time limit: 0.0"), ({"work_limit": 0}, "work limit: 0")],
)
def test_limits_that_make_no_sense_are_refused(limits, message):
    with pytest.raises(BadInputError, match=message):
        autopar.search("llama3-8b", JOB, CLUSTER, **limits)


def test_what_does_not_fit_is_no_reason_to_stop_seeking(monkeypatch):
    """Where nodes are far apart pipelines are likely to be best: they are tried until some fit."""
    cluster = Cluster.parse("8x1:h100")
    group = cluster.groups[0]
    cluster = Cluster((replace(group, inter_node=replace(group.inter_node, bandwidth=2e9)),))
    model, job = decoder(16), Job(64, 256)
    real, staged = explore_module.price, []

    def none_of_the_first_fits(context, config, shardings, found):
        if config.pp > 1:
            staged.append(config)
        return INFINITE if config.pp > 1 and len(staged) <= 20 else real(context, config, shardings, found)

    monkeypatch.setattr(explore_module, "price", none_of_the_first_fits)
    monkeypatch.setattr(explore_module._Walk, "prove", lambda walk: None)
    explore(Context.of(model, job, cluster, Fix()), shapes(model, job, cluster, Fix()), Watch(Limits(gap=0.0)))
    assert len(staged) > 20
