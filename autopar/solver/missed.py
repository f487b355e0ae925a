"""By how much estimates were too low, so that others like them are raised: where to look first, never a bound."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from autopar.solver.space import Config, Family, Shape

ENOUGH = 3
"""Configurations priced of a class after which the least that was missed of them is expected of the others."""


@dataclass(slots=True)
class Missed:
    """Seconds over estimates: of the shape priced last, and of all with stages, or without, by ZeRO level."""

    shapes: dict[Shape, float] = field(default_factory=dict)
    classes: dict[tuple[bool, int], list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, config: Config, estimate: float, seconds: float) -> None:
        """What a configuration took."""
        ratio = self.shapes[config.shape] = max(1.0, seconds / estimate)
        self.classes[config.pp > 1, config.zero].append(ratio)

    def factor(self, item: Shape | Family | Config) -> float:
        """What an estimate is likely to be too low by: as much as for the same shape, or at least for its class."""
        shape = item if isinstance(item, Shape) else item.shape
        if shape in self.shapes:
            return self.shapes[shape]
        staged = shape.outline.pp > 1
        like = self.classes[staged, item.zero] if not isinstance(item, Shape) else []
        if len(like) < ENOUGH:
            like = [ratio for (other, _), ratios in self.classes.items() if other == staged for ratio in ratios]
        return min(like) if len(like) >= ENOUGH else 1.0
