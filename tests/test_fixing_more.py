"""Fixing more never makes a plan faster than fixing less, but for the gap the search was told to leave."""

import pytest

import autopar

GAP = 1.01

FIXES = [
    # Blocks that stay gathered are weighed against others that do not, neither of which may be lost.
    ("2x8:l40s", {"pp": 2, "tp": 1, "cp": 1, "zero": 3, "schedule": "interleaved", "vpp": 4}, {"recompute": "full"}),
    # Estimates of other numbers of stages were too low, of this one too high.
    ("2x8:a100-80g", {"pp": 8, "tp": 1, "zero": 2}, {"cp": 1}),
    ("2x8:a100-80g", {"pp": 8, "tp": 1, "zero": 2}, {"vpp": 2, "schedule": "interleaved"}),
]


@pytest.mark.parametrize(("cluster", "fix", "more"), FIXES)
def test_fixing_more_makes_no_plan_faster(cluster, fix, more):
    job, devices = autopar.Job(global_batch=64, seq_len=4096), autopar.Cluster.parse(cluster)
    less, other = (autopar.search("llama3-8b", job, devices, fix=one) for one in (fix, {**fix, **more}))
    assert less.predicted.step_time <= GAP * other.predicted.step_time
