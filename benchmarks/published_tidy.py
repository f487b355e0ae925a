"""Records of published runs brought into one form before anything is read from them.

Files that nobody here has seen may state numbers as text, whole numbers as 8.0, leave fields out where others have
null, or hold what no run has. `tidied` returns a record in which every field of the form (`shared/published/README.md`
lists them) is there, numbers are numbers inside plausible ranges, and words are text; what cannot be brought into that
form is refused with the field's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

Record = Mapping[str, Any]

COUNTS = {"global_batch": 10**7, "micro_batch": 10**5, "tp": 4096, "cp": 4096, "pp": 1024, "vpp": 256, "dp": 10**6}
COUNTS["ep"] = 4096
SIZES = {"layers": 4096, "hidden": 2**18, "heads": 4096, "kv_heads": 4096, "ffn": 2**20, "vocab": 2**22}
SIZES |= {"seq_len": 2**27, "head_dim": 2**14}
MACHINES = {"count": 10**6, "gpus_per_node": 10**4}
EXPERTS = {"experts": 2**16, "topk": 2**10, "shared": 64, "expert_ffn": 2**20, "dense_layers": 4096}
"""Whole numbers by where they stand, and the most that is taken for one: beyond what any run has had by a factor of 10
or more, and small enough that predicting it ends."""
ZERO = ("shared", "dense_layers")
"""Those of which there may be none."""
MEASURED = ("step_time_s", "tflops_per_gpu", "mfu", "tokens_per_s_per_gpu", "peak_mem_gb")
WORDS = ("group", "source", "notes", "dtype", "schedule")
MACHINE_WORDS = ("gpu", "intra_node_link", "inter_node_link")
MODEL_WORDS = ("name", "attention")
PARTS = ("model", "hardware", "measured")
MICRO_BATCHES = 20_000
"""The most micro-batches of a step that are simulated one by one."""


class RefusedError(Exception):
    """A record that cannot be represented; its text is the reason."""


def tidied(record: Record) -> dict[str, Any]:
    """The record in one form. Raises RefusedError naming the field."""
    if not isinstance(record, Mapping):
        raise RefusedError(f"a record is an object with fields, not {type(record).__name__}")
    found = dict(record)
    for name in PARTS:
        part = found.get(name)
        if part is not None and not isinstance(part, Mapping):
            raise RefusedError(f"{name} is not an object with fields")
        found[name] = dict(part or {})
    for part, names in ((found, COUNTS), (found["model"], SIZES), (found["hardware"], MACHINES)):
        for name, most in names.items():
            part[name] = _whole(name, part.get(name), most)
    for name in MEASURED:
        found["measured"][name] = _positive(name, found["measured"].get(name))
    share = found["measured"]["mfu"]
    found["measured"]["mfu"] = share / 100 if share and share > 1 else share
    for part, names in ((found, WORDS), (found["hardware"], MACHINE_WORDS), (found["model"], MODEL_WORDS)):
        for name in names:
            part[name] = None if part.get(name) is None else str(part[name])
    found["model"]["moe"] = _experts(found["model"].get("moe"))
    found["sp"] = _truth(found.get("sp"))
    arguments = found.get("ci_args")
    found["ci_args"] = dict(arguments) if isinstance(arguments, Mapping) else {}
    for name in ("zero_stage", "recompute"):
        found.setdefault(name, None)
    return found


def _experts(told: Any) -> dict[str, Any] | None:
    if not told:
        return None
    if not isinstance(told, Mapping):
        raise RefusedError("moe is not an object with fields")
    return {**told, **{name: _whole(name, told.get(name), most) for name, most in EXPERTS.items()}}


def _number(name: str, told: Any) -> float | None:
    if told is None or (isinstance(told, str) and not told.strip()):
        return None
    try:
        if isinstance(told, bool):
            raise ValueError
        value = float(told)
    except (TypeError, ValueError, OverflowError):
        raise RefusedError(f"{name} is no number: {str(told)[:40]!r}") from None
    if not isfinite(value):
        raise RefusedError(f"{name} is no number: {told!r}")
    return value


def _whole(name: str, told: Any, most: int) -> int | None:
    value = _number(name, told)
    if value is None:
        return None
    if value != int(value) or value < (0 if name in ZERO else 1):
        if value == 0:
            return None  # as good as not stated
        raise RefusedError(f"{name} is no count: {told!r}")
    if value > most:
        raise RefusedError(f"{name} is beyond any run: {told!r}")
    return int(value)


def _positive(name: str, told: Any) -> float | None:
    """A measurement; what cannot be one was not measured."""
    try:
        value = _number(name, told)
    except RefusedError:
        return None
    return value if value and value > 0 else None


def _truth(told: Any) -> bool | None:
    if told is None or isinstance(told, bool):
        return told
    text = str(told).strip().lower()
    return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text)
