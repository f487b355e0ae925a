"""Python's garbage collection, put off."""

import gc
import weakref

import pytest

from autopar import garbage
from autopar.garbage import uncollected


class Ring:
    """Refers to itself: only a collection frees it."""

    def __init__(self) -> None:
        self.me = self


def test_what_is_made_meanwhile_is_old_afterwards_and_still_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "MANY", 10_000)
    gc.collect()
    with uncollected():
        assert not gc.isenabled()
        ring = weakref.ref(Ring())
        kept = [[number] for number in range(20_000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    assert gc.get_count()[0] < len(kept) / 2, "the next collection would begin with all of it"
    assert ring() is not None
    gc.collect()
    assert ring() is None


def test_a_program_that_collects_nothing_or_has_frozen_its_own_is_left_alone() -> None:
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with pytest.raises(ValueError, match="on the way"), uncollected():
            raise ValueError("on the way")
        assert gc.isenabled()
        # Some of them may have died by their references meanwhile; thawed, none would be left.
        assert gc.get_freeze_count() > frozen / 2 > 0
    finally:
        gc.unfreeze()
