"""What room stages leave is given to blocks that stay gathered under zero 3: as many as fit, counted exactly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from autopar.solver.answers import Answered
from autopar.solver.candidates import BlockCost
from autopar.solver.context import Context
from autopar.solver.evaluate import Assessment, assess, placed, rank_bytes
from autopar.solver.groups import root_blocks
from autopar.solver.room import most_gathered
from autopar.solver.space import Config

WORTH = 2e-3
"""The least share of a step that blocks that stay gathered have to promise to be weighed against recomputation and so
on; below, only the plan that is found at last has what room it leaves filled."""


def worth_gathering(context: Context, config: Config, answer: Answered) -> float:
    """The share of the step that blocks which stay gathered may spare, if it is worth the search, else 0: each block as
    if alone, as many as memory has room for at most."""
    elements = most_gathered(context, config)
    if not elements or not any(len(context.gathered_of(index)) > 1 for index in range(len(context.model.blocks))):
        return 0.0
    data = placed(context, config, answer.boundary).data
    roots = root_blocks(context.model, range(len(context.model.blocks)))
    work = spared = held = 0.0
    for (kind, root), count in Counter(zip((b.kind for b in context.model.blocks), roots, strict=True)).items():
        cost = answer.costs[kind]["none"]
        work += count * (cost.forward_s + cost.backward_s)
        if not root:
            copies, gather = (data.of(what, cost.elements, cost.expert) for what in ("gather_copy_s", "gather_s"))
            scatter = data.of("scatter_s", cost.trains, cost.expert)
            ahead = max(cost.forward_s + copies, gather) - cost.forward_s
            back = max(cost.backward_s + copies, gather + scatter) - max(cost.backward_s, scatter)
            spared, held = spared + count * (ahead + back), held + count * cost.elements
    share = spared * min(1.0, elements / max(held, 1.0)) / max(work, 1e-30)
    return share if share >= WORTH else 0.0


def more_gathered(context: Context, found: Assessment) -> Assessment:
    """``found``, which fits, with as many more blocks of each rank that stay gathered as fit, by bisection; the last of
    each stage first, since nothing hides the gather of the one whose backward begins. It takes no longer."""
    config, stages = found.config, found.stages
    if config.zero != 3:
        return found
    roots = root_blocks(context.model, range(len(context.model.blocks)))
    open_ = [not root and context.gathered_of(index) == (False, True) for index, root in enumerate(roots)]
    starts = [0, *accumulate(map(len, stages))]
    places: list[list[tuple[int, int]]] = [[] for _ in range(config.pp)]
    for stage, costs in enumerate(stages):
        free = [at for at, cost in enumerate(costs) if open_[starts[stage] + at] and not cost.gathered]
        places[found.rank_of(stage)] += [(stage, at) for at in reversed(free)]
    least, most, room = [0] * config.pp, [len(some) for some in places], context.cluster.device.memory_bytes
    stays = {id(cost): replace(cost, gathered=True) for costs in stages for cost in costs}  # equal stages stay equal

    def changed(counts: Sequence[int]) -> list[list[BlockCost]]:
        """Stages with so many more blocks of each rank."""
        chosen = {place for some, count in zip(places, counts, strict=True) for place in some[:count]}
        return [
            [stays[id(cost)] if (stage, at) in chosen else cost for at, cost in enumerate(costs)]
            for stage, costs in enumerate(stages)
        ]

    while least != most:
        counts = [(low + high + 1) // 2 for low, high in zip(least, most, strict=True)]
        for rank, nbytes in enumerate(rank_bytes(context, config, changed(counts), found.boundary)):
            if nbytes <= room:
                least[rank] = counts[rank]
            else:
                most[rank] = counts[rank] - 1
    if not any(least):
        return found
    more = assess(context, config, changed(least), found.boundary, fitting=True)
    return min(found, more, key=lambda one: one.step_time)
