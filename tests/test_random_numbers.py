"""Random numbers that a model draws beside its dropout: in emitted code, and compared with the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_dropout import Axis
from torch import Tensor, nn

import autopar
from autopar.codegen.emit_module import module_source
from autopar.codegen.runtime.operators import drawn
from autopar.codegen.same_numbers import NUMBERS
from autopar.codegen.typecheck import typecheck
from autopar.codegen.verify import verify
from autopar.errors import UnsupportedError
from autopar.graph.trace import trace

WIDTH, SEQ = 8, 8
CLUSTER = autopar.Cluster.parse("1x4:h100")
SAMPLE = {"ids": torch.zeros(SEQ, dtype=torch.int64)}


def square(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return outputs.float().square().mean()


class Noisy(nn.Module):
    """Numbers of every kind: noise on what comes in, a choice by Gumbel noise, a jitter that only training has."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gate, self.out = nn.Embedding(32, WIDTH), nn.Linear(WIDTH, 4), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.training:
            x = x * torch.empty_like(x).uniform_(0.9, 1.1)
        x = x + 0.1 * torch.randn_like(x) + torch.rand_like(x.detach())
        scores = self.gate(x)
        chosen = (scores - torch.empty_like(scores).exponential_(2.0).log()).argmax(-1, keepdim=True)
        mixed: Tensor = self.out(x) * scores.softmax(-1).gather(-1, chosen)
        return mixed


@pytest.mark.parametrize("fix", [{"dp": 4}, {"tp": 4, "sp": True}, {"dp": 2, "cp": 2}])
def test_a_model_that_draws_is_compared_as_it_trains(fix: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Noisy()
    graph = trace(model, SAMPLE, square)
    nodes = [node for kind in graph.kinds.values() for node in kind.graph.of("op")]
    kinds = [node.args[1] for node in nodes if node.op == "autopar.drawn"]
    assert kinds == ["uniform", "normal", "uniform", "exponential"]
    plan = autopar.search(model, autopar.Job(8, SEQ), CLUSTER, inputs=SAMPLE, loss=square, fix=fix)
    report = verify(plan, model, SAMPLE, loss=square, graph=graph)
    assert report.worst[1] < 1e-10
    typecheck(plan, graph, 4)
    assert ("axis=" in module_source(plan, graph)) == ("dp" not in fix or "cp" in fix)
    monkeypatch.setitem(NUMBERS, "uniform", 0.9)  # what is drawn counts, on both sides
    other = verify(plan, model, SAMPLE, loss=square, graph=graph)
    assert other.worst[1] < 1e-10
    assert abs(other.loss - report.loss) > 1e-3 * abs(report.loss)


def test_ranks_draw_numbers_of_their_own_where_they_hold_parts() -> None:
    def numbers(axis: Any) -> Tensor:
        torch.manual_seed(0)
        return drawn(torch.ones(1000), "uniform", axis)

    whole, first, second = numbers(()), numbers(Axis(0)), numbers(Axis(1))
    assert not torch.equal(first, second)
    assert torch.equal(whole, numbers(()))
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.1


class Shuffled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        x = super().forward(ids)
        return x[torch.randperm(x.shape[0], device=x.device)]


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Shuffled(32, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.inner(ids)
        return result


def test_other_random_numbers_are_refused_with_their_place() -> None:
    with pytest.raises(UnsupportedError, match=r"module 'inner' draws random numbers \(aten\.randperm\)"):
        trace(Outer(), SAMPLE, square)


class Ordered(nn.Module):
    """A scale for all, and an order drawn for each sample (as masked autoencoders do)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(32, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x * torch.empty(1, device=x.device).uniform_(0.5, 2.5).to(x.dtype)
        values, order = torch.sort(torch.rand(x.shape[:2], device=x.device), dim=1)
        x = torch.gather(x, 1, order.unsqueeze(-1).expand(-1, -1, WIDTH))
        return torch.tanh(self.out(x)) * values.unsqueeze(-1).to(x.dtype)


@pytest.mark.parametrize("fix", [{"dp": 2}, {"tp": 2}])
def test_orders_that_are_drawn(fix: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = Ordered()
    cluster = autopar.Cluster.parse("1x2:h100")
    plan = autopar.search(model, autopar.Job(4, SEQ), cluster, inputs=SAMPLE, loss=square, fix=fix)
    assert verify(plan, model, SAMPLE, loss=square).worst[1] < 1e-10


class Scaled(nn.Module):
    """Evaluated, scales by what dropout keeps in training: another program than training with nothing dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(32, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.out(self.embed(ids))
        return nn.functional.dropout(x, 0.2) if self.training else x * 0.8


def test_what_is_compared_with_dropout_off_is_the_training_step() -> None:
    torch.manual_seed(0)
    model = Scaled()
    cluster = autopar.Cluster.parse("1x2:h100")
    plan = autopar.search(model, autopar.Job(4, SEQ), cluster, inputs=SAMPLE, loss=square, fix={"dp": 2})
    assert verify(plan, model, SAMPLE, loss=square).worst[1] < 1e-10


class Stepped(nn.Module):
    """A step for each sample, by whole numbers in each spelling."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.steps = nn.Embedding(32, WIDTH), nn.Embedding(9, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        step = torch.randint(9, (len(ids), 1), device=ids.device)
        other = torch.randint(2, 9, size=(len(ids), 1), device=ids.device)
        like = torch.randint_like(ids, 1, 4)
        return self.embed(ids) + self.steps(step) + self.steps(other) * like.unsqueeze(-1)


@pytest.mark.parametrize("fix", [{"dp": 4}, {"cp": 2, "dp": 2}])
def test_whole_numbers_are_parts_of_uniform_ones(fix: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = Stepped()
    graph = trace(model, SAMPLE, square)
    ops = {node.op for kind in graph.kinds.values() for node in kind.graph.of("op")}
    assert {"autopar.drawn", "aten.floor"} <= ops
    assert not {"aten.randint", "aten.randint_like"} & ops
    plan = autopar.search(model, autopar.Job(8, SEQ), CLUSTER, inputs=SAMPLE, loss=square, fix=fix)
    assert verify(plan, model, SAMPLE, loss=square, graph=graph).worst[1] < 1e-10
