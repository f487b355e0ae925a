"""Weights that are one tensor in the model but have a copy on several pipeline stages."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .parameters import Tied, own_slice


class TiedWeights:
    """The copies this rank holds: adds up their gradients over the stages, and says which copies to count.

    Every copy starts equal, gets the sum of all gradients and takes the same optimizer steps, so they stay equal. Two
    copies may be on one rank, on stages of its own.
    """

    def __init__(self, stages: dict[int, nn.Module], tied: Tied, mesh: DeviceMesh) -> None:
        # Copies held here, the pipeline ranks that hold some, and whether all have the same layout.
        self.copies: list[tuple[list[nn.Parameter], list[int], bool]] = []
        self.not_counted: set[int] = set()
        if mesh["pp"].size() == 1 or not tied:
            return
        self.group = mesh["pp"].get_group()
        own: list[dict[int, nn.Parameter]] = [{} for _ in tied]
        for index, stage in stages.items():
            weights = dict(stage.named_parameters(remove_duplicate=False))
            for place, names in enumerate(tied):
                weight = next((weights[name] for name in names if name in weights), None)
                if weight is not None and weight.requires_grad:
                    own[place][index] = weight
        # By rank and tied weight, the layout of each copy by its stage.
        layouts: list[list[dict[int, str]]] = [[] for _ in range(mesh["pp"].size())]
        told = [{index: str(weight.placements) for index, weight in held.items()} for held in own]
        dist.all_gather_object(layouts, told, group=self.group)
        for place, held in enumerate(own):
            everywhere = {index: layout for rank in layouts for index, layout in rank[place].items()}
            if not held or len(everywhere) == 1:
                continue
            ranks = [rank for rank, found in enumerate(layouts) if found[place]]
            self.copies.append((list(held.values()), ranks, len(set(everywhere.values())) == 1))
            self.not_counted |= {id(weight) for index, weight in held.items() if index != min(everywhere)}

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Replace the gradient of each copy by the sum over all its copies."""
        for weights, ranks, same_layout in self.copies:
            gradients = [weight.grad for weight in weights]
            # Shards of the same layout can be added as they are; others are added as whole tensors.
            parts = [_local(gradient) if same_layout else gradient.full_tensor() for gradient in gradients]
            total = self._sum(sum(parts[1:], parts[0]), ranks)
            for gradient in gradients:
                _local(gradient).copy_(total if same_layout else own_slice(total, gradient))

    def _sum(self, own: Tensor, ranks: list[int]) -> Tensor:
        parts = {rank: torch.empty_like(own) for rank in ranks}
        me = dist.get_rank(self.group)
        parts[me] = own.contiguous()
        operations = []
        for rank in ranks:
            if rank != me:
                peer = dist.get_global_rank(self.group, rank)
                operations.append(dist.P2POp(dist.isend, parts[me], peer, self.group))
                operations.append(dist.P2POp(dist.irecv, parts[rank], peer, self.group))
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        # In the same order on every rank, so that all copies get the same bits.
        total = parts[ranks[0]].clone()
        for rank in ranks[1:]:
            total += parts[rank]
        return total


def _local(gradient: Tensor) -> Tensor:
    assert isinstance(gradient, DTensor)
    return gradient.to_local()
