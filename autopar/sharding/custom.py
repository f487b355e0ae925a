"""The user's own operators: their sharding rules, functions that are not traced into, and the proof of both."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from autopar.errors import BadInputError, VerificationError
from autopar.graph.leaves import LEAVES, make_leaf
from autopar.graph.ops import callable_of
from autopar.sharding.factors import Annotation
from autopar.sharding.prove_rule import call_node, prove
from autopar.sharding.rules.blocks import forget
from autopar.sharding.rules.entry import Entry
from autopar.sharding.rules.strategies import divides, has_rule, strategies_of
from autopar.sharding.rules.table import RULES

MODULES: dict[str, str] = {}
"""For each of the user's operators, the module whose import registers it."""

Examples = Sequence[Sequence[Any] | tuple[Sequence[Any], Mapping[str, Any]]]


def register_rule(op: Any, *annotations: str, freeze: str = "", linear: str = "", module: str | None = None) -> None:
    """Say how the operator ``op`` may be split.

    * ``op``: ``"mylib::scan"`` or ``torch.ops.mylib.scan``; it must return one tensor, and have a fake implementation.
    * ``annotations``: ``"b l d, d n -> b l d"``: the dims of every tensor argument and of the result, named by factors.
      ``+`` marks a factor whose split leaves partial sums in the result (``"b k+, k+ n -> b n"``), ``^`` one that must
      stay whole, ``...`` the leading dims. Several, if calls differ in form: the first that fits holds.
    * ``freeze``: factors that must stay whole, by name, as if marked ``^``.
    * ``linear``: operands in which the operator is linear, together, as digits ("0", "01 2"): sums may pass through.
    * ``module``: the module that emitted code imports to have the operator; default the caller's.

    Prove it with `check_rule`. Raises BadInputError for an operator or an annotation that cannot be read.
    """
    name = _name(op)
    try:
        callable_of(name)
    except (KeyError, AttributeError):
        raise BadInputError(f"register_rule: there is no operator {op!r}; define it with torch.library first") from None
    _register(name, annotations, freeze, linear)
    MODULES[name] = module or sys._getframe(1).f_globals.get("__name__", "__main__")


def leaf(target: Any, *annotations: str, freeze: str = "", linear: str = "") -> Any:
    """Make a function one operator that tracing does not look into, split as ``annotations`` say.

    * ``target``: a function of tensors (and other arguments) that returns one tensor, or a `torch.autograd.Function`
      (its ``apply``). It must be importable from its module, since emitted code calls it there.
    * the rest: as for `register_rule`.

    Returns what to use in its place: ``norm = autopar.leaf(norm, "b s d^, d -> b s d^")``. Raises BadInputError.
    """
    made, found = make_leaf(target)
    _register(found.op, annotations, freeze, linear)
    MODULES[found.op] = found.module
    return made


def check_rule(op: Any, examples: Examples, ranks: Sequence[int] = (2, 4)) -> int:
    """Prove the rule of ``op`` by running it on shards: every way to split each example, forward and backward.

    * ``op``: as for `register_rule`, or what `leaf` returned.
    * ``examples``: argument tuples (tensors among them), or pairs (arguments, keyword arguments).

    Returns how many splits were proved. Raises VerificationError for the first that is wrong, or if there are none.
    """
    name = _name(op)
    proved = 0
    for example in examples:
        args, kwargs = example if len(example) == 2 and isinstance(example[1], dict) else (example, {})
        node, graph, values = call_node(name, args, kwargs)
        if not has_rule(node, graph):
            raise VerificationError(f"{name}: no annotation fits tensors of shapes {_shapes(values)}")
        for size, strategy in itertools.product(ranks, strategies_of(node, graph)):
            if strategy.extent is None or not divides(node, graph, strategy, size, 1, 1):
                continue
            try:
                prove(node, values, {"tp": strategy}, {"tp": size})
            except (VerificationError, RuntimeError) as error:
                raise VerificationError(
                    f"{name} on tensors of shapes {_shapes(values)}, {strategy.name} split over {size} ranks "
                    f"({strategy}): {error}"
                ) from error
            proved += 1
    if not proved:
        raise VerificationError(f"{name}: no factor of these examples can be split over {' or '.join(map(str, ranks))}")
    return proved


def _register(name: str, annotations: tuple[str, ...], freeze: str, linear: str) -> None:
    if not annotations:
        raise BadInputError(f"{name}: give an annotation such as 'b l d, d n -> b l d'")
    frozen = set(freeze.split())
    texts = []
    for text in annotations:
        try:
            parsed = Annotation.parse(text)
        except ValueError as error:
            raise BadInputError(f"{name}: {error}") from None
        known = {factor for dims in (*parsed.operands, parsed.output) for dim in dims for factor in dim}
        if unknown := frozen - known:
            raise BadInputError(f"{name}: freeze names {', '.join(sorted(unknown))}, which {text!r} does not have")
        marked = re.sub(r"[a-z][a-z0-9]*|\.\.\.", lambda m: m[0] + "^" if m[0] in frozen else m[0], text)
        texts.append(marked.replace("^^", "^"))
    RULES[name] = Entry(name, tuple(texts), linear=linear)
    forget()


def _name(op: Any) -> str:
    if isinstance(op, str):
        return op.replace("::", ".")
    if isinstance(op, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return str(op._qualified_op_name if isinstance(op, torch._ops.OpOverloadPacket) else op._schema.name).replace(
            "::", "."
        )
    call: Callable[..., Any] = getattr(op, "__wrapped__", op)
    for name, known in LEAVES.items():
        if known.call == call or (isinstance(op, type) and known.op == f"leaf.{op.__module__}.{op.__qualname__}.apply"):
            return name
    raise BadInputError(
        f"{op!r} is no operator: give 'mylib::scan', torch.ops.mylib.scan, or what autopar.leaf returned"
    )


def _shapes(values: Sequence[torch.Tensor]) -> str:
    return ", ".join(str(list(value.shape)) for value in values)
