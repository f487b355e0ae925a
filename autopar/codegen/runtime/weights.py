"""Empty parameters in the plan's layout, and the modules that hold them under the model's own names."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard


class Weights(nn.Module):
    """Parameters, and further `Weights`, under their names; their use is written in the block that holds them."""

    def __init__(self, **members: "nn.Parameter | Weights") -> None:
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member)

    @classmethod
    def named(cls, *members: "tuple[str, nn.Parameter | Weights]") -> "Weights":
        """The same for names that cannot be written as keywords ("0", "in")."""
        return cls(**dict(members))


class New:
    """Makes uninitialised parameters; with a model axis they are DTensors on it, of the (global) shape given."""

    def __init__(self, axis: DeviceMesh | None, device: torch.device, dtype: torch.dtype) -> None:
        self.axis, self.device, self.dtype = axis, device, dtype

    def whole(self, *shape: int) -> nn.Parameter:
        """Every rank of the axis holds the whole parameter."""
        local = torch.empty(shape, device=self.device, dtype=self.dtype)
        if self.axis is None:
            return nn.Parameter(local)
        return nn.Parameter(DTensor.from_local(local, self.axis, [Replicate()], run_check=False))

    def split(self, dim: int, *shape: int) -> nn.Parameter:
        """Each rank of the axis holds its slice of ``dim``."""
        assert self.axis is not None
        parts = self.axis.size()
        if shape[dim] % parts:
            raise ValueError(f"dim {dim} of shape {shape} does not split evenly over {parts} ranks")
        own = [size // parts if place == dim else size for place, size in enumerate(shape)]
        local = torch.empty(own, device=self.device, dtype=self.dtype)
        return nn.Parameter(DTensor.from_local(local, self.axis, [Shard(dim)], run_check=False))
