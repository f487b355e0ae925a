"""A micro-batch of real models, forward and backward, against its prediction with and without a profile.

    python benchmarks/profiled_steps.py --profile cpu.json                                  # one thread of this CPU
    python benchmarks/profiled_steps.py --profile h200.json --cluster 1x1:h200 --large      # a GPU

The models are built by transformers with random weights and run in eager PyTorch, with and without full recomputation;
the prediction is that of one data rank's stage. Collectives, optimizer and memory are not looked at. Of the repeats the
least counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import autopar
from autopar.cluster import Cluster
from autopar.profiler.clock import HostClock, clock_of

REPEATS = 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SMALL = (("llama", 512, 4), ("gpt2", 512, 4))
LARGE = (("llama", 2048, 16), ("llama", 3072, 28))
"""Kind, width and layers. The large ones are about Llama 3.2 1B and 3B."""


def model_of(kind: str, width: int, layers: int) -> torch.nn.Module:
    """A model with heads of 64 (128 for the large), a quarter of them for keys in a Llama."""
    torch.manual_seed(0)
    vocabulary, heads = 8192 if width < 2048 else 128256, width // (64 if width < 3072 else 128)
    if kind == "gpt2":
        still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
        return GPT2LMHeadModel(
            GPT2Config(n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocabulary, use_cache=False, **still)
        )
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width,
            intermediate_size=width * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 4,
            vocab_size=vocabulary,
            use_cache=False,
        )
    )


def measured(model: torch.nn.Module, device: torch.device, batch: int, seq: int) -> tuple[float, float]:
    """Least seconds of forward and backward of a micro-batch."""
    clock = HostClock(time.thread_time) if device.type == "cpu" else clock_of(device)
    ids = torch.randint(model.config.vocab_size, (batch, seq), device=device)
    best = [float("inf")] * 2
    losses: list[torch.Tensor] = []

    def forward() -> None:
        losses.append(model(input_ids=ids, labels=ids).loss)

    def backward() -> None:
        losses.pop().backward()

    for _ in range(REPEATS):
        model.zero_grad()
        ahead, back = clock.plain_samples([forward, backward])
        best = [min(best[0], ahead), min(best[1], back)]
    return best[0], best[1]


def predicted(cluster: Cluster, shape: tuple[str, int, int], dtype: str, batch: int, seq: int, recompute: str) -> float:
    """Seconds of the same, of one data rank."""
    ranks = cluster.devices
    fix = {"dp": ranks, "tp": 1, "pp": 1, "micro_batch": batch, "recompute": recompute, "zero": 0}
    plan = autopar.predict(model_of(*shape), autopar.Job(ranks * batch, seq, dtype=dtype), cluster, fix)
    return sum(stage.forward_s + stage.backward_s for stage in plan.stages)


def cases(large: bool) -> Iterator[tuple[tuple[str, int, int], str, int, int]]:
    """Model, dtype, samples, tokens of each."""
    for shape in LARGE if large else SMALL:
        for dtype in ("bf16",) if large else ("fp32", "bf16"):
            for batch, seq in ((1, 4096), (4, 2048)) if large else ((2, 256), (1, 512)):
                yield shape, dtype, batch, seq


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", required=True)
    parser.add_argument("--cluster", default="1x2:cpu", help="one device of it is what runs")
    parser.add_argument("--large", action="store_true", help="models of 1 and 3 billion parameters")
    given = parser.parse_args()
    plain = Cluster.parse(given.cluster)
    profiled = plain.with_profile(given.profile)
    device = torch.device(plain.device.backend)
    torch.set_num_threads(1 if device.type == "cpu" else torch.get_num_threads())
    errors: dict[str, list[float]] = {"catalog": [], "profile": []}
    print("| model | dtype | samples x tokens | recompute | forward ms | backward ms | without | with profile |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for shape, dtype, batch, seq in cases(given.large):
        for recompute in ("none", "full"):
            model = model_of(*shape).to(device, DTYPES[dtype]).train()
            if recompute == "full":
                model.gradient_checkpointing_enable({"use_reentrant": False})
            ahead, back = measured(model, device, batch, seq)
            told = []
            for name, cluster in (("catalog", plain), ("profile", profiled)):
                error = predicted(cluster, shape, dtype, batch, seq, recompute) / (ahead + back) - 1
                errors[name].append(abs(error))
                told.append(f"{100 * error:+.1f} %")
            print(
                f"| {shape[0]} {shape[1]} x {shape[2]} | {dtype} | {batch} x {seq:,} | {recompute} | {1e3 * ahead:.1f} "
                f"| {1e3 * back:.1f} | {told[0]} | {told[1]} |",
                flush=True,
            )
    means = {name: 100 * sum(some) / len(some) for name, some in errors.items()}
    print(f"\nmean absolute error: {means['catalog']:.1f} % without, {means['profile']:.1f} % with the profile")


if __name__ == "__main__":
    main()
