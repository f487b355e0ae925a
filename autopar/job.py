"""The training job: what is trained per step, in which precision, with which optimizer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from autopar.errors import BadInputError

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
"""Bytes per element of the compute dtype. "fp64" is for proofs."""

OPTIMIZERS = {"adamw": 2, "sgd": 1}
"""Tensors of optimizer state per parameter: AdamW's two moments; SGD with momentum."""


@dataclass(frozen=True, slots=True)
class Job:
    """``global_batch`` sequences of ``seq_len`` tokens per optimizer step, computed in ``dtype``.

    bf16 and fp16 keep float32 master parameters, float32 gradient reduction and float32 optimizer state; fp16 scales
    the loss, so that small gradients do not vanish. ``optimizer``: "adamw", or "sgd" with momentum.
    Raises BadInputError naming the field.
    """

    global_batch: int
    seq_len: int
    dtype: str = "bf16"
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        for name in ("global_batch", "seq_len"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise BadInputError(f"job: {name} must be a positive integer, not {value!r}")
        for name, known in (("dtype", tuple(DTYPE_BYTES)), ("optimizer", tuple(OPTIMIZERS))):
            if getattr(self, name) not in known:
                raise BadInputError(f"job: unknown {name} {getattr(self, name)!r}; one of {', '.join(known)}")

    @property
    def compute_bytes(self) -> int:
        """Bytes per element of activations and gathered parameters."""
        return DTYPE_BYTES[self.dtype]

    @property
    def master_bytes(self) -> int:
        """Bytes per element of the parameters the optimizer updates (float32, or float64 for a float64 job)."""
        return max(4, DTYPE_BYTES[self.dtype])

    @property
    def moments(self) -> int:
        """Tensors of optimizer state, of master dtype, per parameter."""
        return OPTIMIZERS[self.optimizer]

    @property
    def tokens(self) -> int:
        return self.global_batch * self.seq_len

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Job:
        return Job(**data)
