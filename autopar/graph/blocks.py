"""Cuts a simplified model graph into a chain of blocks, and finds the blocks that are the same.

A block is one call of a repeated layer (`autopar.graph.structure.repeats`), or a piece between layers: Prologue,
Middle, Epilogue. What depends on neither parameters nor batch data is shared: it becomes the constants graph. Of other
blocks, a block reads only the one before it (`autopar.graph.handing`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from autopar.graph.draft import Draft
from autopar.graph.fold import STAND_IN, CannotFoldError, Fold
from autopar.graph.handing import Segment, hand_on, lend, sink
from autopar.graph.ir import Block, BlockKind, Node, OpGraph, Source, map_refs
from autopar.graph.naming import leaf_name, named, purpose
from autopar.graph.size import BATCH
from autopar.graph.structure import layer_of


@dataclass(frozen=True, slots=True)
class Blocks:
    """The chain: kinds by name, blocks in order, the constants graph."""

    kinds: dict[str, BlockKind]
    blocks: tuple[Block, ...]
    constants: OpGraph


def cut(draft: Draft, layers: Mapping[str, str], class_names: Mapping[str, str], fold: Fold | None = None) -> Blocks:
    """Partition ``draft``. ``layers``: path to structure key; ``class_names``: path to class name.

    Layers that ``fold`` made stand-ins of become blocks of their representative's kind. Raises CannotFoldError when the
    graph shows that they may differ. A layer that computes something else each time it is called (without gradients,
    say) is no block, of which a module has one: then there is a single block.
    """
    given = draft
    draft, shared = _merge_shared(draft, _shared(draft, layers))
    lent = lend(draft, layers)
    if len(segments := _segments(lent, layers, shared)) > 1:
        draft = lent
    else:
        segments = _segments(draft, layers, shared)
    draft, segments = sink(draft, segments, shared)
    home = {name: index for index, segment in enumerate(segments) for name in segment.nodes}
    wanted, readers = _outputs(draft, segments, home)
    carried = hand_on(segments, wanted, readers)
    wanted = [(*own, *passed) for own, passed in zip(wanted, carried, strict=True)]
    constants, constant_names = _constants(draft, segments, layers, shared)
    kinds: dict[str, BlockKind] = {}
    forms: dict[tuple[object, ...], str] = {}
    blocks: list[Block] = []
    for index, segment in enumerate(segments):
        if any(draft.nodes[name].op == STAND_IN for name in segment.nodes):
            assert fold is not None
            blocks.append(_stand_in(fold, segment, index, blocks, wanted))
            continue
        passed = carried[index]
        nodes, sources, targets = _extract(draft, segment, index, home, wanted, passed, shared, constant_names)
        form = canonical(nodes, wanted[index])
        if form not in forms:
            wished = _kind_name(segment, index, len(segments), class_names)
            forms[form] = name = _unique(wished, kinds)
            graph, _ = named(nodes, wanted[index], _input_names(nodes, sources, blocks, kinds))
            kinds[name] = BlockKind(name, graph)
        kind = kinds[forms[form]]
        inputs = dict(zip((node.name for node in kind.graph.of("input")), sources, strict=True))
        blocks.append(Block(kind.name, segment.module, inputs, targets))
    called = {(block.path, block.kind) for block in blocks if block.path}
    if len(called) > len({path for path, _ in called}):
        if fold is not None:
            raise CannotFoldError("a layer computes something else each time it is called")
        return cut(given, {}, class_names)
    return Blocks(kinds, tuple(blocks), constants)


def _stand_in(
    fold: Fold, segment: Segment, index: int, blocks: Sequence[Block], wanted: Sequence[tuple[str, ...]]
) -> Block:
    """The block of a stood-in layer, if the graph agrees that it is its representative's twin."""
    path = fold.representative[segment.path]
    places = {block.path: place for place, block in enumerate(blocks)}
    if path not in places or fold.first[path] not in places:
        raise CannotFoldError(f"{path} has no block of its own")
    place = places[path]
    twin = blocks[place]
    alike = twin.kind == blocks[places[fold.first[path]]].kind
    if (
        not alike
        or len(segment.nodes) > 1
        or any(len(wanted[near]) != 1 for near in (place - 1, place, index - 1, index))
    ):
        raise CannotFoldError(f"{segment.path} differs from {path}, or more than one tensor leaves a layer")
    inputs: dict[str, Source] = {}
    for name, source in twin.inputs.items():
        if source.origin == "block" and source.block == place - 1:
            source = replace(source, block=index - 1)
        elif source.origin == "block" and blocks[source.block].path:
            raise CannotFoldError(f"{path} reads {blocks[source.block].path}, which is not the layer before it")
        inputs[name] = source
    old, new = f"{path}.", f"{segment.path}."
    parameters = {
        target: new + full.removeprefix(old) if full.startswith(old) else full
        for target, full in twin.parameters.items()
    }
    return Block(twin.kind, segment.path, inputs, parameters)


def _shared(draft: Draft, layers: Mapping[str, str]) -> set[str]:
    """Constant nodes that no layer's own buffer feeds, and that are no repetition for the samples of a batch."""
    shared: set[str] = set()
    for node in draft.nodes.values():
        own = node.kind == "buffer" and layer_of(node.target, layers) is not None
        repeated = node.op == "aten.expand" and BATCH in node.meta.shape
        if node.name in draft.constant and not (own or repeated) and all(name in shared for name in node.operands()):
            shared.add(node.name)
    return shared


def _merge_shared(draft: Draft, shared: set[str]) -> tuple[Draft, set[str]]:
    """Equal shared constants, computed in several places, become one."""
    names: dict[str, str] = {}
    first: dict[str, str] = {}
    merged = Draft(output=draft.output)
    for node in draft.nodes.values():
        args, kwargs = map_refs(node.args, names.__getitem__), map_refs(node.kwargs, names.__getitem__)
        key = repr((node.kind, node.op, args, kwargs, node.meta, node.target)) if node.name in shared else node.name
        names[node.name] = first.setdefault(key, node.name)
        if names[node.name] == node.name:
            merged.nodes[node.name] = replace(node, args=args, kwargs=kwargs)
    merged.constant = draft.constant & merged.nodes.keys()
    return merged, shared & merged.nodes.keys()


def _segments(draft: Draft, layers: Mapping[str, str], shared: set[str]) -> list[Segment]:
    segments: list[Segment] = []
    for node in draft.nodes.values():
        if node.kind != "op" or node.name in shared:
            continue
        path = layer_of(node.module, layers) or ""
        if not segments or segments[-1].path != path:
            segments.append(Segment(path))
        segments[-1].nodes.append(node.name)
    paths = [segment.path for segment in segments if segment.path]
    if len(set(paths)) < 2 or len(set(paths)) != len(paths) or _share(draft, segments, layers):
        whole = Segment("", [name for segment in segments for name in segment.nodes])
        return [whole]
    return _absorb(draft, segments)


def _share(draft: Draft, segments: Sequence[Segment], layers: Mapping[str, str]) -> bool:
    """Whether a layer reads a parameter of another: such layers are no blocks, whose parameters are their own."""
    for segment in segments:
        own = re.sub(r"@\d+", "", segment.path)
        for name in segment.nodes if own else ():
            for operand in draft.nodes[name].operands():
                leaf = draft.nodes[operand]
                if leaf.kind == "parameter" and layer_of(leaf.target, layers) not in (None, own):
                    return True
    return False


def _absorb(draft: Draft, segments: list[Segment]) -> list[Segment]:
    """What runs between two layers of one container belongs to the layer before it, unless it has parameters of its
    own, which are not that layer's."""
    merged: list[Segment] = []
    for index, segment in enumerate(segments):
        following = segments[index + 1] if index + 1 < len(segments) else None
        before = merged[-1] if merged else None
        between = not segment.path and before and following and _container(before.path) == _container(following.path)
        if before and between and not _reads_parameters(draft, segment):
            before.nodes.extend(segment.nodes)
        else:
            merged.append(segment)
    return merged


def _reads_parameters(draft: Draft, segment: Segment) -> bool:
    operands = {operand for name in segment.nodes for operand in draft.nodes[name].operands()}
    return any(draft.nodes[operand].kind == "parameter" for operand in operands)


def _container(path: str) -> str:
    return path.rpartition(".")[0]


def _outputs(
    draft: Draft, segments: Sequence[Segment], home: Mapping[str, int]
) -> tuple[list[tuple[str, ...]], dict[str, list[int]]]:
    """For each segment, its nodes that later segments read (and the loss), the last one first: the layer's result.

    And for each of them the segments that read it.
    """
    readers: dict[str, list[int]] = {draft.output: []}
    for index, segment in enumerate(segments):
        for name in segment.nodes:
            for operand in draft.nodes[name].operands():
                if home.get(operand, index) != index:
                    readers.setdefault(operand, []).append(index)
    wanted = []
    for segment in segments:
        *others, result = [name for name in segment.nodes if name in readers] or [""]
        wanted.append((result, *others) if result else ())
    rest = tuple(name for name in wanted[-1] if name != draft.output)
    wanted[-1] = (draft.output, *rest)
    return wanted, readers


def _is_own(node: Node, segment: Segment) -> bool:
    return not segment.path or node.target.startswith(segment.module + ".")


def _constants(
    draft: Draft, segments: Sequence[Segment], layers: Mapping[str, str], shared: set[str]
) -> tuple[OpGraph, dict[str, str]]:
    """The graph of shared constants that blocks read, and the names of its outputs by draft name."""
    outputs: dict[str, None] = {}
    for segment in segments:
        for name in segment.nodes:
            for operand in draft.nodes[name].operands():
                node = draft.nodes[operand]
                if operand in shared and not (node.kind == "buffer" and _is_own(node, segment)):
                    outputs[operand] = None
    needed = set(outputs)
    for node in reversed(draft.nodes.values()):
        if node.name in needed:
            needed.update(node.operands())
    nodes = [node for node in draft.nodes.values() if node.name in needed]
    graph, names = named(nodes, tuple(outputs), _purposes(draft, segments, outputs))
    return graph, {name: names[name] for name in outputs}


def _purposes(draft: Draft, segments: Sequence[Segment], values: Iterable[str]) -> dict[str, str]:
    """Names of shared constants, after what their first reader does with them, where that is known."""
    found: dict[str, str] = {}
    wanted = set(values)
    for name in (name for segment in segments for name in segment.nodes):
        reader = draft.nodes[name]
        operands = reader.operands()
        for place, operand in enumerate(operands):
            value = draft.nodes[operand]
            if operand in wanted and operand not in found and value.kind == "op" and not _is_counted(draft, value):
                word = purpose(value, reader, place, draft.nodes[operands[0]].target.rpartition(".")[0])
                found |= {operand: word} if word else {}
    return found


def _is_counted(draft: Draft, node: Node) -> bool:
    """Whether a value is a view of 0, 1, 2 ...: positions."""
    while node.op in ("aten.unsqueeze", "aten.expand", "aten.view", "autopar.cast"):
        node = draft.nodes[node.operands()[0]]
    return node.op == "aten.arange"


def _extract(
    draft: Draft,
    segment: Segment,
    index: int,
    home: Mapping[str, int],
    wanted: Sequence[tuple[str, ...]],
    passed: Sequence[str],
    shared: set[str],
    constant_names: Mapping[str, str],
) -> tuple[list[Node], list[Source], dict[str, str]]:
    """One segment as a graph of its own: leaves first; sources of its inputs in order; targets to full names."""
    inputs: dict[str, Node] = {}
    parameters: dict[str, Node] = {}
    buffers: dict[str, Node] = {}
    sources: list[Source] = []
    targets: dict[str, str] = {}
    prefix = segment.module + "." if segment.path else ""
    ops: list[Node] = []
    for name in segment.nodes:
        node = draft.nodes[name]
        for operand in node.operands():
            leaf = draft.nodes[operand]
            if home.get(operand) == index or operand in inputs or operand in parameters or operand in buffers:
                continue
            if leaf.kind == "parameter" or (leaf.kind == "buffer" and _is_own(leaf, segment)):
                target = leaf.target.removeprefix(prefix) if leaf.target.startswith(prefix) else leaf.target
                targets[target] = leaf.target
                (parameters if leaf.kind == "parameter" else buffers)[operand] = replace(leaf, target=target, module="")
                continue
            inputs[operand] = Node(operand, "input", leaf.meta)
            if leaf.kind == "input":
                sources.append(Source("batch", key=leaf.target))
            elif operand in shared:
                sources.append(Source("constant", key=constant_names[operand]))
            else:
                sources.append(Source("block", block=index - 1, index=wanted[index - 1].index(operand)))
        ops.append(replace(node, module=_relative(node.module, segment)))
    for name in passed:
        if name not in inputs:
            inputs[name] = Node(name, "input", draft.nodes[name].meta)
            sources.append(Source("block", block=index - 1, index=wanted[index - 1].index(name)))
    return [*inputs.values(), *parameters.values(), *buffers.values(), *ops], sources, targets


def _relative(path: str, segment: Segment) -> str:
    """``path`` inside the segment's layer, without the numbers of repeated calls; "" for what runs around the layer."""
    inside = not segment.path or f"{path}.".startswith(f"{segment.path}.")
    return re.sub(r"@\d+", "", path.removeprefix(segment.path).removeprefix(".")) if inside else ""


def canonical(nodes: Sequence[Node], outputs: Sequence[str]) -> tuple[object, ...]:
    """A value equal for graphs that are equal up to the names of nodes (input targets are not compared)."""
    numbers = {node.name: f"%{place}" for place, node in enumerate(nodes)}
    return (
        *(
            (
                node.kind,
                node.meta,
                node.op,
                repr(map_refs(node.args, numbers.__getitem__)),
                repr(sorted(map_refs(node.kwargs, numbers.__getitem__).items())),
                "" if node.kind == "input" else node.target,
                node.module,
            )
            for node in nodes
        ),
        tuple(numbers[name] for name in outputs),
    )


def _input_names(
    nodes: Sequence[Node], sources: Sequence[Source], blocks: Sequence[Block], kinds: Mapping[str, BlockKind]
) -> dict[str, str]:
    """The result of the block before is "hidden"; what else it hands over keeps its name."""

    def wished(source: Source) -> str:
        if source.origin == "block":
            return kinds[blocks[source.block].kind].graph.outputs[source.index] if source.index else "hidden"
        return leaf_name(source.key) if source.origin == "batch" else source.key

    inputs = [node for node in nodes if node.kind == "input"]
    return {node.name: wished(source) for node, source in zip(inputs, sources, strict=True)}


def _kind_name(segment: Segment, index: int, count: int, class_names: Mapping[str, str]) -> str:
    if segment.path:
        return class_names[segment.module]
    if count == 1:
        return "Model"
    return "Prologue" if index == 0 else "Epilogue" if index == count - 1 else "Middle"


def _unique(wished: str, taken: Mapping[str, object]) -> str:
    name, number = wished, 2
    while name in taken:
        name, number = f"{wished}{number}", number + 1
    return name
