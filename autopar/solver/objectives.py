"""The search for other objectives than the step time of the whole cluster: branch and bound over parts of the cluster.

Each part (`cluster_sizes.parts`) has a proved lower bound on its step time, and so on its device-seconds; a part whose
bound cannot beat the best plan found is never searched. The others are, the most promising first, each by the whole
search (`autopar.solver.search`): for the shortest step, which on a given number of devices is best for every objective
but energy, whose search counts seconds in which devices wait for less (`computing`).

* Throughput and cost are those of the least device-seconds n T, energy is that of the least at full power. Of parts
  whose bounds are within the gap of each other the larger is searched first; of equal plans the one with the shorter
  step is kept.
* The fewest devices: parts whose bound is above the limit are out. How far plans lay above their bounds so far tells
  which is likely the first to reach the limit; what is smaller than a part that does is then refuted or
  found, the most promising first.

At most `SEARCHES` parts are searched, and none after a Ctrl-C. What is left unsearched counts with its bound, so that
bound, gap and status say what is known of all parts. A part on which the search finds nothing that fits counts as one
where nothing fits.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import floor, inf, log, log1p, nextafter
from typing import Any

from autopar.cluster import Cluster
from autopar.errors import InfeasibleError
from autopar.graph.ir import ModelGraph
from autopar.job import Job
from autopar.objective import Objective, ObjectiveValue
from autopar.plan import Plan
from autopar.sharding.data_parallel import check_data_parallel
from autopar.solver.check_space import check_space
from autopar.solver.cluster_sizes import LAST, Size, SizeBounds, parts
from autopar.solver.evaluate import full_power_s
from autopar.solver.fix import Fix, parse_fix
from autopar.solver.limits import GAP, INTERRUPTED, OPTIMAL, Limits
from autopar.solver.search import search
from autopar.solver.space import configs

SEARCHES = 24
"""The most parts that are searched."""

SAME = 1e-9
"""Values closer than this, relatively, are equal."""


def search_parts(
    model: ModelGraph,
    job: Job,
    cluster: Cluster,
    objective: Objective,
    fix: Fix | Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    searches: int = SEARCHES,
    equal_blocks: bool = True,
) -> Plan:
    """The plan that serves the objective best, on the part of the cluster on which it does; `Plan.objective` says what
    it reaches. ``limits``, ``equal_blocks``: of each part's search; ``searches``: the most parts to search.

    Deterministic. Raises as `autopar.solver.search.search` does, BadInputError where a price or the power of the device
    is missing, and InfeasibleError where no part reaches the step time that "devices" asks for (with the shortest one
    found).
    """
    begin = time.perf_counter()
    objective.check(cluster)
    fixed = parse_fix(fix)
    if objective.kind == "step_time":
        return search(model, job, cluster, fixed, limits, equal_blocks=equal_blocks)
    bounds = SizeBounds(model, job, cluster, fixed, equal_blocks, objective.waiting(cluster))
    there = next((part for part in parts(cluster) if _has_mesh(model, job, part, fixed)), None)
    if there is None:
        return search(model, job, cluster, fixed, limits, equal_blocks=equal_blocks)  # raises, saying why
    fixed.check(there.devices, [block.kind for block in model.blocks])
    check_space(model, job, there, fixed)
    check_data_parallel(model, fixed.micro_batch is not None)
    sizes = [size for part in parts(cluster) if (size := bounds.size(part)) is not None]
    parted = PartSearch(bounds, sizes, limits, searches)
    if objective.kind == "devices":
        plan, value, bound = _fewest(parted, objective, cluster)
    else:
        found = parted.least(lambda size: size.devices)
        if found is None:
            return search(model, job, cluster, fixed, limits, equal_blocks=equal_blocks)  # raises, saying why
        plan, least = found
        value, bound = (objective.value(s, job, cluster) for s in (plan.cluster.devices * parted.sought(plan), least))
    low, high = sorted((value, bound))
    gap = (high - low) / low
    reached = ObjectiveValue(objective, value, bound, gap, "optimal" if gap <= OPTIMAL else "feasible", cluster.devices)
    counts = {"cluster sizes": len(sizes), "cluster sizes searched": len(parted.plans)}
    seconds = {"all cluster sizes": round(time.perf_counter() - begin, 4)}
    return replace(plan, objective=reached, searched={**plan.searched, **counts}, seconds={**plan.seconds, **seconds})


class PartSearch:
    """Searches of parts, each made once. ``plans``: what they found, by number of devices; None where nothing fits."""

    def __init__(self, bounds: SizeBounds, sizes: list[Size], limits: Limits | None, searches: int) -> None:
        self.sizes, self.plans = sizes, dict[int, Plan | None]()
        self._bounds, self._limits, self._searches = bounds, limits, searches
        self._waiting = bounds.context.waiting
        self.interrupted = False

    def sought(self, plan: Plan) -> float:
        """Seconds of a step that count: all, or those at full power (`computing`)."""
        return full_power_s(self._waiting, _seconds(plan), plan.predicted.computing_s)

    def within(self, size: Size, limit: float) -> bool:
        """Whether the part's bound leaves a step of ``limit`` seconds possible."""
        while size.level < LAST and size.bound <= limit:
            self._bounds.refine(size, nextafter(limit, inf))
        return size.bound <= limit

    def rules_out(self, size: Size, seconds: float) -> bool:
        """Whether the sharpest bounds show that every plan of the part takes ``seconds`` or more."""
        return size.devices not in self.plans and self._bounds.rules_out(size, seconds)

    def spent(self, size: Size) -> bool:
        """Whether the part may not be searched any more."""
        return size.devices not in self.plans and (self.interrupted or len(self.plans) >= self._searches)

    def plan(self, size: Size) -> Plan | None:
        """The fastest plan of the part; its bound becomes the part's."""
        if size.devices not in self.plans:
            context = self._bounds.context
            try:
                found = search(
                    context.model,
                    context.job,
                    size.cluster,
                    context.fix,
                    self._limits,
                    explained=False,
                    equal_blocks=context.equal_blocks,
                    waiting=self._waiting,
                )
                size.bound = max(size.bound, found.bound)
                self.interrupted = INTERRUPTED in found.searched
            except InfeasibleError:
                found, size.bound = None, inf
            self.plans[size.devices] = found
        return self.plans[size.devices]

    def least(self, weight: Callable[[Size], float]) -> tuple[Plan, float] | None:
        """The plan with the least weight times `sought`, and a bound on that over all parts; None if nothing fits."""
        best: Plan | None = None
        least = inf
        queue = [(_rank(weight(size) * size.bound), -size.devices, at) for at, size in enumerate(self.sizes)]
        heapq.heapify(queue)
        while queue:
            _, _, at = heapq.heappop(queue)
            size = self.sizes[at]
            if size.bound == inf or weight(size) * size.bound * (1 + GAP) >= least:
                continue
            if size.level < LAST:
                self._bounds.refine(size, least / (1 + GAP) / weight(size))
                if size.bound < inf:
                    heapq.heappush(queue, (_rank(weight(size) * size.bound), -size.devices, at))
                continue
            if best is not None and self.rules_out(size, least / (1 + GAP) / weight(size)):
                continue
            # Without any plan there is nothing to return: the limit waits for the first.
            waits = best is not None or self.interrupted
            found = None if waits and self.spent(size) else self.plan(size)
            if found is None:
                continue
            worth = weight(size) * self.sought(found)
            same = best is not None and abs(worth - least) <= SAME * least and _seconds(found) < _seconds(best)
            if worth < least * (1 - SAME) or same:
                best, least = found, worth
        if best is None:
            return None
        return best, min(least, min(weight(size) * size.bound for size in self.sizes))


def _fewest(parted: PartSearch, objective: Objective, cluster: Cluster) -> tuple[Plan, float, float]:
    """The plan on the fewest devices within the limit; their number, and a bound on it."""
    limit = objective.within_s
    assert limit is not None
    best: Plan | None = None
    above = 1.0
    # Nothing on these can be within the limit but what is still to be searched.
    left = [size for size in parted.sizes if parted.within(size, limit)]
    unknown: list[int] = []
    while left and not parted.spent(left[0]):
        if best is None:
            likely = (size for size in left if size.bound * above <= limit)
            size = next(likely, None) or min(left, key=lambda size: size.bound)
        else:
            size = min(left, key=lambda size: size.bound)
        left.remove(size)
        if parted.rules_out(size, nextafter(limit, inf)):
            continue
        estimate = size.bound
        found = parted.plan(size)
        if found is None:
            continue
        if _seconds(found) <= limit:
            best = found
            left = [other for other in left if other.devices < size.devices]
            continue
        above = max(above, _seconds(found) / estimate)
        if size.bound <= limit:
            unknown.append(size.devices)
    if best is None:
        fastest = parted.least(lambda size: 1.0)
        if fastest is None or _seconds(fastest[0]) > limit:
            raise InfeasibleError(_unreached(parted, cluster, limit, fastest))
        best = fastest[0]
    devices = best.cluster.devices
    return best, float(devices), float(min([devices, *unknown, *(size.devices for size in left)]))


def _unreached(parted: PartSearch, cluster: Cluster, limit: float, fastest: tuple[Plan, float] | None) -> str:
    """What is said where no part reaches the limit."""
    name = cluster.device.name
    if fastest is None:
        return f"nothing fits on {cluster} or fewer of its devices ({name}); add devices, or devices with more memory"
    plan, bound = fastest
    return (
        f"no number of devices up to {cluster} was found to make a step within {limit:g} s: the shortest found takes "
        f"{_seconds(plan):.4g} s, on {plan.cluster}, and none takes less than {bound:.4g} s; allow more seconds, or "
        "give a larger or faster cluster"
    )


def _has_mesh(model: ModelGraph, job: Job, cluster: Cluster, fix: Fix) -> bool:
    return any(True for _ in configs(model, job, cluster, fix))


def _rank(bound: float) -> float:
    """Bounds in steps of the gap, so that of about equal ones something else decides."""
    return floor(log(bound) / log1p(GAP)) if 0 < bound < inf else bound


def _seconds(plan: Plan) -> float:
    return plan.predicted.step_time
