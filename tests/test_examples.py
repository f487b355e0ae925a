"""examples/emitted/ is what autopar emits now, and is clean code."""

from __future__ import annotations

import difflib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def emitted() -> ModuleType:
    specification = importlib.util.spec_from_file_location("emitted_examples", ROOT / "examples" / "emitted.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["emitted_examples"] = module
    specification.loader.exec_module(module)
    return module


def texts(folder: Path) -> dict[str, str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(paths)}


@pytest.mark.parametrize("name", ["llama_tp2_dp2", "llama_cp2_tp2", "gpt2_pp2_interleaved"])
def test_emitted_examples_are_current(emitted: ModuleType, name: str, tmp_path: Path) -> None:
    emitted.EXAMPLES[name].write(tmp_path / name)
    kept, found = texts(emitted.EMITTED / name), texts(tmp_path / name)
    assert set(kept) == set(found), "run `make examples`"
    for file, text in found.items():
        if kept[file] != text:
            lines = difflib.unified_diff(kept[file].splitlines(), text.splitlines(), "kept", "emitted now", "", n=1)
            told = "\n".join(list(lines)[:100])
            pytest.fail(f"{name}/{file} differs; read this, then run `make examples`:\n{told}")


def test_every_example_is_kept(emitted: ModuleType) -> None:
    assert {path.name for path in emitted.EMITTED.iterdir()} == set(emitted.EXAMPLES)


def test_emitted_code_is_clean(emitted: ModuleType) -> None:
    """Linted as the project is, and formatted: train.py and runtime at 120 columns, module.py at 88."""
    folders = [str(path) for path in emitted.EMITTED.iterdir()]
    modules = [f"{folder}/module.py" for folder in folders]
    for command in (
        ["check", *folders],
        ["format", "--check", "--line-length", "120", *folders],
        ["format", "--check", "--line-length", "88", *modules],
    ):
        done = subprocess.run([sys.executable, "-m", "ruff", *command], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout
