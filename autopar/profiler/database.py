"""The profile database: one portable JSON file for one device, which can be merged, compared and gone on with.

    {"format": "autopar profile", "schema": 1, "date": "2026-11-28T20:00:00+00:00",
     "device": {"backend": "cuda", "name": "NVIDIA H200", "memory_bytes": ..., "processors": 132, "driver": ..., ...},
     "spent_s": {"ops": 300.0},                            # seconds measured so far, by command
     "figures": {"launch.kernel_s": 2.1e-6, ...},          # what is not an operator: launch and host overhead, overlap
     "ops": [{"op": "matmul", "dtype": "bf16", "pass": "forward", "threads": 0, "at": [4096, 4096, 4096],
              "seconds": ..., "least": ..., "spread": ..., "repeats": ...}, ...],
     "collectives": [{"kind": "all_reduce", "mesh": "2x4", "size": 4, "stride": 1, ..., "bytes": 1024, ...}, ...],
     "digest": "..."}                                      # of all the rest: a file that was cut or edited is refused

Files are written by way of a temporary file and a rename, so that a kill at any point leaves the last whole one.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from autopar.errors import BadInputError
from autopar.plan import write_whole

FORMAT = "autopar profile"
SCHEMA = 1
IDENTITY = ("backend", "name", "memory_bytes", "processors", "driver", "torch")
"""Device properties that must agree for two measurements to be of the same thing."""


@dataclass(frozen=True, slots=True)
class OpRecord:
    """One operator at one shape. ``at``: sizes, as `autopar.profiler.operators` names them; ``threads``: CPU threads
    (0: the device has none of its own). Median ``seconds`` of ``repeats`` runs, the ``least``, and their ``spread``
    (interquartile range over median)."""

    op: str
    dtype: str
    direction: str
    threads: int
    at: tuple[int, ...]
    seconds: float
    least: float
    spread: float
    repeats: int

    @property
    def key(self) -> tuple[object, ...]:
        return self.op, self.dtype, self.direction, self.threads, self.at


@dataclass(frozen=True, slots=True)
class CollectiveRecord:
    """One collective, run by all groups of a mesh axis at once.

    ``mesh``: the mesh measured ("2x4", outermost first); the axis has ``size`` ranks, ``stride`` ranks apart, on
    ``nodes`` nodes with ``per_node`` ranks of a group on each; ``node_ranks``: all ranks of a node. ``nbytes``: of the
    tensor in full (what each rank sends, for send_recv). Seconds are those of the slowest rank.
    """

    kind: str
    transport: str
    mesh: str
    size: int
    stride: int
    nodes: int
    per_node: int
    node_ranks: int
    nbytes: int
    seconds: float
    least: float
    spread: float
    repeats: int

    @property
    def key(self) -> tuple[object, ...]:
        where = (self.size, self.stride, self.nodes, self.per_node, self.node_ranks)
        return self.kind, self.transport, self.mesh, *where, self.nbytes

    @property
    def tier(self) -> str:
        return "intra_node" if self.nodes == 1 else "inter_node"


Record = TypeVar("Record", OpRecord, CollectiveRecord)


@dataclass(frozen=True, slots=True)
class Profile:
    """What is known of one device. ``date``: of the last change, UTC, ISO 8601."""

    device: dict[str, Any]
    date: str
    spent_s: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    ops: tuple[OpRecord, ...] = ()
    collectives: tuple[CollectiveRecord, ...] = ()

    @property
    def digest(self) -> str:
        """Sixteen hex digits over all of the contents."""
        return _digest(self._content())

    @property
    def title(self) -> str:
        return f"{self.device['name']}, {self.date[:10]}"

    def to_json(self) -> dict[str, Any]:
        return {**self._content(), "digest": self.digest}

    def save(self, path: str | Path) -> None:
        """Write the file, all of it or nothing: a line for each record. Raises BadInputError where that fails."""
        try:
            write_whole(Path(path), _text(self.to_json()))
        except OSError as error:
            raise BadInputError(f"cannot write profile {path}: {error.strerror or error}") from error

    def _content(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "schema": SCHEMA,
            "date": self.date,
            "device": self.device,
            "spent_s": self.spent_s,
            "figures": self.figures,
            "ops": [asdict(record) for record in self.ops],
            "collectives": [asdict(record) for record in self.collectives],
        }

    @staticmethod
    def load(path: str | Path) -> Profile:
        """Read a profile. Raises BadInputError with the reason for a file that is missing, cut, edited or foreign."""
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise BadInputError(f"cannot read profile {path}: {reason or error}") from error
        try:
            data = json.loads(text)
        except ValueError as error:
            raise BadInputError(
                f"profile {path} is not JSON ({error}); it was cut short or is another kind of file: measure it again"
            ) from error
        try:
            return Profile.from_json(data)
        except BadInputError as error:
            raise BadInputError(f"profile {path}: {error}") from error

    @staticmethod
    def from_json(data: Any) -> Profile:
        """Inverse of `to_json`. Raises BadInputError with the reason for anything else."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise BadInputError(f'not a profile: it has no "format": "{FORMAT}" (autopar profile writes one)')
        if data.get("schema") != SCHEMA:
            raise BadInputError(
                f"it has schema {data.get('schema')!r}, this version of autopar reads {SCHEMA}: measure it again"
            )
        content = {name: value for name, value in data.items() if name != "digest"}
        if data.get("digest") != _digest(content):
            raise BadInputError("its contents do not match its digest: it was edited or damaged; measure it again")
        try:
            profile = Profile(
                device=dict(data["device"]),
                date=str(data["date"]),
                spent_s=dict(data["spent_s"]),
                figures=dict(data["figures"]),
                ops=tuple(OpRecord(**{**record, "at": tuple(record["at"])}) for record in data["ops"]),
                collectives=tuple(CollectiveRecord(**record) for record in data["collectives"]),
            )
            profile._check()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadInputError(f"a field is missing or wrong ({type(error).__name__}: {error})") from error
        return profile

    def _check(self) -> None:
        for name in IDENTITY:
            if name not in self.device:
                raise ValueError(f"device has no {name!r}")
        records: list[OpRecord | CollectiveRecord] = [*self.ops, *self.collectives]
        for record in records:
            if not (math.isfinite(record.seconds) and record.seconds > 0 and record.repeats > 0):
                raise ValueError(f"a record of {record.seconds!r} s, {record.repeats!r} repeats")

    def check_device(self, device: dict[str, Any], what: str, way_out: str) -> None:
        """Raise BadInputError unless the profile is of this device, naming the properties that differ."""
        differing = [
            f"{name} {self.device[name]!r}, not {device[name]!r}"
            for name in IDENTITY
            if self.device[name] != device[name]
        ]
        if differing:
            raise BadInputError(f"{what} is of another device ({'; '.join(differing)}): {way_out}")

    def with_records(
        self,
        ops: Iterable[OpRecord] = (),
        collectives: Iterable[CollectiveRecord] = (),
        figures: dict[str, float] | None = None,
        spent_s: dict[str, float] | None = None,
    ) -> Profile:
        """The profile with more records, dated now; where a key is there already, the better of the two is kept."""
        return replace(
            self,
            date=now(),
            ops=_joined((*self.ops, *ops)),
            collectives=_joined((*self.collectives, *collectives)),
            figures={**self.figures, **(figures or {})},
            spent_s={**self.spent_s, **(spent_s or {})},
        )


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def merge(profiles: Iterable[Profile]) -> Profile:
    """One profile with the records of all; of two of the same measurement, the one with more repeats, then less spread.

    Figures are those of the latest that has them; seconds spent are added up, each measurement's once.
    Raises BadInputError when they are of different devices, naming what differs.
    """
    first, *others = sorted(profiles, key=lambda profile: (profile.date, profile.digest))
    unique = {profile.digest: profile for profile in (first, *others)}
    for other in unique.values():
        first.check_device(other.device, "the first profile", "merge profiles of one device; compare others with diff")
    found = first
    spent: dict[str, float] = {}
    figures: dict[str, float] = {}
    for profile in unique.values():
        spent = {name: spent.get(name, 0.0) + profile.spent_s.get(name, 0.0) for name in {**spent, **profile.spent_s}}
        figures.update(profile.figures)
        found = found.with_records(profile.ops, profile.collectives)
    device = {**first.device, **(others[-1].device if others else {})}
    return replace(found, device=device, date=max(p.date for p in unique.values()), spent_s=spent, figures=figures)


def _joined(records: Iterable[Record]) -> tuple[Record, ...]:
    found: dict[Any, Record] = {}  # keys of one kind of records compare place by place
    for record in records:
        before = found.get(record.key)
        if before is None or _worth(record) > _worth(before):
            found[record.key] = record
    return tuple(found[key] for key in sorted(found))


def _worth(record: OpRecord | CollectiveRecord) -> tuple[float, ...]:
    return record.repeats, -record.spread, -record.seconds


def _digest(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _text(data: dict[str, Any]) -> str:
    """JSON with a line for each record, so that files can be compared by eye."""
    lines = []
    for name, value in data.items():
        if isinstance(value, list) and value:
            rows = ",\n  ".join(json.dumps(row) for row in value)
            lines.append(f' "{name}": [\n  {rows}\n ]')
        else:
            lines.append(f' "{name}": {json.dumps(value)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def begun(path: Path, device: dict[str, Any]) -> Profile:
    """The profile to continue at ``path``, or a new one of ``device``. Raises BadInputError where the file is damaged
    or of another device."""
    if not path.exists():
        return Profile(dict(device), now())
    profile = Profile.load(path)
    profile.check_device(device, f"profile {path}", "name another file with -o, or delete this one")
    return profile


def check_target(path: Path) -> None:
    """Raise BadInputError where a profile could not be written after minutes of measuring."""
    if path.is_dir():
        raise BadInputError(f"-o {path}: a folder is in the way; name a file")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        tempfile.TemporaryFile(dir=above).close()
    except OSError as error:
        raise BadInputError(f"-o {path}: cannot write in {above}: {error.strerror or error}") from error
