"""Weights that are one tensor in the model but have a copy on several pipeline stages."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .parameters import Tied, own_slice


class TiedWeights:
    """The copies this rank holds: adds up their gradients over the stages, and says which copies to count.

    Every copy starts equal, gets the sum of all gradients and takes the same optimizer steps, so they stay equal.
    """

    def __init__(self, stage: nn.Module, tied: Tied, mesh: DeviceMesh) -> None:
        self.copies: list[tuple[nn.Parameter, list[int], bool]] = []
        self.not_counted: set[int] = set()
        if mesh["pp"].size() == 1 or not tied:
            return
        self.group = mesh["pp"].get_group()
        weights = dict(stage.named_parameters(remove_duplicate=False))
        held = [next((weights[name] for name in group if name in weights), None) for group in tied]
        layouts: list[list[str | None]] = [[] for _ in range(mesh["pp"].size())]
        dist.all_gather_object(layouts, [None if w is None else str(w.placements) for w in held], group=self.group)
        own = mesh["pp"].get_local_rank()
        for index, weight in enumerate(held):
            stages = [s for s, layout in enumerate(layouts) if layout[index] is not None]
            if weight is None or len(stages) == 1:
                continue
            same_layout = len({layouts[s][index] for s in stages}) == 1
            self.copies.append((weight, stages, same_layout))
            if own != stages[0]:
                self.not_counted.add(id(weight))

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Replace the gradient of each copy by the sum over all its copies."""
        for weight, stages, same_layout in self.copies:
            gradient = weight.grad
            assert isinstance(gradient, DTensor)
            # Shards of the same layout can be added as they are; others are added as whole tensors.
            if same_layout:
                total = self._sum(gradient.to_local(), stages)
            else:
                total = own_slice(self._sum(gradient.full_tensor(), stages), gradient)
            gradient.to_local().copy_(total)

    def _sum(self, own: Tensor, stages: list[int]) -> Tensor:
        parts = {stage: torch.empty_like(own) for stage in stages}
        me = dist.get_rank(self.group)
        parts[me] = own.contiguous()
        operations = []
        for stage in stages:
            if stage != me:
                peer = dist.get_global_rank(self.group, stage)
                operations.append(dist.P2POp(dist.isend, parts[me], peer, self.group))
                operations.append(dist.P2POp(dist.irecv, parts[stage], peer, self.group))
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        # In stage order on every rank, so that all copies get the same bits.
        total = parts[stages[0]].clone()
        for stage in stages[1:]:
            total += parts[stage]
        return total
