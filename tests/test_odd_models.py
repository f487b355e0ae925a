"""Ways to write a model that have to be understood before it can be planned: each small, and compared with itself."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from traced import worst_error

import autopar
from autopar.codegen.emit_module import module_source
from autopar.codegen.verify import verify
from autopar.errors import UnsupportedError
from autopar.graph.export import Loss
from autopar.graph.ir import ModelGraph
from autopar.graph.trace import trace
from autopar.models import model_graph

WIDTH, SEQ = 8, 6
CLUSTER = autopar.Cluster.parse("1x2:h100")


def square(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return outputs.float().square().mean()


def ops(graph: ModelGraph) -> set[str]:
    return {node.op for kind in graph.kinds.values() for node in kind.graph.of("op")}


def proved(model: nn.Module, inputs: dict[str, Tensor], loss: Loss = square, **fix: object) -> ModelGraph:
    """The graph of ``model``, once its plan on two ranks computes the same."""
    graph = model_graph(model, inputs, loss)
    plan = autopar.search(model, autopar.Job(4, SEQ), CLUSTER, inputs=inputs, loss=loss, fix=fix)
    assert verify(plan, model, inputs, loss=loss, graph=graph).worst[1] < 1e-10
    return graph


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


SAMPLE = {"x": torch.zeros(SEQ, WIDTH), "ids": torch.zeros(SEQ, dtype=torch.int64)}
"""The ids say which dim is the sequence."""


class Turned(nn.Module):
    """Rotary positions as a product of complex numbers, of all heads with a table and of one that all heads share."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rates = torch.arange(WIDTH // 2, device=x.device).float()
        angles = torch.outer(torch.arange(x.shape[1], device=x.device), 0.5**rates)
        table = torch.polar(torch.ones_like(angles), angles)
        q = self.q(x).unflatten(-1, (4, WIDTH)).transpose(1, 2)
        k = self.k(x).unsqueeze(1)
        turned = []
        for part in (q, k):
            pairs = torch.view_as_complex(part.float().reshape(*part.shape[:-1], -1, 2))
            turned.append(torch.view_as_real(pairs * table[None, None]).flatten(3).type_as(part))
        q, k = turned
        return q @ k.expand(-1, 4, -1, -1).transpose(2, 3)


@pytest.mark.parametrize("fix", [{"tp": 2, "sp": False}, {"cp": 2}])
def test_complex_numbers_are_pairs_of_real_ones(fix):
    graph = proved(Turned(), SAMPLE, **fix)
    metas = [node.meta.dtype for kind in graph.kinds.values() for node in kind.graph.nodes.values()]
    assert not any(dtype.startswith("complex") for dtype in metas)


class Skipping(nn.Module):
    """Skips layers at random in training, all of them nearly always."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            chance = torch.rand([])
            if not (self.training and chance < 0.999):
                x = torch.tanh(layer(x))
        return x


def test_layers_skipped_at_random_are_not_skipped_and_that_is_told():
    graph = proved(Skipping(), SAMPLE, dp=2)
    assert len(graph.parameters) == 6
    assert graph.notes == ("layers that the model skips at random are not skipped (Skipping.forward)",)
    assert torch.rand([]) != 1.0, "only while a model is traced"


class Router(nn.Module):
    """Widens its layer while it runs, as routers do."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier.to(torch.float32)(x.float()).softmax(-1)


def test_a_module_that_is_cast_has_its_parameters_cast():
    graph = proved(Router(), SAMPLE, dp=2)
    (kind,) = graph.kinds.values()
    (linear,) = (node for node in kind.graph.of("op") if node.op == "aten.linear")
    assert linear.meta.dtype == "float32"
    assert all(meta.dtype == "compute" for meta in graph.parameters.values())


class Normed(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(WIDTH, 12, 3, padding=1, bias=False), nn.BatchNorm1d(12)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.norm(self.conv(x.transpose(1, 2))).relu().mean(-1)))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_batch_norms_norm_by_the_micro_batch_of_each_data_rank(dropout):
    model, inputs = Normed(dropout), {"x": torch.zeros(SEQ, WIDTH)}
    with pytest.raises(UnsupportedError, match=r"aten\.batch_norm \(norm in norm\) mixes the samples of a micro-batch"):
        autopar.search(model, autopar.Job(8, SEQ), CLUSTER, inputs=inputs, loss=square)
    graph = proved(model, inputs, dp=2, micro_batch=2)
    assert graph.notes[0].startswith("the running averages of 1 batch norms are not kept")
    assert not graph.buffers
    assert model.norm.track_running_stats, "the model is not modified"
    plan = autopar.search(
        model, autopar.Job(8, SEQ), CLUSTER, inputs=inputs, loss=square, fix={"tp": 2, "micro_batch": 4}
    )
    source = re.sub(r"\s+", "", module_source(plan, graph))
    assert re.search(r"F\.batch_norm\(\w+,None,None,weight=self\.norm\.weight.*,training=True,eps=1e-5", source)


class Relative(nn.Module):
    """Scores by distance, picked by a table that all samples and heads (in one dim) share."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        scores = self.scores(x).view(b, s, 2, WIDTH).transpose(1, 2).reshape(2 * b, s, WIDTH)
        places = torch.arange(s, device=x.device)
        distance = (places[:, None] - places[None]).clamp(-3, 4) + 3
        return torch.gather(scores, -1, distance.expand(2 * b, s, s)).softmax(-1)


@pytest.mark.parametrize("fix", [{"dp": 2}, {"tp": 2, "sp": False}])
def test_a_table_shared_by_samples_and_heads_is_read_by_each(fix):
    proved(Relative(), SAMPLE, **fix)


class Aliases(nn.Module):
    """The same operators by other names."""

    def __init__(self) -> None:
        super().__init__()
        self.least = nn.Parameter(torch.tensor(-0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.concatenate([x, torch.multiply(x, 2.0).reshape_as(x)], -1)
        y = torch.max(y, self.least) + torch.min(y, y.abs().view_as(y))
        return torch.subtract(y, torch.divide(y, 3.0)).clip(-4.0, 4.0)


def test_other_names_of_an_operator_are_that_operator():
    graph = proved(Aliases(), SAMPLE, dp=2)
    wanted = {"cat", "mul", "maximum", "minimum", "abs", "add", "sub", "div", "clamp"}
    assert {op.partition(".")[2] for op in ops(graph)} - {"mean", "square", "pow", "sum", "cast"} == wanted


class Slopes(nn.Module):
    """Multiplies half-precision activations by a float32 buffer in a batched product, where torch does not promote."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mixing", torch.randn(1, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(self.linear(x), self.mixing.expand(x.shape[0], -1, -1))


def test_buffers_that_must_be_narrow_are():
    graph = proved(Slopes(), SAMPLE, dp=2)
    assert graph.buffers["mixing"].dtype == "compute"


class Cached(nn.Module):
    """Has no argument to turn its cache off, and cannot be traced for any length with it."""

    config = SimpleNamespace(use_cache=True)

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if self.config.use_cache:
            x = F.pad(x, (0, 0, 0, -x.shape[1] % 4))
        return self.linear(x)


def test_caches_are_off():
    model = Cached()
    model.config = SimpleNamespace(use_cache=True)
    graph = model_graph(model, SAMPLE, square)
    assert graph.notes == ()
    assert model.config.use_cache


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Sorted(nn.Module):
    """Rows in groups of sizes that follow from values."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.one, self.two = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        chosen = self.gate(rows).argmax(-1)
        parts = rows[chosen.argsort()].split(torch.bincount(chosen, minlength=2).tolist())
        return torch.cat([self.one(parts[0]), self.two(parts[1])])


class Looped(nn.Module):
    """A loop over the experts that were chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        for chosen in self.gate(x).argmax(-1).flatten().bincount(minlength=2).nonzero():
            x = x + chosen[0]
        return x


@pytest.mark.parametrize("made", [Sorted, Looped])
def test_what_depends_on_values_is_refused_with_its_place(made):
    outer = Outer(made())
    with pytest.raises(
        UnsupportedError, match=r"module 'inner'.* computes sizes, or chooses what to run, from the values"
    ):
        model_graph(outer, SAMPLE, square)


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.hfft(x)


def test_what_torch_refuses_is_told_with_its_place():
    outer = Outer(Spectrum())
    with pytest.raises(UnsupportedError, match=r"in module 'inner' \(Spectrum, .*: Unsupported dtype BFloat16"):
        trace(outer, SAMPLE, square)  # it has nothing to train, which is said first where plans are made


class Dropping(nn.Module):
    """Stochastic depth, in both spellings: what a layer adds is left out for some samples."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.linear, self.spelling = nn.Linear(WIDTH, WIDTH), spelling

    def forward(self, x: Tensor) -> Tensor:
        added = self.linear(x)
        if not self.training:
            return x + added
        shape = (x.shape[0], 1, 1)
        if self.spelling == "floor":
            kept = 0.75 + torch.rand(shape, dtype=x.dtype, device=x.device)
            return x + added.div(0.75) * kept.floor_()
        return x + added * x.new_empty(shape).bernoulli_(0.75).div_(0.75)


@pytest.mark.parametrize("spelling", ["floor", "bernoulli"])
def test_samples_dropped_at_random_are_a_dropout(spelling):
    graph = proved(Dropping(spelling), SAMPLE, dp=2)
    (dropout,) = (node for kind in graph.kinds.values() for node in kind.graph.of("op") if node.op == "aten.dropout")
    assert dropout.args[1:] == (0.25, True)
    assert [str(size) for size in dropout.meta.shape] == ["b", "1", "1"]


class Sinusoids(nn.Module):
    """Positions from a table of sinusoids with a blank row, as of fairseq's models."""

    def __init__(self, blank: int | None) -> None:
        super().__init__()
        self.linear, self.blank = nn.Linear(WIDTH, WIDTH), blank
        rates = torch.exp(torch.arange(4).float() * -(math.log(10000) / 3))
        angles = torch.arange(600).float().unsqueeze(1) * rates.unsqueeze(0)
        table = torch.cat([angles.sin(), angles.cos()], 1)
        if blank is not None:
            table[blank] = 0
        self.register_buffer("table", table, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device) + 2
        return self.linear(x + self.table.index_select(0, places).to(x.dtype))


@pytest.mark.parametrize("blank", [None, 3])
def test_tables_of_sinusoids_are_computed(blank):
    graph = proved(Sinusoids(blank), SAMPLE, cp=2)
    assert not graph.buffers
    (table,) = (node for node in graph.constants.of("op") if node.op == "autopar.sinusoids")
    assert table.args == ((600, WIDTH) if blank is None else (600, WIDTH, blank))
    model = Sinusoids(blank)
    model.table[4, 1] += 1e-3
    assert "table" in model_graph(model, SAMPLE, square).buffers, "nothing is guessed"


class Summed(nn.Module):
    """Products written with an ellipsis, of tensors of different rank."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.einsum("...sd,...td->...st", x, x)
        return torch.einsum("...st,...td,hd->...sh", scores, x, self.weight)


def test_an_ellipsis_stands_for_the_dims_there_are():
    graph = proved(Summed(), SAMPLE, tp=2, sp=False)
    equations = [node.args[0] for kind in graph.kinds.values() for node in kind.graph.of("op") if "einsum" in node.op]
    assert equations == ["asd,atd->ast", "ast,atd,hd->ash"]


class Gridded(nn.Module):
    """Adds places of a grid, in both orders, and a sum in another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = torch.arange(2, device=x.device), torch.arange(4, device=x.device)
        one, other = torch.meshgrid(rows, columns, indexing="ij")
        two, last = torch.meshgrid(columns, rows, indexing="xy")
        places = (one + 3 * other + 5 * two + 7 * last).flatten().to(x.dtype)
        return self.linear(x + places) + x.sum(-1, keepdim=True, dtype=torch.float32).to(x.dtype)


def test_grids_are_tensors_repeated():
    assert not {"aten.meshgrid"} & ops(proved(Gridded(), SAMPLE, tp=2, sp=False))


class Sharing(nn.Module):
    """Four layers, two of which are one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4))
        self.layers[3][0] = self.layers[1][0]

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


def test_layers_that_share_parameters_are_one_block():
    graph = proved(Sharing(), SAMPLE, dp=2)
    assert [block.kind for block in graph.blocks] == ["Model"]
    assert len(graph.parameters) == 8


class _Careful(nn.Module):
    """Scales by a number that 16 bits do not hold, and clamps what is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) * torch.tensor(32**0.5, dtype=x.dtype)
        if not torch.isfinite(y).all() or torch.isnan(y).any():
            y = y.clamp(-1e4, 1e4)
        return y.square().mean()


def test_numbers_are_not_rounded_and_what_is_computed_is_finite() -> None:
    torch.manual_seed(0)
    model = _Careful().double()
    graph = model_graph(model, inputs={"x": torch.zeros(6)})
    batch = {"x": torch.randn(5, 6, dtype=torch.float64)}
    assert worst_error(graph, model, batch, model(**batch)) < 1e-12


class Counted(nn.Module):
    """Positions, and one kind for all tokens, from buffers of more values than are ever written down."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.places, self.kinds, self.first = nn.Embedding(40, WIDTH), nn.Embedding(3, WIDTH), first
        self.register_buffer("order", torch.arange(first, 9000 + first).expand(1, -1), persistent=False)
        self.register_buffer("kind", torch.full((1, 9000), 2), persistent=False)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        seq = x.shape[1]
        return self.linear(x + self.places(self.order[:, :seq]) + self.kinds(self.kind[:, :seq]))


@pytest.mark.parametrize(("first", "fix"), [(0, {"cp": 2}), (2, {"tp": 2})])
def test_long_buffers_of_positions_are_computed(first, fix):
    graph = proved(Outer(Counted(first)), SAMPLE, **fix)
    assert not graph.buffers


class Factored(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        triangle: Tensor = torch.linalg.qr(super().forward(x))[1]
        return triangle


def test_operators_without_a_form_are_refused_with_their_place_and_what_to_do():
    with pytest.raises(UnsupportedError, match=r"module 'inner' uses aten\.linalg_qr.*register_rule.*leaf"):
        model_graph(Outer(Factored(WIDTH, WIDTH)), SAMPLE, square)
