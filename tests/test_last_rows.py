"""Pooling at the last position that a mask picks, where how many it picks is what data say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar.errors import UnsupportedError
from autopar.graph.last_rows import last_row
from autopar.graph.picks import Picks

END, SEQ = 2, 12


class Classifier(nn.Module):
    """``form``: how the positions of the ends are picked and grouped by samples."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.embed, self.mix, self.head = nn.Embedding(32, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.mix(self.embed(ids))).cumsum(1)
        ends = ids.eq(END)
        if self.form == "checked":
            if len(torch.unique_consecutive(ends.sum(1))) > 1:
                raise ValueError("as many ends in all samples")
            return self.head(x[ends, :].view(x.size(0), -1, x.size(-1))[:, -1, :])
        if self.form == "short":
            return self.head(x[ends].reshape(len(x), -1, x.shape[-1])[:, -1])
        return self.head(x[ends].mean(0, keepdim=True) + x[:, 0])


def loss(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(outputs, batch["label"])


IDS = torch.tensor([5, 6, END, 7, 8, 9, 4, 3, 11, 12, END, 1])


@pytest.mark.parametrize("form", ["checked", "short"])
def test_the_last_end_of_each_sample(form):
    torch.manual_seed(0)
    model, inputs = Classifier(form), {"ids": IDS, "label": torch.tensor(1)}
    job = autopar.Job(global_batch=8, seq_len=SEQ)
    found = autopar.search(model, job, autopar.Cluster.parse("1x2:h100"), inputs, loss, fix={"dp": 2, "pp": 1})
    assert autopar.verify(found, model, inputs, loss).worst[1] < 1e-11


def test_it_is_what_is_picked():
    x, ids = torch.randn(2, SEQ, 4), torch.stack([IDS, IDS.roll(3)])
    plain = x[ids == END].view(2, -1, 4)
    with Picks(last_row):
        grouped = x[ids == END].view(2, -1, 4)
        last, first, rows = grouped[:, -1], grouped[:, 0], grouped[torch.tensor([1, 0])]
    assert torch.equal(last, plain[:, -1])
    assert torch.equal(first, plain[:, 0])
    assert torch.equal(rows, plain.flip(0))


def test_other_uses_of_what_is_picked_are_refused_where_they_come_up():
    inputs = {"ids": IDS, "label": torch.tensor(1)}
    with pytest.raises(UnsupportedError, match=r"from the values of tensors \(aten.index\).*picks is understood as"):
        autopar.search(
            Classifier("mean"), autopar.Job(8, SEQ), autopar.Cluster.parse("1x2:h100"), inputs, loss, fix={"dp": 2}
        )
