"""What emitted code is for: the plan's axes, precision and one micro-batch of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from autopar.codegen.positions import is_balanced
from autopar.graph.ir import ModelGraph
from autopar.plan import Plan
from autopar.sharding.layout import CONTEXT


@dataclass(frozen=True, slots=True)
class Setting:
    """What the emitted code is for: sizes of the model axes larger than one, the precision, and one micro-batch.

    ``balanced``: cp holds sequences in balanced order (see `positions`); ``ep``: data ranks that share experts.
    ``seconds(kind, bytes, axis)`` predicts a collective, if it can.
    """

    axes: Mapping[str, int]
    double: bool
    micro_batch: int
    seq_len: int
    compute_bytes: int
    balanced: bool = False
    ep: int = 1
    seconds: Callable[[str, int, str], float | None] = lambda kind, nbytes, axis: None

    @property
    def splits(self) -> tuple[str, ...]:
        """The axes that may split parameters: all but cp."""
        return tuple(axis for axis in self.axes if axis != CONTEXT)


def setting_of(plan: Plan, model: ModelGraph) -> Setting:
    """The setting of ``plan``."""
    axes, strides = plan.mesh.model_axes(), plan.mesh.strides()
    try:
        from autopar.solver.collective_costs import CollectiveCosts

        costs = CollectiveCosts(plan.cluster)
    except (ImportError, AttributeError):  # a hand-made plan without a real cluster
        costs = None

    def seconds(kind: str, nbytes: int, axis: str) -> float | None:
        return costs.seconds(kind, nbytes, axes[axis], strides[axis]) if costs is not None else None

    job = plan.job
    balanced = is_balanced(plan, model)
    return Setting(
        axes, job.dtype == "fp64", plan.micro_batch, job.seq_len, job.compute_bytes, balanced, plan.mesh.ep, seconds
    )
