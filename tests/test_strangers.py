"""Models as strangers write them: what each taught, small, and compared with itself."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from test_odd_models import CLUSTER, SAMPLE, SEQ, WIDTH, ops, proved, square
from torch import Tensor, nn

import autopar
from autopar.codegen.emit_module import module_source
from autopar.codegen.random_batches import random_batch
from autopar.codegen.ranks import local_ranks
from autopar.errors import BadInputError, UnsupportedError, VerificationError
from autopar.graph.ir import ModelGraph
from autopar.models import model_graph


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def mixed(graph: ModelGraph, *names: str) -> list[str]:
    """Operators of ``names`` with operands in float32 and in the dtype of the weights."""
    found = []
    for kind in graph.kinds.values():
        for node in kind.graph.of("op"):
            if node.op in names and {kind.graph.nodes[x].meta.dtype for x in node.operands()} >= {"compute", "float32"}:
                found.append(node.name)
    return found


class Ahead(nn.Module):
    """Foretells two tokens: one table embeds them, and scores both, after layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, WIDTH)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))
        self.ahead = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        first, second = (F.linear(layer(x), self.table.weight) for layer in self.ahead)
        return F.cross_entropy(first.flatten(0, 1), labels.flatten()) + F.cross_entropy(
            second[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        )


TOKENS = {"ids": torch.randint(16, (8,)), "labels": torch.randint(16, (8,))}


@pytest.mark.parametrize("fix", [{"tp": 2, "sp": True}, {"tp": 2, "sp": False}, {"pp": 2}])
def test_a_weight_read_in_several_blocks_is_one(fix: dict[str, object]) -> None:
    """Stored alike for all of them; and its copies on several stages are told, so that their gradients are added."""
    model = Ahead()
    graph = model_graph(model, TOKENS)
    assert graph.tied == (("table.weight",),)
    plan = autopar.search(model, autopar.Job(4, 8), CLUSTER, inputs=TOKENS, fix={"micro_batch": 2, **fix})
    assert autopar.verify(plan, model, TOKENS).worst[1] < 1e-12
    assert 'TIED = (("table.weight",),)' in module_source(plan, graph)


class Drawing(nn.Module):
    """Draws, and drops, in functions of torch that are written in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.gumbel_softmax(self.layer(x), hard=True) * x + torch.randint(2, 9, (len(x), 1, 1), device=x.device)


def test_what_functions_of_torch_draw_is_the_same_in_a_proof() -> None:
    graph = proved(Drawing(), {"x": SAMPLE["x"]}, square, dp=2)
    assert "autopar.drawn" in ops(graph)


class Fourier(nn.Module):
    """Rates that are a power of whole numbers: of the default dtype, which is another in a proof."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rates = 3.1 ** torch.arange(2, device=x.device) / 7
        return self.layer((x.unsqueeze(-1) * rates).flatten(-2).sin())


def test_tables_of_powers_are_as_exact_as_the_proof() -> None:
    proved(Fourier(), {"x": SAMPLE["x"]}, square, dp=2)


class Keeping(nn.Module):
    """Scales by what it was first called for, by another number when it is evaluated, and drops."""

    scale: float | None = None

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = 2.0 if self.training else 3.0
        return F.dropout(self.layer(x), 0.1, self.training) * self.scale


def test_what_a_model_keeps_from_its_evaluation_is_not_trained_with() -> None:
    proved(Keeping(), {"x": SAMPLE["x"]}, square, dp=2)


class Timed(nn.Module):
    """Sines of a time step, in float32, into layers; a norm and a convolution of what comes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.mix = nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        rates = torch.exp(-torch.arange(WIDTH, device=x.device).float())
        angles = (step.float().unsqueeze(-1) * rates).sin()
        x = x + F.silu(self.time(angles)).unsqueeze(1) + self.norm(angles).unsqueeze(1)
        return self.mix(x.float().transpose(1, 2))


def test_what_is_float32_meets_weights_as_under_autocast() -> None:
    graph = proved(Timed(), {"x": SAMPLE["x"], "step": torch.tensor(0.5)}, square, dp=2)
    assert not mixed(graph, "aten.linear", "aten.conv1d", "aten.layer_norm")
    assert any("as under autocast" in note for note in graph.notes)
    plain = model_graph(nn.Sequential(nn.Linear(WIDTH, WIDTH)), {"input": SAMPLE["x"]}, square)
    assert not any("as under autocast" in note for note in plain.notes)


class Branching(nn.Module):
    """Other code for long sequences than for short ones; ``cut``: a mask as long as the sequences it is trained on,
    with which it can be traced for shorter ones only."""

    def __init__(self, cut: bool) -> None:
        super().__init__()
        self.layer, self.cut = nn.Linear(WIDTH, WIDTH), cut
        self.register_buffer("mask", torch.ones(16, 16).tril())

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        x = self.layer(x)
        length = ids.shape[1]
        if self.cut:
            x = self.mask[:length, :length].to(x) @ x
        return x * 2 if length > 10 else x.cumsum(1)


def inputs_of(length: int) -> dict[str, Tensor]:
    return {"x": torch.zeros(length, WIDTH), "ids": torch.zeros(length, dtype=torch.int64)}


def test_code_that_was_not_traced_is_not_planned() -> None:
    for length, other, told in ((16, 6, "runs other code"), (6, 16, "longer than")):
        given = {"inputs": inputs_of(length), "loss": square}
        plan = autopar.search(Branching(cut=False), autopar.Job(4, length), CLUSTER, **given, fix={"dp": 2})
        assert autopar.verify(plan, Branching(cut=False), **given).worst[1] < 1e-12
        with pytest.raises(BadInputError, match=told):
            autopar.search(Branching(cut=False), autopar.Job(4, other), CLUSTER, **given)


def test_code_of_shorter_sequences_is_not_taken_for_that_of_longer_ones() -> None:
    model, given = Branching(cut=True), {"inputs": inputs_of(16), "loss": square}
    plan = autopar.search(model, autopar.Job(4, 16), CLUSTER, **given, fix={"dp": 2})
    assert autopar.verify(plan, model, **given).worst[1] < 1e-12
    assert "aten.cumsum" not in ops(model_graph(model, **given))


class Added(nn.Module):
    """Adds float32 to what the layer makes, in place: that keeps its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x += torch.arange(WIDTH, device=x.device).float() / WIDTH
        return self.second(x)


def test_what_is_changed_in_place_keeps_its_dtype() -> None:
    graph = proved(Added(), {"x": SAMPLE["x"]}, square, dp=2)
    (kind,) = graph.kinds.values()
    (added,) = (node for node in kind.graph.of("op") if node.op == "aten.add")
    assert added.meta.dtype == "float32"
    assert not mixed(graph, "aten.linear")


class Clamping(nn.Module):
    """Brings the labels that it is given into range where they are, as it reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        scores = self.layer(x)
        labels.view(-1).clamp_(1, 3)
        return F.cross_entropy(scores.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("fix", [{"dp": 2}, {"tp": 2}])
def test_what_is_given_may_be_changed_in_place(fix: dict[str, int]) -> None:
    graph = proved(Clamping(), {"x": SAMPLE["x"], "labels": torch.tensor([0, 1, 2, 3, 0, 3])}, None, **fix)
    assert "aten.clamp" in ops(graph)


def test_scores_of_one_length_fix_that_of_the_targets() -> None:
    class Fixed(nn.Module):
        """As many scores as it has queries, whatever it reads."""

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.queries = nn.Embedding(16, WIDTH), nn.Parameter(torch.randn(12, WIDTH))
            self.head = nn.Linear(WIDTH, 16)

        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
            x = self.embed(ids)
            read = F.scaled_dot_product_attention(self.queries.expand(len(x), -1, -1), x, x)
            return F.cross_entropy(self.head(read).view(-1, 16), labels.view(-1))

    given = {"ids": torch.randint(16, (12,)), "labels": torch.randint(16, (12,))}
    plan = autopar.search(Fixed(), autopar.Job(4, 12), CLUSTER, inputs=given, fix={"dp": 2})
    assert autopar.verify(plan, Fixed(), given).worst[1] < 1e-12


class Shuffled(nn.Module):
    """Pixels for channels and back, groups of channels in turn, slopes of channels and one of all."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3, padding=1)
        self.slopes, self.slope = nn.PReLU(8), nn.PReLU()

    def forward(self, image: Tensor) -> Tensor:
        x = F.channel_shuffle(self.slopes(self.layer(image)), 4)
        return F.pixel_unshuffle(self.slope(F.pixel_shuffle(x, 2)) + 1, 4)


@pytest.mark.parametrize("fix", [{"dp": 2}, {"tp": 2}])
def test_pixels_and_slopes(fix: dict[str, int]) -> None:
    proved(Shuffled(), {"image": torch.randn(3, 4, 4)}, square, **fix)


def test_masks_that_are_drawn_leave_something_and_mark_something() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.layer(x) * mask.unsqueeze(-1)

    given = {"x": SAMPLE["x"], "mask": torch.tensor([1, 1, 1, 1, 1, 0])}
    graph = model_graph(Masked(), given, square)
    for seed in range(50):
        mask = random_batch(graph, given, 1, SEQ, torch.float64, seed)["mask"]
        assert mask[0, 0] == 1
        assert 0 in mask


def test_sizes_that_no_input_of_a_block_tells_are_refused_by_operator_and_place() -> None:
    class Averaged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            average = x.mean()
            for layer in self.layers:
                average = layer(average.expand(WIDTH)).mean()
            return average.expand(len(x))

    with pytest.raises(
        UnsupportedError, match=r"aten\.expand in the model itself: its sizes depend on b.*autopar\.leaf"
    ):
        proved(Averaged(), {"x": torch.randn(3, WIDTH)}, lambda y, batch: y.square().mean(), micro_batch=2, dp=2)


def test_sizes_that_differ_by_sample_are_refused_with_the_way_out() -> None:
    class Resized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Parameter(torch.randn(1, WIDTH, 4, 4))

        def forward(self, x: Tensor, sides: Tensor) -> Tensor:
            return x + torch.cat([F.interpolate(self.places, size=(side, side)) for side in sides])

    given = {"x": torch.randn(WIDTH, 3, 3), "sides": torch.tensor(3)}
    with pytest.raises(UnsupportedError, match=r"in a loop over its samples .* for the whole batch at once"):
        model_graph(Resized(), given, square)


def test_a_loss_without_end_is_told() -> None:
    class Endless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) / 0.0

    with pytest.raises(VerificationError, match=r"Endless: on the random batch the loss of the single device is inf"):
        proved(Endless(), SAMPLE, square, dp=2)


def test_a_proof_leaves_the_interpreter_as_it_was() -> None:
    before = sys.excepthook
    with local_ranks({"tp": 2}):
        pass
    assert sys.excepthook is before
