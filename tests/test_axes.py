"""Several model axes in one problem: choices are whole, compute what one device computes, and cost what they say."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from functools import cache
from itertools import product
from math import prod
from types import SimpleNamespace

import pytest
from dense_decoder import decoder
from plain_plans import small_gpt2, small_llama
from rule_examples import Build
from sharded_runs import prove
from test_execute import GRAPHS, draw_decision

from autopar.cluster import Cluster
from autopar.errors import UnsupportedError, VerificationError
from autopar.graph.ir import Block, BlockKind, ModelGraph, Source
from autopar.job import Job
from autopar.mesh import Mesh, strides
from autopar.models import model_graph
from autopar.sharding.check import check_decision, fits
from autopar.sharding.conversions import convertible, direct, types_of
from autopar.sharding.decision import BlockDecision, Conversion
from autopar.sharding.layout import I, Layout, P, R, S
from autopar.sharding.local import produced_layouts
from autopar.solver.axis_choices import boundary_layouts, choices_of, stored_layouts
from autopar.solver.block_problem import model_problem, ties_of
from autopar.solver.collective_costs import CollectiveCosts
from autopar.solver.context import Context
from autopar.solver.decision_costs import boundary_bytes, decision_price
from autopar.solver.decisions import decisions_of
from autopar.solver.fix import parse_fix
from autopar.solver.intra_block import solve
from autopar.solver.op_costs import OpCosts
from autopar.solver.prices import AxisPrices
from autopar.solver.problem import price
from autopar.solver.reprice import _block_seconds
from autopar.solver.shardings import Shardings

CLUSTER = Cluster.parse("2x8:h100")


@cache
def traced(name: str) -> ModelGraph:
    return model_graph({"llama": small_llama, "gpt2": small_gpt2}[name]())


def shardings(model: ModelGraph, axes: dict[str, int], fix: dict, batch: int = 2, seq: int = 16) -> Shardings:
    job = Job(global_batch=16, seq_len=seq)
    return Shardings(Context.of(model, job, CLUSTER, parse_fix(fix)), axes.items(), batch)


def decided(*args, **kwargs) -> dict[str, BlockDecision]:  # type: ignore[no-untyped-def]
    costs = shardings(*args, **kwargs).fastest().costs
    return {kind: choices["none"].decision for kind, choices in costs.items()}


def prove_all(model: ModelGraph, decisions: dict[str, BlockDecision], batch: int = 2, seq: int = 16) -> None:
    for name, decision in decisions.items():
        prove(model.kinds[name].graph, decision, batch, seq)


@pytest.mark.parametrize("sp", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_context_and_tensor_parallel_together(name: str, sp: bool) -> None:
    model, axes = traced(name), {"cp": 2, "tp": 2}
    decisions = decided(model, axes, {"cp": 2, "tp": 2, "sp": sp})
    for kind, decision in decisions.items():
        graph = model.kinds[kind].graph
        between = S(1) if sp else I
        for node in graph.nodes.values():
            layout = decision.inputs.get(node.name)
            if node.kind == "parameter":
                assert layout["cp"] == R
            elif node.kind == "input" and node.meta.requires_grad:
                assert layout == Layout.of(cp=S(1), tp=between)
        split = [names["tp"] for n, names in decision.strategies.items() if graph.nodes[n].op == "aten.linear"]
        assert all(choice[0] in "nk" for choice in split), "tp=2 splits a feature of every matmul"
    assert decisions["Epilogue"].outputs["loss"]["cp"] == P
    prove_all(model, decisions)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_context_parallel_alone(name: str) -> None:
    model = traced(name)
    prove_all(model, decided(model, {"cp": 4}, {"cp": 4}))


def test_eight_ways_of_two_heads_split_heads_and_the_queries_in_each() -> None:
    model = decoder(heads=8, kv_heads=2, head=8, hidden=64, ffn=128, vocab=8192, layers=2)
    axes = {"tp0": 2, "tp1": 4}
    decisions = decided(model, axes, {"tp": "2x4"}, seq=4096)
    layer = decisions["Layer"]
    assert layer.strategies["attention"] == {"tp0": "h", "tp1": "g"}
    assert layer.inputs["q_proj"] == layer.inputs["k_proj"] == Layout.of(tp0=S(0), tp1=S(0))
    assert [str(c.target) for c in layer.conversions if c.tensor in ("k", "v")] == ["tp0:S(2) tp1:R"] * 2
    assert decisions["Epilogue"].strategies["loss"] == {"tp0": "v", "tp1": "v"}
    for name, decision in decisions.items():
        prove(model.kinds[name].graph, decision, 2, 16, high=8192)


@pytest.mark.parametrize("sp", [True, False])
def test_three_axes(sp: bool) -> None:
    model = decoder(heads=8, kv_heads=2, head=8, hidden=64, ffn=128, vocab=64, layers=2)
    axes = {"cp": 2, "tp0": 2, "tp1": 2}
    prove_all(model, decided(model, axes, {"cp": 2, "tp": "2x2", "sp": sp}))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("axes", [{"tp": 2}, {"cp": 2, "tp": 4}, {"tp0": 2, "tp1": 2}], ids=str)
def test_a_vocabulary_that_does_not_divide_is_split_all_the_same(axes: dict[str, int], tied: bool) -> None:
    model = decoder(heads=8, kv_heads=4, head=8, hidden=64, ffn=128, vocab=8191, layers=2, tied=tied)
    tensor = [axis for axis in axes if axis != "cp"]
    fix = {"cp": axes.get("cp", 1), "tp": "2x2" if "tp0" in axes else axes["tp"]}
    decisions = decided(model, axes, fix, seq=4096)
    table, head = decisions["Prologue"].inputs["table"], decisions["Epilogue"].inputs["head"]
    assert all(head[axis] == S(0) for axis in tensor), "the loss over parts of the classes is cheapest"
    assert decisions["Epilogue"].strategies["loss"] == {axis: "s" if axis == "cp" else "v" for axis in axes}
    assert table == head or not tied
    for name, decision in decisions.items():
        prove(model.kinds[name].graph, decision, 2, 16, high=8191)


def test_parts_of_a_vocabulary_are_not_converted_and_none_is_empty() -> None:
    model = decoder(vocab=63, layers=2)
    kind = model.kinds["Epilogue"]
    good = decided(model, {"tp": 2}, {"tp": 2, "sp": False})["Epilogue"]
    good = replace(good, inputs={**good.inputs, "head": Layout.of(tp=S(0))})
    held = [Layout.of(tp=S(0)), Layout.of(tp=R)]
    with pytest.raises(VerificationError, match=r"head \[63, 64\] cannot be held as tp:S\(0\)"):
        check_decision(kind, replace(good, conversions=(*good.conversions, Conversion("head", *held))), 2, 16)
    few = decoder(vocab=9, layers=2)
    for decision in decided(few, {"tp": 8}, {"tp": 8}).values():
        assert all(layout["tp"] != S(0) or name not in ("table", "head") for name, layout in decision.inputs.items())


def test_parameters_are_whole_on_the_context_axis() -> None:
    model = traced("llama")
    kind = model.kinds["Epilogue"]
    good = decided(model, {"cp": 2}, {"cp": 2})["Epilogue"]
    assert check_decision(kind, good, 2, 16)
    for wrong in (I, S(0), P):
        inputs = {**good.inputs, "lm_head_weight": Layout.of(cp=wrong)}
        message = f"lm_head.weight is stored as {re.escape(str(wrong))} on cp; context-parallel ranks hold it whole"
        with pytest.raises(VerificationError, match=message):
            check_decision(kind, replace(good, inputs=inputs), 2, 16)


def test_sequences_that_cannot_be_split_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="cp=3 splits sequences, but seq_len 16 does not divide"):
        decided(traced("llama"), {"cp": 3}, {"cp": 3})
    with pytest.raises(UnsupportedError, match=r"sp=true .* seq_len 18 does not divide by 4"):
        decided(traced("llama"), {"cp": 2, "tp": 2}, {"cp": 2, "tp": 2, "sp": True}, seq=18)


def attention_on_context(kv_heads: int, cluster: Cluster, cp: int = 4) -> str:
    model = decoder(heads=32, kv_heads=kv_heads, head=128, hidden=4096, ffn=4096, vocab=1024, layers=2)
    job = Job(global_batch=16, seq_len=8192)
    found = Shardings(Context.of(model, job, cluster, parse_fix({"cp": cp})), {"cp": cp}.items(), 1)
    return found.fastest().costs["Layer"]["none"].decision.strategies["attention"]["cp"]


def test_how_attention_is_split_follows_the_costs() -> None:
    """Gathered keys and values of a few heads are little; those of all heads are more than what changes places."""
    assert attention_on_context(4, Cluster.parse("1x8:h100")) == "q"
    assert attention_on_context(32, Cluster.parse("8x1:h100")) == "h"
    link = CLUSTER.intra_node
    slow = Cluster.parse("1x8:h100").with_links(intra_node=replace(link, bandwidth=link.bandwidth / 50))
    assert attention_on_context(32, slow) == "h", "slow links favour what moves less"


def test_strides_count_the_ranks_inside() -> None:
    assert strides({"cp": 2, "tp0": 2, "tp1": 4}) == {"cp": 8, "tp0": 4, "tp1": 1}


@pytest.mark.parametrize("axes", [{"tp": 2}, {"cp": 2, "tp": 2}, {"tp0": 2, "tp1": 2}], ids=str)
@pytest.mark.parametrize("name", GRAPHS)
def test_both_ways_of_pricing_agree(name: str, axes: dict[str, int]) -> None:
    """The search's tables and the repricing of finished plans, on decisions drawn at random."""
    graph, job = GRAPHS[name](), Job(global_batch=8, seq_len=8)
    ops, collectives = OpCosts(CLUSTER.device, job), CollectiveCosts(CLUSTER)
    kind = BlockKind("Drawn", graph)
    model = SimpleNamespace(kinds={"Drawn": kind})
    parts = tuple(axes[axis] for axis in ("tp0", "tp1") if axis in axes)
    mesh = Mesh(1, 1, axes.get("cp", 1), axes.get("tp", prod(parts)), parts)
    plan = SimpleNamespace(job=job, micro_batch=4, mesh=mesh)
    for seed in range(8):
        decision = draw_decision(graph, axes, random.Random(seed))
        found, _ = decision_price(kind, decision, AxisPrices(ops, collectives, axes, 4))
        candidate = SimpleNamespace(decision=decision, recompute="none", saved=(), offload=False)
        again = _block_seconds(plan, model, candidate, ops, collectives)  # type: ignore[arg-type]
        assert again == pytest.approx((found.forward_s, found.backward_s, found.computing_s), rel=1e-9)


@pytest.mark.parametrize("axes", [{"cp": 2, "tp": 2}, {"cp": 4}, {"tp0": 2, "tp1": 2}], ids=str)
def test_bounds_hold(axes: dict[str, int]) -> None:
    found = shardings(traced("llama"), axes, {})
    fastest, bound = found.fastest(), found.bound()
    counts, job = found.context.counts, found.context.job
    handed = found.context.gradient_price()
    costs = {name: choices["none"] for name, choices in fastest.costs.items()}
    seconds = {name: c.forward_s + c.backward_s + handed * c.elements for name, c in costs.items()}
    total = sum(n * seconds[name] for name, n in counts.items())
    assert found.least_work() <= bound * (1 + 1e-6)  # both are bounds, rounded down each in its way
    assert bound <= total * (1 + 1e-9)
    assert bound == pytest.approx(total, rel=1e-6), "nothing is tied: the ILP's optimum is what the decision costs"
    for name, cost in costs.items():
        kind = found.context.model.kinds[name]
        assert found.kind_bounds()[name].none_s <= seconds[name] * (1 + 1e-9)
        assert found.kind_bytes()[name].saved <= cost.inflight
        assert found.kind_bytes()[name].peak <= cost.inflight + cost.transient
        assert found.kind_bytes()[name].inputs <= boundary_bytes(kind, cost.decision, 2, job)


def mlp() -> ModelGraph:
    """Two blocks in a chain: norm, two products, residual."""
    g = Build()
    x, norm = g.leaf("x", "b s 8"), g.leaf("norm", "8", "parameter")
    up, down = g.leaf("up_weight", "16 8", "parameter"), g.leaf("down_weight", "8 16", "parameter")
    y = g.op("aten.rms_norm", x, (8,), norm, 1e-5, out="b s 8", name="normed")
    y = g.op("aten.silu", g.op("aten.linear", y, up, out="b s 16", name="up"), out="b s 16", name="silu")
    y = g.op("aten.linear", y, down, out="b s 8", name="down")
    graph = g.graph(g.op("aten.add", x, y, out="b s 8", name="sum"))
    whole = decoder(layers=2)
    names = {node.target: node.target for node in graph.of("parameter")}
    inputs = ({"x": Source("batch", key="x")}, {"x": Source("block", 0)})
    blocks = tuple(Block("Mlp", f"{index}", each, names) for index, each in enumerate(inputs))
    return replace(whole, kinds={"Mlp": BlockKind("Mlp", graph)}, blocks=blocks, tied=())


def held_as(layout: Layout) -> object:
    """Equal for layouts that hold a tensor alike."""
    types = dict(layout.types)
    dims = {kind.dim for kind in types.values() if kind.kind == "S"}
    return tuple(sorted((axis, str(kind)) for axis, kind in types.items())), tuple(map(layout.splits, sorted(dims)))


class Enumeration:
    """The cheapest decision by trying everything: all strategies, and conversions through every type on every axis."""

    def __init__(self, kind: BlockKind, prices: AxisPrices) -> None:
        self.graph, self.prices, self.axes = kind.graph, prices, prices.axes
        self.away: dict[object, dict[object, float]] = {}
        self.trees: dict[object, float] = {}
        self.known: dict[object, Layout] = {}

    def distances(self, name: str, start: Layout) -> dict[object, float]:
        key = (name, held_as(start))
        if key not in self.away:
            meta = self.graph.nodes[name].meta
            best, layouts = {held_as(start): 0.0}, {held_as(start): start}
            todo = [held_as(start)]
            while todo:
                here = min(todo, key=best.__getitem__)
                todo.remove(here)
                layout = layouts[here]
                for axis, kind in product(self.axes, types_of(len(meta.shape))):
                    step = direct(layout[axis], kind, meta.requires_grad) if convertible(layout, axis) else None
                    after = layout.with_type(axis, kind)
                    if step is None or not fits(
                        meta.shape, after, self.axes, self.prices.batch, self.prices.job.seq_len
                    ):
                        continue
                    there = held_as(after)
                    seconds = best[here] + self.prices.conversion(meta, layout, axis, step).seconds
                    if seconds < best.get(there, float("inf")):
                        best[there], layouts[there] = seconds, after
                        todo += [there] if there not in todo else []
            self.away[key] = best
            self.known |= {(name, other): found for other, found in layouts.items()}
        return self.away[key]

    def tree(self, name: str, start: Layout, wanted: set[Layout]) -> float:
        """The cheapest conversions to at most two layouts: they part somewhere."""
        ends = sorted({held_as(layout) for layout in wanted}, key=str)
        key = (name, held_as(start), tuple(ends))
        if key not in self.trees:
            first = self.distances(name, start)
            self.trees[key] = min(
                seconds + sum(self.distances(name, self.known[name, via]).get(end, float("inf")) for end in ends)
                for via, seconds in first.items()
            )
        return self.trees[key]

    def best(self, stored: dict[str, tuple[Layout, ...]], boundary: tuple[Layout, ...]) -> float:
        nodes = list(self.graph.of("op"))
        options = []
        for node in nodes:
            found = choices_of(node, self.graph, self.axes, self.prices.batch, self.prices.job.seq_len)
            options.append(
                [(*produced_layouts(node, c), self.prices.operator(node, self.graph, c)[0].seconds) for c in found]
            )
        least = float("inf")
        for around, *combination in product(boundary, *options):
            total = sum(seconds for _, _, seconds in combination)
            made = {"x": around} | {node.name: output for node, (_, output, _) in zip(nodes, combination, strict=True)}
            wanted: dict[str, set[Layout]] = {"sum": {around}}
            for node, (inputs, _, _) in zip(nodes, combination, strict=True):
                for operand, layout in zip(node.operands(), inputs, strict=True):
                    wanted.setdefault(operand, set()).add(layout)
            for name, layouts in wanted.items():
                if total < least:
                    starts = stored[name] if name in stored else (made[name],)
                    total += min(self.tree(name, start, layouts) for start in starts)
            least = min(least, total)
        return least


@pytest.mark.parametrize("seq", [64, 4096])
@pytest.mark.parametrize("axes", [{"cp": 2, "tp": 2}, {"tp0": 2, "tp1": 2}], ids=str)
def test_the_ilp_on_two_axes_agrees_with_enumeration(axes: dict[str, int], seq: int) -> None:
    model, job = mlp(), Job(global_batch=8, seq_len=seq)
    prices = AxisPrices(OpCosts(CLUSTER.device, job), CollectiveCosts(CLUSTER), axes, 2)
    built = model_problem(model, prices, ties_of(model))
    answer = solve(built.problem)
    assert answer.status == "optimal"
    assert price(built.problem, answer)[0] == answer.seconds
    graph = model.kinds["Mlp"].graph
    stored = {node.name: stored_layouts(node.meta, axes, ()) for node in graph.of("parameter")}
    boundary = boundary_layouts(graph.nodes["x"].meta, axes, 2, seq)
    best = Enumeration(model.kinds["Mlp"], prices).best(stored, boundary)
    assert answer.seconds == pytest.approx(2 * best, rel=1e-9)
    assert answer.bound <= answer.seconds
    (decision,) = decisions_of(model, built, answer).values()
    prove(graph, decision, 2, 8)
