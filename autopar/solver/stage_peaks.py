"""The bytes of a stage through one backward: activations, gradients and FSDP2's buffers, as they come and go.

FSDP2 (`torch.distributed.fsdp._fully_shard`, driven by `codegen/runtime/sharding.py`) has a group per block and a root
group. A backward goes through the blocks from last to first. M/C: bytes per element of master parameters and of
compute, n: elements of the block that train, r: of the root group, Z: ranks of a shard group. While a block's backward
runs, there are

* what it and the blocks before it saved for this micro-batch, what other micro-batches saved, and its transient bytes,
  in which are the C n of its own gradients;
* gradients kept for the optimizer: those of the blocks after it as they are after this micro-batch, of all others as
  they were before (`MemoryModel.kept_gradients`). Those of the root group's blocks after it: C n, until the end;
* the input of the last reduction, M n of the block after it, until the next one starts; where only the end of the step
  waits for reductions (`MemoryModel.drains`), the inputs of all so far, until then;
* under zero 3 its gathered parameters and those of the block before it, on the way, if they do not stay gathered (then
  they stand).

When it is done, its gradients are reduced (if this backward reduces): the input M n beside them, or beside the M n to
which deferred ones were added; then, without them, the input with the output M n / Z. A shard group of one rank divides
the input into a copy of it, M n; larger ones hold on to the gradient of the group's last parameter. At the end the same
happens to the root group, whose gathered parameters zero 3 frees first.

Schedules that halve backwards run "I", in which nothing is freed and gradients that weights need are kept; gradients
of weights come in "W", and stay, C N of the stage, until the hooks of the next "I" add them up (M N). After the last
"W" all groups are reduced, one after another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from autopar.solver.memory import BlockBytes, MemoryModel


@dataclass(frozen=True, slots=True)
class Beside:
    """Bytes at one time of a backward: ``activations`` of its micro-batch that are still kept, ``gradients``, and
    ``transient``, all else."""

    activations: float
    gradients: float
    transient: float

    @property
    def total(self) -> float:
        return self.activations + self.gradients + self.transient


class Peak(NamedTuple):
    """The most bytes of a rank; then, by its stages, those saved for backward at that time, and the most of gradients
    at any time."""

    total: float
    flying: list[float]
    gradients: list[float]


class StageBackward:
    """The backwards of one stage. ``handed``: bytes of the gradient that a block hands to the one before; ``halved``:
    whether they are halved, as those of the first stage never are: all of it is its "W"."""

    def __init__(self, model: MemoryModel, blocks: Sequence[BlockBytes], handed: int, halved: bool) -> None:
        self.model, self.blocks, self.handed, self.halved = model, list(blocks), handed, halved
        self.saved = [0.0, *accumulate(float(block.inflight) for block in self.blocks)]
        self.rooted = sum(block.own_trains for block in self.blocks if block.root)
        self.grouped = sum(block.trains for block in self.blocks if not block.root)
        # Elements of shared experts count several times where what is kept is divided by the ranks of a shard group.
        self.thinner = 0.0 if model.defers else model.thinner - 1
        self.added = self.thinner * sum(block.expert for block in self.blocks)
        self.elements_rooted = sum(block.own for block in self.blocks if block.root)
        self._most: dict[tuple[str, str, bool], tuple[float, Beside | None]] = {}

    def most(self, kind: str, done: str, last: bool) -> tuple[float, Beside | None]:
        """Of these `times`, the most bytes of gradients, and the one with most bytes in all."""
        key = kind, done, last
        if key not in self._most:
            through = list(self.times(kind, done, last))
            gradients = max((time.gradients for time in through), default=0.0)
            self._most[key] = gradients, max(through, key=lambda time: time.total, default=None)
        return self._most[key]

    def times(self, kind: str, done: str, last: bool) -> Iterator[Beside]:
        """The times of a backward "B", "I" or "W" at which most may be held. ``done``: as in `orders.Moment`."""
        if kind == "W" and self.halved:
            yield from self._weights(done)
        elif kind == "I" and self.halved:
            yield from self._inputs(done)
        elif kind != "I":
            yield from self._buffered() if self.model.keeps_buffers else self._whole(done, last)
        if kind == "W" and last:
            yield from self._reductions()

    def kept(self, done: str) -> float:
        """Bytes per element of the gradients that are kept."""
        return self.model.kept_gradients(done, self.halved)

    def draining(self, done: str) -> float:
        """Bytes of what reductions have read and hold to the end of the step."""
        held = self.model.drains and done == "all"
        return self.model.job.master_bytes * (self.grouped + self.rooted) if held else 0.0

    def _whole(self, done: str, last: bool) -> Iterator[Beside]:
        model = self.model
        master, compute = model.job.master_bytes, model.job.compute_bytes
        reduces = (model.zero >= 2 or last) and not model.splits
        before, after = self.kept(done), self.kept("all" if reduces and last else "one" if done == "none" else "some")
        adds = model.defers and done != "none"  # to gradients of earlier micro-batches, which are whole
        fresh = 0 if adds and compute == master else compute
        later = waiting = 0.0  # elements of groups that are done, gradients of root blocks that are
        rest = float(self.grouped) + self.added
        reducing = drained = 0.0
        for place in reversed(range(len(self.blocks))):
            block = self.blocks[place]
            ahead = next((other for other in reversed(self.blocks[:place]) if not other.root), None)
            coming = compute * ahead.elements if model.frees_blocks and ahead is not None and not ahead.gathered else 0
            kept = after * later + before * (rest + self.rooted)
            own = compute * block.elements if model.frees_blocks and not (block.root or block.gathered) else 0
            shard = master / model.shards * block.elements if model.offload == "state" else 0.0
            yield Beside(self.saved[place + 1], kept, waiting + block.transient + reducing + coming + own + shard)
            if block.root:
                waiting = min(waiting + fresh * block.trains, fresh * self.rooted)
                continue
            handed = waiting + coming + (self.handed if place else 0)
            own = fresh * block.trains
            yield Beside(self.saved[place], kept, handed + reducing + own)
            if reduces:
                reducing = drained + master * block.trains
                yield Beside(self.saved[place], kept, handed + reducing + (0 if adds else own))
                gone = before * block.trains if adds else 0.0
                held = self._tail(before if adds else fresh, block.tail) + drained
                yield Beside(self.saved[place], kept - gone, handed + held + self._reduced(block.trains))
                drained = reducing if model.drains else 0.0
            counted = block.trains + self.thinner * block.expert
            later, rest = later + counted, rest - counted
            yield Beside(self.saved[place], after * later + before * (rest + self.rooted) + waiting, drained)
        kept = after * (self.grouped + self.added) + before * self.rooted
        yield Beside(0.0, kept + waiting, reducing)
        if reduces:
            freed = compute * self.elements_rooted if model.frees_blocks else 0
            yield Beside(0.0, kept + (0 if adds else waiting), drained + master * self.rooted - freed)
            gone = before * self.rooted if adds else 0.0
            tail = next((block.tail for block in reversed(self.blocks) if block.root and block.own_trains), 0)
            held = self._tail(before if adds else fresh, tail)
            yield Beside(0.0, kept - gone, drained + held + self._reduced(self.rooted) - freed)
        yield Beside(0.0, after * (self.grouped + self.added + self.rooted), self.draining("all") if reduces else 0.0)

    def _buffered(self) -> Iterator[Beside]:
        """Where gradients have buffers of their own, in which they are reduced, too."""
        kept = self.kept("all") * (self.grouped + self.rooted)
        for place in reversed(range(len(self.blocks))):
            yield Beside(self.saved[place + 1], kept, self.blocks[place].transient)

    def _tail(self, each: float, elements: int) -> float:
        """The last gradient that a reduction puts in order for its shards is held until the reduction ends (by the
        variable of a loop in `foreach_reduce`)."""
        return each * elements if self.model.shards > 1 else 0.0

    def _reduced(self, elements: float) -> float:
        """Input, output and copies of a reduction, its source freed."""
        master, shards = self.model.job.master_bytes, self.model.shards
        return master * elements * (3 if shards == 1 else 1 + 1 / shards)

    def _inputs(self, done: str) -> Iterator[Beside]:
        """Hooks add up what the last "W" left, block by block; what weights need is kept from here on."""
        model = self.model
        master, compute = model.job.master_bytes, model.job.compute_bytes
        left = compute if done != "none" and compute < master else 0
        added = 0 if done == "none" else master
        before = self.kept(done) - left
        later, rest, kept = 0.0, float(self.grouped), 0.0
        for place in reversed(range(len(self.blocks))):
            block = self.blocks[place]
            gradients = added * later + (before + left) * (rest + self.rooted)
            yield Beside(self.saved[-1], gradients, kept + max(0, block.transient - compute * block.trains))
            kept += block.waiting
            if not block.root:
                later, rest = later + block.trains, rest - block.trains

    def _weights(self, done: str) -> Iterator[Beside]:
        """Gradients of weights come, one by one."""
        total = self.grouped + self.rooted
        yield Beside(self.saved[-1], self.kept("one" if done == "none" else "some") * total, 0.0)

    def _reductions(self) -> Iterator[Beside]:
        """All groups are reduced, one after another."""
        model = self.model
        groups = [self.rooted, *(block.trains for block in self.blocks if not block.root)]
        before, after = self.kept("one" if model.micro_batches == 1 else "some"), self.kept("all")
        left = self.rooted + self.grouped
        ready = left
        for elements in groups:
            left -= elements
            done = ready - left - elements
            kept, drained = before * left + after * done, model.job.master_bytes * done if model.drains else 0.0
            yield Beside(0.0, kept, drained + before * elements + model.job.master_bytes * elements)
            yield Beside(0.0, kept, drained + self._reduced(elements))
