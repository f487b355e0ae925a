"""Ring attention as it is emitted: each rank's rows of the whole attention, in turns that are the same work for all."""

from __future__ import annotations

from collections.abc import Callable
from queue import Queue
from threading import Thread
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hand_plans import graph_of, llama, on_axes, plan_of

from autopar.codegen.emit_module import module_source
from autopar.codegen.load import load_module
from autopar.codegen.ranks import fake_mesh, local_ranks, on_rank, per_rank
from autopar.codegen.runtime import ring
from autopar.codegen.runtime.recompute import selective
from autopar.codegen.runtime.ring import ring_attention
from autopar.plan import Mesh
from autopar.sharding.check import refusal
from autopar.sharding.rules import strategy_of

SEQ, SCALE = 24, 0.4


class Exchanging(ring._Turns):
    """Turns of a rank that is a thread: what is sent goes into the next one's queue."""

    def __init__(self, queues: list[Queue[torch.Tensor]], rank: int, balanced: bool, causal: bool) -> None:
        super().__init__(balanced, causal, SCALE, len(queues), rank, "")
        self.queues = queues

    def send(self, x: torch.Tensor) -> torch.Tensor:
        self.queues[(self.rank + 1) % self.ranks].put(x.clone())
        return x[:]

    def wait(self, x: torch.Tensor) -> torch.Tensor:
        return self.queues[self.rank].get(timeout=20)


def on_every_rank(ranks: int, run: Callable[[int], Any]) -> list[Any]:
    """What ``run(rank)`` returns on each of these ranks, which run at once."""
    found: list[Any] = [None] * ranks

    def one(rank: int) -> None:
        found[rank] = run(rank)

    threads = [Thread(target=one, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert all(result is not None for result in found)
    return found


def positions(rank: int, ranks: int, balanced: bool) -> list[int]:
    """Those that a rank holds, written as the definition says."""
    size = SEQ // (2 * ranks)
    chunks = (rank, 2 * ranks - 1 - rank) if balanced else (2 * rank, 2 * rank + 1)
    return [chunk * size + place for chunk in chunks for place in range(size)]


def tensors(kv_heads: int) -> tuple[torch.Tensor, ...]:
    """Queries, keys, values and the result's gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, SEQ, 8), (2, kv_heads, SEQ, 8), (2, kv_heads, SEQ, 8), (2, 4, SEQ, 8)]
    return tuple(torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)


def expected(kv_heads: int, causal: bool) -> tuple[torch.Tensor, ...]:
    """The result, and the gradients of queries, keys and values, on one device."""
    *inputs, gradient = tensors(kv_heads)
    query, key, value = (x.requires_grad_() for x in inputs)
    whole = F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=SCALE, enable_gqa=True)
    return whole.detach(), *torch.autograd.grad(whole, (query, key, value), gradient)


FORMS = [(True, True), (True, False), (False, False)]
"""Causal or not, and in balanced order or not."""


@pytest.mark.parametrize("kernels", ["fused", "plain"])
@pytest.mark.parametrize(("causal", "balanced"), FORMS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_ranks_together_compute_the_whole(
    ranks: int, kv_heads: int, causal: bool, balanced: bool, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels == "plain":
        monkeypatch.setattr(ring._Turns, "kernels", lambda *_: (ring._plain_forward, ring._plain_backward))
        monkeypatch.setattr(ring, "ROWS", 5)
    *inputs, gradient = tensors(kv_heads)
    queues: list[Queue[torch.Tensor]] = [Queue() for _ in range(ranks)]

    def run(rank: int) -> tuple[torch.Tensor, ...]:
        turns = Exchanging(queues, rank, balanced, causal)
        own = positions(rank, ranks, balanced)
        query, key, value, given = (x[:, :, own] for x in (*inputs, gradient))
        output, sums = ring._attend(turns, query, key, value)
        return output, *ring._attend_back(turns, given, query, key, value, output, sums)

    wanted = expected(kv_heads, causal)
    for rank, found in enumerate(on_every_rank(ranks, run)):
        for one, whole in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, whole[:, :, positions(rank, ranks, balanced)], rtol=1e-12, atol=1e-12)
    assert all(queue.empty() for queue in queues)


@pytest.mark.parametrize(("causal", "balanced"), FORMS)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("ranks", [2, 3])
def test_simulated_ranks_compute_the_whole(ranks: int, kv_heads: int, causal: bool, balanced: bool) -> None:
    *inputs, gradient = tensors(kv_heads)

    def parts(x: torch.Tensor) -> torch.Tensor:
        return per_rank([x[:, :, positions(rank, ranks, balanced)] for rank in range(ranks)])

    wanted = expected(kv_heads, causal)
    with local_ranks({"cp": ranks}) as mesh:
        own = [parts(x).requires_grad_() for x in inputs]
        output = ring_attention(*own, mesh["cp"], balanced=balanced, is_causal=causal, scale=SCALE)
        found = (output, *torch.autograd.grad(output, own, parts(gradient)))
        for rank in range(ranks):
            for one, whole in zip(found, wanted, strict=True):
                rows = whole[:, :, positions(rank, ranks, balanced)]
                torch.testing.assert_close(on_rank(one, rank), rows, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_balanced_turns_are_the_same_work_for_every_rank(ranks: int) -> None:
    def pairs(rank: int, turn: int, balanced: bool) -> int:
        piece = ring._Turns(balanced, True, 1.0, ranks, rank, "").piece(turn, 8, 8)
        if piece is None:
            return 0
        rows, keys = piece.rows[1], piece.keys[1]
        return rows * (rows + 1) // 2 if piece.causal else rows * keys

    balanced = {tuple(pairs(rank, turn, True) for turn in range(ranks)) for rank in range(ranks)}
    assert balanced == {(36, *([32] * (ranks - 1)))}
    least, *_, most = (sum(pairs(rank, turn, False) for turn in range(ranks)) for rank in range(ranks))
    assert (least, most) == (36, 36 + 64 * (ranks - 1))


def test_queries_may_be_any_of_the_sequence_where_nothing_masks_them() -> None:
    """A tensor axis may split them again."""
    *inputs, gradient = tensors(2)
    queues: list[Queue[torch.Tensor]] = [Queue() for _ in range(2)]
    wanted = expected(2, False)

    def run(rank: int) -> tuple[torch.Tensor, ...]:
        own = positions(rank, 2, False)
        query, key, value, given = (
            inputs[0][:, :, own[:4]],
            *(x[:, :, own] for x in inputs[1:]),
            gradient[:, :, own[:4]],
        )
        turns = Exchanging(queues, rank, False, False)
        output, sums = ring._attend(turns, query, key, value)
        return output, *ring._attend_back(turns, given, query, key, value, output, sums)

    for rank, (output, of_query, of_key, _) in enumerate(on_every_rank(2, run)):
        own = positions(rank, 2, False)
        torch.testing.assert_close(output, wanted[0][:, :, own[:4]], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(of_query, wanted[1][:, :, own[:4]], rtol=1e-12, atol=1e-12)
        assert of_key.shape == (2, 2, len(own), 8)


def test_results_lie_so_that_heads_merge_without_a_copy() -> None:
    with fake_mesh({"cp": 2}) as mesh:
        for device in ("cpu", "meta"):
            query = torch.empty(2, 4, 8, 16, device=device)
            output = ring_attention(query, query[:, :2], query[:, :2], mesh["cp"], is_causal=True)
            assert output.transpose(1, 2).is_contiguous()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch._dynamo itself
def test_it_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    with fake_mesh({"cp": 2}) as mesh:

        def model(x: torch.Tensor) -> torch.Tensor:
            return ring_attention(x, x * 2, x * 3, mesh["cp"], balanced=True, is_causal=True) * 2

        x = torch.ones(2, 4, 8, 8, requires_grad=True)
        torch.compile(model, fullgraph=True, backend="aot_eager")(x).sum().backward()
        assert x.grad is not None


@pytest.mark.parametrize(("keep", "runs"), [(("attention",), 1), (("matmul",), 2)])
def test_selective_recomputation_keeps_the_result_of_all_turns(
    keep: tuple[str, ...], runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    attend = ring._attend
    monkeypatch.setattr(ring, "_attend", lambda *x: seen.append(1) or attend(*x))  # type: ignore[func-returns-value]
    with fake_mesh({"cp": 1}) as mesh:
        query, key, value, gradient = tensors(4)
        weight = torch.eye(8, dtype=torch.float64, requires_grad=True)

        def block(x: torch.Tensor) -> torch.Tensor:
            return ring_attention(x @ weight, key, value, mesh["cp"], is_causal=True, scale=SCALE) @ weight

        x = query.requires_grad_()
        selective(block, x, keep=keep).backward(gradient)
        found = weight.grad
        assert len(seen) == runs
        weight.grad = None
        block(x).backward(gradient)
        torch.testing.assert_close(found, weight.grad, rtol=1e-12, atol=1e-12)


def test_keys_and_values_go_round_one_axis() -> None:
    kind = graph_of(llama(2)).kinds["LlamaDecoderLayer"]
    node = next(node for node in kind.graph.of("op") if node.op == "aten.scaled_dot_product_attention")
    ring_, heads = (strategy_of(node, kind.graph, name) for name in ("ring", "h"))
    axes = {"cp": 2, "tp": 2}
    assert refusal(node, kind.graph, {"cp": ring_, "tp": heads}, axes, 1, 16) == ""
    told = refusal(node, kind.graph, {"cp": ring_, "tp": ring_}, axes, 1, 16)
    assert told == "sends keys and values round one axis, not cp and tp"


def test_emitted_code_calls_it_with_the_order_of_the_sequence() -> None:
    graph, mesh = graph_of(llama(2)), Mesh(cp=4)
    for seq_len, call in ((16, "self.cp, balanced=True, is_causal=True)"), (12, "self.cp, is_causal=True)")):
        plan = plan_of(graph, on_axes(graph, mesh, attention="ring"), mesh, micro_batch=1, seq_len=seq_len)
        source = module_source(plan, graph)
        assert f"heads = ring_attention(q, k, v, {call}" in source
        assert "all_gather" not in source
        assert load_module(source).ring_attention is ring_attention
