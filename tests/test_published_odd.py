"""Published runs that nobody has seen: odd records are predicted, or counted with the reason, and never a crash."""

import copy
import json
import math
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import published  # noqa: E402
from published import RUNS, figures, predicted, read, table  # noqa: E402
from published_measured import counted_by, counts_recomputation, held_by, seconds  # noqa: E402
from published_rows import cluster_of, config_of, device_of, fix_of, job_of, recomputing  # noqa: E402
from published_stacks import stack_name  # noqa: E402
from published_tidy import RefusedError, tidied  # noqa: E402

RECORDS = read(RUNS)
BY_ID = {record["id"]: record for record in RECORDS}
PLAIN = next(r for r in RECORDS if r["group"] == "vtrain_single" and r["pp"] == 1 and r["dp"] == 2 and r["tp"] == 1)
KEYS = {"id", "group", "predicted_s", "measured_s", "low_s", "high_s", "predicted_bytes", "measured_bytes"}


def changed(record=PLAIN, **fields):
    """The record with fields set, those of its parts by ``model__layers``; "gone" takes one away."""
    found = copy.deepcopy(record)
    for name, value in fields.items():
        *path, last = name.split("__")
        part = found
        for step in path:
            part = part[step]
        if value == "gone":
            part.pop(last)
        else:
            part[last] = value
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("models"))


def same(folder, **fields):
    """Whether a record so changed is predicted as the plain one is."""
    first, second = (predicted(record, folder) for record in (PLAIN, changed(**fields)))
    return math.isclose(first["predicted_s"], second.get("predicted_s", 0.0), rel_tol=1e-9)


@pytest.mark.parametrize(
    "fields",
    [
        {"tp": "1"},
        {"dp": 2.0, "pp": None, "cp": "gone", "ep": 0, "vpp": " "},
        {"global_batch": str(PLAIN["global_batch"]), "micro_batch": float(PLAIN["micro_batch"])},
        {"model__layers": str(PLAIN["model"]["layers"]), "model__hidden": float(PLAIN["model"]["hidden"])},
        {"model__kv_heads": None, "model__vocab": 0, "model__moe": {}, "model__attention": None},
        {"hardware__gpus_per_node": "8", "hardware__gpu": "NVIDIA A100-80GB"},
        {"zero_stage": "ZeRO-0"},
        {"zero_stage": "none", "schedule": 7, "sp": "false"},
        {"recompute": True},
        {"recompute": "Uniform"},
        {"ep": 2},  # a dense model has no experts to share
        {"dtype": "float16"},
        {"ci_args": None, "deterministic": None, "notes": ["Megatron-DeepSpeed"]},
        {"id": ["a"], "split": None, "source": None},
    ],
)
def test_what_says_the_same_is_predicted_the_same(fields, folder):
    assert same(folder, **fields)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tp": "many"}, "tp is no number: 'many'"),
        ({"tp": True}, "tp is no number"),
        ({"micro_batch": -1}, "micro_batch is no count"),
        ({"micro_batch": 2.5}, "micro_batch is no count"),
        ({"micro_batch": None}, "micro_batch is not stated"),
        ({"global_batch": 10**9}, "global_batch is beyond any run"),
        ({"global_batch": 10**7, "micro_batch": 1}, "5000000 micro-batches in a step"),
        ({"model__layers": float("nan")}, "layers is no number"),
        ({"model__hidden": [1024]}, "hidden is no number"),
        ({"model": 5}, "model is not an object with fields"),
        ({"hardware": "gone"}, "gpus_per_node is not stated"),
        ({"hardware__gpu": None}, "device None is not in the catalog"),
        ({"model__moe": "8x7B"}, "moe is not an object with fields"),
        ({"model__moe": {"topk": 2}}, "experts without their number"),
        ({"hardware__gpu": "H100 PCIe"}, "device 'H100 PCIe' is not in the catalog"),
        ({"hardware__gpu": "GH200"}, "device 'GH200' is not in the catalog"),
        ({"hardware__count": 12, "dp": 12, "global_batch": 24, "micro_batch": 2}, "12 devices are no whole nodes of 8"),
        ({"dtype": "int8"}, "dtype 'int8' is not known"),
        ({"dtype": "fp8"}, "has no fp8 matmul rate"),
        ({"zero_stage": "everything"}, "zero_stage 'everything' is not known"),
        ({"zero_stage": 7}, "zero_stage 7 is not known"),
        ({"pp": 2, "dp": 1, "schedule": "ZB-H1"}, "schedule 'ZB-H1' is none of autopar's"),
        ({"cp": 3, "hardware__count": 3, "dp": 1}, "cp=3 splits sequences"),
        ({"recompute": "now and then"}, "recompute must be one of"),
    ],
)
def test_what_cannot_be_represented_is_named(fields, reason, folder):
    row = predicted(changed(**fields), folder)
    assert reason in row["skipped"]
    assert "predicted_s" not in row


@pytest.mark.parametrize("record", [None, 5, "a run", [1], {}, {"model": None}])
def test_what_is_no_record_is_counted(record, folder):
    assert predicted(record, folder)["skipped"]


def test_parts_that_go_together_are_predicted(folder):
    """Stages under ZeRO 3, context and tensor parallelism, a schedule in a V, nodes of six, few micro-batches."""
    odd = {
        "stages under FSDP": {"pp": 2, "dp": 2, "hardware__count": 4, "zero_stage": "fsdp2"},
        "cp and tp": {"cp": 2, "tp": 2, "dp": 1, "hardware__count": 4, "sp": True, "notes": "ulysses"},
        "V": {"pp": 2, "dp": 1, "vpp": 2, "schedule": "ZBV", "recompute": "none"},
        "six a node": {"pp": 2, "dp": 3, "hardware__count": 6, "hardware__gpus_per_node": 6, "global_batch": 24},
        "unknown software": {"group": "new", "source": "a talk", "notes": "", "zero_stage": "fsdp"},
    }
    for name, fields in odd.items():
        row = predicted(changed(**{"micro_batch": 2, "global_batch": 16, **fields}), folder)
        assert row.get("predicted_s", 0) > 0, (name, row)
        assert row["low_s"] <= row["predicted_s"] <= row["high_s"]
        assert row.keys() >= KEYS


def test_stages_under_fsdp_keep_parameters():
    staged = tidied(changed(pp=2, dp=2, hardware__count=4, zero_stage="fsdp2 group 2"))
    assert (fix_of(staged)["zero"], fix_of(staged)["fsdp"]) == (1, 2)
    assert fix_of(tidied(changed(zero_stage="FSDP")))["zero"] == 3


def test_experts_on_tensor_ranks_are_refused(folder):
    record = next(r for r in RECORDS if (r["ep"], r["dp"], r["model"]["name"]) == (64, 32, "Qwen3-235B-A22B"))
    assert predicted(record, folder)["skipped"] == "experts that tensor ranks share as well"


def test_experts_are_shared_where_deepep_moves_tokens():
    record = next(r for r in RECORDS if r["id"] == "automodel_GPTOSS120B")
    assert record["ep"] is None
    assert fix_of(tidied(record))["ep"] == 64
    assert fix_of(tidied({**record, "notes": "PyTorch"}))["ep"] == 1


def test_a_record_that_takes_too_long_is_given_up(folder, monkeypatch):
    monkeypatch.setattr(published, "LIMIT_S", 0.05)

    def forever(*_):
        while True:
            pass

    monkeypatch.setattr(published, "config_of", forever)
    assert predicted(PLAIN, folder)["skipped"] == "took more than 0.05 CPU seconds"


def test_measured_words_are_no_reason_to_skip(folder):
    told = {"measured__step_time_s": "n/a", "measured__tokens_per_s_per_gpu": -1, "measured__peak_mem_gb": "3.5"}
    row = predicted(changed(**told), folder)
    assert (row["measured_s"], row["measured_bytes"]) == (None, 3.5 * 2**30)


def test_seconds_from_flops(folder):
    """Of FLOP/s that count what is recomputed, a step does a third more."""
    share = predicted(changed(measured={"mfu": "40"}), folder)["measured_s"]
    # 312 TFLOP/s: the peak of the device.
    model, hardware = (
        predicted(changed(measured={"tflops_per_gpu": 0.4 * 312}, notes=notes), folder)["measured_s"]
        for notes in ("Megatron-DeepSpeed", "Megatron-DeepSpeed; hardware FLOP/s")
    )
    assert model == pytest.approx(share)
    assert hardware == pytest.approx(share * 4 / 3)


def test_seconds_from_flops_of_narrow_layers(folder):
    """FLOP are as many in FP8; the Megatron-LM README states TFLOP/s and, by tokens/s, seconds."""
    record = BY_ID["mcore_llama3_fp8_8B"]
    stated = record["measured"]["step_time_s"]
    row = predicted({**record, "measured": {"tflops_per_gpu": record["measured"]["tflops_per_gpu"]}}, folder)
    assert row["measured_s"] == pytest.approx(stated, rel=0.2)
    assert row["trivial_s"] == pytest.approx(6 * 8.03e9 * 128 * 8192 / (0.45 * 1979e12 * 8), rel=0.3)


def test_whose_flops_count_recomputation():
    assert counts_recomputation(tidied(BY_ID["mtnlg_280nodes"]))
    assert counts_recomputation(changed(group="megatron_sc21", notes=None))
    assert not counts_recomputation(changed(group="megatron_sc21", notes=None, recompute="none"))
    assert not counts_recomputation(PLAIN)


def test_stated_and_derived_seconds_of_hardware_flops_agree(tmp_path):
    """MT-NLG's paper states both: with 126 TFLOP/s a device it took 60.1 s."""
    record = BY_ID["mtnlg_280nodes"]
    derived = predicted({**record, "measured": {"tflops_per_gpu": 126}}, str(tmp_path))["measured_s"]
    assert derived == pytest.approx(seconds(record), rel=0.03)


def test_what_counted_the_bytes(folder):
    assert counted_by({"notes": "paper formula, not nvidia-smi"}) == "allocated"
    assert counted_by({"notes": "as nvidia-smi shows"}) == counted_by({"group": "bigscience"}) == "driver"
    assert counted_by({"notes": "max reserved across GPUs"}) == "reserved"
    told = [predicted(changed(notes=f"DeepSpeed {word}"), folder)["predicted_bytes"] for word in ("", "reserved")]
    driver = predicted(changed(notes="DeepSpeed, nvidia-smi"), folder)["predicted_bytes"]
    assert told[0] < told[1] == driver - published.DRIVER_BYTES


def test_whose_bytes():
    assert held_by({"group": "megatron_ci_golden_large"}, [3, 2, 1]) == 1
    assert held_by({"group": "simumax"}, [3, 2, 1]) == 3


@pytest.mark.parametrize(
    ("fields", "stack"),
    [
        ({"group": "bigscience", "dtype": "bf16"}, "megatron-deepspeed-bf16"),
        ({"group": "vtrain_multi"}, "megatron-deepspeed"),
        ({"group": "megatron_sc21"}, "megatron-early"),
        ({"group": "x", "source": "Korthikanti et al.", "recompute": "selective"}, "megatron-early-selective"),
        ({"group": "simumax", "source": "Megatron", "recompute": "selective"}, "megatron-selective"),
        ({"group": "x", "zero_stage": "fsdp2", "recompute": "selective"}, "compiled"),
        ({"group": "x", "zero_stage": 3}, "compiled"),
        ({"group": "x", "source": "pytorch/torchtitan benchmarks 2025"}, "compiled-loss"),
        ({"group": "x", "zero_stage": 1}, "megatron"),
        ({"group": "x", "source": "NVIDIA-NeMo/Automodel"}, "automodel"),
    ],
)
def test_stacks_of_unseen_groups(fields, stack):
    assert stack_name(tidied(changed(**{"source": "", "notes": "", **fields}))) == stack


def test_megatrons_selective_recomputation_is_its_stacks():
    fix = fix_of(tidied(changed(group="megatron_sc21", source="", notes="", recompute="selective")))
    assert fix["recompute"] == "none"


def test_devices_and_links():
    assert [device_of(name) for name in ("nvidia h100 sxm", "GB200 NVL72", "A100 (40 GB)")] == [
        "h100",
        "gb200",
        "a100-40g",
    ]
    for name in ("A100-PCIE-40GB", "H100 NVL", None):
        with pytest.raises(RefusedError, match="is not in the catalog"):
            device_of(name)
    two = {"hardware__count": 16, "dp": 16}
    told = {
        text: cluster_of(changed(**two, hardware__inter_node_link=text)).inter_node
        for text in ("2x25GbE per node", "0Gb", "fast", None)
    }
    assert (told["2x25GbE per node"].bandwidth, told["2x25GbE per node"].shared_by) == (25e9 / 8, 4)
    assert told["0Gb"] == told["fast"] == told[None]
    slow = cluster_of(changed(hardware__intra_node_link="PCIe Gen4"))
    assert slow.intra_node.bandwidth == slow.device.host_bandwidth < cluster_of(PLAIN).intra_node.bandwidth


def test_a_dtype_that_is_not_stated():
    assert job_of(changed(dtype=None)).dtype == "bf16"
    assert job_of(changed(dtype=None, hardware__gpu="V100-32GB")).dtype == "fp16"


def test_tidying_changes_nothing_of_what_is_in_form():
    compared = 0
    for record in RECORDS[::40]:
        for part_of in (config_of, cluster_of, job_of, fix_of):
            try:
                expected = part_of(record)
            except RefusedError:
                continue
            assert part_of(tidied(record)) == expected
            compared += 1
    assert compared > 200


def test_odd_groups_and_sweeps_are_printed(folder):
    rows = [predicted(changed(id=name, group=group), folder) for name, group in ((1, None), ("b", 7), ("c", ["g"]))]
    told = figures(rows, [{"ids": [1, "b", ["c"]]}, {"group": None, "ids": None}, {"group": 7, "ids": ["b", "gone"]}])
    assert {name: group["n"] for name, group in told.items()} == {"None": 1, "7": 1, "['g']": 1}
    assert len(table(told).splitlines()) == 4
    assert json.loads(json.dumps(told))


@pytest.mark.parametrize(
    ("fields", "fix"),
    [
        ({"zero_stage": "FULL_SHARD"}, {"zero": 3, "fsdp": 2}),
        ({"zero_stage": "full_shard"}, {"zero": 3, "fsdp": 2}),
        ({"zero_stage": "ZeRO Stage-3"}, {"zero": 3, "fsdp": 2}),
        ({"zero_stage": "HYBRID_SHARD"}, {"zero": 3, "fsdp": 2}),
        ({"zero_stage": "SHARD_GRAD_OP"}, {"zero": 2, "fsdp": 2}),
        ({"zero_stage": "ZeRO-Infinity"}, {"zero": 3, "fsdp": 2, "offload": "state"}),
        ({"zero_stage": "3 (offload)", "notes": "CPU offload"}, {"zero": 3, "fsdp": 2, "offload": "state"}),
        ({"zero_stage": 3, "notes": "bf16; cpu offload False"}, {"zero": 3, "fsdp": 2}),
    ],
)
def test_words_for_what_is_shared_out(fields, fix):
    found = fix_of(tidied(changed(**fields)))
    assert {name: found.get(name) for name in ("zero", "fsdp", "offload")} == {"offload": None, **fix}


@pytest.mark.parametrize(
    ("gpu", "device"),
    [
        ("AMD Instinct MI300X OAM", "mi300x"),
        ("DGX-H100", "h100"),
        ("8x H100 SXM", "h100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla V100-SXM2-32GB", "v100-32g"),
        ("NVIDIA H20", "h20"),
        ("H200-SXM-141GB", "h200"),
    ],
)
def test_other_names_of_devices(gpu, device):
    assert device_of(gpu) == device


def test_single_layers_are_recomputed_by_rank():
    """Stages of one layer each: half of a rank's eight are recomputed, not none or all."""
    fix = {"pp": 4, "stages": ",".join(["2", *["1"] * 30, "2"])}
    told = recomputing(fix, 32, 50.0, 200.0, 100.0, 50.0)
    layers = [int(part.split("-")[0]) for part in told.split(",")[1:]]
    by_rank = [sum((layer - 1) % 4 == rank for layer in layers) for rank in range(4)]
    assert by_rank == [4, 4, 4, 4]


def test_architectures_of_other_publications(folder):
    """Experts that all tokens share, beside those routed to; experts whose width alone is told; squared ReLU."""
    mixture = BY_ID["bridge_26.06.01_DeepSeekV3_DGX-GB300_1"]["model"]["moe"]
    small = {"model__moe": {**mixture, "experts": 4, "topk": 2, "expert_ffn": 256}, "model__ffn": None}
    small |= {"model__vocab": 1024, "model__layers": 2}
    shared = config_of(tidied(changed(**small)))
    assert (shared["model_type"], shared["shared_expert_intermediate_size"]) == ("qwen2_moe", 256)
    assert predicted(changed(**small), folder)["predicted_s"] > 0
    small["model__moe"] = {"experts": 4, "topk": 2, "expert_ffn": 256}
    plain = config_of(tidied(changed(**small)))
    assert plain["moe_intermediate_size"] == plain["intermediate_size"] == 256
    squared = config_of(tidied(changed(model__name="Nemotron4-340B", model__vocab=1024)))
    assert (squared["model_type"], squared["hidden_act"]) == ("nemotron", "relu2")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"notes": "LoRA fine-tuning"}, r"trains adapters of a frozen model \(LoRA\)"),
        (
            {"notes": "interleaved MoE", "model__moe": {"experts": 4, "topk": 1}, "model__vocab": 64},
            "layers with experts and without",
        ),
    ],
)
def test_what_has_no_configuration_is_refused(fields, reason):
    with pytest.raises(RefusedError, match=reason):
        config_of(tidied(changed(**fields)))


def test_dualpipe_is_taken_as_its_half():
    fix = fix_of(tidied(changed(pp=2, dp=1, schedule="DualPipe", recompute="none", global_batch=16, micro_batch=2)))
    assert fix["schedule"] == "dualpipev"
    shared = {"schedule": "DualPipe", "ep": 2, "model__moe": {"experts": 4, "topk": 2}}
    with pytest.raises(RefusedError, match="schedule 'DualPipe' with experts that ranks share"):
        fix_of(tidied(changed(pp=2, dp=2, hardware__count=4, global_batch=16, micro_batch=2, **shared)))


def test_shared_out_gradients_have_no_whole_buffers(folder):
    """DeepSpeed's ZeRO 3 keeps its share of gradients alone."""
    told = {"notes": "DeepSpeed", "dp": 8, "hardware__count": 8, "global_batch": 64, "micro_batch": 1}
    whole, shares = (predicted(changed(zero_stage=level, **told), folder)["predicted_bytes"] for level in (1, 3))
    model = PLAIN["model"]
    elements = 12 * model["layers"] * model["hidden"] ** 2
    assert whole - shares > 2 * elements  # of gradients in float16, most of them
