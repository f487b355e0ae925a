"""Run a plan in the calling process, from the same source that `autopar.emit` writes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autopar.codegen.emit import write_folder
from autopar.codegen.loading import load_train
from autopar.errors import BadInputError
from autopar.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor, nn

    from autopar.graph.ir import ModelGraph


def parallelize(
    model: nn.Module | str,
    plan: Plan,
    inputs: Mapping[str, Tensor] | None = None,
    loss: Callable[..., Tensor] | None = None,
    graph: ModelGraph | None = None,
    seed: int = 0,
) -> nn.Module:
    """This rank's stage (or stages) of ``model``, wrapped and with values, on every rank that torchrun started.

    Called with the batch's tensors by keyword, a model of one stage returns the loss summed over the batch. Its
    attribute ``training_step`` runs a whole step, pipelined or not: ``module.training_step.forward_backward(batch)``
    takes this data rank's samples of all micro-batches, adds the gradients and returns the global mean loss;
    ``module.training_step.clip_gradients(1.0)`` clips over all ranks. Parameters are DTensors under their original
    names, with the values of ``model``, or drawn from ``seed`` if it is on the meta device or named by a string.

    Raises BadInputError if the plan is for another model or another number of processes.
    """
    from autopar.models import model_graph

    if graph is None:
        graph = model_graph(model, inputs, loss)
    plan.check_model(graph.fingerprint(), graph.name)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != plan.mesh.size:
        raise BadInputError(
            f"the plan needs {plan.mesh.size} processes ({plan.mesh}), but {world} {'was' if world == 1 else 'were'} "
            f"started: run this under torchrun --nproc-per-node {min(plan.mesh.size, plan.cluster.devices_per_node)}"
        )
    with tempfile.TemporaryDirectory(prefix="autopar-") as folder:
        write_folder(plan, graph, Path(folder))
        train = load_train(Path(folder))
    step = train.parallelize(*train.launch.start(train.MESH, train.FSDP, train.DEVICE_TYPE))
    set_values(train, step, model, seed)
    step.stage.training_step = step
    return step.stage  # type: ignore[no-any-return]


def set_values(train: Any, step: Any, model: nn.Module | str, seed: int = 0) -> None:
    """Give the stage of ``step`` the values of ``model``, or values drawn from ``seed`` where it has none."""
    if isinstance(model, str) or any(weight.is_meta for weight in model.parameters()):
        train.parameters.initialise(step.stage, train.module.init_parameter, seed, train.module.TIED)
        return
    train.parameters.copy_weights(step.stage, model.state_dict(), train.module.TIED)
