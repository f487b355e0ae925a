"""The text of module.py: what it says, that it is clean, and that its blocks compile and save what is predicted."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys

import pytest
import torch
from hand_plans import Graphs, gpt2, llama, megatron, on_axes, plan_of, whole

from autopar.codegen.buffers import buffer_expr
from autopar.codegen.emit_module import module_source
from autopar.codegen.load import load_module
from autopar.codegen.ranks import fake_mesh
from autopar.errors import UnsupportedError
from autopar.graph.ir import ModelGraph, TensorMeta
from autopar.graph.saved import saved_bytes, saved_for_backward
from autopar.plan import Mesh, Plan
from autopar.sharding.execute import run_local
from autopar.sharding.local import local_shape

MODELS = {"llama": llama(3), "gpt2": gpt2(3)}
GRAPHS = Graphs(MODELS)
PLANS = ("dp4", "tp4", "tp4 sp", "pp2 tp2 sp full", "cp2 tp2 sp", "cp2 tp2x2")


def plan(graph: ModelGraph, name: str, **changes: object) -> Plan:
    if name == "dp4":
        return plan_of(graph, whole(graph), Mesh(dp=4), **changes)
    if name.startswith("tp4"):
        return plan_of(graph, megatron(graph, 4, "sp" in name), Mesh(tp=4), **changes)
    if name.startswith("cp2"):
        mesh = Mesh(cp=2, tp=4, tp_parts=(2, 2)) if "2x2" in name else Mesh(cp=2, tp=2)
        return plan_of(graph, on_axes(graph, mesh, "sp" in name), mesh, **changes)
    return plan_of(graph, megatron(graph, 2, True), Mesh(pp=2, tp=2), bounds=(2,), recompute="full", **changes)


CASES = [(model, name) for model in MODELS for name in PLANS]


@pytest.mark.parametrize(("model", "name"), CASES)
def test_the_text_is_plain_pytorch_without_baked_sizes(model: str, name: str) -> None:
    odd = plan(GRAPHS[model], name, seq_len=1016, micro_batch=57)
    text = module_source(odd, GRAPHS[model])
    ast.parse(text)
    code = "\n".join(line.split("#")[0] for line in text.splitlines())
    assert "aten" not in code
    assert not re.search(r"\b(1016|57|254|508)\b", code)
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert len(text.splitlines()) < 260


@pytest.mark.parametrize("name", PLANS)
def test_the_text_is_formatted(name: str, tmp_path) -> None:
    for model, graph in GRAPHS.items():
        (tmp_path / f"{model}.py").write_text(module_source(plan(graph, name), graph))
    for width in ("88", "120"):
        for command in (["format", "--check"], ["check", "--select", "E,F,I,B,C4", "--ignore", "E501"]):
            run = subprocess.run(
                [sys.executable, "-m", "ruff", *command, "--isolated", "--line-length", width, str(tmp_path)],
                capture_output=True,
                text=True,
                check=False,
            )
            assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(("model", "name"), CASES)
def test_parameters_keep_their_names_and_shapes(model: str, name: str) -> None:
    chosen = plan(GRAPHS[model], name)
    with fake_mesh(chosen.mesh.axes() | {"pp": 1}) as mesh:
        module = load_module(module_source(chosen, GRAPHS[model]))
        found = {}
        for index in range(len(chosen.stages)):
            stage = module.build_stage(index, mesh, torch.device("cpu"), meta=True)
            assert all(weight.is_meta for weight in stage.parameters())
            assert len(stage.blocks()) == sum(len(run[1]) for run in module.STAGES[index])
            found |= {key: tuple(weight.shape) for key, weight in stage.state_dict().items()}
    expected = {key: tuple(weight.shape) for key, weight in MODELS[model].named_parameters()}
    assert found == expected
    assert chosen.mesh.axes() == module.MESH


def test_a_stage_holds_its_own_layers_under_their_global_numbers() -> None:
    chosen = plan(GRAPHS["llama"], "pp2 tp2 sp full")
    with fake_mesh({"dp": 1, "tp": 2}) as mesh:
        module = load_module(module_source(chosen, GRAPHS["llama"]))
        second = module.build_stage(1, mesh, torch.device("cpu"), meta=True)
    names = [name for name, _ in second.named_parameters()]
    assert "model.layers.1.self_attn.q_proj.weight" in names
    assert "lm_head.weight" in names
    assert not any("layers.0." in name or "embed" in name for name in names)


def test_a_weight_tied_over_stages_has_a_copy_on_each() -> None:
    graph = GRAPHS["gpt2"]
    chosen = plan(graph, "pp2 tp2 sp full")
    with fake_mesh({"dp": 1, "tp": 2}) as mesh:
        module = load_module(module_source(chosen, graph))
        stages = [module.build_stage(index, mesh, torch.device("cpu"), meta=True) for index in (0, 1)]
    assert module.TIED == (("transformer.wte.weight", "lm_head.weight"),)
    assert all("transformer.wte.weight" in stage.state_dict() for stage in stages)


def test_megatron_tensor_parallelism_reads_as_such() -> None:
    text = module_source(plan(GRAPHS["llama"], "tp4 sp", dtype="bf16"), GRAPHS["llama"])
    block = text[text.index("class LlamaDecoderLayer") : text.index("STAGES")]
    calls = re.findall(r"\b(all_gather|reduce_scatter|replicate|F\.linear|F\.scaled_dot_product_attention)\(", block)
    half = ["replicate", "all_gather"]
    attention = [*half, *["F.linear"] * 3, "F.scaled_dot_product_attention", "F.linear", "reduce_scatter"]
    assert calls == [*attention, *half, *["F.linear"] * 3, "reduce_scatter"]
    assert "q_proj=Weights(weight=new.split(64, 64, tp=0))" in block
    assert "o_proj=Weights(weight=new.split(64, 64, tp=1))" in block
    assert "self.input_layernorm = Weights(weight=new.whole(64))" in block
    assert re.search(r"# tp all-gather, [\d.]+ kB per micro-batch, [\d.]+ us; backward: reduce-scatter", block)


def test_one_kind_under_two_decisions_becomes_two_classes() -> None:
    graph = GRAPHS["llama"]
    base = plan(graph, "tp4")
    split = plan(graph, "tp4 sp")
    first, last = base.candidates["LlamaDecoderLayer"], split.candidates["LlamaDecoderLayer"]
    # Both blocks take and give what the ends expect: only the inside of the second differs.
    inner = dataclasses.replace(first.decision, strategies={**first.decision.strategies})
    changed = dict(inner.strategies)
    target = next(node.name for node in graph.kinds["LlamaDecoderLayer"].graph.of("op") if node.op == "aten.silu")
    assert changed[target] == last.decision.strategies[target]
    candidates = {**base.candidates, "other": dataclasses.replace(first, name="other", recompute="full")}
    runs = tuple(dataclasses.replace(r, candidate="other") if r.start == 2 else r for r in base.stages[0].runs)
    mixed = dataclasses.replace(base, candidates=candidates, stages=(dataclasses.replace(base.stages[0], runs=runs),))
    text = module_source(mixed, graph)
    # Recomputation alone needs no second class, but a choice for each block.
    assert text.count("(nn.Module):") == 2
    assert 'if recompute == "full":' in text
    decision = dataclasses.replace(first.decision, conversions=tuple(reversed(first.decision.conversions)))
    candidates["other"] = dataclasses.replace(candidates["other"], decision=decision)
    two = module_source(dataclasses.replace(mixed, candidates=candidates), graph)
    assert "class LlamaDecoderLayer2(nn.Module):" in two


def test_buffers_are_written_as_their_formula_or_as_literals() -> None:
    graph = GRAPHS["llama"]
    assert "1.0 / 10000.0 ** (torch.arange(0, 8, 2" in module_source(plan(graph, "dp4"), graph)
    other = dataclasses.replace(graph, buffer_values=dict.fromkeys(graph.buffers, (1.0, 0.3, 0.2, 0.1)))
    assert "(1.0, 0.3, 0.2, 0.1)" in module_source(plan(graph, "dp4"), other)
    unknown = dataclasses.replace(graph, buffer_values={})
    with pytest.raises(UnsupportedError, match="inv_freq"):
        module_source(plan(graph, "dp4"), unknown)


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1000000.0, 150000.0])
def test_rotary_frequencies_are_written_as_their_formula(theta: float) -> None:
    values = tuple((1.0 / theta ** (torch.arange(0, 128, 2).float() / 128)).tolist())
    text = str(buffer_expr("inv_freq", TensorMeta((64,), "float32"), values, double=False))
    assert str(theta) in text
    off = (*values[:-2], values[-2] * 1.001, values[-1])
    assert str(theta) not in str(buffer_expr("inv_freq", TensorMeta((64,), "float32"), off, double=False))


def test_a_model_whose_blocks_are_no_chain_is_refused() -> None:
    graph = GRAPHS["llama"]
    block = graph.blocks[2]
    inputs = {**block.inputs, "hidden": dataclasses.replace(block.inputs["hidden"], block=0)}
    blocks = (*graph.blocks[:2], dataclasses.replace(block, inputs=inputs), *graph.blocks[3:])
    with pytest.raises(UnsupportedError, match="each block to the next"):
        module_source(plan(graph, "dp4"), dataclasses.replace(graph, blocks=blocks))


# Both are raised inside torch._dynamo.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    ("model", "name"), [("llama", "tp4 sp"), ("gpt2", "tp4"), ("llama", "dp4"), ("llama", "cp2 tp2 sp")]
)
def test_blocks_compile_without_graph_breaks(model: str, name: str) -> None:
    graph = GRAPHS[model]
    chosen = plan(graph, name)
    with fake_mesh(chosen.mesh.axes() | {"pp": 1}) as mesh:
        module = load_module(module_source(chosen, graph))
        stage = module.build_stage(0, mesh, torch.device("cpu"))
        torch._dynamo.reset()
        for block in stage.blocks()[:1]:
            block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager")
        batch = {key: torch.zeros(2, 16, dtype=torch.int64) for key in graph.batch}
        stage(**batch).backward()
        assert all(weight.grad is not None for weight in stage.blocks()[0].parameters())
        torch._dynamo.reset()


@pytest.mark.parametrize(
    ("model", "name"), [("llama", "tp4 sp"), ("llama", "tp4"), ("gpt2", "tp4 sp"), ("llama", "dp4")]
)
def test_an_emitted_block_saves_for_backward_what_the_search_counts(model: str, name: str) -> None:
    graph = GRAPHS[model]
    chosen = plan(graph, name, dtype="bf16")
    candidate = next(c for c in chosen.candidates.values() if c.decision.kind not in ("Prologue", "Epilogue"))
    kind, decision = graph.kinds[candidate.decision.kind], candidate.decision
    batch, seq = 2, 16

    def local(name: str, meta: TensorMeta) -> torch.Tensor:
        shape = local_shape(meta.at(batch, seq), decision.inputs[name], decision.axes)
        return torch.empty(shape, dtype=torch.bfloat16, device="meta").requires_grad_(meta.requires_grad)

    values = {node.name: local(node.name, node.meta) for node in kind.graph.nodes.values() if node.kind != "op"}
    expected = saved_for_backward(
        lambda tensors: run_local(kind, decision, tensors, batch, seq, torch.bfloat16), (values,)
    )
    with fake_mesh(chosen.mesh.axes() | {"pp": 1}) as mesh:
        module = load_module(module_source(chosen, graph))
        stage = module.build_stage(0, mesh, torch.device("cpu"), torch.bfloat16)
        block = stage.blocks()[0]
        inputs = [values[node.name] for node in kind.graph.of("input")]
        found = saved_for_backward(lambda *tensors: block(*tensors), tuple(inputs))
    # Parameters are handed in to one and held by the other: they exist anyway.
    weights = {place for place, node_name in enumerate(values) if kind.graph.nodes[node_name].kind == "parameter"}
    assert saved_bytes(found) - sum(r.bytes for r in expected if r.argument in weights) == saved_bytes(expected)
