"""Valid lower bounds on a step's time: no plan the search could return, generated or not, is faster.

Throughout, stage s needs f_s and b_s seconds per micro-batch, forward and backward, and a_s once after its last
backward; there are m micro-batches and p ranks, and one transfer between neighbouring ranks takes c seconds. i_s is the
part of b_s that must run before the gradient goes on to stage s-1: all of it, unless the schedule halves backwards;
then what gives weight gradients alone may wait (and on stage 0, which hands on nothing, torch leaves all to that half:
i_0 = 0). Rank q has the stages S_q, one of which is stage q, the first of them in the model, under every placement.

`pipeline_bound` is the largest of, over ranks q:

(a) Whatever stage a rank computes first, that micro-batch has passed stages 0 to q-1, on q other ranks. Then the rank
    does all of its own work, one thing at a time:

        T >= sum_{j<q} f_j + q c + m sum_{S_q} (f_s + b_s) + sum_{S_q} a_s

(b) The last gradient that the rank hands on is of stage q, since a micro-batch's backward goes through its other stages
    first; by then it has done all its forwards and all i_s. That gradient passes back through stages q-1 to 0, the
    last of which owes all of its backward and what it does once:

        T >= sum_{j<q} f_j + 2 q c + m sum_{S_q} (f_s + i_s) + sum_{0<j<q} i_j + [q > 0] (b_0 + a_0)

(c) The last micro-batch to come back passes every stage: T >= sum f + sum_{s>0} i_s + b_0 + a_0 + 2 c (boundaries
    between ranks).

With one stage a rank (1F1B, GPipe), a receive starts only once it is posted, after the computation before it, so that
each costs the rank c: m forwards from stage q-1, of which one is among the q transfers of (a) and (b), and m backwards
from q+1. GPipe takes at least (m-1)(max f + max b) + sum(f + b), what it takes if transfers cost nothing.
``(m-1) max (f + b) + sum (f + b)`` is not used for 1F1B: it is neither a bound nor exact for uneven stages (tests show
both).

`spread_bound`: when only the sum W of all f + b is known. One stage a rank: the least possible maximum over ranks of
sum_{j<q} w_j + m w_q makes all equal: w_q = (V/m)(1 - 1/m)^q, hence V = W / (1 - (1 - 1/m)^p). Several: some rank has
at least its even share, V = m W / p. Transfers are left out, which only lowers the bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from autopar.schedule import SCHEDULES
from autopar.solver.simulate import StageTimes, gpipe_seconds


def pipeline_bound(
    stages: Sequence[StageTimes], micro_batches: int, transfer_s: float = 0.0, schedule: str = "1f1b", vpp: int = 1
) -> float:
    """No step over these stages ends sooner; ``transfer_s``: one transfer between ranks."""
    rule = SCHEDULES[schedule]
    m, ranks = micro_batches, len(stages) // vpp
    place = [rule.rank_of(stage, ranks) for stage in range(len(stages))]
    handing = [s.backward_s - (s.weight_s if rule.splits_backward else 0.0) for s in stages]
    if rule.splits_backward:
        handing[0] = 0.0
    first = stages[0]
    way_back = first.backward_s + first.after_s
    bound = 0.0
    there = back = 0.0
    for rank in range(ranks):
        own = [stage for stage in range(len(stages)) if place[stage] == rank]
        forward = sum(stages[stage].forward_s for stage in own)
        busy = m * (forward + sum(stages[stage].backward_s for stage in own))
        waits = waits_of(rank, ranks, m, vpp) * transfer_s
        arrival = there + rank * transfer_s + waits
        bound = max(bound, arrival + busy + sum(stages[stage].after_s for stage in own))
        if rank:
            handed = m * (forward + sum(handing[stage] for stage in own))
            bound = max(bound, arrival + rank * transfer_s + handed + back + way_back)
            back += handing[rank]
        there += stages[rank].forward_s
    through = sum(s.forward_s for s in stages) + sum(handing[1:]) + way_back
    bound = max(bound, through + 2 * crossings_of(schedule, ranks, vpp) * transfer_s)
    return max(bound, gpipe_seconds(stages, m)) if schedule == "gpipe" else bound


def waits_of(rank: int, ranks: int, micro_batches: int, vpp: int) -> int:
    """Receives that a rank has to sit through, beside the first one."""
    return (micro_batches - 1) * (rank > 0) + micro_batches * (rank < ranks - 1) if vpp == 1 else 0


def crossings_of(schedule: str, ranks: int, vpp: int) -> int:
    """Boundaries between stages on different ranks."""
    place = [SCHEDULES[schedule].rank_of(stage, ranks) for stage in range(ranks * vpp)]
    return sum(one != other for one, other in pairwise(place))


def spread_bound(total: float, ranks: int, micro_batches: int, vpp: int = 1) -> float:
    """The least `pipeline_bound` of any split of ``total`` seconds of work, transfers free."""
    if ranks == 1 or vpp > 1:
        return micro_batches * total / ranks
    return total / (1 - (1 - 1 / micro_batches) ** ranks)
