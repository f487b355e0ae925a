"""Parts of a cluster as clusters of their own, and lower bounds on the step time of each that need no search.

A part is some of the nodes, whole, or within one node as many devices as divide it. What a configuration costs does not
depend on how many nodes there are, only on its own ranks, on the devices in a node and on the links; and within a node
all ranks sit on that node, whichever part of it they take. So one `Context`, that of the whole cluster, prices the
configurations of every part, and everything it learns of shardings serves all of them.

The bound of a part is the least of its shapes' bounds (`space.Shape`: sizes of axes and micro-batches, schedule), each
refined in the steps of the search itself, valid by themselves (`steps`), up to `Step.STAGES`.

A shape is refined only while it has the least bound of its part: the others can only be slower. The last step is taken
only to rule a part out, and ends with the first shape that it leaves in.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import inf, prod

from autopar.cluster import Cluster
from autopar.graph.ir import ModelGraph
from autopar.job import Job
from autopar.solver.computing import LeastComputing
from autopar.solver.config_bounds import loose_bound, shape_bound
from autopar.solver.context import Context
from autopar.solver.fix import Fix
from autopar.solver.room import has_room
from autopar.solver.shardings import KnownShardings
from autopar.solver.space import Shape, offloads, open_configs_of, shapes
from autopar.solver.steps import Step

LAST = Step.KINDS
"""The last refinement that every part may take."""


@dataclass(slots=True)
class Size:
    """One part of the cluster. ``bound``: a valid lower bound on its step time, in seconds (for a search that weighs
    waiting, on its seconds at full power: `computing`), refined to ``level``;
    ``queue``: its shapes by their bounds, each with its own level."""

    cluster: Cluster
    bound: float
    level: int = 0
    queue: list[tuple[float, int, int, Shape]] = field(default_factory=list)

    @property
    def devices(self) -> int:
        return self.cluster.devices


def parts(cluster: Cluster) -> Iterator[Cluster]:
    """Every part of the cluster, the fewest devices first. Of a measured device only whole nodes: its figures are
    those of ranks that share the machine."""
    group, node = cluster.groups[0], cluster.devices_per_node
    if cluster.device.origin != "measured":
        for some in range(1, node):
            if node % some == 0:
                yield Cluster((replace(group, nodes=1, devices_per_node=some),))
    for nodes in range(1, cluster.nodes):
        yield Cluster((replace(group, nodes=nodes),))
    yield cluster


class SizeBounds:
    """Bounds for the parts of one cluster."""

    def __init__(
        self, model: ModelGraph, job: Job, cluster: Cluster, fix: Fix, equal_blocks: bool = True, waiting: float = 1.0
    ) -> None:
        self.context = Context.of(model, job, cluster, fix, equal_blocks, waiting)
        self._least = LeastComputing(self.context)
        self._shardings = KnownShardings(self.context)
        sizes = [(prod(meta.at(1, 1)), meta.requires_grad) for meta in model.parameters.values()]
        kept = sum(elements * (1 + job.moments * trains) for elements, trains in sizes) * job.master_bytes
        self._kept_bytes = 0 if "state" in offloads(cluster, fix) else kept

    def size(self, cluster: Cluster) -> Size | None:
        """A part with the first of its bounds; None if no mesh of the search's space is that large, or master
        parameters and optimizer state alone, each held once, are more than its memory."""
        context = self.context
        if self._kept_bytes > cluster.devices * cluster.device.memory_bytes:
            return None
        queue = []
        for order, shape in enumerate(shapes(context.model, context.job, cluster, context.fix)):
            if has_room(context, shape.outline):
                queue.append((self._refined(shape, Step.ARITHMETIC), order, 0, shape))
        heapq.heapify(queue)
        return Size(cluster, queue[0][0], 0, queue) if queue else None

    def refine(self, size: Size, enough: float = inf) -> None:
        """Take the bound of a part to its next level, or to ``enough`` seconds; infinite if nothing fits."""
        size.level = level = min(size.level + 1, LAST)
        queue = size.queue
        while queue and queue[0][2] < level and queue[0][0] < enough:
            bound, order, known, shape = heapq.heappop(queue)
            bound = max(bound, self._refined(shape, known + 1))
            if bound < inf:
                heapq.heappush(queue, (bound, order, known + 1, shape))
        size.bound = max(size.bound, queue[0][0]) if queue else inf

    def rules_out(self, size: Size, seconds: float) -> bool:
        """Whether every plan of the part surely takes ``seconds`` or more; its bound is raised on the way."""
        queue = size.queue
        left_in = False
        while queue and queue[0][0] < seconds and not left_in:
            bound, order, known, shape = heapq.heappop(queue)
            level = min(known + 1, LAST + 1)
            bound = max(bound, self._refined(shape, level)) if level > known else bound
            if bound < inf:
                heapq.heappush(queue, (bound, order, level, shape))
            left_in = level > LAST and bound < seconds
        size.bound = max(size.bound, queue[0][0]) if queue else inf
        return size.bound >= seconds

    def _refined(self, shape: Shape, level: int) -> float:
        context, shardings = self.context.sharing(shape.outline.ep), self._shardings.of(shape.outline.sharding)
        if level == Step.STAGES:
            space = list(open_configs_of(shape, context.job, context.cluster, context.fix))
            seconds = loose_bound(context, space, shardings)  # infinite where not even that fits
        else:
            seconds = shape_bound(context, shape, shardings.work(level) if level else None)
        return self._least.bound(shape, level, seconds)
