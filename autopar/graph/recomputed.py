"""What a model recomputes by itself (`torch.utils.checkpoint`): traced as it is computed once.

Which results are kept is the plan's choice. The reentrant form runs its function without gradients, as a graph would
see it: its backward runs the function again, which no graph shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.utils import checkpoint


@contextlib.contextmanager
def computed_once() -> Iterator[None]:
    """While open, reentrant checkpoints call their function."""
    function: Any = checkpoint.CheckpointFunction
    function.apply = lambda run, _, *args: run(*args)  # in place of the inherited one
    try:
        yield
    finally:
        del function.apply
