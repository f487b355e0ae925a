"""Emitted text of representative plans is what was read and kept."""

from __future__ import annotations

import difflib

import pytest
from snapshots import FOLDER, SNAPSHOTS, path_of


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_emitted_text_is_the_kept_one(name: str) -> None:
    kept, found = path_of(name).read_text(), SNAPSHOTS[name].text()
    difference = difflib.unified_diff(kept.splitlines(), found.splitlines(), "kept", "emitted now", lineterm="", n=2)
    told = "\n".join(list(difference)[:200])
    assert not told, f"{path_of(name).name} differs; read this, then `make snapshots`:\n{told}"


def test_every_kept_text_belongs_to_a_plan() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {path_of(name).name for name in SNAPSHOTS}
