"""The types that `spmd_types` has noted for a tensor, and stating them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


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
        if is_split(kind):
            split[kind.dim].append(axis)
    local = {axis: V if is_split(kind) else kind for axis, kind in types.items()}
    entries = [tuple(axes) if len(axes) > 1 else axes[0] if axes else None for axes in split]
    spmd_types.assert_type(x, local, partition_spec=PartitionSpec(*entries) if any(split) else None)
    return x


def is_split(kind: Any) -> bool:
    return hasattr(kind, "dim")


def stated(function: Callable[..., Tensor], types: Mapping[Any, Any], *arguments: Any, **options: Any) -> Tensor:
    """Run ``function`` under the checker's local mode and state the type of what it returns."""
    import spmd_types

    with spmd_types.no_typecheck():
        result = function(*arguments, **options)
    return with_types(result, types)
