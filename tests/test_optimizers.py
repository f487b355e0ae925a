"""SGD and float16 in emitted scripts: as one process, resumed under another plan, overflows skipped everywhere."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plain_plans import small_llama

import autopar
from autopar.codegen.emit import emit
from autopar.codegen.prove import run_ranks
from autopar.codegen.runtime.scaling import LossScale
from autopar.errors import BadInputError
from autopar.models import model_graph

OPTIONS = ["--data", "corpus.txt", "--token-dtype", "uint8", "--steps", "4", "--warmup", "1"]


def test_optimizers_and_dtypes_are_named() -> None:
    assert (autopar.Job(8, 16, optimizer="sgd").moments, autopar.Job(8, 16).moments) == (1, 2)
    assert autopar.Job(8, 16, dtype="fp16").master_bytes == 4
    with pytest.raises(BadInputError, match="unknown optimizer 'lion'; one of adamw, sgd"):
        autopar.Job(8, 16, optimizer="lion")


def test_the_scale_halves_after_an_overflow_and_grows_after_quiet_steps() -> None:
    scale = LossScale(initial=8.0, interval=2, largest=16.0)
    assert not scale.accepts(torch.tensor(float("inf")))
    assert not scale.accepts(torch.tensor(float("nan")))
    assert scale.value.item() == 2.0
    taken = [scale.accepts(torch.tensor(1.0)) for _ in range(8)]
    assert all(taken)
    assert scale.value.item() == 16.0  # doubled three times, and no further than the largest
    for _ in range(9):
        scale.accepts(torch.tensor(float("inf")))
    assert scale.value.item() == 1.0


def run(folder: Path, plan: str, ranks: int, *options: str) -> dict[int, tuple[float, float]]:
    metrics = f"{plan}{len(options)}.jsonl"
    run_ranks([f"{plan}/train.py", *OPTIONS, "--metrics", metrics, *options], ranks, 600, folder=folder)
    rows = [json.loads(line) for line in (folder / metrics).read_text().splitlines()]
    return {row["step"]: (row["loss"], row["gradient_norm"]) for row in rows}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One plan for one process and two for four ranks, each with SGD in float64 and with AdamW in float16."""
    root = tmp_path_factory.mktemp("optimizers")
    (root / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog; " * 40)
    model = small_llama(tied=True)
    graph = model_graph(model)
    fixes = {
        "one": ("1x1:h100", {"micro_batch": 2}),
        "sharded": ("1x4:h100", {"tp": 2, "dp": 2, "zero": 3, "micro_batch": 2}),
        "piped": ("1x4:h100", {"pp": 2, "dp": 2, "micro_batch": 1}),
    }
    for name, (cluster, fix) in fixes.items():
        for kind, optimizer, dtype in (("sgd", "sgd", "fp64"), ("fp16", "adamw", "fp16")):
            job = autopar.Job(8, 16, "bf16", optimizer)
            plan = autopar.search(model, job, autopar.Cluster.parse(cluster), fix=fix)
            plan = replace(plan, job=replace(job, dtype=dtype))
            emit(plan, graph, root / f"{name}_{kind}", model.state_dict())
    return root


def test_sgd_goes_on_under_another_plan(folder: Path) -> None:
    one = run(folder, "one_sgd", 1, "--any-topology", "--lr", "0.1")
    saving = ("--checkpoint-dir", "ck", "--save-every", "2", "--lr", "0.1")
    sharded = run(folder, "sharded_sgd", 4, *saving)
    piped = run(folder, "piped_sgd", 4, "--resume", "ck/step_2", "--lr", "0.1")
    assert one[4][0] < one[1][0]
    assert (sorted(sharded), sorted(piped)) == ([1, 2, 3, 4], [3, 4])
    for found in (sharded, piped):
        for step, values in found.items():
            assert values == pytest.approx(one[step], rel=1e-10)


def test_float16_trains_with_a_scaled_loss(folder: Path) -> None:
    train = (folder / "piped_fp16" / "train.py").read_text()
    assert "COMPUTE_DTYPE = torch.float16" in train
    # A scale that overflows float16 at first: every rank has to skip the same steps.
    for name in ("one", "piped"):
        script = folder / f"{name}_fp16" / "train.py"
        script.write_text(script.read_text().replace("LossScale()", "LossScale(2.0**19)"))
    one = run(folder, "one_fp16", 1, "--any-topology", "--lr", "1e-2", "--steps", "12")
    piped = run(folder, "piped_fp16", 4, "--lr", "1e-2", "--steps", "12")
    overflows = [step for step, (_, norm) in one.items() if not norm < float("inf")]
    assert overflows[:1] == [1]
    assert len(overflows) < 8
    assert [step for step, (_, norm) in piped.items() if not norm < float("inf")] == overflows
    assert one[12][0] < one[1][0]
    for step in one:
        assert piped[step][0] == pytest.approx(one[step][0], rel=2e-3)
