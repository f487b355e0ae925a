"""Finds what a user names: a block kind, or an operator by node, by module or by the name that reports use."""

from __future__ import annotations

import difflib

from autopar.errors import BadInputError
from autopar.graph.ir import BlockKind, ModelGraph, Node
from autopar.report.words import operator_name

SHOWN = 8
"""Names listed at most in an error."""


def find_kind(model: ModelGraph, name: str) -> BlockKind:
    """The block kind called ``name``, whatever the case, or that of the block with this index or module path.

    Raises BadInputError listing the kinds there are.
    """
    for kind in model.kinds.values():
        if kind.name.lower() == name.lower():
            return kind
    for index, block in enumerate(model.blocks):
        if name in (str(index), block.path):
            return model.kinds[block.kind]
    close = difflib.get_close_matches(name, model.kinds, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}? " if close else ""
    raise BadInputError(
        f"--block: {model.name} has no block kind {name!r}: {hint}Its kinds are {', '.join(model.kinds)}; a block's "
        f"index (0-{len(model.blocks) - 1}) or module path names its kind too"
    )


def find_operator(model: ModelGraph, name: str) -> tuple[BlockKind, Node]:
    """The operator called ``name``: a node (``q_proj``), with its kind before it or not, a module
    (``self_attn.q_proj``, ``model.layers.3.self_attn.q_proj``), or an end of one of these that no other operator has.

    Raises BadInputError listing near matches when none or several are called so.
    """
    kinds, rest = _place(model, name)
    known = {(kind.name, node.name): _aliases(kind, node) for kind in kinds for node in kind.graph.of("op")}
    for fits in (lambda alias: alias == rest, lambda alias: alias.endswith((f".{rest}", f"/{rest}", f"_{rest}"))):
        found = [key for key, aliases in known.items() if any(map(fits, aliases))]
        if len(found) == 1:
            kind, node = found[0]
            return model.kinds[kind], model.kinds[kind].graph.nodes[node]
        if found:
            raise BadInputError(f"--op: {name!r} may be any of {_listed(found)}; name one of them")
    aliases = {alias: key for key, some in known.items() for alias in some}
    ends = {alias.rpartition(".")[2]: alias for alias in aliases}
    close = difflib.get_close_matches(rest, [*aliases, *ends], n=2 * SHOWN, cutoff=0.5)
    near = list(dict.fromkeys(aliases[ends.get(match, match)] for match in close)) or list(known)
    what = "did you mean" if close else "its operators are"
    raise BadInputError(f"--op: {model.name} has no operator {name!r}: {what} {_listed(near)}")


def _place(model: ModelGraph, name: str) -> tuple[list[BlockKind], str]:
    """The kinds to look in, and what is left of a name without the kind or the block's module path before it."""
    kind, slash, rest = name.partition("/")
    if slash:
        return [find_kind(model, kind)], rest
    for block in model.blocks:
        if block.path and name.startswith(f"{block.path}."):
            return [model.kinds[block.kind]], name.removeprefix(f"{block.path}.")
    return list(model.kinds.values()), name


def _aliases(kind: BlockKind, node: Node) -> tuple[str, ...]:
    return tuple(dict.fromkeys((node.name, operator_name(node, kind.graph))))


def _listed(keys: list[tuple[str, str]]) -> str:
    told = [f"{kind}/{node}" for kind, node in keys[:SHOWN]]
    return ", ".join(told) + (f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")
