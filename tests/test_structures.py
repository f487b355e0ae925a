"""Structures that sizes share: a problem priced from a shared one is the problem found on its own."""

import random
from itertools import product

import pytest
from traced import gpt2, llama

from autopar.cluster import Cluster
from autopar.errors import UnsupportedError
from autopar.graph.ir import ModelGraph
from autopar.job import Job
from autopar.models import model_graph
from autopar.solver import intra_ilp
from autopar.solver.block_problem import Demands, ModelProblem, model_problem, ties_of
from autopar.solver.collective_costs import CollectiveCosts
from autopar.solver.intra_block import least, solve
from autopar.solver.kind_prices import KindPrices
from autopar.solver.kind_structure import structure_of
from autopar.solver.kind_tables import KindTables
from autopar.solver.op_costs import OpCosts
from autopar.solver.prices import AxisPrices
from autopar.solver.problem import Problem

MODELS = {
    "grouped": lambda: llama(1),
    "uneven": lambda: llama(1, hidden_size=48, num_attention_heads=6, num_key_value_heads=3, intermediate_size=90),
    "fused": lambda: gpt2(1),
}
AXES = [
    dict(zip(names, sizes, strict=True))
    for names in (("tp",), ("cp",), ("cp", "tp"), ("tp0", "tp1"), ("cp", "tp0", "tp1"))
    for sizes in product((2, 3, 4, 6), repeat=len(names))
]


@pytest.mark.parametrize(
    ("model", "demands"), [*((name, Demands()) for name in MODELS), ("grouped", Demands(True, True))], ids=str
)
def test_a_shared_structure_is_the_one_found_alone(model: str, demands: Demands) -> None:
    graph = model_graph(MODELS[model]())
    memo: dict[object, object] = {}
    cases = [(axes, batch) for axes in AXES[:24] for batch in (1, 2, 3, 4)]  # sizes of one axis and of cp with tp
    rare = [(axes, batch) for axes in AXES[24:] for batch in (1, 2)]
    draw = random.Random(0)
    for axes, batch in [*draw.sample(cases, 20), *draw.sample(rare, 3)]:
        try:
            shared = problem(graph, axes, batch, demands, memo)
        except UnsupportedError:
            continue
        alone = problem(graph, axes, batch, demands, {})
        assert shared == alone, (axes, batch)
        assert ordered(shared) == ordered(alone), "the order of conversions breaks ties"


@pytest.mark.parametrize("model", MODELS)
def test_elimination_finds_what_the_ilp_finds(model: str) -> None:
    """For the problems of real blocks, with a price of memory and without: the same strategies, of equal ones too."""
    graph = model_graph(MODELS[model]())
    memo: dict[object, object] = {}
    for axes in ({"tp": 2}, {"cp": 2, "tp": 2}, {"tp0": 2, "tp1": 2}):
        of = problem(graph, axes, 2, Demands(), memo).problem
        for byte_price in (0.0, 1e-12):
            ours, theirs = solve(of, byte_price), intra_ilp.solve(of, byte_price)
            assert theirs.status == "optimal"
            assert ours.seconds + byte_price * ours.bytes == pytest.approx(
                theirs.seconds + byte_price * theirs.bytes, rel=1e-9
            )
            assert (ours.strategies, ours.sources, ours.outputs) == (theirs.strategies, theirs.sources, theirs.outputs)
            assert sorted(map(str, ours.conversions)) == sorted(map(str, theirs.conversions))


def ordered(built: ModelProblem) -> list[list[object]]:
    return [list(table) for table in built.problem.conversions.values()]


def problem(
    graph: ModelGraph, axes: dict[str, int], batch: int, demands: Demands, memo: dict[object, object]
) -> ModelProblem:
    again = frozenset(list(graph.kinds)[1:2])
    return model_problem(graph, prices(axes, batch), ties_of(graph), demands, 1e-12, again, memo)


def prices(axes: dict[str, int], batch: int) -> AxisPrices:
    job, cluster = Job(global_batch=8, seq_len=24), Cluster.parse("2x8:h100")
    return AxisPrices(OpCosts(cluster.device, job), CollectiveCosts(cluster), axes, batch)


@pytest.mark.parametrize("model", MODELS)
def test_tables_made_once_find_the_least_of_every_size(model: str) -> None:
    """A structure's tables, filled with the prices of axes and micro-batches that divide alike, find what the problem
    of these prices has as its least, run again in backward or not."""
    graph = model_graph(MODELS[model]())
    memo: dict[object, object] = {}
    made: dict[int, KindTables] = {}
    for axes, batch in product(({"tp": 2}, {"tp": 4}, {"cp": 2, "tp": 2}, {"tp0": 2, "tp1": 2}), (2, 4, 8)):
        built = problem(graph, axes, batch, Demands(), memo)
        for name, kind in graph.kinds.items():
            again = name in list(graph.kinds)[1:2]
            structure = structure_of(kind, prices(axes, batch), ties_of(graph), Demands(), again, memo)
            tables = made.setdefault(id(structure), KindTables(structure))
            found = tables.least(KindPrices(structure, prices(axes, batch), 1e-12))
            assert float(found) == pytest.approx(least(of_kind(built.problem, name))[0], rel=1e-9), (axes, batch, name)
    assert len(made) < 12 * len(graph.kinds), "no two sizes had one structure"


def of_kind(whole: Problem, name: str) -> Problem:
    """The problem of one kind alone."""
    return Problem(
        tuple(source for source in whole.sources if source.name.startswith(f"{name}/")),
        tuple(op for op in whole.ops if op.name.startswith(f"{name}/")),
        whole.conversions,
        tuple(output for output in whole.outputs if output.tensor.startswith(f"{name}/")),
        hubs=whole.hubs,
    )
