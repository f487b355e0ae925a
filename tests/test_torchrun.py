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
from plain_plans import plain_plan, small_gpt2, small_llama
from torch import Tensor, nn

import autopar
from autopar.codegen import prove
from autopar.codegen.compare import TOLERANCES, gradient_errors
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
    "cp4 ring": {"cp": 4, "context": "ring", "micro_batch": 4, "recompute": "selective(attention)"},
    "cp2 dp2 ring zero3": {"cp": 2, "dp": 2, "zero": 3, "fsdp": 4, "context": "ring", "micro_batch": 2},
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
    "pp2 dp2 zero3 stages near": {
        "pp": 2, "dp": 2, "zero": 3, "fsdp": 2, "schedule": "1f1b", "micro_batch": 1, "order": "dp,pp,cp,tp",
    },
    "tp2 dp2 zero3 tp outside": {"dp": 2, "tp": 2, "zero": 3, "fsdp": 2, "micro_batch": 2, "order": "tp,cp,pp,dp"},
    "cp2 tp2 cp inside": {"cp": 2, "tp": 2, "sp": True, "micro_batch": 2, "order": "tp,pp,dp,cp"},
    "pp4": {"pp": 4, "schedule": "1f1b", "micro_batch": 2},
    "pp2 tp2 recompute": {"pp": 2, "tp": 2, "sp": True, "schedule": "1f1b", "recompute": "full", "micro_batch": 1},
}  # fmt: skip
"""What is fixed of each plan; axes that are not named have size 1, and nothing is recomputed."""

FLOAT32 = ("dp4", "tp4 sp", "tp2 dp2 zero3 recompute", "pp2 dp2 zero3")
"""The plans that run in float32 too, where gloo reduces otherwise."""

DTYPES = {
    "fp64": tuple(FORCED),
    "fp32": FLOAT32,
    "bf16": ("dp4", "tp4 sp", "cp4 ring", "pp2 dp2 zero3", "pp4"),
    "fp16": ("tp4 sp", "pp2 dp2 zero3"),
}
"""The plans of each dtype."""


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

BROKEN_DTYPES = {"fp64": tuple(BROKEN), "bf16": ("llama tp4 sp", "llama dp4", "gpt2 pp4"), "fp16": ("llama tp4 sp",)}
"""In which dtypes: what rounding does must not hide them."""


def break_cases(folder: Path) -> None:
    """Add a copy of some cases with a mistake in each."""
    cases = json.loads((folder / "cases.json").read_text())
    for case in list(cases):
        if case["name"] in BROKEN_DTYPES.get(case["dtype"], ()):
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
        for dtype in ("fp32", "bf16", "fp16", "fp64"):  # the model does not come back from float64
            wide = model.double() if dtype == "fp64" else model
            weights = {key: value.clone() for key, value in wide.state_dict().items()}
            reference = prove.one_device(wide, batches(), loss_of, steps=dtype == "fp64", dtype=dtype)
            cases = {f"{name} {fix}": prove.with_dtype(plans[f"{name} {fix}"], dtype) for fix in DTYPES[dtype]}
            prove.prepare(folder, cases, graph, weights, reference)
    break_cases(folder)
    rows = prove.prove(folder, ranks=4, timeout_s=400)
    print("\n" + prove.table(rows))
    return rows


@pytest.fixture
def measured(everything: list[prove.Measured]) -> list[prove.Measured]:
    return [row for row in everything if not row.name.startswith("broken")]


@pytest.mark.proof
def test_mistakes_are_noticed(everything: list[prove.Measured]) -> None:
    broken = {(row.dtype, row.name.removeprefix("broken ")): row for row in everything if row.name.startswith("broken")}
    assert set(broken) == {(dtype, name) for dtype, names in BROKEN_DTYPES.items() for name in names}
    for (_, name), row in broken.items():
        # Each error is far past its limit, not only past it.
        assert row.failures()
        assert max(error / most for error, most in row.shares().values()) > 4
        if name == "llama tp4 sp":
            assert "norm" in row.worst_gradient
        if name.startswith("gpt2"):
            assert row.worst_gradient == "transformer.wte.weight"
        if name == "llama dp4":
            assert row.gradient > 0.1


@pytest.mark.proof
def test_every_forced_plan_was_measured(measured: list[prove.Measured]) -> None:
    found = {(row.name, row.dtype) for row in measured}
    assert found == {(f"{m} {fix}", dtype) for m in ("llama", "gpt2") for dtype in DTYPES for fix in DTYPES[dtype]}
    assert all((row.parameter is not None) == (row.dtype == "fp64") for row in measured)


@pytest.mark.proof
def test_loss_gradients_and_steps_agree_with_one_device(measured: list[prove.Measured]) -> None:
    assert [failure for row in measured for failure in row.failures()] == []


@pytest.mark.proof
def test_gradient_norm_counts_everything_once(measured: list[prove.Measured]) -> None:
    assert all(row.norm < TOLERANCES[row.dtype] for row in measured if row.dtype in TOLERANCES)
    wrong = prove.Measured("p", "fp32", 0.0, 0.0, "w", 1e-3, None, "")
    assert wrong.failures() == ["p fp32: the gradient norm is off by 1.0e-03 (at most 1e-05)"]


def test_gradient_error_has_a_floor_for_zero_gradients() -> None:
    reference = {"w": torch.full((4,), 2.0), "bias": torch.zeros(4)}
    errors = gradient_errors({"w": torch.full((4,), 2.002), "bias": torch.full((4,), 1e-9)}, reference)
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


def test_sixteen_bit_limits_are_multiples_of_what_one_device_is_off() -> None:
    once = 2.0**-8  # bfloat16 has eight significant bits: a number rounded once
    own = (1e-6, 2e-2, 1e-2)
    good = prove.Measured("p", "bf16", 1.9 * once, 3.9e-2, "w", 1.4e-2, None, "", 1.4e-2, own)
    assert good.failures() == []
    bad = prove.Measured("p", "bf16", 2.1 * once, 4.1e-2, "w", 1.6e-2, None, "", 1.6e-2, own)
    assert [text.split(" is off")[0] for text in bad.failures()] == [
        "p bf16: loss",
        "p bf16: the gradient of w",
        "p bf16: the whole gradient",
        "p bf16: the gradient norm",
    ]


@pytest.mark.parametrize(("dtype", "bits"), [("bf16", 8), ("fp16", 11)])
def test_one_device_in_sixteen_bits_is_off_by_some_roundings(dtype: str, bits: int, tmp_path: Path) -> None:
    model = small_llama()
    reference = prove.one_device(model, batches(), loss_of, steps=False, dtype=dtype)
    plain = prove.one_device(model, batches(), loss_of, steps=False)
    assert all(torch.equal(reference["gradients"][name], right) for name, right in plain["gradients"].items())
    assert reference["own"]["gradients"].keys() == reference["gradients"].keys()
    assert all(0 < error < 20 * 2.0**-bits for error in reference["own"]["gradients"].values())
    assert 2.0**-bits / 2 < reference["own"]["whole"] < 6 * 2.0**-bits
    plan = plain_plan(model_graph(model), job=autopar.Job(SAMPLES, SEQ, dtype))
    with pytest.raises(ValueError, match=f"p: what one device in {dtype} is off was not measured"):
        prove.prepare(tmp_path, {"p": plan}, model_graph(model), {}, plain)
