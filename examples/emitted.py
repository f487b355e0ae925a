"""Writes ``examples/emitted/``: three training folders as autopar emits them, to read and start. ``make examples``."""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autopar.cluster import Cluster
from autopar.codegen.emit import emit
from autopar.job import Job
from autopar.models import model_graph
from autopar.plan import Plan
from autopar.solver.search import search

EMITTED = Path(__file__).parent / "emitted"


@dataclass(frozen=True, slots=True)
class Example:
    """A catalog model, a job and the parts of the plan that are fixed, on one node of four H100."""

    model: str
    job: Job
    fix: dict[str, Any]

    def command(self) -> str:
        """The command that makes the same folder."""
        fixed = " ".join(f"--fix {key}={str(value).lower()}" for key, value in self.fix.items())
        return (
            f"autopar search {self.model} --cluster 1x4:h100 --global-batch {self.job.global_batch} "
            f"--seq-len {self.job.seq_len} {fixed} -o out/"
        )

    def plan(self) -> Plan:
        """The plan, without what differs from run to run: how long its search took."""
        found = search(model_graph(self.model), self.job, Cluster.parse("1x4:h100"), self.fix)
        return replace(found, seconds={})

    def write(self, folder: Path) -> None:
        """Emit the folder."""
        emit(self.plan(), model_graph(self.model), folder)


EXAMPLES = {
    "llama_tp2_dp2": Example(
        "llama3.2-1b", Job(64, 4096), {"dp": 2, "tp": 2, "pp": 1, "sp": True, "zero": 3, "micro_batch": 2}
    ),
    "llama_cp2_tp2": Example(
        "llama3.2-1b", Job(8, 32768), {"cp": 2, "tp": 2, "dp": 1, "pp": 1, "sp": True, "recompute": "full"}
    ),
    "gpt2_pp2_interleaved": Example(
        "gpt2", Job(64, 1024), {"pp": 2, "dp": 2, "tp": 1, "schedule": "interleaved", "vpp": 2, "zero": 1}
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=EMITTED)
    args = parser.parse_args()
    for name, example in EXAMPLES.items():
        folder = args.out / name
        shutil.rmtree(folder, ignore_errors=True)
        example.write(folder)
        print(f"{folder}: {example.command()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
