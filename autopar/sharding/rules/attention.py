"""Attention and rotary embedding: batch and heads split, with grouped queries by key/value head or within a group, and
queries by position: all keys and values are then read by every rank."""

from __future__ import annotations

from autopar.graph.size import divide
from autopar.sharding.factors import Variant
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


ENTRIES = [
    Entry("aten.scaled_dot_product_attention", compute=_attention, variants=_by_position),
    *table("autopar.rotary: ... d^, ... d^, ... d^ -> ... d^", linear="0"),
]
