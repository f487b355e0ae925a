"""Where PyTorch is the reason for a limit: what it says, or does without a word, when the limit is not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import pipelining
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from autopar.cluster import Cluster
from autopar.codegen.emit import emit
from autopar.codegen.prove import run_ranks
from autopar.job import Job
from autopar.plan import Mesh
from autopar.schedule import SCHEDULES
from autopar.solver import capabilities
from autopar.solver.capabilities import LIMITS, Chosen, refusals
from autopar.solver.search import search
from proof.models import SEQ, Variant, graph_of

AVOIDS = {limit.name: limit.avoids for limit in LIMITS}


def schedule(choice: Chosen) -> Any:
    """The schedule of `torch.distributed.pipelining` as it would be built on rank 0, with a trivial stage."""
    kind = SCHEDULES[choice.schedule]
    made: Callable[..., Any] = getattr(pipelining, kind.torch_name)
    ranks, count = choice.mesh.pp, choice.mesh.pp * choice.vpp
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        own = [index for index in range(count) if kind.rank_of(index, ranks) == 0]
        stages = [PipelineStage(nn.Linear(2, 2), index, count, torch.device("cpu")) for index in own]
        return made(stages if kind.stages != 1 else stages[0], choice.micro_batches, loss_fn=nn.functional.mse_loss)
    finally:
        dist.destroy_process_group()


def choice(name: str, pp: int, vpp: int, micro_batches: int) -> Chosen:
    return Chosen(Mesh(pp=pp), name, vpp, micro_batches, 0, 1)


SAYS: dict[str, tuple[Chosen, Chosen]] = {
    "1f1b fills the pipeline": (choice("1f1b", 4, 1, 2), choice("1f1b", 4, 1, 4)),
    "interleaved goes in rounds": (choice("interleaved", 2, 2, 5), choice("interleaved", 2, 2, 4)),
    "dualpipev fills the pipeline": (choice("dualpipev", 2, 2, 3), choice("dualpipev", 2, 2, 4)),
    "stages on a rank": (choice("zbv", 2, 3, 4), choice("zbv", 2, 2, 4)),
}
"""For each limit that PyTorch states itself: a choice just past it, and one just inside."""


@pytest.mark.parametrize("name", SAYS)
def test_torch_says_what_the_limit_quotes(name: str) -> None:
    limit = next(limit for limit in LIMITS if limit.name == name)
    past, inside = SAYS[name]
    assert limit.breaks(past)
    assert not limit.breaks(inside)
    with pytest.raises(ValueError, match=r"\w+") as error:
        schedule(past)
    quoted = AVOIDS[name].partition('"')[2].rpartition('"')[0]
    assert quoted
    assert all(part in str(error.value) for part in quoted.split(" ... "))
    assert schedule(inside) is not None


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "zbv", "dualpipev"])
def test_limits_refuse_no_more_than_torch(name: str) -> None:
    """For every small number of ranks and micro-batches, the table and the schedule's constructor agree."""
    for ranks in (2, 3, 4):
        for count in range(1, 13):
            made = choice(name, ranks, SCHEDULES[name].stages or 2, count)
            refused = any(limit.breaks(made) for limit in LIMITS)
            try:
                schedule(made)
            except ValueError:
                assert refused, (name, ranks, count)
            else:
                assert not refused, (name, ranks, count)


DOES = (
    "split backward keeps gradients whole",
    "split backward recomputes too often",
    "two tensor axes",
    "context ranks inside data ranks",
)
"""The limits whose reason the tests below run."""


def test_every_limit_of_torch_is_shown() -> None:
    assert {name for name, avoids in AVOIDS.items() if avoids} == {*SAYS, *DOES}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What `stock.py` measures: by case, the error of the worst gradient and the runs of each block."""
    out = tmp_path_factory.mktemp("stock") / "found.json"
    run_ranks([str(Path(__file__).with_name("stock.py")), str(out)], 4, 200)
    return json.loads(out.read_text())  # type: ignore[no-any-return]


@pytest.mark.proof
@pytest.mark.parametrize("name", ["zbv", "dualpipev"])
def test_stock_split_backward_with_freed_parameters_is_silently_wrong(
    stock: dict[str, dict[str, Any]], name: str
) -> None:
    """As zero=3 would free them; as zero=1 keeps them, and under a schedule that does not split, all is right."""
    assert stock[f"{name} frees"]["error"] > 0.1
    assert stock[name]["error"] < 1e-12
    assert stock["1f1b frees"]["error"] < 1e-12
    broken = [limit.name for limit in refusals(replace(choice(name, 2, 2, 4), mesh=Mesh(2, 2), zero=3, fsdp=2))]
    assert broken == ["split backward keeps gradients whole"]
    assert not list(refusals(replace(choice(name, 2, 2, 4), mesh=Mesh(2, 2), zero=1, fsdp=2)))


@pytest.mark.proof
def test_split_backward_recomputes_too_often(
    stock: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recomputed block runs twice for each micro-batch; under a split backward again for each of its weights (except
    on the first stage, whose input has no gradient): with stock parts, and in emitted code without the limit."""
    assert set(stock["1f1b recomputes"]["runs"]) == {2}
    assert set(stock["zbv recomputes"]["runs"]) == {2, 2 + 2}, "of two linear layers"
    graph = graph_of(Variant())
    fixed = {"pp": 2, "dp": 2, "zero": 0, "micro_batch": 1}
    fixes = {
        "1f1b_none": {"schedule": "1f1b", "recompute": "none"},
        "1f1b_full": {"schedule": "1f1b", "recompute": "full"},
        "zbv_none": {"schedule": "zbv", "recompute": "none"},
    }
    job, cluster = Job(8, SEQ), Cluster.parse("1x4:h100")
    plans = {name: search(graph, job, cluster, {**fixed, **fix}) for name, fix in fixes.items()}
    recomputed = {key: replace(kept, recompute="full") for key, kept in plans["zbv_none"].candidates.items()}
    plans["zbv_full"] = replace(plans["zbv_none"], candidates=recomputed)
    assert [limit.name for limit in refusals(Chosen.of(plans["zbv_full"]))] == ["split backward recomputes too often"]
    monkeypatch.setattr(capabilities, "LIMITS", tuple(limit for limit in LIMITS if limit.name not in DOES))
    for name, plan in plans.items():
        emit(plan, graph, tmp_path / name)
    folders = [str(tmp_path / name) for name in plans]
    run_ranks([str(Path(__file__).with_name("counted.py")), str(tmp_path / "out.json"), *folders], 4, 200)
    runs = json.loads((tmp_path / "out.json").read_text())
    assert set(runs["1f1b_none"]) == set(runs["zbv_none"]) == {1}
    assert set(runs["1f1b_full"]) == {2}
    assert set(runs["zbv_full"]) == {2, 2 + 9}, "of nine weights, as the limit's text says"


def test_ranks_that_do_not_rise_hold_other_shards_than_they_say(stock: dict[str, dict[str, Any]]) -> None:
    """Where two axes are one for FSDP2: dp outside cp, as `launch.start` joins them, while ranks have cp outside dp."""
    assert stock["ranks rise"]["error"] < 1e-12
    assert stock["ranks do not rise"]["error"] > 0.1
    swapped = Chosen(Mesh(dp=2, cp=2, order=("pp", "cp", "dp", "tp")), "none", 1, 1, 3, 4)
    assert [limit.name for limit in refusals(swapped)] == ["context ranks inside data ranks"]
    assert not list(refusals(replace(swapped, mesh=Mesh(dp=2, cp=2, order=("dp", "tp", "cp", "pp")))))


def test_fsdp_takes_two_tensor_axes_at_most() -> None:
    quoted = AVOIDS["two tensor axes"].partition('"')[2].rpartition('"')[0]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=16)
    try:
        mesh = init_device_mesh("cpu", (2, 2, 2, 2), mesh_dim_names=("dp", "a", "b", "c"))
        for axes in (("a",), ("a", "b"), ("a", "b", "c")):
            part = nn.Linear(8, 8, bias=False)
            whole = distribute_tensor(part.weight.detach(), mesh[axes], [Shard(0)] * len(axes), src_data_rank=None)
            part.weight = nn.Parameter(whole)
            if len(axes) < 3:
                fully_shard(part, mesh=mesh["dp"])
                continue
            with pytest.raises(NotImplementedError) as error:
                fully_shard(part, mesh=mesh["dp"])
            assert quoted in str(error.value)
    finally:
        dist.destroy_process_group()
