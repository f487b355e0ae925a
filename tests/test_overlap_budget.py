"""Overlap has a budget: communication hidden behind computation is never more than either of them.

Of a time T in which C seconds of computation and N of communication run, hidden is C + N - T. Checked for thousands of
random stages of FSDP2 groups, against what `DataAxis` says its gathers, reductions and copies take one by one."""

from __future__ import annotations

import dataclasses
import random

import pytest

from autopar.cluster import Cluster
from autopar.job import Job
from autopar.solver.collective_costs import CollectiveCosts
from autopar.solver.data_axis import BlockTime, DataAxis, stage_events
from autopar.solver.hiding import hidden_backward, hidden_forward
from autopar.solver.op_costs import OpCosts
from autopar.solver.simulate import simulate

ROUNDING = 1e-9


def seconds(draw: random.Random) -> float:
    """Nothing, one, or something heavy-tailed."""
    style = draw.random()
    return 0.0 if style < 0.2 else 1.0 if style < 0.3 else draw.lognormvariate(0.0, draw.choice((0.5, 2.0)))


def within(total: float, compute: float, communication: float) -> None:
    """``total`` hides no more than there is, of either."""
    hidden = compute + communication - total
    slack = ROUNDING * (compute + communication)
    assert hidden <= min(compute, communication) + slack
    assert hidden >= -slack  # nor is anything waited for that does not run


def test_random_channels_stay_within_their_budget() -> None:
    draw = random.Random(0)
    hides = 0
    for _ in range(4000):
        blocks = draw.randint(1, 8)
        compute, gathers, reduces = ([seconds(draw) for _ in range(blocks)] for _ in range(3))
        after, last = draw.choice((0.0, seconds(draw))), draw.choice((0.0, seconds(draw)))
        forward = hidden_forward(compute, gathers)
        within(forward, sum(compute), sum(gathers))
        # The first gather has nothing before it.
        assert forward >= gathers[0] + sum(compute) - ROUNDING * forward
        backward = hidden_backward(compute, gathers, reduces, after, last)
        within(backward, sum(compute) + after, sum(gathers) + sum(reduces) + last)
        # Nor has the first of the backward; and what reduces last comes after all that computes.
        assert backward >= gathers[-1] + sum(compute) + after + last - ROUNDING * backward
        hides += forward < sum(compute) + sum(gathers)
    assert hides > 1000


def test_more_work_takes_no_less() -> None:
    """What the enumeration and the bounds lean on."""
    draw = random.Random(1)
    for _ in range(2000):
        blocks = draw.randint(1, 6)
        rows = [[seconds(draw) for _ in range(blocks)] for _ in range(3)]
        grown = [[one + draw.choice((0.0, seconds(draw))) for one in row] for row in rows]
        assert hidden_forward(*rows[:2]) <= hidden_forward(*grown[:2]) * (1 + ROUNDING)
        # A reduction that is not there does not wait for its block, so that zeros stay zeros.
        grown[2] = [more if one else 0.0 for one, more in zip(rows[2], grown[2], strict=True)]
        assert hidden_backward(*rows) <= hidden_backward(*grown) * (1 + ROUNDING)


def data_axis(draw: random.Random, zero: int, halves: bool) -> DataAxis:
    nodes, inside = draw.choice(((1, 8), (2, 4), (8, 8)))
    cluster = Cluster.parse(f"{nodes}x{inside}:h100")
    slower = 10 ** draw.uniform(0, 3)
    links = {
        name: dataclasses.replace(link, bandwidth=link.bandwidth / slower)
        for name, link in (("intra_node", cluster.intra_node), ("inter_node", cluster.inter_node))
    }
    cluster = cluster.with_links(**links)
    size = cluster.devices
    group = draw.choice((size, inside)) if zero else 1
    job = Job(64, 64, draw.choice(("bf16", "fp32")))
    count, offload = draw.choice((1, 2, 8)), draw.choice(("none", "none", "state"))
    return DataAxis(
        OpCosts(cluster.device, job), CollectiveCosts(cluster), (((size, 1),),), zero, group, count, halves, offload
    )


def blocks_of(draw: random.Random) -> list[BlockTime]:
    """Some without parameters, some frozen (the first of them without a backward), ends in the root group."""
    count = draw.randint(1, 7)
    frozen = draw.choice((0, 0, 0, draw.randint(0, count)))
    found = []
    for place in range(count):
        elements = draw.choice((0, 1, 10**6, 10**8, draw.randint(1, 10**9)))
        still = place < frozen
        root = place in (0, count - 1) and draw.random() < 0.5
        ahead = 1e-3 * seconds(draw)
        back = 0.0 if still else 2e-3 * seconds(draw)
        weights = draw.random() * back
        stays = draw.random() < 0.3
        frozen_elements = elements if still else 0
        found.append(BlockTime(ahead, back, elements, root, weights, frozen_elements, still, gathered=stays))
    return found


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("zero", range(4))
def test_stages_hide_no_more_than_they_compute(zero: int, halves: bool) -> None:
    draw = random.Random(zero)
    hides = 0
    for _ in range(300):
        axis, blocks = data_axis(draw, zero, halves and zero <= 1), blocks_of(draw)
        times = axis.stage(blocks)
        m = axis.micro_batches
        step = simulate(stage_events([times]), m, schedule="none").total
        groups = [(b.elements, b.trains, b.still, b.gathered) for b in blocks if not b.root]
        rooted = [b for b in blocks if b.root]
        root = sum(b.elements for b in rooted), sum(b.trains for b in rooted)
        # Gathers, and how often: each forward and backward under zero 3 (forwards alone of what has no backward, and
        # once of what stays gathered).
        wire = copies = 0.0
        for elements, trains, still, stays in groups:
            often = m * (1 if still else 2) if axis.gathers_each and not stays else 1
            wire += often * axis.gather_s(elements)
            copies += often * axis.gather_copy_s(elements) if elements else 0.0
            copies += m * axis.reduce_copy_s(trains) if trains else 0.0
        often = m if axis.gathers_each and not all(b.still for b in blocks) else 1
        wire += often * axis.gather_s(root[0])
        copies += often * axis.gather_copy_s(root[0]) if root[0] else 0.0
        copies += m * axis.reduce_copy_s(root[1]) if root[1] else 0.0
        for trains in (*(trains for _, trains, _, _ in groups), root[1]):
            wire += (1 if axis.defers else m) * axis.scatter_s(trains) + axis.replicate_s(trains)
        compute = m * sum(b.forward_s + b.backward_s for b in blocks) + copies
        within(step, compute, wire)
        hides += wire > 0 and step < (compute + wire) * (1 - 1e-6)
    assert hides > 30
