"""No bound is above the simulated time: thousands of random stage vectors under every schedule, and configurations of
small models with all that they may hold.

Times are heavy-tailed and often zero, so that stages differ by orders of magnitude and ties are common; the other test
of the bounds (`test_simulate`) draws them alike."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from small_spaces import AMPLE, Priced, drawn, enumerated, with_memory

from autopar.schedule import SCHEDULES
from autopar.solver.bounds import pipeline_bound, spread_bound
from autopar.solver.config_bounds import loose_bound, quick_bound, shape_bound, stage_bound
from autopar.solver.context import Context
from autopar.solver.fix import parse_fix
from autopar.solver.room import has_room, state_fits
from autopar.solver.shardings import KnownShardings
from autopar.solver.simulate import StageTimes, simulate
from autopar.solver.space import OPEN, Config, open_configs_of

EACH = 600
"""Pipelines of each schedule."""
ROUNDING = 1 + 1e-11


def seconds(draw: random.Random) -> float:
    """Nothing, a tie, or something between a nanosecond and hours."""
    style = draw.random()
    if style < 0.15:
        return 0.0
    return draw.choice((1.0, 2.0)) if style < 0.3 else draw.lognormvariate(0.0, draw.choice((0.3, 1.0, 3.0)))


def micro_batches(draw: random.Random, schedule: str, ranks: int) -> int:
    """As few as the schedule allows, a few more, or many."""
    more = draw.choice((0, 0, 1, draw.randint(0, 9), draw.randint(10, 40)))
    if schedule == "interleaved":  # equal rounds
        count = draw.choice((draw.randint(1, 2 * ranks), ranks * draw.randint(1, 3)))
        return next(m for m in itertools.count(count) if m % max(1, m // ranks) == 0)
    return {"1f1b": ranks, "dualpipev": 2 * ranks}.get(schedule, 1) + more


def pipeline(draw: random.Random, schedule: str) -> tuple[list[StageTimes], int, float, int]:
    """Stages, micro-batches, seconds of one transfer, stages a rank."""
    fixed = SCHEDULES[schedule].stages
    ranks = draw.randint(1 if fixed == 1 else 2, 8)
    vpp = fixed if fixed is not None else draw.randint(2, 4)
    even = draw.random() < 0.2
    stages = []
    for _ in range(ranks * vpp):
        ahead, back = seconds(draw), seconds(draw)
        weights = draw.choice((0.0, 1.0, draw.random())) * back
        first, last, after = (draw.choice((0.0, 0.0, seconds(draw))) for _ in range(3))
        stages.append(StageTimes(ahead, back, weights, first, last, after))
    stages = stages[:1] * len(stages) if even else stages
    return stages, micro_batches(draw, schedule, ranks), draw.choice((0.0, 0.0, seconds(draw))), vpp


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "none"])
def test_no_bound_is_above_the_simulation(schedule: str) -> None:
    draw = random.Random(schedule)
    tight = []
    for case in range(EACH):
        stages, micro, transfer, vpp = pipeline(draw, schedule)
        ranks = len(stages) // vpp
        simulated = simulate(stages, micro, (transfer,) * (len(stages) - 1), schedule, vpp).total
        bound = pipeline_bound(stages, micro, transfer, schedule, vpp)
        assert bound <= simulated * ROUNDING, (case, stages, micro, transfer, vpp)
        work = sum(s.forward_s + s.backward_s for s in stages)
        assert spread_bound(work, ranks, micro, vpp) <= simulated * ROUNDING, (case, stages, micro, transfer, vpp)
        tight.append(bound / simulated if simulated else 1.0)
    # Bounds that were zero would pass all of this.
    assert max(tight) > 0.999
    assert sum(tight) / len(tight) > 0.7


@pytest.mark.parametrize("seed", range(1000, 1030))
def test_no_bound_of_a_configuration_is_above_any_of_its_plans(seed: int) -> None:
    """Of every configuration, with ample memory and with what one of its plans just needs: what fits is not ruled out,
    and none of what fits is faster than a bound."""
    trial, draw = drawn(seed), random.Random(seed)
    plans: dict[Config, list[Priced]] = {}
    for plan in enumerated(trial):
        plans.setdefault(plan.config, []).append(plan)
    for config, some in plans.items():
        for nbytes in (AMPLE, draw.choice(some).nbytes):
            context = Context.of(trial.model, trial.job, with_memory(trial.cluster, nbytes), parse_fix(trial.fix))
            shardings = KnownShardings(context).of(config.sharding)
            best = min(plan.seconds for plan in some if plan.nbytes <= nbytes) * ROUNDING
            shape = config.shape
            assert has_room(context, shape.outline)
            assert state_fits(context, config)
            assert 0 < shardings.unconverted_work() <= shardings.least_work() * (1 + 1e-6)
            for work in (None, shardings.unconverted_work(), shardings.least_work()):
                assert 0 < shape_bound(context, shape, work) <= best
            space = list(open_configs_of(shape, trial.job, context.cluster, context.fix))
            assert loose_bound(context, space, shardings) <= best
            left_open = replace(config, order=OPEN)  # stands for the plans under every order
            assert quick_bound(context, left_open, shardings.bound()) <= best
            assert stage_bound(context, left_open, shardings, sharp=True) <= best
            cheap = quick_bound(context, config, shardings.least_work(), shardings.least_halves())
            close = quick_bound(context, config, shardings.bound(), shardings.least_halves())
            assert 0 < cheap <= close * (1 + 1e-6)
            assert close <= best
            for sharp in (False, True):
                assert stage_bound(context, config, shardings, sharp) <= best
