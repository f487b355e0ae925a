"""Predicted bytes against what is executed: closed forms, and autograd and FSDP2's rules."""

import dataclasses
import itertools

import pytest
import torch
from dense_decoder import decoder, llama3_8b

from autopar.cluster import Cluster
from autopar.graph.saved import saved_for_backward
from autopar.job import Job
from autopar.sharding.execute import local_shape, run_local
from autopar.solver.candidates import BlockCosts
from autopar.solver.context import Context
from autopar.solver.decision_costs import local_elements
from autopar.solver.decisions import whole_decisions
from autopar.solver.evaluate import assess
from autopar.solver.fix import Fix, parse_fix
from autopar.solver.groups import root_blocks
from autopar.solver.liveness import dtype_of
from autopar.solver.memory import BlockBytes, MemoryModel
from autopar.solver.orders import peaks
from autopar.solver.search import search
from autopar.solver.shardings import KnownShardings, Shardings
from autopar.solver.space import configs
from autopar.solver.spread import spread, stage_problem
from autopar.solver.stages import rank_bytes, solve_stages

BF16 = Job(global_batch=8, seq_len=32)
STATIC = ("parameters", "gradients", "optimizer")
BLOCK = BlockBytes(elements=1000, inflight=500, transient=70 + 1000 * 2)
"""Its transient bytes include its own gradients in compute dtype."""


def model(zero=0, fsdp=4, pp=1, micro=4, boundary=10, job=BF16, **more):
    return MemoryModel(job, fsdp if zero else 1, zero, pp, micro, boundary, 99, **more)


def test_zero0_keeps_everything_whole():
    assert model().ranks([[BLOCK, BLOCK]])[0] == {
        "parameters": 2000 * (4 + 2),
        "gradients": 2000 * 4,
        "optimizer": 2000 * 8,
        # Most when the second block is reduced: input, output, and a copy of it, in place of its own gradients.
        "activations": 500,
        "transient": 10 + 1000 * (3 * 4 - 4),
        "reserve": 99,
    }


def test_zero1_shards_the_optimizer_and_zero2_gradients_too():
    one, two = (model(zero=level).ranks([[BLOCK, BLOCK]])[0] for level in (1, 2))
    assert one["parameters"] == two["parameters"] == 2000 * (4 // 4 + 2)
    assert one["optimizer"] == two["optimizer"] == 2000 * 8 // 4
    assert one["gradients"] == 2000 * 4
    assert two["gradients"] == 2000 * 4 // 4
    # Most when the second block's whole gradients are copied for their reduction; or, where those of one micro-batch
    # are reduced, when the first one goes backward beside that copy.
    assert (one["activations"], one["transient"]) == (500, 10 + 1000 * 4)
    assert (two["activations"], two["transient"]) == (500, 70 + 1000 * (2 + 4))
    # With a single micro-batch nothing waits for another.
    assert model(zero=1, micro=1).ranks([[BLOCK, BLOCK]])[0]["gradients"] == 2000 * 4 // 4


def test_zero3_shards_over_the_shard_group_and_gathers_two_blocks():
    memory = model(zero=3).ranks([[BLOCK, BLOCK, BLOCK]])[0]
    assert memory["parameters"] == memory["gradients"] == 3000 * 4 // 4
    assert memory["optimizer"] == 3000 * 8 // 4
    # The block in the middle: it and the one before it are gathered, the one after it is reduced and has freed what
    # it saved.
    assert memory["transient"] == 70 + 1000 * (2 + 4 + 2 * 2)
    assert memory["activations"] == 1000


def test_what_stays_gathered_under_zero3_stands_all_the_time():
    stays = dataclasses.replace(BLOCK, gathered=True)
    free, one, all_three = (model(zero=3).ranks([[stays] * count + [BLOCK] * (3 - count)])[0] for count in (0, 1, 3))
    assert one["parameters"] == free["parameters"] + 1000 * 2
    assert (
        all_three["parameters"] == free["parameters"] + 3000 * 2 == model(zero=2).ranks([[BLOCK] * 3])[0]["parameters"]
    )
    # Nothing is gathered beside it, neither the block that runs nor the one before it; with the first alone, the last
    # two still are.
    assert free["transient"] == one["transient"] + 1000 * 2 == all_three["transient"] + 2000 * 2
    assert sum(all_three.values()) == sum(model(zero=2).ranks([[BLOCK] * 3])[0].values())
    # In other levels and in the root group it means nothing.
    assert model(zero=2).ranks([[stays] * 3]) == model(zero=2).ranks([[BLOCK] * 3])
    rooted = [dataclasses.replace(block, root=True) for block in (BLOCK, stays)]
    assert model(zero=3).ranks([[rooted[0]]]) == model(zero=3).ranks([[rooted[1]]])


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_each_level_needs_no_more_than_the_one_below(pp, micro, schedule):
    more = {"schedule": schedule, "vpp": 2} if schedule == "zbv" else {}
    stages = [[BLOCK, BLOCK]] * pp * more.get("vpp", 1)
    totals = [
        [sum(stage[kind] for kind in STATIC) for stage in model(level, pp=pp, micro=micro, **more).ranks(stages)]
        for level in range(4)
    ]
    for lower, higher in itertools.pairwise(totals):
        assert all(a >= b for a, b in zip(lower, higher, strict=True))
    # Larger shard groups hold less, and one rank is zero 0 but for the copy.
    wide, narrow = (model(3, fsdp=n, pp=pp, micro=micro, **more).ranks(stages)[0]["optimizer"] for n in (8, 2))
    assert wide * 4 == narrow


def test_stages_change_nothing_but_halved_backwards():
    for level in range(4):
        alone, staged = model(level).ranks([[BLOCK]])[0], model(level, pp=2).ranks([[BLOCK], [BLOCK]])[1]
        for kind in ("parameters", "gradients", "optimizer"):
            assert alone[kind] == staged[kind]
    # They reduce when a stage has run its last backward: gradients are whole even with a single micro-batch. The first
    # stage's backward is whole, so that FSDP2 adds them up; those of the others come after its hooks.
    zbv = model(1, pp=2, micro=1, schedule="zbv", vpp=2).ranks([[BLOCK]] * 4)
    assert [stage["gradients"] for stage in zbv] == [4000, 2000, 2000, 2000]
    zbv = model(1, pp=2, micro=4, schedule="zbv", vpp=2).ranks([[BLOCK]] * 4)
    assert [stage["gradients"] for stage in zbv] == [4000, 6000, 6000, 6000]


def test_in_flight_and_buffers_by_stage():
    pipeline = model(pp=4, micro=6)
    assert [pipeline.in_flight(s) for s in range(4)] == [4, 3, 2, 1]
    # Outputs in flight and buffers for their gradients; buffers for inputs, and the gradient last sent; both.
    assert [pipeline.buffers(s) for s in range(4)] == [10 * (6 + 4), 10 * (12 + 3 + 1), 10 * (12 + 2 + 1), 10 * (6 + 1)]
    assert model().buffers(0) == 0
    assert [model(pp=3, micro=7, schedule="gpipe").in_flight(s) for s in range(3)] == [7, 7, 7]


def test_a_rank_with_several_stages_adds_them_up():
    pipeline = model(pp=2, micro=4, boundary=0, schedule="interleaved", vpp=2)
    light = BlockBytes(elements=10, inflight=1, transient=5)
    memory = pipeline.ranks([[light], [BLOCK], [BLOCK], [light]])
    # The reserve once a rank, the transient of its worst stage once; in flight what both hold at the worst moment:
    # rank 0 starts with a round of two on each of its stages and goes on with the next.
    assert [stage["reserve"] for stage in memory] == [99, 99, 0, 0]
    assert [stage["transient"] > 0 for stage in memory] == [True, True, False, False]
    # Most when the stage with the large block goes backward, and none of its micro-batches has yet.
    most = max(held[1][0] for held in pipeline.held(0))
    assert memory[2]["activations"] <= 500 * most


def test_halved_backwards_keep_what_weights_need():
    block = BlockBytes(elements=10, inflight=100, transient=0, waiting=7)
    memory = model(pp=2, micro=8, boundary=0, schedule="zbv", vpp=2).ranks([[block]] * 4)
    for rank in range(2):
        held = peaks("zbv", 2, 2, 8)[rank]
        most = max(sum(alive * 100 + waiting * 7 for alive, waiting in one) for one in held)
        assert 0 <= most - memory[rank]["activations"] - memory[3 - rank]["activations"] <= 100
    # Their last weight gradients wait in compute dtype.
    assert memory[3]["gradients"] == 10 * (4 + 2)
    assert (
        model(pp=2, micro=8, job=Job(8, 32, dtype="fp32"), schedule="zbv", vpp=2).ranks([[block]] * 4)[3]["gradients"]
        == 10 * 4
    )


def test_state_waits_on_the_host():
    away = {level: model(level, offload="state").ranks([[BLOCK, BLOCK]])[0] for level in range(4)}
    assert all(memory["optimizer"] == 0 for memory in away.values())
    assert [away[level]["parameters"] for level in range(4)] == [4000, 4000, 4000, 0]
    assert [away[level]["gradients"] for level in range(4)] == [8000, 8000, 0, 0]
    # Shards that replicas have yet to add up stay on the device.
    assert model(3, offload="state", replicas=2).ranks([[BLOCK]])[0]["gradients"] == 1000 * 4 // 4
    # A shard is on its way while a block runs.
    assert away[3]["transient"] == 70 + 1000 * (2 + 4 + 2 + 4 // 4)
    assert model(3, offload="state").hosts([[BLOCK, BLOCK]]) == (2000 * (4 + 4 + 8) // 4,)
    assert model(3).hosts([[BLOCK, BLOCK]]) == (0,)


def test_momentum_is_one_tensor():
    sgd = Job(8, 32, optimizer="sgd")
    assert model(job=sgd).ranks([[BLOCK]])[0]["optimizer"] == 4000
    half = Job(8, 32, dtype="fp16")
    assert model(job=half).ranks([[BLOCK]]) == model().ranks([[BLOCK]])


def test_tied_weights_count_once_on_a_stage():
    shared = BlockBytes(elements=1000, inflight=0, transient=0, shared=1000)
    assert model().ranks([[BLOCK, shared]])[0]["optimizer"] == model().ranks([[BLOCK]])[0]["optimizer"]


def test_the_root_group_stays_gathered_and_its_gradients_whole():
    """FSDP2 never frees the root group inside a micro-batch and reduces it when the backward has ended."""
    root = BlockBytes(elements=300, inflight=0, transient=5 + 300 * 2, root=True)
    plain = model(zero=3).ranks([[BLOCK]])[0]
    memory = model(zero=3).ranks([[root, BLOCK]])[0]
    assert memory["parameters"] - plain["parameters"] == 300 * (4 // 4 + 2)
    assert memory["gradients"] - plain["gradients"] == 300 * (4 // 4 + 2)
    assert memory["optimizer"] - plain["optimizer"] == 300 * 8 // 4
    # Whole anyway: only the gradients that wait in compute dtype come on top.
    for other in (model(zero=0), model(zero=1), model(zero=1, pp=2)):
        assert other.ranks([[root]] * other.pp)[0]["gradients"] == 300 * (4 + 2)
    # A block of the root group runs beside the input of another block's reduction.
    heavy = BlockBytes(elements=300, inflight=0, transient=50_000, root=True)
    assert model(zero=3).ranks([[heavy, BLOCK]])[0]["transient"] == 50_000 - 300 * 2 + 1000 * 4
    # A root group so large that its own reduction is the peak.
    huge = BlockBytes(elements=10**6, inflight=0, transient=2 * 10**6, root=True)
    assert model(zero=3).ranks([[huge, BLOCK]])[0]["transient"] == 10**6 * (4 - 2)


def test_a_huge_vocabulary_is_predicted_to_stay_gathered():
    job = Job(global_batch=4, seq_len=8)
    cluster = Cluster.parse("1x4:h100")
    small, large = (
        search(decoder(2, vocab=vocab), job, cluster, {"dp": 4, "zero": 3, "recompute": "none"}).stages[0].memory
        for vocab in (512, 512 + 2**17)
    )
    elements = 2 * 2**17 * 64
    assert large["parameters"] - small["parameters"] == elements * (4 // 4 + 2)
    assert large["gradients"] - small["gradients"] == elements * 2
    assert large["transient"] > small["transient"]


def test_blocks_of_the_root_group():
    graph = decoder(2)
    assert root_blocks(graph, range(4)) == (True, False, False, True)
    # Layers that share a weight go with the root where they are in one stage, and only there.
    weight = next(name for name in graph.blocks[1].parameters.values())
    shared = dataclasses.replace(graph, tied=((weight, weight.replace("layers.0", "layers.1")),))
    assert root_blocks(shared, range(4)) == (True, True, True, True)
    assert root_blocks(shared, range(2)) == (True, False)
    assert root_blocks(decoder(2, tied=True), range(4)) == (True, False, False, True)


@pytest.mark.parametrize("fix", [{}, {"pp": 2, "schedule": "interleaved"}, {"pp": 2, "schedule": "zbv"}])
@pytest.mark.parametrize("tied", [False, True])
def test_the_stage_ilp_never_counts_fewer_bytes_than_the_plan(tied, fix):
    graph = decoder(3, tied=tied)
    job = Job(global_batch=8, seq_len=32)
    seen = set()
    for zero in range(4):
        fixed = parse_fix({**fix, "zero": zero})
        context = Context.of(graph, job, Cluster.parse("1x4:h100"), fixed)
        for config in configs(graph, job, context.cluster, fixed):
            answer = KnownShardings(context).of(config.sharding).fastest()
            problem, costs_of = stage_problem(context, config, [answer])
            found = solve_stages(problem, balance=False)
            counted = rank_bytes(problem, found.counts)
            exact = assess(context, config, spread(found.counts, costs_of), answer.boundary).memory
            for rank, told in enumerate(counted):
                assert told >= sum(sum(exact[stage].values()) for stage in problem.own(rank)) - 8
            seen.add(config.zero)
    assert seen == ({0, 1} if "zbv" in fix.values() else {0, 1, 2, 3})


def test_float64_jobs_have_no_separate_masters():
    memory = model(job=Job(8, 32, dtype="fp64")).ranks([[BLOCK]])[0]
    assert memory["gradients"] == 8000
    assert memory["optimizer"] == 16000


def measured_saved(kind, decision, batch, job):
    """Bytes that autograd keeps of one rank with just this batch, the input included."""
    values, found = {}, 0
    for node in kind.graph.nodes.values():
        if node.kind != "op":
            shape = local_shape(node.meta.at(batch, job.seq_len), decision.inputs[node.name], decision.axes)
            dtype = dtype_of(node.meta.dtype, torch.bfloat16)
            grad = node.meta.requires_grad and dtype.is_floating_point
            values[node.name] = torch.empty(shape, dtype=dtype, device="meta").requires_grad_(grad)
            found += values[node.name].nbytes if node.kind == "input" and grad else 0
    saved = saved_for_backward(lambda tensors: run_local(kind, decision, tensors, batch, job.seq_len), (values,))
    return found + sum(record.bytes for record in saved if record.argument is None and record.output is None)


@pytest.mark.parametrize("batch", [1, 3])
def test_saved_bytes_grow_linearly_with_the_batch(batch):
    graph = decoder(2)
    costs = BlockCosts(BF16)
    context = Context.of(graph, BF16, Cluster.parse("1x4:h100"), Fix())
    decisions = [
        whole_decisions(graph),
        {k: c["none"].decision for k, c in Shardings(context, {"tp": 4}.items(), 1).fastest().costs.items()},
    ]
    for chosen in decisions:
        for kind, decision in chosen.items():
            exact = measured_saved(graph.kinds[kind], decision, batch, BF16)
            assert costs.saved(graph.kinds[kind], decision, batch) == exact


def test_saved_bytes_are_what_autograd_keeps():
    """A linear layer and a SiLU: their inputs, once each."""

    def run(x, w):
        return torch.nn.functional.silu(x @ w)

    x, w = (torch.empty(8, 8, device="meta", requires_grad=True) for _ in range(2))
    assert sum(r.bytes for r in saved_for_backward(run, (x, w)) if not r.is_input) == 8 * 8 * 4


def test_llama_layer_keeps_what_the_literature_counts():
    """Fused attention and norms, SwiGLU, bf16 (arXiv 2411.06465): s b h (12 + 4 k/a + 8 f/h) bytes, and small change.

    Ours keeps rather more: the plain SiLU and product keep their inputs (2 f/h each) and rotary embedding its
    halves; never less than the formula without them, never twice as much.
    """
    graph = llama3_8b(1)
    job = Job(1, 8192)
    saved = BlockCosts(job).saved(graph.kinds["Layer"], whole_decisions(graph)["Layer"], 1)
    formula = 8192 * 4096 * (12 + 4 * 8 / 32 + 8 * 14336 / 4096)
    assert 0.8 * formula < saved < 1.6 * formula
    assert local_elements(graph.kinds["Layer"], whole_decisions(graph)["Layer"]) == 218_112_000


def test_splitting_a_block_splits_what_it_keeps():
    graph = llama3_8b(1)
    job = Job(8, 4096)
    context = Context.of(graph, job, Cluster.parse("1x8:h100"), Fix())
    split = Shardings(context, {"tp": 8}.items(), 1).fastest().costs["Layer"]["none"]
    costs = Shardings(context, (), 1).fastest().costs["Layer"]
    whole, recomputed = costs["none"], costs["full"]
    assert whole.inflight / 8 <= split.inflight < whole.inflight / 4
    assert recomputed.inflight == 4096 * 4096 * 2
    assert recomputed.transient == whole.transient + whole.inflight - recomputed.inflight
    assert recomputed.backward_s == pytest.approx(whole.backward_s + recomputed.again_s)
    assert 0.5 * whole.forward_s < recomputed.again_s < whole.forward_s  # the last projection does not run again
    assert split.transient < whole.transient


def test_loss_needs_room_for_its_logits():
    graph = decoder(1, vocab=4096)
    kind, decision = graph.kinds["Epilogue"], whole_decisions(graph)["Epilogue"]
    found = BlockCosts(BF16).footprint(kind, decision)
    tokens, logits = 2 * 32, 2 * 32 * 4096 * 4
    # In float32: the saved log-softmax, the gradient of the losses, and that of the logits. Beside them a few numbers a
    # token and what the matmul and the norm save.
    beside = found.peak_bytes(2) - 3 * logits
    assert 0 <= beside <= tokens * (64 * 2 * 3 + 64) + 1000
    assert found.saved_bytes(2) <= logits + tokens * (64 * 2 * 3 + 64)


def test_a_split_vocabulary_keeps_logits_in_the_compute_dtype():
    """As the emitted operator does; a whole one keeps a float32 log-softmax."""
    graph = decoder(1, vocab=4096)
    costs, whole = BlockCosts(BF16), whole_decisions(graph)["Epilogue"]
    kept, lean = (costs.saved(graph.kinds["Epilogue"], whole, 2, lean) for lean in (False, True))
    # Beside them one float32 per token.
    assert kept - lean == pytest.approx(2 * 32 * 4096 * (4 - 2), abs=2 * 32 * 4)
