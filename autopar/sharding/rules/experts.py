"""The experts of a mixture: split by expert, or inside every expert, either way leaving partial sums; and by token."""

from __future__ import annotations

from autopar.graph.ir import EXPERTS
from autopar.sharding.factors import Mismatch, Variant
from autopar.sharding.rules.entry import Call, Entry

_ROWS = {"none": "f+", "halves": "(c^ f+)", "pairs": "(f+ c^)", "apart": "f+"}


def _experts(call: Call) -> str:
    """``e``: the experts, ``f``: the width inside them, ``c``: gate and values. Every expert reads whole tokens."""
    given = call.node.args[5:]
    rows = _ROWS[call.node.kwargs["gate"]]
    up, down = (f"e+ m^ {rows}", "e+ f+ n^") if call.node.kwargs["transposed"] else (f"e+ {rows} m^", "e+ n^ f+")
    rest = [t for t, one in zip((f"e+ {rows}", "e+ n^", up, f"e+ {rows}"), given, strict=False) if one is not None]
    if len(call.operands) != 5 + len(rest):
        raise Mismatch("experts called with other tensors than hidden states, choice, weights and parameters")
    return f"{', '.join(['... m^', '... k^', '... k^', up, down, *rest])} -> ... n^"


def _own_experts(call: Call) -> dict[str, Variant]:
    """Each rank computes its own experts for all its tokens, zeros for the others, and the results add up."""
    return {"e": Variant("experts")}


ENTRIES = [Entry(EXPERTS, compute=_experts, once="56", variants=_own_experts)]
