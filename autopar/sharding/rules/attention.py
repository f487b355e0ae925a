"""Attention and rotary embedding: batch and heads split, with grouped queries by key/value head or within a group."""

from __future__ import annotations

from autopar.graph.size import divide
from autopar.sharding.rules.entry import Call, Entry, table


def _attention(call: Call) -> str:
    """Queries split by position only where no mask depends on their absolute position."""
    query, key = call.shapes[0], call.shapes[1]
    rows = "q^" if call.arg(5, "is_causal", False) else "q"
    grouped = len(query) > 2 and query[-3] != key[-3] and divide(query[-3], key[-3]) is not None
    heads, kv_heads = ("(h g) ", "h ") if grouped else ("h ", "h ") if len(query) > 2 else ("", "")
    operands = [f"... {heads}{rows} d^", f"... {kv_heads}k^ d^", f"... {kv_heads}k^ e^"]
    if len(call.operands) == 4:
        rank = len(call.shapes[3])
        operands.append(f"{rows} k^" if rank == 2 else f"{heads}{rows} k^" if rank == 3 else f"... {heads}{rows} k^")
    return f"{', '.join(operands)} -> ... {heads}{rows} e^"


ENTRIES = [
    Entry("aten.scaled_dot_product_attention", compute=_attention),
    *table("autopar.rotary: ... d^, ... d^, ... d^ -> ... d^", linear="0"),
]
