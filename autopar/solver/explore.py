"""Branch and bound over meshes, micro-batches, schedules, ZeRO levels, shard groups and offload.

What is to be decided hangs together as a tree: a shape (`space.Shape`: sizes of axes and micro-batches, schedule) has
families (ZeRO level, offload), and these have configurations (shard groups). A bound is refined in steps, each valid
and dearer than the one before (`steps`), until it is priced in full.

First what is likely to be fastest (whatever is sought) is refined and priced, by an estimate that adds what bounds
cannot (`estimates`), until better plans stop coming; then what has the least bound, until the plan is within the gap
asked for, or the least bound is one that only a priced configuration could raise. Then what was passed over because
estimates of others like it were too low is looked at again. What does not promise more than the gap is left alone.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from autopar.solver.computing import LeastComputing
from autopar.solver.config_bounds import (
    loose_bound,
    quick_bound,
    shape_bound,
    stage_bound,
)
from autopar.solver.context import Context
from autopar.solver.crowded import Crowded
from autopar.solver.estimates import estimate
from autopar.solver.found import HOPE, INFINITE, Found
from autopar.solver.intra_ilp import NoShardingError
from autopar.solver.limits import INTERRUPTED, Limits, Progress, Watch
from autopar.solver.missed import Guesses, Missed
from autopar.solver.price import price
from autopar.solver.room import has_room, state_fits
from autopar.solver.shardings import KnownShardings, Shardings
from autopar.solver.space import Config, Family, Shape, open_configs_of
from autopar.solver.steps import Step

Item = Shape | Family | Config
"""What the queue holds."""

NEAR = 0.01
"""How much above the best plan an estimate may be that is looked into before bounds are; what is missed so, and may be
faster, is met again by its bound."""

PROOFS = 600
"""Bounds that are sharpened at most, unless a number of steps is given: of some thousand that are nearly equal, the
least hardly rises."""

AHEAD = 2.5
"""How many times as long as anything may take, by its estimate, what has no stages may take to be looked into first."""

PATIENCE, FIRST, STEPS, BETTER = 8, 3, 1500, 1e-3
"""Configurations priced one after the other that are no better (of those that are looked into first), and steps, after
which no better ones are sought; and how much shorter a step has to be to count as better."""

AGAIN, EACH, REFINED = 12_000, 600, 100
"""Actions of the schedules priced, each at least counted as so many, and steps, when what was passed over is looked at
again."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """Something to refine, after ``step`` steps: no plan of it takes less than ``seconds``, nor less of what is sought
    than ``bound``; likely seconds (``estimate``) with those of the steps before, its place in ``order``."""

    seconds: float
    bound: float
    estimate: float
    order: int
    step: Step
    item: Item
    guesses: Guesses = ()
    proved: bool = False


def explore(
    context: Context,
    space: Iterable[Shape],
    watch: Watch | None = None,
    wanted: Callable[[Config], bool] = lambda _: True,
) -> Found:
    """Branch and bound over the configurations of these shapes (those that are ``wanted``)."""
    walk = _Walk(context, watch or Watch(Limits()), wanted)
    for shape in space:
        if has_room(context, shape.outline):
            walk.add(shape_bound(walk.of(shape), shape), Step.ARITHMETIC, shape)
    walk.meshes = len(walk.left)
    try:
        walk.find()
        walk.prove()
        if walk.look_again():
            walk.prove()
        walk.sharpen()
    except KeyboardInterrupt:
        if walk.found.best is None:
            raise
        walk.watch.stopped = INTERRUPTED
    walk.found.rest = min([walk.found.rest, *(entry.bound for entry in walk.entries.values())])
    return walk.found


class _Walk:
    """The entries of a search that stand, by their order, and how they are worked off."""

    def __init__(self, context: Context, watch: Watch, wanted: Callable[[Config], bool]) -> None:
        self.context, self.watch, self.wanted = context, watch, wanted
        self.known = KnownShardings(context)
        self.least = LeastComputing(context)
        self.found = Found(watch.limits.gap, self.known)
        self.entries: dict[int, _Entry] = {}
        self.left: dict[tuple[int, ...], int] = {}
        self.likely: list[tuple[float, int]] = []
        self.crowded = Crowded()
        self.missed = Missed()
        self.sharpened = 0
        self.seconds: dict[Config, float] = {}
        self.spaces: dict[Shape, list[Config]] = {}
        self.made = self.meshes = 0

    def add(self, seconds: float, step: Step, item: Item, guesses: Guesses = (), least: float = 0.0) -> list[_Entry]:
        """A new entry, if it may be of use. ``least``: a bound that is known of what is sought."""
        bound = max(least, self.least.bound(_shape(item), step, seconds))
        if bound == INFINITE:
            return []
        if not self.found.promising(bound):
            self.found.rest = min(self.found.rest, bound)
            return []
        likely = estimate(self.of(item), item, self.shardings(item), step, seconds)
        entry = _Entry(seconds, bound, likely, self.made, step, item, (*guesses, (step, likely)))
        self.made += 1
        self.entries[entry.order] = entry
        self.left[mesh_of(item)] = self.left.get(mesh_of(item), 0) + 1
        heapq.heappush(self.likely, (entry.estimate, entry.order))
        return [entry]

    def of(self, item: Item) -> Context:
        """The context of the model as the item shares its experts."""
        return self.context.sharing(item.ep if isinstance(item, Config) else _shape(item).outline.ep)

    def shardings(self, item: Item) -> Shardings:
        return self.known.of(item.sharding if isinstance(item, Config) else _shape(item).outline.sharding)

    def find(self) -> None:
        """Work off what is likely to be fastest, until as many priced configurations as `PATIENCE` are no better: first
        what has no stages, which is soon done and says what the rest has to beat. What is not likely to fit comes only
        if nothing else does."""
        stop = AHEAD * min(self.likely, default=(INFINITE, 0))[0]
        self._find([pair for pair in self.likely if mesh_of(self.entries[pair[1]].item)[0] == 1], FIRST, stop)
        self._find([(entry.estimate, entry.order) for entry in self.entries.values()])
        if self.found.best is None:
            self.crowded = Crowded()
            self._find([(entry.estimate, entry.order) for entry in self.entries.values()], patient=True)

    def _find(
        self, likely: list[tuple[float, int]], patience: int = PATIENCE, stop: float = INFINITE, patient: bool = False
    ) -> None:
        found, waited, refined, told = self.found, 0, 0, set()
        heapq.heapify(likely)
        self.likely = likely
        while likely and waited < patience and refined < STEPS:
            guess, order = heapq.heappop(likely)
            entry = self.entries.get(order)
            if entry is None or not found.promising(entry.bound):
                continue
            if not patient and isinstance(entry.item, Config) and self.crowded.has(entry.item):
                continue
            # What was too low for one configuration is likely to be for others.
            missed = self.missed.factor(entry.item, entry.step)
            if missed > 1.0 and order not in told:
                told.add(order)
                heapq.heappush(likely, (guess * missed, order))
                continue
            if guess > stop or (found.best is not None and guess > found.best.step_time * (1 + NEAR)):
                break
            if self.watch.over(found.best is not None):
                return
            before = found.best.sought_s if found.best else INFINITE
            self.refine(entry)
            if found.best is None or entry.step == Step.ARITHMETIC:
                continue
            refined += 1
            if found.best.sought_s < before * (1 - BETTER):
                waited = refined = 0
            elif isinstance(entry.item, Config) and self.seconds.get(entry.item, INFINITE) < INFINITE:
                waited += 1

    def prove(self) -> None:
        """Refine what has the least bound, until no bound stands in the way of the gap, or one that can't be raised:
        where waiting counts for less, and what is fast came first, `PATIENCE` of these that are no better."""
        found, stuck = self.found, 0
        queue = [(entry.bound, entry.order) for entry in self.entries.values()]
        heapq.heapify(queue)
        while queue and found.best is not None and found.promising(queue[0][0]) and not self._proved_enough():
            entry = self.entries[heapq.heappop(queue)[1]]
            if not entry.proved and entry.step >= Step.STAGES:
                bound = self.sharper(entry.item, entry.step, entry.bound)
                entry = self.entries[entry.order] = replace(entry, bound=bound, proved=True)
                heapq.heappush(queue, (bound, entry.order))
                continue
            likely = self.least.bound(_shape(entry.item), entry.step, entry.estimate)
            if entry.step == Step.SPREAD and likely > found.best.sought_s * (1 + HOPE):
                break
            before = found.best.sought_s
            for child in self.refine(entry):
                heapq.heappush(queue, (child.bound, child.order))
            if entry.step == Step.SPREAD and found.promising(entry.bound):
                stuck = 0 if found.best.sought_s < before * (1 - BETTER) else stuck + 1
                if self.context.waiting == 1.0 or stuck == PATIENCE:
                    break

    def look_again(self) -> bool:
        """Price what its own estimate says to be faster than the best plan, whatever was missed of others like it, in
        the order of estimates; what is far from priced is left. Whether a better plan was found."""
        found, before, left, steps = self.found, self.found.best, AGAIN, REFINED
        likely = [(entry.estimate, entry.order) for entry in self.entries.values() if entry.step >= Step.FAMILY]
        heapq.heapify(likely)
        self.likely = likely
        while likely and found.best is not None and left > 0 and steps and not self.watch.over(True):
            guess, order = heapq.heappop(likely)
            entry = self.entries.get(order)
            if guess >= found.best.step_time * (1 - BETTER):
                break
            if entry is None or not found.promising(entry.bound):
                continue
            steps -= 1
            if entry.step == Step.SPREAD:
                shape = _shape(entry.item)
                left -= max(EACH, 2 * shape.outline.micro_batches * shape.outline.pp * shape.vpp)
            self.refine(entry)
        return found.best is not before

    def _proved_enough(self) -> bool:
        """Whether limits end the search, or so many bounds were sharpened that more would tell little."""
        return self.watch.over(True) or (self.watch.limits.work is None and self.sharpened >= PROOFS)

    def sharpen(self) -> None:
        """Raise the bounds of what was priced, the least first, as long as that raises the least of all bounds."""
        found = self.found
        limit = min([found.rest, *(entry.bound for entry in self.entries.values())])
        queue = [(bound, config) for config, bound in found.priced.items()]
        heapq.heapify(queue)
        done = set()
        while queue and found.promising(queue[0][0]) and queue[0][0] < limit and not self.watch.over(True):
            bound, config = heapq.heappop(queue)
            if config in done:
                break
            done.add(config)
            found.priced[config] = self.sharper(config, Step.SPREAD, bound)
            heapq.heappush(queue, (found.priced[config], config))

    def sharper(self, item: Item, step: Step, bound: float) -> float:
        """A bound raised by the paths of its schedule; at the end by recomputation's own ILP and the program of stages
        as well. Infinite if nothing fits."""
        context, shardings = self.of(item), self.shardings(item)
        self.sharpened += 1
        if isinstance(item, Config):
            sharp, enough = step == Step.SPREAD, self.least.seconds(item.shape, step, self.found.enough)
            seconds = stage_bound(context, item, shardings, sharp=sharp, enough=enough)
        else:
            seconds = loose_bound(context, self.space(item), shardings)
        return max(bound, self.least.bound(_shape(item), step, seconds))

    def space(self, item: Shape | Family) -> list[Config]:
        """The configurations of an item, their order open."""
        shape = _shape(item)
        found = self.spaces.get(shape)
        if found is None:
            context = self.of(item)
            space = open_configs_of(shape, context.job, context.cluster, context.fix)
            found = self.spaces[shape] = [one for one in space if self.wanted(one) and state_fits(context, one)]
        if isinstance(item, Family):
            return [one for one in found if (one.zero, one.offload) == (item.zero, item.offload)]
        return found

    def refine(self, entry: _Entry) -> list[_Entry]:
        """One step: what the entry becomes takes its place, which it keeps until then: a Ctrl-C loses no bound."""
        children: list[_Entry] = []
        for seconds, step, item in self._refined(entry):
            children += self.add(max(seconds, entry.seconds), step, item, entry.guesses, entry.bound)
        del self.entries[entry.order]
        self.left[mesh_of(entry.item)] -= 1
        report = self.watch.limits.progress
        if report:
            report(
                Progress(
                    time.perf_counter() - self.watch.begin,
                    self.watch.steps,
                    self.found.best.step_time if self.found.best else None,
                    entry.bound,
                    sum(not number for number in self.left.values()),
                    self.meshes,
                )
            )
        return children

    def _refined(self, entry: _Entry) -> list[tuple[float, Step, Item]]:
        """Itself with a sharper bound, what it consists of, or, once it is priced, nothing."""
        context, item, shardings = self.of(entry.item), entry.item, self.shardings(entry.item)
        if entry.step == Step.SPREAD:
            assert isinstance(item, Config)
            self.found.priced[item] = entry.bound
            seconds = self._price(item, shardings)
            if seconds == INFINITE:
                self._crowd(item, shardings)
            elif entry.estimate < INFINITE:
                self.missed.add(item, entry.guesses, seconds)
            return []
        sharper = Step(entry.step + 1)
        if isinstance(item, Config):
            return [(stage_bound(context, item, shardings, paths=False), sharper, item)]
        if sharper in (Step.OPERATORS, Step.KINDS):
            return [(shape_bound(context, _shape(item), shardings.work(sharper)), sharper, item)]
        space = self.space(item)
        if isinstance(item, Family):
            work, halves = shardings.least_work(), shardings.least_halves()
            return [(quick_bound(context, config, work, halves), sharper, config) for config in space]
        if sharper == Step.STAGES:
            return [(loose_bound(context, space, shardings, paths=False), sharper, item)]
        families: dict[Family, list[Config]] = {}
        for one in space:
            families.setdefault(Family(item, one.zero, one.offload), []).append(one)
        return [(loose_bound(context, some, shardings, paths=False), sharper, one) for one, some in families.items()]

    def _price(self, config: Config, shardings: Shardings) -> float:
        """See `price`; each configuration once."""
        if config not in self.seconds:
            try:
                self.seconds[config] = price(self.of(config), config, shardings, self.found)
            except NoShardingError:  # on no configuration of the shape
                self.seconds[config] = self.found.priced[config] = INFINITE
        return self.seconds[config]

    def _crowd(self, item: Config, shardings: Shardings) -> None:
        """Remember that a configuration does not fit, and whether the one like it that needs least memory does."""
        leanest = max(
            (one for one in self.space(item.shape) if one.zero == item.zero), key=lambda one: (one.offload, one.fsdp)
        )
        known = self.crowded.knows(leanest)
        self.crowded.add(item)
        if not known and leanest != item and self._price(leanest, shardings) == INFINITE:
            self.crowded.add(leanest)


def _shape(item: Item) -> Shape:
    return item if isinstance(item, Shape) else item.shape


def mesh_of(item: Item) -> tuple[int, ...]:
    sizes = item if isinstance(item, Config) else _shape(item).outline
    return sizes.pp, sizes.dp, sizes.cp, sizes.tp
