"""From block kinds to one abstract problem and back: strategies and conversions priced on one model axis.

Every kind's nodes are named "kind/node". The layout of what passes between blocks is one tie per tensor that is handed
on (found by following the blocks' inputs), so that one layout holds along the whole chain; parameters of different
kinds that are one tensor are tied as well.

What the tables of `fix` mean here: with ``tp`` fixed, every matmul with a feature factor that divides splits one
(`feature_splits`); ``sp`` fixes the layout between blocks, split by sequence or invariant (`boundary_types`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from autopar.graph.ir import BlockKind, ModelGraph, Node
from autopar.graph.size import SEQ, Size, size_at
from autopar.sharding.conversions import direct, plain
from autopar.sharding.decision import BlockDecision, Conversion
from autopar.sharding.layout import I, Layout, P, R, S, SpmdType
from autopar.sharding.rules import Strategy, divides, strategies_of
from autopar.solver.prices import AxisPrices, Price
from autopar.solver.problem import Answer, Choice, Op, Output, Problem, Source
from autopar.solver.work import MATMULS

AXIS = "tp"
_MATMULS = frozenset(f"aten.{name}" for name in MATMULS)
_KEEP_NOTHING = frozenset(
    f"aten.{name}"
    for name in (
        "add",
        "sub",
        "view",
        "reshape",
        "unflatten",
        "flatten",
        "transpose",
        "permute",
        "expand",
        "slice",
        "select",
        "cat",
        "neg",
        "unsqueeze",
        "squeeze",
        "clone",
        "sum",
        "mean",
    )
) | {"autopar.cast", "aten.embedding"}
"""Operators that keep none of their operands for backward (used to lean answers towards memory; never for totals)."""


@dataclass(frozen=True, slots=True)
class Demands:
    """What is asked of the sharding beside being fast: `fix` keys ``tp`` (split matmuls) and ``sp``."""

    split_matmuls: bool = False
    sequence: bool | None = None


@dataclass(frozen=True, slots=True)
class Ties:
    """``boundary``: (kind, input node) and (kind, "out", index) to the name of the layout they share; ``parameters``:
    (kind, parameter node) to the tied tensor's name; ``first``: the kind that owns each tied tensor's memory."""

    boundary: dict[tuple[str, ...], str]
    parameters: dict[tuple[str, str], str]


def ties_of(model: ModelGraph) -> Ties:
    """The layouts that must agree between blocks."""
    parent: dict[tuple[str, ...], tuple[str, ...]] = {}

    def find(x: tuple[str, ...]) -> tuple[str, ...]:
        while parent.setdefault(x, x) != x:
            x = parent[x]
        return x

    for block in model.blocks:
        for node, source in block.inputs.items():
            if source.origin == "block":
                made = (model.blocks[source.block].kind, "out", str(source.index))
                parent[find((block.kind, node))] = find(made)
    roots = {x: find(x) for x in list(parent)}
    names = {root: f"boundary{index}" for index, root in enumerate(dict.fromkeys(roots.values()))}
    group_of = {name: group[0] for group in model.tied for name in group}
    parameters: dict[tuple[str, str], str] = {}
    for block in model.blocks:
        for parameter in model.kinds[block.kind].graph.of("parameter"):
            full = block.parameters[parameter.target]
            if full in group_of:
                parameters[block.kind, parameter.name] = f"tied {group_of[full]}"
    return Ties({x: names[root] for x, root in roots.items()}, parameters)


@dataclass(frozen=True, slots=True)
class ModelProblem:
    """The abstract problem of all block kinds on one axis, and the strategies its choices stand for."""

    problem: Problem
    strategies: dict[str, tuple[Strategy, ...]]
    size: int


def model_problem(
    model: ModelGraph,
    prices: AxisPrices,
    ties: Ties,
    demands: Demands = Demands(),
    resident_price: float = 0.0,
    again: frozenset[str] = frozenset(),
) -> ModelProblem:
    """All kinds of ``model``, each weighted with how many blocks it has.

    ``resident_price``: seconds per micro-batch that each parameter element held costs. ``again``: kinds whose forward
    runs twice (recomputed in backward).
    """
    sources: list[Source] = []
    ops: list[Op] = []
    outputs: list[Output] = []
    conversions: dict[str, dict[tuple[SpmdType, SpmdType], float]] = {}
    strategies: dict[str, tuple[Strategy, ...]] = {}
    weights = {kind: float(sum(block.kind == kind for block in model.blocks)) for kind in model.kinds}
    for kind in model.kinds.values():
        build = _KindProblem(kind, model, prices, ties, demands, resident_price, kind.name in again)
        sources += build.sources
        ops += build.ops
        outputs += build.outputs
        strategies |= build.strategies
        conversions |= build.conversions()
    problem = Problem(tuple(sources), tuple(ops), conversions, tuple(outputs), weights)  # type: ignore[arg-type]
    return ModelProblem(problem, strategies, prices.size)


def boundary_types(
    shape: tuple[int | Size, ...], size: int, batch: int, seq: int, demands: Demands
) -> tuple[SpmdType, ...]:
    """The layouts a tensor may have between blocks, sequence first; ``sp`` leaves one."""
    splits = [S(dim) for dim, extent in enumerate(shape) if size_at(extent, batch, seq) % size == 0]
    sequence = [kind for kind in splits if shape[kind.dim] == SEQ]
    if demands.sequence is False:
        return (I,)
    if demands.sequence:
        return tuple(sequence[:1]) or (I,)
    return (*sequence, I, *(kind for kind in splits if kind not in sequence), R, P)


class _KindProblem:
    """One kind's part of the problem."""

    def __init__(
        self,
        kind: BlockKind,
        model: ModelGraph,
        prices: AxisPrices,
        ties: Ties,
        demands: Demands,
        resident: float,
        again: bool,
    ) -> None:
        self.kind, self.graph, self.prices, self.ties = kind, kind.graph, prices, ties
        self.demands, self.resident, self.again = demands, resident, again
        self.strategies: dict[str, tuple[Strategy, ...]] = {}
        self.types: dict[str, dict[SpmdType, None]] = {name: {} for name in self.graph.nodes}
        self.sources = [self._source(node, model) for node in self.graph.nodes.values() if node.kind != "op"]
        self.ops = [self._op(node) for node in self.graph.of("op")]
        self.outputs = [self._output(index, name, model) for index, name in enumerate(self.graph.outputs)]

    def _name(self, node: str) -> str:
        return f"{self.kind.name}/{node}"

    def _plain(self, node: str, kind: SpmdType) -> SpmdType:
        kind = plain(kind, self.graph.nodes[node].meta.requires_grad)
        self.types[node].setdefault(kind)
        return kind

    def _source(self, node: Node, model: ModelGraph) -> Source:
        size, batch, seq = self.prices.size, self.prices.batch, self.prices.job.seq_len
        tie = self.ties.boundary.get((self.kind.name, node.name), "")
        options: dict[SpmdType, tuple[float, float]]
        if tie:
            kinds = boundary_types(node.meta.shape, size, batch, seq, self.demands)
            options = {self._plain(node.name, kind): (0.0, 0.0) for kind in kinds}
        elif node.kind == "parameter":
            tie = self.ties.parameters.get((self.kind.name, node.name), "")
            shape = node.meta.at(batch, seq)
            elements = prod(shape)
            share = 1.0 if not tie else 0.5
            options = {}
            for kind in (I, *(S(dim) for dim, extent in enumerate(shape) if extent % size == 0)):
                held = elements / size if kind.kind == "S" else elements
                options[self._plain(node.name, kind)] = (self.resident * held * share, 0.0)
        else:
            options = {self._plain(node.name, I): (0.0, 0.0)}
        return Source(self._name(node.name), options, tie)  # type: ignore[arg-type]

    def _op(self, node: Node) -> Op:
        graph, size = self.graph, self.prices.size
        seq = self.prices.job.seq_len
        possible = [s for s in strategies_of(node, graph) if divides(node, graph, s, size, self.prices.batch, seq)]
        possible = [s for s in possible if self._even(node, s)]
        if self.demands.split_matmuls:
            possible = feature_splits(node, possible) or possible
        choices = []
        for strategy in possible:
            price, _ = self.prices.operator(node, graph, strategy)
            inputs = tuple(self._plain(n, t) for n, t in zip(node.operands(), strategy.inputs, strict=True))
            output = self._plain(node.name, strategy.output)
            choices.append(Choice(strategy.name, inputs, output, self._seconds(price), self._kept(node, strategy)))
        kept = _undominated(choices)
        self.strategies[self._name(node.name)] = tuple(possible[index] for index in kept)
        operands = tuple(self._name(name) for name in node.operands())
        return Op(self._name(node.name), operands, tuple(choices[index] for index in kept))

    def _seconds(self, price: Price) -> float:
        return price.seconds + (price.forward_s if self.again else 0.0)

    def _even(self, node: Node, strategy: Strategy) -> bool:
        """Whether every split dim of the operands and the output divides, blocks included."""
        pairs = [(self.graph.nodes[n].meta, t) for n, t in zip(node.operands(), strategy.inputs, strict=True)]
        for meta, kind in (*pairs, (node.meta, strategy.output)):
            if kind.kind == "S":
                seq = self.prices.job.seq_len
                blocks = size_at(kind.blocks, self.prices.batch, seq)
                if meta.at(self.prices.batch, seq)[kind.dim] % (blocks * self.prices.size):
                    return False
        return True

    def _kept(self, node: Node, strategy: Strategy) -> float:
        """About how many bytes the operator keeps for backward; a tensor that several read counts once for each."""
        if node.op in _KEEP_NOTHING or not node.meta.requires_grad:
            return 0.0
        kept = 0.0
        for name, kind in zip(node.operands(), strategy.inputs, strict=True):
            operand = self.graph.nodes[name]
            if operand.kind != "parameter":
                kept += self.prices.local(operand.meta, kind).nbytes
        return kept

    def _output(self, index: int, name: str, model: ModelGraph) -> Output:
        tie = self.ties.boundary.get((self.kind.name, "out", str(index)), "")
        if not tie:
            return Output(self._name(name), (self._plain(name, I),))
        meta = self.graph.nodes[name].meta
        kinds = boundary_types(meta.shape, self.prices.size, self.prices.batch, self.prices.job.seq_len, self.demands)
        return Output(self._name(name), tuple(dict.fromkeys(self._plain(name, kind) for kind in kinds)), tie)

    def conversions(self) -> dict[str, dict[tuple[SpmdType, SpmdType], float]]:
        """Per tensor, the direct conversions between the types it may be made, held or read in (and R, I, P)."""
        found = {}
        for name, kinds in self.types.items():
            meta = self.graph.nodes[name].meta
            grad = meta.requires_grad
            universe = tuple(dict.fromkeys((*kinds, R, *((I, P) if grad else ()))))
            table = {}
            for a in universe:
                for b in universe:
                    step = direct(a, b, grad)
                    if step is not None:
                        table[a, b] = self._seconds(self.prices.conversion(meta, step))
            found[self._name(name)] = table
        return found


def feature_splits(node: Node, strategies: Iterable[Strategy]) -> list[Strategy]:
    """Of a matmul's strategies, those that split a feature factor: one whose size depends on neither b nor s."""
    if node.op not in _MATMULS:
        return []
    return [s for s in strategies if isinstance(s.extent, int)]


def _undominated(choices: list[Choice]) -> list[int]:
    """Indices without choices that another one with the same layouts beats or equals in seconds and bytes."""
    best: dict[tuple[object, ...], int] = {}
    kept: list[int] = []
    for index, choice in enumerate(choices):
        key = (choice.inputs, choice.output)
        other = best.get(key)
        if other is not None and choices[other].seconds <= choice.seconds and choices[other].bytes <= choice.bytes:
            continue
        best.setdefault(key, index)
        kept.append(index)
    return kept


def decisions_of(model: ModelGraph, built: ModelProblem, answer: Answer) -> dict[str, BlockDecision]:
    """The block decisions an answer stands for, by kind."""

    def layout(kind: object) -> Layout:
        assert isinstance(kind, SpmdType)
        return Layout(((AXIS, kind),))

    decisions = {}
    for name, kind in model.kinds.items():
        prefix = f"{name}/"
        order = {node: index for index, node in enumerate(kind.graph.nodes)}
        moves = [(t.removeprefix(prefix), a, b) for t, a, b in answer.conversions if t.startswith(prefix)]
        moves.sort(key=lambda move: order[move[0]])
        pairs = zip(built.problem.outputs, answer.outputs, strict=True)
        leaving = [kind_ for output, kind_ in pairs if output.tensor.startswith(prefix)]
        decisions[name] = BlockDecision(
            kind=name,
            axes={AXIS: built.size},
            inputs={
                node.name: layout(answer.sources[prefix + node.name])
                for node in kind.graph.nodes.values()
                if node.kind != "op"
            },
            strategies={
                node.name: {AXIS: built.strategies[prefix + node.name][answer.strategies[prefix + node.name]].name}
                for node in kind.graph.of("op")
            },
            conversions=tuple(Conversion(tensor, layout(a), layout(b)) for tensor, a, b in moves),
            outputs={tensor: layout(kind_) for tensor, kind_ in zip(kind.graph.outputs, leaving, strict=True)},
        )
    return decisions


def whole_decisions(model: ModelGraph) -> dict[str, BlockDecision]:
    """No model axis: every block whole on its rank."""
    return {
        name: BlockDecision(
            kind=name,
            axes={},
            inputs={node.name: Layout() for node in kind.graph.nodes.values() if node.kind != "op"},
            strategies={node.name: {} for node in kind.graph.of("op")},
            conversions=(),
            outputs={output: Layout() for output in kind.graph.outputs},
        )
        for name, kind in model.kinds.items()
    }
