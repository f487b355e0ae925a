"""Seconds one operator takes on one device: a roofline with shape-aware efficiency.

    seconds = sum of matmuls  max(FLOP / (peak * efficiency(shape)), bytes / bandwidth)
            + streamed bytes / bandwidth
            + kernels * launch

Efficiency of a matmul = the device's figure for large ones, times how well its shape fills the machine: the output is
cut into tiles, tiles run in waves of one per processor, and a last wave that is not full, or tiles that stick out, are
lost (NVIDIA, "Matrix Multiplication Background User's Guide", sections on tile and wave quantization). The best of the
tile sizes in `TILES` counts, as a library would choose.

Where linear layers cast their operands, the one that makes the logits does not: Megatron-Core's output layer is none of
Transformer Engine's, torchtitan's filter_fqns names "output".

Where the device has a profile, operators that it knows are priced by that instead (`autopar.solver.measured_ops`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt

from autopar.cluster import Device
from autopar.graph.ir import EXPERTS, LINEAR, Node
from autopar.job import NARROW_BYTES, Job
from autopar.solver.measured_ops import MeasuredOps
from autopar.solver.stack_work import as_run, work_of
from autopar.solver.work import variant
from autopar.solver.work_parts import Attention, LocalTensor, Matmul, Work
from autopar.stack import stack_of

__all__ = ["LocalTensor", "OpCosts", "OpTime"]

TILES: tuple[tuple[int, int, float], ...] = (
    (128, 256, 1.0),
    (256, 128, 1.0),
    (128, 128, 0.92),
    (64, 128, 0.78),
    (128, 64, 0.78),
    (64, 64, 0.6),
)
"""Tile height, width, and the speed of a full wave of them against the largest: smaller tiles load more bytes per FLOP
from the cache. Plausible range of a speed: the square root of (its area over the largest), to 1."""

SPLITS = (1, 2, 4, 8, 16)
"""Ways to cut the inner dim so that few tiles still fill the machine (split-K)."""

FILL_K = 256
"""Inner length that a tile takes to fill and drain its pipeline: three stages of 64 before the first product (CUTLASS's
kernels of 128 x 256 x 64 on Ampere), and results that go out through shared memory at the end; plausible 32 to 512."""

SUM_K = 512
"""Inner length that summing the parts of a split tile takes as long as: 256 KiB of float32 written and read through the
cache against 64 KiFLOP a step; plausible 128 to 1024."""

ATTENTION_TILE = 128
"""Queries that one processor of the fused attention kernel works on (FlashAttention-2: 128 for head dims up to 128)."""

FILL_KEYS = 256
"""Keys that such a tile takes to fill its pipeline; plausible 64 to 1024."""


@dataclass(frozen=True, slots=True)
class OpTime:
    """Seconds forward and backward; ``host_forward``, ``host_backward``: those that the host takes to start its
    kernels, beside the device's. ``source``: where the device's figures are from ("catalog" or "measured"). Beside a
    profile: "measured" (this shape was), "interpolated" (others were), "catalog" or "roofline" (a roofline by figures
    of the catalog, or of a measured device)."""

    forward: float
    backward: float
    source: str
    host_forward: float = 0.0
    host_backward: float = 0.0


class OpCosts:
    """Prices operators of one job on one device. Prices are remembered by operator and local shapes."""

    def __init__(self, device: Device, job: Job) -> None:
        """Raises BadInputError if the device has no matmul rate for the job's dtype."""
        self.device = device
        self.job = job
        self._peak = {job.compute_bytes: device.peak(job.dtype)}
        for dtype, nbytes in (("fp32", 4), ("fp64", 8)):
            if dtype in device.peak_flops:
                self._peak.setdefault(nbytes, device.peak_flops[dtype])
        self._rates = {
            nbytes: device.sustained(job.dtype if nbytes == job.compute_bytes else f"fp{8 * nbytes}")
            for nbytes in self._peak
        }
        self._bandwidth = device.memory_bandwidth * device.memory_efficiency
        self.stack = stack_of(job.stack)
        self._linear = device.sustained(job.linear_dtype) if job.linear_dtype else 0.0
        self._narrow = NARROW_BYTES[job.linear_dtype] if job.linear_dtype else 0.0
        self._measured = MeasuredOps(device.measured, job) if device.measured else None
        self._ops: dict[object, OpTime] = {}
        self._matmuls: dict[tuple[Matmul, int, float], float] = {}

    def seconds(self, node: Node, inputs: Sequence[LocalTensor], output: LocalTensor, grads: Sequence[bool]) -> OpTime:
        """Time of ``node`` on local tensors; ``inputs`` and ``grads`` (wants a gradient) follow ``node.operands()``."""
        key = (node.op, node.logits, variant(node), tuple(inputs), output, tuple(grads))
        found = self._ops.get(key)
        if found is None:
            found = self._ops[key] = self._priced(node, inputs, output, grads)
        return found

    def _priced(self, node: Node, inputs: Sequence[LocalTensor], output: LocalTensor, grads: Sequence[bool]) -> OpTime:
        """By the profile if there is one that knows the operator, else by the roofline."""
        forward, backward = work_of(node, inputs, output, grads, self.stack)
        source = self.device.origin
        if self._measured:
            known = self._measured.seconds(node, inputs, output, grads, (forward, backward), self._time)
            if known:
                return OpTime(*known)
            source = "roofline" if source == "measured" else source
        width = inputs[0].bytes_per_element if inputs else output.bytes_per_element
        narrow = self._narrow if node.op in (LINEAR, EXPERTS) and not node.logits else 0.0
        forward, backward = as_run(node, forward, backward, width, self.stack, narrow)
        linear = self._linear if narrow else 0.0
        host, speed = self.stack.host_s / self.device.host_speed, self.stack.experts if node.op == EXPERTS else 1.0
        return OpTime(
            self._time(forward, width, linear, speed),
            self._time(backward, width, linear, speed),
            source,
            host * forward.kernels,
            host * backward.kernels,
        )

    def arithmetic_seconds(
        self, node: Node, inputs: Sequence[LocalTensor], output: LocalTensor, grads: Sequence[bool]
    ) -> tuple[float, float]:
        """Of `seconds` forward and backward, the arithmetic alone at the rate of the best of shapes: proportional to
        FLOP, so that n ranks that share it take an n-th each, or more."""
        width = inputs[0].bytes_per_element if inputs else output.bytes_per_element
        peak = self._peak.get(width, self._peak[self.job.compute_bytes])
        matmul_rate = max(self._rate(width), self._linear) * self.stack.matmul
        attention_rate = peak * self.device.attention_efficiency * self.stack.attention_speed
        if self.stack.attention == "unfused":
            attention_rate = max(attention_rate, peak)
        if self._measured:  # some shapes may have run faster than the catalog thinks
            matmul_rate = max(matmul_rate, self._measured.best_rate(width))
            attention_rate = max(attention_rate, self._measured.best_rate(width, attention=True))
        forward, backward = (
            sum(matmul.flops for matmul in part.matmuls) / matmul_rate
            + (part.attention.flops / attention_rate if part.attention else 0.0)
            for part in work_of(node, inputs, output, grads, self.stack)
        )
        return forward, backward

    def moving_seconds(
        self, node: Node, inputs: Sequence[LocalTensor], output: LocalTensor, grads: Sequence[bool]
    ) -> float:
        """What the operands of the arithmetic of its backward take to read and write."""
        return self._moved(work_of(node, inputs, output, grads, self.stack)[1].matmul_bytes)

    def stream_seconds(self, nbytes: float, kernels: int = 1) -> float:
        """Time of ``kernels`` kernels that read and write ``nbytes`` bytes together."""
        return self._moved(nbytes) + kernels * self.device.launch_s if nbytes else 0.0

    def optimizer_seconds(self, elements: int) -> float:
        """One fused optimizer step over ``elements`` master parameters of this rank: reads the parameter, its gradient
        and moments (AdamW: two), writes all but the gradient."""
        if self._measured and elements and self.job.optimizer == "adamw" and self.job.master_bytes == 4:
            known = self._measured.adamw_seconds(elements)
            if known is not None:
                return known
        passes = (3 + 2 * self.job.moments) * self.stack.state_passes
        return self.stream_seconds(passes * elements * self.job.master_bytes)

    def clip_seconds(self, elements: int) -> float:
        """Gradient clipping on this rank: reads gradients for the norm, scales them. Its all-reduce is not here."""
        return self.stream_seconds(3 * elements * self.job.master_bytes, kernels=2)

    def _rate(self, bytes_per_element: int) -> float:
        """FLOP/s of large matmuls of elements of this width."""
        return self._rates.get(bytes_per_element, self._rates[self.job.compute_bytes])

    def matmul_seconds(self, matmul: Matmul, bytes_per_element: int, linear: float = 0.0) -> float:
        """Time at the rate of the arithmetic alone, without bytes and launch. ``linear``: the FLOP/s of large matmuls
        of narrower operands, if it casts them."""
        key = (matmul, bytes_per_element, linear)
        found = self._matmuls.get(key)
        if found is None:
            rate = linear or self._rate(bytes_per_element)
            rate *= self.stack.matmul * _fill(matmul, self.device.processors)
            found = self._matmuls[key] = matmul.flops / rate if matmul.flops else 0.0
        return found

    def attention_seconds(self, attention: Attention, bytes_per_element: int) -> float:
        """Time of a fused attention kernel at the rate of its arithmetic alone."""
        if not attention.flops:
            return 0.0
        peak = self._peak.get(bytes_per_element, self._peak[self.job.compute_bytes])
        fill = _attention_fill(attention, self.device.processors)
        return attention.flops / (peak * self.device.attention_efficiency * self.stack.attention_speed * fill)

    def _time(self, part: Work, width: int, linear: float = 0.0, speed: float = 1.0) -> float:
        """On the device; ``speed``: of its matmuls."""
        seconds = sum(self.matmul_seconds(matmul, width, linear) for matmul in part.matmuls) / speed
        if part.attention:
            seconds += self.attention_seconds(part.attention, width)
        seconds = max(seconds, self._moved(part.matmul_bytes))
        return seconds + self._moved(part.nbytes) + part.kernels * self.device.launch_s

    def _moved(self, nbytes: float) -> float:
        cached = min(nbytes, self.device.cache_bytes)
        return (nbytes - cached) / self._bandwidth + (cached / self.device.cache_bandwidth if cached else 0.0)


def _fill(matmul: Matmul, processors: int) -> float:
    """Fraction of the speed of a large matmul that this shape allows, in (0, 1]."""
    if processors == 1:  # rates of such a device are those of the tiles it chose when measured
        return 1.0
    batch, m, n, k = matmul
    least = float("inf")
    for height, width, speed in TILES:
        tiles = batch * ceil(m / height) * ceil(n / width)
        per_wave = processors * height * width / speed
        for split in SPLITS:
            length = k / split + FILL_K + (SUM_K if split > 1 else 0)
            least = min(least, ceil(tiles * split / processors) * length * per_wave)
    return batch * m * n * k / least


def _attention_fill(attention: Attention, processors: int) -> float:
    """Fraction of the speed of a large attention problem with head dim 128, in (0, 1]."""
    if processors == 1:
        return 1.0
    keys = attention.keys * attention.share / attention.pieces
    length = keys / (keys + FILL_KEYS)
    # Short heads do fewer FLOP per softmax element; FlashAttention-2's figures for 64 are 0.8 to 0.9 of those for 128.
    head = min(1.0, sqrt(sqrt(attention.head_dim / 128)))
    tiles = attention.batch * ceil(attention.queries / ATTENTION_TILE)
    covered = attention.batch * attention.queries / ATTENTION_TILE
    return length * head * covered / (ceil(tiles / processors) * processors)
