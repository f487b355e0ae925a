"""Pipeline schedules, replayed event by event as `torch.distributed.pipelining` executes them.

A stage runs a program of posts, waits and computations. A transfer starts when both ends have posted it (NCCL sends do
not buffer) and takes ``transfer_s``. The programs are those of torch 2.13's `Schedule1F1B` and `ScheduleGPipe`:

* 1F1B: stage s runs min(m, p - s) forwards, then backward and forward in turns, then the remaining backwards. In the
  steady state the send of one direction and the receive of the other are one batch that is waited for, so that
  point-to-point time is exposed; sends of the first forwards and the last backwards overlap the next computation.
* GPipe: all forwards, then all backwards, sends overlap.

Closed forms for transfers that cost nothing: GPipe (m-1)(max f + max b) + sum(f + b) for any stages; 1F1B
(m+p-1)(f+b) for equal ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from autopar.errors import AutoparError

Schedule = Literal["none", "1f1b", "gpipe"]
_Transfer = tuple[str, int, int]
"""("F" or "B", sending stage, micro-batch)."""
_Step = tuple[str, str, int, tuple[_Transfer, ...]]
"""("run", "F"/"B", micro-batch, ()) | ("post", "", 0, transfers) | ("wait", "", 0, transfers)."""


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds of one stage: per micro-batch, extra in its first forward and last backward, and once after all."""

    forward_s: float
    backward_s: float
    first_s: float = 0.0
    last_s: float = 0.0
    after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Event:
    """Stage ``stage`` computes "F" or "B" of ``micro_batch`` from ``start`` to ``end`` (s)."""

    stage: int
    kind: str
    micro_batch: int
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """``ends``: when each stage has finished its last computation and send; ``total``: the last of them with its
    ``after_s``. ``events`` only when asked for."""

    total: float
    ends: tuple[float, ...]
    events: tuple[Event, ...]


def simulate(
    stages: Sequence[StageTimes],
    micro_batches: int,
    transfer_s: Sequence[float] = (),
    schedule: Schedule = "1f1b",
    record: bool = False,
) -> Timeline:
    """Replay one step. ``transfer_s[i]``: seconds of one transfer between stages i and i+1, either way.

    Raises AutoparError where the schedule cannot run (1F1B with fewer micro-batches than stages).
    """
    count = len(stages)
    if schedule == "1f1b" and micro_batches < count:
        raise AutoparError(f"1F1B needs at least as many micro-batches as stages: {micro_batches} < {count}")
    transfer_s = transfer_s or (0.0,) * (count - 1)
    make = _gpipe if schedule == "gpipe" else _one_forward_one_backward
    programs = [make(s, count, micro_batches) for s in range(count)]
    return _replay(stages, programs, transfer_s, micro_batches, record)


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


def _batch(transfers: tuple[_Transfer, ...]) -> Iterator[_Step]:
    if transfers:
        yield ("post", "", 0, transfers)
        yield ("wait", "", 0, transfers)


def _one_forward_one_backward(stage: int, count: int, micro_batches: int) -> Iterator[_Step]:
    warmup = min(micro_batches, count - stage)
    pending: tuple[_Transfer, ...] = ()
    sent: tuple[_Transfer, ...] = ()
    for micro in range(warmup):
        received, sent = _ends(stage, count, "F", micro)
        yield from _batch(received)
        yield ("run", "F", micro, ())
        if pending:
            yield ("wait", "", 0, pending)
        pending = ()
        if micro != warmup - 1 and sent:
            yield ("post", "", 0, sent)
            pending = sent
    forward, backward = warmup, 0
    while True:
        received, back = _ends(stage, count, "B", backward)
        yield from _batch((*sent, *received))
        yield ("run", "B", backward, ())
        backward += 1
        if forward == micro_batches:
            break
        received, sent = _ends(stage, count, "F", forward)
        yield from _batch((*back, *received))
        yield ("run", "F", forward, ())
        forward += 1
    if back:
        yield ("post", "", 0, back)
    while backward < micro_batches:
        received, after = _ends(stage, count, "B", backward)
        yield from _batch(received)
        yield ("run", "B", backward, ())
        if back:
            yield ("wait", "", 0, back)
        back = after
        if back:
            yield ("post", "", 0, back)
        backward += 1
    if back:
        yield ("wait", "", 0, back)


def _gpipe(stage: int, count: int, micro_batches: int) -> Iterator[_Step]:
    for kind in "FB":
        pending: list[_Transfer] = []
        for micro in range(micro_batches):
            received, sent = _ends(stage, count, kind, micro)
            yield from _batch(received)
            yield ("run", kind, micro, ())
            if sent:
                yield ("post", "", 0, sent)
                pending += sent
        if pending:
            yield ("wait", "", 0, tuple(pending))


def _replay(
    stages: Sequence[StageTimes],
    programs: Sequence[Iterator[_Step]],
    transfer_s: Sequence[float],
    micro_batches: int,
    record: bool,
) -> Timeline:
    """Run every program as far as it goes, until all are done; a wait stops where the other end has not posted."""
    count = len(stages)
    clock = [0.0] * count
    posted: dict[_Transfer, float] = {}
    done: dict[_Transfer, float] = {}
    blocked: list[tuple[_Transfer, ...] | None] = [()] * count
    events: list[Event] = []
    progress = True
    while progress:
        progress = False
        for stage in range(count):
            waiting = blocked[stage]
            while waiting is not None:
                if waiting:
                    if any(transfer not in done for transfer in waiting):
                        break
                    clock[stage] = max(clock[stage], *(done[transfer] for transfer in waiting))
                    waiting = ()
                step = next(programs[stage], None)
                progress = True
                if step is None:
                    waiting = None
                elif step[0] == "run":
                    end = clock[stage] + _seconds(stages[stage], step[1], step[2], micro_batches)
                    if record:
                        events.append(Event(stage, step[1], step[2], clock[stage], end))
                    clock[stage] = end
                elif step[0] == "post":
                    for transfer in step[3]:
                        if transfer in posted:
                            done[transfer] = max(posted.pop(transfer), clock[stage]) + transfer_s[_link(transfer)]
                        else:
                            posted[transfer] = clock[stage]
                else:
                    waiting = step[3]
            blocked[stage] = waiting
    if any(waiting is not None for waiting in blocked):
        raise AutoparError("the schedule deadlocks: a stage waits for a transfer that nothing sends")
    events.sort(key=lambda event: (event.start, event.stage))
    total = max(end + stage.after_s for end, stage in zip(clock, stages, strict=True))
    return Timeline(total, tuple(clock), tuple(events))


def _link(transfer: _Transfer) -> int:
    """The link a transfer crosses: i for stages i and i+1."""
    return transfer[1] if transfer[0] == "F" else transfer[1] - 1


def _seconds(stage: StageTimes, kind: str, micro: int, micro_batches: int) -> float:
    if kind == "F":
        return stage.forward_s + (stage.first_s if micro == 0 else 0.0)
    return stage.backward_s + (stage.last_s if micro == micro_batches - 1 else 0.0)
