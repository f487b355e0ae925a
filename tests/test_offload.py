"""Activation offload: what is moved, when it comes back, and that gradients do not notice. On the CPU: plain copies."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import pytest
import torch
from hand_plans import graph_of, llama, megatron, plan_of
from test_recompute import Layer, kept_plan
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import autopar
from autopar.cluster import Device
from autopar.codegen.emit_module import module_source
from autopar.codegen.ranks import fake_mesh
from autopar.codegen.runtime import offload as runtime
from autopar.codegen.runtime.offload import Parcel, Visit, offload
from autopar.codegen.runtime.recompute import selective
from autopar.codegen.typecheck import typecheck
from autopar.codegen.verify import verify
from autopar.errors import AutoparError, InfeasibleError, UnsupportedError
from autopar.models import model_graph
from autopar.plan import Mesh, Plan
from autopar.solver import recompute as pricing
from autopar.solver import reprice
from autopar.solver.candidates import BlockCosts, moved_bytes
from autopar.solver.collective_costs import CollectiveCosts
from autopar.solver.op_costs import OpCosts
from autopar.solver.prices import AxisPrices
from autopar.solver.reprice import check_price
from autopar.solver.search import search

SMALL = runtime.SMALL
WAYS: dict[str, Callable[..., Any]] = {
    "none": offload,
    "full": partial(offload, checkpoint, use_reentrant=False),
    "selective": partial(offload, selective, keep=("matmul", "attention")),
}


@pytest.fixture(autouse=True)
def everything_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "SMALL", 0)


class Journal:
    """Calls of blocks as they end, enter backward and are fetched, in order; and how many bytes were sent."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []
        self.sent = 0


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    found = Journal()
    make, fetch, enter = Parcel.__init__, Visit.fetch, Visit.enter_backward
    visits: list[Visit] = []

    def made(parcel: Parcel, x: Tensor) -> None:
        make(parcel, x)
        found.sent += parcel.there.nbytes

    def name(visit: Visit) -> int:
        if visit not in visits:
            visits.append(visit)
        return visits.index(visit)

    def fetched(visit: Visit) -> None:
        found.events.append(("fetch", name(visit)))
        fetch(visit)

    def entered(visit: Visit) -> None:
        if not visit.is_entered:
            found.events.append(("enter", name(visit)))
        enter(visit)

    def left(visit: Visit, result: Any) -> None:
        found.events.append(("left", name(visit)))
        leave(visit, result)

    leave = Visit.left
    monkeypatch.setattr(Parcel, "__init__", made)
    monkeypatch.setattr(Visit, "fetch", fetched)
    monkeypatch.setattr(Visit, "enter_backward", entered)
    monkeypatch.setattr(Visit, "left", left)
    return found


def layers(count: int = 3, dtype: torch.dtype = torch.float64) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Layer(0.2) for _ in range(count)).to(dtype)


def forward(blocks: nn.ModuleList, call: Callable[..., Any], seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, 8, 32, dtype=next(blocks.parameters()).dtype, generator=generator).requires_grad_()
    torch.manual_seed(seed)
    for block in blocks:
        hidden = call(block, hidden)
    return hidden.square().sum()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_are_those_without_offload_to_the_last_bit(way: str, dtype: torch.dtype) -> None:
    expected, found = layers(dtype=dtype), layers(dtype=dtype)
    # Three micro-batches in flight, backward first come first served, as in a pipeline.
    for blocks, call in ((expected, lambda block, x: block(x)), (found, WAYS[way])):
        losses = [forward(blocks, call, seed) for seed in range(3)]
        for loss in losses:
            loss.backward()
    pairs = zip(found.parameters(), expected.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


@pytest.mark.parametrize("way", WAYS)
def test_blocks_come_back_one_ahead_of_backward(journal: Journal, way: str) -> None:
    forward(layers(), WAYS[way]).backward()
    assert journal.events == [
        *(("left", block) for block in range(3)),
        *(("enter", 2), ("fetch", 2), ("fetch", 1)),
        *(("enter", 1), ("fetch", 1), ("fetch", 0)),
        *(("enter", 0), ("fetch", 0)),
    ]


def test_micro_batches_in_flight_do_not_fetch_each_other(journal: Journal) -> None:
    blocks = layers(2)
    first, second = (forward(blocks, offload, seed) for seed in (1, 2))
    first.backward()
    assert {block for what, block in journal.events if what == "fetch"} == {0, 1}
    second.backward()
    assert {block for what, block in journal.events if what == "fetch"} == {0, 1, 2, 3}


def test_each_storage_is_moved_once_and_parameters_and_tables_not_at_all(journal: Journal) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64, bias=False)

        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            wide = x * table  # saves x and the table
            left, right = wide.chunk(2, -1)
            return self.linear(torch.cat((left * right, right.sin()), -1))  # two views of `wide`, the sine's operand

    x, table = torch.randn(10, 64, requires_grad=True), torch.randn(10, 64)
    offload(Block(), x, table).sum().backward()
    assert journal.sent == 4 * 10 * 64 * 2  # wide, the linear layer's operand


def test_small_tensors_stay(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    assert SMALL == pricing.SMALL  # what is priced is what is run
    monkeypatch.setattr(runtime, "SMALL", 1 + 8 * 2 * 8 * 96)
    forward(layers(), offload).backward()
    assert journal.sent == 0
    monkeypatch.setattr(runtime, "SMALL", 8 * 2 * 8 * 64)
    forward(layers(), offload).backward()
    assert journal.sent == 3 * 8 * 2 * 8 * (96 + 4 * 64)  # q, k, v together; gate, its silu, up, their product


def test_device_copies_go_as_backward_goes_on() -> None:
    def parcels() -> list[Parcel]:
        gc.collect()
        return [x for x in gc.get_objects() if type(x) is Parcel]

    loss = forward(layers(), offload)
    assert parcels()
    assert all(parcel.back is None and parcel.source is None for parcel in parcels())
    loss.backward()
    assert parcels() == []  # although the graph is still there


def test_without_gradients_nothing_is_moved(journal: Journal) -> None:
    with torch.no_grad():
        forward(layers(), offload)
    assert journal.sent == 0
    assert journal.events == []


def test_parameters_that_fsdp_has_gathered_stay(journal: Journal) -> None:
    with fake_mesh({"dp": 2}) as mesh:
        blocks = layers(2, torch.float32)
        for block in blocks:
            fully_shard(block, mesh=mesh["dp"], reshard_after_forward=True)
        forward(blocks, offload).backward()
        gathered = journal.sent
    journal.sent = 0
    forward(layers(2, torch.float32), offload).backward()
    assert gathered == journal.sent


# Plans


def offloaded_plan(plan: Plan) -> Plan:
    """The plan with offload in all its decoder layers."""
    moved = {
        name: replace(candidate, offload=True) if candidate.decision.kind == "LlamaDecoderLayer" else candidate
        for name, candidate in plan.candidates.items()
    }
    return replace(plan, candidates=moved)


def test_emitted_stages_offload_and_compute_the_same() -> None:
    model = llama(3)
    graph = graph_of(model)
    plan = offloaded_plan(kept_plan(graph, ("attention", "all_gather")))
    text = module_source(plan, graph)
    assert "from runtime.offload import offload\n" in text
    assert '"selective(attention+all_gather)/offload"' in text
    assert "hidden = offload(block, hidden, cos, sin)" in text
    assert verify(plan, model).worst[1] <= 1e-10
    typecheck(plan, graph, 8)
    whole = offloaded_plan(plan_of(graph, megatron(graph, 2, False), Mesh(tp=2), recompute="full"))
    assert "offload(checkpoint, block, hidden, cos, sin, use_reentrant=False)" in module_source(whole, graph)


def test_offload_is_priced() -> None:
    """Bytes leave the device, what the copies cannot hide is paid, and the plan's own check agrees."""
    with torch.device("meta"):
        model = llama(2, hidden_size=1024, intermediate_size=4096, max_position_embeddings=4096)
    graph = model_graph(model)
    job, cluster = autopar.Job(global_batch=16, seq_len=4096), autopar.Cluster.parse("1x4:h100")
    fix = {"tp": 2, "dp": 2, "micro_batch": 4}
    found = {}
    for offloads in ("none", "activations"):
        for recompute in ("none", "selective(matmul+attention)"):
            plan = search(graph, job, cluster, {**fix, "recompute": recompute, "offload": offloads})
            check_price(plan, graph)
            layer = next(c for c in plan.candidates.values() if c.decision.kind == "LlamaDecoderLayer")
            assert layer.offload == (offloads == "activations")
            found[recompute, offloads] = layer
    link = cluster.device.host_bandwidth
    prices = AxisPrices(OpCosts(cluster.device, job), CollectiveCosts(cluster), {"tp": 2}, 4)
    for recompute in ("none", "selective(matmul+attention)"):
        there = found[recompute, "activations"]
        # The same decision, with what it keeps on the device.
        here = BlockCosts(job).of(graph.kinds["LlamaDecoderLayer"], there.decision, prices, (recompute,))[recompute]
        moved = here.inflight - there.inflight_bytes
        assert 0 <= there.inflight_bytes < 0.02 * here.inflight
        assert there.forward_s == pytest.approx(max(here.forward_s, moved / link))
        assert there.backward_s == pytest.approx(max(here.backward_s, moved / link))
    assert found["none", "activations"].forward_s > found["none", "none"].forward_s


def test_the_search_offloads_where_that_beats_recomputation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found, faster than all that recomputes, and computed right; not where it is fixed, or no link is known."""
    monkeypatch.setattr(pricing, "SMALL", 0)
    model = llama(3)
    graph = graph_of(model)
    job, fix = autopar.Job(global_batch=8, seq_len=64, dtype="fp64"), {"dp": 2, "tp": 2, "micro_batch": 4, "zero": 1}
    cluster = autopar.Cluster.parse("1x4:h100")
    slow = replace(cluster.device, peak_flops={"fp64": 1e9}, reserve_bytes=0, host_bandwidth=1e11)

    def on(device: Device) -> autopar.Cluster:
        return replace(cluster, groups=(replace(cluster.groups[0], device=device),))

    roomy = search(graph, job, on(slow), fix)
    assert not any(candidate.offload for candidate in roomy.candidates.values())
    tight = replace(slow, memory_bytes=int(0.6 * roomy.stages[0].total_bytes))
    plan, here = search(graph, job, on(tight), fix), search(graph, job, on(tight), {**fix, "offload": "none"})
    assert any(candidate.offload for candidate in plan.candidates.values())
    assert any(candidate.recompute != "none" for candidate in here.candidates.values())
    assert not any(candidate.offload for candidate in here.candidates.values())
    assert plan.predicted.step_time < 0.95 * here.predicted.step_time
    assert ", activations on the host" in str(plan)
    unknown = search(graph, job, on(replace(tight, host_bandwidth=0.0)), fix)
    assert unknown.predicted.step_time == here.predicted.step_time
    assert "offload(block" in module_source(plan, graph)
    assert verify(plan, model).worst[1] <= 1e-10


def test_what_comes_back_under_a_split_backward_stays_until_its_weights_are_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between the halves, so that memory counts it; on the first stage all is one half."""
    torch.manual_seed(0)
    block = nn.Linear(64, 64, bias=False)
    x = torch.randn(4, 64, requires_grad=True)
    result = offload(block, x.sin())
    (handed,) = torch.autograd.grad(result.sum(), x, retain_graph=True)
    assert handed.shape == x.shape
    assert any(parcel.back is not None for parcel in gc.get_objects() if type(parcel) is Parcel)
    del result
    monkeypatch.setattr(pricing, "SMALL", 0)
    graph = graph_of(llama(4))
    job = autopar.Job(global_batch=8, seq_len=64)
    fix = {"pp": 2, "schedule": "zbv", "zero": 1, "dp": 2, "micro_batch": 1, "recompute": "none"}
    plan = search(graph, job, on_host(0), {**fix, "offload": "activations"})
    check_price(plan, graph)
    monkeypatch.setattr(reprice, "moved_bytes", lambda *_: 0)
    with pytest.raises(AutoparError, match="memory of stage"):
        check_price(plan, graph)


def test_offload_without_a_known_link_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="host_bandwidth"):
        pricing.exposed_copy(1 << 30, 0.0, 1.0)


def on_host(room: int) -> autopar.Cluster:
    """Four H100s with ``room`` bytes of the host's memory each."""
    cluster = autopar.Cluster.parse("1x4:h100")
    group = cluster.groups[0]
    return replace(cluster, groups=(replace(group, device=replace(group.device, host_memory_bytes=room)),))


def test_state_that_the_host_has_no_room_for_is_refused() -> None:
    graph = graph_of(llama(4))
    job, fix = autopar.Job(global_batch=16, seq_len=64), {"dp": 4, "zero": 3, "micro_batch": 1, "offload": "state"}
    elements = sum(prod(meta.at(1, 1)) for meta in graph.parameters.values())
    needed = 4 * 4 * elements // 4  # parameters, gradients and two moments in float32, over four ranks
    assert search(graph, job, on_host(needed), fix).predicted == search(graph, job, on_host(0), fix).predicted
    with pytest.raises(InfeasibleError, match=rf"keeps {needed:,} bytes on the host, 8 bytes .* not fixed to state"):
        search(graph, job, on_host(needed - 8), fix)


def test_activations_that_the_host_has_no_room_for_are_refused() -> None:
    with torch.device("meta"):
        graph = model_graph(llama(2, hidden_size=1024, intermediate_size=4096, max_position_embeddings=4096))
    job = autopar.Job(global_batch=16, seq_len=4096)
    fix = {"tp": 2, "dp": 2, "micro_batch": 4, "recompute": "none", "offload": "activations"}
    plan = search(graph, job, on_host(1 << 40), fix)
    layer = next(c for c in plan.candidates.values() if c.decision.kind == "LlamaDecoderLayer")
    moved = 2 * moved_bytes(graph.kinds["LlamaDecoderLayer"], layer, 4, job)  # of two layers
    assert moved > 1 << 29
    search(graph, job, on_host(moved), fix)
    with pytest.raises(InfeasibleError, match=r"bytes on the host, .* the 1,048,576 .* not fixed to activations"):
        search(graph, job, on_host(1 << 20), fix)
