"""Block decisions with their full cost: seconds each way, bytes kept, bytes needed while the block runs.

* Bytes saved for backward are read off autograd: the sharded block runs on one rank's fake tensors
  (`graph.saved`), exactly as it will be emitted. Parameters, constants and batch tensors exist anyway and do not count;
  the input handed on by the block before counts here, once. They grow linearly with the batch (measured at one and two
  samples), except where the batch itself is split.
* Recompute "full" keeps the block's input alone; its backward runs the forward again, collectives included, and what
  the block saves is then transient.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from autopar.graph.ir import BlockKind
from autopar.graph.saved import saved_for_backward
from autopar.job import Job
from autopar.sharding.decision import BlockDecision
from autopar.sharding.execute import local_shape, run_local
from autopar.sharding.rules import strategy_of
from autopar.solver.decision_costs import boundary_bytes, decision_price, live_bytes, local_elements
from autopar.solver.prices import AxisPrices

RECOMPUTE = ("none", "full")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True, slots=True)
class BlockCost:
    """A block kind under a decision and a recompute choice, per rank and micro-batch.

    ``again_s``: of the seconds, those of recomputation; ``communication_s``: of the others, those in collectives.
    ``elements``: parameters held on the model axes; ``inflight``: bytes kept for backward, ``boundary``: of these (or
    beside them) the input; ``transient``: bytes while it runs. ``sources``: seconds by where the figure is from.
    """

    kind: str
    decision: BlockDecision
    recompute: str
    forward_s: float
    backward_s: float
    communication_s: float
    again_s: float
    elements: int
    inflight: int
    transient: int
    sources: dict[str, float] = field(default_factory=dict, hash=False)

    def recomputed(self, boundary: int) -> BlockCost:
        """The same decision with the whole block recomputed in backward; ``boundary``: bytes of its inputs."""
        share = self.forward_s / max(self.forward_s + self.backward_s, 1e-30)
        return replace(
            self,
            recompute="full",
            backward_s=self.backward_s + self.forward_s,
            again_s=self.forward_s,
            inflight=boundary,
            transient=self.transient + max(0, self.inflight - boundary),
            sources={name: seconds * (1 + share) for name, seconds in self.sources.items()},
        )


class BlockCosts:
    """Costs of decisions for one job; saved bytes are measured once per decision."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._saved: dict[tuple[str, str], tuple[int, int]] = {}
        self.measured = 0

    def of(self, kind: BlockKind, decision: BlockDecision, prices: AxisPrices) -> dict[str, BlockCost]:
        """The cost by recompute choice."""
        price, sources = decision_price(kind, decision, prices)
        elements = local_elements(kind, decision)
        boundary = boundary_bytes(kind, decision, prices.batch, self.job)
        inflight = self.saved(kind, decision, prices.batch)
        plain = BlockCost(
            kind=kind.name,
            decision=decision,
            recompute="none",
            forward_s=price.forward_s,
            backward_s=price.backward_s,
            communication_s=price.communication_s,
            again_s=0.0,
            elements=elements,
            inflight=inflight,
            transient=live_bytes(kind, decision, prices.batch, self.job),
            sources=sources,
        )
        return {"none": plain, "full": plain.recomputed(boundary)}

    def saved(self, kind: BlockKind, decision: BlockDecision, batch: int) -> int:
        """Bytes per rank that the sharded block keeps for backward, its input included."""
        key = (kind.name, json.dumps(decision.to_json(), sort_keys=True))
        law = self._saved.get(key)
        if law is None:
            if _splits_batch(kind, decision, self.job.seq_len):
                self.measured += 1
                return measure_saved(kind, decision, batch, self.job)
            one, two = (measure_saved(kind, decision, samples, self.job) for samples in (1, 2))
            self.measured += 2
            law = self._saved[key] = (2 * one - two, two - one)
        return law[0] + law[1] * batch


def measure_saved(kind: BlockKind, decision: BlockDecision, batch: int, job: Job) -> int:
    """Run one rank of the block on fake tensors and add up what autograd keeps."""
    compute = _DTYPES[job.dtype]
    values: dict[str, torch.Tensor] = {}
    counts: list[bool] = []
    for node in kind.graph.nodes.values():
        if node.kind == "op":
            continue
        shape = local_shape(node.meta.at(batch, job.seq_len), decision.inputs[node.name], decision.axes)
        dtype = _dtype(node.meta.dtype, compute)
        grad = node.meta.requires_grad and dtype.is_floating_point
        values[node.name] = torch.empty(shape, dtype=dtype, device="meta").requires_grad_(grad)
        counts.append(node.kind == "input" and grad)

    def run(tensors: Mapping[str, torch.Tensor]) -> Any:
        return run_local(kind, decision, tensors, batch, job.seq_len, compute)

    total = sum(value.nbytes for value, counted in zip(values.values(), counts, strict=True) if counted)
    for record in saved_for_backward(run, (values,)):
        if record.argument is None and record.output is None:
            total += record.bytes
    return total


def _dtype(name: str, compute: torch.dtype) -> torch.dtype:
    if name == "compute":
        return compute
    if name == "float32" and compute == torch.float64:
        return torch.float64
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def _splits_batch(kind: BlockKind, decision: BlockDecision, seq: int) -> bool:
    """Whether some tensor is split by batch on a model axis, so that one sample may not divide."""
    for node in kind.graph.of("op"):
        for axis, name in decision.strategies[node.name].items():
            strategy = strategy_of(node, kind.graph, name)
            metas = [kind.graph.nodes[operand].meta for operand in node.operands()]
            pairs = [*zip(metas, strategy.inputs, strict=True), (node.meta, strategy.output)]
            for meta, held in pairs:
                if held.kind == "S" and meta.at(1, seq)[held.dim] % decision.axes[axis]:
                    return True
    return False
