"""Operators that are others by another form: norms, windows, repetitions, rows put by a mask, changes of copies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_odd_models import CLUSTER, ops, proved
from torch import Tensor, nn

import autopar
from autopar.codegen.verify import verify

WIDTH, SEQ = 8, 6
SAMPLE = {
    "x": torch.randn(SEQ, WIDTH, generator=torch.Generator().manual_seed(1)),
    "ids": torch.zeros(SEQ, dtype=torch.int64),
}


def square(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return (outputs.float() - 0.5).square().mean()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(WIDTH, 2 * WIDTH)


class Normed(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return x / torch.linalg.norm(x, dim=-1, keepdim=True) + torch.linalg.norm(x, ord=1, dim=2).unsqueeze(-1)


class Tiled(Layer):
    """`tile` says how often, not which dims."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tile(2).tile((3, 1, 1))  # type: ignore[no-any-return]


class Overlapping(Layer):
    """Windows that overlap, that follow on each other, and those of a convolution of its own at each position."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        overlapping, apart = x.unfold(2, 6, 5).sum(-2), x.unfold(2, 4, 4).flatten(2)
        columns = F.unfold(x.transpose(1, 2).unsqueeze(-1), (3, 1), padding=(1, 0))
        around = columns.transpose(1, 2).unflatten(-1, (2 * WIDTH, 3)).mean(-1)
        return torch.cat((overlapping, apart, around), -1)


class Dilated(Layer):
    def forward(self, x: Tensor) -> Tensor:
        image = self.layer(x).unflatten(-1, (2, WIDTH))
        return F.unfold(image.transpose(1, 2), (2, 3), dilation=(2, 1), stride=(1, 2), padding=1)


@pytest.mark.parametrize("model", [Normed, Tiled, Overlapping, Dilated])
@pytest.mark.parametrize("fix", [{"dp": 2}, {"tp": 2}])
def test_forms_are_understood(model: type[nn.Module], fix: dict[str, int]) -> None:
    graph = proved(model(), SAMPLE if model is not Dilated else {"x": SAMPLE["x"]}, square, **fix)
    assert not ops(graph) & {"aten.linalg_norm", "aten.tile", "aten.unfold", "aten.im2col"}


class Placed(Layer):
    """A number, and rows, in place of what a mask marks; boxes whose sizes are looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = nn.Embedding(5, 2 * WIDTH)

    def forward(self, x: Tensor, ids: Tensor, marked: Tensor, boxes: Tensor) -> Tensor:
        x = self.layer(x)
        rows = x[:, :2].flatten(0, 1) * 2
        x = x + self.sizes(boxes[..., 1] - boxes[..., 0])
        x[marked] = rows
        x[ids == 1] = 0.25
        return x


def test_rows_and_numbers_are_put_where_a_mask_says() -> None:
    lows = torch.arange(SEQ) % 3
    marked = torch.tensor([0, 1, 0, 0, 1, 0], dtype=torch.bool)
    inputs = {**SAMPLE, "marked": marked, "boxes": torch.stack((lows, lows + 2), 1)}
    assert "aten.index_put" not in ops(proved(Placed(), inputs, square, dp=2))


class Replaced(Layer):
    """One learned row in place of all that a mask marks, as of masked patches and of placeholders."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.other = nn.Parameter(torch.randn(2 * WIDTH)), nn.Parameter(torch.randn(1, 2 * WIDTH))

    def forward(self, x: Tensor, ids: Tensor, marked: Tensor) -> Tensor:
        x = self.layer(x)
        x[marked] = self.token
        x[ids == 1] = self.other
        return x


@pytest.mark.parametrize("fix", [{"dp": 2}, {"tp": 2}])
def test_one_row_is_put_wherever_a_mask_says(fix: dict[str, int]) -> None:
    inputs = {**SAMPLE, "marked": torch.tensor([0, 1, 0, 0, 1, 1], dtype=torch.bool)}
    assert "aten.masked_scatter" not in ops(proved(Replaced(), inputs, square, **fix))


class Changed(Layer):
    """A copy made by `contiguous`, and one made by a cast, parts of which are changed in place."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        turned = x.transpose(1, 2).contiguous()
        turned[:, 0] += 1
        turned[:, 1] *= 2
        wide = x.to(torch.float32)
        wide *= 3
        return turned.transpose(1, 2) + wide.to(x.dtype) + x


def test_copies_may_be_changed_in_place() -> None:
    proved(Changed(), SAMPLE, square, dp=2)


class Aliased(Layer):
    """`contiguous` of what is contiguous is no copy: the change shows in both."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x) + 0
        same = x.contiguous()
        same[:, :, 0] += 1
        return x + same


def test_a_change_shows_in_what_is_the_same_tensor() -> None:
    proved(Aliased(), SAMPLE, square, dp=2)


class Answers(nn.Module):
    """Two means, over targets of which each may be none: the one past the last position."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.ends = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, ids: Tensor, first: Tensor, last: Tensor) -> Tensor:
        logits = self.ends(self.tokens(ids)).unbind(-1)
        past = ids.shape[1]
        ends = (first.clamp(0, past), last.clamp(0, past))
        losses = [F.cross_entropy(part, end, ignore_index=past) for part, end in zip(logits, ends, strict=True)]
        return (losses[0] + losses[1]) / 2  # type: ignore[no-any-return]


@pytest.mark.parametrize("fix", [{"dp": 2}, {"cp": 2}])
def test_means_over_different_counts_are_added(fix: dict[str, int]) -> None:
    model = Answers()
    inputs = {"ids": torch.zeros(SEQ, dtype=torch.int64), "first": torch.tensor(1), "last": torch.tensor(2)}
    plan = autopar.search(model, autopar.Job(8, SEQ), CLUSTER, inputs=inputs, fix=fix | {"micro_batch": 2})
    assert verify(plan, model, inputs).worst[1] < 1e-10


class Weighted(Layer):
    """A mean with weights that are given, and a contrast with smoothed targets: one class for each sample."""

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        x = self.layer(x)
        return (x.square().mean(-1) * weights).sum() / weights.sum().clamp(min=1.0)  # type: ignore[no-any-return]


class Contrast(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x).mean(1)
        logits = x @ x.roll(1, -1).t()
        return F.cross_entropy(logits, torch.arange(len(x), device=x.device), label_smoothing=0.1)


@pytest.mark.parametrize("model", [Weighted, Contrast])
def test_losses_of_a_micro_batch(model: type[nn.Module]) -> None:
    made = model()
    inputs = {"x": SAMPLE["x"], **({"weights": torch.rand(SEQ)} if model is Weighted else {})}
    plan = autopar.search(made, autopar.Job(8, SEQ), CLUSTER, inputs=inputs, fix={"dp": 2, "micro_batch": 2})
    assert verify(plan, made, inputs).worst[1] < 1e-10


class Interleaved(nn.Module):
    """Causal attention over two tokens for each position (as a decision transformer has three)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack((self.first(x), self.second(x)), 2).flatten(1, 2)
        q, k, v = self.qkv(both).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed.transpose(1, 2).flatten(2).unflatten(1, (-1, 2))[:, :, 1]


def test_causal_attention_over_several_tokens_for_each_position() -> None:
    model, length = Interleaved(), 16
    inputs = {"x": torch.randn(length, WIDTH), "ids": torch.zeros(length, dtype=torch.int64)}
    plan = autopar.search(model, autopar.Job(4, length), CLUSTER, inputs=inputs, loss=square, fix={"cp": 2})
    assert verify(plan, model, inputs, loss=square).worst[1] < 1e-10


class Lender(nn.Module):
    """A table that is the model's own, read by every layer of a list; what runs between the layers has weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(SEQ, WIDTH))
        self.layers = nn.ModuleList(
            part for _ in range(2) for part in (Borrower(), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()))
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, self.table) if isinstance(layer, Borrower) else layer(x)
        return x


class Borrower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return self.layer(x) + F.gelu(x) * table.sum()


class Interrupted(nn.Module):
    """Equal layers of one list, between which another one works."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.ModuleList((Twice(), nn.Linear(WIDTH, WIDTH), Twice()))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.network:
            x = layer(x)
        return x


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(torch.tanh(self.one(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("fix", [{"dp": 2}, {"tp": 2}, {"pp": 2}])
@pytest.mark.parametrize("model", [Lender, Interrupted])
def test_layers_that_borrow_and_that_are_interrupted(model: type[nn.Module], fix: dict[str, int]) -> None:
    graph = proved(model(), SAMPLE, square, **fix)
    assert len(graph.blocks) > 2
