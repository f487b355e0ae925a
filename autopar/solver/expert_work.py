"""The work of a mixture's experts, as `codegen/runtime/experts.py` computes them, and as other stacks do.

They are two grouped matmuls (three where gate and values are apart), each of (an expert's rows, k) and (k, n) for every
expert that a rank holds. A token has k rows, one for each expert it chose; where a rank holds a part of the experts,
the one that is waited for has `IMBALANCE` times its share of them.

Other stacks (`Stack`) may have routing that is forced to be even (``imbalance``), and matmuls of experts that are one
kernel each, with a kernel that casts its operand where operands are narrow (``grouped``; Transformer Engine's
GroupedLinear, transformer_engine/pytorch/module/grouped_linear.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import ceil

from autopar.graph.dispatch import PARAMETERS, fullest_rows, sent_rows
from autopar.graph.ir import IMBALANCE, Node
from autopar.solver.work_parts import Counted, LocalTensor, Matmul, Work

DOWN = PARAMETERS + 1
"""Where the matrices of the last matmul are among the operands."""

EVEN = IMBALANCE[0] / IMBALANCE[1]
"""What the fullest rank's experts have of an even share, where nothing is known of the stack."""


def expert_rows(node: Node, index: LocalTensor, up: LocalTensor, imbalance: float = EVEN) -> int:
    """Rows that the slowest rank's experts compute: one for each of their tokens' choices."""
    share = Fraction(imbalance).limit_denominator(1000).as_integer_ratio()
    experts, ep = int(node.kwargs["experts"]), int(node.kwargs.get("ep", 1))
    return fullest_rows(index.elements, up.shape[0], experts, ep, share)


def exchanged_rows(node: Node, index: LocalTensor, up: LocalTensor) -> int:
    """Rows that a rank sends to those it shares experts with, its own included; 0 where it shares none."""
    ep = int(node.kwargs.get("ep", 1))
    return sent_rows(index.elements, up.shape[0], int(node.kwargs["experts"]), ep) if ep > 1 else 0


def experts_work(
    node: Node,
    inputs: Sequence[LocalTensor],
    output: LocalTensor,
    grads: Sequence[bool],
    imbalance: float = EVEN,
) -> Counted:
    """Rows gathered by expert, grouped matmuls with the activation before the last, and added up by token.

    Streams, in widths of a row: d twice to gather, three times to add; f seven times for activation, gate and routing
    weight, eighteen times backwards. Sorting the choices: a dozen small kernels."""
    hidden, index, _, up, down = inputs[:5]
    rows, held = expert_rows(node, index, up, imbalance), up.shape[0]
    matrices = (place for place, one in enumerate(inputs) if place >= PARAMETERS and len(one.shape) == 3)
    first = [place for place in matrices if place != DOWN]
    used = max(1, min(held, rows))
    each, width, inner = ceil(rows / used), hidden.shape[-1], down.elements // (held * hidden.shape[-1])
    wide = sum(inputs[place].elements for place in first) // (held * width)
    size = hidden.bytes_per_element
    d, f = rows * width * size, rows * inner * size
    read = (sum(inputs[place].nbytes for place in first) + down.nbytes) * used / held
    moved = read + len(first) * d + rows * wide * size + f + d
    sort = 12 * index.nbytes
    forward = (*(Matmul(used, each, wide // len(first), width) for _ in first), Matmul(used, each, width, inner))
    back = [m for m in forward if grads[0]]
    trains = [grads[place] for place in (*first, DOWN)]
    back += [Matmul(m.batch, m.n, m.k, m.m) for m, grad in zip(forward, trains, strict=True) if grad]
    # Sent rows are gathered by rank, received ones by expert, and both put back.
    sent = 4 * exchanged_rows(node, index, up) * width * size
    added = [one for one in inputs[5:] if len(one.shape) == 2]
    biases = sum(bias.nbytes for bias in added) + (rows * (wide + width) * 3 * size if added else 0)
    return (
        Work(forward, matmul_bytes=moved, nbytes=5 * d + output.nbytes + 7 * f + sort + sent + biases, kernels=24),
        Work(
            tuple(back),
            matmul_bytes=2 * moved,
            nbytes=5 * d + output.nbytes + 18 * f + sort + sent + biases,
            kernels=16 + len(back),
        ),
    )
