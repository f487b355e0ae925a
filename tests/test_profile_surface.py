"""Interpolation between measured shapes, the adaptive grid, and the clocks."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from profiles import formula, spread_points

from autopar.profiler.clock import EventClock, HostClock, sampled
from autopar.profiler.grid import Limits, Table, sizes
from autopar.profiler.shapes import FAMILIES, family
from autopar.profiler.surface import Surface, nonnegative, relative_fit
from autopar.profiler.timing import Timing

MATMUL = family("matmul")


def wavy(point):
    """A device with a roofline and efficiencies that fall towards small sizes, as they do."""
    m, n, k = point
    flops, nbytes = MATMUL.cost(point, "forward", 2)
    efficiency = math.prod(size / (size + 90) for size in (m, n, k))
    return 3e-6 + max(flops / (4e14 * efficiency), nbytes / 2e12)


def surface_of(points, seconds, op=MATMUL):
    costs = [op.cost(point, "forward", 2) for point in points]
    return Surface(points, seconds, [f for f, _ in costs], [b for _, b in costs])


def read(surface, points, op=MATMUL):
    costs = np.array([op.cost(point, "forward", 2) for point in points])
    return surface.predict(points, costs[:, 0], costs[:, 1])


def errors(count):
    points = spread_points(count, 32, 8192, seed=1)(MATMUL)
    held_out = spread_points(200, 64, 4096, seed=2)(MATMUL)
    seconds, _ = read(surface_of(points, [wavy(p) for p in points]), held_out)
    return np.abs(np.log(seconds / np.array([wavy(p) for p in held_out])))


def test_held_out_points_are_near_what_is_read():
    few, many = errors(12), errors(96)
    assert np.median(many) < 0.06
    assert np.quantile(many, 0.95) < 0.25
    assert np.median(many) < np.median(few) / 2


def test_measured_points_are_read_back_nearly():
    points = spread_points(40, 32, 8192)(MATMUL)
    seconds, deviation = read(surface_of(points, [wavy(p) for p in points]), points)
    assert np.max(np.abs(np.log(seconds / np.array([wavy(p) for p in points])))) < 0.05
    assert np.max(deviation) < 0.05


def test_doubt_grows_with_distance_and_beyond_the_range():
    points = spread_points(30, 256, 1024)(MATMUL)
    surface = surface_of(points, [wavy(p) for p in points])
    _, deviation = read(surface, [points[0], (512, 512, 512), (8192, 512, 512), (65536, 512, 512)])
    assert deviation[0] < deviation[2] < deviation[3]
    assert deviation[1] < deviation[2]


def test_left_out_errors_are_those_of_leaving_out():
    points = spread_points(20, 64, 4096)(MATMUL)
    seconds = [wavy(p) * random.Random(str(p)).uniform(0.7, 1.4) for p in points]
    whole = surface_of(points, seconds)
    logs = whole.left_out
    for place in (0, 7, 19):
        kernel = whole._kernel(whole.coordinates, whole.coordinates, whole.length) * whole._scale
        kept = [i for i in range(20) if i != place]
        noise = np.diag(whole._noise)[np.ix_(kept, kept)]
        told = kernel[place, kept] @ np.linalg.solve(kernel[np.ix_(kept, kept)] + noise, whole._logs[kept])
        assert whole._logs[place] - told == pytest.approx(logs[place], rel=1e-6, abs=1e-9)


def test_one_point_and_no_point():
    surface = surface_of([(64, 64, 64)], [1e-5])
    assert read(surface, [(64, 64, 64)])[0][0] == pytest.approx(1e-5, rel=0.01)
    with pytest.raises(ValueError, match="at least one point"):
        surface_of([], [])


def test_terms_are_never_negative_and_found():
    draw = np.random.default_rng(0)
    columns = draw.uniform(0, 1, (30, 3)) * [1, 1e12, 1e9]
    truth = np.array([1e-5, 2e-15, 0.0])
    assert relative_fit(columns, columns @ truth) == pytest.approx(truth, rel=1e-6, abs=1e-20)
    found = nonnegative(columns, columns @ np.array([1.0, -1e-12, 0.0]))
    assert (found >= 0).all()


def test_the_grid_measures_where_the_surface_is_worst():
    """A cliff (a library that has a bad kernel for large k) draws more points than the flat side."""
    table, rng = Table(MATMUL, "bf16"), np.random.default_rng(0)
    limits = Limits(1.0, 1 << 40, "cuda")
    plain = formula(4e14, 2e12, 3e-6)
    for _ in range(50):
        _, point = table.next(rng, limits)
        cliff = 4.0 * (1 + math.sin(3 * math.log2(point[2]))) if point[2] > 1024 else 1.0
        seconds = {d: plain(MATMUL, point, d, 2) * cliff for d in MATMUL.directions}
        table.add(point, {d: Timing(s, s, 0.01, 5) for d, s in seconds.items()})
    rough = sum(point[2] > 1024 for point in table.samples)
    everywhere = sum(size > 1024 for size in sizes(MATMUL, 2)) / len(sizes(MATMUL, 2))
    assert rough / 50 > 1.15 * everywhere


def test_the_grid_keeps_to_its_limits():
    rng = np.random.default_rng(0)
    limits = Limits(5e-3, 1 << 20, "cpu")
    for each in FAMILIES:
        table = Table(each, each.dtypes[0])
        for _ in range(12):
            found = table.next(rng, limits)
            if found is None:
                break
            point = found[1]
            assert point not in table.samples
            assert each.valid(point)
            assert each.resident(point, table.width) * 2 <= limits.nbytes
            seconds = {d: formula(1e10, 1e10, 1e-6)(each, point, d, table.width) for d in each.directions}
            assert max(seconds.values()) <= limits.seconds
            table.add(point, {d: Timing(s, s, 0.0, 5) for d, s in seconds.items()})
        assert table.samples


class Queue:
    """A device with a queue: what is enqueued runs later, one after the other, in simulated milliseconds. Work takes
    ``takes``; the host takes ``host`` to enqueue anything, during which the device goes on."""

    def __init__(self, takes, host):
        self.takes, self.host = takes, host
        self.now = self.free = 0.0
        self.fills = 0

    def enqueue(self, milliseconds):
        self.now += self.host
        self.free = max(self.free, self.now) + milliseconds

    def work(self, index=0):
        self.enqueue(self.takes)

    def fill(self):
        self.fills += 1
        self.enqueue(1.0)

    def synchronize(self):
        self.now = max(self.now, self.free)

    def event(self):
        queue = self

        class Event:
            def record(self):
                self.at = max(queue.free, queue.now)

            def elapsed_time(self, later):
                return later.at - self.at

        return Event()


def test_a_queue_filled_ahead_hides_the_host(monkeypatch):
    """Without the filling, what is timed is the host: ten times as long."""
    queue = Queue(takes=0.05, host=0.5)
    monkeypatch.setattr("autopar.profiler.clock.time.perf_counter", lambda: queue.now / 1e3)
    clock = EventClock(queue.event, queue.synchronize, queue.fill)
    assert clock.plain_samples([queue.work] * 8)[1:] == pytest.approx([0.5e-3] * 7)
    samples = clock.device_samples([queue.work] * 8)
    assert samples == pytest.approx([0.05e-3] * 8)
    assert queue.fills >= 4
    assert clock.host_seconds([queue.work] * 8) == pytest.approx(4e-3)


def test_buffers_rotate_and_a_sample_keeps_to_its_budget():
    seen = []
    sample = sampled(HostClock(), seen.append, buffers=3, budget_s=0.0, least=4)
    assert sample.repeats == 4
    assert seen == [0, 1, 2, 0, 1, 2]
    assert Timing.of([1.0, 2.0, 3.0, 4.0, 100.0]) == Timing(3.0, 1.0, pytest.approx(2 / 3), 5)
