"""The pipeline simulator against closed forms, and the bounds against the simulator."""

import itertools
import random

import pytest

from autopar.errors import AutoparError
from autopar.solver.bounds import pipeline_bound, spread_bound
from autopar.solver.simulate import StageTimes, gpipe_seconds, simulate


def stages_of(forward, backward):
    return [StageTimes(f, b) for f, b in zip(forward, backward, strict=True)]


@pytest.mark.parametrize(("count", "micro"), [(1, 1), (1, 5), (2, 2), (4, 4), (4, 16), (7, 9)])
def test_equal_stages_take_the_textbook_time(count, micro):
    timeline = simulate(stages_of([1.0] * count, [2.0] * count), micro)
    assert timeline.total == pytest.approx((micro + count - 1) * 3.0)
    assert simulate([StageTimes(1.0, 2.0)] * count, micro, schedule="gpipe").total == pytest.approx(
        (micro + count - 1) * 3.0
    )


def test_gpipe_agrees_with_its_closed_form_on_uneven_stages():
    draw = random.Random(0)
    for _ in range(200):
        count, micro = draw.randint(1, 6), draw.randint(1, 10)
        stages = stages_of([draw.uniform(0.1, 3) for _ in range(count)], [draw.uniform(0.1, 3) for _ in range(count)])
        assert simulate(stages, micro, schedule="gpipe").total == pytest.approx(gpipe_seconds(stages, micro))


def test_bounds_never_exceed_the_simulation():
    draw = random.Random(1)
    above = below = 0
    for _ in range(2000):
        count = draw.randint(1, 7)
        micro = draw.randint(count, count + 12)
        transfer = draw.choice((0.0, 0.05, 0.5))
        stages = stages_of([draw.uniform(0.1, 3) for _ in range(count)], [draw.uniform(0.1, 3) for _ in range(count)])
        work = [s.forward_s + s.backward_s for s in stages]
        simulated = simulate(stages, micro, (transfer,) * (count - 1)).total
        bound = pipeline_bound(work, micro, transfer)
        assert bound <= simulated * (1 + 1e-12)
        assert spread_bound(sum(work), count, micro) <= bound * (1 + 1e-12)
        folklore = (micro - 1) * max(work) + sum(work)
        above += transfer == 0 and folklore > simulated * (1 + 1e-9)
        below += transfer == 0 and folklore < simulated * (1 - 1e-9)
    assert above > 0, "(m-1) max + sum would have been a bound after all"


def test_bound_is_reached_by_equal_stages_with_free_transfers():
    assert pipeline_bound([3.0] * 4, 8) == pytest.approx(simulate([StageTimes(1, 2)] * 4, 8).total)


def test_spread_bound_is_the_best_split():
    total, count, micro = 10.0, 3, 5
    best = spread_bound(total, count, micro)
    work = [best / micro * (1 - 1 / micro) ** s for s in range(count)]
    assert sum(work) == pytest.approx(total)
    assert pipeline_bound(work, micro) == pytest.approx(best)


def test_transfers_are_exposed_in_the_steady_state():
    free = simulate([StageTimes(1, 2)] * 4, 32).total
    paid = simulate([StageTimes(1, 2)] * 4, 32, (0.1,) * 3).total
    assert paid >= free + 32 * 0.1


def test_once_per_step_work_counts_where_it_happens():
    stages = [StageTimes(1, 2, first_s=0.5, last_s=0.25, after_s=0.125)]
    assert simulate(stages, 3).total == pytest.approx(9 + 0.875)


def test_events_do_not_overlap_and_cover_every_micro_batch():
    timeline = simulate([StageTimes(1, 2), StageTimes(2, 1), StageTimes(1, 1)], 5, (0.2, 0.3), record=True)
    for stage in range(3):
        events = [event for event in timeline.events if event.stage == stage]
        assert sorted((e.kind, e.micro_batch) for e in events) == sorted((k, i) for k in "FB" for i in range(5))
        assert all(a.end <= b.start + 1e-12 for a, b in itertools.pairwise(events))


def test_too_few_micro_batches_are_refused():
    with pytest.raises(AutoparError, match="3 < 4"):
        simulate([StageTimes(1, 1)] * 4, 3)
