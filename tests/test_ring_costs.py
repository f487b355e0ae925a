"""What attention in a ring costs: its turns, what of the sending they hide, and where the search takes it."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import autopar
from autopar.catalog.devices_file import load_group
from autopar.graph.ir import ModelGraph, Node, Ref, TensorMeta
from autopar.job import Job
from autopar.models import model_graph
from autopar.report.words import describe
from autopar.sharding.factors import RING
from autopar.solver.collective_costs import CollectiveCosts
from autopar.solver.op_costs import LocalTensor, OpCosts
from autopar.solver.ring_work import RANKS, ring_time
from autopar.solver.search import search
from autopar.solver.work import ATTENTION, work
from autopar.solver.work_parts import Attention

NODE = Node("y", "op", TensorMeta(()), op=ATTENTION, args=(*map(Ref, "qkv"), None, 0.0, True))


def held(rows: int, keys: int, heads: int = 32, kv_heads: int = 8) -> list[LocalTensor]:
    """Queries, keys and values."""
    return [LocalTensor(shape, 2) for shape in ((1, heads, rows, 128), *[(1, kv_heads, keys, 128)] * 2)]


def taking(forward: float, backward: float) -> Any:
    """Operator costs of a ring whose turns take so long together."""
    time = SimpleNamespace(forward=forward, backward=backward, source="", host_forward=0.0, host_backward=0.0)
    return SimpleNamespace(seconds=lambda *_: time)


def test_no_more_is_hidden_than_is_computed_meanwhile() -> None:
    draw, grads = random.Random(0), [True] * 3
    hides = 0
    for _ in range(2000):
        ranks, sent = draw.randint(2, 16), draw.lognormvariate(0, 1)
        compute, back = (ranks * draw.lognormvariate(0, 1) for _ in range(2))
        time = ring_time(taking(compute, back), NODE, held(8, 8), held(8, 8)[0], grads, ranks, sent)
        hidden = (ranks - 1) * sent - time.waits_forward
        hidden_back = (2 * ranks - 1) * sent - time.waits_backward
        for most, found in ((compute * (ranks - 1) / ranks, hidden), (back, hidden_back)):
            assert -1e-9 <= found <= most * (1 + 1e-9)
        assert time.waits_backward >= sent  # the way home hides behind nothing
        hides += hidden > 0
    assert hides > 1000
    fast = ring_time(taking(4.0, 8.0), NODE, held(8, 8), held(8, 8)[0], grads, 4, 0.5)
    assert (fast.waits_forward, fast.waits_backward) == (0.0, 0.5)
    slow = ring_time(taking(4.0, 8.0), NODE, held(8, 8), held(8, 8)[0], grads, 4, 3.0)
    assert (slow.waits_forward, slow.waits_backward) == (3 * 2.0, 2 * 1.0 + 2 * 4.0 + 3.0)


def test_all_turns_do_the_arithmetic_of_gathered_keys() -> None:
    rows, ranks = 4096, 8
    query, key, value = held(rows, rows * ranks)
    gathered = work(NODE, (query, key, value), query, [True] * 3)
    ring = Node("y", "op", TensorMeta(()), op=ATTENTION, args=NODE.args, kwargs={RANKS: ranks})
    turns = work(ring, (query, key, value), query, [True] * 3)
    for one, other in zip(gathered, turns, strict=True):
        assert isinstance(one.attention, Attention)
        assert other.attention is not None
        assert one.attention.flops == other.attention.flops
        assert other.nbytes > 2 * query.nbytes  # results are added up
        assert other.kernels > one.kernels + ranks
    # An odd number of queries is in sequence order: all wait for the last rank.
    odd = work(ring, held(4095, 4095 * ranks), held(4095, 1)[0], [True] * 3)[0].attention
    assert odd is not None
    assert odd.share == pytest.approx(1 - 1 / ranks / 2)


def test_short_turns_fill_the_kernel_less() -> None:
    costs = OpCosts(load_group("h100", 1, 8).device, Job(8, 65536))
    each = [costs.attention_seconds(Attention(32, 8192, 65536, 128, True, 2, True, n), 2) for n in (1, 8, 64)]
    assert each == sorted(each)
    assert each[1] < 1.1 * each[0] < each[2]


def test_a_ring_sends_to_the_next_rank_in_every_turn_but_the_last() -> None:
    for text, size, stride in (("1x8:h100", 8, 1), ("2x8:h100", 16, 1), ("4x8:h100", 4, 8)):
        costs = CollectiveCosts(autopar.Cluster.parse(text))
        once = costs.seconds("send_recv", 1e8 / size, size, stride)
        assert costs.seconds(RING, 1e8, size, stride) == (size - 1) * once


def graph_of(heads: int, kv_heads: int, **config: int) -> ModelGraph:
    with torch.device("meta"):
        sizes = {"intermediate_size": 11008, "num_hidden_layers": 4, "vocab_size": 32000, **config}
        config = {**sizes, "hidden_size": heads * 128, "max_position_embeddings": 2**20}
        return model_graph(
            LlamaForCausalLM(LlamaConfig(**config, num_attention_heads=heads, num_key_value_heads=kv_heads))
        )


def chosen(graph: ModelGraph, cluster: str, seq_len: int, **fix: Any) -> tuple[autopar.Plan, str]:
    """The plan on eight context ranks, and what attention does there."""
    fixed = {"cp": 8, "tp": 1, "pp": 1, "dp": 1, "micro_batch": 1, **fix}
    plan = search(graph, Job(4, seq_len), autopar.Cluster.parse(cluster), fixed)
    [name] = {
        candidate.decision.strategies[node.name]["cp"]
        for candidate in plan.candidates.values()
        for node in graph.kinds[candidate.decision.kind].graph.of("op")
        if node.op == ATTENTION
    }
    return plan, name


def test_slow_links_and_long_sequences_want_a_ring() -> None:
    """28 heads are no multiple of 8, so heads cannot be exchanged. Where gathering takes longer than adding up does."""
    graph = graph_of(28, 28)
    plan, name = chosen(graph, "1x8:l40s", 65536)
    assert name == "ring"
    gathered, other = chosen(graph, "1x8:l40s", 65536, context="gathered")
    assert other == "q"
    assert plan.predicted.step_time < gathered.predicted.step_time
    decisions = {name: candidate.decision for name, candidate in plan.candidates.items()}
    told = describe(graph, decisions)
    assert told["cp"] == ("context (ring) parallel",)
    [lines] = {told[name] for name, decision in decisions.items() if decision.kind == "LlamaDecoderLayer"}
    assert lines == (
        "attention  ring  cp S(2) -> S(2)",
        "collectives forward: 1 cp ring",
        "collectives backward: 1 cp ring",
    )


def test_fast_links_and_few_key_heads_want_gathered_keys() -> None:
    graph = graph_of(28, 4)
    plan, name = chosen(graph, "1x8:h100", 32768)
    assert name == "q"
    ring, other = chosen(graph, "1x8:h100", 32768, context="ring")
    assert other == "ring"
    assert plan.predicted.step_time < ring.predicted.step_time


def test_a_ring_keeps_its_own_keys_alone() -> None:
    """What is gathered is kept for backward, here 8 times as much; so are the results of the two runs of queries."""
    graph = graph_of(28, 28)
    kept = {}
    for context in ("gathered", "ring"):
        plan, _ = chosen(graph, "1x8:h100", 16384, context=context, recompute="none", offload="none")
        kept[context] = plan.stages[0].memory["activations"]
    keys = 2 * 4 * 16384 * 28 * 128 * 2  # of four layers, whole
    results = 4 * 16384 // 8 * 28 * 128 * 2
    assert kept["gathered"] - kept["ring"] == pytest.approx(keys * 7 / 8 + results, rel=1e-3)


def test_the_search_takes_the_fastest_of_the_three_ways() -> None:
    """Free, it is no slower than with any of them fixed, and its bound is below them all."""
    graph = graph_of(8, 4)
    for cluster in ("1x4:l40s", "1x4:h100"):
        ways = {
            context: chosen(graph, cluster, 8192, cp=4, context=context)[0].predicted.step_time
            for context in ("gathered", "all-to-all", "ring")
        }
        plan, _ = chosen(graph, cluster, 8192, cp=4)
        assert plan.bound is not None
        assert plan.bound <= min(ways.values()) * (1 + 1e-9)
        assert plan.predicted.step_time <= min(ways.values()) * 1.01  # the gap asked for
        assert len({round(seconds, 9) for seconds in ways.values()}) == 3
