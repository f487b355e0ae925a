"""Backwards in two halves: weights that are read in several places, which PyTorch's own second half gets wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from autopar.codegen.runtime.pipeline import joined_groups, weight_gradients


class Shared(nn.Module):
    """Two layers with one weight and a bias each: the weight belongs with both biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.weight, self.first).tanh(), self.weight, self.second)


class Both(torch.autograd.Function):
    """Hands on two tensors at once, as FSDP2 does with a block's inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x.view_as(x), y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients


class Table(nn.Module):
    """A table that two layers read: the way from the second to it leads through the first."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4))
        self.first, self.second = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        table = self.table * 1.0
        hidden, table = Both.apply(F.linear((x + table).tanh(), self.first), table)
        return F.linear((hidden + table).tanh(), self.second)


@pytest.mark.parametrize("kind", [Shared, Table])
def test_gradients_are_those_of_a_whole_backward(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module = kind().double()
    weights = list(module.parameters())
    x, given = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.randn(3, 4, dtype=torch.float64)
    right = torch.autograd.grad(module(x), [x, *weights], given)

    def first_half() -> list[dict[str, Any]]:
        x.grad = None
        _, groups = stage_backward_input([module(x) * 1.0], [given], [x], iter(weights))
        return groups

    weight_gradients(weights, joined_groups(first_half()))
    for found, expected in zip([x.grad, *(weight.grad for weight in weights)], right, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    # Twice as much after a second micro-batch: nothing is left over, and nothing is missing.
    weight_gradients(weights, joined_groups(first_half()))
    for weight, expected in zip(weights, right[1:], strict=True):
        torch.testing.assert_close(weight.grad, 2 * expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="second time"):
        stage_backward_weight(iter(weights), first_half())


def test_no_weight_is_in_two_groups() -> None:
    torch.manual_seed(0)
    module = Shared()
    weights = list(module.parameters())
    x = torch.randn(3, 4, requires_grad=True)
    _, groups = stage_backward_input([module(x) * 1.0], [torch.ones(3, 4)], [x], iter(weights))
    assert sum(len(group["params"]) for group in groups) > len(weights)
    assert [len(group["params"]) for group in joined_groups(groups)] == [len(weights)]
