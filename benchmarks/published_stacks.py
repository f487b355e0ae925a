"""The software that a published run used, by what its record says: names of `autopar/catalog/stacks.yaml`."""

from __future__ import annotations

import re

from published_tidy import Record

STEP_GRAPHS = "26.06"
"""The container from which on NVIDIA's recipes for mixtures in MXFP8 make whole steps a CUDA graph."""
RECIPES = r"megatron-bridge|\bnemo\b|megatron-lm.*(examples|readme)"
"""Sources that are NVIDIA's own recipes for Megatron-Core."""
RACK = 64
"""Devices of an NVL72 rack that a job uses: its 72, less those that do not divide."""
COMPILED_LOSS = "2025"
"""The year from which on torchtitan compiles the loss (torchtitan/components/loss.py)."""
EARLY = r"korthikanti|narayanan|shoeybi|sc'?21|2205\.05198|2104\.04473|1909\.08053"
"""Papers on Megatron-LM of before FlashAttention (arXiv 2205.14135, of May 2022) and before its gradients were reduced
during the backward."""
NAMES = (
    ("deepspeed|bigscience|vtrain|mt-?nlg", "megatron-deepspeed"),
    (EARLY, "megatron-early"),
    ("automodel", "automodel"),
    ("torchtitan|fms-fsdp|torch.compile", "compiled"),
    ("llm-foundry|mosaicml", "composer"),
    ("internevo|internlm", "internevo"),
    ("megatron|nemo|bridge|mcore", "megatron"),
)
"""Words of a record's group, source and notes, in the order in which they are looked for, and what they name."""


def stack_name(record: Record) -> str:
    """The software that a record names. What names none is Megatron where ranks split models or the optimizer, else
    (ZeRO 3, FSDP) compiled FSDP."""
    told = " ".join(str(record.get(key) or "") for key in ("group", "source", "notes")).lower()
    if "eager" in told and "fsdp2" in told:
        return "torch"
    for words, name in NAMES:
        if re.search(words, told):
            return name + _variant(record, name)
    return "compiled" if shards_parameters(record) else "megatron"


def node_of(record: Record) -> int:
    """Devices that share the fast links of one node."""
    hardware = record["hardware"]
    return RACK if "NVL72" in (hardware.get("intra_node_link") or "") else hardware.get("gpus_per_node") or 8


def shards_parameters(record: Record) -> bool:
    """Whether ranks share parameters, and not what the optimizer keeps alone: FSDP, FULL_SHARD, ZeRO 3."""
    told = str(record.get("zero_stage")).lower()
    return bool(re.match(r"fsdp|hsdp|(full|hybrid)[ _-]?shard|(zero|stage|[ _-])*(3|infinity)", told))


def recomputes_core(record: Record) -> bool:
    """Whether "selective" is Megatron's, which computes the core of attention alone again, not FSDP's by operator."""
    return str(record.get("recompute")).lower() == "selective" and not shards_parameters(record)


def _variant(record: Record, stack: str) -> str:
    """What follows a stack's name where a recipe, a dtype or the date of a source says that it is run otherwise."""
    told = record.get("ci_args") or {}
    if recomputes_core(record) and stack == "megatron-early":
        return "-selective"
    if stack == "megatron-deepspeed" and re.match(r"bf|bfloat", str(record.get("dtype")).lower()):
        return "-bf16"
    if stack == "compiled":
        rows = "-rowwise" if re.search(r"row-?wise", str(record.get("dtype")), re.I) else ""
        if re.search(r"\basync(hronous)? (tp|tensor)", str(record.get("notes")), re.I):
            return "-async" + rows
        dated = re.search(r"\b20[12]\d\b|20[12]\d-?[01]\d", str(record.get("source")))
        return rows or ("-loss" if dated and dated[0] >= COMPILED_LOSS else "")
    if stack != "megatron":
        return ""
    if told.get("attention-backend") == "unfused" or told.get("transformer-impl") == "local":
        return "-unfused"
    if told.get("cross-entropy-loss-fusion"):
        return "-compiled-loss"
    if recomputes_core(record):
        return "-selective"
    return _recipe(record)


def _recipe(record: Record) -> str:
    """How NVIDIA's own recipes run Megatron; "" for other sources."""
    source = str(record.get("source"))
    if not re.search(RECIPES, source, re.I):
        return ""
    mixture, dtype = bool(record["model"].get("moe")), str(record["dtype"]).lower()
    container = re.search(r"\((\d\d\.\d\d)[.\d]* NeMo Container\)", source)
    if mixture and "mxfp8" in dtype and container and container[1] >= STEP_GRAPHS:
        return "-graphs"
    if "fp4" in dtype:
        return "-recipes-fp4"
    far = (record.get("ep") or 1) * (record.get("tp") or 1) > node_of(record)
    return "-recipes" + ("-hidden" if mixture and far and (record.get("vpp") or 1) > 1 else "")
