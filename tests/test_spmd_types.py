"""Our strategies and the `spmd_types` checker agree on the type of every operator's output."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import spmd_types
import torch
import torch.nn.functional as F
from rule_examples import Example, examples_of, fill
from spmd_types.checker import typecheck
from torch.testing._internal.distributed.fake_pg import FakeStore

from autopar.graph.ir import EXPERTS
from autopar.graph.ops import CALLS
from autopar.sharding.layout import I, Layout, P, R, S, SpmdType
from autopar.sharding.local import localize, shard
from autopar.sharding.rules import RULES, Strategy, divides, rule_of, strategies_of

KINDS = {"R": spmd_types.R, "I": spmd_types.I, "P": spmd_types.P, "S": spmd_types.V}
"""In the checker's local mode, a shard of whatever dim is "varying"."""

STRICTER = {"autopar.rotary"}
"""Where we pass fewer partial sums: cos and sin both partial, which nothing makes."""

UNKNOWN = {
    "autopar.selective_scan": "its recurrence is an autograd Function that the checker is not told of",
    "autopar.state_space_scan": "the same",
    "autopar.gated_delta_rule": "it takes a batched product for linear in both of its operands, whatever they hold",
    **dict.fromkeys(
        (op for op in RULES if op.removeprefix("aten.").removeprefix("_").startswith("upsample_")),
        "users call F.interpolate, which is not called with these arguments",
    ),
    "aten.index_add": "it takes it for no linear operator, which it is in what is added and in what that is added to",
    "aten.scatter_add": "the same",
    **{
        f"aten.fft_{kind}{dims}": "it takes it for no linear one"
        for kind in ("fft", "ifft", "rfft", "irfft")
        for dims in ("", "2", "n")
    },
}
"""Operators that the checker cannot be asked about, and why; their rules are executed on shards like all
(`test_rules`)."""

LOSSES = {
    "aten.smooth_l1_loss": (2, "beta"),
    "aten.huber_loss": (2, "delta"),
    "aten.kl_div": (2, "log_target"),
    "aten.binary_cross_entropy": (3, ""),
    "aten.binary_cross_entropy_with_logits": (4, ""),
}
"""Of losses by elements, where the operator has its reduction, and what comes behind."""

AXES = {"tp": 2}


@pytest.fixture(scope="module")
def group() -> Iterator[Any]:
    torch.distributed.init_process_group(backend="fake", rank=0, world_size=2, store=FakeStore())
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def python_call(op: str) -> Callable[..., torch.Tensor]:
    """What a user would call: the checker sees Python functions, not dispatcher operators."""
    name = {
        "aten._unsafe_view": "view",
        "aten.alias": "clone",
        "aten.lift_fresh_copy": "clone",
        "aten.log_sigmoid": "logsigmoid",
    }.get(op, op.partition(".")[2])
    if op in CALLS:
        return CALLS[op]
    if op == "aten.index":
        return lambda x, at: x[tuple(slice(None) if entry is None else entry for entry in at)]
    if op == "aten.linalg_vector_norm":
        return torch.linalg.vector_norm
    if name.startswith("fft_"):
        return getattr(torch.fft, name.removeprefix("fft_"))
    if op in LOSSES:
        return partial(_loss, name, *LOSSES[op])
    return next(getattr(space, name) for space in (torch, F, torch.Tensor) if hasattr(space, name))


def _loss(name: str, place: int, last: str, *args: Any) -> torch.Tensor:
    """Users name the reduction, which is a number in the operator."""
    rest = {last: args[place + 1]} if len(args) > place + 1 else {}
    found: torch.Tensor = getattr(F, name)(*args[:place], reduction="none", **rest)
    return found


def infer(example: Example, types: tuple[SpmdType, ...], output: SpmdType, group: Any, skip: int = 99) -> Any:
    """The checker's type of the output on local tensors of the given types; operands from ``skip`` on left out."""
    node, _, whole = example.build()
    parts = []
    for x, kind in zip(whole, types, strict=True):
        part = shard(x, Layout.of(tp=kind), AXES)[0].requires_grad_(x.is_floating_point())
        parts.append(spmd_types.assert_type(part, {group: KINDS[kind.kind]}))
    args, kwargs = localize(node, Layout.of(tp=output), AXES, 1, 1)
    drawn = iter(parts)
    filled = fill(args, drawn)
    with typecheck(local=True):
        if skip < 99:
            return _without_bias(example.op, filled, group)
        found = python_call(example.op)(*filled, **fill(kwargs, drawn))
    return spmd_types.get_axis_local_type(found, group)


def _without_bias(op: str, args: tuple[Any, ...], group: Any) -> Any:
    """The product of shards is a partial sum, and so is a bias kept on one rank: the two are added as such."""
    bias, *factors = args if op != "aten.linear" else (args[2], args[0], args[1])
    product = {"aten.linear": F.linear, "aten.addmm": torch.mm, "aten.baddbmm": torch.bmm}[op](*factors)
    partial = spmd_types.reinterpret(product, group, src=spmd_types.V, dst=spmd_types.P)
    return spmd_types.get_axis_local_type(partial + bias, group)


def splits_a_sum(strategy: Strategy, example: Example) -> bool:
    node, graph, _ = example.build()
    rule = rule_of(node, graph)
    return rule is not None and strategy.name.partition("/")[0] in rule.sums


@pytest.mark.parametrize(
    "op", sorted(op for op in RULES if examples_of(RULES[op]) and op != EXPERTS and op not in UNKNOWN)
)
def test_checker_accepts_our_strategies_and_infers_our_types(op: str, group: Any) -> None:
    """Not asked: "vocab" variants (composites with collectives inside), operators without tensor operands, and experts,
    which state their own types (`test_experts`).

    A sum over shards is "varying" to the local checker until it is reinterpreted as partial, as emitted code does.
    """
    for example in examples_of(RULES[op]):
        node, graph, whole = example.build()
        for strategy in strategies_of(node, graph):
            if strategy.variant or not whole or not divides(node, graph, strategy, 2, 1, 1):
                continue
            summed = splits_a_sum(strategy, example)
            biased = summed and P in strategy.inputs
            if biased and ".conv" in op:  # no form of it adds its bias apart
                continue
            found = infer(example, strategy.inputs, strategy.output, group, 2 if biased else 99)
            wanted = spmd_types.V if summed and not biased else KINDS[strategy.output.kind]
            assert found is wanted, f"{example} under {strategy}: the checker says {found}"


def test_checker_rejects_partial_sums_where_we_do(group: Any) -> None:
    """Partial operands in every combination that no strategy has: rejected, but for the sets where we are stricter."""
    accepted = set()
    for op in RULES:
        if op in UNKNOWN or op == "aten.binary_cross_entropy":  # parts of probabilities are none
            continue
        for example in examples_of(RULES[op])[:2]:
            node, graph, whole = example.build()
            ours = {strategy.inputs for strategy in strategies_of(node, graph)}
            floats = [index for index, x in enumerate(whole) if x.is_floating_point()]
            for count in range(1, len(floats) + 1):
                for chosen in itertools.combinations(floats, count):
                    types = tuple(P if index in chosen else R for index in range(len(whole)))
                    if types in ours:
                        continue
                    try:
                        infer(example, types, P, group)
                    except spmd_types.SpmdTypeError:
                        continue
                    accepted.add(op)
    assert accepted == STRICTER


def test_checker_rejects_invariant_beside_other_types(group: Any) -> None:
    example = examples_of(RULES["aten.mul"])[1]
    for other in (R, P, S(0)):
        with pytest.raises(spmd_types.SpmdTypeError):
            infer(example, (other, I), other, group)


GLOBAL_GAPS = {
    "aten._unsafe_view": "DTensor does not split a sharded dim by a view; unflatten with -1 it does",
    "aten.view": "the same",
    "aten.reshape": "the same",
    "aten.linear": "a bias kept on one rank, added to shards: in emitted code the product is made partial first",
    "aten.addmm": "the same",
    "aten.baddbmm": "the same",
    "aten.expand": "no strategy when leading dims are new",
    "aten.broadcast_to": "no strategy",
    "aten.cat": "no strategy for a single tensor",
    "aten.einsum": "no strategy for a diagonal",
    "aten.matmul": "no strategy when batch dims broadcast",
    "aten.scaled_dot_product_attention": "no strategy for the fused kernels: emitted code wraps it in local_map",
    "aten.slice": "no strategy for a slice that is the whole sharded dim",
    "aten.cdist": "no strategy",
    "aten.conj_physical": "no strategy",
    "aten.tril": "no strategy",
    "aten.triu": "no strategy",
    "autopar.experts": "rows picked by what indices hold: emitted code states its types",
    **dict.fromkeys(
        (f"aten.{kind}{rank}d" for kind in ("conv", "conv_transpose") for rank in (1, 2, 3)),
        "no strategy for split channels, nor for a batch beside weights and groups",
    ),
    "aten.masked_scatter": "no strategy",
    **dict.fromkeys(("autopar.gru", "autopar.rnn_tanh", "autopar.rnn_relu"), "no strategy for a split batch"),
    "autopar.ctc_loss": "no strategy",
    "autopar.cross_entropy": "flattening (b s) split by s is a strided shard: emitted code wraps it in local_map",
}
"""Operators of which the checker's global mode refuses some strategy, and why; it agrees on all others."""


def agrees_globally(example: Example, strategy: Strategy, group: Any) -> bool:
    """Whether the checker in global mode, told which dims are split, infers which dim of the output is."""
    node, _, whole = example.build()
    kinds = {"R": spmd_types.R, "I": spmd_types.I, "P": spmd_types.P}
    parts = []
    for x, kind in zip(whole, strategy.inputs, strict=True):
        part = shard(x, Layout.of(tp=kind), AXES)[0].requires_grad_(x.is_floating_point())
        told = spmd_types.S(kind.dim) if kind.kind == "S" else kinds[kind.kind]
        parts.append(spmd_types.assert_type(part, {group: told}))
    args, kwargs = localize(node, Layout.of(tp=strategy.output), AXES, 1, 1)
    if node.op == "aten.unflatten" and args[1] <= strategy.output.dim < args[1] + len(args[2]):
        inferred = tuple(-1 if args[1] + at == strategy.output.dim else size for at, size in enumerate(args[2]))
        args = (*args[:2], inferred)
    drawn = iter(parts)
    try:
        with typecheck(local=False):
            found = python_call(example.op)(*fill(args, drawn), **fill(kwargs, drawn))
    except (spmd_types.SpmdTypeError, RuntimeError, AssertionError):  # the last is its own check of itself
        return False
    kind, spec = spmd_types.get_axis_local_type(found, group), spmd_types.get_partition_spec(found)
    if strategy.output.kind == "S":
        return kind is spmd_types.V and spec is not None and spec[strategy.output.dim] is not None
    return kind is kinds[strategy.output.kind]


@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support on cpu")
def test_checker_in_global_mode_infers_our_split_dims(group: Any) -> None:
    gaps, agreed = set(), 0
    for op in RULES:
        if op in UNKNOWN or op == "aten.binary_cross_entropy":  # parts of probabilities are none
            continue
        for example in examples_of(RULES[op]):
            node, graph, whole = example.build()
            for strategy in strategies_of(node, graph):
                blocked = any(kind.blocks != 1 for kind in (*strategy.inputs, strategy.output))
                if not whole or strategy.variant or blocked or not divides(node, graph, strategy, 2, 1, 1):
                    continue
                if agrees_globally(example, strategy, group):
                    agreed += 1
                else:
                    gaps.add(op)
    assert gaps <= set(GLOBAL_GAPS), f"new disagreements: {gaps - set(GLOBAL_GAPS)}"
    assert agreed > 1000
