"""What a user can get wrong: one clear message, its exit status, no traceback, nothing left on disk."""

import json

import pytest
from small_plan import small_plan

from autopar import BadInputError, Cluster, Job, Plan, cli


@pytest.fixture
def refuse(capsys, tmp_path):
    """Run the command, which must fail with one line; gives (status, that line). No file may appear."""

    def run(*arguments):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        assert sorted(tmp_path.rglob("*")) == before
        return stop.value.code, err

    return run


def search(model="llama3-8b", cluster="8x8:h100", batch=512, seq=8192, *more):
    return ("search", model, "--cluster", cluster, "--global-batch", batch, "--seq-len", seq, *more)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (search(cluster="8x8:h1000"), ["'h1000'", "h100"]),
        (search(cluster="8x8"), ["'8x8'", "8x8:h100"]),
        (search(cluster="0x8:h100"), ["at least 1"]),
        (search(cluster="-1x8:h100"), ["at least 1"]),
        (search(cluster="no-such.toml"), ["no-such.toml"]),
        (search(batch=0), ["global_batch", "positive", "0"]),
        (search(seq=-8192), ["seq_len", "positive", "-8192"]),
        (search(batch="many"), ["--global-batch", "integer"]),
        (search("llama3-8bb"), ["llama3-8bb", "llama3-8b"]),
        (search("no-such/config.json"), ["no-such/config.json"]),
        (search("no_such.py:build"), ["no_such.py"]),
        ((*search(), "--dtype", "fp7"), ["dtype", "'fp7'", "bf16"]),
        ((*search(), "--optimizer", "sdg"), ["optimizer", "'sdg'", "adamw"]),
        ((*search(), "--fix", "tpp=8"), ["'tpp'", "tp"]),
        ((*search(), "--fix", "tp"), ["KEY=VALUE", "'tp'"]),
        ((*search(), "--fix", "tp=0"), ["tp", "positive"]),
        ((*search(), "--fix", "tp=2", "--fix", "tp=4"), ["tp", "twice"]),
        ((*search(), "--fix", "zero=7"), ["zero", "'7'"]),
        ((*search(), "--fix", "recompute=most"), ["recompute", "'most'"]),
        ((*search(), "--fix", "tp=7"), ["tp=7", "64"]),
        ((*search(), "--fix", "mesh=pp=2,dp=2,tp=2"), ["pp=2", "8", "64"]),
        ((*search(), "--fix", "pp=1", "--fix", "schedule=1f1b"), ["schedule", "pp=1"]),
        ((*search(), "--fast"), ["--fast"]),
        (search()[:-2], ["--seq-len"]),
        (("serch",), ["serch"]),
        (("report", "missing.json"), ["missing.json"]),
    ],
    ids=lambda value: " ".join(map(str, value))[:60] if isinstance(value, tuple) else "",
)
def test_bad_arguments(refuse, arguments, told):
    status, message = refuse(*arguments)
    assert status == 2
    for part in told:
        assert part in message


def test_what_does_not_fit_says_where_and_by_how_much(refuse, tmp_path):
    status, message = refuse(*search(cluster="1x1:h100"), "--fix", "offload=none", "-o", tmp_path / "out")
    assert status == 3
    for part in ("stage 0 of 1", "bytes", "It would fit with offload not fixed to none"):
        assert part in message


def test_broken_config(refuse, tmp_path):
    (tmp_path / "config.json").write_text("{not json")
    assert "config.json" in refuse(*search(tmp_path / "config.json"))[1]
    (tmp_path / "config.json").write_text('{"model_type": "nothing-known"}')
    assert "nothing-known" in refuse(*search(tmp_path / "config.json"))[1]


def test_broken_module(refuse, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def build():\n    return 3\n\ndef fail():\n    raise RuntimeError('no weights here')\n")
    assert "build" in refuse(*search(f"{path}:build"))[1]
    assert "no weights here" in refuse(*search(f"{path}:fail"))[1]
    assert "other" in refuse(*search(f"{path}:other"))[1]


def damaged(change):
    data = small_plan().to_json()
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "not JSON"),
        (json.dumps(small_plan().to_json())[:500], "cut short"),
        ("[1, 2]", "version"),
        ("{}", "version"),
        ("null", "version"),
        (damaged(lambda plan: plan.update(version=99)), "99"),
        (damaged(lambda plan: plan.pop("stages")), "stages"),
        (damaged(lambda plan: plan.update(mesh={"pp": 2, "dp": 2, "cp": 1, "tp": 4, "tp_parts": []})), "16 ranks"),
        (damaged(lambda plan: plan.update(mesh={"pp": "2", "dp": 2, "tp": 2})), "damaged"),
        (damaged(lambda plan: plan["job"].update(global_batch=-1)), "global_batch"),
        (damaged(lambda plan: plan["stages"].pop()), "1 stages for pp=2"),
        (damaged(lambda plan: plan["stages"][1]["runs"][0].update(start=3)), "block 2 should start"),
        (damaged(lambda plan: plan["candidates"].pop("Layer/plain")), "Layer/plain"),
        (damaged(lambda plan: plan.update(micro_batches=9)), "18 samples"),
        (damaged(lambda plan: plan["candidates"]["Layer/plain"].update(decision=None)), "damaged"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_damaged_plans(refuse, tmp_path, text, told):
    path = tmp_path / "plan.json"
    path.write_text(text)
    for command in (("report", path), ("emit", path, "-o", tmp_path / "out"), ("verify", path)):
        status, message = refuse(*command)
        assert status == 2
        assert str(path) in message
        assert told in message


def test_plan_that_is_no_text(refuse, tmp_path):
    (tmp_path / "plan.json").write_bytes(b"\x80\x81\x00" * 100)
    assert "plan.json" in refuse("verify", tmp_path)[1]


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (("--cluster", "1x4:h100"), ["2x4:h100", "1x4:h100"]),
        (("--cluster", "2x4:a100-80g"), ["2x4:h100", "2x4:a100-80g"]),
        (("--seq-len", "8192"), ["seq_len 4096", "8192"]),
        (("--global-batch", "8"), ["global_batch 16", "8"]),
        (("--global-batch", "0"), ["global_batch", "positive"]),
    ],
)
def test_plan_for_another_cluster_or_shape(refuse, tmp_path, option, told):
    small_plan().save(tmp_path / "plan.json")
    for command in (("emit", tmp_path, "-o", tmp_path / "out"), ("verify", tmp_path)):
        status, message = refuse(*command, *option)
        assert status == 2
        for part in told:
            assert part in message


def test_plan_for_another_model(refuse, tmp_path):
    small_plan().save(tmp_path / "plan.json")
    for command in (("emit", tmp_path, "-o", tmp_path / "out"), ("verify", tmp_path)):
        status, message = refuse(*command, "--model", "llama3-8b")
        assert status == 2
        assert "made for tiny" in message
        assert "llama3-8b" in message


def test_plan_whose_model_is_gone(refuse, tmp_path):
    small_plan("gone.py:build").save(tmp_path / "plan.json")
    assert "gone.py" in refuse("verify", tmp_path)[1]


def test_plan_of_a_module_made_in_python(refuse, tmp_path):
    small_plan("TinyModel").save(tmp_path / "plan.json")
    for command in (("emit", tmp_path, "-o", tmp_path / "out"), ("verify", tmp_path)):
        status, message = refuse(*command)
        assert status == 2
        assert "TinyModel" in message
        assert "--model" in message


def test_something_in_the_way_is_seen_before_the_search(refuse, tmp_path):
    (tmp_path / "out").write_text("mine")
    (tmp_path / "plan.json").mkdir()
    assert "in the way" in refuse(*search(), "-o", tmp_path / "out")[1]
    assert "in the way" in refuse(*search(), "-o", tmp_path / "plan.json")[1]
    assert "in the way" in refuse(*search(), "-o", tmp_path / "out" / "below")[1]
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("value", [0, -1, 1.5, "8", True, None])
def test_job_sizes_are_positive_integers(value):
    with pytest.raises(BadInputError, match="global_batch"):
        Job(global_batch=value, seq_len=128)
    with pytest.raises(BadInputError, match="seq_len"):
        Job(global_batch=8, seq_len=value)


def test_loading_says_what_is_wrong(tmp_path):
    with pytest.raises(BadInputError, match="cannot read plan"):
        Plan.load(tmp_path / "none.json")
    with pytest.raises(BadInputError, match="another model"):
        small_plan().check_model("fedcba9876543210")
    small_plan().check_model(small_plan().fingerprint)
    small_plan().check_cluster(Cluster.parse("2x4:h100"))


def test_failed_save_leaves_the_old_plan(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    small_plan().save(path)
    old = path.read_text()

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", no_space)
    with pytest.raises(OSError, match="No space"):
        small_plan("other").save(path)
    assert path.read_text() == old
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_a_batch_that_fits_no_mesh(refuse):
    status, message = refuse(*search(batch=7), "--fix", "pp=1", "--fix", "tp=1", "--fix", "cp=1")
    assert status == 2
    assert "global_batch 7" in message
    assert "64" in message
    assert "{}" not in message
    assert "1F1B" not in message


def test_a_folder_of_others_is_refused_before_the_search(refuse, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    status, message = refuse(*search("no-such-model"), "-o", tmp_path)
    assert status == 2
    assert "did not write" in message
