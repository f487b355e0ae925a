"""What is refused before anything is traced: modules that are wrapped, or not whole yet."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy

from autopar.errors import BadInputError

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


def check_plain(model: nn.Module) -> None:
    """Raise BadInputError, naming the module and the way out, for what only looks like a plain module."""
    for path, module in model.named_modules():
        where = f"module {path!r}" if path else "the model"
        names = {base.__name__ for base in type(module).__mro__}
        if wrapper := next((name for name in _WRAPPERS if name in names), None):
            raise BadInputError(
                f"{where} is wrapped in {wrapper}: hand over the plain module (its .module); autopar wraps it itself"
            )
        if "FSDPModule" in names:
            raise BadInputError(
                f"{where} has been through fully_shard: hand over the module before it; autopar shards it"
            )
        hooks = {type(hook).__name__ for hook in module._forward_pre_hooks.values()}
        if "_SpectralNorm" in names or "SpectralNorm" in hooks:
            owner = f"module {path.partition('.parametrizations')[0]!r}"
            raise BadInputError(
                f"{owner} has a spectral norm, whose vectors change in every forward: emitted code keeps no state "
                "between steps; bound the weight without one (parametrizations.weight_norm, a gradient penalty)"
            )
        if "WeightNorm" in hooks:
            raise BadInputError(
                f"{where} has torch.nn.utils.weight_norm, which torch cannot copy: use "
                "torch.nn.utils.parametrizations.weight_norm"
            )
        if "ScriptModule" in names:
            raise BadInputError(
                f"{where} is a ScriptModule, whose code cannot be traced: hand over the module it is of"
            )
    if lazy := [name for name, parameter in model.named_parameters() if is_lazy(parameter)]:
        raise BadInputError(
            f"parameter {lazy[0]} has no shape yet (a lazy module): run the model once on an example, then hand it over"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise BadInputError(f"no parameter of {type(model).__name__} trains: there is nothing to plan")
