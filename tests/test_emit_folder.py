"""The emitted folder: complete, free of autopar, written whole or not at all."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plain_plans import plain_plan, small_gpt2, small_llama

from autopar.codegen.emit import emit, vocabulary_of
from autopar.codegen.loading import load_train
from autopar.errors import BadInputError
from autopar.graph.ir import ModelGraph
from autopar.models import model_graph
from autopar.plan import Plan

FILES = ["README.md", "launch.sh", "module.py", "plan.json", "runtime", "train.py"]


@pytest.fixture(scope="module")
def graph() -> ModelGraph:
    return model_graph(small_llama())


def test_only_what_is_used_of_the_runtime_travels(graph: ModelGraph, tmp_path: Path) -> None:
    plain = plain_plan(graph)
    kept = {"recompute": "selective", "saved": ("matmul",)}
    blocks = {key: replace(candidate, **kept) for key, candidate in plain.candidates.items()}
    emit(plain, graph, tmp_path / "plain")
    emit(replace(plain, candidates=blocks), graph, tmp_path / "selective")
    more = set(names(tmp_path / "selective" / "runtime")) - set(names(tmp_path / "plain" / "runtime"))
    assert more == {"recompute.py", "offload.py"}
    assert {"step.py", "sharding.py", "__init__.py"} <= set(names(tmp_path / "plain" / "runtime"))
    assert "collectives.py" not in names(tmp_path / "plain" / "runtime")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_folder_is_complete_and_needs_torch_alone(graph: ModelGraph, tmp_path: Path) -> None:
    plan = plain_plan(graph, pp=2, dp=2, zero=3, recompute="full", micro_batches=2)
    out = tmp_path / "made" / "out"
    emit(plan, graph, out)
    assert names(out) == FILES
    assert names(tmp_path / "made") == ["out"]
    assert Plan.load(out / "plan.json") == plan
    allowed = {"torch", "runtime", "module", *sys.stdlib_module_names}
    for source in [*out.glob("*.py"), *out.glob("runtime/*.py")]:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, source
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert str(node.module).split(".")[0] in allowed, source
    readme = (out / "README.md").read_text()
    assert "| 0 | Prologue to model.layers.1 | model.layers.0 to model.layers.1 |" in readme
    assert "pp=2 x dp=2 x tp=1" in readme
    assert "{{" not in readme + (out / "train.py").read_text() + (out / "launch.sh").read_text()


def test_emitted_files_load_side_by_side(graph: ModelGraph, tmp_path: Path) -> None:
    emit(plain_plan(graph, dp=2, zero=3), graph, tmp_path / "a")
    emit(plain_plan(graph, pp=2, micro_batches=4), graph, tmp_path / "b")
    before = set(sys.modules)
    a, b = load_train(tmp_path / "a"), load_train(tmp_path / "b")
    assert (a.MESH, a.ZERO, a.MICRO_BATCHES) == ({"pp": 1, "dp": 2, "cp": 1, "tp": 1}, 3, 1)
    assert (b.MESH, b.ZERO, b.MICRO_BATCHES) == ({"pp": 2, "dp": 1, "cp": 1, "tp": 1}, 0, 4)
    assert not {"train", "module", "runtime"} & (set(sys.modules) - before)
    assert not list(tmp_path.rglob("__pycache__"))


def test_vocabulary(graph: ModelGraph) -> None:
    assert vocabulary_of(graph) == 256


def test_weights_are_written_once_under_the_first_name(tmp_path: Path) -> None:
    model = small_gpt2()
    graph = model_graph(model)
    emit(plain_plan(graph), graph, tmp_path / "out", model.state_dict())
    weights = torch.load(tmp_path / "out" / "initial.pt", weights_only=True)
    assert set(weights) == set(graph.parameters)
    assert "lm_head.weight" not in weights or "transformer.wte.weight" not in weights
    torch.testing.assert_close(weights["transformer.h.0.ln_1.bias"], model.transformer.h[0].ln_1.bias.detach())


def test_emitting_again_keeps_what_the_user_put_there(graph: ModelGraph, tmp_path: Path) -> None:
    out = tmp_path / "out"
    emit(plain_plan(graph), graph, out, small_llama().state_dict())
    (out / "checkpoints").mkdir()
    (out / "checkpoints" / "latest").write_text("step_3\n")
    (out / "train.py").write_text("broken")
    emit(plain_plan(graph, dp=2), graph, out)
    assert names(out) == sorted([*FILES, "checkpoints"])
    assert (out / "checkpoints" / "latest").read_text() == "step_3\n"
    assert "broken" not in (out / "train.py").read_text()
    assert names(tmp_path) == ["out"]


def test_an_empty_folder_is_filled_and_another_refused(graph: ModelGraph, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    emit(plain_plan(graph), graph, tmp_path / "empty")
    assert names(tmp_path / "empty") == FILES
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(BadInputError, match="autopar did not write"):
        emit(plain_plan(graph), graph, tmp_path / "mine")
    assert names(tmp_path / "mine") == ["thesis.tex"]
    with pytest.raises(BadInputError, match="it is a file"):
        emit(plain_plan(graph), graph, tmp_path / "mine" / "thesis.tex")


def test_nothing_half_written(graph: ModelGraph, tmp_path: Path) -> None:
    plan = plain_plan(graph)
    with pytest.raises(BadInputError, match=r"no weight named model\.embed_tokens\.weight"):
        emit(plan, graph, tmp_path / "out", {})
    with pytest.raises(BadInputError, match="fingerprint"):
        emit(replace(plan, fingerprint="0" * 16), graph, tmp_path / "out")
    assert names(tmp_path) == []


def test_launch_script_refuses_another_world_size(graph: ModelGraph, tmp_path: Path) -> None:
    emit(plain_plan(graph, dp=4), graph, tmp_path / "out")
    environment = {"PATH": os.environ["PATH"], "NPROC_PER_NODE": "3"}
    done = subprocess.run([tmp_path / "out" / "launch.sh"], capture_output=True, text=True, env=environment, timeout=30)
    assert done.returncode == 2
    assert done.stderr == "launch.sh: this plan needs 4 processes (pp=1 x dp=4 x tp=1), not 1 x 3\n"


def test_launch_script_for_many_nodes_wants_an_address(graph: ModelGraph, tmp_path: Path) -> None:
    emit(plain_plan(graph, dp=4, cluster="2x2:h100"), graph, tmp_path / "out")
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run([tmp_path / "out" / "launch.sh"], capture_output=True, text=True, env=environment, timeout=30)
    assert (done.returncode, done.stderr) == (2, "launch.sh: set MASTER_ADDR to the first node's name or address\n")
    assert '--nnodes "$NNODES" --nproc-per-node "$NPROC_PER_NODE"' in (tmp_path / "out" / "launch.sh").read_text()


def test_plan_json_is_what_marks_the_folder(graph: ModelGraph, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plan.json").write_text(json.dumps({"name": "something else"}))
    with pytest.raises(BadInputError, match="autopar did not write"):
        emit(plain_plan(graph), graph, tmp_path / "out")
