"""The work of recurrences along the sequence: scans of state-space models, as `codegen/runtime/scans.py` computes them,
and torch's recurrent layers.

Products of one head: with c chunks of l positions, heads of width p and states of n numbers, the chunked scan does
``c (l*l*n + l*l*p + 2*l*p*n)`` multiply-adds, of any number of groups (arXiv 2405.21060, section 6.3). Mamba's scan has
a decay for each channel and state, so it has no such products: it streams its states [b, d, s, n] instead. The gated
delta rule adds ``c (l*l*n + l*l*(n+p)/2 + l*p*n)``: keys against keys, the triangular system that they make (half a
product), and what the state erases (arXiv 2406.06484, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, log2, prod

from autopar.graph.ir import Node
from autopar.solver.work_parts import Counted, LocalTensor, Matmul, Work

SELECTIVE, CHUNKED, DELTA = "autopar.selective_scan", "autopar.state_space_scan", "autopar.gated_delta_rule"
SCANS = (SELECTIVE, CHUNKED, DELTA)

Products = tuple[tuple[int, int, int, int], ...]
"""(batch, m, n, k) of each matrix product."""


def selective(x: tuple[int, ...], states: int) -> tuple[Products, int, int]:
    """Of Mamba's scan of x [b, d, s]: products, elements streamed in one direction, kernels.

    Of the states' size: five passes to make decays and additions and to read the result; for each doubling thirteen
    (two shifts, two products, one sum).
    """
    batch, channels, length = x
    rounds = ceil(log2(length)) if length > 1 else 0
    return ((batch * length, channels, 1, states),), (5 + 13 * rounds) * prod(x) * states, 8 + 7 * rounds


def chunked(x: tuple[int, ...], states: int, chunk: int) -> tuple[Products, int, int]:
    """Of Mamba-2's scan of x [b, s, h, p]: products, elements streamed in one direction, kernels.

    Six passes over the decays between positions [b, s, chunk, h]; reads and writes of what each group's heads share,
    and of the chunks' states in every doubling.
    """
    batch, length, heads, width = x
    chunks = ceil(length / chunk)
    each = batch * chunks * heads
    rounds = ceil(log2(chunks)) if chunks > 1 else 0
    streamed = (
        6 * each * chunk * chunk + 4 * each * chunk * (states + width) + (2 + 13 * rounds) * each * width * states
    )
    return (
        (
            (each, chunk, chunk, states),
            (each, chunk, width, chunk),
            (each, width, states, chunk),
            (each, chunk, width, states),
        ),
        streamed,
        30 + 7 * rounds,
    )


def delta(value: tuple[int, ...], states: int, chunk: int, channels: bool) -> tuple[Products, int, int]:
    """Of the gated delta rule of value [b, s, h, p]: products, elements streamed in one direction, kernels.

    ``channels``: each of the ``states`` decays by itself, so that both products within a chunk are made element by
    element: four passes over [l, l, n] for each. Else six passes over the decays between positions. Operands are copied
    and scaled by their decays; the state is read and written once a chunk, by six kernels.
    """
    batch, length, heads, width = value
    chunks = ceil(length / chunk)
    each = batch * chunks * heads
    within = ((each, chunk, chunk, states),) * 2
    rest = (
        (each, chunk, states + width, ceil(chunk / 2)),
        (each, chunk, width, chunk),
        (each, chunk, width, states),
        (each, chunk, width, states),
        (each, states, width, chunk),
    )
    decays = each * chunk * chunk * (8 * states if channels else 6)
    streamed = decays + 4 * each * chunk * (3 * states + 2 * width) + 4 * each * states * width
    return (*(() if channels else within), *rest), streamed, 30 + 6 * chunks


def scan_products(node: Node, shapes: Sequence[tuple[int, ...]]) -> tuple[Matmul, ...]:
    """The matrix products of a scan's forward."""
    return tuple(Matmul(*product) for product in _scanned(node, shapes)[0])


def scan(node: Node, inputs: Sequence[LocalTensor], output: LocalTensor, grads: Sequence[bool]) -> Counted:
    """Scans of state-space models; backward runs each product twice, and streams twice as much."""
    shapes = [tensor.shape for tensor in inputs]
    matmuls = scan_products(node, shapes)
    _, streamed, kernels = _scanned(node, shapes)
    size = inputs[0].bytes_per_element
    moved = sum(tensor.nbytes for tensor in inputs) + output.nbytes + streamed * size
    return (
        Work(matmuls, nbytes=moved, kernels=kernels + len(matmuls)),
        Work(2 * matmuls, nbytes=2 * moved, kernels=2 * (kernels + len(matmuls))),
    )


def recurrent(node: Node, inputs: Sequence[LocalTensor], output: LocalTensor, grads: Sequence[bool]) -> Counted:
    """LSTM and GRU: for each layer and direction the inputs' product at once, and one small product a position."""
    x, first = inputs[0].shape, 3 if node.op == "autopar.lstm" else 2
    batch, length = (x[0], x[1]) if node.args[-2] else (x[1], x[0])
    matrices = [tensor.shape for tensor in inputs[first:] if len(tensor.shape) == 2]
    whole = [Matmul(1, batch * length, gates, width) for gates, width in matrices[::2]]
    steps = [Matmul(length, batch, gates, width) for gates, width in matrices[1::2]]
    read = sum(tensor.nbytes for tensor in inputs) + output.nbytes
    gated = sum(batch * length * gates * inputs[0].bytes_per_element for gates, _ in matrices[1::2])
    forward = (*whole, *steps)
    kernels = len(whole) + 2 * length * len(steps)
    return (
        Work(forward, matmul_bytes=read, nbytes=3 * gated, kernels=kernels),
        Work(2 * forward, matmul_bytes=2 * read, nbytes=6 * gated, kernels=2 * kernels),
    )


def _scanned(node: Node, shapes: Sequence[tuple[int, ...]]) -> tuple[Products, int, int]:
    if node.op == SELECTIVE:
        return selective(shapes[0], shapes[2][-1])
    if node.op == DELTA:
        return delta(shapes[2], shapes[1][-1], node.args[5], len(shapes[3]) == 4)
    return chunked(shapes[0], shapes[3][-1], node.args[5])
