"""Sizes that a model divides with a rest (``s // 8``): no formula in the sizes of the batch, so told as they come up.

The model is then traced for one sequence length. To go on first with symbols, which is what takes long, would be in
vain: whatever reads a tensor of such a size, its size is asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.overrides import TorchFunctionMode
from torch.utils._sympy.functions import FloorDiv, Mod

from autopar.graph.sizes import FixedSequenceError
from autopar.graph.specialise import place_of


class RestsTold(TorchFunctionMode):
    """While open, raises FixedSequenceError when a tensor of such a size is made."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._fine: set[Any] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            sizes: tuple[Any, ...] = tuple(result.shape)
            for size in sizes:
                if isinstance(size, torch.SymInt) and (expression := size.node.expr) not in self._fine:
                    if expression.has(FloorDiv, Mod) and not free_unbacked_symbols(expression):
                        place = place_of(self._model)
                        told = f"{place} computes a tensor size with a rest, {expression}"
                        raise FixedSequenceError(told, of_all_lengths=True)
                    self._fine.add(expression)
        return result
