"""`make fuzz CASES=10000 SEED=1`: as many cases as asked for, in batches with a seed each, and what was in them.

A batch that fails is shrunk and printed; the others go on. One batch alone: `make fuzz SEED=1 BATCH=17`.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fuzz.cases import Counts, Wrong, check

MODELS = 25
"""Models of one batch."""


def batch(seed: int, index: int, counts: Counts, shrink: bool = True) -> str:
    """Run one batch; the smallest case that fails in words, "" if none does."""

    @hypothesis.seed(seed * 1_000_003 + index)
    @settings(
        max_examples=MODELS,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=True,
        verbosity=hypothesis.Verbosity.quiet,
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        check(data, counts)

    try:
        run()
    except Wrong as wrong:
        return str(wrong)
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz")
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=None, help="this batch alone")
    parser.add_argument("--no-shrink", action="store_true", help="print failing cases as they were found")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    counts, failures = Counts(), []
    begin, index = time.perf_counter(), args.batch or 0
    while True:
        used = time.process_time()
        if failed := batch(args.seed, index, counts, not args.no_shrink):
            failures.append(index)
            print(f"\nbatch {index} of seed {args.seed} fails:\n{failed}\nalone: make fuzz SEED={args.seed} BATCH={index}")
        minutes = (time.perf_counter() - begin) / 60
        print(
            f"batch {index}: {counts.cases} cases of {counts.models} models, {len(failures)} batches failed, "
            f"{time.process_time() - used:.0f} CPU s, {minutes:.1f} min in all",
            flush=True,
        )
        index += 1
        if args.batch is not None or counts.cases >= args.cases:
            break
    print(f"\ncases by mesh: {_listed(counts.meshes)}")
    print(f"cases by operator: {_listed(counts.operators)}")
    print(
        f"\nseed {args.seed}: {counts.cases} cases of {counts.models} models ({counts.unsound} not finite), "
        f"{len(failures)} of {index} batches failed {failures or ''}; largest error {counts.worst:.1e}"
    )
    return 1 if failures else 0


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda pair: -pair[1]))


if __name__ == "__main__":
    sys.exit(main())
