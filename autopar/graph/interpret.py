"""Runs operator graphs on real (or fake) tensors: the reference for tests, constants, and saved-tensor analysis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from autopar.graph.ir import COMPUTE, ModelGraph, Node, OpGraph, Ref, TensorMeta
from autopar.graph.ops import DTYPES, callable_of
from autopar.graph.size import BATCH, SEQ, Size, size_at


def run_graph(
    graph: OpGraph, values: Mapping[str, torch.Tensor], compute: torch.dtype, sizes: tuple[int, int] | None = None
) -> tuple[torch.Tensor, ...]:
    """Run ``graph`` on ``values`` (leaf node name to tensor) and return its outputs.

    ``compute`` is the dtype that "compute" stands for; under float64, "float32" tensors are float64 too.
    ``sizes`` is (batch, seq); by default it is read off the shapes of the values.
    Raises KeyError for a missing leaf or an operator without an implementation.
    """
    batch, seq = sizes or sizes_of([(node.meta, values[node.name]) for node in leaves(graph) if node.name in values])
    results: dict[str, torch.Tensor] = {}
    remaining = {name: len(users) for name, users in graph.users().items()}
    for output in graph.outputs:
        remaining[output] += 1
    for node in graph.nodes.values():
        if node.kind != "op":
            if node.name in values or remaining[node.name]:
                results[node.name] = values[node.name]
            continue
        args = resolve(node.args, results, batch, seq, compute)
        kwargs = resolve(node.kwargs, results, batch, seq, compute)
        if "dtype" in kwargs and isinstance(kwargs["dtype"], str):
            kwargs["dtype"] = torch_dtype(kwargs["dtype"], compute)
        if node.op == "autopar.cast":
            kwargs["compute"] = compute
        results[node.name] = callable_of(node.op)(*args, **kwargs)
        for operand in set(node.operands()):
            remaining[operand] -= 1
            if not remaining[operand]:
                del results[operand]
    return tuple(results[name] for name in graph.outputs)


def leaves(graph: OpGraph) -> list[Node]:
    """Inputs, parameters and buffers of a graph."""
    return [node for node in graph.nodes.values() if node.kind != "op"]


def sizes_of(pairs: Sequence[tuple[TensorMeta, torch.Tensor]]) -> tuple[int, int]:
    """(batch, seq) from the shapes of tensors of known meta; 1 for a size that none of them shows.

    Raises ValueError when two tensors disagree.
    """
    found: dict[Size, int] = {}
    for meta, tensor in pairs:
        if len(meta.shape) != tensor.ndim:
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} was given for one of shape {meta.shape}")
        for size, actual in zip(meta.shape, tensor.shape, strict=True):
            if isinstance(size, Size) and size in (BATCH, SEQ) and found.setdefault(size, actual) != actual:
                raise ValueError(f"inputs disagree on {size}: {found[size]} and {actual}")
    assert isinstance(BATCH, Size)
    return found.get(BATCH, 1), found.get(SEQ, 1)


def torch_dtype(name: str, compute: torch.dtype) -> torch.dtype:
    """The dtype that a graph's dtype name stands for when the job computes in ``compute``."""
    if name == COMPUTE:
        return compute
    if name == "float32" and compute == torch.float64:
        return torch.float64
    return DTYPES[name] if name in DTYPES else getattr(torch, name)


def resolve(value: Any, results: Mapping[str, torch.Tensor], batch: int, seq: int, compute: torch.dtype) -> Any:
    """An argument with references, sizes and containers made concrete."""
    if isinstance(value, Ref):
        return results[value.name]
    if isinstance(value, Size):
        return size_at(value, batch, seq)
    if isinstance(value, tuple | list):
        return [resolve(item, results, batch, seq, compute) for item in value]
    if isinstance(value, dict):
        return {key: resolve(item, results, batch, seq, compute) for key, item in value.items()}
    return value


def run_model(
    model: ModelGraph, state: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor], compute: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss sum and count of one batch on one device.

    ``state`` maps full names of parameters (already in ``compute``, or to be used as they are) and of buffers to
    tensors; buffers that are missing come from ``model.buffer_values``. Raises KeyError when one is nowhere. The count
    of a loss that is a plain sum is 1.
    """
    sizes = sizes_of([(model.batch[key], tensor) for key, tensor in batch.items() if key in model.batch])

    def leaf(target: str) -> torch.Tensor:
        if target in state:
            return state[target]
        meta = model.buffers[target]
        values = model.buffer_values[target]
        return torch.tensor(values, dtype=torch_dtype(meta.dtype, compute)).reshape(meta.at(*sizes))

    def run(graph: OpGraph, value_of: Callable[[Node], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return run_graph(graph, {node.name: value_of(node) for node in leaves(graph)}, compute, sizes)

    def outside(node: Node) -> torch.Tensor:
        return batch[node.target] if node.kind == "input" else leaf(node.target)

    constants = dict(zip(model.constants.outputs, run(model.constants, outside), strict=True))
    outputs: list[tuple[torch.Tensor, ...]] = []
    for block in model.blocks:
        values: dict[str, torch.Tensor] = {}
        graph = model.kinds[block.kind].graph
        for node in leaves(graph):
            if node.kind != "input":
                values[node.name] = leaf(block.parameters[node.target])
                continue
            source = block.inputs[node.name]
            if source.origin == "block":
                values[node.name] = outputs[source.block][source.index]
            else:
                values[node.name] = batch[source.key] if source.origin == "batch" else constants[source.key]
        outputs.append(run_graph(graph, values, compute, sizes))
    counts = run(model.count, outside)
    return outputs[-1][0], counts[0] if counts else torch.ones((), dtype=torch.int64)


def grouped_products(rows: torch.Tensor, weight: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
    """What `torch._grouped_mm` computes of ``rows`` [n, k] in groups that end at ``offs``, each times its
    own of ``weight`` [groups, k, m], in any dtype; rows behind the last group are zeros."""
    groups = torch.tensor_split(rows, offs.cpu().long())
    parts = [group @ matrix for group, matrix in zip(groups[:-1], weight, strict=True)]
    return torch.cat([*parts, rows.new_zeros(groups[-1].size(0), weight.size(2))])


class keep_wide(TorchFunctionMode):  # noqa: N801  (used as a function: `with keep_wide():`)
    """Makes requests for narrower floating-point dtypes give ``dtype``, float64 or float32, so that a model with
    `.float()` or `.bfloat16()` inside runs wholly in that.

    What is made without a dtype is of it too. Tensors that are narrower all the same (a function may keep its results
    of earlier calls) are widened where they are read.
    """

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self._dtype, self._narrower = dtype, _NARROWER[dtype]

    def __enter__(self) -> keep_wide:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        torch.set_default_dtype(self._default)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        asked = (*args[1:], kwargs.get("dtype")) if func in _CASTS else ()
        if _OWN_CASTS.get(func) in self._narrower or any(
            isinstance(one, torch.dtype) and one in self._narrower for one in asked
        ):
            places = [item for item in (*args[1:], kwargs.get("device")) if isinstance(item, torch.device | str)]
            # A copy, as of a narrower tensor: it may be changed in place.
            return args[0].to(*places[:1], dtype=self._dtype, copy=True)
        if kwargs.get("dtype") in self._narrower:
            kwargs["dtype"] = self._dtype
        filled = args[:1] if func is torch.tensor else args[1:2] or (kwargs.get("fill_value"),)
        if func in (torch.tensor, torch.full) and isinstance(filled[0], float):
            kwargs.setdefault("dtype", self._dtype)  # the least number of a dtype may be no number of another
        if func is torch._grouped_mm and args[0].dtype == torch.float64:  # it has no kernel for float64
            return grouped_products(*args, offs=kwargs["offs"])
        if not func.__name__.endswith("_"):  # neither attributes nor what changes a tensor in place
            args, kwargs = self._widened(args), self._widened(kwargs)
        return func(*args, **kwargs)

    def _widened(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(self._dtype) if value.dtype in self._narrower else value
        if type(value) in (tuple, list):
            return type(value)(self._widened(item) for item in value)
        if isinstance(value, dict):
            return {key: self._widened(item) for key, item in value.items()}
        return value


_CASTS = (torch.Tensor.to, torch.Tensor.type)
_OWN_CASTS: dict[Any, torch.dtype] = {
    torch.Tensor.float: torch.float32,
    torch.Tensor.bfloat16: torch.bfloat16,
    torch.Tensor.half: torch.float16,
}
_HALVES = frozenset({torch.bfloat16, torch.float16})
_NARROWER = {torch.float64: _HALVES | {torch.float32}, torch.float32: _HALVES}
