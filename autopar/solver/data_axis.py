"""What the data axis adds to a stage's seconds: FSDP2's gathers, reductions, copies; hidden where compute hides them.

As executed (FSDP2 of torch 2.13 on one data axis; a group per block and a root group, `groups.py`; see
`codegen/runtime/sharding.py` and `step.py`):

    zero  stages  parameters gathered                       gradients reduced
    0     1       locally (cast and copied), each micro-b.  all-reduce of master dtype at the last micro-batch, block by
                                                            block under its backward
    3     1       over dp, for each forward and backward;   reduce-scatter at each micro-batch, under the backward
                  the root group for each forward only
    0     > 1     locally, once a step                      all-reduce after the last backward, exposed
    3     > 1     over dp, once a step (in the first        reduce-scatter after the last backward, exposed
                  forward; nothing is resharded before
                  the last backward)

The root group's gather begins the forward and nothing hides it; its reduction follows the last block's backward.

Hidden communication has a budget: gathers and reductions of one data axis share one channel (one communicator), run in
the order in which FSDP2 issues them, and a block's compute waits for its gather. A gather is issued when the block
before it starts. So what is hidden never exceeds the compute it runs beside (`hidden_forward`, `hidden_backward`).

Copies, in bytes per parameter element held on the model axes (M master, C compute bytes): gather: M + C cast on the
shard, 2C out of the gathered buffer (and 2C in place of the network when dp is 1); each backward: C + M into the
reduction, or C + 2M when the gradient is accumulated for a later one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autopar.solver.collective_costs import CollectiveCosts
from autopar.solver.op_costs import OpCosts


@dataclass(frozen=True, slots=True)
class BlockTime:
    """One block on one rank: its own seconds per micro-batch, parameter elements held on the model axes, and whether
    it is in the root group."""

    forward_s: float
    backward_s: float
    elements: int
    root: bool = False


@dataclass(frozen=True, slots=True)
class DataTimes:
    """A stage's seconds with the data axis: per micro-batch, extra in the first forward and last backward, reductions
    after the last micro-batch (exposed), optimizer and clipping. ``exposed_s``: communication per micro-batch seen."""

    forward_s: float
    backward_s: float
    first_s: float
    last_s: float
    reduce_s: float
    optimizer_s: float


@dataclass(frozen=True, slots=True)
class DataAxis:
    """``size`` data ranks ``stride`` ranks apart, under ZeRO level ``zero``; ``pipelined``: more than one stage."""

    ops: OpCosts
    collectives: CollectiveCosts
    size: int
    stride: int
    zero: int
    pipelined: bool
    micro_batches: int

    @property
    def sharded(self) -> bool:
        return self.zero == 3

    def gather_s(self, elements: int) -> float:
        """Network seconds to gather a block's parameters in compute dtype."""
        if not self.sharded:
            return 0.0
        return self.collectives.seconds("all_gather", elements * self.ops.job.compute_bytes, self.size, self.stride)

    def reduce_s(self, elements: int) -> float:
        """Network seconds to reduce a block's gradients in master dtype."""
        kind = "reduce_scatter" if self.sharded else "all_reduce"
        return self.collectives.seconds(kind, elements * self.ops.job.master_bytes, self.size, self.stride)

    def gather_copy_s(self, elements: int) -> float:
        """Seconds of the local copies of one gather."""
        master, compute = self.ops.job.master_bytes, self.ops.job.compute_bytes
        shards = self.size if self.sharded else 1
        cast = (master + compute) * elements / shards if master != compute else 0.0
        local = 2 * compute * elements if shards == 1 else 0.0
        return stream_seconds(self.ops, cast + local + 2 * compute * elements, 3)

    def reduce_copy_s(self, elements: int) -> float:
        """Seconds per backward of handing the gradients on to the reduction or the accumulated gradient."""
        master, compute = self.ops.job.master_bytes, self.ops.job.compute_bytes
        deferred = (self.pipelined or not self.sharded) and self.micro_batches > 1
        return stream_seconds(self.ops, (compute + (2 if deferred else 1) * master) * elements, 1)

    def least_copies_s(self, elements: float, root: bool = False) -> float:
        """Seconds per micro-batch of all copies beside one C + M per backward, launches left out, so that it is linear
        in ``elements`` and may stand in bounds. ``root``: of elements that may be in the root group."""
        master, compute = self.ops.job.master_bytes, self.ops.job.compute_bytes
        shards = self.size if self.sharded else 1
        cast = (master + compute) / shards if master != compute else 0.0
        gather = cast + (4 if shards == 1 else 2) * compute
        gathers = 0 if self.pipelined else 2 if self.sharded and not root else 1
        deferred = (self.pipelined or not self.sharded) and self.micro_batches > 1
        return stream_seconds(self.ops, (gathers * gather + (master if deferred else 0)) * elements)

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
        forward = [block.forward_s for block in blocks]
        backward = [block.backward_s + copy for block, copy in zip(blocks, reduce_copies, strict=True)]
        elements = rooted + sum(own)
        share = elements / self.size if self.sharded else elements
        optimizer = self.ops.optimizer_seconds(int(share)) + self.ops.clip_seconds(int(share))
        none = [0.0] * len(blocks)
        plain = sum(backward) + root_reduce_copy
        copied = [f + copy for f, copy in zip(forward, gather_copies, strict=True)]
        gathered = root_gather + root_gather_copy + hidden_forward(copied, gathers)
        if self.pipelined:
            return DataTimes(sum(forward), plain, gathered - sum(forward), 0.0, sum(reduces) + root_reduce, optimizer)
        if self.sharded:
            backward = [b + copy for b, copy in zip(backward, gather_copies, strict=True)]
            reduced = hidden_backward(backward, gathers, reduces, root_reduce_copy, root_reduce)
            return DataTimes(gathered, reduced, 0.0, 0.0, 0.0, optimizer)
        last = hidden_backward(backward, none, reduces, root_reduce_copy, root_reduce) - plain
        return DataTimes(gathered, plain, 0.0, last, 0.0, optimizer)


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
