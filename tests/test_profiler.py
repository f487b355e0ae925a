"""The measured cpu device: plausible, remembered, shared between ranks, and measured again when it must be."""

import json
import threading
import time
from dataclasses import replace

import pytest
import torch

from autopar.cluster import LINK_FIGURES, Cluster
from autopar.errors import BadInputError
from autopar.graph.ir import Node, Ref, TensorMeta
from autopar.job import Job
from autopar.profiler import cpu
from autopar.profiler.cpu_ops import threads
from autopar.profiler.timing import timed
from autopar.solver.collective_costs import CollectiveCosts
from autopar.solver.op_costs import LocalTensor, OpCosts


@pytest.fixture(scope="module")
def profile():
    """One real measurement of this machine."""
    return cpu.measure_cpu(cpu.machine_name(), cpu.usable_cores(), cpu._torch_version())


@pytest.fixture
def measured(profile, tmp_path, monkeypatch):
    """An empty cache, and a measurement that takes no time; the list counts the times it is made."""
    monkeypatch.setenv("AUTOPAR_CACHE", str(tmp_path))
    calls = []

    def measure(machine, cores, torch_version):
        calls.append(1)
        return replace(profile, machine=machine, cores=cores, torch=torch_version)

    monkeypatch.setattr(cpu, "measure_cpu", measure)
    return calls


def test_measurement_is_plausible(profile):
    for rates in (profile.one, profile.all):
        assert set(rates.matmul_flops) == {"bf16", "fp16", "fp32", "fp64"}
        assert all(1e8 < flops < 1e15 for flops in rates.matmul_flops.values())
        assert 1e8 < rates.attention_flops < 1e15
        assert 1e8 < rates.memory_bandwidth < 1e13
        assert 1e8 < rates.cache_bandwidth < 1e14
    assert profile.all.matmul_flops["fp32"] >= profile.one.matmul_flops["fp32"]
    assert 1e-7 < profile.call_s < 1e-3
    for gloo in (profile.pair, profile.crowd):
        assert 1e-7 < gloo.step_s < 1
        assert 1e5 < gloo.bandwidth < 1e12
    assert profile.pair.ranks == 2 <= profile.crowd.ranks
    assert profile.memory_bytes > 1 << 28
    assert profile.cache_bytes >= 1 << 18
    assert not [
        thread for thread in threading.enumerate() if thread is not threading.main_thread() and not thread.daemon
    ]


def test_profile_round_trip(profile):
    assert cpu.CpuProfile.from_json(json.loads(json.dumps(profile.to_json()))) == profile
    with pytest.raises(ValueError, match="schema 99"):
        cpu.CpuProfile.from_json({**profile.to_json(), "schema": 99})


def test_measured_once_and_remembered(measured, tmp_path):
    first = Cluster.parse("1x4:cpu")
    assert Cluster.parse("1x4:cpu") == first
    assert len(measured) == 1
    assert [path.name for path in tmp_path.iterdir()] == [next(tmp_path.glob("cpu-*.json")).name]
    cpu.cpu_node(4, refresh=True)
    assert len(measured) == 2
    assert Cluster.from_json(json.loads(json.dumps(first.to_json()))) == first


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 3}', '{"schema": 0}'])
def test_damaged_cache_is_measured_again(measured, tmp_path, text):
    cpu.cpu_node(1)
    path = next(tmp_path.glob("cpu-*.json"))
    path.write_text(text)
    cpu.cpu_node(1)
    cpu.cpu_node(1)
    assert len(measured) == 2


@pytest.mark.parametrize("what", ["machine_name", "usable_cores", "_torch_version"])
def test_another_machine_is_measured_apart(measured, monkeypatch, what):
    before = cpu.cpu_node(1)
    with monkeypatch.context() as patch:
        patch.setattr(cpu, what, lambda: 17 if what == "usable_cores" else "another")
        cpu.cpu_node(1)
    assert cpu.cpu_node(1) == before
    assert len(measured) == 2


def test_works_without_a_writable_cache(measured, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTOPAR_CACHE", str(tmp_path / "file" / "cache"))
    assert cpu.cpu_node(1) == cpu.cpu_node(1)
    assert len(measured) == 2


def test_ranks_share_the_machine(measured, profile, monkeypatch):
    monkeypatch.setattr(cpu, "usable_cores", lambda: 4)
    (one, _), (few, loose), (many, tight), (_, tighter) = (cpu.cpu_node(ranks) for ranks in (1, 4, 16, 32))
    assert one.peak_flops == profile.all.matmul_flops
    assert few.peak_flops == profile.one.matmul_flops
    for dtype in few.peak_flops:
        assert many.peak(dtype) == pytest.approx(few.peak(dtype) / 4)
    assert many.launch_s == pytest.approx(4 * few.launch_s)
    assert loose.bandwidth == profile.pair.bandwidth
    assert tighter.device_bandwidth == pytest.approx(tight.device_bandwidth / 2)
    assert tighter.latency_s == pytest.approx(2 * tight.latency_s)
    assert 4 * few.memory_bandwidth <= profile.all.memory_bandwidth * (1 + 1e-9)
    assert many.memory_bandwidth == pytest.approx(profile.all.memory_bandwidth / 16)
    assert 4 * many.memory_bytes == pytest.approx(few.memory_bytes, rel=1e-6)
    with pytest.raises(BadInputError, match=r"cpu: 1000000 ranks leave"):
        cpu.cpu_node(1_000_000)


def test_every_figure_has_a_source(measured):
    device, link = cpu.cpu_node(4)
    named = ("name", "title", "backend", "origin", "sources", "peak_flops", "power_w", "wait_w", "workspace_bytes")
    assert device.power_w == device.wait_w == device.workspace_bytes == 0  # not measured, and told as not known
    plain = [name for name in device.to_json() if name not in named]
    assert set(device.sources) == {*plain, *(f"peak_flops.{dtype}" for dtype in device.peak_flops)}
    assert set(link.sources) == set(LINK_FIGURES)
    assert all(len(source) > 20 for source in (*device.sources.values(), *link.sources.values()))
    assert device.origin == "measured"


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp64"])
def test_cpu_prices_every_job(measured, dtype):
    cluster = Cluster.parse("1x4:cpu")
    job = Job(8, 128, dtype=dtype)
    node = Node("y", "op", TensorMeta(()), op="aten.linear", args=(Ref("x"), Ref("w")))
    x = LocalTensor((1024, 1024), job.compute_bytes)
    price = OpCosts(cluster.device, job).seconds(node, [x, x], x, [True, True])
    assert price.forward == pytest.approx(2 * 1024**3 / cluster.device.peak(dtype), rel=0.1)
    assert price.source == "measured"
    costs = CollectiveCosts(cluster)
    assert costs.seconds("reduce_scatter", 1e8, 4, 1) == costs.seconds("all_reduce", 1e8, 4, 1)


def test_prediction_of_a_matmul_is_near_its_time(profile):
    """A larger matmul than the one measured runs at about the rate predicted (a loose band: cores are shared)."""
    size = 768
    x = torch.ones(size, size)
    with threads(1), torch.no_grad():
        seconds = timed(lambda: x @ x, 0.1).least
    assert 0.2 < 2 * size**3 / profile.one.matmul_flops["fp32"] / seconds < 5


def test_threads_are_restored():
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    with pytest.raises(RuntimeError), threads(before + 1):
        raise RuntimeError
    assert torch.get_num_threads() == before


def test_timing_is_a_median_within_a_budget():
    runs = []

    def function():
        runs.append(1)
        time.sleep(0.02 if len(runs) == 3 else 0.001)

    timing = timed(function, budget_s=0.0, least=5)
    assert timing.repeats == 5 == len(runs) - 1
    assert 0.001 <= timing.least <= timing.seconds < 0.01
    assert timed(lambda: None, budget_s=10.0, most=50).repeats == 50
