"""Dropout in emitted code: masks that differ between shards, agree between copies, and return on recomputation."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hand_plans import graph_of, megatron, on_axes, plan_of
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

from autopar.cluster import Cluster
from autopar.codegen.emit_module import module_source
from autopar.codegen.runtime.offload import offload
from autopar.codegen.runtime.operators import attention, dropout
from autopar.codegen.runtime.recompute import selective
from autopar.codegen.typecheck import typecheck
from autopar.codegen.verify import verify
from autopar.graph.ir import ModelGraph
from autopar.job import Job
from autopar.plan import Mesh, Plan
from autopar.solver.search import search


@dataclass
class Axis:
    """What the operators ask of a one-dimensional mesh."""

    rank: int
    ranks: int = 2
    device_type: str = "cpu"

    def size(self) -> int:
        return self.ranks

    def get_local_rank(self) -> int:
        return self.rank


def drawn(rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask of a rank, and the number that the shared stream gives next."""
    torch.manual_seed(seed)
    mask = dropout(torch.ones(400, 100), 0.25, True, Axis(rank))
    return mask, torch.rand(())


def test_shards_draw_masks_of_their_own_and_stay_in_step() -> None:
    (first, after), (second, too) = drawn(0), drawn(1)
    assert after == too
    kept = [(mask != 0).double() for mask in (first, second)]
    for mask in kept:
        assert mask.mean() == pytest.approx(0.75, abs=0.01)
    # Independent: an element survives on both ranks with probability 0.75².
    assert (kept[0] * kept[1]).mean() == pytest.approx(0.75**2, abs=0.01)
    assert torch.equal(drawn(0)[0], first)
    assert first.max() == pytest.approx(1 / 0.75)


def test_masks_of_several_axes_are_independent_along_each_and_stay_in_step() -> None:
    def mask(*axes: Axis) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        dropped = dropout(torch.ones(400, 100), 0.25, True, axes if len(axes) > 1 else axes[0])
        return (dropped != 0).double(), torch.rand(())

    found = {(cp, tp): mask(Axis(cp, 2), Axis(tp, 3)) for cp in range(2) for tp in range(3)}
    assert len({float(after) for _, after in found.values()}) == 1
    for one in found:
        assert found[one][0].mean() == pytest.approx(0.75, abs=0.01)
        for other in found:
            if one < other:  # an element survives on both ranks with probability 0.75²
                both = (found[one][0] * found[other][0]).mean()
                assert both == pytest.approx(0.75**2, abs=0.01), (one, other)
    # Ranks that differ on an axis that does not split the tensor draw the same mask.
    assert torch.equal(mask(Axis(1, 2))[0], mask(Axis(1, 2))[0])


def test_recomputation_draws_the_same_mask() -> None:
    torch.manual_seed(0)
    x = torch.ones(64, 64, requires_grad=True)
    y = checkpoint(lambda x: dropout(x * 1, 0.5, True, Axis(1)) ** 2, x, use_reentrant=False)
    y.sum().backward()
    assert torch.equal(x.grad, 2 * y.detach() / 1.0)


WAYS: dict[str, Callable[..., torch.Tensor]] = {
    "full": partial(checkpoint, use_reentrant=False),
    "selective": partial(selective, keep=("matmul",)),
    "offload": partial(offload, selective, keep=("matmul",)),
}


@pytest.mark.parametrize("way", WAYS)
def test_masks_return_whatever_is_recomputed(way: str) -> None:
    """Three masks a block, one of each rank's own between two that all ranks share: forward, and again in backward."""

    def block(x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(x @ torch.eye(64), 0.3)
        return F.dropout(dropout(x * 2, 0.4, True, Axis(2)) @ torch.eye(64), 0.5).sin()

    def trained(call: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        x = torch.ones(64, 64, requires_grad=True)
        result = call(block, call(block, x))
        torch.rand(7)  # backward begins at another place of the stream
        result.sum().backward()
        return result.detach(), x.grad

    for found, expected in zip(trained(WAYS[way]), trained(lambda block, x: block(x)), strict=True):
        assert torch.equal(found, expected)


def test_masks_of_shards_are_statistically_independent() -> None:
    """Keep rates, and how often two ranks or two calls keep the same element, within five standard deviations."""
    keep, count = 0.75, 400 * 100
    masks = []
    for rank in range(4):
        torch.manual_seed(0)
        masks += [(dropout(torch.ones(400, 100), 1 - keep, True, Axis(rank)) != 0).double() for _ in range(2)]
    for place, mask in enumerate(masks):
        assert abs(float(mask.mean()) - keep) < 5 * (keep * (1 - keep) / count) ** 0.5
        for other in masks[:place]:
            both = float((mask * other).mean())
            assert abs(both - keep**2) < 5 * (keep**2 * (1 - keep**2) / count) ** 0.5


def test_copies_draw_one_mask() -> None:
    """What is not split takes its mask from the stream that the ranks share, also after masks of their own."""

    def drawn_by(rank: int) -> torch.Tensor:
        torch.manual_seed(3)
        dropout(torch.ones(10), 0.5, True, Axis(rank))
        return F.dropout(torch.ones(1000), 0.5)

    assert all(torch.equal(drawn_by(rank), drawn_by(0)) for rank in range(1, 4))


def test_attention_of_shards_differs_only_while_training() -> None:
    query, key, value = torch.randn(3, 1, 2, 8, 4, generator=torch.Generator().manual_seed(0))

    def run(rank: int, p: float) -> torch.Tensor:
        torch.manual_seed(0)
        return attention(query, key, value, Axis(rank), dropout_p=p, is_causal=True)

    assert not torch.equal(run(0, 0.5), run(1, 0.5))
    assert torch.equal(run(0, 0.0), run(1, 0.0))


def by_heads(graph: ModelGraph) -> Plan:
    return plan_of(graph, megatron(graph, 2, False), Mesh(tp=2))


@pytest.mark.parametrize("sp", [False, True])
def test_gpt2_with_its_dropout_is_emitted_and_proved_without(sp: bool) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=32, n_head=4, vocab_size=64, n_positions=64, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    model = GPT2LMHeadModel(config)
    graph = graph_of(model)
    plan = search(graph, Job(8, 32), Cluster.parse("1x2:h100"), {"tp": 2, "sp": True}) if sp else by_heads(graph)
    text = module_source(plan, graph)
    layer = text[text.index("class GPT2Block") : text.index("class Stage")]
    assert "dropout_p=0.1 if self.training else 0.0" in layer
    # The residual's masks: of each shard's own where the sequence is split, else the same on all ranks.
    assert bool(re.search(r"(?<!F\.)dropout\(", layer)) == sp
    assert sp or layer.count("F.dropout(") == 2
    assert sp or re.search(r"attention\([^)]*axis=self.tp", layer)
    report = verify(plan, model)
    assert report.worst[1] <= 1e-10
    assert "dropout off" in str(report)
    assert model.training
    typecheck(plan, graph, 8)


def test_gpt2_with_its_dropout_on_several_axes() -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=32, n_head=4, vocab_size=64, n_positions=64, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    model = GPT2LMHeadModel(config)
    graph = graph_of(model)
    plan = plan_of(graph, on_axes(graph, Mesh(cp=2, tp=2), True), Mesh(cp=2, tp=2))
    text = module_source(plan, graph)
    assert re.search(r"dropout\([^)]*axis=\(self.cp, self.tp\)\)", text)
    assert re.search(r"context_attention\([^)]*split=\(self.(cp|tp), self.(cp|tp)\)", text)
    assert verify(plan, model).worst[1] <= 1e-10
    typecheck(plan, graph, 8)
