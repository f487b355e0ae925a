"""A plan costs what the search said, by code that does not share its tables; and the data axis hides what it can."""

import dataclasses

import pytest
from dense_decoder import decoder

from autopar.cluster import Cluster
from autopar.errors import AutoparError, BadInputError
from autopar.job import Job
from autopar.solver.collective_costs import CollectiveCosts
from autopar.solver.data_axis import BlockTime, DataAxis, hidden_backward, hidden_forward
from autopar.solver.op_costs import OpCosts
from autopar.solver.reprice import check_price, price_plan, reprice
from autopar.solver.search import search

JOB = Job(global_batch=16, seq_len=64)
FIXES = [
    {},
    {"dp": 8, "zero": 0},
    {"dp": 8, "zero": 3},
    {"tp": 8},
    {"pp": 4, "dp": 2, "zero": 3},
    {"pp": 2, "tp": 2, "recompute": "full"},
]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fix", FIXES)
def test_agrees_with_the_search(fix, tied):
    model = decoder(4, tied=tied)
    plan = search(model, JOB, Cluster.parse("1x8:h100"), fix)
    priced = reprice(plan, model)
    assert priced.step_time == pytest.approx(plan.predicted.step_time, rel=1e-9)
    assert priced.mfu == pytest.approx(plan.predicted.mfu, rel=1e-9)
    assert priced.memory == plan.predicted.memory
    assert all(stage["total"] == sum(stage.values()) - stage["total"] for stage in plan.predicted.memory)
    assert [sum(m.values()) for m in price_plan(plan, model).memory] == [s.total_bytes for s in plan.stages]


def test_a_wrong_figure_is_found():
    model = decoder(2)
    plan = search(model, JOB, Cluster.parse("1x4:h100"))
    check_price(plan, model)
    wrong = dataclasses.replace(plan.predicted, step_time=plan.predicted.step_time * 1.0001)
    with pytest.raises(AutoparError, match="says its step time is"):
        check_price(dataclasses.replace(plan, predicted=wrong), model)
    stage = dataclasses.replace(plan.stages[0], memory={**plan.stages[0].memory, "optimizer": 1})
    with pytest.raises(AutoparError, match="says its memory of stage 0"):
        check_price(dataclasses.replace(plan, stages=(stage, *plan.stages[1:])), model)


def test_another_model_is_refused():
    plan = search(decoder(2), JOB, Cluster.parse("1x4:h100"))
    with pytest.raises(BadInputError, match="another model"):
        reprice(plan, decoder(3))


def test_slower_links_cost_more():
    model = decoder(2)
    plan = search(model, JOB, Cluster.parse("1x4:h100"), {"tp": 4})
    link = plan.cluster.intra_node
    slow = plan.cluster.with_links(intra_node=dataclasses.replace(link, bandwidth=link.bandwidth / 100))
    assert price_plan(plan, model, slow).step_time > plan.predicted.step_time


def test_hidden_communication_stays_within_its_budget():
    # Gathers shorter than compute: only the first is seen. Longer: compute waits for each.
    assert hidden_forward([4.0, 4.0, 4.0], [1.0, 1.0, 1.0]) == 13.0
    assert hidden_forward([1.0, 1.0, 1.0], [4.0, 4.0, 4.0]) == 13.0
    assert hidden_forward([1.0], [0.0]) == 1.0
    # The first gather and the last reduction show; both share one channel.
    assert hidden_backward([4.0, 4.0, 4.0], [1.0] * 3, [1.0] * 3) == 14.0
    assert hidden_backward([1.0, 1.0], [3.0, 3.0], [5.0, 5.0]) == 3 + 3 + 5 + 5
    assert hidden_backward([2.0, 2.0], [0.0, 0.0], [0.0, 0.0]) == 4.0
    # The root group's copies and reduction come when all blocks have ended.
    assert hidden_backward([2.0, 2.0], [0.0, 0.0], [1.0, 1.0], 0.5, 3.0) == 4.0 + max(0.5, 1.0) + 3.0
    assert hidden_backward([2.0], [0.0], [0.0], 0.5, 0.0) == 2.5


def data_axis(zero, pipelined):
    job, cluster = Job(global_batch=16, seq_len=64), Cluster.parse("1x8:h100")
    return DataAxis(OpCosts(cluster.device, job), CollectiveCosts(cluster), 8, 1, zero, pipelined, 4)


def test_stages_gather_once_a_step():
    axis, blocks = data_axis(3, True), [BlockTime(1e-6, 2e-6, 10**8), BlockTime(1e-6, 2e-6, 10**8)]
    times = axis.stage(blocks)
    # Gathers far longer than the compute beside them: both are seen in the first forward, none in any backward.
    assert times.first_s > 2 * axis.gather_s(10**8)
    assert times.forward_s == pytest.approx(2e-6)
    assert times.backward_s == pytest.approx(4e-6 + 2 * axis.reduce_copy_s(10**8))
    assert times.reduce_s == pytest.approx(2 * axis.reduce_s(10**8))


def test_the_root_group_is_gathered_once_and_reduced_last():
    axis, n = data_axis(3, False), 10**8
    ends = [BlockTime(0.0, 0.0, n, root=True), BlockTime(0.0, 0.0, n, root=True)]
    layer = BlockTime(1.0, 2.0, n)
    whole, alone = axis.stage([ends[0], layer, ends[1]]), axis.stage([layer])
    # One gather of both ends before the forward; the layer's own is no longer than before.
    assert whole.forward_s - alone.forward_s == pytest.approx(
        axis.gather_s(2 * n) + axis.gather_copy_s(2 * n), rel=1e-4
    )
    # Nothing is gathered in the backward for them, and the reduction of both follows the layer's.
    wait = max(0.0, axis.reduce_copy_s(2 * n) - axis.reduce_s(n))
    assert whole.backward_s - alone.backward_s == pytest.approx(axis.reduce_s(2 * n) + wait, rel=1e-3)
