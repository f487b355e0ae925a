"""Attention and rotary embedding: batch and heads split, with grouped queries by key/value head or within a group, and
queries by position: all keys and values are then read by every rank, or go round the ranks that hold them."""

from __future__ import annotations

from autopar.graph.size import divide
from autopar.sharding.factors import RING, Inner, Rule, Together, Variant
from autopar.sharding.rules.entry import Call, Entry, table


def _attention(call: Call) -> str:
    query, key = call.shapes[0], call.shapes[1]
    grouped = len(query) > 2 and query[-3] != key[-3] and divide(query[-3], key[-3]) is not None
    heads, kv_heads = ("(h g) ", "h ") if grouped else ("h ", "h ") if len(query) > 2 else ("", "")
    operands = [f"... {heads}q d^", f"... {kv_heads}k^ d^", f"... {kv_heads}k^ e^"]
    if len(call.operands) == 4:
        rank = len(call.shapes[3])
        operands.append("q k^" if rank == 2 else f"{heads}q k^" if rank == 3 else f"... {heads}q k^")
    return f"{', '.join(operands)} -> ... {heads}q e^"


def _by_position(call: Call) -> dict[str, Variant]:
    """A causal mask depends on where a rank's queries begin; one that is handed in is split along with them."""
    return {"q": Variant("context")} if call.arg(5, "is_causal", False) else {}


def _ring(call: Call, rule: Rule) -> dict[str, Together]:
    """Queries and keys split alike (arXiv 2310.01889): keys and values, side by side in one message, go round.

    For the forms that `codegen/runtime/ring.py` has: a sequence and its own keys, of one width, with no mask but the
    causal one (each turn would need its columns of another) and no dropout (each turn would draw a mask of its own).
    """
    query, key, value = call.operands[:3]
    alike = len(query.shape) == 4 and query.shape[-2] == key.shape[-2] and key.shape == value.shape
    if not alike or len(call.operands) > 3 or call.arg(4, "dropout_p", 0.0):
        return {}
    pairs = (*key.shape[:-1], key.shape[-1] * 2)
    inner = tuple(Inner(RING, pairs, key.dtype, backward, like=1) for backward in (False, True))
    name = "causal ring" if call.arg(5, "is_causal", False) else "ring"
    return {"ring": Together(("q", "k"), Variant(name, inner=inner))}


ENTRIES = [
    Entry("aten.scaled_dot_product_attention", compute=_attention, variants=_by_position, together=_ring),
    *table("autopar.rotary: ... d^, ... d^, ... d^ -> ... d^", linear="0"),
]
