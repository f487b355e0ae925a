"""Single-process proof: emitted stages on simulated ranks against the user's model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers
from hand_plans import Graphs, gpt2, graph_of, llama, megatron, plan_of, whole
from torch import nn

from autopar.cluster import Cluster
from autopar.codegen import twin
from autopar.codegen.compare import gradient_errors
from autopar.codegen.emit_module import module_source
from autopar.codegen.verify import verify, verify_source
from autopar.errors import BadInputError, UnsupportedError, VerificationError
from autopar.graph.ir import ModelGraph
from autopar.job import Job
from autopar.models import model_graph
from autopar.plan import Mesh, Plan
from autopar.solver.search import search

MODELS = {"llama": llama(2), "gpt2": gpt2(2)}
GRAPHS = Graphs(MODELS)


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
@pytest.mark.parametrize("name", ["dp4", "tp4 sp full", "tp2 dp2", "pp2 tp2 full"])
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


@pytest.mark.parametrize(
    ("model", "fix"),
    [
        ("llama", {"tp": 4, "sp": True}),
        ("gpt2", {"pp": 2, "tp": 2, "recompute": "full"}),
        ("llama", {"dp": 2, "pp": 2}),
    ],
    ids=str,
)
def test_plans_of_the_search_are_right(model: str, fix: dict[str, object]) -> None:
    found = search(GRAPHS[model], Job(8, 32), Cluster.parse("1x4:h100"), fix)
    assert verify(found, MODELS[model]).worst[1] <= 1e-10


def test_tied_weights_on_meta_stay_tied() -> None:
    with torch.device("meta"):
        model = gpt2(2)
    graph = graph_of(model)
    assert graph.tied
    assert verify(plan(graph, "pp4"), model).worst[1] <= 1e-10


def mutated(source: str, old: str, new: str) -> str:
    assert old in source
    return source.replace(old, new, 1)


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        # A norm weight's gradient left as this rank's summand.
        (
            "replicate(self.input_layernorm.weight.to_local(), self.tp)",
            "self.input_layernorm.weight.to_local()",
            "norm",
        ),
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
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.mlp(x)

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(32, 16)
            self.layers = nn.ModuleList([Layer() for _ in range(2)])
            self.head = nn.Linear(16, 32)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.embed(tokens)
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    def loss(outputs: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs.flatten(0, 1), batch["targets"].flatten())

    torch.manual_seed(0)
    model = Tiny()
    inputs = {"tokens": torch.arange(16), "targets": torch.arange(16)}
    graph = model_graph(model, inputs, loss)
    found = search(graph, Job(8, 16), Cluster.parse("1x4:h100"), {"tp": 2, "dp": 2})
    assert verify(found, model, inputs, loss=loss).worst[1] <= 1e-10


def test_a_model_too_large_is_verified_on_a_twin_of_the_same_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twin, "MOST_RANKS", 3)
    model = llama(6, hidden_size=128, num_attention_heads=16, num_key_value_heads=4, vocab_size=512)
    graph = graph_of(model)
    chosen = plan_of(graph, megatron(graph, 4, True), Mesh(pp=2, dp=4, tp=4), bounds=(3,), seq_len=4096)
    small = twin.small_twin(chosen, model, graph, model_graph)
    assert small.plan.mesh == Mesh(pp=2, dp=2, tp=2)
    assert len(small.graph.blocks) < len(graph.blocks)
    assert small.graph.count_parameters() < graph.count_parameters()
    assert {c.decision.kind for c in small.plan.candidates.values()} == set(graph.kinds)
    for name, candidate in small.plan.candidates.items():
        assert candidate.decision.strategies == chosen.candidates[name].decision.strategies
    report = verify(chosen, model)
    assert report.worst[1] <= 1e-10
    assert report.twin == "pp=2 x dp=2 x tp=2, 6 of 8 blocks, narrow layers"
    assert "twin" in str(report)


@pytest.mark.parametrize("layers", [1, 6])
def test_a_twin_of_one_stage_sees_its_layers_as_the_model_does(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twin, "MOST_RANKS", 3)
    model = llama(layers, hidden_size=128, num_attention_heads=16, num_key_value_heads=4, vocab_size=512)
    graph = graph_of(model)
    report = verify(plan_of(graph, whole(graph), Mesh(dp=4)), model)
    assert report.worst[1] <= 1e-10
    assert "pp=1 x dp=2 x tp=1" in report.twin


def test_a_model_too_large_without_a_configuration_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twin, "MOST_BYTES", 1)
    model = llama(1)
    graph = graph_of(model)
    del model.config
    with pytest.raises(UnsupportedError, match="too large to verify in one process"):
        twin.small_twin(plan_of(graph, whole(graph)), model, graph, model_graph)


@pytest.mark.proof
def test_a_plan_for_llama3_8b_is_verified_on_its_twin() -> None:
    found = search(
        model_graph("llama3-8b"), Job(512, 8192), Cluster.parse("8x8:h100"), {"tp": 8, "pp": 2, "micro_batch": 1}
    )
    report = verify(found, "llama3-8b")
    assert report.worst[1] <= 1e-10
    assert "tp=2" in report.twin


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


LARGE = {
    # Latent attention, the first layers dense, and more experts than a proof could hold at this width.
    "deepseek_v3": lambda: transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(num_hidden_layers=9, vocab_size=1024, n_routed_experts=64)
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(num_hidden_layers=6, head_dim=128, vocab_size=1024, num_experts=16)
    ),
    # Twice as wide inside as outside, whose layers' types are not to be set.
    "mamba2": lambda: transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(hidden_size=2560, num_heads=80, num_hidden_layers=6, n_groups=1, vocab_size=1024)
    ),
    # Two lists of layers, the first of each unlike the others.
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=2048,
            d_kv=64,
            d_ff=5120,
            num_layers=5,
            num_decoder_layers=4,
            num_heads=32,
            vocab_size=1024,
            decoder_start_token_id=0,
        )
    ),
    "mamba": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(hidden_size=2048, num_hidden_layers=6, vocab_size=1024)
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_large_plan_of_any_architecture_is_verified_on_its_twin(name: str) -> None:
    with torch.device("meta"):
        model = LARGE[name]()
    found = search(model_graph(model), Job(16, 512), Cluster.parse("1x4:h100"), {"tp": 1, "pp": 1, "zero": 3})
    report = verify(found, model)
    assert "narrow layers" in report.twin
    assert report.worst[1] <= 1e-10


def test_a_configuration_that_cannot_be_narrowed_is_refused() -> None:
    with torch.device("meta"):
        model = LARGE["mamba"]()
    graph = model_graph(model)
    model.config.hidden_act = "none of these"
    with pytest.raises(UnsupportedError, match=r"a narrow twin of it cannot be built .*: verify a smaller config"):
        twin.small_twin(plan_of(graph, whole(graph)), model, graph, model_graph)
