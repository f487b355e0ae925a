"""Emulated ranks: what torch's own mode computes, for the operators that are taken a shorter way."""

from __future__ import annotations

import pytest
import torch
from torch.distributed._local_tensor import LocalTensorMode

from autopar.codegen.emulation import Ranks
from autopar.codegen.ranks import local_ranks, on_rank, per_rank

RANKS = 3


def in_place(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y[0].copy_(x[1])
    y.view(-1)[1:3].add_(1)
    y.relu_()
    return y


def drawn(x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.nn.functional.dropout(x + torch.rand_like(x) + torch.randn(x.shape), 0.5)


def reshaped(x: torch.Tensor) -> torch.Tensor:
    parts = x.t().unsqueeze(0).expand(2, -1, -1).unbind(0)
    return torch.stack(list(parts)).transpose(0, 1).reshape(x.shape[1], -1)[:, 1:].contiguous()


@pytest.mark.parametrize("function", [in_place, drawn, reshaped])
def test_each_rank_computes_its_own(function):
    values = [torch.randn(4, 6, generator=torch.Generator().manual_seed(rank)) for rank in range(RANKS)]
    found = {}
    for kind in (LocalTensorMode, Ranks):
        with kind(RANKS):
            x = per_rank([value.clone() for value in values]).requires_grad_()
            y = function(x)
            (gradient,) = torch.autograd.grad((y * y).sum(), x)
        found[kind] = [(on_rank(y, rank).detach(), on_rank(gradient, rank)) for rank in range(RANKS)]
    for (torchs, its_gradient), (ours, our_gradient), value in zip(
        found[LocalTensorMode], found[Ranks], values, strict=True
    ):
        assert torch.equal(ours, torchs)
        assert torch.equal(our_gradient, its_gradient)
        if function is not drawn:
            assert torch.equal(ours, function(value))


def test_ranks_that_hold_less():
    with Ranks(2):
        x = per_rank([torch.arange(6.0).view(6, 1), torch.arange(3.0).view(3, 1)])
        y = x.split(2)
    assert [on_rank(part, 1).shape[0] for part in y] == [2, 1, 0]
    assert [on_rank(part, 0).shape[0] for part in y] == [2, 2, 2]


def test_coordinates_are_those_of_the_layout():
    with local_ranks({"dp": 2, "tp": 2}) as mesh:
        for name, expected in (("dp", [0, 0, 1, 1]), ("tp", [0, 1, 0, 1])) * 3:
            rank = mesh[name].get_local_rank()
            assert [rank.node._local_ints[index] for index in range(4)] == expected
        coordinates = mesh.get_coordinate()
        assert [coordinates[0].node._local_ints[index] for index in range(4)] == [0, 0, 1, 1]
        with pytest.raises(RuntimeError, match="name the dim"):
            mesh.get_local_rank()
