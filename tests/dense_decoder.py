"""A whole Llama-like model as a `ModelGraph` written by hand, for solver tests that need no tracing."""

from __future__ import annotations

from rule_examples import Build, attention_block, tensor

from autopar.graph.ir import Block, BlockKind, ModelGraph, OpGraph, Source


def decoder(
    layers: int = 4,
    heads: int = 8,
    kv_heads: int = 4,
    head: int = 8,
    hidden: int = 64,
    ffn: int = 256,
    vocab: int = 512,
    tied: bool = False,
) -> ModelGraph:
    """``layers`` decoder layers between an embedding and a final norm, projection and loss."""
    layer = attention_block(heads, kv_heads, head, hidden, ffn)
    first, last = Build(), Build()
    ids = first.leaf("ids", "b s", dtype="int64", grad=False)
    table = first.leaf("table", f"{vocab} {hidden}", "parameter")
    prologue = first.graph(first.op("aten.embedding", table, ids, out=f"b s {hidden}", name="embed"))
    x = last.leaf("x", f"b s {hidden}")
    labels = last.leaf("labels", "b s", dtype="int64", grad=False)
    norm = last.leaf("norm", f"{hidden}", "parameter")
    head_weight = last.leaf("head", f"{vocab} {hidden}", "parameter")
    y = last.op("aten.rms_norm", x, (hidden,), norm, 1e-5, out=f"b s {hidden}", name="final_norm")
    y = last.op("aten.linear", y, head_weight, out=f"b s {vocab}", name="logits")
    epilogue = last.graph(last.op("autopar.cross_entropy", y, labels, -100, out="", dtype="float32", name="loss"))
    kinds = {"Prologue": prologue, "Layer": layer, "Epilogue": epilogue}
    constants = Build()
    for name in ("cos", "sin"):
        constants.leaf(name, f"1 1 s {head}", "buffer", grad=False)

    def names(kind: str, path: str) -> dict[str, str]:
        return {node.target: f"{path}{node.target}" for node in kinds[kind].of("parameter")}

    blocks = [Block("Prologue", "", {"ids": Source("batch", key="ids")}, names("Prologue", ""))]
    for index in range(layers):
        inputs = {
            "x": Source("block", index),
            "cos": Source("constant", key="cos"),
            "sin": Source("constant", key="sin"),
        }
        blocks.append(Block("Layer", f"layers.{index}", inputs, names("Layer", f"layers.{index}.")))
    inputs = {"x": Source("block", layers), "labels": Source("batch", key="labels")}
    blocks.append(Block("Epilogue", "", inputs, names("Epilogue", "")))
    parameters = {
        block.parameters[node.target]: node.meta for block in blocks for node in kinds[block.kind].of("parameter")
    }
    if tied:
        del parameters["head"]
    count = Build()
    labels = count.leaf("labels", "b s", dtype="int64", grad=False)
    counted = count.op("aten.ne", labels, -100, out="b s", dtype="bool", name="valid")
    counted = count.op("aten.sum", counted, out="", dtype="int64", name="count")
    return ModelGraph(
        name="decoder",
        kinds={name: BlockKind(name, graph) for name, graph in kinds.items()},
        blocks=tuple(blocks),
        constants=constants.graph(),
        count=OpGraph(count.nodes, (counted.name,)),
        batch={"ids": tensor("b s", "int64", False), "labels": tensor("b s", "int64", False)},
        parameters=parameters,
        buffers={},
        tied=(("table", "head"),) if tied else (),
    )


def llama3_8b(layers: int = 32) -> ModelGraph:
    """Llama-3 8B's shapes."""
    return decoder(layers, heads=32, kv_heads=8, head=128, hidden=4096, ffn=14336, vocab=128256)
