"""Checks of values that only raise: seen in the source, and left out of the graph."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from autopar.errors import UnsupportedError
from autopar.graph.trace import trace

WIDTH, SEQ = 8, 6
SAMPLE = {
    "x": torch.randn(SEQ, WIDTH, generator=torch.Generator().manual_seed(1)),
    "ids": torch.zeros(SEQ, dtype=torch.int64),
}
logger = logging.getLogger(__name__)


def square(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return outputs.float().square().mean()


class Careful(nn.Module):
    """Asks in every way people ask."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        if ids is not None and ids.max() >= 10:
            raise ValueError("too large")
        if not torch.all(ids >= 0):
            raise ValueError("negative")
        if len(torch.unique_consecutive((ids == 1).sum(1))) > 1:
            raise ValueError("not equally many")
        assert torch.isfinite(x).all(), "numbers"
        assert not (x.sum() == 7).item()
        if (x.abs() > 100).any():
            logger.warning("large")
        return self.layer(x)  # type: ignore[no-any-return]


def test_checks_that_only_raise_or_warn_are_left_out_and_told() -> None:
    graph = trace(Careful(), SAMPLE, square)
    assert [note for note in graph.notes if "Careful.forward" in note and note.startswith("checks of values")]
    ops = {node.op for kind in graph.kinds.values() for node in kind.graph.of("op")}
    assert "aten.linear" in ops
    assert not ops & {"aten.any", "aten.all", "aten.max", "aten.isfinite"}


class Choosing(nn.Module):
    """What is computed depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        if ids.max() >= 10:
            x = -x
        return self.layer(x)  # type: ignore[no-any-return]


def test_choices_by_values_are_still_refused() -> None:
    with pytest.raises(UnsupportedError, match="from the values of tensors"):
        trace(Choosing(), SAMPLE, square)
