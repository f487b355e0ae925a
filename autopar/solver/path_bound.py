"""The bound of the longest path (`paths`) for a stage problem: what its blocks take together, and every stage at least.

Blocks are whole, no stage is empty and the chain keeps its order, so that stage s of S has one of the blocks s to
N - S + s at least. Of a block's seconds some may fall to its forward or to its backward (``Option.either_s``), of a
halved backward only some are sure to be of one half; the others count with whichever the path passes less often. What
memory forces blocks to run again (`laps.forced_seconds`) is backward.

`program_bound` is the linear program of all that: how many blocks of each run are in each stage, under which option, in
parts, so that every rank and its host fit at some times (`standing`), and the step is as long as every path found, and
as every rank's own work. It leaves out that stages are contiguous.
"""

from __future__ import annotations

import numpy as np

from autopar.solver.chain import Chain, chain_of, fastest, least_of_stages, work_of
from autopar.solver.laps import BYTES, forced_seconds
from autopar.solver.linear import INFEASIBLE, OPTIMAL, TOLERANCE, Rows, solve_linear
from autopar.solver.paths import Weights, weights
from autopar.solver.stages import BlockRun, Option, StageProblem

LEVELS = (0.9, 0.7, 0.5, 0.35, 0.2, 0.0)
"""Shares of the work that stages surely have, for which paths are sought."""

ONCE = (1.0, 0.3, 0.1, 0.03, 0.0)
"""What first forwards and last backwards take more, against a micro-batch's work, for which paths are sought."""


def path_bound(problem: StageProblem) -> float:
    """No spread over the stages is faster under the problem's schedule; 0 where nothing is known."""
    chain = chain_of(problem)
    found = _weights(problem, chain)
    if found is None:
        return 0.0
    ahead, inputs, weight, first, last = found.average
    loose = np.minimum(inputs, weight) if found.halved else inputs
    either = np.minimum(ahead, loose)
    ahead_s, back_s, first_s, last_s = problem.beside_s()
    total = float(loose.min()) * forced_seconds(problem, chain) + float(ahead @ ahead_s + loose @ back_s)
    for counts, part in (
        (ahead, "ahead"),
        (inputs, "inputs"),
        (weight, "weight"),
        (loose, "loose"),
        (either, "either"),
    ):
        values = np.array([_parts(problem, run)[part] for run in problem.runs])[chain.run_of]
        least = least_of_stages(values, problem.stages)
        total += float(counts @ least) + float(counts.min()) * max(0.0, float(values.sum() - least.sum()))
    total += float(first @ first_s + last @ last_s)
    return total * (1 - 1e-9) + float(chain.optimizer[-1]) / problem.pp


def _parts(problem: StageProblem, run: BlockRun) -> dict[str, float]:
    """Seconds of a block's fastest option by what they surely are: forward (the least of any option), either half of
    the backward, backward of no certain half, forward or backward."""
    option = run.options[fastest(run)]
    return _split(problem, option, min(o.forward_s for o in run.options), work_of(option))


def _split(problem: StageProblem, option: Option, ahead: float, work: float) -> dict[str, float]:
    either = min(option.either_s, work - ahead)
    inputs = weight = 0.0
    loose = work - ahead - either
    if problem.halves:
        inputs = min(option.sure_input_s, loose)
        weight = min(option.sure_weight_s, loose - inputs)
        loose -= inputs + weight
    return {"ahead": ahead, "inputs": inputs, "weight": weight, "loose": loose, "either": either}


def _weights(problem: StageProblem, chain: Chain) -> Weights | None:
    """The paths that suit a problem."""
    works = np.array([work_of(run.options[fastest(run)]) for run in problem.runs])[chain.run_of]
    beside = problem.beside_s()
    each, ends = float(beside[:2].sum()), float(beside[2:].sum())
    total = float(works.sum()) + each
    sure = float(least_of_stages(works, problem.stages).sum()) + each
    level = next(level for level in LEVELS if level * total <= sure)
    once = next(share for share in ONCE if share * total <= ends)
    return weights(problem.schedule, problem.pp, problem.vpp, problem.micro_batches, level, once)


def program_bound(problem: StageProblem) -> float:
    """The optimum of the linear program, infinite where it has none; 0 where no paths are known."""
    chain = chain_of(problem)
    found = _weights(problem, chain)
    if found is None:
        return 0.0
    rows = Rows()
    step, stages = rows.variables([float("inf")])[0], problem.stages
    options = [(r, option) for r, run in enumerate(problem.runs) for option in run.options]
    run_of = np.array([r for r, _ in options])
    most = [float(problem.runs[r].count) for r, _ in options]
    counts = [rows.variables(most) for _ in range(stages)]
    for r, run in enumerate(problem.runs):
        mine = [row[place] for row in counts for place in np.flatnonzero(run_of == r)]
        rows.add(mine, np.ones(len(mine)), run.count, run.count)
    for row in counts:
        rows.add(row, np.ones(len(row)), 1.0)
    optimizer = float(chain.optimizer[-1]) / problem.pp
    m, (ahead_s, back_s, first_s, last_s) = problem.micro_batches, problem.beside_s()
    beside = m * (ahead_s + back_s) + first_s + last_s
    works = np.array([work_of(option) for _, option in options])
    nbytes = np.array([(o.resident, o.inflight, o.gradients, o.hosted) for _, o in options])
    resident, inflight, gradients, hosted = nbytes.T
    for rank in range(problem.pp):
        own = problem.own(rank)
        mine = [one for stage in own for one in counts[stage]]
        own_s = float(beside[list(own)].sum())
        rows.add([step, *mine], np.array([1.0, *np.tile(-m * works, len(own))]), own_s + optimizer)
        for held in problem.standing(rank):
            needed = np.concatenate([resident + alive * inflight + kept * gradients for alive, kept in held])
            rows.add(mine, needed / BYTES, -float("inf"), problem.spare(rank) / BYTES)
        if problem.host_room < float("inf"):
            waiting = np.concatenate([alive * hosted for alive in problem.most_alive(rank)])
            rows.add(mine, waiting / BYTES, -float("inf"), problem.host_room / BYTES)
    everything = [step, *(one for row in counts for one in row)]
    parts = [_split(problem, option, option.forward_s, work_of(option)) for _, option in options]
    sizes = np.array([[part[name] for part in parts] for name in ("ahead", "inputs", "weight", "loose", "either")])
    for ahead, inputs, weight, first, last in found.every:
        loose = np.minimum(inputs, weight) if found.halved else inputs
        either = np.minimum(ahead, loose)
        takes = np.stack([ahead, inputs, weight, loose, either], axis=1) @ sizes
        known = float(ahead @ ahead_s + loose @ back_s + first @ first_s + last @ last_s)
        rows.add(everything, np.concatenate([[1.0], -takes.ravel()]), known + optimizer)
    linear = rows.least(step)
    solver, status = solve_linear(linear)
    if status == INFEASIBLE:
        return float("inf")
    return float(solver.objective_value) * (1 - TOLERANCE) if status == OPTIMAL else 0.0
