"""The tensors that a block is predicted to make are those of the emitted code."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from proof.fused import fused_rms_norm
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.codegen.runtime import collectives, operators, ring
from autopar.job import Job
from autopar.models import model_graph
from autopar.sharding.conversions import direct
from autopar.sharding.layout import I, P, R, S
from autopar.solver import liveness
from autopar.solver.decisions import whole_decisions
from autopar.solver.liveness import PRIME, _Live, footprint
from autopar.solver.stand_ins import Conversion, RingAttention, VocabCrossEntropy

RANKS, ROWS, WIDTH = 4, 8, 64


def axis():
    """What the emitted code asks of a mesh axis."""
    return SimpleNamespace(
        size=lambda: RANKS, get_local_rank=lambda: 0, get_group=lambda: SimpleNamespace(group_name="fake")
    )


def through(function, *shape, dtype=torch.bfloat16):
    """(most bytes alive, bytes left) of a function, then of its backward, with nothing held but its graph."""
    live = _Live()
    with FakeTensorMode(), live:
        x = torch.empty(shape, dtype=dtype).requires_grad_()
        live.reset([x])
        y = function(x)
        forward = max((fixed + grows for fixed, grows in live.times), default=0), live.fixed + live.grows
        live.times.clear()
        grad = torch.empty_like(y)
        y.backward(grad)
        return forward, max(fixed + grows for fixed, grows in live.times), live.fixed + live.grows


CONVERSIONS = {
    "gather rows": (S(0), R, lambda x: collectives.all_gather(x, axis(), 0)),
    "gather columns": (S(1), R, lambda x: collectives.all_gather(x, axis(), 1)),
    "gather invariant": (S(1), I, lambda x: collectives.all_gather_invariant(x, axis(), 1)),
    "reduce": (P, R, lambda x: collectives.all_reduce(x, axis())),
    "reduce invariant": (P, I, lambda x: collectives.all_reduce_invariant(x, axis())),
    "scatter rows": (P, S(0), lambda x: collectives.reduce_scatter(x, axis(), 0)),
    "scatter columns": (P, S(1), lambda x: collectives.reduce_scatter(x, axis(), 1)),
    "replicate": (I, R, lambda x: collectives.replicate(x, axis())),
    "shard": (R, S(1), lambda x: collectives.shard(x, axis(), 1)),
    "shard invariant": (I, S(1), lambda x: collectives.shard_invariant(x, axis(), 1)),
    "exchange": (S(0), S(1), lambda x: collectives.all_to_all(x, axis(), 0, 1)),
    "pad": (S(1), P, lambda x: collectives.zero_pad(x, axis(), 1)),
}


@pytest.fixture(autouse=True)
def waiting_makes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On real tensors waiting for a collective hands on its result; on fake ones it makes a new one."""
    for module in (collectives, operators, ring):
        plain = module._functional
        monkeypatch.setattr(module, "_functional", SimpleNamespace(wait_tensor=lambda x: x))
        for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "all_to_all_single"):
            setattr(module._functional, name, getattr(plain, name))


@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversions_make_the_buffers_of_the_emitted_code(name: str) -> None:
    source, target, emitted = CONVERSIONS[name]
    step = direct(source, target)
    assert step is not None
    here = through(lambda x: Conversion.apply(x, step, RANKS, False), ROWS, WIDTH)
    assert here == through(emitted, ROWS, WIDTH)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_split_cross_entropy_makes_the_tensors_of_the_emitted_code(dtype: torch.dtype) -> None:
    """But for a few numbers a token."""
    labels = torch.zeros(ROWS, dtype=torch.int64)

    def emitted(x):
        return operators.vocab_cross_entropy(x, torch.empty(ROWS, dtype=torch.int64), axis())

    def predicted(x):
        return VocabCrossEntropy.apply(x, torch.empty(ROWS, dtype=torch.int64))

    told, found = (through(function, ROWS, 100 * WIDTH, dtype=dtype) for function in (predicted, emitted))
    few = 16 * labels.nbytes
    assert told[0] == (pytest.approx(found[0][0], abs=few), pytest.approx(found[0][1], abs=few))
    assert told[1:] == (pytest.approx(found[1], abs=few), pytest.approx(found[2], abs=few))


class InTurns(torch.autograd.Function):
    """What the operators of `runtime.ring` do inside: on fake tensors they make their results alone. ``mask``: whether
    it is in balanced order, and causal."""

    mask = (False, False)

    @staticmethod
    def forward(ctx, query, key, value):
        ctx.turns = ring._Turns(*InTurns.mask, 0.125, RANKS, 1, "fake")
        output, sums = ring._attend(ctx.turns, query, key, value)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx, gradient):
        return ring._attend_back(ctx.turns, gradient, *ctx.saved_tensors)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [4, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_ring_makes_the_tensors_of_the_emitted_code(
    dtype: torch.dtype, heads: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for a few numbers a token and head. Queries are every gradient's, so that one input stands for all."""
    monkeypatch.setattr(InTurns, "mask", (causal, causal))
    shape = (1, 4, 16 * ROWS, WIDTH)

    def through_ring(function):
        def run(x):
            return function(x, x[:, :heads], x[:, heads - 1 : 2 * heads - 1] if heads == 1 else x)

        return through(run, *shape, dtype=dtype)

    told = through_ring(lambda *x: RingAttention.apply(*x, RANKS, causal))
    found = through_ring(InTurns.apply)
    few = 6 * 4 * 4 * 16 * ROWS
    assert told[0] == (pytest.approx(found[0][0], abs=few), pytest.approx(found[0][1], abs=few))
    assert told[1] == pytest.approx(found[1], abs=few)
    assert few < 0.06 * told[1]
    # Four turns hold no more than three.
    more, fewer = (through_ring(lambda *x, n=n: RingAttention.apply(*x, n, causal)) for n in (8, 3))
    assert more == fewer


def test_bytes_that_grow_with_the_batch_are_told_apart() -> None:
    live = _Live()
    with FakeTensorMode(), live:
        kept = [torch.empty(3, PRIME, dtype=torch.float32), torch.empty(5, dtype=torch.float32)]
        assert (live.fixed, live.grows) == (20, 12 * PRIME)
        kept.clear()
        assert (live.fixed, live.grows) == (0, 0)


def test_the_fused_norm_of_the_measurement_is_the_norm() -> None:
    x, weight = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 8), (8,)))
    plain = F.rms_norm(x, (8,), weight, 1e-6)
    with fused_rms_norm():
        fused = F.rms_norm(x, (8,), weight, 1e-6)
    torch.testing.assert_close(fused, plain)
    for one, other in zip(*(torch.autograd.grad(y.sin().sum(), (x, weight)) for y in (fused, plain)), strict=True):
        torch.testing.assert_close(one, other)


def test_layer_norms_keep_their_statistics_in_float32_as_on_a_gpu() -> None:
    norm = torch.nn.LayerNorm(WIDTH)
    graph = model_graph(_Normed(norm), {"x": torch.randn(ROWS, WIDTH)}, lambda out, batch: out.square().mean())
    (block,) = graph.blocks
    kind = graph.kinds[block.kind]
    whole = footprint(kind, whole_decisions(graph)[block.kind], Job(1, ROWS))
    assert whole.saved_sizes(1).count(4 * ROWS) == 2


def test_what_torch_knows_on_fake_tensors_alone_is_measured_there(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = model_graph(
        _Normed(torch.nn.Tanh()), {"x": torch.randn(ROWS, WIDTH)}, lambda out, batch: out.square().mean()
    )
    (block,) = graph.blocks
    kind, decision = graph.kinds[block.kind], whole_decisions(graph)[block.kind]
    found = footprint(kind, decision, Job(1, ROWS))

    def on_fakes(place: object, *rest: object) -> object:
        if isinstance(place, torch.device):
            raise NotImplementedError("no meta kernel")
        return measured(place, *rest)

    measured = liveness._measured
    monkeypatch.setattr(liveness, "_measured", on_fakes)
    assert footprint(kind, decision, Job(1, ROWS)) == found


class _Normed(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.scale = torch.nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x * self.scale) * self.scale
