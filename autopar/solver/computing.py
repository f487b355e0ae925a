"""Seconds that devices compute, which draw more than those in which they wait: what a search for energy counts.

A device draws `Device.power_w` while it computes (operators of the model, recomputed ones too, copies that conversions
make, the optimizer) and `Device.wait_w` for the rest of the step: in bubbles, on communication that nothing hides, on
copies to the host. So n devices whose step takes T seconds, of which each computes C on average, draw as much as n at
full power for

    waiting T + (1 - waiting) C seconds,   waiting = wait_w / power_w   (1 where wait_w is not known)

and that is what the search seeks the least of (`Context.waiting`; at 1 it is the step time). It never is above T, so
that bounds on it are bounds on T as well. A bound follows from one on T and one on C: `LeastComputing`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from typing import Any

from autopar.solver.collective_costs import CollectiveCosts
from autopar.solver.config_bounds import arithmetic_s
from autopar.solver.context import Context
from autopar.solver.evaluate import full_power_s
from autopar.solver.halves import HalvedBackward
from autopar.solver.recompute import Recompute
from autopar.solver.shardings import KnownShardings, Shardings
from autopar.solver.space import Shape
from autopar.solver.steps import Step


class _NoNetwork(CollectiveCosts):
    """Collectives that take no time: what is left of a price is computation."""

    def seconds(self, kind: str, nbytes: float, size: int, stride: int) -> float:
        return 0.0

    def exchange(self, nbytes: float, size: int, stride: int, choices: int = 0) -> float:
        return 0.0


class _Alone(Context):
    """A context in which nothing is left of a price but computation: no network, no gradients handed on."""

    __slots__ = ()

    def gradient_price(self) -> float:
        return 0.0


class LeastComputing:
    """Bounds on what plans of one context draw, in seconds at full power."""

    def __init__(self, context: Context) -> None:
        self._waiting, self._context = context.waiting, context
        if self._waiting < 1.0:
            network = _NoNetwork(context.cluster, context.job.stack)
            shared = {field.name: getattr(context, field.name) for field in fields(Context)}
            own: dict[str, Any] = {"paddings": {}, "sharings": {}, "memo": {}}
            alone = _Alone(**shared | own | {"collectives": network, "halved": HalvedBackward(context.ops)})
            self._known = KnownShardings(alone)

    def bound(self, shape: Shape, step: Step | int, seconds: float) -> float:
        """No plan of the shape whose step takes at least so many ``seconds`` draws less; ``step``: how far the bound
        was refined that they are from."""
        if self._waiting == 1.0 or seconds == float("inf"):
            return seconds
        return full_power_s(self._waiting, seconds, self._least_s(shape, step))

    def seconds(self, shape: Shape, step: Step | int, bound: float) -> float:
        """The inverse: seconds of a step from which on a plan surely draws ``bound`` or more."""
        if self._waiting == 1.0 or bound == float("inf"):
            return bound
        return (bound - (1 - self._waiting) * self._least_s(shape, step)) / self._waiting

    def _least_s(self, shape: Shape, step: Step | int) -> float:
        """Seconds that each device computes at least, on average."""
        outline = shape.outline
        if step == Step.ARITHMETIC:
            work = arithmetic_s(self._context.sharing(outline.ep))[1] * outline.micro_batch / outline.ranks
        elif step == Step.OPERATORS:
            work = self._known.of(outline.sharding).unconverted_work()
        else:
            work = self._kinds_s(self._known.of(outline.sharding))
        return outline.micro_batches * work / outline.pp

    def _kinds_s(self, shardings: Shardings) -> float:
        """Of a micro-batch of all blocks, each kind at its own optimum under the best it may choose."""
        if "computing" not in shardings.memo:
            freedom = Counter(self._context.freedom())
            shardings.memo["computing"] = sum(
                count * min(shardings.least_seconds(kind, _on_device(choice)) for choice in choices)
                for (kind, choices), count in freedom.items()
            )
        return float(shardings.memo["computing"])


def _on_device(choice: str) -> str:
    """The same recompute choice, nothing of it waiting on the host: copies are no computation."""
    return replace(Recompute.of(choice), offload=False).name
