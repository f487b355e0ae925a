"""The stage problem that bounds are made of: the least seconds and the least bytes of every kind of block, as if one
decision had both, spread over the stages of one configuration or of all of a shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

from autopar.schedule import SCHEDULES
from autopar.solver.context import Context
from autopar.solver.data_axis import DataAxis
from autopar.solver.elements import blocks_held, least_elements, least_experts
from autopar.solver.evaluate import Placed, placed
from autopar.solver.halves import sure_halves
from autopar.solver.shardings import Shardings
from autopar.solver.space import Config
from autopar.solver.spread import KindRun, block_runs, overheads, staged
from autopar.solver.stages import BlockRun, Option, StageProblem


def least_problem(
    context: Context, configs: Sequence[Config], shardings: Shardings, sharp: bool = False
) -> StageProblem:
    """Stages of the least bytes and seconds of every kind, and of every configuration (all of one shape)."""
    if (tuple(configs), sharp) == context.memo.get("last problem", (None, None))[0]:
        return cast(StageProblem, context.memo["last problem"][1])
    problem = _least_problem(context, configs, shardings, sharp)
    context.memo["last problem"] = (tuple(configs), sharp), problem
    return problem


def _least_problem(context: Context, configs: Sequence[Config], shardings: Shardings, sharp: bool) -> StageProblem:
    bytes_of = shardings.kind_bytes()
    # Whatever passes between stages is split at most over the whole model axis.
    handed = int(min((least.inputs for least in bytes_of.values() if least.inputs), default=0))
    places = [placed(context, config, handed) for config in configs]
    config, pairs = configs[0], list(zip(configs, places, strict=True))
    halved = SCHEDULES[config.schedule].splits_backward
    runs = []
    for run in _runs(context, config):
        kind = run.kind
        elements = float(least_elements(context, config, run.start))
        trains = float(least_elements(context, config, run.start, trains=True))
        frozen = elements - trains
        passes = context.model.kinds[kind].passes_gradient or (run.root and config.pp == 1)
        still = 0.0 if passes else elements
        expert, root = float(least_experts(context, config, run.start)), run.root and run.sure
        copies = min(place.data.least_copies_s(elements, run.root, frozen, still) for place in places)
        if expert:
            copies += min((place.data.experts or place.data).least_copies_s(expert, run.root) for place in places)
        optimizer = min(_least_optimizer(context, one, place, trains, expert) for one, place in pairs)
        reduced = (place.data.of("reduce_s", int(trains + expert), int(expert)) for place in places)
        reduce = min(reduced) if all(place.data.exposes for place in places) else 0.0
        resident = min(place.memory.least_resident(elements + expert, root, frozen, expert) for place in places)
        sure = _sure_halves(context, config, kind) if halved else (0.0, 0.0)
        # The last block's backward runs first, when most is in flight; of others, less is by the time of theirs.
        is_last = run.start + run.count == len(context.model.blocks)
        first_back = is_last and config.vpp == 1 and not halved
        options = []
        for least in _choices(context, run, shardings, sharp):
            seconds = least.seconds + copies
            # The slowest forward and backward count apart under GPipe: only their sum is known.
            ahead = min(least.forward, seconds) if config.schedule != "gpipe" else 0.0
            back = seconds - ahead
            # Nothing is known of the halves of a backward: all of it may wait.
            options.append(
                Option(
                    least.choice,
                    ahead,
                    back,
                    resident,
                    least.kept,
                    least.needed if first_back else 0.0,
                    reduce,
                    optimizer,
                    weight_s=back,
                    either_s=max(0.0, back - least.backward),
                    sure_input_s=sure[0],
                    sure_weight_s=sure[1],
                )
            )
        runs.append(BlockRun(kind, run.count, tuple(options)))
    room = context.cluster.device.memory_bytes
    overhead = overheads(places[0], config, least=True)
    beside = [least_stage(context, one, place.data) for one, place in pairs]
    least_of = [min(seconds) for seconds in zip(*beside, strict=True)]
    problem = staged(context, config, places[0], runs, overhead, room, least_of)
    return replace(problem, transfer_s=min(place.transfer_s(least=True) for place in places))


def least_stage(context: Context, config: Config, data: DataAxis) -> tuple[float, float, float]:
    """Network seconds of one stage of several that nothing can hide, (each micro-batch, in the first forward, in the
    last backward): what is gathered before the first block begins, and what the block whose backward ends last
    reduces. It is not known which blocks these are: the least counts."""
    if config.pp == 1:
        return 0.0, 0.0, 0.0
    blocks = blocks_held(context, config)
    gather = min(data.of("gather_s", held, expert) for held, _, expert in blocks)
    scatter, replicate = (
        min(data.of(what, trained, expert) for _, trained, expert in blocks) for what in ("scatter_s", "replicate_s")
    )
    # A root group, which may be all that a stage has, is not gathered again for the backward.
    each = gather if data.gathers_each else 0.0
    once = 0.0 if data.gathers_each or data.ahead else gather
    if data.exposes or data.drains:  # what is reduced after the last backward counts with the blocks, or has no waiter
        return each, once, 0.0
    return (each, once, scatter + replicate) if data.defers else (each + scatter, once, replicate)


@dataclass(frozen=True, slots=True)
class _Least:
    """A recompute choice of a kind, whatever its sharding: no fewer ``seconds``, of which so many are surely
    ``forward`` and ``backward``; bytes ``kept``, and ``needed`` beside them."""

    choice: str
    seconds: float
    forward: float
    backward: float
    kept: float
    needed: float


def _runs(context: Context, config: Config) -> list[KindRun]:
    key = ("least runs", SCHEDULES[config.schedule].splits_backward, config.pp == 1)
    if key not in context.memo:
        context.memo[key] = block_runs(context, config, extended=True)
    return cast(list[KindRun], context.memo[key])


def _choices(context: Context, run: KindRun, shardings: Shardings, sharp: bool) -> tuple[_Least, ...]:
    """What a run's blocks may choose that no other choice undercuts, whatever is added to all alike."""
    key = ("least choices", run.kind, run.choices, sharp)
    found = shardings.memo.get(key)
    if found is None:
        found = shardings.memo[key] = _unbeaten([_least(shardings, run.kind, choice, sharp) for choice in run.choices])
    return cast(tuple[_Least, ...], found)


def _least(shardings: Shardings, kind: str, choice: str, sharp: bool) -> _Least:
    seconds, (forward, backward) = shardings.least_seconds(kind, choice, sharp), shardings.least_parts(kind, choice)
    kept, needed = shardings.least_kept(kind, choice), 0.0
    if shardings.size == 1:  # there is one decision, and these are its bytes
        cost = shardings.fastest().costs[kind][choice]
        kept, needed = float(cost.inflight), float(cost.transient)
    return _Least(choice, seconds, min(forward, seconds), backward, kept, needed)


def _unbeaten(choices: Sequence[_Least]) -> tuple[_Least, ...]:
    """Without those that another one takes no more seconds and bytes than, of whatever part of the block they are."""

    def entries(one: _Least) -> tuple[float, ...]:
        return one.forward, one.seconds - one.forward, one.backward, one.kept, one.needed

    kept: list[_Least] = []
    for place, one in enumerate(choices):
        mine = entries(one)
        others = (*kept, *choices[place + 1 :])
        if not any(all(a <= b for a, b in zip(entries(other), mine, strict=True)) for other in others):
            kept.append(one)
    return tuple(kept)


def _sure_halves(context: Context, config: Config, kind: str) -> tuple[float, float]:
    key = ("sure halves", kind, config.micro_batch, config.cp * config.tp)
    if key not in context.memo:
        seq, ranks = context.job.seq_len, config.cp * config.tp
        context.memo[key] = sure_halves(context.ops, context.model.kinds[kind], config.micro_batch, seq, ranks)
    first, second = context.memo[key]
    return float(first), float(second)


def _least_optimizer(context: Context, config: Config, place: Placed, trains: float, expert: float) -> float:
    """Seconds of the optimizer and clipping that grow with the elements a rank keeps, caches and launches left out."""
    device, job = context.cluster.device, context.job
    share = (trains + (expert * place.memory.thinner if expert else 0.0)) / place.memory.shards
    moved = (6 + 2 * job.moments) * share * job.master_bytes
    if config.offload == "state":
        return moved / device.host_memory_bandwidth
    return moved / max(device.memory_bandwidth, device.cache_bandwidth)
