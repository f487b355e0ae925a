"""Bounds and stages that need no ILP: valid against enumeration and simulation, and close to what is possible."""

import random
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest

from autopar.solver.borders import even_borders
from autopar.solver.chain import chain_of
from autopar.solver.laps import forced_seconds, laps_bound, laps_fit
from autopar.solver.mixes import mixed
from autopar.solver.orders import moments, orders, peaks, warm_up
from autopar.solver.path_bound import path_bound, program_bound
from autopar.solver.paths import weights
from autopar.solver.reach import reach
from autopar.solver.simulate import StageTimes, gpipe_seconds, simulate
from autopar.solver.stages import BlockRun, Option, StageProblem, least_seconds, rank_bytes, solve_stages, stage_seconds
from autopar.solver.standing import standing

GIB = 2**30
ROUNDING = 1 + 1e-9


def drawn_options(draw: random.Random, number: int) -> tuple[Option, ...]:
    """A fastest option, and others that keep less and take longer."""
    forward, kept, state = draw.uniform(1, 3), draw.uniform(1, 5) * GIB, draw.uniform(0, 2) * GIB
    once = {"reduce_s": draw.uniform(0, 1), "optimizer_s": draw.uniform(0, 1)}
    found = [Option("none", forward, 2 * forward, state, kept, draw.uniform(0, 2) * GIB, **once)]
    for index in range(1, number):
        again, share = forward * draw.uniform(0.1, 1), draw.uniform(0.05, 0.7)
        found.append(Option(f"less {index}", forward, 2 * forward + again, state, share * kept, kept, **once))
    return tuple(found)


def drawn_problem(draw: random.Random, layers: int, ranks: int) -> StageProblem:
    runs = (
        BlockRun("first", 1, drawn_options(draw, 1)),
        BlockRun("layer", layers, drawn_options(draw, draw.randint(1, 2))),
        BlockRun("last", 1, drawn_options(draw, draw.randint(1, 2))),
    )
    room = draw.uniform(8, 60) * GIB
    schedule = draw.choice(["1f1b", "gpipe"]) if ranks > 1 else "none"
    return StageProblem(runs, ranks, draw.randint(ranks, 3 * ranks), room, draw.uniform(0, 0.3), (), schedule)


def spreads(problem: StageProblem):
    """Every contiguous spread under every number of blocks an option may have."""
    kinds = [r for r, run in enumerate(problem.runs) for _ in range(run.count)]
    for cuts in combinations(range(1, len(kinds)), problem.stages - 1):
        pieces = [kinds[a:b] for a, b in zip((0, *cuts), (*cuts, len(kinds)), strict=True)]
        ways = []
        for piece in pieces:
            rows = []
            for r, run in enumerate(problem.runs):
                count, options = piece.count(r), len(run.options)
                rows.append([(count,)] if options == 1 else [(count - n, n) for n in range(count + 1)])
            ways.append(list(product(*rows)))
        yield from product(*ways)


@pytest.mark.parametrize("seed", range(60))
def test_one_stage_a_rank_is_bounded_and_spread_as_enumeration_says(seed):
    draw = random.Random(seed)
    problem = drawn_problem(draw, draw.randint(2, 4), draw.randint(1, 3))
    fitting = [counts for counts in spreads(problem) if max(rank_bytes(problem, counts)) <= problem.capacity]
    found = reach(problem)
    if not fitting:
        assert found is None or mixed(problem, found.borders) is None
        return
    assert found is not None
    best = min(stage_seconds(problem, counts) for counts in fitting)
    assert found.bound <= best * ROUNDING
    counts = mixed(problem, found.borders)
    if counts is not None:
        assert max(rank_bytes(problem, counts)) <= problem.capacity
        assert stage_seconds(problem, counts) >= best / ROUNDING


def test_without_need_for_memory_the_spread_is_the_best():
    """What the ILP proves optimal, dynamic programming finds, many times faster."""
    draw = random.Random(7)
    for _ in range(12):
        problem = replace(
            drawn_problem(draw, draw.randint(6, 20), draw.randint(2, 5)), capacity=2.0**50, schedule="1f1b"
        )
        found, exact = reach(problem), solve_stages(problem, balance=False)
        assert found is not None
        assert exact is not None
        counts = mixed(problem, found.borders)
        assert counts is not None
        assert found.bound <= exact.value * ROUNDING
        assert stage_seconds(problem, counts) <= exact.value * 1.02


def test_the_least_of_the_ilp_is_a_bound_and_infinite_where_nothing_fits():
    """Whether the last block keeps its bytes or needs them while it runs, they are too many: parts of both fit."""
    layer, ways = (
        Option("none", 1, 2, GIB, 0, 0),
        (Option("none", 1, 2, 0, 3 * GIB, GIB), Option("full", 1, 3, 0, 0, 4 * GIB)),
    )
    problem = StageProblem((BlockRun("layer", 4, (layer,)), BlockRun("last", 1, ways)), 1, 2, 7 * GIB, schedule="none")
    assert reach(problem) is not None
    assert least_seconds(problem, 0.5) == float("inf")
    for capacity, seconds in ((8 * GIB, 30.0), (7.999 * GIB, float("inf"))):
        assert least_seconds(replace(problem, capacity=capacity), 0.5) == pytest.approx(seconds, rel=1e-6)
    assert least_seconds(replace(problem, capacity=8 * GIB), 0.5) <= 30.0
    assert least_seconds(problem, 0.0) in (0.0, float("inf"))  # no time: nothing is known, or seen at once


SCHEDULES_OF = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zbv", 2), ("dualpipev", 2)]


@pytest.mark.parametrize(("schedule", "vpp"), SCHEDULES_OF)
def test_no_path_is_longer_than_the_step(schedule, vpp):
    """Random seconds for every block, random borders: every bound is below what is simulated."""
    draw = random.Random(vpp)
    tight = []
    for _ in range(40):
        ranks = draw.randint(2, 4)
        stages = ranks * vpp
        micro = draw.choice([2, 3]) * ranks
        sizes = [draw.randint(1, 3) for _ in range(stages)]
        runs, times = [], []
        for size in sizes:
            forward, backward, weight = 0.0, 0.0, 0.0
            for _ in range(size):
                f, b = draw.expovariate(1) + 0.1, draw.expovariate(0.5) + 0.1
                w = draw.uniform(0, b)
                sure = draw.uniform(0, 1)
                runs.append(
                    BlockRun(
                        "b",
                        1,
                        (Option("", f, b, 0, 0, 0, weight_s=b, sure_input_s=sure * (b - w), sure_weight_s=sure * w),),
                    )
                )
                forward, backward, weight = forward + f, backward + b, weight + w
            times.append(StageTimes(forward, backward, weight))
        problem = StageProblem(tuple(runs), ranks, micro, 2.0**50, 0.0, (), schedule, vpp, least=True)
        step = simulate(times, micro, (), schedule, vpp).total
        bounds = [path_bound(problem), program_bound(problem)]
        bounds.append(laps_bound(problem) if vpp > 1 else reach(problem).bound)
        assert max(bounds) <= step * ROUNDING
        tight.append(max(bounds) / step)
        ends = even_borders(problem)
        assert len(ends) == stages
        assert list(ends) == sorted(set(ends))
        assert ends[-1] == len(runs)
    assert max(tight) > 0.8


@pytest.mark.parametrize("schedule", ["interleaved", "zbv", "dualpipev"])
def test_no_spread_over_several_stages_a_rank_takes_less_than_its_bound(schedule):
    draw, fitted = random.Random(3), 0
    for _ in range(40):
        problem = drawn_problem(draw, draw.randint(3, 5), 2)
        problem = replace(problem, schedule=schedule, vpp=2, micro_batches=4, transfer_s=0.0)
        fitting = [counts for counts in spreads(problem) if max(rank_bytes(problem, counts)) <= problem.capacity]
        if fitting:
            fitted += 1
            assert laps_bound(problem) <= min(stage_seconds(problem, counts) for counts in fitting) * ROUNDING
    assert fitted > 10


def test_whether_any_spread_fits_is_whether_its_bound_is_finite():
    draw, found = random.Random(5), {True: 0, False: 0}
    for _ in range(300):
        problem = drawn_problem(draw, draw.randint(3, 6), 2)
        share = draw.uniform(0.2, 1.2)
        problem = replace(problem, schedule="interleaved", vpp=2, micro_batches=4, capacity=share * problem.capacity)
        fits = laps_fit(problem)
        assert fits == (laps_bound(problem) < float("inf"))
        found[fits] += 1
    assert min(found.values()) > 20


def test_the_bytes_of_every_rank_count_apart():
    """Together ranks have room for all blocks as fast as they can be, but the first ranks keep most in flight."""
    options = Option("none", 1, 2, 0, GIB, 0), Option("less", 1, 3, 0, 0.1 * GIB, 0)
    ample = StageProblem((BlockRun("layer", 16, options),), 4, 8, 2.0**50, 0.0, (), "interleaved", 2)
    short = replace(ample, capacity=6 * GIB)
    assert forced_seconds(short, chain_of(short)) == 0.0
    assert 1.05 * laps_bound(ample) < laps_bound(short) < 1.3 * laps_bound(ample)


@pytest.mark.parametrize("gib", [14, 12, 10, 8, 6])
def test_ranks_hold_whole_blocks_in_their_memory(gib):
    """Seven of fourteen each, some of which memory forces to take longer: what parts of blocks would do is 3 % less."""
    options = Option("none", 1, 2, 0, GIB, 0), Option("less", 1, 2.4, 0, 0.1 * GIB, 0)
    problem = StageProblem((BlockRun("layer", 14, options),), 2, 8, gib * GIB, 0.0, (), "interleaved", 2)
    exact = solve_stages(problem, work_limit=8.0, balance=False)
    assert exact is not None
    assert 0.98 * exact.value < laps_bound(problem) <= exact.value * ROUNDING


def test_gpipe_of_even_stages_is_as_long_as_its_path():
    found = weights("gpipe", 8, 1, 8)
    even = gpipe_seconds([StageTimes(1.0, 2.0)] * 8, 8)
    assert float(found.average.sum(axis=1) @ np.array([1.0, 2.0, 0.0, 0.0, 0.0])) == pytest.approx(even)


def runs(schedule: str, ranks: int, micro_batches: int) -> bool:
    """Whether the schedule takes so many micro-batches."""
    least = {"1f1b": ranks, "dualpipev": 2 * ranks}
    whole = schedule != "interleaved" or micro_batches % max(1, micro_batches // ranks) == 0
    return micro_batches >= least.get(schedule, 1) and whole


def test_what_ranks_hold_needs_no_walk_through_the_schedule():
    """Closed forms against the orders of actions."""
    for schedule, vpp in [("none", 1), *SCHEDULES_OF]:
        for ranks, micro in product((1,) if schedule == "none" else (2, 3, 5), (2, 3, 5, 8, 12)):
            if not runs(schedule, ranks, micro):
                continue
            held = warm_up(schedule, ranks, vpp, micro)
            for rank, (first, most) in enumerate(zip(held, peaks(schedule, ranks, vpp, micro), strict=True)):
                assert any(all(a <= b for (a, _), (b, _) in zip(first, one, strict=True)) for one in most)
                if vpp > 1:
                    continue
                alive, seen = 0, []
                for kind, *_ in orders(schedule, ranks, vpp, micro)[rank]:
                    seen += [alive] if kind == "B" else []
                    alive += 1 if kind == "F" else -1
                assert most == (((max(seen), 0),),)
                assert {m.held[0][0] for m in moments(schedule, ranks, vpp, micro)[rank]} <= set(seen)


def test_what_ranks_surely_hold_they_hold_at_some_time():
    """Closed forms again, and gradients that are kept, against the orders of actions."""
    later = 0
    for schedule, vpp in [("none", 1), *SCHEDULES_OF, ("interleaved", 3)]:
        needed = 2 if schedule in ("zbv", "dualpipev") else 1
        for ranks, micro in product((1,) if schedule == "none" else (2, 3, 5, 8), (1, 2, 3, 4, 5, 8, 12, 16)):
            if not runs(schedule, ranks, micro):
                continue
            for drains in (False, True):
                held = standing(schedule, ranks, vpp, micro, drains)
                for times, known in zip(held, moments(schedule, ranks, vpp, micro), strict=True):
                    later += any(kept for time in times for _, kept in time)
                    for time in times:
                        assert any(
                            all(
                                alive <= flying and (not kept or (done >= needed and (drains or done < micro)))
                                for (alive, kept), (flying, _, done) in zip(time, moment.held, strict=True)
                            )
                            for moment in known
                            if moment.kind != "I"
                        )
    assert later > 100
