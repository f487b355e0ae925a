"""Local implementations of operators whose split needs more than the operator itself on a shard.

Each is a generator that runs on one rank: it yields ``(op, x)`` where ``x`` is to be all-reduced over the axis ("sum",
with type P to I, or "max") or exchanged for what the rank before holds ("shift"), and is sent the result, so that one
text serves ranks run in lockstep and a rank on its own.
``part``: where this rank's part of the split factor begins, and how large the whole is.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from autopar.graph.experts import experts
from autopar.graph.ir import EXPERTS
from autopar.graph.ops import WIDE, attention_of_last

Collective = tuple[str, torch.Tensor]
Local = Generator[Collective, torch.Tensor, torch.Tensor]


class Part(NamedTuple):
    """A rank's part of the split factor: where it begins, and the size of the whole."""

    start: int
    whole: int


def embedding(part: Part, weight: torch.Tensor, ids: torch.Tensor, *rest: Any) -> Local:
    """Look up the ids this rank's rows hold, zeros for the others; the output is partial. No collective.

    ``rest``: the id whose row gets no gradient, if there is one.
    """
    yield from ()
    rows = weight.shape[0]
    local = ids - part.start
    outside = (local < 0) | (local >= rows)
    found = F.embedding(local.masked_fill(outside, 0), weight)
    if rest and rest[0] >= 0:
        found = torch.where((ids == rest[0]).unsqueeze(-1), found.detach(), found)
    return found.masked_fill(outside.unsqueeze(-1), 0.0)


def cross_entropy(part: Part, logits: torch.Tensor, labels: torch.Tensor, ignore: int = -100) -> Local:
    """Summed cross-entropy from this rank's classes; ``logits`` [..., classes], ``labels`` [...] of all classes."""
    wide = logits.to(WIDE.get(logits.dtype, torch.float32))
    classes = wide.shape[-1]
    top = yield "max", wide.detach().amax(-1)
    shifted = wide - top.unsqueeze(-1)
    total = yield "sum", shifted.exp().sum(-1)
    local = labels - part.start
    outside = (local < 0) | (local >= classes)
    picked = shifted.gather(-1, local.masked_fill(outside, 0).unsqueeze(-1)).squeeze(-1)
    target = yield "sum", picked.masked_fill(outside, 0.0)
    return (total.log() - target).masked_fill(labels == ignore, 0.0).sum()


def context(
    part: Part,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: None = None,
    dropout_p: float = 0.0,
    is_causal: bool = True,
    **options: Any,
) -> Local:
    """Causal attention of the queries from the part's start on to the whole sequence's keys. No collective.

    In two runs if their number is even, each with the keys up to its last query: so the emitted code does it, whose
    ranks hold two separate chunks of the sequence; what is saved for backward is then the same.
    """
    yield from ()
    start, rows = part.start, query.shape[-2]
    runs = [rows // 2] * 2 if rows % 2 == 0 else [rows]
    heads = []
    for run in torch.split(query, runs, -2):
        stop = start + run.shape[-2]
        keys, values = key.narrow(-2, 0, stop), value.narrow(-2, 0, stop)
        heads.append(attention_of_last(run, keys, values, dropout_p=dropout_p, **options))
        start = stop
    return torch.cat(heads, -2) if len(heads) > 1 else heads[0]


def ring(
    part: Part,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Local:
    """Attention of a sequence to itself, keys and values split as the queries are: they go round the ranks, and results
    are merged by their log-sum-exp. In sequence order: what a later rank holds is masked whole."""
    held, wide = key.shape[-2], WIDE.get(query.dtype, torch.float32)
    scaled = query.to(wide) * (query.shape[-1] ** -0.5 if scale is None else scale)
    rows, columns = (torch.arange(size, device=query.device) for size in (query.shape[-2], held))
    output = sums = None
    for turn in range(part.whole // held):
        if turn:
            key = yield "shift", key
            value = yield "shift", value
        first = (part.start - turn * held) % part.whole
        if is_causal and first > part.start:
            continue
        keys, values = (x.to(wide).repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
        scores = scaled @ keys.mT
        if is_causal:
            scores = scores.masked_fill(part.start + rows.unsqueeze(-1) < first + columns, float("-inf"))
        more = scores.logsumexp(-1)
        made = (scores - more.unsqueeze(-1)).exp() @ values
        if output is None or sums is None:
            output, sums = made, more
        else:
            total = torch.logaddexp(sums, more)
            output = output * (sums - total).exp().unsqueeze(-1) + made * (more - total).exp().unsqueeze(-1)
            sums = total
    assert output is not None
    return output.to(query.dtype)


def own_experts(part: Part, *args: Any, **options: Any) -> Local:
    """What this rank's experts, from the part's start on, contribute; the output is partial. No collective."""
    yield from ()
    return experts(*args, first=part.start, **options)


VARIANTS: dict[tuple[str, str], Callable[..., Local]] = {
    ("aten.embedding", "vocab"): embedding,
    ("autopar.cross_entropy", "vocab"): cross_entropy,
    ("aten.scaled_dot_product_attention", "context"): context,
    ("aten.scaled_dot_product_attention", "ring"): ring,
    ("aten.scaled_dot_product_attention", "causal ring"): ring,
    (EXPERTS, "experts"): own_experts,
}
"""By operator and variant name (`Strategy.variant`)."""
