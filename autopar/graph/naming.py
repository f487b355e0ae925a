"""Readable, deterministic names for the nodes of a finished graph: modules first, operators otherwise."""

from __future__ import annotations

import builtins
import keyword
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from autopar.graph.ir import Node, OpGraph, Ref, map_refs

RESERVED = frozenset(keyword.kwlist) | frozenset(dir(builtins)) | {"self", "torch", "F", "batch"}
SUFFIX = {
    "aten.unflatten": "split",
    "aten.flatten": "merged",
    "autopar.rotary": "rotary",
    "aten.slice": "slice",
    "aten.dropout": "dropout",
    "aten.expand": "expanded",
    "aten.unsqueeze": "wide",
    "aten.squeeze": "thin",
    "aten.permute": "permuted",
    "aten.pad": "padded",
    "aten.detach": "detached",
}
PLAIN = {
    "aten.scaled_dot_product_attention": "attention",
    "autopar.cross_entropy": "loss",
    "aten.embedding": "embedded",
    "aten.linear": "linear",
    "aten.rms_norm": "norm",
    "aten.layer_norm": "norm",
}


def named(nodes: Sequence[Node], outputs: Sequence[str], wishes: Mapping[str, str]) -> tuple[OpGraph, dict[str, str]]:
    """The graph of ``nodes`` under readable names, and the map from old names to new.

    ``wishes`` gives the wished names of input nodes, and of others that are to have one. Leaf targets and module paths
    are relative to the block.
    """
    ops_in_module = Counter(node.module for node in nodes if node.kind == "op" and not _is_view_of_weight(node))
    names: dict[str, str] = {}
    stems: dict[str, str] = {}
    taken: set[str] = set()
    kinds = {node.name: node for node in nodes}
    for node in nodes:
        if node.kind == "input" or node.name in wishes:
            stem = wished = wishes[node.name]
        elif node.kind != "op":
            stem = wished = leaf_name(node.target)
        else:
            alone = ops_in_module[node.module] == 1 and module_leaf(node.module)
            wished, stem = _op_name(node, kinds, stems, module_leaf(node.module) if alone else "")
        names[node.name] = _unique(wished, taken)
        stems[node.name] = stem
    renamed = [
        replace(
            node,
            name=names[node.name],
            args=map_refs(node.args, names.__getitem__),
            kwargs=map_refs(node.kwargs, names.__getitem__),
        )
        for node in nodes
    ]
    return OpGraph({node.name: node for node in renamed}, tuple(names[name] for name in outputs)), names


def purpose(value: Node, reader: Node, place: int, table: str) -> str:
    """What a value is for, if operand ``place`` of ``reader`` says it, else "": ids are named after the ``table`` (a
    module path) in which they are looked up."""
    if reader.op == "aten.embedding" and place == 1:
        return re.sub(r"_(embeddings?|emb)$", "", module_leaf(table)) + "_ids"
    return "mask" if value.meta.dtype == "bool" else ""


def leaf_name(target: str) -> str:
    """A parameter's short name: ``self_attn.q_proj.weight`` is ``q_proj_weight``."""
    parts = target.split(".")
    keep = 3 if len(parts) > 2 and parts[-2].isdigit() else 2
    return re.sub(r"\W", "_", "_".join(parts[-keep:]))


def module_leaf(path: str) -> str:
    """The last module of ``path``, with its index where it is an item of a list."""
    parts = re.sub(r"@\d+", "", path).split(".")
    return "_".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])


def _is_view_of_weight(node: Node) -> bool:
    return node.op == "aten.t"


def _op_name(node: Node, nodes: Mapping[str, Node], stems: Mapping[str, str], alone: str) -> tuple[str, str]:
    """(wished name, stem that names derived from this one begin with)."""
    operands = node.operands()
    stem = stems[operands[0]] if operands else node.op.partition(".")[2]
    if alone and not _is_view_of_weight(node):
        return alone, re.sub(r"_(proj|linear|layer|embedding|layernorm)$", "", alone)
    if node.op == "aten.transpose":
        split = nodes[operands[0]].op == "aten.unflatten"
        return f"{stem}_heads" if split and node.args[1:] == (1, 2) else f"{stem}_transposed", stem
    if node.op == "aten.t":
        return f"{stem}_t", stem
    if node.op == "aten.select":
        return f"{stem}_{node.args[2]}", f"{stem}_{node.args[2]}"
    if node.op == "autopar.cast":
        return f"{stem}_{node.args[1]}", stem
    if node.op in SUFFIX:
        return f"{stem}_{SUFFIX[node.op]}", stem
    if node.op in PLAIN:
        return PLAIN[node.op], PLAIN[node.op]
    tensors = [arg for arg in node.args if isinstance(arg, Ref)]
    if node.op in ("aten.add", "aten.mul"):
        same = len(tensors) == 2 and len({nodes[ref.name].meta for ref in tensors}) == 1
        word = {("aten.add", True): "residual", ("aten.mul", True): "product"}.get((node.op, same))
        return (word, word) if word else (f"{stem}_{node.op[5:]}", stem)
    word = node.op.partition(".")[2]
    return word, word


def _unique(wished: str, taken: set[str]) -> str:
    wished = re.sub(r"\W", "_", wished) or "value"
    if wished in RESERVED or wished[0].isdigit():
        wished = f"{wished}_" if wished in RESERVED else f"n{wished}"
    name, number = wished, 2
    while name in taken:
        name, number = f"{wished}_{number}", number + 1
    taken.add(name)
    return name
