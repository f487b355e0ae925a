"""The emitted folder's collectives: each conversion keeps the tensor, its backward the gradient, on any ranks."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from autopar.codegen.emit_block import FUNCTIONS
from autopar.codegen.ranks import fake_mesh, local_ranks, on_rank, per_rank
from autopar.codegen.runtime import collectives, operators
from autopar.errors import UnsupportedError
from autopar.sharding.conversions import direct
from autopar.sharding.layout import Layout, S, SpmdType
from autopar.sharding.local import shard, unshard

RANKS = 4
CASES = [
    (pair, source, target)
    for pair in FUNCTIONS
    for source, target in {
        "SS": [(S(0), S(2)), (S(2), S(1)), (S(1), S(0))],
    }.get(
        pair,
        [
            (S(d) if pair[0] == "S" else SpmdType(pair[0]), S(d) if pair[1] == "S" else SpmdType(pair[1]))
            for d in ((0, 1, 2) if "S" in pair else (0,))
        ],
    )
]


def sequence_dims(source: SpmdType, target: SpmdType) -> list[int | None]:
    """The dims that may be a sequence in balanced order, and None for no such order."""
    return [None, *(kind.dim for kind in (source, target) if kind.kind == "S")]


EACH = [(*case, dim) for case in CASES for dim in sequence_dims(*case[1:])]
"""Every case, also with each split dim in balanced order."""


def call(
    pair: str, source: SpmdType, target: SpmdType, x: torch.Tensor, axis: object, balanced: int | None = None
) -> torch.Tensor:
    function = getattr(collectives, FUNCTIONS[pair])
    dims = [kind.dim for kind in (source, target) if kind.kind == "S"]
    options = {} if balanced is None else {"balanced": balanced if len(dims) > 1 else True}
    return function(x, axis, *dims, **options)


def by_rank(ranks: int) -> list[int]:
    """Balanced order: the chunks that rank 0 has, then those of rank 1, ..."""
    return [chunk for rank in range(ranks) for chunk in (rank, 2 * ranks - 1 - rank)]


def reordered(x: torch.Tensor, dim: int, order: list[int]) -> torch.Tensor:
    chunks = x.chunk(len(order), dim)
    return torch.cat([chunks[place] for place in order], dim)


def shards(whole: torch.Tensor, kind: SpmdType, seed: int, balanced: int | None = None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if kind.kind == "S" and kind.dim == balanced:
        whole = reordered(whole, kind.dim, by_rank(RANKS))
    return shard(whole, Layout.of(tp=kind), {"tp": RANKS}, generator=generator)


def whole_of(parts: list[torch.Tensor], kind: SpmdType, balanced: int | None = None) -> torch.Tensor:
    whole = unshard(parts, Layout.of(tp=kind), {"tp": RANKS})
    if kind.kind == "S" and kind.dim == balanced:
        order = by_rank(RANKS)
        whole = reordered(whole, kind.dim, sorted(range(len(order)), key=order.__getitem__))
    return whole


@pytest.mark.parametrize(("pair", "source", "target", "balanced"), EACH, ids=lambda value: str(value))
def test_conversion_keeps_the_value_forward_and_the_gradient_backward(
    pair: str, source: SpmdType, target: SpmdType, balanced: int | None
) -> None:
    torch.manual_seed(0)
    whole = torch.randn(8, 16, 24, dtype=torch.float64)
    gradient = torch.randn(8, 16, 24, dtype=torch.float64)
    with local_ranks({"tp": RANKS}) as mesh:
        x = per_rank(shards(whole, source, 1, balanced)).requires_grad_()
        y = call(pair, source, target, x, mesh["tp"], balanced)
        y.backward(per_rank(shards(gradient, target.gradient, 2, balanced)))
        found = [on_rank(y.detach(), rank) for rank in range(RANKS)]
        back = [on_rank(x.grad, rank) for rank in range(RANKS)]
    torch.testing.assert_close(whole_of(found, target, balanced), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole_of(back, source.gradient, balanced), gradient, rtol=1e-12, atol=1e-12)
    for parts, kind in ((found, target), (back, source.gradient)):
        if kind.kind in "RI":
            assert all(torch.equal(part, parts[0]) for part in parts)


def test_every_direct_conversion_of_the_algebra_has_a_function_and_no_other() -> None:
    for pair in FUNCTIONS:
        source, target = (S(place) if kind == "S" else SpmdType(kind) for place, kind in enumerate(pair))
        assert direct(source, target) is not None
    kinds = [SpmdType("R"), SpmdType("I"), SpmdType("P"), S(0)]
    offered = {a.kind + b.kind for a in kinds for b in [*kinds, S(1)] if direct(a, b) is not None}
    assert offered == set(FUNCTIONS)


class Everything(torch.nn.Module):
    """Every function once, with a parameter in between."""

    def __init__(self, axis: object) -> None:
        super().__init__()
        self.axis = axis
        self.weight = torch.nn.Parameter(torch.eye(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        c, axis = collectives, self.axis
        x = c.all_gather(x, axis, 1) @ c.replicate(self.weight, axis)
        x = c.all_to_all(c.reduce_scatter(x, axis, 1), axis, 1, 2)
        x = c.shard_invariant(c.all_gather_invariant(x, axis, 2), axis, 0)
        x = c.zero_pad(c.shard(c.all_gather(x, axis, 0), axis, 0), axis, 0)
        x = c.keep_first(c.all_reduce(x, axis), axis)
        x = c.all_gather(c.reduce_scatter(x, axis, 1, balanced=True), axis, 1, balanced=True)
        x = c.all_to_all(c.shard(x, axis, 1, balanced=True), axis, 1, 2, balanced=1)
        x = c.zero_pad(c.all_to_all(x, axis, 2, 1, balanced=1), axis, 1, balanced=True)
        return c.keep_first_invariant(c.all_reduce_invariant(x, axis), axis)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch._dynamo itself
def test_all_of_them_compile_into_one_graph() -> None:
    with fake_mesh({"dp": 2, "tp": 2}) as mesh:
        model = Everything(mesh["tp"])
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        compiled(torch.ones(2, 4, 8, requires_grad=True)).sum().backward()
        assert model.weight.grad is not None
        torch._dynamo.reset()


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _run_on_gloo(rank: int, port: int, queue: object) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        axis = dist.device_mesh.init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))["tp"]
        results = []
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for pair, source, target, balanced in EACH:
                x = (torch.arange(4 * 4 * 8).reshape(4, 4, 8) % 96 + 100 * rank).to(dtype).requires_grad_()
                y = call(pair, source, target, x, axis, balanced)
                y.backward((torch.arange(y.numel()).reshape(y.shape) % 7 + rank).to(dtype))
                results.append((y.detach().double().tolist(), x.grad.double().tolist()))
        queue.put((rank, results))  # type: ignore[attr-defined]
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_real_gloo_ranks_agree_with_simulated_ones_in_every_dtype() -> None:
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    workers = mp.start_processes(_run_on_gloo, (_free_port(), queue), nprocs=2, join=False, start_method="spawn")
    found = dict(queue.get() for _ in range(2))
    while not workers.join():
        pass
    place = 0
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for pair, source, target, balanced in EACH:
            with local_ranks({"tp": 2}) as mesh:
                base = torch.arange(4 * 4 * 8).reshape(4, 4, 8) % 96
                x = per_rank([(base + 100 * rank).to(dtype) for rank in range(2)]).requires_grad_()
                y = call(pair, source, target, x, mesh["tp"], balanced)
                size = torch.arange(on_rank(y, 0).numel()).reshape(on_rank(y, 0).shape) % 7
                y.backward(per_rank([(size + rank).to(dtype) for rank in range(2)]))
                for rank in range(2):
                    assert found[rank][place][0] == on_rank(y.detach(), rank).double().tolist(), (pair, dtype)
                    assert found[rank][place][1] == on_rank(x.grad, rank).double().tolist(), (pair, dtype)
            place += 1


def test_a_process_that_has_a_process_group_is_refused() -> None:
    with fake_mesh({"tp": 2}), pytest.raises(UnsupportedError, match="already has one"), local_ranks({"tp": 2}):
        pass


@pytest.mark.parametrize("vocabulary", [16, 13])
@pytest.mark.parametrize("ignored", [-100, 3])
@pytest.mark.parametrize("axes", [{"tp": 4}, {"tp0": 2, "tp1": 2}], ids=str)
def test_split_vocabulary_loss_and_embedding_equal_the_whole(
    ignored: int, vocabulary: int, axes: dict[str, int]
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5, vocabulary, dtype=torch.float64)
    labels = torch.randint(0, vocabulary, (2, 5))
    labels[0, 0] = labels[1, 3] = ignored
    table = torch.randn(vocabulary, 6, dtype=torch.float64, requires_grad=True)
    reference = logits.clone().requires_grad_()
    expected = operators.cross_entropy(reference, labels, ignored)
    expected.backward()
    ids = labels.clamp(min=0)
    looked_up = torch.nn.functional.embedding(ids, table)
    looked_up.square().sum().backward()
    uneven = {} if vocabulary % 4 == 0 else {"vocabulary": vocabulary}

    def parts(whole: torch.Tensor, dim: int) -> list[torch.Tensor]:
        held = [whole]
        for size in axes.values():
            held = [part.contiguous() for one in held for part in one.chunk(size, dim)]
        return held

    with local_ranks(axes) as mesh:
        axis = tuple(mesh[name] for name in axes) if len(axes) > 1 else mesh["tp"]
        split = per_rank(parts(logits, 2)).requires_grad_()
        found = operators.vocab_cross_entropy(split, per_rank([labels] * RANKS), axis, ignored, **uneven)
        found.backward()
        rows = per_rank(parts(table.detach(), 0)).requires_grad_()
        partial = operators.vocab_embedding(per_rank([ids] * RANKS), rows, axis, **uneven)
        whole = partial
        for name in axes:
            whole = collectives.all_reduce_invariant(whole, mesh[name])
        whole.square().sum().backward()
        summands = [on_rank(partial.detach(), rank) for rank in range(RANKS)]
        gradients = [on_rank(split.grad, rank) for rank in range(RANKS)]
        row_gradients = [on_rank(rows.grad, rank) for rank in range(RANKS)]
        losses = [on_rank(found.detach(), rank) for rank in range(RANKS)]
    for loss in losses:
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat(gradients, 2), reference.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sum(summands), looked_up.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat(row_gradients), table.grad, rtol=1e-12, atol=1e-12)


def test_simulated_ranks_know_their_place_on_axes_that_come_and_go() -> None:
    with local_ranks({"a": 2, "b": 3}) as mesh:
        for name in "abba" * 10:
            # The submesh is freed at once, and the next one may lie where it lay.
            index = torch.arange(3).narrow(0, mesh[name].get_local_rank(), 1)
            found = [int(on_rank(index, rank)) for rank in range(6)]
            assert found == [rank // 3 if name == "a" else rank % 3 for rank in range(6)]
