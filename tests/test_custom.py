"""The user's own operators: rules that are proved, functions that are not traced into, and what is refused."""

from __future__ import annotations

import pytest
import torch
from own_operators import Own, Rounded, Scaled, Secret, Untold, decay, gated

import autopar
from autopar.codegen.emit_module import module_source
from autopar.graph.cache import cached_graph
from autopar.graph.functions import annotation_of
from autopar.graph.model_key import model_key
from autopar.graph.trace import trace
from autopar.sharding.rules import RULES, rule_of

JOB = autopar.Job(global_batch=4, seq_len=8)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Own()


def real(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def test_a_rule_prints_as_it_was_written(model):
    graph = trace(model).kinds["Layer"].graph
    found = {node.op: str(rule_of(node, graph)) for node in graph.of("op") if "own" in node.op}
    assert found == {
        "own_operators.decay": "b s^ d, d -> b s^ d",
        "leaf.own_operators._gated": "b s k^, n k^ -> b s n",
        "leaf.own_operators.Rounded.apply": "b s d -> b s d",
    }


def test_right_rules_are_proved():
    assert autopar.check_rule("own_operators::decay", [(real(4, 8, 16), real(16))]) == 4
    assert autopar.check_rule(torch.ops.own_operators.decay, [(real(4, 8, 16), real(16))]) == 4
    assert autopar.check_rule(gated, [((real(4, 8, 16), real(8, 16)), {"power": 2.0})]) == 6
    assert autopar.check_rule(Rounded, [(real(4, 8), 16)]) == 4
    assert decay is not None


def test_wrong_rules_are_found():
    kept = RULES["own_operators.decay"]
    try:
        autopar.register_rule("own_operators::decay", "b s d, d -> b s d")
        with pytest.raises(autopar.VerificationError, match=r"own_operators\.decay.*s split over 2 ranks"):
            autopar.check_rule("own_operators::decay", [(real(4, 8, 16), real(16))])
        autopar.register_rule("own_operators::decay", "b s d, d -> b s d", freeze="s", linear="0 1")
        autopar.check_rule("own_operators::decay", [(real(4, 8, 16), real(16))])
        with pytest.raises(autopar.VerificationError, match="no annotation fits"):
            autopar.check_rule("own_operators::decay", [(real(4, 8, 16), real(1, 16))])
    finally:
        autopar.register_rule("own_operators::decay", "b s d, d -> b s d", freeze="s")
    assert RULES["own_operators.decay"] == kept


@pytest.mark.parametrize("fix", [{"tp": 2, "sp": False}, {"tp": 2, "sp": True}, {"dp": 2}, {"pp": 2}])
def test_a_model_of_own_operators_computes_the_same(model, fix):
    plan = autopar.search(model, JOB, autopar.Cluster.parse("1x2:h100"), fix=fix)
    assert autopar.verify(plan, model).worst[1] < 1e-12


def test_emitted_code_calls_them_by_name(model):
    plan = autopar.search(model, JOB, autopar.Cluster.parse("1x2:h100"), fix={"tp": 2})
    source = module_source(plan, trace(model))
    assert "\nimport own_operators\n" in source
    assert "torch.ops.own_operators.decay(" in source
    assert "own_operators._gated(" in source
    assert "power=1.5" in source
    assert "own_operators.Rounded.apply(" in source


def test_outside_of_tracing_a_leaf_is_what_it_was():
    x = real(2, 3).requires_grad_()
    Rounded.apply(x, 4).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_an_autograd_function_that_nobody_told_of_is_tried():
    own = Own(Secret)
    graph = trace(own).kinds["Layer"].graph
    (node,) = (node for node in graph.of("op") if "Secret" in node.op)
    assert str(rule_of(node, graph)) == "a b c -> a b c"
    plan = autopar.search(own, JOB, autopar.Cluster.parse("1x2:h100"), fix={"tp": 2, "sp": True})
    assert autopar.verify(plan, own).worst[1] < 1e-12


def test_a_graph_with_a_function_that_was_tried_is_not_kept_on_disk(tmp_path, monkeypatch):
    """What was found of the Function is known to this process alone: the next one has to find it anew."""
    monkeypatch.setenv("AUTOPAR_CACHE", str(tmp_path))
    for name, model in (("plain", Own(Rounded)), ("tried", Own(Secret))):
        cached_graph(name, name, lambda model=model: trace(model))
    assert [path.name.partition("-")[0] for path in (tmp_path / "graphs").iterdir()] == ["plain"]


def test_trying_a_function_changes_no_key():
    own = Own(Untold)
    before = model_key(own, None, None)
    assert before is not None
    assert any("Untold" in node.op for node in trace(own).kinds["Layer"].graph.of("op"))
    assert model_key(own, None, None) == before


def test_dims_along_which_a_function_mixes_stay_whole():
    x, scale = real(2, 3, 8), real(8)
    assert annotation_of(Scaled, (x, scale, 2.0)) == "a b c^, c^ -> a b c^"
    assert annotation_of(Scaled, (x, real(3, 1), 2.0)) == "a b c^, b z1x1^ -> a b c^"
    assert annotation_of(Scaled, (x, scale, "two")) is None


def test_an_autograd_function_that_cannot_be_tried_is_refused():
    class Hidden(Rounded):
        """Defined in a function, so that emitted code cannot import it."""

    with pytest.raises(autopar.UnsupportedError, match=r"Hidden.*autopar.leaf\("):
        trace(Own(Hidden))


def test_what_makes_no_sense_is_refused():
    with pytest.raises(autopar.BadInputError, match="no operator"):
        autopar.register_rule("own_operators::missing", "b -> b")
    with pytest.raises(autopar.BadInputError, match="freeze names z"):
        autopar.register_rule("own_operators::decay", "b s d, d -> b s d", freeze="z")
    with pytest.raises(autopar.BadInputError, match="has no '->'"):
        autopar.register_rule("own_operators::decay", "b s d")
    with pytest.raises(autopar.BadInputError, match="give an annotation"):
        autopar.register_rule("own_operators::decay")
    with pytest.raises(autopar.BadInputError, match="a leaf is a function"):
        autopar.leaf(Own, "b -> b")
    with pytest.raises(autopar.BadInputError, match="defined inside a function"):
        autopar.leaf(lambda x: x, "b -> b")
    with pytest.raises(autopar.BadInputError, match="is no operator"):
        autopar.check_rule(len, [])
