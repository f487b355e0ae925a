"""Torch's `LocalTensorMode`, with what it repeats for every operator and every rank left out where it changes nothing.

Most operators draw no random numbers, and which tensors share memory is a matter of the ranks' own: for these the
states of the generators are not set and read for each rank, arguments are not taken apart several times, and the
`LocalTensor` of a view is not given the storage of the other. Coordinates of ranks depend on a mesh's layout alone.
Together that is most of what an emulated rank costs on small tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed._local_tensor import LocalIntNode, LocalTensor, LocalTensorMode, _combine_rank_results
from torch.distributed.device_mesh import DeviceMesh

_PLAIN = {Tensor, LocalTensor, torch.nn.Parameter, int, float, bool, complex, str, type(None), torch.SymInt}
_PLAIN |= {torch.dtype, torch.device, torch.layout, torch.memory_format}
"""Types of arguments that are handed to a rank as they are, or whose value of a rank is known."""


class Ranks(LocalTensorMode):  # type: ignore[no-untyped-call]
    """Also where a tensor that is the same on all ranks (a buffer) meets a number that differs (a rank's first row)."""

    def __init__(self, ranks: int) -> None:
        super().__init__(ranks)
        self._known: dict[Any, list[torch.SymInt]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.sym_size.default and type(args[0]) is LocalTensor:
            return tuple(args[0]._size)
        kwargs = kwargs or {}
        found = list(_leaves((args, kwargs)))
        local = any(isinstance(value, LocalTensor) for value in found)
        if not local and any(_differs(value) for value in found):
            args, kwargs = _each((args, kwargs), self._on_all)
            found = list(_leaves((args, kwargs)))
            local = any(isinstance(value, LocalTensor) for value in found)
        if not local or not _simple(func, args) or not all(self._handed(value) for value in found):
            return super().__torch_dispatch__(func, types, args, kwargs)
        results = {}
        for rank in sorted(self.ranks):
            own, named = _each((args, kwargs), partial(_on_rank, rank))
            results[rank] = func(*own, **named)
        if len({len(result) if isinstance(result, list) else 0 for result in results.values()}) > 1:
            # Parts of a tensor that is shorter on some ranks: torch adds empty ones there.
            return super().__torch_dispatch__(func, types, args, kwargs)
        return args[0] if func._schema.is_mutable else _combine_rank_results(results, None)

    def _on_all(self, value: Any) -> Any:
        return LocalTensor(dict.fromkeys(self.ranks, value)) if isinstance(value, Tensor) else value  # type: ignore[no-untyped-call]

    def _handed(self, value: Any) -> bool:
        return type(value) in _PLAIN and (not isinstance(value, LocalTensor) or value._ranks == self.ranks)

    def _patch_device_mesh(self) -> None:
        """Torch remembers coordinates by the id of a mesh object, which the next submesh may get once one is freed."""
        super()._patch_device_mesh()
        methods: dict[str, Callable[..., Any]] = {
            "get_coordinate": self._coordinates,
            "get_local_rank": lambda mesh, axis=None: self._coordinates(mesh)[_dim_of(mesh, axis)],
        }
        for name, method in methods.items():
            # A function, unlike a bound method, is given the mesh.
            setattr(DeviceMesh, name, lambda mesh, *args, _method=method, **named: _method(mesh, *args, **named))

    def _coordinates(self, mesh: DeviceMesh) -> list[torch.SymInt]:
        """Of all ranks, each in the mesh of its own that is cut out of the whole one as ``mesh`` is."""
        key = (mesh._layout, mesh._flatten_rank_map)
        if key not in self._known:
            with self.disable():
                alike = mesh._layout.remap_to_tensor(torch.tensor(mesh._flatten_rank_map))
                places = {rank: (alike == rank).nonzero().tolist() for rank in self.ranks}
            assert all(len(found) == 1 for found in places.values()), "a rank is in one mesh, once"
            self._known[key] = [
                torch.SymInt(LocalIntNode({rank: found[0][dim + 1] for rank, found in places.items()}))  # type: ignore[no-untyped-call]
                for dim in range(mesh.ndim)
            ]
        return self._known[key]


def _dim_of(mesh: DeviceMesh, axis: int | str | None) -> int:
    if isinstance(axis, str):
        return (mesh.mesh_dim_names or ()).index(axis)
    if axis is None and mesh.ndim > 1:
        raise RuntimeError(f"a mesh of {mesh.ndim} dims has no one local rank: name the dim")
    return axis or 0


def _simple(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the ranks' results follow from their own arguments alone, and are new or written to the first."""
    return (
        func.namespace == "aten"
        and func is not torch.ops.aten.hash_tensor.default
        and torch.Tag.nondeterministic_seeded not in func.tags
        and torch.Tag.inplace_view not in func.tags
        and not func._schema.name.startswith("aten::sym_")
        and (not func._schema.is_mutable or (func._schema.name.endswith("_") and isinstance(args[0], LocalTensor)))
    )


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


def _each(value: Any, of: Callable[[Any], Any]) -> Any:
    """The same tree with ``of`` each leaf."""
    if isinstance(value, tuple | list):
        return type(value)([_each(item, of) for item in value])
    if isinstance(value, dict):
        return {key: _each(item, of) for key, item in value.items()}
    return of(value)


def _differs(value: Any) -> bool:
    return isinstance(value, torch.SymInt) and isinstance(value.node, LocalIntNode)


def _on_rank(rank: int, value: Any) -> Any:
    if isinstance(value, LocalTensor):
        return value._local_tensors[rank]
    return value.node._local_ints[rank] if _differs(value) else value
