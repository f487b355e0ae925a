"""The shardings of a model on model axes, for a micro-batch size: answers, and proved lower bounds of all there are.

`Shardings.bound` needs the fastest answer, `kind_bounds` the least of each kind alone (`intra_block`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from autopar.solver import intra_block
from autopar.solver.answers import Answers, Found
from autopar.solver.block_tables import TooWideError
from autopar.solver.context import Context
from autopar.solver.decision_costs import boundary_bytes, boundary_parts, decision_price
from autopar.solver.decisions import whole_decisions
from autopar.solver.intra_block import ROUNDING
from autopar.solver.linear import Floats
from autopar.solver.problem import Problem
from autopar.solver.recompute import Recompute, Rerun, moved_of, pieces_of, rerun_of, runs_again
from autopar.solver.shared_bounds import least_part, more_of
from autopar.solver.space import Sharding
from autopar.solver.steps import Step


@dataclass(frozen=True, slots=True)
class KindBound:
    """No decision for the kind needs fewer seconds per rank and micro-batch: nothing recomputed, all recomputed, and
    of the first those of its forward and of its backward."""

    none_s: float
    full_s: float
    forward_s: float
    backward_s: float


@dataclass(frozen=True, slots=True)
class KindBytes:
    """No decision for the kind keeps fewer bytes for backward (``saved``) or as its inputs, nor has fewer at once
    (``peak``)."""

    saved: float
    inputs: float
    peak: float


class KnownShardings:
    """Of one context, found on demand and kept."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._known: dict[Sharding, Shardings] = {}

    def of(self, key: Sharding) -> Shardings:
        if key not in self._known:
            axes, batch, pad_heads, apart, ep = key
            alone = self.of((axes, batch, pad_heads, apart, 1)) if ep > 1 and self.context.ep == 1 else None
            self._known[key] = Shardings(self.context.sharing(ep), axes, batch, pad_heads, apart, alone)
        return self._known[key]


class Shardings(Answers):
    """`Answers`, and bounds. ``alone``: those of the same where no ranks share experts, which bounds follow from
    (`shared_bounds`)."""

    def __init__(
        self,
        context: Context,
        axes: Iterable[tuple[str, int]],
        batch: int,
        pad_heads: int = 1,
        apart: Iterable[int] = (),
        alone: Shardings | None = None,
    ) -> None:
        super().__init__(context, axes, batch, pad_heads, apart)
        self.alone = alone
        self._least_work: float | None = None
        self._least_halves: tuple[float, float] | None = None
        self._unconverted_work: float | None = None
        self._kind_bounds: dict[bool, dict[str, KindBound]] = {}
        self._least_of: dict[tuple[str, frozenset[str]], tuple[float, bool]] = {}
        self._kind_bytes: dict[str, KindBytes] = {}
        self._least_seconds: dict[tuple[str, str, bool], float] = {}
        self._again_of: dict[tuple[str, tuple[str, ...] | None], float] = {}
        self._fastest_ways: dict[str, dict[str, tuple[float, float]]] = {}
        self._fastest_parts: dict[tuple[str, str, frozenset[str] | None], float] = {}
        self._least_moved: dict[tuple[str, str, tuple[str, ...]], float] = {}
        self.memo: dict[Any, Any] = {}

    def kind_bytes(self) -> dict[str, KindBytes]:
        """Per kind, bytes that no decision can undercut: what the whole block keeps, or holds at once, evenly split."""
        context = self.context
        if not self._kind_bytes:
            begin = time.perf_counter()
            for name, decision in whole_decisions(context.model).items():
                kind = context.model.kinds[name]
                # A split vocabulary's cross-entropy keeps less than a whole one's share.
                split = self.size > 1 and any(node.op == "autopar.cross_entropy" for node in kind.graph.of("op"))
                ways = [
                    context.costs.footprint(kind, decision, lean) for lean in ((False, True) if split else (False,))
                ]
                saved = min(way.saved_bytes(self.batch) for way in ways)
                peak = min(way.peak_bytes(self.batch) for way in ways)
                inputs = boundary_bytes(kind, decision, self.batch, context.job)
                self._kind_bytes[name] = KindBytes(saved / self.size, inputs / self.size, peak / self.size)
            context.clock.add("saved bytes", begin)
        return self._kind_bytes

    def kind_bounds(self, sharp: bool = False) -> dict[str, KindBound]:
        """Per kind, seconds that no decision can undercut, whatever the layout between blocks.

        ``sharp``: of wide kinds by ILPs, not their relaxations; recomputation by its own least, not by each operator's
        fastest forward.
        """
        found = self._kind_bounds.get(sharp)
        if found is None:
            found = self._kind_bounds[sharp] = {
                name: self._kind_bound(name, sharp) for name in self.context.model.kinds
            }
        return found

    def _kind_bound(self, name: str, sharp: bool) -> KindBound:
        context = self.context
        forward = self._fastest_forward(name) * (1 - 1e-12)
        backward = self.fastest_part(name, "backward_s") * (1 - 1e-12)
        again = self._fastest_forward(name, runs_again(context.model.kinds[name]).runs) * (1 - 1e-12)
        if self.size == 1:
            cost = self.fastest().costs[name]["none"]
            price, _ = decision_price(context.model.kinds[name], cost.decision, self.prices)
            seconds = price.seconds + context.gradient_price() * self._held(name, cost.trains)
            none = seconds * (1 - 1e-12)
            return KindBound(none, none + again, forward, backward)
        ways = {Recompute.of(choice).recompute for choice in context.choices_of(name)}
        if ways == {"full"}:
            return KindBound(float("inf"), self.least(name, context.always_again(), sharp), forward, backward)
        none = self.least(name, frozenset(), sharp)
        if sharp and "full" in ways:
            return KindBound(none, self.least(name, frozenset(context.model.kinds), sharp), forward, backward)
        return KindBound(none, none + again, forward, backward)

    def least_seconds(self, name: str, choice: str, sharp: bool = False) -> float:
        """Seconds that no decision for the kind can undercut under a recompute choice."""
        key = (name, choice, sharp)
        if key not in self._least_seconds:
            bound, way = self.kind_bounds(sharp)[name], Recompute.of(choice)
            found = bound.none_s
            if way.recompute == "full":
                found = bound.full_s
            elif way.recompute == "selective":
                found += self._again_s(name, way)
            if way.offload:
                # Each way takes as long as its copies do, whatever the seconds above are made of.
                found = max(found, sum(self.least_parts(name, choice)))
            self._least_seconds[key] = found
        return self._least_seconds[key]

    def least_parts(self, name: str, choice: str) -> tuple[float, float]:
        """Seconds that are surely of the forward, and of the backward, whatever the decision for the kind."""
        bound, way = self.kind_bounds(False)[name], Recompute.of(choice)
        forward, backward = bound.forward_s, bound.backward_s + self._again_s(name, way)
        if not way.offload:
            return forward, backward
        copies = self.least_moved(name, choice) / self.context.cluster.device.host_bandwidth * (1 - 1e-12)
        return max(forward, copies), max(backward, copies)

    def _again_s(self, name: str, way: Recompute) -> float:
        """The fastest forward of the operators that surely run again."""
        if way.recompute == "none":
            return 0.0
        key = (name, way.saved if way.recompute == "selective" else None)
        if key not in self._again_of:
            again = runs_again(self.context.model.kinds[name]).runs
            if way.recompute == "selective":
                again = frozenset(self._rerun(name, way.saved).again)
            self._again_of[key] = self._fastest_forward(name, again) * (1 - 1e-12)
        return self._again_of[key]

    def least_work(self) -> float:
        """Seconds of a micro-batch of all blocks, each kind at its own optimum under the best it may choose."""
        if self._least_work is None:
            freedom = Counter(self.context.freedom())
            self._least_work = sum(
                count * min(self.least_seconds(kind, choice) for choice in choices)
                for (kind, choices), count in freedom.items()
            )
        return self._least_work

    def least_halves(self) -> tuple[float, float]:
        """Of a micro-batch of all blocks, seconds that are surely of its forward, and of its backward."""
        if self._least_halves is None:
            parts = [
                (count, [self.least_parts(kind, choice) for choice in choices])
                for (kind, choices), count in Counter(self.context.freedom()).items()
            ]
            ahead, back = (sum(count * min(part[half] for part in of) for count, of in parts) for half in (0, 1))
            self._least_halves = ahead, back
        return self._least_halves

    def work(self, step: int) -> float:
        """What is known of `least_work` at a step: without conversions, or all of it."""
        return self.unconverted_work() if step == Step.OPERATORS else self.least_work()

    def unconverted_work(self) -> float:
        """The same with each operator at its own fastest, conversions free: less, and sooner known."""
        if self._unconverted_work is None:
            self.context.clock.counts["shardings"] += 1
            self._unconverted_work = sum(
                count * min(self._unconverted_s(kind, choice) for choice in choices)
                for (kind, choices), count in Counter(self.context.freedom()).items()
            )
        return self._unconverted_work

    def _unconverted_s(self, name: str, choice: str) -> float:
        both = self._fastest_forward(name) + self.fastest_part(name, "backward_s")
        return both * (1 - 1e-12) + self._again_s(name, Recompute.of(choice))

    def least_kept(self, name: str, choice: str) -> float:
        """Bytes on the device that no decision for the kind can undercut under a recompute choice."""
        least, way = self.kind_bytes()[name], Recompute.of(choice)
        if way.offload:
            return 0.0
        if way.recompute == "none":
            return least.saved
        if way.recompute == "full":
            return min(least.inputs, least.saved)
        return least.inputs + sum(self._rerun(name, way.saved).kept.values()) / self.size

    def least_moved(self, name: str, choice: str) -> float:
        """Bytes per micro-batch that every decision for the kind sends to the host under a choice with offload: of the
        tensors of the whole block those whose even share is large enough to be sent."""
        way = Recompute.of(choice)
        key = (name, way.recompute, way.saved)
        if key not in self._least_moved:
            context, size = self.context, self.size
            kind, whole = context.model.kinds[name], whole_decisions(context.model)[name]
            if way.recompute == "none":
                ways = [context.costs.footprint(kind, whole, lean) for lean in (False, True)]
                # What is one storage of the whole block may be several, one of each tensor, where it is split.
                found = min(
                    sum(nbytes / size for nbytes, view in sizes if moved_of(((view if size > 1 else nbytes) // size,)))
                    for one in (ways if size > 1 else ways[:1])
                    for sizes in [list(zip(one.saved_sizes(self.batch), one.view_sizes(self.batch), strict=True))]
                )
            else:
                parts = boundary_parts(kind, whole, self.batch, context.job)
                if way.recompute == "selective":
                    parts += self._rerun(name, way.saved).kept.values()
                found = sum(nbytes / size for nbytes in parts if moved_of((nbytes // size,)))
            self._least_moved[key] = found
        return self._least_moved[key]

    def _rerun(self, name: str, saved: tuple[str, ...]) -> Rerun:
        """What runs again of a kind that is not split: of its operators the same run again however it is split, and
        each result kept is kept at some place of its way, in one share at least."""
        context, key = self.context, ("rerun", name, saved, self.batch)
        if key not in context.memo:
            pieces = ("pieces", name, self.batch)
            if pieces not in context.memo:
                whole = whole_decisions(context.model)[name]
                context.memo[pieces] = pieces_of(context.model.kinds[name], whole, self.batch, context.job)
            context.memo[key] = rerun_of(context.memo[pieces], saved)
        return cast(Rerun, context.memo[key])

    def _fastest_forward(self, name: str, of: frozenset[str] | None = None) -> float:
        """The fastest forward of each operator (those of these names), conversions free."""
        return self.fastest_part(name, "forward_s", of)

    def fastest_part(self, name: str, part: str, of: frozenset[str] | None = None) -> float:
        """The least of a part of the `Price` of each operator (those of these names), conversions free: ``forward_s``
        or ``backward_s``."""
        key = (name, part, of)
        if key not in self._fastest_parts:
            self._fastest_parts[key] = self._fastest_part(*key)
        return self._fastest_parts[key]

    def _fastest_part(self, name: str, part: str, of: frozenset[str] | None) -> float:
        if self.alone is not None:
            return self.alone.fastest_part(name, part, of) + self.alone.shared_part(name, part, of, self.context.ep)
        least, half = self._fastest_of(name), part == "backward_s"
        graph = self.context.model.kinds[name].graph
        return sum(least[f"{name}/{node.name}"][half] for node in graph.of("op") if of is None or node.name in of)

    def _fastest_of(self, name: str) -> dict[str, tuple[float, float]]:
        """The least seconds forward and backward of any way of each operator, conversions free."""
        if name not in self._fastest_ways:
            if self.size == 1:
                graph = self.context.model.kinds[name].graph
                alone = {node.name: self.prices.operator(node, graph, {})[0] for node in graph.of("op")}
                found = {f"{name}/{node}": (price.forward_s, price.backward_s) for node, price in alone.items()}
            else:
                found = self.priced(name, False).fastest()
            self._fastest_ways[name] = found
        return self._fastest_ways[name]

    def shared_part(self, name: str, part: str, of: frozenset[str] | None, ep: int) -> float:
        """What it adds to `fastest_part` that so many ranks share the experts."""
        if not self.context.any_sharing().has(name):
            return 0.0
        least, half, more = self._fastest_of(name), part == "backward_s", 0.0
        for op, ways in self.priced(name, False, shared=True).shared.items():
            if of is None or op.removeprefix(f"{name}/") in of:
                more += least_part(ways, ep, part) - least[op][half]
        return more

    def least(self, name: str, again: frozenset[str], sharp: bool) -> float:
        """The least seconds of one kind alone, whatever the layout between blocks (one for its inputs and outputs), or
        of a wide kind and unless ``sharp`` what its relaxation says."""
        if self.alone is not None:
            if self.alone.context.any_sharing().has(name):
                return self.alone.least_shared(name, again, self.context.ep)
            return self.alone.least(name, again, sharp)
        known = self._least_of.get((name, again))
        if known is None or (sharp and not known[1]):
            known = self._timed(("least", name, again, sharp), lambda: self._find_least(name, again, sharp))
            self._least_of[name, again] = known
        return known[0]

    def _find_least(self, name: str, again: frozenset[str], sharp: bool) -> tuple[float, bool]:
        prices = self.priced(name, name in again)
        try:
            return float(self.tables(prices.structure).least(prices)) * (1 - ROUNDING), True
        except TooWideError:
            return intra_block.least(self._part(name, again), sharp)

    def least_shared(self, name: str, again: frozenset[str], ep: int) -> float:
        """The same of a kind whose experts so many ranks share (`shared_bounds`)."""
        prices = self.priced(name, name in again, shared=True)
        ways = prices.shared
        found = self._timed(("least shared", name, again), lambda: self._find_shared(name, again, tuple(ways)))
        twice = runs_again(self.context.model.kinds[name]).runs if name in again else frozenset()
        for place, (op, each) in enumerate(ways.items()):
            more = more_of(each, ep, op.removeprefix(f"{name}/") in twice)
            found = found + np.expand_dims(more, tuple(other for other in range(len(ways)) if other != place))
        return float(found.min() + sum(prices.held().values()) / ep) * (1 - ROUNDING)

    def _find_shared(self, name: str, again: frozenset[str], experts: Sequence[str]) -> Floats:
        """The least under each way of experts."""
        prices = self.priced(name, name in again, shared=True)
        try:
            return self.tables(prices.structure).least(prices, experts) * (1 - ROUNDING)
        except TooWideError:
            return intra_block.least_with(self._part(name, again, shared=True), experts)

    def _part(self, name: str, again: frozenset[str], shared: bool = False) -> Problem:
        """The problem of one kind alone."""
        prefix, whole = f"{name}/", self.built(again, shared).problem
        return Problem(
            tuple(source for source in whole.sources if source.name.startswith(prefix)),
            tuple(op for op in whole.ops if op.name.startswith(prefix)),
            {tensor: table for tensor, table in whole.conversions.items() if tensor.startswith(prefix)},
            tuple(output for output in whole.outputs if output.tensor.startswith(prefix)),
            hubs=whole.hubs,
        )

    def _timed(self, what: Any, find: Callable[[], Found]) -> Found:
        """See `_once`; counted as a bound of a kind."""
        begin = time.perf_counter()
        found = self._once(what, find)
        self.context.clock.add("kind bounds", begin)
        self.context.clock.counts["kind bounds"] += 1
        return found
