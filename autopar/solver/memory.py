"""Bytes per rank and stage, as the emitted code holds them.

N: parameter elements of a stage on the model axes, n: of one block, r: of the stage's root group (`groups.py`); of
these, in the lines on gradients, reductions and the optimizer, those that train (others have neither). M/C:
bytes per element of master parameters and of compute, Z: ranks of a shard group (1 under zero 0), k: tensors of the
optimizer (`Job.moments`), m: micro-batches of a step.

                zero 0      zero 1      zero 2      zero 3
    parameters  M N         M N / Z     M N / Z     M N / Z     as the optimizer keeps them
                C N         C N         C N         C r         as blocks read them, for a micro-batch or longer; under
                                                                zero 3 also of blocks that stay gathered
    gradients   M N         M N *       M N / Z     M N / Z     kept from one micro-batch to the next
                C r         C r         C r         C r         of the root group, as autograd leaves them: it takes
                                                                them up only when the backward has ended; beside the
                                                                line above as it is by then (`stage_peaks`)
    optimizer   k M N       k M N / Z   k M N / Z   k M N / Z
    * M N / Z with a single micro-batch, unless the schedule halves backwards: then nothing waits for a reduction.
      With stages under zero 1, reduced shards come beside it, M N / Z: inputs of reductions are held to the step's end.
      Schedules that do (zbv, dualpipev) also leave the last weight gradients of a stage but the first in compute
      dtype: C N, if C < M

With state offload, what the optimizer keeps and gradients that are reduced wait on the host, 1 + 1 + k times M N / Z:
parameters keep the second line, gradients M N under zero 0 and 1 (*), nothing under 2 and 3 (M N / Z where
shard groups have replicas: those add up at the end) and C r, the optimizer nothing.

A rank's peak is the most over all backwards of a step (`orders.moments`) of what stands, what micro-batches in flight
saved, the pipeline's buffers, and what the backward goes through (`stage_peaks`). Of it, beside the above:

* activations  saved for backward at that time; schedules that halve backwards also keep, from "I" to "W", the gradients
               that weights need. What `PipelineStage` holds besides, for stages on other ranks: a receive buffer per
               micro-batch of the step for inputs and one for the gradients of outputs, the outputs of micro-batches in
               flight, and what was sent last (with several stages a rank: all that was sent in the step)
* transient    the rest of the peak: tensors that are not saved, FSDP2's gathered blocks and reductions. Where gradients
               are not all there at the peak, these two are less by what is missing
* reserve      what the driver, the libraries and the allocator's rounding take (`Device.reserve_bytes`)

Transient and reserve of a rank stand with its first stage; the stages of a rank add up.

Experts that ``ep`` data ranks share are sharded over Z / ep of the ranks of a shard group that hold the same ones (1
at least), so that their shards are ep times larger; what is not divided by Z is as it is for other parameters.

The stage ILP counts each part at its most, as if all came at once (`resident`, `staging`), which is never less; bounds
count what surely stands at some times (`standing`, `least_resident`, `least_gradients`, `least_buffers`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from autopar.job import Job
from autopar.plan import MEMORY_KINDS
from autopar.schedule import SCHEDULES, Schedule, stages_of
from autopar.solver.moment_table import SHARES, Ints, moment_tables
from autopar.solver.orders import Held, peaks
from autopar.solver.stage_peaks import Peak, StageBackward
from autopar.stack import stack_of


@dataclass(frozen=True, slots=True)
class BlockBytes:
    """What memory counts of one block on one rank: ``elements`` of parameters on the model axes, ``inflight`` bytes
    saved per micro-batch, ``transient`` bytes of activations while it runs. ``shared``: elements that another block of
    the same stage holds already (tied weights). ``root``: whether it is in the root group. ``waiting``: bytes per
    micro-batch between the halves of its backward. ``frozen``, ``shared_frozen``: of the elements, and of those shared,
    those that do not train. ``tail``: elements of the last parameter that trains. ``hosted``: bytes saved per
    micro-batch that wait on the host. ``expert``: of the elements, those of experts that data ranks share.
    ``gathered``: under zero 3, its parameters stay gathered through the step."""

    elements: int
    inflight: int
    transient: int
    shared: int = 0
    root: bool = False
    waiting: int = 0
    frozen: int = 0
    shared_frozen: int = 0
    tail: int = 0
    hosted: int = 0
    expert: int = 0
    gathered: bool = False

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


@lru_cache(maxsize=1024)
def _crossings(schedule: str, pp: int, vpp: int) -> tuple[bool, ...]:
    """Whether each stage, and what would come after the last, gets its input from another rank."""
    place = [SCHEDULES[schedule].rank_of(stage, pp) for stage in range(pp * vpp)]
    return (False, *(one != other for one, other in pairwise(place)), False)


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """``fsdp``: ranks of a shard group; ``pp``: pipeline ranks with ``vpp`` stages each; ``boundary``: local bytes of
    what passes between stages, per micro-batch; ``offload``: "none" or "state"; ``replicas``: of a shard group; ``ep``:
    data ranks that share experts."""

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
    ep: int = 1

    @property
    def stages(self) -> int:
        return self.pp * self.vpp

    @property
    def shards(self) -> int:
        return self.fsdp if self.zero else 1

    @property
    def experts(self) -> MemoryModel:
        """The same for experts that data ranks share: fewer have the same ones, and share their state out."""
        fsdp = max(1, self.fsdp // self.ep)
        ranks = self.fsdp * self.replicas // self.ep
        return replace(self, fsdp=fsdp, replicas=max(1, ranks // fsdp), ep=1)

    @property
    def thinner(self) -> float:
        """How many times fewer ranks share out the state of experts than that of other parameters."""
        experts = max(1, self.fsdp // self.ep) if self.zero else 1  # the shards of `experts`
        return self.shards / experts if self.ep > 1 else 1.0

    @property
    def frees_blocks(self) -> bool:
        """Whether parameters are gathered block by block, for each forward and backward, unless they stay so."""
        return self.zero == 3

    @property
    def defers(self) -> bool:
        """Whether gradients wait, whole, for the last micro-batch."""
        return self.zero <= 1 and (self.splits or self.micro_batches > 1)

    @property
    def drains(self) -> bool:
        """Whether the inputs of the last reductions are held to the end of the step (`DataAxis.drains`)."""
        return self.defers and self.zero == 1 and self.pp > 1 and stack_of(self.job.stack).overlaps

    @property
    def keeps_buffers(self) -> bool:
        """Whether gradients have buffers of their own, whole (`Stack.buffers`): each rank keeps but its share of them
        where they are shared out (ZeRO 2 and 3; deepspeed/runtime/zero/stage3.py partitions them as they come)."""
        return stack_of(self.job.stack).buffers and self.zero < 2

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
        own = stages_of(self._rule.name, self.pp, self.vpp)[self.rank_of(stage)]
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

    def staying(self, elements: float) -> float:
        """Bytes that blocks of so many elements add to what stands when they stay gathered."""
        return self.job.compute_bytes * elements if self.frees_blocks else 0.0

    def resident(
        self, elements: float, root: bool = False, frozen: float = 0.0, expert: float = 0.0, gathered: bool = False
    ) -> float:
        """Bytes of parameters, gradients and optimizer state of so many elements, of which ``frozen`` do not train and
        ``expert`` are those of shared experts; ``gathered``: they stay so."""
        if gathered:
            return self.resident(elements, root, frozen, expert) + self.staying(elements)
        if expert and self.ep > 1:
            return self.resident(elements - expert, root, frozen) + self.experts.resident(expert, root)
        held = self.per_element(root)
        return sum(held.values()) * elements - (held["gradients"] + held["optimizer"]) * frozen

    def kept_gradients(self, done: str, halved: bool) -> float:
        """Bytes per element of gradients that are kept on the device when a stage has done no, one, some or all of the
        backwards of a step (`orders.Moment`). ``halved``: as in `StageBackward`."""
        master, compute = self.job.master_bytes, self.job.compute_bytes
        if self.keeps_buffers:
            return self.job.gradient_bytes
        if done == "none":
            return 0.0
        if done != "all" and halved:
            # The hooks that add them up run before they are there.
            return compute if done == "one" or compute == master else master + compute
        if done != "all" and self.defers:
            return master
        return self._partial if done != "all" else self._shard

    def staging(self, block: BlockBytes, largest: int) -> float:
        """The most that a block's backward and reduction add to what stands, at most; ``largest``: elements of the
        largest block with a group of its own."""
        master, compute = self.job.master_bytes, self.job.compute_bytes
        # The root group's gradients stand already.
        own = compute * block.trains if block.root else 0
        shard = master / self.shards * block.elements if self.offload == "state" else 0.0
        passing = compute * (1 if block.gathered else 2) if self.frees_blocks else 0
        running = block.transient - own + passing * largest + shard
        pending = 0 if self.splits else master * largest
        return max(running + pending, 0.0 if block.root else self.reduction(block.trains))

    def reduction(self, elements: float) -> float:
        """The most that the reduction of a block of so many elements adds to what stands."""
        master, compute = self.job.master_bytes, self.job.compute_bytes
        gathered = compute if self.frees_blocks else 0
        most = max(compute + master, (2 * master if self.shards == 1 else master * (1 + 1 / self.shards)))
        return self.boundary + (most + gathered + master) * elements

    def root_reduction(self, elements: float) -> float:
        """The most that the reduction of a root group of so many elements adds to what stands."""
        master, compute = self.job.master_bytes, self.job.compute_bytes
        copies = 2 * master if self.shards == 1 else master * (1 + 1 / self.shards)
        return max(master, copies if self.shards > 1 else copies - compute) * elements

    def least_resident(self, elements: float, root: bool = False, frozen: float = 0.0, expert: float = 0.0) -> float:
        """Bytes that stand all the time, of so many elements; ``frozen`` and ``expert``: as in `resident`."""
        if expert and self.ep > 1:
            return self.least_resident(elements - expert, root, frozen) + self.experts.least_resident(expert, root)
        held = self.per_element(root)
        buffers = self.job.gradient_bytes if self.keeps_buffers else 0.0
        return held["parameters"] * elements + (held["optimizer"] + buffers) * (elements - frozen)

    def least_gradients(self, trains: float, expert: float = 0.0) -> float:
        """Bytes of gradients, beside `least_resident`, that are kept of so many elements that train once a stage has
        done backwards (`standing`); ``expert``: of them, those of shared experts."""
        if expert and self.ep > 1:
            return self.least_gradients(trains - expert) + self.experts.least_gradients(expert)
        if self.keeps_buffers:
            return 0.0
        ways = [("some", True), ("some", False)] if self.splits else [("one", False), ("some", False)]
        return min(self.kept_gradients(done, halved) for done, halved in ways) * trains

    def least_backward(self, elements: float, trains: float, root: bool = False, behind: float = 0.0) -> float:
        """Bytes that surely stand, beside `least_resident` and what is saved, when the backward of a block begins
        (`stage_peaks`): its gradients, and under zero 3 its gathered ``elements``, and the ``behind`` of the block
        before it."""
        if self.splits or self.keeps_buffers:
            return 0.0
        gathered = (0.0 if root else elements) + behind if self.frees_blocks else 0.0
        return self.job.compute_bytes * (trains + gathered)

    def buffers(self, stage: int) -> int:
        """The most that the pipeline runtime holds on a stage beside what blocks save."""
        flying, done = np.array([self.in_flight(stage)]), np.array([self.micro_batches])
        return self._received(stage) + int(self._sent([stage], flying, done)[0])

    def least_buffers(self, stage: int) -> int:
        """`buffers` that are there whenever most micro-batches are in flight, without what blocks save."""
        flying = self.in_flight(stage) if self.vpp == 1 else self.micro_batches
        return self._received(stage) - (flying * self.boundary if self._crosses(stage) else 0)

    def _crosses(self, stage: int) -> bool:
        """Whether what a stage gets comes from another rank, in buffers that PyTorch's schedules hold for the step
        (Megatron's make one when it is due, and let go of what was sent)."""
        return not self.keeps_buffers and _crossings(self._rule.name, self.pp, self.vpp)[stage]

    def _received(self, stage: int) -> int:
        """Receive buffers: for inputs, and for the gradients of outputs, of all micro-batches."""
        return self.micro_batches * self.boundary * (self._crosses(stage) + self._crosses(stage + 1))

    def _sent(self, own: Sequence[int], alive: Ints, done: Ints) -> Ints:
        """Of each of these stages: outputs of micro-batches in flight, and the gradient of the input last sent.
        Schedules of several stages wait for what they sent at the end of the step, and hold it until then."""
        several = self.vpp > 1
        ahead = np.array([self._crosses(stage + 1) for stage in own], dtype=np.int64)
        back = np.array([self._crosses(stage) for stage in own], dtype=np.int64)
        outputs = (alive + done if several else alive) * ahead
        gradients = (done if several else np.minimum(done, 1)) * back
        return np.asarray((outputs + gradients) * self.boundary)

    def peaks(self, stages: Sequence[Sequence[BlockBytes]]) -> Iterator[Peak]:
        """When each rank holds most, one after the other: the first mostly have most in flight."""
        known: dict[Any, Any] = {}
        for rank, own in enumerate(stages_of(self._rule.name, self.pp, self.vpp)):
            yield self._peak(rank, own, stages, known)

    def ranks(
        self, stages: Sequence[Sequence[BlockBytes]], peaks: Sequence[Peak] | None = None
    ) -> tuple[dict[str, int], ...]:
        """Bytes by kind (`plan.MEMORY_KINDS`) of every stage of the model. ``peaks``: if they are known."""
        found: list[dict[str, int]] = [{} for _ in stages]
        for own, peak in zip(stages_of(self._rule.name, self.pp, self.vpp), peaks or self.peaks(stages), strict=True):
            for stage, gradients in zip(own, peak.gradients, strict=True):
                found[stage] = {**self._resident(stages[stage]), "gradients": round(gradients)}
            spare = max(0, round(peak.total) - sum(sum(found[stage].values()) for stage in own))
            for stage, kept in zip(own, peak.flying, strict=True):
                found[stage]["activations"] = min(spare, round(kept))
                spare -= found[stage]["activations"]
            for stage in own:
                found[stage]["transient"] = spare if stage == own[0] else 0
                found[stage]["reserve"] = self.reserve if stage == own[0] else 0
        return tuple({kind: held[kind] for kind in MEMORY_KINDS} for held in found)

    def hosts(self, stages: Sequence[Sequence[BlockBytes]]) -> tuple[int, ...]:
        """Bytes of every rank that wait on the host: with state offload its shards of parameters, gradients and
        optimizer state, and what blocks moved there of the micro-batches in flight."""
        found = [0.0] * self.pp
        for stage, blocks in enumerate(stages):
            state = sum(self.host_state(block.own, block.own_trains) for block in blocks)
            moved = sum(block.hosted for block in blocks)
            found[self.rank_of(stage)] += state + (self.in_flight(stage) * moved if moved else 0)
        return tuple(map(round, found))

    def host_state(self, elements: float, trains: float) -> float:
        """Bytes of so many elements' state that wait on the host; ``trains``: of them, those that train."""
        shard = self.job.master_bytes / self.shards if self.offload == "state" else 0.0
        return shard * (elements + (1 + self.job.moments) * trains)

    @property
    def _rule(self) -> Schedule:
        return SCHEDULES[self.schedule if self.pp > 1 else "none"]

    @property
    def _shard(self) -> float:
        """Bytes per element of what is sharded and waits for the optimizer."""
        return 0.0 if self.offload == "state" else self.job.master_bytes / self.shards

    @property
    def _partial(self) -> float:
        """Bytes per element of gradients that are reduced in one shard group only, or as they will stay."""
        return self.job.master_bytes / self.shards if self.replicas > 1 else self._shard

    def _peak(
        self, rank: int, own: Sequence[int], stages: Sequence[Sequence[BlockBytes]], known: dict[Any, Any]
    ) -> Peak:
        """``known``: what was found of equal stages."""
        table = moment_tables(self._rule.name, self.pp, self.vpp, self.micro_batches)[rank]
        still = sum(sum(self._resident(stages[stage]).values()) + self._received(stage) for stage in own)
        saved = np.array([sum(block.inflight for block in stages[stage]) for stage in own], dtype=float)
        waiting = np.array([sum(block.waiting for block in stages[stage]) for stage in own], dtype=float)
        backwards = []
        for stage in own:
            key = id(stages[stage]), self.splits and stage > 0
            if key not in known:
                known[key] = StageBackward(self, stages[stage], self.boundary, key[1])
            backwards.append(known[key])
        times, standing = [], [0.0] * len(own)
        for kind, place, done, last in table.begun:
            gradients, time = backwards[place].most(kind, done, last)
            standing[place] = max(standing[place], gradients)
            times.append(time)
        # The input a stage saves is its receive buffer.
        received = np.array([self.boundary if self._crosses(stage) else 0 for stage in own])
        kept = table.alive * (saved - received) + table.waiting * waiting
        rows = np.arange(len(kept))
        kept[rows, table.place] -= saved[table.place]
        sent = self._sent(own, table.alive, table.done)
        trains = [
            sum(block.own_trains for block in stages[stage]) + one.added
            for stage, one in zip(own, backwards, strict=True)
        ]
        shares = np.array(
            [
                [one.kept(done) * count + one.draining(done) for done in SHARES]
                for one, count in zip(backwards, trains, strict=True)
            ]
        )
        others = shares[np.arange(len(own)), table.share]
        others[rows, table.place] = 0.0
        begun = np.array([-np.inf if time is None else time.total for time in times])
        total = still + kept.sum(axis=1) + sent.sum(axis=1) + others.sum(axis=1) + begun[table.which]
        most = int(np.argmax(total))
        time = times[table.which[most]]
        if time is None:
            return Peak(0.0, [0.0] * len(own), standing)
        flying = kept[most] + sent[most] + [self._received(stage) for stage in own]
        flying[table.place[most]] += time.activations
        return Peak(float(total[most]), flying.tolist(), standing)

    def _resident(self, blocks: Iterable[BlockBytes]) -> dict[str, int]:
        """Bytes of parameters and optimizer of a stage."""
        blocks = tuple(blocks)
        plain, root = self.per_element(), self.per_element(root=True)
        bytes_of = {"parameters": 0.0, "optimizer": 0.0}
        for block in blocks:
            held = root if block.root else plain
            bytes_of["parameters"] += held["parameters"] * block.own
            bytes_of["parameters"] += self.staying(block.own) if block.gathered and not block.root else 0.0
            bytes_of["optimizer"] += held["optimizer"] * block.own_trains
            if block.expert and self.ep > 1:
                thin = self.experts.per_element(block.root)
                for kind in bytes_of:
                    bytes_of[kind] += (thin[kind] - held[kind]) * block.expert
        return {kind: round(found) for kind, found in bytes_of.items()}
