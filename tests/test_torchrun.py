"""The proof on four gloo ranks: every forced plan computes what one device does, in one launch of torchrun.

`pytest -s tests/test_torchrun.py` prints the table of measured errors.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_plans import small_gpt2, small_llama
from torch import Tensor, nn

import autopar
from autopar.codegen import prove
from autopar.errors import VerificationError
from autopar.graph.interpret import keep_wide
from autopar.models import model_graph
from autopar.solver.search import search

SAMPLES, SEQ = 8, 16

FORCED: dict[str, dict[str, Any]] = {
    "dp4": {"dp": 4, "zero": 0, "micro_batch": 1},
    "dp4 recompute": {"dp": 4, "zero": 0, "recompute": "full", "micro_batch": 2},
    "dp4 zero1 offload": {"dp": 4, "zero": 1, "fsdp": 4, "offload": "state", "micro_batch": 1},
    "dp4 zero2 half": {"dp": 4, "zero": 2, "fsdp": 2, "micro_batch": 1},
    "dp4 zero3": {"dp": 4, "zero": 3, "fsdp": 4, "micro_batch": 1},
    "tp4": {"tp": 4, "sp": False, "micro_batch": 4},
    "tp4 sp": {"tp": 4, "sp": True, "micro_batch": 8},
    "tp2x2": {"tp": "2x2", "micro_batch": 4},
    "tp2 dp2": {"dp": 2, "tp": 2, "zero": 0, "micro_batch": 2},
    "tp2 dp2 zero3 recompute": {"dp": 2, "tp": 2, "zero": 3, "fsdp": 2, "recompute": "full", "micro_batch": 2},
    "cp2 dp2 zero3": {"cp": 2, "dp": 2, "zero": 3, "fsdp": 4, "micro_batch": 2},
    "pp2 cp2 zero2": {"pp": 2, "cp": 2, "zero": 2, "fsdp": 2, "schedule": "1f1b", "micro_batch": 2},
    "pp2 dp2 gpipe": {"pp": 2, "dp": 2, "zero": 0, "schedule": "gpipe", "micro_batch": 1},
    "pp2 dp2 zero3": {"pp": 2, "dp": 2, "zero": 3, "fsdp": 2, "schedule": "1f1b", "micro_batch": 1},
    "pp2 dp2 zero2 recompute": {
        "pp": 2, "dp": 2, "zero": 2, "fsdp": 2, "schedule": "1f1b", "recompute": "full", "micro_batch": 2,
    },
    "pp2 dp2 interleaved zero3": {
        "pp": 2, "dp": 2, "zero": 3, "fsdp": 2, "schedule": "interleaved", "vpp": 2, "micro_batch": 1,
    },
    "pp2 dp2 zbv zero1": {"pp": 2, "dp": 2, "zero": 1, "fsdp": 2, "schedule": "zbv", "vpp": 2, "micro_batch": 1},
    "pp2 tp2 dualpipev": {"pp": 2, "tp": 2, "schedule": "dualpipev", "vpp": 2, "micro_batch": 2},
    "pp4": {"pp": 4, "schedule": "1f1b", "micro_batch": 2},
    "pp2 tp2 recompute": {"pp": 2, "tp": 2, "sp": True, "schedule": "1f1b", "recompute": "full", "micro_batch": 1},
}  # fmt: skip
"""What is fixed of each plan; axes that are not named have size 1, and nothing is recomputed."""

FLOAT32 = ("dp4", "tp4 sp", "tp2 dp2 zero3 recompute", "pp2 dp2 zero3")
"""The plans that run in float32 too, where gloo reduces otherwise."""


def batches() -> list[dict[str, Tensor]]:
    """Three steps of token ids; some targets do not count, unevenly over samples."""
    ids = torch.randint(0, 256, (3, SAMPLES, SEQ), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, 0, 3:9] = -100
    labels[:, 5, :] = -100
    return [{"input_ids": i, "labels": l} for i, l in zip(ids, labels, strict=True)]


def loss_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    double = next(model.parameters()).dtype == torch.float64
    with keep_wide() if double else nullcontext():
        return model(**batch).loss  # type: ignore[no-any-return]


BROKEN = {
    # Gradients of norm weights that sequence-split ranks share are left unsummed.
    "llama tp4 sp": (
        "runtime/collectives.py",
        "return _reduced(gradient, ctx.axis), None\n\n\nclass _Shard(",
        "return gradient, None\n\n\nclass _Shard(",
    ),
    # FSDP2's own factor instead of one division by all tokens.
    "llama dp4": ("runtime/sharding.py", "set_gradient_divide_factor(1.0)", "set_gradient_divide_factor(2.0)"),
    # Each stage keeps the gradient of its own copy of the tied embedding.
    "gpt2 pp4": ("runtime/step.py", "self.tied.add_gradients()", "pass"),
    # Of two copies on one rank, the gradient of the first alone.
    "gpt2 pp2 dp2 zbv zero1": ("runtime/tied.py", "sum(parts[1:], parts[0])", "parts[0]"),
}
"""Mistakes that the proof has to notice: in which emitted file, what is replaced by what."""


def break_cases(folder: Path) -> None:
    """Add a copy of some cases with a mistake in each."""
    cases = json.loads((folder / "cases.json").read_text())
    for case in list(cases):
        if case["name"] in BROKEN and case["dtype"] == "fp64":
            file, old, new = BROKEN[case["name"]]
            broken = {**case, "name": f"broken {case['name']}", "folder": f"broken_{case['folder']}"}
            shutil.copytree(folder / case["folder"], folder / broken["folder"])
            source = (folder / broken["folder"] / file).read_text()
            assert source.count(old) == 1
            (folder / broken["folder"] / file).write_text(source.replace(old, new))
            cases.append(broken)
    (folder / "cases.json").write_text(json.dumps(cases))


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> list[prove.Measured]:
    folder = tmp_path_factory.mktemp("proof")
    cluster = autopar.Cluster.parse("1x4:cpu")
    job = autopar.Job(global_batch=SAMPLES, seq_len=SEQ, dtype="fp32")
    for name, model in (("llama", small_llama()), ("gpt2", small_gpt2())):
        graph = model_graph(model)
        one = {"pp": 1, "dp": 1, "cp": 1, "tp": 1, "recompute": "none"}
        plans = {f"{name} {fix}": search(graph, job, cluster, one | FORCED[fix]) for fix in FORCED}
        for dtype in ("fp32", "fp64"):
            wide = model.double() if dtype == "fp64" else model
            weights = {key: value.clone() for key, value in wide.state_dict().items()}
            reference = prove.one_device(wide, batches(), loss_of, steps=dtype == "fp64")
            chosen = FORCED if dtype == "fp64" else FLOAT32
            cases = {f"{name} {fix}": prove.with_dtype(plans[f"{name} {fix}"], dtype) for fix in chosen}
            prove.prepare(folder, cases, graph, weights, reference)
    break_cases(folder)
    rows = prove.prove(folder, ranks=4, timeout_s=400)
    print("\n" + prove.table(rows))
    return rows


@pytest.fixture
def measured(everything: list[prove.Measured]) -> list[prove.Measured]:
    return [row for row in everything if not row.name.startswith("broken")]


def test_mistakes_are_noticed(everything: list[prove.Measured]) -> None:
    broken = {row.name.removeprefix("broken "): row for row in everything if row.name.startswith("broken")}
    assert set(broken) == set(BROKEN)
    assert all(row.failures() for row in broken.values())
    assert "norm" in broken["llama tp4 sp"].worst_gradient
    for name in ("gpt2 pp4", "gpt2 pp2 dp2 zbv zero1"):
        assert broken[name].worst_gradient == "transformer.wte.weight"
    assert broken["llama dp4"].gradient > 0.1


def test_every_forced_plan_was_measured(measured: list[prove.Measured]) -> None:
    found = {(row.name, row.dtype) for row in measured}
    dtypes = {fix: ("fp32", "fp64") if fix in FLOAT32 else ("fp64",) for fix in FORCED}
    assert found == {(f"{m} {fix}", dtype) for m in ("llama", "gpt2") for fix in FORCED for dtype in dtypes[fix]}
    assert all((row.parameter is not None) == (row.dtype == "fp64") for row in measured)


def test_loss_gradients_and_steps_agree_with_one_device(measured: list[prove.Measured]) -> None:
    assert [failure for row in measured for failure in row.failures()] == []


def test_gradient_norm_counts_everything_once(measured: list[prove.Measured]) -> None:
    assert all(row.norm is not None and row.norm < prove.TOLERANCES[row.dtype] for row in measured)


def test_gradient_error_has_a_floor_for_zero_gradients() -> None:
    reference = {"w": torch.full((4,), 2.0), "bias": torch.zeros(4)}
    errors = prove.gradient_errors({"w": torch.full((4,), 2.002), "bias": torch.full((4,), 1e-9)}, reference)
    assert errors["w"] == pytest.approx(1e-3, rel=1e-3)
    assert errors["bias"] == pytest.approx(2e-9 / (1e-3 * 4.0 / 2**0.5), rel=1e-3)


def test_errors_past_their_tolerance_are_named() -> None:
    good = prove.Measured("p", "fp64", 1e-12, 1e-12, "w", 0.0, 1e-12, "w")
    assert good.failures() == []
    bad = prove.Measured("p", "fp64", float("nan"), 1e-3, "w", 0.0, 1e-3, "v")
    assert [text.split(" is off")[0] for text in bad.failures()] == [
        "p fp64: loss",
        "p fp64: the gradient of w",
        "p fp64: after 3 steps v",
    ]


def test_ranks_that_fail_or_hang_are_ended(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text("raise SystemExit('no such thing')")
    with pytest.raises(VerificationError, match="no such thing"):
        prove.run_ranks(["fails.py"], 2, 60, folder=tmp_path)
    (tmp_path / "hangs.py").write_text(
        "import os, pathlib, time\npathlib.Path(f'pid_{os.getpid()}').touch()\ntime.sleep(600)"
    )
    with pytest.raises(VerificationError, match="no end after 8 s"):
        prove.run_ranks(["hangs.py"], 2, 8, folder=tmp_path)
    for started in tmp_path.glob("pid_*"):
        assert not Path("/proc", started.name[4:]).exists()
