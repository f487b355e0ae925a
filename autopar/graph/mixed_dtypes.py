"""Products and norms of tensors in float32 and in the dtype of the weights, which torch computes under autocast only.

Models whose weights are meant to be float32 keep some things so by themselves (the sines of a time step) and hand them
to layers. With weights in 16 bits torch refuses that when it runs, and for some functions not when it traces.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from autopar.graph.exported import TRACE_DTYPE

NOTE = (
    "what the model keeps in float32 and multiplies with weights is cast to their dtype, and norms of it are computed "
    "in float32, as under autocast"
)

_PRODUCTS = {
    *(F.linear, F.bilinear, F.scaled_dot_product_attention, torch.einsum, torch.matmul, torch.Tensor.matmul),
    *(torch.Tensor.__matmul__, torch.Tensor.__rmatmul__, torch.mm, torch.Tensor.mm, torch.bmm, torch.Tensor.bmm),
    *(torch.addmm, torch.baddbmm, torch.Tensor.addmm, torch.Tensor.baddbmm, F.prelu),
    *(F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
}
_NORMS = {F.layer_norm, F.group_norm, F.batch_norm, F.instance_norm}


class MixedDtypes(TorchFunctionMode):
    """``met``: whether there was such a call inside it; with ``cast`` it is computed as under autocast."""

    def __init__(self, cast: bool) -> None:
        super().__init__()
        self._cast, self.met = cast, False

    def __torch_function__(
        self, func: Any, _: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = (args, dict(kwargs or {}))
        if func in _PRODUCTS or func in _NORMS:
            leaves = pytree.tree_leaves(given)
            found = {leaf.dtype for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()}
            if found == {torch.float32, TRACE_DTYPE}:
                self.met = True
                wanted = TRACE_DTYPE if func in _PRODUCTS else torch.float32
                if self._cast:
                    given = pytree.tree_map_only(torch.Tensor, lambda x: x.to(wanted) if x.dtype in found else x, given)
        return func(*given[0], **given[1])
