"""The emitted module under the type checker of `spmd_types`, global mode, 8, 64 and 512 ranks."""

from __future__ import annotations

import pytest
from hand_plans import Graphs, attention_of, gpt2, graph_of, llama, megatron, on_axes, plan_of, whole

from autopar.cluster import Cluster
from autopar.codegen.emit_block import FUNCTIONS
from autopar.codegen.emit_module import module_source
from autopar.codegen.runtime import collectives
from autopar.codegen.typecheck import TWINS, typecheck
from autopar.errors import BadInputError, VerificationError
from autopar.job import Job
from autopar.plan import Mesh, Plan
from autopar.solver.search import search

GRAPHS = Graphs({"llama": llama(2), "gpt2": gpt2(2)})


def plan(model: str, name: str) -> Plan:
    graph = GRAPHS[model]
    if name == "dp":
        return plan_of(graph, whole(graph), Mesh(dp=4))
    if name.startswith("tp4"):
        return plan_of(graph, megatron(graph, 4, "sp" in name), Mesh(tp=4))
    return plan_of(graph, megatron(graph, 2, True), Mesh(pp=2, tp=2), bounds=(2,), recompute="full")


def test_every_collective_has_a_twin() -> None:
    assert set(TWINS) == set(FUNCTIONS.values())
    assert all(callable(getattr(collectives, name)) for name in TWINS)


@pytest.mark.parametrize("ranks", [8, 64])
@pytest.mark.parametrize("name", ["dp", "tp4", "tp4 sp", "pp2 tp2 full"])
@pytest.mark.parametrize("model", GRAPHS)
def test_emitted_modules_type_check(model: str, name: str, ranks: int) -> None:
    typecheck(plan(model, name), GRAPHS[model], ranks)


@pytest.mark.parametrize("model", GRAPHS)
@pytest.mark.parametrize("fix", [{"tp": 4}, {"tp": 2, "dp": 2}], ids=str)
def test_plans_of_the_search_type_check(model: str, fix: dict[str, object]) -> None:
    found = search(GRAPHS[model], Job(8, 32), Cluster.parse("1x4:h100"), fix)
    for ranks in (8, 64):
        typecheck(found, GRAPHS[model], ranks)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("reduce_scatter(o, self.tp, 1)", "shard(o, self.tp, 1)"),
        ("reduce_scatter(o, self.tp, 1)", "reduce_scatter(o, self.tp, 2)"),
        ("reduce_scatter(down, self.tp, 1)", "all_reduce_invariant(down, self.tp)"),
        ("all_gather(normed, self.tp, 1)", "all_gather_invariant(normed, self.tp, 1)"),
        ("all_gather(normed, self.tp, 1)", "normed"),
        ("replicate(self.input_layernorm.weight.to_local(), self.tp)", "self.input_layernorm.weight.to_local()"),
        ("o_proj=Weights(weight=new.split(64, 64, tp=1)", "o_proj=Weights(weight=new.split(64, 64, tp=0)"),
    ],
)
def test_a_wrong_collective_is_caught(old: str, new: str) -> None:
    chosen = plan("llama", "tp4 sp")
    source = module_source(chosen, GRAPHS["llama"])
    assert old in source
    names = "import all_gather, all_gather_invariant, all_reduce_invariant, shard,"
    wrong = source.replace(old, new, 1).replace("import all_gather,", names)
    with pytest.raises(VerificationError, match="does not type-check"):
        typecheck(chosen, GRAPHS["llama"], 8, wrong)
    typecheck(chosen, GRAPHS["llama"], 8, source)


MESHES = {
    "cp2 tp2 sp": Mesh(cp=2, tp=2),
    "cp4 heads": Mesh(cp=4),
    "cp4 ring": Mesh(cp=4),
    "cp2 tp2 sp ring": Mesh(cp=2, tp=2),
    "tp2x2 sp": Mesh(tp=4, tp_parts=(2, 2)),
    "cp2 tp2x2": Mesh(cp=2, tp=4, tp_parts=(2, 2)),
}


def several(model: str, name: str) -> Plan:
    graph, mesh = GRAPHS[model], MESHES[name]
    return plan_of(graph, on_axes(graph, mesh, "sp" in name, attention_of(name)), mesh)


@pytest.mark.parametrize("ranks", [8, 64, 512])
@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("model", GRAPHS)
def test_modules_on_several_axes_type_check(model: str, name: str, ranks: int) -> None:
    typecheck(several(model, name), GRAPHS[model], ranks)


def test_an_uneven_vocabulary_type_checks() -> None:
    graph = graph_of(llama(2, vocab_size=250))
    mesh = Mesh(cp=2, tp=4)
    typecheck(plan_of(graph, on_axes(graph, mesh, True), mesh), graph, 64)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("k = all_gather(k, self.cp, 2, balanced=True)", "k = all_gather(k, self.tp, 2, balanced=True)"),
        ("v = all_gather(v, self.cp, 2, balanced=True)", "v = all_gather_invariant(v, self.cp, 2, balanced=True)"),
        ("v = all_gather(v, self.cp, 2, balanced=True)", "v = v"),
        (
            "context_attention(q, k, v, self.cp, balanced=True,",
            "F.scaled_dot_product_attention(q, k, v, is_causal=True,",
        ),
        ("cos = shard(cos, self.cp, 2, balanced=True)", "cos = shard(cos, self.tp, 2)"),
        ("cos = shard(cos, self.cp, 2, balanced=True)", "cos = cos"),
        ("reduce_scatter(o, self.tp, 1)", "reduce_scatter(o, self.cp, 1)"),
        ("reduce_scatter(o, self.tp, 1)", "all_reduce(o, self.tp)"),
        ("labels[:, 1:], self.cp, 1, balanced=True", "labels[:, 1:], self.tp, 1"),
        ("vocab_cross_entropy(logits, labels, self.tp)", "vocab_cross_entropy(logits, labels, self.cp)"),
        ("k_proj=Weights(weight=new.split(32, 64, tp=0)", "k_proj=Weights(weight=new.whole(32, 64)"),
    ],
)
def test_a_wrong_axis_or_collective_is_caught_on_several_axes(old: str, new: str) -> None:
    chosen = several("llama", "cp2 tp2 sp")
    source = module_source(chosen, GRAPHS["llama"])
    assert old in source
    names = "from runtime.collectives import all_gather_invariant, all_reduce\nfrom runtime.collectives"
    wrong = source.replace(old, new, 1).replace("from runtime.collectives", names, 1)
    with pytest.raises(VerificationError, match="does not type-check"):
        typecheck(chosen, GRAPHS["llama"], 8, wrong)


def test_ranks_that_the_axes_do_not_divide_are_refused() -> None:
    with pytest.raises(BadInputError, match="multiple"):
        typecheck(plan("llama", "tp4"), GRAPHS["llama"], 6)
