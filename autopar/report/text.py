"""The plan as text: what ``print(plan)`` shows, at most 100 columns wide. Works from the plan alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from autopar.plan import MEMORY_KINDS, Candidate, Plan
from autopar.report.units import bytes_text, memory_unit, seconds_text

WIDTH = 100
LABEL = 13
"""Columns of the left-hand labels."""
HEADS = {"parameters": "params", "gradients": "grads", "optimizer": "optim", "activations": "activs"}


def plan_text(plan: Plan) -> str:
    """The whole plan: the decision, the prediction, the stages, and how each kind of block is split."""
    sections = (_decision(plan), _prediction(plan), _stages(plan), _sharding(plan), _notes(plan))
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _decision(plan: Plan) -> list[str]:
    job, mesh, cluster = plan.job, plan.mesh, plan.cluster
    lines = [
        f"{plan.model} on {cluster}: {cluster.devices} x {cluster.device.title}",
        *_item(
            "job", f"{job.global_batch:,} sequences of {job.seq_len:,} tokens per step, {job.dtype}, {job.optimizer}"
        ),
        *_item("mesh", f"{mesh} ({'; '.join(_axis_words(plan)) or 'one device'})"),
        *_item(
            "micro-batch",
            f"{_count(plan.micro_batch, 'sequences')} on each data rank, {plan.micro_batches:,} per step",
        ),
        *_item("schedule", _schedule(plan)),
        *_item("memory", f"ZeRO-{plan.zero}{_shard_groups(plan)}, recompute {_recompute(plan)}{_offload(plan)}"),
    ]
    if plan.pad_heads > 1:
        lines += _item("heads", f"padded with zeros to a multiple of {plan.pad_heads}")
    if plan.fixed:
        lines += _item("fixed", _pairs({key: _value(value) for key, value in plan.fixed.items()}))
        lines += _item("chosen", _pairs(chosen(plan)))
    return lines


def chosen(plan: Plan) -> dict[str, str]:
    """The parts of the plan that were not fixed but chosen, by fix key."""
    mesh = plan.mesh
    whole = {
        "pp": str(mesh.pp),
        "dp": str(mesh.dp),
        "cp": str(mesh.cp),
        "tp": "x".join(map(str, mesh.tp_parts)) or str(mesh.tp),
        "micro_batch": str(plan.micro_batch),
        "zero": str(plan.zero),
        "fsdp": str(plan.fsdp),
        "recompute": _recompute(plan),
        "schedule": plan.schedule,
    }
    if mesh.tp > 1:
        whole["sp"] = _value("sequence parallel" in _names(plan, next(iter(mesh.tp_axes()))))
    neutral = {"cp": "1", "fsdp": str(mesh.data if plan.zero else 1)}
    whole = {key: value for key, value in whole.items() if neutral.get(key) != value}
    return {key: value for key, value in whole.items() if key not in plan.fixed and "mesh" not in plan.fixed}


def _axis_words(plan: Plan) -> list[str]:
    words = []
    if plan.mesh.pp > 1:
        words.append("pp: pipeline stages")
    if plan.mesh.dp > 1:
        words.append("dp: data parallel")
    for axis in plan.mesh.model_axes():
        names = [name.removesuffix(" parallel") for name in _names(plan, axis)]
        words.append(f"{axis}: {' + '.join(names)} parallel" if names else f"{axis}: nothing split")
    return words


def _names(plan: Plan, axis: str) -> tuple[str, ...]:
    return plan.described.get(axis, ())


def _schedule(plan: Plan) -> str:
    if plan.schedule == "none":
        return "no pipeline"
    return plan.schedule + (f", {plan.vpp} stages on each rank" if plan.vpp > 1 else "")


def _shard_groups(plan: Plan) -> str:
    """Said only where it is not all data ranks."""
    if not plan.zero or plan.fsdp == plan.mesh.data:
        return ""
    return f" over groups of {plan.fsdp} data ranks"


def _recompute(plan: Plan) -> str:
    """How many blocks are recomputed in backward: ``none``, or the count for each way of it."""
    runs = [run for stage in plan.stages for run in stage.runs]
    total = sum(run.stop - run.start for run in runs)
    counts: Counter[str] = Counter()
    for run in runs:
        counts[recompute_text(plan.candidates[run.candidate])] += run.stop - run.start
    told = [f"{way} for {count}" for way, count in counts.items() if way != "none"]
    return f"{', '.join(told)} of {total} blocks" if told else "none"


def recompute_text(candidate: Candidate) -> str:
    """What of a block is recomputed, as `fix` writes it."""
    return f"selective({'+'.join(candidate.saved)})" if candidate.recompute == "selective" else candidate.recompute


def _offload(plan: Plan) -> str:
    waiting = ["parameters, gradients, optimizer state"] if plan.offload == "state" else []
    if any(plan.candidates[run.candidate].offload for stage in plan.stages for run in stage.runs):
        waiting.append("activations")
    return f", {', '.join(waiting)} on the host" if waiting else ""


def _prediction(plan: Plan) -> list[str]:
    found = plan.predicted
    low, high = (seconds_text(value) for value in found.interval)
    parts = [(name, s) for name, s in found.breakdown.items() if s > 1e-6 * found.step_time]
    per_device = found.tokens_per_second / plan.cluster.devices
    lines = [
        *_item("step time", f"{seconds_text(found.step_time)} (between {low} and {high})"),
        *_item(
            "throughput",
            f"{found.tokens_per_second:,.0f} tokens/s, {per_device:,.0f} per device, MFU {_percent(found.mfu)}",
        ),
        *_item("made of", ", ".join(f"{name} {seconds_text(s)}" for name, s in parts)),
        *_item("bound", f"{seconds_text(plan.bound)}, gap {_percent(plan.gap)}, {plan.status} in the searched space"),
    ]
    if plan.searched:
        lines += _item("searched", ", ".join(_count(count, name) for name, count in plan.searched.items()))
    if plan.seconds:
        lines += _item("seconds", ", ".join(f"{name.replace('_', ' ')} {s:.2f}" for name, s in plan.seconds.items()))
    return lines


def _percent(share: float) -> str:
    if share < 1e-6:  # rounding of the solver, not a difference
        return "0"
    return f"{100 * share:.1f}%" if share >= 0.001 else f"{100 * share:.2g}%"


def _stages(plan: Plan) -> list[str]:
    several = plan.vpp > 1
    head = [
        *(["rank"] if several else []),
        "stage",
        "blocks",
        "forward",
        "backward",
        "once",
        *(HEADS.get(kind, kind) for kind in MEMORY_KINDS),
        "total",
    ]
    used = (size for stage in plan.stages for kind, size in stage.memory.items() if kind != "reserve")
    unit, scale = memory_unit(max(used, default=0))
    rows = []
    for index, stage in enumerate(plan.stages):
        sizes = [*(stage.memory.get(kind, 0) for kind in MEMORY_KINDS), stage.total_bytes]
        times = [seconds_text(value) for value in (stage.forward_s, stage.backward_s, stage.step_s)]
        span = _span(stage.runs[0].start, stage.runs[-1].stop)
        rank = [str(plan.rank_of(index))] if several else []
        rows.append([*rank, str(index), span, *times, *(bytes_text(size, scale) for size in sizes)])
    limit = bytes_text(plan.cluster.device.memory_bytes, scale)
    title = f"time per micro-batch and once per step; memory per rank in {unit}, of {limit}:"
    return [title, *_table(head, rows)]


def _span(start: int, stop: int) -> str:
    return f"{start}-{stop - 1}" if stop - start > 1 else str(start)


def _sharding(plan: Plan) -> list[str]:
    runs: dict[str, list[str]] = {}
    for run in (run for stage in plan.stages for run in stage.runs):
        runs.setdefault(run.candidate, []).append(_span(run.start, run.stop))
    lines: list[str] = []
    printed: dict[tuple[str, ...], str] = {}
    for name, spans in runs.items():
        candidate, told = plan.candidates[name], plan.described.get(name, ())
        noun = "block" if len(spans) == 1 and spans[0].isdigit() else "blocks"
        where = f"{candidate.decision.kind}, {noun} {', '.join(spans)}"
        times = f"{seconds_text(candidate.forward_s)} forward, {seconds_text(candidate.backward_s)} backward"
        way = recompute_text(candidate)
        times += ", saved tensors on the host" if candidate.offload else ""
        lines.append(f"{where}: {times}{'' if way == 'none' else f', recompute {way}'}")
        lines += [f"  {line}" for line in told] if told not in printed else [f"  split as {printed[told]}"]
        if told:
            printed.setdefault(told, where)
    return lines


def _notes(plan: Plan) -> list[str]:
    return [line for note in plan.notes for line in _item("note", note)]


def _item(label: str, text: str) -> list[str]:
    """A labelled paragraph, wrapped to the width under its own start."""
    lines = [""]
    for word in re.split(r" (?!(?:s|ms|µs)\b)", text):
        if lines[-1] and LABEL + len(lines[-1]) + 1 + len(word) > WIDTH:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return [f"{label if index == 0 else '':<{LABEL}}{line}".rstrip() for index, line in enumerate(lines)]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Right-aligned columns, two spaces apart."""
    whole = [list(head), *map(list, rows)]
    widths = [max(len(row[column]) for row in whole) for column in range(len(head))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in whole]


def _pairs(values: dict[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


def _value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _count(number: int, plural: str) -> str:
    """``12 meshes``, ``1 mesh``, for a plural written with spaces or underscores."""
    noun = plural.replace("_", " ")
    if number == 1:
        noun = noun.removesuffix("es") if noun.endswith("shes") else noun.removesuffix("s")
    return f"{number:,} {noun}"
