"""The command: its contract on standard output, its exit statuses, and that asking for help costs nothing."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from small_plan import small_plan

from autopar import api, cli, errors
from autopar.objective import Objective

SEARCH = ("search", "tiny", "--cluster", "2x4:h100", "--global-batch", "16", "--seq-len", "4096")


@pytest.fixture
def command(capsys):
    """Run the command in this process: (status, standard output, standard error)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        return stop.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def searched(monkeypatch):
    """Searches answer the hand-written plan at once; what they were asked is returned."""
    asked = {}

    def search(model, job, cluster, inputs=None, loss=None, fix=None, objective=None, progress=None, **limits):
        print("a library prints")
        asked.update(model=model, job=job, cluster=str(cluster), fix=fix, objective=objective, limits=limits)
        return replace(small_plan(model), job=job)

    monkeypatch.setattr(api, "search", search)
    return asked


def test_help_is_quick_and_imports_no_torch():
    code = (
        "import sys\nfrom autopar.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "assert not {'torch', 'transformers', 'ortools', 'numpy'} & set(sys.modules)"
    )
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begin
    assert done.returncode == 0, done.stderr
    assert "search" in done.stdout
    assert seconds < 5  # measured 0.4 s; the limit allows for a busy machine


def test_no_arguments_print_the_help(command):
    status, out, _ = command()
    assert status == 0
    assert "search" in out


def test_module_runs_as_the_command():
    done = subprocess.run([sys.executable, "-m", "autopar", "report", "no.json"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot read plan no.json")


def test_search_prints_the_plan(command, searched):
    status, out, err = command(*SEARCH, "--fix", "tp=2", "--fix", "recompute=full")
    assert status == 0
    assert err == ""
    assert "step time" in out
    assert searched["fix"] == {"tp": 2, "recompute": "full"}
    assert (searched["job"].global_batch, searched["job"].seq_len) == (16, 4096)


def test_search_takes_an_objective(command, searched):
    command(*SEARCH, "--objective", "devices", "--within", "2.5")
    assert searched["objective"] == Objective("devices", within_s=2.5)
    command(*SEARCH, "--objective", "cost", "--price", "h100=2.5", "--price", "a100-80g=1")
    assert searched["objective"] == Objective("cost", price={"h100": 2.5, "a100-80g": 1.0})
    command(*SEARCH)
    assert searched["objective"] == Objective()


def test_search_takes_limits(command, searched):
    command(*SEARCH, "--gap", "0.002", "--time-limit", "9.5", "--work-limit", "7")
    limits = {"gap": 0.002, "time_limit": 9.5, "work_limit": 7}
    assert searched["limits"] == {**limits, "equal_blocks": True}
    for given, equal in (("--equal-blocks", True), ("--no-equal-blocks", False)):
        command(*SEARCH, given)
        assert searched["limits"] == {"equal_blocks": equal}


def test_json_is_one_object_and_nothing_else(command, searched):
    status, out, err = command(*SEARCH, "--json")
    assert status == 0
    assert "a library prints" in err
    record = json.loads(out)
    assert list(record)[:5] == ["model", "cluster", "job", "mesh", "micro_batch"]
    assert len(out.splitlines()) == 1


def test_predict_takes_the_same_options(command, searched):
    status, out, _ = command("predict", *SEARCH[1:], "--fix", "pp=2", "--json")
    assert status == 0
    assert searched["fix"] == {"pp": 2}
    assert json.loads(out)["model"] == "tiny"


def test_out_writes_the_folder(command, searched, monkeypatch, tmp_path):
    monkeypatch.setattr(api, "emit", lambda plan, model, out: plan.save(out / "plan.json"))
    status, out, _ = command(*SEARCH, "-o", tmp_path / "folder")
    assert status == 0
    assert "launch.sh" in out
    assert (tmp_path / "folder" / "plan.json").exists()


def test_out_json_writes_the_plan_alone(command, searched, tmp_path):
    status, _, _ = command(*SEARCH, "-o", tmp_path / "found.json", "--json")
    assert status == 0
    status, out, _ = command("report", tmp_path / "found.json", "--json")
    assert status == 0
    assert json.loads(out)["step_time_s"] == 0.7


def test_emit_uses_the_model_the_plan_names(command, monkeypatch, tmp_path):
    small_plan("somewhere.py:build").save(tmp_path / "plan.json")
    asked = []
    monkeypatch.setattr(api, "emit", lambda plan, model, out: asked.append((plan.mesh.tp, model, out)))
    assert command("emit", tmp_path, "-o", tmp_path / "out")[0] == 0
    assert asked == [(2, "somewhere.py:build", tmp_path / "out")]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.VerificationError("gradient of w is off by 1e-2"), 1),
        (errors.BadInputError("no such thing"), 2),
        (errors.UnsupportedError("cannot run this"), 2),
        (errors.InfeasibleError("stage 0 is short of 1 byte"), 3),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_statuses(command, monkeypatch, tmp_path, error, status):
    def fail(*_):
        raise error

    small_plan("tiny.py:build").save(tmp_path / "plan.json")
    monkeypatch.setattr(api, "verify", fail)
    found, out, err = command("verify", tmp_path / "plan.json")
    assert found == status
    assert out == ""
    assert err == f"error: {str(error) or 'interrupted'}\n"


def test_interrupt_within_an_import_is_an_interrupt(command, monkeypatch):
    def search(*_, **__):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as cut:
            raise ImportError("initialization failed") from cut

    monkeypatch.setattr(api, "search", search)
    before = signal.getsignal(signal.SIGINT)
    try:
        status, out, err = command(*SEARCH, "--json")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (status, out, err) == (130, "", "error: interrupted\n")


def test_bugs_keep_their_traceback(monkeypatch, tmp_path):
    def fail(*_):
        raise ZeroDivisionError("a bug")

    small_plan("tiny.py:build").save(tmp_path / "plan.json")
    monkeypatch.setattr(api, "verify", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["verify", str(tmp_path / "plan.json")])
