"""Data parallelism by FSDP2: one group per block, the rest of the stage in a root group.

What happens in a step of m micro-batches, by ZeRO level ("gathers": of each block's parameters; with one rank in a
shard group they are copies; "reductions": of each block's gradients):

    level  parameters                     gathers   reductions
    0      whole                          1         1 all-reduce, in the last backward
    1      whole from first use to the    1         1 reduce-scatter, in the last backward
           end of the step
    2      as 1                           1         m reduce-scatters
    3      whole while a block runs       2m        m reduce-scatters

Under level 3 some blocks may stay whole as all do under level 2: ``gathered`` of `shard_stage`.
A block that no gradient passes, because it and all before it are frozen, is gathered for forwards alone: m at level 3.
Where shard groups have replicas, these add up their shards of the gradients once, in the last backward. Under schedules
that split the backward (level 0 and 1 only) the reduction comes after the last backward of the stage. The root group
(what is in no block) stays whole between a forward and its backward at every level.

In a pipeline levels 1 and 2 gather all stages of a rank as the step begins, while the first micro-batch is on its way,
and level 1 lets its reductions run on behind the last backwards, so that the gradient goes on to the stage before
without them (`gather_ahead`, `drains`). PyTorch before 2.13 still has each block wait for the reduction before its own.
"""

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

# Of a block that hands on what it is given; nothing in module.py changes a tensor in place.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def shard_stage(
    stage: nn.Module,
    blocks: list[nn.Module],
    fsdp_mesh: DeviceMesh,
    zero: int,
    compute: torch.dtype,
    offload: bool = False,
    expert_mesh: DeviceMesh | None = None,
    gathered: Collection[str] = (),
) -> None:
    """Wrap a stage for the data ranks, in place. Afterwards every parameter is a DTensor over data and tensor axes.

    ``fsdp_mesh``: one axis, which shards, or two, which replicate and shard. ``compute``: the dtype blocks run in;
    parameters, gradient reduction and optimizer state keep the dtype of the parameters. ``offload``: these three wait
    on the host, and are copied to the device and back as they are used. ``expert_mesh``: the same as ``fsdp_mesh`` for
    parameters that are split over "ep". ``gathered``: names of blocks that stay whole from their first use to the end
    of the step, at level 3 too.
    """
    master = next(stage.parameters()).dtype
    precision = MixedPrecisionPolicy(
        param_dtype=compute if compute != master else None, reduce_dtype=master, cast_forward_inputs=False
    )
    policy = CPUOffloadPolicy(pin_memory=fsdp_mesh.device_type == "cuda") if offload else OffloadPolicy()
    # A weight that two blocks share has to be gathered once for both: it goes with the root.
    holders = Counter(id(weight) for block in blocks for weight in block.parameters())
    place = None if expert_mesh is None else _placement(fsdp_mesh, expert_mesh)
    names = {module: name for name, module in stage.named_modules()}
    sharded: list[FSDPModule] = []
    for block in blocks:
        weights = list(block.parameters())
        if weights and all(holders[id(weight)] == 1 for weight in weights):
            free = zero == 3 and names[block] not in gathered
            wrapped = fully_shard(
                block,
                mesh=fsdp_mesh,
                reshard_after_forward=free,
                shard_placement_fn=place,
                mp_policy=precision,
                offload_policy=policy,
            )
            wrapped.set_reshard_after_backward(free)  # below level 3 `before_backward` says so of all
            sharded.append(wrapped)
    fully_shard(stage, mesh=fsdp_mesh, reshard_after_forward=False, mp_policy=precision, offload_policy=policy)
    # While a block goes backward, the one before it is gathered. By itself FSDP2 goes by the order of the forwards,
    # which under a pipeline are those of other micro-batches.
    for later, before in itertools.pairwise([stage, *reversed(sharded)]):
        later.set_modules_to_backward_prefetch([before])
        before.register_forward_hook(partial(_prefetch_if_backward, stage, later))

    for module in _sharded_modules(stage):
        # The loss is already divided by the tokens of all ranks, so gradients are added up, not averaged. Without
        # the second line the factor becomes a pre-multiplied sum, which gloo does not have in float32.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def _placement(fsdp_mesh: DeviceMesh, expert_mesh: DeviceMesh) -> Callable[[nn.Parameter], Any]:
    """Which data ranks share a parameter out: experts make a group of their own in their block."""
    # PyTorch 2.13; not public yet.
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult

    def of(mesh: DeviceMesh) -> FSDPMeshInfo:
        return FSDPMeshInfo(mesh, 0) if mesh.ndim == 1 else HSDPMeshInfo(mesh, 1, 0)

    others, experts = of(fsdp_mesh), of(expert_mesh)

    def place(weight: nn.Parameter) -> ShardPlacementResult:
        names = weight.device_mesh.mesh_dim_names or () if isinstance(weight, DTensor) else ()
        return ShardPlacementResult(None, experts if "ep" in names else others)

    return place


def _prefetch_if_backward(stage: FSDPModule, later: FSDPModule, block: FSDPModule, _: Any, result: Any) -> None:
    """After a block's forward: ``later`` need not gather it if no gradient will pass it. With nothing to gather FSDP2
    would go by its own order, so it is told the root, which is whole."""
    passes = any(x.requires_grad for x in tree_leaves(result) if isinstance(x, Tensor))
    later.set_modules_to_backward_prefetch([block if passes else stage])


def gather_ahead(stage: nn.Module) -> None:
    """Begin to gather a stage, in the order of use; each group's first forward waits for its own."""
    for module in _sharded_modules(stage):
        module.unshard(async_op=True)


def drains(zero: int, micro_batches: int, splits_backward: bool) -> bool:
    """Whether a stage of a pipeline leaves its last reductions to themselves until `after_step`: where whole gradients
    wait for them anyway, whose place the reductions' inputs take."""
    return zero == 1 and (micro_batches > 1 or splits_backward)


def reduce_in_background(stage: FSDPModule) -> None:
    """Let a block's reduction begin though the one before it is not through."""
    if hasattr(stage, "set_reduce_scatter_max_input_buffers"):  # PyTorch 2.13
        stage.set_reduce_scatter_max_input_buffers(len(list(_sharded_modules(stage))))


def before_backward(stage: FSDPModule, zero: int, is_last: bool, waits: bool = True) -> None:
    """Say what the next backward of a stage does with the gradients. ``is_last``: it is the last of the step;
    ``waits``: it ends when its reductions are through, else `after_step` waits for them."""
    reduce = zero >= 2 or is_last
    if zero < 3:
        stage.set_reshard_after_backward(False)
    stage.set_requires_gradient_sync(reduce)
    stage.set_requires_all_reduce(is_last)
    # Every backward that reduces ends its reductions, as the last of a step does. Otherwise FSDP2 holds the whole
    # gradients of the root group, its reduction's input, through the next micro-batch.
    stage.set_is_last_backward(reduce and waits)


def take_up_gradients(stage: nn.Module) -> None:
    """Add what autograd left in the weights of a stage to the gradients that wait, as `before_backward` said, for a
    later reduction. FSDP2's hooks do this where no schedule splits the backward."""
    for module in _sharded_modules(stage):
        for group in fully_shard.state(module)._fsdp_param_groups:
            group.post_backward()


def after_step(stage: FSDPModule, waits: bool = True) -> None:
    """Free what is still whole of a stage's parameters. ``waits``: as its last backward was told."""
    if not waits:
        stage.set_is_last_backward(True)
        fully_shard.state(stage)._root_post_backward_final_callback()
    for module in _sharded_modules(stage):
        module.reshard()


def _sharded_modules(stage: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in stage.modules() if isinstance(module, FSDPModule))


def compile_blocks(blocks: list[nn.Module], splits_backward: bool = False) -> None:
    """Compile each block's forward, without graph breaks; FSDP2's hooks stay outside, and so does recomputation, but
    for the selective one, which the compiler carries out (`recompute.selective`).

    ``splits_backward``: the schedule goes through the graph twice, for gradients of inputs and of weights.
    """
    if splits_backward:
        # Else the first pass gives away the buffers that the second needs.
        torch._functorch.config.donated_buffer = False
    block: Any
    for block in blocks:
        block.eager_forward = block.forward
        block.forward = torch.compile(block.forward, fullgraph=True)
