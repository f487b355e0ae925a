"""Sharding answers for model axes and a micro-batch size: the fastest, and leaner ones.

One answer shards every block kind, with one layout between blocks and one storage of each tied parameter. Answers are
found on demand and kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeVar, cast

from autopar.graph.dispatch import shared_experts
from autopar.recent import Recent
from autopar.sharding.decision import BlockDecision
from autopar.sharding.layout import CONTEXT
from autopar.solver.axis_choices import check_axes
from autopar.solver.block_problem import ModelProblem, model_problem
from autopar.solver.candidates import BlockCost
from autopar.solver.collective_costs import Placement
from autopar.solver.context import Context
from autopar.solver.decision_costs import boundary_bytes, decision_price, local_elements
from autopar.solver.decisions import decisions_of, whole_decisions
from autopar.solver.intra_block import solve
from autopar.solver.kind_prices import KindPrices
from autopar.solver.kind_structure import structure_of
from autopar.solver.kind_tables import KindTables
from autopar.solver.prices import AxisPrices
from autopar.solver.recompute import runs_again
from autopar.solver.structure import Structure

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


Found = TypeVar("Found")

_earlier: Recent[dict[Any, Any]] = Recent(48)
"""Of each of the shardings that this process's searches had last, what they found."""


def _results(context: Context, *key: Any) -> dict[Any, Any]:
    """What earlier searches of this process found of the same shardings: model, device, links, job, what is fixed of a
    block and what of it is priced (the context's class) are the same, and so is how ranks of the model axes lie on
    nodes (in ``key``); the batch of a step and sizes of axes that split no block may differ."""
    if "blocks" not in context.memo:
        fix = replace(context.fix, pp=None, dp=None, zero=None, fsdp=None, schedule=None, vpp=None, stages=(), order=())
        fix = replace(fix, ep=None, reshard=())
        group = context.cluster.groups[0]
        links = (group.intra_node, group.inter_node)
        job = replace(context.job, global_batch=1)
        context.memo["blocks"] = context.model.fingerprint(), job, group.device, links, fix, context.equal_blocks
    return _earlier.get((type(context), *context.memo["blocks"], *key), dict)


def _lie(context: Context, prices: AxisPrices) -> list[Placement]:
    """How ranks that a block's collectives join lie on nodes: those of each model axis, and those that share experts,
    or may (see `prices.exchange_seconds`)."""
    joined = [(size, prices.strides[axis]) for axis, size in prices.axes.items()]
    shared = {shared_experts(kind.graph) for kind in context.model.kinds.values()}.union(context.any_sharing().sizes)
    apart = prod(size for axis, size in prices.axes.items() if axis != CONTEXT)
    joined += [(size, apart) for size in sorted(shared)]
    return [context.collectives.placement(size, stride) for size, stride in joined if size > 1]


class Answers:
    """All answers for model axes of these sizes (outermost first) and ``batch`` samples a micro-batch, heads padded
    to a multiple of ``pad_heads``. ``apart``: how far apart neighbours on each axis are (see `space.Sharding`)."""

    def __init__(
        self,
        context: Context,
        axes: Iterable[tuple[str, int]],
        batch: int,
        pad_heads: int = 1,
        apart: Iterable[int] = (),
    ) -> None:
        self.axes, apart = dict(axes), tuple(apart)
        self.prices = AxisPrices(
            context.ops, context.collectives, self.axes, batch, dict(zip(self.axes, apart, strict=False)) or None
        )
        self.size = self.prices.ranks
        lie = tuple(_lie(context, self.prices))
        self._results = _results(context, tuple(self.axes.items()), batch, pad_heads, apart, lie)
        self.context, self.batch = context.padded(pad_heads), batch
        self._built: dict[tuple[frozenset[str], bool], ModelProblem] = {}
        self._priced: dict[tuple[str, bool, bool], KindPrices] = {}
        self._decisions: dict[str, BlockDecision] = {}
        self._fastest: Answered | None = None
        self._lean: list[Answered] | None = None
        self._total_bound: float | None = None

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
            sharing = context.any_sharing() if shared else None
            found = self._built[again, shared] = self._once(
                ("problem", again, shared),
                lambda: model_problem(
                    context.model, self.prices, context.ties, context.demands(), price, again, context.memo, sharing
                ),
            )
            context.clock.add("strategies", begin)
        return found

    def priced(self, name: str, again: bool, shared: bool = False) -> KindPrices:
        """The prices of one kind, recomputed if ``again``; ``shared``: those of `shared_bounds`."""
        found = self._priced.get((name, again, shared))
        if found is None:
            begin = time.perf_counter()
            sharing = self.context.any_sharing() if shared else None
            found = self._priced[name, again, shared] = self._once(
                ("priced", name, again, shared),
                lambda: KindPrices(self._structure(name, again), self.prices, self.context.gradient_price(), sharing),
            )
            self.context.clock.add("strategies", begin)
        return found

    def tables(self, structure: Structure) -> KindTables:
        """Those of a structure. Raises TooWideError."""
        memo, key = self.context.memo, ("tables", id(structure))
        if key not in memo:
            memo[key] = KindTables(structure)
        return cast(KindTables, memo[key])

    def _structure(self, name: str, again: bool) -> Structure:
        context = self.context
        demands = context.demands()
        check_axes(context.model, self.prices.axes, context.job.seq_len, demands.sequence)
        return structure_of(context.model.kinds[name], self.prices, context.ties, demands, again, context.memo)

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
                    again = runs_again(kind).runs if name in context.always_again() else frozenset()
                    forwards = (
                        self.prices.operator(node, kind.graph, {})[0].forward_s
                        for node in kind.graph.of("op")
                        if node.name in again
                    )
                    twice = float(sum(forwards))
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
        self.context.clock.add("answers", begin)
        self.context.clock.counts["answers"] += 1
        return decisions_of(self.context.model, built, answer), answer.bound

    def _answered(self, name: str, decisions: dict[str, BlockDecision]) -> Answered:
        begin = time.perf_counter()
        found = self._once(("answered", name), lambda: self._costs(name, decisions))
        self.context.clock.add("saved bytes", begin)
        return found

    def _costs(self, name: str, decisions: dict[str, BlockDecision]) -> Answered:
        context = self.context
        costs = {
            k: context.costs.of(context.model.kinds[k], d, self.prices, ("none", *context.choices_of(k)))
            for k, d in decisions.items()
        }
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
