"""Conversions proved by execution on simulated ranks, forward and backward; paths over several axes."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from autopar.sharding.conversions import COMMUNICATES, convert, convertible, direct, path, plain, same, steps, types_of
from autopar.sharding.execute import convert_values
from autopar.sharding.layout import I, Layout, P, R, S, SpmdType
from autopar.sharding.local import shard, unshard
from autopar.sharding.simulate import SimulatedWorld

TYPES = [R, I, P, S(0), S(1), S(0, 2), S(1, 3)]
SHAPE = (8, 24)


def held_alike(values: list[torch.Tensor], kind: SpmdType) -> bool:
    return kind.kind not in "RI" or all(torch.equal(values[0], x) for x in values)


def prove(source: Layout, target: Layout, axes: dict[str, int], shape: tuple[int, ...] = SHAPE) -> None:
    """Values are integers, so that every sum is exact: whole tensors and whole gradients must be equal bit for bit."""
    generator = torch.Generator().manual_seed(3)
    whole, grad = (torch.randint(-50, 50, shape, generator=generator).double() for _ in range(2))
    before = [x.requires_grad_() for x in shard(whole, source, axes, generator=generator)]
    after = convert_values(before, source, target, SimulatedWorld(axes), 1, 1)
    assert torch.equal(unshard(after, target, axes), whole)
    torch.autograd.backward(after, shard(grad, target.gradient, axes, generator=generator))
    grads = [x.grad if x.grad is not None else torch.zeros_like(x) for x in before]
    assert torch.equal(unshard(grads, source.gradient, axes), grad)
    if len(axes) == 1:
        (axis,) = axes
        assert held_alike(after, target[axis])
        assert held_alike(grads, source[axis].gradient)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("source", "target"), list(itertools.product(TYPES, TYPES)), ids=str)
def test_conversion_holds_on_simulated_ranks(source: SpmdType, target: SpmdType, ranks: int) -> None:
    prove(Layout.of(tp=source), Layout.of(tp=target), {"tp": ranks})


def test_table_reads_as_the_design_states_it() -> None:
    pairs = [(a, b) for a, b in itertools.product([S(0), P, I, R], [R, I, P, S(0), S(1)]) if a != b]
    lines = [str(direct(a, b)) for a, b in pairs if direct(a, b)]
    assert lines == [
        "S(0) -> R: all_gather / reduce_scatter",
        "S(0) -> I: all_gather / slice",
        "S(0) -> P: pad / slice",
        "S(0) -> S(1): all_to_all / all_to_all",
        "P -> R: all_reduce / all_reduce",
        "P -> I: all_reduce / none",
        "P -> S(0): reduce_scatter / all_gather",
        "P -> S(1): reduce_scatter / all_gather",
        "I -> R: none / all_reduce",
        "I -> P: keep / none",
        "I -> S(0): slice / all_gather",
        "I -> S(1): slice / all_gather",
        "R -> P: keep / keep",
        "R -> S(0): slice / pad",
        "R -> S(1): slice / pad",
    ]
    assert direct(R, I) is None
    assert direct(S(0), S(0, 2)) is None
    assert direct(P, P) is None


def test_bytes_are_those_of_the_whole_tensor_where_data_moves() -> None:
    for source, target in itertools.permutations(TYPES, 2):
        step = direct(source, target)
        if step:
            assert step.forward_bytes == (1.0 if step.forward in COMMUNICATES else 0.0)
            assert step.backward_bytes == (1.0 if step.backward in COMMUNICATES else 0.0)
    assert (direct(I, R).forward_bytes, direct(I, R).backward_bytes) == (0.0, 1.0)
    assert (direct(P, S(1)).forward_bytes, direct(P, S(1)).backward_bytes) == (1.0, 1.0)


def test_tensor_without_gradient_has_no_backward_and_one_replicated_type() -> None:
    assert str(direct(S(0), R, grad=False)) == "S(0) -> R: all_gather / none"
    assert str(direct(R, I, grad=False)) == "R -> I: none / none"
    assert steps(R, I, grad=False) == steps(I, R, grad=False) == ()
    assert [step.forward for step in steps(I, S(1), grad=False)] == ["slice"]
    assert plain(I, grad=False) == R
    assert plain(I, grad=True) == I
    assert same(Layout.of(tp=I), Layout.of(tp=R), grad=False)
    assert not same(Layout.of(tp=I), Layout.of(tp=R), grad=True)


def test_other_blocks_go_by_way_of_the_whole() -> None:
    chain = [str(step) for step in steps(S(0), S(0, 3))]
    assert chain == ["S(0) -> I: all_gather / slice", "I -> S(0, 3): slice / all_gather"]
    assert len(steps(S(0), S(1, 3))) == 1


def test_chains_are_no_dearer_than_any_detour() -> None:
    """The chain found has as few collectives as the best over all sequences of up to three legal steps."""
    for source, target in itertools.permutations(TYPES, 2):
        found = sum(step.forward_bytes + step.backward_bytes for step in steps(source, target))
        best = min(
            sum(step.forward_bytes + step.backward_bytes for step in chain)
            for through in [(), *((m,) for m in TYPES), *itertools.permutations(TYPES, 2)]
            for chain in [[direct(a, b) for a, b in itertools.pairwise((source, *through, target))]]
            if all(chain)
        )
        assert found == best, f"{source} -> {target}"


def test_only_the_innermost_axis_of_a_dim_converts() -> None:
    layout = Layout.of(cp=S(0), tp=S(0))
    assert convertible(layout, "tp")
    assert not convertible(layout, "cp")
    assert str(convert(layout, "tp", R)) == "cp:S(0) tp:R"
    with pytest.raises(ValueError, match=r"cp .* cannot convert before tp"):
        convert(layout, "cp", R)
    steps_taken = [f"{axis} {step}" for axis, step in path(layout, Layout.of(tp=S(0), cp=S(0)))]
    assert len(steps_taken) == 4, "swapping the order of two axes lifts both and puts them back"
    assert path(Layout.of(cp=S(0), tp=S(1)), Layout.of(tp=S(1), cp=S(0))) == (), "order over different dims is no order"


def test_paths_hold_on_simulated_ranks_of_several_axes() -> None:
    rng = random.Random(0)
    kinds = [R, I, P, S(0), S(1), S(1, 3)]
    for axes in ({"cp": 2, "tp": 2}, {"cp": 2, "tp": 4}, {"ep": 2, "cp": 2, "tp": 2}):
        for _ in range(60):
            source, target = (
                Layout(tuple((axis, rng.choice(kinds)) for axis in rng.sample(list(axes), len(axes)))) for _ in range(2)
            )
            if nests(source) and nests(target):
                prove(source, target, axes, (16, 96))


def nests(layout: Layout) -> bool:
    """Blocks inside or outside one another: a blocked split does not come inside a plain one of the same dim."""
    blocks = [layout[axis].blocks for axis in layout.splits(1)]
    return blocks == sorted(blocks, reverse=True)


def test_types_of_a_tensor() -> None:
    assert [str(kind) for kind in types_of(2, [S(1, 3)])] == ["R", "I", "P", "S(0)", "S(1)", "S(1, 3)"]
