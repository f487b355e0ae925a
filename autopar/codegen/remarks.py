"""Comments on collectives: the axis, what moves, how many bytes for one micro-batch, and the predicted time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from autopar.codegen.setting import Setting
from autopar.graph.ir import COMPUTE, Node
from autopar.graph.size import Size, size_at
from autopar.sharding.conversions import Step
from autopar.sharding.factors import RING
from autopar.sharding.layout import Layout
from autopar.sharding.rules import Strategy


def step_remarks(setting: Setting, node: Node, axis: str, step: Step, layout: Layout) -> tuple[str, ...]:
    """What one step of a conversion moves, forward and backward; nothing where it moves nothing.

    ``layout``: how the tensor is held before. Bytes are those of the tensor that is whole on ``axis``, and this rank's
    part of it on the other axes.
    """
    if not step.forward_bytes and not step.backward_bytes:
        return ()
    back = _action(step.backward) if step.backward_bytes else "nothing to move"
    nbytes = _bytes(setting, node.meta.shape, node.meta.dtype, axis, layout)
    if not step.forward_bytes:
        if step.source.kind == "I" and node.kind == "parameter":
            return ()
        return (f"{axis}: nothing to move; backward: {back} of {_amount(nbytes)}",)
    what = node.target if node.kind == "parameter" else "per micro-batch"
    seconds = setting.seconds(step.forward, nbytes, axis)
    time = f", {_time(seconds)}" if seconds is not None else ""
    return (f"{axis} {_action(step.forward)}, {_amount(nbytes)} {what}{time}; backward: {back}",)


def inner_remarks(setting: Setting, choice: Mapping[str, Strategy], operands: Sequence[Layout]) -> tuple[str, ...]:
    """What an operator moves by itself; ``choice``: its strategies; ``operands``: how it reads them."""
    lines = []
    for axis, strategy in choice.items():
        for inner in dict.fromkeys(strategy.inner):
            nbytes = _bytes(setting, inner.shape, inner.dtype, axis, operands[inner.like])
            seconds = setting.seconds(inner.collective, nbytes, axis)
            time = f", {_time(seconds)}" if seconds is not None else ""
            if inner.collective == RING:
                if not inner.backward:
                    when = "per micro-batch, as attention computes; backward: with gradients"
                    lines.append(f"{axis} ring, {_amount(nbytes)}{time} {when}")
                continue
            count = strategy.inner.count(inner)
            times = f"{count} times " if count > 1 else ""
            when = "in backward" if inner.backward else "per micro-batch"
            each = f"{time} each" if time else ""
            lines.append(f"{axis} {_action(inner.collective)}, {times}{_amount(nbytes)} {when}{each}")
    return tuple(lines)


def _bytes(setting: Setting, shape: tuple[int | Size, ...], dtype: str, axis: str, layout: Layout) -> int:
    nbytes = setting.compute_bytes if dtype == COMPUTE else 4
    for dim, size in enumerate(shape):
        ways = prod(setting.axes[other] for other in layout.splits(dim) if other != axis)
        nbytes *= -(-size_at(size, setting.micro_batch, setting.seq_len) // ways)
    return nbytes


def _action(action: str) -> str:
    return action.replace("_", "-")


def _amount(nbytes: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes} B"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"
