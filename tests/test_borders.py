"""Borders of schedules with several stages a rank: what waits for what, and spreads that wait little."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from autopar.schedule import SCHEDULES
from autopar.solver.borders import even_borders, fast_borders, length_of
from autopar.solver.lap_spread import LapSpreads
from autopar.solver.laps import laps_bound
from autopar.solver.mixes import mixed
from autopar.solver.path_bound import program_bound
from autopar.solver.simulate import StageTimes, simulate
from autopar.solver.stages import BlockRun, Option, StageProblem, rank_bytes, solve_stages
from autopar.solver.walk import LANES, walk_of

GIB = 2**30


def seconds(problem: StageProblem, borders: tuple[int, ...]) -> float:
    """The simulated step of the runs' first options, transfers free."""
    blocks = [run.options[0] for run in problem.runs for _ in range(run.count)]
    times = [
        StageTimes(
            sum(o.forward_s for o in blocks[start:end]),
            sum(o.backward_s for o in blocks[start:end]),
            sum(o.weight_s for o in blocks[start:end]) if problem.halves else 0.0,
        )
        for start, end in zip((0, *borders), borders, strict=False)
    ]
    return simulate(times, problem.micro_batches, (), problem.schedule, problem.vpp).total


def even_problem(blocks: int, ranks: int, vpp: int, micro: int, head: float, schedule: str) -> StageProblem:
    """So many equal blocks, and one that takes ``head`` times as long as these."""
    layer, last = (Option("none", f, 2 * f, 0, 0, 0, weight_s=f) for f in (1.0, head))
    runs = (BlockRun("layer", blocks, (layer,)), BlockRun("last", 1, (last,)))
    return StageProblem(runs, ranks, micro, 2.0**50, 0.0, (), schedule, vpp)


@pytest.mark.parametrize(
    ("schedule", "ranks", "vpp", "micro"),
    [("gpipe", 3, 1, 5), ("1f1b", 4, 1, 6), ("interleaved", 3, 3, 6), ("zbv", 3, 2, 7), ("dualpipev", 3, 2, 9)],
)
def test_the_longest_path_is_the_step_if_transfers_are_free(schedule: str, ranks: int, vpp: int, micro: int) -> None:
    draw = np.random.default_rng(1)
    walk = walk_of(schedule, ranks, vpp, micro)
    steps = draw.uniform(0.2, 2.0, (300, ranks * vpp, LANES))
    halved = SCHEDULES[schedule].splits_backward
    steps[:, :, 2] *= halved
    lengths = walk.lengths(steps)
    for lanes, length in zip(steps[::30], lengths[::30], strict=True):
        assert walk.longest(lanes.T.ravel())[0] == pytest.approx(length, rel=1e-12)
        times = [
            StageTimes(f, i + w, w if halved else 0.0, first_s=first, last_s=last) for f, i, w, first, last in lanes
        ]
        step = simulate(times, micro, (), schedule, vpp).total
        if schedule == "dualpipev":  # pairs that run as one only add
            assert length <= step * (1 + 1e-9)
        else:
            assert length == pytest.approx(step, rel=1e-9)


@pytest.mark.parametrize(("schedule", "micro"), [("interleaved", 4), ("interleaved", 8), ("zbv", 6), ("dualpipev", 8)])
def test_fast_borders_are_near_the_best_of_all(schedule: str, micro: int) -> None:
    for blocks, head in ((6, 0.5), (7, 1.5), (9, 0.3)):
        problem = even_problem(blocks, 2, 2, micro, head, schedule)
        cuts = combinations(range(1, blocks + 1), 3)
        best = min(seconds(problem, (*cut, blocks + 1)) for cut in cuts)
        assert seconds(problem, fast_borders(problem)) <= 1.02 * best


def test_they_are_shorter_than_even_ones() -> None:
    """Which lap has the longer stages is one to what is even."""
    shorter = []
    for blocks, ranks, vpp, micro in (
        (40, 8, 4, 16),
        (32, 8, 3, 16),
        (57, 8, 6, 32),
        (40, 16, 2, 32),
        (124, 25, 4, 50),
    ):
        for head in (0.2, 1.0):
            problem = even_problem(blocks, ranks, vpp, micro, head, "interleaved")
            shorter.append(seconds(problem, fast_borders(problem)) / seconds(problem, even_borders(problem)))
    assert max(shorter) <= 1 + 1e-9
    assert sorted(shorter)[len(shorter) // 2] < 0.97


def test_borders_that_are_fixed_stay() -> None:
    problem = replace(even_problem(7, 2, 2, 4, 1.0, "interleaved"), fixed=(3, 1, 2, 2))
    assert fast_borders(problem) == even_borders(problem) == (3, 4, 6, 8)
    counts = LapSpreads().best(problem)
    assert counts is not None
    assert [sum(map(sum, stage)) for stage in counts] == [3, 1, 2, 2]


@pytest.mark.parametrize("gib", [16, 11, 8])
def test_where_memory_is_short_longer_stages_move_with_what_fits(gib: int) -> None:
    options = (
        Option("none", 1.0, 2.0, 0.2 * GIB, 0.1 * GIB, 0.0),
        Option("less", 1.0, 2.6, 0.2 * GIB, 0.03 * GIB, 0.0),
        Option("full", 1.0, 3.0, 0.2 * GIB, 0.005 * GIB, 0.0),
    )
    problem = StageProblem((BlockRun("layer", 45, options),), 8, 16, (gib / 2) * GIB, 0.0, (), "interleaved", 4)
    even = mixed(problem, even_borders(problem))
    laps = LapSpreads()
    first = laps.best(problem)
    if first is None:
        assert even is None
        return
    found = laps.best(problem)  # once more, closer around the best
    assert found is not None
    assert max(rank_bytes(problem, found)) <= problem.capacity
    assert length_of(problem, found) <= length_of(problem, first) * (1 + 1e-9)
    if even is not None:
        assert length_of(problem, found) <= length_of(problem, even) * (1 + 1e-9)
    # In the same borders, less memory takes longer.
    short = replace(problem, capacity=0.9 * problem.capacity)
    again = laps.best(short, anew=False)
    assert again is None or length_of(short, again) >= length_of(problem, found) * (1 - 1e-9)


def test_hosts_that_are_full_make_blocks_wait_or_run_again() -> None:
    """What offload takes off the device has to have room on the host, in bounds as in stages."""
    draw, raised = random.Random(2), 0
    for _ in range(60):
        again = draw.uniform(0.2, 1.0)
        options = (
            Option("none", 1.0, 2.0, 0.0, GIB, 0.0),
            Option("none/offload", 1.0, 2.0, 0.0, 0.0, 0.0, hosted=GIB),
            Option("full", 1.0, 2.0 + again, 0.0, 0.1 * GIB, 0.0),
        )
        ranks, vpp, micro = 2, 2, 4
        problem = StageProblem(
            (BlockRun("layer", draw.randint(6, 9), options),),
            ranks,
            micro,
            draw.uniform(1.5, 4) * GIB,
            0.0,
            (),
            "interleaved",
            vpp,
            host_room=draw.uniform(0.0, 1.5) * GIB,
        )
        exact = solve_stages(problem, work_limit=8.0, balance=False)
        if exact is None:
            continue
        assert laps_bound(problem) <= exact.value * (1 + 1e-9)
        assert program_bound(problem) <= length_of(problem, exact.counts) * (1 + 1e-9)
        raised += laps_bound(problem) > laps_bound(replace(problem, host_room=float("inf"))) * (1 + 1e-6)
    assert raised > 5
