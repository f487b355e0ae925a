"""Which published records the comparison of plans takes: `benchmarks/data/published.json`.

python benchmarks/published_choice.py            # chooses from benchmarks/data/runs.json.gz and writes the file
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from published import RUNS, read
from published_measured import seconds
from published_rows import device_of, family_of
from published_tidy import Record, RefusedError

COMPARED = ("a100-80g", "h100-96g", "h100")
"""Devices whose records are compared."""
DATA = Path(__file__).parent / "data" / "published.json"
SMALLEST = 5e8
"""Parameters of the smallest models taken: in smaller ones launches and small kernels decide, not the plan."""
OTHER_MESHES = 3
"""How many meshes are taken beside the best one where a source swept several."""


def refusal(record: Record) -> str | None:
    """Why a record is not compared, or None."""
    model, gpu = record["model"], record["hardware"]["gpu"]
    if model.get("moe") or model.get("attention"):
        return "model with experts, state spaces or latent attention"
    try:
        family, device = family_of(record), device_of(gpu)
    except RefusedError as error:
        return str(error)
    if record["group"] in ("korthikanti_fig1_memory", "internevo_memory", "megatron_ci_golden_small"):
        return "states memory, no step time"
    if record["dtype"] not in ("bf16", "fp16"):
        return "fp8 or narrower"
    if device not in COMPARED:
        return "device that is not compared"
    if record.get("suspect") or record.get("exclude"):
        return "marked as doubtful"
    needed = [model.get(name) for name in ("layers", "hidden", "heads", "ffn", "seq_len")]
    if family != "gpt" and not model.get("vocab"):
        needed.append(None)
    if None in [
        *needed,
        record["hardware"]["count"],
        *(record[n] for n in ("global_batch", "micro_batch", "tp", "pp")),
    ]:
        return "sizes of the model or batch not stated"
    if seconds(record) is None:
        return "no step time or throughput, MFU alone"
    if record["hardware"]["count"] < 8:
        return "fewer than 8 devices"
    if 12 * model["layers"] * model["hidden"] ** 2 < SMALLEST:
        return "fewer than half a billion parameters in its blocks"
    return None


def choose(records: Iterable[Record]) -> tuple[list[Record], Counter[str]]:
    """The records compared, and how many of the others were left out for which reason.

    Of one model on the same devices: the sequence length nearest to 2,048 and the longest, each at the global batch
    with the best throughput; of one such job the fastest record, and the fastest of each of a few other meshes.
    """
    left: Counter[str] = Counter()
    jobs: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        reason = refusal(record)
        if reason:
            left[reason] += 1
        else:
            jobs.setdefault(_job_key(record), []).append(record)
    families: dict[tuple[Any, ...], list[list[Record]]] = {}
    for key, runs in jobs.items():
        families.setdefault(key[:-2], []).append(sorted(runs, key=seconds))
    chosen: list[Record] = []
    for family in families.values():
        lengths = sorted({runs[0]["model"]["seq_len"] for runs in family})
        for length in dict.fromkeys([min(lengths, key=lambda n: abs(n - 2048)), lengths[-1]]):
            runs = max((runs for runs in family if runs[0]["model"]["seq_len"] == length), key=_throughput)
            meshes: dict[tuple[Any, ...], Record] = {}
            for run in runs:
                meshes.setdefault((run["tp"], run["pp"], run["cp"], run["recompute"]), run)
            chosen += list(meshes.values())[: 1 + OTHER_MESHES]
    left["another batch, length, mesh or micro-batch of a job compared"] = sum(map(len, jobs.values())) - len(chosen)
    return chosen, left


def _job_key(record: Record) -> tuple[Any, ...]:
    model, hardware = record["model"], record["hardware"]
    sizes = [model.get(name) for name in ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab")]
    where = (hardware["gpu"], hardware["count"], record["dtype"])
    return (record["group"], *sizes, *where, model["seq_len"], record["global_batch"])


def _throughput(runs: list[Record]) -> float:
    best = runs[0]
    return best["global_batch"] / (seconds(best) or float("inf"))


def main() -> None:
    """Write the data file."""
    chosen, left = choose(read(RUNS))
    DATA.write_text(json.dumps({"records": chosen, "left_out": dict(left.most_common())}, indent=1) + "\n")
    print(f"{len(chosen)} records; left out: {dict(left.most_common())}")


if __name__ == "__main__":
    main()
