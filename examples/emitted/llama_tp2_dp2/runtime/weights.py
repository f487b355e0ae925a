"""Empty parameters in the plan's layout, and the modules that hold them under the model's own names."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from .meshes import expert_axis


class Weights(nn.Module):
    """Parameters, and further `Weights`, under their names; their use is written in the block that holds them."""

    def __init__(self, /, **members: "nn.Parameter | Weights") -> None:
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member)

    @classmethod
    def named(cls, *members: "tuple[str, nn.Parameter | Weights]") -> "Weights":
        """The same for names that cannot be written as keywords ("0", "in")."""
        return cls(**dict(members))


class New:
    """Makes uninitialised parameters: with axes that split them DTensors on these, of the (global) shape given.

    ``mesh``: the whole device mesh; ``splits``: its axes that split parameters, outermost first; ``ep``: neighbouring
    data ranks that hold the experts of a mixture together.
    """

    def __init__(
        self, mesh: DeviceMesh | None, splits: tuple[str, ...], device: torch.device, dtype: torch.dtype, ep: int = 1
    ) -> None:
        self.mesh, self.splits, self.device, self.dtype = mesh, splits, device, dtype
        self.experts = expert_axis(mesh, ep) if mesh is not None and ep > 1 else None

    def axis(self, name: str) -> DeviceMesh:
        """One axis of the mesh, or "ep"."""
        if name == "ep" and self.experts is not None:
            return self.experts
        assert self.mesh is not None, f"a mesh with the axis {name} is needed"
        return self.mesh[name]

    def whole(self, *shape: int, trains: bool = True) -> nn.Parameter:
        """Every rank holds the whole parameter."""
        return self.split(*shape, trains=trains)

    def split(self, *shape: int, trains: bool = True, **dims: int) -> nn.Parameter:
        """Axis ``a`` splits dim ``dims[a]``, an outer axis before an inner one; the other axes hold it whole. "ep" is
        outside the others.

        The parts are those of `torch.chunk`: where a dim does not divide, the last ranks hold less of it. A parameter
        that does not train has no gradient and no optimizer state.
        """
        local = list(shape)
        splits = ("ep", *self.splits) if "ep" in dims else self.splits
        for name in splits:
            if name in dims:
                ranks, rank = self.axis(name).size(), self.axis(name).get_local_rank()
                size = local[dims[name]]
                part = (size + ranks - 1) // ranks
                local[dims[name]] = torch.sym_max(0, torch.sym_min(size - rank * part, part))
        parameter = torch.empty(local, device=self.device, dtype=self.dtype)
        if self.mesh is None or not splits:
            return nn.Parameter(parameter, trains)
        placements = [Shard(dims[name]) if name in dims else Replicate() for name in splits]
        meshes = [self.axis("ep")] if "ep" in dims else []
        meshes += [self.mesh[self.splits]] if self.splits else []
        whole = torch.empty(shape, device="meta")
        return nn.Parameter(
            DTensor.from_local(
                parameter,
                meshes[0] if len(meshes) == 1 else DeviceMesh._concatenate(meshes),
                placements,
                run_check=False,
                shape=whole.shape,
                stride=whole.stride(),
            ),
            trains,
        )
