"""What nodes of an exported program say: where they ran, in what dtype, with which arguments."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from autopar.graph.ir import COMPUTE

TRACE_DTYPE = torch.bfloat16
"""The model is traced with parameters of this dtype, so that upcasts to float32 show."""

FUNCTIONAL = "torch._functorch.predispatch"
"""Home of the calls that torch.export leaves of torch.func and torch.vmap."""
OWN_OPERATOR = "an operator of its own (torch.library.custom_op, autopar.register_rule)"
IF_EXPERTS = (
    "If these are experts of a mixture, they are recognised where one module holds the weights of all of them stacked "
    "(three dims, with or without biases, or below one another in matrices), is called with hidden states, the chosen "
    "experts' indices and their weights, and computes for each token the weighted sum of down(act(up(x))), act being "
    "one that autopar knows (silu, gelu, relu, relu squared; clamped silu or swish); or where a module calls each of a "
    "list of equal modules with the tokens that chose it, and nothing but single tokens counts"
)
IF_PICKED = (
    "What a boolean mask picks is understood as the targets of a CTC loss, as outputs and targets of a loss picked by "
    "the same mask (else write torch.where and an ignore_index), and as the last position of each sample. "
)


def from_values(operator: str = "") -> str:
    """What is told of code that cannot be traced because it depends on data, seen at an operator."""
    picks = operator in ("aten.index", "aten.masked_select", "aten.nonzero")
    return (
        "computes sizes, or chooses what to run, from the values of tensors"
        f"{f' ({operator})' if operator else ''}, which no graph can hold: make what does so {OWN_OPERATOR}. "
        f"{IF_PICKED if picks else ''}{IF_EXPERTS}"
    )


def unknown_call(target: object) -> str:
    """What to say of a call of something that is no operator of torch: what it is, and the way out."""
    name = getattr(target, "__name__", None) or str(target)
    if getattr(target, "__module__", "") == FUNCTIONAL:
        name = f"a transform of torch.func ({name.strip('_')})"
        out = "derivatives by torch.autograd.grad(..., create_graph=True) are understood, and torch.vmap is; or make"
    else:
        out = "write it in operators of torch (torch.where of both branches, a loop that Python runs), or make"
    return f"calls {name}, which autopar cannot take apart: {out} its module a leaf with a rule (autopar.leaf)"


def module_path(node: torch.fx.Node) -> str | None:
    """Path in the user's model of the module that ran ``node``; None if unknown.

    A module called for the (k+1)-th time shows as ``name@k``, so that calls can be told apart.
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    plain = called = ""
    for key, (path, *_) in stack.items():
        call = key.rpartition("@")[2] if "@" in key else ""
        added = str(path).removeprefix(plain).lstrip(".") if str(path).startswith(plain) else str(path)
        if added != path or not plain:
            called = f"{called}.{added}" if called else added
        else:
            called = added  # a module that lives elsewhere in the model
        called, plain = f"{called}@{call}" if call else called, str(path)
    if called in ("", "model"):
        return ""
    return called.removeprefix("model.") if called.startswith("model.") else None


def dtype_name(dtype: torch.dtype) -> str:
    return COMPUTE if dtype == TRACE_DTYPE else str(dtype).removeprefix("torch.")


def tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def rank_of(node: torch.fx.Node) -> int | None:
    for value in node.args:
        items: Iterable[Any] = value if isinstance(value, list | tuple) else (value,)
        for item in items:
            if isinstance(item, torch.fx.Node) and isinstance(item.meta.get("val"), torch.Tensor):
                return int(item.meta["val"].ndim)
    return None


def positive(value: Any, rank: int) -> Any:
    if isinstance(value, tuple):
        return tuple(positive(item, rank) for item in value)
    return value % max(rank, 1) if isinstance(value, int) else value


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def close(value: Any, wanted: float) -> bool:
    """Whether a graph's literal is ``wanted`` up to float32 rounding."""
    return is_number(value) and math.isclose(value, wanted, rel_tol=1e-6)
