"""What can be executed, as data: the search stays inside this table, a fix outside it is refused by name, the emitter
checks what it is given against it, and the documentation prints it.

`CAPABILITIES` says what values each key may take, `LIMITS` which of them cannot be combined. Later capabilities widen
the tables; nothing else needs to know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from autopar.errors import UnsupportedError
from autopar.mesh import AXES
from autopar.plan import Mesh, Plan
from autopar.schedule import SCHEDULES


@dataclass(frozen=True, slots=True)
class Capability:
    """One fixable key: the form of its values, the values that can be executed (None: any of that form), for the rest
    the reason and the way out, and in ``searched`` what the search looks at where the key is not fixed."""

    form: str
    executable: tuple[Any, ...] | None
    missing: str = ""
    searched: str = ""


CAPABILITIES: dict[str, Capability] = {
    "dp": Capability("size", None, searched="all"),
    "fsdp": Capability("size", None, searched="whole nodes, or parts of one"),
    "zero": Capability("level", (0, 1, 2, 3), searched="all"),
    "tp": Capability("axis", None, searched="sizes that divide a node"),
    "sp": Capability("switch", (True, False), searched="both, tensor by tensor"),
    "cp": Capability("size", None, searched="sizes that leave a rank 1,024 positions or more"),
    "context": Capability("context", ("gathered", "all-to-all", "ring"), searched="all, operator by operator"),
    "ep": Capability("size", None, searched="1, the most that fit in a node, and all that fill nodes"),
    "pp": Capability("size", None, searched="all"),
    "vpp": Capability("size", None, searched="1, 2, 3, 4, 6, 8, 12, 16, 24, 32"),
    "schedule": Capability("schedule", tuple(SCHEDULES), searched="all"),
    "micro_batch": Capability("size", None, searched="one sample, or up to 131,072 tokens"),
    "recompute": Capability(
        "recompute",
        ("none", "selective", "full"),
        searched="none, full, selective where memory is short; for each block",
    ),
    "reshard": Capability("reshard", (True, False), searched="under zero=3, for each block"),
    "offload": Capability(
        "offload",
        ("none", "state", "activations", "all"),
        searched="state; activations where memory is short, for each block",
    ),
    "mesh": Capability("mesh", None),
    "order": Capability("order", None, searched="which of pp and dp comes next after cp and tp, the innermost"),
    "stages": Capability("counts", None, searched="all contiguous splits"),
}
"""Every key that may be fixed."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What the limits look at: the decisions outside the blocks, which recomputation and offload blocks use, and if
    any stays gathered."""

    mesh: Mesh
    schedule: str
    vpp: int
    micro_batches: int
    zero: int
    fsdp: int
    offload: str = "none"
    recompute: frozenset[str] = frozenset({"none"})
    offloads_blocks: bool = False
    dtype: str = "bf16"
    gathered: bool = False

    @staticmethod
    def of(plan: Plan) -> Chosen:
        """What a plan has chosen."""
        used = [plan.candidates[run.candidate] for stage in plan.stages for run in stage.runs]
        return Chosen(
            plan.mesh,
            plan.schedule,
            plan.vpp,
            plan.micro_batches,
            plan.zero,
            plan.fsdp,
            plan.offload,
            frozenset(candidate.recompute for candidate in used),
            any(candidate.offload for candidate in used),
            plan.job.dtype,
            any(candidate.gathered for candidate in used),
        )


@dataclass(frozen=True, slots=True)
class Limit:
    """A combination that cannot be executed: ``keys`` it is about, whether a choice ``breaks`` it, the ``reason`` with
    the way out, and in ``avoids`` the error PyTorch would raise, or what it would do silently."""

    name: str
    keys: tuple[str, ...]
    breaks: Callable[[Chosen], bool]
    reason: str
    avoids: str = ""


def _splits_backward(choice: Chosen) -> bool:
    return SCHEDULES[choice.schedule].splits_backward


LIMITS: tuple[Limit, ...] = (
    Limit(
        "one stage has no schedule",
        ("schedule", "pp"),
        lambda c: (c.mesh.pp == 1) != (c.schedule == "none"),
        'a single stage runs under schedule "none", several under any other',
    ),
    Limit(
        "stages on a rank",
        ("vpp", "schedule"),
        lambda c: c.vpp < 2 if SCHEDULES[c.schedule].stages is None else c.vpp != SCHEDULES[c.schedule].stages,
        "interleaved runs two or more stages a rank (vpp), zbv and dualpipev exactly two, the others one",
        'torch: "requires exactly 2 stages per rank"',
    ),
    Limit(
        "1f1b fills the pipeline",
        ("schedule", "pp", "micro_batch"),
        lambda c: c.schedule == "1f1b" and c.micro_batches < c.mesh.pp,
        "1F1B needs at least pp micro-batches on each data rank; use fewer stages, a smaller micro_batch, a larger "
        "global_batch, or gpipe",
        'torch: "Number of microbatches ... must be greater than or equal to the number of stages"',
    ),
    Limit(
        "interleaved goes in rounds",
        ("schedule", "pp", "micro_batch"),
        lambda c: c.schedule == "interleaved" and c.micro_batches % max(1, c.micro_batches // c.mesh.pp) != 0,
        "interleaved 1F1B runs micro-batches in micro_batches // pp equal rounds; choose a number that divides",
        'torch: "requires the number of microbatches to be a multiple of the number of rounds"',
    ),
    Limit(
        "dualpipev fills the pipeline",
        ("schedule", "pp", "micro_batch"),
        lambda c: c.schedule == "dualpipev" and c.micro_batches < 2 * c.mesh.pp,
        "DualPipeV needs at least 2 pp micro-batches on each data rank; use fewer stages or smaller micro-batches",
        'torch: "DualPipeV requires at least as many microbatches as stages"',
    ),
    Limit(
        "split backward keeps gradients whole",
        ("schedule", "zero"),
        lambda c: _splits_backward(c) and c.zero >= 2,
        "zbv and dualpipev compute weight gradients apart from the backward that FSDP2 reduces and frees after; use "
        "zero=0 or zero=1, or another schedule",
        "gradients are wrong, and nothing is raised (reshard_after_forward under a split backward)",
    ),
    Limit(
        "only zero 3 frees parameters",
        ("zero", "reshard"),
        lambda c: c.gathered and c.zero != 3,
        "under zero=0 to 2 parameters stay gathered in every block; reshard says in which they do under zero=3",
    ),
    Limit(
        "split backward recomputes too often",
        ("schedule", "recompute"),
        lambda c: _splits_backward(c) and bool(c.recompute - {"none"}),
        "zbv and dualpipev would recompute a block once for its input and again for each of its weights; use "
        "recompute=none, or another schedule",
        "a block of 9 weights runs 11 times for each micro-batch, not twice (torch.utils.checkpoint under a split "
        "backward)",
    ),
    Limit(
        "zero 0 shards nothing",
        ("zero", "fsdp"),
        lambda c: c.zero == 0 and c.fsdp != 1,
        "zero=0 keeps everything whole: its shard group is of one rank (fsdp=1)",
    ),
    Limit(
        "two tensor axes",
        ("tp", "mesh"),
        lambda c: len(c.mesh.tp_parts) > 2,
        "a parameter may be split over two tensor axes at most; use tp=AxB, or one axis",
        'FSDP2 raises "FSDP only supports 1D TP/EP or 2D EP+TP"',
    ),
    Limit(
        "shard groups hold whole sequences",
        ("fsdp", "cp"),
        lambda c: c.fsdp > 1 and c.fsdp % c.mesh.cp != 0,
        "the ranks of cp hold one sequence and are sharded over together: fsdp must be a multiple of cp",
    ),
    Limit(
        "experts and shard groups nest",
        ("ep", "fsdp"),
        lambda c: c.fsdp > 1 and c.fsdp % c.mesh.ep != 0 and c.mesh.ep % c.fsdp != 0,
        "shard groups hold whole groups of ranks that share experts, or are parts of one: one of fsdp and ep must "
        "divide the other",
    ),
    Limit(
        "experts are shared by neighbours",
        ("ep", "order"),
        lambda c: c.mesh.ep > 1 and c.mesh.order != AXES,
        "with ep the mesh axes are in the default order (pp,dp,cp,tp)",
    ),
    Limit(
        "experts stay on the device",
        ("ep", "offload"),
        lambda c: c.mesh.ep > 1 and c.offload == "state",
        "state that waits on the host has not been proved with ep; use offload=none or activations",
    ),
    Limit(
        "split backward without exchanges",
        ("ep", "schedule"),
        lambda c: c.mesh.ep > 1 and _splits_backward(c),
        "zbv and dualpipev have not been proved with the exchanges of tokens that ep needs; use another schedule",
    ),
    Limit(
        "context ranks inside data ranks",
        ("order", "dp", "cp"),
        lambda c: min(c.mesh.dp, c.mesh.cp) > 1 and c.mesh.order.index("dp") > c.mesh.order.index("cp"),
        "the ranks of dp and cp are sharded over together, those of cp first: name cp after dp in order",
        "weights and checkpoints are read into other ranks' shards, and nothing is raised (FSDP2 goes by the sorted "
        "ranks of a group, DTensor by places of the mesh)",
    ),
)
"""What cannot be combined."""


def refusals(choice: Chosen) -> Iterator[Limit]:
    """The limits that a choice breaks."""
    return (limit for limit in LIMITS if limit.breaks(choice))


def executes(choice: Chosen) -> bool:
    """Whether emitted code runs it."""
    return next(refusals(choice), None) is None


def check_executable(plan: Plan) -> None:
    """Raise UnsupportedError naming the first limit that the plan breaks."""
    for limit in refusals(Chosen.of(plan)):
        told = limit.reason + (f" (it avoids: {limit.avoids})" if limit.avoids else "")
        raise UnsupportedError(f"the plan for {plan.model} cannot be executed: {limit.name}: {told}")
