"""Objectives: what they accept, the part of the cluster they choose against enumeration, what they say and refuse."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from dense_decoder import decoder
from small_plan import small_plan

import autopar
from autopar.cli import main
from autopar.cluster import Cluster
from autopar.errors import BadInputError, InfeasibleError
from autopar.job import Job
from autopar.objective import Objective, ObjectiveValue, parse_prices
from autopar.plan import Plan
from autopar.report.record import plan_record
from autopar.solver import objectives
from autopar.solver.cluster_sizes import LAST, SizeBounds, parts
from autopar.solver.fix import Fix
from autopar.solver.limits import GAP, OPTIMAL
from autopar.solver.objectives import search_parts
from autopar.solver.search import search
from autopar.solver.space import configs

PRICE = {"h100": 2.5}
OF_DEVICE_SECONDS = (
    Objective("throughput_per_device"),
    Objective("cost", price=PRICE),
    Objective("energy"),
)
MODEL = decoder(2)


def cluster_of(nodes: int, per_node: int, memory: float | None = None, intra: float = 450e9, inter: float = 50e9):
    cluster = Cluster.parse(f"{nodes}x{per_node}:h100")
    cluster = cluster.with_links(
        replace(cluster.intra_node, bandwidth=intra), replace(cluster.inter_node, bandwidth=inter)
    )
    if memory is None:
        return cluster
    device = replace(cluster.device, memory_bytes=int(memory), reserve_bytes=0)
    return Cluster(tuple(replace(group, device=device) for group in cluster.groups))


@pytest.fixture
def search_once(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """The search, which makes each of a test's searches once: it always answers the same."""
    known: dict[str, Plan | InfeasibleError] = {}

    def remembered(model, job, cluster, fix=None, limits=None, explained=True, **more):
        key = f"{job} {cluster} {explained} {more}"
        if key not in known:
            try:
                known[key] = search(model, job, cluster, fix, limits, explained, **more)
            except InfeasibleError as error:
                known[key] = error
        found = known[key]
        if isinstance(found, InfeasibleError):
            raise found
        return found

    monkeypatch.setattr(objectives, "search", remembered)
    return remembered


def by_enumeration(
    search_once: Callable[..., Plan], job: Job, cluster: Cluster, waiting: float = 1.0
) -> dict[int, Plan]:
    """The plan of every part that has one, by its devices: the fastest, or that draws least (``waiting``)."""
    plans = {}
    for part in parts(cluster):
        if any(True for _ in configs(MODEL, job, part, Fix())):
            try:
                plans[part.devices] = search_once(
                    MODEL, job, part, None, None, explained=False, equal_blocks=True, waiting=waiting
                )
            except InfeasibleError:
                continue
    return plans


def seconds(plan: Plan) -> float:
    return plan.predicted.step_time


def drawn_s(plan: Plan, waiting: float) -> float:
    """Device-seconds at full power."""
    found = plan.predicted
    return plan.cluster.devices * (waiting * found.step_time + (1 - waiting) * found.computing_s)


def random_setup(seed: int) -> tuple[Job, Cluster]:
    """Links from slow to fast, memory from what a few devices hold together to plenty, batches that divide by much or
    little. Every third has nodes of two devices, and plenty of memory, which takes less time."""
    draw = random.Random(seed)
    job = Job(draw.choice((4, 6, 8, 12)), draw.choice((64, 256, 1024)))
    per_node = 2 if seed % 3 == 2 else 1
    cluster = cluster_of(
        draw.choice((2, 3)) if per_node == 2 else draw.choice((3, 4, 6)),
        per_node,
        memory=draw.choice((2.0e6, 4.0e6, 1e10)) * (job.seq_len / 256 + 1) if per_node == 1 else None,
        intra=10 ** draw.uniform(9, 11.7),
        inter=10 ** draw.uniform(8, 10.7),
    )
    return job, cluster


@pytest.mark.parametrize("seed", range(12))
def test_agrees_with_enumeration(seed: int, search_once: Callable[..., Plan]) -> None:
    job, cluster = random_setup(seed)
    plans = by_enumeration(search_once, job, cluster)
    assert plans
    for objective in OF_DEVICE_SECONDS:
        waiting = objective.waiting(cluster)
        best_of = plans if waiting == 1.0 else by_enumeration(search_once, job, cluster, waiting)
        least = min(drawn_s(plan, waiting) for plan in best_of.values())
        plan = search_parts(MODEL, job, cluster, objective)
        reached, best = plan.objective, objective.value(least, job, cluster)
        assert reached is not None
        assert seconds(plan) == seconds(best_of[plan.cluster.devices])
        assert reached.value == pytest.approx(objective.value(drawn_s(plan, waiting), job, cluster))
        if objective.kind == "energy":
            assert plan.predicted.energy_j == pytest.approx(reached.value * job.tokens)
            assert best <= objective.value(min(drawn_s(plan, waiting) for plan in plans.values()), job, cluster)
        assert reached.value == pytest.approx(best, rel=1.01 * GAP)
        if objective.seeks_most:
            assert reached.value <= best * (1 + 1e-9) <= reached.bound * (1 + 2e-9)
        else:
            assert reached.value >= best * (1 - 1e-9) >= reached.bound * (1 - 2e-9)
        assert reached.status == ("optimal" if reached.gap <= OPTIMAL else "feasible")
    for limit in {1.001 * seconds(plan) for plan in plans.values()}:
        plan = search_parts(MODEL, job, cluster, Objective("devices", within_s=limit))
        fewest = min(n for n, found in plans.items() if seconds(found) <= limit)
        assert plan.objective is not None
        assert plan.objective.value == plan.cluster.devices == fewest
        assert plan.objective.bound <= fewest
        assert seconds(plan) <= limit
    bounds = SizeBounds(MODEL, job, cluster, Fix())
    for part in parts(cluster):
        size = bounds.size(part)
        if size is None:
            assert part.devices not in plans
            continue
        levels = [size.bound]
        for _ in range(LAST):
            bounds.refine(size)
            levels.append(size.bound)
        assert levels == sorted(levels)
        if part.devices in plans:
            least = seconds(plans[part.devices])
            assert levels[-1] <= least * (1 + 1e-9)
            assert not bounds.rules_out(size, 1.001 * least)
        assert bounds.rules_out(size, 0.5 * levels[-1])


def test_fewer_devices_do_not_do() -> None:
    job, cluster = Job(8, 16384), cluster_of(8, 1, inter=450e9)
    whole = search(MODEL, job, cluster)
    plan = search_parts(MODEL, job, cluster, Objective("devices", within_s=2.2 * seconds(whole)))
    devices = plan.cluster.devices
    assert 1 < devices < cluster.devices
    smaller = [part for part in parts(cluster) if part.devices < devices]
    assert smaller
    for part in smaller:
        assert seconds(search(MODEL, job, part)) > 2.2 * seconds(whole)


def test_parts_of_a_cluster() -> None:
    assert [str(part) for part in parts(Cluster.parse("3x6:h100"))] == [
        "1x1:h100",
        "1x2:h100",
        "1x3:h100",
        "1x6:h100",
        "2x6:h100",
        "3x6:h100",
    ]
    assert [part.devices for part in parts(cluster_of(1, 4))] == [1, 2, 4]
    shared = cluster_of(2, 4)
    measured = Cluster(tuple(replace(g, device=replace(g.device, origin="measured")) for g in shared.groups))
    assert [part.devices for part in parts(measured)] == [4, 8]


def test_two_thousand_nodes_take_few_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[int] = []

    def counted(*arguments, **options):
        searched.append(arguments[2].devices)
        return search(*arguments, **options)

    monkeypatch.setattr(objectives, "search", counted)
    cluster, job = Cluster.parse("2048x8:h100"), Job(256, 8192)
    plan = search_parts(MODEL, job, cluster, Objective("throughput_per_device"))
    assert plan.objective is not None
    assert plan.objective.devices == 16384
    assert plan.searched["cluster sizes"] > plan.searched["cluster sizes searched"] == len(searched) == len({*searched})
    assert len(searched) <= 4
    limit = 0.3 * job.tokens / plan.objective.value  # more than three times as fast as one device
    searched.clear()
    fewest = search_parts(MODEL, job, cluster, Objective("devices", within_s=limit))
    assert seconds(fewest) <= limit
    assert len(searched) <= 4


def test_what_is_not_searched_counts_with_its_bound() -> None:
    job, cluster = Job(8, 256), cluster_of(4, 2, intra=2e9, inter=2e8)
    objective = Objective("energy")
    every = search_parts(MODEL, job, cluster, objective)
    one = search_parts(MODEL, job, cluster, objective, searches=1)
    assert every.objective is not None
    assert one.objective is not None
    assert one.searched["cluster sizes searched"] == 1
    assert one.objective.bound <= every.objective.bound * (1 + 1e-12)
    assert one.objective.bound <= every.objective.value <= one.objective.value
    assert one.objective.gap == pytest.approx(one.objective.value / one.objective.bound - 1)


def test_of_equal_plans_the_faster_is_taken() -> None:
    """Without weights to move and on links that cost nothing, twice the devices take half the time."""
    device = Cluster.parse("1x1:h100").device
    free = replace(device, launch_s=0.0, collective_s=0.0, memory_bandwidth=1e30, matmul_efficiency=1.0, processors=1)
    cluster = cluster_of(4, 1, intra=1e30, inter=1e30)
    links = [replace(link, latency_s=0.0) for link in (cluster.intra_node, cluster.inter_node)]
    cluster = Cluster(tuple(replace(group, device=replace(free, backend="cpu")) for group in cluster.groups))
    plan = search_parts(MODEL, Job(8, 256), cluster.with_links(*links), Objective("throughput_per_device"))
    assert plan.cluster.devices == 4


def test_the_step_time_is_that_of_the_whole_cluster() -> None:
    job, cluster = Job(8, 64), cluster_of(2, 2)
    plan = search_parts(MODEL, job, cluster, Objective())
    assert plan.cluster == cluster
    assert plan.objective is None
    assert seconds(plan) == seconds(search(MODEL, job, cluster))
    record = plan_record(plan)["objective"]
    assert record["kind"] == "step_time"
    assert (record["value"], record["bound"], record["unit"]) == (seconds(plan), plan.bound, "s")


def test_a_fix_holds_on_every_part() -> None:
    job, cluster = Job(8, 256), cluster_of(2, 4)
    plan = search_parts(MODEL, job, cluster, Objective("energy"), {"tp": 4, "dp": 1, "pp": 1})
    assert plan.cluster.devices == plan.mesh.tp == 4
    with pytest.raises(BadInputError, match="tp=3"):
        search_parts(MODEL, job, cluster, Objective("energy"), {"tp": 3})


def test_unreachable_says_the_fastest(search_once: Callable[..., Plan]) -> None:
    job, cluster = Job(8, 64), cluster_of(2, 2)
    fastest = min(map(seconds, by_enumeration(search_once, job, cluster).values()))
    with pytest.raises(InfeasibleError, match="no number of devices up to 2x2:h100") as caught:
        search_parts(MODEL, job, cluster, Objective("devices", within_s=fastest / 2))
    assert f"{fastest:.4g} s" in str(caught.value)
    tiny = cluster_of(2, 2, memory=1e4)
    with pytest.raises(InfeasibleError, match="nothing fits on 2x2:h100"):
        search_parts(MODEL, job, tiny, Objective("devices", within_s=1.0))
    with pytest.raises(InfeasibleError, match="more than the 10,000 it has"):
        search_parts(MODEL, job, tiny, Objective("energy"))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("speed", "unknown kind 'speed'; one of step_time, throughput_per_device, devices, cost, energy"),
        (3, "expected a kind"),
        ({"kind": "cost", "prices": PRICE}, "unknown field 'prices'; the fields are kind, within_s, price"),
        ("devices", "devices needs within_s"),
        ({"kind": "devices", "within_s": -1.0}, "devices needs within_s"),
        ({"kind": "devices", "within_s": float("nan")}, "devices needs within_s"),
        ("cost", "cost needs price"),
        ({"kind": "cost", "price": 2.5}, "cost needs price"),
        ({"kind": "cost", "price": {"h100": 0}}, "price of h100 must be a positive number, not 0"),
        ({"kind": "energy", "within_s": 1.0}, 'within_s is for objective "devices", not for "energy"'),
        ({"kind": "step_time", "price": PRICE}, 'price is for objective "cost", not for "step_time"'),
    ],
)
def test_refuses(given: object, says: str) -> None:
    with pytest.raises(BadInputError, match=says):
        Objective.of(given)  # type: ignore[arg-type]


def test_reads_short_forms() -> None:
    assert Objective.of(None) == Objective.of("step-time") == Objective()
    assert Objective.of("throughput") == Objective("throughput_per_device")
    assert Objective.of({"kind": "devices", "within_s": 2}) == Objective("devices", within_s=2)
    assert parse_prices(["h100=2.5", "a100-80g=1"]) == {"h100": 2.5, "a100-80g": 1.0}
    assert parse_prices([]) is None
    for wrong in (["2.5"], ["h100=free"], ["h100=-1"], ["h100=1", "h100=2"]):
        with pytest.raises(BadInputError, match="--price"):
            parse_prices(wrong)


def test_devices_without_a_price_or_power_are_refused() -> None:
    cluster = Cluster.parse("1x2:a100-80g")
    with pytest.raises(BadInputError, match=r"no price for device 'a100-80g' \(given: h100\); add --price a100-80g="):
        Objective("cost", price=PRICE).check(cluster)
    unknown = Cluster(tuple(replace(g, device=replace(g.device, power_w=0.0)) for g in cluster.groups))
    with pytest.raises(BadInputError, match=r"power of device 'a100-80g' is not known; give power_w"):
        search_parts(MODEL, Job(8, 64), unknown, Objective("energy"))
    Objective("energy").check(cluster)


def test_units() -> None:
    """64 devices for an hour, a million tokens: 64 prices, 64 x 700 W x 3,600 s."""
    cluster, job = Cluster.parse("8x8:h100"), Job(1000, 1000)
    device_seconds = 64 * 3600.0
    assert Objective("cost", price=PRICE).value(device_seconds, job, cluster) == pytest.approx(64 * 2.5)
    assert Objective("energy").value(device_seconds, job, cluster) == pytest.approx(64 * 700 * 3600 / 1e6)
    assert Objective("throughput_per_device").value(device_seconds, job, cluster) == pytest.approx(1e6 / 3600 / 64)
    with pytest.raises(BadInputError, match="not a matter of device-seconds"):
        Objective("devices", within_s=1.0).value(device_seconds, job, cluster)


def test_power_from_a_cluster_file(tmp_path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('device = "h100"\nnodes = 1\ndevices_per_node = 2\npower_w = 500\n')
    cluster = Cluster.load(path)
    assert cluster.device.power_w == 500
    assert cluster.device.sources["power_w"] == "cluster file mine.toml"
    cluster.save(tmp_path / "whole.json")
    assert Cluster.load(tmp_path / "whole.json") == cluster
    path.write_text('device = "h100"\nnodes = 1\ndevices_per_node = 2\npower_w = 0\n')
    with pytest.raises(BadInputError, match="power_w"):
        Cluster.load(path)


@pytest.mark.parametrize("objective", [*OF_DEVICE_SECONDS, Objective("devices", within_s=2.0)])
def test_round_trip_and_report(objective: Objective) -> None:
    reached = ObjectiveValue(objective, 2.0, 1.5, 1 / 3, "feasible", 64)
    plan = replace(small_plan(), objective=reached)
    data = json.loads(json.dumps(plan.to_json()))
    assert Plan.from_json(data).objective == reached
    record = plan_record(plan)["objective"]
    assert record["kind"] == objective.kind
    assert (record["value"], record["bound"], record["unit"]) == (2.0, 1.5, objective.unit)
    assert (record["devices"], record["devices_given"]) == (plan.cluster.devices, 64)
    told = " ".join(str(plan).split())
    side = "at most" if objective.seeks_most else "at least"
    bound = "2" if objective.kind == "devices" else "1.50"
    assert f"of 64 devices ({side} {bound}, gap 33.3%, feasible over all cluster sizes)" in told


def test_plans_without_an_objective_load() -> None:
    data = small_plan().to_json()
    assert data.pop("objective") is None
    assert Plan.from_json(data) == small_plan()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--objective", "cost"), "cost needs price (--price h100=2.5)"),
        (("--objective", "devices"), "devices needs within_s (--within)"),
        (("--objective", "fast"), "unknown kind 'fast'"),
        (("--within", "3"), 'within_s is for objective "devices"'),
        (("--objective", "cost", "--price", "a100-80g=2"), "no price for device 'h100'"),
        (("--objective", "cost", "--price", "cheap"), "--price: expected DEVICE=MONEY_PER_HOUR"),
    ],
)
def test_command_refuses(options: tuple[str, ...], says: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["search", "gpt2", "--cluster", "1x2:h100", "--global-batch", "8", "--seq-len", "64", *options])
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


def test_in_public() -> None:
    assert autopar.Objective is Objective
    with pytest.raises(BadInputError, match="unknown kind 'speed'"):
        autopar.search("gpt2", Job(8, 64), Cluster.parse("1x2:h100"), objective="speed")
