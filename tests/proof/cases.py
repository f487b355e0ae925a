"""The cases of the proof: values for every key of a plan, and a cover of all pairs of them that can be executed.

A case gives each key of `KEYS` one value. What is legal is decided by the capability table and by the counts of blocks
and ranks; `cover` picks, greedily and always the same, cases that hold every legal pair of values of two keys.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

from autopar.job import Job
from autopar.plan import Mesh
from autopar.schedule import SCHEDULES
from autopar.solver.capabilities import Chosen, executes
from proof.models import SEQ, Variant

MESHES: dict[str, tuple[Any, ...]] = {
    # ranks of the pipeline, data, context and tensor axes; a tensor axis in parts is given by its parts
    "pp4": (4, 1, 1, 1),
    "dp4": (1, 4, 1, 1),
    "cp4": (1, 1, 4, 1),
    "tp4": (1, 1, 1, 4),
    "tp2x2": (1, 1, 1, "2x2"),
    "pp2 dp2": (2, 2, 1, 1),
    "pp2 cp2": (2, 1, 2, 1),
    "pp2 tp2": (2, 1, 1, 2),
    "dp2 cp2": (1, 2, 2, 1),
    "dp2 tp2": (1, 2, 1, 2),
    "cp2 tp2": (1, 1, 2, 2),
    "dp8": (1, 8, 1, 1),
    "tp2x4": (1, 1, 1, "2x4"),
    "pp4 dp2": (4, 2, 1, 1),
    "pp4 cp2": (4, 1, 2, 1),
    "pp4 tp2": (4, 1, 1, 2),
    "pp2 dp4": (2, 4, 1, 1),
    "pp2 tp4": (2, 1, 1, 4),
    "pp2 tp2x2": (2, 1, 1, "2x2"),
    "pp2 dp2 cp2": (2, 2, 2, 1),
    "pp2 dp2 tp2": (2, 2, 1, 2),
    "pp2 cp2 tp2": (2, 1, 2, 2),
    "dp4 cp2": (1, 4, 2, 1),
    "dp2 cp4": (1, 2, 4, 1),
    "dp4 tp2": (1, 4, 1, 2),
    "dp2 tp4": (1, 2, 1, 4),
    "dp2 tp2x2": (1, 2, 1, "2x2"),
    "cp2 tp4": (1, 1, 2, 4),
    "cp4 tp2": (1, 1, 4, 2),
    "cp2 tp2x2": (1, 1, 2, "2x2"),
    "dp2 cp2 tp2": (1, 2, 2, 2),
}

RECOMPUTE = {
    "none": "none",
    "full": "full",
    "keep attention": "selective(attention)",
    "keep all but gathers": "selective(matmul+attention+all_reduce+reduce_scatter+all_to_all)",
    "mixed": "0:full,2:full,3:selective(matmul+attention+all_gather)",
}
"""Values of the key "recompute", and the fix they mean; in "mixed" blocks differ, and the first block is recomputed."""

RESHARD = {"all": "true", "some": "true,1:false,3-4:false", "none": "false"}
"""Values of the key "reshard", and the fix they mean under zero 3."""

KEYS: dict[str, tuple[Any, ...]] = {
    "family": ("llama", "gpt2", "bert", "t5"),
    "mesh": tuple(MESHES),
    "schedule": ("none", "gpipe", "1f1b", "interleaved", "interleaved3", "zbv", "dualpipev"),
    "micro_batches": (2, 1, 3, 4, 8),
    "micro_batch": (1, 2),
    "sharding": ("zero0", "zero1", "zero1 half", "zero2", "zero2 half", "zero3", "zero3 half"),
    "recompute": tuple(RECOMPUTE),
    "reshard": tuple(RESHARD),
    "offload": ("none", "state", "activations", "all"),
    "sp": ("searched", True, False),
    "context": ("searched", "gathered", "all-to-all", "ring"),
    "dtype": ("fp64", "fp32", "bf16", "fp16"),
    "optimizer": ("adamw", "sgd"),
    "tied": (False, True),
    "frozen": ("none", "embedding", "half"),
    "vocab": (64, 61),
    "stages": ("searched", "ends alone", "front heavy"),
}
"""Every key and its values; the first of each is what a case has where nothing else is asked for."""


EXACT = ("fp64", "fp32")
"""The dtypes in which a wrong collective cannot pass for rounding."""


@dataclass(frozen=True, slots=True)
class Case:
    """One value for each key, in the order of `KEYS`."""

    values: tuple[Any, ...]

    @staticmethod
    def of(**values: Any) -> Case:
        """A case of these values, elsewhere the first ones; a schedule that fits the mesh."""
        stages = MESHES[values.get("mesh", "dp4")][0]
        usual = {"mesh": "dp4", "schedule": "none" if stages == 1 else "1f1b", "micro_batches": 8 if stages > 1 else 2}
        return Case(tuple({**usual, **values}.get(key, options[0]) for key, options in KEYS.items()))

    def __getitem__(self, key: str) -> Any:
        return self.values[_PLACE[key]]

    def changed(self, values: Mapping[str, Any]) -> Case:
        """The same with other values of some keys."""
        return Case(tuple(values.get(key, own) for key, own in zip(KEYS, self.values, strict=True)))

    @property
    def mesh(self) -> Mesh:
        pp, dp, cp, tp = MESHES[self["mesh"]]
        parts = tuple(map(int, tp.split("x"))) if isinstance(tp, str) else ()
        return Mesh(pp, dp, cp, prod(parts) if parts else tp, parts)

    @property
    def ranks(self) -> int:
        return self.mesh.size

    @property
    def schedule(self) -> str:
        return self["schedule"].rstrip("3")  # type: ignore[no-any-return]

    @property
    def vpp(self) -> int:
        """Stages on each pipeline rank."""
        return SCHEDULES[self.schedule].stages or (3 if self["schedule"] == "interleaved3" else 2)

    @property
    def variant(self) -> Variant:
        # Two blocks are the ends; a layer more than stages need leaves the choice of where to cut.
        layers = 4 if self.mesh.pp * self.vpp <= 4 else 8
        return Variant(self["family"], self["tied"], self["vocab"], self["frozen"], layers)

    @property
    def level(self) -> tuple[int, int]:
        """ZeRO level and shard-group size."""
        zero, data = int(self["sharding"][4]), self.mesh.data
        return zero, 1 if zero == 0 else data // 2 if "half" in self["sharding"] else data

    @property
    def global_batch(self) -> int:
        return self.mesh.dp * self["micro_batch"] * self["micro_batches"]  # type: ignore[no-any-return]

    @property
    def job(self) -> Job:
        return Job(self.global_batch, SEQ, self["dtype"], self["optimizer"])

    @property
    def counts(self) -> tuple[int, ...]:
        """Blocks in each stage, where the case says so."""
        stages, blocks = self.mesh.pp * self.vpp, self.variant.blocks
        if self["stages"] == "ends alone":
            inner = [len(part) for part in _parts(blocks - 2, stages - 2)]
            return (1, *inner, 1)
        if self["stages"] == "front heavy":
            return (blocks - stages + 1, *(1 for _ in range(stages - 1)))
        return ()

    def fix(self) -> dict[str, Any]:
        """What the search is given."""
        mesh, (zero, fsdp) = self.mesh, self.level
        fixed: dict[str, Any] = {
            **{axis: getattr(mesh, axis) for axis in ("pp", "dp", "cp")},
            "tp": "x".join(map(str, mesh.tp_parts)) or mesh.tp,
            "schedule": self.schedule,
            "vpp": self.vpp,
            "micro_batch": self["micro_batch"],
            "recompute": RECOMPUTE[self["recompute"]],
            "offload": self["offload"],
        }
        if mesh.data > 1:
            fixed |= {"zero": zero, "fsdp": fsdp}
        if zero == 3:
            fixed["reshard"] = RESHARD[self["reshard"]]
        if self["sp"] != "searched":
            fixed["sp"] = self["sp"]
        if self["context"] != "searched":
            fixed["context"] = self["context"]
        if self.counts:
            fixed["stages"] = ",".join(map(str, self.counts))
        return fixed

    def choice(self) -> Chosen:
        """What the capability table judges."""
        zero, fsdp = self.level
        used = {
            "none",
            *(part.rpartition(":")[2].partition("(")[0] for part in RECOMPUTE[self["recompute"]].split(",")),
        }
        if self["recompute"] not in ("none", "mixed"):
            used -= {"none"}
        return Chosen(
            self.mesh,
            self.schedule,
            self.vpp,
            self["micro_batches"],
            zero,
            fsdp,
            "state" if self["offload"] in ("state", "all") else "none",
            frozenset(used),
            self["offload"] in ("activations", "all"),
            self["dtype"],
            self["reshard"] != "all",
        )

    def __str__(self) -> str:
        told = [self["family"], self["mesh"], self["dtype"], self["sharding"] if self.mesh.data > 1 else ""]
        told += [self["schedule"] if self.mesh.pp > 1 else "", f"m{self['micro_batches']}x{self['micro_batch']}"]
        told += [self[key] if self[key] != "none" else "" for key in ("recompute",)]
        told += [f"reshard {self['reshard']}" if self["reshard"] != "all" else ""]
        told += [f"offload {self['offload']}" if self["offload"] != "none" else ""]
        told += [{True: "sp", False: "no sp"}.get(self["sp"], "")]
        told += [self["context"] if self["context"] != "searched" else ""]
        told += ["sgd" if self["optimizer"] == "sgd" else "", "tied" if self["tied"] else ""]
        told += [f"frozen {self['frozen']}" if self["frozen"] != "none" else ""]
        told += ["uneven vocabulary" if self["vocab"] == 61 else ""]
        told += [self["stages"] if self["stages"] != "searched" else ""]
        return " ".join(part for part in told if part)


_PLACE = {key: place for place, key in enumerate(KEYS)}


def legal(case: Case) -> bool:
    """Whether the case can be executed, and says nothing without a meaning on its mesh (it would repeat another)."""
    mesh, (_, fsdp), stages = case.mesh, case.level, case.mesh.pp * case.vpp
    if case["sharding"] != "zero0" and (mesh.data == 1 or fsdp < 2):
        return False
    if case["sp"] != "searched" and mesh.tp == 1:
        return False
    if case["context"] != "searched" and mesh.cp == 1:
        return False
    if case["schedule"] == "interleaved3" and stages > case.variant.blocks:
        return False
    if case["stages"] != "searched" and (mesh.pp == 1 or stages > case.variant.blocks):
        return False
    if case["stages"] == "ends alone" and stages < 3:
        return False
    return executes(case.choice())


Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairs_of(case: Case) -> Iterator[Pair]:
    """The pairs of values that a case proves: under 16 bits, whose rounding hides small errors, only those with its
    dtype."""
    pairs = itertools.combinations(zip(KEYS, case.values, strict=True), 2)
    if case["dtype"] in EXACT:
        return pairs
    return (pair for pair in pairs if pair[0][0] == "dtype" or pair[1][0] == "dtype")


@cache
def legal_pairs() -> dict[Pair, Case]:
    """Every pair of values of two keys that some legal case holds, with such a case."""
    bases = [
        Case.of(mesh=mesh, schedule=schedule, micro_batches=count)
        for mesh in MESHES
        for schedule in KEYS["schedule"]
        for count in (8, 4, 2)
    ]
    bases = [other for case in bases for other in (case, case.changed({"sharding": "zero3"})) if legal(other)]
    found = {}
    for (one, ones), (other, others) in itertools.combinations(KEYS.items(), 2):
        for pair in itertools.product(ones, others):
            values = {one: pair[0], other: pair[1]}
            case = next((case for base in bases if legal(case := base.changed(values))), None)
            if case is not None:
                found[(one, pair[0]), (other, pair[1])] = case
    return found


@cache
def one_by_one() -> tuple[Case, ...]:
    """Every value of every key alone, on a mesh where it has a meaning, elsewhere first values: what fails here is easy
    to find. Families and meshes all, each family on three meshes."""
    homes = ("dp4", "dp2 tp2", "pp2 dp2", "dp2 cp2", "pp4")
    found = [Case.of(family=family, mesh=mesh) for mesh in homes[:4] for family in KEYS["family"]]
    for key, options in KEYS.items():
        for value in options[1:]:
            level = {"sharding": "zero3"} if key == "reshard" else {}
            options_ = (Case.of(mesh=home).changed({key: value, **level}) for home in homes)
            found += itertools.islice(filter(legal, options_), 1)
    return tuple(dict.fromkeys(found))


@cache
def cover(seed: int = 0, tries: int = 4) -> tuple[Case, ...]:
    """Legal cases that together hold every legal pair, redundant ones dropped. The same for the same seed.

    Each is built around a pair that none holds yet: the other keys are changed, one at a time and in random order, to
    the value that adds the most new pairs.
    """
    wishes = legal_pairs()
    missing = dict.fromkeys(wishes)
    drawn = random.Random(seed)
    chosen: list[Case] = []
    while missing:
        pair = next(iter(missing))
        grown = [_grow(wishes[pair], {key for key, _ in pair}, missing, drawn) for _ in range(tries)]
        best = max(grown, key=lambda case: sum(found in missing for found in pairs_of(case)))
        chosen.append(best)
        for found in pairs_of(best):
            missing.pop(found, None)
    return _without_redundant(chosen, set(wishes))


@cache
def values_cover() -> tuple[Case, ...]:
    """Few cases of `cover` that hold every value of every key: what the ordinary test suite runs."""
    missing = {(key, value) for key, options in KEYS.items() for value in options}
    chosen: list[Case] = []
    while missing:
        best = max(cover(), key=lambda case: len(missing & set(zip(KEYS, case.values, strict=True))))
        chosen.append(best)
        missing -= set(zip(KEYS, best.values, strict=True))
    return tuple(chosen)


def _grow(case: Case, kept: set[str], missing: Mapping[Any, None], drawn: random.Random) -> Case:
    keys = [key for key in KEYS if key not in kept]
    drawn.shuffle(keys)
    for key in keys:
        options = [case.changed({key: value}) for value in drawn.sample(KEYS[key], len(KEYS[key]))]
        options = [option for option in options if legal(option)]
        case = max(options, key=lambda option: sum(pair in missing for pair in pairs_of(option)))
    return case


def _without_redundant(cases: list[Case], wishes: set[Any]) -> tuple[Case, ...]:
    """Drop the cases all of whose pairs other cases hold."""
    held: dict[Any, int] = {}
    for case in cases:
        for pair in pairs_of(case):
            held[pair] = held.get(pair, 0) + 1
    kept = []
    for case in cases:
        pairs = [pair for pair in pairs_of(case) if pair in wishes]
        if all(held[pair] > 1 for pair in pairs):
            for pair in pairs:
                held[pair] -= 1
        else:
            kept.append(case)
    return tuple(kept)


def _parts(count: int, parts: int) -> list[range]:
    edges = [count * part // parts for part in range(parts + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(edges)]
