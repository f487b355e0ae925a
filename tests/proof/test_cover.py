"""The cases of the proof: what they cover, that they are legal, that they are the same each time."""

from __future__ import annotations

import random

import pytest

from autopar.plan import Mesh
from autopar.schedule import SCHEDULES
from autopar.solver.capabilities import CAPABILITIES, executes
from autopar.solver.fix import parse_fix
from proof.cases import (
    EXACT,
    KEYS,
    MESHES,
    RECOMPUTE,
    RESHARD,
    Case,
    cover,
    legal,
    legal_pairs,
    one_by_one,
    pairs_of,
    values_cover,
)


def test_every_pair_of_values_that_some_legal_case_holds_is_covered() -> None:
    covered = {pair for case in cover() for pair in pairs_of(case)}
    drawn, seen = random.Random(3), set()
    for _ in range(100_000):
        case = Case(tuple(drawn.choice(options) for options in KEYS.values()))
        if legal(case):
            seen.update(pairs_of(case))
    assert len(seen) > 0.9 * len(legal_pairs())
    assert seen <= covered
    assert set(legal_pairs()) <= covered


def test_cases_are_legal_and_none_is_redundant() -> None:
    cases = cover()
    assert all(legal(case) and executes(case.choice()) for case in (*cases, *one_by_one()))
    assert len({str(case) for case in (*cases, *one_by_one())}) == len({*cases, *one_by_one()})
    for left_out in cases:
        rest = {pair for case in cases if case != left_out for pair in pairs_of(case)}
        assert not set(pairs_of(left_out)) <= rest


def test_the_cover_is_deterministic_and_of_a_size_that_can_be_run() -> None:
    again = cover.__wrapped__()
    assert again == cover()
    assert 150 < len(again) < 350
    assert sum(case["dtype"] in EXACT for case in again) > len(again) / 2


def test_every_value_is_tried_alone_and_in_the_subset() -> None:
    every = {(key, value) for key, options in KEYS.items() for value in options}
    alone = {pair for case in one_by_one() for pair in zip(KEYS, case.values, strict=True)}
    assert every == alone
    assert every == {pair for case in values_cover() for pair in zip(KEYS, case.values, strict=True)}
    assert set(values_cover()) <= set(cover())


def test_the_values_are_those_of_the_capability_table() -> None:
    assert {key.rstrip("3") for key in KEYS["schedule"]} == set(SCHEDULES) == set(CAPABILITIES["schedule"].executable)
    assert {int(name[4]) for name in KEYS["sharding"]} == set(CAPABILITIES["zero"].executable)
    assert set(KEYS["offload"]) == set(CAPABILITIES["offload"].executable)
    told = {choice.rpartition(":")[2].partition("(")[0] for fix in RECOMPUTE.values() for choice in fix.split(",")}
    assert told == set(CAPABILITIES["recompute"].executable)
    resharded = {part.rpartition(":")[2] == "true" for fix in RESHARD.values() for part in fix.split(",")}
    assert resharded == set(CAPABILITIES["reshard"].executable)
    assert set(KEYS["sp"]) == {"searched", *CAPABILITIES["sp"].executable}


def test_a_case_says_what_its_fix_says() -> None:
    case = Case.of(mesh="pp2 tp2x2", schedule="interleaved3", stages="ends alone", micro_batches=4, sp=True)
    assert case.mesh == Mesh(pp=2, tp=4, tp_parts=(2, 2))
    assert case.counts == (1, 2, 2, 2, 2, 1)
    fix = parse_fix(case.fix())
    assert (fix.pp, fix.tp_parts, fix.vpp, fix.stages, fix.sp) == (2, (2, 2), 3, case.counts, True)
    half = Case.of(mesh="dp2 cp4", sharding="zero3 half")
    assert half.level == (3, 4)
    assert str(half) == "llama dp2 cp4 fp64 zero3 half m2x1"


@pytest.mark.parametrize(
    "values",
    [
        {"mesh": "tp4", "sharding": "zero3"},
        {"mesh": "dp2 cp4", "sharding": "zero3", "schedule": "1f1b"},
        {"mesh": "cp4", "sharding": "zero1 half"},
        {"mesh": "dp4", "sp": True},
        {"mesh": "pp2 dp2", "schedule": "1f1b", "micro_batches": 1},
        {"mesh": "pp2 dp2", "schedule": "zbv", "sharding": "zero3"},
        {"mesh": "dp4", "sharding": "zero2", "reshard": "some"},
    ],
    ids=str,
)
def test_what_has_no_meaning_or_cannot_run_is_no_case(values: dict[str, object]) -> None:
    assert not legal(Case.of(**values))
    assert all(not set(values.items()) <= set(zip(KEYS, case.values, strict=True)) for case in cover())


def test_meshes_are_all_of_four_ranks_and_the_shapes_of_eight() -> None:
    fours = {Case.of(mesh=name).mesh for name in MESHES if Case.of(mesh=name).ranks == 4}
    sizes = [(pp, dp, cp, 4 // pp // dp // cp) for pp in (1, 2, 4) for dp in (1, 2, 4) for cp in (1, 2, 4)]
    assert {Mesh(*size) for size in sizes if size[0] * size[1] * size[2] <= 4} | {Mesh(tp=4, tp_parts=(2, 2))} == fours
    eights = [Case.of(mesh=name).mesh for name in MESHES if Case.of(mesh=name).ranks == 8]
    assert len({frozenset(axis for axis, size in mesh.axes().items() if size > 1) for mesh in eights}) > 10
