"""The software that runs a plan: which kernels it fuses, what it overlaps, how long its host takes per operator.

"torch" is what autopar emits. The others are stacks whose published runs the cost model is held against, and with
which a plan of theirs can be predicted (`Job.stack`); nothing is emitted for them. What each constant means, what it
may plausibly be, and where its values come from, says ``catalog/stacks.yaml``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from autopar.errors import BadInputError

FILE = Path(__file__).parent / "catalog" / "stacks.yaml"


@dataclass(frozen=True, slots=True)
class Stack:
    """Constants of one stack, in seconds, bytes or fractions; each is explained in the catalog's file. ``family``: its
    name, or of a variant, that of the stack whose figures it has."""

    name: str
    title: str
    family: str
    attention: str
    loss: str
    gradients: str
    buffers: bool
    overlaps: bool
    prefetches: bool
    scatters: bool
    balanced: bool
    grouped: bool
    once: bool
    hidden: bool
    chunked: bool
    adds: bool
    again: bool
    rescales: bool
    copies: float
    pointwise: float
    kernels: float
    matmul: float
    experts: float
    attention_speed: float
    host_s: float
    collective_host_s: float
    step_s: float
    imbalance: float
    state_passes: float
    workspaces: float
    reserved: float


def stack_names() -> tuple[str, ...]:
    """Every stack that a job can name, in alphabetical order."""
    return tuple(sorted(catalog()["stacks"]))


@cache
def stack_of(name: str) -> Stack:
    """The stack called ``name``. Raises BadInputError for an unknown name, listing the known ones."""
    if name not in catalog()["stacks"]:
        raise BadInputError(f"unknown stack {name!r}; one of {', '.join(stack_names())}")
    return read_stack(name, catalog())


def read_stack(name: str, data: dict[str, Any]) -> Stack:
    """A stack of a catalog as ``catalog/stacks.yaml`` has it. Raises BadInputError naming a figure that is missing,
    unknown or out of its range, and a stack that does not say where its figures are from."""
    entry, constants = data["stacks"][name], data["constants"]
    for text in ("title", "facts", "fitted"):
        if not str(entry.get(text) or "").strip():
            raise BadInputError(
                f"stack {name!r}: no {text}; every stack says what it is and where its figures are from"
            )
    values: dict[str, Any] = {"name": name, "title": entry["title"], "family": entry.get("of", name)}
    names = [field.name for field in fields(Stack) if field.name not in values]
    if unknown := set(entry["values"]) - set(names):
        raise BadInputError(f"stack {name!r}: unknown constant {sorted(unknown)[0]!r}; known: {', '.join(names)}")
    for constant in names:
        place = f"stack {name!r}, {constant}"
        if constant not in entry["values"]:
            raise BadInputError(f"{place}: missing")
        value, rule = entry["values"][constant], constants[constant]
        if "known" in rule:
            if value not in rule["known"]:
                raise BadInputError(f"{place}: unknown {value!r}; one of {', '.join(map(str, rule['known']))}")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise BadInputError(f"{place}: {value!r} is not a number (YAML wants the sign in 1.5e+12)")
        elif not rule["low"] <= value <= rule["high"]:
            raise BadInputError(f"{place}: {value} is outside its plausible range {rule['low']} to {rule['high']}")
        values[constant] = value
    return Stack(**values)


@cache
def catalog() -> dict[str, Any]:
    """The file's contents."""
    import yaml  # not at the top: measuring needs torch and numpy alone

    found: dict[str, Any] = yaml.safe_load(FILE.read_text())
    return found
