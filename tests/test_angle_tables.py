"""Tables of rotary and sinusoidal positions kept in buffers or plain attributes: emitted code computes them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from autopar.codegen.runtime.position_tables import angle_table
from autopar.graph.angle_tables import angles_of
from autopar.graph.trace import trace

ROWS, RATES = 40, 16


def rates(base: float = 10000.0) -> Tensor:
    return 1.0 / base ** (torch.arange(0, 2 * RATES, 2).float() / (2 * RATES))


def turned(base: float = 10000.0) -> Tensor:
    return torch.outer(torch.arange(ROWS).float(), rates(base))


def waves() -> Tensor:
    """As in PyTorch's tutorial of the transformer."""
    rising = torch.exp(torch.arange(0, 2 * RATES, 2) * (-math.log(10000.0) / (2 * RATES)))
    table = torch.zeros(ROWS, 1, 2 * RATES)
    table[:, 0, 0::2] = torch.sin(torch.arange(ROWS).unsqueeze(1) * rising)
    table[:, 0, 1::2] = torch.cos(torch.arange(ROWS).unsqueeze(1) * rising)
    return table


def polar() -> Tensor:
    return torch.polar(torch.ones_like(turned(5e5)), turned(5e5))


WRITTEN = {
    "cos": lambda: turned(500000.0).cos(),
    "sin halves": lambda: torch.cat((turned(), turned()), -1).sin(),
    "cos twice": lambda: turned(1e6).cos().repeat_interleave(2, -1).bfloat16(),
    "sin then cos": lambda: torch.cat((turned().sin(), turned().cos()), -1),
    "cos then sin": lambda: torch.cat((turned(5e5).cos(), turned(5e5).sin()), -1),
    "pairs": lambda: torch.stack((turned().cos(), turned().sin()), -1),
    "pairs polar": polar,
    "waves": waves,
}


@pytest.mark.parametrize("form", WRITTEN)
def test_tables_as_they_are_written_are_told(form):
    table = WRITTEN[form]()
    found = angles_of(table)
    assert found is not None
    assert found[:2] + found[3:4] == (ROWS, RATES, form)
    plain = torch.view_as_real(table) if table.is_complex() else table
    made = angle_table(*found, dtype=plain.dtype, device=None)
    assert torch.equal(made.reshape(plain.shape), plain)


def test_a_table_that_differs_in_one_number_is_none():
    table = turned().cos()
    table[-1, -1] += 1e-6
    assert angles_of(table) is None
    assert angles_of(torch.rand(ROWS, RATES)) is None


class Turning(nn.Module):
    """Keeps complex numbers in a plain attribute, as the first Llama did: more of them than can be written down."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(2 * RATES, 2 * RATES)
        self.freqs = polar()

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        pairs = torch.view_as_complex(self.project(x).float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self.freqs[: x.shape[1]]).flatten(2)


def test_a_table_of_complex_numbers_is_computed_as_pairs():
    inputs = {"x": torch.zeros(12, 2 * RATES), "ids": torch.zeros(12, dtype=torch.int64)}
    graph = trace(Turning(), inputs, lambda outputs, batch: outputs.square().mean())
    assert any(node.op == "autopar.angle_table" for node in graph.constants.of("op"))
    metas = [node.meta.dtype for kind in graph.kinds.values() for node in kind.graph.nodes.values()]
    assert not any(dtype.startswith("complex") for dtype in metas)
    assert not graph.buffers
