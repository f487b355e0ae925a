"""Models of which a part trains: emitted, verified and priced without gradients for the rest."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from plain_plans import plain_plan, small_llama
from torch import Tensor, nn

import autopar
from autopar.codegen.emit_module import module_source
from autopar.graph.trace import trace
from autopar.job import Job


class Adapted(nn.Module):
    """A linear layer that stays as it is, and a low-rank pair beside it that trains."""

    def __init__(self, linear: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Linear(linear.in_features, rank, bias=False)
        self.up = nn.Linear(rank, linear.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.up(self.down(x))


def frozen_embedding() -> nn.Module:
    model = small_llama()
    model.model.embed_tokens.requires_grad_(False)
    return model


def frozen_layers() -> nn.Module:
    """The embedding and the first half of the layers: with two stages, all of the first."""
    model = frozen_embedding()
    for layer in model.model.layers[:2]:
        layer.requires_grad_(False)
    return model


def adapters() -> nn.Module:
    model = small_llama().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
        layer.mlp.down_proj = Adapted(layer.mlp.down_proj)
    return model


MODELS = [frozen_embedding, frozen_layers, adapters]
JOB = Job(8, 16, "fp64")


@pytest.mark.parametrize("make", MODELS)
def test_stages_compute_the_single_device(make: Callable[[], nn.Module]) -> None:
    model = make()
    graph = trace(model)
    plan = plain_plan(graph, pp=2, dp=2, job=JOB)
    report = autopar.verify(plan, model)
    assert report.errors.keys() == {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert max(report.loss_error, report.worst[1]) < 1e-12


@pytest.mark.parametrize("make", MODELS)
def test_tensor_parallel_computes_the_single_device(make: Callable[[], nn.Module]) -> None:
    fix = {"tp": 2, "pp": 1, "dp": 1, "micro_batch": 4, "zero": 0, "recompute": "none"}
    plan = autopar.search(make(), Job(4, 16, "bf16"), autopar.Cluster.parse("1x2:h100"), fix=fix)
    report = autopar.verify(plan, make())
    assert max(report.loss_error, report.worst[1]) < 1e-12


def test_the_module_says_what_is_frozen() -> None:
    graph = trace(adapters())
    text = module_source(plain_plan(graph, job=JOB), graph)
    assert "linear=Weights(weight=new.whole(64, 64, trains=False))" in text
    assert "down=Weights(weight=new.whole(4, 64))" in text
