"""The cheapest sharding of a block, by elimination and by the ILP, against enumeration, and the traps that a wrong
formulation falls into."""

import itertools
import random
from dataclasses import replace

import pytest

from autopar.errors import AutoparError
from autopar.solver import block_tables, elimination, intra_ilp
from autopar.solver.intra_block import least, least_with, solve
from autopar.solver.intra_ilp import NoShardingError, relaxed_bound
from autopar.solver.problem import Choice, Op, Output, Problem, Source, path, price, shortest

LAYOUTS = ("R", "P", "S0", "S1")


def tree_seconds(direct, start, wanted, known={}):  # noqa: B006 (remembers within a run)
    """Cheapest conversions that make ``wanted`` from ``start``: every choice of a parent per layout is tried."""
    key = (tuple(direct.items()), start, frozenset(wanted))
    if key not in known:
        known[key] = cheapest_tree(direct, start, wanted)
    return known[key]


def cheapest_tree(direct, start, wanted):
    others = [layout for layout in LAYOUTS if layout != start]
    best = None
    for parents in itertools.product((None, *LAYOUTS), repeat=len(others)):
        edges = {child: parent for child, parent in zip(others, parents, strict=True) if parent is not None}
        if any((parent, child) not in direct or parent == child for child, parent in edges.items()):
            continue
        held = {start}
        while grown := {child for child, parent in edges.items() if parent in held and child not in held}:
            held |= grown
        if wanted <= held:
            cost = sum(direct[parent, child] for child, parent in edges.items())
            best = cost if best is None else min(best, cost)
    return best


def enumerate_best(problem, byte_price=0.0):
    """The optimum by trying every strategy of every operator and every layout of every source."""
    best = None
    sources = {source.name: source for source in problem.sources}
    leaving = [
        dict(zip(range(9), way, strict=False)) for way in itertools.product(*(o.layouts for o in problem.outputs))
    ]
    for layouts in itertools.product(*(source.layouts for source in problem.sources)):
        arrival = dict(zip(sources, layouts, strict=True))
        ties = {}
        if any(s.tie and ties.setdefault(s.tie, arrival[s.name]) != arrival[s.name] for s in problem.sources):
            continue
        for combination in itertools.product(*(op.choices for op in problem.ops)):
            total = sum(c.seconds + byte_price * c.bytes for c in combination)
            for name, layout in arrival.items():
                seconds, size = sources[name].layouts[layout]
                total += seconds + byte_price * size
            if best is not None and total >= best:
                continue
            for way in leaving:
                if any(o.tie and ties.get(o.tie, way[i]) != way[i] for i, o in enumerate(problem.outputs)):
                    continue
                cost = conversion_seconds(problem, arrival, combination, way)
                if cost is not None and (best is None or total + cost < best):
                    best = total + cost
    return best


def conversion_seconds(problem, arrival, combination, leaving):
    start = dict(arrival)
    wanted = {}
    for op, choice in zip(problem.ops, combination, strict=True):
        start[op.name] = choice.output
        for tensor, layout in zip(op.operands, choice.inputs, strict=True):
            wanted.setdefault(tensor, set()).add(layout)
    for index, output in enumerate(problem.outputs):
        wanted.setdefault(output.tensor, set()).add(leaving[index])
    costs = [tree_seconds(problem.conversions.get(t, {}), start[t], layouts) for t, layouts in wanted.items()]
    return None if None in costs else sum(costs)


def random_problem(seed, tied=False):
    draw = random.Random(seed)

    def conversions():
        pairs = itertools.permutations(LAYOUTS, 2)
        return {pair: draw.choice((0.0, 1.0, 2.0, 3.5, 8.0)) for pair in pairs if draw.random() < 0.75}

    tie = "weight" if tied else ""
    sources = [
        Source("x", {"R": (0.0, 0.0)}),
        Source("w", {"R": (0.0, 4.0), "S0": (0.5, 1.0)}, tie),
        Source(
            "v",
            {"R": (0.0, 4.0), "S0": (0.25, 1.0), "S1": (0.0, 1.0)} if not tied else {"R": (0.0, 4.0), "S0": (0.0, 1.0)},
            tie,
        ),
    ]
    names = [source.name for source in sources]
    ops = []
    for index in range(4):
        operands = tuple(draw.choice(names[-4:]) for _ in range(draw.choice((1, 2, 2))))
        choices = tuple(
            Choice(str(k), tuple(draw.choice(LAYOUTS) for _ in operands), draw.choice(LAYOUTS), draw.uniform(0, 5), k)
            for k in range(3)
        )
        ops.append(Op(f"o{index}", operands, choices))
        names.append(f"o{index}")
    outputs = (
        Output(names[-1], ("R", "S0"), tie if draw.random() < 0.5 else ""),
        Output(names[-2], (draw.choice(LAYOUTS),)),
    )
    return Problem(tuple(sources), tuple(ops), {name: conversions() for name in names}, outputs)


@pytest.fixture(params=["elimination", "in parts", "ILP"])
def either(request, monkeypatch):
    """Every problem is wide to the ILP's runs; every sum is large to those in parts."""
    if request.param == "ILP":
        monkeypatch.setattr(block_tables, "WIDE", -1)
    if request.param == "in parts":
        monkeypatch.setattr(elimination, "LARGE", 0)


@pytest.mark.parametrize("seed", range(30))
def test_agrees_with_enumeration(seed, either):
    problem = random_problem(seed, tied=seed % 3 == 0)
    byte_price = (0.0, 0.0, 0.7)[seed % 3]
    best = enumerate_best(problem, byte_price)
    if best is None:
        with pytest.raises(AutoparError, match="no sharding of"):
            solve(problem, byte_price)
        return
    answer = solve(problem, byte_price)
    found = answer.seconds + byte_price * answer.bytes
    assert answer.status == "optimal"
    assert found == pytest.approx(best, rel=1e-7)
    assert answer.bound <= best * (1 + 1e-12)
    assert answer.bound == pytest.approx(best, rel=1e-6)
    assert price(problem, answer) == (answer.seconds, answer.bytes)


@pytest.mark.parametrize("near", [1e-12, 1e-2, 0.1])
def test_variables_left_out_by_reduced_costs_cost_nothing(near, monkeypatch):
    """However few CP-SAT sees first, the answer and its bound are those of all variables."""
    tried = []
    for seed in range(60):
        problem = random_problem(seed, tied=seed % 3 == 0)
        byte_price = (0.0, 0.0, 0.7)[seed % 3]
        monkeypatch.setattr(intra_ilp, "FEW", 500)
        try:
            whole = intra_ilp.solve(problem, byte_price)
        except AutoparError:
            continue
        monkeypatch.setattr(intra_ilp, "FEW", 0)
        monkeypatch.setattr(intra_ilp, "NEAR", near)
        some = intra_ilp.solve(problem, byte_price)
        assert (some.seconds, some.bytes) == pytest.approx((whole.seconds, whole.bytes), rel=1e-9)
        assert some.bound == pytest.approx(whole.bound, rel=1e-6)
        assert some.bound <= whole.seconds + byte_price * whole.bytes
        assert some.status == "optimal"
        tried.append(some.statistics["tried"] / some.statistics["variables"])
    assert len(tried) > 20
    assert min(tried) < 0.9


def test_the_relaxation_is_a_bound_and_often_the_optimum():
    ratios = []
    for seed in range(60):
        problem = random_problem(seed)
        if enumerate_best(problem) is not None:
            ratios.append(relaxed_bound(problem) / solve(problem).seconds)
    assert len(ratios) > 20
    assert max(ratios) <= 1.0 + 1e-9
    assert sum(ratio > 0.999 for ratio in ratios) > len(ratios) / 4


def test_many_readers_share_what_is_converted(either):
    """Up to five operators read one tensor, each some of its layouts: all that any tree of conversions can do is tried,
    however many read what it makes."""
    for seed in range(12):
        problem = shared_problem(seed)
        best = enumerate_best(problem)
        if best is None:
            with pytest.raises(AutoparError):
                solve(problem)
            continue
        answer = solve(problem)
        assert price(problem, answer) == (answer.seconds, answer.bytes)
        assert answer.seconds == pytest.approx(best, rel=1e-7)
        assert answer.bound == pytest.approx(best, rel=1e-6)


def shared_problem(seed):
    """One source that three to five operators read; the last adds up what the others make."""
    draw = random.Random(seed)
    pairs = [pair for pair in itertools.permutations(LAYOUTS, 2) if draw.random() < 0.7]
    direct = {pair: draw.choice((0.0, 1.0, 2.0, 3.5, 8.0)) for pair in pairs}
    source = Source("x", {"R": (draw.uniform(0, 4), 0.0), "S0": (draw.uniform(0, 4), 0.0), "P": (0.0, 0.0)})
    readers = []
    for index in range(draw.choice((3, 4, 5))):
        ways = [Choice(str(k), (draw.choice(LAYOUTS),), draw.choice(("R", "S0")), draw.uniform(0, 3)) for k in range(2)]
        readers.append(Op(f"o{index}", ("x",), tuple(ways)))
    names = tuple(op.name for op in readers)
    last = Op("last", names, tuple(Choice(way, (way,) * len(names), way, 0.0) for way in ("R", "S0")))
    tables = {"x": direct, **{name: {("R", "S0"): 0.5, ("S0", "R"): 0.25} for name in names}}
    return Problem((source,), (*readers, last), tables, ())


def test_a_weight_that_hundreds_of_steps_read():
    """A loop that was unrolled: elimination takes it, though the weight has as many neighbours as there are steps."""
    draw, ops = random.Random(0), []
    for index in range(300):
        ways = [Choice(each, (each, each), each, draw.uniform(1, 2)) for each in ("R", "S0", "S1")]
        ops.append(Op(f"o{index}", (f"o{index - 1}" if index else "x", "w"), tuple(ways)))
    pairs = dict.fromkeys(itertools.permutations(("R", "S0", "S1"), 2), 0.4)
    weight = Source("w", {"R": (0.0, 0.0), "S0": (0.0, 0.0)})
    tables = {op.name: pairs for op in ops} | {"x": pairs, "w": pairs}
    problem = Problem((Source("x", {"R": (0.0, 0.0)}), weight), tuple(ops), tables, (Output("o299", ("R",)),))
    answer = solve(problem)
    assert price(problem, answer) == (answer.seconds, answer.bytes)
    assert answer.seconds == pytest.approx(intra_ilp.solve(problem).seconds, rel=1e-9)
    assert least(problem)[0] == pytest.approx(answer.seconds, rel=1e-9)


def test_the_least_with_each_strategy_of_an_operator(either):
    """Held to one strategy the problem's least is what elimination says of it, or more than its relaxation does."""
    compared = 0
    for seed in range(20):
        problem = random_problem(seed)
        if enumerate_best(problem) is None:
            continue
        found = least_with(problem, ["o1", "o3"])
        assert found.shape == (3, 3)
        for one, other in itertools.product(range(3), repeat=2):
            kept = {"o1": one, "o3": other}
            ops = tuple(
                replace(op, choices=(op.choices[kept[op.name]],)) if op.name in kept else op for op in problem.ops
            )
            best = enumerate_best(replace(problem, ops=ops))
            assert found[one, other] <= (float("inf") if best is None else best * (1 + 1e-9))
            exact = best is not None and block_tables.WIDE > 0
            assert not exact or found[one, other] == pytest.approx(best, rel=1e-9)
            compared += exact
        assert least(problem)[0] == pytest.approx(enumerate_best(problem), rel=1e-6)
    assert compared > 50 or block_tables.WIDE < 0


def test_two_conversions_cannot_justify_each_other(either):
    """x arrives as P; both readers want what nothing makes cheaply: S0 and S1 convert into each other for nothing."""
    problem = Problem(
        sources=(Source("x", {"P": (0.0, 0.0)}),),
        ops=(
            Op("a", ("x",), (Choice("0", ("S0",), "R", 1.0),)),
            Op("b", ("x",), (Choice("1", ("S1",), "R", 1.0),)),
        ),
        conversions={"x": {("S0", "S1"): 0.0, ("S1", "S0"): 0.0, ("P", "S0"): 10.0, ("P", "S1"): 11.0}},
        outputs=(),
    )
    answer = solve(problem)
    assert answer.seconds == pytest.approx(12.0)
    assert answer.conversions == (("x", "P", "S0"), ("x", "S0", "S1"))
    unreachable = Problem(problem.sources, problem.ops, {"x": {("S0", "S1"): 0.0, ("S1", "S0"): 0.0}}, problem.outputs)
    with pytest.raises(NoShardingError, match=r"no sharding of these operators on the axes asked for: [ab];"):
        solve(unreachable)


def test_what_finds_no_sharding_names_the_operators_in_conflict(either):
    """Of eight operators one after the other, the fifth wants what the fourth's result cannot be converted into."""
    ops = [Op("o0", ("x",), (Choice("0", ("R",), "R", 1.0),))]
    for place in range(1, 8):
        wants = "S1" if place == 4 else "R"
        ops.append(Op(f"o{place}", (f"o{place - 1}",), (Choice("0", (wants,), "R", 1.0),)))
    tables = {name: {("R", "S0"): 1.0, ("S0", "R"): 1.0} for name in ("x", *(op.name for op in ops))}
    problem = Problem((Source("x", {"R": (0.0, 0.0), "S0": (0.0, 0.0)}),), tuple(ops), tables, (Output("o7", ("R",)),))
    with pytest.raises(NoShardingError) as raised:
        solve(problem)
    told = str(raised.value).partition(": ")[2].partition(";")[0].split(", ")
    assert set(told) in ({"o3"}, {"o4"}, {"o3", "o4"})


def test_a_conversion_is_paid_once_however_many_read_it(either):
    readers = tuple(Op(name, ("x",), (Choice("n", ("R",), "S1", 1.0),)) for name in "qkv")
    problem = Problem((Source("x", {"S0": (0.0, 0.0)}),), readers, {"x": {("S0", "R"): 5.0}}, ())
    answer = solve(problem)
    assert answer.seconds == pytest.approx(8.0)
    assert answer.conversions == (("x", "S0", "R"),)


def test_three_copies_in_a_chain(either):
    """P -> S0 -> R -> S1 is cheapest when all three are read, though no copy is cheap from P."""
    readers = tuple(Op(name, ("x",), (Choice("", (name,), "R", 0.0),)) for name in ("S0", "R", "S1"))
    direct = {("P", "S0"): 4.0, ("S0", "R"): 4.0, ("R", "S1"): 0.1, ("P", "R"): 8.0, ("P", "S1"): 4.0}
    answer = solve(Problem((Source("x", {"P": (0.0, 0.0)}),), readers, {"x": direct}, ()))
    assert answer.seconds == pytest.approx(8.1)


def test_a_path_of_conversions_is_spelt_out(either):
    direct = {("S0", "R"): 1.0, ("R", "S1"): 1.0, ("S0", "S1"): 5.0}
    best = shortest(direct)
    assert best["S0", "S1"][0] == 2.0
    assert path(best, "S0", "S1") == ["S0", "R", "S1"]
    reader = Op("o", ("x",), (Choice("", ("S1",), "S1", 0.0),))
    answer = solve(Problem((Source("x", {"S0": (0.0, 0.0)}),), (reader,), {"x": direct}, ()))
    assert answer.conversions == (("x", "S0", "R"), ("x", "R", "S1"))


def test_same_problem_same_answer(either):
    problem = random_problem(7)
    assert solve(problem).strategies == solve(problem).strategies
