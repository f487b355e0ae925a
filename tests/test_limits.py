"""The longest sequence is read off tables of positions, whatever the model's config says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.cluster import Cluster
from autopar.errors import BadInputError
from autopar.graph.trace import trace
from autopar.job import Job
from autopar.solver.search import search


class Tabled(nn.Module):
    """Token and position embeddings; ``how`` the table of 24 rows is read."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.tokens, self.positions = nn.Embedding(16, 8), nn.Embedding(24, 8)
        self.head = nn.Linear(8, 16)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        seq = input_ids.shape[1]
        if self.how == "looked up":
            place = self.positions(torch.arange(seq, device=input_ids.device))
        elif self.how == "from the third row":
            place = self.positions(torch.arange(seq, device=input_ids.device) + 2)
        elif self.how == "cut":
            place = self.positions.weight[:seq]
        else:
            place = self.positions.weight.sum(0)
        logits = self.head(self.tokens(input_ids) + place)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize(
    ("how", "longest"), [("looked up", 24), ("from the third row", 22), ("cut", 24), ("not by position", None)]
)
def test_the_table_limits_the_sequence(how: str, longest: int | None) -> None:
    with torch.device("meta"):  # the caller's default device is no matter
        graph = trace(Tabled(how))
    assert graph.max_seq == longest
    if longest is not None:
        with pytest.raises(BadInputError, match=f"seq_len {longest + 1} is longer than Tabled takes"):
            search(graph, Job(4, longest + 1), Cluster.parse("1x1:h100"), {})
