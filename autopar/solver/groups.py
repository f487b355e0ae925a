"""Which blocks of a stage FSDP2 gathers and reduces one by one, and which with the stage's root group.

`codegen/runtime/sharding.py` makes every module in `Stage.blocks()` a group of its own. What is left belongs to the
root group: blocks written as methods of the stage (embedding, final norm and head: they have no path), and blocks
that share a weight with another one of the same stage. The root group is gathered when the stage's forward begins,
stays gathered through the backward, and its gradients are reduced when the backward has ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from autopar.graph.ir import ModelGraph


def root_blocks(model: ModelGraph, stage: Iterable[int]) -> tuple[bool, ...]:
    """For each block of a stage (indices into ``model.blocks``) whether it is in the root group."""
    blocks = [model.blocks[index] for index in stage]
    if not model.tied:
        return tuple(not block.path for block in blocks)
    first = {name: group[0] for group in model.tied for name in group}
    weights = [{first[name] for name in block.parameters.values() if name in first} for block in blocks]
    holders = Counter(name for block, names in zip(blocks, weights, strict=True) if block.path for name in names)
    return tuple(
        not block.path or any(holders[name] > 1 for name in names) for block, names in zip(blocks, weights, strict=True)
    )
