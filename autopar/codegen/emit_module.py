"""Plan and model to the text of ``module.py``: one class per block kind and decision, and the stage that holds them.

What the text defines (the contract with the training runtime):

    MESH, STAGES, TIED                 the plan: axis sizes; per stage its runs of blocks; names of one tied tensor
    build_stage(index, mesh, device, dtype, meta=False) -> Stage
    Stage.forward(hidden, **batch)     every stage takes the whole batch by keyword; the last returns the loss sum
    Stage.blocks()                     the modules to shard, compile and recompute one by one
    count_targets(batch)               what the loss sum is divided by
    init_parameter(name, weight, generator)

It imports `runtime.collectives`, `runtime.operators` and `runtime.weights`, and torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from autopar.codegen.calls import IMPORTS
from autopar.codegen.emit_block import FUNCTIONS
from autopar.codegen.emit_class import class_source
from autopar.codegen.emit_constants import constants_source, count_source
from autopar.codegen.emit_stage import StageWriter
from autopar.codegen.setting import Setting, setting_of
from autopar.codegen.source import literal
from autopar.codegen.statements import wrap_comment
from autopar.codegen.tables import split_once
from autopar.codegen.wiring import place_blocks
from autopar.graph.ir import ModelGraph
from autopar.graph.leaves import FOUND, LEAVES
from autopar.graph.padding import as_planned
from autopar.plan import Plan
from autopar.sharding.custom import MODULES

_OPERATORS = (
    "attention",
    "context_attention",
    "cross_entropy",
    "drawn",
    "dropout",
    "rotary",
    "vocab_cross_entropy",
    "vocab_embedding",
)


def module_source(plan: Plan, model: ModelGraph) -> str:
    """The text of ``module.py`` for ``plan``. Raises UnsupportedError for what cannot be emitted, naming it."""
    model = as_planned(plan, model)
    setting = setting_of(plan, model)
    plan, split = split_once(plan, model)
    placed = place_blocks(plan, model)
    classes = {block.callee: block for block in reversed(placed) if block.path}
    body: list[str] = []
    for name in dict.fromkeys(block.callee for block in placed if block.path):
        body += ["", "", *class_source(classes[name], model, setting)]
    writer = StageWriter(plan, model, placed, setting, split)
    body += ["", "", *writer.stages_table()]
    body += ["", "", *writer.stage_class()]
    if model.constants.outputs:
        body += ["", "", *constants_source(model, setting)]
    splits = literal(tuple(setting.splits)).text
    shared = f", ep={setting.ep}" if setting.ep > 1 else ""
    body += ["", "", *_BUILD.replace("SPLITS", splits).replace("place, dtype)", f"place, dtype{shared})").splitlines()]
    body += ["", "", *count_source(model, setting)]
    body += ["", "", *_INIT.splitlines()]
    text = "\n".join(body)
    return "\n".join([*_header(plan, model, setting, text), text]) + "\n"


def _header(plan: Plan, model: ModelGraph, setting: Setting, text: str) -> list[str]:
    """Docstring, imports of what the text uses, and the plan's constants."""
    lines = [
        f'"""{model.name} on {plan.mesh.size} devices: {plan.mesh}.',
        "",
        "Written by autopar; made to be read and changed. Tensors are what one rank holds of them: its samples of a "
        "micro-batch" + _parts(setting),
    ]
    if setting.axes:
        named = _listed(setting.axes)
        lines += [
            "",
            f"How the ranks of {named} hold a tensor: R replicated, I invariant (replicated and used alike), P partial "
            "sums, S(d) split on dim d; see runtime/collectives.py.",
        ]
    if setting.balanced:
        cp = setting.axes["cp"]
        lines += [
            "",
            f"The ranks of cp hold a sequence in balanced order: of its {2 * cp} chunks, rank r has chunks r and "
            f"{2 * cp - 1} - r, so that causal attention is the same work for each.",
        ]
    if plan.pad_heads > 1:
        lines += [
            "",
            f"Attention has zeros for heads up to a multiple of {plan.pad_heads}, put into its weights where they are "
            "used: the added heads change neither the loss nor a gradient. Parameters are without them.",
        ]
    lines += ['"""', ""]
    lines = [part for line in lines for part in ([line] if len(line) <= 88 else _wrapped(line))]
    lines.append("import torch")
    if "F." in text:
        lines.append("import torch.nn.functional as F")
    for module, names, end in (
        ("runtime.buffers", ("held",), r"\("),
        ("runtime.collectives", sorted(FUNCTIONS.values()), r"\("),
        ("runtime.experts", ("experts",), r"\("),
        ("runtime.offload", IMPORTS["runtime.offload"], r"\("),
        ("runtime.operators", _OPERATORS, r"\("),
        ("runtime.position_tables", ("angle_table", "sinusoids"), r"\("),
        ("runtime.ring", ("ring_attention",), r"\("),
        ("runtime.scans", ("gated_delta_rule", "selective_scan", "state_space_scan"), r"\("),
        ("runtime.recompute", IMPORTS["runtime.recompute"], r"\b"),
        ("runtime.weights", ("New", "Weights"), r"\b"),
    ):
        used = [name for name in names if re.search(rf"(?<![.\w]){name}{end}", text)]
        if used:
            lines += _import(module, used)
    lines += [f"import {module}" for module in imported_modules(model)]
    lines.append("from torch import Tensor, nn")
    lines.append("from torch.distributed.device_mesh import DeviceMesh")
    if re.search(r"\bcheckpoint[(,]", text):
        lines.append("from torch.utils.checkpoint import checkpoint")
    lines += ["", f"MESH = {_dict(plan.mesh.ranked_axes())}  # outermost first, in rank order"]
    return lines + _tied(model.tied)


def imported_modules(model: ModelGraph) -> list[str]:
    """The modules of the user's own operators in ``model``."""
    ops = {node.op for kind in model.kinds.values() for node in kind.graph.of("op")}
    told = {MODULES[op] for op in ops if op in MODULES}
    return sorted(told | {LEAVES[op].module for op in ops if op in FOUND})


def _tied(groups: tuple[tuple[str, ...], ...]) -> list[str]:
    if not groups:
        return ["TIED = ()"]
    names = [[f'"{name}"' for name in group] for group in groups]
    texts = [f"({', '.join(group)}{',' if len(group) == 1 else ''})" for group in names]
    line = f"TIED = ({', '.join(texts)}{',' if len(texts) == 1 else ''})"
    lines = [line]
    if len(line) > 88:
        lines = ["TIED = ("]
        for group, text in zip(names, texts, strict=True):
            if len(text) + 5 <= 88:
                lines.append(f"    {text},")
            else:
                lines += ["    (", *(f"        {name}," for name in group), "    ),"]
        lines.append(")")
    return ["# Names of one and the same parameter.", *lines]


def _parts(setting: Setting) -> str:
    parts = []
    if "cp" in setting.axes:
        parts.append("its part of each sequence (context-parallel axis cp)")
    if setting.splits:
        plural = "es" if len(setting.splits) > 1 else "is"
        parts.append(f"its part along the tensor-parallel ax{plural} {_listed(setting.splits)}")
    return "".join(f", {part}" for part in parts) + "."


def _listed(names: Iterable[str]) -> str:
    return " and ".join(", ".join(names).rsplit(", ", 1))


def _wrapped(line: str) -> list[str]:
    return [part.removeprefix("# ") for part in wrap_comment(line, 0)]


def _dict(values: dict[str, int]) -> str:
    return "{" + ", ".join(f'"{key}": {value}' for key, value in values.items()) + "}"


def _import(module: str, names: list[str]) -> list[str]:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= 88:
        return [line]
    return [f"from {module} import (", *(f"    {name}," for name in names), ")"]


_BUILD = '''\
def build_stage(
    index: int,
    mesh: DeviceMesh | None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    meta: bool = False,
) -> Stage:
    """Stage ``index`` with uninitialised parameters, without memory if ``meta``."""
    place = torch.device("meta") if meta else device
    return Stage(index, New(mesh, SPLITS, place, dtype))'''

_INIT = '''\
@torch.no_grad()
def init_parameter(name: str, weight: Tensor, generator: torch.Generator) -> None:
    """Fill a whole parameter: scales 1, biases 0, everything else normal, deviation 0.02."""
    if name.endswith("bias"):
        weight.zero_()
    elif weight.ndim < 2:
        weight.fill_(1.0)
    else:
        weight.normal_(0.0, 0.02, generator=generator)'''
