"""Block decisions: those that an answer of the intra-block problem stands for, and those of blocks that stay whole."""

from __future__ import annotations

from autopar.graph.ir import ModelGraph
from autopar.sharding.decision import BlockDecision, Conversion
from autopar.sharding.layout import Layout
from autopar.solver.block_problem import ModelProblem, name_now
from autopar.solver.problem import Answer


def decisions_of(model: ModelGraph, built: ModelProblem, answer: Answer) -> dict[str, BlockDecision]:
    """The block decisions an answer stands for, by kind."""

    decisions = {}
    for name, kind in model.kinds.items():
        prefix = f"{name}/"
        order = {node: index for index, node in enumerate(kind.graph.nodes)}
        # What is converted for readers behind a recomputed part is one more layout of the tensor itself.
        named = [(name_now(t), a, b) for t, a, b in answer.conversions if t.startswith(prefix)]
        moves = list({(t, b): (t, a, b) for t, a, b in reversed(named)}.values())[::-1]
        moves.sort(key=lambda move: order[move[0]])
        pairs = zip(built.problem.outputs, answer.outputs, strict=True)
        leaving = [layout for output, layout in pairs if output.tensor.startswith(prefix)]
        decisions[name] = BlockDecision(
            kind=name,
            axes=dict(built.axes),
            inputs={
                node.name: answer.sources[prefix + node.name]  # type: ignore[misc]
                for node in kind.graph.nodes.values()
                if node.kind != "op"
            },
            strategies={
                node.name: {axis: s.name for axis, s in built.choices[chosen][answer.strategies[chosen]].items()}
                for node in kind.graph.of("op")
                for chosen in [prefix + node.name]
            },
            conversions=tuple(Conversion(tensor, a, b) for tensor, a, b in moves),  # type: ignore[arg-type]
            outputs=dict(zip(kind.graph.outputs, leaving, strict=True)),  # type: ignore[arg-type]
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
