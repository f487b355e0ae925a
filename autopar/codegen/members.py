"""Members of the emitted modules: parameters and the modules that hold them, under the names the model gives them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from math import prod

from autopar.codegen.source import Argument, Call, Expr, Method, Text, literal, statement
from autopar.codegen.wiring import is_writable
from autopar.errors import UnsupportedError
from autopar.graph.ir import TensorMeta
from autopar.sharding.layout import Layout
from autopar.sharding.local import least_part


def attribute(prefix: str, path: str, parameter: bool = False) -> str:
    """``self.a.b`` for the dotted path ``a.b`` of a module (or parameter), also where a part is no Python name."""
    text, odd = prefix.rstrip("."), ""
    parts = path.split(".")
    for place, part in enumerate(parts):
        if is_writable(part):
            text += f".{part}"
            continue
        odd += f".{part}" if odd else part
        last = place + 1 == len(parts)
        if last or is_writable(parts[place + 1]):
            text += f".{'get_parameter' if last and parameter else 'get_submodule'}({json.dumps(odd)})"
            odd = ""
    return text


def assignment(path: str, member: Expr, indent: int) -> list[str]:
    """``self.a.b = member``, also where the last part is no Python name."""
    owner, _, leaf = path.rpartition(".")
    if is_writable(leaf):
        return statement(f"{attribute('self', path)} = ", member, str, indent)
    is_parameter = isinstance(member, Call) and member.function.startswith("new.")
    register = "register_parameter" if is_parameter else "add_module"
    holder = Text(attribute("self", owner) if owner else "self")
    return statement("", Method(holder, register, (literal(leaf), member)), str, indent)


def parameter_expr(
    layout: Layout, shape: tuple[int, ...], axes: Mapping[str, int], name: str, trains: bool = True, ep: int = 1
) -> Expr:
    """``new.whole(shape)`` or ``new.split(shape, axis=dim)`` for a parameter stored as ``layout``.

    ``axes``: sizes of the model axes; ``trains``: whether it has a gradient; ``ep``: ranks that hold such a parameter
    each, one after the other the whole. Raises UnsupportedError for
    what no DTensor on these axes is.
    """
    split = {axis: kind for axis, kind in layout.types if kind.kind == "S"}
    what = f"{name} of shape {shape}, stored as {layout}"
    for axis, kind in split.items():
        if axis == "cp" or kind.blocks != 1:
            raise UnsupportedError(
                f"{what}: parameters are split in whole slices, by tensor-parallel axes; the search stores them so"
            )
        order = layout.splits(kind.dim)
        if order != tuple(other for other in axes if other in order):
            raise UnsupportedError(f"{what}: axes that split one dim of a parameter do so in the mesh's order")
        if least_part(shape[kind.dim], [axes[other] for other in order]) < 1:
            parts = prod(axes[other] for other in order)
            raise UnsupportedError(f"{what}: {parts} parts of dim {kind.dim} leave ranks without any; use fewer")
    if "cp" in axes and layout["cp"].kind != "R":
        raise UnsupportedError(f"{what}: on cp a parameter is R, its gradient summed over cp as over data ranks")
    sizes: tuple[Argument, ...] = tuple(literal(size) for size in (shape[0] * ep, *shape[1:])) if shape else ()
    dims: tuple[Argument, ...] = (("ep", literal(0)),) if ep > 1 else ()
    dims += tuple((axis, literal(split[axis].dim)) for axis in axes if axis in split)
    frozen: tuple[Argument, ...] = () if trains else (("trains", literal(False)),)
    return Call("new.split", (*sizes, *dims, *frozen)) if dims else Call("new.whole", (*sizes, *frozen))


def tree(
    stored: dict[str, Layout],
    metas: Mapping[str, TensorMeta],
    axes: Mapping[str, int],
    shared: Set[str] = frozenset(),
    ep: int = 1,
) -> dict[str, Expr]:
    """Top-level attributes of a block, nested as the model's modules are. ``shared``: what ``ep`` ranks share."""
    members: dict[str, Expr] = {}
    for head in dict.fromkeys(target.split(".")[0] for target in stored):
        targets = [target for target in stored if target.split(".")[0] == head]
        if targets == [head]:
            meta = metas[head]
            parts = ep if head in shared else 1
            members[head] = parameter_expr(stored[head], meta.at(1, 1), axes, head, meta.requires_grad, parts)
            continue
        inner = {t.split(".", 1)[1]: stored[t] for t in targets}
        held = {t.split(".", 1)[1] for t in targets if t in shared}
        members[head] = weights(tree(inner, {t.split(".", 1)[1]: metas[t] for t in targets}, axes, held, ep))
    return members


def weights(members: dict[str, Expr]) -> Expr:
    """`Weights` that hold ``members``."""
    if all(is_writable(name) for name in members):
        arguments: tuple[Argument, ...] = tuple(members.items())
        return Call("Weights", arguments)
    return Call("Weights.named", tuple(Call("", (literal(name), member)) for name, member in members.items()))
