"""Sharding answers for model axes and a micro-batch size: the fastest, leaner ones, and proved lower bounds.

One answer shards every block kind, with one layout between blocks and one storage of each tied parameter. Answers are
found on demand and kept; `Shardings.cheap_bound` needs a linear program, `bound` the fastest answer's ILP,
`kind_bounds` one small ILP per kind.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeVar

from autopar.recent import Recent
from autopar.sharding.decision import BlockDecision
from autopar.solver.block_problem import ModelProblem, model_problem
from autopar.solver.candidates import BlockCost
from autopar.solver.context import Context
from autopar.solver.decision_costs import boundary_bytes, boundary_parts, decision_price, local_elements
from autopar.solver.decisions import decisions_of, whole_decisions
from autopar.solver.intra_block import relaxed_bound, solve
from autopar.solver.prices import AxisPrices
from autopar.solver.problem import Problem
from autopar.solver.recompute import Recompute, Rerun, moved_of, rerun, runs_again
from autopar.solver.shared_bounds import part_shift, seconds_shift
from autopar.solver.space import Sharding

LEAN = (0.3, 3.0)
"""Prices of memory for leaner answers, as the share of a micro-batch's seconds that all its saved bytes would cost."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One way to shard all kinds. ``costs``: per kind and recompute choice. ``boundary``: local bytes of what a stage
    hands to the next. ``signature``: layouts between blocks and of tied parameters; blocks of
    answers with equal ones can be mixed."""

    name: str
    costs: dict[str, dict[str, BlockCost]]
    boundary: int
    signature: tuple[str, ...]


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
    """No decision for the kind keeps fewer bytes for backward (``saved``) or as its inputs."""

    saved: float
    inputs: float


Found = TypeVar("Found")

_earlier: Recent[dict[Any, Any]] = Recent(48)
"""Of each of the shardings that this process's searches had last, what they found."""


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


def _results(context: Context, *key: Any) -> dict[Any, Any]:
    """What earlier searches of this process found of the same shardings: model, device, links, job and what is fixed of
    a block are the same; the batch of a step and sizes of axes that split no block may differ."""
    if "blocks" not in context.memo:
        fix = replace(context.fix, pp=None, dp=None, zero=None, fsdp=None, schedule=None, vpp=None, stages=(), order=())
        fix = replace(fix, ep=None)
        group = context.cluster.groups[0]
        links = (group.devices_per_node, group.intra_node, group.inter_node)
        job = replace(context.job, global_batch=1)
        context.memo["blocks"] = context.model.fingerprint(), job, group.device, links, fix, context.equal_blocks
    return _earlier.get((*context.memo["blocks"], *key), dict)


class Shardings:
    """All answers for model axes of these sizes (outermost first) and ``batch`` samples a micro-batch, heads padded
    to a multiple of ``pad_heads``. ``apart``: how far apart neighbours on each axis are (see `space.Sharding`);
    ``alone``: those of the same where no ranks share experts, which bounds follow from (`shared_bounds`)."""

    def __init__(
        self,
        context: Context,
        axes: Iterable[tuple[str, int]],
        batch: int,
        pad_heads: int = 1,
        apart: Iterable[int] = (),
        alone: Shardings | None = None,
    ) -> None:
        self.axes, apart, self.alone = dict(axes), tuple(apart), alone
        self._results = _results(context, tuple(self.axes.items()), batch, pad_heads, apart)
        self.context, self.batch = (context := context.padded(pad_heads)), batch
        self.prices = AxisPrices(
            context.ops, context.collectives, self.axes, batch, dict(zip(self.axes, apart, strict=False)) or None
        )
        self.size = self.prices.ranks
        self._built: dict[tuple[frozenset[str], bool], ModelProblem] = {}
        self._decisions: dict[str, BlockDecision] = {}
        self._fastest: Answered | None = None
        self._lean: list[Answered] | None = None
        self._relaxed: dict[bool, float] = {}
        self._cheap: float | None = None
        self._least_work: float | None = None
        self._total_bound: float | None = None
        self._kind_bounds: dict[bool, dict[str, KindBound]] = {}
        self._least_of: dict[tuple[str, frozenset[str], bool], float] = {}
        self._kind_bytes: dict[str, KindBytes] = {}
        self._least_seconds: dict[tuple[str, str, bool], float] = {}
        self._reruns: dict[tuple[str, tuple[str, ...]], Rerun] = {}
        self._again_of: dict[tuple[str, tuple[str, ...] | None], float] = {}
        self._least_moved: dict[tuple[str, str, tuple[str, ...]], float] = {}
        self.memo: dict[Any, Any] = {}

    def _once(self, what: Any, find: Callable[[], Found]) -> Found:
        """What an earlier search found, or else is found now. A search counts as work what it asks for, found or not:
        then its account does not depend on what came before."""
        if what not in self._results:
            self._results[what] = find()
        found: Found = self._results[what]
        return found

    def built(self, again: frozenset[str], shared: bool = False) -> ModelProblem:
        """The problem of all kinds; those of ``again`` are recomputed. ``shared``: that of `shared_bounds`."""
        found = self._built.get((again, shared))
        if found is None:
            begin = time.perf_counter()
            context = self.context
            price = context.gradient_price()
            sharing = context.sharing_sizes() if shared else None
            found = self._built[again, shared] = self._once(
                ("problem", again, shared),
                lambda: model_problem(
                    context.model, self.prices, context.ties, context.demands(), price, again, context.memo, sharing
                ),
            )
            context.clock.add("strategies", begin)
            context.clock.counts["sharding problems"] += 1
        return found

    def cheap_bound(self) -> float:
        """Seconds of all blocks for one micro-batch by the ILP's linear relaxation: no sharding needs fewer."""
        if self.size == 1:
            return self.bound()
        if self.alone is None:
            return self.relaxed()
        if self._cheap is None:
            again = self.context.always_again()
            shifts = (count * self._shift(kind, again) for kind, count in self.context.counts.items())
            self._cheap = self.alone.relaxed(shared=True) + sum(shifts)
        return self._cheap

    def relaxed(self, shared: bool = False) -> float:
        """The optimum of the relaxation. ``shared``: see `built`."""
        if shared not in self._relaxed:
            problem = self.built(self.context.always_again(), shared).problem
            begin = time.perf_counter()
            self._relaxed[shared] = self._once(("relaxed", shared), lambda: relaxed_bound(problem))
            self.context.clock.add("relaxations", begin)
            self.context.clock.counts["relaxations"] += 1
        return self._relaxed[shared]

    def _shift(self, name: str, again: frozenset[str]) -> float:
        """How much more a kind takes at least than by the least of any sharing of experts."""
        assert self.alone is not None
        kind, ep = self.context.model.kinds[name], self.context.ep
        twice = runs_again(kind).runs if name in again else frozenset()
        shared = self.alone.built(again, shared=True).shared
        found = [
            seconds_shift(ways, ep, node in twice)
            for node in kind.graph.nodes
            if (ways := shared.get(f"{name}/{node}"))
        ]
        return sum(found) * (1 - 1e-12)

    def bound(self) -> float:
        """Seconds of all blocks for one micro-batch: no sharding on this axis needs fewer."""
        if self._total_bound is None:
            context = self.context
            if self.size == 1:
                self._decisions = whole_decisions(context.model)
                seconds = 0.0
                for name, decision in self._decisions.items():
                    kind = context.model.kinds[name]
                    price, _ = decision_price(kind, decision, self.prices)
                    trains = local_elements(kind, decision) - local_elements(kind, decision, frozen=True)
                    handed = context.gradient_price() * self._held(name, trains)
                    twice = (
                        self._fastest_forward(name, runs_again(kind).runs) if name in context.always_again() else 0.0
                    )
                    seconds += context.counts[name] * (price.seconds + twice + handed)
                self._total_bound = seconds * (1 - 1e-12)
            else:
                self._decisions, self._total_bound = self._solve(0.0, context.always_again())
        return self._total_bound

    def fastest(self) -> Answered:
        """The answer with the least seconds."""
        if self._fastest is None:
            self.bound()
            self._fastest = self._answered("", self._decisions)
        return self._fastest

    def ways(self) -> list[tuple[float, frozenset[str]]]:
        """What each answer is the best for: the price of a byte, the kinds that are recomputed. The fastest first."""
        fast, counts = self.fastest(), self.context.counts
        plainly = {k: fast.costs[k]["none"] for k in counts}
        seconds = sum(n * (plainly[k].forward_s + plainly[k].backward_s) for k, n in counts.items())
        saved = sum(n * plainly[k].inflight for k, n in counts.items())
        plain, every = self.context.always_again(), frozenset(self.context.model.kinds)
        return [(0.0, plain), (0.0, every), *((share * seconds / max(saved, 1), plain) for share in LEAN)]

    def lean(self) -> list[Answered]:
        """Answers that keep fewer bytes, not all different."""
        if self._lean is None:
            self._lean = []
            for index, (byte_price, again) in enumerate(self.ways()[1:] if self.size > 1 else ()):
                answer = self._answered(f"lean{index}", self._solve(byte_price, again)[0])
                if all(answer.costs != known.costs for known in (self.fastest(), *self._lean)):
                    self._lean.append(answer)
        return self._lean

    def kind_bytes(self) -> dict[str, KindBytes]:
        """Per kind, bytes that no decision can undercut: what the whole block keeps, evenly split."""
        context = self.context
        if not self._kind_bytes:
            begin = time.perf_counter()
            for name, decision in whole_decisions(context.model).items():
                kind = context.model.kinds[name]
                # A split vocabulary's cross-entropy keeps less than a whole one's share.
                saved = context.costs.saved(kind, decision, self.batch)
                if self.size > 1 and any(node.op == "autopar.cross_entropy" for node in kind.graph.of("op")):
                    saved = min(saved, context.costs.saved(kind, decision, self.batch, lean=True))
                inputs = boundary_bytes(kind, decision, self.batch, context.job)
                self._kind_bytes[name] = KindBytes(saved / self.size, inputs / self.size)
            context.clock.add("saved bytes", begin)
        return self._kind_bytes

    def kind_bounds(self, sharp: bool = False) -> dict[str, KindBound]:
        """Per kind, seconds that no decision can undercut, whatever the layout between blocks.

        ``sharp``: recomputation bounded by an ILP of its own, not by each operator's fastest forward.
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
            return KindBound(float("inf"), self.least(name, context.always_again()), forward, backward)
        none = self.least(name, frozenset())
        if sharp and "full" in ways:
            return KindBound(none, self.least(name, frozenset(context.model.kinds)), forward, backward)
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
        key = (name, saved)
        if key not in self._reruns:
            context = self.context
            whole = whole_decisions(context.model)[name]
            self._reruns[key] = rerun(context.model.kinds[name], whole, saved, self.batch, context.job)
        return self._reruns[key]

    def _fastest_forward(self, name: str, of: frozenset[str] | None = None) -> float:
        """The fastest forward of each operator (those of these names), conversions free."""
        return self.fastest_part(name, "forward_s", of)

    def fastest_part(self, name: str, part: str, of: frozenset[str] | None = None) -> float:
        """The least of a part of the `Price` of each operator (those of these names), conversions free."""
        graph = self.context.model.kinds[name].graph
        nodes = [node for node in graph.of("op") if of is None or node.name in of]
        if self.size == 1:
            return float(sum(getattr(self.prices.operator(node, graph, {})[0], part) for node in nodes))
        if self.alone is not None:
            kind, other = (shardings.context.model.kinds[name] for shardings in (self, self.alone))
            shift = part_shift(self.prices, self.alone.built(frozenset()).choices, kind, other, part, of)
            return self.alone.fastest_part(name, part, of) + shift
        ways = self.built(frozenset()).choices
        return sum(
            min(float(getattr(self.prices.operator(node, graph, way)[0], part)) for way in ways[f"{name}/{node.name}"])
            for node in nodes
        )

    def least(self, name: str, again: frozenset[str], shared: bool = False) -> float:
        """The least seconds of one kind alone, whatever the layout between blocks (one for its inputs and outputs).
        ``shared``: see `built`."""
        if self.alone is not None:
            shared = self.alone.context.sharing_sizes().has(name)
            return self.alone.least(name, again, shared) + self._shift(name, again)
        if (name, again, shared) in self._least_of:
            return self._least_of[name, again, shared]
        begin = time.perf_counter()
        prefix = f"{name}/"
        whole = self.built(again, shared).problem
        part = Problem(
            tuple(source for source in whole.sources if source.name.startswith(prefix)),
            tuple(op for op in whole.ops if op.name.startswith(prefix)),
            {tensor: table for tensor, table in whole.conversions.items() if tensor.startswith(prefix)},
            tuple(output for output in whole.outputs if output.tensor.startswith(prefix)),
            hubs=whole.hubs,
        )
        # What stands for every sharing of experts is loose anyway: its relaxation will do.
        find = (lambda: relaxed_bound(part)) if shared else (lambda: solve(part).bound)
        bound = self._once(("least", name, again, shared), find)
        self._least_of[name, again, shared] = bound
        self.context.clock.add("bounds", begin)
        self.context.clock.counts["intra-block ILPs"] += 1
        return bound

    def _held(self, kind: str, elements: int) -> float:
        """``elements`` of a kind, tied ones shared out between the kinds that hold them (as the ILP's sources are)."""
        nodes = self.context.model.kinds[kind].graph.of("parameter")
        ties = self.context.ties.parameters
        tied = [node for node in nodes if node.meta.requires_grad and (kind, node.name) in ties]
        return elements - 0.5 * sum(prod(node.meta.at(1, 1)) for node in tied)

    def _solve(self, byte_price: float, again: frozenset[str]) -> tuple[dict[str, BlockDecision], float]:
        built = self.built(again)
        begin = time.perf_counter()
        answer = self._once(("answer", byte_price, again), lambda: solve(built.problem, byte_price))
        self.context.clock.add("intra-block ILP", begin)
        self.context.clock.counts["intra-block ILPs"] += 1
        return decisions_of(self.context.model, built, answer), answer.bound

    def _answered(self, name: str, decisions: dict[str, BlockDecision]) -> Answered:
        begin = time.perf_counter()
        context = self.context
        costs = {
            k: context.costs.of(context.model.kinds[k], d, self.prices, ("none", *context.choices_of(k)))
            for k, d in decisions.items()
        }
        context.clock.add("saved bytes", begin)
        return Answered(name, costs, self._boundary(decisions), self._signature(decisions))

    def _signature(self, decisions: dict[str, BlockDecision]) -> tuple[str, ...]:
        ties = self.context.ties
        found = {tie: str(decisions[kind].inputs[node]) for (kind, node), tie in ties.parameters.items()}
        for (kind, *rest), tie in ties.boundary.items():
            if len(rest) == 1:
                found[tie] = str(decisions[kind].inputs[rest[0]])
        return tuple(f"{tie}: {layout}" for tie, layout in sorted(found.items()))

    def _boundary(self, decisions: dict[str, BlockDecision]) -> int:
        """The most bytes any block hands in."""
        kinds = self.context.model.kinds
        return max(boundary_bytes(kinds[k], d, self.batch, self.context.job) for k, d in decisions.items())
