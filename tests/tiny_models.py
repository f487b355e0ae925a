"""Models of a few matmuls as `ModelGraph`s written by hand, for tests that search thousands of times."""

from __future__ import annotations

from collections.abc import Sequence

from rule_examples import Build, tensor

from autopar.graph.ir import Block, BlockKind, ModelGraph, OpGraph, Source


def chain(
    widths: Sequence[int] = (32, 32),
    hidden: int = 16,
    vocab: int = 64,
    tied: bool = False,
    frozen: bool = False,
    name: str = "chain",
) -> ModelGraph:
    """An embedding, one layer per width (up, silu, down, residual; equal widths are one kind), projection and loss.

    ``tied``: embedding and projection share their weight. ``frozen``: embedding and first layer do not train."""
    full = f"b s {hidden}"
    first, last = Build(), Build()
    ids = first.leaf("ids", "b s", dtype="int64", grad=False)
    table = first.leaf("table", f"{vocab} {hidden}", "parameter", grad=not frozen)
    graphs = {"Prologue": first.graph(first.op("aten.embedding", table, ids, out=full, name="embed"))}
    kinds = []
    for place, width in enumerate(widths):
        still, moved = frozen and place == 0, not frozen or place > 1
        kind = f"Layer{width}" + ("Frozen" if still else "" if moved else "First")
        kinds.append(kind)
        if kind not in graphs:
            g = Build()
            x = g.leaf("x", full, grad=moved)
            up = g.leaf("up", f"{width} {hidden}", "parameter", grad=not still)
            down = g.leaf("down", f"{hidden} {width}", "parameter", grad=not still)
            h = g.op("aten.silu", g.op("aten.linear", x, up, out=f"b s {width}", name="rise"), out=f"b s {width}")
            y = g.op("aten.linear", h, down, out=full, name="fall")
            graphs[kind] = g.graph(g.op("aten.add", x, y, out=full, name="residual"))
    x = last.leaf("x", full, grad=not frozen or len(widths) > 1)
    labels = last.leaf("labels", "b s", dtype="int64", grad=False)
    head = last.leaf("head", f"{vocab} {hidden}", "parameter", grad=not (frozen and tied))
    y = last.op("aten.linear", x, head, out=f"b s {vocab}", name="logits")
    graphs["Epilogue"] = last.graph(
        last.op("autopar.cross_entropy", y, labels, -100, out="", dtype="float32", name="loss")
    )

    return assembled(name, graphs, kinds, tied)


def thin(layers: int, hidden: int, vocab: int) -> ModelGraph:
    """The least that is a model: an embedding, ``layers`` projections, one more and the loss. Every tensor is read
    once."""
    full = f"b s {hidden}"
    first, layer, last = Build(), Build(), Build()
    ids = first.leaf("ids", "b s", dtype="int64", grad=False)
    table = first.leaf("table", f"{vocab} {hidden}", "parameter")
    graphs = {"Prologue": first.graph(first.op("aten.embedding", table, ids, out=full, name="embed"))}
    if layers:
        x, weight = layer.leaf("x", full), layer.leaf("weight", f"{hidden} {hidden}", "parameter")
        graphs["Layer"] = layer.graph(layer.op("aten.linear", x, weight, out=full, name="mix"))
    x = last.leaf("x", full)
    labels = last.leaf("labels", "b s", dtype="int64", grad=False)
    head = last.leaf("head", f"{vocab} {hidden}", "parameter")
    y = last.op("aten.linear", x, head, out=f"b s {vocab}", name="logits")
    loss = last.op("autopar.cross_entropy", y, labels, -100, out="", dtype="float32", name="loss")
    graphs["Epilogue"] = last.graph(loss)
    return assembled("thin", graphs, ["Layer"] * layers)


def assembled(name: str, graphs: dict[str, OpGraph], layers: Sequence[str], tied: bool = False) -> ModelGraph:
    """A model of a prologue, ``layers`` by their kinds, and an epilogue."""

    def names(kind: str, path: str) -> dict[str, str]:
        return {node.target: f"{path}{node.target}" for node in graphs[kind].of("parameter")}

    blocks = [Block("Prologue", "", {"ids": Source("batch", key="ids")}, names("Prologue", ""))]
    for place, kind in enumerate(layers):
        path = f"layers.{place}"
        blocks.append(Block(kind, path, {"x": Source("block", place)}, names(kind, f"{path}.")))
    ends = {"x": Source("block", len(layers)), "labels": Source("batch", key="labels")}
    blocks.append(Block("Epilogue", "", ends, names("Epilogue", "")))
    parameters = {
        block.parameters[node.target]: node.meta for block in blocks for node in graphs[block.kind].of("parameter")
    }
    if tied:
        del parameters["head"]
    count = Build()
    labels = count.leaf("labels", "b s", dtype="int64", grad=False)
    valid = count.op("aten.ne", labels, -100, out="b s", dtype="bool", name="valid")
    total = count.op("aten.sum", valid, out="", dtype="int64", name="count")
    return ModelGraph(
        name=name,
        kinds={kind: BlockKind(kind, graph) for kind, graph in graphs.items()},
        blocks=tuple(blocks),
        constants=Build().graph(),
        count=OpGraph(count.nodes, (total.name,)),
        batch={"ids": tensor("b s", "int64", False), "labels": tensor("b s", "int64", False)},
        parameters=parameters,
        buffers={},
        tied=(("table", "head"),) if tied else (),
    )
