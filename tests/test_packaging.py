"""The tree as a package: what a wheel holds, the top-level links, the pins."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import autopar

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The names in a wheel built from a copy of the tree, without network."""
    place = tmp_path_factory.mktemp("tree")
    skip = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, place / "tree", symlinks=True, ignore=skip)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(place)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=place / "tree", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with zipfile.ZipFile(next(place.glob("*.whl"))) as archive:
        return [name for name in archive.namelist() if not name.endswith("/")]


def test_wheel_holds_the_package_alone(wheel):
    tops = {name.split("/")[0] for name in wheel}
    assert tops == {"autopar", f"autopar-{autopar.__version__}.dist-info"}


def test_wheel_holds_every_file_of_the_package(wheel):
    files = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "autopar").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    assert files == {name for name in wheel if name.startswith("autopar/")}


def test_version_is_written_once_and_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == autopar.__version__
    assert f"## [{autopar.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", ["profiler", "solver", "codegen"])
def test_top_level_links_lead_into_the_package(name):
    link = ROOT / name
    assert link.is_symlink()
    assert Path(os.readlink(link)) == Path("autopar", name)


def test_pins_name_every_requirement_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().split()]
    lowered = [re.sub("[-_.]+", "-", pin).lower() for pin in pins]
    assert len(set(lowered)) == len(lowered)
    wanted = [
        *project["dependencies"],
        *(need for extra in project["optional-dependencies"].values() for need in extra),
    ]
    names = {re.sub("[-_.]+", "-", re.match(r"[\w.-]+", need)[0]).lower() for need in wanted} - {"autopar"}
    assert names <= set(lowered)
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text()


def test_integration_runs_check_and_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make check test" in script.read_text()


def test_public_names_all_load():
    for name in autopar.__all__:
        assert getattr(autopar, name) is not None
    assert set(autopar.__all__) <= set(dir(autopar))
    with pytest.raises(AttributeError, match="no attribute 'serch'"):
        _ = autopar.serch
