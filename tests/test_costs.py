"""Operator costs: counted work against torch's own counter, limits of the roofline, and order."""

import time
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from autopar.catalog.devices_file import load_group
from autopar.errors import BadInputError
from autopar.graph.ir import Node, OpGraph, Ref, TensorMeta
from autopar.graph.ops import callable_of
from autopar.job import Job
from autopar.solver import op_costs
from autopar.solver.op_costs import LocalTensor, OpCosts, OpTime
from autopar.solver.work import flops, matmul_of, work
from autopar.solver.work_parts import Attention, Matmul

JOB = Job(global_batch=8, seq_len=4096)
SDPA = "aten.scaled_dot_product_attention"


def op(name, operands, *args, **kwargs):
    refs = tuple(Ref(f"x{i}") for i in range(operands))
    return Node("y", "op", TensorMeta(()), op=name, args=(*refs, *args), kwargs=kwargs)


def local(*shape, width=2):
    return LocalTensor(shape, width)


@pytest.fixture(scope="module")
def costs():
    return OpCosts(load_group("h100", 1, 8).device, JOB)


def counted(function, tensors):
    """(forward, backward) FLOP by torch's counter, on meta tensors."""
    with FlopCounterMode(display=False) as forward:
        out = function(*tensors)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


PRODUCTS = [
    ("aten.linear", [(2, 6, 8), (10, 8)]),
    ("aten.linear", [(2, 6, 8), (10, 8), (10,)]),
    ("aten.addmm", [(10,), (6, 8), (8, 10)]),
    ("aten.mm", [(6, 8), (8, 10)]),
    ("aten.bmm", [(3, 6, 8), (3, 8, 10)]),
    ("aten.matmul", [(3, 2, 6, 8), (3, 2, 8, 10)]),
    ("aten.matmul", [(3, 6, 8), (8, 10)]),
    ("aten.conv1d", [(2, 8, 12), (10, 8, 3), (10,)]),
    ("aten.conv2d", [(2, 8, 6, 6), (10, 8, 2, 2)]),
    ("aten.conv_transpose2d", [(2, 8, 6, 6), (8, 10, 2, 2)]),
]


@pytest.mark.parametrize(("name", "shapes"), PRODUCTS)
@pytest.mark.parametrize("which", ["all", "first", "second"])
def test_matmul_flops_are_torchs(name, shapes, which):
    matrices = [i for i, shape in enumerate(shapes) if len(shape) > 1]  # kernels too
    wanted = {"all": range(len(shapes)), "first": matrices[:1], "second": matrices[1:]}[which]
    grads = [i in wanted for i in range(len(shapes))]
    tensors = [torch.empty(shape, device="meta", requires_grad=g) for shape, g in zip(shapes, grads, strict=True)]
    function = callable_of(name)
    forward, backward = counted(function, tensors)
    output = function(*tensors).shape
    node = op(name, len(shapes))
    ahead, back = work(node, [local(*shape) for shape in shapes], local(*output), grads)
    assert (ahead.flops, back.flops) == (forward, backward)
    assert flops(node, shapes, tuple(output)) == forward


def test_a_convolution_in_groups_is_counted_by_group():
    tensors = [torch.empty(shape, device="meta") for shape in [(2, 8, 12), (8, 2, 3)]]
    node = op("aten.conv1d", 2, None, (1,), (0,), (1,), 4)
    with FlopCounterMode(display=False) as counter:
        output = torch.conv1d(*tensors, groups=4).shape
    assert flops(node, [tuple(x.shape) for x in tensors], tuple(output)) == counter.get_total_flops()


def test_einsum_flops():
    shapes = [(2, 6, 8), (2, 10, 8)]
    node = Node("y", "op", TensorMeta(()), op="aten.einsum", args=("b m k, b n k -> b m n", (Ref("x"), Ref("w"))))
    assert matmul_of(node, shapes, (2, 6, 10)) == Matmul(2, 6, 10, 8)
    assert flops(node, shapes, (2, 6, 10)) == 2 * 2 * 6 * 10 * 8


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_attention_flops_are_torchs(heads):
    query_heads, kv_heads = heads
    query = torch.empty(2, query_heads, 64, 16, device="meta", requires_grad=True)
    key, value = (torch.empty(2, kv_heads, 64, 16, device="meta", requires_grad=True) for _ in range(2))

    def plain(query, key, value):
        key, value = (x.repeat_interleave(query_heads // kv_heads, dim=1) for x in (key, value))
        return (query @ key.transpose(-1, -2)).softmax(-1) @ value

    forward, backward = counted(plain, (query, key, value))
    inputs = [local(*x.shape) for x in (query, key, value)]
    for causal in (False, True):
        node = op(SDPA, 3, is_causal=causal)
        ahead, back = work(node, inputs, local(*query.shape), [True] * 3)
        assert flops(node, [x.shape for x in inputs], tuple(query.shape)) == forward
        assert ahead.flops == forward / (2 if causal else 1)
        # Fused attention computes the scores once more: five matmuls where the unfused backward has four.
        assert back.flops == pytest.approx(2.5 * ahead.flops)
        assert back.flops == pytest.approx(backward * 5 / 4 / (2 if causal else 1))


def test_causal_is_read_from_either_place():
    inputs = [local(1, 2, 64, 16)] * 3
    named, placed = op(SDPA, 3, is_causal=True), op(SDPA, 3, None, 0.0, True)
    assert work(named, inputs, inputs[0], [True] * 3) == work(placed, inputs, inputs[0], [True] * 3)
    assert work(named, inputs, inputs[0], [True] * 3) != work(op(SDPA, 3), inputs, inputs[0], [True] * 3)


def linear(costs, m, n, k, grads=(True, True)):
    return costs.seconds(op("aten.linear", 2), [local(m, k), local(n, k)], local(m, n), grads)


def test_large_matmul_reaches_the_efficiency(costs):
    m = n = k = 16384
    device = costs.device
    rate = 2 * m * n * k / linear(costs, m, n, k).forward
    assert 0.9 < rate / (device.peak("bf16") * device.matmul_efficiency) <= 1.0
    assert linear(costs, m, n, k).backward == pytest.approx(2 * linear(costs, m, n, k).forward, rel=0.02)


def narrow_linear(dtype, node=None, size=8192):
    """A square linear layer on GB200 whose operands are cast, by the stack that autopar emits."""
    told = OpCosts(load_group("gb200", 1, 8).device, Job(global_batch=8, seq_len=4096, linear_dtype=dtype))
    x = local(size, size)
    return told, told.seconds(node or op("aten.linear", 2), [x, x], x, [True, True])


@pytest.mark.parametrize(("dtype", "moved"), [("fp8", 2 + 2 * 1), ("fp4", 2 * 2 + 2 * 0.5)])
def test_what_is_cast_is_written_for_both_products(dtype, moved):
    """Input forward and gradient backward, by rows and by columns; FP4 reads the largest of the tensor first. Weights
    are cast once a step."""
    told, time = narrow_linear(dtype)
    size, rate = 8192, told.device.sustained(dtype) * told.stack.matmul
    cast = told.stream_seconds(moved * size * size)
    fill = (size + op_costs.FILL_K) / size
    waves = -(-(size // 128) * (size // 256) // 152) * 152 / ((size // 128) * (size // 256))
    matmul = 2 * size**3 / rate * fill * waves
    assert time.forward == pytest.approx(matmul + cast + told.device.launch_s, rel=0.01)
    assert time.backward == pytest.approx(2 * matmul + cast + 2 * told.device.launch_s, rel=0.01)


def test_the_layer_of_logits_is_not_cast():
    nodes = {
        "x": Node("x", "input", TensorMeta((4, 8), requires_grad=True)),
        "labels": Node("labels", "input", TensorMeta((4,), "int64")),
        "w": Node("w", "parameter", TensorMeta((16, 8), requires_grad=True)),
        "h": Node("h", "op", TensorMeta((4, 8)), "aten.linear", (Ref("x"), Ref("w"))),
        "y": Node("y", "op", TensorMeta((4, 16)), "aten.linear", (Ref("h"), Ref("w"))),
        "capped": Node("capped", "op", TensorMeta((4, 16)), "aten.tanh", (Ref("y"),)),
        "loss": Node("loss", "op", TensorMeta(()), "autopar.cross_entropy", (Ref("capped"), Ref("labels"), -100)),
    }
    graph = OpGraph(nodes, ("loss",))
    assert [name for name, node in graph.nodes.items() if node.logits] == ["y"]
    head, other = (narrow_linear("fp8", graph.nodes[name])[1] for name in ("y", "h"))
    told, plain = narrow_linear(None)
    assert head == plain
    assert other.forward < 0.7 * plain.forward
    assert told.device.sustained("fp8") > 2 * told.device.sustained("bf16")


def test_small_operators_cost_their_launch(costs):
    launch = costs.device.launch_s
    assert linear(costs, 8, 8, 8).forward == pytest.approx(launch, rel=0.25)
    silu = costs.seconds(op("aten.silu", 1), [local(64)], local(64), [True])
    assert (silu.forward, silu.backward) == pytest.approx((launch, launch), rel=0.01)


def test_narrow_matmul_is_bound_by_bytes(costs):
    m, n, k = 1, 16384, 16384
    device = costs.device
    bandwidth = device.memory_bandwidth * device.memory_efficiency
    assert linear(costs, m, n, k).forward == pytest.approx(2 * n * k / bandwidth + device.launch_s, rel=0.01)


def test_streaming_operators_are_bound_by_bytes(costs):
    size = 1 << 28
    device = costs.device
    time = costs.seconds(op("aten.mul", 2), [local(size), local(size)], local(size), [True, True])
    bandwidth = device.memory_bandwidth * device.memory_efficiency
    assert time.forward == pytest.approx(3 * 2 * size / bandwidth, rel=0.01)
    assert time.backward == pytest.approx(2 * time.forward, rel=0.01)


def test_views_are_free_and_gradients_are_asked_for(costs):
    x = local(4, 128, 4096)
    view = costs.seconds(op("aten.unflatten", 1, 2, (32, 128)), [x], local(4, 128, 32, 128), [True])
    assert (view.forward, view.backward) == (0, 0)
    for name in ("aten.linear", "aten.mul", "aten.rms_norm"):
        time = costs.seconds(op(name, 2), [local(512, 512), local(512, 512)], local(512, 512), [False, False])
        assert time.forward > 0
        assert time.backward == 0
    only = linear(costs, 4096, 4096, 4096, (True, False))
    assert only.backward == pytest.approx(linear(costs, 4096, 4096, 4096).backward / 2, rel=0.01)


@pytest.mark.parametrize("dim", ["m", "n", "k"])
def test_more_work_never_costs_less(costs, dim):
    sizes = {"m": 1024, "n": 1024, "k": 1024}
    times = []
    for size in range(64, 8192, 64):
        time = linear(costs, **{**sizes, dim: size})
        times.append((time.forward, time.backward))
    for before, after in pairwise(times):
        assert after[0] >= before[0] * (1 - 1e-9)
        assert after[1] >= before[1] * (1 - 1e-9)


def test_waves_cost(costs):
    """One row of tiles past a full wave costs most of another wave."""
    tiles = costs.device.processors
    full, over = linear(costs, 128 * tiles, 256, 8192), linear(costs, 128 * tiles + 64, 256, 8192)
    assert over.forward > 1.1 * full.forward


def test_splitting_a_matmul_is_never_superlinear(costs):
    whole = linear(costs, 8192, 8192, 8192).forward
    for ways in (2, 4, 8):
        part = linear(costs, 8192, 8192 // ways, 8192).forward
        assert whole / ways <= part <= whole


def test_attention_depends_on_length_heads_and_mask(costs):
    def time(heads, length, head_dim=128, causal=True):
        x = local(1, heads, length, head_dim)
        return costs.seconds(op(SDPA, 3, is_causal=causal), [x] * 3, x, [True] * 3)

    assert time(32, 8192).forward < time(32, 8192, causal=False).forward
    assert 3.5 < time(32, 16384).forward / time(32, 8192).forward < 4.2
    assert 2.2 < time(32, 8192).backward / time(32, 8192).forward < 2.8
    # The same number of features in shorter heads takes longer.
    assert time(64, 8192, 64).forward > 1.05 * time(32, 8192, 128).forward
    device = costs.device
    rate = Attention(32, 8192, 8192, 128, True, 2).flops / time(32, 8192).forward
    assert 0.8 < rate / (device.peak("bf16") * device.attention_efficiency) <= 1


def test_causal_attention_of_one_ranks_queries(costs):
    """Chunks from both ends of the sequence are half of full attention's work on every rank; one chunk: the last's."""
    assert [Attention(1, rows, 1024, 64, True, 2).share for rows in (1024, 512, 256)] == [0.5] * 3
    assert Attention(1, 5, 15, 64, True, 2).share == pytest.approx(1 - 1 / 6)
    assert Attention(1, 256, 1024, 64, False, 2).share == 1.0
    keys, queries = local(1, 32, 8192, 128), local(1, 32, 2048, 128)
    whole = costs.seconds(op(SDPA, 3, is_causal=True), [keys] * 3, keys, [True] * 3)
    part = costs.seconds(op(SDPA, 3, is_causal=True), [queries, keys, keys], queries, [True] * 3)
    assert whole.forward / 4 < part.forward < whole.forward / 3
    assert whole.backward / 4 < part.backward < whole.backward / 2.5, "gradients of all keys are written and added"


def test_casts_cost_only_where_they_change_the_type(costs):
    narrow, wide = local(4096, 4096), local(4096, 4096, width=4)
    node = op("autopar.cast", 1, "float32")
    assert costs.seconds(node, [narrow], wide, [True]).forward > costs.stream_seconds(6 * 4096**2) * 0.99
    assert costs.seconds(node, [wide], wide, [True]) == OpTime(0.0, 0.0, "catalog")


def test_cross_entropy_and_embedding_count_the_vocabulary(costs):
    logits, labels = local(4096, 128256), local(4096, width=8)
    time = costs.seconds(op("autopar.cross_entropy", 2), [logits, labels], local(width=4), [True, False])
    half = costs.seconds(op("autopar.cross_entropy", 2), [local(4096, 64128), labels], local(width=4), [True, False])
    assert time.forward == pytest.approx(2 * half.forward, rel=0.02)
    table, ids, rows = local(128256, 4096), local(4096, width=8), local(4096, 4096)
    looked_up = costs.seconds(op("aten.embedding", 2), [table, ids], rows, [True, False])
    assert looked_up.backward > looked_up.forward


@pytest.mark.parametrize("device", ["h100", "a100-80g"])
def test_a_llama_layer_runs_at_a_plausible_mfu(device):
    """One Llama-3-8B layer, sequence 8192: the matmuls and attention alone, at what users report for dense training."""
    costs = OpCosts(load_group(device, 1, 8).device, Job(8, 8192))
    tokens, hidden = 8192, 4096
    total = work_done = 0.0
    for n, k in (
        (hidden, hidden),
        (1024, hidden),
        (1024, hidden),
        (hidden, hidden),
        *[(14336, hidden)] * 2,
        (hidden, 14336),
    ):
        node, shapes = op("aten.linear", 2), [(tokens, k), (n, k)]
        time = costs.seconds(node, [local(*shape) for shape in shapes], local(tokens, n), [True, True])
        total += time.forward + time.backward
        work_done += 3 * flops(node, shapes, (tokens, n))
    query, key = local(1, 32, tokens, 128), local(1, 8, tokens, 128)
    node = op(SDPA, 3, is_causal=True, enable_gqa=True)
    time = costs.seconds(node, [query, key, key], query, [True] * 3)
    total += time.forward + time.backward
    work_done += 3 * flops(node, [query.shape, key.shape, key.shape], query.shape)
    assert 0.5 < work_done / total / costs.device.peak("bf16") < 0.85


def test_a_published_step_is_mostly_compute():
    """torchtitan, Llama-3-8B on 64 A100-SXM4-80GB with FSDP, one sequence of 8,192 each: 2.76 s a step, every second
    matmul computed twice (`../shared/published`, row titan_a100_8B_op). What the operators alone take must be less than
    that, and most of it: the rest is exposed communication."""
    costs = OpCosts(load_group("a100-80g", 8, 8).device, Job(64, 8192))
    tokens, hidden, ffn, vocabulary, layers = 8192, 4096, 14336, 128256, 32
    layer = head = 0.0

    def seconds(node, inputs, output, again=0.0):
        time = costs.seconds(node, inputs, output, [True] * len(inputs))
        return time.forward * (1 + again) + time.backward

    x = local(1, tokens, hidden)
    for n, k in [(hidden, hidden)] * 2 + [(1024, hidden)] * 2 + [(ffn, hidden)] * 2 + [(hidden, ffn)]:
        layer += seconds(op("aten.linear", 2), [local(1, tokens, k), local(n, k)], local(1, tokens, n), again=0.5)
    query, key = local(1, 32, tokens, 128), local(1, 8, tokens, 128)
    layer += seconds(op(SDPA, 3, is_causal=True, enable_gqa=True), [query, key, key], query)
    layer += 2 * seconds(op("aten.rms_norm", 2), [x, local(hidden)], x, again=1.0)
    layer += 2 * seconds(op("aten.add", 2), [x, x], x)
    wide = local(1, tokens, ffn)
    layer += seconds(op("aten.silu", 1), [wide], wide, again=1.0) + seconds(op("aten.mul", 2), [wide, wide], wide)
    logits = local(1, tokens, vocabulary)
    head += seconds(op("aten.linear", 2), [x, local(vocabulary, hidden)], logits)
    head += seconds(op("autopar.cross_entropy", 1), [logits], local(width=4))
    total = layers * layer + head + costs.optimizer_seconds(8_030_000_000 // 64)
    assert 0.7 < total / 2.7555 < 1.0


def test_constants_are_plausible():
    """Smaller tiles are slower, but no more than the cache traffic of their shape explains."""
    largest = max(height * width for height, width, _ in op_costs.TILES)
    for height, width, speed in op_costs.TILES:
        assert (height * width / largest) ** 0.5 <= speed <= 1
    assert 32 <= op_costs.FILL_K <= 512
    assert 128 <= op_costs.SUM_K <= 1024
    assert 64 <= op_costs.FILL_KEYS <= 1024


def test_optimizer_and_clipping_are_bound_by_bytes(costs):
    elements = 10**9
    bandwidth = costs.device.memory_bandwidth * costs.device.memory_efficiency
    assert costs.optimizer_seconds(elements) == pytest.approx(28 * elements / bandwidth, rel=0.01)
    assert costs.clip_seconds(elements) == pytest.approx(12 * elements / bandwidth, rel=0.01)
    assert costs.optimizer_seconds(0) == costs.stream_seconds(0) == 0
    assert costs.stream_seconds(2e9) > costs.stream_seconds(1e9)


def test_dtypes(costs):
    fp32 = OpCosts(costs.device, Job(8, 4096, dtype="fp32"))
    x = LocalTensor((4096, 4096), 4)
    wide = fp32.seconds(op("aten.linear", 2), [x, x], x, [True, True])
    assert wide.forward > 8 * linear(costs, 4096, 4096, 4096).forward
    # A float32 product inside a bf16 job runs at the float32 rate.
    assert costs.seconds(op("aten.linear", 2), [x, x], x, [True, True]) == wide
    with pytest.raises(BadInputError, match=r"h100.*fp64"):
        OpCosts(costs.device, Job(8, 4096, dtype="fp64"))


def test_prices_are_remembered_and_cheap(costs):
    first = linear(costs, 1000, 1000, 1000)
    assert isinstance(first, OpTime)
    assert first.source == "catalog"
    node, x = op("aten.linear", 2), local(1000, 1000)
    start = time.perf_counter()
    for _ in range(10_000):
        again = costs.seconds(node, [x, x], x, (True, True))
    assert again is first
    assert time.perf_counter() - start < 1.0


def test_known_operators_run_as_counted():
    """Every operator with bytes of its own is one torch has under that name, or a composite."""
    from autopar.solver import work as module

    extra = {"getitem", "numpy_T", "chunk", "contiguous", "lift_fresh_copy", "to", "pad"}
    for name in module._COUNTS:
        short = name.split(".")[1]
        assert name.startswith("autopar.") or short in extra or hasattr(torch.ops.aten, short) or hasattr(F, short)
