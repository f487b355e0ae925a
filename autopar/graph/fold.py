"""Tracing that does not grow with depth: of layers that are the same, two are traced and the rest stand in.

The parent's code runs in full, with its real loop indices; only the inside of a stood-in layer is skipped. That the
skipped layers are what the traced ones are is proved, not assumed; if any of this fails, everything is traced:

1. Structure: same classes, parameter shapes, hooks and attributes (`structure`), integers apart.
2. Integer attributes that differ (the layer's position) become probes in the traced layers, which refuse any use.
3. Calls: every stood-in layer is handed the same objects as its representative (the second traced layer of its kind),
   except for one tensor, which is the output of the layer before it, and returns the same kind of thing.
4. Graphs: the two traced layers of a kind are equal, and read nothing of another layer but that one tensor; nothing
   runs between stood-in layers (checked by `autopar.graph.blocks.cut`).
5. No parameter of the layers is shared with anything else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from autopar.graph.structure import integers

_library = torch.library.Library("autopar", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("layer(Tensor x, str path) -> Tensor")  # type: ignore[no-untyped-call]
_library.impl(  # type: ignore[no-untyped-call]
    "layer", lambda x, path: torch.empty_like(x), "CompositeExplicitAutograd"
)

STAND_IN = "autopar.layer"
"""Operator of a stood-in layer: args (the tensor from the layer before, the layer's path)."""


class CannotFoldError(Exception):
    """The proof fails: trace every layer. Never reaches the user."""


@dataclass(slots=True)
class Fold:
    """Which layers stand in for which: ``representative`` maps a stood-in layer's path to the traced one's.

    ``first`` maps a representative to the other traced layer of its kind. One `Fold` serves one trace.
    """

    representative: dict[str, str]
    first: dict[str, str]
    positions: dict[str, set[tuple[str, str]]]
    calls: dict[str, _Call] = field(default_factory=dict)
    _previous: Any = None
    _alive: list[Any] = field(default_factory=list)

    def stubs(self, model: nn.Module) -> dict[int, nn.Module]:
        """id of each stood-in layer → the module that takes its place in the copy."""
        layers = {path: model.get_submodule(path) for path in self.representative}
        return {id(layer): StandIn(self, path, layer) for path, layer in layers.items()}

    def watch(self, copied: nn.Module) -> None:
        """Record the calls of the traced layers of ``copied`` and put probes in place of their positions."""
        for representative, first in self.first.items():
            for path in (first, representative):
                layer = copied.get_submodule(path)
                for child, name in self.positions[representative]:
                    setattr(layer.get_submodule(child), name, Probe(f"{path}.{child}.{name}"))
                layer.register_forward_pre_hook(
                    lambda _, args, kwargs, path=path: self._enter(path, args, kwargs), with_kwargs=True
                )
                layer.register_forward_hook(lambda _, args, result, path=path: self._leave(path, result))

    def _enter(self, path: str, args: Any, kwargs: Any) -> None:
        if path in self.calls:
            raise CannotFoldError(f"{path} is called twice")
        self.calls[path] = _Call(self._signature(args, kwargs), self._chain(args, kwargs))

    def _leave(self, path: str, result: Any) -> None:
        leaves, tree = tree_flatten(result)
        tensors = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        call = self.calls[path]
        if len(tensors) == 1:
            call.result, call.tree, call.place = leaves, tree, tensors[0]
            self._previous = leaves[tensors[0]]
        else:
            self._previous = None
        self._alive.append(result)

    def stand_in(self, path: str, args: Any, kwargs: Any) -> Any:
        """What the stood-in layer at ``path`` returns. Raises CannotFoldError."""
        call = self.calls.get(self.representative[path])
        if call is None or call.chain is None or call.place is None:
            raise CannotFoldError(f"{path} runs before its representative, or has no single tensor in and out")
        x = self._chain(args, kwargs)
        if x is None or self._signature(args, kwargs) != call.signature:
            raise CannotFoldError(f"{path} is called with other arguments than {self.representative[path]}")
        output = call.result[call.place]
        if (output.shape, output.dtype) != (call.chain.shape, call.chain.dtype):
            raise CannotFoldError(f"{path} returns another shape or dtype than it is given")
        leaves = list(call.result)
        leaves[call.place] = self._previous = torch.ops.autopar.layer(x, path)
        self._alive.append(self._previous)
        return tree_unflatten(leaves, call.tree)

    def _chain(self, args: Any, kwargs: Any) -> torch.Tensor | None:
        """The output of the layer before, if it is among the arguments."""
        leaves, _ = tree_flatten((args, kwargs))
        return next((leaf for leaf in leaves if leaf is self._previous and leaf is not None), None)

    def _signature(self, args: Any, kwargs: Any) -> tuple[Any, ...]:
        leaves, tree = tree_flatten((args, kwargs))
        self._alive.append(leaves)
        described: list[Any] = [str(tree)]
        for leaf in leaves:
            if leaf is self._previous and leaf is not None:
                described.append("the layer before")
            elif leaf is None or isinstance(leaf, bool | int | float | str):
                described.append((type(leaf).__name__, leaf))
            elif isinstance(leaf, torch.SymInt):
                described.append(("size", str(leaf.node.expr)))
            else:
                described.append(("object", id(leaf)))  # kept alive above, so ids are not reused
        return tuple(described)


@dataclass(slots=True)
class _Call:
    signature: tuple[Any, ...]
    chain: torch.Tensor | None
    result: list[Any] = field(default_factory=list)
    tree: Any = None
    place: int | None = None


class StandIn(nn.Module):
    """Takes a layer's place in the traced copy."""

    def __init__(self, fold: Fold, path: str, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["_stands_for"] = (fold, path, layer)

    def __deepcopy__(self, memo: dict[int, Any]) -> StandIn:
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        fold, path, _ = self.__dict__["_stands_for"]
        return fold.stand_in(path, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "_stands_for" not in self.__dict__:
            return super().__getattr__(name)
        fold, path, layer = self.__dict__["_stands_for"]
        value = getattr(layer, name)
        positions = fold.positions[fold.representative[path]]
        if isinstance(value, torch.Tensor | nn.Module) or callable(value) or ("", name) in positions:
            raise CannotFoldError(f"the model reads {path}.{name} from outside the layer")
        return value


class Probe:
    """Stands for an integer that must not matter: any use of it but a test for None raises CannotFoldError."""

    def __init__(self, name: str) -> None:
        self._name = name

    def _used(self, *_: Any, **__: Any) -> Any:
        raise CannotFoldError(f"forward uses {self._name}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Probe:
        return self


_OPERATIONS = """
    add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod pow rpow divmod rdivmod neg pos abs invert
    and rand or ror xor rxor lshift rlshift rshift rrshift eq ne lt le gt ge hash bool int float complex index round
    trunc floor ceil str repr format getattr iter len contains getitem
"""
for _operation in _OPERATIONS.split():
    setattr(Probe, f"__{_operation}__", Probe._used)


def plan_fold(model: nn.Module, layers: Mapping[str, str]) -> Fold | None:
    """Layers worth standing in for (four or more of one structure in one container); None if there are none."""
    groups: dict[tuple[str, str], list[str]] = {}
    for path, key in layers.items():
        groups.setdefault((path.rpartition(".")[0], key), []).append(path)
    fold = Fold({}, {}, {})
    owners = Counter(id(tensor) for _, tensor in model.named_parameters(remove_duplicate=False))
    for paths in groups.values():
        if len(paths) < 4:
            continue
        modules = [model.get_submodule(path) for path in paths]
        if any(owners[id(parameter)] > 1 for module in modules for parameter in module.parameters()):
            continue
        numbers = [integers(module) for module in modules]
        if any(number.keys() != numbers[0].keys() for number in numbers):
            continue
        first, representative, *rest = paths
        fold.first[representative] = first
        fold.positions[representative] = {key for key in numbers[0] if len({number[key] for number in numbers}) > 1}
        fold.representative.update(dict.fromkeys(rest, representative))
    return fold if fold.representative else None
