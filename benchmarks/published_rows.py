"""Published training runs as autopar takes them: which records it can represent, and what each one fixes.

    python benchmarks/published_rows.py RUNS.json        # chooses records and writes benchmarks/data/published.json

A record's facts are copied as they stand. What a source does not state (null) is left to the search, in favour of the
published configuration. How facts become a model, a cluster, a job and a fix is told at each function;
benchmarks/README.md lists what is only nearly the same.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from autopar import Cluster, Job
from autopar.cluster import Link

DATA = Path(__file__).parent / "data" / "published.json"
MEGATRON_VOCABULARY = 51_200
"""GPT-2's 50,257 tokens as Megatron-LM pads them at tp=8; taken where a GPT record names no vocabulary."""
DEVICES = (
    (r"A100.*80GB", "a100-80g"),
    (r"H100-SXM-96GB", "h100-96g"),
    (r"H100.*80GB", "h100"),
)
SMALLEST = 5e8
"""Parameters of the smallest models taken: in smaller ones launches and small kernels decide, not the plan."""
OTHER_MESHES = 3
"""How many meshes are taken beside the best one where a source swept several."""

Record = Mapping[str, Any]


def refusal(record: Record) -> str | None:
    """Why a record is not compared, or None."""
    model, gpu = record["model"], record["hardware"]["gpu"]
    family = _family(record)
    if record["group"] in ("korthikanti_fig1_memory", "internevo_memory", "megatron_ci_golden_small"):
        return "states memory, no step time"
    if family is None:
        return "model with experts, state spaces or latent attention"
    if record["dtype"] not in ("bf16", "fp16"):
        return "fp8 or narrower"
    if _device(gpu) is None:
        return "device that the catalog does not have"
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


def seconds(record: Record) -> float | None:
    """Measured seconds of a step, from the throughput where that alone is given."""
    measured = record["measured"]
    if measured["step_time_s"]:
        return float(measured["step_time_s"])
    if not measured["tokens_per_s_per_gpu"]:
        return None
    tokens = record["global_batch"] * record["model"]["seq_len"]
    return tokens / (measured["tokens_per_s_per_gpu"] * record["hardware"]["count"])


def config_of(record: Record) -> dict[str, Any]:
    """A Hugging Face configuration with the record's sizes.

    Llama and InternLM (whose attention has biases) are Llamas. GPT of Megatron is GPT-2, without dropout. MPT is
    Starcoder2 (one up projection, GELU, layer norms, no biases, tied embeddings), whose rotary positions stand in for
    ALiBi.
    """
    model = record["model"]
    family = _family(record)
    if family == "gpt":
        return {
            "model_type": "gpt2",
            "n_layer": model["layers"],
            "n_embd": model["hidden"],
            "n_head": model["heads"],
            "n_inner": model["ffn"],
            "n_positions": model["seq_len"],
            "vocab_size": model["vocab"] or MEGATRON_VOCABULARY,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        }
    sizes = {
        "num_hidden_layers": model["layers"],
        "hidden_size": model["hidden"],
        "num_attention_heads": model["heads"],
        "num_key_value_heads": model["kv_heads"] or model["heads"],
        "intermediate_size": model["ffn"],
        "vocab_size": model["vocab"],
        "max_position_embeddings": model["seq_len"],
    }
    if family == "mpt":
        none = dict.fromkeys(("embedding_dropout", "residual_dropout", "attention_dropout"), 0.0)
        return {"model_type": "starcoder2", **sizes, "use_bias": False, "tie_word_embeddings": True, **none}
    return {"model_type": "llama", **sizes, "attention_bias": family == "internlm", "tie_word_embeddings": False}


def cluster_of(record: Record) -> Cluster:
    """The record's devices in nodes, with the catalog's figures except those that the record states: memory and its
    bandwidth of the 96 GB cards, and ports between nodes."""
    hardware = record["hardware"]
    count, per_node = hardware["count"], min(hardware["gpus_per_node"], hardware["count"])
    name = _device(hardware["gpu"])
    cluster = Cluster.parse(f"{count // per_node}x{per_node}:{'h100' if name == 'h100-96g' else name}")
    if name == "h100-96g":
        told = dict.fromkeys(("memory_bytes", "memory_bandwidth"), f"{record['source']}: {hardware['gpu']}")
        device = replace(
            cluster.device,
            name=name,
            title="NVIDIA H100 SXM 96 GB",
            memory_bytes=96_000_000_000,
            memory_bandwidth=2.4e12,
            sources={**cluster.device.sources, **told},
        )
        cluster = Cluster(tuple(replace(group, device=device) for group in cluster.groups))
    link = _link(hardware["inter_node_link"], cluster)
    return cluster.with_links(inter_node=link) if link and cluster.nodes > 1 else cluster


def job_of(record: Record) -> Job:
    """The record's batch, length and dtype, under AdamW."""
    return Job(record["global_batch"], record["model"]["seq_len"], record["dtype"])


def fix_of(record: Record) -> dict[str, Any]:
    """All that the record states of its configuration, by fix key; what it leaves open is not in it."""
    tp, pp, cp = record["tp"], record["pp"], record["cp"] or 1
    data = record["hardware"]["count"] // (tp * pp)
    fix: dict[str, Any] = {"pp": pp, "dp": data // cp, "cp": cp, "tp": tp, "micro_batch": record["micro_batch"]}
    if tp > 1 and record["sp"] is not None:
        fix["sp"] = record["sp"]
    if record["recompute"]:
        fix["recompute"] = record["recompute"]
    if pp > 1:
        interleaved = (record["vpp"] or 1) > 1
        fix |= {"schedule": "interleaved", "vpp": record["vpp"]} if interleaved else {"schedule": "1f1b"}
    return fix | (_zero(record, data) if data > 1 else {})


def _zero(record: Record, data: int) -> dict[str, Any]:
    """ZeRO level and shard group. FSDP2 and FULL_SHARD are level 3; hybrid sharding is level 3 in a node."""
    stage = record["zero_stage"]
    if stage is None or re.search("zero stage.* not stated", record.get("notes") or ""):
        return {}
    group = re.search(r"group (\d+)", str(stage))
    level = 3 if str(stage).startswith(("fsdp", "hsdp")) else int(str(stage)[0])
    shards = int(group[1]) if group else min(8, data) if stage == "hsdp" else data
    return {"zero": 0} if level == 0 or shards == 1 else {"zero": level, "fsdp": shards}


def _family(record: Record) -> str | None:
    name = record["model"]["name"].lower()
    for start, family in (("mpt-", "mpt"), ("internlm", "internlm"), ("llama", "llama"), ("mt-nlg", "gpt")):
        if name.startswith(start):
            return family
    return "gpt" if name == "gpt" or re.match(r"gpt-?[\d.]+b$", name) else None


def _device(gpu: str) -> str | None:
    return next((name for pattern, name in DEVICES if re.match(pattern, gpu)), None)


def _link(text: str | None, cluster: Cluster) -> Link | None:
    """A node's ports from such words as "4x100Gb RoCE per node"; what no port is named of is shared by the node."""
    found = re.search(r"(?:(\d+)x\D*)?(\d+) ?Gb", text or "")
    if not found or "default" in (text or ""):
        return None
    ports = cluster.devices_per_node if "per GPU" in (text or "") else int(found[1] or 1)
    return replace(
        cluster.inter_node,
        bandwidth=float(found[2]) * 1e9 / 8,
        shared_by=cluster.devices_per_node / ports,
        sources={**cluster.inter_node.sources, **dict.fromkeys(("bandwidth", "shared_by"), f"published run: {text}")},
    )


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
    chosen, left = choose(json.loads(Path(sys.argv[1]).read_text()))
    DATA.parent.mkdir(exist_ok=True)
    DATA.write_text(json.dumps({"records": chosen, "left_out": dict(left.most_common())}, indent=1) + "\n")
    print(f"{len(chosen)} records; left out: {dict(left.most_common())}")


if __name__ == "__main__":
    main()
