"""Seconds one collective takes: hierarchical, latency and bandwidth, by message size and by how ranks sit on nodes.

A group of n ranks that holds a tensor of V bytes in full between them moves, per rank and for the best algorithms
(Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH", IJHPCA 2005; the same
factors are the "bus bandwidth" of nccl-tests, doc/PERFORMANCE.md):

    all_gather, reduce_scatter   V (n-1)/n      in n-1 steps (a ring)
    all_reduce                   2 V (n-1)/n    in 2(n-1) steps (reduce-scatter, then all-gather), or up and down a tree
    all_to_all                   V/n (n-1)/n    in n-1 messages
    send_recv                    V              in one
    ring                         V (n-1)/n      in n-1 send_recv to the next rank (`solver.ring_work` says what hides)

Rows that go to experts are an all-to-all, or go to each rank once however many of its experts a token chose, and to
each node once, whose ranks hand it on (`CollectiveCosts.exchange`; deepseek-ai/DeepEP, README).

**Hierarchy.** A ring of l ranks a node crosses each node boundary once, and l rings that leave by l different ports run
at once; so the ring moves at the pace of the slower of the link inside the node and l ports. All groups of an axis run
at the same time, each device through its own share of a port (`Link.shared_by`).

**Message size.** NCCL has protocols that trade bandwidth for latency and picks the fastest; so does the model, with the
figures of NCCL's own (NVIDIA/nccl, src/graph/tuning.cc). gloo has one; its reduce-scatter moves as much as its
all-reduce.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, gcd, log2, prod

from autopar.cluster import Cluster
from autopar.mesh import Span
from autopar.sharding.factors import RING
from autopar.stack import stack_of

KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send_recv", RING)


@dataclass(frozen=True, slots=True)
class Protocol:
    """A way to move a message: seconds to begin, fraction of the bandwidth, and how many times the latency of the
    smallest message one step takes inside a node and between nodes."""

    start_s: float
    bandwidth: float
    intra: float
    inter: float


NCCL = (
    Protocol(start_s=3.6e-6, bandwidth=0.25, intra=1.0, inter=1.0),  # LL: flags beside every 4 bytes
    Protocol(start_s=10.0e-6, bandwidth=0.92, intra=4.0, inter=1.5),  # LL128: flags beside every 120 bytes
    Protocol(start_s=8.4e-6, bandwidth=1.0, intra=7.2, inter=3.6),  # Simple: chunks with memory fences
)
"""From NVIDIA/nccl, src/graph/tuning.cc: baseLat and hwLat of a ring (NVLink 0.47, 1.9, 3.4; network 2.7, 4.0, 9.6
microseconds), busBw factors 1/4 and 0.92."""

TREE_BANDWIDTH = 0.9
"""Bandwidth of NCCL's trees against its rings (same file)."""

GLOO = (Protocol(start_s=0.0, bandwidth=1.0, intra=1.0, inter=1.0),)


@dataclass(frozen=True, slots=True)
class Placement:
    """How the ranks of one group sit: on ``nodes`` nodes, at least ``per_node`` on each (an axis's worst group)."""

    ranks: int
    nodes: int
    per_node: int


class CollectiveCosts:
    """Prices collectives on one cluster."""

    def __init__(self, cluster: Cluster, stack: str = "torch") -> None:
        self.cluster, self.stack = cluster, stack_of(stack)
        self._host_s = self.stack.collective_host_s / cluster.device.host_speed
        self._gloo = cluster.device.backend == "cpu"
        self._protocols = GLOO if self._gloo else NCCL
        self._placements: dict[tuple[int, int], Placement] = {}
        self._seconds: dict[tuple[str, float, int, int], float] = {}
        self._over: dict[tuple[str, float, Span], float] = {}
        self._handed: dict[tuple[float, int, int, float], tuple[float, ...]] = {}
        self._near: dict[tuple[int, int], tuple[bool, ...]] = {}

    @property
    def origin(self) -> str:
        """Where the figures are from, as `op_costs.OpTime` says it of operators."""
        device = self.cluster.device
        return "roofline" if device.measured and device.origin == "measured" else device.origin

    def seconds(self, kind: str, nbytes: float, size: int, stride: int) -> float:
        """Time of collective ``kind`` over an axis of ``size`` ranks whose neighbours are ``stride`` ranks apart.

        ``nbytes``: bytes of the tensor in full, before or after it is split over the axis (what each rank sends, for
        send_recv). Every group of the axis runs it at the same time. Raises KeyError for an unknown kind.
        """
        if kind not in KINDS:
            raise KeyError(kind)
        if size == 1 or nbytes <= 0:
            return 0.0
        if kind == RING:
            return (size - 1) * self.seconds("send_recv", nbytes / size, size, stride)
        key = (kind, nbytes, size, stride)
        found = self._seconds.get(key)
        if found is None:
            place = self.placement(size, stride)
            found = min(self._timed(kind, nbytes, place, protocol) for protocol in self._protocols)
            self._seconds[key] = found
        return found

    def exchange(self, nbytes: float, size: int, stride: int, choices: int = 0) -> float:
        """Time in which every rank of such an axis sends ``nbytes`` to experts on all of them, its own included.

        ``choices``: of each token, where a token goes once to every node that has any of its experts, and there once
        to every rank that does (DeepEP; tokens choose evenly); 0 where it goes once to every expert.
        """
        if size == 1 or nbytes <= 0:
            return 0.0
        if not choices:
            return self.seconds("all_to_all", nbytes * size, size, stride)
        place = self.placement(size, stride)
        return min(self._dispatched(nbytes / choices, choices, place, protocol) for protocol in self._protocols)

    def _dispatched(self, nbytes: float, choices: int, place: Placement, protocol: Protocol) -> float:
        """``nbytes``: of all tokens of a rank, once."""
        intra, inter = self.cluster.intra_node, self.cluster.inter_node
        start = max(self.cluster.device.collective_s + protocol.start_s, self._host_s)
        inside = nbytes * _others(place.ranks, choices) / (intra.device_bandwidth * protocol.bandwidth)
        outside = nbytes * _others(place.nodes, choices) / (inter.device_bandwidth * protocol.bandwidth)
        near, far = (place.per_node - 1) * protocol.intra, (place.nodes - 1) * protocol.inter
        return start + max(inside, outside) + near * intra.latency_s + far * inter.latency_s

    def over(self, kind: str, nbytes: float, span: Span) -> float:
        """`seconds` of groups that span several axes."""
        if len(span) == 1:
            return self.seconds(kind, nbytes, *span[0])
        if not span or nbytes <= 0:
            return 0.0
        key = (kind, nbytes, span)
        found = self._over.get(key)
        if found is None:
            place = self.spread(span)
            found = self._over[key] = min(self._timed(kind, nbytes, place, each) for each in self._protocols)
        return found

    def spread(self, span: Span) -> Placement:
        """`placement` of groups that span several axes: on a node lie so many places of each axis as would of it alone,
        in every combination (an estimate, where an axis does not fill nodes or equal parts of them)."""
        each = [self.placement(size, stride) for size, stride in span]
        return Placement(*map(prod, zip(*((place.ranks, place.nodes, place.per_node) for place in each), strict=True)))

    def scattered(self, nbytes: float, share: float, ranks: int, stride: int) -> tuple[float, float]:
        """Bytes that each of so many tensor ranks sends to the next stage of ``nbytes`` that it holds, and seconds in
        which those that receive them gather the rest (`Stack.scatters`). ``share``: bytes if all were split evenly."""
        if not self.stack.scatters or nbytes <= share:
            return nbytes, 0.0
        return share, self.seconds("all_gather", nbytes, ranks, stride)

    def handed_on(self, nbytes: float, ranks: int, stride: int, more_s: float = 0.0) -> tuple[float, ...]:
        """Seconds in which each of ``ranks`` pipeline ranks, ``stride`` apart, sends so many bytes to the next, the
        last one to the first: inside a node where every pair of such ranks shares one. ``more_s``: what each takes
        beside."""
        if ranks == 1 or nbytes <= 0:
            return (0.0,) * ranks
        key = (nbytes, ranks, stride, more_s)
        found = self._handed.get(key)
        if found is None:
            places = {True: Placement(2, 1, 2), False: Placement(2, 2, 1)}
            times = {
                near: more_s + min(self._timed("send_recv", nbytes, place, protocol) for protocol in self._protocols)
                for near, place in places.items()
            }
            found = self._handed[key] = tuple(times[near] for near in self.near(ranks, stride))
        return found

    def near(self, ranks: int, stride: int) -> tuple[bool, ...]:
        """For each place on an axis, whether every group has it on one node with the next (the last with the first)."""
        found = self._near.get((ranks, stride))
        if found is None:
            found = self._near[ranks, stride] = near_of(ranks, stride, self.cluster.devices_per_node)
        return found

    def placement(self, size: int, stride: int) -> Placement:
        """Where the ranks of a group sit, for the group that spans most nodes with fewest ranks on each."""
        found = self._placements.get((size, stride))
        if found is None:
            found = self._placements[(size, stride)] = placement_of(size, stride, self.cluster.devices_per_node)
        return found

    def _timed(self, kind: str, nbytes: float, place: Placement, protocol: Protocol) -> float:
        intra, inter = self.cluster.intra_node, self.cluster.inter_node
        step = intra.latency_s * protocol.intra
        hop = inter.latency_s * protocol.inter
        inside = intra.device_bandwidth * protocol.bandwidth
        outside = inter.device_bandwidth * protocol.bandwidth
        start = max(self.cluster.device.collective_s + protocol.start_s, self._host_s)
        n = place.ranks

        if kind == "send_recv":
            return start + (nbytes / inside + step if place.nodes == 1 else nbytes / outside + hop)
        if kind == "all_to_all":
            piece = nbytes / n / n
            local = place.per_node - 1
            remote = n - place.per_node
            return start + max(local * piece / inside, remote * piece / outside) + local * step + remote * hop

        # One pass around the ring: a reduce-scatter or an all-gather.
        slowest = inside if place.nodes == 1 else min(inside, place.per_node * outside)
        transfer = nbytes * (n - 1) / n / slowest
        crossings = place.nodes - 1
        ring = (n - 1 - crossings) * step + crossings * hop
        if kind == "all_gather" or (kind == "reduce_scatter" and not self._gloo):
            return start + transfer + ring
        # NCCL's all-reduce alone may go up and down a tree instead, in fewer steps.
        tree = (place.per_node - 1) * step + ceil(log2(place.nodes)) * hop + transfer * (1 / TREE_BANDWIDTH - 1)
        return start + 2 * (transfer + (ring if self._gloo else min(ring, tree)))


def _others(places: int, choices: int) -> float:
    """How many other places have an expert that a token chose, on average."""
    return (places - 1) * (1 - (1 - 1 / places) ** choices)


def placement_of(size: int, stride: int, per_node: int) -> Placement:
    """The worst group of an axis; groups repeat after lcm(size * stride, per_node) ranks."""
    if stride % per_node == 0:
        return Placement(size, size, 1)
    if per_node % stride == 0:  # nodes hold whole strides, so that groups lie alike if they fill nodes or parts of one
        inside = per_node // stride
        if inside % size == 0:
            return Placement(size, 1, size)
        if size % inside == 0:
            return Placement(size, size // inside, inside)
    span = size * stride
    nodes, fewest = 1, size
    for start in range(0, span * per_node // gcd(span, per_node), span):
        for offset in range(min(stride, per_node)):
            where: dict[int, int] = {}
            for rank in range(start + offset, start + offset + span, stride):
                where[rank // per_node] = where.get(rank // per_node, 0) + 1
            if (len(where), -min(where.values())) > (nodes, -fewest):
                nodes, fewest = len(where), min(where.values())
    return Placement(size, nodes, fewest)


def near_of(ranks: int, stride: int, per_node: int) -> tuple[bool, ...]:
    """`CollectiveCosts.near` on nodes of ``per_node`` devices."""
    if stride >= per_node or ranks == 1:
        return (ranks == 1,) * ranks
    span = ranks * stride
    found = [True] * ranks
    for start in range(0, span * per_node // gcd(span, per_node), span):
        for place in range(ranks):
            here, there = start + place * stride, start + (place + 1) % ranks * stride
            for offset in range(stride):
                found[place] &= (here + offset) // per_node == (there + offset) // per_node
    return tuple(found)
