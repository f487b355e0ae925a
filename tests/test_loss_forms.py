"""Losses as people write them: which are sums over a count, and are computed alike by any plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_trace import Regression
from torch import Tensor
from traced import worst_error

from autopar.graph.interpret import run_model
from autopar.graph.trace import trace
from autopar.sharding.data_parallel import samples_mixed

Batch = dict[str, Tensor]


def _several(y: Tensor, batch: Batch) -> Tensor:
    """As of a variational autoencoder: sums, over the samples."""
    wrong = F.binary_cross_entropy(torch.sigmoid(y), torch.sigmoid(batch["x"]), reduction="sum")
    return (wrong - 0.5 * torch.sum(1 + y - y.exp())) / batch["x"].shape[0]


def _with_constants(y: Tensor, batch: Batch) -> Tensor:
    return F.mse_loss(y, batch["x"]) + y.new_zeros(())


def _from_zero(y: Tensor, batch: Batch) -> Tensor:
    total = torch.zeros([])
    for part, target in zip(y.chunk(2, -1), batch["x"].chunk(2, -1), strict=True):
        total = total + F.mse_loss(part, target)
    return total / 2


LOSSES = {
    "smooth l1": lambda y, batch: F.smooth_l1_loss(y, batch["x"], beta=0.5),
    "huber": lambda y, batch: F.huber_loss(y, batch["x"], reduction="none", delta=0.3).sum(-1).mean(),
    "elements": lambda y, batch: F.mse_loss(y, batch["x"], reduction="none").mean([1]).mean(),
    "divergence": lambda y, batch: F.kl_div(y.log_softmax(-1), batch["x"].softmax(-1), reduction="batchmean"),
    "logarithms": lambda y, batch: F.kl_div(
        y.log_softmax(-1), batch["x"].log_softmax(-1), reduction="batchmean", log_target=True
    ),
    "clicks": lambda y, batch: F.binary_cross_entropy_with_logits(y, torch.sigmoid(batch["x"])),
    "rare clicks": lambda y, batch: F.binary_cross_entropy_with_logits(
        y, torch.sigmoid(batch["x"]), pos_weight=torch.tensor(3.0)
    ),
    "over samples": lambda y, batch: (y - batch["x"]).square().sum() / len(y),
    "several": _several,
    "constants": _with_constants,
    "from zero": _from_zero,
}


@pytest.mark.parametrize("name", LOSSES)
def test_such_losses_are_sums_over_a_count(name: str) -> None:
    torch.manual_seed(0)
    model, loss = Regression().double(), LOSSES[name]
    graph = trace(model, inputs={"x": torch.zeros(6)}, loss=loss)
    batch: dict[str, Any] = {"x": torch.randn(5, 6, dtype=torch.float64)}
    assert worst_error(graph, model, batch, loss(model(**batch), batch)) < 1e-10
    _, count = run_model(graph, dict(model.named_parameters()), batch, torch.float64)
    assert int(count) in (5 * 6, 5, 5 * 3)
    assert samples_mixed(graph) == ()
