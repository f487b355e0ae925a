"""Experts in a list of modules: computed for every token and masked, where that is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expert_lists import ByBooleans, ByComparison, ByMask, Centred, EveryToken, Model, OneEach, OnlyHit, OwnForward
from traced import token_batch, worst_error

import autopar
from autopar.errors import UnsupportedError
from autopar.graph.expert_loops import NOTE
from autopar.models import model_graph


@pytest.mark.parametrize("mixture", [ByMask, OnlyHit, ByComparison, ByBooleans, OneEach])
def test_experts_in_a_list_compute_every_token(mixture: Any) -> None:
    torch.manual_seed(0)
    model = Model(mixture).double()
    graph = model_graph(model)
    assert NOTE in graph.notes
    assert [block.kind for block in graph.blocks][1] == [block.kind for block in graph.blocks][2]
    batch = token_batch(3, 8)
    assert worst_error(graph, model, batch, model(**batch)) < 1e-10


@pytest.mark.parametrize("fix", [{"dp": 2, "tp": 2, "zero": 3}, {"cp": 2, "tp": 2, "sp": True}])
def test_such_experts_are_split(fix: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Model(ByMask)
    plan = autopar.search(model, autopar.Job(4, 16), autopar.Cluster.parse("1x4:h100"), fix=fix)
    assert autopar.verify(plan, model).worst[1] < 1e-10


def test_rows_that_are_mixed_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"module 'layers.0.mixture' computes sizes.* list of equal modules"):
        model_graph(Model(Centred))


def test_a_loop_that_chooses_nothing_is_traced_as_it_is() -> None:
    assert NOTE not in model_graph(Model(EveryToken)).notes


def test_a_list_with_a_forward_of_its_own_is_followed() -> None:
    torch.manual_seed(0)
    model = Model(OwnForward)
    assert NOTE in model_graph(model).notes
    plan = autopar.search(model, autopar.Job(4, 16), autopar.Cluster.parse("1x2:h100"), fix={"dp": 2})
    assert autopar.verify(plan, model).worst[1] < 1e-10
