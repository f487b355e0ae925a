"""Published training runs as autopar takes them: a record becomes a model, a cluster, a job and a fix.

A record's facts are copied as they stand. What a source does not state (null) is taken so:

* recompute: none, or what is cheap (all but matmuls and attention) in as many layers of each stage as it takes to fit,
  or beside that whole layers; of mixtures none (NVIDIA's recipes recompute norms, activations and the small projections
  of latent attention, but no experts: recompute_modules in scripts/performance/configs of Megatron-Bridge);
* vocabulary of a GPT: GPT-2's 50,257 tokens as Megatron-LM pads them; kv_heads: as many as heads; ffn of a GPT: four
  times hidden; number of devices: the fewest whole nodes; vpp: one stage a rank; cp, ep: 1; sp: what is cheaper. What a
  mixture of experts does not state is DeepSeek-V3's (`_experts`).
* dtype: bfloat16, or float16 where devices have no bfloat16 (V100).
* zero_stage: left to the prediction, like any part of a plan that is not fixed.

`RefusedError` says why a record cannot be represented.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from math import gcd
from typing import Any

from published_measured import devices_of, stated
from published_stacks import node_of, shards_parameters, stack_name
from published_tidy import MICRO_BATCHES, Record, RefusedError

from autopar import Cluster, Job
from autopar.cluster import Link

VOCABULARY, PADDED_TO = 50_257, 128
"""GPT-2's tokens, taken where a GPT record names no vocabulary, and what Megatron-LM pads them to a multiple of, for
each tensor-parallel rank (`--make-vocab-size-divisible-by`)."""
POSITIONS = 131_072
"""What models with rotary positions, which keep no table of them, are said to be made for."""
DROPOUT = 0.1
"""Megatron-LM's default of hidden and attention dropout."""
DEVICES: tuple[tuple[str, str | None], ...] = (
    (r"GH200|.*PCI|.*\bNVL\b", None),
    (r"A100.*40 ?GB", "a100-40g"),
    (r"A100", "a100-80g"),
    (r"A800", "a800-80g"),
    (r"H100.*96 ?GB", "h100-96g"),
    (r"H100", "h100"),
    (r"H200", "h200"),
    (r"H20\b", "h20"),
    (r"H800", "h800"),
    (r"GB200", "gb200"),
    (r"GB300", "gb300"),
    (r"B200", "b200"),
    (r"B300", "b300"),
    (r"V100", "v100-32g"),
    (r"L40S", "l40s"),
    (r"L4\b", "l4"),
    (r".*4090", "rtx4090"),
    (r"MI250X", "mi250x"),
    (r"MI300X", "mi300x"),
)
VENDORS = r"(?:NVIDIA|AMD|DGX|HGX|GeForce|Instinct|Tesla)[ -]+|\d+ ?x ?"
"""What may stand before a device's name."""
DTYPES = (
    (r"(nv|mx)?fp4", "bf16", "fp4"),
    (r"(amp_)?(mx)?(fp8|float8)", "bf16", "fp8"),
    (r"bf(loat)?16", "bf16", None),
    (r"fp16|float16|half", "fp16", None),
    (r"fp32|float32", "fp32", None),
)
RECOMPUTES = {"true": "full", "1": "full", "block": "full", "uniform": "full", "false": "none", "0": "none"}
"""Other words for what is recomputed: of switches, and Megatron's methods of recomputing whole layers."""
CHEAP = "selective(matmul+attention)"
"""What is recomputed first where a source does not say."""


def config_of(record: Record) -> dict[str, Any]:
    """A Hugging Face configuration with the record's sizes.

    Llama and InternLM (whose attention has biases) are Llamas; mixtures of experts see `_experts`. GPT of Megatron is
    GPTBigCode (GPT-2 whose query, key and value lie head by head, as Megatron-LM has them, so that ranks split them),
    with its dropout. MPT is Starcoder2 (one up projection, GELU, layer norms, no biases, tied embeddings), whose
    rotary positions stand in for ALiBi.
    """
    model = record["model"]
    family, told = family_of(record), record.get("ci_args") or {}
    if "distill" in (model.get("name") or ""):
        raise RefusedError("two models, one the other's teacher")
    if re.search(r"\bq?lora\b|\bpeft\b", str(record.get("notes")), re.I):
        raise RefusedError("trains adapters of a frozen model (LoRA)")
    layers, hidden, heads = (stated(model, name) for name in ("layers", "hidden", "heads"))
    seq_len = stated(model, "seq_len")
    if family == "gpt":
        dropout = told.get("attention-dropout", DROPOUT)  # recipes that turn it off turn both off
        return {
            "model_type": "gpt_bigcode",
            "multi_query": False,
            "n_layer": layers,
            "n_embd": hidden,
            "n_head": heads,
            "n_inner": model["ffn"] or 4 * hidden,
            "n_positions": seq_len,
            "vocab_size": _padded(model["vocab"] or VOCABULARY, record.get("tp") or 1),
            "tie_word_embeddings": not told.get("untie-embeddings-and-output-weights"),
            "attn_pdrop": float(dropout),
            **dict.fromkeys(("resid_pdrop", "embd_pdrop"), float(told.get("hidden-dropout", dropout))),
        }
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": model["kv_heads"] or heads,
        "intermediate_size": _inner(model),
        "vocab_size": stated(model, "vocab"),
        "max_position_embeddings": max(seq_len, POSITIONS),  # rotary: one model for every length
    }
    if family == "mpt":
        none = dict.fromkeys(("embedding_dropout", "residual_dropout", "attention_dropout"), 0.0)
        return {"model_type": "starcoder2", **sizes, "use_bias": False, "tie_word_embeddings": True, **none}
    if model.get("head_dim"):
        sizes["head_dim"] = model["head_dim"]
    if family == "nemotron":
        return {"model_type": "nemotron", **sizes, "hidden_act": "relu2", "tie_word_embeddings": False}
    if model.get("moe"):
        return _experts(model, sizes, record.get("notes"))
    return {"model_type": "llama", **sizes, "attention_bias": family == "internlm", "tie_word_embeddings": False}


def _inner(model: Mapping[str, Any]) -> int:
    """Width of the inner layer; of a mixture that names that of its experts alone, theirs."""
    told = (model.get("moe") or {}).get("expert_ffn")
    return int(model.get("ffn") or told or stated(model, "ffn"))


def _experts(model: Mapping[str, Any], sizes: dict[str, Any], notes: str | None) -> dict[str, Any]:
    """A mixture of experts: DeepSeek-V3's attention and routing where it has its latent attention (whose ranks no
    record states: they are taken to be its own), GPT-OSS's by name, Qwen2's where experts are shared (as one of
    their width together), else Qwen3's. Layers that Llama 4 and others leave without experts are refused, if told."""
    told = model["moe"]
    experts = {"num_experts_per_tok": stated(told, "topk"), "tie_word_embeddings": False}
    dense = {"mlp_only_layers": list(range(told["dense_layers"]))} if told.get("dense_layers") else {}
    count, width = stated(told, "experts"), told.get("expert_ffn") or sizes["intermediate_size"]
    if model.get("attention") == "MLA":
        return {
            "model_type": "deepseek_v3",
            **sizes,
            **experts,
            "n_routed_experts": count,
            "moe_intermediate_size": width,
            "num_key_value_heads": sizes["num_attention_heads"],
            "n_shared_experts": told.get("shared") or 0,
            "first_k_dense_replace": told.get("dense_layers") or 0,
        }
    if re.search(r"interleaved moe|every (second|other) layer", str(notes), re.I):
        raise RefusedError("layers with experts and without by turns")
    if told.get("shared"):
        return {
            "model_type": "qwen2_moe",
            **{name: size for name, size in sizes.items() if name != "head_dim"},
            **experts,
            **dense,
            "num_experts": count,
            "moe_intermediate_size": width,
            "shared_expert_intermediate_size": told["shared"] * width,
        }
    if str(model.get("name")).lower().startswith("gpt-oss"):
        return {"model_type": "gpt_oss", **sizes, **experts, "num_local_experts": count, "intermediate_size": width}
    return {
        "model_type": "qwen3_moe",
        **sizes,
        **experts,
        **dense,
        "num_experts": count,
        "moe_intermediate_size": width,
    }


def cluster_of(record: Record) -> Cluster:
    """The record's devices in nodes, with the catalog's figures except the ports between nodes, if it states them."""
    hardware = record["hardware"]
    count = devices_of(record)
    per_node = min(node_of(record), count)
    if count % per_node:
        raise RefusedError(f"{count} devices are no whole nodes of {per_node}")
    cluster = Cluster.parse(f"{count // per_node}x{per_node}:{device_of(hardware['gpu'])}")
    if re.search(r"pci", hardware.get("intra_node_link") or "", re.I):
        intra, width = cluster.intra_node, cluster.device.host_bandwidth
        cluster = cluster.with_links(intra_node=replace(intra, bandwidth=min(intra.bandwidth, width)))
    link = _link(hardware.get("inter_node_link"), cluster)
    return cluster.with_links(inter_node=link) if link and cluster.nodes > 1 else cluster


def job_of(record: Record) -> Job:
    """The record's batch, length, dtype and software, under AdamW."""
    told = record["dtype"] or ("fp16" if device_of(record["hardware"]["gpu"]) == "v100-32g" else "bf16")
    for pattern, dtype, linear in DTYPES:
        if re.match(pattern, told.strip().lower()):
            length, batch = stated(record["model"], "seq_len"), stated(record, "global_batch")
            return Job(batch, length, dtype, stack=stack_name(record), linear_dtype=linear)
    raise RefusedError(f"dtype {record['dtype']!r} is not known")


def fix_of(record: Record) -> dict[str, Any]:
    """All that the record states of its configuration, by fix key; what it leaves open is not in it."""
    tp, pp, cp = (record.get(name) or 1 for name in ("tp", "pp", "cp"))
    count = devices_of(record)
    if count % (tp * pp * cp):
        raise RefusedError(f"{count} devices do not divide by tp={tp} pp={pp} cp={cp}")
    data = count // (tp * pp)
    micro_batch, batch = stated(record, "micro_batch"), stated(record, "global_batch")
    if batch % (micro_batch * (data // cp)):
        raise RefusedError("the global batch is no whole number of micro-batches")
    micro_batches = batch // (micro_batch * (data // cp))
    if micro_batches > MICRO_BATCHES:
        raise RefusedError(f"{micro_batches} micro-batches in a step")
    mesh = {"pp": pp, "dp": data // cp, "cp": cp, "tp": tp, "ep": _experts_over(record, data)}
    fix: dict[str, Any] = {**mesh, "micro_batch": micro_batch}
    if tp > 1 and record.get("sp") is not None:
        fix["sp"] = record["sp"]
    if record.get("recompute"):
        fix["recompute"] = _recompute(record)
    elif record["model"].get("moe"):
        fix["recompute"] = "none"
    if pp > 1:
        fix |= _schedule(record, pp, micro_batches)
    return fix | (_zero(record, data) if data > 1 else {})


def _recompute(record: Record) -> str:
    """FSDP's "selective" keeps attention and the results of every second matmul (torchtitan's policy by operator): here
    of all in half the layers. Megatron's is its stack's (`recomputes_core`), beside which nothing is recomputed."""
    told = RECOMPUTES.get(str(record["recompute"]).lower(), str(record["recompute"]).lower())
    if told != "selective":
        return told
    if not shards_parameters(record):
        return "none" if stack_name(record).endswith("-selective") else told
    if (record.get("pp") or 1) > 1:
        return told
    return f"selective(matmul+attention),1-{record['model']['layers'] // 2}:selective(attention)"


def _schedule(record: Record, pp: int, micro_batches: int) -> dict[str, Any]:
    """The schedule and the stages a rank. 1F1B with fewer micro-batches than stages runs them all forward before the
    first returns, so it is GPipe. DualPipe, whose ranks hold two stages as well, fed from both ends, is taken as
    DualPipeV, which cuts it in half: bubbles are alike, parameters are not held twice (deepseek-ai/DualPipe, README).
    The CI's records tell layers per stage in place of stages a rank."""
    told = str(record.get("schedule") or "").lower()
    if re.search(r"v-zb|zbv|zb-v|dualpipe", told):
        if record["model"].get("moe") and (record.get("ep") or 1) > 1:
            raise RefusedError(f"schedule {record['schedule']!r} with experts that ranks share is none of autopar's")
        return {"schedule": "dualpipev" if "dual" in told else "zbv", **_even(record, 2 * pp)}
    if re.search(r"zb|zero.?bubble|v-half|v-min", told):
        raise RefusedError(f"schedule {record['schedule']!r} is none of autopar's")
    vpp = record.get("vpp") or 1
    if "layers per virtual stage" in (record.get("notes") or "") and record.get("vpp"):
        vpp = max(1, record["model"]["layers"] // pp // vpp)
    arguments = record.get("ci_args") or {}
    vpp = int(arguments.get("num-virtual-stages-per-pipeline-rank", vpp))
    if int(arguments.get("microbatch-group-size-per-virtual-pipeline-stage", pp)) != pp:
        raise RefusedError("interleaves other groups than one micro-batch a rank")
    if vpp > 1 and micro_batches % pp == 0:
        return {"schedule": "interleaved", "vpp": vpp, **_even(record, pp * vpp)}
    few = micro_batches < pp or "gpipe" in told
    return {"schedule": "gpipe" if few else "1f1b", **_even(record, pp)}


def _even(record: Record, stages: int) -> dict[str, Any]:
    """Blocks of each stage: as many layers in each, the ends of the model beside the first and last, as Megatron-LM has
    it unless told otherwise. Where layers do not divide, the ends count as layers (as in NVIDIA's recipes for 126);
    where that does not either, the first stages get one more."""
    told = record.get("ci_args") or {}
    first, last = (int(told.get(f"decoder-{end}-pipeline-num-layers", 0)) for end in ("first", "last"))
    others = stages - bool(first) - bool(last)
    layers = record["model"]["layers"] - first - last
    if layers % others and (layers + 2) % stages == 0:
        return {"stages": ",".join([str((layers + 2) // stages)] * stages)}
    middle = [layers // others + (place < layers % others) for place in range(others)]
    each = [first] * bool(first) + middle + [last] * bool(last)
    if min(each) < 1:
        raise RefusedError(f"fewer layers than the {stages} stages")
    each[0] += 1
    each[-1] += 1
    return {"stages": ",".join(map(str, each))}


def recomputing(fix: Mapping[str, Any], layers: int, short: float, none: float, cheap: float, full: float) -> str:
    """A fix of "recompute" that spares ``short`` bytes: `CHEAP` in as many layers of each stage as it takes, and where
    that does not do, whole layers. ``none``, ``cheap``, ``full``: bytes with either in all layers."""
    if short <= none - cheap:
        return _mixed(fix, layers, "none", CHEAP, short / (none - cheap))
    return _mixed(fix, layers, CHEAP, "full", min(1.0, (short - (none - cheap)) / max(cheap - full, 1)))


def _mixed(fix: Mapping[str, Any], layers: int, some: str, others: str, share: float) -> str:
    """A fix of "recompute" with ``others`` in this share of each stage's layers."""
    if "stages" not in fix:
        return f"{some},1-{max(1, round(share * layers))}:{others}"
    parts, begin = [some], 0
    sizes, ranks = [int(size) for size in str(fix["stages"]).split(",")], int(fix["pp"])
    due = [0.0] * ranks  # layers of each rank, rounded over all its stages: one may have a single layer
    for place, size in enumerate(sizes):
        first = max(begin, 1)
        there = min(begin + size, layers + 1) - first
        due[place % ranks] += share * there
        count = max(0, min(there, round(due[place % ranks])))
        due[place % ranks] -= count
        if count:
            parts.append(f"{first}-{first + count - 1}:{others}")
        begin += size
    return ",".join(parts)


def _experts_over(record: Record, data: int) -> int:
    """Ranks that share experts, of a mixture. Where that is not stated: none, but with DeepEP, which has no other use,
    the shard group, or all data ranks."""
    if not record["model"].get("moe"):
        return 1
    if record.get("ep"):
        if int(record["ep"]) > data:
            raise RefusedError("experts that tensor ranks share as well")
        return int(record["ep"])
    if "deepep" not in str(record.get("notes")).lower():
        return 1
    return gcd(int(_zero(record, data).get("fsdp", data)), int(record["model"]["moe"]["experts"]))


def _zero(record: Record, data: int) -> dict[str, Any]:
    """ZeRO level and shard group. FSDP2 and FULL_SHARD are level 3; hybrid sharding is level 3 in a node; the
    distributed optimizer of Megatron is level 1, and so is FSDP2 where stages are pipelined: parameters stay gathered,
    gradients wait for the last micro-batch (torch.distributed.pipelining.stage; torchtitan's default of
    reshard_after_forward; Automodel's recipe for DeepSeek-V3)."""
    if record.get("zero_stage") is None:
        return {}
    stage = str(record["zero_stage"]).lower()
    group, named = re.search(r"group (\d+)", stage), re.match(r"(?:zero|stage|[ _-])*([0-3])\b", stage)
    if shards_parameters(record):
        level = 1 if (record.get("pp") or 1) > 1 else 3
    elif stage.startswith("dist"):
        level = 1
    elif stage.startswith("shard_grad"):
        level = 2
    elif named or stage in ("none", "ddp", "no"):
        level = int(named[1]) if named else 0
    else:
        raise RefusedError(f"zero_stage {record['zero_stage']!r} is not known")
    instances = int((record.get("ci_args") or {}).get("num-distributed-optimizer-instances", 1))
    shards = int(group[1]) if group else min(8, data) if re.match(r"hsdp|hybrid", stage) else data // instances
    shards = min(shards, data)
    if level == 0 or shards == 1:
        return {"zero": 0}
    freed = {"reshard": "true"} if level == 3 else {}  # the default of all software of these runs
    return {"zero": level, "fsdp": shards, **freed, **({"offload": "state"} if _offloads(record) else {})}


def _offloads(record: Record) -> bool:
    """Whether parameters, gradients and optimizer state wait on the host; drives are taken to be as fast."""
    told = f"{record.get('zero_stage')}; {record.get('notes')}".lower()
    named = re.search(r"infinity|(cpu|nvme|optimizer|parameters?|state)[ /-]*(cpu )?offload(ed|ing)?(.{0,8})", told)
    return bool(named) and not re.search(r"false|none|\bno\b|off\b", named[4] or "")


def family_of(record: Record) -> str:
    """The architecture: by what the record says of experts and attention, then by the beginning of its name, then by
    its sizes (grouped heads or a narrow inner layer are a Llama's)."""
    model = record["model"]
    name = (model.get("name") or "").lower()
    if model.get("moe") and not model["moe"].get("experts"):
        raise RefusedError("experts without their number")
    if model.get("attention") not in (None, "MHA", "GQA", "MQA") and not model.get("moe"):
        raise RefusedError(f"attention {model['attention']!r}")
    if model.get("moe"):
        return "llama"
    for start, family in (
        ("mpt-", "mpt"),
        ("internlm", "internlm"),
        (r"(meta-)?llama|qwen|mistral|olmo|yi-", "llama"),
        (r"mt-nlg|gpt", "gpt"),
        (r"nemotron", "nemotron"),
    ):
        if re.match(start, name):
            return family
    if model.get("swiglu") or (model.get("kv_heads") or model["heads"]) != model["heads"]:
        return "llama"
    return "gpt" if not model.get("ffn") or model["ffn"] == 4 * (model["hidden"] or 0) else "llama"


def device_of(gpu: str) -> str:
    """The catalog's name of a device. Raises RefusedError for one that it does not have."""
    for pattern, name in DEVICES:
        if re.match(rf"(?:{VENDORS})*(?:{pattern})", (gpu or "").strip(), re.I):
            if name is None:
                break
            return name
    raise RefusedError(f"device {gpu!r} is not in the catalog")


def _padded(vocabulary: int, ranks: int) -> int:
    each = PADDED_TO * ranks
    return -(-vocabulary // each) * each


def _link(text: str | None, cluster: Cluster) -> Link | None:
    """A node's ports from such words as "4x100Gb RoCE per node"; what no port is named of is shared by the node."""
    found = re.search(r"(?:(\d+)x\D*)?(\d+) ?Gb", text or "")
    if not found or not int(found[2]) or "default" in (text or ""):
        return None
    ports = cluster.devices_per_node if "per GPU" in (text or "") else int(found[1] or 1)
    return replace(
        cluster.inter_node,
        bandwidth=float(found[2]) * 1e9 / 8,
        shared_by=cluster.devices_per_node / ports,
        sources={**cluster.inter_node.sources, **dict.fromkeys(("bandwidth", "shared_by"), f"published run: {text}")},
    )
