"""The emitted train.py under torchrun: same samples and losses for every plan, checkpoints that change plans."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from plain_plans import plain_plan, small_llama

import autopar
from autopar.codegen.emit import emit
from autopar.codegen.prove import run_ranks
from autopar.codegen.runtime.data import RandomTokens, Tokens, sample_indices
from autopar.errors import VerificationError
from autopar.graph.ir import ModelGraph
from autopar.models import model_graph
from autopar.plan import Plan, Run, Stage

JOB = autopar.Job(global_batch=8, seq_len=16, dtype="fp64")
OPTIONS = ["--data", "corpus.txt", "--token-dtype", "uint8", "--steps", "6", "--lr", "1e-3", "--warmup", "2"]


@pytest.fixture(scope="module")
def graph() -> ModelGraph:
    return model_graph(small_llama(tied=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, graph: ModelGraph) -> Path:
    """Plans of one tied model: one process, and searched ones on four that are then cut and sharded otherwise."""
    root = tmp_path_factory.mktemp("train")
    model = small_llama(tied=True)
    (root / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog; " * 40)
    emit(plain_plan(graph, job=JOB, micro_batches=2, cluster="1x1:h100"), graph, root / "single", model.state_dict())
    fp32, cluster = replace(JOB, dtype="fp32"), autopar.Cluster.parse("1x4:cpu")
    tensor = autopar.search(model, fp32, cluster, fix={"tp": 2, "dp": 2, "pp": 1, "zero": 3, "micro_batch": 2})
    stages = autopar.search(model, fp32, cluster, fix={"pp": 2, "dp": 2, "tp": 1, "zero": 0, "micro_batch": 1})
    freed = autopar.search(
        model, fp32, cluster, fix={"tp": 2, "dp": 2, "pp": 1, "zero": 3, "reshard": "true", "micro_batch": 2}
    )
    half = replace(JOB, dtype="fp16", optimizer="sgd")
    near = {"order": "dp,pp,cp,tp", "recompute": "full"}  # ranks 0 and 1 are the stages of the first data rank
    ordered = autopar.search(
        model, fp32, cluster, fix={"pp": 2, "dp": 2, "tp": 1, "zero": 3, "schedule": "1f1b", "micro_batch": 1, **near}
    )
    outside = autopar.search(
        model, fp32, cluster, fix={"tp": 2, "dp": 2, "pp": 1, "zero": 2, "micro_batch": 2, "order": "tp,pp,cp,dp"}
    )
    plans = {
        "ordered": replace(ordered, job=JOB),
        "outside": replace(outside, job=JOB),
        "tp2dp2": replace(tensor, job=JOB),
        "interleaved": in_stages(replace(stages, job=JOB, zero=3, fsdp=2), "interleaved", 2),
        # There and back: the two copies of the tied weight are on the same rank.
        "zbv": in_stages(replace(stages, job=JOB, zero=1, fsdp=2), "zbv", 2),
        "half": replace(freed, job=half, zero=2, fsdp=2),
        "half_stages": in_stages(replace(stages, job=half), "dualpipev", 2),
    }
    for name, plan in plans.items():
        emit(plan, graph, root / name, model.state_dict())
    for name in ("half", "half_stages"):  # the loss scale doubles within the few steps of a test
        scaling = root / name / "runtime" / "scaling.py"
        assert scaling.read_text().count("interval: int = 2000") == 1
        scaling.write_text(scaling.read_text().replace("interval: int = 2000", "interval: int = 2"))
    return root


def in_stages(plan: Plan, schedule: str, per_rank: int) -> Plan:
    """The same under another schedule, its blocks cut evenly."""
    runs = [
        Run(i, i + 1, run.candidate) for stage in plan.stages for run in stage.runs for i in range(run.start, run.stop)
    ]
    count = plan.mesh.pp * per_rank
    edges = [len(runs) * place // count for place in range(count + 1)]
    stages = tuple(Stage(tuple(runs[start:stop]), 0.0, 0.0, 0.0, {}) for start, stop in itertools.pairwise(edges))
    return replace(plan, schedule=schedule, vpp=per_rank, stages=stages)


def losses(root: Path, plan: str, ranks: int, metrics: str, *options: str) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step of one run."""
    path = root / metrics
    run_ranks([f"{plan}/train.py", *OPTIONS, "--metrics", metrics, *options], ranks, 600, folder=root)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(row["tokens_per_second"] > 0 and row["peak_bytes"] > 0 for row in rows)
    return {row["step"]: (row["loss"], row["gradient_norm"]) for row in rows}


def loss_scale(checkpoint: Path) -> tuple[float, int]:
    """The loss scale that a checkpoint holds, and the steps since it changed."""
    state = {"loss_scale": {"value": torch.tensor(0.0), "good": torch.tensor(0)}}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(state, checkpoint_id=checkpoint)
    return float(state["loss_scale"]["value"]), int(state["loss_scale"]["good"])


def close(found: tuple[float, float], right: tuple[float, float]) -> bool:
    return all(abs(a - b) <= 1e-10 * abs(b) for a, b in zip(found, right, strict=True))


def test_losses_agree_and_checkpoints_change_plans(folder: Path) -> None:
    single = losses(folder, "single", 1, "single.jsonl", "--any-topology")
    assert sorted(single) == [1, 2, 3, 4, 5, 6]
    assert single[6][0] < single[1][0]

    saving = ("--checkpoint-dir", "ck", "--save-every", "2", "--keep", "2")
    sharded = losses(folder, "tp2dp2", 4, "tp2dp2.jsonl", *saving)
    assert all(close(sharded[step], single[step]) for step in single)
    assert sorted(path.name for path in (folder / "ck").iterdir()) == ["latest", "step_4", "step_6"]
    assert (folder / "ck" / "latest").read_text() == "step_6\n"

    saving = ("--checkpoint-dir", "ck2", "--save-every", "1")
    interleaved = losses(folder, "interleaved", 4, "interleaved.jsonl", "--resume", "ck/step_4", *saving)
    assert sorted(interleaved) == [5, 6]
    assert all(close(interleaved[step], single[step]) for step in interleaved)

    saving = ("--checkpoint-dir", "ck3", "--save-every", "6")
    back = losses(folder, "zbv", 4, "zbv.jsonl", "--resume", "ck2/step_5", *saving)
    assert sorted(back) == [6]
    assert close(back[6], single[6])

    (folder / "ck2" / "latest").write_text("step_5\n")
    again = losses(folder, "single", 1, "again.jsonl", "--resume", "--checkpoint-dir", "ck2", "--any-topology")
    assert sorted(again) == [6]
    assert close(again[6], single[6])


@pytest.mark.proof
def test_ranks_in_another_order_train_alike(folder: Path) -> None:
    """From the start, and from a checkpoint that ranks in yet another order wrote."""
    single = losses(folder, "single", 1, "first.jsonl", "--any-topology")
    saving = ("--checkpoint-dir", "ck4", "--save-every", "4")
    ordered = losses(folder, "ordered", 4, "ordered.jsonl", *saving)
    assert sorted(ordered) == [1, 2, 3, 4, 5, 6]
    assert all(close(ordered[step], single[step]) for step in single)
    outside = losses(folder, "outside", 4, "outside.jsonl", "--resume", "ck4/step_4")
    assert sorted(outside) == [5, 6]
    assert all(close(outside[step], single[step]) for step in outside)


@pytest.mark.proof
def test_float16_and_sgd_change_plans(folder: Path) -> None:
    saving = ("--checkpoint-dir", "ck16", "--save-every", "3", "--lr", "3e-2")
    first = losses(folder, "half", 4, "half.jsonl", *saving)
    assert sorted(first) == [1, 2, 3, 4, 5, 6]
    assert first[6][0] < first[1][0]
    kept = dcp.FileSystemReader(folder / "ck16" / "step_3").read_metadata().state_dict_metadata
    assert {"loss_scale.value", "optimizer.lm_head.weight.momentum_buffer"} <= {
        name.replace("model.embed_tokens", "lm_head") for name in kept
    }
    saving = ("--checkpoint-dir", "ck16b", "--save-every", "3", "--lr", "3e-2")
    stages = losses(folder, "half_stages", 4, "half2.jsonl", "--resume", "ck16/step_3", *saving)
    assert sorted(stages) == [4, 5, 6]
    assert all(stages[step] == pytest.approx(first[step], rel=1e-2) for step in stages)
    assert [loss_scale(folder / "ck16" / f"step_{step}") for step in (3, 6)] == [(2**17, 1), (2**19, 0)]
    assert loss_scale(folder / "ck16b" / "step_6") == (2**19, 0)


def test_wrong_world_size_is_one_line(folder: Path) -> None:
    with pytest.raises(VerificationError) as failure:
        run_ranks(["tp2dp2/train.py", *OPTIONS], 2, 60, folder=folder)
    said = [line for line in str(failure.value).splitlines() if line.startswith("train.py:")]
    assert said == ["train.py: this plan needs 4 processes (pp=1 x dp=2 x tp=2), but 2 were started: use launch.sh"]
    assert "exitcode: 2" in str(failure.value)


@pytest.mark.parametrize(
    ("world", "options", "message"),
    [
        ({"WORLD_SIZE": "3"}, OPTIONS, "this plan needs 1 process (pp=1 x dp=1 x tp=1), but 3 were started"),
        ({}, ["--data", "no/such/file"], "--data: no/such/file is neither a file nor a folder"),
        ({}, ["--data", "corpus.txt", "--token-dtype", "int32"], "--token-dtype?"),
        ({}, ["--data", "random", "--resume", "nowhere"], "--resume: no complete checkpoint in nowhere"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    folder: Path, world: dict[str, str], options: list[str], message: str
) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "single/train.py", *options],
        cwd=folder,
        env={**environment, **world, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


SLOW = """
import atexit, time
import torch
import torch.distributed as dist
from autopar.codegen.runtime import launch

class Slow(torch.Tensor):
    def __del__(self):
        for _ in range(20_000):  # the interpreter's lock is taken again and again
            time.sleep(0.001)

atexit.register(lambda: print("handler ran", flush=True))
mesh, _, _ = launch.start({"pp": 1, "dp": 2, "cp": 1}, 2, "cpu")
group, store = mesh["dp"].get_group(), dist.distributed_c10d._get_default_store()
if dist.get_rank() == 1:
    store.wait(["alone"])
x = torch.ones(4).as_subclass(Slow)
work = dist.all_reduce(x, async_op=True, group=group)
del work, x
if dist.get_rank() == 0:  # only a thread of gloo holds the tensor, until the other rank comes
    store.set("alone", "")
launch.stop()
launch.leave()
"""


def test_threads_that_let_go_late_do_not_abort_the_end(folder: Path, tmp_path: Path) -> None:
    """Where the interpreter shuts down instead, a rank nearly always aborts (SIGABRT)."""
    (tmp_path / "slow.py").write_text(SLOW)
    assert run_ranks(["slow.py"], 2, 60, folder=tmp_path).count("handler ran") == 2
    assert all("    launch.leave()\n" in path.read_text() for path in folder.glob("*/train.py"))


def test_samples_do_not_depend_on_the_mesh() -> None:
    for step in (0, 3):
        whole = sample_indices(step, 0, 1, 8, 1)
        assert whole == list(range(step * 8, step * 8 + 8))
        ranks = [sample_indices(step, rank, 2, 2, 2) for rank in range(2)]
        # Micro-batch 0 of all ranks comes first, then micro-batch 1.
        assert [ranks[r][m * 2 + i] for m in range(2) for r in range(2) for i in range(2)] == whole


def test_tokens_from_files_and_folders(tmp_path: Path) -> None:
    ids = torch.arange(64, dtype=torch.int32)
    (tmp_path / "ids.bin").write_bytes(ids.to(torch.uint16).numpy().tobytes())
    data = Tokens(tmp_path / "ids.bin", 16, 64, "uint16", "", seed=5)
    epoch = data.samples([0, 1, 2, 3])
    assert sorted(epoch[:, 0].tolist()) == [0, 16, 32, 48]
    assert torch.equal(epoch.sort(dim=0).values.flatten().sort().values, ids.long())
    assert not torch.equal(epoch, data.samples([4, 5, 6, 7])) or not torch.equal(epoch, data.samples([8, 9, 10, 11]))
    with pytest.raises(ValueError, match="vocabulary is 63"):
        Tokens(tmp_path / "ids.bin", 16, 63, "uint16", "", seed=5).samples([0, 1, 2, 3])

    (tmp_path / "texts" / "b").mkdir(parents=True)
    (tmp_path / "texts" / "b" / "2.txt").write_text("wxyz")
    (tmp_path / "texts" / "1.txt").write_text("abcd")
    (tmp_path / "texts" / "skip.md").write_text("####")
    text = Tokens(tmp_path / "texts", 4, 256, "uint16", "*.txt", seed=0)
    assert sorted(bytes(row).decode() for row in text.samples([0, 1]).tolist()) == ["abcd", "wxyz"]
    with pytest.raises(ValueError, match="less than one sample of 99"):
        Tokens(tmp_path / "texts", 99, 256, "uint16", "*.txt", seed=0)


def test_random_tokens_are_the_same_each_time() -> None:
    data = RandomTokens(8, 50, seed=1)
    assert torch.equal(data.samples([3, 4])[1], data.samples([4])[0])
    assert int(data.samples(list(range(20))).max()) < 50
