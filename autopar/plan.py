"""The plan: the complete, serialisable decision, with its predicted cost, bound and provenance."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from autopar.cluster import Cluster
from autopar.errors import BadInputError
from autopar.job import Job
from autopar.mesh import AXES
from autopar.mesh import Mesh as Mesh
from autopar.objective import ObjectiveValue
from autopar.schedule import SCHEDULES
from autopar.sharding.decision import BlockDecision

PLAN_VERSION = 2
SAVEABLE = ("matmul", "attention", "all_gather", "all_reduce", "reduce_scatter", "all_to_all")
"""Operators whose results selective recomputation may keep."""
MEMORY_KINDS = ("parameters", "gradients", "optimizer", "activations", "transient", "reserve")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One full choice inside a block kind, with its cost vector (per rank, per micro-batch unless said otherwise).

    ``recompute`` is "none", "full" (backward runs the whole forward again) or "selective" (all of it but the operators
    named in ``saved``, out of `SAVEABLE`; without "all_gather" what was gathered is gathered again). ``offload``: what
    the block saves for backward waits on the host. ``gathered``: under zero 3, its parameters stay gathered through the
    step (`reshard_after_forward=False`); else they are freed after each forward and backward.

    Seconds: ``forward_s``, ``backward_s`` (recomputation included), ``step_s`` (once per optimizer step, exposed).
    Bytes: ``resident_bytes`` (parameters, gradients, optimizer state), ``inflight_bytes`` (saved for backward per
    micro-batch in flight), ``transient_bytes`` (peak while it runs). ``parameters``: elements held per rank on the
    model axes (before any sharding over data ranks).
    """

    name: str
    decision: BlockDecision
    recompute: str
    forward_s: float
    backward_s: float
    step_s: float
    resident_bytes: int
    inflight_bytes: int
    transient_bytes: int
    parameters: int
    saved: tuple[str, ...] = ()
    offload: bool = False
    sources: dict[str, float] = field(default_factory=dict)
    gathered: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks ``start`` up to ``stop`` (indices into the model's blocks) under candidate ``candidate``."""

    start: int
    stop: int
    candidate: str


@dataclass(frozen=True, slots=True)
class Stage:
    """One pipeline stage: runs of blocks, predicted seconds per micro-batch, and bytes per rank by kind.

    Where a rank has several stages, "transient" and "reserve" are those of the rank and stand with its first stage:
    the stages of a rank add up to what it holds.
    """

    runs: tuple[Run, ...]
    forward_s: float
    backward_s: float
    step_s: float
    memory: dict[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def memory_and_total(self) -> dict[str, int]:
        return {**self.memory, "total": self.total_bytes}


@dataclass(frozen=True, slots=True)
class Predicted:
    """``step_time`` s; ``tokens_per_second`` of the whole cluster; ``mfu`` model FLOP/s over peak; ``interval`` s;
    ``breakdown``: seconds by name, adding up to ``step_time``; ``memory``: per stage, bytes per rank by kind and their
    "total"; ``computing_s``: seconds of the step in which a device computes, on average; ``energy_j``: what all devices
    in use draw in a step (`autopar.objective`), None where their power is not known."""

    step_time: float
    tokens_per_second: float
    mfu: float
    interval: tuple[float, float]
    breakdown: dict[str, float]
    memory: tuple[dict[str, int], ...] = ()
    computing_s: float = 0.0
    energy_j: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything needed to run, price and explain one way of training the model on the cluster.

    ``micro_batch``: samples per data rank per micro-batch; ``micro_batches``: how many per step.
    ``zero``: 0 to 3, over groups of ``fsdp`` data ranks (`Mesh.data`, the innermost; 1 under zero 0), replicated across
    groups. ``schedule``: a name of `SCHEDULES`, with ``vpp`` stages on each pipeline rank; ``stages`` are listed in the
    model's order, `rank_of` tells where each sits. ``offload``: "none", or "state": parameters, gradients and optimizer
    state wait on the host. ``pad_heads``: attention heads are padded to a multiple of it (1: they are not; see
    `autopar.graph.padding.as_planned`). ``bound``: a valid lower bound in seconds on the
    step time of every plan in the searched space; ``gap`` = (found - bound) / bound. ``described``: for each candidate
    its sharding in words, a line per operator with parameters, written when the plan was made.
    ``equal_blocks``: whether blocks of one kind were held to one sharding; ``free_step_time``: seconds that this
    configuration would then take if they were not, None where nobody looked. ``bound`` is of free blocks in any case.
    ``objective``: what else than the step time of the whole cluster was sought, and what of it was reached; ``cluster``
    is then the part of the cluster that serves it best, and ``bound``, ``gap`` and ``status`` are those of this part.
    """

    model: str
    fingerprint: str
    cluster: Cluster
    job: Job
    mesh: Mesh
    micro_batch: int
    micro_batches: int
    schedule: str
    zero: int
    candidates: dict[str, Candidate]
    stages: tuple[Stage, ...]
    predicted: Predicted
    bound: float
    gap: float
    status: str
    fixed: dict[str, Any] = field(default_factory=dict)
    searched: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    described: dict[str, tuple[str, ...]] = field(default_factory=dict)
    fsdp: int = 1
    vpp: int = 1
    offload: str = "none"
    pad_heads: int = 1
    objective: ObjectiveValue | None = None
    equal_blocks: bool = True
    free_step_time: float | None = None

    def rank_of(self, stage: int) -> int:
        """The pipeline rank that stage ``stage`` sits on."""
        return SCHEDULES[self.schedule].rank_of(stage, self.mesh.pp)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages of a pipeline rank, in the model's order."""
        return tuple(stage for stage in range(len(self.stages)) if self.rank_of(stage) == rank)

    def gathered_runs(self) -> tuple[Run, ...]:
        """Runs of blocks whose parameters stay gathered through the step though zero 3 frees those of others."""
        runs = (run for stage in self.stages for run in stage.runs if self.candidates[run.candidate].gathered)
        return tuple(runs) if self.zero == 3 else ()

    def candidate_of(self, block: int) -> Candidate:
        """The candidate block ``block`` runs under."""
        for stage in self.stages:
            for run in stage.runs:
                if run.start <= block < run.stop:
                    return self.candidates[run.candidate]
        raise BadInputError(f"plan for {self.model}: no stage holds block {block}")

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values; `from_json` reads it back equal."""
        data: dict[str, Any] = {"version": PLAN_VERSION}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if name in ("cluster", "job"):
                value = value.to_json()
            elif name in ("mesh", "predicted"):
                value = asdict(value)
            elif name == "objective":
                value = value and value.to_json()
            elif name == "candidates":
                value = {key: _candidate_json(candidate) for key, candidate in value.items()}
            elif name == "stages":
                value = [asdict(stage) for stage in value]
            data[name] = value
        return json.loads(json.dumps(data))  # type: ignore[no-any-return]

    @staticmethod
    def from_json(data: dict[str, Any]) -> Plan:
        """Inverse of `to_json`. Raises BadInputError for another version or missing fields."""
        if not isinstance(data, dict) or data.get("version") != PLAN_VERSION:
            found = data.get("version") if isinstance(data, dict) else type(data).__name__
            raise BadInputError(f"not a version-{PLAN_VERSION} plan (found {found!r}): run `autopar search` again")
        try:
            later = {"objective": None, "equal_blocks": True, "free_step_time": None}  # older plans have none of these
            fields = {name: data[name] for name in Plan.__dataclass_fields__ if name not in later}
            fields |= {name: data.get(name, default) for name, default in later.items()}
            told = data.get("objective")
            fields["objective"] = ObjectiveValue.from_json(told) if told else None
            fields["cluster"] = Cluster.from_json(data["cluster"])
            fields["job"] = Job.from_json(data["job"])
            mesh = data["mesh"]  # plans made before the order of its axes was a choice do not tell it
            fields["mesh"] = Mesh(
                **{**mesh, "tp_parts": tuple(mesh["tp_parts"]), "order": tuple(mesh.get("order", AXES))}
            )
            predicted = data["predicted"]
            fields["predicted"] = Predicted(
                **{**predicted, "interval": tuple(predicted["interval"]), "memory": tuple(predicted["memory"])}
            )
            fields["candidates"] = {
                key: Candidate(
                    **{
                        **value,
                        "decision": BlockDecision.from_json(value["decision"]),
                        "saved": tuple(value["saved"]),
                    }
                )
                for key, value in data["candidates"].items()
            }
            fields["stages"] = tuple(
                Stage(**{**stage, "runs": tuple(Run(**run) for run in stage["runs"])}) for stage in data["stages"]
            )
            fields["notes"] = tuple(data["notes"])
            fields["described"] = {key: tuple(lines) for key, lines in data["described"].items()}
            plan = Plan(**fields)
            plan.check_whole()
        except BadInputError as error:
            raise BadInputError(f"the plan is damaged: {error}; search again") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadInputError(f"the plan is damaged: {type(error).__name__} at {error}; search again") from error
        return plan

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, all of it or nothing."""
        write_whole(Path(path), json.dumps(self.to_json(), indent=1) + "\n")

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a saved plan. Raises BadInputError when it is missing or damaged."""
        try:
            data = json.loads(Path(path).read_text())
        except OSError as error:
            raise BadInputError(f"cannot read plan {path}: {error.strerror or error}") from error
        except ValueError as error:
            raise BadInputError(f"plan {path} is not JSON ({error}); it may be cut short: search again") from error
        try:
            return Plan.from_json(data)
        except BadInputError as error:
            raise BadInputError(f"plan {path}: {error}") from error

    def check_whole(self) -> None:
        """Raise BadInputError where the plan contradicts itself (a file edited or damaged)."""
        if self.mesh.size != self.cluster.devices:
            raise BadInputError(f"mesh {self.mesh} has {self.mesh.size} ranks, the cluster {self.cluster.devices}")
        samples = self.mesh.dp * self.micro_batch * self.micro_batches
        if samples != self.job.global_batch:
            raise BadInputError(
                f"dp={self.mesh.dp} x micro_batch={self.micro_batch} x micro_batches={self.micro_batches} is {samples} "
                f"samples, the job's global batch {self.job.global_batch}"
            )
        if self.schedule not in SCHEDULES:
            raise BadInputError(f"no schedule is called {self.schedule!r}; there are {', '.join(SCHEDULES)}")
        if len(self.stages) != self.mesh.pp * self.vpp:
            raise BadInputError(f"{len(self.stages)} stages for pp={self.mesh.pp} with {self.vpp} on each rank")
        if self.mesh.data % self.fsdp:
            raise BadInputError(f"shard groups of {self.fsdp} do not divide the {self.mesh.data} data ranks")
        if self.pad_heads < 1 or self.mesh.tp % self.pad_heads:
            raise BadInputError(
                f"heads padded to a multiple of {self.pad_heads}, which does not divide tp={self.mesh.tp}"
            )
        expected = 0
        for run in (run for stage in self.stages for run in stage.runs):
            if run.start != expected or run.stop <= run.start:
                raise BadInputError(f"blocks {run.start} to {run.stop} where block {expected} should start")
            if run.candidate not in self.candidates:
                raise BadInputError(f"no candidate {run.candidate!r}")
            expected = run.stop

    def check_job(self, job: Job) -> None:
        """Refuse to be used for another job: shapes and memory were decided for this one."""
        if job != self.job:
            names = [name for name in job.to_json() if getattr(job, name) != getattr(self.job, name)]
            told = "; ".join(f"{name} {getattr(self.job, name)}, not {getattr(job, name)}" for name in names)
            raise BadInputError(f"the plan was made for another job ({told}): search again for this one")

    def check_cluster(self, cluster: Cluster) -> None:
        """Refuse to be used on another cluster than the one it was made for (measured figures may differ)."""
        if str(cluster) != str(self.cluster):
            raise BadInputError(
                f"the plan was made for cluster {self.cluster}, not {cluster}: search again for this one"
            )
        mine, given = self.cluster.device.measured, cluster.device.measured
        if (mine and mine.digest) != (given and given.digest):
            told = [f"profile {each.digest} ({each.title})" if each else "no profile" for each in (mine, given)]
            raise BadInputError(
                f"the plan was priced by {told[0]}, the cluster given has {told[1]}: search again with this one, or "
                "name a cluster file with the plan's"
            )
        origins = {cluster.device.origin, self.cluster.device.origin}
        if origins == {"catalog"} and cluster != self.cluster:
            raise BadInputError(
                f"the plan was priced with other figures for {cluster} than given now: search again with these"
            )

    def check_model(self, fingerprint: str, what: str = "this model") -> None:
        """Refuse to be used for a model it was not made for."""
        if fingerprint != self.fingerprint:
            raise BadInputError(
                f"the plan was made for {self.model} ({self.fingerprint}), but {what} has fingerprint {fingerprint}: "
                "another model, shape or version of it; search again for this one"
            )

    def __str__(self) -> str:
        from autopar.report.text import plan_text

        return plan_text(self)


def _candidate_json(candidate: Candidate) -> dict[str, Any]:
    data = {name: getattr(candidate, name) for name in candidate.__dataclass_fields__}
    return {**data, "decision": candidate.decision.to_json()}


def write_whole(path: Path, text: str) -> None:
    """Write a text file by way of a temporary one in the same folder, so that nothing half-written stays.

    Raises BadInputError where none can be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise BadInputError(f"cannot write {path}: {error.strerror}; name another place") from error
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
