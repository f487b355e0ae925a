"""Proof by types: the emitted module under `spmd_types.typecheck`, in its global mode, on a fake process group.

The module's text runs as it is, with other things behind its names: `runtime.collectives` is swapped for the functions
of `spmd_types` that claim the same types (`TWINS`), parameters and batch carry the types of the plan, and the few
operators whose global meaning the checker does not know (`_Boundaries`) state their types themselves.

A dim split in blocks (a fused q/k/v projection split by heads) is for the checker a plain split of the same dim with
its elements in another order: `_Boundaries` follows such tensors from where the order changes to where it changes back.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode

from autopar.codegen.emit_module import module_source
from autopar.codegen.load import load_module
from autopar.codegen.ranks import fake_mesh
from autopar.codegen.runtime.operators import (
    Axes,
    context_attention,
    cross_entropy,
    vocab_cross_entropy,
    vocab_embedding,
)
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
        for name, twin in TWINS.items():
            if hasattr(module, name):
                setattr(module, name, twin)
        module.New = lambda mesh, splits, device, dtype: TypedNew(mesh, splits, dtype, axes)
        # Recomputation repeats the forward; its types are the same.
        module.checkpoint = lambda block, *arguments, use_reentrant: block(*arguments)
        module.selective = lambda block, *arguments, keep: block(*arguments)
        module.offload = lambda run, *arguments, **options: run(*arguments, **options)
        module.vocab_embedding = _vocab_embedding
        module.vocab_cross_entropy = _vocab_cross_entropy
        module.cross_entropy = _cross_entropy
        module.context_attention = _context_attention
        try:
            # The current mesh gives constants made on the fly (positions, zeros) a type on every axis.
            with warnings.catch_warnings(), spmd_types.set_current_mesh(mesh):
                warnings.simplefilter("ignore", FutureWarning)  # spmd_types calls functions that torch 2.13 renamed
                with checker.typecheck(local=False), _Boundaries():
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


def types_of(x: Tensor) -> dict[Any, Any]:
    """The type of ``x`` on every axis the checker knows: R, I, P or S(d); axes that split one dim outermost first."""
    import spmd_types
    from spmd_types import S, V

    dims = {}
    for dim, entry in enumerate(spmd_types.get_partition_spec(x) or ()):
        for axis in entry if isinstance(entry, tuple) else (entry,):
            if axis is not None:
                dims[axis] = dim
    local = dict(spmd_types.get_local_type(x))
    return {axis: S(dims[axis]) if local[axis] is V and axis in dims else local[axis] for axis in [*dims, *local]}


def with_types(x: Tensor, types: Mapping[Any, Any]) -> Tensor:
    """``x``, stated to have ``types``; axes that split one dim in the order they are listed."""
    import spmd_types
    from spmd_types import PartitionSpec, V

    split: list[list[Any]] = [[] for _ in range(x.ndim)]
    for axis, kind in types.items():
        if _is_split(kind):
            split[kind.dim].append(axis)
    local = {axis: V if _is_split(kind) else kind for axis, kind in types.items()}
    entries = [tuple(axes) if len(axes) > 1 else axes[0] if axes else None for axes in split]
    spmd_types.assert_type(x, local, partition_spec=PartitionSpec(*entries) if any(split) else None)
    return x


def _is_split(kind: Any) -> bool:
    return hasattr(kind, "dim")


class TypedNew:
    """Stands in for `runtime.weights.New`: plain parameters whose `to_local` has the stored layout as its type."""

    def __init__(self, mesh: DeviceMesh, splits: tuple[str, ...], dtype: torch.dtype, axes: Mapping[str, Any]) -> None:
        self.mesh, self.splits, self.dtype, self.axes = mesh, splits, dtype, axes

    def axis(self, name: str) -> DeviceMesh:
        return self.mesh[name]

    def whole(self, *shape: int, trains: bool = True) -> nn.Parameter:
        return self.split(*shape, trains=trains)

    def split(self, *shape: int, trains: bool = True, **dims: int) -> nn.Parameter:
        from spmd_types import I, R, S

        local = list(shape)
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

    In balanced order the elements of a sequence are for the checker the same ones, renumbered.
    """

    def convert(x: Tensor, axis: DeviceMesh, *dims: int, balanced: bool | int | None = None) -> Tensor:
        import spmd_types

        def kind(name: str) -> Any:
            return spmd_types.S(dims[0]) if name == "S" else getattr(spmd_types, name)

        function = getattr(spmd_types, collective)
        options: dict[str, Any] = {"backward_options": {"op_dtype": x.dtype}} if x.requires_grad else {}
        if collective == "convert" and target == "P":
            options["expert_mode"] = True
        if collective == "all_to_all":
            return function(x, axis.get_group(), src=spmd_types.S(dims[0]), dst=spmd_types.S(dims[1]), **options)  # type: ignore[no-any-return]
        return function(x, axis.get_group(), src=kind(source), dst=kind(target), **options)  # type: ignore[no-any-return]

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


def _stated(function: Callable[..., Tensor], types: Mapping[Any, Any], *arguments: Any, **options: Any) -> Tensor:
    """Run ``function`` under the checker's local mode and state the type of what it returns."""
    import spmd_types

    with spmd_types.no_typecheck():
        result = function(*arguments, **options)
    return with_types(result, types)


def _fail(what: str) -> None:
    import spmd_types

    raise spmd_types.SpmdTypeError(what)


def _embedding_types(ids: Tensor, weight: Tensor, vocabulary_axes: tuple[Any, ...] = ()) -> dict[Any, Any]:
    from spmd_types import P, R, S

    known, table = types_of(ids), types_of(weight)
    result: dict[Any, Any] = {}
    for axis in [*known, *(axis for axis in table if axis not in known)]:
        kind, other = table.get(axis, R), known.get(axis, R)
        if axis in vocabulary_axes:
            if kind != S(0) or other is not R:
                _fail(f"vocab_embedding of ids {other} by a table {kind}: it must be R and S(0)")
            result[axis] = P
        elif _is_split(other):
            if kind is not R:
                _fail(f"embedding of split ids ({other}) by a table {kind}: it must be R")
            result[axis] = other
        elif kind == S(1):
            result[axis] = S(ids.ndim)
        elif kind == S(0):
            _fail("embedding by a table split by rows: use vocab_embedding")
        else:
            result[axis] = kind
    return result


def _embedding(ids: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    return _stated(F.embedding, _embedding_types(ids, weight), ids, weight, padding_idx)


def _vocab_embedding(
    ids: Tensor, weight: Tensor, axis: Axes, padding_idx: int | None = None, vocabulary: int | None = None
) -> Tensor:
    types = _embedding_types(ids, weight, _axes(axis))
    return _stated(vocab_embedding, types, ids, weight, axis, padding_idx, vocabulary)


def _axes(axis: Axes) -> tuple[Any, ...]:
    from spmd_types import normalize_axis

    return tuple(normalize_axis(each.get_group()) for each in (axis if isinstance(axis, tuple) else (axis,)))


def _loss_types(logits: Tensor, labels: Tensor, vocabulary_axes: tuple[Any, ...] = ()) -> dict[Any, Any]:
    from spmd_types import I, P, R, S

    other, classes = types_of(labels), S(logits.ndim - 1)
    result: dict[Any, Any] = {}
    for axis, kind in types_of(logits).items():
        if axis in vocabulary_axes:
            if kind != classes or _is_split(other.get(axis, R)):
                _fail(f"vocab_cross_entropy of logits {kind} and labels {other.get(axis)}")
            result[axis] = I
        elif _is_split(kind):
            if kind == classes or other.get(axis) != kind:
                _fail(f"cross_entropy of logits {kind} and labels {other.get(axis)}: both must be split by target")
            result[axis] = P
        elif kind is P:
            _fail("cross_entropy of partial logits")
        else:
            result[axis] = kind
    return result


def _cross_entropy(logits: Tensor, labels: Tensor, ignore: int = -100) -> Tensor:
    return _stated(cross_entropy, _loss_types(logits, labels), logits, labels, ignore)


def _vocab_cross_entropy(
    logits: Tensor, labels: Tensor, axis: Axes, ignore: int = -100, vocabulary: int | None = None
) -> Tensor:
    types = _loss_types(logits, labels, _axes(axis))
    return _stated(vocab_cross_entropy, types, logits, labels, axis, ignore, vocabulary)


def _attention_types(
    query: Tensor, key: Tensor, value: Tensor, by_position: tuple[Any, ...] | None, mask: Tensor | None = None
) -> dict[Any, Any]:
    """``by_position``: the axes on which queries may be split by position; None: all."""
    from spmd_types import P, R, S

    keys, values, result = types_of(key), types_of(value), types_of(query)
    masks = types_of(mask) if mask is not None else {}
    for axis, kind in result.items():
        pair = (keys.get(axis), values.get(axis))
        if kind == S(query.ndim - 2):
            allowed = (by_position is None or axis in by_position) and pair == (R, R)
            allowed &= mask is None or masks.get(axis) == S(mask.ndim - 2)
        elif by_position and axis in by_position:
            allowed = False
        else:
            whole = pair == (kind, kind) or (kind == S(1) and pair == (R, R))
            allowed = kind is not P and whole and (not _is_split(kind) or kind in (S(0), S(1)))
        if not allowed:
            _fail(f"attention of query {kind}, key {pair[0]} and value {pair[1]}")
    return result


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
    mask = rest[0] if rest else options.get("attn_mask")
    types = _attention_types(query, key, value, () if options.get("is_causal") else None, mask)
    return _stated(F.scaled_dot_product_attention, types, query, key, value, *rest, **options)


def _context_attention(
    query: Tensor, key: Tensor, value: Tensor, axis: Axes, balanced: bool = False, **options: Any
) -> Tensor:
    types = _attention_types(query, key, value, _axes(axis))
    return _stated(context_attention, types, query, key, value, axis, balanced, **options)


def _blocked_dim(x: Tensor) -> int:
    """The dim of ``x`` whose elements are, for the checker, in another order; -1 if there is none."""
    return getattr(x, "blocked_dim", -1)


class _Boundaries(TorchFunctionMode):
    """Operators that state their own types, and dims that are split in blocks."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        import spmd_types

        kwargs = kwargs or {}
        if not spmd_types.is_type_checking():
            return func(*args, **kwargs)
        if func is F.embedding:
            return _embedding(*args)
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is Tensor.flatten and self._is_inner_split(*args):
            return self._merge(*args)
        place = {Tensor.unflatten: 1, Tensor.chunk: 2}.get(func)
        if place is not None and len(args) > place and _blocked_dim(args[0]) == args[place]:
            return self._separate(func, *args)
        if func is F.linear and len(args) == 3:
            # A partial bias is added to the partial product, which the checker takes in two steps only.
            result = F.linear(*args[:2]) + args[2]
        else:
            result = func(*args, **kwargs)
        if func is F.linear and _blocked_dim(args[1]) == 0:
            result.blocked_dim = result.ndim - 1
        return result

    def _is_inner_split(self, x: Tensor, start: int, end: int) -> bool:
        """Whether a dim that `flatten` merges is split, but is not the outermost of them."""
        split = [kind.dim for kind in types_of(x).values() if _is_split(kind)]
        return any(start < dim <= end for dim in split)

    def _merge(self, x: Tensor, start: int, end: int) -> Tensor:
        from spmd_types import S

        types = types_of(x)
        for axis, kind in types.items():
            if _is_split(kind) and kind.dim > start:
                types[axis] = S(max(start, kind.dim - (end - start)))
        result = _stated(Tensor.flatten, types, x, start, end)
        result.blocked_dim = start  # type: ignore[attr-defined]
        return result

    def _separate(self, func: Callable[..., Any], x: Tensor, *arguments: Any) -> Any:
        """Undo `_merge`: the parts of the dim, each split, as a dim of their own or as a list."""
        import spmd_types
        from spmd_types import S

        types, dim = types_of(x), _blocked_dim(x)
        if func is Tensor.unflatten:
            added = len(arguments[1]) - 1
            for axis, kind in types.items():
                if _is_split(kind) and kind.dim >= dim:
                    types[axis] = S(kind.dim + added)
            return _stated(func, types, x, *arguments)
        with spmd_types.no_typecheck():
            parts = func(x, *arguments)
        return tuple(with_types(part, types) for part in parts)


__all__ = ["TWINS", "TypedNew", "typecheck", "types_of"]
