"""Bytes per rank and stage, as the emitted code holds them.

N: parameter elements of a stage on the model axes, n: of one block, r: of the stage's root group (`groups.py`); of
these, in the lines on gradients, reductions and the optimizer, those that train (others have neither). M/C:
bytes per element of master parameters and of compute, Z: ranks of a shard group (1 under zero 0), k: tensors of the
optimizer (`Job.moments`), m: micro-batches of a step.

                zero 0      zero 1      zero 2      zero 3
    parameters  M N         M N / Z     M N / Z     M N / Z     as the optimizer keeps them
                C N         C N         C N         C r         as blocks read them, for a micro-batch or longer
    gradients   M N         M N *       M N / Z     M N / Z     kept from one micro-batch to the next
                C r         C r         C r         C r         of the root group, as autograd leaves them: it takes
                                                                them up only when the backward has ended
    optimizer   k M N       k M N / Z   k M N / Z   k M N / Z
    * M N / Z with a single micro-batch, unless the schedule halves backwards: then nothing waits for a reduction.
      Schedules that do (zbv, dualpipev) also leave the last weight gradients of a stage in compute dtype: C N, if C < M

With state offload, what the optimizer keeps and gradients that are reduced wait on the host, 1 + 1 + k times M N / Z:
parameters keep the second line, gradients M N under zero 0 and 1 (*), nothing under 2 and 3 (M N / Z where
shard groups have replicas: those add up at the end) and C r, the optimizer nothing.

* activations  saved for backward, for the micro-batches in flight on each stage of a rank at the time when they are
               most together (`orders.peaks`); schedules that halve backwards also keep, from "I" to "W", the gradients
               that weights need. What `PipelineStage` holds besides: a receive buffer per micro-batch of the step for
               inputs, one for the gradients of outputs, the gradients of the inputs, and the outputs of micro-batches
               in flight
* transient    the largest of: what a block's forward or backward needs beside what is saved (`Candidate`) with
               FSDP2's staging, that is gradients in compute dtype and a reduction's input, (C + M) n, under zero 3 also
               two gathered blocks, 2 C n, and under offload the shard on its way, M n / Z; for a block of the root
               group, instead of its own staging, the input of another block's reduction under way; the root group's own
               reduction, M r in place of its C r. Stages of a rank run one at a time: the largest of them
* reserve      what the driver, the libraries and the allocator's rounding take (`Device.reserve_bytes`)

Transient and reserve of a rank stand with its first stage; the stages of a rank add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autopar.job import Job
from autopar.schedule import SCHEDULES, Schedule
from autopar.solver.orders import Held, peaks


@dataclass(frozen=True, slots=True)
class BlockBytes:
    """What memory counts of one block on one rank: ``elements`` of parameters on the model axes, ``inflight`` bytes
    saved per micro-batch, ``transient`` bytes of activations while it runs. ``shared``: elements that another block of
    the same stage holds already (tied weights). ``root``: whether it is in the root group. ``waiting``: bytes per
    micro-batch between the halves of its backward. ``frozen``, ``shared_frozen``: of the elements, and of those shared,
    those that do not train."""

    elements: int
    inflight: int
    transient: int
    shared: int = 0
    root: bool = False
    waiting: int = 0
    frozen: int = 0
    shared_frozen: int = 0

    @property
    def own(self) -> int:
        """Elements that no other block of the stage holds."""
        return self.elements - self.shared

    @property
    def trains(self) -> int:
        """Of all its elements, those that train."""
        return self.elements - self.frozen

    @property
    def own_trains(self) -> int:
        """Of its own elements, those that train."""
        return self.own - (self.frozen - self.shared_frozen)


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """``fsdp``: ranks of a shard group; ``pp``: pipeline ranks with ``vpp`` stages each; ``boundary``: local bytes of
    what passes between stages, per micro-batch; ``offload``: "none" or "state"; ``replicas``: of a shard group."""

    job: Job
    fsdp: int
    zero: int
    pp: int
    micro_batches: int
    boundary: int
    reserve: int
    schedule: str = "1f1b"
    vpp: int = 1
    offload: str = "none"
    replicas: int = 1

    @property
    def stages(self) -> int:
        return self.pp * self.vpp

    @property
    def shards(self) -> int:
        return self.fsdp if self.zero else 1

    @property
    def frees_blocks(self) -> bool:
        """Whether parameters are gathered block by block, for each forward and backward."""
        return self.zero == 3

    @property
    def defers(self) -> bool:
        """Whether gradients wait, whole, for the last micro-batch."""
        return self.zero <= 1 and (self.splits or self.micro_batches > 1)

    @property
    def splits(self) -> bool:
        """Whether the schedule halves backwards."""
        return self._rule.splits_backward

    def rank_of(self, stage: int) -> int:
        return self._rule.rank_of(stage, self.pp)

    def held(self, rank: int) -> tuple[Held, ...]:
        """Micro-batches in flight on a rank's stages at the times when they are most (`orders.peaks`)."""
        return peaks(self.schedule if self.pp > 1 else "none", self.pp, self.vpp, self.micro_batches)[rank]

    def in_flight(self, stage: int) -> int:
        """The most micro-batches whose saved tensors a stage holds at once."""
        own = [other for other in range(self.stages) if self.rank_of(other) == self.rank_of(stage)]
        return max(held[own.index(stage)][0] for held in self.held(self.rank_of(stage)))

    def per_element(self, root: bool = False) -> dict[str, float]:
        """Resident bytes per parameter element, by kind. ``root``: of the root group."""
        master, compute = self.job.master_bytes, self.job.compute_bytes
        on_host = self.offload == "state"
        shard = 0.0 if on_host else master / self.shards
        gathered = compute if root or not self.frees_blocks else 0
        kept = master / self.shards if self.replicas > 1 and self.micro_batches > 1 else shard
        whole = master if self.defers else kept
        left = compute if root or (self.splits and compute < master) else 0
        return {
            "parameters": shard + gathered,
            "gradients": whole + left,
            "optimizer": self.job.moments * shard,
        }

    def resident(self, elements: float, root: bool = False, frozen: float = 0.0) -> float:
        """Bytes of parameters, gradients and optimizer state of so many elements, of which ``frozen`` do not train."""
        held = self.per_element(root)
        return sum(held.values()) * elements - (held["gradients"] + held["optimizer"]) * frozen

    def on_host(self, elements: float) -> float:
        """Bytes of so many elements that wait on the host."""
        held = (2 + self.job.moments) * self.job.master_bytes / self.shards
        return held * elements if self.offload == "state" else 0.0

    def staging(self, elements: float, frozen: float = 0.0) -> float:
        """FSDP2's temporary bytes for a block of so many elements with a group of its own, ``frozen`` without
        gradient."""
        master, compute = self.job.master_bytes, self.job.compute_bytes
        shard = master / self.shards if self.offload == "state" else 0.0
        gathered = 2 * compute if self.frees_blocks else 0
        return (compute + master + gathered + shard) * elements - (compute + master) * frozen

    def pending(self, elements: float) -> float:
        """Temporary bytes while a block of the root group runs, beside other blocks of which at most so many
        elements train."""
        return 0.0 if self.splits else self.job.master_bytes * elements

    def root_staging(self, elements: float) -> float:
        """Temporary bytes of the reduction of a root group of which so many elements train."""
        return max(0, self.job.master_bytes - self.job.compute_bytes) * elements

    def buffers(self, stage: int) -> int:
        """What the pipeline runtime holds on a stage beside what blocks save."""
        count = 0
        if stage > 0:
            count += 2 * self.micro_batches
        if stage < self.stages - 1:
            count += self.micro_batches + self.in_flight(stage)
        return count * self.boundary

    def ranks(self, stages: Sequence[Sequence[BlockBytes]]) -> tuple[dict[str, int], ...]:
        """Bytes by kind (`plan.MEMORY_KINDS`) of every stage of the model."""
        found = [self._resident(blocks) for blocks in stages]
        peak = [self._transient(blocks) for blocks in stages]
        for rank in range(self.pp):
            own = [stage for stage in range(self.stages) if self.rank_of(stage) == rank]
            most = max(self.held(rank), key=lambda held: sum(self._flying(stages, own, held)))
            for stage, flying in zip(own, self._flying(stages, own, most), strict=True):
                found[stage]["activations"] = flying + self.buffers(stage)
                found[stage]["transient"] = max(peak[other] for other in own) if stage == own[0] else 0
                found[stage]["reserve"] = self.reserve if stage == own[0] else 0
        return tuple(found)

    @property
    def _rule(self) -> Schedule:
        return SCHEDULES[self.schedule if self.pp > 1 else "none"]

    def _flying(self, stages: Sequence[Sequence[BlockBytes]], own: list[int], held: Held) -> list[int]:
        """Bytes kept for backward by each stage of a rank."""
        return [
            alive * sum(block.inflight for block in stages[stage])
            + waiting * sum(block.waiting for block in stages[stage])
            for stage, (alive, waiting) in zip(own, held, strict=True)
        ]

    def _resident(self, blocks: Iterable[BlockBytes]) -> dict[str, int]:
        blocks = tuple(blocks)
        plain, root = self.per_element(), self.per_element(root=True)
        bytes_of = dict.fromkeys(plain, 0.0)
        for block in blocks:
            for kind, each in (root if block.root else plain).items():
                bytes_of[kind] += each * (block.own if kind == "parameters" else block.own_trains)
        return {kind: round(found) for kind, found in bytes_of.items()}

    def _transient(self, blocks: Sequence[BlockBytes]) -> int:
        rooted = sum(block.own_trains for block in blocks if block.root)
        pending = self.pending(max((block.trains for block in blocks if not block.root), default=0))
        peaks = (b.transient + (pending if b.root else self.staging(b.elements, b.frozen)) for b in blocks)
        return round(max(self.root_staging(rooted), *peaks))
