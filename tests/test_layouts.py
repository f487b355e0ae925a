"""Layouts: text, order of axes, local shapes, cutting and joining."""

from __future__ import annotations

import pytest
import torch
from rule_examples import attention_block

from autopar.errors import VerificationError
from autopar.graph.ir import Node, Ref, TensorMeta
from autopar.graph.size import BATCH, SEQ, Size
from autopar.sharding.conversions import same
from autopar.sharding.layout import I, Layout, P, R, S, SpmdType
from autopar.sharding.local import (
    blocks_at,
    coordinates,
    cut,
    join,
    least_part,
    local_shape,
    localize,
    part_of,
    produced_layouts,
    settled,
    shard,
    split_order,
    standard,
    unshard,
)
from autopar.sharding.rules import strategies_of


@pytest.mark.parametrize("text", ["", "tp:R", "dp:S(0) tp:S(1)", "cp:S(1) tp:S(1, 3)", "tp:P", "tp:I", "tp:S(0, b)"])
def test_layouts_read_what_they_print(text: str) -> None:
    assert str(Layout.parse(text)) == text
    assert Layout.parse(str(Layout.parse(text))) == Layout.parse(text)


def test_types_and_their_gradients() -> None:
    assert [kind.gradient for kind in (R, I, P, S(1), S(0, 3))] == [P, I, R, S(1), S(0, 3)]
    assert str(S(0, BATCH)) == "S(0, b)"
    assert SpmdType.parse("S(2, 3)") == S(2, 3)
    assert SpmdType.parse("S(0, b)").blocks == Size.parse("b")
    with pytest.raises(ValueError, match="not an SPMD type"):
        SpmdType("Q")
    with pytest.raises(ValueError, match="not an SPMD type"):
        SpmdType("R", 0)


def test_order_matters_only_on_one_dim() -> None:
    assert same(Layout.of(cp=S(0), tp=S(1)), Layout.of(tp=S(1), cp=S(0)))
    assert not same(Layout.of(cp=S(0), tp=S(0)), Layout.of(tp=S(0), cp=S(0)))
    assert same(Layout(), Layout.of(tp=I))
    assert Layout.of(cp=S(1), tp=S(1)).splits(1) == ("cp", "tp")
    assert Layout.of(cp=S(1), tp=R).with_type("cp", S(0)).types == (("tp", R), ("cp", S(0)))


def test_local_shapes() -> None:
    axes = {"cp": 2, "tp": 4}
    assert local_shape((8, 16, 32), Layout.of(cp=S(1), tp=S(2)), axes) == (8, 8, 8)
    assert local_shape((8, 16), Layout.of(cp=S(1), tp=S(1)), axes) == (8, 2)
    assert local_shape((8, 16), Layout.of(cp=P, tp=R), axes) == (8, 16)
    with pytest.raises(VerificationError, match=r"\(8, 6\) does not divide as cp:I tp:S\(1\)"):
        local_shape((8, 6), Layout.of(cp=I, tp=S(1)), axes)


def test_ranks_count_from_the_outermost_axis() -> None:
    assert coordinates({"cp": 2, "tp": 2}) == [
        {"cp": 0, "tp": 0},
        {"cp": 0, "tp": 1},
        {"cp": 1, "tp": 0},
        {"cp": 1, "tp": 1},
    ]
    x = torch.arange(8)
    rows = [part.tolist() for part in shard(x, Layout.of(cp=S(0), tp=S(0)), {"cp": 2, "tp": 2})]
    assert rows == [[0, 1], [2, 3], [4, 5], [6, 7]]
    rows = [part.tolist() for part in shard(x, Layout.of(tp=S(0), cp=S(0)), {"cp": 2, "tp": 2})]
    assert rows == [[0, 1], [4, 5], [2, 3], [6, 7]]


def test_blocks_take_a_slice_of_each() -> None:
    x = torch.arange(12)
    assert [part.tolist() for part in cut(x, 0, 3, 2)] == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]
    assert torch.equal(join(cut(x, 0, 3, 2), 0, 3), x)
    with pytest.raises(VerificationError, match="does not divide by 4"):
        cut(torch.zeros(2, 6), 1, 1, 4)


def test_blocks_cut_by_an_outer_axis_are_counted_locally() -> None:
    layout = Layout.of(cp=S(0), tp=S(0, 6))
    assert blocks_at(layout, "tp", {"cp": 2, "tp": 2}, 1, 1) == S(0, 3)
    assert blocks_at(Layout.of(cp=S(0, 6), tp=S(0)), "tp", {"cp": 2, "tp": 2}, 1, 1) == S(0)
    assert blocks_at(Layout.of(tp=S(0, BATCH)), "tp", {"tp": 2}, 4, 8) == S(0, 4)
    with pytest.raises(VerificationError, match="cut by axes outside"):
        blocks_at(Layout.of(cp=S(0), tp=S(0, 3)), "tp", {"cp": 2, "tp": 2}, 1, 1)


@pytest.mark.parametrize(
    "layout", ["cp:S(0) tp:S(0)", "tp:S(1) cp:P", "cp:R tp:S(1, 3)", "cp:P tp:P", "cp:S(1, 3) tp:I"]
)
def test_shards_join_to_the_whole(layout: str) -> None:
    axes, x = {"cp": 2, "tp": 2}, torch.arange(96.0).reshape(8, 12)
    parts = shard(x, Layout.parse(layout), axes, generator=torch.Generator().manual_seed(0))
    assert len(parts) == 4
    assert torch.equal(unshard(parts, Layout.parse(layout), axes), x)


def test_arguments_are_localised_where_they_tell_split_sizes() -> None:
    x = Ref("x")

    def local(op: str, args: tuple, shape: tuple, layout: Layout, **kwargs):  # type: ignore[no-untyped-def]
        node = Node("y", "op", TensorMeta(shape), op, args, kwargs)
        return localize(node, layout, {"tp": 2}, batch=4, seq=8)[0]

    assert local("aten.view", (x, (BATCH, SEQ, 32, 128)), (BATCH, SEQ, 32, 128), Layout.of(tp=S(2)))[1] == (
        4,
        8,
        16,
        128,
    )
    assert local("aten.view", (x, (BATCH, -1)), (BATCH, SEQ * 2), Layout.of(tp=S(1)))[1] == (4, 8)
    assert local("aten.unflatten", (x, 2, (32, 128)), (BATCH, SEQ, 32, 128), Layout.of(tp=S(2)))[2] == (16, 128)
    assert local("aten.unflatten", (x, 2, (-1, 128)), (BATCH, SEQ, 32, 128), Layout.of(tp=S(3)))[2] == (32, 64)
    assert local("aten.slice", (x, 2, 768, 1536), (BATCH, SEQ, 768), Layout.of(tp=S(2)))[1:] == (2, 384, 768)
    assert local("aten.slice", (x, 1, 0, SEQ - 1), (BATCH, SEQ - 1, 6), Layout.of(tp=S(2)))[1:] == (1, 0, 7)
    assert local("aten.expand", (x, (BATCH, 8, 4, SEQ)), (BATCH, 8, 4, SEQ), Layout.of(tp=S(1)))[1] == (4, 4, 4, 8)
    assert local("aten.rms_norm", (x, (64,), Ref("w"), 1e-5), (BATCH, SEQ, 64), Layout.of(tp=S(1)))[1] == (64,)


def test_parts_are_chunks_of_the_size_rounded_up() -> None:
    assert [part_of(10, [(4, index)]) for index in range(4)] == [(0, 3), (3, 3), (6, 3), (9, 1)]
    cuts = [part_of(11, [(2, outer), (2, inner)]) for outer in range(2) for inner in range(2)]
    assert cuts == [(0, 3), (3, 3), (6, 3), (9, 2)], "the inner axis cuts what the outer one left"
    assert (least_part(10, (4,)), least_part(11, (2, 2)), least_part(9, (8,))) == (1, 2, 0)
    assert local_shape((8, 10), Layout.of(tp=S(1)), {"tp": 4}) == (8, 3), "the first rank's, the largest"
    x = torch.arange(10)
    parts = shard(x, Layout.of(tp=S(0)), {"tp": 4})
    assert [part.tolist() for part in parts] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert torch.equal(unshard(parts, Layout.of(tp=S(0)), {"tp": 4}), x)


def test_the_context_axis_is_outermost_on_the_sequence_and_innermost_elsewhere() -> None:
    graph = attention_block()
    known = {s.name: s for s in strategies_of(graph.nodes["attention"], graph)}
    by_position = {"cp": known["q"], "tp": known["h"]}
    assert split_order(by_position) == ("cp", "tp")
    by_heads = {"cp": known["h"], "tp": known["h"]}
    assert split_order(by_heads) == ("tp", "cp")
    (query, *_), out = produced_layouts(graph.nodes["attention"], by_heads)
    assert str(query) == str(out) == "tp:S(1) cp:S(1)"
    shape = graph.nodes["attention"].meta.shape
    assert standard({"cp": S(1), "tp": S(1)}, shape) == out
    assert str(standard({"cp": S(2), "tp": S(2)}, shape)) == "cp:S(2) tp:S(2)"


def test_blocks_that_outer_axes_took_apart_are_no_blocks() -> None:
    graph = attention_block(heads=8, kv_heads=2)
    known = {s.name: s for s in strategies_of(graph.nodes["attention"], graph)}
    assert known["g"].inputs[0] == S(1, 2)
    choice = settled({"tp0": known["h"], "tp1": known["g"]}, {"tp0": 2, "tp1": 4})
    assert choice["tp1"].inputs == (S(1), R, R)
    assert choice["tp1"].name == "g"
    assert settled({"tp": known["g"]}, {"tp": 4})["tp"].inputs[0] == S(1, 2), "two whole groups are left to split"
