"""Expert parallelism: the model as one of the ranks that share its experts sees it.

Of ``ep`` data ranks each holds 1/ep of every layer's experts; tokens go to the ranks that hold the experts they chose
and come back (`codegen/runtime/experts.py`). In `dispatched` the stacked weights are those of one rank, and the
operator says so (``ep``); everything else is as it was. What a block's split on the model axes means does not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import gcd

from autopar.errors import BadInputError
from autopar.graph.ir import EXPERTS, IMBALANCE, BlockKind, ModelGraph, Node, OpGraph, TensorMeta

PARAMETERS = 3
"""Where an experts operator's parameters begin among its operands."""


def fullest_rows(choices: int, held: int, experts: int, ep: int, imbalance: tuple[int, int] = IMBALANCE) -> int:
    """Rows that the experts of the rank that is waited for compute, which holds ``held`` of ``experts``, where each of
    the ``ep`` that share them has tokens that made so many choices. ``imbalance``: of an even share, as a fraction."""
    more, less = imbalance if held < experts else (1, 1)
    return -(-choices * held * ep * more // (experts * less))


def sent_rows(choices: int, held: int, experts: int, ep: int) -> int:
    """Rows that a rank sends to those it shares experts with, its own included."""
    return -(-choices * held * ep // experts)


def experts_of(graph: OpGraph) -> Iterator[Node]:
    """The operators that are a mixture's experts."""
    return (node for node in graph.of("op") if node.op == EXPERTS)


def expert_parameters(graph: OpGraph) -> Iterator[Node]:
    """The parameters of a graph that hold experts, whatever reads them beside."""
    names = dict.fromkeys(name for node in experts_of(graph) for name in node.operands()[PARAMETERS:])
    return (graph.nodes[name] for name in names if graph.nodes[name].kind == "parameter")


def shared_experts(graph: OpGraph) -> int:
    """Ranks that share the experts of a dispatched graph; 1 where none do."""
    return max((int(node.kwargs.get("ep", 1)) for node in experts_of(graph)), default=1)


def check_experts(model: ModelGraph, ep: int) -> None:
    """Raise BadInputError unless ``ep`` ranks can share the model's experts."""
    nodes = [(kind, node) for kind in model.kinds.values() for node in experts_of(kind.graph)]
    if not nodes:
        raise BadInputError(f"ep={ep}: {model.name} has no experts to share; leave ep=1")
    tied = {name for group in model.tied for name in group}
    for kind, node in nodes:
        count = int(node.kwargs["experts"])
        if count % ep:
            raise BadInputError(f"ep={ep} does not divide the {count} experts of {kind.name}; use a divisor")
        held = list(expert_parameters(kind.graph))
        users = kind.graph.users()
        plain = len(held) == len(node.operands()) - PARAMETERS and all(len(users[each.name]) == 1 for each in held)
        names = {block.parameters[each.target] for block in model.blocks if block.kind == kind.name for each in held}
        if not plain or names & tied or not all(each.meta.requires_grad for each in held):
            raise BadInputError(
                f"ep={ep}: the experts of {kind.name} are not parameters of their own that train (they are computed, "
                "shared or frozen), and cannot be divided among ranks; leave ep=1"
            )


def sharing_sizes(model: ModelGraph) -> tuple[int, ...]:
    """How many ranks can share the model's experts, from 1 on, which is all where there are none to share."""
    counts = {int(node.kwargs["experts"]) for kind in model.kinds.values() for node in experts_of(kind.graph)}
    try:
        check_experts(model, 1)
    except BadInputError:
        return (1,)
    whole = gcd(*counts)
    return tuple(n for n in range(1, whole + 1) if whole % n == 0)


_cache: dict[tuple[int, int], tuple[BlockKind, BlockKind]] = {}


def dispatched(model: ModelGraph, ep: int) -> ModelGraph:
    """``model`` with 1/ep of its experts; dividing twice is dividing once. Raises BadInputError for a model whose
    experts cannot be shared so."""
    if ep == 1 or any(shared_experts(kind.graph) == ep for kind in model.kinds.values()):
        return model
    check_experts(model, ep)
    kinds = {name: _kind(kind, ep) for name, kind in model.kinds.items()}
    parameters = dict(model.parameters)
    for block in model.blocks:
        for node in expert_parameters(kinds[block.kind].graph):
            parameters[block.parameters[node.target]] = node.meta
    return replace(model, kinds=kinds, parameters=parameters)


def _kind(kind: BlockKind, ep: int) -> BlockKind:
    """Found once for each graph object: what is known of a graph elsewhere is known by its identity."""
    found = _cache.get((id(kind), ep))
    if found is None or found[0] is not kind:
        if len(_cache) >= 64:
            _cache.pop(next(iter(_cache)))
        found = _cache[id(kind), ep] = (kind, _divided(kind, ep))
    return found[1]


def _divided(kind: BlockKind, ep: int) -> BlockKind:
    held = {node.name for node in expert_parameters(kind.graph)}
    if not held:
        return kind
    nodes = {}
    for node in kind.graph.nodes.values():
        if node.name in held:
            count, *rest = node.meta.shape
            assert isinstance(count, int)
            node = replace(node, meta=TensorMeta((count // ep, *rest), node.meta.dtype, node.meta.requires_grad))
        elif node.op == EXPERTS:
            node = replace(node, kwargs={**node.kwargs, "ep": ep})
        nodes[node.name] = node
    return replace(kind, graph=OpGraph(nodes, kind.graph.outputs))
