"""Proof by types: the emitted module under `spmd_types.typecheck`, in its global mode, on a fake process group.

The module's text runs as it is, with other things behind its names: `runtime.collectives` is swapped for the functions
of `spmd_types` that claim the same types (`TWINS`), parameters and batch carry the types of the plan, and the few
operators whose global meaning the checker does not know state their types themselves (`typed_operators`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from autopar.codegen.buffers import filed
from autopar.codegen.emit_module import module_source
from autopar.codegen.load import load_module
from autopar.codegen.ranks import fake_mesh
from autopar.codegen.tensor_types import types_of, with_types
from autopar.codegen.typed_operators import OPERATORS, Boundaries
from autopar.errors import BadInputError, VerificationError
from autopar.graph.ir import ModelGraph
from autopar.plan import Plan


def typecheck(plan: Plan, graph: ModelGraph, world_size: int, source: str | None = None) -> None:
    """Check the emitted module's types, forward and backward, on ``world_size`` ranks: the plan's model axes, and data
    ranks for the rest.

    ``source``: module text to check in place of the plan's own. Raises VerificationError with the checker's reason,
    BadInputError for a world size that the plan's axes do not divide.
    """
    import spmd_types
    from spmd_types import checker

    model = plan.mesh.model_axes()
    ranks = prod(model.values())
    if world_size % ranks:
        raise BadInputError(f"{world_size} ranks are no multiple of the plan's model axes of {ranks} ranks together")
    text = source if source is not None else module_source(plan, graph)
    with fake_mesh({"dp": world_size // ranks, **model}) as mesh:
        module: Any = load_module(text)
        axes = {
            name: spmd_types.normalize_axis(mesh[name].get_group()) for name in ("dp", *model) if mesh[name].size() > 1
        }
        for name, twin in (TWINS | OPERATORS).items():
            if hasattr(module, name):
                setattr(module, name, twin)
        module.New = lambda mesh, splits, device, dtype, ep=1: TypedNew(mesh, splits, dtype, axes)
        buffers = filed(graph)
        module.held = lambda name, device, dtype: torch.zeros(buffers[name].shape, dtype=dtype, device=device)
        # Recomputation repeats the forward; its types are the same.
        module.checkpoint = lambda block, *arguments, use_reentrant: block(*arguments)
        module.selective = lambda block, *arguments, keep: block(*arguments)
        module.offload = lambda run, *arguments, **options: run(*arguments, **options)
        try:
            # The current mesh gives constants made on the fly (positions, zeros) a type on every axis.
            with warnings.catch_warnings(), spmd_types.set_current_mesh(mesh):
                warnings.simplefilter("ignore", FutureWarning)  # spmd_types calls functions that torch 2.13 renamed
                with checker.typecheck(local=False), Boundaries():
                    _run(module, plan, graph, mesh, axes)
        except (spmd_types.SpmdTypeError, ValueError, RuntimeError) as error:
            raise VerificationError(
                f"{graph.name}, {plan.mesh}, {world_size} ranks: the emitted module does not type-check: {error}"
            ) from error


def _run(module: Any, plan: Plan, graph: ModelGraph, mesh: DeviceMesh, axes: Mapping[str, Any]) -> None:
    import spmd_types
    from spmd_types import P, R, S

    batch = {}
    for key, meta in graph.batch.items():
        shape = meta.at(plan.micro_batch, plan.job.seq_len)
        with spmd_types.no_typecheck():
            value = torch.zeros(shape, dtype=torch.int64 if meta.dtype.startswith("int") else None, device="meta")
        types = {axes[name]: S(0) if name == "dp" else R for name in axes}
        batch[key] = with_types(value, types)
    flow: tuple[Tensor, ...] = ()
    for index in range(len(plan.stages)):
        with spmd_types.no_typecheck():
            stage = module.build_stage(index, mesh, torch.device("meta"), torch.float32)
            stage.eval()  # dropout does not change a type
        for parameter in stage.parameters():
            with_types(parameter, parameter.stored_types)
        result = stage(*flow, **batch)
        flow = result if isinstance(result, tuple) else (result,)
    decision = plan.candidate_of(len(graph.blocks) - 1).decision
    leaves = decision.outputs[graph.kinds[graph.blocks[-1].kind].graph.outputs[0]]
    for name, axis in axes.items():
        kind = P if name == "dp" else getattr(spmd_types, leaves[name].kind)
        found = types_of(flow[0]).get(axis)
        if found is not kind:
            raise spmd_types.SpmdTypeError(f"the loss leaves as {found} on {name}, where it must be {kind}")
    flow[0].backward()  # type: ignore[no-untyped-call]


class TypedNew:
    """Stands in for `runtime.weights.New`: plain parameters whose `to_local` has the stored layout as its type."""

    def __init__(self, mesh: DeviceMesh, splits: tuple[str, ...], dtype: torch.dtype, axes: Mapping[str, Any]) -> None:
        self.mesh, self.splits, self.dtype, self.axes = mesh, splits, dtype, axes

    def axis(self, name: str) -> DeviceMesh | None:
        return self.mesh[name] if name != "ep" else None  # what goes on among data ranks inside experts has no type

    def whole(self, *shape: int, trains: bool = True) -> nn.Parameter:
        return self.split(*shape, trains=trains)

    def split(self, *shape: int, trains: bool = True, **dims: int) -> nn.Parameter:
        from spmd_types import I, R, S

        local = list(shape)
        dims.pop("ep", None)
        for name, dim in dims.items():
            local[dim] = -(-local[dim] // self.mesh[name].size())
        parameter = nn.Parameter(torch.zeros(local, dtype=self.dtype, device="meta"), requires_grad=trains)
        parameter.stored_types = {  # type: ignore[attr-defined]
            axis: S(dims[name]) if name in dims else I if name in self.splits else R for name, axis in self.axes.items()
        }
        parameter.to_local = lambda: parameter  # type: ignore[attr-defined]
        return parameter


def _twin(collective: str, source: str, target: str) -> Callable[..., Tensor]:
    """The `spmd_types` function for one conversion; "S" takes the dim that the call gives.

    In balanced order the elements of a sequence are for the checker the same ones, renumbered. What is sent must be in
    one piece, forward and backward, as ours makes it.
    """

    def convert(x: Tensor, axis: DeviceMesh, *dims: int, balanced: bool | int | None = None) -> Tensor:
        import spmd_types

        def kind(name: str) -> Any:
            return spmd_types.S(dims[0]) if name == "S" else getattr(spmd_types, name)

        function, x = getattr(spmd_types, collective), x.contiguous()
        options: dict[str, Any] = {"backward_options": {"op_dtype": x.dtype}} if x.requires_grad else {}
        if collective == "convert" and target == "P":
            options["expert_mode"] = True
        if collective == "all_to_all":
            result = function(x, axis.get_group(), src=spmd_types.S(dims[0]), dst=spmd_types.S(dims[1]), **options)
        else:
            result = function(x, axis.get_group(), src=kind(source), dst=kind(target), **options)
        if result.requires_grad:
            with spmd_types.no_typecheck():
                result.register_hook(Tensor.contiguous)
        return result  # type: ignore[no-any-return]

    return convert


TWINS: dict[str, Callable[..., Tensor]] = {
    "all_gather": _twin("all_gather", "S", "R"),
    "all_gather_invariant": _twin("all_gather", "S", "I"),
    "all_reduce": _twin("all_reduce", "P", "R"),
    "all_reduce_invariant": _twin("all_reduce", "P", "I"),
    "reduce_scatter": _twin("reduce_scatter", "P", "S"),
    "replicate": _twin("convert", "I", "R"),
    "shard": _twin("convert", "R", "S"),
    "shard_invariant": _twin("convert", "I", "S"),
    "all_to_all": _twin("all_to_all", "S", "S"),
    "zero_pad": _twin("convert", "S", "P"),
    "keep_first": _twin("convert", "R", "P"),
    "keep_first_invariant": _twin("convert", "I", "P"),
}
"""For each function of `runtime.collectives`, the `spmd_types` function with the same types."""


__all__ = ["TWINS", "TypedNew", "typecheck"]
