"""Our plans beside published hand-tuned ones: predicted gain, and where it comes from.

    python benchmarks/published_plans.py [--only titan] [--limit 5] [--paths] [--json OUT] [--timeout 300]

For each record of benchmarks/data/published.json, both through `autopar.search`: all that the record states, fixed
(theirs), and nothing fixed (ours). A gain is theirs / ours - 1. Where it comes from is told twice: the difference of
the two breakdowns, in seconds of the step; and, above 10 %, for the fastest record of each job (or all: --paths), the
path from theirs to ours that frees a key or two at a time, each from where the last one stopped, so that the steps of
a path make the whole gain.

Measured seconds stand beside the predicted ones and are not judged. Exit status 1, with the records named, where theirs
is predicted faster than ours: then the search missed a plan. README.md in this folder examines the gains.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from published_choice import DATA
from published_measured import seconds
from published_rows import cluster_of, config_of, fix_of, job_of
from published_tidy import Record

EXAMINED = 0.10
"""Gains above it get a path."""
STEPS = (
    ("recompute",),
    ("zero", "fsdp", "reshard"),
    ("micro_batch",),
    ("schedule", "vpp", "stages"),
    ("sp",),
    ("pp", "dp", "cp", "tp"),
)
"""What a path frees, in this order."""
SAME = 1e-6
"""Relative difference of seconds below which two plans are equally fast."""


def compare(records: Sequence[Record], paths: bool = False) -> list[dict[str, Any]]:
    """The comparisons of records of one model, cluster and job, which share our plan. ``paths``: of every gain above
    `EXAMINED`, not of the first record's alone."""
    import autopar

    first = records[0]
    job, cluster = replace(job_of(first), stack="torch"), cluster_of(first)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / first["model"]["name"].replace(" ", "-").replace("/", "-") / "config.json"
        path.parent.mkdir()
        path.write_text(json.dumps(config_of(first)))

        def search(fix: Mapping[str, Any] | None = None) -> autopar.Plan:
            return autopar.search(str(path), job, cluster, fix=fix)

        begin = time.process_time()
        ours = search()
        found = [_compared(record, ours, search, paths or record is first) for record in records]
    return [{**entry, "cluster": str(cluster), "cpu_s": time.process_time() - begin} for entry in found]


def _compared(record: Record, ours: Any, search: Any, path: bool) -> dict[str, Any]:
    """One record's comparison as plain values."""
    import autopar

    fix = fix_of(record)
    entry: dict[str, Any] = {
        "id": record["id"],
        "model": record["model"]["name"],
        "devices": record["hardware"]["count"],
        "global_batch": record["global_batch"],
        "seq_len": record["model"]["seq_len"],
        "dtype": record["dtype"],
        "measured_s": seconds(record),
        "fixed": fix,
        "ours": _told(ours),
        "bound_s": ours.bound,
    }
    try:
        theirs = search(fix)
    except autopar.AutoparError as error:
        return {**entry, "refused": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    gain = theirs.predicted.step_time / ours.predicted.step_time - 1
    entry |= {"theirs": _told(theirs), "gain": gain, "from": _difference(theirs, ours)}
    if path and gain > EXAMINED:
        entry["path"] = dict(_path(fix, theirs, ours, search))
    return entry


def _told(plan: Any) -> dict[str, Any]:
    """A plan's decisions and prediction."""
    from autopar.report.text import chosen

    decisions = {**{key: str(value) for key, value in plan.fixed.items()}, **chosen(plan)}
    return {
        "decisions": decisions,
        "step_time_s": plan.predicted.step_time,
        "gap": plan.gap,
        "breakdown": plan.predicted.breakdown,
        "peak_bytes": max(memory["total"] for memory in plan.predicted.memory),
    }


def _difference(theirs: Any, ours: Any) -> dict[str, float]:
    """Seconds that ours takes less (more where negative), by part of the breakdown; largest first."""
    parts = {name: value - ours.predicted.breakdown[name] for name, value in theirs.predicted.breakdown.items()}
    return dict(sorted(parts.items(), key=lambda item: -abs(item[1])))


def _path(fix: Mapping[str, Any], theirs: Any, ours: Any, search: Any) -> Iterator[tuple[str, float]]:
    """What each step from theirs to ours adds to the gain, by the keys that it frees."""
    left, before, whole = dict(fix), theirs, ours.predicted.step_time
    for keys in STEPS:
        freed = [key for key in keys if key in left]
        if not freed:
            continue
        left = {key: value for key, value in left.items() if key not in keys}
        now = search(left) if left else ours
        yield "+".join(freed), (before.predicted.step_time - now.predicted.step_time) / whole
        before = now


def jobs_of(records: Sequence[Record]) -> list[list[Record]]:
    """Records of equal model, cluster and job together, in order."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        key = json.dumps(
            [record["group"], record["model"], record["hardware"], record["global_batch"], record["dtype"]]
        )
        groups.setdefault(key, []).append(record)
    return list(groups.values())


def missed(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The records whose configuration is predicted faster than the plan we found."""
    return [entry["id"] for entry in entries if entry.get("gain", 0.0) < -SAME]


def text(entry: Mapping[str, Any]) -> str:
    """A comparison as lines."""
    measured = f"measured {_s(entry['measured_s'])}" if entry["measured_s"] else "measured -"
    lines = [
        f"{entry['id']}: {entry['model']} on {entry['cluster']}, {entry['global_batch']:,} x {entry['seq_len']:,} "
        f"{entry['dtype']}, {measured}"
    ]
    ours = entry["ours"]
    if "refused" in entry:
        lines.append(f"  theirs  {_keys(entry['fixed'])}: {entry['refused']}")
    else:
        lines.append(f"  theirs  {_s(entry['theirs']['step_time_s']):>8}  {_keys(entry['theirs']['decisions'])}")
    lines.append(f"  ours    {_s(ours['step_time_s']):>8}  {_keys(ours['decisions'])}")
    if "gain" in entry:
        parts = [
            f"{name} {value:+.3g} s" for name, value in entry["from"].items() if abs(value) > 1e-3 * ours["step_time_s"]
        ]
        lines.append(f"  gain    {entry['gain']:>8.1%}  {', '.join(parts) or 'no part differs'}")
    if "path" in entry:
        lines.append(f"  path    {', '.join(f'{keys} {value:+.1%}' for keys, value in entry['path'].items())}")
    return "\n".join(lines)


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """One line a record: devices, seconds, gain, and the part of the step that most of it is from."""
    lines = [f"{'record':<30}{'devices':>8}{'measured':>10}{'theirs':>10}{'ours':>10}{'gain':>8}  mostly from"]
    for entry in sorted(entries, key=lambda entry: -entry.get("gain", float("inf"))):
        measured = f"{entry['measured_s']:.4g}" if entry["measured_s"] else "-"
        theirs, gain, why = "-", "-", "theirs does not fit or cannot run, see above"
        if "gain" in entry:
            theirs, gain = f"{entry['theirs']['step_time_s']:.4g}", f"{entry['gain']:.1%}"
            why = next(iter(entry["from"])) if entry["gain"] > SAME else "the same"
        lines.append(
            f"{entry['id']:<30}{entry['devices']:>8}{measured:>10}{theirs:>10}{entry['ours']['step_time_s']:>10.4g}"
            f"{gain:>8}  {why}"
        )
    return "\n".join(lines)


def _keys(decisions: Mapping[str, Any]) -> str:
    neutral = {"pp": "1", "cp": "1", "tp": "1"}
    return " ".join(f"{key}={value}" for key, value in decisions.items() if neutral.get(key) != str(value))


def _s(value: float) -> str:
    return f"{value:.4g} s"


def main() -> int:
    """Print the comparisons; 1 where a published plan is predicted faster than ours, or a job gave none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="records with this in their names")
    parser.add_argument("--limit", type=int, help="so many jobs, from the first")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the comparisons here too")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds of wall time for each job")
    parser.add_argument("--paths", action="store_true", help="of every record, not of the fastest of its job alone")
    parser.add_argument("--ids", help=argparse.SUPPRESS)
    args = parser.parse_args()
    data = json.loads(DATA.read_text())
    if args.ids:
        wanted = set(args.ids.split(","))
        print(json.dumps(compare([record for record in data["records"] if record["id"] in wanted], args.paths)))
        return 0
    entries: list[dict[str, Any]] = []
    failed: list[str] = []
    chosen = [record for record in data["records"] if args.only in record["id"]]
    for records in jobs_of(chosen)[: args.limit]:
        ids = ",".join(record["id"] for record in records)
        command = [sys.executable, __file__, "--ids", ids, *(["--paths"] if args.paths else [])]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout, check=True)
        except subprocess.TimeoutExpired:
            failed.append(f"{ids}: no end after {args.timeout:.0f} s")
            print(failed[-1], flush=True)
            continue
        except subprocess.CalledProcessError as error:
            failed.append(f"{ids}: {error.stderr.strip().splitlines()[-1]}")
            print(failed[-1], flush=True)
            continue
        for entry in json.loads(done.stdout.splitlines()[-1]):
            entries.append(entry)
            print(text(entry), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"compared": entries, "failed": failed}, indent=1) + "\n")
    faster = missed(entries)
    print(f"\n{table(entries)}\n")
    print(f"{len(entries)} records compared, {sum('refused' in entry for entry in entries)} of them refused")
    print("left out: " + "; ".join(f"{count} {reason}" for reason, count in data["left_out"].items()))
    if faster:
        print(f"predicted faster than our plan, which must not be: {', '.join(faster)}")
    return 1 if faster or failed else 0


if __name__ == "__main__":
    sys.exit(main())
