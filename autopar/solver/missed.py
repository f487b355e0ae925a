"""By how much estimates were too low, so that others like them are raised: where to look first, never a bound."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from autopar.solver.space import Config, Family, Shape
from autopar.solver.steps import Step

ENOUGH = 3
"""Configurations priced of a class after which the least that was missed of them is expected of the others."""

Guesses = tuple[tuple[Step, float], ...]
"""What a configuration, and before it what it came from, were estimated to take at every step."""


@dataclass(slots=True)
class Missed:
    """Seconds over estimates of every step: of the shape priced last, and of all with stages, or without, of one
    micro-batch or several, by ZeRO level."""

    shapes: dict[tuple[Shape, Step], float] = field(default_factory=dict)
    classes: dict[tuple[tuple[bool, bool], int, Step], list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, config: Config, guesses: Guesses, seconds: float) -> None:
        """What a configuration took."""
        for step, guess in ((step, guess) for step, guess in guesses if guess):  # of no arithmetic nothing is known
            ratio = self.shapes[config.shape, step] = max(1.0, seconds / guess)
            self.classes[_sort(config.shape), config.zero, step].append(ratio)

    def factor(self, item: Shape | Family | Config, step: Step) -> float:
        """What an estimate is likely to be too low by: as much as for the same shape, or at least for its class."""
        shape = item if isinstance(item, Shape) else item.shape
        if (shape, step) in self.shapes:
            return self.shapes[shape, step]
        sort = _sort(shape)
        like = self.classes[sort, item.zero, step] if not isinstance(item, Shape) else []
        if len(like) < ENOUGH:
            like = [
                ratio
                for (other, _, level), ratios in self.classes.items()
                if other == sort and level == step
                for ratio in ratios
            ]
        return min(like) if len(like) >= ENOUGH else 1.0


def _sort(shape: Shape) -> tuple[bool, bool]:
    """Whether it has stages, and several micro-batches."""
    return shape.outline.pp > 1, shape.outline.micro_batches > 1
