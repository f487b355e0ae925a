"""Traced models to and from plain JSON values (the trace cache, fingerprints)."""

from __future__ import annotations

from typing import Any

from autopar.graph.ir import Block, BlockKind, ModelGraph, Node, OpGraph, Ref, Source, TensorMeta
from autopar.graph.size import Size

GRAPH_VERSION = 2


def model_to_json(model: ModelGraph) -> dict[str, Any]:
    """The traced model as plain JSON values; equal models give equal values."""
    return {
        "version": GRAPH_VERSION,
        "name": model.name,
        "kinds": {name: graph_to_json(kind.graph) for name, kind in model.kinds.items()},
        "blocks": [
            [
                block.kind,
                block.path,
                {name: [s.origin, s.block, s.index, s.key] for name, s in block.inputs.items()},
                block.parameters,
            ]
            for block in model.blocks
        ],
        "constants": graph_to_json(model.constants),
        "count": graph_to_json(model.count),
        "batch": _metas_json(model.batch),
        "parameters": _metas_json(model.parameters),
        "buffers": _metas_json(model.buffers),
        "tied": [list(group) for group in model.tied],
        "buffer_values": {name: list(values) for name, values in model.buffer_values.items()},
        "max_seq": model.max_seq,
        **({"min_seq": model.min_seq} if model.min_seq > 1 else {}),
        "nominal_seq": model.nominal_seq,
        "notes": list(model.notes),
    }


def model_from_json(data: dict[str, Any]) -> ModelGraph:
    """Inverse of `model_to_json`. Raises ValueError for another version."""
    if data.get("version") != GRAPH_VERSION:
        raise ValueError(f"graph version {data.get('version')!r}, expected {GRAPH_VERSION}")
    return ModelGraph(
        name=data["name"],
        kinds={name: BlockKind(name, _graph(graph)) for name, graph in data["kinds"].items()},
        blocks=tuple(
            Block(kind, path, {name: Source(*source) for name, source in inputs.items()}, dict(parameters))
            for kind, path, inputs, parameters in data["blocks"]
        ),
        constants=_graph(data["constants"]),
        count=_graph(data["count"]),
        batch=_metas(data["batch"]),
        parameters=_metas(data["parameters"]),
        buffers=_metas(data["buffers"]),
        tied=tuple(tuple(group) for group in data["tied"]),
        buffer_values={name: tuple(values) for name, values in data["buffer_values"].items()},
        max_seq=data["max_seq"],
        min_seq=data.get("min_seq", 1),
        nominal_seq=data["nominal_seq"],
        notes=tuple(data["notes"]),
    )


def graph_to_json(graph: OpGraph) -> dict[str, Any]:
    """A graph as plain JSON values; equal graphs give equal values."""
    nodes = [
        [n.name, n.kind, _meta_json(n.meta), n.op, _value_json(n.args), _value_json(n.kwargs), n.target, n.module]
        for n in graph.nodes.values()
    ]
    return {"nodes": nodes, "outputs": list(graph.outputs)}


def _graph(data: dict[str, Any]) -> OpGraph:
    nodes = [
        Node(name, kind, _meta(meta), op, _value(args), _value(kwargs), target, module)
        for name, kind, meta, op, args, kwargs, target, module in data["nodes"]
    ]
    return OpGraph({node.name: node for node in nodes}, tuple(data["outputs"]))


def _meta_json(meta: TensorMeta) -> list[Any]:
    return [[size if isinstance(size, int) else str(size) for size in meta.shape], meta.dtype, meta.requires_grad]


def _meta(data: list[Any]) -> TensorMeta:
    shape, dtype, requires_grad = data
    return TensorMeta(tuple(s if isinstance(s, int) else Size.parse(s) for s in shape), dtype, requires_grad)


def _metas_json(metas: dict[str, TensorMeta]) -> dict[str, Any]:
    return {name: _meta_json(meta) for name, meta in metas.items()}


def _metas(data: dict[str, Any]) -> dict[str, TensorMeta]:
    return {name: _meta(meta) for name, meta in data.items()}


def _value_json(value: Any) -> Any:
    if isinstance(value, Ref):
        return {"ref": value.name}
    if isinstance(value, Size):
        return {"size": str(value)}
    if isinstance(value, tuple | list):
        return [_value_json(item) for item in value]
    if isinstance(value, dict):
        return {"dict": {key: _value_json(item) for key, item in value.items()}}
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"cannot serialise argument {value!r} of type {type(value).__name__}")


def _value(data: Any) -> Any:
    if isinstance(data, list):
        return tuple(_value(item) for item in data)
    if isinstance(data, dict):
        (tag, content), *_ = data.items()
        if tag == "ref":
            return Ref(content)
        if tag == "size":
            return Size.parse(content)
        if tag == "float":
            return float(content)
        return {key: _value(item) for key, item in content.items()}
    return data
