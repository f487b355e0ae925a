"""The training job: what is trained per step, in which precision, with which optimizer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from autopar.errors import BadInputError
from autopar.stack import stack_names, stack_of

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
"""Bytes per element of the compute dtype. "fp64" is for proofs."""

NARROW_BYTES = {"fp8": 1.0, "fp4": 0.5}
"""Bytes per element of what linear layers may cast their operands to; scales of blocks (mxfp8: 1 byte for 32 elements,
nvfp4: 1 for 16) left out."""

OPTIMIZERS = {"adamw": 2, "sgd": 1}
"""Tensors of optimizer state per parameter: AdamW's two moments; SGD with momentum."""


@dataclass(frozen=True, slots=True)
class Job:
    """``global_batch`` sequences of ``seq_len`` tokens per optimizer step, computed in ``dtype``.

    bf16 and fp16 keep float32 master parameters, float32 gradient reduction and float32 optimizer state; fp16 scales
    the loss, so that small gradients do not vanish. ``optimizer``: "adamw", or "sgd" with momentum.
    ``stack``: the software that runs it, "torch" (what autopar emits) or, to predict their runs, one of
    `autopar.stack.stack_names`. ``linear_dtype``: the dtype that linear layers cast their operands to ("fp8", "fp4"),
    if narrower than ``dtype``; for predictions alone, too. Raises BadInputError naming the field.
    """

    global_batch: int
    seq_len: int
    dtype: str = "bf16"
    optimizer: str = "adamw"
    stack: str = "torch"
    linear_dtype: str | None = None

    def __post_init__(self) -> None:
        for name in ("global_batch", "seq_len"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise BadInputError(f"job: {name} must be a positive integer, not {value!r}")
        for name, known in (("dtype", tuple(DTYPE_BYTES)), ("optimizer", tuple(OPTIMIZERS))):
            if getattr(self, name) not in known:
                raise BadInputError(f"job: unknown {name} {getattr(self, name)!r}; one of {', '.join(known)}")
        if self.stack != "torch" and self.stack not in stack_names():
            raise BadInputError(f"job: unknown stack {self.stack!r}; one of {', '.join(stack_names())}")
        if self.linear_dtype not in (None, *NARROW_BYTES):
            raise BadInputError(f"job: unknown linear_dtype {self.linear_dtype!r}; one of {', '.join(NARROW_BYTES)}")

    @property
    def compute_bytes(self) -> int:
        """Bytes per element of activations and gathered parameters."""
        return DTYPE_BYTES[self.dtype]

    @property
    def master_bytes(self) -> int:
        """Bytes per element of the parameters the optimizer updates (float32, or float64 for a float64 job)."""
        return max(4, DTYPE_BYTES[self.dtype])

    @property
    def gradient_bytes(self) -> int:
        """Bytes per element of gradients as the stack adds them up over ranks."""
        return self.master_bytes if stack_of(self.stack).gradients == "master" else self.compute_bytes

    @property
    def predicts_only(self) -> bool:
        """Whether plans for it can be predicted but not emitted."""
        return self.stack != "torch" or self.linear_dtype is not None

    @property
    def moments(self) -> int:
        """Tensors of optimizer state, of master dtype, per parameter."""
        return OPTIMIZERS[self.optimizer]

    @property
    def tokens(self) -> int:
        return self.global_batch * self.seq_len

    def to_json(self) -> dict[str, Any]:
        """The fields; stack and linear_dtype only where they are not what autopar emits."""
        told = asdict(self)
        if self.stack == "torch":
            del told["stack"]
        if self.linear_dtype is None:
            del told["linear_dtype"]
        return told

    @staticmethod
    def from_json(data: dict[str, Any]) -> Job:
        return Job(**data)
