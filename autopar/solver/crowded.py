"""What is likely not to fit, because what needs no more memory does not: where to look last, never a bound."""

from __future__ import annotations

from dataclasses import dataclass, field

from autopar.solver.space import Config, Shape


@dataclass(slots=True)
class Crowded:
    """Per shape, ZeRO level and offload, the largest shard group that did not fit: smaller ones keep more on each rank,
    and so does state on the device."""

    largest: dict[tuple[Shape, int, str], int] = field(default_factory=dict)

    def add(self, config: Config) -> None:
        """A configuration of which nothing fits."""
        for offload in ("none",) if config.offload == "none" else ("none", config.offload):
            key = (config.shape, config.zero, offload)
            self.largest[key] = max(config.fsdp, self.largest.get(key, 0))

    def knows(self, config: Config) -> bool:
        """Whether anything was found out about such configurations."""
        return any((config.shape, config.zero, offload) in self.largest for offload in ("none", config.offload))

    def has(self, config: Config) -> bool:
        """Whether one that needs no more memory did not fit."""
        return config.fsdp <= self.largest.get((config.shape, config.zero, config.offload), 0)
