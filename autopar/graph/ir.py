"""The operator graph: what a traced model is, from the front end to code generation.

A model is a chain of blocks. Structurally equal blocks share one `BlockKind`, whose graph is written once. Sizes are
symbolic in the batch and the sequence (`Size`), so that one trace serves every micro-batch and sequence length.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from autopar.graph.size import Size, size_at

COMPUTE = "compute"
"""The dtype of a tensor held in the job's compute dtype; other dtypes are torch's names ("float32", "int64", "bool").
"float32" means at least float32: a float64 job computes such tensors in float64."""

CONVOLUTIONS = tuple(f"aten.{kind}{rank}d" for kind in ("conv", "conv_transpose") for rank in (1, 2, 3))
"""Convolutions, plain and transposed, over one to three dims of positions."""
RECURRENT = tuple(f"autopar.{kind}" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu"))
"""Recurrent layers as they are in torch."""
LINEAR, LOSS = "aten.linear", "autopar.cross_entropy"
EXPERTS = "autopar.experts"
"""The operator that the experts of a mixture are (`autopar.graph.experts`)."""

IMBALANCE = (11, 10)
"""Rows of the fullest of the ranks that share a layer's experts, over those of the average rank. Routers are trained to
balance (auxiliary losses, or DeepSeek-V3's biases, arXiv 2412.19437, section 2.1.2), which they do over many tokens and
several experts a rank, not for each expert and batch; plausible 1.0 (forced balance, as in benchmarks) to 1.5."""

_UNHASHED = ("name", "notes", "buffer_values", "nominal_seq")


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """One tensor's global shape (symbolic), dtype name and whether a gradient flows through it."""

    shape: tuple[int | Size, ...]
    dtype: str = COMPUTE
    requires_grad: bool = False

    def at(self, batch: int, seq: int) -> tuple[int, ...]:
        """The shape in integers for ``batch`` samples of ``seq`` positions."""
        return tuple(size_at(size, batch, seq) for size in self.shape)


@dataclass(frozen=True, slots=True)
class Ref:
    """An argument that is another node's value."""

    name: str


@dataclass(frozen=True, slots=True)
class Node:
    """One value of a graph.

    ``kind`` is "input" (``target``: the batch key or the name of the value handed in), "parameter" or "buffer"
    (``target``: the name relative to the block), or "op" (``op``: the operator, e.g. "aten.linear" or
    "autopar.rotary"; ``args``/``kwargs`` hold `Ref`, `Size`, numbers, strings, None and tuples of these).
    ``module`` is the path of the module that computed it, relative to the block. ``logits``: whether it is the linear
    layer that a graph's loss reads the result of; graphs tell their nodes.
    """

    name: str
    kind: str
    meta: TensorMeta
    op: str = ""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    target: str = ""
    module: str = ""
    logits: bool = field(default=False, init=False, repr=False, compare=False)
    _operands: tuple[str, ...] | None = field(default=None, init=False, repr=False, compare=False)

    def operands(self) -> tuple[str, ...]:
        """Names of the tensor arguments, in order: args first, then kwargs by insertion; repeats stay."""
        if self._operands is None:
            found: list[str] = []
            substitute((self.args, self.kwargs), found.append)
            object.__setattr__(self, "_operands", tuple(found))
        return cast(tuple[str, ...], self._operands)


def substitute(value: Any, put: Callable[[str], Any]) -> Any:
    """``value`` with every `Ref` inside replaced by ``put`` of its name, in order; lists become tuples."""
    if isinstance(value, Ref):
        return put(value.name)
    if isinstance(value, tuple | list):
        return tuple(substitute(item, put) for item in value)
    if isinstance(value, dict):
        return {key: substitute(item, put) for key, item in value.items()}
    return value


def map_refs(value: Any, rename: Callable[[str], str]) -> Any:
    """``value`` with every `Ref` inside renamed."""
    return substitute(value, lambda name: Ref(rename(name)))


@dataclass(frozen=True, slots=True)
class OpGraph:
    """Nodes in execution order by name, and the names of the outputs."""

    nodes: dict[str, Node]
    outputs: tuple[str, ...]

    def __post_init__(self) -> None:
        for node in self.nodes.values():
            if node.op != LOSS:
                continue
            while node.op and node.op != LINEAR and node.operands():  # through views, casts and what caps logits
                node = self.nodes[node.operands()[0]]
            if node.op == LINEAR:
                object.__setattr__(node, "logits", True)

    def of(self, kind: str) -> Iterator[Node]:
        """The nodes of one kind ("input", "parameter", "buffer", "op"), in order."""
        return (node for node in self.nodes.values() if node.kind == kind)

    def users(self) -> dict[str, list[str]]:
        """For each node, the names of the nodes that read it (once each)."""
        users: dict[str, list[str]] = {name: [] for name in self.nodes}
        for node in self.nodes.values():
            for operand in dict.fromkeys(node.operands()):
                users[operand].append(node.name)
        return users

    def __str__(self) -> str:
        lines = []
        for node in self.nodes.values():
            shape = ", ".join(map(str, node.meta.shape))
            body = node.target if node.kind != "op" else f"{node.op}{node.args!r}{node.kwargs or ''}"
            lines.append(f"{node.name}: {node.meta.dtype}[{shape}] = {node.kind} {body}")
        return "\n".join([*lines, f"return {', '.join(self.outputs)}"])


@dataclass(frozen=True, slots=True)
class Source:
    """Where a block's input comes from: output ``index`` of block ``block``, a batch tensor, or a shared constant.

    ``origin`` is "block", "batch" or "constant"; ``key`` is the batch key, or the constant's node name.
    """

    origin: str
    block: int = -1
    index: int = 0
    key: str = ""


@dataclass(frozen=True, slots=True)
class BlockKind:
    """A repeated piece of the model, written once. ``name`` is a Python class name, unique in the model."""

    name: str
    graph: OpGraph
    _digest: str = field(default="", init=False, repr=False, compare=False)

    @property
    def passes_gradient(self) -> bool:
        """Whether it has a backward: not where it and all before it are frozen."""
        return any(self.graph.nodes[name].meta.requires_grad for name in self.graph.outputs)

    def digest(self) -> str:
        """Sixteen hex digits that change with anything in its graph."""
        from autopar.graph.serialize import graph_to_json

        if not self._digest:
            object.__setattr__(self, "_digest", _digest(graph_to_json(self.graph)))
        return self._digest


@dataclass(frozen=True, slots=True)
class Block:
    """One occurrence of a kind: ``path`` is its module path ("" for pieces outside a repeated module), ``inputs``
    maps the kind's input nodes to sources, ``parameters`` the kind's parameter and buffer targets to full names."""

    kind: str
    path: str
    inputs: dict[str, Source]
    parameters: dict[str, str]


@dataclass(frozen=True, slots=True)
class ModelGraph:
    """A traced model: kinds, the blocks in order, and what surrounds them.

    * ``constants``: values that depend on no parameter and no batch data (rotary tables), computed once per stage;
      its outputs are what blocks name by `Source("constant", key=...)`. Its only leaves are buffers and the batch
      keys in ``positions_from`` (read for their sizes alone).
    * The last block's first output is the loss **summed** over the micro-batch; ``count`` is a graph from batch tensors
      to the number the sum is divided by (valid targets).
    * ``batch``: for each batch key, the tensor one micro-batch brings.
    * ``parameters``/``buffers``: full name to meta. ``tied``: groups of full names that are one tensor; the first name
      of a group is the one listed in ``parameters``.
    * ``buffer_values``: the flattened values of buffers that are known and small, so that emitted code can hold them.
    * ``max_seq``: longest sequence that its tables of positions and masks allow, or for which it runs the code that was
      traced; ``min_seq``: the shortest. ``nominal_seq``: the one its config speaks of, if it does. ``notes``: what the
      user should be told once.
    """

    name: str
    kinds: dict[str, BlockKind]
    blocks: tuple[Block, ...]
    constants: OpGraph
    count: OpGraph
    batch: dict[str, TensorMeta]
    parameters: dict[str, TensorMeta]
    buffers: dict[str, TensorMeta]
    tied: tuple[tuple[str, ...], ...] = ()
    buffer_values: dict[str, tuple[float, ...]] = field(default_factory=dict)
    max_seq: int | None = None
    min_seq: int = 1
    nominal_seq: int | None = None
    notes: tuple[str, ...] = ()
    _fingerprint: str = field(default="", init=False, repr=False, compare=False)

    def fingerprint(self) -> str:
        """Sixteen hex digits that change with anything a plan depends on.

        Not with the name or the values of buffers: a catalog name and a module of the same structure share plans.
        """
        from autopar.graph.serialize import model_to_json

        if not self._fingerprint:
            data = {key: value for key, value in model_to_json(self).items() if key not in _UNHASHED}
            object.__setattr__(self, "_fingerprint", _digest(data))
        return self._fingerprint

    def count_parameters(self) -> int:
        """Number of parameters, tied ones once."""
        total = 0
        for meta in self.parameters.values():
            numel = 1
            for size in meta.at(1, 1):
                numel *= size
            total += numel
        return total


def _digest(data: Any) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
