"""In which order each pipeline rank computes: the rules that torch 2.13's schedules follow, and what they keep alive.

An action is a forward "F", a whole backward "B", or its two halves: "I" for the gradients of inputs, "W" for those of
weights. p: ranks, m: micro-batches, v: stages on each rank, r: a rank.

gpipe        all F, then all B
1f1b         min(m, p - r) F, then B and F in turns, then the rest of the B
interleaved  rounds of m // max(1, m // p) micro-batches; a round goes through all stages of a rank before the next one.
             First F: (v - 1) rounds and 2 (p - 1 - r) more; then F and B in turns, then the rest of the B
zbv          stage a = r on the way there, b = 2p - 1 - r on the way back. 2(p - r) - 1 times Fa; r times Fb Fa; p - r
             times Fb Ib Wb; until all Fb are done Fa Ia Wa Fb Ib Wb; r times Ia Ib; p - r times Ia Wa; then what is
             left of Wb and of Wa. Written for at least 2p - 1 micro-batches; of fewer, the others are left out
dualpipev    2(p - r - 1) times Fa; r + 1 times Fa Fb; p - r - 1 times Ib W Fb; m - 2p + r + 1 times Fa Bb Fb Ba;
             p - r - 1 times Bb Fb Ba; r + 1 times Bb Ba, halved from the middle on; p - r - 1 times W and B (or I) of
             a; the rest of the W. W takes the oldest half that waits. Each F with the B after it is an overlapped pair
             (but the first of the last rank), which torch runs one after the other
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np

from autopar.schedule import stages_of

_Numbers = TypeVar("_Numbers", bound=tuple[tuple[int, ...], ...])


class Action(NamedTuple):
    """Stage ``stage`` computes ``kind`` ("F", "B", "I" or "W") of micro-batch ``micro``. ``joined``: with the next one,
    as an overlapped pair, which torch starts when both can and whose results it sends when both are done."""

    kind: str
    stage: int
    micro: int
    joined: bool = False


Order = tuple[Action, ...]


@lru_cache(maxsize=64)
def orders(schedule: str, ranks: int, vpp: int, micro_batches: int) -> tuple[Order, ...]:
    """What each of ``ranks`` pipeline ranks computes in a step, in order."""
    return tuple(tuple(_order(schedule, rank, ranks, vpp, micro_batches)) for rank in range(ranks))


def _order(schedule: str, rank: int, ranks: int, vpp: int, micro_batches: int) -> Iterator[Action]:
    if schedule == "none":
        return (Action(kind, 0, micro) for micro in range(micro_batches) for kind in "FB")
    if schedule == "gpipe":
        return (Action(kind, rank, micro) for kind in "FB" for micro in range(micro_batches))
    if schedule == "1f1b":
        return _in_turns(
            _Queue(), min(micro_batches, ranks - rank), [rank] * micro_batches, [rank] * micro_batches, "B"
        )
    if schedule == "interleaved":
        return _interleaved(rank, ranks, vpp, micro_batches)
    if schedule == "zbv":
        return (action for action in _zbv(rank, ranks, micro_batches) if action.micro < micro_batches)
    return _dualpipev(rank, ranks, micro_batches)


class _Queue:
    """Hands out micro-batches: each stage takes them in order, and W takes the oldest half that waits."""

    def __init__(self) -> None:
        self.next: dict[tuple[str, int], int] = {}
        self.halves: deque[tuple[int, int]] = deque()

    def done(self, kind: str, stage: int) -> int:
        return self.next.get((kind, stage), 0)

    def take(self, kind: str, stage: int) -> Action:
        name = "I" if kind == "B" else kind
        micro = self.done(name, stage)
        self.next[name, stage] = micro + 1
        if kind == "I":
            self.halves.append((stage, micro))
        if kind == "B":
            self.next["W", stage] = self.done("W", stage) + 1
        return Action(kind, stage, micro)

    def weights(self) -> Iterator[Action]:
        if self.halves:
            stage, micro = self.halves.popleft()
            self.next["W", stage] = self.done("W", stage) + 1
            yield Action("W", stage, micro)


def _in_turns(queue: _Queue, first: int, forwards: list[int], backwards: list[int], lead: str) -> Iterator[Action]:
    """``first`` forwards, then both in turns beginning with ``lead``, then the remaining backwards; by their stages."""
    for stage in forwards[:first]:
        yield queue.take("F", stage)
    turns = zip(forwards[first:], backwards, strict=False)
    for forward, backward in turns:
        pair = (("B", backward), ("F", forward)) if lead == "B" else (("F", forward), ("B", backward))
        for kind, stage in pair:
            yield queue.take(kind, stage)
    for stage in backwards[len(forwards) - first :]:
        yield queue.take("B", stage)


def _interleaved(rank: int, ranks: int, vpp: int, micro_batches: int) -> Iterator[Action]:
    each, first = interleaved_begin(rank, ranks, vpp, micro_batches)
    laps = [(place // each) % vpp for place in range(vpp * micro_batches)]
    forwards = [lap * ranks + rank for lap in laps]
    backwards = [(vpp - 1 - lap) * ranks + rank for lap in laps]
    return _in_turns(_Queue(), first, forwards, backwards, "F")


def interleaved_begin(rank: int, ranks: int, vpp: int, micro_batches: int) -> tuple[int, int]:
    """Micro-batches of a round, and forwards of a rank before forwards and backwards take turns."""
    each = micro_batches // max(1, micro_batches // ranks)
    return each, min((vpp - 1) * each + 2 * (ranks - 1 - rank), vpp * micro_batches)


def in_laps(count: int, each: int, vpp: int) -> list[int]:
    """Of the first ``count`` forwards of a rank (or backwards, whose laps go the other way), those in each lap, in
    rounds of ``each``."""
    rounds, rest = divmod(count, each * vpp)
    return [rounds * each + min(max(rest - lap * each, 0), each) for lap in range(vpp)]


def _zbv(rank: int, ranks: int, micro_batches: int) -> Iterator[Action]:
    queue, there, back = _Queue(), rank, 2 * ranks - 1 - rank
    count = max(2 * ranks - 1, micro_batches)

    def run(*steps: tuple[str, int]) -> Iterator[Action]:
        return (queue.take(kind, stage) for kind, stage in steps)

    for _ in range(2 * (ranks - rank) - 1):
        yield from run(("F", there))
    for _ in range(rank):
        yield from run(("F", back), ("F", there))
    for _ in range(ranks - rank):
        yield from run(("F", back), ("I", back), ("W", back))
    while queue.done("F", back) < queue.done("F", there) or queue.done("F", there) < count:
        if queue.done("F", there) < count:
            yield from run(("F", there))
        yield from run(("I", there), ("W", there), ("F", back), ("I", back), ("W", back))
    for _ in range(rank):
        yield from run(("I", there), ("I", back))
    for _ in range(ranks - rank):
        yield from run(("I", there), ("W", there))
    for stage in (back, there):
        while queue.done("W", stage) < queue.done("I", stage):
            yield from run(("W", stage))


def _dualpipev(rank: int, ranks: int, micro_batches: int) -> Iterator[Action]:
    queue, there, back = _Queue(), rank, 2 * ranks - 1 - rank
    after = ranks - rank - 1
    for _ in range(2 * after):
        yield queue.take("F", there)
    for _ in range(rank + 1):
        yield queue.take("F", there)
        yield queue.take("F", back)
    for _ in range(after):
        yield queue.take("I", back)
        yield from queue.weights()
        yield queue.take("F", back)
    for turn in range(micro_batches - 2 * ranks + rank + 1):
        for forward, backward in ((there, back), (back, there)):
            alone = turn == 0 and rank == ranks - 1 and forward == there
            yield queue.take("F", forward)._replace(joined=not alone)
            yield queue.take("B", backward)
    for _ in range(after):
        yield queue.take("B", back)
        yield queue.take("F", back)._replace(joined=True)
        yield queue.take("B", there)
    middle, halved = (rank + 1) // 2, False
    for place in range(rank + 1):
        halved = halved or (place == middle and rank % 2 == 1)
        yield queue.take("I" if halved else "B", back)
        halved = halved or (place == middle and rank % 2 == 0)
        yield queue.take("I" if halved else "B", there)
    for _ in range(after):
        yield from queue.weights()
        yield queue.take("I" if halved else "B", there)
    while queue.halves:
        yield from queue.weights()


Held = tuple[tuple[int, int], ...]
"""For each stage of a rank, in the model's order: micro-batches whose saved tensors are alive, and of these those whose
weight gradients are still to come (after "I")."""


@lru_cache(maxsize=4096)
def warm_up(schedule: str, ranks: int, vpp: int, micro_batches: int) -> tuple[Held, ...]:
    """For each rank, what its stages hold when its first backward begins, halves that wait left out: never more than
    one of its `peaks`, and all there is of them with one stage a rank. No order is walked through for it."""
    found: list[Held] = []
    for rank in range(ranks):
        if schedule == "none":
            counts = [1]
        elif schedule == "gpipe":
            counts = [micro_batches]
        elif schedule == "1f1b":
            counts = [ranks - rank]
        elif schedule == "interleaved":
            each, first = interleaved_begin(rank, ranks, vpp, micro_batches)
            counts = in_laps(first + 1, each, vpp)
        else:
            counts = [2 * ranks - rank - 1, rank + 1]
        found.append(tuple((min(count, micro_batches), 0) for count in counts))
    return tuple(found)


@lru_cache(maxsize=256)
def peaks(schedule: str, ranks: int, vpp: int, micro_batches: int) -> tuple[tuple[Held, ...], ...]:
    """For each rank, all that its stages hold at once at some time of the step and that is not exceeded, stage by
    stage, at another time. "I" frees nothing: autograd keeps the graph of a stage until its "W"; on stage 0 torch
    leaves all of the backward to "W", so that nothing waits there."""
    if vpp == 1:
        return tuple((one,) for one in warm_up(schedule, ranks, vpp, micro_batches))
    return tuple(
        tuple(_largest({held for kind, _, held, _ in backwards if kind != "I"}))
        for backwards in _backwards(schedule, ranks, vpp, micro_batches)
    )


Backward = tuple[str, int, Held, tuple[int, ...]]
"""A backward, or half of one, begins: its kind, the place of its stage on the rank, what the rank's stages hold then,
and how many backwards each of them has done."""


def _backwards(schedule: str, ranks: int, vpp: int, micro_batches: int) -> Iterator[Iterator[Backward]]:
    """Of each rank."""
    return (backwards_of_rank(schedule, rank, ranks, vpp, micro_batches) for rank in range(ranks))


def backwards_of_rank(schedule: str, rank: int, ranks: int, vpp: int, micro_batches: int) -> Iterator[Backward]:
    """The backwards of a rank in their order."""
    return _backwards_of(orders(schedule, ranks, vpp, micro_batches)[rank], stages_of(schedule, ranks, vpp)[rank])


def _backwards_of(order: Iterable[Action], own: Sequence[int]) -> Iterator[Backward]:
    held, done, place = [(0, 0)] * len(own), [0] * len(own), {stage: index for index, stage in enumerate(own)}
    for kind, stage, *_ in order:
        at = place[stage]
        alive, waiting = held[at]
        if kind == "F":
            held[at] = (alive + 1, waiting)
            continue
        yield kind, at, tuple(held), tuple(done)
        if kind == "I":
            held[at] = (alive, waiting + (stage > 0))
        else:
            held[at] = (alive - 1, waiting - (kind == "W" and stage > 0))
            done[at] += 1


class Moment(NamedTuple):
    """A backward ("B"), or half of one ("I", "W"), of stage ``place`` of a rank begins. ``held``: what all its stages
    hold then, and the number of micro-batches whose backward they have done; ``done``: of each of them, whether that is
    none, one, some or all; ``last``: this is the stage's last."""

    kind: str
    place: int
    held: tuple[tuple[int, int, int], ...]
    done: tuple[str, ...]
    last: bool


@lru_cache(maxsize=256)
def moments(schedule: str, ranks: int, vpp: int, micro_batches: int) -> tuple[tuple[Moment, ...], ...]:
    """For each rank, the backwards of a step, without those that begin as another does with more in flight."""
    if vpp == 1:
        return tuple(_moments(one[0][0], micro_batches) for one in warm_up(schedule, ranks, vpp, micro_batches))
    found = []
    for backwards in _backwards(schedule, ranks, vpp, micro_batches):
        seen: dict[Moment, set[tuple[tuple[int, int, int], ...]]] = {}
        for kind, place, held, done in backwards:
            counts = tuple(_share(count, micro_batches) for count in done)
            moment = Moment(kind, place, (), counts, done[place] == micro_batches - 1)
            now = tuple((*one, count) for one, count in zip(held, done, strict=True))
            seen.setdefault(moment, set()).add(now)
        found.append(
            tuple(moment._replace(held=one) for moment, all_held in seen.items() for one in _largest(all_held))
        )
    return tuple(found)


def _moments(most: int, micro_batches: int) -> tuple[Moment, ...]:
    """`moments` of a rank of one stage, that holds ``most`` whenever it begins a backward, until forwards run out."""
    found: dict[tuple[str, bool], Moment] = {}
    for done in sorted({0, min(1, micro_batches - 1), min(2, micro_batches - 1), micro_batches - 1}):
        share, last = _share(done, micro_batches), done == micro_batches - 1
        moment = Moment("B", 0, ((min(most, micro_batches - done), 0, done),), (share,), last)
        found.setdefault((share, last), moment)
    return tuple(found.values())


def _share(count: int, whole: int) -> str:
    if count == whole:
        return "all"
    return ("none", "one")[count] if count < 2 else "some"


def _largest(held: Collection[_Numbers]) -> list[_Numbers]:
    """Of different tuples of tuples of numbers, in order, those that no other is at least equal to everywhere."""
    ordered = sorted(held)
    rows = np.array([[number for one in row for number in one] for row in ordered])
    if len(ordered) == 1:
        return ordered
    return [row for row, values in zip(ordered, rows, strict=True) if (rows >= values).all(axis=1).sum() == 1]
