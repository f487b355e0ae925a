"""What cannot be executed is refused by name: where it is asked for, and where a plan changed by hand says it.

One entry for each limit and each value of the capability table that is not executable; the proof that PyTorch itself
is the reason, where it is, is in test_torch_limits.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from autopar.cluster import Cluster
from autopar.codegen.emit import emit
from autopar.errors import BadInputError, UnsupportedError
from autopar.job import Job
from autopar.plan import Mesh, Plan
from autopar.solver.capabilities import CAPABILITIES, LIMITS
from autopar.solver.search import search
from proof.models import SEQ, Variant, graph_of


@dataclass(frozen=True, slots=True)
class Refused:
    """A fix that breaks one limit and no other, what the message must say, and a plan (`good`: a fix that can run;
    `changes`: by hand, to the plan or to all its blocks) that breaks it."""

    fix: dict[str, Any]
    told: str
    good: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    blocks: dict[str, Any] = field(default_factory=dict)
    batch: int = 16
    devices: int = 4


ZBV = {"pp": 2, "dp": 2, "schedule": "zbv", "zero": 0}

REFUSED = {
    "one stage has no schedule": Refused(
        {"dp": 4, "schedule": "1f1b"}, "a single stage runs under schedule", {"dp": 4}, {"schedule": "gpipe"}
    ),
    "stages on a rank": Refused(
        {"pp": 2, "schedule": "1f1b", "vpp": 2},
        "interleaved runs two or more stages a rank",
        {"pp": 2, "schedule": "1f1b"},
        {"schedule": "interleaved"},
    ),
    "1f1b fills the pipeline": Refused(
        {"pp": 4, "schedule": "1f1b", "micro_batch": 8},
        "1F1B needs at least pp micro-batches",
        {"pp": 4, "schedule": "gpipe", "micro_batch": 8},
        {"schedule": "1f1b"},
    ),
    "interleaved goes in rounds": Refused(
        {"pp": 2, "dp": 2, "schedule": "interleaved", "micro_batch": 1},
        "micro_batches // pp equal rounds",
        {"pp": 2, "dp": 2, "schedule": "zbv", "micro_batch": 1},
        {"schedule": "interleaved"},
        batch=10,
    ),
    "dualpipev fills the pipeline": Refused(
        {"pp": 2, "dp": 2, "schedule": "dualpipev", "micro_batch": 4},
        "DualPipeV needs at least 2 pp micro-batches",
        {"pp": 2, "dp": 2, "schedule": "zbv", "micro_batch": 4},
        {"schedule": "dualpipev"},
    ),
    "split backward keeps gradients whole": Refused(
        {**ZBV, "zero": 3}, "use zero=0 or zero=1, or another schedule", ZBV, {"zero": 3, "fsdp": 2}
    ),
    "only zero 3 frees parameters": Refused(
        {"dp": 4, "zero": 2, "reshard": "true"}, "reshard is of zero=3", {"dp": 4, "zero": 2}, blocks={"gathered": True}
    ),
    "split backward recomputes too often": Refused(
        {**ZBV, "recompute": "full"}, "use recompute=none, or another schedule", ZBV, blocks={"recompute": "full"}
    ),
    "zero 0 shards nothing": Refused(
        {"dp": 4, "zero": 0, "fsdp": 2}, "fsdp=2 contradicts zero=0", {"dp": 4, "zero": 0}, {"fsdp": 2}
    ),
    "two tensor axes": Refused(
        {"tp": "2x2x2"},
        "split over two tensor axes at most",
        {"tp": "2x4"},
        {"mesh": Mesh(tp=8, tp_parts=(2, 2, 2))},
        devices=8,
    ),
    "shard groups hold whole sequences": Refused(
        {"cp": 4, "zero": 3, "fsdp": 2},
        "fsdp must be a multiple of cp",
        {"cp": 4, "zero": 3},
        {"fsdp": 2},
    ),
    "context ranks inside data ranks": Refused(
        {"dp": 2, "cp": 2, "order": "pp,cp,dp,tp"},
        "name cp after dp in order",
        {"dp": 2, "cp": 2},
        {"mesh": Mesh(dp=2, cp=2, order=("pp", "cp", "dp", "tp"))},
    ),
}


def plan_of(fix: dict[str, Any], batch: int = 16, devices: int = 4) -> Plan:
    return search(graph_of(Variant()), Job(batch, SEQ), Cluster.parse(f"1x{devices}:h100"), fix)


def test_every_limit_has_a_refusal() -> None:
    """Those of experts need a model that has some: `test_experts`."""
    assert list(REFUSED) == [limit.name for limit in LIMITS if "ep" not in limit.keys]


@pytest.mark.parametrize("name", REFUSED)
def test_a_fix_past_a_limit_says_why_and_what_to_do(name: str) -> None:
    refused = REFUSED[name]
    with pytest.raises((BadInputError, UnsupportedError)) as error:
        plan_of(refused.fix, refused.batch, refused.devices)
    said = str(error.value)
    assert said.startswith("fix: ")
    assert refused.told in said
    assert all(
        f"{key}={value}" in said for key, value in refused.fix.items() if key in ("schedule", "fsdp", "recompute")
    )


@pytest.mark.parametrize("name", REFUSED)
def test_a_plan_changed_by_hand_is_not_emitted(name: str, tmp_path: Path) -> None:
    refused = REFUSED[name]
    plan = plan_of(refused.good, refused.batch, refused.devices)
    emit(plan, graph_of(Variant()), tmp_path / "good")
    blocks = {key: replace(candidate, **refused.blocks) for key, candidate in plan.candidates.items()}
    changed = replace(plan, **refused.changes, candidates=blocks)
    with pytest.raises(UnsupportedError) as error:
        emit(changed, graph_of(Variant()), tmp_path / "out")
    limit = next(limit for limit in LIMITS if limit.name == name)
    assert f"cannot be executed: {name}: {limit.reason}" in str(error.value)
    assert limit.avoids in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_other_values_of_the_table_are_all_executable() -> None:
    assert {key for key, capability in CAPABILITIES.items() if capability.missing} == set()
