"""Data parallelism by FSDP2: one group per block, the rest of the stage in a root group."""

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


def shard_stage(stage: nn.Module, blocks: list[nn.Module], mesh: DeviceMesh, zero: int, compute: torch.dtype) -> None:
    """Wrap a stage for the data axis, in place. Afterwards every parameter is a DTensor over the data and model axes.

    ``zero``: 0 keeps parameters, gradients and optimizer state whole on each data rank; 3 shards all three and gathers
    a block's parameters for its forward and again for its backward, or once a step if there are several stages (stock
    schedules keep what a backward gathers to the end of the step, so freeing it in between saves no memory).
    ``compute``: the dtype blocks run in; parameters, gradient reduction and optimizer state keep the dtype of the
    parameters.
    """
    master = next(stage.parameters()).dtype
    # Shard over "dp", or replicate over "dp" and shard over the one rank of "shard" (the same if "dp" has one rank).
    data_mesh = mesh["dp"] if zero == 3 or mesh["dp"].size() == 1 else mesh["dp", "shard"]
    precision = MixedPrecisionPolicy(
        param_dtype=compute if compute != master else None, reduce_dtype=master, cast_forward_inputs=False
    )
    # A weight that two blocks share has to be gathered once for both: it goes with the root.
    holders = Counter(id(weight) for block in blocks for weight in block.parameters())
    free_blocks = zero == 3 and mesh["pp"].size() == 1
    for block in blocks:
        weights = list(block.parameters())
        if weights and all(holders[id(weight)] == 1 for weight in weights):
            fully_shard(block, mesh=data_mesh, reshard_after_forward=free_blocks, mp_policy=precision)
    fully_shard(stage, mesh=data_mesh, reshard_after_forward=False, mp_policy=precision)

    for module in stage.modules():
        if isinstance(module, FSDPModule):
            # The loss is already divided by the tokens of all ranks, so gradients are added up, not averaged. Without
            # the second line the factor becomes a pre-multiplied sum, which gloo does not have in float32.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def compile_blocks(blocks: list[nn.Module]) -> None:
    """Compile each block's forward, without graph breaks; FSDP2's hooks stay outside, and so does recomputation, but
    for the selective one, which the compiler carries out (`recompute.selective`)."""
    block: Any
    for block in blocks:
        block.eager_forward = block.forward
        block.forward = torch.compile(block.forward, fullgraph=True)
