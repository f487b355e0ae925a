"""What a model's batch tensors are in terms of token ids: how train.py makes them, whatever they are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autopar.codegen.reach import reach_of_predictions
from autopar.errors import UnsupportedError
from autopar.graph.ir import COMPUTE, ModelGraph, Node, OpGraph
from autopar.graph.size import BATCH, SEQ, Size

_BY_NAME = {
    "attention_mask": "torch.ones_like(ids)",
    "position_ids": "torch.arange(SEQ_LEN, device=ids.device).expand_as(ids)",
    "token_type_ids": "torch.zeros_like(ids)",
}

NEXT, MASKED, DENOISING, GIVEN = "next", "masked", "denoising", "given"
"""What a model learns: each position's next token; tokens that are masked in its input; the whole of a sample whose
tokens are masked in the input of its encoder; what the samples say, which are no tokens."""


class NoTokensError(UnsupportedError):
    """A batch that cannot be made from token ids."""


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """How train.py makes a batch. ``objective``: `NEXT`, `MASKED`, `DENOISING` or `GIVEN`. ``made``: for each batch
    tensor the expression that makes it from token ids ``ids`` [samples, SEQ_LEN], from ``shown`` (ids with some masked)
    and ``chosen`` (bool: where). ``starts``: whether an expression reads START_ID."""

    objective: str
    made: dict[str, str]

    @property
    def starts(self) -> bool:
        return any("START_ID" in value for value in self.made.values())


def batch_of(graph: ModelGraph) -> TokenBatch:
    """What the graph is trained on: token ids if they are all that it takes, else samples that hold its tensors."""
    try:
        return token_batch(graph)
    except NoTokensError:
        return TokenBatch(GIVEN, {})


def token_batch(graph: ModelGraph) -> TokenBatch:
    """What the graph is trained on.

    Token ids are what an embedding looks up; targets are what the loss compares with. A model that shifts its targets
    by itself gets the ids. One that predicts from earlier positions alone gets each position's next token, and none for
    the last. One that sees all positions would only copy: it gets masked ids and has to find the masked ones. One
    that sees all positions of some ids and the earlier ones of its targets (or of other ids) is an encoder and a
    decoder: the first are masked, the decoder writes the whole. Raises NoTokensError for a tensor that is none of
    these, and for targets that are not token ids.
    """
    tables, targets = token_tables(graph), loss_targets(graph)
    for key in graph.batch:
        if key not in _BY_NAME and key not in tables and key not in targets:
            raise NoTokensError(
                f"{graph.name} takes {key}, which train.py cannot make from token ids: it is neither looked up by an "
                "embedding, nor the target of a cross-entropy, nor called attention_mask, position_ids or "
                "token_type_ids"
            )
        if key not in targets and graph.batch[key].shape != (BATCH, SEQ):
            raise NoTokensError(f"{graph.name} takes {key} of shape {_shape_text(graph, key)}, not one id per token")
    _check_targets(graph, targets)
    reach = reach_of_predictions(graph)
    sources = [key for key in tables if reach.get(key) and key not in targets]
    decoded = [key for key in (*tables, *targets) if reach.get(key) is False]
    shifts = any(shifted for _, shifted in targets.values())
    made: dict[str, str] = {}
    objective = DENOISING if sources and decoded else MASKED if sources and not shifts else NEXT
    for key in graph.batch:
        if key in _BY_NAME:
            made[key] = _BY_NAME[key]
        elif key in targets:
            made[key] = _target(objective, *targets[key])
        elif objective != NEXT and key in sources:
            made[key] = "shown"
        elif objective == DENOISING and not shifts:
            made[key] = "torch.nn.functional.pad(ids[:, :-1], (1, 0), value=START_ID)"
        else:
            made[key] = "ids"
    return TokenBatch(objective, made)


def _target(objective: str, ignored: int, shifted: bool) -> str:
    if objective == MASKED:
        return f"ids.masked_fill(~chosen, {ignored})"
    if objective == DENOISING or shifted:
        return "ids"
    return f"torch.nn.functional.pad(ids[:, 1:], (0, 1), value={ignored})"


def _check_targets(graph: ModelGraph, targets: dict[str, tuple[int, bool]]) -> None:
    """Raise NoTokensError for targets that are no token ids: labels of samples, or of few classes."""
    for nodes, _ in _graphs(graph):
        for node in nodes.of("op"):
            if node.op == "autopar.cross_entropy":
                classes, vocabulary = nodes.nodes[node.operands()[0]].meta.shape[-1], vocabulary_of(graph)
                if isinstance(classes, int) and classes < vocabulary:
                    raise NoTokensError(
                        f"{graph.name} tells {classes} classes apart, but has {vocabulary} token ids: its targets are "
                        "not tokens"
                    )
    for key in targets:
        if graph.batch[key].shape != (BATCH, SEQ):
            raise NoTokensError(f"{graph.name} has targets {key} of shape {_shape_text(graph, key)}, not one per token")


def _shape_text(graph: ModelGraph, key: str) -> str:
    return f"[{', '.join(map(str, graph.batch[key].shape))}]"


def vocabulary_of(graph: ModelGraph) -> int:
    """Rows of the table that token ids look up. Raises NoTokensError if the model has no such table."""
    tables = token_tables(graph)
    if not tables:
        raise NoTokensError(f"{graph.name}: no embedding reads a tensor of the batch")
    return min(tables.values())


def samples_text(graph: ModelGraph) -> dict[str, str]:
    """For each batch tensor, source text of what a sample of it is: (shape, dtype, values that whole numbers may have
    or 0), as `runtime.samples` takes it."""
    values = {**target_classes(graph), **lookups(graph)}
    return {
        key: f"({_tuple_text(meta.shape[1:])}, {_dtype_text(meta.dtype)}, {_limit(values.get(key))})"
        for key, meta in graph.batch.items()
    }


def _tuple_text(sizes: Sequence[int | Size]) -> str:
    texts = ["SEQ_LEN" if size == SEQ else str(size) for size in sizes]
    return f"({', '.join(texts)}{',' if len(texts) == 1 else ''})"


def _dtype_text(dtype: str) -> str:
    return "torch.float32" if dtype == COMPUTE else f"torch.{dtype}"


def _limit(values: int | Size | None) -> int:
    return values if isinstance(values, int) else 0


def token_tables(graph: ModelGraph) -> dict[str, int]:
    """Batch tensors of token ids that embeddings look up, and the rows of their tables."""
    return {key: rows for key, rows in lookups(graph).items() if key not in _BY_NAME}


def lookups(graph: ModelGraph) -> dict[str, int]:
    """All batch tensors that embeddings look up, and the rows of their tables."""
    found: dict[str, int] = {}
    for nodes, keys in _graphs(graph):
        for node in nodes.of("op"):
            if node.op == "aten.embedding" and (key := keys.get(node.operands()[1])) is not None:
                rows = int(nodes.nodes[node.operands()[0]].meta.at(1, 1)[0])
                found[key] = min(rows, found.get(key, rows))
    return found


def target_classes(graph: ModelGraph) -> dict[str, int | Size]:
    """Batch tensors that a cross-entropy takes as targets, and how many classes it tells apart."""
    found: dict[str, int | Size] = {}
    for nodes, keys in _graphs(graph):
        for node in nodes.of("op"):
            if node.op == "autopar.cross_entropy":
                *_, target = _way(node.operands()[1], nodes, keys)
                if target.name in keys:
                    found[keys[target.name]] = nodes.nodes[node.operands()[0]].meta.shape[-1]
    return found


def loss_targets(graph: ModelGraph) -> dict[str, tuple[int, bool]]:
    """Batch tensors that a cross-entropy takes as targets: the index it ignores, and whether they are shifted first.

    Not those of which the one past the last position is ignored: any position may be given for it.
    """
    found: dict[str, tuple[int, bool]] = {}
    for nodes, keys in _graphs(graph):
        for node in nodes.of("op"):
            if node.op != "autopar.cross_entropy" or not isinstance(node.args[2], int):
                continue
            *passed, target = _way(node.operands()[1], nodes, keys)
            if target.name in keys:
                shifted = any(each.op in ("aten.slice", "aten.pad", "aten.roll", "aten.cat") for each in passed)
                found[keys[target.name]] = (int(node.args[2]), shifted)
    return found


def looked_for(graph: ModelGraph) -> dict[str, set[int]]:
    """Batch tensors in which the model looks for certain ids (placeholders, padding), and these ids."""
    found: dict[str, set[int]] = {}
    for nodes, keys in _graphs(graph):
        for node in nodes.of("op"):
            if node.op in ("aten.eq", "aten.ne") and (key := keys.get(node.operands()[0])) is not None:
                found.setdefault(key, set()).update(arg for arg in node.args[1:] if type(arg) is int)
    return {key: ids for key, ids in found.items() if ids}


def _way(name: str, graph: OpGraph, keys: Mapping[str, str]) -> list[Node]:
    """From a value back to a batch tensor (of ``keys``) that it is made of, first operands first; itself if there is
    none."""
    came: dict[str, str] = {name: ""}
    pending = [name]
    while pending:
        here = pending.pop()
        if here in keys:
            way = [here]
            while came[way[-1]]:
                way.append(came[way[-1]])
            return [graph.nodes[each] for each in reversed(way)]
        for operand in reversed(graph.nodes[here].operands()):
            if operand not in came:
                came[operand] = here
                pending.append(operand)
    return [graph.nodes[name]]


def _graphs(graph: ModelGraph) -> list[tuple[OpGraph, dict[str, str]]]:
    """Each block's operators, and which of its inputs are which batch tensor."""
    return [
        (
            graph.kinds[block.kind].graph,
            {name: source.key for name, source in block.inputs.items() if source.origin == "batch"},
        )
        for block in graph.blocks
    ]
