"""What each of several stages takes at least beside its blocks, and the step beside its stages: network seconds that
nothing hides (`data_axis`).

Stage j of S has none but the blocks j to N - S + j of the chain, so that the least of any of these counts. If blocks
count with their own seconds, a stage also waits in each forward for its first gather, in each backward, under ZeRO 3,
for that of its last block (not the root group, which is still there), and for the reduction of its first block. If they
count with what the network takes for them, it also computes the last block of a forward and, before anything is
reduced, the last of a backward, under which the gather of one other block may be hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from autopar.solver.chain import Floats, least_of_stages
from autopar.solver.context import Context
from autopar.solver.data_axis import DataAxis
from autopar.solver.elements import blocks_held
from autopar.solver.groups import root_blocks
from autopar.solver.room import most_gathered
from autopar.solver.space import Config


class Beside(NamedTuple):
    """Seconds of every stage: in each forward, in each backward, more in its first forward and its last backward."""

    ahead: Floats
    back: Floats
    first: Floats
    last: Floats


class Besides(NamedTuple):
    """`Beside` of several configurations, if blocks count with their own seconds: [configuration, part, stage]. Which
    of them reduce after the last backward only (``defers``), and the longest gather of a backward (``hidden``)."""

    own: Floats
    defers: NDArray[np.bool_]
    hidden: Floats

    def least(self, ahead: Floats | None = None, back: Floats | None = None) -> Floats:
        """`Beside` of any. ``ahead``, ``back``: where forwards, backwards of blocks count with what the network takes,
        the least seconds that each block itself takes, as `least_of_stages`."""
        least: Floats = self.own.min(axis=0)
        if ahead is not None:
            least[0] = ahead
        if back is not None:
            hidden = np.maximum(back - self.hidden[:, None], 0.0)
            least[1] = np.where(self.defers[:, None], self.own[:, 1], hidden).min(axis=0)
            least[3] = np.where(self.defers[:, None], self.own[:, 3], 0.0).min(axis=0)
        return least


def least_beside(context: Context, config: Config, data: DataAxis) -> Beside:
    """Of one configuration, if blocks count with their own seconds."""
    return Beside(*least_besides(context, [(config, data)]).own[0])


def least_besides(context: Context, pairs: Sequence[tuple[Config, DataAxis]]) -> Besides:
    """Of configurations that have as many stages and tensor ranks."""
    first = pairs[0][0]
    if first.pp == 1:
        return Besides(np.zeros((1, 4, first.stages)), np.ones(1, dtype=bool), np.zeros(1))
    # All that a stage has may stay gathered.
    keys = tuple((data.gathers_each and not most_gathered(context, one), of_ranks(data)) for one, data in pairs)
    key = ("beside", first.tp, first.stages, keys)
    if key not in context.memo:
        found = [_beside(context, one, data, again) for (one, data), (again, _) in zip(pairs, keys, strict=True)]
        context.memo[key] = Besides(
            np.array([beside for beside, _ in found]),
            np.array([data.defers for _, data in pairs]),
            np.array([hidden for _, hidden in found]),
        )
    return cast(Besides, context.memo[key])


def of_ranks(data: DataAxis) -> tuple[object, ...]:
    """All that network seconds depend on, but for elements."""
    experts = data.experts.spans if data.experts else ()
    return data.zero, data.fsdp, data.spans, experts, data.micro_batches > 1, data.halves, data.offload


def _beside(context: Context, config: Config, data: DataAxis, each_time: bool) -> tuple[Beside, float]:
    """With blocks' own seconds; and the longest gather of a backward. ``each_time``: if each micro-batch surely gathers
    anew."""
    none = np.zeros(config.stages)
    gathers, scatters, replicates = _network(context, config, data)
    gather, scatter, replicate = (least_of_stages(values, config.stages) for values in (gathers, scatters, replicates))
    hidden = float(gathers.max()) if data.gathers_each else 0.0
    each = gather if each_time else none
    once = none if each_time or data.ahead else gather
    if data.exposes or data.drains:  # what is reduced after the last backward counts with the blocks, or has no waiter
        return Beside(each, none, once, none), hidden
    if data.defers:
        return Beside(each, none, once, scatter + replicate), hidden
    again = np.where(_own_groups(context, config), gather, 0.0) if each_time else none
    return Beside(each, again + scatter, once, replicate), hidden


def least_ends(context: Context, config: Config, data: DataAxis) -> float:
    """Seconds of a step of several stages before the first forward and after the last backward: the gather of the
    first block of all, and the least reduction of any, where only the step's end waits for reductions."""
    if config.pp == 1:
        return 0.0
    key = ("ends", config.tp, of_ranks(data))
    if key not in context.memo:
        held = blocks_held(context, config)
        start = data.of("gather_s", held[0][0], held[0][2]) if data.ahead else 0.0
        reduced = (data.of("reduce_s", trained, expert) for _, trained, expert in set(held))
        context.memo[key] = start + (min(reduced) if data.drains else 0.0)
    return float(context.memo[key])


def _network(context: Context, config: Config, data: DataAxis) -> tuple[Floats, Floats, Floats]:
    """Seconds of each block's gather, and of its reduction in a shard group and across replicas."""
    blocks = blocks_held(context, config)
    of = {
        block: (
            data.of("gather_s", block[0], block[2]),
            data.of("scatter_s", block[1], block[2]),
            data.of("replicate_s", block[1], block[2]),
        )
        for block in set(blocks)
    }
    gathers, scatters, replicates = np.array([of[block] for block in blocks]).T
    return gathers, scatters, replicates


def _own_groups(context: Context, config: Config) -> Floats:
    """Whether surely no block of a stage is in a root group, and all have a backward."""
    key = ("own groups", config.stages)
    if key not in context.memo:
        blocks = context.model.blocks
        own = [
            not root and context.model.kinds[block.kind].passes_gradient
            for block, root in zip(blocks, root_blocks(context.model, range(len(blocks))), strict=True)
        ]
        context.memo[key] = least_of_stages(np.array(own, dtype=float), config.stages) > 0.0
    return np.asarray(context.memo[key])
