"""What print(plan) and --json show."""

import json
from dataclasses import replace

import pytest
from hand_plans import gpt2, graph_of, llama, megatron, whole
from small_plan import small_plan

from autopar.plan import Mesh, Run
from autopar.report.record import plan_record
from autopar.report.units import bytes_text, memory_unit, seconds_text
from autopar.report.words import describe

KEYS = [
    *("model", "cluster", "job", "mesh", "micro_batch", "schedule", "stages"),
    *("step_time_s", "tokens_per_second", "mfu", "interval", "energy", "memory", "bound_s", "gap", "status"),
    *("searched", "seconds", "objective", "equal_blocks"),
]


def test_text_says_the_decision_the_prediction_and_the_sharding():
    text = str(small_plan())
    assert text.startswith("tiny on 2x4:h100: 8 x NVIDIA H100")
    for part in (
        "16 sequences of 4,096 tokens",
        "pp=2 x dp=2 x tp=2 (pp: pipeline stages; dp: data parallel; tp: tensor + sequence",
        "ZeRO-3, recompute full for 2 of 4 blocks",
        "700 ms (between 630 ms and 770 ms)",
        "MFU 41.2%",
        "compute 500 ms",
        "690 ms, gap 1.5%, feasible",
        "12 meshes",
        "linear  column  tp R -> S(2)",
        "aten.foo has no rule",
    ):
        assert part in text


def test_text_tells_context_ranks_shard_groups_schedule_and_offload():
    plan = small_plan()
    kinds = {
        "Layer/full": replace(plan.candidates["Layer/full"], recompute="selective", saved=("matmul", "attention")),
        "Layer/plain": replace(plan.candidates["Layer/plain"], offload=True),
    }
    stages = tuple(
        replace(stage, runs=(Run(i, i + 1, stage.runs[0].candidate),)) for i, stage in enumerate(plan.stages)
    )
    stages += tuple(
        replace(stage, runs=(Run(i + 2, i + 3, stage.runs[0].candidate),)) for i, stage in enumerate(stages)
    )
    text = str(
        replace(
            plan,
            mesh=Mesh(pp=2, dp=1, cp=2, tp=2),
            schedule="zbv",
            vpp=2,
            fsdp=1,
            zero=1,
            offload="state",
            stages=stages,
            candidates=kinds,
            described={"cp": ("context (keys gathered) parallel",)},
        )
    )
    for part in (
        "pp=2 x dp=1 x cp=2 x tp=2 (pp: pipeline stages; cp: context (keys gathered) parallel; tp: nothing split)",
        "zbv, 2 stages on each rank",
        "ZeRO-1 over groups of 1 data ranks, recompute selective(matmul+attention) for 2 of 4 blocks",
        "parameters, gradients, optimizer state, activations of 2 blocks on the host",
        "saved tensors on the host",
    ):
        assert part in " ".join(text.split())
    rows = [line.split()[:3] for line in text.splitlines() if line.strip().startswith(("0 ", "1 "))]
    assert rows == [["0", "0", "0"], ["1", "1", "1"], ["1", "2", "2"], ["0", "3", "3"]]


def test_text_fits_in_100_columns():
    assert max(map(len, str(small_plan("m" * 40)).splitlines())) <= 100


def test_text_names_what_was_fixed_and_what_was_chosen():
    lines = str(small_plan()).splitlines()
    fixed = next(line for line in lines if line.startswith("fixed"))
    chosen = next(line for line in lines if line.startswith("chosen"))
    assert fixed.split() == ["fixed", "tp=2"]
    assert "pp=2" in chosen
    assert "zero=3" in chosen
    assert "tp=2" not in chosen


def test_a_search_without_fix_says_nothing_of_it():
    text = str(replace(small_plan(), fixed={}))
    assert "\nfixed" not in text
    assert "\nchosen" not in text


def test_equal_sharding_is_printed_once():
    text = str(small_plan())
    assert text.count("linear  column") == 1
    assert "split as Layer, blocks 0-1" in text


def test_memory_table_has_a_row_per_stage():
    rows = [line.split() for line in str(small_plan()).splitlines() if line.strip().startswith(("0 ", "1 "))]
    assert [row[-1] for row in rows] == ["10.8", "10.2"]


def test_record_has_exactly_the_agreed_keys():
    record = json.loads(json.dumps(plan_record(small_plan())))
    assert list(record) == KEYS
    assert record["mesh"] == {"pp": 2, "dp": 2, "cp": 1, "tp": 2}
    assert record["cluster"] == "2x4:h100"
    assert record["job"]["seq_len"] == 4096
    assert [stage["total"] for stage in record["memory"]] == [stage.total_bytes for stage in small_plan().stages]
    assert [stage["blocks"] for stage in record["stages"]] == [[0, 2], [2, 4]]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 s"), (9.414, "9.41 s"), (123.4, "123 s"), (0.0123, "12.3 ms"), (2.5e-5, "25.0 µs"), (12345.0, "12,345 s")],
)
def test_seconds_have_three_digits(value, text):
    assert seconds_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1, "<0.01"), (2**28, "0.25"), (2**30, "1.0"), (12.34 * 2**30, "12.3"), (2**42, "4,096")],
)
def test_bytes(value, text):
    assert bytes_text(value) == text


def test_small_models_are_told_in_mib():
    assert memory_unit(2**30) == ("GiB", 2**30)
    assert memory_unit(2**29) == ("MiB", 2**20)
    plan = small_plan()
    memory = dict.fromkeys(plan.stages[0].memory, 3 * 2**18)
    text = str(replace(plan, stages=tuple(replace(stage, memory=memory) for stage in plan.stages)))
    assert "memory per rank in MiB" in text
    assert "0.75" in text


@pytest.fixture(scope="module")
def traced():
    return graph_of(llama())


def test_axis_names_are_derived_from_the_choices(traced):
    sequence = describe(traced, megatron(traced, tp=2, sequence=True))
    assert sequence["tp"] == ("tensor parallel", "sequence parallel", "vocabulary parallel")
    assert describe(traced, megatron(traced, tp=2, sequence=False))["tp"] == ("tensor parallel", "vocabulary parallel")
    assert set(describe(traced, whole(traced))) == set(traced.kinds)


def test_sharding_in_words(traced):
    lines = describe(traced, megatron(traced, tp=2, sequence=True))["LlamaDecoderLayer"]
    told = [" ".join(line.split()) for line in lines]
    assert "self_attn.q_proj column tp R -> S(2) weight S(0)" in told
    assert "attention heads tp S(1) -> S(1)" in told
    assert "mlp.down_proj row tp S(2) -> P weight S(1)" in told
    assert "input_layernorm sequence tp S(1) -> S(1) weight I as R" in told
    assert "collectives forward: 2 tp all-gather, 2 tp reduce-scatter" in told
    assert "collectives backward: 2 tp all-gather, 2 tp all-reduce, 2 tp reduce-scatter" in told


def test_transposed_and_fused_weights_in_words():
    graph = graph_of(gpt2())
    lines = describe(graph, megatron(graph, tp=2, sequence=False))["GPT2Block"]
    told = [" ".join(line.split()) for line in lines]
    assert "mlp.c_fc column tp R -> S(2) weight S(1), bias S(0)" in told
    assert "mlp.c_proj row tp S(2) -> P weight S(0), bias I as P" in told
    assert "attn.c_attn column tp R -> S(2, 3) weight I as S(0, 3), bias I as S(0, 3)" in told
