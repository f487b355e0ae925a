"""A plan costs what the search said, by code that does not share its tables; and the data axis hides what it can."""

import dataclasses

import pytest
from dense_decoder import decoder

from autopar.cluster import Cluster
from autopar.errors import AutoparError, BadInputError
from autopar.job import Job
from autopar.solver.collective_costs import CollectiveCosts
from autopar.solver.data_axis import BlockTime, DataAxis, stage_events
from autopar.solver.hiding import hidden_backward, hidden_forward
from autopar.solver.op_costs import OpCosts
from autopar.solver.reprice import check_price, price_plan, reprice
from autopar.solver.search import search

JOB = Job(global_batch=16, seq_len=64)
FIXES = [
    {},
    *({"dp": 8, "zero": level} for level in range(4)),
    {"dp": 8, "zero": 3, "fsdp": 2},
    {"dp": 8, "zero": 2, "fsdp": 4, "micro_batch": 1},
    {"dp": 4, "tp": 2, "zero": 1, "fsdp": 2, "micro_batch": 1},
    {"dp": 8, "zero": 0, "offload": "state"},
    {"dp": 8, "zero": 3, "offload": "state", "micro_batch": 1},
    {"tp": 8},
    {"pp": 2, "tp": 2, "recompute": "full"},
    *({"pp": 4, "dp": 2, "zero": level, "micro_batch": 1} for level in range(4)),
    {"pp": 4, "dp": 2, "zero": 1, "offload": "state"},
    {"pp": 2, "dp": 4, "schedule": "gpipe"},
    {"pp": 2, "dp": 2, "tp": 2, "schedule": "gpipe", "zero": 2, "fsdp": 2, "stages": "1,5"},
    *({"pp": 2, "dp": 4, "vpp": 2, "zero": level, "micro_batch": 1} for level in range(4)),
    {"pp": 2, "tp": 4, "vpp": 3, "zero": 0},
    {"pp": 2, "dp": 4, "schedule": "zbv", "zero": 1, "recompute": "none"},
    {"pp": 4, "tp": 2, "schedule": "dualpipev", "micro_batch": 1, "vpp": 2, "stages": "1,1,1,1,1,1,1,1"},
    {"pp": 2, "dp": 4, "schedule": "dualpipev", "zero": 0, "fsdp": 1, "stages": "1,1,3,1"},
]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fix", FIXES)
def test_agrees_with_the_search(fix, tied):
    model = decoder(6 if fix.get("stages", "").count(",") == 7 else 4, tied=tied)
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


def data_axis(zero, size=8, fsdp=None, micro=4, cluster="1x8:h100", stack="torch", **more):
    job, cluster = Job(global_batch=16, seq_len=64, stack=stack), Cluster.parse(cluster)
    group = (fsdp or size) if zero else 1
    return DataAxis(OpCosts(cluster.device, job), CollectiveCosts(cluster), (((size, 1),),), zero, group, micro, **more)


N = 10**8
BLOCKS = [BlockTime(1e-6, 2e-6, N), BlockTime(1e-6, 2e-6, N)]


def test_halved_backwards_reduce_when_all_is_done():
    axis = data_axis(1, halves=True)
    times = axis.stage(BLOCKS)
    # Gathers far longer than the compute beside them: both are seen in the first forward, none in any backward.
    assert times.first_s > 2 * axis.gather_s(N)
    assert times.forward_s == pytest.approx(2e-6)
    assert times.backward_s == pytest.approx(4e-6 + 2 * axis.reduce_copy_s(N))
    assert times.reduce_s == pytest.approx(2 * axis.reduce_s(N))
    assert times.last_s == 0


def test_a_stack_that_does_not_prefetch_gathers_before_the_first_forward():
    blocks = [BlockTime(1.0, 2.0, N)] * 3  # whose forward hides any gather but the first
    megatron, internevo = (data_axis(1, stack=stack) for stack in ("megatron", "internevo"))
    assert megatron.stage(blocks).first_s == pytest.approx(megatron.gather_s(N))
    assert internevo.stage(blocks).first_s == pytest.approx(3 * internevo.gather_s(N))
    staged = data_axis(1, stack="internevo", staged=True).stage(blocks)
    assert staged.gathered_s == pytest.approx(3 * internevo.gather_s(N) + 3.0)


def test_levels_two_and_three_reduce_in_every_micro_batch():
    none, one, two, three = (data_axis(level).stage(BLOCKS) for level in range(4))
    assert none.reduce_s == one.reduce_s == two.reduce_s == three.reduce_s == 0
    assert two.backward_s > one.backward_s == none.backward_s
    assert two.first_s > 0 == three.first_s
    assert three.forward_s > two.forward_s
    assert three.backward_s > two.backward_s
    # Levels 0 and 1 hide their one reduction in the last backward.
    assert one.last_s > data_axis(1).reduce_s(N)
    assert two.last_s == 0
    assert none.forward_s == one.forward_s == two.forward_s


def test_what_stays_gathered_is_gathered_once():
    axis = data_axis(3)
    free, some, every = (
        axis.stage([dataclasses.replace(block, gathered=place < count) for place, block in enumerate(BLOCKS)])
        for count in range(3)
    )
    # All are seen: gathers are far longer than the compute beside them.
    once = axis.gather_s(N)
    assert free.first_s == 0
    assert free.forward_s - some.forward_s > 0.99 * once
    assert some.first_s == pytest.approx(free.forward_s - some.forward_s)
    assert every.first_s == pytest.approx(free.forward_s - every.forward_s)
    assert free.backward_s > some.backward_s > every.backward_s
    # As under zero 2, but for what a step gathers first: with all of them, nothing is left to gather.
    two = data_axis(2).stage(BLOCKS)
    assert (every.forward_s, every.backward_s, every.first_s) == (two.forward_s, two.backward_s, two.first_s)
    assert axis.least_copies_s(N, gathered=1.0) == 0 < axis.least_copies_s(N, gathered=0.5) < axis.least_copies_s(N)


def test_what_no_gradient_passes_is_gathered_for_forwards_alone():
    frozen = [BlockTime(1e-6, 0.0, N, frozen=N, still=still) for still in (False, True)]
    for level in (1, 2, 3):
        axis = data_axis(level)
        twice, once = (axis.stage([block, BLOCKS[1]]) for block in frozen)
        alone = axis.stage(BLOCKS[1:])
        assert once.forward_s == twice.forward_s
        assert once.backward_s == pytest.approx(alone.backward_s)
        least = [axis.least_copies_s(2 * N, frozen=N, still=still) for still in (0, N)]
        if level == 3:
            assert twice.backward_s > 1.05 * alone.backward_s
            assert least[0] > least[1]
            # Where nothing passes, the root group stays whole for the step.
            root = BlockTime(0.0, 0.0, N, True, frozen=N, still=True)
            stage, part = axis.stage([root, frozen[1]]), axis.stage([frozen[1]])
            assert (stage.forward_s, stage.first_s) == (part.forward_s, axis.gather_s(N) + axis.gather_copy_s(N))
        else:
            assert twice.backward_s == pytest.approx(once.backward_s)
            assert least[0] == least[1]


def test_shard_groups_inside_a_node_spare_the_slow_links():
    """Eight nodes of eight: gathering over a node's links is faster than over all; only shards cross the network."""
    whole, node = (data_axis(3, size=64, fsdp=group, cluster="8x8:h100") for group in (64, 8))
    assert node.gather_s(N) < 0.75 * whole.gather_s(N)
    assert node.stage(BLOCKS).forward_s < whole.stage(BLOCKS).forward_s
    inside = node.collectives.seconds("reduce_scatter", 4 * N, 8, 1)
    across = node.collectives.seconds("all_reduce", 4 * N / 8, 8, 8)
    assert node.scatter_s(N) == pytest.approx(inside)
    assert node.reduce_s(N) == pytest.approx(inside + across)
    # Replicas add up once a step: in the last backward only.
    assert 0 < node.stage(BLOCKS).last_s <= 2 * across * (1 + 1e-9)
    assert whole.stage(BLOCKS).last_s == 0
    assert data_axis(0, size=64, cluster="8x8:h100").reduce_s(N) == pytest.approx(
        node.collectives.seconds("all_reduce", 4 * N, 64, 1)
    )


def test_offloaded_state_crosses_the_host_link_both_ways():
    device, near = Cluster.parse("1x8:h100").device, data_axis(3)
    far = data_axis(3, offload="state")
    shard = N / 8 * 4
    assert far.gather_s(N) - near.gather_s(N) == pytest.approx(shard / device.host_bandwidth)
    added = 3 * shard / device.host_memory_bandwidth
    assert far.reduce_s(N) - near.reduce_s(N) == pytest.approx(shard / device.host_bandwidth + added)
    # Reduced once, nothing is added up on the host.
    once = data_axis(1, offload="state")
    assert once.reduce_s(N) - data_axis(1).reduce_s(N) == pytest.approx(shard / device.host_bandwidth)
    assert far.optimizer_s(N) == pytest.approx(10 * shard / device.host_memory_bandwidth)
    assert far.optimizer_s(N) > 10 * near.optimizer_s(N)


def test_shards_and_activations_come_back_over_one_link():
    link, far = Cluster.parse("1x8:h100").device.host_bandwidth, data_axis(3, offload="state")
    n = 10**8
    shard, fetched = n / 8 * 4 / link, 0.2
    plain, moved = (far.stage([BlockTime(0.1, 0.2, n, fetched_s=s)] * 4).backward_s for s in (0.0, fetched))
    assert moved >= 4 * (fetched + shard)
    assert moved > plain
    # Nothing else comes over it where the state is on the device, and the block's own seconds hold its copies.
    near = data_axis(3)
    assert near.stage([BlockTime(0.1, 0.2, n, fetched_s=0.2)]) == near.stage([BlockTime(0.1, 0.2, n)])


def test_the_root_group_is_gathered_once_and_reduced_last():
    axis, n = data_axis(3), 10**8
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


def test_stages_gather_ahead_and_leave_their_reductions_behind():
    alone, staged = (data_axis(1, staged=staged).stage(BLOCKS) for staged in (False, True))
    axis = data_axis(1, staged=True)
    # What is left of the first forward are the copies; gathers are through at a certain time after the step begins.
    assert staged.first_s == pytest.approx(2 * axis.gather_copy_s(N))
    assert staged.gathers_s == pytest.approx(2 * axis.gather_s(N))
    assert staged.gathered_s == pytest.approx(2 * axis.gather_s(N) + axis.gather_copy_s(N) + 1e-6, rel=1e-6)
    assert staged.reduces_s == pytest.approx(2 * axis.reduce_s(N))
    assert (staged.forward_s, staged.backward_s, staged.last_s) == (alone.forward_s, alone.backward_s, alone.last_s)
    # The second stage of a rank is gathered after the first.
    events = stage_events([staged] * 4, "interleaved", 2)
    assert [e.ready_s - staged.gathered_s for e in events] == pytest.approx([0, 0, staged.gathers_s, staged.gathers_s])
    # Level 2 reduces in every backward and waits, as does level 3; level 0 has nothing to gather.
    zero, two, three = (data_axis(level, staged=True).stage(BLOCKS) for level in (0, 2, 3))
    assert zero.reduces_s == two.reduces_s == three.reduces_s == 0
    assert zero.gathers_s == three.gathers_s == 0 < two.gathers_s
