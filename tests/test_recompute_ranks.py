"""Selective recomputation and offload on four gloo ranks: FSDP2, 1F1B and tensor parallelism, in one launch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from plain_plans import small_llama
from test_torchrun import SAMPLES, SEQ, batches, loss_of

import autopar
from autopar.codegen import prove
from autopar.models import model_graph
from autopar.solver.search import search

FORCED: dict[str, dict[str, Any]] = {
    "dp4 zero3 offload": {"dp": 4, "zero": 3, "recompute": "none", "offload": "activations"},
    "dp2 tp2 zero3 gathers again": {
        "dp": 2,
        "tp": 2,
        "zero": 3,
        "sp": True,
        "recompute": "selective(matmul+attention+reduce_scatter)",
    },
    "pp2 dp2 kept on the host": {
        "pp": 2,
        "dp": 2,
        "zero": 3,
        "offload": "activations",
        "recompute": "selective(matmul+attention)",
    },
    "pp2 tp2 blocks differ": {
        "pp": 2,
        "tp": 2,
        "sp": True,
        "recompute": "1-1:full,2-2:selective(attention+all_gather),3-3:none,4-4:selective(matmul)",
    },
    # What attention made only enters a kept all-to-all; its own gradient reads it all the same.
    "dp2 cp2 attention between all-to-alls": {
        "dp": 2,
        "cp": 2,
        "zero": 1,
        "recompute": "selective(matmul+attention+all_to_all)",
    },
}


@pytest.mark.proof
def test_plans_compute_what_one_device_does(tmp_path: Path) -> None:
    model = small_llama()
    graph = model_graph(model)
    job = autopar.Job(global_batch=SAMPLES, seq_len=SEQ, dtype="fp64")
    cluster = autopar.Cluster.parse("1x4:cpu")
    if not cluster.device.host_bandwidth:
        pytest.skip("this machine's copies were not measured")
    rest = {"dp": 1, "tp": 1, "pp": 1, "micro_batch": 1}
    plans = {name: search(graph, job, cluster, {**rest, **fix}) for name, fix in FORCED.items()}
    wide = model.double()
    weights = {key: value.clone() for key, value in wide.state_dict().items()}
    prove.prepare(tmp_path, plans, graph, weights, prove.one_device(wide, batches(), loss_of, steps=True))
    for file in tmp_path.glob("case_*/runtime/offload.py"):  # tensors of this model are small
        text = file.read_text()
        assert text.count("SMALL = 1 << 20") == 1
        file.write_text(text.replace("SMALL = 1 << 20", "SMALL = 0"))
    texts = [(tmp_path / f"case_{index}" / "module.py").read_text() for index in range(len(FORCED))]
    assert "offload(block, hidden" in texts[0]
    assert 'keep=("matmul", "attention")' in texts[1]
    assert "offload(\n" in texts[2]
    assert all(f'recompute == "{way}"' in texts[3] for way in ("full", "selective(attention+all_gather)"))
    rows = prove.prove(tmp_path, ranks=4, timeout_s=200)
    assert {row.name for row in rows} == set(FORCED)
    assert [failure for row in rows for failure in row.failures()] == []
