"""A few hundred drawn cases, always the same, and mistakes put into autopar that such cases must notice."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from autopar.codegen import emit_block
from autopar.codegen.runtime import collectives
from autopar.sharding.rules import RULES
from autopar.sharding.rules.reductions import _reduce
from fuzz import models
from fuzz.batches import run_batch
from fuzz.cases import Counts
from fuzz.world import close

SEED = 0
BATCHES, MODELS = 2, 7
CASES = 90
"""At least so many in all."""

COUNTS = Counts()


@pytest.fixture(scope="module", autouse=True)
def _ranks() -> Iterator[None]:
    """Ranks are kept from case to case; other tests make process groups of their own."""
    yield
    close()


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.handler.setLevel(logging.WARNING)  # torch.export logs each of its steps


@pytest.mark.parametrize("batch", range(BATCHES))
def test_drawn_plans_equal_the_single_device(batch: int) -> None:
    if reason := run_batch(SEED, batch, MODELS, COUNTS):
        pytest.fail(reason, pytrace=False)


def test_many_operators_and_meshes_were_drawn() -> None:
    if COUNTS.models < BATCHES * MODELS:
        pytest.skip("not all batches were run")
    assert COUNTS.cases >= CASES
    assert COUNTS.unsound <= COUNTS.models // 10
    assert len(COUNTS.meshes) >= 8
    assert len(COUNTS.operators) >= 30
    assert COUNTS.worst <= 1e-11


def _partial_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "aten.mul", dataclasses.replace(RULES["aten.mul"], linear="01"))


def _partial_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in ("aten.layer_norm", "aten.rms_norm"):
        monkeypatch.setitem(RULES, op, dataclasses.replace(RULES[op], linear="0"))


def _summed_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "aten.mean", dataclasses.replace(RULES["aten.mean"], compute=_reduce("+")))


def _bias_of_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "aten.linear", dataclasses.replace(RULES["aten.linear"], once=""))


def _gather_without_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    slices = collectives._AllGatherInvariant.backward
    monkeypatch.setattr(collectives._AllGather, "backward", staticmethod(slices))


def _replicated_without_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives._Replicate, "backward", staticmethod(lambda ctx, gradient: (gradient, None)))


def _invariant_for_replicated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(emit_block.FUNCTIONS, "SR", "all_gather_invariant")


def _first_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_keep(x: torch.Tensor, axis: Any) -> torch.Tensor:
        return x.clone()

    monkeypatch.setattr(collectives, "_first_only", all_keep)


MISTAKES: list[Callable[[pytest.MonkeyPatch], None]] = [
    _partial_products,
    _partial_norms,
    _summed_means,
    _bias_of_every_rank,
    _gather_without_sum,
    _replicated_without_sum,
    _invariant_for_replicated,
    _first_for_all,
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__.strip("_"))
def test_a_mistake_is_noticed(mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    models.built.cache_clear()  # with what rules have said about its operators
    with monkeypatch.context() as changed:
        mistake(changed)
        assert "is off by" in run_batch(SEED, 0, 12, Counts(), shrink=False)
    models.built.cache_clear()


def test_a_case_is_drawn_again_from_its_seed() -> None:
    first, second = Counts(), Counts()
    for counts in (first, second):
        assert run_batch(SEED, 0, 1, counts) == ""
    assert first == second
