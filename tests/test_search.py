"""The whole search: what it finds unaided, what fixing means, bounds that hold, answers when nothing fits."""

import dataclasses
import re

import pytest
from dense_decoder import decoder, llama3_8b

from autopar.cluster import Cluster
from autopar.errors import BadInputError, InfeasibleError, UnsupportedError
from autopar.job import Job
from autopar.models import model_graph
from autopar.plan import Plan
from autopar.sharding.check import check_decision
from autopar.sharding.layout import I, S
from autopar.solver.config_bounds import quick_bound, stage_bound
from autopar.solver.context import Context
from autopar.solver.fix import Fix, parse_fix
from autopar.solver.search import search
from autopar.solver.shardings import KnownShardings, Shardings
from autopar.solver.space import configs
from autopar.solver.spread import best_stages

JOB = Job(global_batch=16, seq_len=64, dtype="bf16")
CLUSTER = Cluster.parse("2x4:h100")


@pytest.fixture(scope="module")
def small() -> Plan:
    return search(decoder(4), JOB, CLUSTER)


def with_memory(cluster: Cluster, nbytes: int) -> Cluster:
    device = dataclasses.replace(cluster.device, memory_bytes=nbytes, reserve_bytes=nbytes // 20)
    return Cluster(tuple(dataclasses.replace(group, device=device) for group in cluster.groups))


def fastest(model, size, seq, batch=1):
    context = Context.of(model, Job(512, seq), Cluster.parse("8x8:h100"), Fix())
    return Shardings(context, {"tp": size}.items() if size > 1 else (), batch).fastest()


def test_finds_megatron_with_sequence_parallelism_unaided():
    """One 8-way axis, Llama-3 8B: column then row, norms on the split sequence, invariant norm weights."""
    model = model_graph("llama3-8b")
    answer = fastest(model, 8, 4096)
    layer = answer.costs["LlamaDecoderLayer"]["none"].decision
    used = {name: choice["tp"] for name, choice in layer.strategies.items()}
    graph = model.kinds["LlamaDecoderLayer"].graph
    linear = {node.args[1].name: used[node.name] for node in graph.of("op") if node.op == "aten.linear"}
    assert linear == {
        "q_proj_weight": "n",
        "k_proj_weight": "n",
        "v_proj_weight": "n",
        "o_proj_weight": "k",
        "gate_proj_weight": "n",
        "up_proj_weight": "n",
        "down_proj_weight": "k",
    }
    assert used["attention"] == "h"
    assert {used[name] for name in used if "layernorm" in name or "residual" in name} == {"s"}
    stored = {name: str(layout) for name, layout in layer.inputs.items()}
    assert stored["hidden"] == "tp:S(1)"
    assert stored["input_layernorm_weight"] == stored["post_attention_layernorm_weight"] == "tp:I"
    assert stored["q_proj_weight"] == stored["gate_proj_weight"] == "tp:S(0)"
    assert stored["o_proj_weight"] == stored["down_proj_weight"] == "tp:S(1)"
    moves = [f"{c.tensor}: {c.source} -> {c.target}" for c in layer.conversions if c.tensor in ("o_proj", "down_proj")]
    assert moves == ["o_proj: tp:P -> tp:S(1)", "down_proj: tp:P -> tp:S(1)"]
    last = answer.costs["Epilogue"]["none"].decision
    assert last.strategies["loss"] == {"tp": "v"}
    assert last.strategies["lm_head"] == {"tp": "n"}
    for kind, costs in answer.costs.items():
        check_decision(model.kinds[kind], costs["none"].decision, 1, 4096)


def test_tied_embeddings_are_stored_alike():
    model = decoder(4, tied=True)
    costs = fastest(model, 4, 256).costs
    assert costs["Prologue"]["none"].decision.inputs["table"] == costs["Epilogue"]["none"].decision.inputs["head"]


def test_plan_is_whole(small):
    assert Plan.from_json(small.to_json()) == small
    assert small.mesh.size == 8
    assert small.bound <= small.predicted.step_time
    assert small.gap == pytest.approx((small.predicted.step_time - small.bound) / small.bound)
    assert sum(small.predicted.breakdown.values()) == pytest.approx(small.predicted.step_time)
    low, high = small.predicted.interval
    assert low < small.predicted.step_time < high
    assert small.stages[-1].runs[-1].stop == 6
    assert 0 < small.predicted.mfu < 1
    assert {"search", "answers", "reprice"} <= set(small.seconds)
    assert small.searched["shapes"] >= small.searched["meshes"] > 0
    assert small.searched["priced"] > 0


def test_same_inputs_same_plan(small):
    search(decoder(2), Job(8, 32), Cluster.parse("1x2:h100"))
    again = search(decoder(4), JOB, CLUSTER)
    strip = {"seconds": {}}
    assert dataclasses.replace(again, **strip) == dataclasses.replace(small, **strip)


@pytest.mark.parametrize(
    "fix",
    [
        {"dp": 8, "zero": 0},
        {"dp": 8, "zero": 3},
        {"fsdp": 8},
        {"tp": 4, "pp": 1},
        {"tp": 4, "sp": True},
        {"tp": 4, "sp": False, "dp": 2},
        {"pp": 2, "dp": 2, "micro_batch": 2},
        {"pp": 4, "recompute": "full"},
        {"pp": 2, "tp": 2, "recompute": "Layer:full"},
        {"mesh": "pp=2,dp=2,tp=2", "zero": 3, "schedule": "1f1b"},
    ],
)
def test_what_is_fixed_holds_and_is_no_faster(small, fix):
    plan = search(decoder(4), JOB, CLUSTER, fix)
    wanted = parse_fix(fix)
    for axis in ("pp", "dp", "tp"):
        if getattr(wanted, axis) is not None:
            assert getattr(plan.mesh, axis) == getattr(wanted, axis)
    if wanted.micro_batch is not None:
        assert plan.micro_batch == wanted.micro_batch
    assert wanted.zero in (None, plan.zero)
    if wanted.fsdp is not None:
        assert plan.zero > 0
        assert plan.fsdp == wanted.fsdp
    for block, kind in enumerate(block.kind for block in decoder(4).blocks):
        choice = wanted.recompute_of(block, kind, repeated=kind == "Layer")
        assert choice is None or plan.candidate_of(block).recompute == choice
    hidden = plan.candidate_of(1).decision.inputs["x"]["tp"]
    if wanted.sp is not None:
        assert hidden == (S(1) if wanted.sp else I)
    if wanted.tp is not None and wanted.tp > 1:
        strategies = plan.candidate_of(1).decision.strategies
        assert all(strategies[name]["tp"] in ("n", "k") for name in ("q", "k", "v", "o", "gate", "up", "down"))
    assert plan.predicted.step_time >= small.predicted.step_time * (1 - 1e-9)
    assert small.bound <= plan.predicted.step_time
    assert plan.fixed == wanted.given()


@pytest.mark.parametrize(("shape", "nbytes"), [("1x4", 80 * 2**30), ("1x4", 12 * 2**20), ("4x1", 80 * 2**30)])
def test_bounds_hold_for_every_configuration(shape, nbytes):
    """No configuration can be priced below any of its bounds, with much and with little memory, and with slow links."""
    for model, job in ((decoder(3), Job(8, 64)), (decoder(4, hidden=512, ffn=2048), Job(16, 512))):
        cluster = with_memory(Cluster.parse(f"{shape}:h100"), nbytes)
        context = Context.of(model, job, cluster, Fix())
        known = KnownShardings(context)
        fitted = 0
        for config in configs(model, job, cluster, Fix()):
            shardings = known.of(config.sharding)
            assessed = best_stages(context, config, [shardings.fastest()])
            if assessed is None:
                continue
            fitted += 1
            cheap = quick_bound(context, config, shardings.least_work(), shardings.least_halves())
            sharp = quick_bound(context, config, shardings.bound(), shardings.least_halves())
            assert cheap <= sharp * (1 + 1e-6)
            assert sharp <= assessed.step_time
            for closer in (False, True):
                assert stage_bound(context, config, shardings, closer) <= assessed.step_time
            assert all(sum(memory.values()) <= nbytes for memory in assessed.memory)
        assert fitted > 3 or nbytes < 2**30


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("schedule", [{"schedule": "1f1b"}, {"schedule": "interleaved", "vpp": 2}])
def test_bounds_of_pipelines_know_what_data_ranks_send(zero, schedule):
    """Between nodes reductions take longer than the blocks they are hidden behind."""
    model, job, cluster = decoder(8, hidden=512, ffn=2048), Job(32, 512), Cluster.parse("8x1:h100")
    freed = (("", True),) if zero == 3 else ()
    wanted = Fix(pp=2, dp=4, zero=zero, reshard=freed, fsdp=4, micro_batch=1, offload="none", **schedule)
    context = Context.of(model, job, cluster, wanted)
    (config,) = configs(model, job, cluster, wanted)
    shardings = KnownShardings(context).of(config.sharding)
    assessed = best_stages(context, config, [shardings.fastest()])
    assert 0.8 * assessed.step_time < stage_bound(context, config, shardings) <= assessed.step_time


def test_little_memory_makes_it_recompute_or_split():
    model, job = decoder(4, hidden=256, ffn=1024), Job(8, 1024)
    free = search(model, job, Cluster.parse("1x2:h100"), {"micro_batch": 4})
    need = max(stage.total_bytes for stage in free.stages) - free.stages[0].memory["reserve"]
    tight = search(model, job, with_memory(Cluster.parse("1x2:h100"), int(need * 0.8)), {"micro_batch": 4})
    assert max(stage.total_bytes for stage in tight.stages) <= int(need * 0.8)
    assert tight.predicted.step_time > free.predicted.step_time
    assert tight.bound <= tight.predicted.step_time


def test_nothing_fits_and_says_what_would():
    model, job = decoder(4, hidden=256, ffn=1024), Job(8, 1024)
    need = max(s.total_bytes for s in search(model, job, Cluster.parse("1x2:h100"), {"micro_batch": 4}).stages)
    cluster = with_memory(Cluster.parse("1x2:h100"), (need - 4 * 2**30) // 2)
    with pytest.raises(InfeasibleError, match=r"stage \d of \d needs [\d,]+ bytes per device, [\d,]+ bytes") as error:
        search(model, job, cluster, {"dp": 2, "zero": 0, "micro_batch": 4, "recompute": "none"})
    assert "It would fit with" in str(error.value)
    with pytest.raises(InfeasibleError, match=r"smallest cluster of these nodes|No number of these devices"):
        search(model, job, with_memory(cluster, 2**22))


def test_a_rank_of_several_stages_is_short_of_what_all_of_them_need():
    """Not of what its largest stage needs, which may well fit."""
    model, job = decoder(4, hidden=256, ffn=1024), Job(8, 1024)
    fix = {"pp": 2, "schedule": "interleaved", "vpp": 2, "recompute": "none", "micro_batch": 1, "offload": "none"}
    plan = search(model, job, Cluster.parse("1x2:h100"), fix)
    ranks = [sum(plan.stages[stage].total_bytes for stage in plan.stages_of(rank)) for rank in range(2)]
    reserve = plan.stages[0].memory["reserve"]
    room = int(0.7 * (min(ranks) - reserve))
    with pytest.raises(InfeasibleError, match=r"rank \d, with stages \d, \d, of 4 needs") as error:
        search(model, job, with_memory(Cluster.parse("1x2:h100"), room), fix)
    needed, short = (int(found.replace(",", "")) for found in re.findall(r"([\d,]+) bytes", str(error.value))[:2])
    assert 0 < short < needed


def test_the_smallest_conflict_is_named():
    """Of all that is fixed, what does not fit together; what has no part in it is left out."""
    model, job = decoder(4, hidden=256, ffn=1024), Job(8, 1024)
    fix = {"dp": 2, "zero": 0, "micro_batch": 4, "recompute": "none", "offload": "none"}
    stage = search(model, job, Cluster.parse("1x2:h100"), fix).stages[0]
    tight = with_memory(Cluster.parse("1x2:h100"), int(0.9 * (stage.total_bytes - stage.memory["reserve"])))
    with pytest.raises(InfeasibleError, match=r"cannot hold together with [\d,]+ bytes a device: ([^.]*)\.") as error:
        search(model, job, tight, fix)
    told = str(error.value).partition("bytes a device: ")[2].partition(". ")[0]
    named = dict(item.split("=") for item in told.split(", "))
    assert 0 < len(named) < len(fix)
    with pytest.raises(InfeasibleError):
        search(model, job, tight, named)
    for key in named:
        search(model, job, tight, {k: v for k, v in named.items() if k != key})


@pytest.mark.parametrize(
    ("fix", "batch", "message"),
    [
        ({"dp": 8}, 12, "global_batch 12 does not divide by dp=8"),
        ({"dp": 8, "micro_batch": 4}, 16, "micro_batch=4 does not divide"),
        ({"pp": 4, "dp": 2, "micro_batch": 8, "schedule": "1f1b"}, 16, "1F1B needs at least pp"),
        ({"fsdp": 3}, 16, "fsdp=3 does not divide the number of data ranks"),
        ({"tp": 16}, 16, "makes 16 ranks, but the cluster has 8 devices"),
    ],
)
def test_contradictions_are_named(fix, batch, message):
    with pytest.raises(BadInputError, match=message):
        search(decoder(4), Job(batch, 64), CLUSTER, fix)


def test_a_model_axis_that_splits_nothing_is_refused():
    cluster = Cluster.parse("1x3:h100")
    with pytest.raises(BadInputError, match="tp=3 divides no feature dimension"):
        search(decoder(2), Job(3, 63), cluster, {"tp": 3})
    with pytest.raises(BadInputError, match="sp=true splits sequences over tp=4, but seq_len 63"):
        search(decoder(2), Job(4, 63), CLUSTER, {"tp": 4, "sp": True})


def test_sequences_longer_than_the_model_takes_are_refused():
    model = dataclasses.replace(decoder(2), max_seq=32)
    with pytest.raises(BadInputError, match="seq_len 64 is longer than decoder takes"):
        search(model, JOB, CLUSTER)


def test_sequences_beyond_the_config_are_noted():
    model = dataclasses.replace(decoder(2), nominal_seq=32)
    assert any("seq_len 64 is beyond the 32 positions" in note for note in search(model, JOB, CLUSTER).notes)
    assert not any("beyond" in note for note in search(decoder(2), JOB, CLUSTER).notes)


def test_fast_links_favour_sharded_data_parallelism_for_8b():
    plan = search(llama3_8b(), Job(64, 4096), Cluster.parse("1x8:h100"))
    assert (plan.mesh.dp, plan.fsdp) == (8, 8)
    assert plan.zero in (2, 3)
    assert plan.gap < 0.05


def test_shard_groups_of_a_node_beat_slow_links_and_hold_more():
    model, job = decoder(4, hidden=256, ffn=1024), Job(16, 64)
    link = CLUSTER.inter_node
    slow = CLUSTER.with_links(inter_node=dataclasses.replace(link, bandwidth=link.bandwidth / 100))
    node, whole = (search(model, job, slow, {"dp": 8, "zero": 3, "reshard": "true", "fsdp": group}) for group in (4, 8))
    assert node.predicted.step_time < 0.7 * whole.predicted.step_time
    assert node.stages[0].memory["optimizer"] == 2 * whole.stages[0].memory["optimizer"]
    assert (node.fsdp, search(model, job, slow, {"dp": 8, "zero": 3}).fsdp) == (4, 4)


def test_state_on_the_host_fits_what_did_not_fit():
    model, job, fix = decoder(4, hidden=256, ffn=1024), Job(8, 64), {"dp": 2, "micro_batch": 1, "zero": 1}
    free = search(model, job, Cluster.parse("1x2:h100"), fix)
    memory = free.stages[0].memory
    room = int((free.stages[0].total_bytes - memory["reserve"] - 0.8 * memory["optimizer"]) / 0.95)
    tight = with_memory(Cluster.parse("1x2:h100"), room)
    with pytest.raises(InfeasibleError):
        search(model, job, tight, {**fix, "offload": "none"})
    plan = search(model, job, tight, fix)
    assert plan.offload == "state"
    assert plan.stages[0].memory["optimizer"] == 0
    assert plan.predicted.step_time > free.predicted.step_time
    device = dataclasses.replace(tight.device, host_bandwidth=0.0)
    unknown = Cluster(tuple(dataclasses.replace(group, device=device) for group in tight.groups))
    with pytest.raises(UnsupportedError, match="host_bandwidth"):
        search(model, job, unknown, {**fix, "offload": "state"})


def test_what_just_fits_with_halved_backwards_and_one_micro_batch_is_found():
    """Its gradients wait in compute dtype and leave for the host stage by stage: they are never whole all at once."""
    model, job = decoder(8, hidden=512, ffn=2048), Job(4, 16)
    fix = {"pp": 2, "dp": 2, "schedule": "zbv", "zero": 0, "offload": "state", "micro_batch": 2}
    plan = search(model, job, Cluster.parse("1x4:h100"), fix)
    need = max(sum(plan.stages[stage].total_bytes for stage in plan.stages_of(rank)) for rank in range(2))
    tight = search(model, job, with_memory(Cluster.parse("1x4:h100"), need), fix)
    assert tight.bound <= tight.predicted.step_time <= plan.predicted.step_time * (1 + 1e-9)
