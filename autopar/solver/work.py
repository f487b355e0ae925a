"""What one operator does: matmul FLOP and bytes moved, forward and backward, from local shapes.

Prices follow from this by a roofline (`autopar.solver.op_costs`). Bytes are those of the kernels that eager PyTorch
runs: each reads its operands from memory and writes its result there; views move nothing. FLOP are those of matmuls
and attention; everything else is bound by bytes. Mixtures of experts and recurrences have files of their own
(`expert_work`, `scan_work`), and so has attention in a ring (`ring_work`).

Conventions
* a matmul of (m, k) and (k, n) is 2*m*n*k FLOP; its backward is one such matmul for each operand with a gradient;
* fused attention runs two matmuls forward and five backward (the scores are computed again: FlashAttention-2, Dao,
  arXiv 2307.08691, section 4), so 2.5 times the forward; a causal mask halves the work done;
* `flops`, which counts model FLOP for MFU, does **not** halve causal attention (PaLM, arXiv 2204.02311, appendix B;
  Megatron, arXiv 2104.04473), so that figures compare with those papers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from autopar.graph.dispatch import PARAMETERS
from autopar.graph.ir import CONVOLUTIONS, EXPERTS, RECURRENT, Node
from autopar.solver.expert_work import experts_work
from autopar.solver.ring_work import RANKS, ring_work
from autopar.solver.scan_work import CHUNKED, DELTA, SCANS, recurrent, scan, scan_products
from autopar.solver.work_parts import NOTHING, Attention, Counted, LocalTensor, Matmul, Work

ATTENTION = "aten.scaled_dot_product_attention"


def work(node: Node, inputs: Sequence[LocalTensor], output: LocalTensor, grads: Sequence[bool]) -> tuple[Work, Work]:
    """Forward and backward work of ``node`` on local tensors; ``inputs`` and ``grads`` follow ``node.operands()``."""
    count = _COUNTS.get(node.op, _elementwise)
    forward, backward = count(node, inputs, output, grads)
    return forward, backward if any(grads) else NOTHING


def variant(node: Node) -> Any:
    """What a price depends on beside operator and shapes; hashable."""
    if node.op == ATTENTION:
        return is_causal(node), node.kwargs.get(RANKS, 1)
    if node.op == "aten.einsum":
        return node.args[0]
    if node.op == EXPERTS:
        return node.kwargs["experts"], node.kwargs["gate"], node.kwargs.get("ep", 1)
    if node.op in (CHUNKED, DELTA):
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
        matrices = (shape for shape in input_shapes[PARAMETERS:] if len(shape) == 3)
        return 2.0 * prod(input_shapes[1]) * sum(prod(shape[1:]) for shape in matrices)
    if node.op in SCANS:
        return float(sum(matmul.flops for matmul in scan_products(node, input_shapes)))
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
    if RANKS in node.kwargs:
        return ring_work(node.kwargs[RANKS], inputs, output, sizes)
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


def _ctc(node: Node, inputs: Sequence[LocalTensor], output: LocalTensor, grads: Sequence[bool]) -> Counted:
    """Sums over paths through blank, target, blank, ...: a step a frame; and back, then the gradient of each class."""
    probs, targets = inputs[0], inputs[1]
    frames, batch, _ = probs.shape
    states = frames * batch * (2 * targets.shape[-1] + 1) * probs.bytes_per_element
    return (
        Work(nbytes=4 * states, kernels=frames),
        Work(nbytes=5 * states + 2 * probs.nbytes, kernels=frames + 2),
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


def _drawn(node: Node, inputs: Sequence[LocalTensor], output: LocalTensor, grads: Sequence[bool]) -> Counted:
    """Written, nothing read and nothing in backward."""
    return Work(nbytes=output.nbytes, kernels=1), Work()


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
    **dict.fromkeys(SCANS, scan),
    **dict.fromkeys(RECURRENT, recurrent),
    ATTENTION: _attention,
    "aten.cat": _cat,
    "aten.embedding": _embedding,
    "aten.dropout": _dropout,
    "autopar.drawn": _drawn,
    "autopar.cast": _cast,
    "aten.to": _cast,
    "autopar.rotary": _rotary,
    EXPERTS: experts_work,
    "autopar.cross_entropy": _cross_entropy,
    "autopar.ctc_loss": _ctc,
}


_POINTWISE = (_elementwise, _sum_like, _cast, _rotary, _dropout, _softmax, _cross_entropy)


def is_pointwise(node: Node) -> bool:
    """Whether fusing stacks run it together with its neighbours: it reads and writes each element where it is."""
    return _COUNTS.get(node.op, _elementwise) in _POINTWISE
