"""What one operator does: matmul FLOP and bytes moved, forward and backward, from local shapes.

Prices follow from this by a roofline (`autopar.solver.op_costs`). Bytes are those of the kernels that eager PyTorch
runs: each reads its operands from memory and writes its result there; views move nothing. FLOP are those of matmuls
and attention; everything else is bound by bytes.

Conventions
* a matmul of (m, k) and (k, n) is 2*m*n*k FLOP; its backward is one such matmul for each operand with a gradient;
* fused attention runs two matmuls forward and five backward (the scores are computed again: FlashAttention-2, Dao,
  arXiv 2307.08691, section 4), so 2.5 times the forward; a causal mask halves the work done;
* the experts of a mixture are two grouped matmuls, each of (an expert's rows, k) and (k, n) for every expert that a
  rank holds. A token has k rows, one for each expert it chose; where a rank holds a part of the experts, the one that
  is waited for has `IMBALANCE` times its share of them;
* `flops`, which counts model FLOP for MFU, does **not** halve causal attention (PaLM, arXiv 2204.02311, appendix B;
  Megatron, arXiv 2104.04473), so that figures compare with those papers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any, NamedTuple

from autopar.graph.ir import EXPERTS, IMBALANCE, Node
from autopar.solver import scan_work

ATTENTION = "aten.scaled_dot_product_attention"


class LocalTensor(NamedTuple):
    """One rank's piece of a tensor (a named tuple, because prices are looked up by it: its hash must be cheap)."""

    shape: tuple[int, ...]
    bytes_per_element: int

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.bytes_per_element


class Matmul(NamedTuple):
    """``batch`` products of (m, k) and (k, n)."""

    batch: int
    m: int
    n: int
    k: int

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.n * self.k


@dataclass(frozen=True, slots=True)
class Attention:
    """Fused attention of ``batch`` (samples times query heads) problems; ``matmuls``: 2 forward, 5 backward.
    ``balanced``: whether queries split by position are chunks from both ends of the sequence, if they can be."""

    batch: int
    queries: int
    keys: int
    head_dim: int
    causal: bool
    matmuls: int
    balanced: bool = True

    @property
    def share(self) -> float:
        """The part of all keys that a query reads on average; blocks above the diagonal are skipped.

        Fewer queries than keys are one rank's, split by position: half of all keys where each rank takes a chunk from
        both ends of the sequence, which an even number of queries allows; else what the last rank reads.
        """
        if not self.causal:
            return 1.0
        return (
            0.5
            if (self.balanced and self.queries % 2 == 0) or self.queries >= self.keys
            else 1 - self.queries / self.keys / 2
        )

    @property
    def flops(self) -> float:
        """FLOP done."""
        return 2 * self.matmuls * self.batch * self.queries * self.keys * self.head_dim * self.share


@dataclass(frozen=True, slots=True)
class Work:
    """One direction of one operator: its matmul-like parts, other bytes moved, and how many kernels it launches.

    ``nbytes`` are moved by streaming kernels and do not overlap with the matmuls, whose own operands are in
    ``matmul_bytes``.
    """

    matmuls: tuple[Matmul, ...] = ()
    attention: Attention | None = None
    matmul_bytes: float = 0.0
    nbytes: float = 0.0
    kernels: float = 0

    @property
    def flops(self) -> float:
        return sum(matmul.flops for matmul in self.matmuls) + (self.attention.flops if self.attention else 0)


NOTHING = Work()


def work(node: Node, inputs: Sequence[LocalTensor], output: LocalTensor, grads: Sequence[bool]) -> tuple[Work, Work]:
    """Forward and backward work of ``node`` on local tensors; ``inputs`` and ``grads`` follow ``node.operands()``."""
    count = _COUNTS.get(node.op, _elementwise)
    forward, backward = count(node, inputs, output, grads)
    return forward, backward if any(grads) else NOTHING


def variant(node: Node) -> Any:
    """What a price depends on beside operator and shapes; hashable."""
    if node.op == ATTENTION:
        return is_causal(node)
    if node.op == "aten.einsum":
        return node.args[0]
    if node.op == EXPERTS:
        return node.kwargs["experts"], node.kwargs["gate"], node.kwargs.get("ep", 1)
    if node.op == CHUNKED:
        return node.args[5]
    if node.op in RECURRENT:
        return node.args[-2:]
    return None


def flops(node: Node, input_shapes: Sequence[tuple[int, ...]], output_shape: tuple[int, ...]) -> float:
    """Model FLOP of the forward: matmuls and attention, causal attention in full (see the module's conventions)."""
    if node.op == ATTENTION:
        query, key = input_shapes[0], input_shapes[1]
        head_dims = query[-1] + input_shapes[2][-1]
        return 2.0 * prod(query[:-1]) * key[-2] * head_dims
    if node.op == EXPERTS:
        (index, up), down = (input_shapes[1], input_shapes[3]), input_shapes[4]
        return 2.0 * prod(index) * (prod(up[1:]) + prod(down[1:]))
    if node.op in (SELECTIVE, CHUNKED):
        return float(sum(matmul.flops for matmul in _scan_products(node, input_shapes)))
    matmul = matmul_of(node, input_shapes, output_shape)
    return float(matmul.flops) if matmul else 0.0


def is_causal(node: Node) -> bool:
    """Whether an attention node masks the future; its place follows torch's signature."""
    if "is_causal" in node.kwargs:
        return bool(node.kwargs["is_causal"])
    return len(node.args) > 5 and bool(node.args[5])


def matmul_of(node: Node, shapes: Sequence[tuple[int, ...]], output: tuple[int, ...]) -> Matmul | None:
    """The one matrix product that ``node`` is, or None."""
    if node.op == "aten.linear":
        return Matmul(1, prod(output[:-1]), output[-1], shapes[0][-1])
    if node.op in ("aten.mm", "aten.addmm"):
        left = shapes[node.op == "aten.addmm"]
        return Matmul(1, output[-2], output[-1], left[-1])
    if node.op in ("aten.bmm", "aten.baddbmm", "aten.matmul"):
        left, right = shapes[-2], shapes[-1]
        if len(left) == 1 or len(right) == 1:
            return Matmul(1, prod(output), 1, left[-1])
        if len(right) == 2:
            return Matmul(1, prod(output[:-1]), output[-1], left[-1])
        return Matmul(prod(output[:-2]), output[-2], output[-1], left[-1])
    if node.op in CONVOLUTIONS:
        return _convolution_matmul(node, shapes, output)
    if node.op == "aten.einsum" and len(shapes) == 2:
        return _einsum_matmul(node.args[0], shapes)
    return None


def _convolution_matmul(node: Node, shapes: Sequence[tuple[int, ...]], output: tuple[int, ...]) -> Matmul:
    """A convolution as the products it is computed by: for each group, positions by output channels, over the input
    channels and the window (cuDNN, arXiv 1410.0759, section 3). Transposed: over the input's positions instead."""
    x, weight = shapes[:2]
    rank = len(weight) - 2
    groups = (output if "transpose" in node.op else x)[-rank - 1] // weight[1]  # of this rank
    window = prod(weight[2:])
    if "transpose" in node.op:
        return Matmul(groups, prod(x) // x[-rank - 1], weight[1] * window, weight[0] // groups)
    return Matmul(groups, prod(output) // output[-rank - 1], weight[0] // groups, weight[1] * window)


def _einsum_matmul(equation: str, shapes: Sequence[tuple[int, ...]]) -> Matmul:
    inputs, _, result = equation.replace(" ", "").partition("->")
    left, right = inputs.split(",")
    sizes = dict(zip(left, shapes[0], strict=True)) | dict(zip(right, shapes[1], strict=True))
    both = set(left) & set(right)
    return Matmul(
        batch=prod(sizes[f] for f in both & set(result)),
        m=prod(sizes[f] for f in set(left) - both),
        n=prod(sizes[f] for f in set(right) - both),
        k=prod(sizes[f] for f in both - set(result)),
    )


Counted = tuple[Work, Work]
Counter = Callable[[Node, Sequence[LocalTensor], LocalTensor, Sequence[bool]], Counted]


def _matmul(node: Node, inputs: Sequence[LocalTensor], output: LocalTensor, grads: Sequence[bool]) -> Counted:
    """Left and right operand and, first (addmm) or last (linear), a bias."""
    product = matmul_of(node, [tensor.shape for tensor in inputs], output.shape)
    if product is None:
        return _elementwise(node, inputs, output, grads)
    first = 1 if node.op in ("aten.addmm", "aten.baddbmm") else 0
    left, right = inputs[first], inputs[first + 1]
    biases = [i for i in range(len(inputs)) if i not in (first, first + 1)]
    batch, m, n, k = product
    moved = left.nbytes + right.nbytes + output.nbytes + sum(inputs[i].nbytes for i in biases)
    back, back_bytes = [], 0
    for position, matmul in ((first, Matmul(batch, m, k, n)), (first + 1, Matmul(batch, n, k, m))):
        if grads[position]:
            back.append(matmul)
            back_bytes += left.nbytes + right.nbytes + output.nbytes
    summed = [i for i in biases if grads[i]]
    return (
        Work((product,), matmul_bytes=moved, kernels=1),
        Work(
            tuple(back),
            matmul_bytes=back_bytes,
            nbytes=sum(output.nbytes + inputs[i].nbytes for i in summed),
            kernels=len(back) + len(summed),
        ),
    )


def _attention(node: Node, inputs: Sequence[LocalTensor], output: LocalTensor, grads: Sequence[bool]) -> Counted:
    query, key, value = inputs[:3]
    batch, causal = prod(query.shape[:-2]), is_causal(node)
    head_dim = (query.shape[-1] + value.shape[-1]) // 2
    sizes = (batch, query.shape[-2], key.shape[-2], head_dim, causal)
    read = sum(tensor.nbytes for tensor in inputs)
    statistics = 4 * prod(query.shape[:-1])
    forward = Work(attention=Attention(*sizes, matmuls=2), matmul_bytes=read + output.nbytes + statistics, kernels=1)
    # Backward reads everything and the output's gradient, and first computes rowsum(dO * O) in a kernel of its own.
    backward = Work(
        attention=Attention(*sizes, matmuls=5),
        matmul_bytes=2 * read + 2 * output.nbytes + statistics,
        nbytes=2 * output.nbytes + statistics,
        kernels=3,
    )
    if causal and query.shape[-2] < key.shape[-2] and query.shape[-2] % 2 == 0:
        # Two runs, of a chunk of queries each. Their results are concatenated; the gradients of the keys that each of
        # them read are written into zeros (2 writes, 2 reads and writes of about half) and added (3).
        forward = replace(forward, nbytes=2 * output.nbytes, kernels=3)
        moved = backward.nbytes + 7 * (key.nbytes + value.nbytes)
        backward = replace(backward, nbytes=moved, kernels=2 * backward.kernels + 10)
    return forward, backward


def expert_rows(node: Node, index: LocalTensor, up: LocalTensor) -> int:
    """Rows that the slowest rank's experts compute: one for each of their tokens' choices."""
    held, experts = up.shape[0], int(node.kwargs["experts"])
    more, less = IMBALANCE if held < experts else (1, 1)
    return -(-index.elements * held * int(node.kwargs.get("ep", 1)) * more // (experts * less))


def exchanged_rows(node: Node, index: LocalTensor, up: LocalTensor) -> int:
    """Rows that a rank sends to those it shares experts with, its own included; 0 where it shares none."""
    ep = int(node.kwargs.get("ep", 1))
    return -(-index.elements * up.shape[0] * ep // int(node.kwargs["experts"])) if ep > 1 else 0


def _experts(node: Node, inputs: Sequence[LocalTensor], output: LocalTensor, grads: Sequence[bool]) -> Counted:
    """Rows gathered by expert, two grouped matmuls with the activation between them, and added up by token
    (`codegen/runtime/experts.py`). Streams, in widths of a row: d twice to gather, three times to add; f seven times
    for activation, gate and routing weight, eighteen times backwards. Sorting the choices: a dozen small kernels."""
    hidden, index, _, up, down = inputs[:5]
    rows, held = expert_rows(node, index, up), up.shape[0]
    used = max(1, min(held, rows))
    each, width, inner = ceil(rows / used), hidden.shape[-1], down.elements // (held * hidden.shape[-1])
    wide = up.elements // (held * width)
    size = hidden.bytes_per_element
    d, f = rows * width * size, rows * inner * size
    read = (up.nbytes + down.nbytes) * used / held
    moved = read + d + rows * wide * size + f + d
    sort = 12 * index.nbytes
    forward = (Matmul(used, each, wide, width), Matmul(used, each, width, inner))
    back = [m for m in forward if grads[0]]
    back += [Matmul(m.batch, m.n, m.k, m.m) for m, grad in zip(forward, grads[3:5], strict=True) if grad]
    # Sent rows are gathered by rank, received ones by expert, and both put back.
    sent = 4 * exchanged_rows(node, index, up) * width * size
    biases = sum(bias.nbytes for bias in inputs[5:]) + (rows * (wide + width) * 3 * size if inputs[5:] else 0)
    return (
        Work(forward, matmul_bytes=moved, nbytes=5 * d + output.nbytes + 7 * f + sort + sent + biases, kernels=24),
        Work(
            tuple(back),
            matmul_bytes=2 * moved,
            nbytes=5 * d + output.nbytes + 18 * f + sort + sent + biases,
            kernels=16 + len(back),
        ),
    )


def _elementwise(node: Node, inputs: Sequence[LocalTensor], output: LocalTensor, grads: Sequence[bool]) -> Counted:
    """Reads each operand once; the gradient of each operand reads the output's gradient and one saved tensor."""
    size = output.nbytes
    moved = 0
    kernels = 0
    for tensor, grad in zip(inputs, grads, strict=True):
        if grad:
            moved += 3 * size + _reduced(tensor, output)
            kernels += 1 + (tensor.elements != output.elements)
    return Work(nbytes=sum(t.nbytes for t in inputs) + size, kernels=1), Work(nbytes=moved, kernels=kernels)


def _sum_like(node: Node, inputs: Sequence[LocalTensor], output: LocalTensor, grads: Sequence[bool]) -> Counted:
    """Addition and subtraction: the gradient is handed on as it is, or summed where an operand was broadcast."""
    back = [tensor for tensor, grad in zip(inputs, grads, strict=True) if grad and tensor.elements != output.elements]
    return (
        Work(nbytes=sum(t.nbytes for t in inputs) + output.nbytes, kernels=1),
        Work(nbytes=sum(_reduced(tensor, output) for tensor in back), kernels=len(back)),
    )


def _reduced(tensor: LocalTensor, output: LocalTensor) -> int:
    """Bytes of summing a gradient of the output's size down to a broadcast operand."""
    return output.nbytes + tensor.nbytes if tensor.elements != output.elements else 0


def _copy(node: Node, inputs: Sequence[LocalTensor], output: LocalTensor, grads: Sequence[bool]) -> Counted:
    """Reads everything, writes everything; so does its gradient."""
    moved = Work(nbytes=sum(t.nbytes for t in inputs) + output.nbytes, kernels=1)
    return moved, moved


def _cast(node: Node, inputs: Sequence[LocalTensor], output: LocalTensor, grads: Sequence[bool]) -> Counted:
    """A cast to the type a tensor has already returns it as it is."""
    if inputs[0].bytes_per_element == output.bytes_per_element:
        return NOTHING, NOTHING
    return _copy(node, inputs, output, grads)


def _cat(node: Node, inputs: Sequence[LocalTensor], output: LocalTensor, grads: Sequence[bool]) -> Counted:
    """The gradients are views of the output's gradient."""
    return Work(nbytes=2 * output.nbytes, kernels=1), NOTHING


def _view(node: Node, inputs: Sequence[LocalTensor], output: LocalTensor, grads: Sequence[bool]) -> Counted:
    """Moves nothing. A gradient is summed where a dim was expanded, and written into zeros where a part was taken."""
    source = inputs[0]
    if output.elements > source.elements:
        return NOTHING, Work(nbytes=output.nbytes + source.nbytes, kernels=1)
    if output.elements < source.elements:
        return NOTHING, Work(nbytes=source.nbytes + 2 * output.nbytes, kernels=2)
    return NOTHING, NOTHING


def _reduction(node: Node, inputs: Sequence[LocalTensor], output: LocalTensor, grads: Sequence[bool]) -> Counted:
    """The gradient of a sum is a broadcast view; others are read against their input."""
    read = Work(nbytes=sum(t.nbytes for t in inputs) + output.nbytes, kernels=1)
    if node.op in ("aten.sum", "aten.mean"):
        return read, NOTHING
    return read, Work(nbytes=2 * inputs[0].nbytes + output.nbytes, kernels=1)


def _softmax(node: Node, inputs: Sequence[LocalTensor], output: LocalTensor, grads: Sequence[bool]) -> Counted:
    return (
        Work(nbytes=inputs[0].nbytes + output.nbytes, kernels=1),
        Work(nbytes=2 * output.nbytes + inputs[0].nbytes, kernels=1),
    )


def _norm(node: Node, inputs: Sequence[LocalTensor], output: LocalTensor, grads: Sequence[bool]) -> Counted:
    """Layer and RMS norm as one fused kernel each way, and one more for the gradients of weight and bias."""
    size = output.nbytes
    backward = (3 * size if grads[0] else 0) + (2 * size if any(grads[1:]) else 0)
    return (
        Work(nbytes=sum(t.nbytes for t in inputs) + size, kernels=1),
        Work(nbytes=backward, kernels=int(grads[0]) + int(any(grads[1:]))),
    )


def _embedding(node: Node, inputs: Sequence[LocalTensor], output: LocalTensor, grads: Sequence[bool]) -> Counted:
    """Reads the rows looked up; the gradient clears a whole table and adds the rows into it."""
    weight, ids = inputs[0], inputs[1]
    return (
        Work(nbytes=2 * output.nbytes + ids.nbytes, kernels=1),
        Work(nbytes=weight.nbytes + 3 * output.nbytes + ids.nbytes, kernels=3),
    )


def _cross_entropy(node: Node, inputs: Sequence[LocalTensor], output: LocalTensor, grads: Sequence[bool]) -> Counted:
    """Logits widened to float32, log-softmax, loss; and the same backwards (`graph.ops.cross_entropy`)."""
    logits = inputs[0]
    wide = max(4, logits.bytes_per_element)
    widened = logits.bytes_per_element != wide
    cast = logits.elements * (logits.bytes_per_element + wide) if widened else 0
    return (
        Work(nbytes=cast + logits.elements * 2 * wide, kernels=2 + widened),
        Work(nbytes=cast + logits.elements * 4 * wide, kernels=2 + widened),
    )


def _rotary(node: Node, inputs: Sequence[LocalTensor], output: LocalTensor, grads: Sequence[bool]) -> Counted:
    """Half negated (1 pass over x), concatenated (2), two products (4) and a sum (3); backward the same in reverse."""
    tables = sum(tensor.nbytes for tensor in inputs[1:])
    passes = Work(nbytes=10 * output.nbytes + tables, kernels=5)
    return passes, passes


def _dropout(node: Node, inputs: Sequence[LocalTensor], output: LocalTensor, grads: Sequence[bool]) -> Counted:
    """Reads, writes, and keeps a one-byte mask."""
    moved = Work(nbytes=2 * output.nbytes + output.elements, kernels=1)
    return moved, moved


def _scan(node: Node, inputs: Sequence[LocalTensor], output: LocalTensor, grads: Sequence[bool]) -> Counted:
    """Scans of state-space models; backward runs each product twice, and streams twice as much."""
    shapes = [tensor.shape for tensor in inputs]
    matmuls = _scan_products(node, shapes)
    _, streamed, kernels = _scanned(node, shapes)
    size = inputs[0].bytes_per_element
    moved = sum(tensor.nbytes for tensor in inputs) + output.nbytes + streamed * size
    return (
        Work(matmuls, nbytes=moved, kernels=kernels + len(matmuls)),
        Work(2 * matmuls, nbytes=2 * moved, kernels=2 * (kernels + len(matmuls))),
    )


def _scanned(node: Node, shapes: Sequence[tuple[int, ...]]) -> tuple[scan_work.Products, int, int]:
    if node.op == SELECTIVE:
        return scan_work.selective(shapes[0], shapes[2][-1])
    return scan_work.chunked(shapes[0], shapes[3][-1], node.args[5])


def _scan_products(node: Node, shapes: Sequence[tuple[int, ...]]) -> tuple[Matmul, ...]:
    return tuple(Matmul(*product) for product in _scanned(node, shapes)[0])


def _recurrent(node: Node, inputs: Sequence[LocalTensor], output: LocalTensor, grads: Sequence[bool]) -> Counted:
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


SELECTIVE, CHUNKED = "autopar.selective_scan", "autopar.state_space_scan"
RECURRENT = frozenset(f"autopar.{name}" for name in ("lstm", "gru", "rnn_tanh", "rnn_relu"))
CONVOLUTIONS = frozenset(f"aten.{kind}{rank}d" for kind in ("conv", "conv_transpose") for rank in (1, 2, 3))
MATMULS = ("linear", "mm", "addmm", "bmm", "baddbmm", "matmul", "einsum")
VIEWS = (
    *("view", "reshape", "unflatten", "flatten", "transpose", "permute", "t", "numpy_T", "movedim"),
    *("unsqueeze", "squeeze", "expand", "expand_as", "slice", "select", "narrow", "split", "split_with_sizes"),
    *("chunk", "unbind", "getitem", "diagonal", "alias", "detach", "lift_fresh_copy"),
)
REDUCTIONS = (
    *("sum", "mean", "amax", "amin", "max", "min", "prod", "var", "std", "logsumexp", "norm", "argmax", "all", "any"),
)
COPIES = (
    *("clone", "contiguous", "_to_copy", "copy", "repeat", "repeat_interleave", "roll", "flip", "pad"),
    "constant_pad_nd",
)

_FAMILIES: tuple[tuple[Counter, Sequence[str]], ...] = (
    (_matmul, MATMULS),
    (_view, VIEWS),
    (_reduction, REDUCTIONS),
    (_copy, COPIES),
    (_sum_like, ("add", "sub", "rsub")),
    (_softmax, ("softmax", "_softmax", "log_softmax", "_log_softmax")),
    (_norm, ("layer_norm", "rms_norm", "native_layer_norm")),
)

_COUNTS: dict[str, Counter] = {f"aten.{name}": count for count, names in _FAMILIES for name in names} | {
    **dict.fromkeys(CONVOLUTIONS, _matmul),
    **dict.fromkeys((SELECTIVE, CHUNKED), _scan),
    **dict.fromkeys(RECURRENT, _recurrent),
    ATTENTION: _attention,
    "aten.cat": _cat,
    "aten.embedding": _embedding,
    "aten.dropout": _dropout,
    "autopar.cast": _cast,
    "aten.to": _cast,
    "autopar.rotary": _rotary,
    EXPERTS: _experts,
    "autopar.cross_entropy": _cross_entropy,
}


_POINTWISE = (_elementwise, _sum_like, _cast, _rotary, _dropout, _softmax, _cross_entropy)


def is_pointwise(node: Node) -> bool:
    """Whether fusing stacks run it together with its neighbours: it reads and writes each element where it is."""
    return _COUNTS.get(node.op, _elementwise) in _POINTWISE
