"""Fits constants of the cost model to published runs: those marked "train" alone.

    python benchmarks/published_fit.py --groups internevo,mtnlg --constants internevo.host_s,a100-80g.matmul_efficiency

Every run is predicted once; then the plans are priced anew with one constant after the other moved, inside its
plausible range, to where the mean absolute logarithm of predicted over measured, each group weighing the same, is
least (pattern search: steps halve). Prints the constants found; nothing is written: the figure goes into the catalog by
hand, with its meaning and its source. ``--left-out`` instead prints, for each group, how far off the model is without
the constants that come from that group (`left_out`).
"""

from __future__ import annotations

import argparse
import multiprocessing
import pickle
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from math import exp, log
from pathlib import Path
from statistics import fmean
from typing import Any

import published
import yaml
from published_measured import seconds

import autopar.stack as stacks
from autopar.catalog.devices_file import FOLDER, figures_of

ROUNDS, WORKERS = 4, 2
"""Times that steps are halved, and processes."""
MOVES = 0.01
"""Share of the step time that a constant must move for runs to tell what it is."""
MANY = 100
"""Runs of a group that are always all taken."""


def constant(name: str) -> dict[str, float]:
    """Value and range of ``STACK.field`` or ``DEVICE.field``."""
    owner, _, part = name.partition(".")
    if owner in stacks.stack_names():
        rule = stacks.catalog()["constants"][part]
        return {"value": stacks.catalog()["stacks"][owner]["values"][part], "low": rule["low"], "high": rule["high"]}
    return figures_of(yaml.safe_load((Path(FOLDER) / f"{owner}.yaml").read_text()))[part]


def with_device(cluster: Any, changes: dict[str, float]) -> Any:
    """The cluster with device and link constants set."""
    for name, value in changes.items():
        owner, _, part = name.partition(".")
        if owner != cluster.device.name:
            continue
        head, _, tail = part.partition(".")
        if tail:
            cluster = cluster.with_links(**{head: replace(getattr(cluster, head), **{tail: value})})
        else:
            device = replace(cluster.device, **{part: value})
            cluster = type(cluster)(tuple(replace(group, device=device) for group in cluster.groups))
    return cluster


def set_stacks(changes: dict[str, float]) -> None:
    """Set stack constants in this process, of variants too where these have the same."""
    every = stacks.catalog()["stacks"]
    for name, value in changes.items():
        owner, _, part = name.partition(".")
        old = every[owner]["values"][part] if owner in every else None
        for other, entry in every.items() if owner in every else ():
            if owner in (other, entry.get("of")) and entry["values"][part] == old:
                entry["values"][part] = value
    stacks.stack_of.cache_clear()


Entry = tuple[str, str, float, Any, Any]
"""Group, id, measured seconds, plan, model graph."""


def _run(task: tuple[list[Entry], dict[str, float]]) -> list[tuple[str, str, float]]:
    """(group, id, log of predicted over measured) of runs under given constants."""
    from autopar.solver.reprice import price_plan

    entries, changes = task
    set_stacks(changes)
    found = []
    for group, name, measured, plan, model in entries:
        priced = price_plan(plan, model, with_device(plan.cluster, changes))
        found.append((group, name, log(priced.step_time / measured)))
    return found


ENTRIES: list[Entry] = []
"""All runs; processes that a pool forks have them too, so that tasks are told their places alone."""


def _run_places(task: tuple[list[int], dict[str, float]]) -> list[tuple[str, str, float]]:
    places, changes = task
    return _run(([ENTRIES[place] for place in places], changes))


def errors(pool: Any, workers: int, entries: list[Entry], changes: dict[str, float]) -> list[tuple[str, str, float]]:
    """Of these of all plans."""
    place = {entry[1]: at for at, entry in enumerate(ENTRIES)}
    wanted = [place[entry[1]] for entry in entries]
    parts = pool.map(_run_places, [(wanted[first::workers], changes) for first in range(workers)])
    return [entry for part in parts for entry in part]


def loss(found: list[tuple[str, str, float]]) -> float:
    """Mean over groups of the mean absolute logarithm."""
    groups: dict[str, list[float]] = {}
    for group, _, value in found:
        groups.setdefault(group, []).append(abs(value))
    return fmean(fmean(values) for values in groups.values())


OWN = {
    "megatron-deepspeed": (("vtrain_single", "vtrain_multi"), ("host_s", "collective_host_s", "matmul", "step_s")),
    "internevo": (("internevo",), ("matmul",)),
    "composer": (("llm_foundry_mpt",), ("pointwise", "attention_speed", "matmul")),
    "compiled": (("torchtitan", "fms_fsdp"), ("pointwise", "matmul")),
    "megatron": (("megatron_bridge",), ("experts", "host_s", "matmul")),
}
"""Of each stack, the groups of runs that constants come from, and which ("fitted" in `autopar/catalog/stacks.yaml`)."""
RELATIVES = {
    "megatron-deepspeed": "megatron",  # the same modules on the same eager PyTorch, of a later year
    "megatron": "megatron-deepspeed",
    "internevo": "torch",  # eager PyTorch with fused attention: devices' figures as they are
    "composer": "torch",
    "compiled": "torch",
}
"""The stack whose constants stand in where no other runs of a stack fit them. Figures of "torch" that are no figures (a
host that takes no time) stay the stack's own, which are assumptions then."""


def elsewhere(stack: str) -> dict[str, float]:
    """A stack's fitted constants as its relative has them."""
    every = {name: entry["values"] for name, entry in stacks.catalog()["stacks"].items()}
    return {f"{stack}.{name}": every[RELATIVES[stack]][name] or every[stack][name] for name in OWN[stack][1]}


def family(entry: Entry) -> str:
    """The stack that a run's constants are those of."""
    return stacks.stack_of(entry[3].job.stack).family


def tells(pool: Any, workers: int, entries: list[Entry], known: dict[str, float], name: str) -> bool:
    """Whether these runs tell what a constant is: a fifth less of it moves them by `MOVES` or more."""
    before, after = (errors(pool, workers, entries, {**known, name: known[name] * share}) for share in (1.0, 0.8))
    return fmean(abs(a[2] - b[2]) for a, b in zip(before, after, strict=True)) >= MOVES


def left_out(pool: Any, workers: int, entries: list[Entry]) -> dict[str, tuple[int, float, float, dict[str, float]]]:
    """Per group: runs, mean absolute error of time with all constants, the same with what is known without the group,
    and that: `elsewhere`, fitted to the stack's other groups where it has any. Nothing changes without a group that
    nothing was fitted to."""
    # Processes keep what they were told last: each time, all that may differ is told.
    own = {
        name: float(constant(name)["value"])
        for stack, (_, names) in OWN.items()
        for name in (f"{stack}.{name}" for name in names)
    }
    found = {}
    for group in sorted({entry[0] for entry in entries}):
        mine = [entry for entry in entries if entry[0] == group]
        stack = Counter(map(family, mine)).most_common(1)[0][0]
        groups, names = OWN.get(stack, ((), ()))
        others = [entry for entry in entries if entry[0] != group and entry[0] in groups]
        known = elsewhere(stack) if group in groups else {}
        if known and others:
            names = [
                name
                for name in (f"{stack}.{name}" for name in names)
                if tells(pool, workers, others, own | known, name)
            ]
            moved = fitted(pool, workers, others, own | known, names)
            known = {name: moved[name] for name in known}
        told = [
            fmean(abs(exp(value) - 1) for _, _, value in errors(pool, workers, mine, changes))
            for changes in (own, own | known)
        ]
        found[group] = (len(mine), told[0], told[1], known)
    return found


def fitted(
    pool: Any, workers: int, entries: list[Entry], start: dict[str, float], names: list[str]
) -> dict[str, float]:
    """``start`` with the named constants moved to where these runs are least off (pattern search: steps halve)."""
    values = dict(start)
    ranges = {name: constant(name) for name in names}
    best = loss(errors(pool, workers, entries, values))
    print(f"{best:.4f} {values}")
    step = 0.25
    for _ in range(ROUNDS):
        moved = True
        while moved:
            moved = False
            for name in names:
                low, high = float(ranges[name]["low"]), float(ranges[name]["high"])
                for sign in (1, -1):
                    tried = min(high, max(low, values[name] + sign * step * max(values[name], (high - low) * 0.1)))
                    if tried == values[name]:
                        continue
                    now = loss(errors(pool, workers, entries, {**values, name: tried}))
                    if now < best - 2e-4:
                        best, moved = now, True
                        values[name] = tried
                        print(f"{best:.4f} {name} = {tried:.4g}", flush=True)
                        break
        step /= 2
    return values


def plans_of(records: list[Any], cache: Path | None) -> list[Entry]:
    """(group, id, measured seconds, plan, model graph) of every record that can be predicted; kept in ``cache``."""
    if cache and cache.exists():
        kept: list[Entry] = pickle.loads(cache.read_bytes())
        wanted = {record["id"] for record in records}
        return shared([entry for entry in kept if entry[1] in wanted])
    entries = [entry for entry in published.predict_all(records, 2, keep=True) if "plan" in entry]
    found = [(row["group"], row["id"], row["measured_s"], row["plan"], row["graph"]) for row in entries]
    if cache:
        cache.write_bytes(pickle.dumps(found))
    return shared(found)


def shared(entries: list[Entry]) -> list[Entry]:
    """The same with one graph for all plans of a model, whose rules are then looked up once."""
    graphs: dict[str, Any] = {}
    return [(*rest, plan, graphs.setdefault(graph.fingerprint(), graph)) for *rest, plan, graph in entries]


def main() -> None:
    """Fit and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", required=True)
    parser.add_argument("--constants", default="")
    parser.add_argument("--left-out", action="store_true", help="each group by what is known without it")
    parser.add_argument("--every", type=int, default=1, help=f"every N-th run alone, of groups of more than {MANY}")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--set", default="", help="NAME=VALUE,... held fixed")
    given = parser.parse_args()
    records = [
        record
        for record in published.read(published.RUNS)
        if record["group"] in given.groups.split(",") and record["split"] == "train" and seconds_or_none(record)
    ]
    records = thinned(records, given.every)
    ENTRIES[:] = plans_of(records, given.cache)
    print(f"{len(ENTRIES)} runs of {len(records)}")
    if given.left_out:
        with multiprocessing.get_context("fork").Pool(WORKERS) as pool:
            for group, (count, own, alone, known) in left_out(pool, WORKERS, list(ENTRIES)).items():
                told = ", ".join(f"{name}={value:.3g}" for name, value in known.items())
                print(f"{group:28s} n={count:4d} with its own constants {own:6.1%}  without {alone:6.1%}  ({told})")
        return
    held = {name: float(value) for name, _, value in (one.partition("=") for one in given.set.split(",") if one)}
    names = [name for name in given.constants.split(",") if name]
    with multiprocessing.get_context("fork").Pool(WORKERS) as pool:
        values = fitted(pool, WORKERS, ENTRIES, {name: constant(name)["value"] for name in names} | held, names)
        found = errors(pool, WORKERS, ENTRIES, values)
    for group in sorted({group for group, _, _ in found}):
        mine = [value for name, _, value in found if name == group]
        print(f"{group:28s} n={len(mine):4d} mean |log| {fmean(map(abs, mine)):.3f} bias {fmean(mine):+.3f}")
    print(values)


def thinned(records: Iterable[Any], every: int) -> list[Any]:
    """Every so many-th record of groups that have more than `MANY`, all of others."""
    groups: dict[str, list[Any]] = {}
    for record in records:
        groups.setdefault(record["group"], []).append(record)
    return [record for some in groups.values() for record in some[:: every if len(some) > MANY else 1]]


def seconds_or_none(record: Any) -> float | None:
    """Measured seconds, None where they are not stated."""
    try:
        return seconds(record)
    except Exception:
        return None


if __name__ == "__main__":
    main()
