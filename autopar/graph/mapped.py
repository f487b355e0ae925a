"""What `torch.vmap` maps, written for all at once.

torch.export leaves a mapped function in the program as it runs for one item, between calls that add and remove the
dim it is mapped over. `unmap` runs such a stretch of the program once more, where torch's own rules of batching see
every operator, and puts what these make of it in its place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch._functorch.vmap
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from autopar.graph.exported import FUNCTIONAL

ENTER, LEAVE = "_vmap_increment_nesting", "_vmap_decrement_nesting"


@contextlib.contextmanager
def mapped_first() -> Iterator[None]:
    """While open, results of mapped functions get their dim in front and are moved where ``out_dims`` wants it: what
    else than 0 it is, torch.export does not follow."""
    functions: Any = torch._functorch.vmap
    plain = functions._remove_batch_dim

    def removed(x: torch.Tensor, level: int, size: int, out: int) -> torch.Tensor:
        result: torch.Tensor = plain(x, level, size, 0)
        return result.movedim(0, out) if out else result

    functions._remove_batch_dim = removed
    try:
        yield
    finally:
        functions._remove_batch_dim = plain


def unmap(module: fx.GraphModule) -> None:
    """Write out what is mapped in the program's graph and in the graphs inside it."""
    for inner in list(module.modules()):
        if isinstance(inner, fx.GraphModule):
            for stretch in _stretches(inner.graph):
                _write_out(inner, stretch)


def _stretches(graph: fx.Graph) -> list[list[fx.Node]]:
    """The nodes of each function that is mapped, with those mapped inside it."""
    found: list[list[fx.Node]] = []
    depth = 0
    for node in graph.nodes:
        name = node.target.__name__ if getattr(node.target, "__module__", "") == FUNCTIONAL else ""
        if name == ENTER:
            found += [[]] if not depth else []
            depth += 1
        if depth:
            found[-1].append(node)
        depth -= name == LEAVE
    return found


def _write_out(module: fx.GraphModule, stretch: list[fx.Node]) -> None:
    within = set(stretch)
    read = dict.fromkeys(x for node in stretch for x in node.all_input_nodes if x not in within)
    named = [node for node in read if node.op == "get_attr"]  # which function is called, not what it is called with
    given = [node for node in read if node.op != "get_attr"]
    results = [node for node in stretch if node.op != "get_attr" and any(user not in within for user in node.users)]
    flat = _flat(module, named + stretch, given, results)
    if flat is None:
        return
    graph, copies = module.graph, {}
    places = iter(given)
    with graph.inserting_before(stretch[0]):
        for node in flat.graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(places)
            elif node.op == "call_function":
                copies[node] = graph.node_copy(node, copies.__getitem__)
                copies[node].meta = {**results[0].meta, "val": node.meta.get("val")}
    made: Any = next(node for node in flat.graph.nodes if node.op == "output").args[0]
    for node, result in zip(results, made, strict=True):
        node.replace_all_uses_with(copies[result], delete_user_cb=lambda user: user not in within)
    for node in reversed(stretch):
        if not node.users:  # a later stretch may call the same function
            graph.erase_node(node)


def _flat(
    module: fx.GraphModule, stretch: list[fx.Node], given: list[fx.Node], results: list[fx.Node]
) -> fx.GraphModule | None:
    """The same without mapping; None where it holds what can only be told as it is (a constant of its own)."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in given}
    for node in stretch:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in results))
    values = [node.meta["val"] for node in given]
    mode = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)
    if mode is None or not results:
        return None
    with mode, torch.no_grad():  # what autograd keeps for itself is no part of it
        flat = make_fx(fx.GraphModule(module, graph))(*values)
    return None if any(node.op == "get_attr" for node in flat.graph.nodes) else flat
