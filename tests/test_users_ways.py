"""What users' own models do that transformers' do not: each small, planned on two ranks, and compared with itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autopar
from autopar.codegen.verify import verify
from autopar.errors import UnsupportedError
from autopar.graph.ir import ModelGraph
from autopar.models import model_graph

WIDTH, HEADS, VOCABULARY, SEQ = 16, 4, 32, 8
CLUSTER = autopar.Cluster.parse("1x2:h100")


def next_tokens(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1).float(), batch["labels"].flatten())


def square(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return outputs.float().square().mean()


def proved(model: nn.Module, inputs: dict[str, Tensor], loss: Any = square, **fix: Any) -> ModelGraph:
    """The graph of ``model``, once its plan on two ranks computes the same."""
    graph = model_graph(model, inputs, loss)
    plan = autopar.search(model, autopar.Job(4, SEQ), CLUSTER, inputs=inputs, loss=loss, fix=fix)
    assert verify(plan, model, inputs, loss=loss, graph=graph).worst[1] < 1e-10
    return graph


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


IDS = torch.zeros(SEQ, dtype=torch.int64)
TOKENS = {"ids": IDS, "labels": IDS}
VECTORS = {"x": torch.zeros(SEQ, WIDTH), "ids": IDS}
"""The ids say which dim is the sequence."""


class Whole(nn.Module):
    """torch's own encoder and decoder, with masks of padding and of the future."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.Transformer(WIDTH, HEADS, 2, 2, 24, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, source: Tensor, ids: Tensor) -> Tensor:
        future = self.layers.generate_square_subsequent_mask(ids.shape[1])
        y = self.layers(self.embed(source), self.embed(ids), tgt_mask=future, src_key_padding_mask=source == 1)
        return self.head(y)


@pytest.mark.parametrize("fix", [{"tp": 2}, {"cp": 2}, {"pp": 2}])
def test_torchs_own_transformer(fix):
    proved(Whole(), {"source": IDS, **TOKENS}, next_tokens, **fix)


class Apart(nn.Module):
    """Attention layers in one list, their norms in another, positions first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.attend = nn.ModuleList(nn.MultiheadAttention(WIDTH, HEADS) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).transpose(0, 1)
        for attend, norm in zip(self.attend, self.norms, strict=True):
            x = norm(x + attend(x, x, x, need_weights=False)[0])
        return self.head(x.transpose(0, 1))


@pytest.mark.parametrize("fix", [{"tp": 2}, {"pp": 2}])
def test_what_runs_between_layers_keeps_its_own_parameters(fix):
    graph = proved(Apart(), TOKENS, next_tokens, **fix)
    for block in graph.blocks:
        assert all(target == full for target, full in block.parameters.items() if target.startswith("norms"))


class Cut(nn.Module):
    """Cuts a mask that is as large as the sequences it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.register_buffer("mask", torch.tril(torch.ones(SEQ, SEQ)).view(1, 1, SEQ, SEQ))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        scores = (q @ k.transpose(-2, -1)).masked_fill(self.mask[:, :, :length, :length] == 0, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def test_a_mask_as_long_as_the_sequence_does_not_fix_it():
    graph = proved(Cut(), VECTORS, cp=2)
    assert graph.notes == ()
    assert graph.max_seq == SEQ


class Formulas(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.pair = nn.Linear(WIDTH, 2 * WIDTH), nn.Bilinear(WIDTH, WIDTH, 6)
        self.bag = nn.EmbeddingBag(VOCABULARY, 6, mode="mean", padding_idx=0)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        x = F.glu(self.gate(x), -1)
        return self.pair(x, torch.tanh(x)) + self.bag(ids).unsqueeze(1)


@pytest.mark.parametrize("fix", [{"dp": 2}, {"tp": 2, "sp": False}])
def test_gated_units_products_of_two_and_bags(fix):
    proved(Formulas(), VECTORS, **fix)


class Counting(nn.Module):
    """Keeps count of its calls and an average of what it sees; clamps a weight where it is stored."""

    def __init__(self, reads: bool = False) -> None:
        super().__init__()
        self.linear, self.reads = nn.Linear(WIDTH, WIDTH), reads
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("average", torch.zeros(WIDTH))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        self.linear.weight.data.clamp_(-0.1, 0.1)
        y = self.linear(x)
        self.calls += 1
        with torch.no_grad():
            self.average.mul_(0.9).add_(y.mean((0, 1)), alpha=0.1)
        return y - self.average if self.reads else y


def test_buffers_that_no_loss_reads_may_change():
    graph = model_graph(Counting(), VECTORS, square)
    assert [note.split(",")[0] for note in graph.notes] == ["parameter linear.weight", "buffer calls", "buffer average"]
    assert not graph.buffers
    model = Counting()
    with torch.no_grad():
        model.linear.weight.clamp_(-0.1, 0.1)  # as after the first step
    proved(model, VECTORS, tp=2)


def test_a_buffer_that_changes_and_is_read_is_refused():
    with pytest.raises(UnsupportedError, match="changes buffer average in place, and its loss depends on it"):
        model_graph(Counting(reads=True), VECTORS, square)


class Written(nn.Module):
    """Fills every third place, takes slices counted from the end, and reads a number that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        ids.max().item()
        length = ids.shape[1]
        y = self.linear(x)[:, -length:]
        z = y.clone()
        z[..., 1:WIDTH:3] = y[..., 0:5] * 2
        z[..., 0:12:4] = y[..., 3:6]
        return z + torch.zeros_like(ids, dtype=torch.float32).unsqueeze(-1).to(z.dtype)


@pytest.mark.parametrize("fix", [{"dp": 2}, {"cp": 2}])
def test_places_written_in_steps_and_cut_from_the_end(fix):
    proved(Written(), VECTORS, **fix)


def smoothed(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), batch["labels"].flatten(), label_smoothing=0.1)


@pytest.mark.parametrize("fix", [{"dp": 2}, {"tp": 2}])
def test_smoothed_labels(fix):
    model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY))
    proved(model, {"input": IDS, "labels": IDS}, smoothed, **fix)
