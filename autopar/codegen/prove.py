"""The proof on real ranks: emitted folders, run by torchrun, against one device.

Starting ranks costs seconds, so one launch runs many plans: `prepare` writes each emitted folder and what one device
computes, `prove` starts the ranks once, and each rank (`python -m autopar.codegen.prove FOLDER`) goes through the
cases with the emitted train.py's own functions: FSDP2, schedule, tied weights, clipping and AdamW included.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autopar.codegen.emit import emit
from autopar.codegen.loading import load_train
from autopar.errors import VerificationError
from autopar.graph.ir import ModelGraph
from autopar.plan import Plan

TOLERANCES = {"fp64": 1e-10, "fp32": 1e-5, "fp16": 2e-2, "bf16": 1e-1}
"""Largest error of the loss and of every gradient, by the job's dtype. Under 16 bits the reference is one device in
float32, so the tolerance is what rounding in that dtype does to a small gradient, some ten units in the last place."""

FLOORS = {"fp64": 1e-3, "fp32": 1e-3, "fp16": 0.1, "bf16": 0.3}
"""The floor of `gradient_errors`: what rounding leaves of a gradient that is truly zero is no error."""

PARAMETER_TOLERANCE = 1e-8
"""Largest error of every parameter after the optimizer steps, in float64."""

STEPS = 3
CASE_TIMEOUT_S = 120.0
"""A case that takes longer hangs: its ranks say where, and end."""

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, foreach=True),
    "sgd": partial(torch.optim.SGD, lr=1e-1, momentum=0.9, weight_decay=0.1, foreach=True),
}
MAX_NORM = 1.0


@dataclass(frozen=True, slots=True)
class Measured:
    """Errors of one plan against one device; ``parameter`` is None where no optimizer steps were taken."""

    name: str
    dtype: str
    loss: float
    gradient: float
    worst_gradient: str
    norm: float | None
    parameter: float | None
    worst_parameter: str

    def failures(self) -> list[str]:
        """What is past its tolerance, in words; empty when all is well."""
        limit = TOLERANCES[self.dtype]
        found = []
        if not self.loss <= limit:
            found.append(f"{self.name} {self.dtype}: loss is off by {self.loss:.1e} (at most {limit:.0e})")
        if not self.gradient <= limit:
            found.append(
                f"{self.name} {self.dtype}: the gradient of {self.worst_gradient} is off by {self.gradient:.1e} "
                f"(at most {limit:.0e})"
            )
        if self.parameter is not None and not self.parameter <= PARAMETER_TOLERANCE:
            found.append(
                f"{self.name} {self.dtype}: after {STEPS} steps {self.worst_parameter} is off by {self.parameter:.1e} "
                f"(at most {PARAMETER_TOLERANCE:.0e})"
            )
        return found


def gradient_errors(
    gradients: Mapping[str, Tensor], reference: Mapping[str, Tensor], floor: float = 1e-3
) -> dict[str, float]:
    """Error of each gradient: |g - r| / max(|r|, ``floor`` |all gradients| / sqrt(number of parameters)).

    The floor is there because some true gradients are zero, such as that of a key projection's bias.
    """
    total = math.sqrt(sum(float(r.double().norm()) ** 2 for r in reference.values()))
    least = floor * total / math.sqrt(len(reference))
    return {
        name: float((gradient.double() - reference[name].double()).norm())
        / max(float(reference[name].double().norm()), least)
        for name, gradient in gradients.items()
    }


def one_device(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    loss_of: Callable[[nn.Module, Mapping[str, Tensor]], Tensor],
    steps: bool,
    optimizer: str = "adamw",
) -> dict[str, Any]:
    """What a single device computes: loss, gradients and norm of the first batch, parameters after all batches.

    ``steps``: whether to take optimizer steps, with the optimizer that the plans' job names. Frozen parameters have no
    gradient here, and must have none anywhere.
    """
    names = {id(weight): name for name, weight in model.named_parameters()}
    found: dict[str, Any] = {"batches": [dict(batch) for batch in batches], "steps": steps}
    taking = OPTIMIZERS[optimizer](model.parameters())
    for index, batch in enumerate(batches if steps else batches[:1]):
        taking.zero_grad()
        loss = loss_of(model, batch)
        torch.autograd.backward(loss)
        if index == 0:
            found["gradients"] = {
                names[id(weight)]: weight.grad.clone() for weight in model.parameters() if weight.grad is not None
            }
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        if index == 0:
            found["loss"], found["norm"] = loss.detach().clone(), norm.detach().clone()
        if steps:
            taking.step()
    found["parameters"] = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    return found


def prepare(
    folder: Path,
    plans: Mapping[str, Plan],
    graph: ModelGraph,
    weights: Mapping[str, Tensor],
    reference: dict[str, Any],
) -> None:
    """Add cases to ``folder``: each plan emitted with these weights, and the `one_device` result it must reproduce."""
    cases = _cases(folder)
    key = f"reference_{len(cases)}.pt"
    torch.save(reference, folder / key)
    for name, plan in plans.items():
        case = f"case_{len(cases)}"
        emit(plan, graph, folder / case, weights)
        cases.append(
            {"name": name, "folder": case, "reference": key, "dtype": plan.job.dtype, "optimizer": plan.job.optimizer}
        )
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
    run_ranks(["-m", "autopar.codegen.prove", str(folder)], ranks, timeout_s)
    failed = _failed(folder)
    if failed:
        raise VerificationError("; ".join(f"{name}: {reason}" for name, reason in failed.items()))
    return _measured(folder)


def prove_each(folder: Path, ranks: int, timeout_s: float = 3600.0) -> tuple[list[Measured], dict[str, str]]:
    """`prove`, but a case that fails or hangs does not stop the others: the ranks are started again for the rest.

    Names must differ. Returns what was measured, and for each case that failed the end of its ranks' output, by name.
    """
    failures: dict[str, str] = {}
    while True:
        cases = _cases(folder)
        failures |= _failed(folder)
        done = {row.name for row in _measured(folder)}
        left = [case for case in cases if case["name"] not in done | set(failures)]
        if not left:
            return _measured(folder), failures
        # Every launch knows only what is left; the ranks append what they measure.
        (folder / "left.json").write_text(json.dumps(left))
        try:
            run_ranks(["-m", "autopar.codegen.prove", str(folder), "left.json"], ranks, timeout_s)
        except VerificationError as error:
            done = {row.name for row in _measured(folder)} | set(_failed(folder))
            guilty = next((case["name"] for case in left if case["name"] not in done), None)
            if guilty is None:  # all was measured: they only ended badly
                continue
            failures[guilty] = str(error)


def run_ranks(arguments: list[str], ranks: int, timeout_s: float, folder: Path | None = None) -> str:
    """Run a script under torchrun on this machine's CPU, in ``folder``; returns its output, standard error included.

    Leaves no process behind. Raises VerificationError if it fails or does not end in time.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *arguments]
    package = str(Path(__file__).parents[2])
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
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
        norm, parameter = ("-" if value is None else f"{value:.1e}" for value in (row.norm, row.parameter))
        lines.append(
            f"{row.name:<34}{row.dtype:<7}{row.loss:>9.1e}{row.gradient:>10.1e}{norm:>9}{parameter:>9}"
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


def _cases(folder: Path, name: str = "cases.json") -> list[dict[str, str]]:
    path = folder / name
    return json.loads(path.read_text()) if path.exists() else []


def _measured(folder: Path) -> list[Measured]:
    path = folder / "measured.jsonl"
    return [Measured(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def _failed(folder: Path) -> dict[str, str]:
    path = folder / "failed.jsonl"
    return dict(json.loads(line) for line in path.read_text().splitlines()) if path.exists() else {}


def _worker(folder: Path, cases: str = "cases.json") -> None:
    """One rank: run every case; rank 0 writes what was measured, case by case."""
    torch.set_num_threads(1)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for place, case in enumerate(_cases(folder, cases)):
        faulthandler.dump_traceback_later(CASE_TIMEOUT_S, exit=True)
        begin = time.perf_counter()
        try:
            row = _measure(case, folder)
        except Exception as error:
            if not _all_failed(folder / f"failures_{os.getppid()}_{place}", rank, ranks, repr(error)):
                raise
            reason = "".join(traceback.format_exception(error)[-4:])
            _append(folder / "failed.jsonl", [case["name"], reason], rank)
            continue
        _append(folder / "measured.jsonl", asdict(row), rank)
        if rank == 0:
            print(f"{table([row]).splitlines()[1]}  {time.perf_counter() - begin:.1f} s", flush=True)
    faulthandler.cancel_dump_traceback_later()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _append(path: Path, value: Any, rank: int) -> None:
    if rank == 0:
        with path.open("a") as file:
            file.write(json.dumps(value) + "\n")


def _all_failed(folder: Path, rank: int, ranks: int, error: str, patience_s: float = 10.0) -> bool:
    """Whether every rank failed at this case, in the same way: then none waits for another, and they can go on."""
    folder.mkdir(exist_ok=True)
    kind = error.partition("(")[0]
    (folder / f"{rank}.new").write_text(kind)
    (folder / f"{rank}.new").rename(folder / str(rank))
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        told = [folder / str(other) for other in range(ranks)]
        if all(path.exists() for path in told):
            return all(path.read_text() == kind for path in told)
        time.sleep(0.05)
    return False


_meshes: dict[tuple[Any, ...], Any] = {}


def _mesh(train: Any) -> Any:
    """What the folder's `launch.start` returns, made once for all cases of the same mesh."""
    key = (*train.MESH.items(), train.FSDP)
    if key not in _meshes:
        _meshes[key] = train.launch.start(train.MESH, train.FSDP, train.DEVICE_TYPE)
    return _meshes[key]


def _measure(case: dict[str, str], folder: Path) -> Measured:
    train = load_train(folder / case["folder"])
    reference = torch.load(folder / case["reference"], weights_only=True)
    mesh, fsdp_mesh, device = _mesh(train)
    step = train.parallelize(mesh, fsdp_mesh, device)
    train.parameters.load_weights(step.stage, folder / case["folder"] / "initial.pt", train.module.TIED)
    first = train.parameters.first_names(train.module.TIED)
    held = [(first.get(name, name), weight) for name, weight in step.stage.named_parameters()]
    optimizer = OPTIMIZERS[case["optimizer"]](step.stage.parameters())
    # The ranks of cp and tp have the same samples; they take their parts themselves.
    rank, ranks = mesh["dp"].get_local_rank(), mesh["dp"].size()
    rows = train.sample_indices(0, rank, ranks, train.MICRO_BATCH, train.MICRO_BATCHES)

    gradients: dict[str, float] = {}
    loss_error = norm_error = 0.0
    for index, batch in enumerate(reference["batches"] if reference["steps"] else reference["batches"][:1]):
        part = {key: value[rows] for key, value in batch.items()}
        optimizer.zero_grad()
        loss = step.forward_backward(part)
        while step.scale is not None and not step.scale.accepts(step.clip_gradients(None)):
            optimizer.zero_grad()
            loss = step.forward_backward(part)
        if index == 0:
            for name, weight in held:
                if weight.grad is None:
                    continue
                if name not in reference["gradients"]:
                    raise VerificationError(f"{case['name']}: {name} has a gradient, but is frozen on one device")
                # Of two copies of a tied weight, the worse one.
                error = gradient_errors(
                    {name: weight.grad.full_tensor()}, reference["gradients"], FLOORS[case["dtype"]]
                )[name]
                gradients[name] = max(gradients.get(name, 0.0), math.inf if math.isnan(error) else error)
            loss_error = abs(float(loss) - float(reference["loss"])) / abs(float(reference["loss"]))
        norm = step.clip_gradients(MAX_NORM)
        if index == 0:
            norm_error = abs(float(norm) - float(reference["norm"])) / float(reference["norm"])
        if reference["steps"]:
            optimizer.step()
    parameters: dict[str, float] = {}
    if reference["steps"]:
        for name, weight in held:
            right = reference["parameters"][name]
            error = float((weight.full_tensor().detach() - right).norm()) / max(float(right.norm()), 1e-12)
            parameters[name] = max(parameters.get(name, 0.0), math.inf if math.isnan(error) else error)

    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (loss_error, gradients, norm_error, parameters))
    worst_gradient, gradient = _worst(part[1] for part in everyone)
    worst_parameter, parameter = _worst(part[3] for part in everyone)
    missing = set(reference["gradients"]) - {name for part in everyone for name in part[1]}
    if missing:
        raise VerificationError(f"{case['name']}: no rank holds {', '.join(sorted(missing))}")
    return Measured(
        name=case["name"],
        dtype=case["dtype"],
        loss=max(part[0] for part in everyone),
        gradient=gradient,
        worst_gradient=worst_gradient,
        norm=max(part[2] for part in everyone),
        parameter=parameter if reference["steps"] else None,
        worst_parameter=worst_parameter,
    )


def _worst(errors: Iterable[dict[str, float]]) -> tuple[str, float]:
    # Not a number is worse than any number.
    pairs = [(name, error) for part in errors for name, error in part.items()]
    return max(pairs, key=lambda pair: math.inf if math.isnan(pair[1]) else pair[1], default=("", 0.0))


if __name__ == "__main__":
    _worker(Path(sys.argv[1]), *sys.argv[2:])
