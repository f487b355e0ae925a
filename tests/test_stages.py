"""The stage ILP against enumeration of every spread."""

import itertools
import random

import pytest

from autopar.solver.stages import BlockRun, Option, StageProblem, rank_bytes, solve_stages, stage_seconds

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
        options = []
        for c in range(2):
            seconds = draw.uniform(1, 4) * (1 + 0.3 * c)
            ahead, weights = draw.uniform(0.2, 0.5) * seconds, draw.uniform(0.1, 0.4) * seconds
            options.append(
                Option(
                    f"{kind}{c}",
                    forward_s=ahead,
                    backward_s=seconds - ahead,
                    resident=draw.randint(1, 8) * MiB,
                    inflight=draw.randint(1, 8) * MiB // (1 + 2 * c),
                    transient=draw.randint(0, 4) * MiB,
                    reduce_s=draw.choice((0.0, 0.4)),
                    optimizer_s=draw.choice((0.0, 0.3)),
                    weight_s=weights,
                    waiting=draw.randint(0, 2) * MiB,
                )
            )
        return BlockRun(kind, count, tuple(options))

    schedule, vpp = draw.choice((("1f1b", 1), ("1f1b", 1), ("gpipe", 1), ("interleaved", 2), ("zbv", 2)))
    ranks = 2 if vpp == 2 else draw.randint(1, 3)
    runs = (run("first", 1), run("layer", draw.randint(2, 4 - (vpp > 1))), run("last", 1))
    return StageProblem(
        runs,
        ranks,
        2 * draw.randint(1, 3) if vpp == 2 else draw.randint(ranks, 6),
        draw.randint(25, 120) * MiB * vpp,
        draw.choice((0.0, 0.2)),
        tuple(draw.choice((0.0, MiB)) for _ in range(ranks * vpp)),
        schedule,
        vpp,
    )


@pytest.mark.parametrize("seed", range(60))
def test_agrees_with_enumeration(seed):
    problem = random_problem(seed)
    fitting = [
        counts for counts in every_spread(problem) if max(rank_bytes(problem, counts)) <= problem.capacity + 1e-6
    ]
    answer = solve_stages(problem)
    if not fitting:
        assert answer is None
        return
    best = min(stage_seconds(problem, counts) for counts in fitting)
    assert max(rank_bytes(problem, answer.counts)) <= problem.capacity
    assert answer.status == "optimal"
    assert best <= answer.value * (1 + 1e-9)
    if problem.vpp == 1:  # else the balance of the ranks decides, not V
        assert answer.value <= best * (1 + 1.2e-4)
    assert answer.bound <= best * (1 + 1e-12)
    assert answer.bound >= best * (1 - 1e-4)
    if problem.stages > 1:
        exact = solve_stages(problem, balance=False)
        assert exact.value == pytest.approx(best, rel=2e-5)


def test_uneven_ends_get_fewer_layers():
    """The last block is three layers' worth: its stage takes three layers fewer."""
    layer = (Option("layer", 0.4, 0.6, MiB, MiB, 0.0),)
    heavy = (Option("last", 1.2, 1.8, MiB, MiB, 0.0),)
    light = (Option("first", 1e-6, 0.0, MiB, MiB, 0.0),)
    problem = StageProblem((BlockRun("f", 1, light), BlockRun("l", 29, layer), BlockRun("e", 1, heavy)), 4, 64, 2**40)
    answer = solve_stages(problem)
    assert [sum(stage[1]) for stage in answer.counts] == [8, 8, 8, 5]


def test_early_stages_recompute_more():
    """Stage 0 holds four micro-batches in flight, stage 3 one."""
    options = (Option("none", 0.3, 0.7, MiB, 4 * MiB, 0.0), Option("full", 0.3, 1.0, MiB, MiB, 0.0))
    problem = StageProblem((BlockRun("l", 16, options),), 4, 8, 40 * MiB)
    answer = solve_stages(problem)
    recomputed = [stage[0][1] for stage in answer.counts]
    assert recomputed[0] > recomputed[-1] == 0
    assert recomputed == sorted(recomputed, reverse=True)


def test_nothing_fits():
    options = (Option("none", 0.3, 0.7, 50 * MiB, MiB, 0.0),)
    assert solve_stages(StageProblem((BlockRun("l", 4, options),), 2, 4, 60 * MiB)) is None


LAYER = (Option("layer", 0.4, 0.6, MiB, MiB, 0.0),)


def test_fixed_boundaries_hold():
    ends = (Option("end", 0.01, 0.02, MiB, MiB, 0.0),)
    runs = (BlockRun("first", 1, ends), BlockRun("layer", 8, LAYER), BlockRun("last", 1, ends))
    for fixed in ((5, 5), (1, 9), (9, 1), (2, 8)):
        answer = solve_stages(StageProblem(runs, 2, 4, 2**40, fixed=fixed))
        assert tuple(sum(map(sum, stage)) for stage in answer.counts) == fixed
    embedding, loss = solve_stages(StageProblem(runs, 3, 4, 2**40, fixed=(1, 8, 1))).counts[::2]
    assert embedding == ((1,), (0,), (0,))
    assert loss == ((0,), (0,), (1,))


def test_a_heavy_loss_gets_a_stage_of_its_own():
    heavy = (Option("last", 3.0, 5.0, MiB, MiB, 0.0),)
    light = (Option("first", 1e-6, 0.0, MiB, MiB, 0.0),)
    runs = (BlockRun("f", 1, light), BlockRun("l", 16, LAYER), BlockRun("e", 1, heavy))
    answer = solve_stages(StageProblem(runs, 3, 32, 2**40))
    assert [sum(stage[1]) for stage in answer.counts] == [8, 8, 0]


@pytest.mark.parametrize(("schedule", "vpp"), [("interleaved", 2), ("interleaved", 4), ("zbv", 2), ("dualpipev", 2)])
def test_ranks_share_the_work_of_their_stages(schedule, vpp):
    answer = solve_stages(StageProblem((BlockRun("layer", 16, LAYER),), 2, 8, 2**40, schedule=schedule, vpp=vpp))
    problem = StageProblem((BlockRun("layer", 16, LAYER),), 2, 8, 2**40, schedule=schedule, vpp=vpp)
    shares = [sum(answer.counts[stage][0][0] for stage in problem.own(rank)) for rank in range(2)]
    assert shares == [8, 8]


def test_capacity_is_a_ranks_not_a_stages():
    """Two ranks of two stages; what fits is judged over both stages of a rank, at the worst moment."""
    runs = (BlockRun("layer", 8, LAYER),)
    roomy = StageProblem(runs, 2, 4, 2**40, schedule="interleaved", vpp=2)
    need = max(rank_bytes(roomy, solve_stages(roomy).counts))
    fits = StageProblem(runs, 2, 4, need, schedule="interleaved", vpp=2)
    assert max(rank_bytes(fits, solve_stages(fits).counts)) <= need
    assert solve_stages(StageProblem(runs, 2, 4, 4 * MiB + 3, schedule="interleaved", vpp=2)) is None
