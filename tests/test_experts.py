"""Mixtures of experts: recognised by what they compute, traced as one operator, split, priced and proved."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from mixtures import CONFIGS, Apart, Below, Beyond, Stacked, StackedModel, mixture
from torch import nn

import autopar
from autopar.codegen.emit_module import module_source
from autopar.codegen.load import load_module
from autopar.codegen.ranks import local_ranks, per_rank
from autopar.codegen.runtime import experts as runtime
from autopar.codegen.typecheck import typecheck
from autopar.codegen.verify import verify_source
from autopar.errors import AutoparError, VerificationError
from autopar.graph import experts as reference
from autopar.graph.find_experts import Held, experts_form
from autopar.graph.ir import EXPERTS, IMBALANCE, Node, TensorMeta
from autopar.job import Job
from autopar.models import model_graph
from autopar.sharding.rules import has_rule
from autopar.solver.expert_work import EVEN
from autopar.solver.prices import exposed
from autopar.solver.search import search
from autopar.solver.stack_work import as_run, work_of
from autopar.solver.work import flops, work
from autopar.solver.work_parts import LocalTensor
from autopar.stack import stack_of

FORMS: dict[str, dict[str, Any]] = {
    "halves": {"gate": "halves", "activation": "silu"},
    "pairs": {"gate": "pairs", "transposed": True, "activation": "clamped_swish", "alpha": 1.7, "limit": 0.5},
    "none": {"gate": "none", "activation": "relu2"},
    "gelu": {"gate": "halves", "transposed": True, "activation": "gelu_tanh"},
    "clamped": {"gate": "halves", "activation": "clamped_silu", "limit": 0.5},
    "apart": {"gate": "apart", "activation": "silu"},
    "apart turned": {"gate": "apart", "transposed": True, "activation": "clamped_swish", "alpha": 1.7, "limit": 0.5},
}


def tensors(form: str, biases: bool, experts: int = 4, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Hidden states [3, 5, 8], choice, weights, and the parameters of experts of width 6."""
    drawn = torch.Generator().manual_seed(0)
    apart = FORMS[form]["gate"] == "apart"
    rows = 6 if apart or FORMS[form]["gate"] == "none" else 12
    shapes = (
        [(experts, 8, rows), (experts, 6, 8)]
        if FORMS[form].get("transposed")
        else [(experts, rows, 8), (experts, 8, 6)]
    )
    shapes += [(experts, rows), (experts, 8)] if biases else []
    shapes += [shapes[0], *([(experts, rows)] if biases else [])] if apart else []
    index = torch.rand(3, 5, experts, generator=drawn).argsort(-1)[..., :2]
    index[index == 3] = 1  # nobody chooses the last expert, and some tokens one twice
    made = [
        torch.randn(shape, generator=drawn, dtype=dtype).requires_grad_() for shape in [(3, 5, 8), (3, 5, 2), *shapes]
    ]
    given: list[Any] = [made[0], index, *made[1:]]
    return given if biases or not apart else [*given[:5], None, None, *given[5:]]


def by_hand(
    form: str, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, *parameters: torch.Tensor
) -> torch.Tensor:
    """The definition, token by token."""
    options = dict(FORMS[form])
    transposed = options.pop("transposed", False)
    up, down, *rest = parameters
    biases, values = (rest[:2] if rest and rest[0] is not None else []), rest[2:]
    rows = []
    for x, chosen, share in zip(hidden.flatten(0, 1), index.flatten(0, 1), weights.flatten(0, 1), strict=True):
        total = torch.zeros_like(x)
        for expert, weight in zip(chosen, share, strict=True):
            first, second = (up[expert].T, down[expert].T) if transposed else (up[expert], down[expert])
            y = first @ x + (biases[0][expert] if biases else 0)
            if values:
                other = (values[0][expert].T if transposed else values[0][expert]) @ x
                options["values"] = other + (values[1][expert] if biases else 0)
            y = second @ reference.activated(y, **options) + (biases[1][expert] if biases else 0)
            total = total + weight * y
        rows.append(total)
    return torch.stack(rows).view_as(hidden)


def outcome(result: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    probe = torch.randn(result.shape, generator=torch.Generator().manual_seed(1), dtype=result.dtype)
    return [result, *torch.autograd.grad(result, [x for x in inputs if x is not None and x.requires_grad], probe)]


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_operator_and_emitted_function_compute_the_definition(form: str, biases: bool) -> None:
    given = tensors(form, biases)
    wanted = outcome(by_hand(form, *given), given)
    for result in (reference.experts(*given, experts=4, **FORMS[form]), runtime.experts(*given, **FORMS[form])):
        for found, right in zip(outcome(result, given), wanted, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_experts_split_over_ranks_add_up(form: str) -> None:
    """On simulated ranks, which hold different numbers of rows; and what each of them adds."""
    given = tensors(form, biases=True)
    whole = runtime.experts(*given, **FORMS[form]).detach()
    with local_ranks({"dp": 1, "tp": 2}) as mesh, torch.no_grad():
        shared = [per_rank([x.detach()] * 2) for x in given[:3]]
        split = [per_rank([part.clone() for part in x.detach().chunk(2)]) for x in given[3:]]
        parts = runtime.experts(*shared, *split, **FORMS[form], axis=mesh["tp"])
        found = [parts._local_tensors[rank] for rank in range(2)]
    torch.testing.assert_close(found[0] + found[1], whole, rtol=1e-12, atol=1e-12)
    for rank, part in enumerate(found):
        own = reference.experts(
            *given[:3], *(x.chunk(2)[rank] for x in given[3:]), experts=4, first=2 * rank, **FORMS[form]
        )
        torch.testing.assert_close(part, own.detach(), rtol=1e-12, atol=1e-12)


FOUND = {
    "mixtral": {"experts": 4, "gate": "halves", "transposed": False, "activation": "silu"},
    "qwen3_moe": {"experts": 8, "gate": "halves", "transposed": False, "activation": "silu"},
    "deepseek_v3": {"experts": 8, "gate": "halves", "transposed": False, "activation": "silu"},
    "gpt_oss": {
        "experts": 4, "gate": "pairs", "transposed": True, "activation": "clamped_swish", "alpha": 1.702, "limit": 7.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", FOUND)
def test_experts_of_transformers_are_recognised(kind: str, implementation: str) -> None:
    with torch.device("meta"):
        model = mixture(kind, experts_implementation=implementation)
    forms = [form for module in model.modules() if (form := experts_form(module, {})) is not None]
    assert [dict(form.options) for form in forms] == [FOUND[kind]] * 2


def test_experts_of_a_user_are_recognised_by_what_they_compute() -> None:
    form = experts_form(Stacked(), {})
    assert form is not None
    assert form.parameters == (Held(("rise",)), Held(("fall",)), None, None)
    assert dict(form.options) == {"experts": 4, "gate": "none", "transposed": True, "activation": "relu2"}
    assert experts_form(Stacked(twice=True), {}) is None
    assert experts_form(nn.Linear(4, 4), {}) is None


def test_experts_below_one_another_in_matrices_are_recognised_and_split() -> None:
    form = experts_form(Below(), {})
    assert form is not None
    assert form.parameters[:2] == (Held(("held.gate", "held.up"), 4), Held(("held.down",), 4, turned=True))
    assert dict(form.options) == {"experts": 4, "gate": "halves", "transposed": False, "activation": "gelu"}
    torch.manual_seed(0)
    model = StackedModel(made=Below)
    for fix in ({"tp": 2, "dp": 2}, {"cp": 4}):
        plan = autopar.search(model, Job(8, 16), autopar.Cluster.parse("1x4:h100"), fix=fix, gap=0.5)
        assert autopar.verify(plan, model).worst[1] < 1e-12


def test_gate_and_values_apart_are_recognised_split_inside_and_shared() -> None:
    form = experts_form(Apart(), {})
    assert form is not None
    assert [held and held.names for held in form.parameters] == [
        ("w1",), ("w2",), ("bias",), ("last",), ("w3",), ("other",)
    ]  # fmt: skip
    assert dict(form.options) == {"experts": 4, "gate": "apart", "transposed": False, "activation": "silu"}
    torch.manual_seed(0)
    model = StackedModel(made=Apart)
    graph = model_graph(model)
    plans: list[dict[str, Any]] = [{"tp": 4, "sp": True}, {"tp": 8}, {"ep": 4, "dp": 4}, {"ep": 2, "dp": 2, "tp": 2}]
    for fix in plans:
        ranks = fix.get("dp", 1) * fix.get("tp", 1)
        plan = autopar.search(model, Job(8, 16), autopar.Cluster.parse(f"1x{ranks}:h100"), fix=fix, gap=0.5)
        assert autopar.verify(plan, model).worst[1] < 1e-12
        typecheck(plan, graph, ranks)
        if fix.get("tp") == 8:  # more than there are experts: what is split is the width inside them
            text = module_source(plan, graph)
            assert "w1=new.split(4, 24, 16, tp=1)" in text
            assert "w2=new.split(4, 16, 24, tp=2)" in text
            assert "w3=new.split(4, 24, 16, tp=1)" in text


def test_experts_beyond_those_with_matrices_give_back_what_they_are_given() -> None:
    form = experts_form(Beyond(), {})
    assert form is not None
    assert form.beyond
    assert form.parameters[:2] == (Held(("rise",), first=2), Held(("fall",)))
    assert form.options["experts"] == 2
    torch.manual_seed(0)
    model = StackedModel(made=Beyond)
    for fix in ({"tp": 4}, {"dp": 2, "cp": 2}):
        plan = autopar.search(model, Job(8, 16), autopar.Cluster.parse("1x4:h100"), fix=fix, gap=0.5)
        assert autopar.verify(plan, model).worst[1] < 1e-12


def test_experts_that_compute_something_else_are_refused_with_their_place() -> None:
    model = StackedModel()
    model.layers[1].experts.twice = True
    with pytest.raises(AutoparError, match=r"layers\.1\.experts.*Stacked"):
        model_graph(model)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_mixture_is_traced_whole(kind: str) -> None:
    """The experts are one operator on [b, s, ...]; every operator around them has a rule."""
    graph = model_graph(mixture(kind))
    nodes = [node for each in graph.kinds.values() for node in each.graph.of("op")]
    found = [node for node in nodes if node.op == EXPERTS]
    assert found
    assert all(len(node.meta.shape) == 3 for node in found)
    assert not [node for each in graph.kinds.values() for node in each.graph.of("op") if not has_rule(node, each.graph)]
    assert not [
        node
        for node in nodes
        if node.op in ("aten.flatten", "aten.unflatten") and node.args[1] == 0 and "mlp" in node.module
    ]


PLANS: dict[str, dict[str, Any]] = {
    "dp": {"dp": 4, "zero": 0},
    "tp": {"tp": 2, "dp": 2},
    "tp sp": {"tp": 4, "sp": True},
    "cp": {"cp": 2, "tp": 2},
    "pp": {"pp": 2, "dp": 2},
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_plans_are_proved(kind: str, name: str) -> None:
    model = mixture(kind)
    plan = autopar.search(model, Job(8, 16), autopar.Cluster.parse("1x4:h100"), fix=PLANS[name], gap=0.5)
    report = autopar.verify(plan, model)
    assert report.worst[1] < 1e-12
    typecheck(plan, model_graph(model), 8)
    split = {
        strategy["tp"]
        for candidate in plan.candidates.values()
        for node, strategy in candidate.decision.strategies.items()
        if node.startswith("experts") and "tp" in strategy
    }
    assert split <= {"e", "f"}
    assert bool(split) == ("tp" in PLANS[name])


SHARED: dict[str, dict[str, Any]] = {
    "ep2 dp4": {"dp": 4, "ep": 2, "zero": 3},
    "ep2 dp2 tp2": {"dp": 2, "tp": 2, "ep": 2, "zero": 1},
    "ep4 dp2 cp2": {"dp": 2, "cp": 2, "ep": 4, "zero": 2},
    "ep2 pp2": {"pp": 2, "dp": 2, "ep": 2, "zero": 1},
}


@pytest.mark.parametrize(("kind", "name"), [*(("mixtral", name) for name in SHARED), ("gpt_oss", "ep2 dp2 tp2")])
def test_plans_that_share_experts_are_proved(kind: str, name: str) -> None:
    model = mixture(kind)
    plan = autopar.search(model, Job(8, 16), autopar.Cluster.parse("1x4:h100"), fix=SHARED[name], gap=0.5)
    assert plan.mesh.ep == SHARED[name]["ep"]
    assert autopar.verify(plan, model).worst[1] < 1e-12
    graph = model_graph(model)
    typecheck(plan, graph, 8)
    text = module_source(plan, graph)
    assert "ep=self.ep" in text
    assert f"new.split({FOUND[kind]['experts']}, " in text
    assert autopar.Plan.from_json(plan.to_json()) == plan


def test_a_wrong_place_of_experts_is_noticed() -> None:
    model = mixture("mixtral")
    plan = autopar.search(model, Job(8, 16), autopar.Cluster.parse("1x4:h100"), fix=SHARED["ep2 dp4"], gap=0.5)
    plan = replace(plan, job=replace(plan.job, dtype="fp64"))
    graph = model_graph(model)
    source = module_source(plan, graph)
    assert verify_source(source, plan, model, graph).worst[1] < 1e-12
    broken = source.replace("ep=self.ep", "ep=None")
    with pytest.raises((VerificationError, RuntimeError)):
        verify_source(broken, plan, model, graph)


def test_sharing_experts_is_priced_and_counted() -> None:
    """Of experts a rank holds less and reads less, and exchanges tokens; what its shard groups keep is as before."""
    graph, cluster = model_graph("qwen3-30b-a3b"), autopar.Cluster.parse("8x8:h100")
    one = {"pp": 1, "cp": 1, "tp": 1, "fsdp": 64, "micro_batch": 1, "recompute": "full"}
    near, far = (search(graph, Job(512, 4096), cluster, one | {"zero": 1, "ep": ep}) for ep in (8, 64))
    here, there = near.predicted.memory[0], far.predicted.memory[0]
    experts = 48 * 128 * 3 * 2048 * 768
    assert here["parameters"] - there["parameters"] == pytest.approx(2 * experts * (1 / 8 - 1 / 64), rel=1e-6)
    assert here["optimizer"] == pytest.approx(there["optimizer"], rel=1e-6)
    alone, shared = (search(graph, Job(512, 4096), cluster, one | {"zero": 3, "ep": ep}) for ep in (1, 8))
    assert alone.predicted.memory[0]["optimizer"] == pytest.approx(here["optimizer"], rel=1e-6)
    assert alone.predicted.memory[0]["gradients"] == pytest.approx(shared.predicted.memory[0]["gradients"], rel=0.02)
    talks = [plan.predicted.breakdown["model axis communication"] for plan in (alone, near, far)]
    assert talks[0] == 0.0 < talks[1] < talks[2]  # within a node, then between nodes
    assert shared.predicted.breakdown["data axis"] < alone.predicted.breakdown["data axis"]


@pytest.mark.parametrize(
    ("fix", "reason"),
    [
        ({"dp": 4, "ep": 3}, "ep=3"),
        ({"dp": 2, "tp": 2, "ep": 4}, "ep=4"),
        ({"dp": 4, "ep": 2, "offload": "state"}, "state that waits on the host"),
        ({"dp": 2, "pp": 2, "ep": 2, "schedule": "zbv"}, "exchanges of tokens"),
        ({"dp": 2, "pp": 2, "ep": 2, "order": "dp,pp,cp,tp"}, "default order"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_name(fix: dict[str, Any], reason: str) -> None:
    graph = model_graph(mixture("mixtral"))
    with pytest.raises(AutoparError, match=reason):
        search(graph, Job(8, 16), autopar.Cluster.parse("1x4:h100"), fix)


def test_a_model_without_experts_shares_none() -> None:
    with pytest.raises(AutoparError, match="has no experts to share"):
        search(model_graph("llama3.2-1b"), Job(8, 64), autopar.Cluster.parse("1x4:h100"), {"dp": 4, "ep": 2})


@pytest.mark.parametrize(
    ("name", "billions"),
    [("mixtral-8x22b", 140.6), ("qwen3-30b-a3b", 30.5), ("deepseek-v3", 671.0), ("gpt-oss-20b", 20.9)],
)
def test_catalog_mixtures_have_their_published_size(name: str, billions: float) -> None:
    assert model_graph(name).count_parameters() == pytest.approx(billions * 1e9, rel=2e-3)


def test_the_written_call_is_readable() -> None:
    model = mixture("mixtral")
    plan = autopar.search(model, Job(8, 16), autopar.Cluster.parse("1x4:h100"), fix={"tp": 4, "sp": True}, gap=0.5)
    text = module_source(plan, model_graph(model))
    assert "from runtime.experts import experts" in text
    assert "axis=self.tp" in text
    assert "chosen = " in text
    load_module(text)


def node(held: int, experts: int) -> Node:
    return Node("y", "op", TensorMeta((4096, 64)), EXPERTS, (), {"experts": experts, "gate": "halves"})


def test_work_counts_the_rows_of_chosen_experts() -> None:
    shapes = [(4096, 64), (4096, 2), (4096, 2), (8, 96, 64), (8, 64, 48)]
    operands = [LocalTensor(shape, 2) for shape in shapes]
    forward, backward = work(node(8, 8), operands, LocalTensor((4096, 64), 2), [True] * 5)
    products = 2 * 4096 * 2 * (96 * 64 + 64 * 48)
    assert forward.flops == products == flops(node(8, 8), shapes, (4096, 64))
    assert backward.flops == 2 * products
    assert forward.matmuls[0] == (8, 1024, 96, 64)
    # A quarter of the experts: the slowest rank has more than its share.
    part = [LocalTensor(shape, 2) for shape in (*shapes[:3], (2, 96, 64), (2, 64, 48))]
    forward, _ = work(node(2, 8), part, LocalTensor((4096, 64), 2), [True] * 5)
    assert forward.flops == pytest.approx(products / 4 * IMBALANCE[0] / IMBALANCE[1], rel=1e-3)
    # Fewer rows than experts: only as many matrices are read.
    few = [LocalTensor(shape, 2) for shape in ((2, 64), (2, 2), (2, 2), *shapes[3:])]
    assert work(node(8, 8), few, LocalTensor((2, 64), 2), [True] * 5)[0].matmuls[0].batch == 4


def test_stacks_run_experts_otherwise() -> None:
    operands = [LocalTensor(shape, 2) for shape in ((4096, 64), (4096, 2), (4096, 2), (2, 96, 64), (2, 64, 48))]
    given = (node(2, 8), operands, LocalTensor((4096, 64), 2), [True] * 5)
    emitted, megatron = stack_of("torch"), stack_of("megatron")
    assert work_of(*given, emitted) == work(*given)
    forward, backward = work_of(*given, megatron)
    assert forward.flops == pytest.approx(work(*given)[0].flops * megatron.imbalance / EVEN, rel=1e-3)
    # A kernel for each of two experts, and for its cast where operands are narrow.
    whole = replace(megatron, grouped=True)
    for part, matmuls in ((0, 2), (1, 4)):
        kernels = [as_run(given[0], forward, backward, 2, stack)[part].kernels for stack in (megatron, whole)]
        narrow = [as_run(given[0], forward, backward, 2, stack, 1.0)[part].kernels for stack in (megatron, whole)]
        assert kernels[0] - kernels[1] == matmuls
        assert narrow[0] - narrow[1] == matmuls + 2
    assert as_run(given[0], forward, backward, 2, emitted) == (forward, backward)


def test_exchanges_hide_behind_as_much_as_experts_take() -> None:
    plain, hiding = stack_of("megatron"), stack_of("megatron-graphs")
    assert exposed(3.0, 2.0, plain) == 3.0
    assert (exposed(3.0, 2.0, hiding), exposed(1.0, 2.0, hiding)) == (1.0, 0.0)
