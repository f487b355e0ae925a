"""What surely does not fit, said before any stages are sought."""

from __future__ import annotations

from autopar.solver.context import Context
from autopar.solver.decisions import whole_decisions
from autopar.solver.elements import total_elements
from autopar.solver.evaluate import placed
from autopar.solver.groups import root_blocks
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


def state_fits(context: Context, config: Config) -> bool:
    """Whether all ranks together could hold the state of a step, as `MemoryModel.ranks` counts it: parameters as the
    optimizer keeps them and, but for zero 3, as blocks read them; optimizer state; under zero 0 and 1 the gradients
    that wait for their reduction, those of every stage at their most. Each is split at most over tp and the stages."""
    return _spare(context, config) >= 0.0


def most_gathered(context: Context, config: Config) -> float:
    """Parameter elements that may stay gathered under zero 3 in the room that the state leaves, of all stages together,
    split over tp; 0 where no block may."""
    if config.zero != 3:
        return 0.0
    if "may stay" not in context.memo:
        roots = root_blocks(context.model, range(len(context.model.blocks)))
        context.memo["may stay"] = any(True in context.gathered_of(i) for i, root in enumerate(roots) if not root)
    if not context.memo["may stay"]:
        return 0.0
    elements, rooted = total_elements(context)
    return max(0.0, min(_spare(context, config) / context.job.compute_bytes, (elements - rooted) / config.tp))


def _spare(context: Context, config: Config) -> float:
    """Bytes that the state of `state_fits` leaves of all stages' memory."""
    sizes = (config.pp, config.tp, config.dp, config.cp, config.micro_batch, config.zero, config.fsdp, config.offload)
    key = ("state fits", sizes, config.schedule)
    if key not in context.memo:
        memory = placed(context, config, 0).memory
        held, (elements, _), (trains, _) = memory.per_element(), total_elements(context), total_elements(context, True)
        waiting = memory.kept_gradients("one" if config.micro_batches == 1 else "some", memory.splits)
        gradients = min(context.job.master_bytes, waiting) if memory.defers else 0
        needed = held["parameters"] * elements + (held["optimizer"] + gradients) * trains
        room = context.cluster.device.memory_bytes - memory.reserve
        context.memo[key] = room * config.pp - needed / config.tp
    return float(context.memo[key])
