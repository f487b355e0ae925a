"""Prices by a profile: which figure is taken, what the plan says of it, and that the search's bounds hold with any."""

from __future__ import annotations

import dataclasses
import random

import pytest
from profiles import DEVICE, collective, erratic, formula, op_records, profile_of, spread_points, with_measured
from small_spaces import drawn, enumerated
from test_exhaustive_tp import drawn as drawn_split
from test_exhaustive_tp import every_plan
from tiny_models import chain

from autopar.cluster import Cluster
from autopar.errors import BadInputError
from autopar.graph.ir import Node, Ref, TensorMeta
from autopar.job import Job
from autopar.measured import Measured
from autopar.plan import Plan
from autopar.profiler.attach import attached
from autopar.report.record import plan_record
from autopar.solver.config_bounds import shape_bound, stage_bound
from autopar.solver.context import Context
from autopar.solver.fix import parse_fix
from autopar.solver.halves import sure_halves
from autopar.solver.interval import interval_of, residuals
from autopar.solver.measured_ops import MeasuredOps
from autopar.solver.op_costs import LocalTensor, OpCosts
from autopar.solver.reprice import check_price
from autopar.solver.room import has_room
from autopar.solver.search import search
from autopar.solver.shardings import KnownShardings
from autopar.solver.space import configs

ROUNDING = 1 + 1e-9
JOB = Job(8, 1024)
LINEAR = Node("y", "op", TensorMeta(()), op="aten.linear", args=(Ref("x"), Ref("w")))
CLUSTER = Cluster.parse("1x8:h100")
POINTS = [(m, n, k) for m in (256, 1024, 4096) for n in (256, 1024, 4096) for k in (256, 1024, 4096)]


def matmul_profile(scale: float = 1.0):
    """Matmuls alone, with another rate for each direction."""
    rates = {"forward": 4e14, "input_grad": 3e14, "weight_grad": 2e14}

    def seconds(each, point, direction, width):
        return scale * (1e-6 + each.cost(point, direction, width)[0] / rates[direction])

    return profile_of(op_records(seconds, lambda each: POINTS if each.name == "matmul" else []))


def price(costs: OpCosts, m: int, n: int, k: int, grads=(True, True)):
    tensors = [LocalTensor((m, k), 2), LocalTensor((n, k), 2)]
    return costs.seconds(LINEAR, tensors, LocalTensor((m, n), 2), list(grads))


def test_measured_then_interpolated_then_catalog():
    plain = OpCosts(CLUSTER.device, JOB)
    costs = OpCosts(attached(CLUSTER, matmul_profile()).device, JOB)
    exact = price(costs, 1024, 4096, 256)
    work = 2 * 1024 * 4096 * 256
    assert exact.source == "measured"
    assert exact.forward == pytest.approx(1e-6 + work / 4e14, rel=1e-3)
    assert exact.backward == pytest.approx(2e-6 + work / 3e14 + work / 2e14, rel=1e-3)
    between = price(costs, 2048, 2048, 2048)
    assert between.source == "interpolated"
    assert between.forward == pytest.approx(1e-6 + 2 * 2048**3 / 4e14, rel=0.05)
    far = price(costs, 16, 16, 16)
    assert far.source == "catalog"
    assert far == price(plain, 16, 16, 16)
    node = Node("y", "op", TensorMeta(()), op="aten.silu", args=(Ref("x"),))
    x = LocalTensor((4096, 4096), 2)
    assert costs.seconds(node, [x], x, [True]) == plain.seconds(node, [x], x, [True])
    assert price(plain, 1024, 4096, 256).source == "catalog"


def test_each_gradient_has_its_own_price():
    costs = OpCosts(attached(CLUSTER, matmul_profile()).device, JOB)
    both, left, right, none = (
        price(costs, 1024, 1024, 1024, grads).backward
        for grads in ((True, True), (True, False), (False, True), (False, False))
    )
    assert both == pytest.approx(left + right)
    assert left < right
    assert none == 0.0


def test_the_host_and_taking_turns_make_it_slower():
    device = attached(CLUSTER, matmul_profile()).device
    found = price(OpCosts(device, JOB), 256, 256, 256)
    slow = dataclasses.replace(device.measured, slowdown=3.0)
    assert price(OpCosts(dataclasses.replace(device, measured=slow), JOB), 256, 256, 256).forward == pytest.approx(
        3 * found.forward
    )
    busy = dataclasses.replace(device.measured, host_s=1e-4)
    waiting = price(OpCosts(dataclasses.replace(device, measured=busy), JOB), 256, 256, 256)
    assert waiting.forward == 1e-4
    assert waiting.backward == 2e-4


@pytest.mark.parametrize("seed", range(40))
def test_no_price_is_below_its_arithmetic(seed):
    """Whatever the profile, over shapes and splits: what bounds are made of."""
    draw, measured = random.Random(seed), erratic(seed)
    costs = OpCosts(dataclasses.replace(CLUSTER.device, measured=measured), JOB)
    for _ in range(40):
        m, n, k = (2 ** draw.randint(0, 11) for _ in range(3))
        whole = [LocalTensor((m, k), 2), LocalTensor((n, k), 2)]
        sure = costs.arithmetic_seconds(LINEAR, whole, LocalTensor((m, n), 2), [True, True])
        for ranks in (1, 2, 4):
            for local in ((m // ranks, n, k), (m, n // ranks, k), (m, n, k // ranks)):
                if min(local) < 1:
                    continue
                found = price(costs, *local)
                assert found.forward * ROUNDING >= sure[0] / ranks
                assert found.backward * ROUNDING >= sure[1] / ranks


def measured_trial(seed):
    trial = drawn(seed)
    return dataclasses.replace(trial, cluster=with_measured(trial.cluster, erratic(seed)))


@pytest.mark.parametrize("seed", range(2001, 2012))
def test_bounds_hold_with_an_erratic_profile(seed):
    trial = measured_trial(seed)
    plans = list(enumerated(trial))
    best = min(plan.seconds for plan in plans)
    plan = search(trial.model, trial.job, trial.cluster, trial.fix)
    step = plan.predicted.step_time
    assert plan.bound <= best * ROUNDING
    assert best <= step * ROUNDING
    assert step <= best * (1 + plan.gap) * ROUNDING
    check_price(plan, trial.model)
    context = Context.of(trial.model, trial.job, trial.cluster, parse_fix(trial.fix))
    for config in dict.fromkeys(plan.config for plan in plans):
        least = min(plan.seconds for plan in plans if plan.config == config) * ROUNDING
        shardings = KnownShardings(context).of(config.sharding)
        assert has_room(context, config.shape.outline)
        for work in (None, shardings.least_work()):
            assert 0 < shape_bound(context, config.shape, work) <= least
        assert stage_bound(context, config, shardings, True) <= least


@pytest.mark.parametrize("seed", [2001, 2002, 2006, 2007])
def test_no_sharding_beats_the_bound_with_an_erratic_profile(seed):
    model, job, cluster = drawn_split(seed)
    cluster, fix = with_measured(cluster, erratic(seed, high=1024)), {"cp": 1, "offload": "none"}
    context = Context.of(model, job, cluster, parse_fix(fix))
    space = [config for config in configs(model, job, cluster, parse_fix(fix)) if config.pad_heads == 1]
    best = min(seconds for seconds, _ in every_plan(model, context, space))
    plan = search(model, job, cluster, fix)
    assert plan.bound <= best * ROUNDING
    assert best <= plan.predicted.step_time * ROUNDING
    assert plan.predicted.step_time <= best * (1 + plan.gap) * ROUNDING


@pytest.mark.parametrize("seed", range(30))
def test_halves_are_surely_there(seed):
    """What a halved backward surely takes in each half is in the price of every operator whole on its rank."""
    costs = OpCosts(dataclasses.replace(CLUSTER.device, measured=erratic(seed)), JOB)
    model = chain((32, 32), 16, 64)
    for kind in model.kinds.values():
        first, second = sure_halves(costs, kind, 4, 64, 1)
        backward = weights = 0.0
        for node in kind.graph.of("op"):
            metas = [kind.graph.nodes[name].meta for name in node.operands()]
            inputs = [LocalTensor(meta.at(4, 64), 2) for meta in metas]
            grads = [meta.requires_grad for meta in metas]
            own = [kind.graph.nodes[name].kind == "parameter" for name in node.operands()]
            output = LocalTensor(node.meta.at(4, 64), 2)
            both = costs.seconds(node, inputs, output, grads).backward
            rest = costs.seconds(node, inputs, output, [g and not w for g, w in zip(grads, own, strict=True)]).backward
            backward, weights = backward + both, weights + both - rest
        assert second <= weights * ROUNDING + 1e-15
        assert first <= (backward - weights) * ROUNDING + 1e-15


def test_the_plan_says_where_its_prices_are_from(tmp_path):
    model, job = chain((64, 64), 32, 256), Job(8, 64)
    records = op_records(formula(), spread_points(12))
    two = Cluster.parse("1x2:h100")
    cluster = attached(two, profile_of(records, figures={"launch.kernel_s": 1e-6}))
    plan = search(model, job, cluster, {})
    measured = cluster.device.measured
    record = plan_record(plan)["profile"]
    assert record["digest"] == measured.digest == profile_of(records, figures={"launch.kernel_s": 1e-6}).digest
    assert sum(record["sources"].values()) == pytest.approx(1)
    assert record["sources"]["interpolated"] > 0.5
    assert f"profile {measured.digest} (NVIDIA H100, 2026-11-28)" in str(plan)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    check_price(again, model)
    low, high = interval_of(again, model)
    assert low < plan.predicted.step_time < high
    step, published = plan.predicted.step_time, residuals("torch")  # of catalog figures, not of measured ones
    assert (low / step, high / step) != pytest.approx(published, rel=0.01)
    with pytest.raises(BadInputError, match=rf"priced by profile {measured.digest} .*the cluster given has no profile"):
        again.check_cluster(two)
    without = search(model, job, two, {})
    assert "profile" not in plan_record(without)
    assert "priced by" not in str(without)


def test_a_cluster_names_a_profile_in_its_file_or_in_python(tmp_path):
    profile_of(op_records(formula(), spread_points(12))).save(tmp_path / "h100.json")
    (tmp_path / "cluster.toml").write_text('device = "h100"\nnodes = 1\ndevices_per_node = 8\nprofile = "h100.json"\n')
    named = Cluster.load(tmp_path / "cluster.toml")
    assert named == CLUSTER.with_profile(tmp_path / "h100.json")
    assert named != CLUSTER
    for suffix in (".toml", ".yaml", ".json"):
        named.save(tmp_path / f"saved{suffix}")
        assert Cluster.load(tmp_path / f"saved{suffix}") == named
    (tmp_path / "cluster.toml").write_text('device = "h100"\nnodes = 1\ndevices_per_node = 8\nprofile = "no.json"\n')
    with pytest.raises(BadInputError, match=r"cluster.toml: cannot read profile .*no.json: No such file"):
        Cluster.load(tmp_path / "cluster.toml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cpu"}, "measured on cpu, the device is of cuda"),
        ({"processors": 108}, "108 processors, h100 has 132"),
        ({"memory_bytes": 42 << 30}, "bytes of memory"),
    ],
)
def test_a_profile_of_another_device_is_refused(change, message):
    with pytest.raises(BadInputError, match=message):
        attached(CLUSTER, profile_of(device={**DEVICE, **change}))


def test_figures_and_links_come_from_the_profile():
    size = 1 << 28
    sizes = [(size,), (1024,), (2048,)]
    records = op_records(formula(1e14, 2.5e12, 1e-6), lambda each: sizes if len(each.dims) == 1 else [])
    copies = [record for record in records if record.op.startswith("copy")]
    sent = [
        collective("all_reduce", nbytes, 20e-6 + 6 * 2e-6 + 2 * nbytes * 3 / 4 / 3e11)
        for nbytes in (1 << 10, 1 << 16, 1 << 22, 1 << 28, 1 << 30)
    ]
    profile = profile_of(copies, collectives=tuple(sent), figures={"launch.kernel_s": 2e-6, "launch.eager_s": 7e-6})
    cluster = attached(CLUSTER, profile)
    device, told = cluster.device, f"profile {profile.digest}"
    assert device.launch_s == 2e-6
    assert device.measured.host_s == 7e-6
    assert device.memory_bandwidth * device.memory_efficiency == pytest.approx(2.5e12, rel=0.02)
    assert device.host_bandwidth == pytest.approx(2.5e12, rel=0.02)
    assert cluster.intra_node.device_bandwidth == pytest.approx(3e11, rel=0.05)
    assert all(told in device.sources[name] for name in ("launch_s", "memory_efficiency", "host_bandwidth"))
    assert told in cluster.intra_node.sources["bandwidth"]
    assert cluster.inter_node == CLUSTER.inter_node
    elsewhere = attached(Cluster.parse("2x4:h100"), profile)
    assert elsewhere.intra_node == Cluster.parse("2x4:h100").intra_node


def test_the_optimizer_is_measured():
    seconds = formula(1e14, 2e12, 5e-5)
    cluster = attached(CLUSTER, profile_of(op_records(seconds, spread_points(12, 4096, 1 << 28))))
    costs = OpCosts(cluster.device, JOB)
    assert costs.optimizer_seconds(10**8) == pytest.approx(5e-5 + 28e8 / 2e12, rel=0.02)
    assert costs.optimizer_seconds(0) == 0
    sgd = OpCosts(cluster.device, dataclasses.replace(JOB, optimizer="sgd"))
    assert sgd.optimizer_seconds(10**8) == sgd.stream_seconds(5 * 4e8)


def test_a_dtype_that_was_not_measured_is_left_to_the_catalog():
    cluster = attached(CLUSTER, profile_of(op_records(formula(), spread_points(12), dtypes=("bf16",))))
    costs = OpCosts(cluster.device, Job(8, 1024, dtype="fp32"))
    tensors = [LocalTensor((512, 512), 4)] * 2
    assert costs.seconds(LINEAR, tensors, LocalTensor((512, 512), 4), [True, True]).source == "catalog"


def test_damaged_tables_are_refused():
    with pytest.raises(ValueError, match=r"invalid literal"):
        Measured.from_json({"digest": "a", "title": "b", "tables": {"matmul bf16 forward": "1 2 x 3 4"}})
    assert MeasuredOps(Measured("a", "b", {}), JOB).best_rate(2) == 0
