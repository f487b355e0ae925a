"""Decisions are checked end to end; the batch is checked to be splittable."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rule_examples import Build, attention_block

from autopar.errors import UnsupportedError, VerificationError
from autopar.graph.ir import Block, BlockKind, ModelGraph, OpGraph, Source
from autopar.sharding.check import check_decision
from autopar.sharding.data_parallel import check_data_parallel, samples_mixed
from autopar.sharding.decision import BlockDecision, Conversion
from autopar.sharding.execute import run_local
from autopar.sharding.layout import I, Layout, P, R, S, SpmdType
from autopar.sharding.rules import strategies_of


def on(kind: SpmdType) -> Layout:
    return Layout.of(tp=kind)


def sequence_parallel() -> tuple[BlockKind, BlockDecision]:
    """A decoder layer split column then row, norms and residual on the split sequence, norm weights invariant."""
    graph = attention_block()
    column, row, sequence = ("q", "k", "v", "gate", "up"), ("o", "down"), ("norm1", "norm2", "residual1", "residual2")
    outputs = {name: S(2) for name in ("q_heads", "k_heads", "v_heads", "merge_t", "merge", "silu", "mul", *column)}
    outputs |= {name: S(1) for name in ("q_t", "k_t", "v_t", "q_rotary", "k_rotary", "attention", *sequence)}
    outputs |= dict.fromkeys(row, P)
    names = {}
    for node in graph.of("op"):
        names[node.name] = next(
            strategy.name
            for strategy in strategies_of(node, graph)
            if strategy.output == outputs[node.name] and not strategy.name.startswith("P")
        )
    inputs = {f"{name}_proj": on(S(0)) for name in column} | {f"{name}_proj": on(S(1)) for name in row}
    inputs |= {"x": on(S(1)), "cos": on(R), "sin": on(R), "input_norm": on(I), "post_norm": on(I)}
    moves = [("input_norm", I, R), ("norm1", S(1), R), ("o", P, S(1)), ("post_norm", I, R), ("norm2", S(1), R)]
    conversions = tuple(Conversion(name, on(a), on(b)) for name, a, b in [*moves, ("down", P, S(1))])
    strategies = {name: {"tp": choice} for name, choice in names.items()}
    kind = BlockKind("LlamaDecoderLayer", graph)
    return kind, BlockDecision(kind.name, {"tp": 2}, inputs, strategies, conversions, {"residual2": on(S(1))})


def test_a_whole_decision_passes_and_tells_what_is_produced() -> None:
    kind, decision = sequence_parallel()
    produced = check_decision(kind, decision, batch=1, seq=8)
    assert {name: str(produced[name]["tp"]) for name in ("x", "q", "attention", "o", "residual1", "down")} == {
        "x": "S(1)",
        "q": "S(2)",
        "attention": "S(1)",
        "o": "P",
        "residual1": "S(1)",
        "down": "P",
    }
    assert check_decision(kind, BlockDecision.from_json(decision.to_json())) == produced


def refuse(match: str, batch: int | None = None, seq: int | None = None, **changes: object) -> None:
    kind, decision = sequence_parallel()
    with pytest.raises(VerificationError, match=match):
        check_decision(kind, replace(decision, **changes), batch, seq)  # type: ignore[arg-type]


def test_what_is_missing_or_wrong_is_named() -> None:
    _, good = sequence_parallel()
    without = tuple(c for c in good.conversions if c.tensor != "norm1")
    refuse(
        r"LlamaDecoderLayer: q \(aten.linear\) needs norm1 as tp:R, which is held as tp:S\(1\) only",
        conversions=without,
    )
    from_nothing = (*good.conversions, Conversion("q", on(R), on(S(1))))
    refuse(r"q is converted from tp:R to tp:S\(1\), but is held as tp:S\(2\) only", conversions=from_nothing)
    refuse(
        "speaks of nodes that are not there: ghost", conversions=(*good.conversions, Conversion("ghost", on(R), on(P)))
    )
    refuse(r"q \(aten.linear\) has strategy 'zz' on axis tp", strategies={**good.strategies, "q": {"tp": "zz"}})
    refuse(r"q \(aten.linear\) has strategy None on axis tp", strategies={**good.strategies, "q": {}})
    refuse("parameter q_proj is stored as R on tp; only I and S", inputs={**good.inputs, "q_proj": on(R)})
    refuse("no layout is given for input x", inputs={n: layout for n, layout in good.inputs.items() if n != "x"})
    refuse(r"output residual2 leaves as tp:R, held as tp:S\(1\) only", outputs={"residual2": on(R)})
    refuse("no layout is given for output residual2", outputs={})
    refuse(r"x has a layout on axis cp", inputs={**good.inputs, "x": Layout.of(cp=R)})


def test_splits_must_be_even() -> None:
    _, good = sequence_parallel()
    refuse(r"k_heads .* splits factor h of size 2 over 4 ranks", axes={"tp": 4})
    refuse(r"x \[b, s, 16\] cannot be held as tp:S\(1\)", batch=1, seq=7)
    kind, _ = sequence_parallel()
    assert check_decision(kind, good)["x"] == on(S(1)), "without batch and seq, symbolic sizes are taken on trust"


def test_constants_without_gradient_may_be_read_as_either_replicated_type() -> None:
    kind, good = sequence_parallel()
    assert check_decision(kind, replace(good, inputs={**good.inputs, "cos": on(I), "sin": on(I)}))


def test_one_rank_runs_on_fake_tensors_with_local_shapes() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    kind, decision = sequence_parallel()
    shapes = {"x": (1, 4, 16), "q_proj": (8, 16), "k_proj": (4, 16), "v_proj": (4, 16), "o_proj": (16, 8)}
    shapes |= {
        "gate_proj": (16, 16),
        "up_proj": (16, 16),
        "down_proj": (16, 16),
        "input_norm": (16,),
        "post_norm": (16,),
    }
    with FakeTensorMode():
        values = {name: torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for name, shape in shapes.items()}
        values |= {name: torch.zeros(1, 1, 8, 4, dtype=torch.bfloat16) for name in ("cos", "sin")}
        (out,) = run_local(kind, decision, values, batch=1, seq=8)
        saved: list[tuple[int, ...]] = []
        assert tuple(out.shape) == (1, 4, 16)
        out.sum().backward()
        assert all(values[name].grad.shape == torch.Size(shape) for name, shape in shapes.items())
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(tuple(x.shape)), lambda _: None):
            run_local(kind, decision, values, batch=1, seq=8)
    assert (1, 8, 16) in saved, "the gathered input of the column-split matmuls is what they save"


def model(body, loss) -> ModelGraph:  # type: ignore[no-untyped-def]
    """A model of two blocks: ``body`` maps tokens to hidden, ``loss`` hidden and labels to the loss."""
    first, last = Build(), Build()
    ids = first.leaf("ids", "b s", dtype="int64")
    table = first.leaf("table", "32 16", "parameter")
    x = body(first, first.op("aten.embedding", table, ids, out="b s 16", name="look_up"))
    hidden, labels = last.leaf("hidden", "b s 16"), last.leaf("labels", "b s", dtype="int64")
    out = loss(last, hidden, labels)
    count = Build()
    valid = count.op("aten.ne", count.leaf("labels", "b s", dtype="int64"), -100, out="b s", dtype="bool")
    count_graph = count.graph(count.op("aten.sum", valid, out="", dtype="int64"))
    kinds = {"Body": BlockKind("Body", first.graph(x)), "Loss": BlockKind("Loss", last.graph(out))}
    blocks = (
        Block("Body", "body", {"ids": Source("batch", key="input_ids")}, {"table": "table"}),
        Block("Loss", "", {"hidden": Source("block", 0, 0), "labels": Source("batch", key="labels")}, {}),
    )
    metas = dict.fromkeys(("input_ids", "labels"), first.nodes["ids"].meta)
    return ModelGraph("toy", kinds, blocks, OpGraph({}, ()), count_graph, metas, {}, {})


def summed_loss(g: Build, hidden, labels):  # type: ignore[no-untyped-def]
    return g.op("autopar.cross_entropy", hidden, labels, out="", name="loss")


def test_data_parallel_accepts_independent_samples_and_a_summed_loss() -> None:
    check_data_parallel(model(lambda g, x: g.op("aten.silu", x, out="b s 16"), summed_loss))

    def cast_loss(g: Build, hidden, labels):  # type: ignore[no-untyped-def]
        return g.op("autopar.cast", summed_loss(g, hidden, labels), "float32", out="", dtype="float32", name="cast")

    check_data_parallel(model(lambda g, x: x, cast_loss))


def test_data_parallel_names_the_operator_that_mixes_samples() -> None:
    with pytest.raises(UnsupportedError, match=r"aten.cumsum \(mix\) mixes the samples of a micro-batch"):
        check_data_parallel(
            model(lambda g, x: g.op("aten.cumsum", x, 0, out="b s 16", name="mix"), summed_loss), micro_batch=False
        )
    with pytest.raises(UnsupportedError, match=r"aten.cumulative_trapezoid \(whole\) mixes samples"):
        check_data_parallel(
            model(lambda g, x: g.op("aten.cumulative_trapezoid", x, out="b s 16", name="whole"), summed_loss),
            micro_batch=False,
        )


def test_samples_may_be_mixed_within_a_micro_batch_of_given_size() -> None:
    mixing = model(lambda g, x: g.op("aten.cumsum", x, 0, out="b s 16", name="mix"), summed_loss)
    assert samples_mixed(mixing) == ("toy, body: aten.cumsum (mix)",)
    check_data_parallel(mixing, micro_batch=True)


def test_data_parallel_refuses_a_loss_that_is_not_a_sum() -> None:
    def mean_loss(g: Build, hidden, labels):  # type: ignore[no-untyped-def]
        return g.op("aten.mean", hidden, out="", name="mean")

    with pytest.raises(UnsupportedError, match=r"aten.mean \(mean\) mixes the samples of a micro-batch"):
        check_data_parallel(model(lambda g, x: x, mean_loss))

    def no_loss(g: Build, hidden, labels):  # type: ignore[no-untyped-def]
        return g.op("aten.silu", hidden, out="b s 16", name="out")

    with pytest.raises(UnsupportedError, match=r"the loss is not a sum over samples"):
        check_data_parallel(model(lambda g, x: x, no_loss))
