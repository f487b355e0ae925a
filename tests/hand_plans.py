"""Small models, and plans for them written by hand: the strategies of a few operators, the rest follows."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from autopar.cluster import Cluster
from autopar.graph.ir import BlockKind, ModelGraph, Node, OpGraph
from autopar.graph.size import SEQ
from autopar.job import Job
from autopar.models import model_graph
from autopar.plan import Candidate, Mesh, Plan, Predicted, Run, Stage
from autopar.sharding.conversions import plain, same
from autopar.sharding.decision import BlockDecision, Conversion
from autopar.sharding.layout import I, Layout, P, R, S, SpmdType
from autopar.sharding.local import produced_layouts, settled, standard
from autopar.sharding.rules import Strategy, strategies_of

Wishes = Mapping[str, tuple[SpmdType | None, SpmdType]]
"""For an op node: the type of its first operand (None: any) and of its output."""


def llama(layers: int = 2, **changes: object) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "use_cache": False,
        **changes,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**config))


def gpt2(layers: int = 2, **changes: object) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = {
        "vocab_size": 128,
        "n_positions": 64,
        "n_embd": 64,
        "n_layer": layers,
        "n_head": 8,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "use_cache": False,
        **changes,
    }
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**config))


def graph_of(model: nn.Module) -> ModelGraph:
    """The traced model, with the values of its buffers."""
    graph = model_graph(model)
    buffers = dict(model.named_buffers())
    values = {name: tuple(buffers[name].flatten().tolist()) for name in graph.buffers if name in buffers}
    return dataclasses.replace(graph, buffer_values={**values, **graph.buffer_values})


class Graphs(Mapping[str, ModelGraph]):
    """The graphs of models by name, each traced when it is first asked for: whoever runs tests imports them all."""

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        self._models, self._traced = models, dict[str, ModelGraph]()

    def __getitem__(self, name: str) -> ModelGraph:
        if name not in self._traced:
            self._traced[name] = graph_of(self._models[name])
        return self._traced[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)


@dataclasses.dataclass(frozen=True)
class Axis:
    """What is wanted on one axis: strategies, and the types of stored parameters, of inputs and of the outputs; those
    not named are ``rest``. ``names``: of strategies that must be those, by node."""

    wishes: Wishes
    stored: Mapping[str, SpmdType] = dataclasses.field(default_factory=dict)
    inputs: Mapping[str, SpmdType] = dataclasses.field(default_factory=dict)
    output: SpmdType = I
    rest: SpmdType = I
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def arrives(self, node: Node) -> SpmdType:
        return self.stored.get(node.target, self.inputs.get(node.name, self.rest))


def attention_of(name: str) -> str:
    """The strategy on cp that a plan's name asks for (`context_parallel`)."""
    return "h" if "heads" in name else "ring" if "ring" in name else "q"


def decide(kind: BlockKind, sizes: Mapping[str, int], axes: Mapping[str, Axis]) -> BlockDecision:
    """A decision on several axes: on each one the wished strategies, elsewhere those that need the fewest conversions
    on that axis; then the conversions that all of them together need."""
    graph = kind.graph
    chosen: dict[str, dict[str, Strategy]] = {node.name: {} for node in graph.of("op")}
    for name, axis in axes.items():
        for node, strategy in _strategies(graph, axis).items():
            chosen[node][name] = strategy
    held: dict[str, list[Layout]] = {}
    arrives = {}
    conversions: list[Conversion] = []

    def need(name: str, target: Layout) -> None:
        grad = graph.nodes[name].meta.requires_grad
        if not any(same(layout, target, grad) for layout in held[name]):
            conversions.append(Conversion(name, held[name][0], target))
            held[name].append(target)

    for node in graph.nodes.values():
        if node.kind != "op":
            types = {name: axis.arrives(node) for name, axis in axes.items()}
            arrives[node.name] = standard(types, node.meta.shape)
            held[node.name] = [arrives[node.name]]
            continue
        inputs, output = produced_layouts(node, settled(chosen[node.name], sizes))
        for name, layout in zip(node.operands(), inputs, strict=True):
            need(name, layout)
        held[node.name] = [output]
    leaves = {name: axis.output for name, axis in axes.items()}
    promised = {name: standard(leaves, graph.nodes[name].meta.shape) for name in graph.outputs}
    for name, layout in promised.items():
        need(name, layout)
    strategies = {node: {axis: strategy.name for axis, strategy in choice.items()} for node, choice in chosen.items()}
    return BlockDecision(kind.name, dict(sizes), arrives, strategies, tuple(conversions), promised)


def _strategies(graph: OpGraph, axis: Axis) -> dict[str, Strategy]:
    """A strategy for every operator, on one axis alone."""
    held: dict[str, set[SpmdType]] = {}
    found = {}
    for node in graph.nodes.values():
        if node.kind != "op":
            held[node.name] = {axis.arrives(node)}
            continue
        operands = node.operands()
        first, wanted = axis.wishes.get(node.name, (None, None))

        def misfits(strategy, operands=operands) -> int:
            pairs = zip(operands, strategy.inputs, strict=True)
            return sum(
                not any(plain(kind, grad) == plain(have, grad) for have in held[name])
                for name, kind in pairs
                for grad in [graph.nodes[name].meta.requires_grad]
            )

        choices = [
            strategy
            for strategy in strategies_of(node, graph)
            if (wanted is None or strategy.output == wanted)
            and (first is None or strategy.inputs[0] == first)
            and axis.names.get(node.name, strategy.name) == strategy.name
        ]
        assert choices, (node.name, [str(s) for s in strategies_of(node, graph)])
        best = min(choices, key=lambda s: (misfits(s), s.output == P))
        for name, kind in zip(operands, best.inputs, strict=True):
            held[name].add(kind)
        found[node.name] = best
        held[node.name] = {best.output}
    return found


def tensor_parallel(kind: BlockKind, sequence: bool) -> Axis:
    """Column then row, split vocabulary; the residual whole, or split by sequence."""
    between = S(1) if sequence else I
    wishes: dict[str, tuple[SpmdType | None, SpmdType]] = {}
    stored: dict[str, SpmdType] = {}
    for node in kind.graph.of("op"):
        weight = node.operands()[1] if node.op == "aten.linear" else ""
        target = _parameter(kind, weight) if weight else ""
        conv1d = bool(weight) and kind.graph.nodes[weight].op == "aten.t"
        if node.op == "aten.linear" and any(part in target for part in ("o_proj", "down_proj", "c_proj")):
            wishes[node.name] = (S(2), P)
            stored[target] = S(0 if conv1d else 1)
        elif node.op == "aten.linear":
            blocks = 3 if "c_attn" in target else 1
            wishes[node.name] = (None, S(2, blocks))
            stored[target] = I if blocks > 1 else S(1 if conv1d else 0)
            bias = target.replace("weight", "bias")
            if conv1d and blocks == 1:
                stored[bias] = S(0)
        elif node.op == "aten.embedding" and "wpe" not in _parameter(kind, node.operands()[0]):
            wishes[node.name] = (S(0), P)
            stored[_parameter(kind, node.operands()[0])] = S(0)
        elif node.op == "aten.embedding":
            wishes[node.name] = (I, I)
        elif node.op in ("aten.rms_norm", "aten.layer_norm") or (node.op == "aten.add" and node.meta.requires_grad):
            wishes[node.name] = (between, between)
    inputs = {} if kind.name == "Prologue" else {"hidden": between}
    return Axis(wishes, stored, inputs, I if kind.name == "Epilogue" else between)


def context_parallel(kind: BlockKind, attention: str) -> Axis:
    """Every activation split by sequence, parameters whole; attention under the strategy called ``attention``: of
    queries by position ("q"), in a ring, or by heads ("h")."""
    wishes: dict[str, tuple[SpmdType | None, SpmdType]] = {}
    names = {}
    for node in kind.graph.of("op"):
        if node.op == "aten.scaled_dot_product_attention":
            names[node.name] = attention
        elif node.op == "autopar.cross_entropy":
            wishes[node.name] = (S(1), P)
        elif node.op in ("aten.embedding", "aten.linear", "aten.rms_norm", "aten.layer_norm"):
            positions = node.meta.shape.index(SEQ)
            wishes[node.name] = (None, S(positions))
        elif node.op == "autopar.rotary":
            wishes[node.name] = (S(2), S(2))
    inputs = {} if kind.name == "Prologue" else {"hidden": S(1)}
    return Axis(wishes, {}, inputs, P if kind.name == "Epilogue" else S(1), rest=R, names=names)


def on_axes(model: ModelGraph, mesh: Mesh, sequence: bool = False, attention: str = "q") -> dict[str, BlockDecision]:
    """Context parallelism on cp, and the same tensor parallelism on every tp axis."""
    return {
        kind.name: decide(
            kind,
            mesh.model_axes(),
            {
                name: context_parallel(kind, attention) if name == "cp" else tensor_parallel(kind, sequence)
                for name in mesh.model_axes()
            },
        )
        for kind in model.kinds.values()
    }


def megatron(model: ModelGraph, tp: int, sequence: bool) -> dict[str, BlockDecision]:
    """Tensor parallelism on one axis."""
    return on_axes(model, Mesh(tp=tp), sequence)


def whole(model: ModelGraph) -> dict[str, BlockDecision]:
    """No model axis."""
    return {
        kind.name: BlockDecision(
            kind.name,
            {},
            {node.name: Layout() for node in kind.graph.nodes.values() if node.kind != "op"},
            {node.name: {} for node in kind.graph.of("op")},
            (),
            {name: Layout() for name in kind.graph.outputs},
        )
        for kind in model.kinds.values()
    }


def _parameter(kind: BlockKind, name: str) -> str:
    node = kind.graph.nodes[name]
    while node.kind == "op":
        node = kind.graph.nodes[node.operands()[0]]
    return node.target


def plan_of(
    model: ModelGraph,
    decisions: Mapping[str, BlockDecision],
    mesh: Mesh | None = None,
    bounds: tuple[int, ...] = (),
    micro_batch: int = 2,
    micro_batches: int = 2,
    recompute: str = "none",
    dtype: str = "fp64",
    seq_len: int = 16,
) -> Plan:
    """A plan of one candidate per kind; ``bounds``: indices of the blocks that begin a further stage."""
    mesh = mesh or Mesh()
    candidates = {
        name: Candidate(name, decision, recompute, 0.0, 0.0, 0.0, 0, 0, 0, 0) for name, decision in decisions.items()
    }
    edges = (0, *bounds, len(model.blocks))
    stages = []
    for start, stop in itertools.pairwise(edges):
        runs = tuple(Run(i, i + 1, model.blocks[i].kind) for i in range(start, stop))
        stages.append(Stage(runs, 0.0, 0.0, 0.0, {}))
    return Plan(
        model=model.name,
        fingerprint=model.fingerprint(),
        cluster=Cluster.parse(f"1x{mesh.size}:h100"),
        job=Job(micro_batch * micro_batches * mesh.dp, seq_len, dtype),
        mesh=mesh,
        micro_batch=micro_batch,
        micro_batches=micro_batches,
        schedule="none" if len(stages) == 1 else "1f1b",
        zero=0,
        candidates=candidates,
        stages=tuple(stages),
        predicted=Predicted(1.0, 1.0, 0.0, (1.0, 1.0), {}),
        bound=1.0,
        gap=0.0,
        status="feasible",
    )
