"""A configuration priced in full: the fastest sharding, leaner ones if memory makes them pay, every order of axes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from autopar.solver.answers import Answered
from autopar.solver.context import Context
from autopar.solver.equal_blocks import together
from autopar.solver.evaluate import Assessment, assess
from autopar.solver.found import INFINITE, Found
from autopar.solver.lap_spread import LapSpreads
from autopar.solver.shardings import Shardings
from autopar.solver.space import Config, in_order
from autopar.solver.spread import best_stages


def price(context: Context, config: Config, shardings: Shardings, found: Found) -> float:
    """Price a configuration in full and keep it if it is the best so far: under the default order of its mesh axes, and
    under each other that at a first look is faster and not far from the best. Returns the seconds of the fastest plan
    found of it; infinite if nothing fits."""
    first, *others = in_order(config, context.cluster)
    bound = found.priced.get(config, 0.0)
    fits, assessed = _price(context, first, shardings, found, bound)
    if assessed is None:  # bytes are the same under all
        return found.best.step_time if fits and found.best else INFINITE
    seconds = assessed.step_time
    for other in others:
        likely = assess(context, other, assessed.stages, assessed.boundary)
        if found.near(min(likely.sought_s, assessed.sought_s)):
            own = best_stages(context, other, [shardings.fastest()], at_once=True)
            likely = min(likely, own or likely, key=lambda look: look.sought_s)
        found.keep(likely)
        seconds = min(seconds, likely.step_time)
        if likely.sought_s < assessed.sought_s * (1 - 1e-9) and found.near(likely.sought_s):
            _price(context, other, shardings, found, bound)
    return seconds


def _price(
    context: Context, config: Config, shardings: Shardings, found: Found, bound: float
) -> tuple[bool, Assessment | None]:
    """The same under one order: whether anything fits, and the fastest that was found."""
    laps = LapSpreads()
    best = best_stages(context, config, [shardings.fastest()], beat=_beat(found), laps=laps)
    found.keep(best)
    if best is not None and not _short(context, best):
        return True, best
    if not found.promising(bound):
        return True, best
    # Memory is short: leaner shardings, and blocks that keep some results and not others.
    fits = best is not None
    more = context.freedom(True) != context.freedom()
    for place, answers in enumerate(together(context, [shardings.fastest(), *shardings.lean()])):
        if not place and len(answers) == 1 and not more:
            continue
        if found.best is not None and context.waiting * _least_step(context, config, answers) >= found.best.sought_s:
            fits = True  # or would not be better
            continue
        # Of several answers the first is sought with the ILP as well: which it is seldom decides what fits.
        leaner = best_stages(context, config, answers, extended=True, thorough=not place, beat=_beat(found), laps=laps)
        found.keep(leaner)
        best = min((one for one in (best, leaner) if one), key=lambda one: one.sought_s, default=None)
    return fits or best is not None, best


def _beat(found: Found) -> float:
    return found.best.sought_s if found.best else INFINITE


def _short(context: Context, best: Assessment) -> bool:
    """Whether memory made blocks run something again: kinds that may do nothing else say nothing of it."""
    always = context.always_again()
    return any(cost.again_s and cost.kind not in always for stage in best.stages for cost in stage)


def _least_step(context: Context, config: Config, answers: Sequence[Answered]) -> float:
    """Seconds that blocks of these answers take at least, if no rank ever waits."""
    work = 0.0
    for (kind, choices), blocks in Counter(context.freedom()).items():
        costs = [answer.costs[kind][choice] for answer in answers for choice in choices]
        work += blocks * min(cost.forward_s + cost.backward_s for cost in costs)
    return config.micro_batches * work / config.pp
