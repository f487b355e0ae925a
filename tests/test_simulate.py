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


def random_pipeline(draw):
    """Stages, micro-batches, transfer, schedule and stages a rank that can run."""
    schedule = draw.choice(("1f1b", "gpipe", "interleaved", "zbv", "dualpipev"))
    ranks = draw.randint(1 if schedule in ("1f1b", "gpipe") else 2, 5)
    vpp = {"interleaved": draw.choice((2, 3, 4)), "zbv": 2, "dualpipev": 2}.get(schedule, 1)
    micro = draw.randint(1, 14)
    if schedule == "1f1b":
        micro = max(micro, ranks)
    if schedule == "dualpipev":
        micro += 2 * ranks
    if schedule == "interleaved":
        micro = ranks * draw.randint(1, 4)
    stages = []
    for _ in range(ranks * vpp):
        backward = draw.uniform(0.1, 3)
        after = draw.choice((0.0, draw.uniform(0, 9)))
        stages.append(StageTimes(draw.uniform(0.1, 3), backward, draw.uniform(0, backward), after_s=after))
    return stages, micro, draw.choice((0.0, 0.05, 0.5)), schedule, vpp


def test_bounds_never_exceed_the_simulation():
    draw = random.Random(1)
    tight = {}
    for _ in range(4000):
        stages, micro, transfer, schedule, vpp = random_pipeline(draw)
        simulated = simulate(stages, micro, (transfer,) * (len(stages) - 1), schedule, vpp).total
        bound = pipeline_bound(stages, micro, transfer, schedule, vpp)
        assert bound <= simulated * (1 + 1e-12)
        work = sum(s.forward_s + s.backward_s for s in stages)
        assert spread_bound(work, len(stages) // vpp, micro, vpp) <= bound * (1 + 1e-12)
        tight.setdefault(schedule, []).append(bound / simulated)
    assert all(max(ratios) > 0.98 and sum(ratios) / len(ratios) > 0.7 for ratios in tight.values())


def test_the_usual_formula_is_neither_a_bound_nor_exact():
    draw = random.Random(1)
    above = below = 0
    for _ in range(300):
        count = draw.randint(1, 7)
        micro = draw.randint(count, count + 12)
        stages = stages_of([draw.uniform(0.1, 3) for _ in range(count)], [draw.uniform(0.1, 3) for _ in range(count)])
        work = [s.forward_s + s.backward_s for s in stages]
        simulated = simulate(stages, micro).total
        folklore = (micro - 1) * max(work) + sum(work)
        above += folklore > simulated * (1 + 1e-9)
        below += folklore < simulated * (1 - 1e-9)
    assert above > 0
    assert below > 0


def test_bound_is_reached_by_equal_stages_with_free_transfers():
    assert pipeline_bound([StageTimes(1, 2)] * 4, 8) == pytest.approx(simulate([StageTimes(1, 2)] * 4, 8).total)


def test_spread_bound_is_the_best_split():
    total, count, micro = 10.0, 3, 5
    best = spread_bound(total, count, micro)
    work = [best / micro * (1 - 1 / micro) ** s for s in range(count)]
    assert sum(work) == pytest.approx(total)
    assert pipeline_bound([StageTimes(w, 0.0) for w in work], micro) == pytest.approx(best)


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


def test_more_stages_a_rank_make_a_smaller_bubble():
    """The same work on four ranks, cut finer; and a halved backward fills what is left."""
    totals = [simulate([StageTimes(1, 2)] * 4, 8).total]
    for vpp in (2, 4):
        totals.append(simulate([StageTimes(1 / vpp, 2 / vpp)] * 4 * vpp, 8, schedule="interleaved", vpp=vpp).total)
    assert totals == pytest.approx([24 + 9, 24 + 9 / 2, 24 + 9 / 4])
    for schedule in ("zbv", "dualpipev"):
        halved = simulate([StageTimes(0.5, 1.0, 0.5)] * 8, 8, schedule=schedule, vpp=2).total
        assert 24 <= halved < totals[1]


def test_transfers_overlap_where_they_are_posted_ahead():
    free, paid = (
        simulate([StageTimes(0.5, 1.0)] * 8, 32, (t,) * 7, schedule="interleaved", vpp=2).total for t in (0.0, 0.1)
    )
    assert free < paid < free + 32 * 0.1


def test_a_halved_backward_hands_on_before_its_weights():
    """Torch leaves the whole backward of stage 0 to its second half."""
    stages = [StageTimes(1.0, 2.0, 1.25)] * 4
    events = simulate(stages, 3, schedule="zbv", vpp=2, record=True).events
    lengths = {(e.kind, e.stage): round(e.end - e.start, 9) for e in events}
    assert lengths["I", 0] == 0
    assert lengths["W", 0] == 2
    assert lengths["I", 2] == 0.75
    assert lengths["W", 2] == 1.25
    handed = {(e.stage, e.micro_batch): e.end for e in events if e.kind == "I"}
    begun = {(e.stage, e.micro_batch): e.start for e in events if e.kind == "I"}
    assert all(begun[s, i] >= handed[s + 1, i] - 1e-12 for s in range(3) for i in range(3))


def test_what_happens_once_a_step_with_several_stages_on_a_rank():
    plain = simulate([StageTimes(1, 2)] * 4, 4, schedule="interleaved", vpp=2).total
    stages = [StageTimes(1, 2, first_s=0.5, last_s=0.25, after_s=0.125)] * 4
    assert simulate(stages, 4, schedule="interleaved", vpp=2).total > plain + 0.5


def test_first_forwards_wait_for_what_is_gathered_ahead():
    """Gathered by 5 s: the first stage waits for its own, the second not, since its input comes later anyway."""
    slow = simulate([StageTimes(1, 2, ready_s=5.0), StageTimes(1, 2, ready_s=6.0)], 4)
    assert slow.total == pytest.approx(simulate([StageTimes(1, 2)] * 2, 4).total + 4)
    assert slow.exposed == pytest.approx((4.0, 0.0))
    early = simulate([StageTimes(1, 2, ready_s=1.0), StageTimes(1, 2, ready_s=2.0)], 4)
    assert early.total == simulate([StageTimes(1, 2)] * 2, 4).total


def test_only_the_end_of_the_step_waits_for_reductions_that_drain():
    plain = simulate([StageTimes(1, 2)] * 2, 4)
    # The last stage's go on while the first stage goes back; the first's are all that is seen.
    waits = simulate([StageTimes(1, 2, last_s=0.5)] * 2, 4)
    drains = simulate([StageTimes(1, 2, last_s=0.5, reduces_s=2.0)] * 2, 4)
    assert waits.total == pytest.approx(plain.total + 1.0)
    assert drains.total == pytest.approx(plain.total + 0.5)
    assert drains.exposed == pytest.approx((0.5, 0.5))
    # Of several stages a rank, the second's wait for the first's to be through.
    several = [StageTimes(1, 2, last_s=0.5, reduces_s=9.0)] * 4
    timeline = simulate(several, 4, schedule="interleaved", vpp=2, record=True)
    plain = simulate([StageTimes(1, 2)] * 4, 4, schedule="interleaved", vpp=2)
    begin = max(e.start for e in timeline.events if e.stage == 2 and e.kind == "B")
    assert timeline.ends[0] == pytest.approx(max(begin + 2.5 + 9.0, plain.ends[0] + 0.5))
