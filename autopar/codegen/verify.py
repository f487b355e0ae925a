"""Proof by numbers, in one process: the emitted module on all ranks against the user's model on one device.

The stages run one after another under `LocalTensorMode`, each with all its data and model ranks. Data and
context-parallel ranks hold the same parameters and their gradients are added up, as FSDP2 does under torchrun (which
does not run here); all ranks but the data ranks see the same batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from autopar.codegen.buffers import filed
from autopar.codegen.compare import gradient_errors
from autopar.codegen.emit_module import module_source
from autopar.codegen.load import load_module
from autopar.codegen.random_batches import random_batch
from autopar.codegen.ranks import local_ranks, on_rank, per_rank
from autopar.codegen.runtime.buffers import hold
from autopar.codegen.same_numbers import SameNumbers
from autopar.codegen.tokens import looked_for
from autopar.codegen.twin import Twin, small_twin, wide_copy
from autopar.errors import VerificationError
from autopar.graph.batch_norms import by_batch
from autopar.graph.export import LossOf, default_dtype
from autopar.graph.histograms import whole_numbers_counted
from autopar.graph.interpret import keep_wide
from autopar.graph.ir import ModelGraph
from autopar.graph.ops import draws_random
from autopar.graph.skipping import every_layer, every_stretch
from autopar.models import load, model_graph
from autopar.plan import Plan
from autopar.sharding.data_parallel import samples_mixed
from autopar.sharding.layout import P
from autopar.sharding.local import coordinates

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Largest error of the loss and of each gradient that counts as equal."""

_NARROW = frozenset({"aten._grouped_mm"})
"""Operators of which torch has no kernel for float64."""

JOB_DTYPES = {torch.float64: "fp64", torch.float32: "fp32"}


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Errors of the loss and of each parameter's gradient (see `gradient_errors`), and what was run.

    ``ranks``: of each stage; ``twin``: how the model was shrunk, "" if it was not;
    ``dropout_off``: the model has dropout, which the proof turns off.
    """

    model: str
    mesh: str
    ranks: int
    dtype: str
    loss: float
    loss_error: float
    errors: dict[str, float]
    tolerance: float
    twin: str
    dropout_off: bool
    seconds: float

    @property
    def worst(self) -> tuple[str, float]:
        """The parameter with the largest error, and that error."""
        return max(self.errors.items(), key=lambda pair: pair[1])

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "mesh": self.mesh,
            "dtype": self.dtype,
            "loss": self.loss,
            "loss_error": self.loss_error,
            "worst_parameter": self.worst[0],
            "worst_error": self.worst[1],
            "errors": self.errors,
            "tolerance": self.tolerance,
            "twin": self.twin,
            "dropout_off": self.dropout_off,
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        ordered = sorted(self.errors.items(), key=lambda pair: -pair[1])
        width = max(len(name) for name, _ in ordered[:5])
        what = f"its shrunk twin ({self.twin})" if self.twin else "the whole model"
        what += ", dropout off" if self.dropout_off else ""
        lines = [
            f"{self.model}, {self.mesh}: {self.dtype}, {self.ranks} ranks a stage in one process, {what}",
            f"  {'loss':{width}}  {self.loss_error:.1e}",
            *(f"  {name:{width}}  {error:.1e}" for name, error in ordered[:5]),
        ]
        rest = len(ordered) - 5
        if rest > 0:
            lines.append(f"  {rest} more gradients, none above {ordered[4][1]:.1e}")
        lines.append(f"  all within {self.tolerance:.0e} of the single device, {self.seconds:.1f} s")
        return "\n".join(lines)


def verify(
    plan: Plan,
    model: nn.Module | str,
    inputs: Mapping[str, Any] | None = None,
    *,
    loss: Callable[..., Any] | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    graph: ModelGraph | None = None,
) -> VerifyReport:
    """Run the plan's module and the model on the same random batch, and compare the loss and every gradient
    of a parameter that trains.

    ``inputs`` and ``loss`` as in `autopar.search`; ``graph``: the model's, if it has been traced already. A batch of
    the plan's micro-batches is drawn from ``seed``. A model on meta gets random weights. Plans too large for one
    process are verified on a twin (see `small_twin`), those of models with operators that have no float64 in float32.
    Raises VerificationError naming the worst parameter, BadInputError for another model than the plan's.
    """
    begin = time.perf_counter()
    if isinstance(model, str):
        loaded = load(model)
        model, inputs, loss = loaded.model, inputs or loaded.inputs, loss or loaded.loss
    graph = graph or model_graph(model, inputs, loss)
    plan.check_model(graph.fingerprint(), type(model).__name__)
    if any(node.op in _NARROW for kind in graph.kinds.values() for node in kind.graph.of("op")):
        dtype = torch.float32
    # Placeholders have their places in a sequence of the given length.
    placed = not looked_for(graph).keys().isdisjoint(inputs or ())
    twin = small_twin(plan, model, graph, lambda small: model_graph(small, inputs, loss), whole=placed)
    return _verify(twin, inputs, loss, dtype, seed, begin)


def verify_source(
    source: str, plan: Plan, model: nn.Module, graph: ModelGraph, dtype: torch.dtype = torch.float64, seed: int = 0
) -> VerifyReport:
    """`verify` for module text that may have been changed by hand: ``plan`` and ``graph`` are not shrunk.

    Random tokens in float64 keep "float32" tensors in float64 only if ``source`` was written for a job in "fp64".
    """
    begin = time.perf_counter()
    return _compare(source, Twin(plan, model, graph, ""), None, None, dtype, seed, begin)


def _verify(
    twin: Twin, inputs: Mapping[str, Any] | None, loss: Any, dtype: torch.dtype, seed: int, begin: float
) -> VerifyReport:
    plan = replace(twin.plan, job=replace(twin.plan.job, dtype=JOB_DTYPES[dtype]))
    source = module_source(plan, twin.graph)
    return _compare(source, twin, inputs, loss, dtype, seed, begin)


def _compare(
    source: str, twin: Twin, inputs: Mapping[str, Any] | None, loss: Any, dtype: torch.dtype, seed: int, begin: float
) -> VerifyReport:
    plan, graph = twin.plan, twin.graph
    samples = plan.mesh.dp * plan.micro_batch * plan.micro_batches
    dropout = _drops(graph)
    # Random masks cannot be compared: dropout is off on both sides. A model that draws for more trains on both.
    reference = _reference(twin.model, graph, dtype, seed, training=not dropout or _draws(graph))
    batch = random_batch(graph, inputs, samples, plan.job.seq_len, dtype, seed)
    weights = {name: weight.detach() for name, weight in reference.named_parameters()}
    shares = _micro_batches(source, plan, graph, batch)
    with SameNumbers() if _draws(graph) else nullcontext():
        expected_loss, expected = _single_device(reference, graph, loss, shares)
        with default_dtype(dtype):  # as for the model: of powers and quotients of whole numbers
            found_loss, found = run_emitted(source, plan, graph, weights, batch, dtype)
    difference, errors = _differences(found_loss, found, expected_loss, expected)
    if dropout and not reference.training and max(difference, *errors.values()) > TOLERANCE[dtype]:
        # Some compute something else when they are evaluated (scale by what dropout would have kept, choose more
        # experts): train them, with nothing dropped.
        reference = _reference(twin.model, graph, dtype, seed, training=True)
        with SameNumbers():
            expected_loss, expected = _single_device(reference, graph, loss, shares)
        difference, errors = _differences(found_loss, found, expected_loss, expected)
    if not isfinite(expected_loss):
        raise VerificationError(
            f"{graph.name}: on the random batch the loss of the single device is {expected_loss}: there is nothing "
            "to compare; give `inputs` whose values the model can be trained on, or another seed"
        )
    report = VerifyReport(
        model=graph.name,
        mesh=str(plan.mesh),
        ranks=plan.mesh.data * plan.mesh.tp,
        dtype=str(dtype).removeprefix("torch."),
        loss=expected_loss,
        loss_error=difference,
        errors=errors,
        tolerance=TOLERANCE[dtype],
        twin=twin.how,
        dropout_off=dropout,
        seconds=time.perf_counter() - begin,
    )
    name, error = report.worst
    if not difference <= report.tolerance or not error <= report.tolerance:
        raise VerificationError(
            f"{graph.name}, {plan.mesh}: the emitted module differs from the single device: loss by {difference:.1e}, "
            f"gradient of {name} by {error:.1e} (the most of {len(errors)}); allowed {report.tolerance:.0e}"
        )
    return report


def _reference(model: nn.Module, graph: ModelGraph, dtype: torch.dtype, seed: int, training: bool) -> nn.Module:
    """The user's model on one device: a copy that nothing was run on."""
    reference = wide_copy(model, graph, dtype, seed).train(training)
    by_batch(reference)
    every_stretch(reference)
    return reference


def _differences(
    found_loss: float, found: dict[str, Tensor], expected_loss: float, expected: dict[str, Tensor]
) -> tuple[float, dict[str, float]]:
    """Of the loss, relative; of each gradient, infinite where only one side has it."""
    errors = gradient_errors(found, expected) | {name: float("inf") for name in found.keys() - expected.keys()}
    return abs(found_loss - expected_loss) / max(abs(expected_loss), 1e-30), errors


def _drops(graph: ModelGraph) -> bool:
    """Whether the model drops elements at random."""
    return any(draws_random(node) for kind in graph.kinds.values() for node in kind.graph.of("op"))


def _draws(graph: ModelGraph) -> bool:
    """Whether the model draws random numbers for anything but dropout."""
    return any(node.op == "autopar.drawn" for kind in graph.kinds.values() for node in kind.graph.of("op"))


def _micro_batches(
    source: str, plan: Plan, graph: ModelGraph, batch: dict[str, Tensor]
) -> list[tuple[float, dict[str, Tensor]]]:
    """What one device runs at once, and its part of all targets: the whole batch, or, where samples of a micro-batch
    are mixed, each micro-batch of each data rank."""
    if not samples_mixed(graph):
        return [(1.0, dict(batch))]
    parts = plan.mesh.dp * plan.micro_batches
    split = {key: value.chunk(parts) for key, value in batch.items()}
    found = [{key: values[index] for key, values in split.items()} for index in range(parts)]
    count = load_module(source).count_targets
    total = int(count(dict(batch)))
    return [(int(count(dict(part))) / total if total else 1.0, part) for part in found]


def _single_device(
    model: nn.Module, graph: ModelGraph, loss: Any, shares: list[tuple[float, dict[str, Tensor]]]
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the user's model in eager."""
    dtype = next(model.parameters()).dtype
    runner = LossOf(model, loss)
    total = 0.0
    for share, part in shares:
        with keep_wide(dtype), every_layer(), whole_numbers_counted(), _eager():
            value = runner({key: given.clone() for key, given in part.items()}) * share  # it may change them in place
        value.backward()
        total += float(value.detach())
    return total, {
        name: weight.grad if weight.grad is not None else torch.zeros_like(weight)
        for name, weight in model.named_parameters()
        if name in graph.parameters and weight.requires_grad
    }


def _eager() -> AbstractContextManager[None]:
    """Modules that the user compiled run as they are written: in float64, and once."""
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]


def run_emitted(
    source: str,
    plan: Plan,
    graph: ModelGraph,
    weights: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> tuple[float, dict[str, Tensor]]:
    """Mean loss, and per parameter its gradient, all copies there are of it stacked on a new dim 0.

    ``weights``: whole values by full name; ``batch``: the samples of all data ranks and micro-batches.
    """
    module = load_module(source)
    hold(filed(graph))
    mesh = plan.mesh
    first = {name: group[0] for group in graph.tied for name in group}
    values = {first.get(name, name): value for name, value in weights.items()}
    axes = {axis: size for axis, size in mesh.axes().items() if axis != "pp"}
    with local_ranks(axes) as device_mesh:
        stages = [
            module.build_stage(index, device_mesh, torch.device("cpu"), dtype) for index in range(len(plan.stages))
        ]
        for stage in stages:
            stage.train(not _drops(graph))
            for name, parameter in stage.named_parameters():
                _fill(parameter, values[first.get(name, name)], axes, mesh.ep)
        targets = int(module.count_targets(dict(batch)))
        losses = []
        for index in range(plan.micro_batches):
            part = {key: _per_rank(value, plan, index) for key, value in batch.items()}
            flow: tuple[Tensor, ...] = ()
            for stage in stages:
                result = stage(*flow, **part)
                flow = result if isinstance(result, tuple) else (result,)
            loss = flow[0] / max(targets, 1)
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        gradients: dict[str, Tensor] = {}
        for stage in stages:
            for name, parameter in stage.named_parameters():
                if not parameter.requires_grad:
                    continue
                copies = _gradient(parameter, axes, mesh.ep)
                key = first.get(name, name)
                gradients[key] = gradients[key] + copies if key in gradients else copies
    decision = plan.candidate_of(len(graph.blocks) - 1).decision
    leaves = decision.outputs[graph.kinds[graph.blocks[-1].kind].graph.outputs[0]]
    # Data ranks have samples of their own; on the other axes the loss leaves in parts, or whole on every rank.
    summed = ("dp", *(axis for axis in decision.axes if leaves[axis] == P))
    ranks = [r for r, own in enumerate(coordinates(axes)) if all(own[axis] == 0 for axis in axes if axis not in summed)]
    total = sum(float(on_rank(loss, rank)) for loss in losses for rank in ranks)
    return total, gradients


def _per_rank(value: Tensor, plan: Plan, index: int) -> Tensor:
    """Micro-batch ``index`` of every data rank, the same on all its model ranks."""
    shares = value.chunk(plan.mesh.dp)
    parts = [share.chunk(plan.micro_batches)[index] for share in shares]
    return per_rank([part.clone() for part in parts for _ in range(plan.mesh.cp * plan.mesh.tp)])


@torch.no_grad()
def _fill(parameter: nn.Parameter, whole: Tensor, axes: Mapping[str, int], ep: int) -> None:
    local: Any = parameter._local_tensor if isinstance(parameter, DTensor) else parameter.data
    split = _splits(parameter)
    sizes = {**axes, "ep": ep}
    for rank, own in enumerate(coordinates(axes)):
        own["ep"] = (own["dp"] * axes["cp"] + own["cp"]) % ep
        value = whole
        for axis, dim in split.items():
            value = value.chunk(sizes[axis], dim)[own[axis]]
        on_rank(local, rank).copy_(value)


def _gradient(parameter: nn.Parameter, axes: Mapping[str, int], ep: int) -> Tensor:
    """The gradient summed over the data and context ranks that hold the same: whole, stacked for all ranks that have
    one of their own."""
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros(1, *parameter.shape)
    local = gradient._local_tensor if isinstance(gradient, DTensor) else gradient
    data = [size for axis, size in axes.items() if axis in ("dp", "cp")]
    held = {axis: size for axis, size in axes.items() if axis not in ("dp", "cp")}
    ranks, model = range(prod(data)), prod(held.values())
    split = _splits(gradient)
    if "ep" in split:
        held = {"ep": ep, **held}
        groups = [range(e, len(ranks), ep) for e in range(ep)]
    else:
        groups = [ranks]
    parts = [
        torch.stack([on_rank(local, d * model + m) for d in group]).sum(0).unsqueeze(0)
        for group in groups
        for m in range(model)
    ]
    for axis, size in reversed(held.items()):
        # Innermost axis first: neighbours are the ranks that differ on it alone. Copies are stacked on dim 0.
        runs = [parts[place : place + size] for place in range(0, len(parts), size)]
        parts = [torch.cat(run, split[axis] + 1 if axis in split else 0) for run in runs]
    return parts[0]


def _splits(x: Tensor) -> dict[str, int]:
    """The axes that split a parameter (or its gradient), outermost first, and the dims they split."""
    if not isinstance(x, DTensor):
        return {}
    names = x.device_mesh.mesh_dim_names or ()
    return {axis: kind.dim for axis, kind in zip(names, x.placements, strict=True) if isinstance(kind, Shard)}
