"""Recurrent layers as they are in torch (LSTM, GRU, Elman): samples go apart, all else stays whole."""

from __future__ import annotations

from autopar.graph.ir import RECURRENT
from autopar.sharding.rules.entry import Call, Entry


def _recurrent(call: Call) -> str:
    """``autopar.lstm(x, states, weights, biases, layers, dropout, train, bidirectional, batch_first, index)``."""
    batch_first, index = call.node.args[-2:]
    several = call.node.op == "autopar.lstm"
    x = "b s^ d^" if batch_first else "s^ b d^"
    states = ["l^ b h^"] * 2 if several else ["l^ b h^"]
    weights = [
        " ".join(f"w{place}x{dim}^" for dim in range(len(shape)))
        for place, shape in enumerate(call.shapes[1 + len(states) :])
    ]
    result = states[0] if index else "b s^ o^" if batch_first else "s^ b o^"
    return f"{', '.join([x, *states, *weights])} -> {result}"


ENTRIES = [Entry(op, compute=_recurrent) for op in RECURRENT]
