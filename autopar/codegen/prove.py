"""The proof on real ranks: emitted folders, run by torchrun, against one device.

Starting ranks costs seconds, so one launch runs many plans: `prepare` writes each emitted folder and what one device
computes, `prove` starts the ranks once, and each rank goes through the cases (see prove_rank.py). How far a plan may
be off is in compare.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autopar.codegen.compare import (
    ROUNDED,
    UNIT_ROUNDOFF,
    WHOLE_MULTIPLE,
    distance,
    limit,
    relative,
    whole_error,
)
from autopar.codegen.emit import emit
from autopar.codegen.runtime.scaling import LossScale
from autopar.errors import VerificationError
from autopar.graph.ir import ModelGraph
from autopar.plan import Plan

PARAMETER_TOLERANCE = 1e-8
"""Largest error of every parameter after the optimizer steps, in float64."""

STEPS = 3
LossOf = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, foreach=True),
    "sgd": partial(torch.optim.SGD, lr=1e-1, momentum=0.9, weight_decay=0.1, foreach=True),
}
MAX_NORM = 1.0
ROUNDINGS = 8
"""Runs of one device in 16 bits. One is a matter of luck: where a rounded value falls on the other side of a ReLU's
zero, a gradient jumps (an 8-layer T5 in float16: 0.0054 to 0.0114 over twelve runs)."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Errors of one plan against one device; ``parameter`` is None where no optimizer steps were taken.

    ``gradient``: that of the parameter nearest to its limit; ``whole``: that of all gradients as one vector. ``owns``:
    the errors of one device in the job's dtype, of the loss, of that parameter and of the whole (16 bits only).
    """

    name: str
    dtype: str
    loss: float
    gradient: float
    worst_gradient: str
    norm: float
    parameter: float | None
    worst_parameter: str
    whole: float = 0.0
    owns: tuple[float, float, float] | None = None

    def shares(self) -> dict[str, tuple[float, float]]:
        """What is compared, in words, with its error and its limit."""
        owns = self.owns or (None, None, None)
        loss, gradient = (limit(self.dtype, own) for own in owns[:2])
        whole = limit(self.dtype, owns[2], WHOLE_MULTIPLE)
        found = {
            "loss": (self.loss, loss),
            f"the gradient of {self.worst_gradient}": (self.gradient, gradient),
            "the whole gradient": (self.whole, whole),
            # |‖G‖ - ‖R‖| is at most ‖G - R‖.
            "the gradient norm": (self.norm, whole),
        }
        if self.parameter is not None:
            found[f"after {STEPS} steps {self.worst_parameter}"] = (self.parameter, PARAMETER_TOLERANCE)
        return found

    def failures(self) -> list[str]:
        """What is past its limit, in words; empty when all is well."""
        return [
            f"{self.name} {self.dtype}: {what} is off by {error:.1e} (at most {most:.1g})"
            for what, (error, most) in self.shares().items()
            if not error <= most
        ]


def one_device(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    loss_of: LossOf,
    steps: bool,
    optimizer: str = "adamw",
    dtype: str = "",
) -> dict[str, Any]:
    """What a single device computes: loss, gradients and norm of the first batch, parameters after all batches.

    ``steps``: whether to take optimizer steps, with the optimizer that the plans' job names. ``dtype``: of the plans'
    job; under 16 bits ``model`` is float32, and how far one device in that dtype is off is measured too. Frozen
    parameters have no gradient here, and must have none anywhere.
    """
    found: dict[str, Any] = {"batches": [dict(batch) for batch in batches], "steps": steps}
    taking = OPTIMIZERS[optimizer](model.parameters())
    for index, batch in enumerate(batches if steps else batches[:1]):
        taking.zero_grad()
        loss = loss_of(model, batch)
        torch.autograd.backward(loss)
        if index == 0:
            found["gradients"] = _gradients(model)
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        if index == 0:
            found["loss"], found["norm"] = loss.detach().clone(), norm.detach().clone()
        if index == 0 and dtype in ROUNDED:
            found["own"] = _own_errors(model, batch, loss_of, dtype, found)
        if steps:
            taking.step()
    found["parameters"] = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    return found


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def _own_errors(
    model: nn.Module, batch: Mapping[str, Tensor], loss_of: LossOf, dtype: str, right: Mapping[str, Any]
) -> dict[str, Any]:
    """The largest errors of the loss, of every gradient and of all together on one device that computes in ``dtype``,
    over `ROUNDINGS` ways to round the weights: to the nearest, then up or down by chance."""
    found = [_rounded_errors(model, batch, loss_of, dtype, right, seed) for seed in range(ROUNDINGS)]
    return {
        "loss": max(errors["loss"] for errors in found),
        "gradients": {name: max(errors["gradients"][name] for errors in found) for name in right["gradients"]},
        "whole": max(errors["whole"] for errors in found),
    }


def _rounded_errors(
    model: nn.Module, batch: Mapping[str, Tensor], loss_of: LossOf, dtype: str, right: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    scale = LossScale()
    while True:
        rounded = _Rounded(model, dtype, seed)
        factor = float(scale.value) if dtype == "fp16" else 1.0
        model.zero_grad()
        loss = loss_of(rounded, batch)
        torch.autograd.backward(loss * factor)
        gradients = {name: gradient / factor for name, gradient in _gradients(model).items()}
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        if dtype != "fp16" or scale.accepts(norm):
            break
    model.zero_grad()
    distances = {name: distance(gradients.get(name), gradient) for name, gradient in right["gradients"].items()}
    return {
        "loss": abs(float(loss.detach()) - float(right["loss"])) / abs(float(right["loss"])),
        "gradients": relative(distances, right["gradients"]),
        "whole": whole_error(distances, right["gradients"]),
    }


class _Rounded(nn.Module):
    """A float32 model that computes in 16 bits, as FSDP2's mixed precision does: parameters are cast when they are
    used, buffers stay as they are, and gradients arrive in float32. ``seed``: 0 rounds to the nearest; others first
    move every weight by up to half the distance to the next number, so that some are rounded the other way."""

    def __init__(self, model: nn.Module, dtype: str, seed: int) -> None:
        super().__init__()
        self.model, self.dtype, self.unit, self.seed = model, ROUNDED[dtype], UNIT_ROUNDOFF[dtype], seed

    def forward(self, **batch: Tensor) -> Any:
        drawn = torch.Generator().manual_seed(self.seed)
        cast = {}
        for name, weight in self.model.named_parameters():
            moved = self.unit * (2 * torch.rand(weight.shape, generator=drawn) - 1) if self.seed else 0.0
            cast[name] = (weight * (1 + moved)).to(self.dtype)
        return torch.func.functional_call(self.model, cast, (), batch)


def prepare(
    folder: Path,
    plans: Mapping[str, Plan],
    graph: ModelGraph,
    weights: Mapping[str, Tensor],
    reference: dict[str, Any],
) -> None:
    """Add cases to ``folder``: each plan emitted with these weights, and the `one_device` result it must reproduce.

    Raises ValueError for a plan in 16 bits where ``reference`` has no errors of one device.
    """
    for name, plan in plans.items():
        if plan.job.dtype in ROUNDED and "own" not in reference:
            raise ValueError(f"{name}: what one device in {plan.job.dtype} is off was not measured (one_device, dtype)")
    cases = cases_of(folder)
    key = f"reference_{len(cases)}.pt"
    torch.save(reference, folder / key)
    for name, plan in plans.items():
        case = f"case_{len(cases)}"
        emit(plan, graph, folder / case, weights)
        cases.append(
            {
                "name": name,
                "folder": case,
                "reference": key,
                "dtype": plan.job.dtype,
                "optimizer": plan.job.optimizer,
                "mesh": f"{plan.mesh}, fsdp={plan.fsdp}",
            }
        )
    (folder / "cases.json").write_text(json.dumps(cases))


def join(folder: Path, parts: Iterable[Path]) -> None:
    """Make the cases of ``parts``, folders inside ``folder``, its own."""
    cases = cases_of(folder)
    for part in parts:
        inside = part.relative_to(folder)
        for case in cases_of(part):
            cases.append({**case, **{key: str(inside / case[key]) for key in ("folder", "reference")}})
    (folder / "cases.json").write_text(json.dumps(cases))


def with_dtype(plan: Plan, dtype: str) -> Plan:
    """The same decisions for a job in another dtype."""
    return replace(plan, job=replace(plan.job, dtype=dtype))


def prove(folder: Path, ranks: int, timeout_s: float = 300.0) -> list[Measured]:
    """Run the cases of ``folder`` on ``ranks`` gloo processes, in one launch.

    Raises VerificationError with the end of the ranks' output if they fail or take longer than ``timeout_s``.
    """
    for name in ("measured.jsonl", "failed.jsonl"):
        (folder / name).unlink(missing_ok=True)
    run_ranks(["-m", "autopar.codegen.prove_rank", str(folder)], ranks, timeout_s)
    failed = _failed(folder)
    if failed:
        raise VerificationError("; ".join(f"{name}: {reason}" for name, reason in failed.items()))
    return _measured(folder)


MESHES = 6
"""Meshes of one launch. Their process groups stay to its end, each of gloo's polls in threads of its own, and some
hundred of them would leave no time for the ranks."""


def prove_each(folder: Path, ranks: int, timeout_s: float = 3600.0) -> tuple[list[Measured], dict[str, str]]:
    """`prove`, but a case that fails or hangs does not stop the others: the ranks are started again for the rest, and
    after every `MESHES` meshes.

    Names must differ. Returns what was measured, and for each case that failed the end of its ranks' output, by name.
    """
    failures: dict[str, str] = {}
    while True:
        cases = cases_of(folder)
        failures |= _failed(folder)
        done = {row.name for row in _measured(folder)}
        left = [case for case in cases if case["name"] not in done | set(failures)]
        if not left:
            return _measured(folder), failures
        # Every launch knows only what is next; the ranks append what they measure.
        meshes = list(dict.fromkeys(case["mesh"] for case in left))[:MESHES]
        left = sorted((case for case in left if case["mesh"] in meshes), key=lambda case: meshes.index(case["mesh"]))
        (folder / "left.json").write_text(json.dumps(left))
        try:
            run_ranks(["-m", "autopar.codegen.prove_rank", str(folder), "left.json"], ranks, timeout_s)
        except VerificationError as error:
            done = {row.name for row in _measured(folder)} | set(_failed(folder))
            guilty = next((case["name"] for case in left if case["name"] not in done), None)
            if guilty is None:  # all was measured: they only ended badly
                continue
            failures[guilty] = str(error)


def run_ranks(
    arguments: list[str], ranks: int, timeout_s: float, folder: Path | None = None, modules: Iterable[Path] = ()
) -> str:
    """Run a script under torchrun on this machine's CPU, in ``folder``; returns its output, standard error included.

    ``modules``: folders, beside this package's, whose modules the ranks can import.
    Leaves no process behind. Raises VerificationError if it fails or does not end in time.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *arguments]
    paths = [*map(str, (Path(__file__).parents[2], *modules)), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(paths).rstrip(os.pathsep),
    }
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=folder,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise VerificationError(f"{' '.join(arguments)}: no end after {timeout_s:.0f} s on {ranks} ranks") from None
    finally:
        _end(process)
    if process.returncode:
        # The first traceback is that of the rank that failed; torchrun's own comes after.
        start = max(0, output.find("Traceback") - 1000)
        raise VerificationError(f"{' '.join(arguments)} failed on {ranks} ranks:\n{output[start:][:6000]}")
    return output


def table(rows: Iterable[Measured]) -> str:
    """The errors as text, one plan per line."""
    lines = [f"{'plan':<34}{'dtype':<7}{'loss':>9}{'gradient':>10}{'norm':>9}{'3 steps':>9}  worst gradient"]
    for row in rows:
        parameter = "-" if row.parameter is None else f"{row.parameter:.1e}"
        lines.append(
            f"{row.name:<34}{row.dtype:<7}{row.loss:>9.1e}{row.gradient:>10.1e}{row.norm:>9.1e}{parameter:>9}"
            f"  {row.worst_gradient}"
        )
    return "\n".join(lines)


def _end(process: subprocess.Popen[str]) -> None:
    """End a process group that we started, ranks included (torchrun puts them in sessions of their own)."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)  # torchrun passes it on to its ranks
        try:
            process.communicate(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def cases_of(folder: Path, name: str = "cases.json") -> list[dict[str, str]]:
    path = folder / name
    return json.loads(path.read_text()) if path.exists() else []


def _measured(folder: Path) -> list[Measured]:
    path = folder / "measured.jsonl"
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [Measured(**{**row, "owns": row["owns"] and tuple(row["owns"])}) for row in rows]


def _failed(folder: Path) -> dict[str, str]:
    path = folder / "failed.jsonl"
    return dict(json.loads(line) for line in path.read_text().splitlines()) if path.exists() else {}
