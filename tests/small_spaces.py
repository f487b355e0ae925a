"""Small random problems, and every plan of their spaces: each configuration that the capability table allows, each
contiguous split over its stages, each recompute choice of each block, under zero 3 whether it stays gathered, priced by
the simulator alone.

What a plan costs does not depend on the memory of its devices, so that one enumeration answers for any."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator
from functools import cache
from math import comb, prod
from typing import Any

from tiny_models import chain

from autopar.cluster import Cluster
from autopar.graph.ir import ModelGraph
from autopar.job import Job
from autopar.schedule import SCHEDULES
from autopar.solver.candidates import BlockCost
from autopar.solver.context import Context
from autopar.solver.decision_costs import boundary_bytes
from autopar.solver.decisions import whole_decisions
from autopar.solver.evaluate import assess
from autopar.solver.fix import parse_fix
from autopar.solver.groups import root_blocks
from autopar.solver.prices import AxisPrices
from autopar.solver.recompute import choices
from autopar.solver.space import Config, configs

MOST = 300
"""Plans that a problem may have; of a larger one more is fixed."""
AMPLE = 2**40
"""Bytes."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """A problem without its memory."""

    seed: int
    model: ModelGraph
    job: Job
    cluster: Cluster
    fix: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Priced:
    """One plan of the space: seconds, bytes of its fullest rank and of its fullest host, what it is, and seconds that a
    device computes."""

    seconds: float
    nbytes: int
    config: Config
    told: str
    host: int = 0
    computing: float = 0.0


def drawn_cluster(draw: random.Random, shape: str) -> Cluster:
    """Devices and links between a tenth and ten times those of the catalog, and now and then something extreme."""

    def about(figure: float, spread: float = 10.0) -> float:
        return figure * spread ** draw.uniform(-1, 1)

    cluster = Cluster.parse(f"{shape}:h100")
    device, inside, between = cluster.device, cluster.intra_node, cluster.inter_node
    device = dataclasses.replace(
        device,
        # Blocks this small only differ where a device is slow to compute.
        peak_flops={dtype: about(flops / 1e5, 100.0) for dtype, flops in device.peak_flops.items()},
        memory_bandwidth=about(device.memory_bandwidth / 1e2),
        cache_bytes=0,
        cache_bandwidth=0.0,
        launch_s=draw.choice((0.0, about(device.launch_s))),
        collective_s=draw.choice((0.0, about(device.collective_s))),
        memory_bytes=AMPLE,
        reserve_bytes=draw.choice((0, 1000)),
    )
    links = [
        dataclasses.replace(
            link,
            bandwidth=about(link.bandwidth / scale, 100.0),
            latency_s=draw.choice((0.0, about(link.latency_s))),
        )
        for link, scale in ((inside, 1e2), (between, 1e2))
    ]
    group = dataclasses.replace(cluster.groups[0], device=device, intra_node=links[0], inter_node=links[1])
    return Cluster((group,))


def _linked(cluster: Cluster, seed: int) -> Cluster:
    """With links to the host that are now and then as fast as the blocks are small."""
    draw = random.Random(f"host {seed}")
    device = cluster.device
    fast = dataclasses.replace(
        device,
        host_bandwidth=device.memory_bandwidth * 10 ** draw.uniform(-3, 0),
        host_memory_bandwidth=device.memory_bandwidth * 10 ** draw.uniform(-2, 0),
        host_memory_bytes=0,
    )
    return Cluster(tuple(dataclasses.replace(group, device=fast) for group in cluster.groups))


def with_memory(cluster: Cluster, nbytes: int, host: int = 0) -> Cluster:
    """``host``: bytes of the host's memory for each device, 0: enough."""
    device = dataclasses.replace(cluster.device, memory_bytes=nbytes, host_memory_bytes=host)
    return Cluster(tuple(dataclasses.replace(group, device=device) for group in cluster.groups))


@cache
def model_of(widths: tuple[int, ...], hidden: int, vocab: int, tied: bool, frozen: bool) -> ModelGraph:
    return chain(widths, hidden, vocab, tied, frozen)


def drawn(seed: int, offload: bool = False) -> Trial:
    """A problem whose space has at most `MOST` plans: of a larger one more and more is fixed. ``offload``: with a link
    to the host, and nothing fixed of what waits there."""
    draw = random.Random(seed)
    layers = draw.choice((0, 1, 1, 2, 2, 2, 3))
    one, other = draw.choice((16, 64)), draw.choice((16, 32, 128))
    widths = tuple(draw.choice((one, one, other)) for _ in range(layers))
    style = draw.choice(("plain", "plain", "plain", "tied", "frozen"))
    frozen = style == "frozen" and layers > 0
    model = model_of(widths, draw.choice((8, 32)), draw.choice((16, 64, 256)), style == "tied", frozen)
    shape = draw.choice(("1x1", "1x2", "2x1", "1x4", "1x4", "2x2", "2x2"))
    batch, length = draw.choice((4, 4, 8, 8, 12)), draw.choice((8, 32, 100))
    job = Job(batch, length, draw.choice(("bf16", "bf16", "fp32")), draw.choice(("adamw", "sgd")))
    trial = Trial(seed, model, job, drawn_cluster(draw, shape), {"tp": 1, "cp": 1, "offload": "none"})
    if offload:
        trial = dataclasses.replace(trial, cluster=_linked(trial.cluster, seed), fix={"tp": 1, "cp": 1})
    wishes = ({}, {"schedule": draw.choice(list(SCHEDULES))}, {"pp": draw.choice((2, 4))})
    wished = dataclasses.replace(trial, fix={**trial.fix, **draw.choice(wishes)})
    trial = wished if size(wished) else trial
    while size(trial) > (MOST // 2 if offload else MOST):
        config = draw.choice(space(trial))
        key = draw.choice([k for k in ("zero", "micro_batch", "pp", "schedule", "recompute") if k not in trial.fix])
        value = draw.choice(("none", "full")) if key == "recompute" else getattr(config, key)
        trial = dataclasses.replace(trial, fix={**trial.fix, key: value})
    return trial


def space(trial: Trial) -> list[Config]:
    return list(configs(trial.model, trial.job, trial.cluster, parse_fix(trial.fix)))


def size(trial: Trial) -> int:
    """Plans of a problem, or a few less; those apart that differ in what stays gathered alone."""
    context = context_of(trial)
    total = 0
    for config in space(trial):
        splits = comb(len(trial.model.blocks) - 1, config.stages - 1)
        total += splits * prod(len(costs) for costs in block_costs(context, config))
    return total


def context_of(trial: Trial) -> Context:
    return Context.of(trial.model, trial.job, trial.cluster, parse_fix(trial.fix))


def block_costs(context: Context, config: Config) -> list[list[BlockCost]]:
    """What each block may cost: under every recompute choice, those once that come to the same."""
    prices = AxisPrices(context.ops, context.collectives, {}, config.micro_batch)
    whole, fixed = whole_decisions(context.model), context.fix.given().get("recompute")
    layers = any(block.path for block in context.model.blocks)
    halved = SCHEDULES[config.schedule].splits_backward
    found = []
    for block in context.model.blocks:
        repeated = bool(block.path) or not layers
        given = fixed if repeated or fixed is None else "none"
        open_too = repeated and context.fix.offload is None and context.cluster.device.host_bandwidth > 0
        names = choices(given, None if open_too else False, extended=repeated)
        if halved:
            names = tuple(name for name in names if name.startswith("none"))
        key = (block.kind, config.micro_batch, names)
        if key not in context.memo:
            costs = context.costs.of(context.model.kinds[block.kind], whole[block.kind], prices, names)
            once = {(c.forward_s, c.backward_s, c.inflight, c.transient, c.hosted): c for c in reversed(costs.values())}
            context.memo[key] = list(once.values())[::-1]
        found.append(context.memo[key])
    return found


def staying(context: Context, config: Config) -> list[list[BlockCost]]:
    """`block_costs`, under zero 3 also of blocks that stay gathered, where they have a group of their own."""
    roots = root_blocks(context.model, range(len(context.model.blocks)))
    return [
        [*costs, *(dataclasses.replace(cost, gathered=True) for cost in costs)]
        if config.zero == 3 and not root
        else costs
        for costs, root in zip(block_costs(context, config), roots, strict=True)
    ]


def enumerated(trial: Trial) -> Iterator[Priced]:
    """Every plan of the space."""
    context, blocks = context_of(trial), len(trial.model.blocks)
    whole = whole_decisions(trial.model)
    for config in space(trial):
        kinds = trial.model.kinds.values()
        boundary = max(boundary_bytes(kind, whole[kind.name], config.micro_batch, trial.job) for kind in kinds)
        for cuts in itertools.combinations(range(1, blocks), config.stages - 1):
            for way in itertools.product(*staying(context, config)):
                stages = [way[start:stop] for start, stop in itertools.pairwise((0, *cuts, blocks))]
                priced = assess(context, config, stages, boundary)
                choices = [cost.choice + ("/gathered" if cost.gathered else "") for cost in way]
                told = f"{config}, cut at {cuts}, {choices}"
                nbytes, host = max(priced.rank_bytes()), max(priced.host)
                yield Priced(priced.step_time, nbytes, config, told, host, priced.computing_s)
