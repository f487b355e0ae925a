"""The stage ILP against enumeration of every spread."""

import itertools
import random

import pytest

from autopar.solver.stages import BlockRun, Option, StageProblem, solve_stages, stage_bytes, stage_seconds

MiB = 2.0**20


def every_spread(problem):
    """All contiguous spreads with every mix of candidates per stage and run."""
    total = sum(run.count for run in problem.runs)
    ends = list(itertools.accumulate(run.count for run in problem.runs))
    starts = [0, *ends[:-1]]
    for cuts in itertools.combinations(range(1, total), problem.stages - 1):
        borders = [0, *cuts, total]
        choices = []
        for low, high in itertools.pairwise(borders):
            for start, end, run in zip(starts, ends, problem.runs, strict=True):
                blocks = max(0, min(high, end) - max(low, start))
                ways = itertools.product(range(blocks + 1), repeat=len(run.options))
                choices.append([way for way in ways if sum(way) == blocks])
        for combination in itertools.product(*choices):
            width = len(problem.runs)
            yield tuple(combination[s * width : (s + 1) * width] for s in range(problem.stages))


def random_problem(seed):
    draw = random.Random(seed)

    def run(kind, count):
        options = tuple(
            Option(
                f"{kind}{c}",
                seconds=draw.uniform(1, 4) * (1 + 0.3 * c),
                after_s=draw.choice((0.0, 0.4)),
                resident=draw.randint(1, 8) * MiB,
                inflight=draw.randint(1, 8) * MiB // (1 + 2 * c),
                transient=draw.randint(0, 4) * MiB,
            )
            for c in range(2)
        )
        return BlockRun(kind, count, options)

    stages = draw.randint(1, 3)
    runs = (run("first", 1), run("layer", draw.randint(2, 4)), run("last", 1))
    return StageProblem(
        runs,
        stages,
        draw.randint(stages, 6),
        draw.randint(25, 120) * MiB,
        draw.choice((0.0, 0.2)),
        tuple(draw.choice((0.0, MiB)) for _ in range(stages)),
    )


@pytest.mark.parametrize("seed", range(60))
def test_agrees_with_enumeration(seed):
    problem = random_problem(seed)
    fitting = [
        counts for counts in every_spread(problem) if max(stage_bytes(problem, counts)) <= problem.capacity + 1e-6
    ]
    answer = solve_stages(problem)
    if not fitting:
        assert answer is None
        return
    best = min(stage_seconds(problem, counts) for counts in fitting)
    assert max(stage_bytes(problem, answer.counts)) <= problem.capacity
    assert answer.status == "optimal"
    assert best <= answer.value * (1 + 1e-9)
    assert answer.value <= best * (1 + 1.2e-4)
    assert answer.bound <= best * (1 + 1e-12)
    assert answer.bound >= best * (1 - 1e-4)
    if problem.stages > 1:
        exact = solve_stages(problem, balance=False)
        assert exact.value == pytest.approx(best, rel=2e-5)


def test_uneven_ends_get_fewer_layers():
    """The last block is three layers' worth: its stage takes three layers fewer."""
    layer = (Option("layer", 1.0, 0.0, MiB, MiB, 0.0),)
    heavy = (Option("last", 3.0, 0.0, MiB, MiB, 0.0),)
    light = (Option("first", 1e-6, 0.0, MiB, MiB, 0.0),)
    problem = StageProblem((BlockRun("f", 1, light), BlockRun("l", 29, layer), BlockRun("e", 1, heavy)), 4, 64, 2**40)
    answer = solve_stages(problem)
    assert [sum(stage[1]) for stage in answer.counts] == [8, 8, 8, 5]


def test_early_stages_recompute_more():
    """Stage 0 holds four micro-batches in flight, stage 3 one."""
    options = (Option("none", 1.0, 0.0, MiB, 4 * MiB, 0.0), Option("full", 1.3, 0.0, MiB, MiB, 0.0))
    problem = StageProblem((BlockRun("l", 16, options),), 4, 8, 40 * MiB)
    answer = solve_stages(problem)
    recomputed = [stage[0][1] for stage in answer.counts]
    assert recomputed[0] > recomputed[-1] == 0
    assert recomputed == sorted(recomputed, reverse=True)


def test_nothing_fits():
    options = (Option("none", 1.0, 0.0, 50 * MiB, MiB, 0.0),)
    assert solve_stages(StageProblem((BlockRun("l", 4, options),), 2, 4, 60 * MiB)) is None
