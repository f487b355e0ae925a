"""The outer search: branch and bound over meshes, micro-batch sizes and ZeRO levels.

A configuration's bound is refined in steps, each valid: (1) every operator at its fastest, conversions free; (2) the
intra-block ILP's proved optimum; then, where it matters, (3) the stage ILP over the least seconds and the least
bytes of every block kind. Configurations are taken in the order of their bounds; one whose bound is not below the
best plan found is never priced. Pricing one in full means: the fastest sharding of every kind (and leaner
ones where memory makes them pay), stages by the stage ILP, seconds by the simulator. The stages of the best plan are
then polished by the simulator alone.

The plan's bound is the least bound of all configurations, so the gap covers the whole space: all of them, with every
sharding of every block, generated or not.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autopar.cluster import Cluster
from autopar.errors import InfeasibleError
from autopar.graph.ir import ModelGraph
from autopar.job import Job
from autopar.plan import Plan
from autopar.sharding.check import check_data_parallel
from autopar.solver.config_bounds import fits_at_best, quick_bound, stage_bound
from autopar.solver.evaluate import Assessment
from autopar.solver.fix import Fix, parse_fix
from autopar.solver.infeasible import explain
from autopar.solver.plan_of import plan_of
from autopar.solver.polish import polished
from autopar.solver.reprice import check_price
from autopar.solver.shardings import Context, Key, Shardings
from autopar.solver.space import Config, check_space, configs
from autopar.solver.spread import best_stages, compatible

GAP = 1e-3
"""A plan this close to the bound is called optimal, and configurations that promise less than this are left alone."""


@dataclass(slots=True)
class Found:
    """The state of a search: the best plan so far and a valid bound for every configuration."""

    best: Assessment | None = None
    bounds: dict[Config, float] = field(default_factory=dict)
    priced: list[Config] = field(default_factory=list)
    shardings: dict[Key, Shardings] = field(default_factory=dict)

    def promising(self, bound: float) -> bool:
        """Whether a configuration of this bound may beat the best plan by more than `GAP`."""
        return self.best is None or bound * (1 + GAP) < self.best.step_time


def search(model: ModelGraph, job: Job, cluster: Cluster, fix: Fix | Mapping[str, Any] | None = None) -> Plan:
    """The fastest plan that fits.

    Deterministic. Raises BadInputError (a fix or job that contradicts the cluster or model), UnsupportedError (what
    cannot be executed), InfeasibleError (nothing fits: where, what is short, by how much, and what would fit).
    """
    begin = time.perf_counter()
    fixed = parse_fix(fix)
    fixed.check(cluster.devices, [block.kind for block in model.blocks])
    check_space(model, job, cluster, fixed)
    check_data_parallel(model)
    context = Context.of(model, job, cluster, fixed)
    space = list(configs(model, job, cluster, fixed))
    found = explore(context, space)
    if found.best is None:
        raise InfeasibleError(explain(context, space))
    bound = prove(context, found)
    best = polished(context, found.best)
    seconds = dict(context.clock.seconds)
    counts = {
        "meshes": len({config.mesh for config in space}),
        "configurations": len(space),
        "priced": len(found.priced),
        **context.clock.counts,
    }
    plan = plan_of(context, best, min(bound, best.step_time), GAP, counts)
    later = time.perf_counter()
    check_price(plan, model)
    seconds["reprice"] = time.perf_counter() - later
    seconds["search"] = time.perf_counter() - begin
    plan.seconds.update({name: round(value, 4) for name, value in seconds.items()})
    return plan


def explore(context: Context, space: list[Config]) -> Found:
    """Branch and bound."""
    found = Found()
    known = found.shardings
    queue: list[tuple[float, int, Config, bool]] = []
    for order, config in enumerate(space):
        key = config.sharding
        shardings = known.setdefault(key, Shardings(context, *key))
        bound = quick_bound(context, config, shardings.cheap_bound())
        found.bounds[config] = bound
        heapq.heappush(queue, (bound, order, config, False))
    while queue:
        bound, order, config, sharp = heapq.heappop(queue)
        if not found.promising(bound):
            break
        shardings = known[config.sharding]
        if not sharp:
            if not fits_at_best(context, config, shardings):
                found.bounds[config] = float("inf")
                continue
            bound = max(bound, quick_bound(context, config, shardings.bound()))
            found.bounds[config] = bound
            heapq.heappush(queue, (bound, order, config, True))
            continue
        price(context, config, shardings, found)
    return found


def price(context: Context, config: Config, shardings: Shardings, found: Found) -> None:
    """Price a configuration in full and keep it if it is the best so far."""
    found.priced.append(config)
    cutoff = found.best.step_time if found.best else float("inf")
    assessed = best_stages(context, config, [shardings.fastest()], cutoff)
    _keep(assessed, found)
    short = assessed is None or any(cost.again_s for stage in assessed.stages for cost in stage)
    if short:
        bound = max(found.bounds[config], stage_bound(context, config, shardings))
        found.bounds[config] = bound
        short = found.promising(bound)
    if short:
        # Memory is short: leaner shardings, and blocks that keep some results and not others.
        more = context.freedom(True) != context.freedom()
        for answers in compatible([shardings.fastest(), *shardings.lean()]):
            if len(answers) == 1 and answers[0] is shardings.fastest() and not more:
                continue
            cutoff = found.best.step_time if found.best else float("inf")
            _keep(best_stages(context, config, answers, cutoff, extended=True), found)


def _keep(assessed: Assessment | None, found: Found) -> None:
    if assessed is not None and (found.best is None or assessed.step_time < found.best.step_time * (1 - 1e-9)):
        found.best = assessed


def prove(context: Context, found: Found) -> float:
    """A bound over the whole space: the configurations whose bounds stand in the way of the gap get a sharper one."""
    assert found.best is not None
    known = found.shardings
    ranked = sorted(found.bounds.items(), key=lambda item: (item[1], item[0]))
    for config, bound in ranked:
        if not found.promising(bound):
            break
        shardings = known[config.sharding]
        for sharp in (False, True):
            if found.promising(bound):
                bound = max(bound, stage_bound(context, config, shardings, sharp))
        found.bounds[config] = bound
    return min(found.best.step_time, min(found.bounds.values()))
