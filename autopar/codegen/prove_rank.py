"""One rank of the proof: `python -m autopar.codegen.prove_rank FOLDER [CASES]`, started by `prove` under torchrun.

Every case runs with the emitted train.py's own functions: FSDP2, schedule, tied weights, clipping and optimizer
included. Rank 0 writes what was measured, or how it failed, line by line.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from autopar.codegen.compare import distance, limit, relative, whole_error
from autopar.codegen.loading import load_train
from autopar.codegen.prove import MAX_NORM, OPTIMIZERS, Measured, cases_of, table
from autopar.codegen.runtime import launch
from autopar.errors import VerificationError

CASE_TIMEOUT_S = 400.0
"""A case that takes longer hangs: its ranks say where, and end. On two cores, eight ranks take minutes to let DTensor
find out how a first optimizer step over fifty weights on three axes is sharded."""


def _worker(folder: Path, cases: str = "cases.json") -> None:
    """One rank: run every case; rank 0 writes what was measured, case by case."""
    torch.set_num_threads(1)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for place, case in enumerate(cases_of(folder, cases)):
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
    launch.stop()
    launch.leave()


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

    # How far each gradient held here is from the reference; of two copies of a tied weight, the worse one.
    far: dict[str, float] = {}
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
                off = distance(weight.grad.full_tensor(), reference["gradients"][name])
                far[name] = max(far.get(name, 0.0), off)
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
    dist.all_gather_object(everyone, (loss_error, far, norm_error, parameters))
    losses, fars, norms, ends = zip(*everyone, strict=True)
    distances = _largest(fars)
    missing = set(reference["gradients"]) - set(distances)
    if missing:
        raise VerificationError(f"{case['name']}: no rank holds {', '.join(sorted(missing))}")
    errors, own = relative(distances, reference["gradients"]), reference.get("own")
    # The gradient nearest to its limit, which under 16 bits is its own.
    worst = max(errors, key=lambda name: errors[name] / limit(case["dtype"], own and own["gradients"][name]))
    after = _largest(ends)
    worst_parameter = max(after, key=lambda name: after[name], default="")
    return Measured(
        name=case["name"],
        dtype=case["dtype"],
        loss=max(losses, key=_or_infinite),
        gradient=errors[worst],
        worst_gradient=worst,
        norm=max(norms, key=_or_infinite),
        parameter=after[worst_parameter] if reference["steps"] else None,
        worst_parameter=worst_parameter,
        whole=whole_error(distances, reference["gradients"]),
        owns=own and (own["loss"], own["gradients"][worst], own["whole"]),
    )


def _largest(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    """By name, the largest of what the ranks have."""
    found: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            found[name] = max(found.get(name, 0.0), value)
    return found


def _or_infinite(value: float) -> float:
    # Not a number is worse than any number.
    return math.inf if math.isnan(value) else value


if __name__ == "__main__":
    _worker(Path(sys.argv[1]), *sys.argv[2:])
