"""Bytes per rank and stage, as the emitted code holds them.

N: parameter elements of the stage on the model axes, n: of one block, r: of the stage's root group (`groups.py`), M/C:
bytes per element of master parameters and of compute, D: data ranks, Z = D under zero 3 and 1 under zero 0 (nothing is
sharded over data ranks). "Frees": zero 3 without stages.

* parameters   M N / Z, and gathered for a whole micro-batch or longer: C N, or only C r if each block is freed
* gradients    M N accumulated whole, unless zero 3 without stages reduces at each micro-batch: then M N / Z
               (stock pipelining defers reduction, so that gradients stay whole to the last micro-batch); C r as
               autograd leaves them, because the root group takes them up only when the backward has ended
* optimizer    2 M N / Z (AdamW's two moments)
* activations  saved for backward x micro-batches in flight (1F1B: min(p - s, m) on stage s), and what
               `PipelineStage` holds besides: a receive buffer per micro-batch of the step for inputs, one for the
               gradients of outputs, the gradients of the inputs, and the outputs of micro-batches in flight
* transient    the largest of: what a block's forward or backward needs beside what is saved (`Candidate`) with
               FSDP2's staging, that is gradients in compute dtype and a reduction's input, (C + M) n, and if blocks are
               freed also two gathered ones, 2 C n; for a block of the root group, instead of its own staging, the input
               of another block's reduction under way; the root group's own reduction, M r in place of its C r
* reserve      what the driver, the libraries and the allocator's rounding take (`Device.reserve_bytes`)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from autopar.job import Job


@dataclass(frozen=True, slots=True)
class BlockBytes:
    """What memory counts of one block on one rank: ``elements`` of parameters on the model axes, ``inflight`` bytes
    saved per micro-batch, ``transient`` bytes of activations while it runs. ``shared``: elements that another block of
    the same stage holds already (tied weights). ``root``: whether it is in the root group."""

    elements: int
    inflight: int
    transient: int
    shared: int = 0
    root: bool = False


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """``data``: ranks of the data axis; ``boundary``: local bytes of what passes between stages, per micro-batch."""

    job: Job
    data: int
    zero: int
    stages: int
    micro_batches: int
    boundary: int
    reserve: int

    @property
    def shards(self) -> int:
        return self.data if self.zero == 3 else 1

    @property
    def frees_blocks(self) -> bool:
        """Whether parameters are gathered and gradients reduced block by block, each micro-batch."""
        return self.zero == 3 and self.stages == 1

    def in_flight(self, stage: int) -> int:
        """Micro-batches whose saved tensors a stage holds at once."""
        return min(self.stages - stage, self.micro_batches)

    def per_element(self, root: bool = False) -> dict[str, float]:
        """Resident bytes per parameter element, by kind. ``root``: of the root group."""
        master, compute = self.job.master_bytes, self.job.compute_bytes
        held = master / self.shards
        return {
            "parameters": held + (0 if self.frees_blocks and not root else compute),
            "gradients": (held if self.frees_blocks else master) + (compute if root else 0),
            "optimizer": 2 * held,
        }

    def resident(self, elements: float, root: bool = False) -> float:
        """Bytes of parameters, gradients and optimizer state of so many elements."""
        return sum(self.per_element(root).values()) * elements

    def staging(self, elements: float) -> float:
        """FSDP2's temporary bytes for a block of so many elements with a group of its own."""
        master, compute = self.job.master_bytes, self.job.compute_bytes
        return (compute + master + (2 * compute if self.frees_blocks else 0)) * elements

    def pending(self, elements: float) -> float:
        """Temporary bytes while a block of the root group runs, beside other blocks of at most so many elements."""
        return 0.0 if self.stages > 1 else self.job.master_bytes * elements

    def root_staging(self, elements: float) -> float:
        """Temporary bytes of the reduction of a root group of so many elements."""
        return max(0, self.job.master_bytes - self.job.compute_bytes) * elements

    def buffers(self, stage: int) -> int:
        """What the pipeline runtime holds on a stage beside what blocks save."""
        if self.stages == 1:
            return 0
        count = 0
        if stage > 0:
            count += 2 * self.micro_batches
        if stage < self.stages - 1:
            count += self.micro_batches + self.in_flight(stage)
        return count * self.boundary

    def stage(self, stage: int, blocks: Iterable[BlockBytes]) -> dict[str, int]:
        """Bytes by kind (`plan.MEMORY_KINDS`)."""
        blocks = tuple(blocks)
        rooted = sum(block.elements - block.shared for block in blocks if block.root)
        alone = sum(block.elements - block.shared for block in blocks if not block.root)
        plain, root = self.per_element(), self.per_element(root=True)
        memory = {kind: round(plain[kind] * alone + root[kind] * rooted) for kind in plain}
        saved = sum(block.inflight for block in blocks) * self.in_flight(stage)
        memory["activations"] = saved + self.buffers(stage)
        pending = self.pending(max((block.elements for block in blocks if not block.root), default=0))
        peaks = (b.transient + (pending if b.root else self.staging(b.elements)) for b in blocks)
        memory["transient"] = round(max(self.root_staging(rooted), *peaks))
        memory["reserve"] = self.reserve
        return memory
