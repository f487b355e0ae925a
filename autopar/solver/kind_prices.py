"""What the operators, conversions and sources of one block kind take on axes of one size and one micro-batch: the
seconds of a structure (`structure`), in its order."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import numpy as np

from autopar.graph.ir import EXPERTS
from autopar.solver.linear import Floats
from autopar.solver.op_costs import LocalTensor
from autopar.solver.prices import AxisPrices
from autopar.solver.shared_bounds import Shared, Sharing, least_of
from autopar.solver.structure import Structure, Ways


class KindPrices:
    """Seconds of a structure's operations and moves, in its order.

    ``forward``, ``backward``: of each operation; ``once``: of both; ``twice``: with a second forward, for what runs
    again in backward. ``moved``, ``moved_twice``: the same of moves. ``parts``: what the first rank holds of each part.
    ``resident``: seconds that an element of a parameter that trains costs.

    ``sharing``: prices are those of `shared_bounds`: ``experts`` are the operations that ranks may share, which take
    the least of any number of ranks, and holding their parameters takes nothing.
    """

    def __init__(
        self, structure: Structure, prices: AxisPrices, resident: float, sharing: Sharing | None = None
    ) -> None:
        self.structure, self.resident = structure, resident
        self._free = sharing.held if sharing else frozenset()
        self.parts: dict[int, LocalTensor] = {place: prices.held(part) for place, part in structure.parts}
        self.experts: dict[int, Shared] = {}
        self._operations(prices, sharing)
        self._moves(prices)

    def _operations(self, prices: AxisPrices, sharing: Sharing | None) -> None:
        parts, priced, least = self.parts, [], {}
        for place, (_, each) in enumerate(self.structure.operations):
            inputs = [parts[part] for part in each.inputs]
            if sharing and each.node.op == EXPERTS:
                shared = sharing.prices(prices, each.node, inputs, parts[each.output], each.grads)
                self.experts[place], least[place] = shared, [least_of(shared, again) for again in (False, True)]
                priced.append((0.0, 0.0))
                continue
            inside = [(inner, parts[part]) for inner, part in each.inside]
            price, _ = prices.timed(each.node, inputs, parts[each.output], each.grads, inside)
            priced.append((price.forward_s, price.backward_s))
        self.forward, self.backward = np.array(priced, dtype=float).reshape(-1, 2).T
        self.once: Floats = self.forward + self.backward
        self.twice: Floats = self.once + self.forward
        for place, (once, twice) in least.items():
            self.once[place], self.twice[place] = once, twice

    def _moves(self, prices: AxisPrices) -> None:
        place = {of: index for index, (of, _) in enumerate(self.structure.acts)}
        seconds = np.array([prices.acted(self.parts[part], action)[0] for _, (part, action) in self.structure.acts])
        ways = np.array([(place[ahead], place[back]) for _, (ahead, back) in self.structure.moves], dtype=int)
        forward, backward = seconds[ways.reshape(-1, 2).T]
        self.moved: Floats = forward + backward
        self.moved_twice: Floats = self.moved + forward

    def fastest(self) -> dict[str, tuple[float, float]]:
        """The least seconds forward, and backward, of any way of each operator; of what hands on, none."""
        found = {}
        forward, backward = (each.tolist() for each in (self.forward, self.backward))
        for name, ways in self._ways():
            found[name] = min([forward[way] for way in ways]), min([backward[way] for way in ways])
        return found

    @cached_property
    def shared(self) -> dict[str, list[Shared]]:
        """Of each operator whose experts ranks may share, what its ways take."""
        return {
            name: [self.experts[way] for way in ways] for name, ways in self._ways() if ways and ways[0] in self.experts
        }

    def _ways(self) -> list[tuple[str, list[int]]]:
        """Of each operator the places of its ways among the operations."""
        place = {of: index for index, (of, _) in enumerate(self.structure.operations)}
        ops = [op for op in self.structure.ops if isinstance(op, Ways)]
        return [(op.name, [place[way.operation] for way in op.ways]) for op in ops]

    def sources(self) -> list[Floats]:
        """Seconds of each source, by the layout it arrives in."""
        return [
            self.resident * source.share * self._elements(source.layouts.values())
            if source.share and source.name not in self._free
            else np.zeros(len(source.layouts))
            for source in self.structure.sources
        ]

    def held(self) -> dict[str, float]:
        """Seconds that parameters of experts, which are held for nothing here, take at least if no ranks share them."""
        return {
            source.name: float(self.resident * source.share * self._elements(source.layouts.values()).min())
            for source in self.structure.sources
            if source.name in self._free
        }

    def _elements(self, parts: Iterable[int]) -> Floats:
        return np.array([self.parts[part].elements for part in parts], dtype=float)
