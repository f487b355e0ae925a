"""The search for the fastest plan that fits: the whole space explored, the best plan polished, its price checked.

Configurations are found by branch and bound (`explore`). Pricing one in full means: the fastest sharding of every kind
(and leaner ones where memory makes them pay), stages that fit, seconds by the simulator. The stages of the best plan
are then polished by the simulator alone.

The plan's bound is the least of all bounds that stand, so the gap covers the whole space: all configurations, with
every sharding of every block, generated or not.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from autopar.cluster import Cluster
from autopar.errors import InfeasibleError
from autopar.garbage import uncollected
from autopar.graph.ir import ModelGraph
from autopar.job import Job
from autopar.plan import Plan
from autopar.sharding.data_parallel import check_data_parallel
from autopar.solver.check_space import check_space
from autopar.solver.context import Context
from autopar.solver.equal_blocks import free_step_time
from autopar.solver.evaluate import within_memory
from autopar.solver.explore import explore, mesh_of
from autopar.solver.fix import Fix, parse_fix
from autopar.solver.gathering import more_gathered
from autopar.solver.infeasible import explain, least_memory
from autopar.solver.limits import OPTIMAL, Limits, Watch
from autopar.solver.plan_of import plan_of
from autopar.solver.polish import polished
from autopar.solver.reprice import check_price
from autopar.solver.space import shapes


def search(
    model: ModelGraph,
    job: Job,
    cluster: Cluster,
    fix: Fix | Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    explained: bool = True,
    equal_blocks: bool = True,
    waiting: float = 1.0,
) -> Plan:
    """The fastest plan that fits. ``explained``: whether an InfeasibleError is to say why, which takes a while.
    ``equal_blocks``: whether blocks of one kind share one sharding (`equal_blocks`). ``waiting``: below 1, the plan
    that draws the least is sought instead, and its bound is of seconds at full power (`computing`).

    Deterministic, unless ``limits`` give it a time. Ctrl-C ends it with the best plan so far, if there is one. Raises
    BadInputError (a fix or job that contradicts the cluster or model), UnsupportedError (what cannot be executed),
    InfeasibleError (nothing fits: where, what is short, by how much, and what would fit).
    """
    begin = time.perf_counter()
    fixed = parse_fix(fix)
    fixed.check(cluster.devices, [block.kind for block in model.blocks])
    check_space(model, job, cluster, fixed)
    check_data_parallel(model, fixed.micro_batch is not None)
    context = Context.of(model, job, cluster, fixed, equal_blocks, waiting)
    watch = Watch(limits or Limits())
    space = list(shapes(model, job, cluster, fixed))
    with uncollected():
        found = explore(context, space, watch)
    if found.best is None and explained:
        leanest = least_memory(context)  # looked for by memory alone, which takes a while
        found.keep(leanest if leanest is not None and within_memory(context, leanest) else None)
    if found.best is None:
        raise InfeasibleError(explain(context) if explained else f"{model.name} does not fit on {cluster}")
    context = context.sharing(found.best.config.ep)
    best = more_gathered(context, polished(context, found.best))
    free = free_step_time(context, best, found.known.of(best.config.sharding)) if equal_blocks else None
    seconds = dict(context.clock.seconds)
    counts = {
        "meshes": len({mesh_of(shape) for shape in space}),
        "shapes": len(space),
        "priced": len(found.priced),
        **watch.told,
        **context.clock.counts,
    }
    # The bound is of free blocks.
    bound = min(found.bound, best.sought_s, best.step_time if free is None else free)
    plan = plan_of(context, best, bound, OPTIMAL, counts, free)
    later = time.perf_counter()
    check_price(plan, model)
    seconds["reprice"] = time.perf_counter() - later
    seconds["search"] = time.perf_counter() - begin
    plan.seconds.update({name: round(value, 4) for name, value in seconds.items()})
    return plan
