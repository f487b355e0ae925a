"""How blocks hang together in the emitted stage: what flows between them, which are loops, modules or methods."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, count

from autopar.codegen.runtime import collectives, offload, operators, recompute
from autopar.errors import UnsupportedError
from autopar.graph.ir import BlockKind, ModelGraph
from autopar.plan import Candidate, Plan

_MODULE_NAMES = frozenset(
    ("Stage", "Weights", "New", "Tensor", "DeviceMesh", "MESH", "STAGES", "TIED", "F", "nn", "torch", "checkpoint")
)
"""What module.py defines or imports beside the classes of blocks."""


_FUNCTIONS = frozenset(
    name for module in (collectives, operators, recompute, offload) for name in vars(module) if not name.startswith("_")
)
"""What module.py may import and call inside a forward: no argument may have such a name."""


@dataclass(frozen=True, slots=True)
class Placed:
    """One block of the model: its index and path, stage, candidate, class (or method) name, and call arguments."""

    index: int
    kind: str
    path: str
    stage: int
    candidate: Candidate
    callee: str
    arguments: tuple[str, ...]

    @property
    def container(self) -> str:
        """The module list it is in ("" if it is in none)."""
        head, _, last = self.path.rpartition(".")
        return head if last.isdigit() else ""

    @property
    def position(self) -> int:
        return int(self.path.rpartition(".")[2])


def place_blocks(plan: Plan, model: ModelGraph) -> tuple[Placed, ...]:
    """Every block where the plan puts it. Raises UnsupportedError for a model that is no chain."""
    flow = flow_after(model)
    tables = table_names(model)
    names: dict[tuple[str, str], str] = {}
    placed = []
    stages = {
        block: s for s, stage in enumerate(plan.stages) for run in stage.runs for block in range(run.start, run.stop)
    }
    for index, block in enumerate(model.blocks):
        candidate = plan.candidate_of(index)
        key = (block.kind, repr(candidate.decision.to_json()))
        if key not in names:
            known = any(kind == block.kind for kind, _ in names)
            # A second decision for a kind must not take the name of another kind, which ends in a number as well.
            others = {_class_name(kind) for kind in model.kinds if known or kind != block.kind}
            names[key] = _numbered(_base_name(block.kind, model), {*others, *names.values()}, _class_name(block.kind))
        callee = names[key] if block.path else free_name(_snake(names[key]), top_names(model))
        arguments = []
        for source in block.inputs.values():
            if source.origin == "block" and source.block != index - 1:
                raise UnsupportedError(
                    f"block {index} ({block.path or block.kind}) reads the output of block {source.block}: emitted "
                    "stages pass activations from each block to the next only"
                )
            if source.origin == "block":
                arguments.append(flow[index - 1][source.index])
            else:
                arguments.append(tables[source.key] if source.origin == "constant" else argument_name(source.key))
        placed.append(Placed(index, block.kind, block.path, stages[index], candidate, callee, tuple(arguments)))
    return tuple(placed)


def _class_name(kind: str) -> str:
    name = re.sub(r"\W", "_", kind)
    return f"{name}Block" if name in _MODULE_NAMES else name


def _base_name(kind: str, model: ModelGraph) -> str:
    """The class name of a kind, without the number that tells it from others of the same class."""
    base = kind.rstrip("0123456789")
    return _class_name(base if base in model.kinds else kind)


def _numbered(base: str, taken: set[str], first: str) -> str:
    """``first``, or the first of base2, base3 ... that is free."""
    return next(free for free in chain((first,), (f"{base}{n}" for n in count(2))) if free not in taken)


def flow_names(model: ModelGraph) -> tuple[str, ...]:
    """Names of the activations that go from block to block: what the most frequent kind calls them."""
    kinds = [block.kind for block in model.blocks[1:]]
    common = max(dict.fromkeys(kinds), key=kinds.count) if kinds else model.blocks[0].kind
    block = next((b for b in model.blocks[1:] if b.kind == common), model.blocks[0])
    names: dict[int, str] = {}
    for name, source in block.inputs.items():
        if source.origin == "block":
            node = model.kinds[common].graph.nodes[name]
            names[source.index] = argument_name(node.target or name)
    count = max((len(model.kinds[b.kind].graph.outputs) for b in model.blocks), default=1)
    return tuple(names.get(index, f"hidden_{index + 1}" if index else "hidden") for index in range(count))


def flow_after(model: ModelGraph) -> tuple[tuple[str, ...], ...]:
    """For each block, the names of what it returns: the result under the model's common name, the rest their own."""
    common = flow_names(model)
    kinds = [model.kinds[block.kind].graph for block in model.blocks]
    if all(len(kind.outputs) == 1 for kind in kinds):
        return tuple(common[:1] for _ in model.blocks)
    sources = {source for block in model.blocks for source in block.inputs.values()}
    taken = {common[0], *table_names(model).values()}
    taken |= {argument_name(source.key) for source in sources if source.origin == "batch"}
    names: list[tuple[str, ...]] = []
    for kind in kinds:
        own = [common[0]]
        for output in kind.outputs[1:]:
            own.append(free_name(argument_name(output), {*taken, *own}))
        names.append(tuple(own))
    return tuple(names)


def crossing(model: ModelGraph, index: int) -> tuple[str, ...]:
    """The names of what block ``index`` returns and the next one reads: what crosses a cut behind it."""
    following = model.blocks[index + 1].inputs.values()
    read = {source.index for source in following if source.origin == "block"}
    return tuple(name for place, name in enumerate(flow_after(model)[index]) if place in read)


def argument_names(kind: BlockKind, flow: dict[str, str]) -> dict[str, str]:
    """Argument names of a kind's forward, by input node."""
    names: dict[str, str] = {}
    for node in kind.graph.of("input"):
        names[node.name] = flow.get(node.name) or distinct(node.target or node.name, (*flow.values(), *names.values()))
    return names


def table_names(model: ModelGraph) -> dict[str, str]:
    """What a stage calls the shared tables, by output of the constants graph."""
    names: dict[str, str] = {}
    for output in model.constants.outputs:
        names[output] = distinct(output, (*map(argument_name, model.batch), *flow_names(model), *names.values()))
    return names


def distinct(text: str, taken: Iterable[str]) -> str:
    """`argument_name` of ``text``, numbered if that is one of ``taken``."""
    name = argument_name(text)
    return _numbered(f"{name}_", set(taken), name)


def argument_name(text: str) -> str:
    """``text`` as a Python name, without what tracing appended to it."""
    name = re.sub(r"(_(wide|compute|float32))+(_\d+)?$", "", re.sub(r"\W", "_", text.rpartition(".")[2]))
    name = {"arange": "positions"}.get(name, name)
    if name in _FUNCTIONS:
        return f"{name}_"
    return name if is_writable(name) else f"x_{name}"


def is_writable(name: str) -> bool:
    """Whether ``name`` can be written as an attribute: "0" and "in" are names of modules that cannot."""
    return name.isidentifier() and not keyword.iskeyword(name)


def free_name(wished: str, taken: Iterable[str]) -> str:
    """``wished``, with as many underscores behind it as keep it from being one of ``taken``."""
    taken = set(taken)
    while wished in taken:
        wished += "_"
    return wished


def top_names(model: ModelGraph) -> frozenset[str]:
    """What the model itself calls the members of its outermost module: the stage may call nothing else so."""
    return frozenset(full.partition(".")[0] for full in model.parameters)


def blocks_method(model: ModelGraph) -> str:
    """The name of ``Stage.blocks``, for a model that has a member of that name itself."""
    return free_name("blocks", top_names(model))


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
