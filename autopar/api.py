"""The compile-time calls: search, predict, emit, parallelize, verify. Each is a thin line through the parts below.

A model is a ``torch.nn.Module`` (its parameters may be on the meta device) or a string: a catalog name
(``"llama3-8b"``), the path of a Hugging Face ``config.json``, or ``"module.py:function"``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autopar.cluster import Cluster
from autopar.errors import BadInputError
from autopar.job import Job
from autopar.objective import Objective
from autopar.plan import Plan
from autopar.solver.limits import GAP, Limits, Progress

if TYPE_CHECKING:
    from torch import Tensor, nn

    from autopar.codegen.verify import VerifyReport
    from autopar.graph.ir import ModelGraph

    Model = nn.Module | str
    Inputs = Mapping[str, Tensor] | None
    Loss = Callable[..., Tensor] | None


def search(
    model: Model,
    job: Job,
    cluster: Cluster,
    inputs: Inputs = None,
    loss: Loss = None,
    fix: Mapping[str, Any] | None = None,
    objective: Objective | str | Mapping[str, Any] | None = None,
    gap: float = GAP,
    time_limit: float | None = None,
    work_limit: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    equal_blocks: bool = True,
) -> Plan:
    """The fastest plan that fits for training ``model`` on ``cluster``, or the one that serves ``objective`` best.

    * ``inputs``: example tensors for one sample by the model's keyword, default token ids and labels.
    * ``loss``: ``fn(outputs, batch)``, default the model's own.
    * ``fix``: any part of the plan (``{"tp": 8, "recompute": "full"}``); the rest is searched.
    * ``objective``: an `autopar.Objective`, its kind (``"energy"``) or its fields (``{"kind": "devices", "within_s":
      5.0}``); default the shortest step on the whole cluster. Others may use a part of the cluster: `Plan.cluster`.
    * ``gap``: a plan this close to the bound is close enough. ``time_limit``: seconds after which the best plan so far
      is taken; ``work_limit``: the same in steps of the search, which are equal on every machine. Ctrl-C does the same.
      Whatever ends it, ``plan.bound``, ``plan.gap`` and ``plan.status`` say what is known.
    * ``equal_blocks``: blocks of one kind share one sharding; what memory decides stage by stage (recomputation, and
      what waits on the host) may differ all the same. `Plan.free_step_time` says what that costs; False: they may.
    * ``progress``: called after every step of the search with how far it is (`autopar.solver.limits.Progress`).

    Raises BadInputError, UnsupportedError, or InfeasibleError when nothing fits or reaches what the objective asks for.
    """
    from autopar.graph.padding import as_planned
    from autopar.report.words import describe
    from autopar.solver.fix import parse_fix
    from autopar.solver.objectives import search_parts

    for what, value, kind in (("job", job, Job), ("cluster", cluster, Cluster)):
        if not isinstance(value, kind):
            raise BadInputError(f"{what} must be an autopar.{kind.__name__}, not {value!r}")
    choices, sought = parse_fix(fix).given(), Objective.of(objective)
    limits = Limits(gap, time_limit, work_limit, progress)
    sought.check(cluster)
    begin = time.perf_counter()
    graph = _graph_of(model, inputs, loss)
    traced = time.perf_counter() - begin
    plan = search_parts(graph, job, cluster, sought, choices, limits, equal_blocks=equal_blocks)
    decisions = {name: candidate.decision for name, candidate in plan.candidates.items()}
    return replace(
        plan,
        model=_name_of(model, graph),
        seconds={"trace": traced, **plan.seconds},
        described=describe(as_planned(plan, graph), decisions),
    )


def predict(
    model: Model,
    job: Job,
    cluster: Cluster,
    fix: Mapping[str, Any],
    inputs: Inputs = None,
    loss: Loss = None,
) -> Plan:
    """The plan that ``fix`` describes, priced: a plan given, not searched.

    What ``fix`` leaves open is chosen best (as `search` would); ``plan.fixed`` tells what was given, and the printed
    plan names what was chosen. Raises as `search` does.
    """
    return search(model, job, cluster, inputs=inputs, loss=loss, fix=fix)


def emit(plan: Plan, model: Model, out: str | Path, inputs: Inputs = None, loss: Loss = None) -> None:
    """Write the folder ``out`` that trains the plan under ``torchrun`` with torch alone.

    A module whose parameters hold values gives them to the folder as starting weights; otherwise training starts from
    an initialisation. Raises BadInputError if the plan was made for another model; then nothing is written.
    """
    from autopar.codegen.emit import emit as write

    graph = _checked(plan, model, inputs, loss)
    write(plan, graph, out, _weights_of(model))


def parallelize(model: Model, plan: Plan, inputs: Inputs = None, loss: Loss = None, seed: int = 0) -> nn.Module:
    """Under ``torchrun``: this rank's runnable module, from the same source that `emit` writes.

    Parameters have the values of ``model``, or are drawn from ``seed`` where it holds none. Raises BadInputError for
    another model or another number of processes than the plan's.
    """
    from autopar.codegen.parallelize import parallelize as build

    return build(model, _plan(plan), inputs, loss, seed=seed)


def verify(plan: Plan, model: Model, inputs: Inputs = None, loss: Loss = None) -> VerifyReport:
    """Compare the plan's module with the single device, in this process: loss and every parameter gradient.

    Returns the measured errors; a plan too large for this machine is verified on its shrunk twin, which the report
    tells. Raises VerificationError where an error is too large, BadInputError if the plan was made for another model.
    """
    from autopar.codegen.verify import verify as compare

    if isinstance(model, str):
        _checked(plan, model, inputs, loss)
    return compare(_plan(plan), model, inputs, loss=loss)


def _graph_of(model: Model, inputs: Inputs, loss: Loss) -> ModelGraph:
    from torch import nn

    from autopar.models import model_graph

    if not isinstance(model, nn.Module | str):
        raise BadInputError(f"the model must be a torch.nn.Module or a MODEL string, not a {type(model).__name__}")
    if inputs is not None and not isinstance(inputs, Mapping):
        raise BadInputError(f"inputs must map names to example tensors, not be a {type(inputs).__name__}")
    return model_graph(model, inputs, loss)


def _name_of(model: Model, graph: ModelGraph) -> str:
    return model if isinstance(model, str) else graph.name


def _checked(plan: Plan, model: Model, inputs: Inputs, loss: Loss) -> ModelGraph:
    """The model's graph, which must be the one the plan was made for."""
    graph = _graph_of(model, inputs, loss)
    _plan(plan).check_model(graph.fingerprint(), _name_of(model, graph))
    return graph


def _plan(plan: Plan) -> Plan:
    if not isinstance(plan, Plan):
        raise BadInputError(f"expected a Plan, not {type(plan).__name__}: load one with autopar.Plan.load(path)")
    return plan


def _weights_of(model: Model) -> dict[str, Tensor] | None:
    """The model's parameters and buffers if they hold values, else None."""
    if isinstance(model, str) or any(value.is_meta for value in model.parameters()):
        return None
    return dict(model.state_dict())
