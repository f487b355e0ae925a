"""Pipeline schedules: how stages sit on pipeline ranks, and what each schedule of `torch.distributed.pipelining` wants.

none         one stage
gpipe        all forwards, then all backwards (Huang et al., arXiv 1811.06965)
1f1b         forward and backward in turns (Narayanan et al., arXiv 1806.03377)
interleaved  several stages a rank, stage i on rank i mod p (Narayanan et al., arXiv 2104.04473)
zbv          two stages a rank in a V; weight gradients fill the bubble (Qi et al., arXiv 2401.10241)
dualpipev    two stages a rank in a V, forward and backward overlapped (DeepSeek-AI, arXiv 2412.19437)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class Schedule:
    """``torch_name``: the class in `torch.distributed.pipelining`. ``placement``: "loop" (stage i on rank i mod p) or
    "v" (there and back). ``stages``: stages on each rank, None for any number from two. ``splits_backward``: input and
    weight gradients are computed apart."""

    name: str
    torch_name: str
    placement: str
    stages: int | None
    splits_backward: bool = False

    def rank_of(self, stage: int, ranks: int) -> int:
        """The pipeline rank of stage ``stage`` among ``ranks``."""
        lap, place = divmod(stage, ranks)
        return ranks - 1 - place if self.placement == "v" and lap % 2 else place


@lru_cache(maxsize=4096)
def stages_of(schedule: str, ranks: int, vpp: int) -> tuple[tuple[int, ...], ...]:
    """The stages of each of so many ranks, in the model's order."""
    place = [SCHEDULES[schedule].rank_of(stage, ranks) for stage in range(ranks * vpp)]
    return tuple(tuple(stage for stage, rank in enumerate(place) if rank == mine) for mine in range(ranks))


SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        Schedule("none", "", "loop", 1),
        Schedule("gpipe", "ScheduleGPipe", "loop", 1),
        Schedule("1f1b", "Schedule1F1B", "loop", 1),
        Schedule("interleaved", "ScheduleInterleaved1F1B", "loop", None),
        Schedule("zbv", "ScheduleZBVZeroBubble", "v", 2, splits_backward=True),
        Schedule("dualpipev", "ScheduleDualPipeV", "v", 2, splits_backward=True),
    )
}
