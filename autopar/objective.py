"""What a search seeks: the shortest step on the whole cluster, or the part of the cluster that serves something else.

    kind                     sought                                               of a plan on n devices
    step_time                the least seconds a step, on the whole cluster       T
    throughput_per_device    the most tokens per second and device                tokens / (n T)
    devices                  the fewest devices whose step takes `within_s`       n
    cost                     the least money per million tokens                   n T price / 3600 / tokens * 1e6
    energy                   the least joules per token                           n (C power_w + (T - C) wait_w)
                                                                                  / tokens

All but the first may leave devices of the cluster unused (`autopar.solver.objectives`). A plan is for one kind of
device, so throughput and cost are best at the same plan, the one with the least device-seconds n T; they differ in what
they say of it.

**Power.** A device draws its board power (`Device.power_w`, the vendor's maximum) for the C seconds of a step in which
it computes, on average over devices (`autopar.solver.computing`), and `Device.wait_w` for the others: in bubbles, and
while it waits for communication that nothing hides, when clusters draw little more than idle ones (Microsoft, OpenAI
and NVIDIA of their production, arXiv 2508.14318; Perseus, arXiv 2312.06902, counts alike). Where no measured `wait_w`
was found (H20, B300, GB300, L4, L40S, RTX 4090, MI250X), board power is counted for the whole step, an upper figure:
energy is best where throughput is. So Meta reports its training runs: GPU hours times the 700 W of an H100
(meta-llama/llama3, MODEL_CARD.md, "Carbon Footprint").

What it leaves out: hosts, network and cooling; and that operators bound by bytes, small ones, and kernels with gaps
between them draw less than the maximum. H100 that trained drew 500 to 690 of their 700 W (NVIDIA-NeMo/Speech issue
9291); nodes of eight 76 % of what they are rated for, hosts included (Newkirk et al., arXiv 2506.14551), 8.4 of 10.2 kW
at most (Latif et al., arXiv 2412.08602). So figures are somewhat above what is drawn, and compare plans.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

from autopar.cluster import Cluster
from autopar.errors import BadInputError
from autopar.job import Job

UNITS = {
    "step_time": "s",
    "throughput_per_device": "tokens/s per device",
    "devices": "devices",
    "cost": "per million tokens",
    "energy": "J per token",
}
"""Unit of each kind's value; money is in the currency of the prices."""

SHORT = {"step-time": "step_time", "throughput": "throughput_per_device"}
"""Other names of kinds."""

EXTRAS = {"within_s": "devices", "price": "cost"}
"""The kind that each further field belongs to."""


@dataclass(frozen=True, slots=True)
class Objective:
    """``kind``: a key of `UNITS`. ``within_s``: for "devices", the step time to reach, in seconds. ``price``: for
    "cost", money per device-hour by the device's name (``{"h100": 2.5}``).

    Raises BadInputError naming the field.
    """

    kind: str = "step_time"
    within_s: float | None = None
    price: dict[str, float] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if self.kind not in UNITS:
            raise BadInputError(f"objective: unknown kind {self.kind!r}; one of {', '.join([*UNITS, *SHORT])}")
        for name, kind in EXTRAS.items():
            if getattr(self, name) is not None and kind != self.kind:
                raise BadInputError(f'objective: {name} is for objective "{kind}", not for "{self.kind}"')
        if self.kind == "devices" and not _positive(self.within_s):
            raise BadInputError(
                f"objective: devices needs within_s (--within), the seconds a step may take, not {self.within_s!r}"
            )
        if self.kind == "cost":
            if not isinstance(self.price, Mapping) or not self.price:
                raise BadInputError(
                    "objective: cost needs price (--price h100=2.5), the money each device costs an hour, "
                    f"not {self.price!r}"
                )
            for device, price in self.price.items():
                if not _positive(price):
                    raise BadInputError(f"objective: the price of {device} must be a positive number, not {price!r}")

    @staticmethod
    def of(given: Objective | str | Mapping[str, Any] | None) -> Objective:
        """An objective from its kind ("energy"), or from a mapping (``{"kind": "devices", "within_s": 5.0}``).

        Raises BadInputError for another form, or for fields that are missing, unknown or wrong.
        """
        if isinstance(given, Objective):
            return given
        if given is None:
            return Objective()
        if isinstance(given, str):
            return Objective(SHORT.get(given, given))
        if not isinstance(given, Mapping):
            raise BadInputError(f'objective: expected a kind such as "energy" or an autopar.Objective, not {given!r}')
        fields = tuple(Objective.__dataclass_fields__)
        if unknown := sorted(map(str, set(given) - set(fields))):
            raise BadInputError(f"objective: unknown field {unknown[0]!r}; the fields are {', '.join(fields)}")
        kind = given.get("kind", "step_time")
        return Objective(**{**given, "kind": SHORT.get(kind, kind) if isinstance(kind, str) else kind})

    def check(self, cluster: Cluster) -> None:
        """Refuse a cluster whose device has no price or no power where it is needed. Raises BadInputError."""
        device = cluster.device
        if self.kind == "cost" and device.name not in (self.price or {}):
            raise BadInputError(
                f"objective: no price for device {device.name!r} (given: {', '.join(self.price or {})}); add "
                f"--price {device.name}=MONEY_PER_HOUR"
            )
        if self.kind == "energy" and not device.power_w:
            raise BadInputError(
                f"objective: the power of device {device.name!r} is not known; give power_w (watts) in a cluster file"
            )

    def waiting(self, cluster: Cluster) -> float:
        """What a second in which a device waits counts against one in which it computes."""
        return cluster.device.waiting if self.kind == "energy" else 1.0

    def value(self, device_seconds: float, job: Job, cluster: Cluster) -> float:
        """Throughput, cost or energy of a step that keeps devices of this cluster busy for so many device-seconds (for
        energy, those at full power).

        Raises BadInputError as `check` does, and for kinds that device-seconds do not tell.
        """
        self.check(cluster)
        if self.kind == "throughput_per_device":
            return job.tokens / device_seconds
        if self.kind == "cost":
            assert self.price is not None
            return device_seconds / 3600 * self.price[cluster.device.name] / job.tokens * 1e6
        if self.kind == "energy":
            return device_seconds * cluster.device.power_w / job.tokens
        raise BadInputError(f"objective: {self.kind} is not a matter of device-seconds")

    @property
    def unit(self) -> str:
        return UNITS[self.kind]

    @property
    def seeks_most(self) -> bool:
        """Whether more is better."""
        return self.kind == "throughput_per_device"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Objective:
        """Inverse of `to_json`. Raises BadInputError or TypeError when fields are wrong or missing."""
        return Objective(**data)


@dataclass(frozen=True, slots=True)
class ObjectiveValue:
    """What a plan reaches: ``value`` in the objective's unit; ``bound``: no plan on any part of the cluster is better;
    ``gap`` = how far value and bound are apart, as a share of the lesser; ``status``: "optimal" or "feasible";
    ``devices``: those of the cluster that was given."""

    objective: Objective
    value: float
    bound: float
    gap: float
    status: str
    devices: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> ObjectiveValue:
        """Inverse of `to_json`. Raises BadInputError, KeyError or TypeError when fields are wrong or missing."""
        return ObjectiveValue(**{**data, "objective": Objective.from_json(data["objective"])})


def parse_prices(items: Iterable[str]) -> dict[str, float] | None:
    """Prices written as ``["h100=2.5"]``; None where there are none. Raises BadInputError for another form."""
    prices: dict[str, float] = {}
    for item in items:
        device, _, text = item.partition("=")
        try:
            price = float(text)
        except ValueError:
            price = 0.0
        if not device.strip() or not _positive(price):
            raise BadInputError(f"--price: expected DEVICE=MONEY_PER_HOUR such as h100=2.5, not {item!r}")
        if prices.setdefault(device.strip(), price) != price:
            raise BadInputError(f"--price: {device.strip()} is given twice, as {prices[device.strip()]} and {price}")
    return prices or None


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) and value > 0
