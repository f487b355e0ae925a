"""Two plans side by side: the decisions that differ, and where seconds and bytes do. Works from the plans alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from autopar.mesh import AXES
from autopar.plan import MEMORY_KINDS, Plan
from autopar.report.columns import span, value_text
from autopar.report.text import recompute_text, schedule_words


@dataclass(frozen=True, slots=True)
class Pair:
    """What is said of the first plan and of the second."""

    name: str
    first: str
    second: str


@dataclass(frozen=True, slots=True)
class Amount:
    """Seconds or bytes of the first plan and of the second."""

    name: str
    first: float
    second: float

    @property
    def more(self) -> float:
        """What the second has more."""
        return self.second - self.first


@dataclass(frozen=True, slots=True)
class OperatorsDiffer:
    """Operators of a block kind (names of nodes) that run one strategy in the first plan, another in the second."""

    kind: str
    first: str
    second: str
    operators: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PlanDiff:
    """What differs between two plans.

    ``premises``: model, job or cluster, where they are not the same; ``decisions`` and ``operators``: only what
    differs; ``step``: seconds; ``seconds``: by what the step is made of on the rank that decides it; ``held``: bytes of
    the fullest rank, ``ranks``: which ones, ``bytes``: theirs by kind.
    """

    premises: tuple[Pair, ...]
    decisions: tuple[Pair, ...]
    operators: tuple[OperatorsDiffer, ...]
    step: Amount
    tokens_per_second: Amount
    seconds: tuple[Amount, ...]
    held: Amount
    ranks: tuple[int, int]
    bytes: tuple[Amount, ...]

    @property
    def same(self) -> bool:
        """Whether nothing that is decided differs."""
        return not (self.premises or self.decisions or self.operators)


def diff(first: Plan, second: Plan) -> PlanDiff:
    """What differs from ``first`` to ``second``."""
    ours, theirs = decided(first), decided(second)
    parts = first.predicted.breakdown, second.predicted.breakdown
    names = dict.fromkeys(name for part in parts for name in part)
    ranks = fullest_rank(first), fullest_rank(second)
    full = rank_bytes(first)[ranks[0]], rank_bytes(second)[ranks[1]]
    return PlanDiff(
        premises=tuple(_premises(first, second)),
        decisions=tuple(Pair(name, ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]),
        operators=tuple(_operators(first, second)),
        step=Amount("step time", first.predicted.step_time, second.predicted.step_time),
        tokens_per_second=Amount(
            "tokens per second", first.predicted.tokens_per_second, second.predicted.tokens_per_second
        ),
        seconds=tuple(Amount(name, *(part.get(name, 0.0) for part in parts)) for name in names),
        held=Amount("fullest rank", *(sum(some.values()) for some in full)),
        ranks=ranks,
        bytes=tuple(Amount(kind, *(some.get(kind, 0) for some in full)) for kind in MEMORY_KINDS),
    )


def _premises(first: Plan, second: Plan) -> list[Pair]:
    """What the plans were made for, where it differs."""
    found = []
    if first.fingerprint != second.fingerprint:
        found.append(Pair("model", f"{first.model} ({first.fingerprint})", f"{second.model} ({second.fingerprint})"))
    ours, theirs = first.job.to_json(), second.job.to_json()
    found += [Pair(name, str(ours[name]), str(theirs[name])) for name in ours if ours[name] != theirs[name]]
    if str(first.cluster) != str(second.cluster):
        found.append(Pair("cluster", str(first.cluster), str(second.cluster)))
    elif first.cluster != second.cluster:
        found.append(Pair("cluster", f"{first.cluster}, priced by its figures", "the same, priced by other figures"))
    return found


def decided(plan: Plan) -> dict[str, str]:
    """The decisions outside the operators, as words."""
    return {
        "mesh": str(replace(plan.mesh, order=AXES)),
        "order of ranks": ", ".join(plan.mesh.order),
        "micro-batch": f"{plan.micro_batch} x {plan.micro_batches} per step",
        "schedule": schedule_words(plan),
        "ZeRO": str(plan.zero),
        "fsdp": str(plan.fsdp),
        "stay gathered": _by_block(plan, lambda name: value_text(_stays(plan, name))),
        "recompute": _by_block(plan, lambda name: recompute_text(plan.candidates[name])),
        "stages": " | ".join(span(stage.runs[0].start, stage.runs[-1].stop) for stage in plan.stages),
        "state on the host": value_text(plan.offload == "state"),
        "activations on the host": _by_block(plan, lambda name: value_text(plan.candidates[name].offload)),
        "heads padded to": str(plan.pad_heads),
        "equal blocks": value_text(plan.equal_blocks),
    }


def _stays(plan: Plan, name: str) -> bool:
    """Whether blocks under a candidate stay gathered though ZeRO 3 frees others."""
    return plan.zero == 3 and plan.candidates[name].gathered


def _by_block(plan: Plan, told: Callable[[str], str]) -> str:
    """What is told of candidates, for runs of blocks; once if it is the same for all."""
    runs: list[tuple[int, int, str]] = []
    for run in (run for stage in plan.stages for run in stage.runs):
        word = told(run.candidate)
        if runs and runs[-1][2] == word:
            runs[-1] = (runs[-1][0], run.stop, word)
        else:
            runs.append((run.start, run.stop, word))
    return runs[0][2] if len(runs) == 1 else ", ".join(f"{span(start, stop)} {word}" for start, stop, word in runs)


def _operators(first: Plan, second: Plan) -> list[OperatorsDiffer]:
    ours, theirs = _strategies(first), _strategies(second)
    found: dict[tuple[str, str, str], list[str]] = {}
    for kind in (kind for kind in ours if kind in theirs):
        for node in (node for node in ours[kind] if node in theirs[kind]):
            a, b = ours[kind][node], theirs[kind][node]
            if a != b:
                found.setdefault((kind, a, b), []).append(node)
    return [OperatorsDiffer(*key, tuple(nodes)) for key, nodes in found.items()]


def _strategies(plan: Plan) -> dict[str, dict[str, str]]:
    """Per kind and operator how it is split, by all candidates that the plan has for the kind."""
    ways: dict[str, dict[str, dict[str, None]]] = {}
    for candidate in plan.candidates.values():
        kind = ways.setdefault(candidate.decision.kind, {})
        for node, choice in candidate.decision.strategies.items():
            kind.setdefault(node, {})[split_words(choice)] = None
    return {kind: {node: " or ".join(some) for node, some in nodes.items()} for kind, nodes in ways.items()}


def split_words(choice: dict[str, str]) -> str:
    """A strategy by axis as ``tp n`` (the factor that is split), "whole" where every rank runs the whole operator."""
    split = [f"{axis} {name}" for axis, name in choice.items() if name not in ("R", "I")]
    return ", ".join(split) or "whole"


def fullest_rank(plan: Plan) -> int:
    """The pipeline rank that holds most, the first of equals."""
    totals = [sum(held.values()) for held in rank_bytes(plan)]
    return totals.index(max(totals))


def rank_bytes(plan: Plan) -> list[dict[str, int]]:
    """Bytes of every pipeline rank by kind, all its stages together."""
    found = []
    for rank in range(plan.mesh.pp):
        held: dict[str, int] = {}
        for stage in plan.stages_of(rank):
            for kind, size in plan.stages[stage].memory.items():
                held[kind] = held.get(kind, 0) + size
        found.append(held)
    return found
