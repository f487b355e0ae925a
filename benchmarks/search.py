"""The search's CPU seconds, phase by phase, and its peak memory, on models and clusters of all sizes.

    python benchmarks/search.py [--only llama3-8b] [--timeout 600]

Every row runs in a process of its own. CPU seconds are from a model on meta, or its graph on disk, to the plan, after
imports. The yardstick, one fixed OR-Tools model solved before the rows in the same run, tells machines apart: seconds
over the yardstick's compare between them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Row:
    """One search, and the CPU seconds it may take."""

    model: str
    cluster: str
    global_batch: int
    seq_len: int
    target_s: float


ROWS = (
    Row("llama3-8b", "8x8:h100", 512, 8192, 8.0),
    Row("llama3-70b", "64x8:h100", 512, 8192, 10.0),
    Row("mixtral-8x22b", "32x8:h100", 256, 8192, 12.0),
    Row("llama3-405b", "2048x8:h100", 2048, 8192, 20.0),
    Row("llama3-405b", "2048x8:h100", 2048, 131072, 20.0),
    Row("deepseek-v3", "256x8:h800", 15360, 4096, 25.0),
    Row("large_mixture.py:ten_trillion", "12500x8:b200", 25000, 8192, 60.0),
)
PEAK_BYTES = 1.5e9
PHASES = (
    "trace",
    "strategies",
    "kind bounds",
    "saved bytes",
    "answers",
    "bounds",
    "stages",
    "simulation",
    "reprice",
)


def yardstick() -> float:
    """CPU seconds of a fixed assignment problem: 40 tasks on 8 machines, seeded, the longest machine shortest."""
    from ortools.sat.python import cp_model

    drawn, model = random.Random(0), cp_model.CpModel()
    longest = model.new_int_var(0, 10_000, "")
    machines: list[list[object]] = [[] for _ in range(8)]
    for _ in range(40):
        choices = [model.new_bool_var("") for _ in machines]
        model.add_exactly_one(choices)
        for machine, choice in zip(machines, choices, strict=True):
            machine.append(drawn.randrange(10, 100) * choice)
    for machine in machines:
        model.add(sum(machine) <= longest)
    model.minimize(longest)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers, solver.parameters.max_deterministic_time = 1, 2.0
    begin = time.process_time()
    solver.solve(model)
    return time.process_time() - begin


IMPORTS = (
    "autopar.graph.trace",
    "autopar.solver.search",
    "ortools.sat.python.cp_model",
    "sympy.tensor.tensor",
    "torch._dynamo.config",
    "torch.export._trace",
)


def _import_all(model: str) -> None:
    """What a search imports on its way: fake tensors bring the whole of torch's compiler, and a model its own modules
    (transformers finds them when it builds one)."""
    from autopar.models import load_model

    for module in IMPORTS:
        importlib.import_module(module)
    load_model(model)


def measure(row: Row) -> dict[str, object]:
    """One search in this process."""
    import autopar
    from autopar.models import model_graph

    model = str(Path(__file__).with_name(row.model)) if ".py:" in row.model else row.model
    _import_all(model)
    job = autopar.Job(global_batch=row.global_batch, seq_len=row.seq_len)
    begin = time.process_time()
    if model == row.model:
        model_graph(model)
    traced = time.process_time() - begin
    plan = autopar.search(model, job, autopar.Cluster.parse(row.cluster))
    traced += plan.seconds.get("trace", 0.0)
    return {
        "cpu_s": time.process_time() - begin,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "seconds": {"trace": traced, **{name: value for name, value in plan.seconds.items() if name != "trace"}},
        "plan": f"{plan.mesh}, micro_batch={plan.micro_batch}, zero={plan.zero}, {plan.schedule}",
        "step_time_s": plan.predicted.step_time,
        "gap": plan.gap,
    }


def main() -> int:
    """Print the table; 1 if a row misses its target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows of models with this in their names")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds of wall time for each row")
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row is not None:
        print(json.dumps(measure(ROWS[args.row])))
        return 0
    unit = yardstick()
    print(f"yardstick {unit:.2f} s of CPU\n")
    print(f"{'model':<30}{'cluster':<13}{'seq':>7}{'CPU s':>8}{'target':>8}{'of yardstick':>13}{'peak GB':>9}  gap")
    missed = 0
    for index, row in enumerate(ROWS):
        if args.only not in row.model:
            continue
        head = f"{row.model:<30}{row.cluster:<13}{row.seq_len:>7}"
        command = [sys.executable, __file__, "--row", str(index)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout, check=True)
        except subprocess.TimeoutExpired:
            print(f"{head}{'-':>8}{row.target_s:>8.0f}  no end after {args.timeout:.0f} s", flush=True)
            missed += 1
            continue
        except subprocess.CalledProcessError as error:
            print(f"{head}  failed: {error.stderr.strip().splitlines()[-1]}", flush=True)
            missed += 1
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        phases = ", ".join(f"{name} {found['seconds'].get(name, 0.0):.1f}" for name in PHASES)
        missed += found["cpu_s"] > row.target_s or found["peak_bytes"] > PEAK_BYTES
        print(
            f"{head}{found['cpu_s']:>8.1f}{row.target_s:>8.0f}{found['cpu_s'] / unit:>13.1f}"
            f"{found['peak_bytes'] / 1e9:>9.2f}  {found['gap']:.2%}\n    {found['plan']}: "
            f"{found['step_time_s']:.3g} s a step\n    seconds: {phases}",
            flush=True,
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
