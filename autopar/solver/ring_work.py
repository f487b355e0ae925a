"""Ring attention (`codegen/runtime/ring.py`): what a rank does in its n turns, and what of the sending it waits for.

A turn attends to the keys and values of one rank, and meanwhile sends those in hand to the next rank. With C seconds of
computation and T of sending in a turn, what a rank waits for is

    forward     max(0, T - C) in each of n-1 turns: nothing is sent in the last one
    backward    gradients of keys and values, as large as these, follow one turn behind: max(0, T - C) in the first
                turn and the last, max(0, 2T - C) in those between, and T when they go home

so that no more is hidden than is computed meanwhile. Turns are equally long where the sequence is in balanced order;
elsewhere the last rank, which computes most, is the one that all wait for (`work_parts.Attention.share`), and its turns
are taken to be equal.

Beside attention a rank packs keys and values into one message, adds up results in float32 weighted by their
log-sum-exp, and adds gradients up, those of queries in float32. Of a causal mask in balanced order every second turn,
on average, has half of the queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from autopar.graph.ir import Node
from autopar.solver.work_parts import Attention, Counted, LocalTensor, Work

if TYPE_CHECKING:
    from autopar.solver.op_costs import OpCosts

RANKS = "ring"
"""The keyword under which the node of a ring has its number of ranks, where work is counted."""

MERGE_KERNELS = 7
"""Cast, log-add-exp, difference, exponential, weighted mean, copy of the sums; and the packing's share."""


@dataclass(frozen=True, slots=True)
class RingTime:
    """Seconds of all turns ``forward`` and ``backward``, and those that a rank ``waits`` in each direction beside;
    the rest as `op_costs.OpTime`."""

    forward: float
    backward: float
    waits_forward: float
    waits_backward: float
    source: str
    host_forward: float
    host_backward: float


def ring_time(
    ops: OpCosts,
    node: Node,
    inputs: Sequence[LocalTensor],
    output: LocalTensor,
    grads: Sequence[bool],
    ranks: int,
    send_s: float,
) -> RingTime:
    """Attention of queries to the keys of ``ranks`` ranks, of which this one holds ``inputs``. ``send_s``: seconds to
    send its keys and values to the next."""
    query, key, value = inputs
    whole = (query, _all_of(key, ranks), _all_of(value, ranks))
    time = ops.seconds(replace(node, kwargs={**node.kwargs, RANKS: ranks}), whole, output, grads)
    forward, backward = time.forward / ranks, time.backward / ranks
    waits = (ranks - 1) * max(0.0, send_s - forward)
    back = 2 * max(0.0, send_s - backward) + (ranks - 2) * max(0.0, 2 * send_s - backward) + send_s
    return RingTime(time.forward, time.backward, waits, back, time.source, time.host_forward, time.host_backward)


def _all_of(tensor: LocalTensor, ranks: int) -> LocalTensor:
    *lead, positions, width = tensor.shape
    return LocalTensor((*lead, positions * ranks, width), tensor.bytes_per_element)


def ring_work(
    ranks: int, inputs: Sequence[LocalTensor], output: LocalTensor, sizes: tuple[int, int, int, int, bool]
) -> Counted:
    """Forward and backward work of all turns on one rank. ``inputs``: its queries, and the keys and values of all;
    ``sizes``: the first fields of `Attention`."""
    query, key, value = inputs
    wide = max(4, query.bytes_per_element)
    rows = 1 + (ranks - 1) * (0.75 if sizes[-1] and query.shape[-2] % 2 == 0 else 1.0)  # queries, in times all of them
    held = (key.nbytes + value.nbytes) / ranks
    sums = wide * query.elements / query.shape[-1]
    read = rows * query.nbytes + ranks * held
    merged = (rows - 1) * (output.nbytes + wide * 4 * output.elements + 6 * sums)
    ends = 2 * (output.nbytes + wide * output.elements)
    forward = Work(
        attention=Attention(*sizes, matmuls=2, pieces=ranks),
        matmul_bytes=read + rows * (output.nbytes + sums),
        nbytes=merged + ends + 2 * held,
        kernels=ranks + (ranks - 1) * MERGE_KERNELS + 3,
    )
    added = rows * (query.nbytes + 2 * wide * query.elements) + ranks * 3 * held
    backward = Work(
        attention=Attention(*sizes, matmuls=5, pieces=ranks),
        matmul_bytes=2 * read + rows * (2 * output.nbytes + sums),
        nbytes=rows * (2 * output.nbytes + sums) + added + 2 * wide * query.elements + 4 * held,
        kernels=ranks * (3 + 3) + 6,
    )
    return forward, backward
