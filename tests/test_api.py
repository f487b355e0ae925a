"""The public calls on a small model: search, predict, emit, verify, and what they refuse."""

from dataclasses import replace

import pytest
import torch
from hand_plans import llama

import autopar
from autopar import BadInputError, Cluster, Job, Plan

CLUSTER = Cluster.parse("1x4:h100")
JOB = Job(global_batch=8, seq_len=32, dtype="fp32")
MESH = {"pp": 1, "dp": 2, "cp": 1, "tp": 2}
ALL = {**MESH, "zero": 3, "sp": True, "micro_batch": 2, "recompute": "none", "schedule": "none"}


def meta_llama():
    with torch.device("meta"):
        return llama()


@pytest.fixture(scope="module")
def plan():
    return autopar.search(meta_llama(), JOB, CLUSTER, fix=MESH)


def timeless(plan):
    return replace(plan, seconds={})


def test_search_fixes_what_it_is_told(plan):
    assert plan.mesh.axes() == MESH
    assert plan.fixed == MESH
    assert plan.predicted.step_time > 0
    assert plan.bound <= plan.predicted.step_time * (1 + 1e-9)
    assert plan.gap == pytest.approx(plan.predicted.step_time / plan.bound - 1, abs=1e-9)
    assert sum(plan.predicted.breakdown.values()) == pytest.approx(plan.predicted.step_time)
    assert {"trace"} < set(plan.seconds)


def test_search_is_deterministic_and_the_plan_round_trips(plan, tmp_path):
    assert timeless(autopar.search(meta_llama(), JOB, CLUSTER, fix=MESH)) == timeless(plan)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_searched_plan_prints_its_sharding(plan):
    text = str(plan)
    assert "self_attn.q_proj" in text
    assert "collectives forward" in text
    assert max(map(len, text.splitlines())) <= 100


def test_predict_prices_the_plan_it_is_given():
    given = autopar.predict(meta_llama(), JOB, CLUSTER, fix=ALL)
    assert given.fixed == ALL
    assert (given.mesh.axes(), given.micro_batch, given.zero) == (MESH, 2, 3)
    assert "sequence parallel" in given.described["tp"]
    assert all(candidate.recompute == "none" for candidate in given.candidates.values())


def test_search_is_never_slower_than_a_part_fixed(plan):
    assert autopar.search(meta_llama(), JOB, CLUSTER).predicted.step_time <= plan.predicted.step_time * (1 + 1e-9)


def test_module_and_string_of_one_structure_share_plans(plan, tmp_path):
    source = "from hand_plans import llama\n\ndef build():\n    import torch\n    with torch.device('meta'):\n"
    (tmp_path / "mine.py").write_text(source + "        return llama()\n")
    name = f"{tmp_path / 'mine.py'}:build"
    named = autopar.search(name, JOB, CLUSTER, fix=MESH)
    assert named.model == name
    assert plan.model == "LlamaForCausalLM"
    assert named.fingerprint == plan.fingerprint


def test_emit_writes_the_folder_with_the_weights_a_model_has(plan, tmp_path):
    autopar.emit(plan, meta_llama(), tmp_path / "empty")
    files = {path.name for path in (tmp_path / "empty").iterdir()}
    assert {"module.py", "train.py", "plan.json", "launch.sh", "README.md"} <= files
    assert "initial.pt" not in files
    assert Plan.load(tmp_path / "empty" / "plan.json") == plan
    model = llama()
    autopar.emit(plan, model, tmp_path / "full")
    weights = torch.load(tmp_path / "full" / "initial.pt")
    assert torch.equal(weights["model.embed_tokens.weight"], model.model.embed_tokens.weight)


def test_another_model_is_refused_and_nothing_is_written(plan, tmp_path):
    other = llama(layers=3)
    for call in (
        lambda: autopar.emit(plan, other, tmp_path / "out"),
        lambda: autopar.verify(plan, other),
        lambda: autopar.parallelize(other, plan),
    ):
        with pytest.raises(BadInputError, match="made for LlamaForCausalLM"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_parallelize_refuses_another_world_size(plan):
    with pytest.raises(BadInputError, match="4"):
        autopar.parallelize(meta_llama(), plan)


def test_a_path_is_not_a_plan(tmp_path):
    with pytest.raises(BadInputError, match=r"Plan\.load"):
        autopar.emit("plan.json", meta_llama(), tmp_path / "out")


def test_verify_measures_the_error(plan):
    autopar.verify(plan, llama())


@pytest.mark.parametrize("fix", [{"tpp": 2}, {"tp": 0}, {"tp": 3}, {"pp": 64}, {"mesh": {"pp": 2, "dp": 2, "tp": 2}}])
def test_bad_fixes_are_refused(fix):
    with pytest.raises(BadInputError, match=r"^fix: "):
        autopar.search(meta_llama(), JOB, CLUSTER, fix=fix)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"model": 3}, "torch.nn.Module"),
        ({"job": {"global_batch": 8}}, "autopar.Job"),
        ({"cluster": "1x4:h100"}, "autopar.Cluster"),
        ({"inputs": [1]}, "inputs"),
        ({"fix": 8}, "mapping"),
        ({"fix": "tp=8"}, "mapping"),
    ],
    ids=str,
)
def test_arguments_of_another_type_are_refused(wrong, told):
    with pytest.raises(BadInputError, match=told):
        autopar.search(**{"model": "llama3-8b", "job": JOB, "cluster": CLUSTER, **wrong})
