"""What data ranks add to a stage's seconds: FSDP2's gathers, reductions, copies; hidden where compute hides them.

As executed (FSDP2 of torch 2.13 on the data ranks, dp x cp flattened; a group per block and a root group, `groups.py`;
see `codegen/runtime/sharding.py` and `step.py`). What is sharded is so over shard groups, ``fsdp`` neighbouring data
ranks; groups are replicas of each other. How far apart these ranks are follows from the order of the mesh axes
(`Mesh.data_span`).

    zero  parameters gathered                               gradients reduced
    0     locally (cast and copied), once a step            all-reduce of master dtype over all data ranks, in the last
                                                            backward
    1     over the shard group, once a step (nothing is     reduce-scatter over the shard group, in the last backward
          resharded before its end)
    2     as 1                                              reduce-scatter in each backward
    3     over the shard group, for each forward and        as 2
          backward; for each forward only: the root group,
          and blocks that no gradient passes (``still``);
          once a step: the root group of a stage of those, and blocks that stay ``gathered`` (as all do under 2)

Replicas of shard groups add up their shards once, in the last backward. Reductions run block by block under the
backward, with stages and without: schedules do not see the groups. Only those that halve backwards (zero 0 and 1)
reduce after a stage's last backward, exposed.

The root group's gather begins the forward and nothing hides it; its reduction follows the last block's backward.

With stages (``staged``), levels 1 and 2 gather all of a rank's stages as the step begins, one group after the other
(`DataAxis.ahead`), and level 1 leaves the reductions of a stage's last backward to themselves until the step ends
(`DataAxis.drains`): the gradient goes on to the stage before, and the rank to its other stages, meanwhile.

A stack that does not prefetch (`Stack.prefetches`) gathers what it gathers once a step before the first forward.

Hidden communication has a budget: gathers and reductions of one stage share one channel (one communicator), run in
the order in which FSDP2 issues them, and a block's compute waits for its gather. A gather is issued when the block
before it starts. So what is hidden never exceeds the compute it runs beside (`hidden_forward`, `hidden_backward`).

Copies, in bytes per parameter element held on the model axes (M master, C compute bytes): gather: M + C cast on the
shard, 2C out of the gathered buffer (and 2C in place of the network when the shard group is one rank); each backward:
C + M into the reduction, or C + 2M when the gradient is accumulated for a later one.

Where ``ep`` ranks share the experts of mixtures, these make a group of their own in their block, over the data ranks
that hold the same ones (`codegen/runtime/meshes.py`); its collectives come after those of the other group.

State offload: every gather first brings the shard from the host, and every reduction takes its shard there
(`Device.host_bandwidth`; both count as part of the channel), and the optimizer runs on the host: memory-bound as on
the device, at `Device.host_memory_bandwidth`. A shard that is reduced in several micro-batches is added to what waits
on the host; where replicas still have to add theirs, it stays on the device until the last. Under zero 3 shards come
to the device for a backward over the link that brings back what blocks saved: a block's backward is no shorter than
both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod

from autopar.mesh import Span, cut
from autopar.schedule import SCHEDULES
from autopar.solver.collective_costs import CollectiveCosts
from autopar.solver.hiding import hidden_backward, hidden_forward, ready_forward
from autopar.solver.op_costs import OpCosts
from autopar.solver.simulate import StageTimes


@dataclass(frozen=True, slots=True)
class BlockTime:
    """One block on one rank: its own seconds per micro-batch, parameter elements held on the model axes, and whether
    it is in the root group. ``weight_s``: of the backward, the part that gives weight gradients alone. ``frozen``: of
    the elements, those that do not train: gathered like the others, but without a gradient to reduce. ``still``: no
    gradient passes the block (`ir.BlockKind.passes_gradient`), so it has no backward. ``fetched_s``: seconds in which
    what it saved comes back from the host. ``expert``: of the elements, those of experts that data ranks share.
    ``gathered``: under zero 3, its parameters stay gathered through the step."""

    forward_s: float
    backward_s: float
    elements: int
    root: bool = False
    weight_s: float = 0.0
    frozen: int = 0
    still: bool = False
    fetched_s: float = 0.0
    expert: int = 0
    gathered: bool = False

    @property
    def trains(self) -> int:
        """Elements that train."""
        return self.elements - self.frozen


@dataclass(frozen=True, slots=True)
class DataTimes:
    """A stage's seconds with the data axis: per micro-batch, extra in the first forward and last backward, reductions
    after the last micro-batch (exposed), optimizer and clipping. ``weight_s``: of the backward, the part that gives
    weight gradients alone.

    ``gathers_s``, ``gathered_s``: if gathered as the step begins, seconds of all its gathers, and when its first
    forward can have ended at the earliest after they begin. ``reduces_s``: if they drain, seconds of the last
    backward's reductions; ``last_s`` is then how long they go on after it."""

    forward_s: float
    backward_s: float
    first_s: float
    last_s: float
    reduce_s: float
    optimizer_s: float
    weight_s: float = 0.0
    gathers_s: float = 0.0
    gathered_s: float = 0.0
    reduces_s: float = 0.0


@dataclass(frozen=True, slots=True)
class GroupTimes:
    """Seconds of what FSDP2's groups do, a block each (0 where it has none of its own), the root group's last: network
    seconds of gathers, of reductions inside a shard group and across replicas, and of the copies around them."""

    gathers: list[float]
    gather_copies: list[float]
    scatters: list[float]
    replicates: list[float]
    reduce_copies: list[float]


@dataclass(frozen=True, slots=True)
class DataAxis:
    """The data ranks that make a span, under ZeRO level ``zero`` over groups of ``fsdp``; ``halves``: whether the
    schedule halves backwards; ``offload``: "none" or "state"; ``staged``: whether the model is cut into stages on
    several ranks. ``spans``: that one, or several for bounds that take the least of any. ``experts``: the data ranks
    that hold the same experts, where ``ep`` of them share these (`with_experts`)."""

    ops: OpCosts
    collectives: CollectiveCosts
    spans: tuple[Span, ...]
    zero: int
    fsdp: int
    micro_batches: int
    halves: bool = False
    offload: str = "none"
    staged: bool = False
    experts: DataAxis | None = None
    _figures: dict[tuple[str, int, int], float] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def shards(self) -> int:
        """Ranks that what the optimizer keeps is split over."""
        return self.fsdp if self.zero else 1

    @property
    def replicas(self) -> int:
        """Ranks that keep the same."""
        return prod(size for size, _ in self.spans[0]) // self.shards

    @property
    def defers(self) -> bool:
        """Whether gradients are reduced once a step."""
        return self.zero <= 1

    @property
    def exposes(self) -> bool:
        """Whether reductions follow the last backward of a stage, and what comes next waits for them."""
        return self.defers and not self.drains and (self.halves or not self.ops.stack.overlaps)

    @property
    def gathers_each(self) -> bool:
        """Whether each micro-batch gathers what is not kept gathered."""
        return self.zero == 3

    @property
    def accumulates(self) -> bool:
        """Whether whole gradients wait for a later micro-batch's."""
        return self.defers and self.micro_batches > 1

    @property
    def ahead(self) -> bool:
        """Whether all that a rank keeps whole is gathered as the step begins."""
        return self.staged and self.zero in (1, 2)

    @property
    def drains(self) -> bool:
        """Whether nothing but the end of the step waits for the last reductions. Their inputs, which take the place of
        whole gradients that waited, are held until then."""
        late = self.halves or self.micro_batches > 1
        return self.staged and self.zero == 1 and late and self.ops.stack.overlaps

    def gather_s(self, elements: int) -> float:
        """Network seconds to gather a block's parameters in compute dtype."""
        if not elements:
            return 0.0
        seconds = self._host_s(elements)
        if self.shards > 1:
            nbytes = elements * self.ops.job.compute_bytes
            seconds += self._shared_s("all_gather", nbytes)
        return seconds

    def reduce_s(self, elements: int) -> float:
        """Network seconds to reduce a block's gradients in master dtype, all of it."""
        return self.scatter_s(elements) + self.replicate_s(elements)

    def scatter_s(self, elements: int) -> float:
        """Of these, inside a shard group: what zero 2 and 3 do in every micro-batch."""
        if not elements:
            return 0.0
        nbytes = elements * self.ops.job.gradient_bytes
        seconds = 0.0
        if self.shards > 1:
            seconds += self._shared_s("reduce_scatter", nbytes)
        if self.replicas > 1:
            return seconds
        # A shard that is whole leaves for the host, and is added to what is there if it is not the only one.
        again = not self.defers and self.micro_batches > 1
        return seconds + self._host_s(elements) + (self._host_sum_s(elements) if again else 0.0)

    def replicate_s(self, elements: int) -> float:
        """Of these, across replicas: once a step."""
        if not elements or self.replicas == 1:
            return 0.0
        nbytes = elements * self.ops.job.gradient_bytes / self.shards
        across = min(self.collectives.over("all_reduce", nbytes, cut(span, self.shards)[1]) for span in self.spans)
        return across + self._host_s(elements)

    def gather_copy_s(self, elements: int) -> float:
        """Seconds of the local copies of one gather."""
        master, compute = self.ops.job.master_bytes, self.ops.job.compute_bytes
        cast = (master + compute) * elements / self.shards if master != compute else 0.0
        local = 2 * compute * elements if self.shards == 1 else 0.0
        return self._copied_s(cast + local + 2 * compute * elements, 3)

    def reduce_copy_s(self, elements: int) -> float:
        """Seconds per backward of handing the gradients on to the reduction or the accumulated gradient."""
        master, compute = self.ops.job.master_bytes, self.ops.job.compute_bytes
        handed = self._copied_s((compute + (2 if self.accumulates else 1) * master) * elements, 1)
        return handed + self._added_s(elements)

    def _added_s(self, elements: int) -> float:
        """Seconds per backward, on average over a step, of the kernels that add a micro-batch's gradients to those of
        the ones before (`Stack.adds`); where they are widened, the first is added too."""
        if not self.ops.stack.adds or not self.defers or not elements:
            return 0.0
        compute, wide = self.ops.job.compute_bytes, self.ops.job.gradient_bytes
        added = 1.0 if wide > compute else 1 - 1 / self.micro_batches
        return stream_seconds(self.ops, added * (compute + 2 * wide) * elements, 1) if added else 0.0

    def optimizer_s(self, elements: float) -> float:
        """Seconds of clipping and the optimizer where so many of the elements held on the model axes train."""
        share = int(elements / self.shards)
        if self.offload != "state":
            return self.ops.optimizer_seconds(share) + self.ops.clip_seconds(share)
        device, job = self.ops.device, self.ops.job
        # As `OpCosts` counts them: the optimizer reads and writes 3 + 2 k tensors, clipping 3.
        return (3 + 2 * job.moments + 3) * share * job.master_bytes / device.host_memory_bandwidth if share else 0.0

    def least_copies_s(
        self, elements: float, root: bool = False, frozen: float = 0.0, still: float = 0.0, gathered: float = 0.0
    ) -> float:
        """Seconds per micro-batch of all copies beside one C + M per backward, launches left out, so that it is linear
        in ``elements`` and may stand in bounds. ``root``: of elements that may be in the root group; ``frozen``: how
        many of them do not train; ``still``: how many are in blocks that no gradient passes; ``gathered``: which share
        of them may stay gathered."""
        master, compute = self.ops.job.master_bytes, self.ops.job.compute_bytes
        cast = (master + compute) / self.shards if master != compute else 0.0
        gather = cast + (4 if self.shards == 1 else 2) * compute
        each = ((1 if root else 2) * elements - still) * (1 - gathered) if self.gathers_each else 0.0
        accumulated = (master if self.accumulates else 0) * (elements - frozen)
        return self._copied_s(gather * each + accumulated)

    def _copied_s(self, nbytes: float, kernels: int = 0) -> float:
        """Seconds of copies around collectives, as many as the stack makes."""
        return self.ops.stack.copies * stream_seconds(self.ops, nbytes, kernels)

    def of(self, seconds: str, elements: int, expert: int) -> float:
        """A figure of this class (by its method's name) for ``elements`` of which ``expert`` are experts': these are a
        group of their own, over their own ranks."""
        key = (seconds, elements, expert)
        found = self._figures.get(key)
        if found is None:
            found = self._figures[key] = self._of(seconds, elements, expert)
        return found

    def _of(self, seconds: str, elements: int, expert: int) -> float:
        if self.experts is None or not expert:
            return float(getattr(self, seconds)(elements))
        others = getattr(self, seconds)(elements - expert) if elements > expert else 0.0
        return float(others + getattr(self.experts, seconds)(expert))

    def groups(self, blocks: Sequence[BlockTime]) -> GroupTimes:
        """Of the groups of a stage that holds ``blocks``."""
        held = [0 if block.root else block.elements for block in blocks]
        held.append(sum(block.elements for block in blocks if block.root))
        trains = [0 if block.root else block.trains for block in blocks]
        trains.append(sum(block.trains for block in blocks if block.root))
        shared = [0 if block.root else block.expert for block in blocks]
        shared.append(sum(block.expert for block in blocks if block.root))
        gathers, gather_copies = (
            [self.of(what, n, expert) if n else 0.0 for n, expert in zip(held, shared, strict=True)]
            for what in ("gather_s", "gather_copy_s")
        )
        scatters, replicates, reduce_copies = (
            [self.of(what, n, expert) if n else 0.0 for n, expert in zip(trains, shared, strict=True)]
            for what in ("scatter_s", "replicate_s", "reduce_copy_s")
        )
        return GroupTimes(gathers, gather_copies, scatters, replicates, reduce_copies)

    def stage(self, blocks: Sequence[BlockTime]) -> DataTimes:
        """Seconds of a stage that holds ``blocks``."""
        groups = self.groups(blocks)
        gathers, gather_copies, reduce_copies = groups.gathers, groups.gather_copies, groups.reduce_copies
        scatters = groups.scatters
        reduces = [one + other for one, other in zip(scatters, groups.replicates, strict=True)]
        root_gather, root_gather_copy = gathers.pop(), gather_copies.pop()
        root_scatter, root_reduce, root_reduce_copy = scatters.pop(), reduces.pop(), reduce_copies.pop()
        weights = sum(block.weight_s for block in blocks) + sum(reduce_copies) + root_reduce_copy
        forward = [block.forward_s for block in blocks]
        backward = [block.backward_s + copy for block, copy in zip(blocks, reduce_copies, strict=True)]
        optimizer = self.of("optimizer_s", sum(block.trains for block in blocks), sum(block.expert for block in blocks))
        compute, plain = sum(forward), sum(backward) + root_reduce_copy
        copied = [f + copy for f, copy in zip(forward, gather_copies, strict=True)]
        rooted, hidden = root_gather + root_gather_copy, hidden_forward(copied, gathers)
        # What a micro-batch gathers, and copies for it; others only the first.
        freed = [self.gathers_each and not block.gathered for block in blocks]
        again, copies = (
            [seconds if free else 0.0 for seconds, free in zip(some, freed, strict=True)]
            for some in (gathers, gather_copies)
        )
        before = not self.ops.stack.prefetches
        gathers_s = gathered_s = 0.0
        if self.ahead:
            each, first = compute, root_gather_copy + sum(gather_copies)
            gathers_s = root_gather + sum(gathers)
            gathered_s = ready_forward([root_gather_copy, *copied], [root_gather, *gathers])
            if before:
                gathered_s = gathers_s + root_gather_copy + sum(copied)
        elif not self.gathers_each:
            each, first = compute, rooted + (sum(gathers) + sum(copied) if before else hidden) - compute
        else:
            later = hidden_forward([f + copy for f, copy in zip(forward, copies, strict=True)], again)
            once = sum(gathers) - sum(again) + sum(gather_copies) - sum(copies) if before else hidden - later
            if all(block.still for block in blocks):  # the root group is freed by a backward, or at the step's end
                each, first = later, once + rooted
            else:
                each, first = rooted + later, once
        after = sum(reduces) + root_reduce
        if self.exposes:
            return DataTimes(each, plain, first, 0.0, after, optimizer, weights, gathers_s, gathered_s)
        if self.halves and self.drains:
            return DataTimes(each, plain, first, after, 0.0, optimizer, weights, gathers_s, gathered_s, after)
        again = [0.0 if block.still else gather for block, gather in zip(blocks, again, strict=True)]
        if self.gathers_each:
            copies = [0.0 if block.still else copy for block, copy in zip(blocks, copies, strict=True)]
            links = [
                self._host_s(block.elements) if gather else 0.0 for block, gather in zip(blocks, again, strict=True)
            ]
            backward = [
                max(b + copy, block.fetched_s + link if block.fetched_s else 0.0)
                for b, copy, block, link in zip(backward, copies, blocks, links, strict=True)
            ]
        last = hidden_backward(backward, again, reduces, root_reduce_copy, root_reduce)
        if not self.defers:
            plain = hidden_backward(backward, again, scatters, root_reduce_copy, root_scatter)
        reduces_s = after if self.drains else 0.0
        return DataTimes(each, plain, first, last - plain, 0.0, optimizer, weights, gathers_s, gathered_s, reduces_s)

    def _shared_s(self, kind: str, nbytes: float) -> float:
        """Seconds of a collective in every shard group."""
        return min(self.collectives.over(kind, nbytes, cut(span, self.shards)[0]) for span in self.spans)

    def _host_s(self, elements: float) -> float:
        """Seconds to copy this rank's shard of master elements between host and device."""
        if self.offload != "state":
            return 0.0
        return elements / self.shards * self.ops.job.master_bytes / self.ops.device.host_bandwidth

    def _host_sum_s(self, elements: float) -> float:
        """Seconds to add a reduced shard to the one on the host."""
        if self.offload != "state":
            return 0.0
        return 3 * elements / self.shards * self.ops.job.master_bytes / self.ops.device.host_memory_bandwidth


def with_experts(data: DataAxis, ep: int) -> DataAxis:
    """``data`` where groups of ``ep`` neighbours share the experts of mixtures: of a shard group, every ep-th rank has
    the same ones."""
    if ep == 1:
        return data
    spans = tuple(cut(span, ep)[1] for span in data.spans)
    return replace(data, experts=replace(data, spans=spans, fsdp=max(1, data.fsdp // ep)))


def stage_events(times: Sequence[DataTimes], schedule: str = "none", ranks: int = 1) -> list[StageTimes]:
    """What the simulator replays. A rank's stages are gathered one after the other, the first of the model first."""
    place, before = SCHEDULES[schedule].rank_of, [0.0] * ranks
    events = []
    for stage, t in enumerate(times):
        rank = place(stage, ranks) if ranks > 1 else 0
        ready = before[rank] + t.gathered_s if t.gathers_s else 0.0
        before[rank] += t.gathers_s
        events.append(
            StageTimes(t.forward_s, t.backward_s, t.weight_s, t.first_s, t.last_s, t.reduce_s, ready, t.reduces_s)
        )
    return events


def stream_seconds(ops: OpCosts, nbytes: float, kernels: int = 0) -> float:
    """Seconds to read and write ``nbytes`` of memory, caches left out: linear, so that it may stand in bounds."""
    device = ops.device
    return nbytes / (device.memory_bandwidth * device.memory_efficiency) + kernels * device.launch_s
