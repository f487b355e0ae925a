"""Why nothing fits: which stage of the configuration that comes closest, what is short there, by how many bytes, what
of the fix cannot hold together, and the nearest thing that fits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from heapq import nsmallest
from math import sqrt
from typing import Any, cast

from autopar.cluster import Cluster
from autopar.graph.ir import ModelGraph
from autopar.job import Job
from autopar.mesh import AXES
from autopar.solver.answers import Answered
from autopar.solver.context import Context
from autopar.solver.equal_blocks import together
from autopar.solver.evaluate import Assessment, assess, host_shortage
from autopar.solver.fix import Fix
from autopar.solver.shardings import KnownShardings
from autopar.solver.space import Config, configs
from autopar.solver.spread import best_stages, spread, stage_problem
from autopar.solver.stages import rank_bytes, solve_stages

GIB = 2**30
UNLIMITED = 2.0**50
TRIES = 6
"""Configurations looked at to find the closest, those with the smallest micro-batches and most sharding first."""


def explain(context: Context) -> str:
    """The message of an `InfeasibleError`."""
    closest = least_memory(context)
    if closest is None:
        return f"{context.model.name} cannot be spread over {context.cluster}: no configuration places every block"
    fixed = ", ".join(f"{key}={value}" for key, value in context.fix.given().items())
    told = f"{context.model.name} does not fit on {context.cluster}" + (f" with {fixed}" if fixed else "")
    room, short = context.cluster.device.memory_bytes, host_shortage(context, closest)
    needed = closest.rank_bytes()
    if short and max(needed) <= room:
        return (
            f"{told}: a pipeline rank keeps {max(closest.host):,} bytes on the host, {short:,} bytes "
            f"({short / GIB:.2f} GiB) more than the {context.cluster.device.host_memory_bytes:,} that each device has "
            f"of its node's memory (host_memory_bytes), in the closest plan ({closest.config}). {_way_out(context)}"
        )
    worst = max(range(len(needed)), key=lambda rank: needed[rank])
    own = [stage for stage in range(len(closest.memory)) if closest.rank_of(stage) == worst]
    by_kind = {kind: sum(closest.memory[stage][kind] for stage in own) for kind in closest.memory[own[0]]}
    kinds = sorted(by_kind.items(), key=lambda item: -item[1])
    bytes_told = ", ".join(f"{name} {size / GIB:.2f}" for name, size in kinds if size)
    where = f"stage {own[0]}" if len(own) == 1 else f"rank {worst}, with stages {', '.join(map(str, own))},"
    return (
        f"{told}: {where} of {len(closest.memory)} needs {needed[worst]:,} bytes per device, "
        f"{needed[worst] - room:,} bytes ({(needed[worst] - room) / GIB:.2f} GiB) more than the {room:,} it has, "
        f"in the closest plan ({closest.config}); GiB by kind: {bytes_told}. "
        f"{_conflict_text(context)}{_way_out(context)}"
    )


def least_memory(context: Context) -> Assessment | None:
    """The stages that were found to need least memory, whether they fit or not; None if blocks cannot be placed."""
    if "least memory" not in context.memo:
        space = _space(context.model, context.job, context.cluster, context.fix)
        known = KnownShardings(context)
        found = (one for config in _leanest(space) for one in _least_memory(context, config, known))
        context.memo["least memory"] = min(found, key=lambda one: max(one.rank_bytes()), default=None)
    return cast(Assessment | None, context.memo["least memory"])


def _space(model: ModelGraph, job: Job, cluster: Cluster, fix: Fix) -> Iterator[Config]:
    """The configurations under one order of the mesh axes each: memory is the same under all."""
    return (one for one in configs(model, job, cluster, fix) if fix.order or one.order == AXES)


def _leanest(space: Iterable[Config], tries: int = TRIES) -> list[Config]:
    return nsmallest(tries, space, key=lambda c: (c.vpp, c.micro_batch, -c.zero, -c.fsdp, -c.pp * c.tp, c))


def _answers(context: Context, config: Config, known: KnownShardings) -> list[list[Answered]]:
    shardings = known.of(config.sharding)
    return list(together(context, [shardings.fastest(), *shardings.lean()]))


def _least_memory(context: Context, config: Config, known: KnownShardings) -> Iterator[Assessment]:
    """Stages that use the least memory, whatever the room."""
    context = context.sharing(config.ep)
    for answers in _answers(context, config, known):
        problem, costs_of = stage_problem(context, config, answers, extended=True)
        boundary = max(answer.boundary for answer in answers)
        problem = replace(problem, host_room=float("inf"))
        found = solve_stages(replace(problem, capacity=UNLIMITED), balance=False)
        if found is None:
            continue
        high = max(rank_bytes(problem, found.counts))
        low = high / 64
        while high > 1.02 * low:
            room = sqrt(low * high)
            answer = solve_stages(replace(problem, capacity=room), balance=False, work_limit=1.0)
            if answer is None:
                low = room
            else:
                found, high = answer, min(room, max(rank_bytes(problem, answer.counts)))
        yield assess(context, config, spread(found.counts, costs_of), boundary)


def _way_out(context: Context) -> str:
    """The nearest thing that fits."""
    fix = context.fix
    for loosened, told in _looser(fix):
        config = _fits(context, loosened, context.cluster)
        if config is not None:
            return f"It would fit with {told or config} ({config})."
    for factor in (2, 4, 8, 16, 64):
        cluster = Cluster(tuple(replace(group, nodes=group.nodes * factor) for group in context.cluster.groups))
        config = _fits(context, Fix(), cluster, tries=2)
        if config is not None:
            return f"The smallest cluster of these nodes found to fit is {cluster} ({config})."
    return "No number of these devices tried (up to 64 times as many) fits it."


FREED: dict[str, dict[str, Any]] = {
    "offload": {"offload": None},
    "recompute": {"recompute": ()},
    "micro_batch": {"micro_batch": None},
    "reshard": {"reshard": ()},
    "zero": {"zero": None, "fsdp": None, "reshard": ()},
    "sp": {"sp": None},
    "schedule": {"schedule": None, "vpp": None},
    "order": {"order": ()},
    "ep": {"ep": None},
    "cp": {"cp": None},
    "tp": {"tp": None, "tp_parts": ()},
    "dp": {"dp": None},
    "pp": {"pp": None, "schedule": None, "vpp": None},
}
"""What is no longer fixed where a key is let go."""


def _freed(fix: Fix) -> list[str]:
    """The keys that can be let go."""
    given = fix.given()
    return [key for key in FREED if key in given or (key == "zero" and "fsdp" in given)]


def _looser(fix: Fix) -> Iterator[tuple[Fix, str]]:
    """The fix with one thing less fixed, then with all of them."""
    given, keys = fix.given(), _freed(fix)
    if not keys:
        return
    for key in keys:
        yield replace(fix, **FREED[key]), f"{key} not fixed to {given.get(key, given.get('fsdp'))}"
    together = {name: value for key in keys for name, value in FREED[key].items()}
    yield replace(fix, **together), "nothing of this fixed"


def conflict(context: Context) -> Fix:
    """Of what is fixed, as much as cannot hold together in this memory: nothing of it can be left out. Keys are let go
    one after the other; one without which it still does not fit has no part in it."""
    left = context.fix
    for key in _freed(left):
        without = replace(left, **FREED[key])
        if _fits(context, without, context.cluster) is None:
            left = without
    return left


def _conflict_text(context: Context) -> str:
    if len(_freed(context.fix)) < 2:
        return ""
    left = conflict(context).given()
    room = f"{context.cluster.device.memory_bytes:,} bytes a device"
    if not left:
        return f"Nothing of what is fixed is to blame: {room} are too few. "
    return f"These cannot hold together with {room}: {', '.join(f'{k}={v}' for k, v in left.items())}. "


def _any_fits(context: Context, config: Config, known: KnownShardings) -> bool:
    return any(best_stages(context, config, some, extended=True) for some in _answers(context, config, known))


def _fits(context: Context, fix: Fix, cluster: Cluster, tries: int = TRIES) -> Config | None:
    """A configuration that fits, among those that take least memory."""
    key = ("fits", fix, str(cluster), tries)  # what is in conflict and what would fit ask alike
    if key not in context.memo:
        other = Context.of(context.source or context.model, context.job, cluster, fix, context.equal_blocks)
        known = KnownShardings(other)
        fitting = (
            config
            for config in _leanest(_space(other.source or other.model, context.job, cluster, fix), tries)
            if _any_fits(other.sharing(config.ep), config, known)
        )
        context.memo[key] = next(fitting, None)
    return cast(Config | None, context.memo[key])
