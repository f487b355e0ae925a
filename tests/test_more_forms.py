"""More ways to write a model: several index tensors, cells in a loop, sizes divided, buffers without a formula."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_odd_models import CLUSTER, ops, proved
from test_other_forms import SAMPLE, SEQ, WIDTH, square
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import autopar
from autopar.codegen.prove import run_ranks


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(WIDTH, WIDTH)


class Pairs(Layer):
    """The products of all pairs of features, each once, and a table read at pairs of places, some from its end."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 5))
        self.register_buffer("rows", torch.tensor([0, 2, -1]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        products = x @ x.transpose(1, 2)
        rows, columns = torch.tril_indices(SEQ, SEQ, -1)
        bias = self.table[self.rows, torch.tensor([4, -2, 0])]
        return products[:, rows, columns] + bias.sum()


@pytest.mark.parametrize("fix", [{"dp": 2}, {"tp": 2}])
def test_several_index_tensors(fix: dict[str, int]) -> None:
    proved(Pairs(), {"x": SAMPLE["x"]}, square, **fix)


class Steps(Layer):
    """Cells that go through the positions one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(WIDTH, 6), nn.GRUCell(6, 4, bias=False), nn.RNNCell(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        h, c = x.new_zeros(len(x), 6), x.new_zeros(len(x), 6)
        g, r = x.new_zeros(len(x), 4), x.new_zeros(len(x), 4)
        for place in range(2):
            h, c = self.lstm(x[:, place], (h, c))
            g = self.gru(h, g)
            r = self.rnn(g, r)
        return r + g


def test_cells_are_the_operators_they_are_made_of() -> None:
    found = ops(proved(Steps(), {"x": SAMPLE["x"]}, square, dp=2))
    assert not {op for op in found if op.endswith("_cell")}


def merged(windows: Tensor, width: int) -> Tensor:
    """As written for windows of pictures: the number of samples from a quotient of numbers."""
    samples = int(windows.shape[0] / (SEQ / width))
    return windows.view(samples, SEQ // width, width, -1).flatten(1, 2)


class Windows(Layer):
    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(SEQ, int)
        windows = x.unflatten(1, (-1, 2)).flatten(0, 1)
        return merged(self.layer(windows), 2)


def test_a_quotient_of_a_size_is_a_size() -> None:
    proved(Windows(), {"x": SAMPLE["x"]}, square, dp=2)
    assert "int" not in globals()


class Turned(Layer):
    """A matrix that forward makes in the default dtype, multiplied with what the model computes."""

    def forward(self, x: Tensor) -> Tensor:
        turn = torch.eye(WIDTH).flip(0)
        return torch.bmm(self.layer(x), turn.expand(len(x), -1, -1))


def test_what_forward_makes_is_of_the_dtype_that_the_model_computes_in() -> None:
    proved(Turned(), {"x": SAMPLE["x"]}, square, tp=2)


class Scheduled(Layer):
    """Noise by a schedule of a thousand steps, and a mask of no known form."""

    def __init__(self) -> None:
        super().__init__()
        kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
        self.register_buffer("kept", kept.sqrt())
        self.register_buffer("hidden", torch.rand(100, WIDTH) < 0.5)

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        scale = self.kept.gather(-1, step).reshape(-1, 1, 1)
        return self.layer(x * scale).masked_fill(self.hidden[:SEQ], 0.0)


def test_buffers_without_a_formula_are_read_from_a_file(tmp_path: Path) -> None:
    model, inputs = Scheduled(), {"x": SAMPLE["x"], "step": torch.tensor(700)}
    proved(model, inputs, square, dp=2)
    plan = autopar.search(model, autopar.Job(2, SEQ, dtype="fp32"), autopar.Cluster.parse("1x1:cpu"), inputs, square)
    autopar.emit(plan, model, tmp_path / "out", inputs, square)
    assert sorted(torch.load(tmp_path / "out" / "buffers.pt")) == ["hidden", "kept"]
    batch = {"x": torch.randn(2, SEQ, WIDTH), "step": torch.tensor([3, 900])}
    torch.save(batch, tmp_path / "samples.pt")
    options = ["--data", "samples.pt", "--steps", "1", "--metrics", "metrics.jsonl"]
    run_ranks(["out/train.py", *options], 1, 300, folder=tmp_path)
    (row,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert abs(row["loss"] - square(model(**batch), batch).item()) < 1e-6


class Angles(Layer):
    """Rotary positions as a table of complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(16.0), 0.5 ** torch.arange(WIDTH // 2))
        self.register_buffer("table", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(self.layer(x).float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self.table[: x.shape[1]]).flatten(2).type_as(x)


def test_complex_buffers_keep_their_imaginary_part() -> None:
    proved(Angles(), SAMPLE, square, dp=2)


class Loads(Layer):
    """Counts which feature is largest at how many positions, as routers count their tokens."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        counts = torch.histc(x.argmax(-1), bins=WIDTH, min=0, max=WIDTH)
        return x.softmax(-1).mean((0, 1)) * counts / counts.sum() + 0 * F.relu(x)


def test_whole_numbers_are_counted() -> None:
    proved(Loads(), SAMPLE, square, dp=2, micro_batch=2)


def test_dims_in_another_order_are_no_product() -> None:
    class Einsum(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bsd->bds", self.layer(x))

    assert "aten.einsum" not in ops(proved(Einsum(), SAMPLE, square, dp=2))


class Mapped(Layer):
    """Takes its batch as a dict, and gives one back."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": (self.layer(batch["x"]) - batch["target"]).square().mean()}


def test_a_model_may_take_its_batch_as_a_dict() -> None:
    model, inputs = Mapped(), {"x": SAMPLE["x"], "target": SAMPLE["x"]}
    plan = autopar.search(model, autopar.Job(4, SEQ), CLUSTER, inputs, fix={"dp": 2})
    assert autopar.verify(plan, model, inputs).worst[1] < 1e-10


FACTORY = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("places", torch.tensor([3, 1, 2]))
        self.register_buffer("table", torch.sin(torch.arange(800.0)).view(100, 8))

    def forward(self, x):
        return (self.layer(x + self.table[: x.shape[1]])[:, self.places] - 0.5).square().mean()

def build():
    return Model(), {"x": torch.zeros(6, 8), "ids": torch.zeros(6, dtype=torch.int64)}, lambda loss, batch: loss
"""


def test_buffers_of_a_factory_on_meta_keep_their_values(tmp_path: Path) -> None:
    (tmp_path / "factory_with_buffers.py").write_text(FACTORY)
    model = f"{tmp_path}/factory_with_buffers.py:build"
    plan = autopar.search(model, autopar.Job(4, SEQ), CLUSTER, fix={"dp": 2})
    assert autopar.verify(plan, model).worst[1] < 1e-10


class Spectrum(Layer):
    """A long convolution by its spectrum."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(WIDTH, 64) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x).transpose(1, 2)
        length = x.shape[-1]
        kernel = torch.fft.rfft(self.kernel[:, :length].float(), n=2 * length)
        spectrum = torch.fft.rfft(x.float(), n=2 * length) * kernel
        return torch.fft.irfft(spectrum, n=2 * length)[..., :length].type_as(x).transpose(1, 2)


@pytest.mark.parametrize("fix", [{"dp": 2}, {"tp": 2}])
def test_convolutions_by_spectrum(fix: dict[str, int]) -> None:
    proved(Spectrum(), SAMPLE, square, **fix)


class Recomputed(Layer):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant, self.head = reentrant, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        return x + checkpoint(self.layer, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_a_model_recomputes_keeps_its_gradients(reentrant: bool) -> None:
    proved(Recomputed(reentrant), {"x": SAMPLE["x"]}, square, tp=2)


class Ends(Layer):
    """Where the tokens of each class end, in 32 bits, as grouped products take it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        counts = torch.histc(x.argmax(-1), bins=WIDTH, min=0, max=WIDTH)
        ends = torch.cumsum(counts, 0, dtype=torch.int32)
        assert ends.dtype == torch.int32
        return x * ends / (ends[-1] + 1)


def test_sums_in_a_narrow_dtype_stay_in_it() -> None:
    graph = proved(Ends(), SAMPLE, square, dp=2, micro_batch=2)
    (total,) = (node for kind in graph.kinds.values() for node in kind.graph.of("op") if node.op == "aten.cumsum")
    assert total.meta.dtype == "int64"
