"""The difference of two plans: what was changed is told and nothing else, with seconds and bytes of both."""

from __future__ import annotations

import dataclasses
import json

import pytest
from small_plan import GIB, small_plan

from autopar import cli
from autopar.cluster import Cluster
from autopar.plan import Mesh, Plan, Run
from autopar.report.diff import diff
from autopar.report.diff_text import diff_text


def changed(**fields) -> Plan:
    return dataclasses.replace(small_plan(), **fields)


def test_equal_plans_are_the_same():
    found = diff(small_plan(), small_plan())
    assert found.same
    assert found.step.more == 0
    assert diff_text(found).startswith("the plans are the same")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"zero": 1}, {"ZeRO": ("3", "1")}),
        ({"fsdp": 1}, {"fsdp": ("2", "1")}),
        ({"schedule": "gpipe"}, {"schedule": ("1f1b", "gpipe")}),
        ({"micro_batch": 2, "micro_batches": 4}, {"micro-batch": ("1 x 8 per step", "2 x 4 per step")}),
        ({"mesh": Mesh(2, 4, 1, 1)}, {"mesh": ("pp=2 x dp=2 x tp=2", "pp=2 x dp=4 x tp=1")}),
        ({"offload": "state"}, {"state on the host": ("false", "true")}),
        ({"pad_heads": 2}, {"heads padded to": ("1", "2")}),
    ],
)
def test_what_was_changed_is_told_and_nothing_else(fields, told):
    found = diff(small_plan(), changed(**fields))
    assert {pair.name: (pair.first, pair.second) for pair in found.decisions} == told
    assert not found.premises
    assert not found.operators
    assert all(first in diff_text(found) and second in diff_text(found) for first, second in told.values())


def test_borders_of_stages_and_recomputation_by_block():
    first, second = small_plan().stages
    stages = (
        dataclasses.replace(first, runs=(Run(0, 1, "Layer/full"), Run(1, 3, "Layer/plain"))),
        dataclasses.replace(second, runs=(Run(3, 4, "Layer/plain"),)),
    )
    found = diff(small_plan(), changed(stages=stages))
    assert {pair.name: (pair.first, pair.second) for pair in found.decisions} == {
        "stages": ("0-1 | 2-3", "0-2 | 3"),
        "recompute": ("0-1 full, 2-3 none", "0 full, 1-3 none"),
    }


def test_blocks_that_stay_gathered():
    plan = small_plan()
    stays = dataclasses.replace(plan.candidates["Layer/plain"], gathered=True)
    found = diff(plan, changed(candidates={**plan.candidates, "Layer/plain": stays}))
    assert {pair.name: (pair.first, pair.second) for pair in found.decisions} == {
        "stay gathered": ("false", "0-1 false, 2-3 true")
    }


def test_operators_that_are_split_otherwise():
    plan = small_plan()
    candidates = {
        name: dataclasses.replace(
            candidate, decision=dataclasses.replace(candidate.decision, strategies={"linear": {"tp": "R"}})
        )
        for name, candidate in plan.candidates.items()
    }
    found = diff(plan, changed(candidates=candidates))
    assert [(o.kind, o.first, o.second, o.operators) for o in found.operators] == [
        ("Layer", "tp n", "whole", ("linear",))
    ]
    assert "Layer: tp n -> whole: linear" in diff_text(found)
    some = {**plan.candidates, "Layer/full": candidates["Layer/full"]}
    mixed = diff(plan, changed(candidates=some)).operators[0]
    assert set(mixed.second.split(" or ")) == {"tp n", "whole"}


def test_seconds_and_bytes_add_up_and_the_largest_difference_comes_first():
    plan = small_plan()
    predicted = dataclasses.replace(
        plan.predicted, step_time=0.9, breakdown={"compute": 0.5, "collectives": 0.16, "bubble": 0.04, "data axis": 0.2}
    )
    stages = (
        plan.stages[0],
        dataclasses.replace(plan.stages[1], memory={**plan.stages[1].memory, "optimizer": 9 * GIB}),
    )
    found = diff(plan, changed(predicted=predicted, stages=stages))
    assert found.step.more == pytest.approx(0.2)
    assert sum(amount.more for amount in found.seconds) == pytest.approx(found.step.more)
    assert {amount.name: round(amount.more, 6) for amount in found.seconds} == {
        "compute": 0.0,
        "collectives": 0.01,
        "bubble": -0.01,
        "data axis": 0.2,
    }
    assert found.ranks == (0, 1)
    assert {amount.name: amount.more / GIB for amount in found.bytes if amount.more} == {
        "optimizer": 5.0,
        "activations": -0.5,
    }
    assert found.held.more == 4.5 * GIB
    text = diff_text(found)
    assert "comes from   data axis +200 ms, " in text
    assert "GiB of the fullest rank (0 and 1)" in text


def test_stages_of_one_rank_are_held_together():
    plan = small_plan()
    halves = [
        dataclasses.replace(plan.stages[index // 2], runs=(Run(index, index + 1, "Layer/full"),)) for index in range(4)
    ]
    found = diff(plan, changed(schedule="interleaved", vpp=2, stages=tuple(halves)))
    assert found.held.second == max(halves[0].total_bytes + halves[2].total_bytes, 0)


def test_other_jobs_clusters_and_models_are_said_first():
    plan = small_plan()
    job = dataclasses.replace(plan.job, global_batch=32)
    found = diff(plan, changed(job=job, cluster=Cluster.parse("1x8:h100"), fingerprint="f" * 16, micro_batches=16))
    assert [pair.name for pair in found.premises] == ["model", "global_batch", "cluster"]
    text = diff_text(found)
    assert text.startswith("A and B were made for different things")
    assert text.index("2x4:h100") < text.index("micro-batch")
    device = dataclasses.replace(plan.cluster.device, memory_bytes=60 * GIB)
    other = Cluster(tuple(dataclasses.replace(group, device=device) for group in plan.cluster.groups))
    (pair,) = diff(plan, changed(cluster=other)).premises
    assert "other figures" in pair.second


def test_the_command_compares_files_and_folders(capsys, tmp_path):
    small_plan().save(tmp_path / "a.json")
    (tmp_path / "out").mkdir()
    changed(zero=1).save(tmp_path / "out" / "plan.json")

    def run(*arguments: str):
        with pytest.raises(SystemExit) as stop:
            cli.main(["diff", str(tmp_path / "a.json"), *arguments])
        return stop.value.code, *capsys.readouterr()

    status, out, _ = run(str(tmp_path / "out"))
    assert status == 0
    assert "ZeRO                   3  1" in out
    record = json.loads(run(str(tmp_path / "out"), "--json")[1])
    assert record["decisions"] == [{"name": "ZeRO", "first": "3", "second": "1"}]
    status, out, err = run(str(tmp_path / "none.json"))
    assert (status, out) == (2, "")
    assert "cannot read plan" in err
