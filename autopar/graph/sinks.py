"""Attention with sinks, written as fused attention.

A sink is one logit per head that takes part in the softmax and is then dropped (gpt-oss, arXiv 2508.10925). It is a key
before all others whose value is zero: with one more element to a head, the sink over the scale in the query's and one
in that key's, their product times the scale is the sink. A query before all others keeps the causal mask square; what
it computes is dropped.
"""

from __future__ import annotations

from typing import Any

from autopar.graph.draft import Draft, Rule
from autopar.graph.exported import is_number
from autopar.graph.ir import Node, Ref
from autopar.graph.raising import unrepeated

ADDED = 8
"""Elements added to each head: the kernels want a multiple of eight."""

LEAST = -1e30


def sinks(node: Node, new: Draft) -> Ref | None:
    """softmax(cat(q k^T scale + mask, sinks))[..., :-1] v → attention of one more key and query."""
    chance, values = node.args
    kept = new.producer(_uncast(chance, new), "aten.slice")
    softmax = new.producer(kept.args[0], "aten.softmax") if kept else None
    joined = new.producer(softmax.args[0], "aten.cat") if softmax else None
    if not kept or not softmax or not joined or len(joined.args[0]) != 2 or kept.args[1:3] != (3, 0):
        return None
    logits, sink = joined.args[0]
    shape = new.shape(logits)
    if softmax.args[1:] != (3,) or joined.args[1:] != (3,) or len(shape) != 4 or kept.args[3] != shape[3]:
        return None
    scores, mask = _masked(logits, new)
    query, keys, scale = _product(scores, new)
    heads = _per_head(sink, shape[1], new)
    if query is None or keys is None or heads is None or shape[2] != shape[3] or mask is None:
        return None
    key, value = unrepeated(keys, new) or keys, unrepeated(values, new) or values
    groups, width = new.shape(key)[1], new.shape(query)[3]
    if groups != new.shape(value)[1] or not isinstance(width, int):
        return None
    length, wide = shape[2] + 1, width + ADDED
    one = Ref(new.emit("aten.full", (1, 1), 1.0, shape=(1, 1), dtype=new.meta(query).dtype))
    place = new.pad(one, (width, ADDED - 1, 0, 0), 0.0)
    logit = Ref(new.emit("aten.mul", heads, place, shape=(shape[1], 1, wide)))
    logit = Ref(new.emit("aten.div", logit, scale, shape=(shape[1], 1, wide)))
    query = new.pad(query, (0, ADDED, 1, 0), 0.0)
    query = Ref(new.emit("aten.add", query, logit, shape=new.shape(query)))
    key = new.pad(key, (0, ADDED, 1, 0), 0.0)
    first = new.pad(place, (0, 0, 0, shape[3]), 0.0)
    key = Ref(new.emit("aten.add", key, first, shape=new.shape(key)))
    value = new.pad(value, (0, 0, 1, 0), 0.0)
    boolean = new.meta(mask).dtype == "bool"
    if new.shape(mask)[-2:] != shape[2:]:
        return None
    mask = new.pad(mask, (0, 0, 1, 0), False if boolean else LEAST)
    mask = new.pad(mask, (1, 0), True if boolean else 0.0)
    options: dict[str, Any] = {"attn_mask": mask, "scale": scale}
    if groups != shape[1]:
        options["enable_gqa"] = True
    full = (*shape[:2], length, new.shape(value)[3])
    result = Ref(new.emit("aten.scaled_dot_product_attention", query, key, value, shape=full, options=options))
    return new.slice(result, 2, 1, length)


def _uncast(value: Any, new: Draft) -> Any:
    cast = new.producer(value, "autopar.cast")
    return cast.args[0] if cast else value


def _masked(logits: Ref, new: Draft) -> tuple[Any, Ref | None]:
    """The scores, and the constant mask that is added to them."""
    total = new.producer(logits, "aten.add")
    if total and len(total.args) == 2 and not total.kwargs:
        for scores, mask in (total.args, total.args[::-1]):
            if isinstance(mask, Ref) and mask.name in new.constant:
                return scores, mask
    return logits, None


def _product(scores: Any, new: Draft) -> tuple[Ref | None, Ref | None, float]:
    """q, k and the scale of ``q @ k^T * scale``."""
    scale, scaled = 1.0, new.producer(scores, "aten.mul")
    if scaled and is_number(scaled.args[1]):
        scores, scale = scaled.args[0], float(scaled.args[1])
    product = new.producer(scores, "aten.matmul")
    turned = new.producer(product.args[1], "aten.transpose") if product else None
    if not product or not turned or turned.args[1:] != (2, 3):
        return None, None, scale
    return product.args[0], turned.args[0], scale


def _per_head(sink: Any, heads: Any, new: Draft) -> Ref | None:
    """The sinks as [heads, 1, 1], if ``sink`` is them expanded."""
    wide = new.producer(sink, "aten.expand")
    thin = new.producer(wide.args[0], ("aten.unflatten", "aten.reshape", "aten.unsqueeze")) if wide else None
    if not wide or not thin or new.shape(wide.args[0]) != (1, heads, 1, 1):
        return None
    return new.select(wide.args[0], 0, 0)


RULES: dict[str, list[Rule]] = {"aten.matmul": [sinks]}
