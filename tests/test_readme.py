"""README.md says what the data says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from autopar.solver.capabilities import CAPABILITIES, LIMITS

ROOT = Path(__file__).parent.parent


def test_the_table_of_capabilities_is_current() -> None:
    specification = importlib.util.spec_from_file_location("refresh_readme", ROOT / "examples" / "refresh_readme.py")
    assert specification is not None
    assert specification.loader is not None
    refresh = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(refresh)
    text = (ROOT / "README.md").read_text()
    assert refresh.with_capabilities(text) == text, "run `make readme`"
    assert all(f"| `{key}` |" in text for key in CAPABILITIES)
    assert all(limit.reason in text for limit in LIMITS)
