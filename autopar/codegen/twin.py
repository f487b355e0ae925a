"""What is verified in one process: the plan itself if it is small enough, else a twin with the same decisions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from itertools import groupby
from math import prod

import torch
from torch import nn

from autopar.codegen.narrow import narrow_model
from autopar.errors import UnsupportedError, VerificationError
from autopar.graph.ir import ModelGraph
from autopar.graph.padding import as_planned
from autopar.plan import Candidate, Plan, Run, Stage
from autopar.sharding.check import check_decision

MOST_BYTES = 3e9
"""Float64 weights and gradients that a proof may hold at once, over all ranks and the reference."""

MOST_RANKS = 16


@dataclass(frozen=True, slots=True)
class Twin:
    """A plan, the model and graph it is for, and ``how`` they were shrunk ("" if they were not)."""

    plan: Plan
    model: nn.Module
    graph: ModelGraph
    how: str


def small_twin(
    plan: Plan, model: nn.Module, graph: ModelGraph, trace: Callable[[nn.Module], ModelGraph], whole: bool = False
) -> Twin:
    """The plan with a short batch (``whole``: of sequences as long as the job's), and, if it is still too large: two
    ranks on each axis, a few blocks of every run, and for models with a Hugging Face ``config`` narrow layers. Every
    block kind and decision stays.

    Raises UnsupportedError when even that does not fit.
    """
    short = _short_batch(plan, graph, whole)
    if _bytes(short, graph) <= MOST_BYTES and short.mesh.data * short.mesh.tp <= MOST_RANKS:
        return Twin(short, model, graph, "")
    kept = _kept_runs(plan, graph)
    narrow = narrow_model(plan, model, _kept_layers(kept, graph))
    small = trace(narrow)
    twin = _short_batch(_few_blocks(_few_ranks(plan), kept, small), small, whole)
    _check(twin, small)
    if _bytes(twin, small) > MOST_BYTES:
        raise UnsupportedError(
            f"{graph.name} is too large to verify in one process even as a twin ({_bytes(twin, small) / 1e9:.1f} GB of "
            "weights and gradients): verify a narrower configuration of the same architecture, or the emitted "
            "folder under torchrun"
        )
    how = f"{twin.mesh}, {len(small.blocks)} of {len(graph.blocks)} blocks, narrow layers"
    return Twin(twin, narrow, small, how)


def _bytes(plan: Plan, graph: ModelGraph) -> float:
    copies = 2 + plan.mesh.data * 2
    return 8.0 * graph.count_parameters() * copies


def _short_batch(plan: Plan, graph: ModelGraph, whole: bool) -> Plan:
    """Few samples, micro-batches and positions, as long as every decision still divides."""
    job = plan.job
    step = 8 * plan.mesh.cp * plan.mesh.tp
    few = min(plan.micro_batch, 2)
    lengths = [job.seq_len] if whole else range(step, 4 * step + 1, step)
    sizes = [(few, seq) for seq in lengths if graph.min_seq <= seq <= job.seq_len]
    for batch, seq in (*sizes, (plan.micro_batch, job.seq_len)):
        micro_batches = min(plan.micro_batches, 2)
        short = replace(
            plan,
            micro_batch=batch,
            micro_batches=micro_batches,
            job=replace(job, seq_len=seq, global_batch=plan.mesh.dp * batch * micro_batches),
        )
        try:
            _check(short, graph)
        except VerificationError:
            continue
        return short
    return plan


def _check(plan: Plan, graph: ModelGraph) -> None:
    graph = as_planned(plan, graph)
    for candidate in plan.candidates.values():
        decision = candidate.decision
        check_decision(graph.kinds[decision.kind], decision, plan.micro_batch, plan.job.seq_len)


def _few_ranks(plan: Plan) -> Plan:
    """At most two ranks on each data and model axis."""
    old = plan.mesh
    parts = tuple(min(size, 2) for size in old.tp_parts)
    tp = prod(parts) if parts else min(old.tp, 2)
    mesh = replace(old, dp=min(old.dp, 2), cp=min(old.cp, 2), tp=tp, tp_parts=parts, ep=min(old.ep, 2))
    candidates = {name: _on_axes(candidate, mesh.axes()) for name, candidate in plan.candidates.items()}
    fsdp = plan.fsdp if mesh.data % plan.fsdp == 0 else mesh.data
    pad_heads = tp if plan.pad_heads > 1 else 1
    return replace(plan, mesh=mesh, candidates=candidates, fsdp=fsdp, pad_heads=pad_heads)


def _on_axes(candidate: Candidate, sizes: dict[str, int]) -> Candidate:
    axes = {axis: sizes[axis] for axis in candidate.decision.axes}
    return replace(candidate, decision=replace(candidate.decision, axes=axes))


@dataclass(frozen=True, slots=True)
class _Kept:
    """A run of which the twin has some blocks (``copies``)."""

    run: Run
    copies: int

    @property
    def places(self) -> list[int]:
        """The blocks that those of the twin stand for."""
        return [min(self.run.start + copy, self.run.stop - 1) for copy in range(self.copies)]


def _kept_runs(plan: Plan, graph: ModelGraph) -> list[list[_Kept]]:
    """Per stage that is kept, its runs: the first and last stage, and any with a new candidate."""
    kept: list[list[_Kept]] = []
    seen: set[str] = set()
    for index, stage in enumerate(plan.stages):
        names = [run.candidate for run in stage.runs]
        alike = [list(group) for _, group in groupby(stage.runs, key=lambda run: run.candidate)]
        merged = [replace(runs[0], stop=runs[-1].stop) for runs in alike]
        if index in (0, len(plan.stages) - 1) or not seen.issuperset(names):
            kept.append([_Kept(run, _copies(run, graph)) for run in merged])
            seen.update(names)
    return kept


def _copies(run: Run, graph: ModelGraph) -> int:
    """How many blocks of a run the twin keeps: two of several, and of the only layer there is, which would not be seen
    as one that may be repeated."""
    path = _list_of(run.start, graph)
    alone = sum(_list_of(index, graph) == path for index in range(len(graph.blocks))) == 1
    return 2 if path and (alone or run.stop - run.start > 1) else 1


def _list_of(block: int, graph: ModelGraph) -> str:
    """The module path of the list that has a block; empty for what is between lists."""
    return graph.blocks[block].path.rpartition(".")[0]


def _kept_layers(kept: list[list[_Kept]], graph: ModelGraph) -> dict[str, list[int]]:
    """Of each list of layers those that the twin's stand for, in order."""
    lists: dict[str, list[int]] = {}
    for index in range(len(graph.blocks)):
        lists.setdefault(_list_of(index, graph), []).append(index)
    layers: dict[str, list[int]] = {}
    for one in (one for stage in kept for one in stage):
        path = _list_of(one.run.start, graph)
        if path:
            layers.setdefault(path, []).extend(lists[path].index(place) for place in one.places)
    return layers


def _few_blocks(plan: Plan, kept: list[list[_Kept]], small: ModelGraph) -> Plan:
    """The plan for a model with the blocks that are kept."""
    stages, start = [], 0
    for some in kept:
        runs = []
        for one in some:
            runs.append(Run(start, start + one.copies, one.run.candidate))
            start = runs[-1].stop
        stages.append(Stage(tuple(runs), 0.0, 0.0, 0.0, {}))
    if start != len(small.blocks):
        raise UnsupportedError(
            f"cannot make a twin of {plan.model} with {start} blocks: it has {len(small.blocks)}; verify "
            "a smaller configuration of the same architecture"
        )
    names = {one.run.candidate for some in kept for one in some}
    candidates = {name: candidate for name, candidate in plan.candidates.items() if name in names}
    return replace(
        plan,
        mesh=replace(plan.mesh, pp=len(stages)),
        vpp=1,
        schedule="1f1b" if len(stages) > 1 else "none",
        stages=tuple(stages),
        candidates=candidates,
        fingerprint=small.fingerprint(),
    )


def wide_copy(model: nn.Module, graph: ModelGraph, dtype: torch.dtype, seed: int) -> nn.Module:
    """A training-mode copy on the CPU in ``dtype``; weights and buffers on meta get random or traced values."""
    on_meta = any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    made = copy.deepcopy(model)
    if on_meta:
        lost = {name for name, buffer in made.named_buffers() if buffer.is_meta}
        made._apply(lambda x: torch.empty_like(x, device="cpu") if x.is_meta else x)  # type: ignore[no-untyped-call]
        _tie(made, graph)
        _draw(made, graph, seed, lost)
    made._apply(lambda tensor: _wide(tensor, dtype))  # type: ignore[no-untyped-call]
    for parameter in made.parameters():
        parameter.grad = None
    return made.train()


def _wide(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """On the CPU; numbers in ``dtype``, complex ones with parts in it (`Module.to` would drop what is imaginary)."""
    if tensor.is_complex():
        return tensor.to("cpu", torch.complex128 if dtype == torch.float64 else torch.complex64)
    return tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)


def _tie(model: nn.Module, graph: ModelGraph) -> None:
    """Make tied names one parameter again: `to_empty` gives each its own."""
    for first, *others in graph.tied:
        for name in others:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, model.get_parameter(first))


@torch.no_grad()
def _draw(model: nn.Module, graph: ModelGraph, seed: int, lost: Collection[str]) -> None:
    """Random parameters, and for the ``lost`` buffers the values that the graph has."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 1 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.1
        parameter.copy_(noise * scale + (parameter.ndim < 2))
    for name, buffer in model.named_buffers():
        values = graph.buffer_values.get(name)
        if values is not None and name in lost:
            buffer.copy_(torch.tensor(values).reshape(buffer.shape))
