"""Equal blocks decide equally: which shardings the blocks of one plan may have, and what it costs that they agree.

Blocks of one kind are equal. With the option on (the default) they share one sharding: every operator's strategy, every
layout, every conversion. What else is decided of a block is not the model's structure but its stage's memory, and stays
free: whether it is recomputed, what it then keeps, and whether that waits on the host. So a plan has one class of code
for each kind of block. With the option off, blocks of a kind may be sharded in several ways, as long as the layouts of
what they hand on, and of weights they share, agree.

Its price is reported in two figures:

* what the plan's own configuration would take if its blocks were free, found by pricing it so: different shardings of
  one kind pay only where memory forces some blocks away from the fastest one;
* how much faster any plan with free blocks can be: down to the plan's bound. It holds for them as it is, since no bound
  asks that blocks agree: `shardings.Shardings.least_seconds` and ``least_kept`` are of each block alone, whatever its
  decision; the bounds of all blocks together, `Shardings.bound`, are of layouts between blocks that free blocks share
  as well, under which no block is faster than under its kind's best decision.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from autopar.solver.answers import Answered
from autopar.solver.context import Context
from autopar.solver.evaluate import Assessment
from autopar.solver.polish import polished
from autopar.solver.shardings import Shardings
from autopar.solver.spread import best_stages, compatible

MOST = 16
"""Ways to choose a sharding for each kind of several blocks that are priced; beyond, kinds choose together."""


def together(context: Context, answers: Sequence[Answered]) -> Iterator[list[Answered]]:
    """Answers that the blocks of one plan may be made of together, in all ways, the first answer's first."""
    for group in compatible(answers):
        if context.equal_blocks:
            yield from _equal(context, group)
        else:
            yield group


def _equal(context: Context, group: list[Answered]) -> Iterator[list[Answered]]:
    """One answer for all blocks of each kind. A kind of one block is equal to itself whatever it does."""
    ways = {
        kind: [answer for place, answer in enumerate(group) if _is_new(kind, answer, group[:place])]
        for kind, blocks in Counter(block.kind for block in context.model.blocks).items()
        if blocks > 1
    }
    picks = list(product(*ways.values()))
    if len(picks) > MOST:
        picks = [(answer,) * len(ways) for answer in group]
    for pick in picks:
        shared = {kind: answer.costs[kind] for kind, answer in zip(ways, pick, strict=True)}
        yield [replace(answer, costs={**answer.costs, **shared}) for answer in group]


def _is_new(kind: str, answer: Answered, before: Sequence[Answered]) -> bool:
    return all(answer.costs[kind] != other.costs[kind] for other in before)


def free_step_time(context: Context, best: Assessment, shardings: Shardings) -> float:
    """Seconds of the configuration of ``best`` if its blocks were free; as many as now where that gains nothing."""
    fastest = shardings.fastest()
    if _at_ease(context, best, fastest):
        return best.step_time
    free = replace(context, equal_blocks=False)
    found = [
        mixed
        for answers in together(free, [fastest, *shardings.lean()])
        if len(answers) > 1 and (mixed := best_stages(free, best.config, answers, extended=True)) is not None
    ]
    if not found:
        return best.step_time
    return min(best.step_time, polished(free, min(found, key=lambda one: one.step_time)).step_time)


def _at_ease(context: Context, best: Assessment, fastest: Answered) -> bool:
    """Whether every block is as fast as the fastest answer lets it be: memory forces nothing."""
    least = {
        kind: min(fastest.costs[kind][name].forward_s + fastest.costs[kind][name].backward_s for name in names)
        for kind, names in context.freedom(True)
    }
    blocks = [cost for stage in best.stages for cost in stage]
    return all(cost.forward_s + cost.backward_s <= least[cost.kind] * (1 + 1e-12) for cost in blocks)
