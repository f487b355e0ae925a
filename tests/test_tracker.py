"""The proof's counter of live bytes stays exact while other threads let go of tensors (as gloo's do)."""

from __future__ import annotations

import sys
import threading
from collections import deque

import pytest
import torch
from proof.tracker import Tracker


@pytest.fixture
def hurried_threads():
    """Threads change places as often as the interpreter lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_bytes_freed_by_another_thread_are_counted_exactly(hurried_threads):
    handed: deque[torch.Tensor | None] = deque()

    def let_go() -> None:
        while True:
            if handed and handed.popleft() is None:
                return

    thread = threading.Thread(target=let_go)
    thread.start()
    with Tracker() as tracker:
        kept = []
        try:
            for _ in range(2000):
                handed.append(torch.empty(16, dtype=torch.float32))
                kept.append(torch.empty(256, dtype=torch.float32))  # a new peak each time: what is held is gone through
        finally:
            handed.append(None)
            thread.join()
        assert tracker.live == sum(value.untyped_storage().nbytes() for value in kept) == 2000 * 1024
        assert tracker.peak >= tracker.live
        assert sum(tracker.at_peak.values()) == tracker.peak


def test_a_storage_that_grows_is_counted_once():
    with Tracker() as tracker:
        value = torch.empty(16, dtype=torch.uint8)
        value.untyped_storage().resize_(64)
        assert tracker.live == 64
        value.untyped_storage().resize_(0)
        assert (tracker.live, tracker.peak) == (0, 64)
        del value
        assert tracker.live == 0
