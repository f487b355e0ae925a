"""A batch of random numbers for a model's proof: what it takes, and what it can be trained on."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from autopar.codegen.tokens import looked_for, lookups, loss_targets, target_classes
from autopar.graph.ir import ModelGraph
from autopar.graph.size import Size, size_at


def random_batch(
    graph: ModelGraph, inputs: Mapping[str, Any] | None, samples: int, seq: int, dtype: torch.dtype, seed: int
) -> dict[str, Tensor]:
    """A batch of the shapes the graph takes. Token ids are drawn from the vocabulary, a tenth of the targets
    is ignored; other tensors given as ``inputs`` are drawn from the values they hold. Ids that the model looks for
    (placeholders of images) stay where ``inputs`` have them, and are nowhere else."""
    tables, targets, sought = lookups(graph), loss_targets(graph), looked_for(graph)
    vocabulary, classes = min(tables.values(), default=2), target_classes(graph)
    generator = torch.Generator().manual_seed(seed)
    batch = {}
    for key, meta in graph.batch.items():
        shape = meta.at(samples, seq)
        example = inputs.get(key) if inputs else None
        if example is not None and not example.is_meta and key not in tables and key not in targets:
            picked = _drawn_from(example, shape, generator)
            batch[key] = picked.to(dtype) if example.is_floating_point() else picked
        elif meta.dtype in ("int64", "int32"):
            most = tables.get(key, size_at(classes.get(key, vocabulary), samples, seq))
            batch[key] = torch.randint(0, most, shape, generator=generator)
            if example is not None and not example.is_meta and (special := sought.get(key)):
                _place(special, batch[key], example)
            if key in targets:
                batch[key][torch.rand(shape, generator=generator) < 0.1] = targets[key][0]
        elif meta.dtype == "bool":
            batch[key] = torch.ones(shape, dtype=torch.bool)
        else:
            batch[key] = torch.randn(shape, generator=generator, dtype=dtype)
    for key, count in classes.items():
        if batch[key].ndim == 1 and isinstance(count, Size):
            _unmask(batch[key], batch, size_at(count, samples, seq))
    return batch


def _unmask(answers: Tensor, batch: Mapping[str, Tensor], length: int) -> None:
    """Move ``answers`` [samples], each a position of ``length``, off those that a mask in ``batch`` hides, to the first
    that it shows: where it hides, a model's scores are so low that the loss is infinite."""
    for mask in batch.values():
        if mask.shape == (len(answers), length) and not mask.is_floating_point() and 0 <= mask.min() <= mask.max() <= 1:
            hidden = mask.gather(1, answers[:, None])[:, 0] == 0
            answers[hidden] = mask.int().argmax(1)[hidden]


def _drawn_from(example: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """[samples, ...] of what ``example`` of one sample holds: a mask as it is, since how many it marks may matter; of
    integers whole rows (the corners of a box belong together); else single values. Of a mask that marks some positions
    the first stays as it is, since a causal sequence needs something to attend to, and some stay marked, since models
    may run other code where none are."""
    if example.dtype == torch.bool and example.shape == shape[1:]:
        return example.expand(shape).clone()
    if not example.is_floating_point() and example.ndim > 1 and example.shape[1:] == shape[2:]:
        return example[torch.randint(0, len(example), shape[:2], generator=generator)]
    values = example.flatten()
    picked = values[torch.randint(0, values.numel(), shape, generator=generator)]
    if example.ndim == 1 and len(kinds := torch.unique(values)) == 2:
        picked[:, 0] = values[0]
        picked[0, -1] = kinds[kinds != values[0]]
    return picked


def _place(special: set[int], ids: Tensor, example: Tensor) -> None:
    """Take ``special`` ids out of ``ids``, and put those of the ``example`` of one sample where it has them."""
    if not example.ndim:
        return
    marked, usual = torch.tensor(sorted(special)), next(id_ for id_ in itertools.count() if id_ not in special)
    ids.masked_fill_(torch.isin(ids, marked), usual)
    shown = example[: ids.shape[1]]
    here = torch.isin(shown, marked)
    ids[:, : len(shown)][:, here] = shown[here]
