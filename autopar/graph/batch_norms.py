"""Batch norms: what they mean where a batch is held by many.

A batch norm in training divides by the statistics of the samples it sees: those of one micro-batch on one data rank, as
under DistributedDataParallel. That is an operator that mixes samples (`autopar.sharding.data_parallel`). The running
averages that it keeps for evaluation have no part in the loss or in any gradient, and are not kept: the traced model
norms without them, and says so.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def forget_averages(model: nn.Module) -> tuple[str, ...]:
    """Take the running averages from every batch norm of ``model`` (a copy made for tracing); what to tell of it."""
    found = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]
    for module in found:
        module.running_mean = module.running_var = module.num_batches_tracked = None
        module.track_running_stats = False
    if not found:
        return ()
    return (
        f"the running averages of {len(found)} batch norms are not kept (no gradient depends on them): for evaluation, "
        "compute them from trained weights (torch.optim.swa_utils.update_bn)",
    )


def by_batch(model: nn.Module) -> None:
    """Let the batch norms of ``model`` norm by the batch, also where it does not train."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train()
