"""What data ranks add to a stage's seconds: FSDP2's gathers, reductions, copies; hidden where compute hides them.

As executed (FSDP2 of torch 2.13 on the data ranks, dp x cp flattened; a group per block and a root group, `groups.py`;
see `codegen/runtime/sharding.py` and `step.py`). What is sharded is so over shard groups, ``fsdp`` neighbouring data
ranks, ``stride`` (the size of tp) ranks apart; groups are replicas of each other, stride x fsdp ranks apart.

    zero  parameters gathered                               gradients reduced
    0     locally (cast and copied): in each micro-batch    all-reduce of master dtype over all data ranks, at the last
          without stages, else once a step                  micro-batch
    1     over the shard group, once a step (nothing is     reduce-scatter over the shard group, then all-reduce of the
          resharded before its end)                         shard across replicas, at the last micro-batch
    2     as 1                                              as 1, at each micro-batch
    3     over the shard group, for each forward and        as 1, at each micro-batch
          backward; the root group for each forward only

Reductions run block by block under the backward. Only where stock pipelining defers them, under zero 0 and 1 with
stages, they follow a stage's last backward, exposed. With several stages on a rank, gathers start together when the
step begins, in the order of the stages, and a stage starts when all of its own have arrived (``gather_s``; zero 0 and
1; the schedule does not see the groups of 2 and 3).

The root group's gather begins the forward and nothing hides it; its reduction follows the last block's backward.

Hidden communication has a budget: gathers and reductions of one stage share one channel (one communicator), run in
the order in which FSDP2 issues them, and a block's compute waits for its gather. A gather is issued when the block
before it starts. So what is hidden never exceeds the compute it runs beside (`hidden_forward`, `hidden_backward`).

Copies, in bytes per parameter element held on the model axes (M master, C compute bytes): gather: M + C cast on the
shard, 2C out of the gathered buffer (and 2C in place of the network when the shard group is one rank); each backward:
C + M into the reduction, or C + 2M when the gradient is accumulated for a later one.

State offload: every gather first brings the shard from the host, and every reduction takes its shard there
(`Device.host_bandwidth`; both count as part of the channel), and AdamW runs on the host: memory-bound as on the device,
at `Device.host_memory_bandwidth`. A shard that is reduced in several micro-batches is added to what waits on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from autopar.solver.collective_costs import CollectiveCosts
from autopar.solver.op_costs import OpCosts
from autopar.solver.simulate import StageTimes


@dataclass(frozen=True, slots=True)
class BlockTime:
    """One block on one rank: its own seconds per micro-batch, parameter elements held on the model axes, and whether
    it is in the root group. ``weight_s``: of the backward, the part that gives weight gradients alone."""

    forward_s: float
    backward_s: float
    elements: int
    root: bool = False
    weight_s: float = 0.0


@dataclass(frozen=True, slots=True)
class DataTimes:
    """A stage's seconds with the data axis: per micro-batch, extra in the first forward and last backward, reductions
    after the last micro-batch (exposed), optimizer and clipping. ``weight_s``: of the backward, the part that gives
    weight gradients alone; ``gather_s``: gathers that start with the step and that the first forward waits for."""

    forward_s: float
    backward_s: float
    first_s: float
    last_s: float
    reduce_s: float
    optimizer_s: float
    weight_s: float = 0.0
    gather_s: float = 0.0


@dataclass(frozen=True, slots=True)
class DataAxis:
    """``size`` data ranks ``stride`` ranks apart, under ZeRO level ``zero`` over groups of ``fsdp``; ``pp``: ranks of
    the pipeline, ``vpp``: stages on each of them; ``offload``: "none" or "state"."""

    ops: OpCosts
    collectives: CollectiveCosts
    size: int
    stride: int
    zero: int
    fsdp: int
    pp: int
    micro_batches: int
    vpp: int = 1
    offload: str = "none"

    @property
    def pipelined(self) -> bool:
        return self.pp > 1

    @property
    def shards(self) -> int:
        """Ranks that what the optimizer keeps is split over."""
        return self.fsdp if self.zero else 1

    @property
    def defers(self) -> bool:
        """Whether gradients are reduced once a step."""
        return self.zero <= 1

    @property
    def exposes(self) -> bool:
        """Whether reductions follow the last backward of a stage."""
        return self.pipelined and self.defers

    @property
    def gathers_each(self) -> bool:
        """Whether each micro-batch gathers, be it locally."""
        return self.zero == 3 or (self.zero == 0 and not self.pipelined)

    @property
    def accumulates(self) -> bool:
        """Whether whole gradients wait for a later micro-batch's."""
        return self.defers and self.micro_batches > 1

    def gather_s(self, elements: int) -> float:
        """Network seconds to gather a block's parameters in compute dtype."""
        if not elements:
            return 0.0
        seconds = self._host_s(elements)
        if self.shards > 1:
            nbytes = elements * self.ops.job.compute_bytes
            seconds += self.collectives.seconds("all_gather", nbytes, self.fsdp, self.stride)
        return seconds

    def reduce_s(self, elements: int) -> float:
        """Network seconds to reduce a block's gradients in master dtype."""
        if not elements:
            return 0.0
        nbytes = elements * self.ops.job.master_bytes
        shards, seconds = self.shards, 0.0
        if shards > 1:
            seconds += self.collectives.seconds("reduce_scatter", nbytes, shards, self.stride)
        if self.size > shards:
            seconds += self.collectives.seconds(
                "all_reduce", nbytes / shards, self.size // shards, self.stride * shards
            )
        return seconds + self._host_s(elements) + self._host_sum_s(elements)

    def gather_copy_s(self, elements: int) -> float:
        """Seconds of the local copies of one gather."""
        master, compute = self.ops.job.master_bytes, self.ops.job.compute_bytes
        cast = (master + compute) * elements / self.shards if master != compute else 0.0
        local = 2 * compute * elements if self.shards == 1 else 0.0
        return stream_seconds(self.ops, cast + local + 2 * compute * elements, 3)

    def reduce_copy_s(self, elements: int) -> float:
        """Seconds per backward of handing the gradients on to the reduction or the accumulated gradient."""
        master, compute = self.ops.job.master_bytes, self.ops.job.compute_bytes
        return stream_seconds(self.ops, (compute + (2 if self.accumulates else 1) * master) * elements, 1)

    def optimizer_s(self, elements: float) -> float:
        """Seconds of clipping and the optimizer for so many elements held on the model axes."""
        share = int(elements / self.shards)
        if self.offload != "state":
            return self.ops.optimizer_seconds(share) + self.ops.clip_seconds(share)
        device, job = self.ops.device, self.ops.job
        # As `OpCosts` counts them: the optimizer reads and writes 3 + 2 k tensors, clipping 3.
        return (3 + 2 * job.moments + 3) * share * job.master_bytes / device.host_memory_bandwidth if share else 0.0

    def least_copies_s(self, elements: float, root: bool = False) -> float:
        """Seconds per micro-batch of all copies beside one C + M per backward, launches left out, so that it is linear
        in ``elements`` and may stand in bounds. ``root``: of elements that may be in the root group."""
        master, compute = self.ops.job.master_bytes, self.ops.job.compute_bytes
        cast = (master + compute) / self.shards if master != compute else 0.0
        gather = cast + (4 if self.shards == 1 else 2) * compute
        gathers = (2 if self.zero == 3 and not root else 1) if self.gathers_each else 0
        return stream_seconds(self.ops, (gathers * gather + (master if self.accumulates else 0)) * elements)

    def stage(self, blocks: Sequence[BlockTime]) -> DataTimes:
        """Seconds of a stage that holds ``blocks``."""
        own = [0 if block.root else block.elements for block in blocks]
        rooted = sum(block.elements for block in blocks if block.root)
        gathers, gather_copies, reduces, reduce_copies = (
            [seconds(elements) if elements else 0.0 for elements in (*own, rooted)]
            for seconds in (self.gather_s, self.gather_copy_s, self.reduce_s, self.reduce_copy_s)
        )
        root_gather, root_reduce = gathers.pop(), reduces.pop()
        root_gather_copy, root_reduce_copy = gather_copies.pop(), reduce_copies.pop()
        weights = sum(block.weight_s for block in blocks) + sum(reduce_copies) + root_reduce_copy
        forward = [block.forward_s for block in blocks]
        backward = [block.backward_s + copy for block, copy in zip(blocks, reduce_copies, strict=True)]
        optimizer = self.optimizer_s(rooted + sum(own))
        none = [0.0] * len(blocks)
        compute, plain = sum(forward), sum(backward) + root_reduce_copy
        copied = [f + copy for f, copy in zip(forward, gather_copies, strict=True)]
        gathered = root_gather + root_gather_copy + hidden_forward(copied, gathers)
        if self.exposes:
            exposed = sum(reduces) + root_reduce
            if self.vpp > 1:
                copies = sum(gather_copies) + root_gather_copy
                waits = sum(gathers) + root_gather
                return DataTimes(compute, plain, copies, 0.0, exposed, optimizer, weights, waits)
            return DataTimes(compute, plain, gathered - compute, 0.0, exposed, optimizer, weights)
        if self.zero == 3:
            backward = [b + copy for b, copy in zip(backward, gather_copies, strict=True)]
        again = gathers if self.zero == 3 else none
        reduced = hidden_backward(backward, again, reduces, root_reduce_copy, root_reduce)
        if self.zero == 3:
            return DataTimes(gathered, reduced, 0.0, 0.0, 0.0, optimizer)
        # What one micro-batch sees of it, and every one: gathers once or each time, reductions once or each time.
        each, first = (gathered, 0.0) if self.gathers_each else (compute, gathered - compute)
        if self.defers:
            return DataTimes(each, plain, first, reduced - plain, 0.0, optimizer)
        return DataTimes(each, reduced, first, 0.0, 0.0, optimizer)

    def _host_s(self, elements: float) -> float:
        """Seconds to copy this rank's shard of master elements between host and device."""
        if self.offload != "state":
            return 0.0
        return elements / self.shards * self.ops.job.master_bytes / self.ops.device.host_bandwidth

    def _host_sum_s(self, elements: float) -> float:
        """Seconds to add a reduced shard to the one on the host, where several micro-batches reduce."""
        if self.offload != "state" or self.defers or self.micro_batches == 1:
            return 0.0
        return 3 * elements / self.shards * self.ops.job.master_bytes / self.ops.device.host_memory_bandwidth


def stage_events(times: Sequence[DataTimes], owned: Sequence[Sequence[int]]) -> list[StageTimes]:
    """What the simulator replays; ``owned``: the stages of each rank, whose gathers begin the step in turn."""
    ready = [0.0] * len(times)
    for own in owned:
        for stage, arrived in zip(own, accumulate(times[stage].gather_s for stage in own), strict=True):
            ready[stage] = arrived
    return [
        StageTimes(t.forward_s, t.backward_s, t.weight_s, t.first_s, t.last_s, t.reduce_s, at)
        for t, at in zip(times, ready, strict=True)
    ]


def stream_seconds(ops: OpCosts, nbytes: float, kernels: int = 0) -> float:
    """Seconds to read and write ``nbytes`` of memory, caches left out: linear, so that it may stand in bounds."""
    device = ops.device
    return nbytes / (device.memory_bandwidth * device.memory_efficiency) + kernels * device.launch_s


def hidden_forward(compute: Sequence[float], gathers: Sequence[float]) -> float:
    """Seconds of a forward whose block i waits for gather i, issued when block i-1 starts."""
    channel = now = started = 0.0
    for seconds, gather in zip(compute, gathers, strict=True):
        channel = max(channel, started) + gather
        started = max(now, channel)
        now = started + seconds
    return now


def hidden_backward(
    compute: Sequence[float],
    gathers: Sequence[float],
    reduces: Sequence[float],
    after: float = 0.0,
    reduce_after: float = 0.0,
) -> float:
    """Seconds of a backward, last block first: the gather of the next block is issued when a block starts, its
    reduction when it has ended; both in one channel. ``after``: seconds once all have ended, then a last reduction."""
    now = 0.0
    channel = ready = gathers[-1] if gathers else 0.0
    for index in range(len(compute) - 1, -1, -1):
        started = max(now, ready)
        if index:
            channel = max(channel, started) + gathers[index - 1]
            ready = channel
        now = started + compute[index]
        if reduces[index]:
            channel = max(channel, now) + reduces[index]
    now += after
    if reduce_after:
        channel = max(channel, now) + reduce_after
    return max(now, channel)
