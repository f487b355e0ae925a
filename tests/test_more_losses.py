"""Losses as strangers write them: one for each target, with weights, of vectors, with numbers and parameters around."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_odd_models import CLUSTER, ops, proved
from torch import Tensor, nn

import autopar
from autopar.errors import BadInputError
from autopar.graph.trace import trace

WIDTH, CLASSES = 8, 5


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Scores(nn.Module):
    """Scores of classes for each position."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


INPUTS = {"x": torch.randn(6, WIDTH), "y": torch.tensor([0, 1, 2, 3, 4, -100])}
CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 0.25, 1.5])

Batch = dict[str, Tensor]


def one_by_one(scores: Tensor, batch: Batch) -> Tensor:
    """A focal loss: each target's own, weighed by itself."""
    terms = F.cross_entropy(scores.transpose(1, 2), batch["y"], reduction="none", label_smoothing=0.1)
    return ((1 - torch.exp(-terms)) ** 2 * terms).mean()


def masked(scores: Tensor, batch: Batch) -> Tensor:
    logs = F.nll_loss(scores.log_softmax(-1).flatten(0, 1), batch["y"].flatten(), reduction="none")
    valid = batch["y"].flatten() != -100
    return (logs * valid).sum() / valid.sum()


def weighted(scores: Tensor, batch: Batch) -> Tensor:
    weight = CLASS_WEIGHTS.to(scores)
    return F.cross_entropy(scores.flatten(0, 1), batch["y"].flatten(), weight=weight, label_smoothing=0.2)


def weighted_sum(scores: Tensor, batch: Batch) -> Tensor:
    return F.nll_loss(
        scores.log_softmax(-1).flatten(0, 1), batch["y"].flatten(), CLASS_WEIGHTS.to(scores), reduction="sum"
    )


def of_probabilities(scores: Tensor, batch: Batch) -> Tensor:
    shares = F.one_hot(batch["y"].clamp(min=0), CLASSES).to(scores)
    return F.cross_entropy(scores.flatten(0, 1), shares.flatten(0, 1), CLASS_WEIGHTS.to(scores), label_smoothing=0.1)


@pytest.mark.parametrize("loss", [one_by_one, masked, weighted_sum, of_probabilities])
@pytest.mark.parametrize("fix", [{"dp": 2}, {"tp": 2}])
def test_cross_entropies_that_are_not_plain(loss: Callable[[Tensor, Batch], Tensor], fix: dict[str, int]) -> None:
    proved(Scores(), INPUTS, loss, **fix)


def test_a_mean_with_weights_of_classes_is_of_a_micro_batch() -> None:
    proved(Scores(), INPUTS, weighted, dp=2, micro_batch=2)


class Vectors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 6)

    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.layer(x) for x in (a, b, c))


THREE = {key: torch.randn(WIDTH) for key in "abc"} | {"sign": torch.tensor(1)}

OF_VECTORS: dict[str, Callable[[tuple[Tensor, ...], Batch], Tensor]] = {
    "triplet": lambda o, _: F.triplet_margin_loss(*o, margin=0.5, swap=True),
    "ranking": lambda o, y: F.margin_ranking_loss(o[0].sum(-1), o[1].sum(-1), y["sign"] * 2 - 1, margin=0.3),
    "soft margin": lambda o, y: F.soft_margin_loss(o[0], (y["sign"] * 2 - 1).unsqueeze(-1).expand_as(o[0])),
    "cosine": lambda o, y: F.cosine_embedding_loss(o[0], o[1], y["sign"] * 2 - 1, margin=0.1),
    "distance": lambda o, _: (F.pairwise_distance(o[0], o[1], p=1.0) - F.pairwise_distance(o[0], o[2])).mean(),
    "two less": lambda o, _: 2 - 2 * F.cosine_similarity(o[0], o[1], dim=-1).mean(),
    "one more": lambda o, _: (F.mse_loss(o[0], o[1]) - 3.0) / 2 + 1,
}


@pytest.mark.parametrize("name", OF_VECTORS)
def test_losses_of_vectors(name: str) -> None:
    proved(Vectors(), THREE, OF_VECTORS[name], dp=2)


class Tasks(nn.Module):
    """Two tasks, the weights of which are learned (arXiv 1705.07115), and a penalty on weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scales = nn.Linear(WIDTH, CLASSES), nn.Parameter(torch.tensor([0.3, -0.2]))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        scores = self.layer(x)
        first = F.cross_entropy(scores.flatten(0, 1), y.flatten())
        second = F.mse_loss(scores, x[..., :CLASSES])
        tasks = torch.exp(-self.scales[0]) * first + second / self.scales[1].exp()
        return tasks + self.scales.sum() + 0.01 * self.layer.weight.square().sum()


def test_losses_weighed_by_parameters() -> None:
    proved(Tasks(), INPUTS, None, dp=2, micro_batch=1)
    graph = trace(Tasks(), {key: INPUTS[key] for key in ("x", "y")})
    assert "autopar.cross_entropy" in ops(graph)


def test_a_number_beside_a_plain_sum_is_refused() -> None:
    """It would be added once for each micro-batch and rank."""
    with pytest.raises(BadInputError, match="not a sum over a count"):
        autopar.search(
            Vectors(), autopar.Job(4, 6), CLUSTER, inputs=THREE, loss=lambda o, _: 1 - o[0].square().sum(), fix={}
        )
