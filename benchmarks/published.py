"""Predictions of published training runs beside what was measured.

    python benchmarks/published.py [--runs FILE --sweeps FILE --json OUT]

Every record that can be represented (`published_rows`) is predicted through `autopar.predict`: its architecture is
built by transformers on the meta device, traced, sharded, priced. Memory limits do not apply: the runs ran. Printed by
group: number of runs, mean absolute, median signed and 90th percentile error of the step time, the same of the trivial
formula, of memory, and for sweeps Kendall's tau and the regret of the predicted best. Records that cannot be
represented are counted by reason. ``--plot FILE`` writes the scatter as HTML; ``--residuals`` writes the intervals of
predictions (``autopar/catalog/residuals.yaml``) from these runs.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from published_measured import (
    counted_by,
    counts_recomputation,
    held_by,
    peak_bytes,
    seconds,
    workspace_bytes,
)
from published_plot import write_scatter
from published_rows import CHEAP, cluster_of, config_of, fix_of, job_of, recomputing
from published_stats import errors, left_out, spread, summary, sweep_figures, trivial_seconds
from published_tidy import Record, RefusedError, tidied

HERE = Path(__file__).parent
ROOT = HERE.parent
RUNS, SWEEPS = HERE / "data" / "runs.json.gz", HERE / "data" / "sweeps.json.gz"
ENOUGH = 10
"""Runs of a stack below which its predictions take the interval of all groups."""
CHUNK = 250
"""Records of one model that a process takes at once: all, so that no other traces it too."""
SHARED = 256
"""Plans that a process keeps: runs that differ in nothing but what was measured share one."""
LIMIT_S = 120.0
"""CPU seconds that a record may take; the slowest that are known, a mixture's first, take a tenth of it."""
DRIVER_BYTES = int(1.8 * 2**30)
"""Bytes that nvidia-smi shows beside the allocator's: 0.5 GiB of context and kernels, 0.4 GiB of NCCL's buffers for
each of three communicators (as device files have it of `reserve_bytes`, without the allocator's part)."""
ROOMY = 64
"""Times its memory a device is given: what ran is priced, whether the model of memory thinks that it fits or not."""


def read(path: Path) -> Any:
    """A JSON file, compressed or not."""
    return json.loads((gzip.open(path, "rt") if path.suffix == ".gz" else path.open()).read())


def predicted(record: Record, folder: str, keep: bool = False) -> dict[str, Any]:
    """One record's row, or ``{"id", "skipped": reason}``; never raises for what a record holds. ``keep``: with its
    plan and graph."""
    told = record if isinstance(record, Mapping) else {}
    row: dict[str, Any] = {"id": _word(told.get("id")), "group": _word(told.get("group")), "split": told.get("split")}
    try:
        with cpu_limit(LIMIT_S):
            return row | _row(tidied(record), folder, keep)
    except RefusedError as reason:
        return row | {"skipped": str(reason)}
    except Exception as error:
        return row | {"skipped": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]}


def _word(told: Any) -> str | int:
    """A name that rows can be found by."""
    return told if isinstance(told, str | int) else str(told)


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raises RefusedError in what runs inside once it has taken so many CPU seconds."""

    def stop(*_: Any) -> None:
        raise RefusedError(f"took more than {seconds:g} CPU seconds")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _row(record: Record, folder: str, keep: bool) -> dict[str, Any]:
    from autopar.models import model_graph
    from autopar.stack import stack_of

    if record.get("exclude"):
        raise RefusedError("excluded by its source")
    config, job, fix = config_of(record), job_of(record), fix_of(record)
    real, layers = cluster_of(record), record["model"]["layers"]
    written = json.dumps(config)
    # A graph is found again by the name of its file.
    path = str(Path(folder) / str(os.getpid()) / f"{hashlib.sha256(written.encode()).hexdigest()[:12]}.json")
    plan = _planned(path, written, job, real, tuple(fix.items()), layers)
    told = plan.predicted
    flops = told.mfu * told.step_time * real.device.peak(job.dtype) * real.devices
    peak = real.device.peak(job.linear_dtype or job.dtype)
    ranks = _held(plan)
    stack = stack_of(job.stack)
    beside = workspace_bytes(record, real.device, stack) - real.device.reserve_bytes
    held = held_by(record, ranks) + beside
    counted = counted_by(record)
    held = held if counted == "allocated" else held * stack.reserved
    low, high = told.interval
    return {
        "stack": job.stack,
        "predicted_s": told.step_time,
        "measured_s": _measured(record, flops, peak * real.devices, real.devices),
        "low_s": low,
        "high_s": high,
        "trivial_s": trivial_seconds(flops / 6 / job.tokens, job.tokens, peak, real.devices),
        "predicted_bytes": held + (DRIVER_BYTES if counted == "driver" else 0),
        "measured_bytes": peak_bytes(record),
        "breakdown": told.breakdown,
        **({"plan": plan, "graph": model_graph(path, None, None)} if keep else {}),
    }


def _measured(record: Record, flops: float, peak: float, devices: int) -> float | None:
    """Measured seconds: stated, or from what is stated of FLOP/s, of which a step does ``flops``, recomputation apart,
    on devices that together could do ``peak``."""
    measured, told = record["measured"], seconds(record)
    if told is not None:
        return told
    if measured["mfu"]:
        return flops / (peak * float(measured["mfu"]))
    if not measured["tflops_per_gpu"]:
        return None
    done = flops * (4 / 3 if counts_recomputation(record) else 1)
    return done / (float(measured["tflops_per_gpu"]) * 1e12 * devices)


@lru_cache(maxsize=SHARED)
def _planned(path: str, config: str, job: Any, real: Any, fixed: tuple[tuple[str, Any], ...], layers: int) -> Any:
    """The plan of a run. Where recomputation is not fixed: none, or as little as it takes to fit."""
    from autopar import predict

    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text(config)
    fix, roomy = dict(fixed), _roomy(real)
    plan = predict(path, job, roomy, {"recompute": "none", **fix})
    short = max(_held(plan)) - real.device.memory_bytes
    if "recompute" in fix or short <= 0:
        return plan
    most = [max(_held(predict(path, job, roomy, {**fix, "recompute": again}))) for again in (CHEAP, "full")]
    return predict(path, job, roomy, {**fix, "recompute": recomputing(fix, layers, short, max(_held(plan)), *most)})


def _roomy(cluster: Any) -> Any:
    """The same cluster with devices whose memory no plan fills."""
    device = replace(cluster.device, memory_bytes=cluster.device.memory_bytes * ROOMY, host_memory_bytes=0)
    return type(cluster)(tuple(replace(group, device=device) for group in cluster.groups))


def _held(plan: Any) -> list[int]:
    """Bytes of every pipeline rank."""
    from autopar.report.diff import rank_bytes

    return [sum(kinds.values()) for kinds in rank_bytes(plan)]


def predict_all(records: Iterable[Record], processes: int, keep: bool = False) -> list[dict[str, Any]]:
    """Rows of all records, in their order; records of one model go to one process, which traces it once."""
    by_model: dict[str, list[tuple[int, Record]]] = defaultdict(list)
    for index, record in enumerate(records):
        by_model[_model(record)].append((index, record))
    # The most records first, so that no process ends long after the other.
    tasks = sorted(by_model.values(), key=len, reverse=True)
    cut = [task[start : start + CHUNK] for task in tasks for start in range(0, len(task), CHUNK)]
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("fork").Pool(processes) as pool:
        found = []
        for part in pool.imap_unordered(_Task(folder, keep), cut):
            found += part
            if sys.stderr.isatty():
                print(f"\r{len(found)} runs", end="", file=sys.stderr)
    return [row for _, row in sorted(found, key=lambda pair: pair[0])]


def _model(record: Record) -> str:
    """What runs of one model have in common."""
    try:
        record = tidied(record)
        return json.dumps(config_of(record)) + str(record.get("dtype"))
    except Exception:
        return ""


class _Task:
    def __init__(self, folder: str, keep: bool) -> None:
        self.folder, self.keep = folder, keep

    def __call__(self, task: list[tuple[int, Record]]) -> list[tuple[int, dict[str, Any]]]:
        found = []
        for index, record in task:
            found.append((index, predicted(record, self.folder, self.keep)))
            gc.freeze()  # else each prediction goes through all of torch again
        return found


def figures(rows: Iterable[Mapping[str, Any]], sweeps: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By group, what the module's docstring says is printed."""
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if "skipped" not in row:
            groups[str(row["group"])].append(row)
    found = {}
    for name, members in groups.items():
        timed = [row for row in members if row["measured_s"]]
        weighed = [row for row in members if row["measured_bytes"]]
        times = summary(errors((row["predicted_s"], row["measured_s"]) for row in timed))
        trivial = summary(errors((row["trivial_s"], row["measured_s"]) for row in timed))
        memory = summary(errors((row["predicted_bytes"], row["measured_bytes"]) for row in weighed))
        by_id = {row["id"]: row for row in members}
        inside = [row["low_s"] <= row["measured_s"] <= row["high_s"] for row in timed]
        found[name] = {
            "n": len(timed),
            "time_mape": times["mape"],
            "time_median": times["median"],
            "time_p90": times["p90"],
            "trivial_mape": trivial["mape"],
            "memory_n": len(weighed),
            "memory_mape": memory["mape"],
            "memory_median": memory["median"],
            "covered": sum(inside) / len(inside) if inside else None,
            **sweep_figures((sweep for sweep in sweeps if str(sweep.get("group")) == name), by_id),
        }
    return found


def table(groups: Mapping[str, Mapping[str, Any]]) -> str:
    """The printed table."""
    columns = ("n", "time_mape", "time_median", "time_p90", "trivial_mape", "memory_n", "memory_mape", "memory_median")
    columns = (*columns, "covered", "tau", "regret", "sweeps")
    lines = [
        "group".ljust(28) + "".join(name.replace("time_", "").replace("memory", "mem").rjust(13) for name in columns)
    ]
    for name in sorted(groups):
        cells = []
        for column in columns:
            value = groups[name][column]
            if value is None:
                text = "-"
            elif column in ("n", "memory_n", "sweeps"):
                text = str(value)
            elif column == "tau":
                text = f"{value:.2f}"
            else:
                text = f"{value:+.1%}" if "median" in column else f"{value:.1%}"
            cells.append(text.rjust(13))
        lines.append(name.ljust(28) + "".join(cells))
    return "\n".join(lines)


def ratios_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Measured over predicted seconds, by group."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row.get("measured_s"):
            found[str(row["group"])].append(row["measured_s"] / row["predicted_s"])
    return dict(found)


def write_residuals(path: Path, rows: list[Mapping[str, Any]]) -> None:
    """The intervals by stack, and of all groups, which serve a stack without runs of its own."""
    import yaml

    from autopar.stack import stack_of

    ratios = ratios_of(rows)
    stacks: dict[str, list[list[float]]] = {}
    families = {row["stack"]: stack_of(row["stack"]).family for row in rows}
    for name in sorted(set(families.values())):
        some = list(ratios_of(row for row in rows if families[row["stack"]] == name).values())
        if sum(map(len, some)) >= ENOUGH:
            stacks[name] = some
    content = {
        "all": {**spread(ratios.values()), "groups": len(ratios), "runs": sum(map(len, ratios.values()))},
        "stacks": {name: {**spread(some), "runs": sum(map(len, some))} for name, some in stacks.items()},
    }
    head = (
        "# 10th and 90th percentile of measured over predicted seconds, each group of published runs with the same\n"
        "# weight, or less if it has fewer than ten; written by `python benchmarks/published.py --residuals`.\n"
    )
    temporary = path.with_suffix(".tmp")
    temporary.write_text(head + yaml.safe_dump(content, sort_keys=False))
    temporary.replace(path)


def main() -> None:
    """Predict, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--sweeps", type=Path, default=SWEEPS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--residuals", action="store_true")
    parser.add_argument("--groups", help="of these groups alone, separated by commas")
    parser.add_argument("--every", type=int, default=1, help="every N-th record alone")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    begin = time.perf_counter()
    records, sweeps = read(given.runs), read(given.sweeps)
    if given.groups:
        records = [record for record in records if record.get("group") in given.groups.split(",")]
    rows = predict_all(records[:: given.every], given.processes)
    groups = figures(rows, sweeps)
    skipped = Counter(row["skipped"] for row in rows if "skipped" in row)
    print(table(groups))
    for reason, count in skipped.most_common():
        print(f"{count:6d} not predicted: {reason}")
    done = [row for row in rows if "skipped" not in row]
    ratios = ratios_of(done)
    shares = left_out(ratios) if len(ratios) > 1 else {}
    if shares:
        counts = {name: groups[name]["n"] for name in shares}
        inside = sum(share * counts[name] for name, share in shares.items()) / sum(counts.values())
        each = ", ".join(f"{name} {share:.0%}" for name, share in sorted(shares.items()))
        print(f"inside the interval that the other groups make: {inside:.0%} of runs ({each})")
    print(f"{len(rows)} records in {time.perf_counter() - begin:.0f} s")
    if given.plot:
        write_scatter(given.plot, done, "Published runs")
    if given.residuals:
        write_residuals(ROOT / "autopar" / "catalog" / "residuals.yaml", done)
    if given.json:
        given.json.write_text(json.dumps({"groups": groups, "skipped": dict(skipped), "rows": done}, indent=1))


if __name__ == "__main__":
    main()
