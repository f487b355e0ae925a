"""Single-process proof: emitted stages on simulated ranks against the user's model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hand_plans import gpt2, graph_of, llama, megatron, plan_of, whole
from torch import nn

from autopar.cluster import Cluster
from autopar.codegen.emit_module import module_source
from autopar.codegen.twin import small_twin
from autopar.codegen.verify import gradient_errors, verify, verify_source
from autopar.errors import BadInputError, VerificationError
from autopar.graph.ir import ModelGraph
from autopar.graph.trace import trace
from autopar.job import Job
from autopar.plan import Mesh, Plan
from autopar.solver.search import search

MODELS = {"llama": llama(2), "gpt2": gpt2(2)}
GRAPHS = {name: graph_of(model) for name, model in MODELS.items()}


def plan(graph: ModelGraph, name: str) -> Plan:
    full = "full" if "full" in name else "none"
    if name.startswith("dp4"):
        return plan_of(graph, whole(graph), Mesh(dp=4), recompute=full)
    if name.startswith("pp4"):
        return plan_of(graph, whole(graph), Mesh(pp=4), bounds=(1, 2, 3), recompute=full)
    if name.startswith("tp4"):
        return plan_of(graph, megatron(graph, 4, "sp" in name), Mesh(tp=4), recompute=full)
    if name.startswith("tp2 dp2"):
        return plan_of(graph, megatron(graph, 2, "sp" in name), Mesh(dp=2, tp=2), recompute=full)
    return plan_of(graph, megatron(graph, 2, "sp" in name), Mesh(pp=2, tp=2), bounds=(2,), recompute=full)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["dp4", "tp4", "tp4 sp full", "tp2 dp2 sp", "pp2 tp2 full", "pp4"])
def test_loss_and_gradients_equal_the_single_device(model: str, name: str) -> None:
    report = verify(plan(GRAPHS[model], name), MODELS[model])
    assert report.loss_error <= 1e-10
    assert report.worst[1] <= 1e-10
    assert set(report.errors) == set(GRAPHS[model].parameters)
    assert report.twin == ""


@pytest.mark.parametrize("model", MODELS)
def test_float32_agrees_to_single_precision(model: str) -> None:
    report = verify(plan(GRAPHS[model], "tp2 dp2 sp"), MODELS[model], dtype=torch.float32)
    assert 0 < report.worst[1] <= 1e-5
    assert "float32" in str(report)
    assert report.worst[0] in str(report)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("fix", [{"tp": 4}, {"tp": 4, "sp": True}, {"pp": 2, "tp": 2, "recompute": "full"}], ids=str)
def test_plans_of_the_search_are_right(model: str, fix: dict[str, object]) -> None:
    found = search(GRAPHS[model], Job(8, 32), Cluster.parse("1x4:h100"), fix)
    assert verify(found, MODELS[model]).worst[1] <= 1e-10


def mutated(source: str, old: str, new: str) -> str:
    assert old in source
    return source.replace(old, new, 1)


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        # A norm weight's gradient left as this rank's summand.
        ("replicate(self.input_layernorm.weight.to_local(), self.tp)", "self.input_layernorm.weight.to_local()", "norm"),
        # Wrong backward only: the forward value is the same.
        ("all_gather(normed, self.tp, 1)", "all_gather_invariant(normed, self.tp, 1)", ""),
        ("eps=1e-6", "eps=1e-3", ""),
    ],
)
def test_a_wrong_module_is_caught_and_the_parameter_named(old: str, new: str, where: str) -> None:
    chosen = plan(GRAPHS["llama"], "tp4 sp")
    source = module_source(chosen, GRAPHS["llama"]).replace(
        "import replicate", "import replicate, all_gather_invariant"
    )
    source = source.replace("import all_gather,", "import all_gather, all_gather_invariant,")
    with pytest.raises(VerificationError, match=rf"gradient of \S*{where}\S* by"):
        verify_source(mutated(source, old, new), chosen, MODELS["llama"], GRAPHS["llama"])


def test_another_model_is_refused() -> None:
    with pytest.raises(BadInputError, match="another model, shape or version"):
        verify(plan(GRAPHS["llama"], "dp4"), MODELS["gpt2"])


def test_a_model_and_loss_of_ones_own_are_verified() -> None:
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(32, 16)
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2)])
            self.head = nn.Linear(16, 32)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.embed(tokens)
            for layer in self.layers:
                x = x + layer(x)
            return self.head(x)

    def loss(outputs: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs.flatten(0, 1), batch["targets"].flatten())

    torch.manual_seed(0)
    model = Tiny()
    inputs = {"tokens": torch.arange(16), "targets": torch.arange(16)}
    graph = trace(model, inputs, loss)
    found = search(graph, Job(8, 16), Cluster.parse("1x4:h100"), {"tp": 2, "dp": 2})
    assert verify(found, model, inputs, loss=loss).worst[1] <= 1e-10


def test_a_model_too_large_is_verified_on_a_twin_of_the_same_decisions() -> None:
    from autopar.models import load_model, model_graph

    model, graph = load_model("llama3-8b"), model_graph("llama3-8b")
    found = search(graph, Job(512, 8192), Cluster.parse("8x8:h100"), {"tp": 8, "pp": 2, "micro_batch": 1})
    twin = small_twin(found, model, graph, trace)
    assert twin.plan.mesh.tp == 2
    assert {c.decision.kind for c in twin.plan.candidates.values()} == set(graph.kinds)
    for name, candidate in twin.plan.candidates.items():
        assert candidate.decision.strategies == found.candidates[name].decision.strategies
    report = verify(found, model)
    assert report.worst[1] <= 1e-10
    assert "tp=2" in report.twin
    assert "twin" in str(report)


def test_error_measure_has_a_floor_for_gradients_that_are_zero() -> None:
    expected = {"a": torch.tensor([3.0, 4.0]), "zero": torch.zeros(2)}
    found = {"a": torch.tensor([[3.0, 4.5]]), "zero": torch.tensor([[0.0, 1e-6], [0.0, 2e-6]])}
    errors = gradient_errors(found, expected)
    assert errors["a"] == pytest.approx(0.1)
    assert errors["zero"] == pytest.approx(2e-6 / (1e-3 * 5 / 2**0.5))
    assert gradient_errors({}, expected)["a"] == float("inf")


def test_a_report_is_plain_values() -> None:
    report = verify(dataclasses.replace(plan(GRAPHS["llama"], "dp4")), MODELS["llama"])
    data = report.to_json()
    assert data["worst_error"] == report.worst[1]
    assert data["loss"] > 0
