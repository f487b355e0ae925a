"""The data ranks as one mesh axis, and how they share the experts of a mixture."""

from torch.distributed.device_mesh import DeviceMesh

# PyTorch has no public names for joining and splitting axes. All meshes must come from one, or FSDP2 cannot combine
# them.


def data_axis(mesh: DeviceMesh) -> DeviceMesh:
    """The ranks of "dp" and "cp" together, those of cp first: they hold the same parameters, but for experts."""
    return mesh["dp", "cp"]._flatten("data")


def expert_axis(mesh: DeviceMesh, ep: int) -> DeviceMesh:
    """The ``ep`` neighbouring data ranks that hold the experts together."""
    return _expert_meshes(mesh, ep)["ep"]


def expert_fsdp_mesh(mesh: DeviceMesh, ep: int, fsdp: int) -> DeviceMesh:
    """The data ranks that hold the same experts: one axis, which shards them, or two, which replicate and shard.

    ``fsdp``: ranks of a shard group of other parameters; of these, every ep-th has the same experts.
    """
    same = _expert_meshes(mesh, ep)["expert_data"]
    shards = max(1, fsdp // ep)
    if shards == same.size():
        return same
    return same._unflatten(0, (same.size() // shards, shards), ("expert_replicate", "expert_shard"))


def _expert_meshes(mesh: DeviceMesh, ep: int) -> DeviceMesh:
    data = data_axis(mesh)
    return data._unflatten(0, (data.size() // ep, ep), ("expert_data", "ep"))
