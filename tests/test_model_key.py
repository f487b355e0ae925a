"""Modules are traced once: keys are equal where traces are, and differ where anything that a trace depends on does."""

from __future__ import annotations

import functools
import gc
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_plans import small_llama
from torch import nn

import autopar
from autopar.graph import export
from autopar.graph.model_key import model_key
from autopar.models import model_graph

SCALE = 2.0


class Net(nn.Module):
    """With all kinds of things that a forward may read."""

    width = 4

    def __init__(self, factor: float = 1.0, table: tuple[float, ...] = (1.0, 2.0)) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.factor, self.config = factor, types.SimpleNamespace(deep={"on": [True]})
        self.act: Callable[[torch.Tensor], torch.Tensor] = torch.relu
        self.register_buffer("table", torch.tensor(table))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.second(self.act(self.first(x))) * self.factor * SCALE).mean()


def key(model: nn.Module, inputs: Any = None, loss: Any = None) -> Any:
    found = model_key(model, inputs, loss)
    assert found is not None
    return found


def test_equal_modules_have_equal_keys_whatever_their_weights() -> None:
    assert key(Net()) == key(Net())
    assert hash(key(Net())) == hash(key(Net()))
    assert key(small_llama()) == key(small_llama())


def _tie(net: Net) -> None:
    net.second.weight = net.first.weight


CHANGES: dict[str, Callable[[Net], Any]] = {
    "a number": lambda net: setattr(net, "factor", 3.0),
    "an activation": lambda net: setattr(net, "act", torch.tanh),
    "what is deep in a configuration": lambda net: net.config.deep["on"].append(False),
    "values of a buffer": lambda net: net.table.add_(1.0),
    "frozen": lambda net: net.first.weight.requires_grad_(False),
    "tied": _tie,
    "evaluated": lambda net: net.eval(),
    "a part evaluated": lambda net: net.second.eval(),
    "dtype": lambda net: net.to(torch.bfloat16),
    "a hook": lambda net: net.first.register_forward_hook(lambda *_: None),
    "another module": lambda net: setattr(net, "second", nn.Linear(4, 4, bias=False)),
    "a forward of its own": lambda net: setattr(net, "forward", functools.partial(Net.forward, net)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_trace_depends_on_is_in_the_key(change: str) -> None:
    net = Net()
    before = key(net)
    CHANGES[change](net)
    assert key(net) != before


def test_code_and_the_values_it_names_are_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(Net())
    with monkeypatch.context() as patch:
        patch.setattr(Net, "width", 5)
        assert key(Net()) != before
    with monkeypatch.context() as patch:
        patch.setattr(Net, "forward", lambda self, x: self.first(x).mean())
        assert key(Net()) != before
    with monkeypatch.context() as patch:
        patch.setitem(Net.forward.__globals__, "SCALE", 3.0)
        assert key(Net()) != before
    assert key(Net()) == before


def test_inputs_count_by_shape_and_losses_by_what_they_are() -> None:
    def scaled(by: float) -> Callable[..., Any]:
        return lambda outputs, batch: outputs * by

    one, two = {"x": torch.zeros(4)}, {"x": torch.ones(4)}
    assert key(Net(), one) == key(Net(), two)
    assert key(Net(), one) != key(Net(), {"x": torch.zeros(8)})
    loss = scaled(1.0)
    assert key(Net(), one, loss) == key(Net(), two, loss)
    assert key(Net(), one, loss) != key(Net(), one, scaled(2.0))


def test_what_has_no_description_has_no_key() -> None:
    net = Net()
    net.draw = torch.Generator()  # type: ignore[assignment]
    assert model_key(net, None, None) is None
    assert model_key(Net(table=(0.0,) * (1 << 21)), None, None) is None


def test_a_key_equals_none_once_its_code_is_gone() -> None:
    def made() -> nn.Module:
        class Local(nn.Linear):
            pass

        return Local(2, 2)

    net = made()
    before = key(net)
    assert key(net) == before
    del net
    gc.collect()
    assert before != before


def test_a_model_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searched for, verified and looked at; traced again when it has changed."""
    exports = []
    real = torch.export.export
    monkeypatch.setattr(
        export.torch.export, "export", lambda *args, **kwargs: exports.append(1) or real(*args, **kwargs)
    )
    model = small_llama()
    model.config.name_or_path = "never traced before"
    cluster = autopar.Cluster.parse("1x2:cpu")
    plan = autopar.search(model, autopar.Job(4, 16, dtype="fp32"), cluster, fix={"tp": 1, "dp": 2})
    autopar.verify(plan, model)
    assert model_graph(model) is model_graph(model)
    once = len(exports)
    assert once > 0
    for parameter in model.model.embed_tokens.parameters():
        parameter.requires_grad_(False)
    assert not model_graph(model).parameters["model.embed_tokens.weight"].requires_grad
    assert len(exports) > once
