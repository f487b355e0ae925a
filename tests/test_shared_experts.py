"""The search over how many ranks share experts: its bounds hold, and it chooses what pays."""

from __future__ import annotations

from dataclasses import replace

import pytest
from mixtures import mixture

from autopar import Cluster, Job
from autopar.graph.ir import ModelGraph
from autopar.models import model_graph
from autopar.solver.config_bounds import loose_bound, quick_bound, stage_bound
from autopar.solver.context import Context
from autopar.solver.fix import Fix
from autopar.solver.forced import context_of
from autopar.solver.found import INFINITE, Found
from autopar.solver.price import price
from autopar.solver.search import search
from autopar.solver.shardings import KnownShardings
from autopar.solver.space import configs

JOB = Job(global_batch=8, seq_len=64)


@pytest.fixture(scope="module")
def model() -> ModelGraph:
    return model_graph(mixture("mixtral", num_hidden_layers=3, hidden_size=64, intermediate_size=256))


def slow_links(name: str, bandwidth: float) -> Cluster:
    """A cluster whose nodes are joined by links this slow."""
    cluster = Cluster.parse(name)
    group = cluster.groups[0]
    return Cluster((replace(group, inter_node=replace(group.inter_node, bandwidth=bandwidth)),))


def test_no_bound_is_above_what_a_configuration_takes(model: ModelGraph) -> None:
    """For every sharing of experts, with model axes and without."""
    context = Context.of(model, JOB, Cluster.parse("2x4:h100"), Fix())
    known, priced = KnownShardings(context), {1: 0, 2: 0, 4: 0}
    for config in list(configs(model, JOB, context.cluster, Fix(micro_batch=1)))[::5]:
        of, shardings = context.sharing(config.ep), known.of(config.sharding)
        seconds = price(of, config, shardings, Found(0.0, known))
        if seconds == INFINITE:
            continue
        priced[config.ep] += 1
        bounds = [quick_bound(of, config, shardings.least_work())]
        bounds += [stage_bound(of, config, shardings, sharp) for sharp in (False, True)]
        assert max(*bounds, loose_bound(of, [config], shardings)) <= seconds, str(config)
    assert min(priced.values()) > 3


def test_a_relaxation_for_all_sharings_is_below_that_of_each(model: ModelGraph) -> None:
    context = Context.of(model, JOB, Cluster.parse("2x4:h100"), Fix())
    known = KnownShardings(context)
    for ep in (2, 4):
        for axes in ({"tp": 2}, {"cp": 2, "tp": 2}):
            key = (tuple(axes.items()), 1, 1, ())
            derived = known.of((*key, ep))
            own = KnownShardings(Context.of(model, JOB, context.cluster, Fix(ep=ep))).of((*key, ep))
            assert derived.alone is not None
            assert own.alone is None
            assert 0.999 * own.least_work() < derived.least_work() <= own.least_work() * (1 + 1e-6)


def test_slow_links_make_ranks_share_experts(model: ModelGraph) -> None:
    """Gathering all experts, again and again, costs more than sending tokens."""
    large = model_graph(mixture("mixtral", num_hidden_layers=3, hidden_size=64, intermediate_size=8192))
    fix = {"pp": 1, "tp": 1, "cp": 1, "zero": 3, "micro_batch": 1}
    found = search(large, JOB, slow_links("2x2:h100", 1e9), fix)
    assert found.mesh.ep > 1
    alone = search(large, JOB, slow_links("2x2:h100", 1e9), {**fix, "ep": 1})
    assert found.predicted.step_time < alone.predicted.step_time
    for ep in (2, 4):
        other = search(large, JOB, slow_links("2x2:h100", 1e9), {**fix, "ep": ep})
        assert found.bound <= other.predicted.step_time * (1 + 1e-9)
    # What reads the plan afterwards sees its experts shared, though nobody fixed that.
    assert "ep" not in found.fixed
    assert context_of(found, large).ep == found.mesh.ep
