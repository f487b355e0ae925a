"""Tensors of one sample for the kinds of data that transformers models read, by the name of the argument.

Sizes come from the config of the model, or of the part of it that reads the data; where a config leaves several, all
are listed, the likeliest first.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

ITEMS = 5
"""Boxes, or other things that an image was cut into, where their number is free."""
FRAMES = 64
"""Of a spectrogram, where their number is free."""
BY_POSITION = ("states", "actions", "rewards", "returns_to_go")
"""Numbers for each position of the sequence."""
_BOOKS = ("num_codebooks", "num_quantizers")
PLACEHOLDERS = ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index")


def tokens(config: Any, seq: int) -> Tensor:
    """Ids that are none of the config's special tokens; the last is the end of the sequence, where there is one."""
    text = text_config(config)
    special = {value for key, value in _every(config, text) if "token" in key and isinstance(value, int)}
    vocabulary = first(text, "vocab_size") or 2
    ids = [token for token in range(vocabulary) if token not in special] or [0]
    chosen = torch.tensor(ids)[torch.randint(len(ids), (seq,), generator=torch.Generator().manual_seed(0))]
    end = first(text, "eos_token_id")
    if isinstance(end, int) and 0 <= end < vocabulary:
        chosen[-1] = end
    return chosen


def codes(config: Any, seq: int) -> Tensor | None:
    """Sound as codes [seq, codebooks], for a model (or its decoder) that has several codebooks; None for others."""
    reads = config if first(config, *_BOOKS) else _part(config, "decoder")
    books = first(reads, *_BOOKS)
    return tokens(reads, seq)[:, None].repeat(1, books) if isinstance(books, int) else None


def text_config(config: Any) -> Any:
    """The part of the config that speaks of text; where several do, of what is read."""
    try:
        return config.get_text_config()
    except ValueError:
        return config.get_text_config(encoder=True)


def _every(*configs: Any) -> Iterator[tuple[str, Any]]:
    for config in configs:
        yield from vars(config).items()


def first(config: Any, *names: str) -> Any:
    """The first of the config's attributes that is there and not None; None if there is none."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _part(config: Any, *names: str) -> Any:
    """A sub-config, or the config itself."""
    return first(config, *names) or config


def _pair(size: Any) -> tuple[int, ...] | None:
    return (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, list | tuple) else None


def images(config: Any, many: bool) -> list[Tensor]:
    """An image or a video; with ``many`` also a list of images, of tiles, and of patches, as models with text have."""
    vision = _part(config, "vision_config", "image_config", "backbone_config", "encoder")
    channels = first(vision, "num_channels", "in_channels", "in_chans") or 3
    size = _pair(first(vision, "image_size", "img_size", "input_size", "crop_size"))
    frames = first(vision, "num_frames", "frames_per_clip")
    shapes = [(channels, *side) for side in (*([size] if size else []), (32, 32), (64, 64), (224, 224))]
    shapes = [(frames, *shape) for shape in shapes] + shapes if frames else shapes
    if many and size:
        shapes += [(1, channels, *size), (1, 1, channels, *size)]
        patch = _pair(first(vision, "patch_size"))
        if patch:
            shapes.append((size[0] // patch[0] * (size[1] // patch[1]), channels * patch[0] * patch[1]))
    return [torch.randn(shape) for shape in shapes]


def features(config: Any) -> list[Tensor]:
    """Spectrograms: [bins, frames] or [frames, bins], or one as a picture."""
    audio = _part(config, "audio_config", "encoder_config")
    names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "feature_size", "input_dim")
    bins = first(audio, *names) or 80
    frames = first(audio, "max_source_positions")
    side = first(audio, "spec_size")
    pictures = [(1, side * (side // bins), bins)] if isinstance(side, int) and side >= bins else []
    lengths = [*([2 * frames, frames] if isinstance(frames, int) and frames <= 3000 else []), FRAMES, 128]
    shapes = [*pictures, *(shape for length in lengths for shape in ((bins, length), (length, bins)))]
    other = first(audio, "feature_projection_input_dim")
    if other and other != bins:  # bins of several frames side by side
        shapes += [(FRAMES, other)]
    return [torch.randn(shape) for shape in shapes]


def waves(config: Any) -> list[Tensor]:
    """Sound as it is, [samples] or [channels, samples], or as a spectrogram of fixed length."""
    audio = _part(config, "audio_config", "encoder")
    bins, frames = first(audio, "num_mel_bins"), first(audio, "max_length")
    hop = 1
    for stride in first(audio, "conv_stride", "upsampling_ratios", "downsampling_ratios") or [5, 2, 2, 2, 2, 2, 2]:
        hop *= stride
    shapes: list[tuple[int, ...]] = [(frames, bins)] if bins and frames else []
    shapes += [(hop * 26,), (hop * 64,), (4096,), (16000,)]
    channels = first(audio, "audio_channels") or 1
    return [torch.randn(shape) for shape in (*shapes, (channels, hop * 26), (channels, 4096))]


def series(model: nn.Module) -> dict[str, Tensor]:
    """A time series: its past (with the lags that the model looks back to), and what is to be foretold."""
    config: Any = model.config
    length, ahead = config.context_length, first(config, "prediction_length", "horizon_length") or 1
    length += max(getattr(config, "lags_sequence", None) or [0])
    channels = first(config, "num_input_channels", "input_size") or 1
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


def beside(config: Any, names: list[str], seq: int) -> dict[str, Tensor]:
    """What models read beside text, images and sound: the arguments in ``names`` that a size of the config fits."""
    generator = torch.Generator().manual_seed(1)

    def sized(attribute: str, *dims: int) -> Tensor | None:
        size = first(config, attribute)
        return torch.randn(*dims, size, generator=generator) if size else None

    def ids(attribute: str, *dims: int) -> Tensor | None:
        most = first(config, attribute)
        return torch.randint(most, dims, generator=generator) if most else None

    boxes = torch.arange(seq * 2).reshape(seq, 2) % 6
    queries = first(config, "latent_query_num") or 1
    depth = first(config, "max_depth") or 1
    made: dict[str, Tensor | None] = {
        "qformer_input_ids": tokens(config, ITEMS) if "qformer_input_ids" in names else None,
        "bbox": torch.cat([boxes, boxes + 3], 1),  # left, top, right, bottom of each token
        "xpath_tags_seq": ids("max_xpath_tag_unit_embeddings", seq, depth),
        "xpath_subs_seq": ids("max_xpath_subs_unit_embeddings", seq, depth),
        "visual_feats": sized("visual_feat_dim", ITEMS),
        "visual_pos": sized("visual_pos_dim", ITEMS),
        "visual_embeds": sized("visual_embedding_dim", ITEMS),
        "states": sized("state_dim", seq),
        "actions": sized("act_dim", seq),
        "rewards": torch.randn(seq, 1, generator=generator),
        "returns_to_go": torch.randn(seq, 1, generator=generator),
        "timesteps": ids("max_ep_len", seq),
        "flattened_patches": _patches(config),
        "noise_sequence": sized("model_in_channels", FRAMES),
        "decoder_input_values": sized("num_mel_bins", 12),
        "speaker_embeddings": sized("speaker_embedding_dim"),
        "image_embeds_position_mask": torch.arange(seq) % seq < queries,
        "image_attention_mask": torch.ones(seq, 1, dtype=torch.int64),
        "aspect_ratio_ids": torch.ones(1, dtype=torch.int64),
        "aspect_ratio_mask": torch.ones(1, 1, dtype=torch.int64),
        "cross_attention_mask": torch.ones(seq, 1, 1, dtype=torch.int64),
        "feature_attention_mask": torch.ones(FRAMES, dtype=torch.int64),
        "input_features_mask": torch.ones(FRAMES, dtype=torch.int64),
    }
    return {name: value for name, value in made.items() if name in names and value is not None}


def _patches(config: Any) -> Tensor | None:
    """Patches [9, 2 + size] of an image, each after its row and column; no value is none of a row."""
    size = first(_part(config, "vision_config"), "patch_embed_hidden_size")
    if not isinstance(size, int):
        return None
    places = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    return torch.cat([places, torch.rand(9, size, generator=torch.Generator().manual_seed(1))], 1)


def with_placeholders(model: nn.Module, stream: dict[str, Tensor], ids: Tensor) -> Tensor | None:
    """Token ids with as many placeholders as the image or sound has features; as they are, for a model without."""
    placeholder = first(model.config, *PLACEHOLDERS)
    if placeholder is None:
        return ids
    inner = getattr(model, "model", None)
    names = ("get_image_features", "get_audio_features")
    getter = next((found for name in names for of in (model, inner) if (found := getattr(of, name, None))), None)
    if getter is None:
        return None
    try:
        with torch.no_grad():
            found = getter(**{key: value.unsqueeze(0) for key, value in stream.items()})
    except Exception:  # another shape may do
        return None
    found = getattr(found, "pooler_output", found)
    while isinstance(found, tuple | list):
        found = found[0]
    if not isinstance(found, Tensor):
        return None
    count = found.shape[-2]
    tail = ids[: max(len(ids) - count - 1, 8)]
    return torch.cat([ids[:1], torch.full((count,), placeholder), tail])
