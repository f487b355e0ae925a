"""An operator's work as a software stack runs it: pointwise operators fused, attention fused or not.

`autopar.solver.work` counts the kernels of eager PyTorch. A stack that fuses pointwise operators into each other, or
into the kernels beside them, moves fewer bytes in fewer kernels: ``Stack.pointwise`` and ``Stack.kernels`` say how many
of a kernel each. Views, copies, lookups and collectives stay as they are, and so do norms, which are one kernel anyway.

Unfused attention (Megatron-LM before FlashAttention: a batched matmul, a fused kernel that scales, masks and takes the
softmax, a batched matmul), on scores S of batch x queries x keys elements, whole whatever the mask:

    forward     Q K^T (writes S), softmax (reads and writes S), P V (reads S)
    backward    dV = P^T dO, dP = dO V^T (writes S), softmax (reads P and dP, writes dS), dQ = dS K, dK = dS^T Q

and where probabilities are dropped out, one kernel more each way, which reads and writes S and a mask of bytes. Where
the core is computed again (`Stack.again`: Megatron's selective recomputation), the backward begins with a forward.

Linear layers in a narrower dtype cast their operands first: the input forward, the output's gradient backward
(Micikevicius et al., "FP8 Formats for Deep Learning", arXiv 2209.05433), each in a kernel of its own that reads it and
writes it twice, by rows for one product and by columns for the other (Transformer Engine's quantizers; blocks of MXFP8
and NVFP4 run along what is summed over). Weights are cast once a step, as they are updated or gathered (Megatron-Core's
fp8_param_gather, torchao's enable_fsdp_float8_all_gather): next to nothing of it. Products of the backward may be
scaled afterwards (`Stack.rescales`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from autopar.graph.ir import EXPERTS, LINEAR, Node
from autopar.solver.expert_work import experts_work
from autopar.solver.work import ATTENTION, MATMULS, is_pointwise, work
from autopar.solver.work_parts import Attention, Counted, LocalTensor, Matmul, Work
from autopar.stack import Stack

ALIGNED_BYTES, UNALIGNED = 16, 5
"""What a head's rows are a multiple of where unfused attention's products are at their best, and how many times as long
those of others take: with heads of 144 elements for 150, bigscience's models of about 190 billion parameters went from
94 to 120 TFLOP/s on A100 (bigscience-workshop/bigscience, train/tr11-176B-ml/chronicles-prequel.md; NVIDIA, "Matrix
Multiplication Background User's Guide", section on tensor core requirements); plausible 2 to 10."""
TENSOR_SCALES = 1.0
"""Bytes per element below which a cast needs the largest of the whole tensor first, which reads it once more (NVFP4
scales blocks and tensors: arXiv 2509.25149)."""


def work_of(
    node: Node, inputs: Sequence[LocalTensor], output: LocalTensor, grads: Sequence[bool], stack: Stack
) -> Counted:
    """`work`, with the rows that experts of this stack have."""
    if node.op != EXPERTS:
        return work(node, inputs, output, grads)
    return experts_work(node, inputs, output, grads, stack.imbalance)


def as_run(
    node: Node, forward: Work, backward: Work, width: int, stack: Stack, narrow: float = 0.0
) -> tuple[Work, Work]:
    """Forward and backward of a node whose operands have ``width`` bytes per element, as the stack runs them.
    ``narrow``: bytes per element of what linear layers cast them to, 0 if they do not."""
    if node.op == ATTENTION and forward.attention:
        if stack.attention == "unfused":
            drops = bool(node.kwargs.get("dropout_p"))
            forward, backward = _unfused(forward, width, drops), _unfused(backward, width, drops)
        elif not stack.balanced:
            forward, backward = _unbalanced(forward), _unbalanced(backward)
        return forward, _together(forward, backward) if stack.again and backward.kernels else backward
    if node.op == EXPERTS:
        return _experts(forward, width, stack, narrow, False), _experts(backward, width, stack, narrow, True)
    if is_pointwise(node):
        return _fused(forward, stack), _fused(backward, stack)
    if node.op.removeprefix("aten.") in MATMULS:
        forward, backward = _fused(forward, stack), _fused(backward, stack)  # what sums the gradient of a bias
        if not narrow or node.op != LINEAR:
            return forward, backward
        forward, backward = _cast(forward, backward, _moved(width, narrow))
        return forward, _rescaled(backward, width) if stack.rescales else backward
    return forward, backward


def _moved(width: int, narrow: float) -> float:
    """Bytes that casting one element moves."""
    return width * (1 + (narrow < TENSOR_SCALES)) + 2 * narrow


def _cast(forward: Work, backward: Work, moved: float) -> tuple[Work, Work]:
    """With the casts of input and gradient, each of which moves so many bytes per element."""
    batch, m, n, k = forward.matmuls[0]
    made = batch * m * n if backward.matmuls else 0
    return (
        replace(forward, nbytes=forward.nbytes + moved * batch * m * k, kernels=forward.kernels + 1),
        replace(backward, nbytes=backward.nbytes + moved * made, kernels=backward.kernels + bool(made)),
    )


def _rescaled(part: Work, width: int) -> Work:
    """With a kernel for each product, which reads and writes it."""
    made = sum(each.batch * each.m * each.n for each in part.matmuls)
    return replace(part, nbytes=part.nbytes + 2 * width * made, kernels=part.kernels + len(part.matmuls))


def _experts(part: Work, width: int, stack: Stack, narrow: float, back: bool) -> Work:
    """Two casts of rows where operands are narrow: forward of what goes into the matmuls, backward of the gradients of
    what comes out. Where matmuls are a kernel for each expert, casts are too."""
    casts = 2 if narrow and part.matmuls else 0
    fused = _fused(part, stack)
    if casts:
        cast = sum(each.batch * each.m * (each.n if back else each.k) for each in part.matmuls[:2])
        fused = replace(fused, nbytes=fused.nbytes + _moved(width, narrow) * cast, kernels=fused.kernels + casts)
    if stack.grouped or not part.matmuls:
        return fused
    return replace(fused, kernels=fused.kernels + (part.matmuls[0].batch - 1) * (len(part.matmuls) + casts))


def _fused(part: Work, stack: Stack) -> Work:
    streams = part.kernels - len(part.matmuls)
    kernels = len(part.matmuls) + streams * stack.kernels
    return replace(part, nbytes=part.nbytes * stack.pointwise, kernels=kernels)


def _unbalanced(part: Work) -> Work:
    return replace(part, attention=replace(part.attention, balanced=False)) if part.attention else part


def _together(first: Work, second: Work) -> Work:
    """Both, one after the other; of fused kernels as one."""
    attention = second.attention
    if attention and first.attention:
        attention = replace(attention, matmuls=first.attention.matmuls + attention.matmuls)
    return Work(
        matmuls=first.matmuls + second.matmuls,
        matmul_bytes=first.matmul_bytes + second.matmul_bytes,
        nbytes=first.nbytes + second.nbytes,
        kernels=first.kernels + second.kernels,
        attention=attention,
    )


def _unfused(part: Work, width: int, drops: bool) -> Work:
    attention = part.attention
    if attention is None:
        return part
    elements = attention.batch * attention.queries * attention.keys
    scores, dropped = width * elements, (2 * width + 1) * elements if drops else 0
    back = attention.matmuls > 2
    return Work(
        matmuls=_products(attention, back, width),
        matmul_bytes=part.matmul_bytes + (4 if back else 2) * scores,
        nbytes=(3 if back else 2) * scores + dropped,
        kernels=(5 if back else 3) + drops,
    )


def _products(attention: Attention, back: bool, width: int) -> tuple[Matmul, ...]:
    batch, queries, keys, dim = attention.batch, attention.queries, attention.keys, attention.head_dim
    if dim * width % ALIGNED_BYTES:
        batch *= UNALIGNED
    first = Matmul(batch, queries, keys, dim)
    second = Matmul(batch, queries, dim, keys)
    third = Matmul(batch, keys, dim, queries)
    return (first, second, third, third) if back else (first, second)
