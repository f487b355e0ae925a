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

from collections.abc import Iterator, Sequence
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
    flow = (_kept_flow if micro_batches * count <= _KEPT else _flow)(schedule, count, vpp, micro_batches)
    return _replay(stages, flow, transfer_s, record)


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


_RUN, _FIRST, _LAST, _POST, _JOIN, _WAIT = range(6)
"""What acts of flows are: a computation; one that is a stage's first forward, or its last backward; the first end of a
transfer to be ready, the second, and a wait for it to be through."""

_KINDS = ("F", "B", "I", "W", "after")


@dataclass(frozen=True, slots=True)
class _Flow:
    """All that ranks do, each after what it waits for: (what, rank, where, stage or link, action). ``where``: the place
    of its seconds, by stage and kind, or the number of a transfer, of ``transfers``."""

    acts: tuple[tuple[int, int, int, int, Action], ...]
    transfers: int


_KEPT = 30_000
"""Micro-batches times stages up to which flows are kept, about 30 MB each."""


def _flow(schedule: str, count: int, vpp: int, micro_batches: int) -> _Flow:
    """The programs of a schedule run as far as they go, one after the other, until all are done: what waits for what
    does not depend on how long it takes."""
    if schedule in ("none", "gpipe", "1f1b"):
        make = _one_forward_one_backward if schedule == "1f1b" else _gpipe
        programs = [make(stage, count, micro_batches) for stage in range(count)]
    else:
        programs = [iter(program) for program in _programs(schedule, count // vpp, vpp, micro_batches)]
    acts: list[tuple[int, int, int, int, Action]] = []
    numbers: dict[_Transfer, int] = {}
    done: set[_Transfer] = set()
    blocked: list[tuple[_Transfer, ...] | None] = [()] * len(programs)
    left = [micro_batches] * count
    progress = True
    while progress:
        progress = False
        for rank, program in enumerate(programs):
            waiting = blocked[rank]
            while waiting is not None and done.issuperset(waiting):
                acts += [(_WAIT, rank, numbers[transfer], 0, _NOTHING) for transfer in waiting]
                progress, waiting = True, ()
                step = next(program, None)
                if step is None:
                    waiting = None
                elif step[0] == "run":
                    acts.append((_what(step[1], left), rank, _place(step[1]), step[1].stage, step[1]))
                elif step[0] == "wait":
                    waiting = step[2]
                else:
                    for transfer in step[2]:
                        what = _JOIN if transfer in numbers else _POST
                        number = numbers.setdefault(transfer, len(numbers))
                        acts.append((what, rank, number, _link(transfer), _NOTHING))
                        if what == _JOIN:
                            done.add(transfer)
            blocked[rank] = waiting
    if any(waiting is not None for waiting in blocked):
        raise AutoparError("the schedule deadlocks: a stage waits for a transfer that nothing sends")
    return _Flow(tuple(acts), len(numbers))


_kept_flow = lru_cache(maxsize=8)(_flow)


def _what(action: Action, left: list[int]) -> int:
    """``left``: backwards that each stage has before it."""
    if action.kind == "F":
        return _RUN if action.micro else _FIRST
    if action.kind not in "BW":
        return _RUN
    left[action.stage] -= 1
    return _RUN if left[action.stage] else _LAST


def _place(action: Action) -> int:
    return action.stage * len(_KINDS) + _KINDS.index(action.kind)


def _replay(stages: Sequence[StageTimes], flow: _Flow, transfer_s: Sequence[float], record: bool) -> Timeline:
    """How long all of it takes."""
    count = max(rank for _, rank, _, _, _ in flow.acts) + 1
    clock, channel, exposed = [0.0] * count, [0.0] * count, [0.0] * count
    through = [0.0] * flow.transfers
    seconds = [_seconds(times, kind, stage) for stage, times in enumerate(stages) for kind in _KINDS]
    events: list[Event] = []
    for what, rank, where, place, action in flow.acts:
        now = clock[rank]
        if what == _RUN:
            end = now + seconds[where]
        elif what == _WAIT:
            if through[where] > now:
                clock[rank] = through[where]
            continue
        elif what == _POST:
            through[where] = now
            continue
        elif what == _JOIN:
            through[where] = max(through[where], now) + transfer_s[place]
            continue
        elif what == _FIRST:
            times = stages[place]
            end = now + (seconds[where] + times.first_s)
            if end < times.ready_s:
                exposed[rank] += times.ready_s - end
                end = times.ready_s
        else:
            times = stages[place]
            end = now + seconds[where]
            if times.reduces_s:
                channel[rank] = max(channel[rank] + times.reduces_s, end + times.last_s)
            else:
                end += times.last_s
        if record and action.kind != "after":
            events.append(Event(place, action.kind, action.micro, now, end))
        clock[rank] = end
    events.sort(key=lambda event: (event.start, event.stage))
    exposed = [one + max(0.0, last - end) for one, last, end in zip(exposed, channel, clock, strict=True)]
    ends = tuple(map(max, clock, channel))
    return Timeline(max(ends), ends, tuple(events), tuple(exposed))


def _link(transfer: _Transfer) -> int:
    """The link a transfer crosses: i for stages i and i+1."""
    return transfer[1] if transfer[0] == "F" else transfer[1] - 1


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
