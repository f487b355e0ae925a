"""Operator times from a profile: measured where the shape is there, else read off the surface between measured shapes.

An operator that the profile does not know, or whose sizes are far outside of what was measured, is left to the caller's
roofline. Parts of an operator that the profile has no table for (summing the gradient of a bias) are too.

**Bounds.** Bounds of the search divide arithmetic evenly (`OpCosts.arithmetic_seconds`): for those to hold, no price
may be below FLOP / `best_rate`, for any shape. So prices between measured shapes are kept above that, `best_rate` being
the best of all measured ones. A matmul's backward is priced product by product, so that what one gradient less saves is
what the other product takes (`solver.halves`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from math import log2, prod

import numpy as np

from autopar.graph.ir import Node
from autopar.job import Job
from autopar.measured import Measured
from autopar.profiler.shapes import WIDTHS, Point, family
from autopar.profiler.surface import Surface, relative_fit
from autopar.solver.work import ATTENTION, MATMULS, is_causal
from autopar.solver.work_parts import LocalTensor, Matmul, Work

BELOW, ABOVE = 2.0, 4.0
"""Octaves outside the measured range of a size that its surface is still read at: efficiencies stay as they are towards
large sizes, and fall towards small ones."""

SOURCES = ("measured", "interpolated")

Part = tuple[float, bool]
"""Seconds, and whether they were measured at this very shape."""

Rest = Callable[[Work, int], float]
"""Seconds of work by the roofline; bytes per element."""


class OpTable:
    """One operator in one dtype and direction."""

    def __init__(self, measured: Measured, op: str, dtype: str, direction: str) -> None:
        self.family, self.direction, self.width = family(op), direction, WIDTHS[dtype]
        rows = measured.rows(f"{op} {dtype} {direction}")
        self.known = {point: seconds for point, seconds, _ in rows}
        costs = [self.family.cost(point, direction, self.width) for point, _, _ in rows]
        self.surface: Surface | None = None
        self.best_rate = 0.0
        if rows:
            flops, nbytes = zip(*costs, strict=True)
            points, seconds, spread = zip(*rows, strict=True)
            self.surface = Surface(points, seconds, flops, nbytes, spread)
            self.best_rate = max(work / time for work, time in zip(flops, seconds, strict=True))
        self._read: dict[Point, Part | None] = {}

    def at(self, point: Point) -> Part | None:
        """Seconds at a point; None where the table says nothing of it."""
        if point not in self._read:
            self._read[point] = self._at(point)
        return self._read[point]

    def _at(self, point: Point) -> Part | None:
        if point in self.known:
            return self.known[point], True
        if self.surface is None or min(point) < 1:
            return None
        logs = [log2(size) for size in point]
        if any(
            value < low - BELOW or value > high + ABOVE
            for value, low, high in zip(logs, self.surface.low, self.surface.high, strict=True)
        ):
            return None
        flops, nbytes = self.family.cost(point, self.direction, self.width)
        seconds = self.surface.read(point, flops, nbytes)
        return max(seconds, flops / self.best_rate if flops else 0.0), False


@lru_cache(maxsize=8)
def _read_tables(measured: Measured) -> dict[tuple[str, str, str], OpTable]:
    """Tables read so far; every `MeasuredOps` of the same measurements shares them."""
    return {}


class MeasuredOps:
    """Prices operators of one job by one profile."""

    def __init__(self, measured: Measured, job: Job) -> None:
        self.measured, self.job = measured, job
        self._dtypes = {4: "fp32", job.compute_bytes: job.dtype}
        self._tables = _read_tables(replace(measured, slowdown=1.0))

    def seconds(
        self,
        node: Node,
        inputs: Sequence[LocalTensor],
        output: LocalTensor,
        grads: Sequence[bool],
        works: tuple[Work, Work],
        rest: Rest,
    ) -> tuple[float, float, str] | None:
        """(forward, backward, source) of a node on local tensors, or None where the profile does not know it."""
        width = inputs[0].bytes_per_element if inputs else output.bytes_per_element
        dtype = self._dtypes.get(width)
        if dtype not in WIDTHS:
            return None
        name = node.op.removeprefix("aten.").removeprefix("autopar.")
        if name in MATMULS:
            first = int(node.op in ("aten.addmm", "aten.baddbmm"))  # a bias comes before the operands
            parts = self._matmul(dtype, width, grads[first : first + 2], works, rest)
        else:
            told = _point_of(node, name, inputs, output)
            parts = self._trained(*told, dtype, width, any(grads), works, rest) if told else None
        if parts is None:
            return None
        (forward, exact), (backward, back_exact) = parts
        return forward, backward, SOURCES[0] if exact and back_exact else SOURCES[1]

    def best_rate(self, width: int, attention: bool = False) -> float:
        """The most FLOP/s that any price of a matmul (or of attention) in this width has; 0 if none is measured."""
        dtype = self._dtypes.get(width)
        if dtype not in WIDTHS:
            return 0.0
        names = ("attention", "causal_attention") if attention else ("matmul", "batched_matmul")
        rates = [
            self._table(name, dtype, direction).best_rate for name in names for direction in family(name).directions
        ]
        return max(rates) / self.measured.slowdown

    def adamw_seconds(self, elements: int) -> float | None:
        """A fused AdamW step over float32 parameters, linear in their number; None if it is not measured."""
        known = self._table("adamw_fused", "fp32", "step").known
        if not known:
            return None
        columns = np.array([[1.0, point[0]] for point in known])
        start, each = relative_fit(columns, np.array(list(known.values())))
        return float(start + each * elements) * self.measured.slowdown

    def _table(self, op: str, dtype: str, direction: str) -> OpTable:
        key = (op, dtype, direction)
        if key not in self._tables:
            self._tables[key] = OpTable(self.measured, *key)
        return self._tables[key]

    def _matmul(
        self,
        dtype: str,
        width: int,
        wanted: Sequence[bool],
        works: tuple[Work, Work],
        rest: Rest,
    ) -> tuple[Part, Part] | None:
        if len(works[0].matmuls) != 1:
            return None
        product = works[0].matmuls[0]
        forward = self._product(product, "forward", dtype)
        if forward is None:
            return None
        back = 0.0
        exact = True
        for direction, grad in zip(("input_grad", "weight_grad"), wanted, strict=True):
            found = self._product(product, direction, dtype)
            if found is None:  # asked of both, wanted or not: what one gradient less saves must be the other's price
                return None
            if grad:
                back += found[0]
                exact = exact and found[1]
        extra = Work(nbytes=works[1].nbytes, kernels=works[1].kernels - sum(wanted))
        return forward, (back + rest(extra, width), exact)

    def _product(self, product: Matmul, direction: str, dtype: str) -> Part | None:
        batch, m, n, k = product
        if batch == 1:
            return self._at("matmul", dtype, direction, (m, n, k), 1)
        return self._at("batched_matmul", dtype, direction, (batch, m, n, k), 1)

    def _at(self, op: str, dtype: str, direction: str, point: Point, kernels: float) -> Part | None:
        """A table's figure as a rank has it; not less than the host takes to start so many kernels."""
        found = self._table(op, dtype, direction).at(point)
        if found is None:
            return None
        return max(found[0] * self.measured.slowdown, kernels * self.measured.host_s), found[1]

    def _trained(
        self, op: str, point: Point, dtype: str, width: int, wanted: bool, works: tuple[Work, Work], rest: Rest
    ) -> tuple[Part, Part] | None:
        """An operator whose directions are measured whole; one without a backward leaves that to the rest."""
        forward = self._at(op, dtype, "forward", point, works[0].kernels)
        if forward is None:
            return None
        if op == "copy":  # the gradient is copied as well
            return forward, forward if wanted and works[1].kernels else (0.0, True)
        if "backward" not in family(op).directions:
            return forward, (rest(works[1], width), not works[1].kernels)
        backward = self._at(op, dtype, "backward", point, works[1].kernels) if wanted else (0.0, True)
        return None if backward is None else (forward, backward)


def _point_of(node: Node, name: str, inputs: Sequence[LocalTensor], output: LocalTensor) -> tuple[str, Point] | None:
    """The family and sizes that stand for a node on local tensors, if one does."""
    if not inputs or not output.elements:
        return None
    first = inputs[0]
    if node.op == ATTENTION:
        query, key = first.shape, inputs[1].shape
        same = len(inputs) == 3 and query[-2] == key[-2] and query[-1] == inputs[2].shape[-1]
        problems, held = prod(query[:-2]), prod(key[:-2])
        if not same or problems % held:
            return None
        return "causal_attention" if is_causal(node) else "attention", (
            problems,
            problems // held,
            query[-2],
            query[-1],
        )
    rows = prod(first.shape[:-1])
    if name in ("layer_norm", "native_layer_norm", "rms_norm"):
        return ("rms_norm" if name == "rms_norm" else "layer_norm"), (rows, first.shape[-1])
    if name in ("softmax", "_softmax") and first == output:
        return "softmax", (rows, first.shape[-1])
    if name == "cross_entropy":
        return "cross_entropy", (rows, first.shape[-1])
    if name == "embedding":
        return "embedding", (inputs[1].elements, first.shape[0], first.shape[1])
    alike = all(tensor == output for tensor in inputs)
    if name in ("silu", "gelu") and alike:
        return name, (output.elements,)
    if name == "mul" and alike and len(inputs) == 2:
        return "multiply", (output.elements,)
    if name in ("add", "sub") and alike and len(inputs) == 2:
        return "add", (output.elements,)
    if name in ("clone", "contiguous") and alike:
        return "copy", (output.elements,)
    return None
