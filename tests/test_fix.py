"""What may be fixed, how it is read, and how it is refused."""

import pytest

from autopar.errors import BadInputError, UnsupportedError
from autopar.plan import Mesh
from autopar.solver.capabilities import CAPABILITIES
from autopar.solver.fix import Fix, parse_fix


def test_reads_dicts_and_strings_alike():
    assert parse_fix({"tp": 8, "pp": 2, "sp": True, "recompute": "full"}) == parse_fix(
        ["tp=8", "pp=2", "sp=true", "recompute=full"]
    )
    assert parse_fix(None) == parse_fix({}) == Fix()
    assert parse_fix({"zero": "3", "micro_batch": "2", "schedule": "1F1B"}) == Fix(
        zero=3, micro_batch=2, schedule="1f1b"
    )


def test_mesh_sets_every_axis():
    expected = Fix(pp=2, dp=1, tp=4)
    for mesh in ("pp=2,tp=4", "pp=2 x dp=1 x tp=4", {"pp": 2, "tp": 4}, Mesh(pp=2, tp=4)):
        assert parse_fix({"mesh": mesh}) == expected
    with pytest.raises(BadInputError, match="tp is given twice"):
        parse_fix({"mesh": "tp=4", "tp": 2})


def test_neutral_values_of_what_is_not_executed_are_fine():
    assert parse_fix({"cp": 1, "ep": 1, "vpp": 1, "offload": "none"}) == Fix()


@pytest.mark.parametrize(
    ("fix", "message"),
    [
        ({"pt": 8}, "unknown key 'pt'; the keys are dp, fsdp, zero"),
        (["tp"], "expected KEY=VALUE"),
        ({"tp": 0}, "tp must be a positive integer"),
        ({"tp": "eight"}, "not 'eight'"),
        ({"tp": True}, "tp must be a positive integer"),
        ({"zero": 4}, "zero must be 0, 1, 2 or 3"),
        ({"sp": "maybe"}, "sp must be true or false"),
        ({"schedule": "fast"}, "schedule must be one of"),
        ({"recompute": "some"}, "recompute must be one of"),
        ({"mesh": "8x8"}, "mesh must name sizes"),
    ],
)
def test_bad_values_are_named(fix, message):
    with pytest.raises(BadInputError, match=message):
        parse_fix(fix)


@pytest.mark.parametrize(
    "fix",
    [
        {"zero": 1},
        {"zero": 2},
        {"cp": 2},
        {"ep": 4},
        {"vpp": 2},
        {"schedule": "zbv"},
        {"recompute": "selective"},
        {"offload": "activations"},
        {"fsdp": 2, "dp": 8},
    ],
)
def test_what_is_not_executed_yet_is_refused(fix):
    with pytest.raises(UnsupportedError, match=r"(not|is) emitted yet"):
        parse_fix(fix)


def test_contradictions_with_the_cluster():
    with pytest.raises(BadInputError, match="tp=3 makes 3 ranks, but the cluster has 8 devices"):
        parse_fix({"tp": 3}).check(8, ["A"] * 4)
    with pytest.raises(BadInputError, match="makes 4 ranks, but the cluster has 8"):
        parse_fix({"tp": 2, "pp": 2, "dp": 1}).check(8, ["A"] * 4)
    with pytest.raises(BadInputError, match="only 4 blocks"):
        parse_fix({"pp": 8}).check(8, ["A"] * 4)
    with pytest.raises(BadInputError, match="schedule=none contradicts pp=2"):
        parse_fix({"pp": 2, "schedule": "none"}).check(8, ["A"] * 4)
    with pytest.raises(BadInputError, match="zero=3, which contradicts zero=0"):
        parse_fix({"fsdp": 8, "zero": 0})
    parse_fix({"tp": 2, "pp": 2}).check(8, ["A"] * 4)


def test_recompute_per_block():
    fix = parse_fix({"recompute": "none,Layer:full,2-3:none"})
    fix.check(1, ["Prologue", "Layer", "Layer", "Layer", "Epilogue"])
    assert [fix.recompute_of(i, k) for i, k in enumerate(["Prologue", "Layer", "Layer", "Layer", "Epilogue"])] == [
        "none",
        "full",
        "none",
        "none",
        "none",
    ]
    full = parse_fix({"recompute": "full"})
    assert full.recompute_of(1, "Layer") == "full"
    assert full.recompute_of(0, "Prologue", repeated=False) == "none"
    assert Fix().recompute_of(0, "Layer") is None
    with pytest.raises(BadInputError, match="names block 'Lyer'"):
        parse_fix({"recompute": "Lyer:full"}).check(1, ["Layer"])
    with pytest.raises(BadInputError, match="blocks 0-0"):
        parse_fix({"recompute": "0-4:full"}).check(1, ["Layer"])


def test_given_round_trips():
    fix = parse_fix({"tp": 2, "sp": False, "recompute": "Layer:full"})
    assert parse_fix(fix.given()) == fix


def test_every_key_of_the_design_is_in_the_table():
    keys = [
        "dp",
        "fsdp",
        "zero",
        "tp",
        "sp",
        "cp",
        "ep",
        "pp",
        "vpp",
        "schedule",
        "micro_batch",
        "recompute",
        "offload",
        "mesh",
    ]
    assert sorted(CAPABILITIES) == sorted(keys)
