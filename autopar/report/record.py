"""The plan as the one JSON object that ``--json`` prints."""

from __future__ import annotations

from typing import Any

from autopar.objective import Objective, ObjectiveValue
from autopar.plan import Plan
from autopar.report.text import source_mix


def plan_record(plan: Plan) -> dict[str, Any]:
    """Plain JSON values: seconds, bytes, and counts.

    ``cluster`` is the short form (``"8x8:h100"``); ``mesh`` axis sizes, outermost first; ``memory`` bytes per rank by
    kind, one object per stage; ``searched`` counts; ``seconds`` by phase; ``objective`` what was sought and reached;
    ``energy`` joules of a step and of a token, null where the device's power is not known, and the share of the step in
    which devices compute; ``equal_blocks`` whether blocks of a kind share one sharding, and what that costs.
    ``profile`` is there where a profile had a part in the prices: its digest and title, and the part of the blocks'
    seconds from each source.
    """
    predicted, measured = plan.predicted, plan.cluster.device.measured
    record = {
        "model": plan.model,
        "cluster": str(plan.cluster),
        "job": plan.job.to_json(),
        "mesh": plan.mesh.ranked_axes(),
        "micro_batch": plan.micro_batch,
        "schedule": plan.schedule,
        "stages": [_stage_record(plan, index) for index in range(len(plan.stages))],
        "step_time_s": predicted.step_time,
        "tokens_per_second": predicted.tokens_per_second,
        "mfu": predicted.mfu,
        "interval": list(predicted.interval),
        "energy": _energy_record(plan),
        "memory": [stage.memory_and_total for stage in plan.stages],
        "bound_s": plan.bound,
        "gap": plan.gap,
        "status": plan.status,
        "searched": dict(plan.searched),
        "seconds": dict(plan.seconds),
        "objective": _objective_record(plan),
        "equal_blocks": _equal_blocks_record(plan),
    }
    if measured:
        record["profile"] = {"digest": measured.digest, "title": measured.title, "sources": source_mix(plan)}
    return record


def _energy_record(plan: Plan) -> dict[str, Any]:
    found = plan.predicted
    per_token = None if found.energy_j is None else found.energy_j / plan.job.tokens
    return {
        "step_j": found.energy_j,
        "token_j": per_token,
        "computing": found.computing_s / found.step_time,
        "power_w": plan.cluster.device.power_w or None,
        "wait_w": plan.cluster.device.wait_w or None,
    }


def _equal_blocks_record(plan: Plan) -> dict[str, Any]:
    """Whether blocks of a kind share one sharding; if so, seconds that freedom would gain: in this configuration, and
    at most in any."""
    free, step = plan.free_step_time, plan.predicted.step_time
    if not plan.equal_blocks or free is None:
        return {"on": plan.equal_blocks}
    return {
        "on": True,
        "free_step_time_s": free,
        "gain_s": step - free,
        "gain_at_most_s": max(0.0, step - plan.bound),
    }


def _objective_record(plan: Plan) -> dict[str, Any]:
    reached = plan.objective or ObjectiveValue(
        Objective(), plan.predicted.step_time, plan.bound, plan.gap, plan.status, plan.cluster.devices
    )
    sought = {name: value for name, value in reached.objective.to_json().items() if value is not None}
    return {
        **sought,
        "value": reached.value,
        "bound": reached.bound,
        "unit": reached.objective.unit,
        "gap": reached.gap,
        "status": reached.status,
        "devices": plan.cluster.devices,
        "devices_given": reached.devices,
    }


def _stage_record(plan: Plan, index: int) -> dict[str, Any]:
    stage = plan.stages[index]
    runs = [
        {
            "blocks": [run.start, run.stop],
            "kind": plan.candidates[run.candidate].decision.kind,
            "recompute": plan.candidates[run.candidate].recompute,
            "saved": list(plan.candidates[run.candidate].saved),
            "offload": plan.candidates[run.candidate].offload,
            "gathered": plan.candidates[run.candidate].gathered,
        }
        for run in stage.runs
    ]
    return {
        "blocks": [stage.runs[0].start, stage.runs[-1].stop],
        "runs": runs,
        "rank": plan.rank_of(index),
        "micro_batches": plan.micro_batches,
        "zero": plan.zero,
        "fsdp": plan.fsdp,
        "vpp": plan.vpp,
        "offload": plan.offload,
        "forward_s": stage.forward_s,
        "backward_s": stage.backward_s,
        "step_s": stage.step_s,
    }
