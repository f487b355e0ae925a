"""Searches that are stopped: the plan so far, with what is honestly known of it."""

import pytest
from dense_decoder import decoder

import autopar
from autopar.cluster import Cluster
from autopar.errors import BadInputError
from autopar.job import Job
from autopar.solver.limits import OPTIMAL, Limits, Progress
from autopar.solver.search import search

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
