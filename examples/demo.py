"""Plan, emit and train a small Llama on four CPU ranks, and show that it learns exactly as one process does.

The text is the source code of Python's standard library, byte by byte: it is on every machine that runs this.
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import autopar
from autopar.codegen.loading import load_train
from autopar.codegen.prove import run_ranks

CLUSTER = "1x4:cpu"
JOB = autopar.Job(global_batch=16, seq_len=128, dtype="fp32")
TRAINING = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
CORPUS_BYTES = 4_000_000


def small_llama() -> LlamaForCausalLM:
    """Four layers, grouped-query attention, one token per byte; seeded."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=256,
        max_position_embeddings=JOB.seq_len,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def write_corpus(path: Path) -> int:
    """The first bytes of the standard library's files in sorted order; returns how many."""
    text = bytearray()
    for source in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += source.read_bytes()
        if len(text) >= CORPUS_BYTES:
            break
    path.write_bytes(text)
    return len(text)


def train_parallel(folder: Path, corpus: Path, steps: int) -> list[float]:
    """Run the emitted train.py on four ranks under torchrun; the loss of each step."""
    metrics = folder / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    options = {
        "--data": corpus,
        "--token-dtype": "uint8",
        "--steps": steps,
        "--schedule": "constant",
        "--lr": TRAINING["lr"],
        "--metrics": metrics.name,
    }
    run_ranks(["train.py", *(str(part) for pair in options.items() for part in pair)], 4, timeout_s=300, folder=folder)
    return [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]


def train_single(model: LlamaForCausalLM, folder: Path, corpus: Path, steps: int) -> list[float]:
    """The same training in this process, written the usual way: the model as it is, AdamW, clipping."""
    train = load_train(folder)
    data = train.Tokens(corpus, JOB.seq_len, 256, dtype="uint8", pattern="", seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), **TRAINING)
    losses = []
    for step in range(steps):
        first = step * JOB.global_batch
        ids = data.samples(list(range(first, first + JOB.global_batch)))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--fix", action="append", default=[], help="part of the plan, as in --fix tp=2 --fix pp=2")
    parser.add_argument("--out", type=Path, help="where to leave the emitted folder (default: a temporary place)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="autopar-demo-") as temporary:
        folder = args.out or Path(temporary) / "out"
        model = small_llama()
        begin = time.perf_counter()
        fix = dict(item.partition("=")[::2] for item in args.fix)
        plan = autopar.search(model, JOB, autopar.Cluster.parse(CLUSTER), fix=fix)
        print(plan)
        print(f"searched in {time.perf_counter() - begin:.1f} s")

        autopar.emit(plan, model, folder)
        corpus = Path(temporary) / "stdlib.bytes"
        size = write_corpus(corpus)
        print(f"\nemitted to {folder}; training on {size / 1e6:.1f} MB of Python source, {plan.mesh} on 4 ranks ...")
        begin = time.perf_counter()
        parallel = train_parallel(folder.resolve(), corpus, args.steps)
        print(f"torchrun: {args.steps} steps in {time.perf_counter() - begin:.1f} s; the same in one process ...")
        begin = time.perf_counter()
        single = train_single(model, folder, corpus, args.steps)
        print(f"one process: {args.steps} steps in {time.perf_counter() - begin:.1f} s\n")

    print(f"{'step':>4}  {'one process':>12}  {'four ranks':>12}  {'difference':>10}")
    for step, (one, four) in enumerate(zip(single, parallel, strict=True), start=1):
        print(f"{step:>4}  {one:>12.6f}  {four:>12.6f}  {four - one:>10.1e}")
    worst = max(abs(four - one) / one for one, four in zip(single, parallel, strict=True))
    print(f"\nloss {single[0]:.3f} -> {single[-1]:.3f}; largest relative difference {worst:.1e}")
    if worst > 1e-4 or not parallel[-1] < 0.8 * parallel[0]:
        print("demo: the losses do not agree, or do not go down", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
