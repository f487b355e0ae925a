"""What a shape or configuration is likely to take: a guess that says what to look at first, never a bound."""

from __future__ import annotations

from math import log2

from autopar.solver.chain import work_of
from autopar.solver.config_bounds import least_problem, least_stage, shape_bound
from autopar.solver.context import Context
from autopar.solver.evaluate import placed
from autopar.solver.laps import even_borders
from autopar.solver.mixes import mixed
from autopar.solver.reach import reach
from autopar.solver.shardings import Shardings
from autopar.solver.space import Config, Family, Shape
from autopar.solver.stages import StageProblem

BUBBLE = {"zbv": 1 / 3, "dualpipev": 1 / 2}
"""Of the bubble of even stages, what schedules leave that fill it with weight gradients; others leave all of it."""

TENSOR, SEQUENCE = 0.05, 0.03
"""What each doubling of a tensor or context axis is likely to add, before any sharding was looked at."""


def estimate(context: Context, item: Shape | Family | Config, shardings: Shardings, step: int) -> float:
    """Seconds of a step: even stages that wait as even stages do, and pass first forwards and last backwards one by
    one. ``step``: how many bounds of it are known (`search`)."""
    shape = item if isinstance(item, Shape) else item.shape
    outline = shape.outline
    pp, m, stages = outline.pp, outline.micro_batches, outline.pp * shape.vpp
    if step == 0:
        guess = 1 + TENSOR * log2(outline.tp) + SEQUENCE * log2(outline.cp)
        return shape_bound(context, shape) * guess * (1 + _bubble(shape.schedule, pp, shape.vpp, m))
    each = once = 0.0
    if isinstance(item, Config) and step == 6 and pp > 1:
        return _spread(least_problem(context, [item], shardings))
    work = shardings.cheap_bound() if step == 1 else shardings.least_work()
    if isinstance(item, Config) and pp > 1:
        each, first, last = least_stage(context, item, placed(context, item, 0).data)
        once = first + last
    return m * (work + stages * each) / pp * (1 + _bubble(shape.schedule, pp, shape.vpp, m)) + stages * once


def _bubble(schedule: str, pp: int, vpp: int, micro_batches: int) -> float:
    """What ranks wait for even stages, against their work."""
    return BUBBLE.get(schedule, 1.0) * (pp - 1) / (vpp * micro_batches)


def _spread(problem: StageProblem) -> float:
    """The same for an even spread of blocks under options that fit, by the rank with most work."""
    reached = reach(problem) if problem.vpp == 1 else None
    if problem.vpp == 1 and reached is None:
        return float("inf")
    counts = mixed(problem, reached.borders if reached else even_borders(problem))
    if counts is None:
        return float("inf")
    stages = [
        sum(
            n * work_of(option)
            for run, some in zip(problem.runs, stage, strict=True)
            for n, option in zip(some, run.options, strict=True)
        )
        + problem.stage_s
        for stage in counts
    ]
    slowest = max(sum(stages[stage] for stage in problem.own(rank)) for rank in range(problem.pp))
    waits = BUBBLE.get(problem.schedule, 1.0) * (problem.pp - 1) * sum(stages) / problem.stages
    once = problem.stages * (problem.stage_first_s + problem.stage_last_s)
    return problem.micro_batches * slowest + waits + once
