"""Plans whose types were once misjudged: what the checker is told about them."""

from __future__ import annotations

from typing import Any

import pytest

from autopar.codegen.typecheck import typecheck
from proof.cases import Case
from proof.models import graph_of
from proof.running import plan_of

CASES: dict[str, dict[str, Any]] = {
    "gradients in pieces are sent": {
        "mesh": "tp4",
        "dtype": "fp32",
        "micro_batches": 1,
        "micro_batch": 2,
        "recompute": "keep attention",
        "offload": "state",
        "sp": False,
        "optimizer": "sgd",
        "vocab": 61,
    },
    "a table of biases split over two axes": {
        "family": "t5",
        "mesh": "dp2 tp2x2",
        "micro_batch": 2,
        "offload": "state",
        "sp": False,
        "optimizer": "sgd",
    },
    "heads split inside their groups": {
        "mesh": "cp2 tp4",
        "dtype": "fp32",
        "sharding": "zero1",
        "micro_batch": 2,
        "recompute": "mixed",
        "sp": False,
        "tied": True,
        "frozen": "half",
    },
    "a frozen table of split ids": {
        "mesh": "dp2 tp2",
        "sharding": "zero1",
        "frozen": "embedding",
        "sp": True,
        "vocab": 61,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_types_hold(name: str) -> None:
    case = Case.of(**CASES[name])
    plan, graph = plan_of(case), graph_of(case.variant)
    for ranks in (8, 64):
        typecheck(plan, graph, ranks)
