"""Blocks moved across the borders of stages, as long as the simulated step gets shorter.

The stage ILP counts what it must: stages that load their ranks equally are one to it, whatever the order in which
micro-batches meet them. The simulator tells them apart, so the last word about the best plan found is a descent by it.
Which moves it looks at first, the longest path through the schedule (`walk`) says, of all of them at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from autopar.solver.borders import moved, moves
from autopar.solver.candidates import BlockCost
from autopar.solver.chain import Floats
from autopar.solver.context import Context
from autopar.solver.evaluate import Assessment, assess, halves
from autopar.solver.space import Config
from autopar.solver.walk import EACH, LANES, step_lengths

MOST, TOGETHER, IN_VAIN = 400, 8, 64
"""Spreads that are simulated at most; how many before the fastest of them is taken; and after how many that are not
faster no others are."""

Stages = tuple[tuple[BlockCost, ...], ...]


def polished(context: Context, best: Assessment) -> Assessment:
    """``best``, or a spread of the same blocks over the same stages that is faster and fits. A fix of the stages stays.

    Each round tries to give a block of every stage to the next, to the one before, or to another of the same rank: the
    borders between them move by one.
    """
    if context.fix.stages or len(best.stages) == 1:
        return best
    config = best.config
    pairs, tried = moves(config.schedule, config.pp, config.vpp), 0
    blocks = [block for stage in best.stages for block in stage]
    sums = _sums(context, config, blocks)
    while tried < MOST:
        near = moved(np.array(list(accumulate(map(len, best.stages)))), pairs)
        stages_s = np.diff(sums[near], axis=1, prepend=0.0)
        likely = step_lengths(config.schedule, config.pp, config.vpp, config.micro_batches, stages_s)
        near = near[np.argsort(likely, kind="stable")][:IN_VAIN]
        faster = best
        for first in range(0, len(near), TOGETHER):
            some = near[first : first + TOGETHER].tolist()
            for ends in some:
                stages = tuple(tuple(blocks[start:end]) for start, end in pairwise((0, *ends)))
                beat = faster.step_time * (1 - 1e-9)
                one = assess(context, config, stages, best.boundary, fitting=True, beat=beat)
                faster = one if one.step_time < beat else faster
            tried += len(some)
            if faster is not best or tried >= MOST:
                break
        if faster is best:
            break
        best = faster
    return best


def _sums(context: Context, config: Config, blocks: Sequence[BlockCost]) -> Floats:
    """Seconds of all blocks before each, by lane: those of blocks alone."""
    sums = np.zeros((len(blocks) + 1, LANES))
    for place, block in enumerate(blocks, 1):
        weight = halves(context, config, block)[0]
        sums[place, :EACH] = block.forward_s, block.backward_s - weight, weight
    return sums.cumsum(axis=0)
