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
    """No inputs could be derived: says what the forward takes, and what the last try said."""


def example_of(model: nn.Module) -> Example:
    """Inputs of one sample for training ``model`` (on the CPU, with weights). Raises NoInputsError."""
    last = "nothing was tried"
    model = copy.deepcopy(model).eval()  # some write to their weights when they are evaluated
    for seq in LENGTHS:
        for inputs in _candidates(model, seq):
            if any(seq in value.shape for value in inputs.values() if value.is_floating_point()):
                continue  # a size of the image would be taken for the sequence's
            try:
                outputs = _run(model, inputs)
            except Exception as error:  # what a model says about a wrong shape is its own affair
                last = f"{type(error).__name__}: {(str(error).strip() or ' ').splitlines()[0]}"
                continue
            return _with_targets(model, inputs, outputs, seq)
    takes = ", ".join(_parameters(model))
    raise NoInputsError(f"cannot derive inputs for {type(model).__name__}.forward({takes}); the last try: {last}")


def _parameters(model: nn.Module) -> list[str]:
    return list(inspect.signature(model.forward).parameters)


@torch.no_grad()
def _run(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """The model on two copies of the sample."""
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in _parameters(model) else {}
    return model(**{key: torch.stack([value, value]) for key, value in inputs.items()}, **options)


def _candidates(model: nn.Module, seq: int) -> Iterator[dict[str, Tensor]]:
    """What the model may take, in order of likelihood."""
    names, config = _parameters(model), model.config
    streams: list[list[dict[str, Tensor]]] = []
    if "pixel_values" in names:
        streams.append([{"pixel_values": torch.randn(shape)} for shape in _image_shapes(config)])
    if "input_features" in names:
        streams.append([{"input_features": torch.randn(shape)} for shape in _feature_shapes(config)])
    if "input_values" in names:
        streams.append([{"input_values": torch.randn(shape)} for shape in _wave_shapes(config)])
    if "past_values" in names:
        streams.append([_series(model)])
    if "input_ids" in names:
        made: list[dict[str, Tensor]] = [{"input_ids": _tokens(config, seq)}]
        placeholder = _first(config, "image_token_id", "image_token_index")
        if streams and placeholder is not None:
            made = [
                {"input_ids": ids}
                for image in streams[0]
                if (ids := _with_images(model, image, made[0]["input_ids"], placeholder)) is not None
            ]
        streams.append(made)
    if not streams:
        raise NoInputsError(
            f"{type(model).__name__}.forward takes {', '.join(names)}: no token ids, images, sound or series that "
            "the zoo knows how to make"
        )
    decoder = {"decoder_input_ids": _tokens(config, seq)}
    for parts in itertools.product(*streams):
        inputs = {key: value for part in parts for key, value in part.items()}
        yield inputs
        if "decoder_input_ids" in names:
            if "labels" in names:  # the model shifts them into the decoder's inputs by itself
                yield inputs | {"labels": decoder["decoder_input_ids"]}
            yield inputs | decoder
    # Text alone, where images have a form of their own (lists of patches).
    if len(streams) > 1 and "input_ids" in names:
        yield {"input_ids": _tokens(config, seq)}


def _with_images(model: nn.Module, image: dict[str, Tensor], ids: Tensor, placeholder: int) -> Tensor | None:
    """Token ids with as many placeholders as the image has features."""
    features = getattr(model, "get_image_features", None) or getattr(
        getattr(model, "model", None), "get_image_features", None
    )
    if features is None:
        return None
    try:
        with torch.no_grad():
            found = features(**{key: value.unsqueeze(0) for key, value in image.items()})
    except Exception:  # another image shape may do
        return None
    found = getattr(found, "pooler_output", found)
    while isinstance(found, tuple | list):
        found = found[0]
    count = found.shape[-2]
    tail = ids[: max(len(ids) - count - 1, 8)]
    return torch.cat([ids[:1], torch.full((count,), placeholder), tail])


def _tokens(config: Any, seq: int) -> Tensor:
    """Ids that are none of the config's special tokens; the last is the end of the sequence, where there is one."""
    text = config.get_text_config()
    special = {value for key, value in _every(config, text) if "token" in key and isinstance(value, int)}
    vocabulary = _first(text, "vocab_size") or 2
    ids = [token for token in range(vocabulary) if token not in special] or [0]
    chosen = torch.tensor(ids)[torch.randint(len(ids), (seq,), generator=torch.Generator().manual_seed(0))]
    end = _first(text, "eos_token_id")
    if isinstance(end, int) and 0 <= end < vocabulary:
        chosen[-1] = end
    return chosen


def _every(*configs: Any) -> Iterator[tuple[str, Any]]:
    for config in configs:
        yield from vars(config).items()


def _first(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _part(config: Any, *names: str) -> Any:
    """A sub-config, or the config itself."""
    return _first(config, *names) or config


def _image_shapes(config: Any) -> list[tuple[int, ...]]:
    vision = _part(config, "vision_config", "backbone_config")
    channels = _first(vision, "num_channels", "in_channels", "in_chans") or 3
    size = _first(vision, "image_size", "img_size", "input_size")
    sides = [(size, size)] if isinstance(size, int) else [tuple(size)] if isinstance(size, list | tuple) else []
    sides += [(32, 32), (64, 64), (224, 224)]
    frames = _first(vision, "num_frames")
    shapes = [(channels, *side) for side in sides]
    return [(frames, *shape) for shape in shapes] + shapes if frames else shapes


def _feature_shapes(config: Any) -> list[tuple[int, ...]]:
    audio = _part(config, "audio_config", "encoder_config")
    bins = _first(audio, "num_mel_bins", "input_feat_per_channel", "feature_size", "input_dim") or 80
    frames = _first(audio, "max_source_positions")
    side = _first(audio, "spec_size")
    pictures = [(1, side * (side // bins), bins)] if isinstance(side, int) and side >= bins else []
    lengths = [*([2 * frames, frames] if isinstance(frames, int) and frames <= 3000 else []), 64, 128]
    return [*pictures, *(shape for length in lengths for shape in ((bins, length), (length, bins)))]


def _wave_shapes(config: Any) -> list[tuple[int, ...]]:
    audio = _part(config, "audio_config", "encoder")
    bins = _first(audio, "num_mel_bins")
    frames = _first(audio, "max_length")
    strides = _first(audio, "conv_stride") or [5, 2, 2, 2, 2, 2, 2]
    hop = 1
    for stride in strides:
        hop *= stride
    shapes: list[tuple[int, ...]] = [(frames, bins)] if bins and frames else []
    return [*shapes, (hop * 26,), (hop * 64,), (4096,), (16000,)]


def _series(model: nn.Module) -> dict[str, Tensor]:
    """A time series: its past (with the lags that the model looks back to), and what is to be foretold."""
    config = model.config
    length, ahead = config.context_length, getattr(config, "prediction_length", 1)
    length += max(getattr(config, "lags_sequence", None) or [0])
    channels = _first(config, "num_input_channels", "input_size") or 1
    inner = (channels,) if channels > 1 or hasattr(config, "num_input_channels") else ()
    times = getattr(config, "num_time_features", 0)
    made = {
        "past_values": torch.randn(length, *inner),
        "past_time_features": torch.randn(length, times),
        "past_observed_mask": torch.ones(length, *inner),
        "future_values": torch.randn(ahead, *inner),
        "future_time_features": torch.randn(ahead, times),
        "static_categorical_features": torch.zeros(config.num_static_categorical_features, dtype=torch.int64)
        if getattr(config, "num_static_categorical_features", 0)
        else torch.zeros(0),
        "static_real_features": torch.randn(getattr(config, "num_static_real_features", 0)),
    }
    taken = inspect.signature(model.forward).parameters
    wanted = {name for name, parameter in taken.items() if parameter.default is inspect.Parameter.empty}
    return {
        name: value
        for name, value in made.items()
        if name in taken and value.numel() and (name in wanted or name.startswith(("past", "future")))
    }


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
    own = _own_targets(model, inputs, outputs)
    if own is not None:
        return Example(inputs | own, None, seq)
    if "return_loss" in names:
        return Example(inputs, None, seq)
    return Example(inputs, _mean_square, seq)


def _looks_ahead(model: nn.Module, inputs: dict[str, Tensor]) -> bool:
    """Whether what is computed at the first position depends on the last token: then padding must be masked."""
    changed = inputs["input_ids"].clone()
    changed[-2] = changed[0] if changed[-2] != changed[0] else changed[1]
    try:
        one, other = (_leading(_run(model, inputs | {"input_ids": ids})) for ids in (inputs["input_ids"], changed))
    except Exception:  # then it is treated as causal
        return False
    return one.ndim < 3 or not torch.allclose(one[:, 0], other[:, 0], rtol=1e-4, atol=1e-5)


def _leading(outputs: Any) -> Tensor:
    """The first floating-point tensor of what a model returns."""
    items = outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, tuple) else (outputs,)
    return next(item for item in items if isinstance(item, Tensor) and item.is_floating_point())


def _own_targets(model: nn.Module, inputs: dict[str, Tensor], outputs: Any) -> dict[str, Tensor] | None:
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
        within = inputs["input_ids"] if shape[1] >= model.config.get_text_config().vocab_size else None
        tried.append(within.clone() if within is not None else torch.randint(shape[1], (shape[0],)))
    if "decoder_input_ids" in names:
        decoder = inputs.get("decoder_input_ids", inputs.get("input_ids"))
        tried.append(decoder.clone() if decoder is not None else _tokens(model.config, 16))
    if len(shape) >= 1:
        tried += [torch.tensor(1), torch.randint(shape[0], shape[1:]), torch.randint(2, shape[:-1])]
    tried += [torch.tensor(1.0), torch.rand(shape or (1,))]
    placeholder = _first(model.config, "image_token_id", "image_token_index")
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


def _mean_square(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """A loss for a model that has none: what it computes, squared. Any gradient will do for the proof."""
    return _leading(outputs).float().square().mean()
