"""Runs one case: the emitted module on all ranks against the drawn model on one device, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from autopar.codegen.compare import gradient_errors
from autopar.codegen.emit_module import module_source
from autopar.codegen.load import load_module
from autopar.codegen.verify import TOLERANCE, random_batch
from autopar.graph.export import LossOf
from autopar.graph.interpret import keep_wide
from autopar.graph.ir import ModelGraph
from autopar.plan import Plan
from autopar.sharding.layout import P
from autopar.sharding.local import coordinates
from fuzz.world import ranks_of

LIMIT = TOLERANCE[torch.float64]
SEED = 0
DEBUG = False


@dataclass(frozen=True)
class Result:
    """Errors of the loss and of the worst gradient."""

    loss: float
    gradient: float
    worst: str

    @property
    def holds(self) -> bool:
        return self.loss <= LIMIT and self.gradient <= LIMIT


class Unsound(Exception):
    """The model itself has no finite loss and gradients to compare with."""


def run(plan: Plan, model: nn.Module, inputs: Mapping[str, Tensor], graph: ModelGraph) -> Result:
    """Emit the plan's module, run it on all its ranks, and compare."""
    samples = plan.mesh.dp * plan.micro_batch * plan.micro_batches
    batch = random_batch(graph, inputs, samples, plan.job.seq_len, torch.float64, SEED)
    expected_loss, expected = _one_device(model, graph, batch)
    if not isfinite(expected_loss) or not all(bool(g.isfinite().all()) for g in expected.values()):
        raise Unsound
    found_loss, found = _all_ranks(module_source(plan, graph), plan, model, graph, batch)
    errors = gradient_errors(found, expected) | {name: float("inf") for name in found.keys() - expected.keys()}
    if DEBUG: print({k: f"{v:.1e}" for k, v in errors.items()})
    worst = max(errors, key=lambda name: errors[name])
    difference = abs(found_loss - expected_loss) / max(abs(expected_loss), 1e-3)
    return Result(difference, errors[worst], worst)


def _one_device(
    model: nn.Module, graph: ModelGraph, batch: Mapping[str, Tensor]
) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    with keep_wide():
        loss = LossOf(model, None)(dict(batch))
    loss.backward()
    return float(loss.detach()), {
        name: weight.grad if weight.grad is not None else torch.zeros_like(weight)
        for name, weight in model.named_parameters()
        if name in graph.parameters and weight.requires_grad
    }


def _all_ranks(
    source: str, plan: Plan, model: nn.Module, graph: ModelGraph, batch: Mapping[str, Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the emitted module; copies of a gradient that ranks have are stacked on a new dim 0."""
    module = load_module(source)
    mesh, axes = plan.mesh, {axis: size for axis, size in plan.mesh.axes().items() if axis != "pp"}
    first = {name: group[0] for group in graph.tied for name in group}
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    places = coordinates(axes)
    targets = max(int(module.count_targets(dict(batch))), 1)

    def work(rank: int, device_mesh: DeviceMesh) -> tuple[float, dict[str, tuple[Tensor, dict[str, int]]]]:
        own = places[rank]
        stages = [module.build_stage(i, device_mesh, torch.device("cpu"), torch.float64) for i in range(mesh.pp)]
        for stage in stages:
            for name, parameter in stage.named_parameters():
                whole = weights[first.get(name, name)]
                for axis, dim in _splits(parameter).items():
                    whole = whole.chunk(axes[axis], dim)[own[axis]]
                _local(parameter).detach().copy_(whole)
        total = 0.0
        for index in range(plan.micro_batches):
            part = {
                key: value.chunk(mesh.dp)[own["dp"]].chunk(plan.micro_batches)[index].clone()
                for key, value in batch.items()
            }
            flow: tuple[Any, ...] = ()
            for stage in stages:
                result = stage(*flow, **part)
                flow = result if isinstance(result, tuple) else (result,)
            loss = flow[0] / targets
            loss.backward()
            total += float(loss.detach())
        gradients: dict[str, tuple[Tensor, dict[str, int]]] = {}
        for stage in stages:
            for name, parameter in stage.named_parameters():
                if parameter.requires_grad:
                    key, gradient = first.get(name, name), parameter.grad
                    local = torch.zeros_like(_local(parameter)) if gradient is None else _local(gradient)
                    before = gradients[key][0] if key in gradients else 0.0
                    gradients[key] = (local + before, _splits(parameter))
        return total, gradients

    results = ranks_of(tuple(axes.items())).run(work)
    decision = plan.candidate_of(len(graph.blocks) - 1).decision
    leaves = decision.outputs[graph.kinds[graph.blocks[-1].kind].graph.outputs[0]]
    summed = ("dp", *(axis for axis in decision.axes if leaves[axis] == P))
    loss = sum(
        total
        for place, (total, _) in zip(places, results, strict=True)
        if all(place[axis] == 0 for axis in axes if axis not in summed)
    )
    return loss, {name: _joined(name, [found for _, found in results], axes) for name in results[0][1]}


def _joined(name: str, results: list[dict[str, tuple[Tensor, dict[str, int]]]], axes: Mapping[str, int]) -> Tensor:
    """The gradient summed over the data ranks and put together from its parts; copies stacked on dim 0."""
    parts = [result[name][0].detach().unsqueeze(0) for result in results]
    split = results[0][name][1]
    for axis, size in reversed(axes.items()):
        # Innermost axis first: neighbours are the ranks that differ on it alone.
        inner = 1
        runs = [parts[place : place + size] for place in range(0, len(parts), size * inner)]
        if axis in ("dp", "cp"):
            parts = [torch.stack(run).sum(0) for run in runs]
        else:
            parts = [torch.cat(run, split[axis] + 1 if axis in split else 0) for run in runs]
    return parts[0]


def _local(x: Any) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x.detach() if isinstance(x, nn.Parameter) else x


def _splits(x: Any) -> dict[str, int]:
    """The axes that split a parameter, outermost first, and the dims they split."""
    if not isinstance(x, DTensor):
        return {}
    names = x.device_mesh.mesh_dim_names or ()
    return {axis: kind.dim for axis, kind in zip(names, x.placements, strict=True) if isinstance(kind, Shard)}
