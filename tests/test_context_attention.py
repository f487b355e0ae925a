"""Causal attention of queries split by position: each rank's rows of the whole attention, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from autopar.codegen.emit_block import Body
from autopar.codegen.ranks import local_ranks, on_rank, per_rank
from autopar.codegen.runtime import operators
from autopar.codegen.runtime.collectives import shard
from autopar.codegen.runtime.operators import context_attention
from autopar.graph import size
from autopar.graph.ir import Node, TensorMeta
from autopar.sharding.layout import Layout

SEQ = 24


@dataclass
class Axis:
    """What the operator asks of a one-dimensional mesh, on one rank."""

    ranks: int
    rank: int
    device_type: str = "cpu"

    def size(self) -> int:
        return self.ranks

    def get_local_rank(self) -> int:
        return self.rank


def positions(axes: list[Axis], balanced: bool) -> list[int]:
    """The positions that a rank holds, written as the definition says."""
    held = list(range(SEQ))
    for place, axis in enumerate(axes):
        if balanced and place == 0:
            size = len(held) // (2 * axis.ranks)
            first, second = axis.rank * size, (2 * axis.ranks - 1 - axis.rank) * size
            held = held[first : first + size] + held[second : second + size]
        else:
            size = len(held) // axis.ranks
            held = held[axis.rank * size : (axis.rank + 1) * size]
    return held


def tensors(kv_heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, SEQ, 8), (2, kv_heads, SEQ, 8), (2, kv_heads, SEQ, 8), (2, 4, SEQ, 8)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("sizes", [(1,), (2,), (3,), (2, 2), (2, 3)], ids=str)
def test_the_ranks_together_compute_the_whole(sizes: tuple[int, ...], balanced: bool, kv_heads: int) -> None:
    query, key, value, gradient = (x.requires_grad_() for x in tensors(kv_heads))
    options = {"enable_gqa": True} if kv_heads < 4 else {}
    whole = F.scaled_dot_product_attention(query, key, value, is_causal=True, **options)
    expected = torch.autograd.grad(whole, (query, key, value), gradient)
    sums = [torch.zeros_like(x) for x in (key, value)]
    for ranks in product(*map(range, sizes)):
        axes = [Axis(size, rank) for size, rank in zip(sizes, ranks, strict=True)]
        own = positions(axes, balanced)
        rows = query.detach()[:, :, own].requires_grad_()
        axis = axes[0] if len(axes) == 1 else tuple(axes)
        part = context_attention(rows, key, value, axis, balanced=balanced, **options)
        torch.testing.assert_close(part, whole[:, :, own], rtol=1e-12, atol=1e-12)
        back = torch.autograd.grad(part, (rows, key, value), gradient[:, :, own])
        torch.testing.assert_close(back[0], expected[0][:, :, own], rtol=1e-12, atol=1e-12)
        sums = [total + one for total, one in zip(sums, back[1:], strict=True)]
    for total, one in zip(sums, expected[1:], strict=True):
        torch.testing.assert_close(total, one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("balanced", [False, True])
def test_simulated_ranks_agree_with_real_ones(balanced: bool) -> None:
    query, key, value, _ = tensors(2)
    sizes = (2, 2)
    real, rows = [], []
    for ranks in product(*map(range, sizes)):
        axes = tuple(Axis(size, rank) for size, rank in zip(sizes, ranks, strict=True))
        rows.append(query[:, :, positions(list(axes), balanced)])
        real.append(context_attention(rows[-1], key, value, axes, balanced=balanced, enable_gqa=True))
    with local_ranks({"cp": 2, "tp": 2}) as mesh:
        axes = (mesh["cp"], mesh["tp"])
        same = [per_rank([x] * 4) for x in (key, value)]
        found = context_attention(per_rank(rows), *same, axes, balanced=balanced, enable_gqa=True)
        for rank, one in enumerate(real):
            torch.testing.assert_close(on_rank(found, rank), one, rtol=1e-12, atol=1e-12)


def test_the_balanced_order_gives_every_rank_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    masks = operators.causal_lower_right

    def counted(rows: int, keys: int) -> torch.Tensor:
        done[-1] += rows * (2 * keys - rows + 1) // 2
        return masks(rows, keys)

    monkeypatch.setattr(operators, "causal_lower_right", counted)
    query, key, value, _ = tensors(4)
    for rank in range(3):
        done.append(0)
        axis = Axis(3, rank)
        context_attention(query[:, :, positions([axis], True)], key, value, axis, balanced=True)
    assert done == [SEQ * (SEQ + 1) // 2 // 3] * 3


def test_dropout_differs_along_the_axes_that_split_the_result_only() -> None:
    query, key, value, _ = tensors(4)

    def run(cp: int, tp: int, split: bool) -> torch.Tensor:
        torch.manual_seed(0)
        axes = (Axis(2, cp), Axis(2, tp)) if split else Axis(2, cp)
        return context_attention(query[:, :, : SEQ // 2], key, value, Axis(2, 0), dropout_p=0.5, split=axes)

    assert not torch.equal(run(0, 0, True), run(0, 1, True))
    assert not torch.equal(run(0, 0, True), run(1, 0, True))
    assert torch.equal(run(0, 0, False), run(0, 1, False))


def test_a_buffer_that_is_the_same_on_all_ranks_is_cut() -> None:
    whole = torch.arange(8.0)
    with local_ranks({"tp": 2}) as mesh:
        part = shard(whole, mesh["tp"], 0)
        assert [on_rank(part, rank).tolist() for rank in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_two_dims_by_position_are_exchanged_by_way_of_the_whole() -> None:
    """In balanced order an all-to-all would leave the dim that it splits in that order."""
    node = Node("scores", "op", TensorMeta((size.BATCH, size.SEQ, size.SEQ, 4), requires_grad=True))
    source, target = Layout.parse("cp:S(1)"), Layout.parse("cp:S(2)")
    for balanced, steps in ((True, ["S(1) -> R", "R -> S(2)"]), (False, ["S(1) -> S(2)"])):
        block: Any = SimpleNamespace(setting=SimpleNamespace(balanced=balanced))
        found = [str(step).partition(":")[0] for _, step in Body._path(block, node, source, target)]
        assert found == steps
