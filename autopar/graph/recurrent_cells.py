"""One step of a recurrent layer (`nn.LSTMCell`, `nn.GRUCell`, `nn.RNNCell`), as the operators it is made of.

A loop over positions calls such a cell for each. Formulas are those of torch's documentation of the three modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from autopar.graph.draft import Draft
from autopar.graph.ir import Ref
from autopar.graph.size import divide


def _linear(draft: Draft, x: Ref, weight: Ref, bias: Ref | None) -> Ref:
    given = (x, weight) if bias is None else (x, weight, bias)
    return Ref(draft.emit("aten.linear", *given, shape=(*draft.shape(x)[:-1], draft.shape(weight)[0])))


def _same(draft: Draft, op: str, x: Ref, *others: Any) -> Ref:
    return Ref(draft.emit(f"aten.{op}", x, *others, shape=draft.shape(x)))


def _gates(draft: Draft, x: Ref, count: int) -> list[Ref]:
    """``x`` [..., count h] in parts of h."""
    last = len(draft.shape(x)) - 1
    size = divide(draft.shape(x)[last], count)
    assert size is not None
    parts = draft.unflatten(x, last, (count, size), free=1)
    return [draft.select(parts, last, index) for index in range(count)]


def lstm_cell(
    draft: Draft, x: Ref, states: Sequence[Ref], w_ih: Ref, w_hh: Ref, b_ih: Ref | None = None, b_hh: Ref | None = None
) -> list[Ref]:
    """x [n, i], states (hidden, cell) [n, h], weights [4 h, i] and [4 h, h] -> hidden and cell."""
    hidden, cell = states
    both = _same(draft, "add", _linear(draft, x, w_ih, b_ih), _linear(draft, hidden, w_hh, b_hh))
    enter, forget, new, leave = _gates(draft, both, 4)
    kept = _same(draft, "mul", _same(draft, "sigmoid", forget), cell)
    added = _same(draft, "mul", _same(draft, "sigmoid", enter), _same(draft, "tanh", new))
    cell = _same(draft, "add", kept, added)
    return [_same(draft, "mul", _same(draft, "sigmoid", leave), _same(draft, "tanh", cell)), cell]


def gru_cell(
    draft: Draft, x: Ref, hidden: Ref, w_ih: Ref, w_hh: Ref, b_ih: Ref | None = None, b_hh: Ref | None = None
) -> Ref:
    """x [n, i], hidden [n, h], weights [3 h, i] and [3 h, h] -> hidden."""
    given = _gates(draft, _linear(draft, x, w_ih, b_ih), 3)
    held = _gates(draft, _linear(draft, hidden, w_hh, b_hh), 3)
    both = [_same(draft, "add", a, b) for a, b in zip(given[:2], held[:2], strict=True)]
    reset, update = (_same(draft, "sigmoid", gate) for gate in both)
    new = _same(draft, "tanh", _same(draft, "add", given[2], _same(draft, "mul", reset, held[2])))
    return _same(draft, "add", new, _same(draft, "mul", update, _same(draft, "sub", hidden, new)))


def _rnn_cell(activation: str) -> Callable[..., Ref]:
    def cell(
        draft: Draft, x: Ref, hidden: Ref, w_ih: Ref, w_hh: Ref, b_ih: Ref | None = None, b_hh: Ref | None = None
    ) -> Ref:
        both = _same(draft, "add", _linear(draft, x, w_ih, b_ih), _linear(draft, hidden, w_hh, b_hh))
        return _same(draft, activation, both)

    return cell


CELLS: dict[str, Callable[..., Any]] = {
    "lstm_cell": lstm_cell,
    "gru_cell": gru_cell,
    "rnn_tanh_cell": _rnn_cell("tanh"),
    "rnn_relu_cell": _rnn_cell("relu"),
}
