"""Rules print as annotation strings; strategies follow from them."""

from __future__ import annotations

import pytest
from rule_examples import Build, attention_block

from autopar.errors import UnsupportedError
from autopar.graph.ir import OpGraph, Ref
from autopar.graph.size import BATCH, SEQ
from autopar.sharding.factors import Annotation, Mismatch
from autopar.sharding.layout import I, S
from autopar.sharding.rules import blocks_of, divides, has_rule, rule_of, strategies_of, strategy_of
from autopar.sharding.rules.shapes import reshape_rule


def one(op: str, *args, out: str, shapes: dict[str, str], dtypes: dict[str, str] | None = None, **kwargs) -> OpGraph:  # type: ignore[no-untyped-def]
    """A graph of one operator, called "out"; string arguments that name a shape are its tensors."""
    g = Build()
    for name, text in shapes.items():
        g.leaf(name, text, dtype=(dtypes or {}).get(name, "compute"))

    def place(value):  # type: ignore[no-untyped-def]
        if isinstance(value, tuple):
            return tuple(place(item) for item in value)
        return Ref(value) if isinstance(value, str) and value in shapes else value

    return g.graph(g.op(op, *map(place, args), out=out, name="out", **{k: place(v) for k, v in kwargs.items()}))


def text(op: str, *args, out: str, **shapes: str) -> str:  # type: ignore[no-untyped-def]
    graph = one(op, *args, out=out, shapes=shapes)
    rule = rule_of(graph.nodes["out"], graph)
    return str(rule) if rule else "no rule"


def ring_of(*call, out: str, **shapes: str) -> list[str]:  # type: ignore[no-untyped-def]
    """The strategies of a call whose keys and values go round."""
    graph = one(*call, out=out, shapes=shapes)
    return [str(s) for s in strategies_of(graph.nodes["out"], graph) if s.is_ring]


def test_products() -> None:
    assert text("aten.mm", "x", "w", x="4 8", w="8 12", out="4 12") == "i k+, k+ j -> i j"
    linear = {"x": "b s 4096", "w": "14336 4096", "out": "b s 14336"}
    assert text("aten.linear", "x", "w", **linear) == "b s k+, n k+ -> b s n"
    assert text("aten.linear", "x", "w", "c", c="14336", **linear) == "b s k+, n k+, n -> b s n"
    assert text("aten.addmm", "c", "x", "w", c="12", x="b*s 8", w="8 12", out="b*s 12") == "n, i k+, k+ n -> i n"
    assert (
        text("aten.matmul", "x", "w", x="b 32 s 128", w="b 32 128 s", out="b 32 s s") == "b d i k+, b d k+ j -> b d i j"
    )
    assert text("aten.matmul", "x", "w", x="b s 8", w="1 8 4", out="b s 4") == "b i k+, 1 k+ j -> b i j"
    assert (
        text("aten.einsum", "bqd,bkd->bqk", ("x", "w"), x="b 8 4", w="b 6 4", out="b 8 6") == "b q d+, b k d+ -> b q k"
    )


def test_attention() -> None:
    q, kv = {"q": "b 32 s 128", "out": "b 32 s 128"}, {"k": "b 8 s 128", "v": "b 8 s 128"}
    causal = ("aten.scaled_dot_product_attention", "q", "k", "v", None, 0.0, True)
    assert text(*causal, **q, **kv) == "b (h g) q d^, b h k^ d^, b h k^ e^ -> b (h g) q e^"
    assert text(*causal, **q, k=q["q"], v=q["q"]) == "b h q d^, b h k^ d^, b h k^ e^ -> b h q e^"
    graph = one(*causal, out=q["out"], shapes={"q": q["q"], **kv})
    by_position = [s for s in strategies_of(graph.nodes["out"], graph) if s.by_sequence]
    assert [str(s) for s in by_position] == [
        "q: S(2), R, R -> S(2) [context]",
        "ring: S(2), S(2), S(2) -> S(2) [causal ring]",
    ], "each rank reads all keys and values, which are there or come round"
    assert ring_of(*causal[:4], 0.1, True, **q, **kv) == ring_of(*causal[:4], "m", m="b 1 s s", **q, **kv) == []
    assert ring_of(*causal[:4], **q, **kv) == ["ring: S(2), S(2), S(2) -> S(2) [ring]"]
    assert ring_of(*causal[:4], q=q["q"], k="b 8 s 128", v="b 8 s 64", out="b 32 s 64") == []  # of one width alone
    assert ring_of(*causal[:4], q=q["q"], k="b 8 77 128", v="b 8 77 128", out=q["q"]) == []
    free = text("aten.scaled_dot_product_attention", "q", "k", "v", "m", m="b 1 s s", **q, **kv)
    assert free == "b (h g) q d^, b h k^ d^, b h k^ e^, b 1 q k^ -> b (h g) q e^"
    assert (
        text("autopar.rotary", "q", "c", "n", **q, c="1 s 128", n="1 s 128") == "b h s d^, 1 s d^, 1 s d^ -> b h s d^"
    )


def test_norms_and_reductions() -> None:
    x = {"x": "b s 4096"}
    assert text("aten.rms_norm", "x", (4096,), "w", w="4096", out="b s 4096", **x) == "b s d^, d^ -> b s d^"
    assert text("aten.layer_norm", "x", (4096,), "w", "c", w="4096", c="4096", out="b s 4096", **x) == (
        "b s d^, d^, d^ -> b s d^"
    )
    assert text("aten.sum", "x", (1,), out="b 4096", **x) == "b s+ d -> b d"
    assert text("aten.sum", "x", out="", **x) == "b+ s+ d+ -> ()"
    assert text("aten.mean", "x", (2,), True, out="b s 1", **x) == "b s d^ -> b s 1"
    assert text("aten.softmax", "x", 2, out="b s 4096", **x) == "b s d^ -> b s d^"
    assert text("aten.cumsum", "x", 1, out="b s 4096", **x) == "b s^ d -> b s^ d"


def test_elementwise_broadcasts() -> None:
    assert text("aten.add", "x", "y", x="b s 8", y="s 1", out="b s 8") == "b s d, s 1 -> b s d"
    assert text("aten.silu", "x", x="b s 8", out="b s 8") == "b s d -> b s d"
    assert text("aten.where", "c", "x", "y", c="s s", x="b 4 s s", y="", out="b 4 s s") == "d s, b h d s, () -> b h d s"


def test_shapes_are_computed() -> None:
    assert text("aten.unflatten", "x", 2, (32, 128), x="b s 4096", out="b s 32 128") == "b s (h d) -> b s h d"
    assert text("aten.flatten", "x", 0, 1, x="b s 4096", out="b*s 4096") == "b s d -> (b s) d"
    assert text("aten.view", "x", (BATCH, SEQ, 8, 4), x="b*s 32", out="b s 8 4") == "(b s) (h d) -> b s h d"
    assert text("aten.transpose", "x", 1, 2, x="b s 32 128", out="b 32 s 128") == "b s h d -> b h s d"
    assert text("aten.t", "x", x="8 4", out="4 8") == "h d -> d h"
    assert text("aten.expand", "x", (), x="b 8 1 s 128", out="b 8 4 s 128") == "b e 1 s d -> b e h^ s d"
    assert text("aten.slice", "x", 2, 768, 1536, x="b s 2304", out="b s 768") == "b s (h^ d) -> b s d"
    assert text("aten.slice", "x", 1, 0, SEQ - 1, x="b s 8", out="b s-1 8") == "b s^ d -> b h^ d"
    assert text("aten.cat", ("x", "y"), 2, x="b s 64", y="b s 64", out="b s 128") == "b s d, b s d -> b s (h^ d)"
    assert text("aten.cat", ("x", "y"), 2, x="b s 64", y="b s 32", out="b s 96") == "b s h^, b s e^ -> b s f^"
    assert text("aten.select", "x", 1, 0, x="b s 8", out="b 8") == "b s^ d -> b d"
    assert text("aten.unsqueeze", "x", 1, x="b s", out="b 1 s") == "b s -> b 1 s"


def test_reshapes_that_share_no_factor_stay_whole() -> None:
    assert str(reshape_rule((12, 8), (8, 12))) == "(g f^) e^ -> (g h^) d^", "4 is common, 3 and 2 are not"
    assert str(reshape_rule((3, 4), (4, 3))).count("^") == 4
    assert str(reshape_rule((BATCH, 3, 4), (BATCH, 4, 3))).startswith("b ")
    assert reshape_rule((BATCH, SEQ - 1), (BATCH * (SEQ - 1),)).splittable() == ("b", "d")


def test_unusual_sizes_and_arguments_stay_whole() -> None:
    assert reshape_rule((4, 0), (0, 2)).splittable() == ()
    assert text("aten.slice", "x", 1, -4, None, x="b 16", out="b 4") == "b d^ -> b h^"
    padded = one("aten.embedding", "w", "i", 0, shapes={"w": "12 8", "i": "b s"}, dtypes={"i": "int64"}, out="b s 8")
    names = [strategy.name for strategy in strategies_of(padded.nodes["out"], padded)]
    assert names == ["R", "I", "v", "d", "b", "s"], "a padding row has no gradient, on the rank that holds it"


def test_look_ups_and_loss() -> None:
    graph = one(
        "aten.embedding", "w", "i", shapes={"w": "128256 4096", "i": "b s"}, dtypes={"i": "int64"}, out="b s 4096"
    )
    node = graph.nodes["out"]
    assert str(rule_of(node, graph)) == "v+ d, b s -> b s d"
    assert str(strategy_of(node, graph, "v")) == "v: S(0), R -> P [vocab]"
    loss = one("autopar.cross_entropy", "x", "i", shapes={"x": "b s 128256", "i": "b s"}, dtypes={"i": "int64"}, out="")
    node = loss.nodes["out"]
    assert str(rule_of(node, loss)) == "b+ s+ v, b+ s+ -> ()"
    split = strategy_of(node, loss, "v")
    assert str(split) == "v: S(2), R -> I [vocab]"
    assert [(inner.collective, inner.shape, inner.dtype) for inner in split.inner] == [
        ("all_reduce", (BATCH, SEQ), "float32")
    ] * 3
    assert str(strategy_of(node, loss, "s")) == "s: S(1), S(1) -> P"


def test_strategies_of_a_linear_layer_with_bias() -> None:
    graph = one("aten.linear", "x", "w", "c", shapes={"x": "b s 16", "w": "8 16", "c": "8"}, out="b s 8")
    assert [str(strategy) for strategy in strategies_of(graph.nodes["out"], graph)] == [
        "R: R, R, R -> R",
        "I: I, I, I -> I",
        "b: S(0), R, R -> S(0)",
        "s: S(1), R, R -> S(1)",
        "k: S(2), S(1), P -> P",
        "n: R, S(0), S(0) -> S(2)",
    ]


def test_nonlinear_operators_pass_no_partial_sums() -> None:
    def partial(*args, **kwargs) -> list[str]:  # type: ignore[no-untyped-def]
        graph = one(*args, **kwargs)
        return [str(s) for s in strategies_of(graph.nodes["out"], graph) if s.name.startswith("P")]

    x, xy = {"x": "4 8"}, {"x": "4 8", "y": "4 8"}
    assert partial("aten.silu", "x", shapes=x, out="4 8") == []
    assert partial("aten.add", "x", 1.0, shapes=x, out="4 8") == []
    assert partial("aten.add", "x", "y", shapes=xy, out="4 8") == ["P: P, P -> P"]
    assert partial("aten.mul", "x", "y", shapes=xy, out="4 8") == ["P0: P, R -> P", "P1: R, P -> P"]
    assert partial("aten.div", "x", "y", shapes=xy, out="4 8") == ["P: P, R -> P"]
    assert partial("aten.div", 2.0, "x", shapes=x, out="4 8") == []
    assert partial("autopar.cast", "x", "int64", shapes=x, out="4 8") == []
    assert partial("aten.mean", "x", (1,), shapes=x, out="4") == ["P: P -> P"]
    assert partial("aten.dropout", "x", 0.1, True, shapes=x, out="4 8") == []
    assert partial("aten.masked_fill", "x", "y", -1.0, shapes=xy, out="4 8") == []


def test_divisibility_is_that_of_the_factor_not_of_the_dim() -> None:
    graph = one("aten.unflatten", "x", 2, (6, 128), shapes={"x": "b s 768"}, out="b s 6 128")
    node = graph.nodes["out"]
    heads = strategy_of(node, graph, "h")
    assert heads.inputs == (S(2),)
    assert divides(node, graph, heads, 2, batch=1, seq=16)
    assert not divides(node, graph, heads, 4, batch=1, seq=16), "768 divides by 4, 6 heads do not"
    assert not divides(node, graph, strategy_of(node, graph, "b"), 2, batch=1, seq=16)
    assert divides(node, graph, strategy_of(node, graph, "s"), 8, batch=1, seq=16)
    with pytest.raises(UnsupportedError, match="no strategy 'z'; it has R, I, b"):
        strategy_of(node, graph, "z")


def test_operator_without_rule_runs_replicated() -> None:
    graph = one("aten.cumulative_trapezoid", "x", shapes={"x": "b 8"}, out="b 8")
    assert not has_rule(graph.nodes["out"], graph)
    assert rule_of(graph.nodes["out"], graph) is None
    assert [strategy.name for strategy in strategies_of(graph.nodes["out"], graph)] == ["R", "I"]


def test_without_gradient_there_is_no_invariant_strategy() -> None:
    graph = one("aten.eq", "x", 3, shapes={"x": "b s"}, dtypes={"x": "int64"}, out="b s")
    assert [strategy.name for strategy in strategies_of(graph.nodes["out"], graph)] == ["R", "b", "s"]


def test_blocks_spread_from_a_fused_projection_to_its_producer() -> None:
    g = Build()
    x, w, c = g.leaf("x", "b s 768"), g.leaf("w", "2304 768", "parameter"), g.leaf("c", "2304", "parameter")
    qkv = g.op("aten.linear", x, w, c, out="b s 2304", name="qkv")
    qkv = g.op("aten.dropout", qkv, 0.1, True, out="b s 2304", name="drop")
    part = g.op("aten.slice", qkv, 2, 768, 1536, out="b s 768", name="part")
    graph = g.graph(g.op("aten.unflatten", part, 2, (12, 64), out="b s 12 64", name="heads"))
    assert str(strategy_of(graph.nodes["part"], graph, "d")) == "d: S(2, 3) -> S(2)"
    assert str(strategy_of(graph.nodes["qkv"], graph, "n/3")) == "n/3: R, S(0, 3), S(0, 3) -> S(2, 3)"
    assert str(strategy_of(graph.nodes["drop"], graph, "d/3")) == "d/3: S(2, 3) -> S(2, 3)"
    assert str(strategy_of(graph.nodes["heads"], graph, "h")) == "h: S(2) -> S(2)"
    assert strategy_of(graph.nodes["qkv"], graph, "n/3").extent == 768
    assert 3 in blocks_of(graph, "w", 0)


def test_blocks_may_be_symbolic() -> None:
    graph = one("aten.flatten", "x", 0, 1, shapes={"x": "b s 16"}, out="b*s 16")
    assert str(strategy_of(graph.nodes["out"], graph, "s")) == "s: S(1) -> S(0, b)"


def test_attention_block_heads_follow_through() -> None:
    graph = attention_block()
    heads = {
        name: next(s.name for s in strategies_of(graph.nodes[name], graph) if s.output == out)
        for name, out in (("q_heads", S(2)), ("q_t", S(1)), ("q_rotary", S(1)), ("merge_t", S(2)), ("merge", S(2)))
    }
    assert set(heads.values()) == {"h"}
    assert strategy_of(graph.nodes["attention"], graph, "g").inputs[0] == S(1, 2)
    assert strategy_of(graph.nodes["norm1"], graph, "I").inputs == (I, I)


def test_annotations_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(ValueError, match="no '->'"):
        Annotation.parse("a b, c")
    with pytest.raises(ValueError, match="cannot read '&'"):
        Annotation.parse("a & -> a")
    with pytest.raises(ValueError, match=r"marks k both \+ and \^"):
        Annotation.parse("a k+, k^ -> a")
    with pytest.raises(Mismatch, match="has 3 dims, not 2"):
        Annotation.parse("i k+, k+ j -> i j").bind([(2, 3, 4), (4, 5)], (2, 5))
    with pytest.raises(Mismatch, match="has size 5, not 4"):
        Annotation.parse("i k+, k+ j -> i j").bind([(3, 4), (5, 6)], (3, 6))
    assert Annotation.parse("... (h g) q^ d^ -> ()").sums == frozenset()
