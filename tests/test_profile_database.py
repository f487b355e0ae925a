"""The profile file: whole or not at all, refused with the reason, merged, compared, continued after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from profiles import DEVICE, collective, formula, op_records, profile_of, spread_points

from autopar import cli
from autopar.errors import BadInputError
from autopar.profiler.__main__ import main
from autopar.profiler.compare import difference, difference_text, summary_text
from autopar.profiler.database import Profile, merge

RECORDS = op_records(formula(), spread_points(3), dtypes=("bf16",))
SENT = (collective("all_reduce", 1024, 1e-5), collective("all_reduce", 1 << 26, 1e-3))
PROFILE = profile_of(RECORDS, collectives=SENT, figures={"launch.kernel_s": 2e-6}, spent_s={"ops": 10.0})


@pytest.fixture
def saved(tmp_path):
    PROFILE.save(tmp_path / "a.json")
    return tmp_path / "a.json"


def test_round_trip(saved):
    assert Profile.load(saved) == PROFILE
    assert json.loads(saved.read_text())["digest"] == PROFILE.digest
    assert [path.name for path in saved.parent.iterdir()] == ["a.json"]


def changed(text, **fields):
    return json.dumps({**json.loads(text), **fields})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[: len(text) // 2], "is not JSON .*cut short"),
        (lambda text: "", "is not JSON"),
        (lambda text: "[]", 'has no "format": "autopar profile"'),
        (lambda text: '{"mesh": {}}', 'has no "format": "autopar profile"'),
        (lambda text: changed(text, schema=99), "schema 99, this version of autopar reads 1"),
        (lambda text: changed(text, date="2020"), "do not match its digest"),
        (lambda text: text.replace('"bf16"', '"fp32"', 1), "do not match its digest"),
        (lambda text: text.replace('"repeats": 9', '"repeats": 8', 1), "do not match its digest"),
    ],
)
def test_what_is_no_whole_profile_is_refused_with_the_reason(saved, damage, reason):
    saved.write_text(damage(saved.read_text()))
    with pytest.raises(BadInputError, match=f"profile .*a.json.*{reason}"):
        Profile.load(saved)


def test_a_field_that_is_wrong_is_refused_under_its_own_digest():
    slow = replace(RECORDS[0], seconds=-1.0)
    with pytest.raises(BadInputError, match=r"a record of -1.0 s"):
        Profile.from_json(profile_of([slow]).to_json())
    with pytest.raises(BadInputError, match="device has no 'driver'"):
        Profile.from_json(profile_of(device={k: v for k, v in DEVICE.items() if k != "driver"}).to_json())
    with pytest.raises(BadInputError, match=r"cannot read profile nowhere.json: No such file"):
        Profile.load("nowhere.json")


def test_binary_files_are_refused(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInputError, match="it is not text"):
        Profile.load(tmp_path / "x.json")


def test_merging_keeps_the_surer_of_two_and_all_of_the_rest():
    surer = replace(RECORDS[0], seconds=5.0, repeats=50)
    other = replace(
        profile_of([surer, replace(RECORDS[1], at=(7,) * len(RECORDS[1].at))], figures={"launch.graph_s": 1e-6}),
        date="2027-01-01T00:00:00+00:00",
    )
    for pair in ((PROFILE, other), (other, PROFILE)):
        merged = merge(pair)
        assert len(merged.ops) == len(RECORDS) + 1
        assert surer in merged.ops
        assert RECORDS[0] not in merged.ops
        assert merged.figures == {"launch.kernel_s": 2e-6, "launch.graph_s": 1e-6}
        assert merged.date == other.date
        assert len(merged.collectives) == 2
    assert merge([PROFILE, PROFILE, PROFILE]).spent_s == {"ops": 10.0}
    assert merge([PROFILE]).digest == merge([PROFILE, PROFILE]).digest


@pytest.mark.parametrize("name", ["name", "driver", "torch", "processors", "memory_bytes", "backend"])
def test_profiles_of_different_devices_do_not_merge(name):
    other = profile_of(device={**DEVICE, name: "another"})
    with pytest.raises(BadInputError, match=f"of another device .*{name}"):
        merge([PROFILE, other])


def test_difference_tells_ratios_and_what_only_one_has():
    slower = [replace(r, seconds=2 * r.seconds) if r.op == "matmul" else r for r in RECORDS]
    other = replace(
        profile_of([*slower[1:], replace(slower[0], at=(9,) * len(slower[0].at))], collectives=SENT),
        device={**DEVICE, "driver": "2.0"},
    )
    found = difference(PROFILE, other)
    rows = {row["name"]: row for row in found["tables"]}
    first = rows[f"{RECORDS[0].op} bf16 {RECORDS[0].direction}"]
    assert (first["both"], first["only_a"], first["only_b"]) == (2, 1, 1)
    assert rows["matmul bf16 input_grad"]["median"] == pytest.approx(2)
    assert rows["silu bf16 forward"]["median"] == 1
    assert found["device"] == {"driver": ["1.0", "2.0"]}
    assert found["figures"] == {"launch.kernel_s": [2e-6, None]}
    text = difference_text(PROFILE, other)
    assert "driver: '1.0' in A, '2.0' in B" in text
    assert "launch.kernel_s: 2.00 us in A, - in B" in text
    assert difference_text(PROFILE, PROFILE).endswith("the two are the same")
    assert "matmul bf16" in summary_text(PROFILE)
    assert "GB/s" in summary_text(PROFILE)


@pytest.mark.parametrize("command", ["module", "cli"])
def test_merge_diff_and_show_as_commands(saved, tmp_path, capsys, command):
    def run(*arguments):
        given = [str(argument) for argument in arguments]
        if command == "module":
            return main(given), *capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main(["profile", *given])
        return stop.value.code, *capsys.readouterr()

    links = profile_of(collectives=SENT, date="2026-12-01T00:00:00+00:00")
    replace(PROFILE, collectives=()).save(saved)
    links.save(tmp_path / "b.json")
    status, out, err = run("merge", saved, tmp_path / "b.json", "-o", tmp_path / "c.json")
    assert (status, out) == (0, "")
    assert f"{len(RECORDS)} operators, 2 collectives" in err
    assert len(Profile.load(tmp_path / "c.json").collectives) == 2
    status, out, _ = run("diff", saved, tmp_path / "c.json")
    assert status == 0
    assert "median B/A" in out
    assert run("show", tmp_path / "c.json")[0] == 0
    (tmp_path / "c.json").write_text("{}")
    status, out, err = run("diff", saved, tmp_path / "c.json")
    assert (status, out) == (2, "")
    assert err.startswith("error: profile")
    assert len(err.splitlines()) == 1
    status, _, err = run("merge", saved, "-o", tmp_path)
    assert status == 2
    assert "a folder is in the way" in err


def test_a_killed_run_leaves_a_whole_file_and_is_continued(tmp_path, capsys):
    out = tmp_path / "cpu.json"
    command = [sys.executable, "-m", "autopar.profiler", "ops", "--ops", "add,copy,silu", "-o", str(out), "--minutes"]
    process = subprocess.Popen([*command, "2"], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (out.exists() and Profile.load(out).ops) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    before = Profile.load(out)
    assert before.ops
    spent = before.spent_s["ops"]
    assert 0 < spent < 100
    done = subprocess.run([*command, f"{(spent + 1) / 60}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    after = Profile.load(out)
    assert {record.key for record in before.ops} <= {record.key for record in after.ops}
    assert spent + 0.5 < after.spent_s["ops"] < spent + 100
    kept = {record.key: record for record in after.ops}
    assert all(kept[record.key] == record for record in before.ops)
    assert main([*command[3:], "0.001"]) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert Profile.load(out) == after


def test_a_file_of_another_device_is_not_continued(tmp_path, capsys):
    PROFILE.save(tmp_path / "gpu.json")
    assert main(["ops", "--minutes", "0.01", "-o", str(tmp_path / "gpu.json")]) == 2
    assert "is of another device (backend 'cuda', not 'cpu'" in capsys.readouterr().err
    assert Profile.load(tmp_path / "gpu.json") == PROFILE
