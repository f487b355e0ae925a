"""Fixed parts of the plan: what `fix={"tp": 8, "recompute": "full"}` and `--fix tp=8` mean, each in one place.

dp=n           samples are split over n groups of ranks
zero=0|1|2|3   0: gradients are all-reduced; 1: optimizer state is sharded over data ranks, 2: gradients too (reduced
               at each micro-batch), 3: parameters too (gathered block by block)
fsdp=n         shard-group size: of the dp x cp data ranks, n share what is sharded; 1 is zero=0
cp=n           a model axis on which activations are split by sequence, and no parameter is
tp=n           a model axis of size n on which every matmul with a divisible feature factor is split by it; tp=2x4: made
               of two mesh axes, for operators that split it in two ways
context        "gathered" | "all-to-all" | "ring": how attention over a sequence that cp splits reads the keys of other
               ranks, where it can: gathered; or its heads are split, not the sequence; or they go round the ranks
sp=true|false  values between blocks are split by sequence over tp | held whole, invariant
pp=n           n pipeline ranks                          vpp=n        stages on each of them
schedule       "none" for one stage, else "gpipe", "1f1b", "interleaved", "zbv", "dualpipev"
stages=a,b,... blocks in each stage, in the model's order
micro_batch=n  samples per data rank per micro-batch
recompute      "none" | "selective" | "full" (the repeated blocks; the ends of the model are recomputed only when
               named), or per block: "LlamaDecoderLayer:full" or "0-3:full" (block indices), comma separated, later
               ones win; "selective(matmul+attention)" keeps the results of these operators, "selective" alone is the
               search's choice
reshard        "true" | "false", or per block, as recompute: under zero=3, which blocks free their parameters after each
               forward and backward; those of the others stay gathered through the step, as all do under zero=2
offload        "none" | "state" (parameters, gradients, optimizer state wait on the host) | "activations" (what the
               repeated blocks save for backward does) | "all"
mesh           "pp=2,dp=2,cp=1,tp=2", or {"pp": 2, "dp": 2, "tp": 2}: all at once (what is not named is 1)
order          "dp,pp,cp,tp": the mesh axes as ranks go through them, outermost first; nodes hold neighbouring ranks
ep=n           n neighbouring data ranks (of dp x cp, those of cp first) share the experts: each holds 1/n of them, and
               tokens go to the ranks of the experts they chose and come back
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from autopar.errors import BadInputError, UnsupportedError
from autopar.mesh import AXES, Mesh
from autopar.plan import SAVEABLE
from autopar.schedule import SCHEDULES
from autopar.solver.axis_choices import CONTEXTS
from autopar.solver.capabilities import CAPABILITIES

_FLAGS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True, slots=True)
class Fix:
    """Parsed and validated; None means: searched. ``recompute``, ``reshard``: (block selector, choice), a later entry
    wins; the selector is "" for all blocks, a kind's name, or "3" / "0-3"."""

    pp: int | None = None
    dp: int | None = None
    cp: int | None = None
    tp: int | None = None
    tp_parts: tuple[int, ...] = ()
    zero: int | None = None
    fsdp: int | None = None
    sp: bool | None = None
    schedule: str | None = None
    vpp: int | None = None
    stages: tuple[int, ...] = ()
    offload: str | None = None
    micro_batch: int | None = None
    recompute: tuple[tuple[str, str], ...] = ()
    reshard: tuple[tuple[str, bool], ...] = ()
    order: tuple[str, ...] = ()
    ep: int | None = None
    context: str | None = None

    def recompute_of(self, index: int, kind: str, repeated: bool = True) -> str | None:
        """What is fixed for block ``index`` of kind ``kind``, or None. ``repeated``: not an end of the model."""
        found = None
        for selector, choice in self.recompute:
            if selector == "":
                found = choice if repeated else "none"
            elif _selects(selector, index, kind):
                found = choice
        return found

    def reshard_of(self, index: int, kind: str) -> bool | None:
        """Whether block ``index`` of kind ``kind`` is fixed to free its parameters under zero 3, or not to; or None."""
        chosen = [choice for selector, choice in self.reshard if not selector or _selects(selector, index, kind)]
        return chosen[-1] if chosen else None

    def given(self) -> dict[str, Any]:
        """What was fixed, as plain values for the plan's record."""
        values: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if name in ("recompute", "reshard"):
                if value:
                    told = [(selector, str(choice).lower()) for selector, choice in value]
                    values[name] = ",".join(f"{selector}:{choice}" if selector else choice for selector, choice in told)
            elif name == "tp_parts":
                values |= {"tp": "x".join(map(str, value))} if value else {}
            elif name in ("stages", "order"):
                values |= {name: ",".join(map(str, value))} if value else {}
            elif value is not None:
                values[name] = value
        return values

    def check(self, devices: int, blocks: Iterable[str]) -> None:
        """Refuse what contradicts the cluster or the model (``blocks``: the kind of each block).

        Raises BadInputError.
        """
        kinds = list(blocks)
        sizes = {axis: getattr(self, axis) for axis in AXES if getattr(self, axis) is not None}
        product = 1
        for size in sizes.values():
            product *= size
        named = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        whole = {"pp", "dp", "tp"} <= sizes.keys()
        if devices % product or (whole and product != devices):
            raise BadInputError(
                f"fix: {named} makes {product} ranks, but the cluster has {devices} devices; "
                "the sizes of pp, dp, cp and tp must multiply to that"
            )
        stages = (self.pp or 1) * (self.vpp or 1)
        if stages > len(kinds):
            blocks = "1 block" if len(kinds) == 1 else f"{len(kinds)} blocks"
            raise BadInputError(f"fix: {stages} stages, but the model has only {blocks} to spread")
        if self.pp is not None and self.schedule is not None and (self.schedule == "none") != (self.pp == 1):
            wanted = "none" if self.pp == 1 else "1f1b"
            raise BadInputError(f'fix: schedule={self.schedule} contradicts pp={self.pp}; that runs under "{wanted}"')
        self._check_stages(len(kinds))
        selectors = [("recompute", one) for one, _ in self.recompute] + [("reshard", one) for one, _ in self.reshard]
        for key, selector in selectors:
            numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", selector)
            last = int(numbers[2] or numbers[1]) if numbers else -1
            if (numbers and last >= len(kinds)) or (not numbers and selector and selector not in kinds):
                raise BadInputError(
                    f"fix: {key} names block {selector!r}; the model has blocks 0-{len(kinds) - 1} of kinds "
                    f"{', '.join(dict.fromkeys(kinds))}"
                )

    def _check_stages(self, blocks: int) -> None:
        if not self.stages:
            return
        if sum(self.stages) != blocks:
            raise BadInputError(
                f"fix: stages={','.join(map(str, self.stages))} holds {sum(self.stages)} blocks, the model has {blocks}"
            )
        if self.pp is None or len(self.stages) % self.pp:
            raise BadInputError(
                f"fix: stages gives {len(self.stages)} stages; fix pp as well, to a number that divides them"
            )


def parse_fix(fix: Fix | Mapping[str, Any] | Iterable[str] | None) -> Fix:
    """Read a dict (``{"tp": 8}``) or ``key=value`` strings.

    Raises BadInputError for unknown keys and values of the wrong form, UnsupportedError for what cannot be
    executed yet.
    """
    if isinstance(fix, Fix):
        return fix
    pairs: list[tuple[str, Any]]
    if fix is not None and (isinstance(fix, str) or not isinstance(fix, Iterable)):
        raise BadInputError(f'fix: expected a mapping such as {{"tp": 8}}, not {fix!r}')
    if isinstance(fix, Mapping):
        pairs = list(fix.items())
    else:
        pairs = [_split(item) for item in fix or ()]
    values: dict[str, Any] = {}
    for key, text in pairs:
        value = _value(key, text)
        for name, part in value.items() if key in ("mesh", "tp") else ((key, value),):
            if name in values and values[name] != part:
                raise BadInputError(f"fix: {name} is given twice, as {values[name]!r} and {part!r}")
            values[name] = part
    _check_zero(values)
    return Fix(**values)


def _split(item: str) -> tuple[str, str]:
    key, separator, value = item.partition("=")
    if not separator or not key.strip() or not value.strip():
        raise BadInputError(f"fix: expected KEY=VALUE such as tp=8, not {item!r}")
    return key.strip(), value.strip()


def _value(key: str, given: Any) -> Any:
    capability = CAPABILITIES.get(key)
    if capability is None:
        raise BadInputError(f"fix: unknown key {key!r}; the keys are {', '.join(CAPABILITIES)}")
    value = _READERS[capability.form](key, given)
    told: tuple[Any, ...] = (value,)
    if capability.form in ("recompute", "reshard"):
        told = tuple(choice.partition("(")[0] if isinstance(choice, str) else choice for _, choice in value)
    for choice in told:
        if capability.executable is not None and choice not in capability.executable:
            raise UnsupportedError(f"fix: {key}={given} cannot be executed: {capability.missing}")
    return value


def _size(key: str, given: Any) -> int:
    text = str(given).strip()
    if isinstance(given, bool) or not re.fullmatch(r"[1-9]\d*", text):
        raise BadInputError(f"fix: {key} must be a positive integer, not {given!r}")
    return int(text)


def _level(key: str, given: Any) -> int:
    if isinstance(given, bool) or str(given).strip() not in ("0", "1", "2", "3"):
        raise BadInputError(f"fix: {key} must be 0, 1, 2 or 3, not {given!r}")
    return int(str(given))


def _switch(key: str, given: Any) -> bool:
    text = str(given).strip().lower()
    if text not in _FLAGS:
        raise BadInputError(f"fix: {key} must be true or false, not {given!r}")
    return _FLAGS[text]


def _one_of(key: str, given: Any, known: tuple[str, ...]) -> str:
    text = str(given).strip().lower()
    if text not in known:
        raise BadInputError(f"fix: {key} must be one of {', '.join(known)}, not {given!r}")
    return text


def _schedule(key: str, given: Any) -> str:
    return _one_of(key, given, tuple(SCHEDULES))


def _offload(key: str, given: Any) -> str:
    return "none" if given in (False, None) else _one_of(key, given, ("none", "state", "activations", "all"))


def _axis(key: str, given: Any) -> dict[str, Any]:
    sizes = tuple(_size(key, part) for part in str(given).lower().split("x")) if isinstance(given, str) else ()
    if len(sizes) > 1 and 1 not in sizes:
        return {"tp": prod(sizes), "tp_parts": sizes}
    return {"tp": _size(key, given)}


def _context(key: str, given: Any) -> str:
    return _one_of(key, given, tuple(CONTEXTS))


def _counts(key: str, given: Any) -> tuple[int, ...]:
    parts = given if isinstance(given, list | tuple) else str(given).split(",")
    return tuple(_size(key, part) for part in parts)


def _selects(selector: str, index: int, kind: str) -> bool:
    """Whether a kind's name or block numbers ("3", "0-3") select block ``index`` of kind ``kind``."""
    numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", selector)
    return selector == kind or (numbers is not None and int(numbers[1]) <= index <= int(numbers[2] or numbers[1]))


def _by_block(given: Any) -> list[tuple[str, str]]:
    if isinstance(given, Mapping):
        entries = [(str(selector), str(choice)) for selector, choice in given.items()]
    else:
        parts = [part.strip() for part in str(given).split(",")]
        entries = [(part.rpartition(":")[0], part.rpartition(":")[2]) for part in parts]
    return [(selector.strip(), choice) for selector, choice in entries]


def _recompute(key: str, given: Any) -> tuple[tuple[str, str], ...]:
    return tuple((selector, _recomputation(key, choice)) for selector, choice in _by_block(given))


def _reshard(key: str, given: Any) -> tuple[tuple[str, bool], ...]:
    return tuple((selector, _switch(key, choice)) for selector, choice in _by_block(given))


def _recomputation(key: str, given: str) -> str:
    kept = re.fullmatch(r"selective\((.*)\)", given.strip().lower())
    if not kept:
        return _one_of(key, given, ("none", "selective", "full"))
    names = [_one_of(f"{key}: selective", name, SAVEABLE) for name in kept[1].split("+") if name.strip()]
    return f"selective({'+'.join(name for name in SAVEABLE if name in names)})"


def _order(key: str, given: Any) -> tuple[str, ...]:
    parts = given if isinstance(given, list | tuple) else re.split(r"[\s,]+", str(given).strip().lower())
    order = tuple(map(str, parts))
    if sorted(order) != sorted(AXES):
        unknown = [axis for axis in order if axis not in AXES]
        missing = [axis for axis in AXES if axis not in order]
        told = f"there is no axis {unknown[0]!r}" if unknown else ""
        told = told or (f"{', '.join(missing)} is missing" if missing else "an axis is named twice")
        raise BadInputError(
            f"fix: {key} must name each of {', '.join(AXES)} once, outermost first, such as {key}=dp,pp,cp,tp, not "
            f"{given!r}: {told}"
        )
    return order


def _mesh(key: str, given: Any) -> dict[str, Any]:
    if isinstance(given, Mapping):
        pairs: list[tuple[str, Any]] = [(str(axis), size) for axis, size in given.items()]
    elif isinstance(given, Mesh):
        pairs = [("pp", given.pp), ("dp", given.dp), ("cp", given.cp), ("tp", _parts_text(given))]
    else:
        parts = [part for part in re.split(r",|\s+x\s+|\s+", str(given)) if part]
        pairs = [(part.partition("=")[0], part.partition("=")[2]) for part in parts]
    if not pairs or any(axis not in AXES for axis, _ in pairs):
        raise BadInputError(f'fix: {key} must name sizes of pp, dp, cp, tp, such as "pp=2,dp=2,tp=2", not {given!r}')
    sizes: dict[str, Any] = dict.fromkeys(AXES, 1)
    if isinstance(given, Mesh) and given.order != AXES:
        sizes["order"] = given.order
    for axis, size in pairs:
        sizes |= _axis(f"{key}.tp", size) if axis == "tp" else {axis: _size(f"{key}.{axis}", size)}
    return sizes


def _parts_text(mesh: Mesh) -> str:
    return "x".join(map(str, mesh.tp_parts)) or str(mesh.tp)


def _check_zero(values: dict[str, Any]) -> None:
    """`fsdp`, `reshard` and `zero` must agree."""
    shard, level = values.get("fsdp"), values.get("zero")
    if level not in (None, 3) and values.get("reshard"):
        raise BadInputError(f"fix: reshard is of zero=3, not of zero={level}, under which parameters are not freed")
    data = values["dp"] * values.get("cp", 1) if "dp" in values else None
    if shard is None:
        return
    if data is not None and data % shard:
        raise BadInputError(f"fix: shard groups of fsdp={shard} ranks do not divide the {data} data ranks (dp x cp)")
    if level is not None and (level == 0) != (shard == 1) and data != 1:
        raise BadInputError(f"fix: fsdp={shard} contradicts zero={level}: a shard group of one rank is zero=0")


_READERS: dict[str, Callable[[str, Any], Any]] = {
    "size": _size,
    "axis": _axis,
    "counts": _counts,
    "level": _level,
    "switch": _switch,
    "schedule": _schedule,
    "context": _context,
    "recompute": _recompute,
    "reshard": _reshard,
    "offload": _offload,
    "mesh": _mesh,
    "order": _order,
}
