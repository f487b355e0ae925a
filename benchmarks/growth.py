"""How the search's CPU seconds grow: with the depth of a model, the number of devices, and the axes that are open.

    python benchmarks/growth.py [--depths 8 16 32 64 126] [--nodes 1 4 16 64 256]

One model (the widths of Llama-3 8B, from a `config.json` written for the purpose) is searched at several depths on one
cluster, at one depth on several clusters, and there with axes closed one after the other. Tracing and search are CPU
seconds of one process after imports; a bar is proportional to the seconds of the search. Growth is that of the search
from the first row to the last, against the growth of what varies.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WIDTHS = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
"""meta-llama/Meta-Llama-3-8B, config.json."""

CLOSED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("all axes open", {}),
    ("cp=1", {"cp": 1}),
    ("cp=1 tp=1", {"cp": 1, "tp": 1}),
    ("cp=1 tp=1 pp=1", {"cp": 1, "tp": 1, "pp": 1}),
)
BAR = 40


def searched(layers: int, nodes: int, fix: dict[str, Any]) -> tuple[float, float, float]:
    """CPU seconds of tracing and of the search, and the gap."""
    import autopar
    from autopar.models import model_graph
    from autopar.solver.fix import parse_fix
    from autopar.solver.search import search

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps({**WIDTHS, "num_hidden_layers": layers}))
        begin = time.process_time()
        graph = model_graph(str(path))
        traced = time.process_time()
    job = autopar.Job(global_batch=64 * nodes, seq_len=8192)
    plan = search(graph, job, autopar.Cluster.parse(f"{nodes}x8:h100"), parse_fix(fix))
    return traced - begin, time.process_time() - traced, plan.gap


def table(title: str, rows: list[tuple[str, float, tuple[float, float, float]]]) -> None:
    """Print rows of (name, what varies, seconds), with bars and the growth from first to last."""
    longest = max(seconds for _, _, (_, seconds, _) in rows)
    print(f"\n{title:<18}{'trace s':>8}{'search s':>9}{'gap':>7}")
    for name, _, (trace, seconds, gap) in rows:
        print(f"{name:<18}{trace:>8.1f}{seconds:>9.1f}{gap:>7.1%}  {'#' * round(BAR * seconds / longest)}")
    (_, low, (_, first, _)), (_, high, (_, last, _)) = rows[0], rows[-1]
    if low and high:
        print(f"{high / low:.0f} times as much: {last / first:.1f} times the seconds of the search")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 16, 32, 64, 126])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    args = parser.parse_args()
    searched(2, 1, {})  # imports, and torch's first trace
    table("layers, 8x8", [(f"{n}", float(n), searched(n, 8, {})) for n in args.depths])
    table("nodes, 32 layers", [(f"{n}x8", float(n), searched(32, n, {})) for n in args.nodes])
    table("axes, 8x8", [(name, 0.0, searched(32, 8, fix)) for name, fix in CLOSED])
    return 0


if __name__ == "__main__":
    sys.exit(main())
