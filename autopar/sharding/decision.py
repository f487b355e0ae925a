"""What the search decides inside one block kind, complete enough to run, price and emit it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autopar.sharding.layout import Layout


@dataclass(frozen=True, slots=True)
class Conversion:
    """Tensor ``tensor`` (a node of the kind's graph) is materialised in ``target`` from its materialisation ``source``.

    A tensor may be converted several times; each source is the producer's layout or an earlier conversion's target.
    """

    tensor: str
    source: Layout
    target: Layout


@dataclass(frozen=True, slots=True)
class BlockDecision:
    """Sharding of one block kind over the model axes.

    ``axes``: model axis name to size. ``strategies``: for each op node, per model axis, the strategy's name
    (see `autopar.sharding.rules.strategies_of`). ``inputs``: layout in which each input node, parameter and buffer
    arrives. ``outputs``: layout in which each output leaves. ``conversions``: in execution order.
    """

    kind: str
    axes: dict[str, int]
    inputs: dict[str, Layout]
    strategies: dict[str, dict[str, str]]
    conversions: tuple[Conversion, ...]
    outputs: dict[str, Layout]

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "axes": self.axes,
            "inputs": {name: str(layout) for name, layout in self.inputs.items()},
            "strategies": self.strategies,
            "conversions": [[c.tensor, str(c.source), str(c.target)] for c in self.conversions],
            "outputs": {name: str(layout) for name, layout in self.outputs.items()},
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> BlockDecision:
        return BlockDecision(
            kind=data["kind"],
            axes=dict(data["axes"]),
            inputs={name: Layout.parse(text) for name, text in data["inputs"].items()},
            strategies={name: dict(choice) for name, choice in data["strategies"].items()},
            conversions=tuple(
                Conversion(tensor, Layout.parse(source), Layout.parse(target))
                for tensor, source, target in data["conversions"]
            ),
            outputs={name: Layout.parse(text) for name, text in data["outputs"].items()},
        )
