"""Block decisions with their full cost: seconds each way, bytes kept, bytes needed while the block runs.

* Bytes are read off autograd: the sharded block runs on one rank's fake tensors, forward and backward
  (`solver.liveness`), exactly as it will be emitted. Parameters, constants and batch tensors exist anyway and do not
  count; the input handed on by the block before counts here, once. "Transient" is the most that is alive at some time
  of the forward or backward beyond what the whole block keeps, gradients of its parameters included.
* Recompute "full" keeps the block's input alone; its backward runs the forward again, collectives included, up to the
  last operator that saves something, and what the block saves is then transient.
* "selective" keeps besides the results of some operators (`solver.recompute`): their bytes are counted, the rest runs
  again.
* A block takes as long each way as the device works for it, or as the host needs to start its kernels, whichever is
  more: the host runs ahead of a busy device, and an idle one waits for it.
* "/offload": what is kept waits on the host. On the device remain tensors too small to be moved and, while the block
  runs, the tensors of two blocks: its own, and those on their way to or from the host.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from autopar.graph.ir import BlockKind
from autopar.job import Job
from autopar.plan import Candidate
from autopar.recent import Recent
from autopar.sharding.decision import BlockDecision
from autopar.solver.decision_costs import (
    boundary_bytes,
    boundary_parts,
    decision_price,
    expert_elements,
    local_elements,
    priced_pieces,
)
from autopar.solver.liveness import Footprint, footprint
from autopar.solver.prices import AxisPrices, Price
from autopar.solver.recompute import Recompute, exposed_copy, moved_of, pieces_of, rerun, rerun_of


@dataclass(frozen=True, slots=True)
class BlockCost:
    """A block kind under a decision and a recompute choice, per rank and micro-batch.

    ``saved``: families of operators whose results selective recomputation keeps; ``offload``: what is kept waits on the
    host. ``again_s``: of the seconds, those of recomputation; ``copies_s``: those that wait for copies to the host and
    back; ``communication_s``: of the others, those in collectives. ``computing_s``: those in which the device computes,
    recomputation included, whatever the host takes.
    ``elements``: parameters held on the model axes, ``frozen``: of these, those that do not train, ``expert``: those of
    experts that data ranks share; ``inflight``: bytes
    kept for backward on the device, ``hosted``: on the host; ``transient``: bytes while it runs.
    ``sources``: seconds by where the figure is from. ``gathered``: under zero 3, its parameters stay gathered through
    the step; what this saves is the stage's (`data_axis`).
    """

    kind: str
    decision: BlockDecision
    recompute: str
    forward_s: float
    backward_s: float
    communication_s: float
    again_s: float
    elements: int
    inflight: int
    transient: int
    sources: dict[str, float] = field(default_factory=dict, hash=False)
    saved: tuple[str, ...] = ()
    offload: bool = False
    frozen: int = 0
    hosted: int = 0
    copies_s: float = 0.0
    expert: int = 0
    gathered: bool = False
    computing_s: float = 0.0

    @property
    def trains(self) -> int:
        """Parameter elements that train."""
        return self.elements - self.frozen

    @property
    def choice(self) -> str:
        """The recompute choice by its name."""
        return Recompute(self.recompute, self.saved, self.offload).name

    def recomputed(
        self, recompute: str, saved: tuple[str, ...], again_s: float, kept: int, computing_s: float
    ) -> BlockCost:
        """The same decision with ``again_s`` more seconds of backward, in which parts of the forward run again, and the
        device computes for ``computing_s``; ``kept``: bytes in flight."""
        share = again_s / max(self.forward_s + self.backward_s, 1e-30)
        return replace(
            self,
            recompute=recompute,
            saved=saved,
            backward_s=self.backward_s + again_s,
            again_s=again_s,
            computing_s=self.computing_s + computing_s,
            inflight=kept,
            transient=self.transient + max(0, self.inflight - kept),
            sources={name: seconds * (1 + share) for name, seconds in self.sources.items()},
        )

    def offloaded(self, moved: int, bandwidth: float) -> BlockCost:
        """The same with ``moved`` of the bytes in flight on the host, over a link of ``bandwidth`` bytes/s."""
        out, back = (exposed_copy(moved, bandwidth, busy) for busy in (self.forward_s, self.backward_s))
        return replace(
            self,
            offload=True,
            forward_s=self.forward_s + out,
            backward_s=self.backward_s + back,
            inflight=self.inflight - moved,
            hosted=moved,
            copies_s=out + back,
            transient=self.transient + 2 * moved,
        )


_earlier: Recent[Footprint] = Recent(4096)
"""Footprints of this process's searches."""


class BlockCosts:
    """Costs of decisions for one job; saved bytes are measured once per decision."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._footprints: dict[tuple[str, str, bool], Footprint] = {}
        self._digests: dict[str, str] = {}
        self.measured = 0

    def of(
        self, kind: BlockKind, decision: BlockDecision, prices: AxisPrices, choices: Iterable[str] = ("none", "full")
    ) -> dict[str, BlockCost]:
        """The cost by recompute choice, for those asked for."""
        pieces = list(priced_pieces(kind, decision, prices))
        price, sources = decision_price(kind, decision, prices)
        batch, found_bytes = prices.batch, self.footprint(kind, decision)
        inflight = found_bytes.saved_bytes(batch)
        boundary = boundary_bytes(kind, decision, batch, self.job)
        plain = BlockCost(
            kind=kind.name,
            decision=decision,
            recompute="none",
            forward_s=max(price.forward_s, price.host_forward_s),
            backward_s=max(price.backward_s, price.host_backward_s),
            communication_s=price.communication_s,
            again_s=0.0,
            elements=local_elements(kind, decision),
            frozen=local_elements(kind, decision, frozen=True),
            expert=expert_elements(kind, decision),
            inflight=inflight,
            transient=max(0, found_bytes.peak_bytes(batch) - inflight),
            sources=sources,
            computing_s=price.computing_s,
        )
        parts = {key: one for key, one, _ in pieces}
        bandwidth = prices.ops.device.host_bandwidth
        found = {}
        here = {"none": (plain, found_bytes.saved_sizes(batch))}  # on the device, with the tensors kept
        running = pieces_of(kind, decision, batch, self.job)
        for name in choices:
            choice = Recompute.of(name)
            how = replace(choice, offload=False).name
            if how not in here:
                run = rerun_of(running, choice.saved)
                again = [parts[key] for key in run.again]
                again_s = longer(price, again) - plain.backward_s
                computing_s = sum(piece.computing_forward_s for piece in again)
                kept = boundary + sum(run.kept.values())
                sizes = [*boundary_parts(kind, decision, batch, self.job), *run.kept.values()]
                here[how] = plain.recomputed(choice.recompute, run.families, again_s, kept, computing_s), sizes
            cost, sizes = here[how]
            found[name] = cost.offloaded(moved_of(sizes), bandwidth) if choice.offload else cost
        return found

    def saved(self, kind: BlockKind, decision: BlockDecision, batch: int, lean: bool = False) -> int:
        """Bytes per rank that the sharded block keeps for backward, its input included. ``lean``: see `footprint`."""
        return self.footprint(kind, decision, lean).saved_bytes(batch)

    def footprint(self, kind: BlockKind, decision: BlockDecision, lean: bool = False) -> Footprint:
        """What the sharded block holds through its forward and backward."""
        key = (kind.name, json.dumps(decision.to_json(), sort_keys=True), lean)
        if key not in self._footprints:
            if kind.name not in self._digests:
                self._digests[kind.name] = kind.digest()
            place = (self._digests[kind.name], replace(self.job, global_batch=1), *key)
            self._footprints[key] = _earlier.get(place, lambda: footprint(kind, decision, self.job, lean))
            self.measured += 1
        return self._footprints[key]


def longer(price: Price, again: Iterable[Price]) -> float:
    """Seconds of a backward in which the forward of these pieces runs again."""
    pieces = list(again)
    device = price.backward_s + sum(piece.forward_s for piece in pieces)
    return max(device, price.host_backward_s + sum(piece.host_forward_s for piece in pieces))


def again_pieces(kind: BlockKind, candidate: Candidate, batch: int, job: Job) -> tuple[str, ...]:
    """Keys of the pieces that run again in a candidate's backward."""
    if candidate.recompute == "none":
        return ()
    return tuple(rerun(kind, candidate.decision, candidate.saved, batch, job).again)


def moved_bytes(kind: BlockKind, candidate: Candidate, batch: int, job: Job) -> int:
    """Bytes per micro-batch that a candidate with offload sends to the host."""
    decision = candidate.decision
    if candidate.recompute == "none":
        sizes = footprint(kind, decision, job).saved_sizes(batch)
    else:
        sizes = boundary_parts(kind, decision, batch, job)
    if candidate.recompute == "selective":
        sizes += rerun(kind, decision, candidate.saved, batch, job).kept.values()
    return moved_of(sizes)
