"""Which block-cyclic splits a graph can use: ``S(d, blocks=n)`` beside ``S(d)``.

A reshape or a slice may split a compound dim on an inner factor, as when a fused projection ``[3 * h * d]`` is split by
heads. Then whoever produces that dim must split it in the same blocks. Blocks spread along factors, from every tensor
that is split so to all operators that share the factor, until nothing is new.
"""

from __future__ import annotations

from typing import Any

from autopar.graph.ir import OpGraph
from autopar.graph.size import Size, divide
from autopar.sharding.factors import Rule
from autopar.sharding.rules.table import rule_of

Spots = dict[tuple[str, int], dict[int | Size, None]]
"""For each (tensor, dim), the numbers of blocks in which it may be split, in order of discovery."""

_MOST = 8
"""Numbers of blocks kept for one factor: real models need one or two; this only stops contrived graphs."""


class GraphBlocks:
    """The rules and blocks of one graph, and the strategies found for its nodes so far."""

    def __init__(self, graph: OpGraph) -> None:
        self.graph = graph
        self.rules = {node.name: rule_of(node, graph) for node in graph.of("op")}
        self.spots: Spots = {}
        self.strategies: dict[str, tuple[Any, ...]] = {}
        changed = True
        while changed:
            changed = False
            for order in (list(self.rules), list(reversed(self.rules))):
                for name in order:
                    changed |= self._spread(name)

    def of(self, name: str, factor: str) -> tuple[int | Size, ...]:
        """The numbers of blocks in which ``factor`` of node ``name`` may be split; 1 is always the first."""
        rule = self.rules[name]
        found: dict[int | Size, None] = {1: None}
        if rule is not None:
            for tensor, dim, majors in self._places(name, rule, factor):
                for blocks in self.spots.get((tensor, dim), {}):
                    inner = divide(blocks, majors)
                    if inner is not None and _splits(rule.sizes[factor], inner):
                        found[inner] = None
        return tuple(found)[:_MOST]

    def _spread(self, name: str) -> bool:
        rule = self.rules[name]
        changed = False
        for factor in rule.splittable() if rule else ():
            assert rule is not None
            counts = self.of(name, factor)
            for tensor, dim, majors in self._places(name, rule, factor):
                spot = self.spots.setdefault((tensor, dim), {})
                for count in counts:
                    if majors * count not in spot:
                        spot[majors * count] = None
                        changed = True
        return changed

    def _places(self, name: str, rule: Rule, factor: str) -> list[tuple[str, int, int | Size]]:
        tensors = [*zip(self.graph.nodes[name].operands(), rule.operands, strict=True), (name, rule.output)]
        places = [(tensor, rule.position(dims, factor)) for tensor, dims in tensors]
        return [(tensor, place[0], place[1]) for tensor, place in places if place is not None]


def _splits(size: int | Size, blocks: int | Size) -> bool:
    """Whether a factor of ``size`` can be seen as more than one element in each of ``blocks`` blocks."""
    rest = divide(size, blocks)
    return rest is not None and rest != 1


_cache: dict[int, GraphBlocks] = {}


def graph_blocks(graph: OpGraph) -> GraphBlocks:
    """The blocks of ``graph``, found once for each graph object."""
    found = _cache.get(id(graph))
    if found is None or found.graph is not graph:
        if len(_cache) >= 64:
            _cache.pop(next(iter(_cache)))
        found = _cache[id(graph)] = GraphBlocks(graph)
    return found


def forget() -> None:
    """Drop what was found, after a change of the rule table."""
    _cache.clear()


def blocks_of(graph: OpGraph, tensor: str, dim: int) -> tuple[int | Size, ...]:
    """The numbers of blocks in which dim ``dim`` of ``tensor`` is split by some strategy of its producer or users."""
    return tuple(graph_blocks(graph).spots.get((tensor, dim), {}))
