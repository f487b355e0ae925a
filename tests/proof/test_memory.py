"""Predicted bytes are those that emitted code holds: plans of every kind, on ranks of their own."""

from pathlib import Path

import pytest

from proof.memory import PLANS, measure


@pytest.mark.long
def test_plans_hold_what_is_predicted(tmp_path: Path) -> None:
    """Static bytes within 1 %, the peak within 3 %, on every pipeline rank."""
    rows, failed = measure(tmp_path / "memory")
    assert not failed
    assert {row.name for row in rows} == {plan.name for plan in PLANS}
    assert len(PLANS) >= 20
    assert [failure for row in rows for failure in row.failures] == []
