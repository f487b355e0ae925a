"""The longest sequence is read off tables of positions, whatever the model's config says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autopar
from autopar.cluster import Cluster
from autopar.errors import BadInputError, UnsupportedError
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


class Sparse(nn.Module):
    """Each position reads the eight that score best, or all where there are fewer."""

    def __init__(self, **config: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(**config)
        self.tokens, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        scores = x @ x.transpose(1, 2)
        best = scores.topk(min(8, scores.shape[-1]), dim=-1).indices
        hidden = torch.ones_like(scores, dtype=torch.bool).scatter(-1, best, False)
        read = F.softmax(scores.masked_fill(hidden, -1e9), -1) @ x
        return F.cross_entropy(self.head(read).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize(("length", "within"), [(16, (8, None)), (8, (8, None)), (6, (1, 8))])
def test_the_example_decides_what_the_least_of_a_number_and_the_sequence_is(
    length: int, within: tuple[int, int | None]
) -> None:
    tokens = torch.randint(16, (length,))
    inputs = {"input_ids": tokens, "labels": tokens}
    model = Sparse()
    graph = trace(model, inputs)
    assert (graph.min_seq, graph.max_seq, graph.notes) == (*within, ())
    if length == 16:
        fix: dict[str, Any] = {"cp": 2, "micro_batch": 2}
        plan = autopar.search(model, autopar.Job(2, length), Cluster.parse("1x2:h100"), inputs=inputs, fix=fix)
        assert autopar.verify(plan, model, inputs).worst[1] < 1e-12


def test_without_an_example_the_length_of_the_config_decides() -> None:
    assert trace(Sparse(max_position_embeddings=64)).min_seq == 8
    assert trace(Sparse(max_position_embeddings=4)).max_seq == 8
    with pytest.raises(UnsupportedError, match=r"size Min\(8, s\).*pass `inputs`"):
        trace(Sparse())


class Chunked(Sparse):
    """Adds what chunks of eight positions come to, as many as there are, the last of which may be shorter."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x, seq = self.tokens(input_ids), input_ids.shape[1]
        chunks = [x[:, count * 8 : min(count * 8 + 8, seq)].cumsum(1) for count in range((seq + 7) // 8)]
        x = x + sum(chunk.sum(1, keepdim=True) for chunk in chunks)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def test_as_many_chunks_as_the_example_has_are_no_code_for_other_lengths() -> None:
    tokens = torch.randint(16, (16,))
    graph = trace(Chunked(), {"input_ids": tokens, "labels": tokens})
    assert graph.notes[0].startswith("the sequence length is fixed to that of the example inputs")
