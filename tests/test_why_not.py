"""Why not otherwise: the search again with a wish fixed, what forbids it, and the command that asks."""

from __future__ import annotations

import json

import pytest
from dense_decoder import decoder
from explained import JOB, PAIR, SPLIT, holding, small, split_plan

from autopar import cli, models
from autopar.errors import BadInputError
from autopar.job import Job
from autopar.plan import Plan
from autopar.report.why_not import why_not
from autopar.solver.search import search


@pytest.fixture(scope="module")
def split() -> Plan:
    return split_plan()


def test_why_not_what_the_plan_has(split: Plan):
    assert why_not(split, small(), [f"{key}={value}" for key, value in SPLIT.items()]).verdict == "same"


def test_why_not_slower_says_where_the_time_goes():
    free = search(small(), JOB, PAIR)
    answer = why_not(free, small(), ["pp=2", "micro_batch=1"])
    other = search(small(), JOB, PAIR, {"pp": 2, "micro_batch": 1})
    assert free.mesh.pp == 1
    assert answer.verdict == "slower"
    assert answer.diff.step.more == pytest.approx(other.predicted.step_time - free.predicted.step_time)
    assert sum(amount.more for amount in answer.diff.seconds) == pytest.approx(answer.diff.step.more)
    assert "mesh" in {pair.name for pair in answer.diff.decisions}
    assert free.predicted.step_time < answer.bound <= other.predicted.step_time


def test_why_not_says_when_the_plan_was_held_back(split: Plan):
    answer = why_not(split, small(), ["tp=1"])
    assert answer.verdict == "faster"
    assert "tp=8" in answer.reason
    assert answer.diff.step.more < 0


def test_why_not_what_memory_forbids_says_where_and_how_many_bytes():
    model, job = decoder(4, hidden=256, ffn=1024), Job(8, 1024)
    wish = {"pp": 1, "tp": 1, "zero": 0, "micro_batch": 4, "recompute": "none", "offload": "none"}
    need = max(stage.total_bytes for stage in search(model, job, PAIR, wish).stages)
    tight = holding(PAIR, need - 12_345_678)
    answer = why_not(search(model, job, tight), model, [f"{key}={value}" for key, value in wish.items()])
    assert (answer.verdict, answer.short) == ("unavailable", True)
    assert f"stage 0 of 1 needs {need:,} bytes per device, 12,345,678 bytes" in answer.reason


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        ("tp=3", "makes 3 ranks"),
        ("ep=2", "has no experts to share"),
        ("micro_batch=3", "does not divide global_batch"),
        ("pp=8", "stages, but the model has only 4 blocks"),
    ],
)
def test_why_not_what_cannot_be(split: Plan, wish: str, reason: str):
    answer = why_not(split, small(), [wish])
    assert (answer.verdict, answer.short, answer.diff) == ("unavailable", False, None)
    assert reason in answer.reason


def test_why_not_of_an_unknown_key_is_a_mistake(split: Plan):
    with pytest.raises(BadInputError, match="unknown key 'tpp'"):
        why_not(split, small(), ["tpp=4"])


@pytest.fixture
def command(capsys, monkeypatch, tmp_path, split):
    """``autopar explain`` on an emitted folder's plan: (status, standard output, standard error)."""
    split.save(tmp_path / "plan.json")
    monkeypatch.setattr(models, "model_graph", lambda name: small())

    def run(*arguments: str):
        with pytest.raises(SystemExit) as stop:
            cli.main(["explain", str(tmp_path), "--model", "small.py:build", *arguments])
        return stop.value.code, *capsys.readouterr()

    return run


def test_the_command_without_a_question_gives_a_short_account(command):
    status, out, _ = command()
    assert status == 0
    assert "mesh         pp=1 x dp=1 x tp=8" in out
    assert "fullest rank 0 of 1" in out
    record = json.loads(command("--json")[1])
    assert record["mesh"]["tp"] == 8
    assert "gate" in record["operators"]["Layer"]
    assert sum(record["breakdown"].values()) == pytest.approx(record["step_time_s"])


@pytest.mark.parametrize(
    ("question", "words", "key"),
    [
        (("--op", "gate"), "Layer/gate, aten.linear", "strategies"),
        (("--block", "Layer"), "Layer, blocks 1-2: recompute none", "candidates"),
        (("--why-not", "tp=3"), "tp=3: unavailable", "verdict"),
        (("--why-not", "tp=8", "--why-not", "sp=true"), "decisions that differ", "verdict"),
    ],
)
def test_the_command_answers_in_words_and_as_json(command, question, words, key):
    status, out, err = command(*question)
    assert (status, err) == (0, "")
    assert words in out
    status, out, _ = command(*question, "--json")
    assert status == 0
    assert key in json.loads(out)


def test_the_command_takes_one_question_and_known_names(command):
    status, _, err = command("--op", "gate", "--block", "Layer")
    assert status == 2
    assert "one question at a time" in err
    for question in (("--op", "nothing"), ("--block", "nothing"), ("--why-not", "nothing=1")):
        status, out, err = command(*question)
        assert (status, out) == (2, "")
        assert err.startswith("error: ")
