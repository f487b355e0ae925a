"""Training samples from tokens in a file, the same for every plan.

A sample is ``seq_len`` consecutive tokens; each epoch takes all samples in an order of its own. Step t takes the next
global batch of samples; micro-batch j of it the next ``ranks * micro_batch``; data rank r its slice of these. So what
a step learns from depends on the seed alone, not on the mesh, and a resumed run goes on where it stopped. The same
holds for the tokens that are masked.
"""

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from .launch import InputError

DTYPES = {"uint8": torch.uint8, "uint16": torch.uint16, "int32": torch.int32}


class Tokens:
    """Token ids: a file of little-endian integers (mapped, never read whole), or a folder of text, byte by byte.

    ``path``: a file of ``dtype`` values ("uint8" makes any text file a byte-level corpus), or a folder whose files that
    match ``pattern`` are joined in sorted order. Raises InputError if there is less than one sample in it.
    """

    def __init__(self, path: Path, seq_len: int, vocabulary: int, dtype: str, pattern: str, seed: int) -> None:
        if path.is_dir():
            files = sorted(file for file in path.rglob(pattern) if file.is_file())
            text = bytearray().join(file.read_bytes() for file in files)
            self.tokens = torch.frombuffer(text, dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
        elif path.is_file():
            count = path.stat().st_size // DTYPES[dtype].itemsize
            self.tokens = torch.from_file(str(path), shared=False, size=count, dtype=DTYPES[dtype])
        else:
            raise InputError(f"--data: {path} is neither a file nor a folder")
        self.path, self.seq_len, self.vocabulary, self.seed = path, seq_len, vocabulary, seed
        self.count = len(self.tokens) // seq_len
        if self.count == 0:
            raise InputError(f"--data: {path} has {len(self.tokens)} tokens, less than one sample of {seq_len}")

    def samples(self, indices: list[int]) -> Tensor:
        """The samples of these indices (counted over all epochs): int64 [len(indices), seq_len].

        Raises InputError on a token id past the vocabulary.
        """
        rows = []
        for index in indices:
            epoch, place = divmod(index, self.count)
            start = int(order_of_epoch(self.count, self.seed, epoch)[place]) * self.seq_len
            rows.append(self.tokens[start : start + self.seq_len].to(torch.int64))
        ids = torch.stack(rows)
        if int(ids.max()) >= self.vocabulary or int(ids.min()) < 0:
            raise InputError(
                f"--data: {self.path} has token id {int(ids.max())}, but the model's vocabulary is {self.vocabulary}: "
                "was the file written with another --token-dtype?"
            )
        return ids


class RandomTokens:
    """Random token ids below ``vocabulary``, to try the speed without data; used like `Tokens`."""

    def __init__(self, seq_len: int, vocabulary: int, seed: int) -> None:
        self.seq_len, self.vocabulary, self.seed = seq_len, vocabulary, seed

    def samples(self, indices: list[int]) -> Tensor:
        """int64 [len(indices), seq_len]; a sample of one index is always the same."""
        rows = []
        for index in indices:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
            rows.append(torch.randint(self.vocabulary, (self.seq_len,), generator=generator))
        return torch.stack(rows)


def sample_indices(step: int, rank: int, ranks: int, micro_batch: int, micro_batches: int) -> list[int]:
    """The samples that data rank ``rank`` of ``ranks`` takes at ``step``, micro-batch after micro-batch."""
    first = step * micro_batches * ranks * micro_batch
    return [
        first + (index * ranks + rank) * micro_batch + place
        for index in range(micro_batches)
        for place in range(micro_batch)
    ]


def mask_tokens(
    ids: Tensor, indices: list[int], seed: int, share: float, mask_id: int, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """Masks ``share`` of the tokens of each sample, as BERT does (Devlin et al. 2019, section 3.1).

    ``ids``: int64 [samples, seq], the samples ``indices`` (each epoch masks other tokens of a sample). Returns what the
    model is shown, int64, and which positions were chosen, bool, both [samples, seq]. Of the chosen ones, 80% show
    ``mask_id``, 10% a random id below ``vocabulary``, 10% what they are.
    """
    shown, chosen = ids.clone(), torch.zeros_like(ids, dtype=torch.bool)
    count = max(1, round(share * ids.size(1)))
    for row, index in enumerate(indices):
        # The complement: a stream of its own, not the one that `RandomTokens` draws the ids from.
        generator = torch.Generator().manual_seed(~(seed * 1_000_003 + index))
        places = torch.randperm(ids.size(1), generator=generator)[:count]
        random_ids = torch.randint(vocabulary, (count,), generator=generator)
        kind = torch.rand(count, generator=generator)
        kept = torch.where(kind < 0.9, random_ids, ids[row, places])
        shown[row, places] = torch.where(kind < 0.8, mask_id, kept)
        chosen[row, places] = True
    return shown, chosen


@lru_cache(maxsize=2)
def order_of_epoch(count: int, seed: int, epoch: int) -> Tensor:
    """In which order an epoch goes through ``count`` samples: int64 [count]."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)
