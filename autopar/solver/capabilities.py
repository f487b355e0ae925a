"""What can be executed today, as data: the search stays inside this table, and a fix outside it is refused by name.

Later capabilities widen the table; nothing else needs to know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Capability:
    """One fixable key: the form of its values, the values that can be executed (None: any of that form), and for the
    rest the reason and the way out."""

    form: str
    executable: tuple[Any, ...] | None
    missing: str = ""


CAPABILITIES: dict[str, Capability] = {
    "dp": Capability("size", None),
    "fsdp": Capability("size", None),
    "zero": Capability(
        "level",
        (0, 3),
        "zero 1 and 2 need reduction without resharding, which is not emitted yet; use zero=0 or zero=3",
    ),
    "tp": Capability("size", None),
    "sp": Capability("switch", (True, False)),
    "cp": Capability(
        "size", (1,), "context parallelism as an axis of its own is not emitted yet; leave cp=1 and let tp split"
    ),
    "ep": Capability("size", (1,), "expert parallelism is not emitted yet; leave ep=1"),
    "pp": Capability("size", None),
    "vpp": Capability("size", (1,), "interleaved (virtual) stages are not emitted yet; leave vpp=1"),
    "schedule": Capability("name", ("none", "1f1b"), 'only "1f1b" (and "none", for a single stage) is emitted yet'),
    "micro_batch": Capability("size", None),
    "recompute": Capability(
        "recompute", ("none", "full"), 'selective recompute is not emitted yet; use "none" or "full", also per block'
    ),
    "offload": Capability("offload", ("none",), "offload to the host is not emitted yet; leave offload=none"),
    "mesh": Capability("mesh", None),
}
"""Every key that may be fixed."""

SCHEDULES = {"none": "one stage", "1f1b": "micro_batches >= stages"}
"""What a schedule demands."""


def schedule_of(stages: int) -> str:
    """The schedule that runs this many stages."""
    return "none" if stages == 1 else "1f1b"


def schedule_allows(stages: int, micro_batches: int) -> bool:
    """Whether the emitted schedule runs: torch's 1F1B wants at least as many micro-batches as stages."""
    return stages == 1 or micro_batches >= stages
