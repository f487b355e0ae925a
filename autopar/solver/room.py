"""What surely does not fit, said before any stages are sought."""

from __future__ import annotations

from autopar.schedule import SCHEDULES
from autopar.solver.context import Context
from autopar.solver.decisions import whole_decisions
from autopar.solver.evaluate import placed
from autopar.solver.space import Config, Outline


def has_room(context: Context, outline: Outline) -> bool:
    """Whether memory could hold what one block has at hand in its backward, be it saved, made again or
    brought back from the host, evenly split."""
    room = context.cluster.device.memory_bytes - context.cluster.device.reserve_bytes
    return _saved_bytes(context) * outline.micro_batch / outline.ranks <= room


def _saved_bytes(context: Context) -> float:
    """The most bytes that any block keeps for each sample."""
    if "sample" not in context.memo:
        most = 0.0
        for name, decision in whole_decisions(context.model).items():
            kind = context.model.kinds[name]
            one, two = (
                min(context.costs.saved(kind, decision, n, lean=lean) for lean in (False, True)) for n in (1, 2)
            )
            most = max(most, float(two - one))
        context.memo["sample"] = most
    return float(context.memo["sample"])


def holds_state(context: Context, config: Config, elements: int, trains: int) -> bool:
    """Whether all ranks together could hold what stands as the last backwards begin, ``elements`` being those of all
    parameters, of which ``trains`` train: parameters as the optimizer keeps them and, but for zero 3, as blocks read
    them (all were read by then), optimizer state, and under zero 0 and 1 gradients that wait for their reduction, or
    its inputs and results (`memory`). Each is split at most over tp and the stages."""
    splits = SCHEDULES[config.schedule].splits_backward
    sizes = (config.pp, config.tp, config.dp, config.cp, config.micro_batch, config.zero, config.fsdp, config.offload)
    key = ("holds state", sizes, splits)
    if key not in context.memo:
        memory = placed(context, config, 0).memory
        held = memory.per_element()
        gradients = context.job.master_bytes if memory.defers else 0
        needed = held["parameters"] * elements + (held["optimizer"] + gradients) * trains
        room = context.cluster.device.memory_bytes - memory.reserve
        context.memo[key] = needed / config.tp <= room * config.pp
    return bool(context.memo[key])
