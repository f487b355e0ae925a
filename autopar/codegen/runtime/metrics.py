"""What a run reports: loss, gradient norm, speed against the prediction, memory."""

import json
import resource
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist


class Metrics:
    """Prints one line per step from rank 0 and, if asked, appends one JSON object per step to a file.

    ``predicted_s``: seconds per step that the plan predicts. ``amount``: tokens (or other ``unit``) per step, over all
    ranks.
    """

    def __init__(
        self, amount: int, predicted_s: float, device: torch.device, path: Path | None = None, unit: str = "tokens"
    ) -> None:
        self.amount, self.predicted_s, self.device, self.path = amount, predicted_s, device, path
        self.unit = unit
        self.is_main = dist.get_rank() == 0
        self.last = time.perf_counter()
        self.last_step: int | None = None

    def report(self, step: int, loss: float, norm: float, rate: float) -> None:
        """Report the state after ``step`` optimizer steps. Called by all ranks (the memory is the largest of all)."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        steps = step - self.last_step if self.last_step is not None else 1
        seconds = (now - self.last) / max(1, steps)
        self.last, self.last_step = now, step
        memory = torch.tensor(float(self._peak_bytes()), device=self.device)
        dist.all_reduce(memory, op=dist.ReduceOp.MAX)
        if not self.is_main:
            return
        values = {
            "step": step,
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": rate,
            "step_s": seconds,
            "predicted_step_s": self.predicted_s,
            f"{self.unit}_per_second": self.amount / seconds,
            "peak_bytes": int(memory.item()),
        }
        print(
            f"step {step:6d}  loss {loss:.4f}  norm {norm:.3f}  lr {rate:.2e}  {seconds * 1e3:.0f} ms"
            f" (predicted {self.predicted_s * 1e3:.0f})  {self.amount / seconds:,.0f} {self.unit}/s"
            f"  {memory.item() / 2**30:.2f} GiB",
            flush=True,
        )
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(values) + "\n")

    def _peak_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
