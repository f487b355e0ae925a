"""What a shape or configuration is likely to take: a guess that says what to look at first, never a bound."""

from __future__ import annotations

from math import log2

import numpy as np

from autopar.solver.beside import least_beside
from autopar.solver.chain import work_of
from autopar.solver.context import Context
from autopar.solver.evaluate import placed
from autopar.solver.least_problem import least_problems
from autopar.solver.mixes import mixed
from autopar.solver.shardings import Shardings
from autopar.solver.space import Config, Family, Shape
from autopar.solver.spread import likely_borders
from autopar.solver.stages import StageProblem, used
from autopar.solver.steps import Step

BUBBLE = {"zbv": 1 / 3, "dualpipev": 1 / 2}
"""Of the bubble of even stages, what schedules leave that fill it with weight gradients; others leave all of it."""

TENSOR, SEQUENCE = 0.05, 0.03
"""What each doubling of a tensor or context axis is likely to add, before any sharding was looked at."""


SHARDED = 0.005
"""What a bound without stages is likely to leave out where blocks are sharded, compared with where they are not."""


def estimate(context: Context, item: Shape | Family | Config, shardings: Shardings, step: Step, bound: float) -> float:
    """Seconds of a step, not below the ``bound`` that is known at this ``step``: even stages that wait as even stages
    do, and pass first forwards and last backwards one by one."""
    return max(bound, _guess(context, item, shardings, step, bound))


def _guess(context: Context, item: Shape | Family | Config, shardings: Shardings, step: Step, bound: float) -> float:
    shape = item if isinstance(item, Shape) else item.shape
    outline = shape.outline
    pp, m = outline.pp, outline.micro_batches
    if step == Step.ARITHMETIC:
        sharded = 1 + TENSOR * log2(outline.tp) + SEQUENCE * log2(outline.cp)
        return bound * sharded * (1 + _bubble(shape.schedule, pp, shape.vpp, m))
    each = once = 0.0
    if isinstance(item, Config) and step == Step.SPREAD and pp > 1:
        return _spread(least_problems(context, [item], shardings)[0])
    if isinstance(item, Config) and step == Step.SPREAD:
        return bound * (1 + SHARDED) if item.mesh.model_axes() else bound
    work = shardings.work(step)
    if isinstance(item, Config) and pp > 1:
        ahead, back, first, last = least_beside(context, item, placed(context, item, 0).data)
        each, once = float((ahead + back).sum()), float((first + last).sum())
    return m * (work + each) / pp * (1 + _bubble(shape.schedule, pp, shape.vpp, m)) + once


def _bubble(schedule: str, pp: int, vpp: int, micro_batches: int) -> float:
    """What ranks wait for even stages, against their work."""
    return BUBBLE.get(schedule, 1.0) * (pp - 1) / (vpp * micro_batches)


def _spread(problem: StageProblem) -> float:
    """The same for an even spread of blocks under options that fit, by the rank with most work."""
    borders = likely_borders(problem)
    counts = mixed(problem, borders) if borders else None
    if counts is None:
        return float("inf")
    ahead, back, first, last = problem.beside_s()
    works = [sum(n * work_of(option) for n, option in used(problem, stage)) for stage in counts]
    stages = np.array(works) + ahead + back
    slowest = max(float(stages[list(problem.own(rank))].sum()) for rank in range(problem.pp))
    waits = BUBBLE.get(problem.schedule, 1.0) * (problem.pp - 1) * float(stages.mean())
    return problem.micro_batches * slowest + waits + float((first + last).sum())
