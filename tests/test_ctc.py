"""CTC losses: targets as rows or as a mask picks them, lengths of each sample, all on shards of the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autopar
from autopar.errors import UnsupportedError
from autopar.graph.ctc import whole_ctc
from autopar.graph.ops import ctc_loss
from autopar.graph.picks import Picks

FRAMES, CLASSES, TARGETS = 20, 6, 8


class Recogniser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 16), nn.Linear(16, CLASSES)

    def forward(self, sound: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(sound)))


def by_rows(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Padded targets and the length of each, as torch's documentation has it."""
    labels = batch["labels"]
    logs = outputs.log_softmax(-1).transpose(0, 1)
    lengths = torch.full((outputs.shape[0],), outputs.shape[1], dtype=torch.long)
    return F.ctc_loss(logs, labels.clamp(min=1), lengths, (labels > 0).sum(-1), zero_infinity=True)


def by_mask(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Targets one after another, what is no target left out wherever it is."""
    labels = batch["labels"]
    mask = labels != -100
    logs = outputs.log_softmax(-1, dtype=torch.float32).transpose(0, 1)
    lengths = torch.full((outputs.shape[0],), outputs.shape[1])
    return F.ctc_loss(logs, labels[mask], lengths, mask.sum(-1), reduction="sum", zero_infinity=True)


@pytest.mark.parametrize("loss", [by_rows, by_mask])
def test_gradients_are_the_single_devices(loss: Any) -> None:
    torch.manual_seed(0)
    model = Recogniser()
    inputs = {"sound": torch.randn(FRAMES, 5), "labels": torch.tensor([1, 2, 2, -100, 3, -100, 5, -100])}
    job = autopar.Job(global_batch=8, seq_len=TARGETS)
    found = autopar.search(model, job, autopar.Cluster.parse("1x2:h100"), inputs, loss, fix={"dp": 2, "pp": 1})
    report = autopar.verify(found, model, inputs, loss)
    assert report.loss > 0
    assert max(report.loss_error, report.worst[1]) < 1e-11


def test_targets_that_a_mask_picks_are_moved_to_the_front_of_their_rows() -> None:
    logs = torch.randn(FRAMES, 3, CLASSES).log_softmax(-1)
    labels = torch.tensor([[-1, 2, 1, -1, 1], [3, -1, -1, -1, -1], [1, 2, 3, 4, 5]])
    mask, frames = labels >= 0, torch.tensor([20, 18, 20])
    plain = F.ctc_loss(logs, labels[mask], frames, mask.sum(1), reduction="none")
    rows: list[Tensor] = []

    def noting(log_probs: Tensor, targets: Tensor, *rest: Any) -> Tensor:
        rows.append(targets)
        return ctc_loss(log_probs, targets, *rest)

    with pytest.MonkeyPatch.context() as patch, Picks(whole_ctc):
        patch.setattr(torch.ops.autopar, "ctc_loss", noting)
        found = F.ctc_loss(logs, labels[mask], frames, mask.sum(1), reduction="none")
        picked = labels.masked_select(mask) + 1
        again = F.ctc_loss(logs, labels.masked_select(mask).to(torch.int32), frames, mask.sum(1), reduction="none")
    assert torch.equal(found, plain)
    assert torch.equal(again, plain)
    assert rows[0][0, :3].tolist() == [2, 1, 1]
    assert torch.equal(picked, labels[mask] + 1)  # elsewhere it is the values themselves


def test_targets_one_after_another_that_no_mask_picks_are_refused() -> None:
    logs = torch.randn(FRAMES, 2, CLASSES).log_softmax(-1)
    with Picks(whole_ctc), pytest.raises(UnsupportedError, match="targets \\[batch, length\\] or what a mask"):
        F.ctc_loss(logs, torch.tensor([1, 2, 3]), torch.tensor([9, 9]), torch.tensor([1, 2]))
