"""Single-process proof of plans on several model axes: context parallelism, tensor parallelism in parts, and both."""

from __future__ import annotations

import pytest
import torch
from hand_plans import Axis, Graphs, attention_of, decide, gpt2, graph_of, llama, on_axes, plan_of
from torch import nn

from autopar.cluster import Cluster
from autopar.codegen import twin
from autopar.codegen.emit_module import module_source
from autopar.codegen.typecheck import typecheck
from autopar.codegen.verify import verify, verify_source
from autopar.errors import UnsupportedError, VerificationError
from autopar.graph.ir import ModelGraph
from autopar.job import Job
from autopar.models import model_graph
from autopar.plan import Mesh, Plan
from autopar.sharding.layout import P, R, S
from autopar.solver.search import search

MODELS = {"llama": llama(2), "gpt2": gpt2(2)}
GRAPHS = Graphs(MODELS)
MESHES = {
    "cp4": Mesh(cp=4),
    "cp2 tp2 sp": Mesh(cp=2, tp=2),
    "dp2 cp2 heads": Mesh(dp=2, cp=2),
    "cp2 tp2 sp heads": Mesh(cp=2, tp=2),
    "cp4 ring": Mesh(cp=4),
    "pp2 cp2 tp2 sp ring": Mesh(pp=2, cp=2, tp=2),
    "cp2 tp2x2": Mesh(cp=2, tp=4, tp_parts=(2, 2)),
    "pp2 cp2 tp2 sp": Mesh(pp=2, cp=2, tp=2),
}


def plan(graph: ModelGraph, name: str, seq_len: int = 16) -> Plan:
    mesh = MESHES[name]
    decisions = on_axes(graph, mesh, "sp" in name, attention_of(name))
    return plan_of(graph, decisions, mesh, (2,) if mesh.pp > 1 else (), micro_batch=1, seq_len=seq_len)


CASES = [("llama", name) for name in MESHES] + [("gpt2", name) for name in ("cp2 tp2 sp", "cp2 tp2x2")]


@pytest.mark.parametrize(("model", "name"), CASES)
def test_loss_and_gradients_equal_the_single_device(model: str, name: str) -> None:
    report = verify(plan(GRAPHS[model], name), MODELS[model])
    assert report.loss_error <= 1e-12
    assert report.worst[1] <= 1e-12
    assert set(report.errors) == set(GRAPHS[model].parameters)
    assert report.twin == ""


@pytest.mark.parametrize(
    ("model", "vocabulary", "mesh"),
    [
        ("llama", 250, Mesh(tp=4)),
        ("llama", 257, Mesh(cp=2, tp=4, tp_parts=(2, 2))),
        ("gpt2", 257, Mesh(tp=4)),
    ],
    ids=str,
)
def test_vocabularies_that_do_not_divide(model: str, vocabulary: int, mesh: Mesh) -> None:
    uneven = {"llama": llama, "gpt2": gpt2}[model](2, vocab_size=vocabulary)
    graph = graph_of(uneven)
    chosen = plan_of(graph, on_axes(graph, mesh, True), mesh, micro_batch=1)
    assert f"vocabulary={vocabulary}" in module_source(chosen, graph)
    assert verify(chosen, uneven).worst[1] <= 1e-12


def test_sequences_are_in_balanced_order_where_that_helps() -> None:
    graph = GRAPHS["llama"]
    assert "balanced=True" in module_source(plan(graph, "cp4"), graph)
    assert "balanced order" in module_source(plan(graph, "cp4"), graph)
    assert "balanced" not in module_source(
        plan(graph, "dp2 cp2 heads"), graph
    )  # attention by heads is balanced as it is
    odd = plan(graph, "cp4", seq_len=12)  # no even number of chunks for each rank
    assert "balanced" not in module_source(odd, graph)
    assert verify_source(module_source(odd, graph), odd, MODELS["llama"], graph).worst[1] <= 1e-12
    odd = plan(graph, "cp4 ring", seq_len=12)
    assert "ring_attention(q, k, v, self.cp, is_causal=True" in module_source(odd, graph)
    assert verify_source(module_source(odd, graph), odd, MODELS["llama"], graph).worst[1] <= 1e-12


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("k = all_gather(k, self.cp, 2, balanced=True)", "k = all_gather(k, self.cp, 2)"),
        ("cos = shard(cos, self.cp, 2, balanced=True)", "cos = shard(cos, self.cp, 2)"),
        ("labels[:, 1:], self.cp, 1, balanced=True", "labels[:, 1:], self.cp, 1"),
        ("context_attention(q, k, v, self.cp, balanced=True", "context_attention(q, k, v, self.cp"),
        ("ring_attention(q, k, v, self.cp, balanced=True", "ring_attention(q, k, v, self.cp"),
    ],
)
def test_an_order_that_is_not_the_others_is_caught(old: str, new: str) -> None:
    name = "cp4 ring" if "ring" in old else "cp2 tp2 sp"
    chosen, graph = plan(GRAPHS["llama"], name), GRAPHS["llama"]
    source = module_source(chosen, graph)
    assert old in source
    with pytest.raises(VerificationError, match="differs from the single device"):
        verify_source(source.replace(old, new, 1), chosen, MODELS["llama"], graph)


def test_a_plan_too_large_is_verified_with_two_ranks_on_each_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twin, "MOST_RANKS", 15)
    model = llama(2, hidden_size=128, num_attention_heads=16, num_key_value_heads=8, vocab_size=250)
    graph = graph_of(model)
    mesh = Mesh(dp=2, cp=4, tp=8, tp_parts=(2, 4))
    chosen = plan_of(graph, on_axes(graph, mesh, True), mesh, seq_len=4096)
    small = twin.small_twin(chosen, model, graph, model_graph)
    assert small.plan.mesh == Mesh(dp=2, cp=2, tp=4, tp_parts=(2, 2))
    assert all(c.decision.axes == {"cp": 2, "tp0": 2, "tp1": 2} for c in small.plan.candidates.values())
    assert "vocabulary=" in module_source(small.plan, small.graph)
    report = verify(chosen, model)
    assert report.worst[1] <= 1e-12
    assert "dp=2 x cp=2 x tp=2x2" in report.twin


def test_parameters_that_cannot_be_stored_so_are_refused() -> None:
    from autopar.codegen.members import parameter_expr
    from autopar.codegen.source import statement
    from autopar.sharding.layout import Layout
    from autopar.sharding.local import least_part

    axes = {"cp": 2, "tp0": 2, "tp1": 4}
    for text, reason in (
        ("cp:I tp0:S(0)", "on cp a parameter is R"),
        ("cp:R tp0:S(0, 3)", "whole slices"),
        ("cp:R tp1:S(0) tp0:S(0)", "mesh's order"),
        ("cp:R tp0:S(1) tp1:S(1)", "leave ranks without any"),
    ):
        with pytest.raises(UnsupportedError, match=reason):
            parameter_expr(Layout.parse(text), (96, 9), axes, "w")
    # 13 over 3 x 2 is 3 2, 3 2, 2 1: every rank has some, as check_decision finds too.
    stored = parameter_expr(Layout.parse("tp0:S(0) tp1:S(0)"), (13, 8), {"tp0": 3, "tp1": 2}, "w")
    assert statement("", stored, str, 0) == ["new.split(13, 8, tp0=0, tp1=0)"]
    assert (least_part(13, (3, 2)), least_part(9, (2, 4)), least_part(9, (4, 2))) == (1, 0, 0)


def test_a_stage_index_counts_all_stages_of_all_ranks() -> None:
    """Four stages on two ranks: the module knows stages by their place in the model, whatever rank they sit on."""
    import dataclasses

    from autopar.codegen.load import load_module
    from autopar.codegen.ranks import fake_mesh

    model = llama(2)
    graph = GRAPHS["llama"]
    base = plan_of(graph, on_axes(graph, Mesh(tp=2)), Mesh(pp=4, tp=2), (1, 2, 3))
    chosen = dataclasses.replace(base, mesh=Mesh(pp=2, dp=2, tp=2), vpp=2, schedule="interleaved")
    chosen = dataclasses.replace(chosen, job=dataclasses.replace(chosen.job, global_batch=8))
    with fake_mesh({"pp": 2, "dp": 2, "tp": 2}) as mesh:
        module = load_module(module_source(chosen, graph))
        stages = [module.build_stage(index, mesh, torch.device("cpu"), meta=True) for index in range(4)]
    held = [{name for name, _ in stage.named_parameters()} for stage in stages]
    assert set().union(*held) == set(GRAPHS["llama"].parameters)
    assert sum(map(len, held)) == len(GRAPHS["llama"].parameters)
    assert verify(chosen, model).worst[1] <= 1e-12


def test_ways_to_two_layouts_that_begin_alike_have_their_beginning_once() -> None:
    """``x`` is read as R, S(2) and as R, R: both by way of R, I."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, 4)
            self.a, self.b = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(input_ids)
            return (self.a(x) * self.b(x)).sum()

    model, inputs = Two(), {"input_ids": torch.arange(8)}
    graph, mesh = model_graph(model, inputs), Mesh(tp=4, tp_parts=(2, 2))
    [kind] = graph.kinds.values()
    axes = {"tp0": Axis({"a": (R, R), "b": (R, R)}), "tp1": Axis({"a": (S(2), P), "b": (R, R)})}
    decision = decide(kind, mesh.model_axes(), axes)
    assert [str(c.target) for c in decision.conversions if c.tensor == "embed"] == ["tp0:R tp1:S(2)", "tp0:R tp1:R"]
    chosen = plan_of(graph, {kind.name: decision}, mesh)
    assert module_source(chosen, graph).count("(embed, self.tp0)") == 1
    assert verify(chosen, model, inputs).worst[1] <= 1e-12


@pytest.mark.parametrize(
    ("model", "fix"), [("llama", {"cp": 2, "tp": 2, "sp": True}), ("gpt2", {"cp": 2, "tp": 2})], ids=str
)
def test_plans_of_the_search_are_right(model: str, fix: dict[str, object]) -> None:
    found = search(GRAPHS[model], Job(8, 32), Cluster.parse("1x4:h100"), fix)
    assert verify(found, MODELS[model]).worst[1] <= 1e-12
    typecheck(found, GRAPHS[model], 64)
