"""The forward of a stage whose blocks are not all alike in what they take: several lists of layers (an encoder and a
decoder), layers that take other arguments than their neighbours, more than one tensor from block to block."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise

from autopar.codegen.calls import call, manner, remark
from autopar.codegen.emit_class import signature
from autopar.codegen.members import attribute
from autopar.codegen.source import statement
from autopar.codegen.wiring import Placed, crossing, flow_after
from autopar.graph.ir import ModelGraph


def is_plain(placed: Sequence[Placed], model: ModelGraph) -> bool:
    """Whether one tensor goes from block to block, and all layers are of one list, one after another, and take the same
    arguments."""
    loops = [block for block in placed if block.container]
    return (
        all(len(model.kinds[block.kind].graph.outputs) == 1 for block in placed)
        and len({(block.container, block.arguments) for block in loops}) <= 1
        and all(after.index == before.index + 1 for before, after in pairwise(loops))
    )


def forward_signature(placed: Sequence[Placed], model: ModelGraph, index: str, many: bool) -> list[str]:
    """``def forward``, and on later stages the names of what the stage before hands over."""
    batch = list(model.batch)
    if not many:
        return signature("forward", [], batch, 1, 1)
    # What follows *flow is passed by name as it is.
    lines = signature("forward", ["*flow", *batch], [], 1, 1)
    lines[-1] = lines[-1].replace("-> Tensor:", "-> Tensor | tuple[Tensor, ...]:")
    for before, block in pairwise(placed):
        if before.stage != block.stage:
            names = ", ".join(crossing(model, before.index))
            lines += [f"        if self.{index} == {block.stage}:", f"            {names}, = flow"]
            if ", " in names:
                lines[-1] = lines[-1].replace(", = ", " = ")
    return lines


def forward_parts(
    placed: Sequence[Placed], model: ModelGraph, index: str, many: bool
) -> list[tuple[Placed, list[str]]]:
    """The statements of forward behind its signature: for each loop or single block, its first block and the lines."""
    parts: list[tuple[Placed, list[str]]] = []
    for container, group in groupby(placed, lambda block: block.container):
        blocks = list(group)
        # A list whose layers take turns with others is written layer by layer.
        if container and sum(block.container == container for block in placed) == len(blocks):
            parts.append((blocks[0], _loop(container, blocks, model, _others(container, placed, model))))
        else:
            parts += [(block, _single(block, model, index, many)) for block in blocks]
        if many:
            parts[-1][1].extend(_returns(blocks, placed, model, index))
    return parts


def _single(block: Placed, model: ModelGraph, index: str, many: bool) -> list[str]:
    lines, margin = [], 2
    if many:
        lines, margin = [f"        if self.{index} == {block.stage}:"], 3
    last = block.index == len(model.blocks) - 1
    result = "return " if last else f"{', '.join(flow_after(model)[block.index])} = "
    function = attribute("self", block.path) if block.path else f"self.{block.callee}"
    lines += remark(block.candidate, margin)
    return [*lines, *statement(result, call(function, block.arguments, block.candidate), str, margin)]


def _others(container: str, placed: Sequence[Placed], model: ModelGraph) -> list[str]:
    """Names of the members of a list that are no blocks: their parameters are those of other blocks."""
    inside = [
        full.removeprefix(f"{container}.").partition(".")[0]
        for block in placed
        if block.container != container
        for full in model.blocks[block.index].parameters.values()
        if full.startswith(f"{container}.")
    ]
    return list(dict.fromkeys(inside))


def _loop(container: str, blocks: Sequence[Placed], model: ModelGraph, others: Sequence[str]) -> list[str]:
    """A loop over the layers of one list that the stage holds; layers that are called otherwise are told by name, as
    are ``others``, which are no layers."""
    names = flow_after(model)
    forms: dict[tuple[tuple[str, ...], tuple[str, ...], str], list[Placed]] = {}
    for block in blocks:
        forms.setdefault((block.arguments, names[block.index], manner(block.candidate)), []).append(block)
    ordered = sorted(forms.items(), key=lambda item: len(item[1]))  # the most frequent call comes last, as else
    path = attribute("self", container)
    if len(ordered) == 1 and not others:
        lines = [f"        for block in {path}.values():"]
    else:
        lines = [f"        for i, block in {path}.items():"]
    if others:
        among = f'== "{others[0]}"' if len(others) == 1 else f"in {tuple(others)}"
        lines += [f"            if i {among}:", "                continue"]
    for place, ((arguments, results, _), alike) in enumerate(ordered):
        margin = 3
        if len(ordered) > 1:
            if place + 1 == len(ordered):
                lines.append("            else:")
            else:
                lines.append(f"            {'el' if place else ''}if {_among([block.position for block in alike])}:")
            margin = 4
        result = ", ".join(results)
        if blocks[-1].index == len(model.blocks) - 1 and len(blocks) == 1:
            result = "loss"
        lines += remark(alike[0].candidate, margin)
        lines += statement(f"{result} = ", call("block", arguments, alike[0].candidate), str, margin)
    return lines


def _among(positions: Sequence[int]) -> str:
    if len(positions) == 1:
        return f'i == "{positions[0]}"'
    if list(positions) == list(range(positions[0], positions[-1] + 1)):
        return f"int(i) in range({positions[0]}, {positions[-1] + 1})"
    return f"int(i) in {{{', '.join(map(str, positions))}}}"


def _returns(blocks: Sequence[Placed], placed: Sequence[Placed], model: ModelGraph, index: str) -> list[str]:
    """What leaves the stages that end among ``blocks``: what the next block reads."""
    lines: list[str] = []
    ending = [
        block for block in blocks if block.index + 1 < len(placed) and placed[block.index + 1].stage != block.stage
    ]
    for block in ending:
        lines.append(f"        if self.{index} == {block.stage}:")
        lines.append(f"            return {', '.join(crossing(model, block.index))}")
    return lines
