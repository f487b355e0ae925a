"""Blocks moved across the borders of stages, as long as the simulated step gets shorter.

The stage ILP counts what it must: stages that load their ranks equally are one to it, whatever the order in which
micro-batches meet them. The simulator tells them apart, so the last word about the best plan found is a descent by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, permutations

from autopar.solver.candidates import BlockCost
from autopar.solver.context import Context
from autopar.solver.evaluate import Assessment, assess

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
        fastest, beat = best, best.step_time * (1 - 1e-9)
        for stages in _neighbours(best):
            tried += 1
            one = assess(context, best.config, stages, best.boundary, fitting=True, beat=beat)
            if one.step_time < beat:
                fastest, beat = one, one.step_time
        if fastest is best:
            break
        best = fastest
    return best


def _neighbours(best: Assessment) -> Iterator[Stages]:
    """The chain cut anew, with one block less in one stage and one more in another; no stage is left empty. Without
    those whose ranks cannot be done sooner than now."""
    blocks = [block for stage in best.stages for block in stage]
    counts = [len(stage) for stage in best.stages]
    work = [0.0, *accumulate(block.forward_s + block.backward_s for block in blocks)]
    for giver, taker in permutations(range(len(counts)), 2):
        if counts[giver] > 1 and (abs(giver - taker) == 1 or best.rank_of(giver) == best.rank_of(taker)):
            changed = [count - (s == giver) + (s == taker) for s, count in enumerate(counts)]
            ends = list(accumulate(changed))
            rank = best.rank_of(taker)
            own = sum(
                work[end] - work[end - n]
                for s, (end, n) in enumerate(zip(ends, changed, strict=True))
                if best.rank_of(s) == rank
            )
            if best.config.micro_batches * own < best.step_time:
                yield tuple(tuple(blocks[end - count : end]) for end, count in zip(ends, changed, strict=True))
