"""What bounds of blocks whose experts data ranks share follow from: one problem for every number of them (``ep``).

Of a decision x for a block only its experts' seconds s(k, ep) depend on ep, by their strategy k, and what each rank
holds of their parameters, one in ep of it. With z(x) the seconds of all else and h the least price of holding them,

    seconds(x) = z(x) + s(k(x), ep) + price(x) >= min over k of  (min over x with k(x) = k of z(x)) + s(k, ep) + h / ep

so that one elimination, in which experts are held for nothing, bounds all. (It has them take the least of any ep, m(k),
which is taken off again: then a linear program can stand for it.) What may be decided under an ep may be decided
without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from autopar.graph.dispatch import PARAMETERS, expert_parameters
from autopar.graph.ir import ModelGraph, Node
from autopar.solver.linear import Floats
from autopar.solver.op_costs import LocalTensor
from autopar.solver.prices import AxisPrices, Price

Shared = dict[int, Price]
"""What experts take in one of these ways, by ep."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """That any of these numbers of ranks may share experts; ``held``: their parameters, as "kind/node"."""

    sizes: tuple[int, ...]
    held: frozenset[str]

    @staticmethod
    def of(model: ModelGraph, sizes: tuple[int, ...]) -> Sharing:
        kinds = model.kinds.values()
        return Sharing(
            sizes, frozenset(f"{kind.name}/{node.name}" for kind in kinds for node in expert_parameters(kind.graph))
        )

    def has(self, kind: str) -> bool:
        """Whether blocks of this kind have experts."""
        return any(name.partition("/")[0] == kind for name in self.held)

    def prices(
        self, prices: AxisPrices, node: Node, inputs: Sequence[LocalTensor], output: LocalTensor, grads: Sequence[bool]
    ) -> Shared:
        """What experts take whose local ``inputs`` are those of a rank that shares none."""
        found = {}
        for ep in self.sizes:
            parts = [
                one._replace(shape=(-(-one.shape[0] // ep), *one.shape[1:])) if place >= PARAMETERS else one
                for place, one in enumerate(inputs)
            ]
            shared = replace(node, kwargs={**node.kwargs, "ep": ep})
            found[ep], _ = prices.timed(shared, parts, output, grads, ())
        return found


def least_of(shared: Shared, again: bool) -> float:
    """The least seconds of any ep; ``again``: with a second forward."""
    return min(_seconds(price, again) for price in shared.values())


def more_of(ways: Sequence[Shared], ep: int, again: bool) -> Floats:
    """How much more experts take than the least of any ep: [strategy]."""
    return np.array([_seconds(shared[ep], again) - least_of(shared, again) for shared in ways])


def _seconds(price: Price, again: bool) -> float:
    return price.seconds + (price.forward_s if again else 0.0)


def least_part(ways: Sequence[Shared], ep: int, part: str) -> float:
    """The least of a part of the `Price` of any of these ways, if so many ranks share the experts."""
    return float(min(getattr(shared[ep], part) for shared in ways))
