"""The operator vocabulary of `OpGraph`: canonical names and the torch call that runs each.

One table serves the rule proofs, the saved-for-backward analysis, the reference interpreter and the emitter's tests.
Names are torch's without overloads ("aten.linear"), plus a few composites ("autopar.*") that simplification raises:

    autopar.rotary(x, cos, sin)                      x*cos + rotate_half(x)*sin, last dim whole
    autopar.cross_entropy(logits, labels, ignore)    sum over targets, float32 or wider; logits [..., v], labels [...]
    autopar.sinusoids(rows, width, blank, dtype=)    the table of sinusoidal positions, computed in float32
    autopar.angle_table(rows, rates, base, form, rising, dtype=)    a table of rotary positions, computed in float32
    autopar.topk(x, k, dim, largest=True)            the indices of torch.topk, int64
    autopar.drawn(x, kind)                           random numbers in the shape of x; kind "uniform", "normal", ...
    autopar.ctc_loss(log_probs, targets, input_lengths, target_lengths, blank, zero_infinity)    of each sample, [b]
    autopar.experts(...)                             the experts of a mixture (`autopar.graph.experts`)
    aten.batch_norm(x, weight, bias, eps)            by the statistics of the batch itself
    autopar.cast(x, dtype)                           dtype "float32" (at least) or "compute" or torch's name

Shape operators are canonical too: `aten.unflatten(x, dim, sizes)` (one entry may be -1), `aten.flatten(x, start, end)`,
`aten.reshape` only where these do not do; `aten.slice(x, dim, start, end)` (step 1; end may be a Size);
`aten.select(x, dim, index)`. Dims in args are non-negative. Every node has a single tensor output.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function

from autopar.graph.experts import experts
from autopar.graph.ir import RECURRENT, Node

WIDE = {torch.float64: torch.float64}
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
}


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding, half-split form (RoFormer, arXiv 2104.09864, as in the Llama code)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def attention_of_last(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    """Causal attention of queries that are the last positions of the keys; ``options`` as for torch's attention.

    A torch function mode sees it as one function, as it sees torch's own.
    """
    if has_torch_function((query, key, value)):
        return handle_torch_function(attention_of_last, (query, key, value), query, key, value, **options)
    rows, columns = query.shape[-2], key.shape[-2]
    mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, ignore: int = -100) -> torch.Tensor:
    """Summed cross-entropy over the last dim of ``logits``; targets equal to ``ignore`` count nothing."""
    wide = logits.to(WIDE.get(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, -2), labels.flatten(), ignore_index=ignore, reduction="sum")


def ctc_loss(
    log_probs: torch.Tensor,
    targets: torch.Tensor,
    input_lengths: torch.Tensor,
    target_lengths: torch.Tensor,
    blank: int,
    zero_infinity: bool,
) -> torch.Tensor:
    """[b]: of each sample; log_probs [t, b, c], targets [b, s], lengths [b]."""
    return F.ctc_loss(log_probs, targets, input_lengths, target_lengths, blank, "none", zero_infinity)


def cast(x: torch.Tensor, dtype: str, compute: torch.dtype = torch.float32) -> torch.Tensor:
    """Cast to a named dtype; "compute" is the job's; "float32" never narrows a float64 tensor."""
    if dtype == "compute":
        return x.to(compute)
    if dtype == "float32" and torch.float64 in (x.dtype, compute):
        return x.to(torch.float64)
    return x.to(DTYPES[dtype])


def topk(x: torch.Tensor, k: int, dim: int, largest: bool = True) -> torch.Tensor:
    """The indices of the ``k`` largest (or smallest) along ``dim``, in order."""
    return x.topk(k, dim, largest)[1]


def callable_of(op: str) -> Callable[..., torch.Tensor]:
    """The function that runs canonical operator ``op`` on tensors. Raises KeyError if there is none."""
    return CALLS[op] if op in CALLS else _aten(op)


def _aten(op: str) -> Callable[..., Any]:
    namespace, _, name = op.partition(".")
    packet = getattr(getattr(torch.ops, namespace), name, None)
    if packet is None:
        raise KeyError(op)
    return packet  # type: ignore[no-any-return]


def draws_random(node: Node) -> bool:
    """Whether an operator node drops elements at random, or draws numbers."""
    if node.op == "autopar.drawn":
        return True
    if node.op == "aten.dropout":
        return bool(node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5))
    if node.op == "aten.scaled_dot_product_attention":
        return bool(node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0))
    return False


def _travelling(name: str, module: str = "scans") -> Callable[..., torch.Tensor]:
    """A function of the runtime that travels with emitted code (torch alone, so that importing it is no circle)."""

    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        function = getattr(import_module(f"autopar.codegen.runtime.{module}"), name)
        return function(*args, **kwargs)  # type: ignore[no-any-return]

    return call


def _position_table(name: str) -> Callable[..., torch.Tensor]:
    table = _travelling(name, "position_tables")
    return lambda *args, dtype: table(*args, dtype=dtype, device=None)


def _recurrent(name: str) -> Callable[..., torch.Tensor]:
    """One of the results of torch's recurrent layers: the last argument says which."""

    def call(*args: Any) -> torch.Tensor:
        return getattr(torch, name)(*args[:-1])[args[-1]]  # type: ignore[no-any-return]

    return call


CALLS: dict[str, Callable[..., torch.Tensor]] = {
    "autopar.rotary": rotary,
    "autopar.cross_entropy": cross_entropy,
    "autopar.cast": cast,
    "autopar.ctc_loss": ctc_loss,
    "autopar.topk": topk,
    "autopar.experts": experts,
    "autopar.drawn": _travelling("drawn", "operators"),
    "autopar.angle_table": _position_table("angle_table"),
    "autopar.sinusoids": _position_table("sinusoids"),
    "autopar.gated_delta_rule": _travelling("gated_delta_rule"),
    "autopar.selective_scan": _travelling("selective_scan"),
    "autopar.state_space_scan": _travelling("state_space_scan"),
    **{op: _recurrent(op.removeprefix("autopar.")) for op in RECURRENT},
    "aten.linear": F.linear,
    "aten.scaled_dot_product_attention": F.scaled_dot_product_attention,
    "aten.rms_norm": F.rms_norm,
    "aten.layer_norm": lambda x, shape, weight=None, bias=None, eps=1e-5: F.layer_norm(x, shape, weight, bias, eps),
    "aten.batch_norm": lambda x, weight=None, bias=None, eps=1e-5: F.batch_norm(
        x, None, None, weight, bias, training=True, eps=eps
    ),
    "aten.embedding": lambda weight, ids, *rest: F.embedding(ids, weight, *rest),
    "aten.unflatten": lambda x, dim, sizes: x.unflatten(dim, sizes),
    "aten.flatten": lambda x, start, end: x.flatten(start, end),
    "aten.slice": lambda x, dim, start, end: x.narrow(dim, start, end - start),
    "aten.cat": lambda tensors, dim=0: torch.cat(tuple(tensors), dim),
    "aten.gelu": lambda x, approximate="none": F.gelu(x, approximate=approximate),
    "aten.dropout": F.dropout,
}
