"""What may be fixed, how it is read, and how it is refused."""

import pytest

from autopar.errors import BadInputError
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
    expected = Fix(pp=2, dp=1, cp=1, tp=4)
    for mesh in ("pp=2,tp=4", "pp=2 x dp=1 x tp=4", {"pp": 2, "tp": 4}, Mesh(pp=2, tp=4)):
        assert parse_fix({"mesh": mesh}) == expected
    with pytest.raises(BadInputError, match="tp is given twice"):
        parse_fix({"mesh": "tp=4", "tp": 2})


def test_a_model_axis_may_be_made_of_several():
    assert parse_fix({"tp": "2x4"}) == parse_fix(["tp=2x4"]) == Fix(tp=8, tp_parts=(2, 4))
    assert parse_fix({"mesh": "dp=2,tp=2x2"}) == Fix(pp=1, dp=2, cp=1, tp=4, tp_parts=(2, 2))
    assert parse_fix({"mesh": Mesh(dp=2, tp=4, tp_parts=(2, 2))}) == parse_fix({"mesh": "dp=2 x tp=2x2"})
    assert parse_fix({"tp": "2x4"}).given() == {"tp": "2x4"}
    with pytest.raises(BadInputError, match="tp must be a positive integer, not '2x1'"):
        parse_fix({"tp": "2x1"})


def test_an_order_names_every_axis():
    wanted = Fix(order=("dp", "pp", "cp", "tp"))
    for order in ("dp,pp,cp,tp", "DP, PP, CP, TP", "dp pp cp tp", ["dp", "pp", "cp", "tp"], wanted.order):
        assert parse_fix({"order": order}) == wanted
    assert parse_fix(["order=dp,pp,cp,tp"]).given() == {"order": "dp,pp,cp,tp"}
    assert parse_fix(wanted.given()) == wanted
    assert parse_fix({"mesh": Mesh(2, 2, 1, 2, order=wanted.order)}) == Fix(2, 2, 1, 2, order=wanted.order)
    with pytest.raises(BadInputError, match="order is given twice"):
        parse_fix({"mesh": Mesh(2, 2, 1, 2, order=wanted.order), "order": "pp,dp,cp,tp"})


def test_neutral_values_are_fine():
    assert parse_fix({"ep": 1}) == Fix(ep=1)
    assert parse_fix({"cp": 1, "vpp": 1, "offload": "none"}) == Fix(cp=1, vpp=1, offload="none")


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
        ({"order": "dp,pp,tp"}, "order=dp,pp,cp,tp, not 'dp,pp,tp': cp is missing"),
        ({"order": "dp,pp,cp,ep"}, "outermost first, such as .*: there is no axis 'ep'"),
        (["order=dp,pp,cp,tp,dp"], "must name each of pp, dp, cp, tp once, .*: an axis is named twice"),
        ({"stages": "2,x"}, "stages must be a positive integer, not 'x'"),
        ({"offload": "disk"}, "offload must be one of none, state"),
        ({"recompute": "selective(gelu)"}, "selective must be one of matmul, attention"),
    ],
)
def test_bad_values_are_named(fix, message):
    with pytest.raises(BadInputError, match=message):
        parse_fix(fix)


def test_what_is_not_executed_is_refused():
    with pytest.raises(BadInputError, match="ep must be a positive integer"):
        parse_fix({"ep": 0})


def test_contradictions_with_the_cluster():
    with pytest.raises(BadInputError, match="tp=3 makes 3 ranks, but the cluster has 8 devices"):
        parse_fix({"tp": 3}).check(8, ["A"] * 4)
    with pytest.raises(BadInputError, match="makes 4 ranks, but the cluster has 8"):
        parse_fix({"tp": 2, "pp": 2, "dp": 1}).check(8, ["A"] * 4)
    with pytest.raises(BadInputError, match="only 4 blocks"):
        parse_fix({"pp": 8}).check(8, ["A"] * 4)
    with pytest.raises(BadInputError, match="schedule=none contradicts pp=2"):
        parse_fix({"pp": 2, "schedule": "none"}).check(8, ["A"] * 4)
    with pytest.raises(BadInputError, match="fsdp=8 contradicts zero=0"):
        parse_fix({"fsdp": 8, "zero": 0})
    with pytest.raises(BadInputError, match="fsdp=3 ranks do not divide the 8 data ranks"):
        parse_fix({"fsdp": 3, "dp": 4, "cp": 2})
    with pytest.raises(BadInputError, match="holds 5 blocks, the model has 4"):
        parse_fix({"pp": 2, "stages": "2,3"}).check(8, ["A"] * 4)
    with pytest.raises(BadInputError, match="fix pp as well"):
        parse_fix({"stages": [2, 2]}).check(8, ["A"] * 4)
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
    fix = parse_fix(
        {"tp": "2x2", "sp": False, "pp": 2, "stages": "1,3", "recompute": "Layer:full,0-1:selective(attention+matmul)"}
    )
    assert parse_fix(fix.given()) == fix
    assert fix.given()["recompute"] == "Layer:full,0-1:selective(matmul+attention)"


def test_reshard_is_given_for_all_or_by_block():
    fix = parse_fix({"zero": 3, "reshard": "true,2-3:false,Layer:true,5:false"})
    assert [fix.reshard_of(i, "Other") for i in range(6)] == [True, True, False, False, True, False]
    assert fix.reshard_of(2, "Layer") is True
    assert parse_fix(["reshard=0-1:false"]).reshard_of(7, "Layer") is None
    assert parse_fix({"reshard": False}).reshard_of(7, "Layer") is False
    assert fix.given()["reshard"] == "true,2-3:false,Layer:true,5:false"
    assert parse_fix(fix.given()) == fix
    with pytest.raises(BadInputError, match="reshard is of zero=3, not of zero=2"):
        parse_fix({"zero": 2, "reshard": True})
    with pytest.raises(BadInputError, match="reshard must be true or false, not 'sometimes'"):
        parse_fix({"reshard": "sometimes"})
    with pytest.raises(BadInputError, match="reshard names block '9'; the model has blocks 0-1"):
        parse_fix({"reshard": "9:false"}).check(1, ["Layer", "Layer"])


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
        "reshard",
        "offload",
        "mesh",
        "stages",
        "order",
        "context",
    ]
    assert sorted(CAPABILITIES) == sorted(keys)
