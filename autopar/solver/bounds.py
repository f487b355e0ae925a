"""Valid lower bounds on a step's time: no plan the search could return, generated or not, is faster.

Throughout, stage s needs w_s = f_s + b_s seconds per micro-batch, m micro-batches, p stages, and one transfer across
each stage boundary takes c seconds in either direction.

`pipeline_bound`: before stage s runs its first forward, the first micro-batch has passed every earlier stage (their f
and the s transfers); after its last backward the last one still passes them back (their b, s transfers). In between
stage s computes m times, and each of its receives starts only once it is posted, that is after the computation
before it, so that every receive costs it c: m forwards from stage s-1 and m backwards from s+1. One receive of the
first forward is one of the s transfers already counted. Hence, for every s,

    T >= sum_{j<s} w_j + max(0, 2s - 1) c + m (w_s + c [s > 0] + c [s < p-1])

``(m-1) max w + sum w`` is not used: it is neither a bound nor exact for 1F1B with uneven stages (tests show both).

`spread_bound`: the same when only the sum W of the w_s is known. The least possible maximum over s makes all equal:
w_s = (V/m)(1 - 1/m)^s, hence V = W / (1 - (1 - 1/m)^p); c is left out, which only lowers the bound.
"""

from __future__ import annotations

from collections.abc import Sequence


def pipeline_bound(work: Sequence[float], micro_batches: int, transfer_s: float = 0.0) -> float:
    """No 1F1B or GPipe step over stages of ``work`` seconds (forward and backward) ends sooner."""
    last = len(work) - 1
    bound = before = 0.0
    for s, w in enumerate(work):
        waits = transfer_s * ((s > 0) + (s < last))
        bound = max(bound, before + max(0, 2 * s - 1) * transfer_s + micro_batches * (w + waits))
        before += w
    return bound


def spread_bound(total: float, stages: int, micro_batches: int) -> float:
    """The least `pipeline_bound` of any split of ``total`` seconds of work into ``stages``, transfers free."""
    if stages == 1:
        return micro_batches * total
    return total / (1 - (1 - 1 / micro_batches) ** stages)
