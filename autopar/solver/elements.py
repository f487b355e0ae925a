"""Parameter elements as bounds count them: of the model, and at least of every block and group, however sharded."""

from __future__ import annotations

from math import prod
from typing import cast

from autopar.graph.dispatch import expert_parameters, shared_experts
from autopar.solver.context import Context
from autopar.solver.groups import root_blocks
from autopar.solver.space import Config


def total_elements(context: Context, trains: bool = False) -> tuple[int, int]:
    """Parameter elements of the model, and of these those that may be in a root group. ``trains``: only what trains."""
    key = ("elements", trains)
    if key not in context.memo:
        metas = {name: meta for name, meta in context.model.parameters.items() if meta.requires_grad or not trains}
        sizes = {name: prod(meta.at(1, 1)) for name, meta in metas.items()}
        context.memo[key] = sum(sizes.values()), sum(sizes.get(name, 0) for name in _rooted_names(context))
    total, rooted = context.memo[key]
    return total, rooted


def still_elements(context: Context) -> tuple[int, int]:
    """Parameter elements of blocks that no gradient passes: of those with a group of their own, and of those that may
    be in a root group."""
    if "still elements" not in context.memo:
        model = context.model
        held = [b.parameters.values() for b in model.blocks if not model.kinds[b.kind].passes_gradient]
        names, rooted = {name for block in held for name in block} & model.parameters.keys(), _rooted_names(context)
        context.memo["still elements"] = tuple(
            sum(prod(model.parameters[name].at(1, 1)) for name in part) for part in (names - rooted, names & rooted)
        )
    own, root = context.memo["still elements"]
    return own, root


def least_experts(context: Context, config: Config, index: int) -> int:
    """Elements of experts that data ranks share, of block ``index`` per rank when all of them are split."""
    key = ("least experts", context.model.blocks[index].kind)
    if key not in context.memo:
        graph = context.model.kinds[context.model.blocks[index].kind].graph
        shared = expert_parameters(graph) if shared_experts(graph) > 1 else ()
        context.memo[key] = sum(prod(node.meta.at(1, 1)) for node in shared)
    return int(context.memo[key]) // config.tp


def least_elements(context: Context, config: Config, index: int, trains: bool = False) -> int:
    """Parameter elements of block ``index`` per rank when all of them are split, without `least_experts`. Of a tied
    parameter the first block counts, and the last, if it surely sits in another stage. ``trains``: only what trains."""
    apart = config.pp > 1 and index == len(context.model.blocks) - 1
    key = ("least elements", index, apart, trains)
    if key not in context.memo:
        context.memo[key] = _whole_elements(context, index, apart, trains)
    return int(context.memo[key]) // config.tp


def least_groups(context: Context, config: Config, trains: bool = False) -> tuple[list[int], int]:
    """Least elements of what FSDP2 gathers (``trains``: and reduces), of a model in one stage: each block's own group
    (0 where it has none), and the root group."""
    roots = root_blocks(context.model, range(len(context.model.blocks)))
    least = [least_elements(context, config, index, trains) for index in range(len(roots))]
    own = [0 if root else elements for elements, root in zip(least, roots, strict=True)]
    return own, sum(least) - sum(own)


def blocks_held(context: Context, config: Config) -> list[tuple[int, int, int]]:
    """For every block, how many elements a rank holds when all of them are split, how many of these train, and how many
    are of experts that data ranks share, which count in both."""
    key = ("blocks held", config.tp, config.pp > 1)
    if key not in context.memo:
        found = []
        for index in range(len(context.model.blocks)):
            held, trained = (least_elements(context, config, index, trains) for trains in (False, True))
            expert = least_experts(context, config, index)
            found.append((held + expert, trained + expert, expert))
        context.memo[key] = found
    return cast(list[tuple[int, int, int]], context.memo[key])


def _whole_elements(context: Context, index: int, apart: bool, trains: bool) -> int:
    blocks = context.model.blocks
    block = blocks[index]
    total = 0
    graph = context.model.kinds[block.kind].graph
    shared = {node.name for node in expert_parameters(graph)} if shared_experts(graph) > 1 else set()
    for node in graph.of("parameter"):
        if (trains and not node.meta.requires_grad) or node.name in shared:
            continue
        tie = context.ties.parameters.get((block.kind, node.name))
        first = next((i for i, other in enumerate(blocks) if _holds(context, other.kind, tie)), index) if tie else index
        if first == index or (apart and first == 0):
            total += prod(node.meta.at(1, 1))
    return total


def _holds(context: Context, kind: str, tie: str | None) -> bool:
    return any(owner == kind and name == tie for (owner, _), name in context.ties.parameters.items())


def _rooted_names(context: Context) -> set[str]:
    """Parameters that may be in a root group, tied ones under the first of their names."""
    model = context.model
    first = {name: group[0] for group in model.tied for name in group}
    names = set()
    for block, root in zip(model.blocks, root_blocks(model, range(len(model.blocks))), strict=True):
        if root:
            names |= {first.get(name, name) for name in block.parameters.values()}
    return names & model.parameters.keys()
