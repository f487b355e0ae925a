"""What a model asks of values that are the same for all data, and what only seems to be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_odd_models import SAMPLE, SEQ, WIDTH, ops, proved, square
from torch import Tensor, nn

from autopar.errors import UnsupportedError
from autopar.graph.trace import trace


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def masked(mask: list[int]) -> dict[str, Tensor]:
    return {**SAMPLE, "attention_mask": torch.tensor(mask)}


class Marked(nn.Module):
    """Attends everywhere where a mask is above one; what it does then has as many rows as there are such places."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = torch.ones(x.shape[:2]) if attention_mask is None else attention_mask
        inverted = 1.0 - mask[:, None, :].expand(-1, x.shape[1], -1).float()
        bias = inverted.masked_fill(inverted.bool(), torch.finfo(x.dtype).min)[:, 0, :] * inverted[:, 0, :]
        bias[mask == 2] = 1.0
        y = self.layer(x) * (bias == 0)[:, :, None]
        if (bias > 0).flatten().any().item():
            y = y + x[bias > 0].sum()
        return y


def test_a_mask_of_ones_marks_nothing() -> None:
    graph = proved(Marked(), SAMPLE, square, dp=2)
    assert graph.notes == ()


def test_a_mask_that_is_given_is_taken_to_be_one_and_told() -> None:
    graph = proved(Marked(), masked([1] * (SEQ - 2) + [0] * 2), square, dp=2)
    assert [note for note in graph.notes if note.startswith("attention_mask of zeros and ones only")]


def test_an_example_with_marks_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="chooses what to run, from the values of tensors"):
        trace(Marked(), masked([2] + [1] * (SEQ - 1)), square)


def test_a_mask_written_to_is_no_longer_known() -> None:
    class Written(Marked):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            mask = torch.ones(x.shape[:2])
            part = mask[:, 1:]
            part.mul_((x[:, 1:, 0] > 0).float() * 2)
            return self.layer(x) if (mask < 2).all() else x

    with pytest.raises(UnsupportedError, match="chooses what to run, from the values of tensors"):
        trace(Written(), SAMPLE, square)


class Framed(nn.Module):
    """A convolution that keeps its stride and kernel in buffers, and computes with them how much it pads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 5, 2)
        self.stride = nn.Buffer(torch.tensor(2), persistent=False)
        self.kernel = nn.Buffer(torch.tensor(5), persistent=False)
        self.total = nn.Buffer(torch.tensor(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[-1]
        frames = torch.ceil((length - self.kernel + self.total) / self.stride + 1).to(torch.int64) - 1
        more = frames * self.stride + self.kernel - self.total - length
        if max(self.total, more) >= length:
            raise ValueError("too short")
        padded = F.pad(x, (self.total, more))
        return self.conv(padded[..., : padded.shape[-1] - more])


def test_numbers_in_buffers_are_numbers() -> None:
    proved(Framed(), {"x": torch.randn(WIDTH, 11)}, square, dp=2)


class Languages(nn.Module):
    """Adapters by language, of which one is every sample's unless it is said otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh()])

    def forward(self, x: Tensor, language: Tensor | None = None) -> Tensor:
        chosen = torch.ones(x.shape[0]) if language is None else language
        y = torch.zeros_like(x)
        for number, adapter in enumerate(self.adapters):
            mask = chosen == number
            y[mask] = adapter(x[mask])
        return y


def test_a_mask_known_to_pick_all_or_nothing_picks_that() -> None:
    graph = proved(Languages(), SAMPLE, square, dp=2)
    assert sorted(graph.parameters) == ["adapters.1.bias", "adapters.1.weight"]
    graph = proved(Languages(), {**SAMPLE, "language": torch.tensor(1)}, square, dp=2)
    assert len(graph.parameters) == 4


def test_a_mask_that_may_mask_nothing_is_kept() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(16, WIDTH)

        def forward(self, ids: Tensor) -> Tensor:
            mask = ids.eq(0)
            if not mask.any():
                mask = None
            x = self.table(ids)
            return x if mask is None else x.masked_fill(mask[:, :, None], 0.0)

    graph = proved(Padded(), {"ids": torch.tensor([3, 0, 5, 7])}, square, dp=2)
    assert "aten.masked_fill" in ops(graph) or "aten.where" in ops(graph)
    assert "drop a mask that masks nothing" in graph.notes[0]


class Chunks(nn.Module):
    """Products of positions and those of the chunk before and after, by ``as_strided``; dims of x are in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x.transpose(0, 1)).transpose(0, 1)  # held in memory with the positions first
        count = torch.div(x.shape[1], 4, rounding_mode="trunc")
        x = x.view(x.shape[0], count, 4, WIDTH)
        size, stride = list(x.size()), list(x.stride())
        size[1], stride[1] = size[1] * 2 - 1, stride[1] // 2
        return x.as_strided(size=size, stride=stride) * torch.arange(1.0, 5.0).to(x.dtype)[:, None]


def test_overlapping_chunks_by_their_strides() -> None:
    sample = {"x": torch.randn(8, WIDTH)}
    proved(Chunks(), sample, square, dp=2)
    proved(Chunks(), sample, square, tp=2)


class Mixing(nn.Module):
    """Mixes positions and features by the real part of a Fourier transform; and by a circular correlation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        y = y + torch.fft.fftn(y, dim=(1, 2)).real
        q, k = torch.fft.rfft(y, dim=1), torch.fft.rfft(x, dim=1)
        return y + torch.fft.irfft(q * torch.conj(k), n=x.shape[1], dim=1)


def test_fourier_transforms_of_narrow_models_are_wide() -> None:
    graph = proved(Mixing(), {"x": torch.randn(8, WIDTH)}, square, dp=2)
    (kind,) = graph.kinds.values()
    assert {kind.graph.nodes[node.operands()[0]].meta.dtype for node in kind.graph.of("op") if "fftn" in node.op} == {
        "float32"
    }
    sums = [node for node in kind.graph.of("op") if node.op == "aten.add"]
    assert sums
    assert {node.meta.dtype for node in sums} == {"compute"}
    proved(Mixing(), {"x": torch.randn(8, WIDTH)}, square, tp=2)


class Halved(nn.Module):
    """Ends with the first half of the positions, whatever their number."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), First())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class First(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, : x.shape[1] // 2]


def test_a_size_with_a_rest_is_told_where_it_comes_up() -> None:
    graph = proved(Halved(), SAMPLE, square, dp=2)
    (note,) = [note for note in graph.notes if "sequence length is fixed" in note]
    assert "module 'inner.1' (First.forward" in note
    assert "a tensor size with a rest" in note
