"""Runs one case: the emitted module on all ranks against the drawn model on one device, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import hypot, isfinite
from threading import local
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from autopar.codegen.compare import gradient_errors
from autopar.codegen.emit_module import module_source
from autopar.codegen.load import load_module
from autopar.codegen.random_batches import random_batch
from autopar.codegen.verify import TOLERANCE
from autopar.graph.export import LossOf
from autopar.graph.interpret import keep_wide
from autopar.graph.ir import ModelGraph
from autopar.plan import Plan
from autopar.sharding.layout import P
from autopar.sharding.local import coordinates
from fuzz.world import ranks_of

LIMIT = TOLERANCE[torch.float64]
SEED = 0


@dataclass(frozen=True)
class Result:
    """Errors of the loss and of the worst gradient."""

    loss: float
    gradient: float
    worst: str

    @property
    def holds(self) -> bool:
        return self.loss <= LIMIT and self.gradient <= LIMIT


class UnsoundError(Exception):
    """The model itself has no gradients to compare with: they are not finite, or nothing but rounding."""


def run(plan: Plan, model: nn.Module, inputs: Mapping[str, Tensor], graph: ModelGraph) -> Result:
    """Emit the plan's module, run it on all its ranks, and compare."""
    samples = plan.mesh.dp * plan.micro_batch * plan.micro_batches
    batch = random_batch(graph, inputs, samples, plan.job.seq_len, torch.float64, SEED)
    expected_loss, expected = _one_device(model, graph, batch)
    size = hypot(*(float(gradient.norm()) for gradient in expected.values()))
    if not isfinite(expected_loss) or not isfinite(size) or size < 1e-6 * abs(expected_loss):
        raise UnsoundError
    found_loss, found = _all_ranks(module_source(plan, graph), plan, model, graph, batch)
    errors = gradient_errors(found, expected) | {name: float("inf") for name in found.keys() - expected.keys()}
    worst = max(errors, key=lambda name: errors[name])
    difference = abs(found_loss - expected_loss) / max(abs(expected_loss), 1e-3)
    return Result(difference, errors[worst], worst)


def _one_device(model: nn.Module, graph: ModelGraph, batch: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    with keep_wide():
        loss = LossOf(model, None)(dict(batch))
    loss.backward()
    return float(loss.detach()), {
        name: weight.grad if weight.grad is not None else torch.zeros_like(weight)
        for name, weight in model.named_parameters()
        if name in graph.parameters and weight.requires_grad
    }


class LocalNew:
    """Stands in for `runtime.weights.New`: parameters that are what one rank holds of ``weights``, with their splits.

    DTensors, which hold them elsewhere, cost more to make than a case takes to run.
    """

    def __init__(self, mesh: DeviceMesh, own: Mapping[str, int], splits: tuple[str, ...]) -> None:
        self.mesh, self.own, self.splits = mesh, own, splits

    def axis(self, name: str) -> DeviceMesh:
        return _axis(self.mesh, name)

    def whole(self, *shape: int, trains: bool = True) -> nn.Parameter:
        return self.split(*shape, trains=trains)

    def split(self, *shape: int, trains: bool = True, **dims: int) -> nn.Parameter:
        local = torch.zeros(shape, dtype=torch.float64)
        split = {axis: dims[axis] for axis in self.splits if axis in dims}
        parameter: Any = nn.Parameter(self.part(local, split), trains)
        parameter.split, parameter.to_local = split, lambda: parameter
        return parameter

    def part(self, whole: Tensor, split: Mapping[str, int]) -> Tensor:
        """What this rank holds of a tensor that axes, outermost first, split on dims."""
        for axis, dim in split.items():
            whole = whole.chunk(self.axis(axis).size(), dim)[self.own[axis]]
        return whole.clone()


@cache
def _axis(mesh: DeviceMesh, name: str) -> DeviceMesh:
    return mesh[name]


def _all_ranks(
    source: str, plan: Plan, model: nn.Module, graph: ModelGraph, batch: Mapping[str, Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the emitted module; copies of a gradient that ranks have are stacked on a new dim 0."""
    module: Any = load_module(source)
    mesh, axes = plan.mesh, {axis: size for axis, size in plan.mesh.axes().items() if axis != "pp"}
    first = {name: group[0] for group in graph.tied for name in group}
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    places = coordinates(axes)
    targets = max(int(module.count_targets(dict(batch))), 1)
    made = local()
    module.New = lambda *_: made.new

    def work(rank: int, device_mesh: DeviceMesh) -> tuple[float, dict[str, tuple[Tensor, dict[str, int]]]]:
        own = places[rank]
        new = made.new = LocalNew(device_mesh, own, tuple(mesh.tp_axes()))
        stages = [module.build_stage(i, device_mesh, torch.device("cpu"), torch.float64) for i in range(mesh.pp)]
        for stage in stages:
            for name, parameter in stage.named_parameters():
                parameter.detach().copy_(new.part(weights[first.get(name, name)], parameter.split))
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
                    key = first.get(name, name)
                    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    before = gradients[key][0] if key in gradients else 0.0
                    gradients[key] = (gradient.detach() + before, parameter.split)
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
    parts = [result[name][0].unsqueeze(0) for result in results]
    split = results[0][name][1]
    for axis, size in reversed(axes.items()):
        # Innermost axis first: neighbours are the ranks that differ on it alone.
        runs = [parts[place : place + size] for place in range(0, len(parts), size)]
        if axis in ("dp", "cp"):
            parts = [torch.stack(run).sum(0) for run in runs]
        else:
            parts = [torch.cat(run, split[axis] + 1 if axis in split else 0) for run in runs]
    return parts[0]
