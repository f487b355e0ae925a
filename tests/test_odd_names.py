"""Models whose members are called what Python or the emitted module would not: emitted, and equal to one device."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autopar
from autopar import Cluster, Job
from autopar.codegen.emit import emit
from autopar.codegen.tokens import token_batch
from autopar.models import model_graph

WIDTH, VOCABULARY = 8, 16
CLUSTER = Cluster.parse("1x2:h100")
JOB = Job(global_batch=4, seq_len=8, dtype="fp32")


class Stage(nn.Module):
    """A layer with the name of the emitted module's own class, and members with names of its own attributes."""

    def __init__(self):
        super().__init__()
        self.tp = nn.Linear(WIDTH, WIDTH)
        self.index = nn.LayerNorm(WIDTH)

    def forward(self, x):
        return x + self.tp(self.index(x))


class Clashing(nn.Module):
    """`blocks`, `index` and `epilogue` are members of the emitted `Stage` too; `pos` sits beside modules."""

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.scale = nn.Parameter(torch.ones(WIDTH))
        self.model.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Stage() for _ in range(2)])
        self.index = nn.Linear(WIDTH, WIDTH)
        self.epilogue = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids, labels):
        x = self.model.embed(input_ids) * self.model.scale
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.epilogue(self.index(x)).flatten(0, 1), labels.flatten())


class Unwritable(nn.Module):
    """Numbers, keywords and spaces; a Sequential with layers in its middle; parameters in a list."""

    def __init__(self):
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(WIDTH)) for _ in range(2)])
        self.add_module("in", nn.Embedding(VOCABULARY, WIDTH))
        self.net = nn.Sequential(
            nn.Linear(WIDTH, WIDTH),
            *[nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(2)],
            nn.LayerNorm(WIDTH),
        )
        self.odd = nn.ModuleDict({"layer one": nn.ModuleDict({"def": nn.Linear(WIDTH, WIDTH), "0": nn.Linear(8, 8)})})
        self.F = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids, labels):
        x = self.net(self.get_submodule("in")(input_ids) * self.scales[0]) * self.scales[1]
        x = self.odd["layer one"]["0"](F.relu(self.odd["layer one"]["def"](x)))
        return F.cross_entropy(self.F(x).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("fix", [{"dp": 2}, {"tp": 2}, {"pp": 2}], ids=str)
@pytest.mark.parametrize("build", [Clashing, Unwritable])
def test_any_name_is_emitted(build, fix):
    model = build()
    plan = autopar.search(model, JOB, CLUSTER, fix=fix)
    assert autopar.verify(plan, model).worst[1] <= 1e-10


class Decoder(nn.Module):
    """Takes tokens and targets by other names, and leaves the shift between them to its caller."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, idx, targets):
        logits = self.head(self.embed(idx))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def sample(*keys):
    return {key: torch.zeros(8, dtype=torch.int64) for key in keys}


def test_the_script_feeds_what_the_model_asks_for(tmp_path):
    inputs, loss = sample("idx", "targets"), lambda outputs, batch: outputs[1]
    graph = model_graph(Decoder(), inputs, loss)
    assert token_batch(graph).made["idx"] == "ids"
    made = eval(token_batch(graph).made["targets"], {"torch": torch, "ids": torch.tensor([[3, 1, 4]])})
    assert made.tolist() == [[1, 4, -1]]
    plan = autopar.search(Decoder(), JOB, CLUSTER, inputs=inputs, loss=loss)
    emit(plan, graph, tmp_path / "out")
    assert '"idx": ids' in (tmp_path / "out" / "train.py").read_text()


def test_what_it_cannot_feed_is_named():
    class Other(Decoder):
        def forward(self, idx, weather, targets):
            logits = self.head(self.embed(idx) + weather.unsqueeze(-1))
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    graph = model_graph(Other(), {**sample("idx", "targets"), "weather": torch.zeros(8)})
    with pytest.raises(autopar.AutoparError, match="takes weather"):
        token_batch(graph)


@pytest.mark.parametrize("reduction", ["sum", "elements"])
@pytest.mark.parametrize("fix", [{"dp": 2, "micro_batch": 1}, {"tp": 2}], ids=str)
def test_losses_without_targets_to_count(reduction, fix):
    def loss(outputs, batch):
        if reduction == "elements":
            return outputs.square().mean()
        return F.cross_entropy(outputs.flatten(0, 1), batch["labels"].flatten(), reduction="sum")

    class Plain(Decoder):
        def forward(self, input_ids):
            return self.head(self.embed(input_ids))

    inputs = sample("input_ids") if reduction == "elements" else None
    plan = autopar.search(Plain(), JOB, CLUSTER, inputs=inputs, loss=loss, fix=fix)
    assert autopar.verify(plan, Plain(), inputs=inputs, loss=loss).worst[1] <= 1e-10
