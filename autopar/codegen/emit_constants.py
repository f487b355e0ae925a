"""The functions of ``module.py`` that hold no parameters: shared tables, and the count that the loss is divided by."""

from __future__ import annotations

import re

from autopar.codegen.buffers import buffer_expr
from autopar.codegen.emit_block import Body
from autopar.codegen.setting import Setting
from autopar.codegen.source import WIDTH, Expr
from autopar.codegen.wiring import argument_name, table_names
from autopar.errors import UnsupportedError
from autopar.graph.ir import ModelGraph, OpGraph
from autopar.graph.size import BATCH, SEQ


def constants_source(model: ModelGraph, setting: Setting) -> list[str]:
    """The function that makes what blocks share and no parameter changes (rotary tables, positions)."""
    body = _free_body(model, model.constants, setting)
    body.extra = {"size b": "batch", "size s": "seq", "dtype": "dtype", "device": "device"}
    body.names = table_names(model)
    for node in model.constants.of("op"):
        reads_buffer = any(model.constants.nodes[name].kind == "buffer" for name in node.operands())
        if node.op in ("aten.mul", "aten.matmul") and reads_buffer:
            body.names[node.name] = "angles"
    lines = body.program().lines(1)
    names = list(table_names(model).values())
    kind = "tuple[" + ", ".join(["Tensor"] * len(names)) + "]" if len(names) > 1 else "Tensor"
    given = {"batch": "int", "seq": "int", "dtype": "torch.dtype", "device": "torch.device"}
    used = [key for key in given if any(_mentions(line, key) for line in lines)]
    arguments = ", ".join(f"{key}: {given[key]}" for key in used)
    text = " and ".join(names) if len(names) < 3 else ", ".join(names)
    head = [f"def shared_tables({arguments}) -> {kind}:"]
    if len(head[0]) > WIDTH:
        head = ["def shared_tables(", *(f"    {key}: {given[key]}," for key in used), f") -> {kind}:"]
    told = f'    """{text}: the same for all blocks and ranks."""'
    if len(told) > WIDTH:
        told = '    """Made of no parameter and no batch: the same for all blocks and ranks."""'
    return [*head, told, *lines]


def constants_arguments(model: ModelGraph, setting: Setting) -> tuple[str, ...]:
    """The arguments that ``shared_tables`` takes, of batch, seq, dtype and device."""
    head = "".join(constants_source(model, setting)).partition("(")[2].partition(")")[0]
    return tuple(part.split(":")[0].strip() for part in head.split(",") if part.strip())


def _mentions(line: str, name: str) -> bool:
    return re.search(rf"(?<![\w.]){name}\b(?!=)", line) is not None


def _free_body(model: ModelGraph, graph: OpGraph, setting: Setting) -> Body:
    weights: dict[str, Expr] = {}
    for node in graph.of("parameter"):
        raise UnsupportedError(f"{node.target}: a parameter among the constants")
    for node in graph.of("buffer"):
        values = model.buffer_values.get(node.target)
        weights[node.name] = buffer_expr(node.target, node.meta, values, setting.double)
    arguments = {node.name: argument_name(node.target) for node in graph.of("input")}
    return Body(graph, None, setting, arguments, weights)


def count_source(model: ModelGraph, setting: Setting) -> list[str]:
    head = "def count_targets(batch: dict[str, Tensor]) -> Tensor:"
    some, shape = next((key, meta.shape) for key, meta in model.batch.items() if meta.shape[:1] == (BATCH,))
    if not model.count.outputs:
        return [
            head,
            '    """None: the loss is a plain sum, which nothing divides."""',
            f'    return torch.zeros((), dtype=torch.int64, device=batch["{some}"].device)',
        ]
    body = _free_body(model, model.count, setting)
    # A mean over all elements, or targets without positions: the sizes follow from other tensors of the batch.
    read = {size for node in model.count.of("input") for size in node.meta.shape}
    long, dims = next(((key, m.shape) for key, m in model.batch.items() if SEQ in m.shape), (some, shape))
    others = {"device": f'batch["{some}"].device'} if not read else {}
    if BATCH not in read:
        others["size b"] = f'batch["{some}"].shape[0]'
    if SEQ not in read and SEQ in dims:
        others["size s"] = f'batch["{long}"].shape[{dims.index(SEQ)}]'
    body.extra = others
    return [
        head,
        '    """How many targets ``batch`` has: what its summed loss is divided by."""',
        *(f'    {body.arguments[node.name]} = batch["{node.target}"]' for node in model.count.of("input")),
        *body.program().lines(1),
    ]
