"""The plan as text: what ``print(plan)`` shows, at most 100 columns wide. Works from the plan alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from autopar.mesh import AXES, Mesh
from autopar.plan import MEMORY_KINDS, Candidate, Plan
from autopar.report.columns import counted, item, pairs, percent, span, table, value_text
from autopar.report.units import bytes_text, energy_text, memory_unit, seconds_text, significant
from autopar.stack import stack_of

HEADS = {"parameters": "params", "gradients": "grads", "optimizer": "optim", "activations": "activs"}


def plan_text(plan: Plan) -> str:
    """The whole plan: the decision, the prediction, the stages, and how each kind of block is split."""
    sections = (decision_lines(plan), _prediction(plan), _stages(plan), _sharding(plan), _notes(plan))
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def decision_lines(plan: Plan) -> list[str]:
    """Mesh, micro-batch, schedule and memory, and what of it was fixed."""
    job, mesh, cluster = plan.job, plan.mesh, plan.cluster
    lines = [
        f"{plan.model} on {cluster}: {cluster.devices} x {cluster.device.title}",
        *item(
            "job",
            f"{job.global_batch:,} sequences of {job.seq_len:,} tokens per step, {job.dtype}"
            + (f" (linear layers {job.linear_dtype})" if job.linear_dtype else "")
            + f", {job.optimizer}"
            + ("" if job.stack == "torch" else f", run by {stack_of(job.stack).title}"),
        ),
        *item("mesh", f"{replace(mesh, order=AXES)} ({'; '.join(_axis_words(plan)) or 'one device'})"),
        *(item("ranks", order_words(mesh)) if mesh.order != AXES else ()),
        *item(
            "micro-batch",
            f"{counted(plan.micro_batch, 'sequences')} on each data rank, {plan.micro_batches:,} per step",
        ),
        *item("schedule", schedule_words(plan)),
        *item("memory", ", ".join([f"ZeRO-{plan.zero}{_shard_groups(plan)}", *_gathered(plan), *_kept(plan)])),
    ]
    if plan.pad_heads > 1:
        lines += item("heads", f"padded with zeros to a multiple of {plan.pad_heads}")
    if plan.fixed:
        lines += item("fixed", pairs({key: value_text(value) for key, value in plan.fixed.items()}))
        lines += item("chosen", pairs(chosen(plan)))
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
        "reshard": reshard_words(plan),
        "recompute": recompute_words(plan),
        "schedule": plan.schedule,
        "offload": offload_words(plan),
        "order": ",".join(mesh.order),
    }
    if mesh.tp > 1:
        whole["sp"] = value_text("sequence parallel" in _names(plan, next(iter(mesh.tp_axes()))))
    fsdp = str(mesh.data if plan.zero else 1)
    neutral = {"cp": "1", "offload": "none", "fsdp": fsdp, "order": ",".join(AXES), "reshard": ""}
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


def order_words(mesh: Mesh) -> str:
    """In which order ranks go through the axes of more than one rank."""
    several = [axis for axis in mesh.order if mesh.axes().get(axis, mesh.tp) > 1]
    return f"in the order {', '.join(several)}, outermost first"


def _names(plan: Plan, axis: str) -> tuple[str, ...]:
    return plan.described.get(axis, ())


def schedule_words(plan: Plan) -> str:
    """The schedule, and how many stages a rank has if several."""
    if plan.schedule == "none":
        return "no pipeline"
    return plan.schedule + (f", {plan.vpp} stages on each rank" if plan.vpp > 1 else "")


def _shard_groups(plan: Plan) -> str:
    """Said only where it is not all data ranks."""
    if not plan.zero or plan.fsdp == plan.mesh.data:
        return ""
    return f" over groups of {plan.fsdp} data ranks"


def gathered_blocks(plan: Plan) -> int:
    """How many blocks stay gathered through the step though ZeRO 3 frees the others."""
    return sum(run.stop - run.start for run in plan.gathered_runs())


def reshard_words(plan: Plan) -> str:
    """Which blocks free their parameters after each use, as `fix` writes it: all but those named; nothing where that is
    all of them, or the ZeRO level leaves no choice."""
    spans: list[tuple[int, int]] = []
    for run in plan.gathered_runs():
        start = spans.pop()[0] if spans and spans[-1][1] == run.start else run.start
        spans.append((start, run.stop))
    return ",".join(["true", *(f"{span(start, stop)}:false" for start, stop in spans)]) if spans else ""


def _gathered(plan: Plan) -> list[str]:
    count = gathered_blocks(plan)
    return [f"{counted(count, 'blocks')} staying gathered"] if count else []


def recompute_words(plan: Plan) -> str:
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


def offload_words(plan: Plan) -> str:
    """What waits on the host, as `fix` writes it, and of how many blocks the activations do, if not of all layers."""
    activations = _activations(plan)
    if not activations:
        return plan.offload
    return activations.replace("activations", "all", 1) if plan.offload == "state" else activations


def _kept(plan: Plan) -> list[str]:
    """What of a micro-batch is made again, and what waits on the host."""
    waiting = ["parameters, gradients, optimizer state"] if plan.offload == "state" else []
    waiting += filter(None, [_activations(plan)])
    return [f"recompute {recompute_words(plan)}", *([f"{', '.join(waiting)} on the host"] if waiting else [])]


def _activations(plan: Plan) -> str:
    """What is said of activations on the host: of how many blocks, where others of their kinds keep them."""
    counts: dict[str, Counter[bool]] = {}
    for run in (run for stage in plan.stages for run in stage.runs):
        candidate = plan.candidates[run.candidate]
        counts.setdefault(candidate.decision.kind, Counter())[candidate.offload] += run.stop - run.start
    moving = [count for count in counts.values() if count[True]]
    if not any(count[False] for count in moving):
        return "activations" if moving else ""
    return f"activations of {counted(sum(count[True] for count in moving), 'blocks')}"


def _prediction(plan: Plan) -> list[str]:
    found = plan.predicted
    low, high = (seconds_text(value) for value in found.interval)
    parts = [(name, s) for name, s in found.breakdown.items() if s > 1e-6 * found.step_time]
    per_device = found.tokens_per_second / plan.cluster.devices
    lines = [
        *item("step time", f"{seconds_text(found.step_time)} (between {low} and {high})"),
        *item(
            "throughput",
            f"{found.tokens_per_second:,.0f} tokens/s, {per_device:,.0f} per device, MFU {percent(found.mfu)}",
        ),
        *_energy(plan),
        *_objective(plan),
        *_priced_by(plan),
        *item("made of", ", ".join(f"{name} {seconds_text(s)}" for name, s in parts)),
        *item("bound", f"{seconds_text(plan.bound)}, gap {percent(plan.gap)}, {plan.status} in the searched space"),
    ]
    if told := equal_blocks_words(plan):
        lines += item("equal blocks", told)
    if plan.searched:
        lines += item("searched", ", ".join(counted(number, name) for name, number in plan.searched.items()))
    if plan.seconds:
        lines += item("seconds", ", ".join(f"{name.replace('_', ' ')} {s:.2f}" for name, s in plan.seconds.items()))
    return lines


def _energy(plan: Plan) -> list[str]:
    """What devices draw in a step, where their power is known."""
    found, device = plan.predicted, plan.cluster.device
    if found.energy_j is None:
        return []
    told = f"{energy_text(found.energy_j)} a step, {significant(found.energy_j / plan.job.tokens)} J per token"
    how = f"each {device.power_w:g} W all the time, what it draws while it waits is not known"
    if device.wait_w:
        share = percent(found.computing_s / found.step_time)
        how = f"each {device.power_w:g} W while it computes, {share} of the time, else {device.wait_w:g} W"
    return item("energy", f"{told} ({how})")


def _priced_by(plan: Plan) -> list[str]:
    """Where the seconds of operators are from, if a profile had a part in them."""
    measured = plan.cluster.device.measured
    if measured is None:
        return []
    told = [f"{percent(part)} {name}" for name, part in source_mix(plan).items()]
    return item("priced by", f"profile {measured.digest} ({measured.title}): {', '.join(told)}")


def source_mix(plan: Plan) -> dict[str, float]:
    """Of the seconds of all blocks, conversions included, the part from each source, the largest first: "measured" (at
    the very shape), "interpolated" (between measured shapes), "catalog" or "roofline" (by figures of the device)."""
    seconds: dict[str, float] = {}
    for run in (run for stage in plan.stages for run in stage.runs):
        for name, value in plan.candidates[run.candidate].sources.items():
            seconds[name] = seconds.get(name, 0.0) + (run.stop - run.start) * value
    total = sum(seconds.values())
    largest = sorted(seconds.items(), key=lambda entry: -entry[1])
    return {name: value / total for name, value in largest if total}


def equal_blocks_words(plan: Plan) -> str:
    """Whether blocks of a kind share one sharding, and what that costs; "" where nobody looked."""
    free, step = plan.free_step_time, plan.predicted.step_time
    if not plan.equal_blocks:
        return "may be sharded differently"
    if free is None:
        return ""

    def told(seconds: float) -> str:
        return f"{seconds_text(seconds)} ({percent(seconds / step)})" if seconds > 1e-9 * step else "nothing"

    most = told(max(0.0, step - plan.bound))
    return f"sharded alike; free, they gain {told(step - free)} here, at most {most} anywhere"


def _objective(plan: Plan) -> list[str]:
    """What was sought, if not the step time of the whole cluster, and how much of the cluster serves it."""
    reached = plan.objective
    if reached is None:
        return []
    sought = reached.objective
    side = "at most" if sought.seeks_most else "at least"
    text = "{:,.0f}".format if sought.kind == "devices" else significant
    value, bound = text(reached.value), text(reached.bound)
    names = {
        "throughput_per_device": f"most per device: {value} tokens/s",
        "devices": f"fewest devices within {seconds_text(sought.within_s or 0.0)}: {value}",
        "cost": f"least cost: {value} per million tokens",
        "energy": f"least energy: {value} J per token",
    }
    used = f"on {plan.cluster.devices:,} of {counted(reached.devices, 'devices')}"
    sure = f"{side} {bound}, gap {percent(reached.gap)}, {reached.status} over all cluster sizes"
    return item("objective", f"{names[sought.kind]}, {used} ({sure})")


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
        blocks = span(stage.runs[0].start, stage.runs[-1].stop)
        rank = [str(plan.rank_of(index))] if several else []
        rows.append([*rank, str(index), blocks, *times, *(bytes_text(size, scale) for size in sizes)])
    limit = bytes_text(plan.cluster.device.memory_bytes, scale)
    title = f"time per micro-batch and once per step; memory per rank in {unit}, of {limit}:"
    return [title, *table(head, rows)]


def _sharding(plan: Plan) -> list[str]:
    runs: dict[str, list[str]] = {}
    for run in (run for stage in plan.stages for run in stage.runs):
        runs.setdefault(run.candidate, []).append(span(run.start, run.stop))
    lines: list[str] = []
    printed: dict[tuple[str, ...], str] = {}
    for name, spans in runs.items():
        candidate, told = plan.candidates[name], plan.described.get(name, ())
        noun = "block" if len(spans) == 1 and spans[0].isdigit() else "blocks"
        where = f"{candidate.decision.kind}, {noun} {', '.join(spans)}"
        times = f"{seconds_text(candidate.forward_s)} forward, {seconds_text(candidate.backward_s)} backward"
        way = recompute_text(candidate)
        times += ", saved tensors on the host" if candidate.offload else ""
        times += ", parameters stay gathered" if candidate.gathered and plan.zero == 3 else ""
        lines.append(f"{where}: {times}{'' if way == 'none' else f', recompute {way}'}")
        lines += [f"  {line}" for line in told] if told not in printed else [f"  split as {printed[told]}"]
        if told:
            printed.setdefault(told, where)
    return lines


def _notes(plan: Plan) -> list[str]:
    return [line for note in plan.notes for line in item("note", note)]
