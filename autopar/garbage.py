"""Python's garbage collection, put off while much is made that lasts."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

MANY = 500_000
"""Objects from which on the next collection would be felt: some tenths of a second."""


@contextmanager
def uncollected() -> Iterator[None]:
    """No collection meanwhile: each would go through all of torch and sympy again, a fifth of a trace's time, and find
    little. What is made counts as old afterwards, so that the next one does not begin with all of it."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            # How much is frozen takes as long to say as there is.
            if gc.get_count()[0] > MANY and not gc.get_freeze_count():
                gc.freeze()
                gc.unfreeze()  # to the oldest generation, without a walk
            gc.enable()
