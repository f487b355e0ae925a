"""Losses of what a mask picks of outputs and of targets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autopar
from autopar.graph.picked_losses import picked_loss
from autopar.graph.picks import Picks

SEQ, CLASSES = 12, 6


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)))


def classes(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    kept = batch["tags"] >= 0
    return nn.CrossEntropyLoss()(outputs[kept], batch["tags"][kept])


def flat_classes(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """As encoders with a mask of padding have it."""
    active = batch["tags"].view(-1) != -100
    tags = batch["tags"].view(-1)[active]
    return F.cross_entropy(outputs.view(-1, CLASSES)[active].float(), tags.view(-1))


def squares(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    kept = batch["tags"] > 0
    targets = F.one_hot(batch["tags"].clamp(min=0), CLASSES).to(outputs.dtype)
    return 2 * F.mse_loss(outputs[kept], targets[kept])


def summed(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    kept = batch["tags"] > 2
    return F.l1_loss(outputs[..., 0].masked_select(kept), batch["tags"].masked_select(kept).float(), reduction="sum")


@pytest.mark.parametrize("loss", [classes, flat_classes, squares, summed])
def test_gradients_are_the_single_devices(loss: Any) -> None:
    torch.manual_seed(0)
    model = Tagger()
    inputs = {"ids": torch.arange(SEQ), "tags": torch.tensor([1, 2, -100, 4, 5, 0, -100, 1, 2, 3, 4, 5])}
    job = autopar.Job(global_batch=8, seq_len=SEQ)
    found = autopar.search(model, job, autopar.Cluster.parse("1x2:h100"), inputs, loss, fix={"dp": 2, "pp": 1})
    report = autopar.verify(found, model, inputs, loss)
    assert max(report.loss_error, report.worst[1]) < 1e-11


def test_it_is_the_loss_of_what_is_picked():
    outputs, tags = torch.randn(3, SEQ, CLASSES), torch.randint(-1, CLASSES, (3, SEQ))
    tags[tags < 0] = -100
    for loss in (classes, flat_classes, squares, summed):
        plain = loss(outputs, {"tags": tags})
        with Picks(picked_loss):
            found = loss(outputs, {"tags": tags})
            another = F.l1_loss(outputs[tags > 0].mean(), outputs[tags > 1].mean())
        assert torch.allclose(found, plain)
    assert torch.equal(another, F.l1_loss(outputs[tags > 0].mean(), outputs[tags > 1].mean()))
