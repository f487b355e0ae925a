"""Compiles a PyTorch model, a cluster and a training job into the fastest parallel plan, and that into readable code.

    cluster = autopar.Cluster.parse("8x8:h100")
    job = autopar.Job(global_batch=512, seq_len=8192)
    plan = autopar.search("llama3-8b", job, cluster)
    autopar.emit(plan, "llama3-8b", "out/")

This file is the whole public API. Names load on first use, so that importing autopar costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autopar.api import emit, parallelize, predict, search, verify
    from autopar.cluster import Cluster
    from autopar.errors import AutoparError, BadInputError, InfeasibleError, UnsupportedError, VerificationError
    from autopar.job import Job
    from autopar.objective import Objective
    from autopar.plan import Mesh, Plan, Predicted, Stage
    from autopar.sharding.custom import check_rule, leaf, register_rule

__version__ = "0.1.0"

_HOMES = {
    "autopar.api": ("emit", "parallelize", "predict", "search", "verify"),
    "autopar.cluster": ("Cluster",),
    "autopar.errors": ("AutoparError", "BadInputError", "InfeasibleError", "UnsupportedError", "VerificationError"),
    "autopar.job": ("Job",),
    "autopar.objective": ("Objective",),
    "autopar.sharding.custom": ("check_rule", "leaf", "register_rule"),
    "autopar.plan": ("Mesh", "Plan", "Predicted", "Stage"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AutoparError",
    "BadInputError",
    "Cluster",
    "InfeasibleError",
    "Job",
    "Mesh",
    "Objective",
    "Plan",
    "Predicted",
    "Stage",
    "UnsupportedError",
    "VerificationError",
    "check_rule",
    "emit",
    "leaf",
    "parallelize",
    "predict",
    "register_rule",
    "search",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'autopar' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
