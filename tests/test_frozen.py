"""Models of which a part trains: emitted, verified and priced without gradients for the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from plain_plans import plain_plan, small_llama
from proof.models import SEQ, Variant, build, graph_of
from test_train_script import close, losses
from torch import Tensor, nn

import autopar
from autopar.codegen import prove
from autopar.codegen.emit import emit
from autopar.codegen.emit_module import module_source
from autopar.graph.interpret import keep_wide
from autopar.job import Job
from autopar.models import model_graph
from autopar.solver.reprice import reprice
from autopar.solver.search import search


class Adapted(nn.Module):
    """A linear layer that stays as it is, and a low-rank pair beside it that trains."""

    def __init__(self, linear: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Linear(linear.in_features, rank, bias=False)
        self.up = nn.Linear(rank, linear.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.up(self.down(x))


def frozen_embedding() -> nn.Module:
    model = small_llama()
    model.model.embed_tokens.requires_grad_(False)
    return model


def frozen_layers() -> nn.Module:
    """The embedding and the first half of the layers: with two stages, all of the first."""
    model = frozen_embedding()
    for layer in model.model.layers[:2]:
        layer.requires_grad_(False)
    return model


def adapters() -> nn.Module:
    model = small_llama().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
        layer.mlp.down_proj = Adapted(layer.mlp.down_proj)
    return model


MODELS = [frozen_embedding, frozen_layers, adapters]
JOB = Job(8, 16, "fp64")


@pytest.mark.parametrize("make", MODELS)
def test_stages_compute_the_single_device(make: Callable[[], nn.Module]) -> None:
    model = make()
    graph = model_graph(model)
    plan = plain_plan(graph, pp=2, dp=2, job=JOB)
    report = autopar.verify(plan, model)
    assert report.errors.keys() == {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert max(report.loss_error, report.worst[1]) < 1e-12


@pytest.mark.parametrize("make", MODELS)
def test_tensor_parallel_computes_the_single_device(make: Callable[[], nn.Module]) -> None:
    fix = {"tp": 2, "pp": 1, "dp": 1, "micro_batch": 4, "zero": 0, "recompute": "none"}
    plan = autopar.search(make(), Job(4, 16, "bf16"), autopar.Cluster.parse("1x2:h100"), fix=fix)
    report = autopar.verify(plan, make())
    assert max(report.loss_error, report.worst[1]) < 1e-12


def test_the_module_says_what_is_frozen() -> None:
    graph = model_graph(adapters())
    text = module_source(plain_plan(graph, job=JOB), graph)
    assert "linear=Weights(weight=new.whole(64, 64, trains=False))" in text
    assert "down=Weights(weight=new.whole(4, 64))" in text


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("fix", [{"dp": 4, "zero": 3}, {"pp": 2, "tp": 2, "zero": 0}, {"dp": 2, "tp": 2, "zero": 1}])
def test_priced_alike_by_both_paths(make: Callable[[], nn.Module], fix: dict[str, int]) -> None:
    graph = model_graph(make())
    plan = search(graph, Job(16, 16), autopar.Cluster.parse("1x4:h100"), fix)
    priced = reprice(plan, graph)
    assert priced.step_time == pytest.approx(plan.predicted.step_time, rel=1e-9)
    assert priced.memory == plan.predicted.memory
    assert plan.bound <= plan.predicted.step_time


def test_frozen_weights_have_no_gradient_and_no_optimizer_state() -> None:
    cluster, job, fix = autopar.Cluster.parse("1x1:h100"), Job(8, 16), {"micro_batch": 4, "recompute": "none"}
    whole, part = (search(model_graph(make()), job, cluster, fix) for make in (small_llama, frozen_layers))
    model = frozen_layers()
    trains = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    held, fewer = whole.predicted.memory[0], part.predicted.memory[0]
    assert fewer["optimizer"] == 8 * trains, "two moments in float32"
    assert held["optimizer"] == 8 * sum(weight.numel() for weight in model.parameters())
    assert fewer["parameters"] == held["parameters"]
    assert fewer["gradients"] < held["gradients"]
    assert part.predicted.step_time < whole.predicted.step_time


def test_every_layer_is_recomputed_though_the_first_differs() -> None:
    """Below the first layer nothing trains: it is a kind of its own, with one block."""
    graph = model_graph(frozen_embedding())
    layers = [index for index, block in enumerate(graph.blocks) if block.path]
    assert graph.blocks[layers[0]].kind != graph.blocks[layers[1]].kind
    for fixed in ("full", "selective(attention)"):
        fix = {"micro_batch": 2, "recompute": fixed}
        plan = search(graph, Job(8, 16), autopar.Cluster.parse("1x1:h100"), fix)
        chosen = [plan.candidate_of(index).recompute for index in range(len(graph.blocks))]
        assert [index for index, name in enumerate(chosen) if name != "none"] == layers


def test_a_second_decision_does_not_take_another_kinds_class() -> None:
    """Frozen layers are a kind, those that train another: a second decision for the first has a name of its own."""
    variant = Variant("gpt2", False, 64, "half", 4)
    model, graph = build(variant), graph_of(variant)
    fix = {"tp": 4, "sp": True, "micro_batch": 1, "recompute": "2:full"}
    plan = search(graph, Job(2, SEQ, "fp32", "sgd"), autopar.Cluster.parse("1x4:h100"), fix, equal_blocks=False)
    layers = [(block.kind, plan.candidate_of(i).decision) for i, block in enumerate(graph.blocks) if block.path]
    different = {(kind, repr(decision.to_json())) for kind, decision in layers}
    assert len(different) > len({kind for kind, _ in layers}), "a kind is sharded in two ways"
    assert {kind for kind, _ in layers} >= {"GPT2Block", "GPT2Block2"}
    assert module_source(plan, graph).count("\nclass ") == len(different) + 1
    report = autopar.verify(plan, model)
    assert report.errors.keys() == {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert max(report.loss_error, report.worst[1]) < 1e-12


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "embedding dp4 zero3": (frozen_embedding, {"dp": 4, "zero": 3, "fsdp": 4}),
    "adapters dp2 tp2 zero2": (adapters, {"dp": 2, "tp": 2, "zero": 2, "fsdp": 2}),
    "layers pp2 dp2 zero1": (frozen_layers, {"pp": 2, "dp": 2, "zero": 1, "fsdp": 2, "stages": "3,3"}),
    "layers pp2 dp2 zbv": (
        frozen_layers,
        {"pp": 2, "dp": 2, "zero": 1, "fsdp": 2, "schedule": "zbv", "vpp": 2, "stages": "2,1,2,1"},
    ),
    "adapters pp2 dp2 dualpipev": (
        adapters,
        {"pp": 2, "dp": 2, "zero": 0, "schedule": "dualpipev", "vpp": 2, "stages": "1,2,2,1"},
    ),
    "embedding pp2 dp2 zbv": (
        frozen_embedding,
        {"pp": 2, "dp": 2, "zero": 0, "schedule": "zbv", "vpp": 2, "stages": "1,2,2,1"},
    ),
}
"""With frozen layers nothing of the first stage trains."""


@pytest.mark.proof
def test_frozen_parts_on_four_ranks(tmp_path: Path) -> None:
    ids = torch.randint(0, 256, (3, 8, 16), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": batch, "labels": batch} for batch in ids]
    for name, (make, fix) in CASES.items():
        model = make().double()
        graph = model_graph(model)
        one = {"pp": 1, "dp": 1, "cp": 1, "tp": 1, "recompute": "none", "micro_batch": 1}
        plan = search(graph, Job(8, 16, "fp32"), autopar.Cluster.parse("1x4:cpu"), one | fix)
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        reference = prove.one_device(model, batches, loss_of, steps=True)
        prove.prepare(tmp_path, {name: prove.with_dtype(plan, "fp64")}, graph, weights, reference)
    rows = prove.prove(tmp_path, ranks=4, timeout_s=200)
    assert {row.name for row in rows} == CASES.keys()
    assert [failure for row in rows for failure in row.failures()] == []


@pytest.mark.proof
@pytest.mark.parametrize("make", [frozen_layers, adapters])
def test_training_resumes_under_another_plan(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    """As an uninterrupted run goes on: checkpoints hold what is frozen too, and nothing of it moves."""
    model, job = make(), Job(8, 16, "fp64")
    graph = model_graph(model)
    tensor = search(
        graph, Job(8, 16, "fp32"), autopar.Cluster.parse("1x2:cpu"), {"tp": 2, "pp": 1, "dp": 1, "micro_batch": 4}
    )
    plans = {
        "data": replace(plain_plan(graph, dp=2, micro_batches=2, job=job), zero=3, fsdp=2),
        "tensor": prove.with_dtype(tensor, "fp64"),
        "stages": plain_plan(graph, pp=2, micro_batches=2, job=job),
    }
    (tmp_path / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog; " * 40)
    for name, plan in plans.items():
        emit(plan, graph, tmp_path / name, model.state_dict())
    whole = losses(tmp_path, "data", 2, "data.jsonl", "--checkpoint-dir", "ck", "--save-every", "2", "--any-topology")
    assert sorted(whole) == [1, 2, 3, 4, 5, 6]
    assert whole[6][0] < whole[1][0]
    saving = ("--checkpoint-dir", "ck2", "--save-every", "1", "--any-topology")
    staged = losses(tmp_path, "stages", 2, "stages.jsonl", "--resume", "ck/step_2", *saving)
    split = losses(tmp_path, "tensor", 2, "tensor.jsonl", "--resume", "ck2/step_4", "--any-topology")
    assert (sorted(staged), sorted(split)) == ([3, 4, 5, 6], [5, 6])
    assert all(close(later[step], whole[step]) for later in (staged, split) for step in later)

    state: dict[str, Any] = {"model": {name: torch.empty_like(weight).double() for name, weight in weights_of(model)}}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(state, checkpoint_id=tmp_path / "ck2" / "step_6")
    for name, weight in weights_of(model):
        moved = not torch.equal(state["model"][name], weight.detach().double())
        assert moved == weight.requires_grad, name
    kept = dcp.FileSystemReader(tmp_path / "ck2" / "step_6").read_metadata().state_dict_metadata
    moments = {name.removeprefix("optimizer.").removesuffix(".exp_avg") for name in kept if name.endswith(".exp_avg")}
    assert moments == {name for name, weight in weights_of(model) if weight.requires_grad}


def weights_of(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())


def loss_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    with keep_wide():
        return model(**batch).loss  # type: ignore[no-any-return]
