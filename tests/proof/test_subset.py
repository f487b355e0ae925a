"""A part of the proof that every run of the tests makes: each value of each key once, and mistakes that it must notice.

`make proof` runs all of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from autopar.codegen import prove
from autopar.solver import capabilities
from proof import running
from proof.cases import Case, values_cover
from proof.running import Outcome, plan_of, prepare, run, table


def replaced(file: str, old: str, new: str) -> Callable[[Path], None]:
    """Write ``new`` for ``old`` in a file of an emitted folder."""

    def change(folder: Path) -> None:
        source = (folder / file).read_text()
        assert source.count(old) == 1, (file, old, source.count(old))
        (folder / file).write_text(source.replace(old, new))

    return change


AGAIN = (
    # Position biases that two layers of a stage read, under a split backward.
    Case.of(
        family="t5",
        mesh="pp2 tp2",
        schedule="dualpipev",
        micro_batches=4,
        sp=False,
        frozen="embedding",
        stages="ends alone",
    ),
)
"""Cases that once failed and hold no value of their own."""

MISTAKES: dict[str, tuple[Case, Callable[[Path], None]]] = {
    "norm weights of split sequences are not summed": (
        Case.of(mesh="tp4", sp=True),
        replaced(
            "runtime/collectives.py",
            "return _reduced(gradient, ctx.axis), None\n\n\nclass _Shard(",
            "return gradient, None\n\n\nclass _Shard(",
        ),
    ),
    "gradients are divided twice": (
        Case.of(mesh="dp4", sharding="zero2"),
        replaced("runtime/sharding.py", "set_gradient_divide_factor(1.0)", "set_gradient_divide_factor(2.0)"),
    ),
}
"""A case, and what is changed in its emitted folder."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    found = run((*values_cover(), *AGAIN), tmp_path_factory.mktemp("subset") / "cases", types=(8,))
    print("\n" + table(found))
    return found


@pytest.mark.proof
def test_every_value_of_every_key_is_proved(outcomes: list[Outcome]) -> None:
    assert [failure for outcome in outcomes for failure in outcome.failures] == []


@pytest.mark.proof
def test_mistakes_and_what_is_refused_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Emitted code with a mistake in it, and the plan that a limit refuses because its gradients would be wrong."""
    names = []
    for name, (case, change) in MISTAKES.items():
        assert not prepare(case, tmp_path).failed
        cases = json.loads((tmp_path / "cases.json").read_text())
        change(tmp_path / cases[-1]["folder"])
        cases[-1]["name"] = name
        (tmp_path / "cases.json").write_text(json.dumps(cases))
        names.append(name)
    monkeypatch.setattr(capabilities, "check_executable", lambda plan: None)
    monkeypatch.setattr(running, "plan_of", lambda case: replace(plan_of(case), zero=3))
    refused = Case.of(mesh="pp2 dp2", schedule="zbv", sharding="zero1", micro_batches=4)
    assert not prepare(refused, tmp_path).failed
    rows, stopped = prove.prove_each(tmp_path, 4)
    wrong = {row.name for row in rows if not row.gradient < 0.01 and row.failures()}
    assert wrong | set(stopped) == {*names, str(refused)}, prove.table(rows)
    assert set(names) <= wrong
