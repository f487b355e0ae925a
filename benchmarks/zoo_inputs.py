"""Example inputs of a transformers model, told from its config, its forward's signature and what it returns.

No list of architectures: what the forward takes says what kind of data it reads; sizes come from the config; candidate
shapes are tried by running the (small) model; and what it returns says which targets and which loss it has.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import zoo_tensors
from torch import Tensor, nn

LENGTHS = (32, 24, 16, 12, 8)
"""Sequence lengths tried, longest first: a window of the model should be shorter, a table of positions longer."""

MASKED_TAIL = 3


@dataclass(frozen=True, slots=True)
class Example:
    """``inputs``: example tensors of one sample; ``loss``: None where the model has its own; ``seq``: the length."""

    inputs: dict[str, Tensor]
    loss: Callable[..., Tensor] | None
    seq: int


class NoInputsError(Exception):
    """No inputs could be derived: says what the forward takes, and what the fullest try said."""


def example_of(model: nn.Module) -> Example:
    """Inputs of one sample for training ``model`` (on the CPU, with weights). Raises NoInputsError."""
    return next(examples_of(model))


def examples_of(model: nn.Module) -> Iterator[Example]:
    """The same, and then with fewer inputs: text without images or sound. Raises NoInputsError where there is none."""
    told, most = "nothing was tried", -1
    model = copy.deepcopy(model).eval()  # some write to their weights when they are evaluated
    given: list[set[str]] = []
    for alone in (False, True):
        tried = ((seq, inputs) for seq in LENGTHS for inputs in _candidates(model, seq, alone))
        for seq, inputs in tried:
            sizes = (
                value.shape[key in zoo_tensors.BY_POSITION :]
                for key, value in inputs.items()
                if value.is_floating_point()
            )
            if any(seq in shape for shape in sizes):
                continue  # a size of the image would be taken for the sequence's
            if any(set(inputs) >= names for names in given):
                continue
            try:
                example = _with_targets(model, inputs, _run(model, inputs), seq)
            except Exception as error:  # what a model says about a wrong shape is its own affair
                if len(inputs) > most:
                    told, most = f"{type(error).__name__}: {(str(error).strip() or ' ').splitlines()[0]}", len(inputs)
                continue
            given.append(set(inputs))
            yield example
    if not given:
        takes = ", ".join(_parameters(model))
        raise NoInputsError(
            f"cannot derive inputs for {type(model).__name__}.forward({takes}); the fullest try: {told}"
        )


def _parameters(model: nn.Module) -> list[str]:
    return list(inspect.signature(model.forward).parameters)


@torch.no_grad()
def _run(model: nn.Module, inputs: Mapping[str, Tensor], copies: int = 2) -> Any:
    """The model on copies of the sample."""
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in _parameters(model) else {}
    return model(**{key: torch.stack([value] * copies) for key, value in inputs.items()}, **options)


def _candidates(model: nn.Module, seq: int, alone: bool) -> Iterator[dict[str, Tensor]]:
    """What the model may take, in order of likelihood; ``alone``: text without the images or sound that go with it."""
    names, config = _parameters(model), model.config
    text = "input_ids" in names
    streams: list[list[dict[str, Tensor]]] = []
    if pixels := next((name for name in ("pixel_values", "pixel_values_videos") if name in names), None):
        streams.append([{pixels: image} for image in zoo_tensors.images(config, many=text)])
    if "input_features" in names:
        streams.append([{"input_features": spectrogram} for spectrogram in zoo_tensors.features(config)])
    if "input_values" in names:
        streams.append([{"input_values": wave} for wave in zoo_tensors.waves(config)])
    if "past_values" in names:
        streams.append([zoo_tensors.series(model)])
    ids = {"input_ids": zoo_tensors.tokens(config, seq)} if text else {}
    beside = zoo_tensors.beside(config, names, seq)
    if not (streams or text or beside):
        raise NoInputsError(
            f"{type(model).__name__}.forward takes {', '.join(names)}: no token ids, images, sound or series that "
            "the zoo knows how to make"
        )
    if alone:
        if streams and text:  # where images have a form of their own (patches of several images in a row)
            yield from _with_others(names, config, ids, {}, seq)
        return
    for parts in itertools.product(*streams):
        inputs = {key: value for part in parts for key, value in part.items()}
        if text:
            found = zoo_tensors.with_placeholders(model, inputs, ids["input_ids"]) if streams else ids["input_ids"]
            if found is None:
                continue
            inputs = {**inputs, "input_ids": found}
        yield from _with_others(names, config, inputs, beside, seq)
    if text and (books := zoo_tensors.codes(config, seq)) is not None:
        yield {"input_ids": books}
        if "labels" in names:  # shifted into the decoder's inputs, of which a sample has several rows
            yield {**(ids if "decoder_input_ids" in names else {}), "labels": books}


def _with_others(
    names: list[str], config: Any, inputs: dict[str, Tensor], beside: dict[str, Tensor], seq: int
) -> Iterator[dict[str, Tensor]]:
    """``inputs`` with what a decoder reads, and with what else the model may read."""
    decoder: list[dict[str, Tensor]] = [{}]
    if "decoder_input_ids" in names:
        ids = zoo_tensors.tokens(config, seq)
        # Where there are labels, the model shifts them into the decoder's inputs by itself.
        decoder += [*([{"labels": ids}] if "labels" in names else []), {"decoder_input_ids": ids}]
    for more in [beside, {}] if beside else [{}]:
        for part in decoder:
            yield {**inputs, **part, **more}


# Targets and losses, told from what the model returns.


def _with_targets(model: nn.Module, inputs: dict[str, Tensor], outputs: Any, seq: int) -> Example:
    names = _parameters(model)
    if "input_ids" in inputs and "attention_mask" in names and _looks_ahead(model, inputs):
        mask = torch.ones(len(inputs["input_ids"]), dtype=torch.int64)
        mask[-MASKED_TAIL:] = 0
        if _runs(model, inputs | {"attention_mask": mask}):
            inputs = inputs | {"attention_mask": mask}
    if _has_loss(model, inputs):
        return Example(inputs, None, seq)
    own = _own_targets(model, inputs, outputs, seq)
    if own is not None:
        return Example(inputs | own, None, seq)
    if "return_loss" in names:
        return Example(inputs, None, seq)
    return Example(inputs, squared(model, inputs, outputs), seq)


def _looks_ahead(model: nn.Module, inputs: dict[str, Tensor]) -> bool:
    """Whether what is computed at the first position depends on the last token: then padding must be masked."""
    changed = inputs["input_ids"].clone()
    changed[-2] = changed[0] if changed[-2] != changed[0] else changed[1]
    try:
        one, other = (_leading(_run(model, inputs | {"input_ids": ids})) for ids in (inputs["input_ids"], changed))
    except Exception:  # then it is treated as causal
        return False
    return one.ndim < 3 or not torch.allclose(one[:, 0], other[:, 0], rtol=1e-4, atol=1e-5)


def _floating(outputs: Any) -> list[Tensor]:
    """The floating-point tensors in what a model returns."""
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    items = outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, tuple | list) else ()
    return [found for item in items for found in _floating(item)]


def _leading(outputs: Any) -> Tensor:
    return _floating(outputs)[0]


def _own_targets(model: nn.Module, inputs: dict[str, Tensor], outputs: Any, seq: int) -> dict[str, Tensor] | None:
    """Targets with which the model returns a scalar loss of its own, or None."""
    names = _parameters(model)
    if {"start_positions", "end_positions"} <= set(names):
        ends = {"start_positions": torch.tensor(1), "end_positions": torch.tensor(2)}
        return ends if _has_loss(model, inputs | ends) else None
    if "labels" not in names:
        return None
    logits = getattr(outputs, "logits", None)
    shape = logits.shape[1:] if isinstance(logits, Tensor) else ()
    tried: list[Tensor] = []
    if len(shape) == 2 and "input_ids" in inputs and len(inputs["input_ids"]) == shape[0]:
        within = inputs["input_ids"] if shape[1] >= zoo_tensors.text_config(model.config).vocab_size else None
        tried.append(within.clone() if within is not None else torch.randint(shape[1], (shape[0],)))
    if len(shape) == 2 and "input_ids" not in inputs and shape[1] > 2:  # of a CTC loss: fewer than there are frames
        tried.append(torch.full((seq,), -100))
        tried[-1][:4] = torch.tensor([1, 2, 1, 2])
    if "decoder_input_ids" in names:
        decoder = inputs.get("decoder_input_ids", inputs.get("input_ids"))
        tried.append(decoder.clone() if decoder is not None else zoo_tensors.tokens(model.config, 16))
    if len(shape) >= 1:
        tried += [torch.tensor(1), torch.randint(shape[0], shape[1:]), torch.randint(2, shape[:-1])]
    tried += [torch.tensor(1.0), torch.rand(shape or (1,))]
    placeholder = zoo_tensors.first(model.config, *zoo_tensors.PLACEHOLDERS)
    for labels in tried:
        if placeholder is not None and labels.ndim:
            labels = labels.masked_fill(labels == placeholder, -100)
        if _has_loss(model, inputs | {"labels": labels}):
            return {"labels": labels}
    return None


def _has_loss(model: nn.Module, inputs: dict[str, Tensor]) -> bool:
    try:
        loss = getattr(_run(model, inputs), "loss", None)
    except Exception:  # these were not the targets it wants
        return False
    return isinstance(loss, Tensor) and loss.ndim == 0 and bool(torch.isfinite(loss))


def _runs(model: nn.Module, inputs: dict[str, Tensor]) -> bool:
    try:
        _run(model, inputs)
    except Exception:
        return False
    return True


def _by_sample(two: Tensor, three: Tensor) -> bool:
    """Whether what comes of two samples and of three has rows for each of them, which are alike."""
    return two.ndim > 0 and len(two) * 3 == len(three) * 2 and two.shape[1:] == three.shape[1:]


def squared(model: nn.Module, inputs: Mapping[str, Tensor], outputs: Any) -> Callable[..., Tensor]:
    """A loss for a model that has none: how far the first thing it computes for each sample apart (of two that are
    compared with each other there are as many as their product) is from a half, squared. Any gradient will do for the
    proof, but none is left of vectors of length one by their squares; and one number for each sample is a loss already,
    which may be of the whole batch."""
    alone = _floating(_run(model, inputs, copies=3))
    pairs = zip(_floating(outputs), alone, strict=True)
    apart = [(two.ndim == 1, place) for place, (two, three) in enumerate(pairs) if _by_sample(two, three)]
    place = min(apart, default=(False, 0))[1]

    def mean_square(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        return (_floating(outputs)[place].float() - 0.5).square().mean()

    return mean_square
