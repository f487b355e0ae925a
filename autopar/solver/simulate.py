"""Pipeline schedules, replayed event by event as `torch.distributed.pipelining` executes them.

A rank runs a program of posts, waits and computations. A transfer starts when both ends have posted it (NCCL sends do
not buffer) and takes ``transfer_s``; stages on one rank hand on for nothing. The programs are those of torch 2.13:

* `Schedule1F1B`: in the steady state the send of one direction and the receive of the other are one batch that is
  waited for, so that point-to-point time is exposed; sends of the first forwards and the last backwards overlap the
  next computation. `ScheduleGPipe`: all forwards, then all backwards, sends overlap; a receive is posted when needed.
* Schedules of several stages a rank run a table of actions (`orders`). Sends are posted when their computation ends and
  waited for at the end of the step. A receive is posted by the place in the table that its rank has come to when,
  going round the ranks one action at a time, the sender's is written down: ahead of its use, so that it overlaps.

What follows a stage's last backward (``after_s``): of a schedule of one stage a rank it comes when the last send is
through, of several stages straight after the last backward of that stage, before what follows. Reductions that drain
(``reduces_s``) share one channel of their rank, one after another; only the end of the step waits for them.

Closed forms for transfers that cost nothing: GPipe (m-1)(max f + max b) + sum(f + b) for any stages; 1F1B
(m+p-1)(f+b) for equal ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from autopar.errors import AutoparError
from autopar.schedule import SCHEDULES
from autopar.solver.orders import Action, orders

_Transfer = tuple[str, int, int]
"""("F" or "B", sending stage, micro-batch)."""
_Step = tuple[str, Action, tuple[_Transfer, ...]]
"""("run", what, ()) | ("post", any, transfers) | ("wait", any, transfers)."""
_NOTHING = Action("", 0, 0)
_KINDS = ("F", "B", "I", "W", "after")
_Compiled = tuple[int, int, int, int, tuple[int, ...], tuple[int, ...]]
"""What a rank runs, then what it posts, then what it waits for: place in `_KINDS` (none: -1), stage, micro-batch, 1
before the stage's last backward, numbers of the transfers posted, of those waited for."""
_KEPT = 30_000
"""Micro-batches times stages up to which compiled programs are kept, about 20 MB."""


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds of one stage: per micro-batch (``weight_s``: of the backward, the part that gives weight gradients
    alone), extra in its first forward and last backward, and once after all. ``ready_s``: the first forward ends no
    earlier after the step's begin. ``reduces_s``: seconds of reductions that begin under the last backward and that
    only the step's end waits for; they go on for ``last_s`` after it, if no others are in the way."""

    forward_s: float
    backward_s: float
    weight_s: float = 0.0
    first_s: float = 0.0
    last_s: float = 0.0
    after_s: float = 0.0
    ready_s: float = 0.0
    reduces_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Event:
    """Stage ``stage`` computes "F", "B", "I" or "W" of ``micro_batch`` from ``start`` to ``end`` (s)."""

    stage: int
    kind: str
    micro_batch: int
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """``ends``: when each rank has finished all it does; ``total``: the last of them. ``events`` if asked for.
    ``exposed``: seconds each rank waits for what its first forwards need beside their input, and at its end for
    reductions."""

    total: float
    ends: tuple[float, ...]
    events: tuple[Event, ...]
    exposed: tuple[float, ...]


def simulate(
    stages: Sequence[StageTimes],
    micro_batches: int,
    transfer_s: Sequence[float] = (),
    schedule: str = "1f1b",
    vpp: int = 1,
    record: bool = False,
) -> Timeline:
    """Replay one step of a schedule of `SCHEDULES` with ``vpp`` stages on each rank. ``transfer_s[i]``: seconds of one
    transfer between stages i and i+1, either way, if they are on two ranks.

    Raises AutoparError where the schedule cannot run (1F1B with fewer micro-batches than stages).
    """
    count = len(stages)
    if schedule == "1f1b" and micro_batches < count:
        raise AutoparError(f"1F1B needs at least as many micro-batches as stages: {micro_batches} < {count}")
    transfer_s = transfer_s or (0.0,) * (count - 1)
    few = micro_batches * count <= _KEPT
    programs = (_kept_programs if few else _compiled_programs)(schedule, count, vpp, micro_batches)
    return _replay(stages, programs, transfer_s, micro_batches, record)


def _compiled_programs(schedule: str, count: int, vpp: int, micro_batches: int) -> tuple[tuple[_Compiled, ...], ...]:
    """The programs of all ranks, for `_replay`."""
    programs: Iterable[Iterable[_Step]]
    if schedule in ("none", "gpipe", "1f1b"):
        make = _one_forward_one_backward if schedule == "1f1b" else _gpipe
        programs = (make(s, count, micro_batches) for s in range(count))
    else:
        programs = _programs(schedule, count // vpp, vpp, micro_batches)
    return tuple(tuple(_compiled(program, count, micro_batches)) for program in programs)


_kept_programs = lru_cache(maxsize=8)(_compiled_programs)


def _compiled(program: Iterable[_Step], count: int, micro_batches: int) -> Iterator[_Compiled]:
    left = [micro_batches] * count
    kind, stage, micro, last = -1, 0, 0, 0
    posts: tuple[int, ...] = ()
    for what, action, transfers in program:
        if what == "post":
            posts += tuple(_number(transfer, count) for transfer in transfers)
            continue
        if what == "wait":
            yield kind, stage, micro, last, posts, tuple(_number(transfer, count) for transfer in transfers)
            kind, posts = -1, ()
            continue
        if kind >= 0 or posts:
            yield kind, stage, micro, last, posts, ()
            posts = ()
        kind, stage, micro = _KINDS.index(action.kind), action.stage, action.micro
        left[stage] -= action.kind in "BW"
        last = int(action.kind in "BW" and not left[stage])
    if kind >= 0 or posts:
        yield kind, stage, micro, last, posts, ()


def _number(transfer: _Transfer, count: int) -> int:
    """Of a transfer; modulo twice the links, twice the link it crosses (i for stages i and i+1), and 1 on its way
    back."""
    kind, stage, micro = transfer
    return 2 * (count - 1) * micro + (2 * stage if kind == "F" else 2 * stage - 1)


def gpipe_seconds(stages: Sequence[StageTimes], micro_batches: int) -> float:
    """Closed form of GPipe with free transfers."""
    slowest = max(s.forward_s for s in stages) + max(s.backward_s for s in stages)
    return (micro_batches - 1) * slowest + sum(s.forward_s + s.backward_s for s in stages)


def _ends(stage: int, count: int, kind: str, micro: int) -> tuple[tuple[_Transfer, ...], tuple[_Transfer, ...]]:
    """The transfers a stage receives before and sends after running ``kind`` of ``micro``."""
    before, after = (stage - 1, stage + 1) if kind == "F" else (stage + 1, stage - 1)
    received: tuple[_Transfer, ...] = ((kind, before, micro),) if 0 <= before < count else ()
    sent: tuple[_Transfer, ...] = ((kind, stage, micro),) if 0 <= after < count else ()
    return received, sent


def _post(transfers: tuple[_Transfer, ...]) -> Iterator[_Step]:
    if transfers:
        yield ("post", _NOTHING, transfers)


def _wait(transfers: tuple[_Transfer, ...]) -> Iterator[_Step]:
    if transfers:
        yield ("wait", _NOTHING, transfers)


def _batch(transfers: tuple[_Transfer, ...]) -> Iterator[_Step]:
    yield from _post(transfers)
    yield from _wait(transfers)


def _run(kind: str, stage: int, micro: int = 0) -> _Step:
    return ("run", Action(kind, stage, micro), ())


def _one_forward_one_backward(stage: int, count: int, micro_batches: int) -> Iterator[_Step]:
    warmup = min(micro_batches, count - stage)
    pending: tuple[_Transfer, ...] = ()
    sent: tuple[_Transfer, ...] = ()
    for micro in range(warmup):
        received, sent = _ends(stage, count, "F", micro)
        yield from _batch(received)
        yield _run("F", stage, micro)
        yield from _wait(pending)
        pending = ()
        if micro != warmup - 1:
            yield from _post(sent)
            pending = sent
    forward, backward = warmup, 0
    while True:
        received, back = _ends(stage, count, "B", backward)
        yield from _batch((*sent, *received))
        yield _run("B", stage, backward)
        backward += 1
        if forward == micro_batches:
            break
        received, sent = _ends(stage, count, "F", forward)
        yield from _batch((*back, *received))
        yield _run("F", stage, forward)
        forward += 1
    yield from _post(back)
    while backward < micro_batches:
        received, after = _ends(stage, count, "B", backward)
        yield from _batch(received)
        yield _run("B", stage, backward)
        yield from _wait(back)
        back = after
        yield from _post(back)
        backward += 1
    yield from _wait(back)
    yield _run("after", stage)


def _gpipe(stage: int, count: int, micro_batches: int) -> Iterator[_Step]:
    for kind in "FB":
        pending: list[_Transfer] = []
        for micro in range(micro_batches):
            received, sent = _ends(stage, count, kind, micro)
            yield from _batch(received)
            yield _run(kind, stage, micro)
            yield from _post(sent)
            pending += sent
        yield from _wait(tuple(pending))
    yield _run("after", stage)


@lru_cache(maxsize=32)
def _programs(schedule: str, ranks: int, vpp: int, micro_batches: int) -> tuple[tuple[_Step, ...], ...]:
    """The tables of a schedule of several stages a rank, with their sends and receives."""
    count = ranks * vpp
    place = [SCHEDULES[schedule].rank_of(stage, ranks) for stage in range(count)]
    left = [_turns(order, micro_batches) for order in orders(schedule, ranks, vpp, micro_batches)]
    programs: list[list[_Step]] = [[] for _ in range(ranks)]
    sends: list[list[_Transfer]] = [[] for _ in range(ranks)]
    arrived: set[_Transfer] = set()
    while any(left):
        before = sum(map(len, left))
        for rank, turns in enumerate(left):
            ends = [_exchanged(action, count) for action in turns[-1]] if turns else []
            if not turns or not all(arrived.issuperset(received) for received, _ in ends):
                continue
            for action, (received, _) in zip(turns.pop(), ends, strict=True):
                programs[rank] += _wait(tuple(one for one in received if place[one[1]] != rank))
                programs[rank].append(("run", action, ()))
            for transfer in (one for _, sent in ends for one in sent):
                arrived.add(transfer)
                kind, stage, _ = transfer
                other = place[stage + 1 if kind == "F" else stage - 1]
                if other != rank:
                    programs[rank] += _post((transfer,))
                    programs[other] += _post((transfer,))
                    sends[rank].append(transfer)
        if sum(map(len, left)) == before:
            raise AutoparError(f"{schedule} deadlocks with {micro_batches} micro-batches: a defect of autopar")
    return tuple((*program, *_wait(tuple(sent))) for program, sent in zip(programs, sends, strict=True))


def _turns(order: Sequence[Action], micro_batches: int) -> list[list[Action]]:
    """What a rank does at one go, the last first: an action, a pair, or what follows a stage's last backward."""
    turns: list[list[Action]] = []
    backwards: dict[int, int] = {}
    joined = False
    for action in order:
        if joined:
            turns[-1].append(action)
        else:
            turns.append([action])
        joined = action.joined
        if action.kind in "BW":
            backwards[action.stage] = backwards.get(action.stage, 0) + 1
            if backwards[action.stage] == micro_batches:
                turns.append([Action("after", action.stage, 0)])
    return turns[::-1]


def _exchanged(action: Action, count: int) -> tuple[tuple[_Transfer, ...], tuple[_Transfer, ...]]:
    """What an action of a table receives and sends."""
    if action.kind not in "FBI":
        return (), ()
    return _ends(action.stage, count, "F" if action.kind == "F" else "B", action.micro)


def _replay(
    stages: Sequence[StageTimes],
    programs: Sequence[Sequence[_Compiled]],
    transfer_s: Sequence[float],
    micro_batches: int,
    record: bool,
) -> Timeline:
    """Run every program as far as it goes, until all are done; a wait stops where the other end has not posted."""
    count, ways = len(programs), 2 * (len(stages) - 1)
    clock = [0.0] * count
    channel, exposed = [0.0] * count, [0.0] * count
    links = [seconds for seconds in transfer_s for _ in "FB"]
    posted, done = ([-1.0] * (ways * micro_batches) for _ in range(2))
    waiting: list[tuple[int, ...]] = [()] * count
    steps = [iter(program) for program in programs]
    each = [[_seconds(times, kind, stage) for stage, times in enumerate(stages)] for kind in _KINDS]
    events: list[Event] = []
    going = list(range(count))
    while going:
        still, idle = [], True
        for rank in going:
            now, waits = clock[rank], waiting[rank]
            while True:
                if waits:
                    there = [done[transfer] for transfer in waits]
                    if min(there) < 0.0:
                        still.append(rank)
                        break
                    now = max(now, *there)
                idle, step = False, next(steps[rank], None)
                if step is None:
                    break
                kind, stage, micro, last, posts, waits = step
                if kind >= 0:
                    times, begin = stages[stage], now
                    now += each[kind][stage]
                    if not kind and not micro:
                        now = begin + (times.forward_s + times.first_s)
                        if now < times.ready_s:
                            exposed[rank] += times.ready_s - now
                            now = times.ready_s
                    if last and times.reduces_s:
                        channel[rank] = max(channel[rank] + times.reduces_s, now + times.last_s)
                    elif last:
                        now += times.last_s
                    if record and kind < 4:
                        events.append(Event(stage, _KINDS[kind], micro, begin, now))
                for transfer in posts:
                    if posted[transfer] < 0.0:
                        posted[transfer] = now
                    else:
                        done[transfer] = max(posted[transfer], now) + links[transfer % ways]
            clock[rank], waiting[rank] = now, waits
        if idle:
            raise AutoparError("the schedule deadlocks: a stage waits for a transfer that nothing sends")
        going = still
    events.sort(key=lambda event: (event.start, event.stage))
    exposed = [one + max(0.0, last - end) for one, last, end in zip(exposed, channel, clock, strict=True)]
    ends = tuple(map(max, clock, channel))
    return Timeline(max(ends), ends, tuple(events), tuple(exposed))


def _seconds(times: StageTimes, kind: str, stage: int) -> float:
    """Seconds of an action, without what is more in a first forward or a last backward's reductions."""
    if kind == "after":
        return times.after_s
    if kind == "F":
        return times.forward_s
    weights = times.weight_s if stage else times.backward_s  # torch leaves all of it to "W" on stage 0
    if kind == "I":
        return times.backward_s - weights
    return times.backward_s if kind == "B" else weights
