"""The order in which ranks go through mesh axes: where ranks lie, what that costs, how it is chosen, told, emitted."""

from __future__ import annotations

import dataclasses
import json
from itertools import permutations, product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from explained import JOB, small
from hand_plans import graph_of, llama, megatron, on_axes, plan_of
from small_plan import small_plan
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from autopar.cluster import Cluster
from autopar.codegen.emit import emit
from autopar.codegen.loading import load_train
from autopar.codegen.verify import verify
from autopar.errors import BadInputError, UnsupportedError
from autopar.graph.ir import ModelGraph
from autopar.job import Job
from autopar.mesh import AXES, Mesh, Span, cut, same_ranks
from autopar.models import model_graph
from autopar.plan import Plan
from autopar.report.diff import diff
from autopar.report.diff_text import diff_text
from autopar.report.record import plan_record
from autopar.report.text import plan_text
from autopar.report.why_not import why_not
from autopar.schedule import SCHEDULES
from autopar.solver.collective_costs import CollectiveCosts, Placement
from autopar.solver.rank_order import STAGES_NEAR, orders_of, transfers
from autopar.solver.reprice import price_plan
from autopar.solver.search import search

ORDERS = tuple(permutations(AXES))


def coordinates(mesh: Mesh) -> list[dict[str, int]]:
    """The place of every rank on every axis, counted one by one."""
    axes = mesh.ranked_axes()
    return [dict(zip(axes, place, strict=True)) for place in product(*map(range, axes.values()))]


def groups_of(mesh: Mesh, key: tuple[str, ...]) -> list[list[int]]:
    """Ranks that are alike in all axes but those of ``key``."""
    found: dict[tuple[int, ...], list[int]] = {}
    for rank, place in enumerate(coordinates(mesh)):
        found.setdefault(tuple(at for axis, at in place.items() if axis not in key), []).append(rank)
    return list(found.values())


def worst(groups: list[list[int]], per_node: int) -> Placement:
    """Most nodes, fewest ranks on one."""
    nodes = [[rank // per_node for rank in group] for group in groups]
    fewest = min(min(some.count(node) for node in some) for some in nodes)
    return Placement(len(groups[0]), max(len(set(some)) for some in nodes), fewest)


@pytest.mark.parametrize("order", ORDERS)
def test_groups_lie_on_nodes_as_counted_one_by_one(order):
    costs = CollectiveCosts(Cluster.parse("8x8:h100"))
    for pp, dp, cp, tp in [(4, 4, 2, 2), (2, 16, 1, 2), (8, 2, 2, 2), (1, 8, 2, 4), (16, 1, 4, 1)]:
        mesh = Mesh(pp, dp, cp, tp, order=order)
        strides = mesh.strides()
        for axis, size in mesh.axes().items():
            assert costs.placement(size, strides[axis]) == worst(groups_of(mesh, (axis,)), 8)
        if mesh.data > 1:
            assert costs.spread(mesh.data_span()) == worst(groups_of(mesh, ("dp", "cp")), 8)
        near = costs.near(pp, strides["pp"])
        for place in range(pp):
            pairs = [(ranks[place], ranks[(place + 1) % pp]) for ranks in groups_of(mesh, ("pp",))]
            assert near[place] == all(here // 8 == there // 8 for here, there in pairs)


@pytest.mark.parametrize("order", [AXES, STAGES_NEAR, ("cp", "dp", "pp", "tp"), ("dp", "tp", "cp", "pp")])
def test_shard_groups_are_neighbouring_data_ranks(order):
    """Of the data ranks, those of cp first, then those of dp: a group and its replicas, for every size."""
    mesh = Mesh(2, 4, 2, 2, order=order)
    for ranks in (1, 2, 4, 8):
        shard, replicas = cut(mesh.data_span(), ranks)
        own = [dict.fromkeys(("pp", "tp"), 0) | {"dp": d // 2, "cp": d % 2} for d in range(mesh.data)]
        numbers = [coordinates(mesh).index({axis: place[axis] for axis in mesh.ranked_axes()}) for place in own]
        assert reached(shard, [0]) == numbers[:ranks]
        assert reached(replicas, [0]) == numbers[::ranks]
        assert reached(replicas, reached(shard, [0])) == numbers
    with pytest.raises(ValueError, match="not made of groups of 3"):
        cut(mesh.data_span(), 3)


def reached(span: Span, start: list[int]) -> list[int]:
    for size, stride in span:
        start = [at + step * stride for step in range(size) for at in start]
    return start


def test_tensor_axes_of_two_parts_stay_together():
    mesh = Mesh(2, 2, 1, 4, (2, 2), order=("tp", "dp", "cp", "pp"))
    assert list(mesh.ranked_axes()) == ["tp0", "tp1", "dp", "cp", "pp"]
    assert mesh.strides() == {"pp": 1, "cp": 2, "dp": 2, "tp1": 4, "tp0": 8}
    assert list(mesh.axes()) == ["pp", "dp", "cp", "tp0", "tp1"]


def test_stages_hand_on_over_the_link_between_their_ranks():
    links = (1.0, 2.0, 3.0, 9.0)  # the last: between the last rank and the first
    assert transfers("1f1b", 4, 4, links) == (1.0, 2.0, 3.0)
    assert transfers("interleaved", 4, 8, links) == (1.0, 2.0, 3.0, 9.0, 1.0, 2.0, 3.0)
    assert transfers("zbv", 4, 8, links) == (1.0, 2.0, 3.0, 0.0, 3.0, 2.0, 1.0)
    assert transfers("none", 1, 1, (0.0,)) == ()
    costs = CollectiveCosts(Cluster.parse("2x4:h100"))
    inside, between = costs.handed_on(1e8, 4, 2)[:2]
    assert costs.handed_on(1e8, 4, 2) == (inside, between, inside, between)
    assert inside == costs.seconds("send_recv", 1e8, 2, 1) < between == costs.seconds("send_recv", 1e8, 2, 4)
    assert costs.handed_on(1e8, 4, 1) == (inside,) * 4


@pytest.mark.parametrize(
    ("sizes", "per_node", "wanted"),
    [
        ((4, 2, 1), 4, (AXES, STAGES_NEAR)),
        ((4, 2, 1), 8, (AXES,)),  # one node
        ((4, 2, 4), 4, (AXES,)),  # the model axes fill it
        ((1, 8, 1), 4, (AXES,)),
        ((8, 1, 1), 4, (AXES,)),
        ((4, 2, 2), 4, (AXES, STAGES_NEAR)),
        ((2, 2, 1), 1, (AXES,)),
    ],
)
def test_orders_that_make_no_difference_are_one(sizes, per_node, wanted):
    assert orders_of(*sizes, per_node) == wanted


def test_axes_of_one_rank_have_no_place_in_an_order():
    assert same_ranks(Mesh(2, 2, 1, 2, order=("cp", "pp", "dp", "tp"))) == AXES
    assert same_ranks(Mesh(2, 2, 1, 2, order=("dp", "cp", "pp", "tp"))) == STAGES_NEAR
    plan = search(small(), JOB, Cluster.parse("2x2:h100"), {"pp": 2, "dp": 2, "order": "cp,pp,dp,tp"})
    assert plan.mesh.order == AXES
    assert plan.fixed["order"] == "cp,pp,dp,tp"


def slow_nodes(times: float) -> Cluster:
    cluster = Cluster.parse("2x4:h100")
    link = cluster.inter_node
    return cluster.with_links(inter_node=dataclasses.replace(link, bandwidth=link.bandwidth / times))


FOUR_STAGES = {
    "pp": 4, "dp": 2, "cp": 1, "tp": 1, "zero": 1, "fsdp": 2, "micro_batch": 1, "schedule": "1f1b",
    "recompute": "none", "offload": "none",
}  # fmt: skip


@pytest.mark.parametrize(("batch", "wanted"), [(16, AXES), (512, STAGES_NEAR)])
def test_what_crosses_slow_nodes_is_what_crosses_them_less(batch, wanted):
    """Four stages, two data ranks, two nodes of four devices: with few micro-batches a step the gradients, once, are
    more than what stages hand on, with many they are less."""
    graph, job, cluster = model_graph("llama3.2-1b"), Job(batch, 8192), slow_nodes(10)
    seconds = {
        order: search(graph, job, cluster, {**FOUR_STAGES, "order": order}).predicted.step_time
        for order in (AXES, STAGES_NEAR)
    }
    assert min(seconds, key=seconds.__getitem__) == wanted
    assert max(seconds.values()) > 1.005 * min(seconds.values())
    plan = search(graph, job, cluster, FOUR_STAGES)
    assert plan.mesh.order == wanted
    assert plan.predicted.step_time == pytest.approx(seconds[wanted], rel=1e-9)
    assert plan.bound <= min(seconds.values())


def test_ties_keep_the_default_order():
    """Links that are alike inside and between nodes: no order is better than another."""
    link = dataclasses.replace(slow_nodes(1).inter_node, latency_s=0.0)
    alike = slow_nodes(1).with_links(link, link)
    assert search(small(), JOB, alike, {"pp": 2, "dp": 4}).mesh.order == AXES


@pytest.mark.parametrize("order", ["dp,pp,cp,tp", "tp,dp,cp,pp", "cp,tp,pp,dp"])
@pytest.mark.parametrize("sizes", [{"pp": 2, "dp": 2, "tp": 2}, {"pp": 2, "cp": 2, "tp": 2}])
def test_priced_anew_a_plan_costs_the_same_and_comes_back_from_its_file(order, sizes, tmp_path: Path):
    """`search` itself raises where `reprice` disagrees."""
    fix = {"cp": 1, "dp": 1, **sizes, "order": order, "micro_batch": 1}
    plan = search(small(), JOB, slow_nodes(10), fix)
    assert price_plan(plan, small()).step_time == pytest.approx(plan.predicted.step_time, rel=1e-9)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.mesh.order == same_ranks(dataclasses.replace(plan.mesh, order=tuple(order.split(","))))
    assert price_plan(again, small()).step_time == price_plan(plan, small()).step_time


def test_model_axes_between_nodes_cost_more():
    fix = {"pp": 1, "dp": 4, "tp": 2, "cp": 1, "micro_batch": 1, "zero": 0}
    near, far = (
        search(small(), JOB, slow_nodes(10), {**fix, "order": order}) for order in ("pp,dp,cp,tp", "tp,pp,cp,dp")
    )
    talk = "model axis communication"
    assert far.predicted.breakdown[talk] > near.predicted.breakdown[talk] > 0


def test_plans_from_before_there_was_an_order_load(tmp_path: Path):
    data = small_plan().to_json()
    del data["mesh"]["order"]
    (tmp_path / "old.json").write_text(json.dumps(data))
    assert Plan.load(tmp_path / "old.json") == small_plan()
    data["mesh"]["order"] = ["pp", "dp", "cp"]
    (tmp_path / "old.json").write_text(json.dumps(data))
    with pytest.raises(BadInputError, match="order must name each of pp, dp, cp, tp once"):
        Plan.load(tmp_path / "old.json")


def ordered(plan: Plan, order: tuple[str, ...]) -> Plan:
    return dataclasses.replace(plan, mesh=dataclasses.replace(plan.mesh, order=order))


def test_reports_tell_it_where_it_is_not_the_default():
    plan, swapped = small_plan(), ordered(small_plan(), STAGES_NEAR)
    assert "ranks " not in plan_text(plan)
    assert "ranks        in the order dp, pp, tp, outermost first" in plan_text(swapped)
    assert list(plan_record(swapped)["mesh"]) == ["dp", "pp", "cp", "tp"]
    assert str(swapped.mesh) == "pp=2 x dp=2 x tp=2, order=dp,pp,cp,tp"
    found = diff(plan, swapped)
    assert {pair.name: (pair.first, pair.second) for pair in found.decisions} == {
        "order of ranks": ("pp, dp, cp, tp", "dp, pp, cp, tp")
    }
    assert "order of ranks" in diff_text(found)


def test_why_not_another_order():
    fix = {"pp": 4, "dp": 2, "tp": 1, "cp": 1}
    plan = search(small(), JOB, slow_nodes(100), fix)
    other = STAGES_NEAR if plan.mesh.order == AXES else AXES
    answer = why_not(plan, small(), [*(f"{key}={value}" for key, value in fix.items()), f"order={','.join(other)}"])
    assert answer.verdict == "slower"
    assert answer.diff is not None
    assert answer.diff.step.more > 0
    assert "order of ranks" in {pair.name for pair in answer.diff.decisions}


def test_context_ranks_outside_data_ranks_are_refused():
    fix = {"pp": 1, "dp": 2, "cp": 2, "tp": 1, "order": "pp,cp,dp,tp", "zero": 3}
    with pytest.raises(BadInputError, match="name cp after dp in order"):
        search(small(), JOB, Cluster.parse("1x4:h100"), fix)
    fine = search(small(), JOB, Cluster.parse("1x4:h100"), {**fix, "order": AXES})
    with pytest.raises(UnsupportedError, match="context ranks inside data ranks"):
        emit(ordered(fine, ("pp", "cp", "dp", "tp")), small(), Path("never-written"))


@pytest.fixture(scope="module")
def traced() -> tuple[nn.Module, ModelGraph]:
    model = llama()
    return model, graph_of(model)


@pytest.mark.parametrize(
    ("mesh", "wanted"),
    [
        (Mesh(2, 2, 1, 2), {"pp": [0, 4], "dp": [0, 2], "tp": [0, 1]}),
        (Mesh(2, 2, 1, 2, order=STAGES_NEAR), {"dp": [0, 4], "pp": [0, 2], "tp": [0, 1]}),
        (Mesh(2, 2, 1, 2, order=("tp", "cp", "dp", "pp")), {"tp": [0, 4], "dp": [0, 2], "pp": [0, 1]}),
    ],
)
def test_the_emitted_mesh_has_ranks_in_this_order(mesh: Mesh, wanted, traced, tmp_path: Path):
    """On rank 0, under a process group that moves nothing: who is on each axis with it, and in its shard group."""
    graph = traced[1]
    plan = plan_of(graph, megatron(graph, 2, False), mesh, bounds=(2,))
    emit(plan, graph, tmp_path / "out")
    train = load_train(tmp_path / "out")
    assert tuple(train.MESH) == mesh.order
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        made, sharding, _ = train.launch.start(train.MESH, 2, "cpu")
        assert made.mesh_dim_names == AXES
        strides = mesh.strides()
        for axis in ("pp", "dp", "tp"):
            assert made[axis].mesh.tolist() == wanted[axis] == [0, strides[axis]]
            assert dist.get_process_group_ranks(made[axis].get_group()) == wanted[axis]
        assert sharding.mesh.tolist() == wanted["dp"]
        assert torch.equal(made.mesh.flatten().sort().values, torch.arange(8))
    finally:
        dist.destroy_process_group()
    told = " x ".join(f"{axis}={size}" for axis, size in mesh.ranked_axes().items() if axis != "cp")
    with pytest.raises(train.launch.InputError, match=rf"needs 8 processes \({told}\), but 1 were started"):
        train.launch.check_launch(train.MESH, 8)


def test_plans_of_other_orders_are_verified(traced):
    model, graph = traced
    mesh = Mesh(2, 2, 1, 2, order=STAGES_NEAR)
    report = verify(plan_of(graph, on_axes(graph, mesh), mesh, bounds=(2,)), model)
    assert "order=dp,pp,cp,tp" in str(report)


def test_every_schedule_has_a_rule_for_ranks():
    for name, schedule in SCHEDULES.items():
        pp = 1 if name == "none" else 4
        stages = pp * (schedule.stages or 2)
        assert len(transfers(name, pp, stages, (1.0,) * pp)) == stages - 1


def test_stages_hand_on_shares_where_the_stack_scatters():
    plain, scattering = (CollectiveCosts(Cluster.parse("2x4:h100"), stack) for stack in ("torch", "megatron"))
    assert plain.scattered(1e8, 2.5e7, 4, 1) == (1e8, 0.0)
    assert scattering.scattered(1e8, 2.5e7, 4, 1) == (2.5e7, scattering.seconds("all_gather", 1e8, 4, 1))
    assert scattering.scattered(2.5e7, 2.5e7, 4, 1) == (2.5e7, 0.0)  # split already, as sequence parallelism has it
    assert scattering.handed_on(1e8, 2, 4, 1.0)[0] == pytest.approx(1.0 + scattering.handed_on(1e8, 2, 4)[0])
