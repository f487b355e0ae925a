"""The stage problem that bounds are made of: the least seconds and the least bytes of every kind of block, as if one
decision had both, spread over the stages of one configuration or of all of a shape.

Under ZeRO 2 and 3 each forward or backward of a stage also takes as long as what it gathers and reduces, one after the
other in one channel (`data_axis`): F >= max(sum f, sum g), B >= max(sum b, sum (g + r)). Where the network takes longer
in the whole model, its seconds stand for those of blocks, in forwards or in backwards; what comes on top is `Beside`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple, cast

import numpy as np

from autopar.schedule import SCHEDULES, stages_of
from autopar.solver.beside import least_besides, least_ends, of_ranks
from autopar.solver.chain import Floats, least_of_stages
from autopar.solver.context import Context
from autopar.solver.elements import least_elements, least_experts
from autopar.solver.evaluate import Placed, placed
from autopar.solver.halves import sure_halves
from autopar.solver.recompute import Recompute
from autopar.solver.shardings import Shardings
from autopar.solver.space import Config
from autopar.solver.spread import KindRun, block_runs, overheads, staged
from autopar.solver.stages import BlockRun, Option, StageProblem

GATHERED = "/gathered"
"""What the names of options end in whose blocks stay gathered under zero 3."""

NEAR = 0.8
"""Share of the longest blocks that others have to be as long as to be counted with as well: memory may force more."""


def least_problems(
    context: Context, configs: Sequence[Config], shardings: Shardings, sharp: bool = False
) -> tuple[StageProblem, ...]:
    """Stages of the least bytes and seconds of every kind, and of every configuration (all of one shape), by what
    counts for seconds of blocks, what is likely to bound best first. Each is valid."""
    key = (tuple(configs), sharp)
    if key != context.memo.get("last problems", (None, None))[0]:
        context.memo["last problems"] = key, tuple(_least_problems(context, configs, shardings, sharp))
    return cast(tuple[StageProblem, ...], context.memo["last problems"][1])


def _least_problems(
    context: Context, configs: Sequence[Config], shardings: Shardings, sharp: bool
) -> Iterator[StageProblem]:
    bytes_of = shardings.kind_bytes()
    # Whatever passes between stages is split at most over the whole model axis.
    handed = int(min((least.inputs for least in bytes_of.values() if least.inputs), default=0))
    places = [placed(context, config, handed) for config in configs]
    config, pairs = configs[0], list(zip(configs, places, strict=True))
    told = _every(context, configs, places, shardings, sharp)
    gpipe = config.schedule == "gpipe"
    needed = _needed(told, config, begun := _begun(told, config) if config.pp > 1 else [])
    room = context.cluster.device.memory_bytes
    host_room = context.cluster.device.host_memory_bytes or float("inf")
    overhead = overheads(places[0], config, least=True)
    for rank, nbytes in enumerate(begun):
        overhead[stages_of(config.schedule, config.pp, config.vpp)[rank][0]] += nbytes
    transfer_s = min(place.transfer_s(least=True) for place in places)
    ends_s = min(least_ends(context, config, place.data) for config, place in pairs)
    for way, beside in _ways(context, pairs, told):
        runs = [
            BlockRun(one.run.kind, one.run.count, tuple(_options(one, way, gpipe, transient)))
            for one, transient in zip(told, needed, strict=True)
        ]
        problem = staged(context, config, places[0], runs, overhead, room, True, tuple(map(tuple, beside.T.tolist())))
        drains = all(place.memory.drains for place in places)
        yield replace(problem, transfer_s=transfer_s, ends_s=ends_s, host_room=host_room, drains=drains)


def _ways(
    context: Context, pairs: Sequence[tuple[Config, Placed]], told: Sequence[_Told]
) -> list[tuple[tuple[bool, bool], Floats]]:
    """Whether the network's seconds count for those of blocks, in forwards, in backwards, and what comes beside them:
    the longest first."""
    ways = [(False, False)]
    if pairs[0][0].pp > 1 and any(way.ahead_s or way.back_s for one in told for way in one.sending):
        ways += [(False, True), (True, False), (True, True)]
    besides, stages = least_besides(context, [(config, place.data) for config, place in pairs]), pairs[0][0].stages
    ahead, back = (_own(told, half, stages) if len(ways) > 1 else None for half in ("forward", "backward"))
    found = [(way, besides.least(ahead if way[0] else None, back if way[1] else None)) for way in ways]
    lengths = [sum(one.run.count * one.seconds(*way) for one in told) + float(each[:2].sum()) for way, each in found]
    order = sorted(range(len(found)), key=lambda place: -lengths[place])
    return [found[place] for place in order if lengths[place] >= NEAR * lengths[order[0]]]


@dataclass(frozen=True, slots=True)
class _Least:
    """A recompute choice of a kind, whatever its sharding: no fewer ``seconds``, of which so many are surely
    ``forward`` and ``backward``; bytes ``kept``, and ``needed`` beside them; bytes sent to the host (``hosted``)."""

    choice: str
    seconds: float
    forward: float
    backward: float
    kept: float
    needed: float
    hosted: float = 0.0


@dataclass(frozen=True, slots=True)
class _Sending:
    """Seconds of copies in each micro-batch, and of the network in each forward and each backward, of a block that
    ``stays`` gathered under zero 3 or does not, which takes so many bytes (``staying``)."""

    stays: bool
    staying: float
    copies_s: float
    ahead_s: float
    back_s: float


@dataclass(frozen=True, slots=True)
class _Told:
    """What is known of a run's blocks: each ``choice``; ``sending``, what they copy and send whatever the choice, the
    ways of it apart that take memory; ``sure``, seconds of both halves of the backward; ``begun``, bytes at the begin
    of the backward of one, and of one behind another (`MemoryModel.least_backward`). Of an option of one of them
    ``resident``, ``gradients``, ``reduce_s``, ``optimizer_s``."""

    run: KindRun
    choices: tuple[_Least, ...]
    sending: tuple[_Sending, ...]
    sure: tuple[float, float]
    begun: tuple[float, float]
    resident: float
    gradients: float
    reduce_s: float
    optimizer_s: float

    def seconds(self, ahead_sent: bool, back_sent: bool) -> float:
        """The least seconds of a block if the network's stand for its own in forwards, in backwards."""
        ahead = min(one.ahead_s for one in self.sending)
        back = min(one.back_s for one in self.sending)
        if ahead_sent:
            return ahead + (back if back_sent else min(least.backward for least in self.choices))
        if back_sent:
            return min(least.forward for least in self.choices) + back
        return min(least.seconds for least in self.choices) + min(one.copies_s for one in self.sending)


class _Ranks(NamedTuple):
    """What the data ranks of a configuration add at least to a block of a run: seconds of copies in each micro-batch,
    of the network in each forward and each backward, of reductions after all, of the optimizer; bytes that stand, of
    gradients that are kept, and at the begin of its backward, if it is alone and if it follows another
    (`MemoryModel`)."""

    copies_s: float
    ahead_s: float
    back_s: float
    reduce_s: float
    optimizer_s: float
    resident: float
    gradients: float
    begun: float
    begun_behind: float


def _every(
    context: Context, configs: Sequence[Config], places: Sequence[Placed], shardings: Shardings, sharp: bool
) -> list[_Told]:
    """What is known of every run: the same for all schedules that halve backwards, or for all that do not."""
    first, halved = configs[0], SCHEDULES[configs[0].schedule].splits_backward
    ranks = tuple(of_ranks(place.data) for place in places)
    key = ("told", halved, first.pp == 1, first.ep, sharp, ranks)
    if key not in shardings.memo:
        runs = _runs(context, first)
        shardings.memo[key] = [_told(context, configs, places, run, shardings, sharp) for run in runs]
    return cast(list[_Told], shardings.memo[key])


def _told(
    context: Context,
    configs: Sequence[Config],
    places: Sequence[Placed],
    run: KindRun,
    shardings: Shardings,
    sharp: bool,
) -> _Told:
    halved = SCHEDULES[configs[0].schedule].splits_backward
    elements, _, expert = _elements(context, configs[0], run)
    # If some are not of zero 3, what stays gathered in one takes no bytes in another: the least of all.
    together = all(one.zero == 3 for one in configs)
    sending, every = [], []
    for stays in run.gathered if together else (True,):
        ranks = [_of_data(context, one, place, run, stays) for one, place in zip(configs, places, strict=True)]
        staying = places[0].memory.staying(elements + expert) if stays and together else 0.0
        some = _Ranks(*map(min, zip(*ranks, strict=True)))
        sending.append(_Sending(stays and together, staying, some.copies_s, some.ahead_s, some.back_s))
        every.append(some)
    least = _Ranks(*map(min, zip(*every, strict=True)))
    return _Told(
        run,
        _choices(context, run, shardings, sharp),
        tuple(sending),
        _sure_halves(context, configs[0], run.kind) if halved else (0.0, 0.0),
        (least.begun, least.begun_behind),
        least.resident,
        least.gradients,
        least.reduce_s,
        least.optimizer_s,
    )


def _elements(context: Context, config: Config, run: KindRun) -> tuple[float, float, float]:
    """Of a block of a run at least: elements without experts' that data ranks share, those that train, experts'."""
    held, trains = (least_elements(context, config, run.start, trained) for trained in (False, True))
    return float(held), float(trains), float(least_experts(context, config, run.start))


def _of_data(context: Context, config: Config, place: Placed, run: KindRun, stays: bool) -> _Ranks:
    """``stays``: if under zero 3 the block, unless it is in a root group, stays gathered."""
    data, memory, stays = place.data, place.memory, stays and not run.root
    key = ("of data", run.start, config.tp, config.pp == 1, config.ep, stays, of_ranks(data))
    if key not in context.memo:
        elements, trains, expert = _elements(context, config, run)
        held, trained, shared = int(elements + expert), int(trains + expert), int(expert)
        passes = context.model.kinds[run.kind].passes_gradient
        still = 0.0 if passes or (run.root and config.pp == 1) else elements
        share = 1.0 if stays else 0.0
        copies = data.least_copies_s(elements, run.root, elements - trains, still, share)
        if expert:
            copies += (data.experts or data).least_copies_s(expert, run.root, gathered=share)
        gathered = 0 if stays else held  # in its own backward; what stays so stands all the time
        # A root group is gathered and reduced apart.
        gather = data.of("gather_s", held, shared) if data.gathers_each and not (run.root or stays) else 0.0
        scatter = 0.0 if data.defers or run.root else data.of("scatter_s", trained, shared)
        stands = memory.least_resident(elements + expert, run.root and run.sure, elements - trains, expert)
        gradients = memory.least_gradients(trained, shared)
        if config.pp == 1 and config.micro_batches > 1:  # whenever most is in flight, but for the first time
            stands, gradients = stands + gradients, 0.0
        context.memo[key] = _Ranks(
            copies,
            gather,
            (gather if passes else 0.0) + scatter,
            data.of("reduce_s", trained, shared) if data.exposes else 0.0,
            _least_optimizer(context, config, place, trains, expert),
            stands,
            gradients,
            memory.least_backward(gathered, trained, run.root),
            memory.least_backward(gathered, trained, run.root, 0.0 if run.root else gathered),
        )
    return cast(_Ranks, context.memo[key])


def _own(told: Sequence[_Told], half: str, stages: int) -> Floats:
    """The least seconds of each stage's ``half`` of a block, whatever the network takes."""
    least = [min(getattr(least, half) for least in one.choices) for one in told]
    return least_of_stages(np.repeat(least, [one.run.count for one in told]), stages)


def _begun(told: Sequence[_Told], config: Config) -> list[float]:
    """Bytes of each of several ranks when a backward of its stages begins: of the block that needs least."""
    blocks = np.repeat([one.begun[0] for one in told], [one.run.count for one in told])
    least = least_of_stages(blocks, config.stages)
    return [float(least[list(own)].min()) for own in stages_of(config.schedule, config.pp, config.vpp)]


def _needed(told: Sequence[_Told], config: Config, begun: Sequence[float]) -> list[tuple[float, ...]]:
    """For each run, the bytes beside that stand for the transient bytes of its options: of the last block, whose
    backward runs first, when most is in flight (of others, less is by the time of theirs); without stages also of the
    last block of a run which only the root group follows, less what the blocks that follow had saved."""
    found = [tuple(0.0 for _ in one.choices) for one in told]
    if config.vpp > 1 or SCHEDULES[config.schedule].splits_backward:
        return found
    counted = begun[-1] if begun else 0.0
    found[-1] = tuple(max(0.0, least.needed - counted) for least in told[-1].choices)
    gone = 0.0
    for place in reversed(range(len(told) if config.pp == 1 else 0)):
        one = told[place]
        needed = one.begun[one.run.count > 1] - gone
        found[place] = tuple(max(needed, other) for other in found[place])
        if not one.run.root:
            break
        gone += one.run.count * max(least.kept for least in one.choices)
    return found


def _options(told: _Told, way: tuple[bool, bool], gpipe: bool, transient: tuple[float, ...]) -> Iterator[Option]:
    ahead_sent, back_sent = way
    for sending, (least, needed) in product(told.sending, tuple(zip(told.choices, transient, strict=True))):
        seconds = least.seconds + sending.copies_s
        # The slowest forward and backward count apart under GPipe: only their sum is known.
        ahead = min(least.forward, seconds) if not gpipe or back_sent else 0.0
        back = seconds - ahead
        either = max(0.0, back - least.backward)
        if ahead_sent:
            ahead, back, either = sending.ahead_s, least.backward, 0.0
        if back_sent:
            back, either = sending.back_s, 0.0
        if gpipe:
            ahead, back, either = 0.0, ahead + back, ahead + either
        yield Option(
            least.choice + (GATHERED if sending.stays else ""),
            ahead,
            back,
            told.resident + sending.staying,
            least.kept,
            needed,
            told.reduce_s,
            told.optimizer_s,
            weight_s=back,  # nothing is known of the halves of a backward: all of it may wait
            either_s=either,
            sure_input_s=told.sure[0],
            sure_weight_s=told.sure[1],
            hosted=least.hosted,
            gradients=told.gradients,
        )


def _runs(context: Context, config: Config) -> list[KindRun]:
    key = ("least runs", SCHEDULES[config.schedule].splits_backward, config.pp == 1, config.zero == 3)
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
    kept = shardings.least_kept(kind, choice)
    needed = max(0.0, shardings.kind_bytes()[kind].peak - kept)
    hosted = shardings.least_moved(kind, choice) * (1 - 1e-12) if Recompute.of(choice).offload else 0.0
    if shardings.size == 1:  # there is one decision, and these are its bytes
        cost = shardings.fastest().costs[kind][choice]
        kept, needed, hosted = float(cost.inflight), float(cost.transient), float(cost.hosted)
    return _Least(choice, seconds, min(forward, seconds), backward, kept, needed, hosted)


def _unbeaten(choices: Sequence[_Least]) -> tuple[_Least, ...]:
    """Without those that another one takes no more seconds and bytes than, of whatever part of the block they are:
    what is needed beside what is kept counts for one block at a time, and each has kept its own by then."""

    def entries(one: _Least) -> tuple[float, ...]:
        return one.forward, one.seconds - one.forward, one.backward, one.kept, one.kept + one.needed, one.hosted

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
