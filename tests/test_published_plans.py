"""Published configurations beside ours: what the records become, and that theirs is never predicted faster."""

import json
import sys
from math import prod
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from published_choice import choose, refusal  # noqa: E402
from published_measured import seconds  # noqa: E402
from published_plans import compare, missed, table, text  # noqa: E402
from published_rows import cluster_of, config_of, fix_of, job_of  # noqa: E402

RECORDS = json.loads((BENCHMARKS / "data" / "published.json").read_text())["records"]
BY_ID = {record["id"]: record for record in RECORDS}


def changed(identity, **fields):
    return {**BY_ID[identity], **fields}


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["id"])
def test_every_record_is_whole(record):
    assert refusal(record) is None
    assert record["source"]
    assert cluster_of(record).devices == record["hardware"]["count"]
    fix = fix_of(record)
    assert prod(fix[axis] for axis in ("pp", "dp", "cp", "tp")) == record["hardware"]["count"]
    assert record["global_batch"] % (fix["dp"] * fix["micro_batch"]) == 0
    assert job_of(record).seq_len == record["model"]["seq_len"]
    assert seconds(record) > 0
    assert config_of(record)["vocab_size"] > 0


def test_what_a_source_leaves_open_is_not_fixed():
    record = BY_ID["automodel_Llama3_70B"]
    assert record["recompute"] is None
    mesh = {"pp": 1, "dp": 32, "cp": 2, "tp": 1, "ep": 1}
    assert fix_of(record) == {**mesh, "micro_batch": 1, "zero": 3, "fsdp": 32, "reshard": "true"}
    assert fix_of(BY_ID["vtrain_multi_0042"])["stages"] == "13,12,12,13"


@pytest.mark.parametrize(
    ("stage", "zero", "fsdp"),
    [(3, 3, 128), ("hsdp", 3, 8), ("1 (shard group 4)", 1, 4), ("1 (shard over all DP)", 1, 128), (0, 0, None)],
)
def test_zero_levels(stage, zero, fsdp):
    fix = fix_of(changed("fms_7B_a100", zero_stage=stage))
    assert (fix["zero"], fix.get("fsdp")) == (zero, fsdp)


@pytest.mark.parametrize(
    ("words", "bandwidth"),
    [
        ("4x100Gb RoCE per node", 6.25e9),
        ("400Gbps per node", 6.25e9),
        ("RDMA 400Gb/s per GPU", 50e9),
        ("8x HDR 200Gb/s IB per node", 25e9),
        (None, 25e9),  # the catalog's
    ],
)
def test_ports_between_nodes(words, bandwidth):
    record = BY_ID["fms_7B_a100"]
    link = cluster_of({**record, "hardware": {**record["hardware"], "inter_node_link": words}}).inter_node
    assert link.bandwidth / link.shared_by == bandwidth


def test_records_are_chosen_or_counted():
    record = BY_ID["vtrain_single_0479"]
    slow = changed("vtrain_single_0479", id="slow", measured={**record["measured"], "step_time_s": 9.0})
    other = {**slow, "id": "other", "tp": 2}
    odd = {**record, "dtype": "fp8"}
    chosen, left = choose([slow, odd, other, record])
    assert [found["id"] for found in chosen] == [record["id"], "other"]
    assert sum(left.values()) == 2
    assert left["fp8 or narrower"] == 1


def test_what_is_not_compared():
    record = BY_ID["automodel_Llama3_70B"]
    model, hardware = record["model"], record["hardware"]
    assert refusal({**record, "model": {**model, "moe": {"experts": 8, "topk": 2}}}).startswith("model with experts")
    assert "TPUv4" in refusal({**record, "hardware": {**hardware, "gpu": "TPUv4"}})
    assert refusal({**record, "hardware": {**hardware, "gpu": "GB200"}}) == "device that is not compared"


@pytest.mark.proof  # a minute and a half
@pytest.mark.parametrize("identity", ["vtrain_single_0479", "internevo_tgs_tp2_z4_16"])
def test_theirs_is_never_predicted_faster(identity):
    (entry,) = compare([BY_ID[identity]])
    assert missed([entry]) == []
    assert entry["gain"] >= 0
    theirs, ours = entry["theirs"]["step_time_s"], entry["ours"]["step_time_s"]
    assert entry["gain"] == pytest.approx(theirs / ours - 1)
    assert sum(entry["from"].values()) == pytest.approx(theirs - ours)
    if "path" in entry:
        assert sum(entry["path"].values()) == pytest.approx(entry["gain"])
    assert identity in text(entry)


def test_a_faster_one_is_named():
    entry = {"id": "x", "devices": 8, "measured_s": 1.0, "ours": {"step_time_s": 2.0}}
    faster = {**entry, "gain": -0.01, "theirs": {"step_time_s": 1.98}, "from": {}}
    assert missed([entry, faster]) == ["x"]
    assert "x " in table([entry])
