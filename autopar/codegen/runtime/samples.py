"""Training samples from a file of tensors, the same for every plan (in the order that `data` takes tokens).

The file is what ``torch.save({name: tensor [samples, ...]})`` writes; it is mapped, never read whole.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .data import order_of_epoch
from .launch import InputError

Kind = tuple[tuple[int, ...], torch.dtype, int]
"""Of one tensor of a sample: its shape, its dtype, and how many values its whole numbers may have (0: any number)."""


class Samples:
    """``path``: the file; ``tensors``: what the model takes of each sample, by name.

    Raises InputError for a file that lacks one of them, or has one of another shape.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Kind], seed: int) -> None:
        if not path.is_file():
            raise InputError(f"--data: {path} is no file; save your samples with torch.save({{name: tensor}}, path)")
        try:
            held = torch.load(path, mmap=True, weights_only=True)
        except Exception as error:
            raise InputError(f"--data: {path} was not written by torch.save({{name: tensor}}, path): {error}") from None
        if not isinstance(held, dict):
            raise InputError(f"--data: {path} holds a {type(held).__name__}, not tensors by name")
        if missing := [name for name in tensors if not isinstance(held.get(name), Tensor)]:
            raise InputError(f"--data: {path} has {', '.join(map(str, held))}, but no tensor {', '.join(missing)}")
        self.tensors = {name: held[name] for name in tensors}
        for name, (shape, _, _) in tensors.items():
            found = tuple(self.tensors[name].shape)
            if found[1:] != shape:
                wanted = ", ".join(map(str, ("samples", *shape)))
                raise InputError(f"--data: {name} in {path} has shape {found}, not [{wanted}]")
        counts = {name: len(tensor) for name, tensor in self.tensors.items()}
        self.count = min(counts.values())
        if self.count == 0 or len(set(counts.values())) > 1:
            raise InputError(f"--data: tensors in {path} have {counts} samples: not one number above 0")
        self.path, self.kinds, self.seed = path, dict(tensors), seed

    def samples(self, indices: list[int]) -> dict[str, Tensor]:
        """The samples of these indices (counted over all epochs), each tensor [len(indices), ...].

        Raises InputError on a whole number out of range.
        """
        places = [divmod(index, self.count) for index in indices]
        rows = [int(order_of_epoch(self.count, self.seed, epoch)[place]) for epoch, place in places]
        batch = {}
        for name, (_, dtype, limit) in self.kinds.items():
            batch[name] = self.tensors[name][rows].to(dtype)
            if limit and int(batch[name].max()) >= limit:
                raise InputError(
                    f"--data: {name} in {self.path} has {int(batch[name].max())}, but the model knows {limit} values"
                )
        return batch


class RandomSamples:
    """Random numbers of the same kinds, to try the speed without data; used like `Samples`. Those that are not whole
    are between 0 and 1, as targets of any loss may be."""

    def __init__(self, tensors: Mapping[str, Kind], seed: int) -> None:
        self.kinds, self.seed = dict(tensors), seed

    def samples(self, indices: list[int]) -> dict[str, Tensor]:
        """A sample of one index is always the same."""
        rows: dict[str, list[Tensor]] = {name: [] for name in self.kinds}
        for index in indices:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
            for name, (shape, dtype, limit) in self.kinds.items():
                if dtype.is_floating_point:
                    rows[name].append(torch.rand(shape, generator=generator, dtype=dtype))
                else:
                    drawn = torch.randint(limit or 2, shape, generator=generator)
                    rows[name].append(drawn.to(dtype))
        return {name: torch.stack(values) for name, values in rows.items()}
