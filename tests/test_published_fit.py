"""Fits to published runs: what is searched, and what stands in for a group that is left out."""

import sys
from math import exp, log
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import published_fit
from published_fit import MANY, OWN, RELATIVES, constant, elsewhere, fitted, left_out, thinned

from autopar import Job
from autopar.stack import catalog


class Plan:
    """As much of a plan as tells its stack."""

    def __init__(self, stack):
        self.job = Job(8, 128, stack=stack)


def entry(group, name, stack):
    return (group, name, 1.0, Plan(stack), None)


@pytest.fixture
def matmuls(monkeypatch):
    """Runs whose time is inverse to the stack's speed of matmuls, and right at 0.9; hosts do not matter."""

    def errors(pool, workers, entries, changes):
        return [(group, name, log(0.9 / changes[f"{plan.job.stack}.matmul"])) for group, name, _, plan, _ in entries]

    monkeypatch.setattr(published_fit, "errors", errors)


def test_every_constant_that_is_fitted_is_in_the_catalog():
    stacks = catalog()["stacks"]
    assert OWN.keys() == RELATIVES.keys()
    for stack, (groups, names) in OWN.items():
        assert groups
        assert RELATIVES[stack] in stacks
        for name in names:
            ranges = constant(f"{stack}.{name}")
            assert ranges["low"] <= elsewhere(stack)[f"{stack}.{name}"] <= ranges["high"]


def test_a_fit_finds_the_constant(matmuls):
    start = {"internevo.matmul": 1.1}
    found = fitted(None, 1, [entry("internevo", "a", "internevo")], start, ["internevo.matmul"])
    assert found["internevo.matmul"] == pytest.approx(0.9, rel=0.02)
    assert start == {"internevo.matmul": 1.1}


def test_without_a_group_others_of_its_stack_tell_what_they_can(matmuls):
    one, other = (entry(group, group, "megatron-deepspeed") for group in ("vtrain_single", "vtrain_multi"))
    alone = entry("internevo", "internevo", "internevo")
    unused = entry("mtnlg", "mtnlg", "megatron-deepspeed")
    found = left_out(None, 1, [one, other, alone, unused])
    count, own, without, known = found["vtrain_single"]
    assert count == 1
    assert own == pytest.approx(abs(exp(log(0.9 / constant("megatron-deepspeed.matmul")["value"])) - 1))
    assert without < 0.02
    # What no run tells is the relative's.
    assert known["megatron-deepspeed.host_s"] == catalog()["stacks"]["megatron"]["values"]["host_s"]
    assert found["internevo"][3] == {"internevo.matmul": catalog()["stacks"]["torch"]["values"]["matmul"]}
    assert found["internevo"][2] == pytest.approx(0.1)
    assert found["mtnlg"][3] == {}
    assert found["mtnlg"][1] == found["mtnlg"][2]


def test_large_groups_are_thinned():
    records = [{"group": "large", "id": place} for place in range(MANY + 1)] + [{"group": "small", "id": 0}] * 3
    found = thinned(records, 10)
    assert [record["group"] for record in found].count("small") == 3
    assert [record["id"] for record in found if record["group"] == "large"] == list(range(0, MANY + 1, 10))
