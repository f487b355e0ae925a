"""Recurrent layers of torch, kept whole while a model is traced: torch.export would unroll them over the positions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from autopar.errors import UnsupportedError
from autopar.graph.ir import RECURRENT

KINDS = tuple(op.removeprefix("autopar.") for op in RECURRENT)

_library = torch.library.Library("autopar", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "recurrent(str kind, Tensor x, Tensor[] states, Tensor[] weights, bool biases, int layers, bool bidirectional, "
    "bool batch_first) -> Tensor[]"
)


@torch.library.register_fake("autopar::recurrent", lib=_library)  # type: ignore[untyped-decorator]
def _shapes(
    kind: str,
    x: Tensor,
    states: list[Tensor],
    weights: list[Tensor],
    biases: bool,
    layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> list[Tensor]:
    width = states[0].shape[-1] * (2 if bidirectional else 1)
    return [x.new_empty((*x.shape[:2], width)), *(torch.empty_like(state) for state in states)]


def _whole(kind: str) -> Callable[..., tuple[Tensor, ...]]:
    def call(x: Tensor, states: Any, weights: Any, *rest: Any) -> tuple[Tensor, ...]:
        if len(rest) != 6 or not isinstance(weights, list | tuple):
            raise UnsupportedError(f"{kind} of packed sequences cannot be traced; pad them")
        biases, layers, dropout, train, bidirectional, batch_first = rest
        if dropout and train and layers > 1:
            raise UnsupportedError(f"{kind} has dropout between its layers; put nn.Dropout between layers of their own")
        held = list(states) if isinstance(states, tuple | list) else [states]
        if any(weight.shape[-1] != held[0].shape[-1] for weight in weights[1 :: 4 if biases else 2]):
            raise UnsupportedError(f"{kind} with projections (proj_size) has no form in autopar")
        results = torch.ops.autopar.recurrent(kind, x, held, list(weights), biases, layers, bidirectional, batch_first)
        return tuple(results)

    return call


@contextlib.contextmanager
def recurrent_whole() -> Iterator[None]:
    """While open, `nn.LSTM`, `nn.GRU` and `nn.RNN` call one operator."""
    functions: Any = torch._VF
    before = {kind: functions.__dict__.get(kind) for kind in KINDS}
    for kind in KINDS:
        setattr(functions, kind, _whole(kind))
    try:
        yield
    finally:
        for kind, function in before.items():
            if function is None:
                delattr(functions, kind)
            else:
                setattr(functions, kind, function)
