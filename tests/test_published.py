"""Published runs: what records become, what is counted, and the command on a few of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from autopar import Cluster
from autopar.stack import stack_of

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from published import RUNS, SWEEPS, figures, predicted, read  # noqa: E402
from published_measured import (  # noqa: E402
    devices_of,
    seconds,
    workspace_bytes,
)
from published_rows import cluster_of, config_of, fix_of, job_of, recomputing  # noqa: E402
from published_stacks import stack_name  # noqa: E402
from published_stats import kendall_tau, regret, summary, sweep_figures, trivial_seconds  # noqa: E402
from published_tidy import RefusedError, tidied  # noqa: E402

RECORDS = read(RUNS)
BY_ID = {record["id"]: record for record in RECORDS}
SMALL = ("vtrain_single_0820", "vtrain_single_0370")


def of_group(name):
    return next(record for record in RECORDS if record["group"] == name)


def test_errors():
    assert summary([0.1, -0.3, 0.2]) == {"mape": pytest.approx(0.2), "median": 0.1, "p90": 0.3}
    assert summary([]) == {"mape": None, "median": None, "p90": None}


def test_ranking():
    agreed, reversed_, tied = [(1, 10), (2, 20), (3, 30)], [(1, 30), (2, 20), (3, 10)], [(1, 5), (1, 7)]
    assert (kendall_tau(agreed), kendall_tau(reversed_), kendall_tau(tied)) == (1.0, -1.0, None)
    assert regret([(1, 12), (2, 10)]) == pytest.approx(0.2)
    rows = {name: {"predicted_s": p, "measured_s": m} for name, p, m in (("a", 1, 12), ("b", 2, 10), ("c", 3, None))}
    found = sweep_figures([{"ids": ["a", "b", "c"]}, {"ids": ["a", "gone"]}], rows)
    assert found == {"tau": -1.0, "regret": pytest.approx(0.2), "sweeps": 1}


def test_the_trivial_formula():
    assert trivial_seconds(1e9, 1e6, 300e12, 8) == pytest.approx(6e15 / (0.45 * 300e12 * 8))


@pytest.mark.parametrize(
    ("group", "stack"),
    [
        ("vtrain_multi", "megatron-deepspeed"),
        ("internevo", "internevo"),
        ("llm_foundry_mpt", "composer"),
        ("torchtitan", "compiled"),
        ("megatron_bridge", "megatron-recipes"),
    ],
)
def test_stacks(group, stack):
    found = [stack_name(record) for record in RECORDS if record["group"] == group]
    assert found.count(stack) >= len(found) / 2


def test_eager_is_not_compiled():
    assert stack_name(BY_ID["titan_8b_8_eager"]) == "torch"
    assert stack_name(BY_ID["titan_8b_8_compile"]) == "compiled"


@pytest.mark.parametrize(
    ("told", "stack"),
    [
        ({}, "megatron"),
        ({"transformer-impl": "local"}, "megatron-unfused"),
        ({"cross-entropy-loss-fusion": True}, "megatron-compiled-loss"),
    ],
)
def test_recipes_name_variants(told, stack):
    assert stack_name({**of_group("megatron_ci_golden_small"), "ci_args": told}) == stack


def test_torchtitan_compiles_the_loss_from_2025_on():
    assert stack_name(BY_ID["titan_8b_h200_4n"]) == "compiled-loss"


def test_containers_name_variants():
    new, old = (
        next(record for record in RECORDS if record["id"].startswith(f"bridge_{container}_Qwen3_30B_a3B_DGX-GB200"))
        for container in ("26.06", "26.04")
    )
    dense = {**new, "model": {**new["model"], "moe": None}}
    assert stack_name(new) == "megatron-graphs"
    assert {stack_name(record) for record in (old, dense, {**new, "dtype": "bf16"})} == {"megatron-recipes"}
    assert stack_name({**old, "dtype": "nvfp4"}) == "megatron-recipes-fp4"
    assert stack_name({**old, "source": "somebody's Megatron-LM"}) == "megatron"


def test_recipes_hide_what_experts_send_to_other_nodes():
    """Where stages are interleaved: eight devices a node, or the rack of an NVL72."""
    far = BY_ID["bridge_26.04.01_DeepSeekV3_DGX-B200_63"]
    assert (far["ep"], far["vpp"], stack_name(far)) == (32, 2, "megatron-recipes-hidden")
    near = BY_ID["bridge_26.04.01_DeepSeekV3_DGX-GB200_61"]
    assert {stack_name(record) for record in (near, {**far, "ep": 8}, {**far, "vpp": None})} == {"megatron-recipes"}


def test_asynchronous_tensor_parallelism_is_told_by_notes():
    vanilla, hidden = (BY_ID[f"titan_async_8B_bf16_{how}"] for how in ("vanilla", "async"))
    assert (stack_name(vanilla), stack_name(hidden)) == ("compiled-loss", "compiled-async")
    by_rows = [stack_name({**record, "dtype": "float8 rowwise"}) for record in (vanilla, hidden)]
    assert by_rows == ["compiled-rowwise", "compiled-async-rowwise"]


def test_mixtures_run_no_experts_again_unless_told():
    record = tidied(BY_ID["bridge_26.04.01_DeepSeekV3_DGX-B200_63"])
    assert fix_of(record)["recompute"] == "none"
    assert fix_of({**record, "recompute": "full"})["recompute"] == "full"
    assert "recompute" not in fix_of(tidied(of_group("megatron_llama_readme")))


def test_recipes_change_the_record():
    record = of_group("megatron_ci_golden_small")
    still = config_of({**record, "ci_args": {"attention-dropout": 0.0}})
    assert (still["attn_pdrop"], still["resid_pdrop"]) == (0.0, 0.0)
    assert config_of({**record, "ci_args": {}})["resid_pdrop"] == 0.1
    halves = fix_of({**record, "ci_args": {"num-distributed-optimizer-instances": 2}})
    assert halves["fsdp"] == fix_of({**record, "ci_args": {}})["fsdp"] // 2
    with pytest.raises(RefusedError, match="teacher"):
        config_of({**record, "model": {**record["model"], "name": "gpt3_modelopt_distill"}})
    staged = {**record, "pp": 2, "ci_args": {"microbatch-group-size-per-virtual-pipeline-stage": 5}}
    with pytest.raises(RefusedError, match="other groups"):
        fix_of(staged)


def test_deterministic_runs_have_larger_workspaces():
    device, stack = Cluster.parse("1x1:a100-80g").device, stack_of("megatron")
    plain, fixed = (workspace_bytes({"deterministic": told}, device, stack) for told in (False, True))
    assert plain == stack.workspaces * device.workspace_bytes
    assert fixed - plain == 2 * (2**25 - device.workspace_bytes)


def test_as_little_is_recomputed_as_fits():
    assert recomputing({}, 8, 5, 100, 90, 50) == "none,1-4:selective(matmul+attention)"
    assert recomputing({}, 8, 30, 100, 90, 50) == "selective(matmul+attention),1-4:full"
    fix = {"pp": 2, "stages": "5,5"}
    assert recomputing(fix, 8, 500, 100, 90, 50) == "selective(matmul+attention),1-4:full,5-8:full"


@pytest.mark.parametrize(
    ("name", "kind"), [("DeepSeek-V3", "deepseek_v3"), ("Qwen3-30B-A3B", "qwen3_moe"), ("GPT-OSS-120B", "gpt_oss")]
)
def test_experts(name, kind):
    record = next(r for r in RECORDS if r["model"]["name"] == name and (r["ep"] or 1) > 1)
    config = config_of(record)
    assert config["model_type"] == kind
    assert record["model"]["moe"]["experts"] in config.values()
    assert fix_of(record)["ep"] == record["ep"]


def test_what_is_not_stated():
    record = of_group("vtrain_multi")
    assert config_of(record)["vocab_size"] == -(-50257 // (128 * record["tp"])) * 128 * record["tp"]
    bare = {**record, "hardware": {**record["hardware"], "count": None}, "tp": 4, "pp": 4, "cp": 1}
    assert devices_of({**bare, "dp": None}) == 16
    assert devices_of({**bare, "dp": 3}) == 48
    with pytest.raises(RefusedError, match="global_batch is not stated"):
        job_of({**record, "global_batch": None})
    with pytest.raises(RefusedError, match="device 'TPUv4' is not in the catalog"):
        cluster_of({**record, "hardware": {**record["hardware"], "gpu": "TPUv4"}})
    with pytest.raises(RefusedError, match="no whole number of micro-batches"):
        fix_of({**record, "micro_batch": 7})


def test_narrow_dtypes():
    record = of_group("megatron_llama_readme")
    job = job_of(record)
    assert (job.dtype, job.linear_dtype, job.stack) == ("bf16", "fp8", "megatron-recipes")
    assert job_of({**record, "dtype": "nvfp4"}).linear_dtype == "fp4"


def test_throughput_becomes_seconds():
    record = BY_ID["fms_7B_a100"]
    tokens = record["global_batch"] * record["model"]["seq_len"]
    assert seconds(record) == pytest.approx(tokens / record["measured"]["tokens_per_s_per_gpu"] / 128)


@pytest.mark.parametrize(
    "broken", [{"model": {}}, {"hardware": None}, {"tp": 3}, {"dtype": "words"}, {"micro_batch": "many"}]
)
def test_no_record_breaks_the_run(broken, tmp_path):
    row = predicted({**BY_ID[SMALL[0]], **broken}, str(tmp_path))
    assert row["skipped"]


def test_the_command(tmp_path):
    odd = {**BY_ID[SMALL[0]], "id": "odd", "dtype": "int4"}
    runs, out = tmp_path / "runs.json", tmp_path / "out.json"
    runs.write_text(json.dumps([*(BY_ID[name] for name in SMALL), odd]))
    command = [sys.executable, str(BENCHMARKS / "published.py"), "--runs", str(runs), "--sweeps", str(SWEEPS)]
    done = subprocess.run([*command, "--json", str(out)], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "vtrain_single" in done.stdout
    assert "1 not predicted: dtype 'int4' is not known" in done.stdout
    told = json.loads(out.read_text())
    assert told.keys() == {"groups", "skipped", "rows"}
    wanted = {"n", "time_mape", "time_median", "time_p90", "memory_n", "memory_mape", "tau", "regret", "sweeps"}
    assert wanted <= told["groups"]["vtrain_single"].keys()
    assert told["skipped"] == {"dtype 'int4' is not known": 1}
    for row in told["rows"]:
        assert {"id", "predicted_s", "measured_s", "low_s", "high_s", "predicted_bytes", "measured_bytes"} <= row.keys()
        assert row["low_s"] <= row["predicted_s"] <= row["high_s"]
        assert row["predicted_s"] == pytest.approx(row["measured_s"], rel=0.5)


def test_figures_count_what_lies_inside():
    row = {"group": "g", "measured_s": 1.0, "predicted_s": 1.1, "trivial_s": 2.0, "measured_bytes": None}
    rows = [
        {**row, "id": "in", "low_s": 0.9, "high_s": 1.3, "predicted_bytes": 1},
        {**row, "id": "out", "low_s": 1.05, "high_s": 1.3, "predicted_bytes": 1},
        {"id": "no", "group": "g", "skipped": "why"},
    ]
    found = figures(rows, [])["g"]
    assert (found["n"], found["covered"], found["memory_n"]) == (2, 0.5, 0)
    assert found["trivial_mape"] == pytest.approx(1.0)


def test_what_was_not_measured_is_predicted(tmp_path):
    row = predicted({**BY_ID[SMALL[0]], "measured": {}}, str(tmp_path))
    assert row["measured_s"] is None
    assert row["predicted_s"] > 0
