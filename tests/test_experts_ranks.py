"""Mixtures of experts on four gloo ranks: FSDP2, pipelines and split experts compute what one device does.

`pytest -s tests/test_experts_ranks.py` prints the table of measured errors.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixtures import mixture
from test_torchrun import loss_of
from torch import Tensor

import autopar
from autopar.codegen import prove
from autopar.models import model_graph
from autopar.solver.search import search

SAMPLES, SEQ = 8, 16

FORCED: dict[str, dict[str, Any]] = {
    "dp4 zero3": {"dp": 4, "zero": 3, "fsdp": 4, "micro_batch": 1},
    "dp4 zero2 half recompute": {"dp": 4, "zero": 2, "fsdp": 2, "recompute": "full", "micro_batch": 1},
    "tp4": {"tp": 4, "sp": True, "micro_batch": 4},
    "tp2 dp2 zero3 selective": {
        "dp": 2, "tp": 2, "zero": 3, "fsdp": 2, "recompute": "selective(matmul+attention)", "micro_batch": 2,
    },
    "tp2x2": {"tp": "2x2", "micro_batch": 4},
    "cp2 tp2": {"cp": 2, "tp": 2, "micro_batch": 2},
    "pp2 dp2 zbv": {"pp": 2, "dp": 2, "zero": 1, "fsdp": 2, "schedule": "zbv", "vpp": 2, "micro_batch": 1},
    "pp2 tp2": {"pp": 2, "tp": 2, "schedule": "1f1b", "micro_batch": 2},
    "ep2 dp4 zero3": {"dp": 4, "zero": 3, "fsdp": 4, "ep": 2, "micro_batch": 1},
    "ep4 dp4 zero0": {"dp": 4, "zero": 0, "ep": 4, "micro_batch": 1},
    "ep4 dp4 zero2 half recompute": {"dp": 4, "zero": 2, "fsdp": 2, "ep": 4, "micro_batch": 1, "recompute": "full"},
    "ep2 dp2 tp2 zero1": {"dp": 2, "tp": 2, "zero": 1, "fsdp": 2, "ep": 2, "micro_batch": 2},
    "ep2 pp2 dp2 zero3": {"pp": 2, "dp": 2, "zero": 3, "fsdp": 2, "ep": 2, "schedule": "1f1b", "micro_batch": 1},
    "ep4 cp2 dp2 zero1": {"cp": 2, "dp": 2, "zero": 1, "fsdp": 4, "ep": 4, "micro_batch": 2},
    "ep2 dp4 zero3 selective": {
        "dp": 4, "zero": 3, "fsdp": 4, "ep": 2, "micro_batch": 1, "recompute": "selective(matmul+all_to_all)",
    },
}  # fmt: skip
KINDS = {
    "mixtral": tuple(FORCED),
    "deepseek_v3": ("tp2 dp2 zero3 selective", "pp2 dp2 zbv", "ep4 dp4 zero0"),
    "gpt_oss": ("dp4 zero3", "cp2 tp2", "ep2 dp2 tp2 zero1"),
}
FLOAT32 = ("dp4 zero3", "tp4", "ep2 dp4 zero3")


def batches() -> list[dict[str, Tensor]]:
    """Three steps of token ids; some targets do not count."""
    ids = torch.randint(0, 64, (3, SAMPLES, SEQ), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, 0, 3:9] = -100
    return [{"input_ids": i, "labels": l} for i, l in zip(ids, labels, strict=True)]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[prove.Measured]:
    folder = tmp_path_factory.mktemp("experts")
    cluster = autopar.Cluster.parse("1x4:cpu")
    job = autopar.Job(global_batch=SAMPLES, seq_len=SEQ, dtype="fp32")
    one = {"pp": 1, "dp": 1, "cp": 1, "tp": 1, "recompute": "none"}
    for kind, fixes in KINDS.items():
        model = mixture(kind)
        graph = model_graph(model)
        plans = {f"{kind} {fix}": search(graph, job, cluster, one | FORCED[fix]) for fix in fixes}
        for dtype in ("fp32", "fp64"):  # the model does not come back from float64
            wide = model.double() if dtype == "fp64" else model
            weights = {key: value.clone() for key, value in wide.state_dict().items()}
            reference = prove.one_device(wide, batches(), loss_of, steps=dtype == "fp64", dtype=dtype)
            names = fixes if dtype == "fp64" else [fix for fix in fixes if fix in FLOAT32]
            cases = {f"{kind} {fix}": prove.with_dtype(plans[f"{kind} {fix}"], dtype) for fix in names}
            prove.prepare(folder, cases, graph, weights, reference)
    rows = prove.prove(folder, ranks=4, timeout_s=1500)
    print("\n" + prove.table(rows))
    return rows


@pytest.mark.long
def test_loss_gradients_and_steps_agree_with_one_device(measured: list[prove.Measured]) -> None:
    wide = [fix for fixes in KINDS.values() for fix in fixes]
    assert len(measured) == len(wide) + sum(fix in FLOAT32 for fix in wide)
    assert [failure for row in measured for failure in row.failures()] == []
