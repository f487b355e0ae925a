"""Blocks moved across the borders of stages, as long as the simulated step gets shorter.

The stage ILP counts what it must: stages that load their ranks equally are one to it, whatever the order in which
micro-batches meet them. The simulator tells them apart, so the last word about the best plan found is a descent by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, permutations

from autopar.solver.candidates import BlockCost
from autopar.solver.context import Context
from autopar.solver.evaluate import Assessment, assess, within_memory

MOST = 400
"""Spreads that are tried at most."""

Stages = tuple[tuple[BlockCost, ...], ...]


def polished(context: Context, best: Assessment) -> Assessment:
    """``best``, or a spread of the same blocks over the same stages that is faster and fits. A fix of the stages stays.

    Each round tries to give a block of every stage to the next, to the one before, or to another of the same rank: the
    borders between them move by one. The fastest is kept.
    """
    if context.fix.stages or len(best.stages) == 1:
        return best
    tried = 0
    while tried < MOST:
        near = [assess(context, best.config, stages, best.boundary) for stages in _neighbours(best)]
        tried += len(near)
        fastest = min(
            (other for other in near if within_memory(context, other)), key=lambda a: a.step_time, default=best
        )
        if fastest.step_time >= best.step_time * (1 - 1e-9):
            break
        best = fastest
    return best


def _neighbours(best: Assessment) -> Iterator[Stages]:
    """The chain cut anew, with one block less in one stage and one more in another; no stage is left empty."""
    blocks = [block for stage in best.stages for block in stage]
    counts = [len(stage) for stage in best.stages]
    for giver, taker in permutations(range(len(counts)), 2):
        if counts[giver] > 1 and (abs(giver - taker) == 1 or best.rank_of(giver) == best.rank_of(taker)):
            changed = [count - (s == giver) + (s == taker) for s, count in enumerate(counts)]
            ends = list(accumulate(changed))
            yield tuple(tuple(blocks[end - count : end]) for end, count in zip(ends, changed, strict=True))
