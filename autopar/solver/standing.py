"""What ranks surely hold at some times of a step: micro-batches in flight, and gradients of those that are done.

Bounds count the bytes of a rank at a few times when a backward begins, never more than there is (`orders.moments` has
all times). These are the first backward, when no gradients are kept, and later ones, when they are and still much is in
flight: of schedules of one stage the second backward, of others the last with a forward before it, the first behind
which every stage has done one, and between these a few.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

from autopar.schedule import SCHEDULES
from autopar.solver.orders import backwards_of_rank, in_laps, interleaved_begin, warm_up

MOST_ACTIONS = 4_000
"""Schedules of several stages without a closed form are not walked through if they have more actions."""

Holding = tuple[int, bool]
"""Of a stage: micro-batches in flight at least, and whether it surely keeps gradients (`MemoryModel.least_gradients`).
"""

Standing = tuple[Holding, ...]
"""For each stage of a rank, in the model's order."""

_Counted = tuple[Sequence[int], Sequence[int]]
"""By stage: micro-batches in flight, and backwards done."""


@lru_cache(maxsize=4096)
def standing(
    schedule: str, ranks: int, vpp: int, micro_batches: int, drains: bool = False
) -> tuple[tuple[Standing, ...], ...]:
    """For each rank, what it holds at some times. ``drains``: whether gradients that were reduced are held to the end
    of the step (`MemoryModel.drains`)."""
    # A stage that halves backwards keeps gradients whole when it has done two.
    needed = 2 if SCHEDULES[schedule].splits_backward else 1
    found = []
    for rank, first in enumerate(warm_up(schedule, ranks, vpp, micro_batches)):
        times = [tuple((alive, False) for alive, _ in first)]
        for alive, done in _later(schedule, rank, ranks, vpp, micro_batches, times[0][0][0]):
            kept = (needed <= count and (drains or count < micro_batches) for count in done)
            times.append(tuple(zip(alive, kept, strict=True)))
        found.append(_largest(times))
    return tuple(found)


def least_holding(stages: Iterable[Holding]) -> Holding:
    """What each of these stages holds at least."""
    alive, kept = zip(*stages, strict=True)
    return min(alive), all(kept)


def _later(schedule: str, rank: int, ranks: int, vpp: int, micro_batches: int, first: int) -> Iterable[_Counted]:
    """``first``: micro-batches in flight at the first backward."""
    if vpp == 1:
        # Forwards and backwards take turns until forwards run out.
        return [((min(first, micro_batches - 1),), (1,))] if micro_batches > 1 else []
    if schedule == "interleaved":
        return _interleaved(rank, ranks, vpp, micro_batches)
    if 2 * ranks * vpp * micro_batches > MOST_ACTIONS:
        return []
    walked = backwards_of_rank(schedule, rank, ranks, vpp, micro_batches)
    kept = [([alive for alive, _ in held], done) for kind, _, held, done in walked if kind != "I" and min(done) > 1]
    return [max(kept, key=lambda one: sum(one[0]))] if kept else []


def _interleaved(rank: int, ranks: int, vpp: int, micro_batches: int) -> list[_Counted]:
    """See `orders` for the order in which laps follow each other."""
    each, first = interleaved_begin(rank, ranks, vpp, micro_batches)
    if micro_batches % each:
        return []
    total = vpp * micro_batches

    def counted(backward: int) -> _Counted:
        """When the backward of this number begins."""
        forwards = in_laps(min(total, first + 1 + backward), each, vpp)
        done = in_laps(backward, each, vpp)[::-1]
        return [ahead - back for ahead, back in zip(forwards, done, strict=True)], done

    turns = total - first - 1
    wanted = {turns, *(lap * each + 1 for lap in {vpp // 2, vpp - 1} if lap * each >= turns)}
    return [counted(backward) for backward in sorted(wanted) if 0 < backward < total]


def _largest(times: Sequence[Standing]) -> tuple[Standing, ...]:
    """Those that no other exceeds."""
    different = list(dict.fromkeys(times))

    def exceeds(one: Standing, other: Standing) -> bool:
        return one != other and all(a >= b and x >= y for (a, x), (b, y) in zip(one, other, strict=True))

    return tuple(one for one in different if not any(exceeds(other, one) for other in different))
