"""Cutting a model into a chain of blocks: kinds by structure, sources, constants, the round trip to JSON."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from traced import gpt2, gpt2_graph, llama, llama_graph, worst_error

import autopar
from autopar.graph.ir import ModelGraph, Source
from autopar.graph.serialize import model_from_json, model_to_json
from autopar.graph.trace import trace


def test_llama_is_prologue_layers_epilogue():
    graph = trace(llama(4))
    assert [(block.kind, block.path) for block in graph.blocks] == [
        ("Prologue", ""),
        *(("LlamaDecoderLayer", f"model.layers.{i}") for i in range(4)),
        ("Epilogue", ""),
    ]
    layer = graph.blocks[2]
    assert layer.inputs == {
        "hidden": Source("block", block=1, index=0),
        "cos_wide": Source("constant", key="cos_wide"),
        "sin_wide": Source("constant", key="sin_wide"),
    }
    assert layer.parameters["self_attn.q_proj.weight"] == "model.layers.1.self_attn.q_proj.weight"
    assert graph.blocks[-1].inputs["labels"] == Source("batch", key="labels")
    assert graph.constants.outputs == ("cos_wide", "sin_wide")
    assert [node.target for node in graph.constants.of("buffer")] == ["model.rotary_emb.inv_freq"]


def test_learned_positions_belong_to_the_prologue():
    graph = gpt2_graph()
    assert graph.blocks[0].parameters.keys() == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert [node.op for node in graph.constants.of("op")] == ["aten.arange", "aten.unsqueeze"]


def test_graphs_are_closed_and_names_unique():
    for graph in (llama_graph(), gpt2_graph()):
        _check(graph)


def _check(graph: ModelGraph) -> None:
    """Every reference resolves, every source exists and agrees with what it feeds."""
    for operators in (*(kind.graph for kind in graph.kinds.values()), graph.constants, graph.count):
        seen: set[str] = set()
        for name, node in operators.nodes.items():
            assert name == node.name
            assert name.isidentifier()
            assert set(node.operands()) <= seen
            seen.add(name)
        assert set(operators.outputs) <= seen
    for place, block in enumerate(graph.blocks):
        nodes = graph.kinds[block.kind].graph.nodes
        for name, source in block.inputs.items():
            if source.origin == "block":
                assert source.block < place
                producer = graph.kinds[graph.blocks[source.block].kind].graph
                assert producer.nodes[producer.outputs[source.index]].meta == nodes[name].meta
            elif source.origin == "batch":
                assert graph.batch[source.key] == nodes[name].meta
            else:
                assert graph.constants.nodes[source.key].meta == nodes[name].meta
        for node in nodes.values():
            if node.kind in ("parameter", "buffer"):
                table = graph.parameters if node.kind == "parameter" else graph.buffers
                assert table[block.parameters[node.target]] == node.meta


def test_round_trip_and_fingerprint():
    graph = gpt2_graph()
    again = model_from_json(json.loads(json.dumps(model_to_json(graph))))
    assert again == graph
    assert again.fingerprint() == graph.fingerprint() == trace(gpt2(device="cpu")).fingerprint()
    assert trace(gpt2(4)).fingerprint() != graph.fingerprint()


class Layer(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.linear = nn.Linear(6, width)
        self.back = nn.Linear(width, 6)
        self.register_buffer("scale", torch.linspace(1, 2, 6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.back(F.relu(self.linear(x))) * (self.scale + 1)


class Net(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 6)
        self.layers = nn.ModuleList(layers)
        self.register_buffer("table", torch.arange(6.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        first = x
        for layer in self.layers:
            x = layer(x) + self.table
        return x + first


def square(y: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return y.square().mean()


def traced(layers: list[nn.Module], cls: type[nn.Module] = Net) -> ModelGraph:
    torch.manual_seed(0)
    model = cls(layers).double()
    graph = trace(model, inputs={"x": torch.zeros(6)}, loss=square)
    _check(graph)
    batch = {"x": torch.randn(3, 6, dtype=torch.float64)}
    assert worst_error(graph, model, batch, square(model(**batch), batch)) < 1e-10
    return graph


def test_layers_of_two_widths_are_two_kinds():
    graph = traced([Layer(4), Layer(4), Layer(4), Layer(8), Layer(4)])
    # All hand on what enters the first, which the end reads; to the first itself that is one tensor, not two.
    assert [block.kind for block in graph.blocks][1:-2] == ["Layer", "Layer2", "Layer2", "Layer3"]


def test_what_runs_between_layers_belongs_to_the_layer_before():
    graph = traced([Layer() for _ in range(4)])
    assert [block.kind for block in graph.blocks] == ["Prologue", "Layer", "Layer2", "Layer2", "Layer3", "Epilogue"]
    kinds = {name: [node.op for node in kind.graph.of("op")] for name, kind in graph.kinds.items()}
    assert kinds["Layer2"] == [*kinds["Layer3"], "aten.add"]


def test_what_is_needed_further_down_is_handed_on():
    graph = traced([Layer() for _ in range(3)])
    for place, block in enumerate(graph.blocks):
        assert all(source.block == place - 1 for source in block.inputs.values() if source.origin == "block")
    # What enters the first layer reaches the end as every layer's second output.
    assert Source("block", block=3, index=1) in graph.blocks[-1].inputs.values()
    kind = graph.kinds[graph.blocks[2].kind].graph
    assert kind.nodes[kind.outputs[1]].kind == "input"


class Masked(Net):
    """A mask made once from the batch, read by every layer."""

    def forward(self, x: Tensor) -> Tensor:
        mask = (x > 0).to(x.dtype)
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x) * mask
        return x


def test_what_follows_from_the_batch_alone_is_computed_where_it_is_read():
    graph = traced([Layer() for _ in range(3)], Masked)
    for block in graph.blocks[1:3]:
        assert Source("batch", key="x") in block.inputs.values()
        assert len(graph.kinds[block.kind].graph.outputs) == 1
    assert "aten.gt" not in [node.op for node in graph.kinds["Prologue"].graph.of("op")]


def test_buffers_of_layers_stay_with_them_and_shared_ones_are_constants():
    graph = traced([Layer(), Layer(), Layer()])
    assert graph.blocks[2].parameters["scale"] == "layers.1.scale"
    assert graph.buffers.keys() == {f"layers.{i}.scale" for i in range(3)} | {"table"}
    assert graph.buffer_values["table"] == tuple(range(6))
    assert any(source == Source("constant", key="table") for source in graph.blocks[1].inputs.values())


class Shared(Net):
    """One layer, run three times."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for _ in range(3):
            x = self.layers[0](x)
        return self.layers[1](x)


def test_a_layer_called_again_is_a_block_each_time():
    graph = traced([Layer(), Layer()], Shared)
    assert [block.path for block in graph.blocks] == ["", "layers.0", "layers.0", "layers.0", "layers.1", ""]
    assert {block.kind for block in graph.blocks[1:5]} == {"Layer"}
    assert len(graph.parameters) == 2 + 2 * 4


class Nested(nn.Module):
    """Stages that differ, of blocks that do not."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Sequential(Layer(4), Layer(4)), nn.Sequential(Layer(8), Layer(8), Layer(8))])

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


def test_repeated_layers_are_found_inside_stages():
    graph = traced([], Nested)
    paths = [block.path for block in graph.blocks]
    assert paths == [*(f"stages.0.{i}" for i in range(2)), *(f"stages.1.{i}" for i in range(3)), ""]


@pytest.mark.parametrize("count", [0, 1])
def test_no_repetition_is_one_block(count):
    graph = traced([Layer() for _ in range(count)])
    assert [block.kind for block in graph.blocks] == ["Model"]


class Rounds(nn.Module):
    """The same layers twice: first without gradients, then with them, as some recurrent models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.SiLU()) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        with torch.no_grad():
            for layer in self.layers:
                x = x + layer(x)
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_layers_that_compute_something_else_each_time_are_no_blocks():
    torch.manual_seed(0)
    model, inputs = Rounds(), {"ids": torch.zeros(8, dtype=torch.int64)}

    def loss(y: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return y.square().mean()

    graph = trace(model, inputs, loss)
    assert [block.path for block in graph.blocks] == [""]
    plan = autopar.search(model, autopar.Job(4, 8), autopar.Cluster.parse("1x2:h100"), inputs, loss, fix={"tp": 2})
    assert autopar.verify(plan, model, inputs, loss=loss).worst[1] < 1e-12
