"""`trace`: a PyTorch model to a `ModelGraph`."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake

from autopar.errors import AutoparError, BadInputError, UnsupportedError
from autopar.garbage import uncollected
from autopar.graph import (
    arguments,
    broadcasting,
    complex_numbers,
    flattening,
    joining,
    joint_indices,
    losses,
    masks,
    raising,
    random_numbers,
    sinks,
)
from autopar.graph.bands import unfold_buffers
from autopar.graph.blocks import Blocks, cut
from autopar.graph.buffers import LARGEST_FILED, known_values
from autopar.graph.export import BatchSpec, Dtypes, Exported, Loss, export, takes_whole
from autopar.graph.fold import CannotFoldError, Fold, plan_fold
from autopar.graph.importing import Importer, promoting_buffers
from autopar.graph.interpret import leaves
from autopar.graph.ir import COMPUTE, ModelGraph, OpGraph, TensorMeta
from autopar.graph.limits import longest_sequence
from autopar.graph.own_state import notes_of_state
from autopar.graph.per_sample import share_samples
from autopar.graph.simplify import simplify
from autopar.graph.sizes import FixedSequenceError, Sizes
from autopar.graph.structure import repeats

SAMPLES = 4
POSITIONS = 24
"""Sizes of the example batch; they leave no mark, since both are symbolic."""


def trace(
    model: nn.Module,
    inputs: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    name: str | None = None,
    fold: bool = True,
) -> ModelGraph:
    """Trace ``model`` with its loss.

    ``inputs``: example tensors of one sample (no batch dim) by name of the argument of ``model.forward`` (or for the
    loss alone); by default token ids ``input_ids`` and ``labels``, both int64 [s]. Dims as long as the sample's
    sequence (dim 0 of its first integer tensor) are symbolic. ``loss``: fn(outputs, batch) → scalar; by default the
    model's own. The model may be on meta or hold weights; it is not modified. ``fold=False`` traces every layer, also
    those proved equal to another (`autopar.graph.fold`); the result is the same, later.

    Raises BadInputError for inputs or a loss that cannot be used, UnsupportedError for a model that cannot be traced.
    """
    spec = batch_spec(model, inputs, loss)
    parameters, aliases = _canonical_names(model, model.named_parameters(remove_duplicate=False))
    _, buffer_aliases = _canonical_names(model, model.named_buffers(remove_duplicate=False))
    names = _Names(
        {f"model.{alias}": full for alias, full in {**aliases, **buffer_aliases}.items()},
        lambda full: parameters[full].requires_grad,
    )
    layers = repeats(model)
    notes: tuple[str, ...] = ()
    dtypes = Dtypes()
    try:
        traced = _folded(model, spec, loss, names, layers, fold, False, dtypes)
    except FixedSequenceError as error:
        if inputs is None:
            raise UnsupportedError(f"{error}; pass `inputs` of the sequence length to train with, to fix it") from None
        try:
            if error.of_all_lengths:
                raise
            traced = _folded(model, _shorter(spec), loss, names, layers, fold, False, dtypes)
            _check_length(spec, traced)
        except AutoparError:
            traced = _folded(model, spec, loss, names, layers, fold, True, dtypes)
            notes = (f"the sequence length is fixed to that of the example inputs: {error}",)
    used: dict[str, dict[str, TensorMeta]] = {"parameter": {}, "buffer": {}}
    for block in traced.blocks.blocks:
        for node in leaves(traced.blocks.kinds[block.kind].graph):
            if node.kind != "input":
                used[node.kind][block.parameters[node.target]] = node.meta
    used["buffer"].update({node.target: node.meta for node in traced.blocks.constants.of("buffer")})
    notes = (*notes, *traced.notes)
    if unused := [full for full in parameters if full not in used["parameter"]]:
        notes = (*notes, f"{len(unused)} parameters take no part in the loss and are left out: {', '.join(unused[:3])}")
    missing = used["buffer"].keys() - traced.values.keys()
    values = {**traced.values, **known_values(model, missing, LARGEST_FILED)}
    limits = {*traced.limits, *(limit for limit in (longest_sequence(traced.blocks, values),) if limit is not None)}
    return ModelGraph(
        name=name or type(model).__name__,
        kinds=traced.blocks.kinds,
        blocks=traced.blocks.blocks,
        constants=traced.blocks.constants,
        count=traced.count,
        batch=traced.batch,
        parameters={full: used["parameter"][full] for full in parameters if full in used["parameter"]},
        buffers=used["buffer"],
        tied=_tied(aliases, traced.blocks),
        buffer_values={full: tuple(values[full].flatten().tolist()) for full in used["buffer"] if full in values},
        max_seq=min(limits, default=None),
        min_seq=traced.shortest,
        nominal_seq=_nominal_seq(model),
        notes=notes,
    )


def _shorter(spec: BatchSpec) -> BatchSpec:
    """Sequences half as long: at the full length of a table or mask that the model cuts (``mask[:n, :n]``), the cut is
    none, and tracing takes the length for fixed."""
    shapes = {
        key: tuple(size // 2 if dim in spec.seq_dims[key] else size for dim, size in enumerate(shape))
        for key, shape in spec.shapes.items()
    }
    return replace(spec, shapes=shapes, length=spec.length and spec.length // 2)


def _check_length(spec: BatchSpec, traced: _Traced) -> None:
    """Raise FixedSequenceError if for sequences of ``spec`` the model runs other code than was traced."""
    lengths = {spec.shapes[key][dim] for key, dims in spec.seq_dims.items() for dim in dims}
    if any(length < traced.shortest or length > min(traced.limits, default=length) for length in lengths):
        raise FixedSequenceError("the model runs other code for shorter sequences")


def _folded(
    model: nn.Module,
    spec: BatchSpec,
    loss: Loss | None,
    names: _Names,
    layers: Mapping[str, str],
    fold: bool,
    static_seq: bool,
    dtypes: Dtypes,
) -> _Traced:
    """Trace with equal layers stood in for; if the proof fails, trace them all."""
    # Whatever the caller's default device: the traced copy is a fake on the CPU.
    with torch.device("cpu"), uncollected():
        if fold:
            before = replace(dtypes)
            try:
                return _traced(model, spec, loss, names, layers, plan_fold(model, layers), static_seq, dtypes)
            except CannotFoldError:
                dtypes = before
        return _traced(model, spec, loss, names, layers, None, static_seq, dtypes)


@dataclass(frozen=True, slots=True)
class _Traced:
    blocks: Blocks
    count: OpGraph
    batch: dict[str, TensorMeta]
    values: dict[str, torch.Tensor]
    limits: frozenset[int]
    shortest: int
    notes: tuple[str, ...]


def _traced(
    model: nn.Module,
    spec: BatchSpec,
    loss: Loss | None,
    names: _Names,
    layers: Mapping[str, str],
    fold: Fold | None,
    static_seq: bool,
    dtypes: Dtypes,
) -> _Traced:
    while True:
        exported = export(model, spec, loss, fold, static_seq, dtypes)
        sizes, metas = _sizes(exported, spec, static_seq)
        importer = Importer(sizes, names.canonical, names.trainable)
        draft = importer.program(exported.program, list(spec.shapes))
        shortest, longest = sizes.lengths(exported.program.range_constraints, exported.guards)
        # `model.to(bf16)` narrows buffers too. Those that the model widens by itself stay wide; the others may not
        # silently turn its activations into float32.
        promoting = promoting_buffers(draft) - dtypes.narrow
        if not (promoting or exported.mixed):
            break
        dtypes.narrow, dtypes.mixed = dtypes.narrow | promoting, dtypes.mixed or not promoting
    changed = notes_of_state(importer.changed, draft)
    draft = unfold_buffers(draft, model, importer.constants)
    buffers = [node.target for node in draft.nodes.values() if node.kind == "buffer"]
    values = {**known_values(model, (full for full in buffers if full not in importer.constants)), **importer.constants}
    limits: set[int] = {longest} if longest else set()
    recognised = masks.rules(values, _nominal_seq(model), limits)
    several = joint_indices.rules(values)
    passes = (arguments, broadcasting, joining, flattening, raising, sinks, complex_numbers, random_numbers)
    patterns = tuple(each.RULES for each in passes)
    draft = simplify(draft, *patterns, recognised, several)
    draft = share_samples(draft, values)
    draft = simplify(draft, *patterns, recognised, several)
    draft, count = losses.lower(draft)
    draft = simplify(draft, *patterns)
    random_numbers.refuse_others(draft)
    class_names = {path: type(model.get_submodule(path)).__name__ for path in layers}
    blocks, notes = cut(draft, layers, class_names, fold), (*exported.notes, *changed)
    return _Traced(blocks, count, metas, values, frozenset(limits), shortest, notes)


@dataclass(frozen=True, slots=True)
class _Names:
    """``canonical``: name in the traced wrapper → first full name of the same tensor in the model."""

    canonical: dict[str, str]
    trainable: Callable[[str], bool]


def batch_spec(model: nn.Module, inputs: Mapping[str, Any] | None, loss: Loss | None) -> BatchSpec:
    """The traced batch. Raises BadInputError when ``inputs`` do not fit the model's forward."""
    parameters = inspect.signature(model.forward).parameters
    takes_all = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    samples = dict(inputs) if inputs is not None else _default_inputs(model, list(parameters), loss)
    takes_all = takes_all or bool(takes_whole(model) and not samples.keys() & parameters.keys())
    for key, value in samples.items():
        if not isinstance(value, torch.Tensor):
            raise BadInputError(f"inputs[{key!r}] is a {type(value).__name__}; give example tensors of one sample")
        if not takes_all and key not in parameters and loss is None:
            raise BadInputError(
                f"{type(model).__name__}.forward takes {', '.join(parameters)}, not {key}; name the inputs as forward "
                "does, or pass loss=fn(outputs, batch) that uses it"
            )
    integer = [value for value in samples.values() if value.ndim and not value.is_floating_point()]
    length = integer[0].shape[0] if integer else None
    return BatchSpec(
        shapes={key: (SAMPLES, *value.shape) for key, value in samples.items()},
        dtypes={key: torch.bfloat16 if value.is_floating_point() else value.dtype for key, value in samples.items()},
        seq_dims={
            key: tuple(dim + 1 for dim, size in enumerate(value.shape) if size == length)
            for key, value in samples.items()
        },
        masks=frozenset(key for key, value in samples.items() if "mask" in key and _is_mask(value)),
        length=_nominal_seq(model) if inputs is None else length,
    )


def _is_mask(value: torch.Tensor) -> bool:
    """Whether it is known to hold zeros and ones alone."""
    known = not (value.is_floating_point() or value.is_meta or is_fake(value))
    return known and bool(((value == 0) | (value == 1)).all())


def _default_inputs(model: nn.Module, parameters: list[str], loss: Loss | None) -> dict[str, torch.Tensor]:
    tokens = torch.zeros(POSITIONS, dtype=torch.int64)
    if {"input_ids", "labels"} <= set(parameters):
        return {"input_ids": tokens, "labels": tokens}
    if loss is not None and parameters:
        return {"input_ids" if "input_ids" in parameters else parameters[0]: tokens, "labels": tokens}
    raise BadInputError(
        f"{type(model).__name__}.forward takes {', '.join(parameters) or 'nothing'}, not input_ids and labels: pass "
        "inputs={name: example tensor of one sample} and, if the model returns no loss, loss=fn(outputs, batch) (a "
        "module.py:function returns them with the model: model, inputs, loss)"
    )


_FREE_BATCH = (
    ". There is one program for micro-batches of every size: Python lists and loops of as many entries as there are "
    "samples, and ints made of their number, fix it; write what they do for the whole batch at once, or make it an "
    "operator of its own (torch.library.custom_op, autopar.register_rule)"
)


def _sizes(exported: Exported, spec: BatchSpec, static_seq: bool) -> tuple[Sizes, dict[str, TensorMeta]]:
    """The reader of symbolic sizes, and the metas of the batch tensors.

    Raises UnsupportedError when the batch dim is not free, FixedSequenceError when only a sequence dim is not.
    """
    user = set(exported.program.graph_signature.user_inputs)
    places = [node for node in exported.program.graph.nodes if node.op == "placeholder" and node.name in user]
    values = {key: node.meta["val"] for key, node in zip(spec.shapes, places, strict=True)}
    roles: dict[Any, str] = {}
    for what in ("batch", "sequence"):
        for key, value in values.items():
            dims = (0,) if what == "batch" else () if static_seq else spec.seq_dims[key]
            for dim in dims:
                size = value.shape[dim]
                symbol = sympy.Integer(size) if isinstance(size, int) else size.node.expr
                if not symbol.is_Symbol or roles.get(symbol, what[0]) != what[0]:
                    place = exported.fixed_in.get(int(symbol), "the model") if symbol.is_Integer else "the model"
                    message = f"{place} works for one {what} size only: it fixes dim {dim} of {key} to {size}"
                    if what == "batch":
                        message += _FREE_BATCH
                    raise (UnsupportedError if what == "batch" else FixedSequenceError)(message)
                roles[symbol] = what[0]
    sizes = Sizes(roles, spec.length)
    metas = {
        key: TensorMeta(
            sizes.shape(value),
            COMPUTE if spec.dtypes[key].is_floating_point else str(spec.dtypes[key]).removeprefix("torch."),
        )
        for key, value in values.items()
    }
    return sizes, metas


def _canonical_names(model: nn.Module, tensors: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Distinct tensors by their first full name, and every full name → first name of the same tensor."""
    first: dict[int, str] = {}
    distinct: dict[str, torch.Tensor] = {}
    names: dict[str, str] = {}
    for full, tensor in tensors:
        names[full] = first.setdefault(id(tensor), full)
        distinct.setdefault(names[full], tensor)
    return distinct, names


def _tied(aliases: Mapping[str, str], blocks: Blocks) -> tuple[tuple[str, ...], ...]:
    """The names of each parameter that has several, or one but is read in several blocks: stages hold copies of it."""
    groups: dict[str, list[str]] = {}
    for alias, full in aliases.items():
        groups.setdefault(full, []).append(alias)
    readers = Counter(full for block in blocks.blocks for full in set(block.parameters.values()))
    return tuple(tuple(group) for full, group in groups.items() if len(group) > 1 or readers[full] > 1)


def _nominal_seq(model: nn.Module) -> int | None:
    """The longest sequence that the model's config speaks of: no limit by itself (rotary positions go on)."""
    config = getattr(model, "config", None)
    for attribute in ("max_position_embeddings", "n_positions", "block_size", "max_seq_len"):
        value = getattr(config, attribute, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None
