"""Tracing must not grow with depth: CPU seconds to trace Llama 3.1 405B's architecture at 2 and at 126 layers.

    python benchmarks/trace_depth.py

Both in one process, after one warm-up trace, best of three; building the module (on meta) is timed apart.
"""

from __future__ import annotations

import time

from autopar.graph.trace import trace
from autopar.models import build_config

DEPTHS = (2, 126)


def main() -> None:
    """Print the table, and the ratio the design promises to keep below 2."""
    trace(build_config("llama3-405b", num_hidden_layers=2))
    seconds = {}
    print("layers  build s  trace s  blocks  parameters")
    for depth in DEPTHS:
        started = time.process_time()
        model = build_config("llama3-405b", num_hidden_layers=depth)
        built = time.process_time() - started
        runs = []
        for _ in range(3):
            started = time.process_time()
            graph = trace(model)
            runs.append(time.process_time() - started)
        seconds[depth] = min(runs)
        print(f"{depth:6}  {built:7.2f}  {seconds[depth]:7.2f}  {len(graph.blocks):6}  {graph.count_parameters():,}")
    print(f"ratio {seconds[DEPTHS[1]] / seconds[DEPTHS[0]]:.2f} (CPU seconds of tracing, must be below 2)")


if __name__ == "__main__":
    main()
