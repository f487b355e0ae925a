"""Batches of cases under hypothesis, each with a seed of its own."""

from __future__ import annotations

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st

from fuzz.cases import Counts, WrongError, check


def run_batch(seed: int, index: int, models: int, counts: Counts, shrink: bool = True) -> str:
    """Run batch ``index`` of so many models; the smallest case that fails in words, "" if none does."""

    @hypothesis.seed(seed * 1_000_003 + index)
    @settings(
        max_examples=models,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        verbosity=Verbosity.quiet,
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        check(data, counts)

    try:
        run()
    except WrongError as wrong:
        return str(wrong)
    return ""
