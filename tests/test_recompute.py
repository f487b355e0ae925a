"""Selective recomputation: what runs again, what is kept and how many bytes it is, and equal gradients."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hand_plans import graph_of, llama, megatron, plan_of
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from autopar.cluster import Cluster
from autopar.codegen.emit_module import module_source
from autopar.codegen.load import load_module
from autopar.codegen.ranks import fake_mesh
from autopar.codegen.runtime.collectives import all_gather, reduce_scatter
from autopar.codegen.runtime.recompute import KEEPABLE, policy, selective
from autopar.codegen.runtime.sharding import compile_blocks
from autopar.codegen.typecheck import typecheck
from autopar.codegen.verify import verify
from autopar.graph.ir import ModelGraph
from autopar.job import Job
from autopar.plan import SAVEABLE, Mesh, Plan
from autopar.solver.candidates import BlockCosts
from autopar.solver.collective_costs import CollectiveCosts
from autopar.solver.context import Context
from autopar.solver.decision_costs import boundary_bytes, priced_pieces
from autopar.solver.fix import parse_fix
from autopar.solver.op_costs import OpCosts
from autopar.solver.prices import AxisPrices
from autopar.solver.recompute import SELECTIVE, Recompute, choices, rerun, runs_again, selective_name
from autopar.solver.shardings import Shardings

Call = Callable[..., Any]


class Layer(nn.Module):
    """A decoder layer with biases and dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.before, self.between = nn.RMSNorm(32), nn.RMSNorm(32)
        self.qkv, self.o = nn.Linear(32, 96, bias=False), nn.Linear(32, 32)
        self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)
        self.p = dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (4, 8)).transpose(1, 2) for t in self.qkv(self.before(x)).chunk(3, -1))
        heads = F.scaled_dot_product_attention(q * 2, k * 0.5, v, is_causal=True)
        x = x + F.dropout(self.o(heads.transpose(1, 2).flatten(2)), self.p)
        normed = self.between(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Count(TorchDispatchMode):
    """Counts operators by the family they may be kept as."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for family, packets in KEEPABLE.items():
            self.found[family] += func.overloadpacket in packets
        return func(*args, **(kwargs or {}))


def trained(call: Call, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Counter[str]]:
    """Gradients of three layers, each called through ``call``, and the operators of the backward."""
    torch.manual_seed(0)
    layers = nn.ModuleList(Layer(dropout) for _ in range(3)).to(dtype)
    x = torch.randn(2, 8, 32, dtype=dtype, requires_grad=True)
    hidden = x
    for layer in layers:
        hidden = call(layer, hidden)
    with Count() as counted:
        hidden.float().square().sum().backward()
    return [x.grad, *(weight.grad for weight in layers.parameters())], counted.found


def plainly(layer: nn.Module, *args: Tensor) -> Tensor:
    return layer(*args)


fully: Call = partial(checkpoint, use_reentrant=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_those_without_recomputation_to_the_last_bit(dropout: float, dtype: torch.dtype) -> None:
    expected, _ = trained(plainly, dropout, dtype)
    for keep in [(), ("matmul",), ("attention",), ("matmul", "attention")]:
        found, _ = trained(partial(selective, keep=keep), dropout, dtype)
        assert all(map(torch.equal, found, expected)), keep
    found, _ = trained(fully, dropout, dtype)
    assert all(map(torch.equal, found, expected))


def test_kept_operators_do_not_run_again_and_others_do() -> None:
    def again(call: Call) -> tuple[int, int]:
        more = trained(call)[1] - trained(plainly)[1]
        return more["matmul"] // 3, more["attention"] // 3

    # The last projection of a layer has saved its operands before it computes: it never runs again.
    assert again(fully) == (4, 1)
    assert again(partial(selective, keep=())) == (4, 1)
    assert again(partial(selective, keep=("attention",))) == (4, 0)
    assert again(partial(selective, keep=("matmul",))) == (0, 1)
    assert again(partial(selective, keep=("matmul", "attention"))) == (0, 0)


def test_names_are_those_of_plans() -> None:
    assert tuple(KEEPABLE) == SAVEABLE
    assert all(KEEPABLE.values())


def test_the_policy_works_with_pytorchs_own_contexts() -> None:
    contexts = partial(create_selective_checkpoint_contexts, policy(("matmul",)))
    expected, plain = trained(plainly)
    found, counted = trained(partial(checkpoint, use_reentrant=False, context_fn=contexts))
    assert all(map(torch.equal, found, expected))
    assert counted["matmul"] == plain["matmul"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # of the compiler itself
def test_compiled_blocks_keep_what_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiler's own splitting of forward and backward, without the C++ it would make of them."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
    expected, plain = trained(plainly)

    def compiled(layer: nn.Module, x: Tensor, keep: tuple[str, ...]) -> Tensor:
        compile_blocks([layer])
        return selective(layer, x, keep=keep)

    for keep, again in ((("matmul", "attention"), 0), (("attention",), 4)):
        found, counted = trained(partial(compiled, keep=keep))
        pairs = zip(found, expected, strict=True)
        assert max(float((a - b).norm() / b.norm()) for a, b in pairs) < 1e-12
        assert counted["matmul"] - plain["matmul"] == 3 * again


def test_attention_made_of_matmuls_keeps_no_scores() -> None:
    def attend(x: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(x, x, x).sin()

    x = torch.randn(1, 2, 64, 4, requires_grad=True)
    held, _ = held_bytes(lambda: selective(attend, x, keep=("matmul", "attention")))
    assert held < 64 * 64 * 4 * 2 + 8192  # not two heads of 64 x 64 scores


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_layers_run_again_as_a_whole(kind: type[nn.RNNBase]) -> None:
    """They work in place on the results of their matmuls: kept ones would not be what the forward computed with."""
    torch.manual_seed(0)
    layer, x = kind(4, 3, batch_first=True).double(), torch.randn(2, 5, 4, dtype=torch.float64)

    def gradients(call: Call) -> list[Tensor]:
        loss = call(lambda y: layer(y)[0], x).square().sum()
        return list(torch.autograd.grad(loss, list(layer.parameters())))

    kept = gradients(partial(selective, keep=("matmul",)))
    for found, expected in zip(kept, gradients(lambda block, y: block(y)), strict=True):
        assert torch.equal(found, expected)


def test_backward_twice_is_refused() -> None:
    x = torch.randn(2, 8, 32, requires_grad=True)
    result = selective(Layer(0.0), x, keep=("matmul",)).sum()
    result.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time through the same block"):
        result.backward()


def held_bytes(run: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes allocated by ``run`` and not freed (its result included), and the result."""
    run()  # whatever is made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = run()
    return sum(event.self_cpu_memory_usage for event in found.key_averages()), result


class Mlp(nn.Module):
    """A gated MLP, its inner width split over 8 ranks, its input and output by sequence."""

    def __init__(self, width: int, axis: Any) -> None:
        super().__init__()
        self.axis = axis
        self.gate, self.up = (nn.Linear(width, 4 * width // 8, bias=False) for _ in range(2))
        self.down = nn.Linear(4 * width // 8, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        whole = all_gather(F.rms_norm(x, x.shape[-1:]), self.axis, 1)
        return reduce_scatter(self.down(F.silu(self.gate(whole)) * self.up(whole)), self.axis, 1)


def test_gathered_tensors_are_kept_or_gathered_again() -> None:
    width, seq = 256, 1024
    shard, gathered, inner = (4 * n for n in (seq // 8 * width, seq * width, seq * width // 2))
    everything = ("matmul", "all_gather", "reduce_scatter")
    with fake_mesh({"tp": 8}) as mesh:
        x = torch.randn(1, seq // 8, width, requires_grad=True)
        mlp = Mlp(width, mesh["tp"])

        def measured(call: Call) -> tuple[int, Counter[str]]:
            held, result = held_bytes(lambda: call(mlp, x))
            with Count() as counted:
                result.sum().backward()
            return held - shard, counted.found  # without the result itself

        none, plain = measured(plainly)
        kept, with_gathers = measured(partial(selective, keep=everything))
        regathered, without = measured(partial(selective, keep=("matmul", "reduce_scatter")))
        full, again = measured(fully)
    slack = 16 << 10  # statistics of the norm; with recomputation the state of the random numbers
    assert none == pytest.approx(gathered + 4 * inner, abs=slack)
    assert kept == pytest.approx(gathered + 2 * inner, abs=slack)
    assert regathered == pytest.approx(2 * inner, abs=slack)
    assert full == pytest.approx(0, abs=slack)
    # What is gathered is a third of what the MLP saves without recomputation, half of what it keeps with.
    assert gathered / none == pytest.approx(1 / 3, abs=0.01)
    assert (kept - regathered) == pytest.approx(gathered, abs=slack)
    runs = [found["all_gather"] - plain["all_gather"] for found in (with_gathers, without, again)]
    assert runs == [0, 1, 1]
    assert [found["reduce_scatter"] - plain["reduce_scatter"] for found in (with_gathers, without, again)] == [0, 0, 0]


# Emitted blocks


def kept_plan(graph: ModelGraph, saved: tuple[str, ...], tp: int = 2, sequence: bool = True, **options: Any) -> Plan:
    """Tensor and sequence parallel; the first two layers are recomputed selectively, the others not."""
    plan = plan_of(graph, megatron(graph, tp, sequence), Mesh(tp=tp), **options)
    layer = plan.candidates["LlamaDecoderLayer"]
    other = dataclasses.replace(layer, name="kept", recompute="selective", saved=saved, inflight_bytes=12_345_678)
    runs = tuple(
        dataclasses.replace(run, candidate="kept") if run.start in (1, 2) else run for run in plan.stages[0].runs
    )
    stage = dataclasses.replace(plan.stages[0], runs=runs)
    return dataclasses.replace(plan, candidates={**plan.candidates, "kept": other}, stages=(stage,))


def test_blocks_of_one_stage_differ_in_the_emitted_text() -> None:
    graph = graph_of(llama(4))
    text = module_source(kept_plan(graph, ("matmul", "attention", "reduce_scatter")), graph)
    assert "from runtime.recompute import selective\n" in text
    assert '"selective(matmul+attention+reduce_scatter)",' in text
    call = """\
                if recompute == "selective(matmul+attention+reduce_scatter)":
                    # keeps its input and the results named, backward runs the rest
                    # again: 12.3 MB per micro-batch
                    hidden = selective(
                        block,
                        hidden,
                        cos,
                        sin,
                        keep=("matmul", "attention", "reduce_scatter"),
                    )
                else:
                    hidden = block(hidden, cos, sin)
"""
    assert call in text


@pytest.mark.parametrize("saved", [SELECTIVE[0], SELECTIVE[1], ("attention", "all_reduce")])
def test_emitted_blocks_compute_the_single_devices_gradients(saved: tuple[str, ...]) -> None:
    model = llama(3)
    graph = graph_of(model)
    for sequence in (True, False):
        plan = kept_plan(graph, saved, sequence=sequence)
        assert verify(plan, model).worst[1] <= 1e-10
    typecheck(plan, graph, 8)


@pytest.mark.parametrize("tp", [1, 2])
def test_predicted_bytes_are_those_that_are_kept(tp: int) -> None:
    """What `solver.recompute` reads off the graph, against the memory an emitted layer holds after its forward."""
    graph = graph_of(llama(2))
    batch, seq = 2, 512
    for saved in SELECTIVE:
        plan = kept_plan(graph, saved, tp, dtype="fp32", micro_batch=batch, seq_len=seq)
        decision = plan.candidates["kept"].decision
        kind = graph.kinds["LlamaDecoderLayer"]
        run = rerun(kind, decision, saved, batch, plan.job)
        out = boundary_bytes(kind, decision, batch, plan.job)
        with fake_mesh({"pp": 1, "dp": 1, "cp": 1, "tp": tp}) as mesh:
            module = load_module(module_source(plan, graph))
            stage = module.build_stage(0, mesh, torch.device("cpu"), torch.float32)
            layer = next(iter(stage.blocks()))
            for weight in layer.parameters():
                nn.init.ones_(weight)
            x = torch.randn(batch, seq // tp, 64, requires_grad=True)
            tables = module.shared_tables(seq, torch.float32, x.device)
            held, result = held_bytes(partial(selective, layer, x, *tables, keep=saved))
            with Count() as counted:
                result.sum().backward()
            result = layer(x, *tables)
            with Count() as plain:
                result.sum().backward()
        assert held - out == pytest.approx(sum(run.kept.values()), abs=20_000), saved
        assert sum(run.kept.values()) > 100_000
        for family in run.families:
            assert counted.found[family] == plain.found[family]
        again = Counter(kind.graph.nodes[key].op for key in run.again if key in kind.graph.nodes)
        assert counted.found["matmul"] - plain.found["matmul"] == again["aten.linear"]
        assert counted.found["all_gather"] - plain.found["all_gather"] == sum("S(1) > " in key for key in run.again)


# Names of choices


def test_choices() -> None:
    assert choices(None, False) == ("none", "full")
    assert choices("full", True) == ("full/offload",)
    assert choices("selective(attention)", False) == ("selective(attention)",)
    assert len(choices("selective", False)) == len(SELECTIVE)
    assert set(choices(None, False, extended=True)) == {"none", "full", *choices("selective", False)}
    for name in (*choices(None, True, extended=True), "selective()"):
        assert Recompute.of(name).name == name
    assert selective_name(("attention", "matmul")) == "selective(matmul+attention)"


def test_results_nobody_reads_are_not_kept() -> None:
    graph = graph_of(llama(2))
    kind = graph.kinds["LlamaDecoderLayer"]
    whole = megatron(graph, 2, True)[kind.name]
    job = kept_plan(graph, ()).job
    linear = [node.name for node in kind.graph.of("op") if node.op == "aten.linear"]
    q, k, v, o, gate, up, down = linear
    # Partial sums that enter a kept reduce-scatter are not read; the last result leaves the block.
    kept = rerun(kind, whole, ("matmul", "reduce_scatter"), 2, job).kept
    assert set(linear) & set(kept) == {q, k, v, gate, up}
    assert sum(key.startswith(f"{o}: ") for key in kept) == 1
    assert not any(key.startswith(f"{down}: ") for key in kept)
    # Without that collective among the kept ones, they are.
    assert set(linear) & set(rerun(kind, whole, ("matmul",), 2, job).kept) == {q, k, v, o, gate, up}
    # With nothing kept, everything up to the last projection runs again.
    again = rerun(kind, whole, (), 2, job).again
    assert set(linear) - set(again) == {down}
    assert runs_again(kind).runs == set(again) & {node.name for node in kind.graph.of("op")}


def test_full_recomputation_is_priced_up_to_the_last_result_that_is_saved() -> None:
    """The last projection and the reduction of its result are not run again, and are not paid for again."""
    graph = graph_of(llama(2))
    kind = graph.kinds["LlamaDecoderLayer"]
    decision, job = megatron(graph, 2, True)[kind.name], kept_plan(graph, (), dtype="fp32").job
    cluster = Cluster.parse("1x2:h100")
    prices = AxisPrices(OpCosts(cluster.device, job), CollectiveCosts(cluster), {"tp": 2}, 2)
    costs = BlockCosts(job).of(kind, decision, prices)
    down = [node.name for node in kind.graph.of("op") if node.op == "aten.linear"][-1]
    order = [node.name for node in kind.graph.of("op")]
    late = {*order[order.index(down) :]}
    pieces = {key: price.forward_s for key, price, _ in priced_pieces(kind, decision, prices)}
    not_again = [seconds for key, seconds in pieces.items() if key.partition(":")[0] in late]
    assert len(not_again) > len(late)  # the conversion of the last result is among them
    assert costs["full"].again_s == pytest.approx(sum(pieces.values()) - sum(not_again), rel=1e-9)
    assert costs["full"].again_s < 0.9 * costs["none"].forward_s


@pytest.mark.parametrize("axes", [{"tp": 4}, {"cp": 2, "tp": 2}, {"tp0": 2, "tp1": 2}], ids=str)
def test_the_ilp_pays_for_recomputation_what_candidates_do(axes: dict[str, int]) -> None:
    """Conversions before the point where the second run stops count twice, those behind it once."""
    graph, sizes = graph_of(llama(4)), "x".join(str(n) for name, n in axes.items() if name != "cp")
    fix = parse_fix({"recompute": "full", "cp": axes.get("cp", 1), "tp": sizes})
    context = Context.of(graph, Job(32, 64), Cluster.parse("1x8:h100"), fix)
    shardings = Shardings(context, axes.items(), 4)
    bound, costs = shardings.bound(), shardings.fastest().costs
    seconds = 0.0
    for kind, count in context.counts.items():
        cost = costs[kind]["full" if kind == "LlamaDecoderLayer" else "none"]
        seconds += count * (cost.forward_s + cost.backward_s + context.gradient_price() * cost.trains)
    assert bound == pytest.approx(seconds, rel=1e-6)


def test_json_of_a_plan_keeps_what_is_kept(tmp_path: Path) -> None:
    graph = graph_of(llama(2))
    plan = kept_plan(graph, ("attention",))
    plan.save(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["candidates"]["kept"]["saved"] == ["attention"]
    assert Plan.load(tmp_path / "plan.json") == plan
