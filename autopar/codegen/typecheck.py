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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode

from autopar.codegen.emit_module import module_source
from autopar.codegen.load import load_module
from autopar.codegen.ranks import fake_mesh
from autopar.errors import BadInputError, VerificationError
from autopar.graph.ir import ModelGraph
from autopar.plan import Plan


def typecheck(plan: Plan, graph: ModelGraph, world_size: int, source: str | None = None) -> None:
    """Check the emitted module's types, forward and backward, on ``world_size`` ranks: the plan's tensor-parallel axis,
    and data ranks for the rest.

    ``source``: module text to check in place of the plan's own. Raises VerificationError with the checker's reason,
    BadInputError for a world size that the plan's axes do not divide.
    """
    import spmd_types
    from spmd_types import checker

    tp = plan.mesh.tp
    if world_size % tp:
        raise BadInputError(f"{world_size} ranks are no multiple of the plan's tensor-parallel axis of {tp}")
    text = source if source is not None else module_source(plan, graph)
    with fake_mesh({"dp": world_size // tp, "tp": tp}) as mesh:
        module: Any = load_module(text)
        axes = {
            name: spmd_types.normalize_axis(mesh[name].get_group()) for name in ("dp", "tp") if mesh[name].size() > 1
        }
        for name, twin in TWINS.items():
            if hasattr(module, name):
                setattr(module, name, twin)
        module.New = lambda axis, device, dtype: TypedNew(axis, dtype, axes)
        # Recomputation repeats the forward; its types are the same.
        module.checkpoint = lambda block, *arguments, use_reentrant: block(*arguments)
        module.selective = lambda block, *arguments, keep: block(*arguments)
        module.offload = lambda run, *arguments, **options: run(*arguments, **options)
        module.vocab_embedding = _vocab_embedding
        module.vocab_cross_entropy = _vocab_cross_entropy
        module.cross_entropy = _cross_entropy
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
        batch[key] = spmd_types.assert_type(value, types)
    flow: tuple[Tensor, ...] = ()
    for index in range(len(plan.stages)):
        with spmd_types.no_typecheck():
            stage = module.build_stage(index, mesh, torch.device("meta"), torch.float32)
            stage.eval()  # dropout does not change a type
        for parameter in stage.parameters():
            spmd_types.assert_type(parameter, parameter.stored_types)
        result = stage(*flow, **batch)
        flow = result if isinstance(result, tuple) else (result,)
    promised = _promised(plan, graph)
    for name, axis in axes.items():
        kind, found = (P if name == "dp" else promised), types_of(flow[0]).get(axis)
        if found is not kind:
            raise spmd_types.SpmdTypeError(f"the loss leaves as {found} on an axis where it must be {kind}")
    flow[0].backward()  # type: ignore[no-untyped-call]


def _promised(plan: Plan, graph: ModelGraph) -> Any:
    import spmd_types

    decision = plan.candidate_of(len(graph.blocks) - 1).decision
    kind = decision.outputs[graph.kinds[graph.blocks[-1].kind].graph.outputs[0]]["tp"].kind
    return getattr(spmd_types, kind)


def types_of(x: Tensor) -> dict[Any, Any]:
    """The type of ``x`` on every axis the checker knows: R, I, P or S(d)."""
    import spmd_types
    from spmd_types import S, V

    spec = spmd_types.get_partition_spec(x)
    dims = {}
    for dim, entry in enumerate(spec or ()):
        for axis in entry if isinstance(entry, tuple) else (entry,):
            if axis is not None:
                dims[axis] = dim
    local = dict(spmd_types.get_local_type(x))
    return {axis: S(dims[axis]) if kind is V and axis in dims else kind for axis, kind in local.items()}


class TypedNew:
    """Stands in for `runtime.weights.New`: plain parameters whose `to_local` has the stored layout as its type."""

    def __init__(self, axis: DeviceMesh | None, dtype: torch.dtype, axes: Mapping[str, Any]) -> None:
        self.axis, self.dtype, self.axes = axis, dtype, axes

    def whole(self, *shape: int) -> nn.Parameter:
        from spmd_types import I

        return self._parameter(shape, I)

    def split(self, dim: int, *shape: int) -> nn.Parameter:
        from spmd_types import S

        assert self.axis is not None
        own = tuple(size // self.axis.size() if place == dim else size for place, size in enumerate(shape))
        return self._parameter(own, S(dim))

    def _parameter(self, shape: tuple[int, ...], kind: Any) -> nn.Parameter:
        from spmd_types import R

        parameter = nn.Parameter(torch.zeros(shape, dtype=self.dtype, device="meta"))
        parameter.stored_types = {  # type: ignore[attr-defined]
            axis: R if name == "dp" else kind for name, axis in self.axes.items()
        }
        parameter.to_local = lambda: parameter  # type: ignore[attr-defined]
        return parameter


def _twin(collective: str, source: str, target: str) -> Callable[..., Tensor]:
    """The `spmd_types` function for one conversion; "S" takes the dim that the call gives."""

    def convert(x: Tensor, axis: DeviceMesh, *dims: int) -> Tensor:
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
    return spmd_types.assert_type(result, dict(types))  # type: ignore[return-value]


def _fail(what: str) -> None:
    import spmd_types

    raise spmd_types.SpmdTypeError(what)


def _embedding_types(ids: Tensor, weight: Tensor, vocabulary_axis: Any = None) -> dict[Any, Any]:
    from spmd_types import P, R, S

    known = types_of(ids)
    result: dict[Any, Any] = {}
    for axis, kind in types_of(weight).items():
        other = known.get(axis, R)
        if axis == vocabulary_axis:
            if kind != S(0) or other is not R:
                _fail(f"vocab_embedding of ids {other} by a table {kind}: it must be R and S(0)")
            result[axis] = P
        elif isinstance(other, type(S(0))):
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


def _vocab_embedding(ids: Tensor, weight: Tensor, axis: DeviceMesh, padding_idx: int | None = None) -> Tensor:
    from autopar.codegen.runtime.operators import vocab_embedding

    types = _embedding_types(ids, weight, _axis(axis))
    return _stated(vocab_embedding, types, ids, weight, axis, padding_idx)


def _axis(axis: DeviceMesh) -> Any:
    from spmd_types import normalize_axis

    return normalize_axis(axis.get_group())


def _loss_types(logits: Tensor, labels: Tensor, vocabulary_axis: Any = None) -> dict[Any, Any]:
    from spmd_types import I, P, R, S

    split, other = type(S(0)), types_of(labels)
    result: dict[Any, Any] = {}
    for axis, kind in types_of(logits).items():
        if axis == vocabulary_axis:
            if kind != S(logits.ndim - 1) or isinstance(other.get(axis, R), split):
                _fail(f"vocab_cross_entropy of logits {kind} and labels {other.get(axis)}")
            result[axis] = I
        elif isinstance(kind, split):
            if kind == S(logits.ndim - 1) or other.get(axis) != kind:
                _fail(f"cross_entropy of logits {kind} and labels {other.get(axis)}: both must be split by target")
            result[axis] = P
        elif kind is P:
            _fail("cross_entropy of partial logits")
        else:
            result[axis] = kind
    return result


def _cross_entropy(logits: Tensor, labels: Tensor, ignore: int = -100) -> Tensor:
    from autopar.codegen.runtime.operators import cross_entropy

    return _stated(cross_entropy, _loss_types(logits, labels), logits, labels, ignore)


def _vocab_cross_entropy(logits: Tensor, labels: Tensor, axis: DeviceMesh, ignore: int = -100) -> Tensor:
    from autopar.codegen.runtime.operators import vocab_cross_entropy

    return _stated(vocab_cross_entropy, _loss_types(logits, labels, _axis(axis)), logits, labels, axis, ignore)


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
    from spmd_types import P, R, S

    split = type(S(0))
    keys, values, result = types_of(key), types_of(value), types_of(query)
    for axis, kind in result.items():
        pair = (keys.get(axis), values.get(axis))
        same = pair == (kind, kind) or (kind == S(1) and pair == (R, R))
        if kind is P or not same or (isinstance(kind, split) and kind not in (S(0), S(1))):
            _fail(f"attention of query {kind}, key {pair[0]} and value {pair[1]}")
    return _stated(F.scaled_dot_product_attention, result, query, key, value, *rest, **options)


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
        split = [kind.dim for kind in types_of(x).values() if hasattr(kind, "dim")]
        return any(start < dim <= end for dim in split)

    def _merge(self, x: Tensor, start: int, end: int) -> Tensor:
        from spmd_types import S

        types = types_of(x)
        for axis, kind in types.items():
            if hasattr(kind, "dim") and kind.dim > start:
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
                if hasattr(kind, "dim") and kind.dim >= dim:
                    types[axis] = S(kind.dim + added)
            return _stated(func, types, x, *arguments)
        with spmd_types.no_typecheck():
            parts = func(x, *arguments)
        return tuple(spmd_types.assert_type(part, types) for part in parts)


__all__ = ["TWINS", "TypedNew", "typecheck", "types_of"]
