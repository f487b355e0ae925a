"""`make fuzz CASES=10000 SEED=1`: as many cases as asked for, in batches with a seed each, and what was in them.

A batch that fails is shrunk and printed; the others go on. One batch alone: `make fuzz SEED=1 BATCH=17`.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Mapping

import torch

from fuzz.batches import run_batch
from fuzz.cases import Counts

MODELS = 25
"""Models of one batch."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz")
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, help="this batch alone")
    parser.add_argument("--no-shrink", action="store_true", help="print failing cases as they were found")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    counts, failed = Counts(), []
    begin, index = time.perf_counter(), args.batch or 0
    while True:
        if reason := run_batch(args.seed, index, MODELS, counts, not args.no_shrink):
            failed.append(index)
            print(f"\nbatch {index} fails:\n{reason}\nalone: make fuzz SEED={args.seed} BATCH={index}\n")
        print(
            f"batch {index}: {counts.cases} cases of {counts.models} models, {len(failed)} batches failed, "
            f"{time.process_time():.0f} CPU s, {(time.perf_counter() - begin) / 60:.1f} min",
            flush=True,
        )
        index += 1
        if args.batch is not None or counts.cases >= args.cases:
            break
    print(f"\ncases by mesh: {_listed(counts.meshes)}")
    print(f"cases by operator: {_listed(counts.operators)}")
    print(
        f"\nseed {args.seed}: {counts.cases} cases of {counts.models} models ({counts.unsound} without "
        f"gradients to compare), failed batches: {failed or 'none'}; largest error {counts.worst:.1e}"
    )
    return 1 if failed else 0


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda pair: -pair[1]))


if __name__ == "__main__":
    sys.exit(main())
