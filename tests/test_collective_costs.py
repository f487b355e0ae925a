"""Collective costs: order, limits, hierarchy and consistency."""

from dataclasses import replace
from itertools import pairwise

import pytest

from autopar.cluster import Cluster, Link
from autopar.solver.collective_costs import KINDS, CollectiveCosts, Placement

SIZES = [10**k for k in range(3, 11)]


@pytest.fixture(scope="module")
def costs():
    return CollectiveCosts(Cluster.parse("8x8:h100"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "stride"), [(8, 1), (4, 2), (8, 8), (64, 1), (16, 4), (2, 32), (3, 1)])
def test_more_bytes_never_cost_less(costs, kind, size, stride):
    times = [costs.seconds(kind, nbytes, size, stride) for nbytes in SIZES]
    assert all(later >= earlier > 0 for earlier, later in pairwise(times))
    # Rates do not fall with size: a message is worth at most two of half the size.
    for nbytes in SIZES:
        assert costs.seconds(kind, 2 * nbytes, size, stride) <= 2 * costs.seconds(kind, nbytes, size, stride)


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter", "all_reduce"])
@pytest.mark.parametrize("nbytes", [10**4, 10**7, 10**9])
def test_more_ranks_never_cost_less(costs, kind, nbytes):
    times = [costs.seconds(kind, nbytes, size, 1) for size in (1, 2, 4, 8, 16, 32, 64)]
    assert times[0] == 0
    assert all(later > earlier for earlier, later in pairwise(times))


@pytest.mark.parametrize("nbytes", [10**4, 10**7, 10**9])
def test_kinds_agree(costs, nbytes):
    for size, stride in ((2, 1), (4, 2), (8, 1)):
        gather, scatter, both, swap = (
            costs.seconds(kind, nbytes, size, stride)
            for kind in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
        )
        assert gather == scatter
        assert gather < both <= gather + scatter
        assert nbytes < 10**7 or swap < gather
    for size, stride in ((8, 1), (8, 8), (64, 1)):
        both = costs.seconds("all_reduce", 10**10, size, stride)
        assert both == pytest.approx(2 * costs.seconds("all_gather", 10**10, size, stride), rel=0.01)


def test_small_all_reduces_take_the_tree(costs):
    """NCCL's gathers go around a ring, step by step; its all-reduce has a tree, which many ranks make worth it."""
    assert costs.seconds("all_reduce", 10**4, 64, 1) < costs.seconds("all_gather", 10**4, 64, 1)


def test_large_messages_reach_the_link(costs):
    nbytes = 10**11
    inside, outside = costs.cluster.intra_node.device_bandwidth, costs.cluster.inter_node.device_bandwidth
    assert costs.seconds("all_gather", nbytes, 8, 1) == pytest.approx(nbytes * 7 / 8 / inside, rel=0.01)
    assert costs.seconds("all_gather", nbytes, 8, 8) == pytest.approx(nbytes * 7 / 8 / outside, rel=0.01)
    assert costs.seconds("all_to_all", nbytes, 8, 1) == pytest.approx(nbytes / 8 * 7 / 8 / inside, rel=0.01)
    assert costs.seconds("send_recv", nbytes, 2, 8) == pytest.approx(nbytes / outside, rel=0.01)
    # Four ranks of a node leave by four ports at once.
    assert costs.seconds("all_gather", nbytes, 8, 2) == pytest.approx(nbytes * 7 / 8 / (4 * outside), rel=0.01)


def test_small_messages_cost_latency(costs):
    small = costs.seconds("all_reduce", 8, 8, 1)
    assert 5e-6 < small < 5e-5
    assert costs.seconds("all_reduce", 16, 8, 1) == pytest.approx(small, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nbytes", [10**3, 10**6, 10**9])
def test_inside_a_node_is_cheaper_than_across(costs, kind, nbytes):
    assert costs.seconds(kind, nbytes, 8, 1) < costs.seconds(kind, nbytes, 8, 8)
    assert costs.seconds(kind, nbytes, 2, 1) < costs.seconds(kind, nbytes, 2, 8)


def test_shared_ports_slow_the_network_alone():
    cluster = Cluster.parse("8x8:h100")
    port = cluster.inter_node
    shared = cluster.with_links(inter_node=Link(port.bandwidth, port.latency_s, port.efficiency, shared_by=4))
    one, other = CollectiveCosts(cluster), CollectiveCosts(shared)
    assert other.seconds("all_gather", 1e10, 8, 8) == pytest.approx(4 * one.seconds("all_gather", 1e10, 8, 8), rel=0.01)
    assert other.seconds("all_gather", 1e10, 8, 1) == one.seconds("all_gather", 1e10, 8, 1)


@pytest.mark.parametrize(
    ("size", "stride", "nodes", "per_node"),
    [
        (8, 1, 1, 8),
        (8, 8, 8, 1),
        (16, 4, 8, 2),
        (4, 2, 1, 4),
        (64, 1, 8, 8),
        (2, 32, 2, 1),
        (12, 1, 2, 4),
        (3, 1, 2, 1),
    ],
)
def test_placement(costs, size, stride, nodes, per_node):
    assert costs.placement(size, stride) == Placement(size, nodes, per_node)


def test_placement_is_quick_on_large_clusters():
    costs = CollectiveCosts(Cluster.parse("12500x8:h100"))
    assert costs.placement(100_000, 1) == Placement(100_000, 12_500, 8)
    assert costs.placement(12_500, 8) == Placement(12_500, 12_500, 1)


def test_nothing_to_do_is_free(costs):
    assert costs.seconds("all_gather", 10**6, 1, 1) == 0
    assert costs.seconds("all_gather", 0, 8, 1) == 0
    with pytest.raises(KeyError):
        costs.seconds("broadcast", 1, 8, 1)


def test_gloo_reduce_scatter_costs_an_all_reduce():
    cluster = Cluster.parse("1x8:h100")
    (nodes,) = cluster.groups
    costs = CollectiveCosts(Cluster((replace(nodes, device=replace(nodes.device, backend="cpu")),)))
    for nbytes in (10, 10**8):
        assert costs.seconds("reduce_scatter", nbytes, 4, 1) == costs.seconds("all_reduce", nbytes, 4, 1)
    assert costs.seconds("reduce_scatter", 10**8, 4, 1) > 1.9 * costs.seconds("all_gather", 10**8, 4, 1)


@pytest.mark.parametrize("size", [8, 64])
def test_a_token_that_goes_once_to_a_rank_moves_less(costs, size):
    nbytes = 10**9
    every, one, eight = (costs.exchange(nbytes, size, 1, choices) for choices in (0, 1, 8))
    assert every == costs.seconds("all_to_all", nbytes * size, size, 1)
    # A token of one choice goes where it goes; of eight, some share a rank, and more a node.
    assert one == pytest.approx(every, rel=0.03)
    assert eight < every
    assert costs.exchange(nbytes, 1, 1, 8) == costs.exchange(0, size, 1, 8) == 0


def test_nodes_are_reached_once(costs):
    """Eight choices on 8 nodes of 8: 8 (1 - 1/8) = 7 rows leave a node, of 8 (1 - (7/8)^8) (1 - 1/8) = 4.6 tokens."""
    every, once = (costs.exchange(8 * 10**9, 64, 1, choices) for choices in (0, 8))
    assert once / every == pytest.approx(1 - (7 / 8) ** 8, rel=0.02)
