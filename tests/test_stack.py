"""Stacks: where their figures are from, what they change of a prediction, and that nothing is emitted for others."""

import copy
from dataclasses import replace

import pytest

import autopar
from autopar import Cluster, Job
from autopar.errors import BadInputError, UnsupportedError
from autopar.graph.ir import LINEAR, Node, TensorMeta
from autopar.solver.answers import Answers
from autopar.solver.collective_costs import CollectiveCosts
from autopar.solver.data_axis import DataAxis
from autopar.solver.interval import residuals
from autopar.solver.intra_block import solve
from autopar.solver.op_costs import OpCosts
from autopar.solver.stack_work import as_run
from autopar.solver.work import ATTENTION, work
from autopar.solver.work_parts import LocalTensor
from autopar.stack import catalog, read_stack, stack_names, stack_of

FIX = {"pp": 1, "dp": 8, "tp": 1, "zero": 1, "micro_batch": 1, "recompute": "full"}


def predicted(stack="torch", device="a100-80g", fix=FIX, dtype="bf16", **more):
    job = Job(64, 2048, dtype, stack=stack, **more)
    return autopar.predict("llama3.2-1b", job, Cluster.parse(f"1x8:{device}"), fix)


@pytest.mark.parametrize("name", stack_names())
def test_every_stack_is_in_its_ranges(name):
    stack = stack_of(name)
    assert stack.name == name
    assert stack.title


@pytest.mark.parametrize("constant", [name for name, rule in catalog()["constants"].items() if "low" in rule])
def test_a_figure_out_of_its_range_is_named(constant):
    data = copy.deepcopy(catalog())
    assert data["constants"][constant]["meaning"]
    for wrong in (data["constants"][constant]["low"] - 1, data["constants"][constant]["high"] * 2):
        data["stacks"]["torch"]["values"][constant] = wrong
        with pytest.raises(BadInputError, match=f"stack 'torch', {constant}: .* outside its plausible range"):
            read_stack("torch", data)


def test_a_stack_without_source_is_refused():
    data = copy.deepcopy(catalog())
    data["stacks"]["torch"]["facts"] = " "
    with pytest.raises(BadInputError, match="stack 'torch': no facts"):
        read_stack("torch", data)


def test_unknown_names_are_told():
    with pytest.raises(BadInputError, match="unknown stack 'horovod'; one of automodel, compiled, compiled-async"):
        Job(8, 128, stack="horovod")
    with pytest.raises(BadInputError, match="unknown linear_dtype 'int8'; one of fp8, fp4"):
        Job(8, 128, linear_dtype="int8")


def test_a_plan_keeps_its_stack(tmp_path):
    plan = predicted("megatron")
    plan.save(tmp_path / "plan.json")
    assert autopar.Plan.load(tmp_path / "plan.json").job == plan.job
    assert predicted().job.to_json().keys() == {"global_batch", "seq_len", "dtype", "optimizer"}


def test_unfused_attention_is_slower_and_keeps_scores():
    fused, unfused = (predicted(name, fix={**FIX, "recompute": "none"}) for name in ("megatron", "megatron-unfused"))
    assert unfused.predicted.step_time > fused.predicted.step_time
    # 16 layers of 32 heads keep 2048 x 2048 probabilities of two bytes.
    kept = unfused.predicted.memory[0]["activations"] - fused.predicted.memory[0]["activations"]
    assert kept == pytest.approx(16 * 32 * 2048 * 2048 * 2, rel=0.05)


def test_unfused_attention_drops_out_in_a_kernel_of_its_own():
    """Bytes of a float16 score and its mask, read and written, each way."""
    scores, head = 4 * 128 * 128, LocalTensor((1, 4, 128, 64), 2)
    stack = stack_of("megatron-deepspeed")
    plain, dropped = (
        as_run(node, *work(node, [head] * 3, head, [True] * 3), 2, stack)
        for node in (
            Node("a", "op", TensorMeta((1, 4, 128, 64)), ATTENTION, (), more) for more in ({}, {"dropout_p": 0.1})
        )
    )
    for without, with_dropout in zip(plain, dropped, strict=True):
        assert with_dropout.nbytes - without.nbytes == 5 * scores
        assert with_dropout.kernels == without.kernels + 1


def test_heads_whose_rows_are_not_aligned_are_slow():
    """Products of unfused attention with heads of 150 elements against 144."""
    device = Cluster.parse("1x8:a100-80g").device

    def seconds(head_dim, name):
        x, node = LocalTensor((1, 12, 2048, head_dim), 2), Node("a", "op", TensorMeta(()), ATTENTION, tuple("qkv"))
        return OpCosts(device, Job(8, 2048, "fp16", stack=name)).seconds(node, [x] * 3, x, [True] * 3).forward

    assert seconds(150, "megatron-deepspeed") > 2 * seconds(144, "megatron-deepspeed")
    assert seconds(150, "megatron") < 1.2 * seconds(144, "megatron")


def test_a_fixed_recomputation_is_no_sign_of_short_memory(monkeypatch):
    """Leaner shardings are not asked for where blocks may do nothing but run again, and memory is enough."""
    monkeypatch.setattr(Answers, "lean", lambda self: pytest.fail("memory is not short"))
    assert predicted(fix={**FIX, "dp": 4, "tp": 2}).candidates


def test_shardings_that_lie_alike_are_solved_once(monkeypatch):
    """On other nodes too; but not where their ranks cross nodes."""
    fix = {**FIX, "dp": 1, "tp": 4, "micro_batch": 2, "sp": False}
    job, told = Job(8, 512, "fp16"), {}
    for shape in ("1x4", "1x8", "2x2", "1x4"):
        cluster = Cluster.parse(f"{shape}:a100-80g")
        seen = []
        monkeypatch.setattr("autopar.solver.answers.solve", lambda *a, seen=seen: seen.append(a) or solve(*a))
        plan = autopar.predict("gpt2", job, cluster, {**fix, "dp": cluster.devices // 4})
        told.setdefault(shape, []).append((plan.predicted.step_time, bool(seen)))
    (first, solved), (again, none) = told["1x4"]
    assert (again, solved, none) == (first, True, False)
    assert [solved for _, solved in told["1x8"] + told["2x2"]] == [False, True]
    assert told["2x2"][0][0] > 1.2 * first


def test_fused_kernels_are_faster():
    assert predicted("compiled").predicted.step_time < predicted("torch").predicted.step_time


def test_a_slow_host_bounds_small_work():
    """Splitting what the host cannot start fast enough gains nothing."""
    fix = {"pp": 1, "dp": 1, "zero": 0, "micro_batch": 1, "recompute": "full", "sp": False}
    one, eight = (
        autopar.predict(
            "gpt2",
            Job(8, 128, "fp16", stack="megatron-deepspeed"),
            Cluster.parse(f"1x{tp}:a100-80g"),
            {**fix, "tp": tp},
        )
        for tp in (1, 4)
    )
    assert eight.predicted.step_time > 0.95 * one.predicted.step_time


def with_host(cluster, speed):
    group = cluster.groups[0]
    return Cluster((replace(group, device=replace(group.device, host_speed=speed)),))


def test_a_slower_host_takes_as_much_longer():
    """What its cores start one by one takes as much longer as they are slower; what nothing waits for stays."""
    job = Job(8, 128, "fp16", stack="megatron-deepspeed")
    fix = {"pp": 1, "dp": 2, "tp": 1, "zero": 0, "micro_batch": 1, "recompute": "full"}
    plain = Cluster.parse("1x2:a100-80g")
    whole, half = (autopar.predict("gpt2", job, with_host(plain, speed), fix).predicted for speed in (1.0, 0.5))
    fixed = stack_of(job.stack).step_s
    assert half.step_time - fixed == pytest.approx(2 * (whole.step_time - fixed), rel=0.15)
    for speed in (1.0, 0.5):
        collectives = CollectiveCosts(with_host(plain, speed), job.stack)
        host = stack_of(job.stack).collective_host_s / speed
        assert host < collectives.seconds("all_reduce", 8, 2, 1) < host + 1e-5
    emitted = replace(job, stack="torch")
    one, other = (autopar.predict("gpt2", emitted, with_host(plain, speed), fix).predicted for speed in (1.0, 0.5))
    assert one.step_time == other.step_time


def test_hosts_of_devices_are_told_against_one(tmp_path):
    speeds = {name: Cluster.parse(f"1x4:{name}").device.host_speed for name in ("a100-80g", "h100", "gb200")}
    assert speeds["h100"] == 1
    assert 0.5 < speeds["a100-80g"] < speeds["gb200"] < 1
    with pytest.raises(BadInputError, match="host_speed"):
        with_host(Cluster.parse("1x4:h100"), 0.0)
    file = tmp_path / "cluster.yaml"
    file.write_text("device: h100\nnodes: 1\ndevices_per_node: 4\nhost_speed: 0.5\n")
    device = Cluster.load(file).device
    assert device.host_speed == 0.5
    assert device.sources["host_speed"] == "cluster file cluster.yaml"


def test_narrow_linear_layers():
    plain, narrow = (predicted(device="h100", linear_dtype=name) for name in (None, "fp8"))
    assert 0.5 < narrow.predicted.step_time / plain.predicted.step_time < 0.95
    with pytest.raises(BadInputError, match="'a100-80g' has no fp8 matmul rate"):
        predicted(linear_dtype="fp8")


def test_products_that_are_scaled_again_are_read_and_written():
    """Backward, by row-wise float8: the input's gradient and the weight's, two bytes each way, in a kernel each."""
    rows, weight, output = LocalTensor((128, 64), 2), LocalTensor((256, 64), 2), LocalTensor((128, 256), 2)
    node = Node("a", "op", TensorMeta((128, 256)), LINEAR, (), {})
    parts = work(node, [rows, weight], output, [True, True])
    plain, again = (as_run(node, *parts, 2, stack_of(name), 1.0) for name in ("compiled-loss", "compiled-rowwise"))
    assert again[0] == plain[0]
    assert again[1].nbytes - plain[1].nbytes == 4 * (128 * 64 + 256 * 64)
    assert again[1].kernels == plain[1].kernels + 2
    wide = [as_run(node, *parts, 2, stack_of(name)) for name in ("compiled-loss", "compiled-rowwise")]
    assert wide[0] == wide[1]


def test_tensor_ranks_wait_for_one_part_of_what_goes_in_parts():
    fix = {**FIX, "dp": 2, "tp": 4, "recompute": "none", "sp": True}
    whole, parts = (predicted(name, fix=fix).predicted.breakdown for name in ("compiled-loss", "compiled-async"))
    sent = "model axis communication"
    assert parts[sent] < 0.4 * whole[sent]
    assert parts["computation"] == pytest.approx(whole["computation"], rel=0.05)


@pytest.mark.parametrize("more", [{"stack": "megatron"}, {"linear_dtype": "fp8"}])
def test_nothing_is_emitted_for_other_stacks(more, tmp_path):
    plan = predicted(device="h100", **more)
    with pytest.raises(UnsupportedError, match="predicts what another stack does"):
        autopar.emit(plan, "llama3.2-1b", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", stack_names())
def test_no_bound_is_above_what_is_found(name):
    plan = autopar.search("gpt2", Job(32, 512, "fp16", stack=name), Cluster.parse("1x4:a100-80g"))
    assert plan.bound <= plan.predicted.step_time * (1 + 1e-9)


def test_variants_have_the_interval_of_their_family():
    assert stack_of("compiled-loss").family == "compiled"
    assert residuals("compiled-loss") == residuals("compiled") != residuals("composer")


def test_losses_differ_by_their_copies_of_logits():
    logits = 2048 * 128_256 * 4
    held = {
        name: predicted(name).predicted.memory[0]["total"]
        for name in ("megatron", "megatron-compiled-loss", "compiled", "compiled-loss")
    }
    assert held["megatron-compiled-loss"] - held["megatron"] == pytest.approx(logits, rel=0.05)
    # Three in float32 against two in bfloat16, until something else is the most.
    assert logits < held["compiled"] - held["compiled-loss"] <= 2.01 * logits


def test_attention_that_is_computed_again_keeps_no_scores():
    """Megatron's selective recomputation: as much kept as by fused kernels, and one more forward in the backward."""
    fix = {**FIX, "recompute": "none"}
    whole, again = (predicted(name, fix=fix, dtype="fp16") for name in ("megatron-early", "megatron-early-selective"))
    fewer = whole.predicted.memory[0]["activations"] - again.predicted.memory[0]["activations"]
    # 16 layers of 32 heads keep 2048 x 2048 probabilities of two bytes, fused kernels a float32 for each query.
    assert fewer == pytest.approx(16 * 32 * 2048 * (2048 * 2 - 4), rel=0.05)
    assert again.predicted.step_time > whole.predicted.step_time
    head = LocalTensor((1, 4, 128, 64), 2)
    node = Node("a", "op", TensorMeta((1, 4, 128, 64)), ATTENTION, (), {})
    parts = work(node, [head] * 3, head, [True] * 3)
    for name in ("megatron", "megatron-early"):
        forward, backward = as_run(node, *parts, 2, stack_of(name))
        same, both = as_run(node, *parts, 2, stack_of(f"{name}-selective"))
        assert same == forward
        assert both.kernels == forward.kernels + backward.kernels
        assert both.nbytes == forward.nbytes + backward.nbytes
        if name == "megatron":
            assert both.attention.matmuls == forward.attention.matmuls + backward.attention.matmuls
        else:
            assert both.matmuls == forward.matmuls + backward.matmuls


@pytest.mark.parametrize(
    ("stack", "micro_batches", "moved"),
    [
        ("megatron", 4, 0),  # matmuls add up
        ("megatron-deepspeed", 1, 0),
        (
            "megatron-deepspeed",
            4,
            3 * (2 + 2 + 2),
        ),  # of four, three are added: two tensors of float16 read, one written
        ("megatron-deepspeed-bf16", 4, 4 * (2 + 4 + 4)),  # all are widened
    ],
)
def test_adding_up_gradients_moves_bytes(stack, micro_batches, moved):
    elements, device = 10**8, Cluster.parse("1x8:a100-80g").device
    job = Job(64, 2048, "fp16", stack=stack)
    ops, collectives = OpCosts(device, job), CollectiveCosts(Cluster.parse("1x8:a100-80g"), stack)
    data = DataAxis(ops, collectives, (((8, 1),),), 1, 8, micro_batches)
    seconds = micro_batches * data.reduce_copy_s(elements)
    launches = micro_batches * device.launch_s if moved else 0
    assert seconds == pytest.approx(moved * elements / (device.memory_bandwidth * device.memory_efficiency) + launches)
    assert data.reduce_copy_s(0) == 0
