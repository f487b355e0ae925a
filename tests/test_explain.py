"""Why a plan is as it is: forced strategies priced anew, reasons that name what does not divide or fit, names."""

from __future__ import annotations

import dataclasses
import re

import pytest
from dense_decoder import decoder
from explained import JOB, PAIR, holding, small, split_plan

from autopar.errors import BadInputError
from autopar.job import Job
from autopar.plan import Plan, Run
from autopar.report.explain_block import explain_block
from autopar.report.explain_op import OperatorAnswer, StrategyAnswer, explain_operator
from autopar.report.explain_text import block_text, operator_text
from autopar.report.find import find_kind, find_operator
from autopar.report.text import recompute_text
from autopar.report.why_not import why_not
from autopar.sharding.check import check_decision
from autopar.sharding.rules import strategies_of
from autopar.sharding.rules.blocks import graph_blocks
from autopar.solver.decision_costs import decision_price
from autopar.solver.decisions import decisions_of
from autopar.solver.forced import question_of
from autopar.solver.search import search


@pytest.fixture(scope="module")
def split() -> Plan:
    return split_plan()


@pytest.fixture(scope="module")
def residual(split: Plan) -> OperatorAnswer:
    return explain_operator(split, small(), "Layer/residual1")


def by_name(answer: OperatorAnswer, name: str) -> StrategyAnswer:
    return next(one for one in answer.strategies if one.splits == {"tp": name})


def test_every_strategy_has_a_verdict(residual: OperatorAnswer):
    model = small()
    node = model.kinds["Layer"].graph.nodes["residual1"]
    names = {strategy.name for strategy in strategies_of(node, model.kinds["Layer"].graph)}
    assert {one.splits["tp"] for one in residual.strategies} == names
    assert residual.optimal
    assert residual.blocks == 2
    assert [one.verdict for one in residual.strategies].count("chosen") == 1
    for one in residual.strategies:
        if one.together is not None:
            whole, tie = one.together, 1e-6 * residual.whole_s
            assert whole.seconds >= -tie, "the plan's own is the best"
            assert (one.verdict == "tie") == (whole.seconds <= tie)
            assert one.verdict.startswith("cheaper alone") == (one.alone_s < residual.chosen.alone_s - 1e-12) or (
                one.verdict == "tie"
            )
            parts = whole.operator + whole.others + whole.conversions + whole.weights
            assert whole.seconds == pytest.approx(parts, abs=1e-15)


def test_a_dearer_strategy_costs_what_the_decision_with_it_is_priced_at(split: Plan, residual: OperatorAnswer):
    """The decision that the ILP found with the strategy held is checked, and priced operator by operator."""
    model = small()
    question = question_of(split, model, "Layer")
    shardings = question.shardings

    def seconds(decisions) -> float:
        for name, decision in decisions.items():
            check_decision(model.kinds[name], decision, split.micro_batch, JOB.seq_len)
        counts = shardings.context.counts
        return sum(
            counts[name] * decision_price(model.kinds[name], decision, shardings.prices)[0].seconds
            for name, decision in decisions.items()
        )

    own = {candidate.decision.kind: candidate.decision for candidate in split.candidates.values()}
    tested = 0
    for index, choice in enumerate(question.built.choices["Layer/residual1"]):
        name = choice["tp"].name
        answer = question.held("Layer/residual1", index)
        forced = decisions_of(model, question.built, answer)
        assert forced["Layer"].strategies["residual1"] == {"tp": name}
        told = by_name(residual, name)
        if told.together is not None:
            more = seconds(forced) - seconds(own)
            assert more == pytest.approx(told.together.seconds - told.together.weights, rel=1e-6, abs=1e-12)
            moves = sum(c.tensor == tensor for c in forced["Layer"].conversions for tensor, _ in told.together.more)
            assert not told.together.more or moves
            tested += told.verdict not in ("chosen", "tie")
    assert tested >= 3


def test_cheaper_alone_but_dearer_together_pays_in_conversions(residual: OperatorAnswer):
    found = [one for one in residual.strategies if one.verdict == "cheaper alone but dearer together"]
    assert found
    for one in found:
        assert one.alone_s < residual.chosen.alone_s
        assert one.together.seconds > 0
        assert one.together.operator < 0
        assert one.together.others + one.together.conversions + one.together.weights > -one.together.operator


def test_what_does_not_divide_names_the_extent_and_the_axis(split: Plan):
    answer = explain_operator(split, small(), "k_heads")
    told = by_name(answer, "h")
    assert told.verdict == "unavailable"
    assert re.fullmatch(r"splits factor h of size 4 over 8 ranks \(tp\): does not divide", told.reason)
    assert by_name(answer, "b").reason == "splits factor b of size b = 1 over 8 ranks (tp): does not divide"
    assert told.reason in operator_text(answer).replace("\n    ", " ")


def test_what_a_fix_rules_out_says_so(split: Plan):
    told = by_name(explain_operator(split, small(), "gate"), "s")
    assert (told.verdict, told.together) == ("unavailable", None)
    assert "tp=8 is fixed" in told.reason


def test_a_strategy_with_equal_layouts_is_dominated():
    model = small()
    graph = model.kinds["Layer"].graph
    known = strategies_of(graph.nodes["silu"], graph)
    first = next(strategy for strategy in known if strategy.extent == 256)
    graph_blocks(graph).strategies["silu"] = (*known, dataclasses.replace(first, name="twin"))
    plan = search(model, JOB, PAIR, {"mesh": "pp=1,dp=1,tp=2", "micro_batch": 1})
    told = by_name(explain_operator(plan, model, "silu"), "twin")
    assert told.verdict == "dominated"
    assert told.reason.startswith(f"{first.name} reads and makes the same layouts")


def test_a_plan_that_is_not_the_fastest_sharding_says_so(split: Plan):
    """The decisions of a held answer, as a plan: what the ILP would have taken is cheaper by what holding cost."""
    model = small()
    question = question_of(split, model, "Layer")
    told = explain_operator(split, model, "residual1")
    used = told.chosen.splits["tp"]
    index, worse = max(
        (
            (index, by_name(told, choice["tp"].name))
            for index, choice in enumerate(question.built.choices["Layer/residual1"])
            if by_name(told, choice["tp"].name).together is not None
        ),
        key=lambda pair: pair[1].together.seconds,
    )
    decisions = decisions_of(model, question.built, question.held("Layer/residual1", index))
    candidates = {
        name: dataclasses.replace(candidate, decision=decisions[candidate.decision.kind])
        for name, candidate in split.candidates.items()
    }
    answer = explain_operator(dataclasses.replace(split, candidates=candidates), model, "residual1")
    assert not answer.optimal
    assert answer.chosen.splits == worse.splits
    assert answer.also == {}
    better = by_name(answer, used)
    assert better.verdict == "cheaper"
    assert better.together.seconds == pytest.approx(-worse.together.seconds, rel=1e-6)
    assert "not the fastest" in operator_text(answer)


def test_a_leaner_sharding_is_judged_by_seconds_and_bytes():
    """The answer for a price of memory, as a plan: what is faster and keeps more is dearer by that measure."""
    model, job = decoder(2, head=64, hidden=512, ffn=2048), Job(8, 4096)
    plan = search(model, job, PAIR, {"mesh": "pp=1,dp=1,tp=2", "micro_batch": 2, "recompute": "none"})
    shardings = question_of(plan, model, "Layer").shardings
    priced = max(shardings.ways())
    lean = next(
        answer for answer in shardings.lean() if answer.costs["Layer"]["none"].decision != plan.candidate_of(1).decision
    )
    candidates = {
        name: dataclasses.replace(candidate, decision=lean.costs[candidate.decision.kind]["none"].decision)
        for name, candidate in plan.candidates.items()
    }
    held = dataclasses.replace(plan, candidates=candidates)
    question = question_of(held, model, "Layer")
    assert question.optimal
    assert 0 < question.byte_price <= priced[0]
    faster = 0
    for name in ("norm1", "residual1", "q"):
        answer = explain_operator(held, model, name)
        for one in answer.strategies:
            if one.together is not None:
                measure = one.together.seconds + question.byte_price * one.together.saved_bytes
                assert measure >= -1e-6 * answer.whole_s
                faster += one.together.seconds < 0
    assert faster
    assert "Memory is short: a GiB saved" in operator_text(answer)


def test_blocks_that_run_it_otherwise_are_named(split: Plan):
    layer = split.candidate_of(1)
    strategies = {**layer.decision.strategies, "residual1": {"tp": "R"}}
    other = dataclasses.replace(
        layer, name="other", decision=dataclasses.replace(layer.decision, strategies=strategies)
    )
    runs = [
        Run(b, b + 1, "other" if b == 2 else split.candidate_of(b).name) for b in range(split.stages[0].runs[-1].stop)
    ]
    stages = (dataclasses.replace(split.stages[0], runs=tuple(runs)),)
    plan = dataclasses.replace(split, candidates={**split.candidates, "other": other}, stages=stages)
    answer = explain_operator(plan, small(), "residual1")
    assert answer.also == {"other": {"tp": "R"}}
    assert "under other run it as whole" in operator_text(answer)


def test_without_model_axes_every_operator_is_whole():
    plan = search(small(), JOB, PAIR, {"dp": 2})
    answer = explain_operator(plan, small(), "gate")
    assert (answer.strategies, answer.chosen) == ((), None)
    assert "every rank runs it whole" in " ".join(operator_text(answer).split())


def test_a_block_adds_up_to_the_plan(split: Plan):
    answer = explain_block(split, small(), "Layer")
    (told,) = answer.candidates
    candidate = split.candidates[told.candidate]
    assert told.count == 2
    assert told.forward.total == pytest.approx(candidate.forward_s)
    assert told.backward.total == pytest.approx(candidate.backward_s)
    assert {row.node for row in told.operators} == {node.name for node in small().kinds["Layer"].graph.of("op")}
    assert "recompute    none, because it was fixed" in block_text(answer)


def test_conversions_of_a_block_tell_their_bytes():
    fix = {"mesh": "pp=1,dp=1,tp=2", "micro_batch": 2, "sp": True}
    model, job = decoder(2, head=64, hidden=512, ffn=2048), Job(8, 4096)
    answer = explain_block(search(model, job, PAIR, fix), model, "Layer")
    whole = 2 * 4096 * 512 * 2  # batch x seq x hidden, bf16
    rows = answer.candidates[0].conversions
    assert [(r.tensor, r.forward, r.backward, r.forward_bytes, r.backward_bytes) for r in rows] == [
        ("x", "pad", "slice", 0, 0),
        ("input_norm", "none", "all_reduce", 0, 512 * 2),
        ("norm1", "all_gather", "reduce_scatter", whole, whole),
        ("residual1", "all_reduce", "none", whole, 0),
        ("norm2", "none", "all_reduce", 0, whole),
        ("residual2", "reduce_scatter", "all_gather", whole, whole),
    ]
    for row in rows:
        assert (row.forward_talk_s > 0, row.backward_talk_s > 0) == (row.forward_bytes > 0, row.backward_bytes > 0)
        assert row.forward_talk_s <= row.forward_s
        assert row.backward_talk_s <= row.backward_s
    assert "all-gather" in block_text(answer)


def test_other_recompute_choices_cost_what_the_search_finds_with_them_fixed():
    model, fix = small(), {"mesh": "pp=2,dp=1,tp=1", "micro_batch": 1, "zero": 0, "stages": "2,2"}
    plans = {way: search(model, JOB, PAIR, {**fix, "recompute": way}) for way in ("none", "full")}
    (told,) = explain_block(plans["none"], model, "Layer").candidates
    other = next(choice for choice in told.recompute if choice.name == "full")
    more = plans["full"].predicted.step_time - plans["none"].predicted.step_time
    assert other.step_s == pytest.approx(more)
    assert other.kept == plans["full"].candidate_of(1).inflight_bytes
    assert (other.short, other.blocks) == (0, 2)
    (back,) = explain_block(plans["full"], model, "Layer").candidates
    assert back.backward.recomputation == pytest.approx(other.block_s)
    assert next(choice for choice in back.recompute if choice.name == "none").step_s == pytest.approx(-more)


def test_recomputation_for_want_of_memory_says_how_many_bytes_are_short():
    model, job = decoder(4, hidden=256, ffn=1024), Job(8, 1024)
    fix = {"mesh": "pp=1,dp=2,tp=1", "micro_batch": 4, "zero": 1}
    need = max(stage.total_bytes for stage in search(model, job, PAIR, {**fix, "recompute": "none"}).stages)
    tight = search(model, job, holding(PAIR, int(need - 20e6)), fix)
    ways = {block: recompute_text(tight.candidate_of(block)) for block in range(1, 5)}
    assert set(ways.values()) != {"none"}
    for told in explain_block(tight, model, "Layer").candidates:
        if told.recompute[0].name == "none":
            continue
        plain = next(choice for choice in told.recompute if choice.name == "none")
        own = [block for block in ways if tight.candidate_of(block).name == told.candidate]
        wish = ",".join(f"{block}:{'none' if block in own else way}" for block, way in ways.items())
        roomy = search(model, job, PAIR, {**fix, "recompute": wish})
        assert plain.short == roomy.stages[0].total_bytes - int(need - 20e6)
        assert plain.short > 0
        assert plain.blocks < told.count == len(own)
        assert plain.step_s == pytest.approx(roomy.predicted.step_time - tight.predicted.step_time)
        assert plain.step_s < 0
    text = block_text(explain_block(tight, model, "Layer"))
    assert "because memory is short: " in " ".join(text.split())


def test_a_schedule_may_refuse_recomputation():
    fix = {"mesh": "pp=2,dp=1,tp=1", "micro_batch": 1, "schedule": "zbv", "zero": 0}
    model = decoder(4)
    plan = search(model, JOB, PAIR, fix)
    refused = [c for one in explain_block(plan, model, "Layer").candidates for c in one.recompute if not c.chosen]
    assert refused
    assert all("zbv" in choice.refused for choice in refused)


def test_operators_are_found_by_node_module_path_and_end():
    model = small()
    for name in ("Layer/gate", "layer/gate", "gate", "layers.1.gate"):
        kind, node = find_operator(model, name)
        assert (kind.name, node.name) == ("Layer", "gate")
    assert find_operator(model, "merge")[1].name == "merge"  # exact before ends
    assert find_kind(model, "layers.1") is find_kind(model, "1") is model.kinds["Layer"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("heads", "may be any of Layer/q_heads, Layer/k_heads, Layer/v_heads"),
        ("gte", "no operator 'gte': did you mean Layer/gate"),
        ("Layer/zzz", "its operators are Layer/norm1"),
        ("Lyer/gate", "did you mean Layer"),
    ],
)
def test_names_that_are_none_list_near_ones(name: str, told: str):
    with pytest.raises(BadInputError, match=re.escape(told)):
        find_operator(small(), name)


def test_another_model_is_refused(split: Plan):
    for ask in (
        lambda model: explain_operator(split, model, "gate"),
        lambda model: explain_block(split, model, "Layer"),
        lambda model: why_not(split, model, ["tp=2"]),
    ):
        with pytest.raises(BadInputError, match="fingerprint"):
            ask(decoder(3))
