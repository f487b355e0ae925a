"""Random numbers that a model draws: what is a dropout by another name becomes one, other noise an operator.

Stochastic depth ("drop path", arXiv 1603.09382) multiplies what a layer adds by a number for each sample: one with the
chance to keep, else zero. That is the dropout of a tensor of ones. Uniform and normal numbers are drawn by
``autopar.uniform(x, low, high)`` and ``autopar.normal(x, mean, deviation)``, in the shape of x, which emitted code
draws alike on ranks that hold the same and apart on others. Others (integers, orders) are refused.

Random numbers cannot be compared: in a proof (`middle_drawn`, and emitted code that is not training) each is the middle
of what may be drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from autopar.errors import UnsupportedError
from autopar.graph.draft import DRAWN, RANDOM, Draft, Rule
from autopar.graph.exported import is_number
from autopar.graph.ir import Node, Ref

_UNIT = (0.0, 1.0)
"""From zero to one; and mean and deviation."""


def kept(node: Node, new: Draft) -> Ref | None:
    """floor(rand + chance) → dropout(ones, 1 - chance) * chance."""
    total = new.producer(node.args[0], "aten.add")
    if not total or len(total.args) != 2 or total.kwargs:
        return None
    for drawn, chance in (total.args, total.args[::-1]):
        noise = new.producer(drawn, "autopar.uniform")
        if noise and noise.args[1:] == _UNIT and is_number(chance) and 0 < chance <= 1:
            return _ones_dropped(node, float(chance), new)
    return None


def marked(node: Node, new: Draft) -> Ref | None:
    """bernoulli(chance) → dropout(ones, 1 - chance) * chance."""
    chance: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("p")
    return _ones_dropped(node, float(chance), new) if is_number(chance) and 0 < chance <= 1 else None


def _ones_dropped(node: Node, chance: float, new: Draft) -> Ref:
    shape, dtype = node.meta.shape, node.meta.dtype
    ones = Ref(new.emit("aten.full", shape, 1.0, shape=shape, dtype=dtype, options={"dtype": dtype}))
    if chance == 1:
        return ones
    dropped = Ref(new.emit("aten.dropout", ones, 1 - chance, True, shape=shape))
    return Ref(new.emit("aten.mul", dropped, chance, shape=shape))


def _drawn(op: str, given: Callable[[Node], tuple[Any, Any]]) -> Rule:
    def rule(node: Node, new: Draft) -> Ref | None:
        first, second = given(node)
        if not (is_number(first) and is_number(second)):
            return None
        shape, dtype = node.meta.shape, node.meta.dtype
        like = Ref(new.emit("aten.full", shape, 0.0, shape=shape, dtype=dtype, options={"dtype": dtype}))
        return Ref(new.emit(op, like, float(first), float(second), shape=shape, dtype=dtype))

    return rule


def _in_place(node: Node) -> tuple[Any, Any]:
    """The two numbers of ``x.uniform_(low, high)`` and ``x.normal_(mean, deviation)``."""
    names = ("from", "to") if node.op == "aten.uniform" else ("mean", "std")
    given = [*node.args[1:], *(node.kwargs.get(name) for name in names[len(node.args) - 1 :])]
    return tuple(default if value is None else value for value, default in zip(given, _UNIT, strict=True))  # type: ignore[return-value]


def refuse_others(draft: Draft) -> None:
    """Raise UnsupportedError for random numbers of other kinds."""
    for node in draft.nodes.values():
        if node.op in RANDOM - DRAWN - {"aten.dropout"}:
            place = f"module {node.module!r}" if node.module else "the model"
            raise UnsupportedError(
                f"{place} draws random numbers ({node.op}); autopar knows dropout, of elements or of whole samples "
                "(x * floor(keep + rand) / keep), and uniform and normal numbers; make what draws them a leaf "
                "(autopar.leaf), or hand them in as inputs"
            )


class middle_drawn(TorchDispatchMode):  # type: ignore[no-untyped-call]  # noqa: N801
    """While open, uniform and normal numbers are the middle of what may be drawn."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::").removesuffix("_")
        if name in ("uniform", "normal"):
            numbers: tuple[Any, ...] = args[1:] + _UNIT[len(args) - 1 :]
            first, second = numbers
            return found.fill_((first + second) / 2 if name == "uniform" else first)
        if name in ("rand", "rand_like", "randn", "randn_like"):
            return found.fill_(0.5 if name.startswith("rand") and not name.startswith("randn") else 0.0)
        return found


class nothing_dropped(TorchFunctionMode):  # noqa: N801
    """While open, dropout keeps everything, whether or not a module is training."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout):
            return args[0]
        if func is F.scaled_dot_product_attention:
            kwargs |= dict(zip(("dropout_p", "is_causal"), args[4:], strict=False)) | {"dropout_p": 0.0}
            args = args[:4]
        return func(*args, **kwargs)


RULES: dict[str, list[Rule]] = {
    "aten.floor": [kept],
    "aten.bernoulli": [marked],
    "aten.rand": [_drawn("autopar.uniform", lambda _: _UNIT)],
    "aten.rand_like": [_drawn("autopar.uniform", lambda _: _UNIT)],
    "aten.uniform": [_drawn("autopar.uniform", _in_place)],
    "aten.randn": [_drawn("autopar.normal", lambda _: _UNIT)],
    "aten.randn_like": [_drawn("autopar.normal", lambda _: _UNIT)],
    "aten.normal": [_drawn("autopar.normal", _in_place)],
}
