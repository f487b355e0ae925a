"""A bound for zero 3 without model axis and stages, where which blocks stay gathered is still to be chosen.

The seconds of a step are maxima of sums of those of its parts (`hiding`): a convex function. So they are no less than
where every block runs under its fastest option and none stays gathered, plus what other options add or spare on one
longest way through that step. That is a sum over blocks, and the least of it in the memory there is follows from the
hulls of their options (`chain`), of such sums in place of seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

from autopar.solver.answers import Answered
from autopar.solver.candidates import BlockCost
from autopar.solver.chain import Chain
from autopar.solver.context import Context
from autopar.solver.evaluate import assess, block_time, placed, tied_elements
from autopar.solver.groups import root_blocks
from autopar.solver.hiding import hidden_backward, hidden_forward
from autopar.solver.least_problem import GATHERED
from autopar.solver.space import Config
from autopar.solver.stages import BlockRun, StageProblem

Part = tuple[str, int]
"""What takes seconds, "compute" (copies with it) or "gather", and the block."""


class Traced(float):
    """Seconds that know of which parts they are the sum."""

    parts: tuple[Part, ...]

    def __new__(cls, seconds: float, parts: tuple[Part, ...]) -> Traced:
        made = super().__new__(cls, seconds)
        made.parts = parts
        return made

    def __add__(self, other: float) -> Traced:
        return Traced(float(self) + float(other), self.parts + parts_of(other))

    __radd__ = __add__


def parts_of(seconds: float) -> tuple[Part, ...]:
    """The parts of traced seconds, of others none."""
    return seconds.parts if isinstance(seconds, Traced) else ()


class _Row(NamedTuple):
    """A block: its ``run`` and fastest ``cost``, seconds of its gather and the copies around it; whether the longest
    forward goes through its own seconds and its gather, in how many of a step's backwards it does (``_back``), and
    whether a gradient passes (0 or 1)."""

    run: BlockRun
    cost: BlockCost
    copy_s: float
    gather_s: float
    computes: bool
    computes_back: int
    gathers: bool
    gathers_back: int
    passes: int


def gather_bound(
    context: Context, config: Config, problem: StageProblem, blocks: Sequence[BlockCost], answer: Answered
) -> float:
    """No plan of the configuration takes less. ``problem``: its least problem; ``blocks``: the fastest cost of each,
    none of which stays gathered, of ``answer``, the only one there is. 0 where their copies to the host hide one
    another with the gathers."""
    if any(block.hosted for block in blocks):
        return 0.0
    data, m = placed(context, config, answer.boundary).data, config.micro_batches
    roots, doubles = root_blocks(context.model, range(len(blocks))), tied_elements(context, [blocks])[0][0]
    times = [block_time(context, *one, 0.0) for one in zip(blocks, doubles, roots, strict=True)]
    groups = data.groups(times)
    gathers, copies = groups.gathers[:-1], groups.gather_copies[:-1]
    passes = [0 if time.still else 1 for time in times]
    ahead = _traced("compute", (t.forward_s + copy for t, copy in zip(times, copies, strict=True)))
    back = _traced(
        "compute",
        (
            t.backward_s + reduce + passed * copy
            for t, reduce, passed, copy in zip(times, groups.reduce_copies, passes, copies, strict=False)
        ),
    )
    again = _traced("gather", (passed * gather for passed, gather in zip(passes, gathers, strict=True)))
    reduces = [one + other for one, other in zip(groups.scatters, groups.replicates, strict=True)]
    forward = parts_of(hidden_forward(ahead, _traced("gather", gathers)))
    each, last = (
        parts_of(hidden_backward(back, again, some[:-1], groups.reduce_copies[-1], some[-1]))
        for some in (groups.scatters, reduces)
    )

    def often(part: Part) -> int:
        """How often a step's backwards wait for a part."""
        return (m - 1) * (part in each) + (part in last)

    own = [run for run in problem.runs for _ in range(run.count)]
    rows = [
        _Row(
            run,
            cost,
            copies[i],
            gathers[i],
            ("compute", i) in forward,
            often(("compute", i)),
            ("gather", i) in forward,
            often(("gather", i)),
            passes[i],
        )
        for i, (run, cost) in enumerate(zip(own, blocks, strict=True))
    ]
    runs = []
    for row, alike in groupby(rows):
        through = row.computes * row.copy_s + row.gathers * row.gather_s
        first = through if context.ops.stack.prefetches else row.gather_s + row.copy_s
        spared = m * through - first + row.passes * (row.computes_back * row.copy_s + row.gathers_back * row.gather_s)
        changed = []
        for option in row.run.options:
            other = answer.costs[row.run.kind][option.name.removesuffix(GATHERED)]
            more = m * row.computes * (other.forward_s - row.cost.forward_s)
            more += row.computes_back * (other.backward_s - row.cost.backward_s)
            more -= spared if option.name.endswith(GATHERED) else 0.0
            changed.append(replace(option, forward_s=more, backward_s=0.0))
        runs.append(BlockRun(row.run.kind, len(list(alike)), tuple(changed)))
    none = assess(context, config, [blocks], answer.boundary).step_time
    found = float(Chain(replace(problem, runs=tuple(runs))).seconds(0)[0, -1])
    return none + found - 1e-12 * none


def _traced(name: str, seconds: Iterable[float]) -> list[float]:
    return [Traced(value, ((name, index),)) for index, value in enumerate(seconds)]
