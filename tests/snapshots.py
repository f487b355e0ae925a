"""Emitted modules of seven representative plans, kept as text in ``tests/snapshots``; ``make snapshots`` rewrites them.

A change of the emitter shows there as an engineer sees it: read the difference before you write it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autopar.cluster import Cluster
from autopar.codegen.emit_module import module_source
from autopar.job import Job
from autopar.models import model_graph
from autopar.solver.search import search

FOLDER = Path(__file__).parent / "snapshots"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A model, a job, a cluster and what of the plan is fixed."""

    model: str
    cluster: str
    job: Job
    fix: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """module.py of the plan."""
        graph = model_graph(self.model)
        return module_source(search(graph, self.job, Cluster.parse(self.cluster), self.fix), graph)


SNAPSHOTS = {
    "llama_dp_zero3": Snapshot("llama3.2-1b", "1x8:h100", Job(64, 4096), {"dp": 8, "zero": 3, "recompute": "none"}),
    "llama_tp_sp": Snapshot(
        "llama3-8b", "1x8:h100", Job(64, 8192), {"tp": 4, "dp": 2, "pp": 1, "sp": True, "zero": 3, "micro_batch": 1}
    ),
    "llama_cp_tp": Snapshot(
        "llama3.1-8b", "1x8:h100", Job(8, 32768), {"cp": 2, "tp": 2, "dp": 2, "pp": 1, "recompute": "full"}
    ),
    "llama_cp_ring": Snapshot(
        "llama3.1-8b", "1x8:l40s", Job(8, 131072), {"cp": 8, "tp": 1, "dp": 1, "pp": 1, "context": "ring"}
    ),
    "gpt2_interleaved_tied": Snapshot(
        "gpt2", "1x4:h100", Job(64, 1024), {"pp": 2, "dp": 2, "tp": 1, "schedule": "interleaved", "vpp": 2}
    ),
    "llama_selective": Snapshot(
        "llama3-8b",
        "1x8:h100",
        Job(64, 8192),
        {"tp": 4, "dp": 2, "pp": 1, "sp": True, "micro_batch": 1, "recompute": "selective(matmul+attention)"},
    ),
    "t5_tp": Snapshot(
        f"{Path(__file__).parent / 'plain_plans.py'}:small_t5", "1x4:h100", Job(16, 16), {"tp": 2, "dp": 2, "pp": 1}
    ),
}
"""Each by the name of its file. All models but T5 are of the catalog, so that numbers are those of real sizes."""


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.py.txt"


def main() -> int:
    for name, snapshot in SNAPSHOTS.items():
        text = snapshot.text()
        path = path_of(name)
        changed = not path.exists() or path.read_text() != text
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        print(f"{path.name}: {'written' if changed else 'as it was'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
