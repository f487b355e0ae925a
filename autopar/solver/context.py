"""What every part of one search shares: the model, job and cluster, prices, what is fixed, and what is remembered."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, cast

from autopar.cluster import Cluster
from autopar.graph.dispatch import dispatched, sharing_sizes
from autopar.graph.ir import Block, ModelGraph
from autopar.graph.padding import padded
from autopar.job import Job
from autopar.solver.axis_choices import Demands
from autopar.solver.candidates import BlockCosts
from autopar.solver.collective_costs import CollectiveCosts
from autopar.solver.data_axis import stream_seconds
from autopar.solver.fix import Fix
from autopar.solver.halves import HalvedBackward
from autopar.solver.op_costs import OpCosts
from autopar.solver.recompute import Recompute, choices
from autopar.solver.shared_bounds import Sharing
from autopar.solver.ties import Ties, ties_of


@dataclass(slots=True)
class Clock:
    """Seconds by phase and counts of what was done."""

    seconds: dict[str, float] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, phase: str, begin: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begin


@dataclass(slots=True)
class Context:
    """What every part of one search shares. ``model``: with its experts divided among ``ep`` ranks; ``source``: as it
    was given. ``equal_blocks``, ``waiting`` (`computing`): see there; ``paddings``: its like for the model with padded
    heads, ``sharings``: for each number of ranks that share experts."""

    model: ModelGraph
    job: Job
    cluster: Cluster
    fix: Fix
    ops: OpCosts
    collectives: CollectiveCosts
    ties: Ties
    costs: BlockCosts
    clock: Clock
    counts: dict[str, int]
    halved: HalvedBackward
    equal_blocks: bool = True
    paddings: dict[int, Context] = field(default_factory=dict)
    memo: dict[Any, Any] = field(default_factory=dict)
    source: ModelGraph | None = None
    ep: int = 1
    sharings: dict[int, Context] = field(default_factory=dict)
    waiting: float = 1.0

    @staticmethod
    def of(
        model: ModelGraph, job: Job, cluster: Cluster, fix: Fix, equal_blocks: bool = True, waiting: float = 1.0
    ) -> Context:
        source, model = model, dispatched(model, fix.ep or 1)
        counts = Counter(block.kind for block in model.blocks)
        ops = OpCosts(cluster.device, job)
        return Context(
            model,
            job,
            cluster,
            fix,
            ops,
            CollectiveCosts(cluster, job.stack),
            ties_of(model),
            BlockCosts(job),
            Clock(),
            counts,
            HalvedBackward(ops),
            equal_blocks,
            source=source,
            ep=fix.ep or 1,
            waiting=waiting,
        )

    def sharing(self, ep: int) -> Context:
        """The context of the model whose experts ``ep`` data ranks share."""
        if ep == self.ep:
            return self
        self.sharings.setdefault(self.ep, self)
        if ep not in self.sharings:
            model = dispatched(self.source or self.model, ep)
            costs, halved, ties = BlockCosts(self.job), HalvedBackward(self.ops), ties_of(model)
            self.sharings[ep] = replace(
                self, model=model, ties=ties, costs=costs, halved=halved, paddings={}, memo={}, ep=ep
            )
        return self.sharings[ep]

    def any_sharing(self) -> Sharing:
        """That any number of ranks that can may share the experts."""
        if "sharing" not in self.memo:
            self.memo["sharing"] = Sharing.of(self.model, sharing_sizes(self.model)[1:])
        return cast(Sharing, self.memo["sharing"])

    def padded(self, ranks: int) -> Context:
        """The context of the model whose heads are padded to a multiple of ``ranks``."""
        model = padded(self.model, ranks)
        if model is self.model:
            return self
        if ranks not in self.paddings:
            self.paddings[ranks] = replace(
                self,
                model=model,
                costs=BlockCosts(self.job),
                halved=HalvedBackward(self.ops),
                paddings={},
                memo={},
                sharings={},
            )
        return self.paddings[ranks]

    def demands(self) -> Demands:
        return Demands(self.fix.tp is not None, self.fix.sp, self.fix.context)

    def freedom(self, extended: bool = False) -> list[tuple[str, tuple[str, ...]]]:
        """For each block its kind and the recompute choices the fix leaves. ``extended``: with those that only pay
        where memory is short (`recompute.choices`): selective lists, and offload where there is a link to the host."""
        if ("freedom", extended) not in self.memo:
            found: list[tuple[str, tuple[str, ...]]] = []
            for index, block in enumerate(self.model.blocks):
                repeated = self.repeated(block)
                fixed = self.fix.recompute_of(index, block.kind, repeated)
                moves: bool | None = repeated and self.fix.offload in ("activations", "all")
                if repeated and self.fix.offload is None and self.cluster.device.host_bandwidth:
                    moves = None
                found.append((block.kind, choices(fixed, moves, extended and repeated)))
            self.memo["freedom", extended] = found
        return list(self.memo["freedom", extended])

    def gathered_of(self, index: int) -> tuple[bool, ...]:
        """Whether block ``index`` may be freed after each use under zero 3 (False), and stay gathered (True)."""
        fixed = self.fix.reshard_of(index, self.model.blocks[index].kind)
        return (False, True) if fixed is None else (not fixed,)

    def choices_of(self, kind: str) -> tuple[str, ...]:
        """All recompute choices that some block of the kind has."""
        return tuple(dict.fromkeys(choice for name, some in self.freedom(True) if name == kind for choice in some))

    def repeated(self, block: Block) -> bool:
        """Whether the block is one of the model's layers (all are, if it has none): what "recompute" without a place
        and "offload" speak of. A layer that differs from the others is one too."""
        return bool(block.path) or not any(other.path for other in self.model.blocks)

    def always_again(self) -> frozenset[str]:
        """Kinds all of whose blocks are fixed to be recomputed."""
        free = {kind for kind, some in self.freedom() if any(Recompute.of(name).recompute != "full" for name in some)}
        return frozenset(self.model.kinds) - free

    def gradient_price(self) -> float:
        """Seconds per micro-batch that each parameter element that trains costs at least: its gradient is handed on."""
        return self.ops.stack.copies * stream_seconds(self.ops, self.job.compute_bytes + self.job.master_bytes)
