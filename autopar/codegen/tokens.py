"""What a model's batch tensors are in terms of token ids: how train.py makes them, whatever they are called."""

from __future__ import annotations

from autopar.errors import UnsupportedError
from autopar.graph.ir import ModelGraph, Node, OpGraph, Ref

_BY_NAME = {
    "attention_mask": "torch.ones_like(ids)",
    "position_ids": "torch.arange(SEQ_LEN, device=ids.device).expand_as(ids)",
}


def token_batch(graph: ModelGraph) -> dict[str, str]:
    """For each batch tensor, the expression that makes it from token ids ``ids`` [samples, SEQ_LEN].

    Token ids are what an embedding looks up; targets are what the loss compares with. A model that shifts its targets
    by itself gets the ids; one that compares position by position gets each position's next token, and none for the
    last. Raises UnsupportedError for a tensor that is none of these.
    """
    tables, targets = token_tables(graph), loss_targets(graph)
    made: dict[str, str] = {}
    for key in graph.batch:
        if key in _BY_NAME:
            made[key] = _BY_NAME[key]
        elif key in tables:
            made[key] = "ids"
        elif key in targets:
            ignored, shifted = targets[key]
            made[key] = "ids" if shifted else f"torch.nn.functional.pad(ids[:, 1:], (0, 1), value={ignored})"
        else:
            raise UnsupportedError(
                f"{graph.name} takes {key}, which train.py cannot make from token ids: it is neither looked up by an "
                "embedding, nor the target of a cross-entropy, nor called attention_mask or position_ids; wrap the "
                "model in one that makes it by itself"
            )
    return made


def vocabulary_of(graph: ModelGraph) -> int:
    """Rows of the table that token ids look up. Raises UnsupportedError if the model has no such table."""
    tables = token_tables(graph)
    if not tables:
        raise UnsupportedError(
            f"{graph.name}: no embedding reads a tensor of the batch, so train.py cannot tell its vocabulary; autopar "
            "writes training scripts for models that start from token ids"
        )
    return min(tables.values())


def token_tables(graph: ModelGraph) -> dict[str, int]:
    """Batch tensors that embeddings look up, and the rows of their tables."""
    found: dict[str, int] = {}
    for nodes, keys in _graphs(graph):
        for node in nodes.of("op"):
            if node.op == "aten.embedding" and (key := keys.get(node.operands()[1])) not in (None, *_BY_NAME):
                assert key is not None
                rows = int(nodes.nodes[node.operands()[0]].meta.at(1, 1)[0])
                found[key] = min(rows, found.get(key, rows))
    return found


def loss_targets(graph: ModelGraph) -> dict[str, tuple[int, bool]]:
    """Batch tensors that a cross-entropy takes as targets: the index it ignores, and whether they are shifted first."""
    found: dict[str, tuple[int, bool]] = {}
    for nodes, keys in _graphs(graph):
        for node in nodes.of("op"):
            if node.op != "autopar.cross_entropy":
                continue
            target, shifted = nodes.nodes[node.operands()[1]], False
            while target.kind == "op":
                shifted |= target.op in ("aten.slice", "aten.pad", "aten.roll", "aten.cat")
                target = _first(target, nodes)
            if target.name in keys:
                found[keys[target.name]] = (int(node.args[2]), shifted)
    return found


def _first(node: Node, graph: OpGraph) -> Node:
    return graph.nodes[next(arg.name for arg in node.args if isinstance(arg, Ref))]


def _graphs(graph: ModelGraph) -> list[tuple[OpGraph, dict[str, str]]]:
    """Each block's operators, and which of its inputs are which batch tensor."""
    return [
        (
            graph.kinds[block.kind].graph,
            {name: source.key for name, source in block.inputs.items() if source.origin == "batch"},
        )
        for block in graph.blocks
    ]
