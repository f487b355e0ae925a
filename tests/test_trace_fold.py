"""Folding: equal layers are traced twice however many there are, and only if they are proved equal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from traced import gpt2, llama, worst_error

from autopar.graph.ir import ModelGraph
from autopar.graph.trace import trace

DEPTH = 7
SAMPLE = {"x": torch.zeros(6)}


class Layer(nn.Module):
    """Counts its calls; ``use`` may read the layer's position."""

    calls = 0

    def __init__(self, index: int, use: Callable[[Layer, Tensor], Tensor] = lambda layer, x: x) -> None:
        super().__init__()
        self.index = index
        self.use = use
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        Layer.calls += 1
        return x + self.use(self, self.linear(x)).tanh()


class Stack(nn.Module):
    """``run(layers, x)`` is the parent's loop."""

    def __init__(self, layers: list[nn.Module], run: Callable[[nn.ModuleList, Tensor], Tensor]) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 6)
        self.layers = nn.ModuleList(layers)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.layers, self.enter(x))


def in_turn(layers: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def square(y: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return y.square().mean()


def traced_calls(
    layers: list[nn.Module], run: Callable[[nn.ModuleList, Tensor], Tensor] = in_turn
) -> tuple[ModelGraph, int]:
    """The graph (checked against the model and against the unfolded graph) and the layer calls that tracing took."""
    torch.manual_seed(0)
    model = Stack(layers, run).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    Layer.calls = 0
    graph = trace(model, inputs=SAMPLE, loss=square)
    calls = Layer.calls
    assert graph == trace(model, inputs=SAMPLE, loss=square, fold=False)
    batch = {"x": torch.randn(3, 6, dtype=torch.float64)}
    assert worst_error(graph, model, batch, square(model(**batch), batch)) < 1e-10
    return graph, calls


@pytest.mark.parametrize("make", [llama, gpt2])
def test_folded_graph_is_the_whole_graph(make):
    assert trace(make(6)) == trace(make(6), fold=False)


def test_equal_layers_are_traced_twice():
    graph, calls = traced_calls([Layer(i) for i in range(DEPTH)])
    assert calls == 2
    assert [block.kind for block in graph.blocks] == ["Prologue", *["Layer"] * DEPTH, "Epilogue"]
    assert [block.inputs["hidden"].block for block in graph.blocks[1:]] == list(range(DEPTH + 1))
    assert graph.blocks[6].parameters == {
        "linear.weight": "layers.5.linear.weight",
        "linear.bias": "layers.5.linear.bias",
    }


def test_alternating_layers_are_two_kinds():
    halves = [lambda layer, x: x, lambda layer, x: F.relu(x)]
    graph, calls = traced_calls([Layer(i, halves[i % 2]) for i in range(10)])
    assert calls == 4
    assert [block.kind for block in graph.blocks] == ["Prologue", *["Layer", "Layer2"] * 5, "Epilogue"]


def test_outputs_of_all_layers_may_be_read_after():
    def collect(layers: nn.ModuleList, x: Tensor) -> Tensor:
        outputs = [x := layer(x) for layer in layers]
        return torch.stack(outputs).sum(0)

    graph, calls = traced_calls([Layer(i) for i in range(DEPTH)], collect)
    # Each layer hands on what those before it made, one value more than the last: they are not alike.
    assert calls == DEPTH + 2
    last = len(graph.blocks) - 1
    assert {source.block for source in graph.blocks[last].inputs.values()} == {last - 1}
    assert len(graph.blocks[last].inputs) == DEPTH


@pytest.mark.parametrize(
    "use",
    [
        lambda layer, x: x * (layer.index + 1),
        lambda layer, x: x if layer.index < 5 else x * 2,
        lambda layer, x: x * [1, 1, 1, 1, 2, 1, 1][layer.index],
        lambda layer, x: x * {4: 2.0}.get(layer.index, 1.0),
        lambda layer, x: x * float(f"{layer.index}"),
        lambda layer, x: x.roll(layer.index, dims=-1),
    ],
)
def test_use_of_the_position_is_found(use):
    _, calls = traced_calls([Layer(i, use) for i in range(DEPTH)])
    assert calls >= DEPTH


def test_layers_that_differ_are_not_folded():
    layers = [Layer(i) for i in range(DEPTH)]
    for layer in layers:
        layer.scale = 0.5 * layer.index  # a float attribute: part of the structure, whatever it is for
    _, calls = traced_calls(layers)
    assert calls == DEPTH


def test_shared_parameters_are_not_folded():
    layers = [Layer(i) for i in range(DEPTH)]
    layers[5].linear.weight = layers[2].linear.weight
    graph, calls = traced_calls(layers)
    assert calls == DEPTH
    assert graph.tied == (("layers.2.linear.weight", "layers.5.linear.weight"),)


def special_case(layers: nn.ModuleList, x: Tensor) -> Tensor:
    for index, layer in enumerate(layers):
        x = layer(x * 2 if index == 4 else x)
    return x


def other_argument(layers: nn.ModuleList, x: Tensor) -> Tensor:
    first = y = layers[0](x)
    for layer in [*layers[1:4], *layers[5:]]:
        y = layer(y)
    return y + layers[4](first)


def skip_connections(layers: nn.ModuleList, x: Tensor) -> Tensor:
    outputs = [x]
    for index, layer in enumerate(layers):
        outputs.append(layer(outputs[-1]) + (outputs[index - 2] if index > 3 else 0))
    return outputs[-1]


def backwards(layers: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in reversed(layers):
        x = layer(x)
    return x


def reads_weights(layers: nn.ModuleList, x: Tensor) -> Tensor:
    return in_turn(layers, x) + layers[5].linear.bias


@pytest.mark.parametrize("run", [special_case, other_argument, skip_connections, backwards, reads_weights])
def test_layers_used_unlike_each_other_are_not_folded(run):
    _, calls = traced_calls([Layer(i) for i in range(DEPTH)], run)
    assert calls >= DEPTH


class Chatty(Layer):
    """Leaves something for the next layer behind its caller's back."""

    memory: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        held, Chatty.memory = Chatty.memory, x
        return super().forward(x if held is None else x + held)


def test_hidden_edges_between_layers_are_found():
    def run(layers: nn.ModuleList, x: Tensor) -> Tensor:
        Chatty.memory = None
        return in_turn(layers, x)

    _, calls = traced_calls([Chatty(i) for i in range(DEPTH)], run)
    assert calls >= DEPTH
