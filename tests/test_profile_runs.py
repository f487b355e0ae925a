"""Real measurements of seconds: operators of this CPU, collectives under torchrun on gloo; and what imports cost."""

from __future__ import annotations

import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from profiles import collective, formula, op_records, profile_of, spread_points

from autopar import cli
from autopar.cluster import Cluster
from autopar.errors import BadInputError
from autopar.profiler.__main__ import main
from autopar.profiler.clock import HostClock, sampled
from autopar.profiler.collectives import LinksRun, axes_of, groups_of, measure_collectives, parse_mesh
from autopar.profiler.database import Profile
from autopar.profiler.links import KINDS, fit_links
from autopar.profiler.machine import describe
from autopar.profiler.measure import OpsRun, measure_ops
from autopar.profiler.operators import BUILD, DTYPES, supported
from autopar.profiler.shapes import FAMILIES, family

CPU = torch.device("cpu")


def test_importing_the_profiler_needs_torch_and_numpy_alone(tmp_path):
    """In a process where nothing else can be imported, a whole command runs."""
    code = f"""
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in "ortools transformers pydantic typer rich yaml jinja2 networkx".split():
            raise ImportError(name)
sys.meta_path.insert(0, Nothing())
from autopar.profiler.__main__ import main
assert main(["ops", "--ops", "add", "--minutes", "0.005", "-o", {str(tmp_path / "a.json")!r}]) == 0
assert main(["show", {str(tmp_path / "a.json")!r}]) == 0
import autopar.profiler, autopar.profiler.collectives, autopar.profiler.overlap, autopar.profiler.attach
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A few seconds of this CPU in float32."""
    out = tmp_path_factory.mktemp("profile") / "cpu.json"
    told = []
    profile = measure_ops(OpsRun(out, minutes=0.1, dtypes=("fp32",)), lambda *what: told.append(what))
    return out, profile, told


def test_every_operator_is_measured_each_way(measured):
    out, profile, told = measured
    assert Profile.load(out) == profile
    found = {(record.op, record.direction) for record in profile.ops}
    assert found == {(each.name, direction) for each in FAMILIES for direction in each.directions}
    for record in profile.ops:
        each = family(record.op)
        assert each.valid(record.at)
        assert len(record.at) == len(each.dims)
        assert 0 < record.least <= record.seconds < 10
        assert record.repeats >= 3
        assert record.threads == 1
        flops, _ = each.cost(record.at, record.direction, 4)
        assert flops / record.seconds < 1e13  # no CPU thread does more
    assert 1e-8 < profile.figures["launch.eager_s"] < 1e-3
    assert profile.device["backend"] == "cpu"
    assert profile.device["torch"] == torch.__version__
    assert [spent for spent, _, _ in told] == sorted(spent for spent, _, _ in told)
    assert all(total == pytest.approx(6.0) for _, total, _ in told)


def test_the_first_point_is_written_at_once(tmp_path):
    """What a kill within the first second would leave: each point is told before it may be written."""
    out, held = tmp_path / "cpu.json", []
    measure_ops(
        OpsRun(out, minutes=0.005, ops=("add", "copy"), dtypes=("fp32",)),
        lambda *told: held.append(Profile.load(out) if out.exists() else None),
    )
    assert held[0] is not None
    assert held[0].ops == ()
    assert held[1].ops
    assert held[1].figures.keys() == {"launch.eager_s", "launch.kernel_s"}


def test_a_continued_run_measures_nothing_again(tmp_path):
    out = tmp_path / "cpu.json"
    run = OpsRun(out, minutes=0.005, ops=("matmul", "batched_matmul"), dtypes=("fp32",))
    before = measure_ops(run)
    after = measure_ops(replace(run, minutes=before.spent_s["ops"] / 60 + 0.01))
    assert after.figures == before.figures
    kept = {record.key: record for record in after.ops}
    assert all(kept[record.key] == record for record in before.ops)
    assert len(after.ops) > len(before.ops)


def test_larger_matmuls_take_longer():
    for direction in family("matmul").directions:
        small, large = (
            sampled(HostClock(), BUILD["matmul"]((size,) * 3, torch.float32, CPU, 2)[direction], 2, 0.02).least
            for size in (64, 512)
        )
        assert large > 3 * small  # 512 times the work


def test_a_cpu_is_priced_by_its_profile_alone(monkeypatch, tmp_path, capsys):
    profile = profile_of(op_records(formula(1e10, 1e10), spread_points(8), threads=1), device=describe(CPU))
    out = tmp_path / "cpu.json"
    profile.save(out)
    monkeypatch.setenv("AUTOPAR_CACHE", str(tmp_path))
    cluster = Cluster.parse("1x2:cpu").with_profile(out)
    assert cluster.device.measured.digest == profile.digest
    assert cluster.device.measured.slowdown == max(1.0, 2 / profile.device["processors"])
    if profile.device["processors"] > 1:
        with pytest.raises(BadInputError, match="measured on 1 threads, but a rank of 1x1:cpu computes on"):
            Cluster.parse("1x1:cpu").with_profile(out)
    profile_of(profile.ops[:1], device=describe(CPU)).save(tmp_path / "short.json")
    with pytest.raises(BadInputError, match=r"short.json: it holds too few shapes"):
        Cluster.parse("1x2:cpu").with_profile(tmp_path / "short.json")
    with pytest.raises(SystemExit) as stop:
        cli.main(
            ["search", "gpt2", "--cluster", "1x2:h100", "--global-batch", "2", "--seq-len", "64", "--profile", str(out)]
        )
    assert stop.value.code == 2
    assert "it was measured on cpu, the device is of cuda" in capsys.readouterr().err


@pytest.mark.parametrize("each", FAMILIES, ids=lambda each: each.name)
def test_calls_compute_what_they_are_named(each):
    """Every family runs in every dtype that it has, on rotating buffers, and its gradients are of the right sizes."""
    for dtype in each.dtypes:
        assert supported(each, dtype, CPU) == ""
    point = tuple(
        each.fixed[i][0] if each.fixed and i in each.fixed else max(low, 64) for i, low in enumerate(each.low)
    )
    calls = BUILD[each.name](point, DTYPES.get(each.dtypes[0], torch.uint8), CPU, 2)
    assert set(each.directions) <= set(calls)
    for direction in each.directions:
        for index in (0, 1, 0):
            calls[direction](index)
    if each.directions == ("forward", "input_grad", "weight_grad"):
        shapes = {name: tuple(call(1).shape) for name, call in calls.items()}
        *batch, m, n, k = point
        right = (n, k) if not batch else (k, n)
        assert shapes == {"forward": (*batch, m, n), "input_grad": (*batch, m, k), "weight_grad": (*batch, *right)}


def test_what_cannot_be_measured_is_said(tmp_path, capsys):
    for arguments, message in (
        (["ops", "--device", "cuda"], "torch finds no such device here"),
        (["ops", "--device", "quantum"], "not a torch device"),
        (["ops", "--ops", "fft"], "--ops: unknown 'fft'; known: matmul, "),
        (["ops", "--dtypes", "int8"], "--dtypes: unknown 'int8'"),
        (["ops", "--minutes", "0"], "--minutes must be positive"),
        (["ops", "--threads", "0"], "--threads must be at least 1"),
        (
            ["ops", "--ops", "copy_to_host", "--dtypes", "fp32", "-o", "/proc/no/a.json"],
            "-o /proc/no/a.json: cannot write in /proc",
        ),
        (["collectives"], "start it with torchrun"),
        (["collectives", "--mesh", "2xz"], "--mesh 2xz: write axis sizes"),
        (["collectives", "--kinds", "gossip"], "--kinds: unknown 'gossip'"),
    ):
        out = [] if "-o" in arguments else ["-o", str(tmp_path / "a.json")]
        assert main([*arguments, *out]) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
    assert not list(tmp_path.iterdir())


def torchrun(ranks, out, *more):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "-m", "autopar.profiler"]
    command += ["collectives", "--minutes", "0.1", "--largest", "1048576", "-o", str(out), *more]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_collectives_under_torchrun(tmp_path):
    out = tmp_path / "links.json"
    done = torchrun(4, out)
    assert done.returncode == 0, done.stderr
    profile = Profile.load(out)
    axes = {(record.size, record.stride) for record in profile.collectives}
    assert axes == {(2, 1), (2, 2), (4, 1)}
    assert {record.kind for record in profile.collectives} == set(KINDS)
    assert {record.transport for record in profile.collectives} == {"gloo"}
    assert min(record.nbytes for record in profile.collectives) == 1024
    assert all(record.nodes == 1 and record.per_node == record.size for record in profile.collectives)
    assert 0.2 < profile.figures["overlap.compute"] < 50
    assert 0.2 < profile.figures["overlap.communication"] < 50
    again = torchrun(2, out, "--minutes", "0.3", "--kinds", "all_gather")
    assert again.returncode == 0, again.stderr
    more = Profile.load(out).collectives
    assert set(profile.collectives) < set(more)
    assert {(record.mesh, record.kind) for record in set(more) - set(profile.collectives)} == {("2", "all_gather")}


def test_a_file_that_is_no_profile_stops_all_ranks(monkeypatch, tmp_path):
    alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**alone, "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    out = tmp_path / "links.json"
    out.write_text("{}")
    with pytest.raises(BadInputError, match="not a profile"):
        measure_collectives(LinksRun(out))
    assert out.read_text() == "{}"
    assert not torch.distributed.is_initialized()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_the_mesh_must_have_all_ranks(monkeypatch, tmp_path):
    for name, value in {"RANK": 0, "WORLD_SIZE": 4, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(BadInputError, match="--mesh 2x3 has 6 ranks, torchrun started 4"):
        measure_collectives(LinksRun(tmp_path / "a.json", mesh=parse_mesh("2x3")))


def test_axes_one_by_one_and_jointly():
    assert list(axes_of((2, 4, 1))) == [(2, 4), (8, 1), (4, 1)]
    assert list(groups_of(2, 2, 8)) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert list(groups_of(4, 1, 4)) == [[0, 1, 2, 3]]


def test_links_are_fitted_with_residuals():
    """Latency and bandwidth of each tier come back from collectives that have them, within their noise."""
    records = []
    for nodes, step, bandwidth in ((1, 2e-6, 3e11), (2, 9e-6, 4e10)):
        for size in (4, 8):
            carriers = size // nodes if nodes > 1 else 1
            for power in range(10, 31, 2):
                nbytes = 1 << power
                moved = nbytes * (size - 1) / size / carriers
                for kind, passes in (("all_gather", 1), ("all_reduce", 2)):
                    noise = 1.05 if (power // 2) % 2 else 1 / 1.05
                    seconds = noise * (5e-6 + passes * ((size - 1) * step + moved / bandwidth))
                    records.append(collective(kind, nbytes, seconds, size, nodes=nodes, per_node=size // nodes))
    fits = {(fit.tier, fit.kind): fit for fit in fit_links(records)}
    for tier, step, bandwidth in (("intra_node", 2e-6, 3e11), ("inter_node", 9e-6, 4e10)):
        fit = fits[tier, "all"]
        assert fit.latency_s == pytest.approx(step, rel=0.1)
        assert fit.bandwidth == pytest.approx(bandwidth, rel=0.1)
        assert fit.start_s == pytest.approx(5e-6, abs=2e-6)
        assert 0.03 < fit.residual < 0.07
        assert fit.points == 44
        assert {kind for t, kind in fits if t == tier} == {"all", "all_gather", "all_reduce"}
    assert fit_links(records[:1]) == []
