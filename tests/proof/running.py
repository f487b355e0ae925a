"""Runs cases: each is searched with its fix, emitted, and proved by real ranks against one device."""

from __future__ import annotations

import json
import os
import shutil
import time
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from autopar.cluster import Cluster
from autopar.codegen import prove
from autopar.codegen.typecheck import typecheck
from autopar.job import Job
from autopar.plan import Plan
from autopar.solver.capabilities import Chosen
from autopar.solver.search import search
from proof.cases import Case
from proof.models import Variant, batches, build, graph_of, loss_of

TYPED = (8, 64, 512)
"""Numbers of ranks on which the types of emitted code are checked: model axes as planned, data ranks for the rest."""

WIDTHS = {"fp64": torch.float64, "fp32": torch.float32}
"""What one device computes in: 16-bit jobs are compared with float32, and may be off as one 16-bit device is."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one case: what was measured, or at which step ("search", "emit", "types", "run") it failed and why;
    ``typed``: the numbers of ranks its types were checked on."""

    case: str
    ranks: int
    measured: prove.Measured | None
    failed: str = ""
    reason: str = ""
    typed: tuple[int, ...] = ()

    @property
    def failures(self) -> list[str]:
        found = [f"{self.case}: {self.failed} failed: {self.reason}"] if self.failed else []
        return found + (self.measured.failures() if self.measured else [])


def plan_of(case: Case) -> Plan:
    """The plan that the search makes of the case's fix, on one node of catalog GPUs.

    A float64 job is planned as a float32 one: no catalog device has figures for float64.
    """
    job, planned = case.job, "fp32" if case["dtype"] == "fp64" else case["dtype"]
    job = Job(job.global_batch, job.seq_len, planned, job.optimizer)
    plan = search(graph_of(case.variant), job, Cluster.parse(f"1x{case.ranks}:h100"), case.fix())
    for what, asked, got in differences(case, plan):
        raise AssertionError(f"the fix asked for {what} {asked}, the plan has {got}")
    return prove.with_dtype(plan, case["dtype"])


def differences(case: Case, plan: Plan) -> Iterator[tuple[str, Any, Any]]:
    """Where the plan is not what the case asks for: a search that ignored a part of a fix would prove nothing."""
    choice, found = case.choice(), Chosen.of(plan)
    for name in Chosen.__dataclass_fields__:
        asked, got = getattr(choice, name), getattr(found, name)
        if name == "recompute" and case["recompute"] != "mixed":
            layers = [index for index, block in enumerate(graph_of(case.variant).blocks) if block.path]
            got = frozenset(plan.candidate_of(layer).recompute for layer in layers)
        if name == "dtype" or (name in ("zero", "fsdp") and case.mesh.data == 1):
            continue
        if asked != got:
            yield name, asked, got
    counts = tuple(sum(run.stop - run.start for run in stage.runs) for stage in plan.stages)
    if case.counts and counts != case.counts:
        yield "blocks in stages", case.counts, counts
    if len(counts) != case.mesh.pp * case.vpp:
        yield "stages", case.mesh.pp * case.vpp, len(counts)


@cache
def _weights(variant: Variant, dtype: str) -> tuple[Any, dict[str, torch.Tensor]]:
    model = build(variant).to(WIDTHS.get(dtype, torch.float32))
    return model, {name: value.clone() for name, value in model.state_dict().items()}


@cache
def _reference(variant: Variant, dtype: str, samples: int, optimizer: str) -> dict[str, Any]:
    model, weights = _weights(variant, dtype)
    model.load_state_dict(weights)
    return prove.one_device(model, batches(variant, samples), loss_of, dtype == "fp64", optimizer, dtype)


def prepare(case: Case, folder: Path, types: Iterable[int] = ()) -> Outcome:
    """Add the case to ``folder`` and check its emitted types on so many ranks; says at which step it failed, if it did.
    A case whose types are wrong is run all the same."""
    graph, step, typed = graph_of(case.variant), "search", []
    try:
        plan = plan_of(case)
        step = "emit"
        reference = _reference(case.variant, case["dtype"], case.global_batch, case["optimizer"])
        weights = _weights(case.variant, case["dtype"])[1]
        prove.prepare(folder, {str(case): plan}, graph, weights, reference)
        step = "types"
        for world in types:
            typecheck(plan, graph, world)
            typed.append(world)
        step = ""
    except Exception as error:  # whatever it is, it is what this case shows; the others go on
        return Outcome(str(case), case.ranks, None, step, _told(error), tuple(typed))
    return Outcome(str(case), case.ranks, None, typed=tuple(typed))


def _told(error: Exception) -> str:
    return "".join([*traceback.format_tb(error.__traceback__)[-2:], f"{type(error).__name__}: {error}"])


def run(cases: Iterable[Case], folder: Path, types: Iterable[int] = ()) -> list[Outcome]:
    """Make the plans of all cases, some at a time, and run those of each number of ranks; in the order given."""
    shutil.rmtree(folder, ignore_errors=True)
    outcomes: dict[str, Outcome] = {}
    cases = list(cases)
    for ranks in sorted({case.ranks for case in cases}):
        own = [case for case in cases if case.ranks == ranks]
        place = folder / f"{ranks}_ranks"
        place.mkdir(parents=True)
        begin = time.perf_counter()
        outcomes |= _prepared(own, place, tuple(types))
        print(f"{len(own)} plans on {ranks} ranks made in {time.perf_counter() - begin:.0f} s", flush=True)
        begin = time.perf_counter()
        rows, failures = prove.prove_each(place, ranks)
        print(f"run in {time.perf_counter() - begin:.0f} s", flush=True)
        for row in rows:
            outcomes[row.name] = replace(outcomes[row.name], measured=row)
        for name, reason in failures.items():
            outcomes[name] = replace(outcomes[name], failed="run", reason=reason)
    return [outcomes[str(case)] for case in cases]


def _prepared(cases: list[Case], place: Path, types: tuple[int, ...]) -> dict[str, Outcome]:
    """Prepare cases in as many processes as there are cores: those of one model together, traced once."""
    models: dict[Variant, list[Case]] = {}
    for case in cases:
        models.setdefault(case.variant, []).append(case)
    parts = sorted(models.values(), key=len, reverse=True)
    folders = [place / f"model_{index}" for index in range(len(parts))]
    outcomes: dict[str, Outcome] = {}
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for found in pool.map(_prepare_part, parts, folders, repeat(types)):
            outcomes |= {outcome.case: outcome for outcome in found}
    prove.join(place, folders)
    return outcomes


def _prepare_part(cases: list[Case], folder: Path, types: tuple[int, ...]) -> list[Outcome]:
    torch.set_num_threads(1)
    folder.mkdir()
    return [prepare(case, folder, types) for case in cases]


def table(outcomes: Iterable[Outcome]) -> str:
    """One line per case; ``of limit``: the error that is nearest to its limit, as a part of it."""
    outcomes = list(outcomes)
    width = max(len(outcome.case) for outcome in outcomes)
    lines = [
        f"{'':7}{'case':<{width}}  {'loss':>8}{'gradient':>10}{'norm':>9}{'3 steps':>9}{'of limit':>10}  "
        f"{'types':<11}worst gradient"
    ]
    for outcome in outcomes:
        row = outcome.measured
        head = f"{'FAILED' if outcome.failures else 'ok':7}{outcome.case:<{width}}  "
        if row is None:
            lines.append(head + f"{outcome.failed} failed: {outcome.reason.strip().splitlines()[-1][:120]}")
            continue
        steps = "-" if row.parameter is None else f"{row.parameter:.1e}"
        share = max(error / most for error, most in row.shares().values())
        types = " ".join(map(str, outcome.typed)) or "-"
        lines.append(
            head
            + f"{row.loss:>8.1e}{row.gradient:>10.1e}{row.norm:>9.1e}{steps:>9}{share:>10.1%}  {types:<11}"
            + row.worst_gradient
        )
    return "\n".join(lines)


def write(outcomes: list[Outcome], folder: Path) -> None:
    """Write ``table.txt`` and ``table.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.txt").write_text(table(outcomes) + "\n")
    (folder / "table.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
