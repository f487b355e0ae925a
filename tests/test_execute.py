"""Whole decisions run on shards: the outputs and every gradient are those of the single device."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from rule_examples import Build, attention_block
from sharded_runs import prove, values_of

from autopar.errors import VerificationError
from autopar.graph.ir import BlockKind, Node, OpGraph
from autopar.sharding.check import refusal
from autopar.sharding.conversions import same
from autopar.sharding.decision import BlockDecision, Conversion
from autopar.sharding.execute import run_sharded
from autopar.sharding.layout import I, Layout, P, R, S, SpmdType
from autopar.sharding.local import produced_layouts, settled, shard
from autopar.sharding.rules import strategies_of

BATCH, SEQ = 4, 8


def fused_block() -> OpGraph:
    """A GPT-2 layer: fused q/k/v projection with bias cut into three, layer norms, GELU, dropout off."""
    g = Build()
    hidden, heads, head = 16, 4, 4
    x = g.leaf("x", f"b s {hidden}")
    w = g.leaf("c_attn", f"{3 * hidden} {hidden}", "parameter")
    b = g.leaf("c_attn_bias", f"{3 * hidden}", "parameter")
    o, ob = g.leaf("c_proj", f"{hidden} {hidden}", "parameter"), g.leaf("c_proj_bias", f"{hidden}", "parameter")
    fc, fcb = g.leaf("c_fc", f"32 {hidden}", "parameter"), g.leaf("c_fc_bias", "32", "parameter")
    out, outb = g.leaf("c_out", f"{hidden} 32", "parameter"), g.leaf("c_out_bias", f"{hidden}", "parameter")
    n1, n1b = (g.leaf(name, f"{hidden}", "parameter") for name in ("ln_1", "ln_1_bias"))
    full = f"b s {hidden}"
    h = g.op("aten.layer_norm", x, (hidden,), n1, n1b, 1e-5, out=full, name="norm1")
    qkv = g.op("aten.linear", h, w, b, out=f"b s {3 * hidden}", name="qkv")
    parts = []
    for index in range(3):
        part = g.op("aten.slice", qkv, 2, index * hidden, (index + 1) * hidden, out=full, name=f"part{index}")
        part = g.op("aten.unflatten", part, 2, (heads, head), out=f"b s {heads} {head}", name=f"heads{index}")
        parts.append(g.op("aten.transpose", part, 1, 2, out=f"b {heads} s {head}", name=f"turned{index}"))
    a = g.op("aten.scaled_dot_product_attention", *parts, None, 0.0, True, out=f"b {heads} s {head}", name="attention")
    a = g.op("aten.transpose", a, 1, 2, out=f"b s {heads} {head}", name="merge_t")
    a = g.op("aten.flatten", a, 2, 3, out=full, name="merge")
    a = g.op("aten.dropout", g.op("aten.linear", a, o, ob, out=full, name="o"), 0.0, True, out=full, name="drop")
    x = g.op("aten.add", x, a, out=full, name="residual")
    h = g.op("aten.gelu", g.op("aten.linear", x, fc, fcb, out="b s 32", name="fc"), "tanh", out="b s 32", name="gelu")
    return g.graph(g.op("aten.linear", h, out, outb, out=full, name="out"))


def ends() -> OpGraph:
    """Embedding, a flattened linear head, and the loss: split vocabularies, (b s) compound dims."""
    g = Build()
    ids = g.leaf("ids", "b s", dtype="int64")
    labels = g.leaf("labels", "b s", dtype="int64")
    table, head = g.leaf("embed", "32 16", "parameter"), g.leaf("head", "32 16", "parameter")
    x = g.op("aten.embedding", table, ids, out="b s 16", name="look_up")
    x = g.op("aten.flatten", x, 0, 1, out="b*s 16", name="tokens")
    x = g.op("aten.silu", x, out="b*s 16", name="act")
    x = g.op("aten.linear", x, head, out="b*s 32", name="logits")
    x = g.op("aten.unflatten", x, 0, (-1, 8), out="b s 32", name="back")
    return g.graph(g.op("autopar.cross_entropy", x, labels, -100, out="", name="loss"))


GRAPHS = {"llama": attention_block, "gpt2": fused_block, "ends": ends}


def draw_type(node: Node, axis: str, rng: random.Random) -> SpmdType:
    """A type in which an input may arrive, or a parameter be stored."""
    splits = [S(d) for d, size in enumerate(node.meta.at(BATCH, SEQ)) if size % 8 == 0]
    if node.kind == "parameter":
        return R if axis == "cp" else rng.choice([I, *splits])
    return rng.choice([R, I, *splits, *([P] if node.meta.requires_grad else [])])


def draw_decision(graph: OpGraph, axes: dict[str, int], rng: random.Random) -> BlockDecision:
    """Random strategies everywhere, and the conversions they need."""
    produced = {
        node.name: Layout(tuple((axis, draw_type(node, axis, rng)) for axis in axes))
        for node in graph.nodes.values()
        if node.kind != "op"
    }
    inputs, strategies, conversions = dict(produced), {}, []
    for node in graph.of("op"):
        options = strategies_of(node, graph)
        choice = {axis: rng.choice(options) for axis in axes}
        while refusal(node, graph, choice, axes, BATCH, SEQ):
            choice = {axis: rng.choice(options) for axis in axes}
        strategies[node.name] = {axis: strategy.name for axis, strategy in choice.items()}
        needs, produced[node.name] = produced_layouts(node, settled(choice, axes))
        for operand, need in zip(node.operands(), needs, strict=True):
            wanted = Conversion(operand, produced[operand], need)
            if not same(produced[operand], need, graph.nodes[operand].meta.requires_grad) and wanted not in conversions:
                conversions.append(wanted)
    outputs = {name: produced[name] for name in graph.outputs}
    return BlockDecision("Drawn", axes, inputs, strategies, tuple(conversions), outputs)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("axes", [{"tp": 2}, {"tp": 4}, {"cp": 2, "tp": 2}, {"ep": 2, "cp": 2, "tp": 2}], ids=str)
def test_random_decisions_compute_what_one_device_computes(name: str, axes: dict[str, int]) -> None:
    graph = GRAPHS[name]()
    for seed in range(16 if len(axes) < 3 else 4):
        decision = draw_decision(graph, axes, random.Random(seed))
        try:
            prove(graph, decision)
        except Exception as problem:
            raise AssertionError(f"{name} on {axes}, seed {seed}: {problem}") from problem


def test_running_names_what_was_not_made_available() -> None:
    graph = ends()
    decision = draw_decision(graph, {"tp": 2}, random.Random(3))
    short = replace(decision, conversions=())
    values = {n: shard(x, short.inputs[n], short.axes, BATCH, SEQ) for n, x in values_of(graph, BATCH, SEQ).items()}
    with pytest.raises(VerificationError, match=r"needs \w+ as tp:.*, which is held as tp:.* only"):
        run_sharded(BlockKind("Drawn", graph), short, values, BATCH, SEQ)
