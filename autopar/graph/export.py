"""Runs `torch.export` on a fake copy of the user's model; the model itself is never touched."""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo import config as dynamo
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx import config as fx_config
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from autopar.errors import AutoparError, BadInputError, UnsupportedError
from autopar.graph.batch_norms import forget_averages
from autopar.graph.cast_modules import casts_traced
from autopar.graph.causal_hints import masks_unread
from autopar.graph.ctc import whole_ctc
from autopar.graph.data_attribute import data_followed
from autopar.graph.embedding_bags import bags_taken_apart
from autopar.graph.exact_numbers import numbers_kept
from autopar.graph.expert_loops import follow_loops
from autopar.graph.exported import TRACE_DTYPE, from_values
from autopar.graph.find_experts import replace_experts
from autopar.graph.fold import CannotFoldError, Fold
from autopar.graph.fourier import WideTransforms
from autopar.graph.histograms import whole_numbers_counted
from autopar.graph.last_rows import last_row
from autopar.graph.leaves import stopping
from autopar.graph.mapped import mapped_first, unmap
from autopar.graph.mixed_dtypes import NOTE as MIXED
from autopar.graph.mixed_dtypes import MixedDtypes
from autopar.graph.picked_losses import picked_loss
from autopar.graph.picks import Picks
from autopar.graph.quotients import quotients_whole
from autopar.graph.recomputed import computed_once
from autopar.graph.recurrent import recurrent_whole
from autopar.graph.rests import RestsTold
from autopar.graph.scans import scans_whole
from autopar.graph.skipping import NOTE, every_layer, every_stretch
from autopar.graph.sorted_rows import SortedRows
from autopar.graph.specialise import raised_in, watched
from autopar.graph.strides import StridesFollowed
from autopar.graph.taking_apart import refused_samples, unknown_lengths
from autopar.graph.value_checks import checks_passed, checks_told
from autopar.graph.value_ranges import ValueRanges, masks_told, small_numbers

Loss = Callable[[Any, dict[str, torch.Tensor]], torch.Tensor]

DEEP = 100
"""Modules above which torch's cache of fake results pays: 8 layers of Llama took as long with it as without."""


@dataclass(frozen=True, slots=True)
class BatchSpec:
    """The tensors of one micro-batch as traced: for each key, shape, dtype, and which dims are the sequence.

    ``masks``: those that hold nothing but zeros and ones in the example. ``length``: that of its sequences; of
    the default example, the longest that the model's config speaks of, if it does.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    seq_dims: dict[str, tuple[int, ...]]
    masks: frozenset[str] = frozenset()
    length: int | None = None


@dataclass(frozen=True, slots=True)
class Exported:
    """``fixed_in``: for each number that a symbolic size turned out to be, the place in the model that fixed it.
    ``notes``: what the user should be told of how the model was traced. ``mixed``: whether torch would refuse, when it
    runs, some product of tensors in float32 and in the dtype of the weights. ``guards``: what is true of the sizes for
    which the code that was traced is run."""

    program: ExportedProgram
    fixed_in: dict[int, str]
    notes: tuple[str, ...] = ()
    mixed: bool = False
    guards: tuple[Any, ...] = ()


class LossOf(nn.Module):
    """forward(batch) → loss; ``model`` is called with the batch tensors that its forward takes, ``seen`` before."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | None,
        seen: Callable[[dict[str, torch.Tensor]], None] = lambda batch: None,
    ) -> None:
        super().__init__()
        self.model = model
        self._loss = loss
        self._seen = seen

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self._seen(batch)
        outputs = self.model(**call_arguments(self.model, batch))
        loss = scalar_of(outputs) if self._loss is None else self._own(outputs, batch)
        if not isinstance(loss, torch.Tensor) or loss.ndim or not loss.is_floating_point():
            given = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise BadInputError(f"the loss must be a scalar floating-point tensor, got {given}")
        return loss

    def _own(self, outputs: Any, batch: dict[str, torch.Tensor]) -> Any:
        assert self._loss is not None
        try:
            return self._loss(outputs, batch)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise BadInputError(
                f"loss(outputs, batch) fails with {type(error).__name__}: {error}; outputs is a "
                f"{type(outputs).__name__}, batch has {', '.join(batch)}"
            ) from error


def call_arguments(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``batch`` that ``model.forward`` takes, with ``use_cache=False`` and ``return_loss=True``."""
    parameters = inspect.signature(model.forward).parameters
    takes_all = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    arguments = {key: value for key, value in batch.items() if takes_all or key in parameters}
    if not arguments and (whole := takes_whole(model)):
        arguments = {whole: dict(batch)}
    if "use_cache" in parameters:
        arguments["use_cache"] = False
    if "return_loss" in parameters:  # contrastive models, which need no labels
        arguments["return_loss"] = True
    return arguments


def takes_whole(model: nn.Module) -> str:
    """The argument of a forward that takes the batch as a dict (it looks up names in it); "" of any other."""
    parameters = list(inspect.signature(model.forward).parameters)
    try:
        source = inspect.getsource(model.forward)
    except (OSError, TypeError):
        return ""
    name = parameters[0] if len(parameters) == 1 else ""
    return name if name and re.search(rf"\b{name}(\[|\.get\()[\"']", source) else ""


def scalar_of(outputs: Any) -> torch.Tensor:
    """The model's own loss: ``outputs.loss``, ``outputs["loss"]``, or the only scalar among the outputs.

    Raises BadInputError when there is none.
    """
    if isinstance(getattr(outputs, "loss", None), torch.Tensor):
        return outputs.loss  # type: ignore[no-any-return]
    if isinstance(outputs, Mapping) and isinstance(outputs.get("loss"), torch.Tensor):
        return outputs["loss"]  # type: ignore[no-any-return]
    items = outputs if isinstance(outputs, tuple | list) else (outputs,)
    scalars = [item for item in items if isinstance(item, torch.Tensor) and item.ndim == 0]
    if len(scalars) == 1:
        return scalars[0]
    kind = "a tensor" if isinstance(outputs, torch.Tensor) else type(outputs).__name__
    raise BadInputError(
        f"the model returns {kind} without a loss; pass loss=fn(outputs, batch) returning a scalar (a "
        "module.py:function returns it with the model: model, inputs, loss)"
    )


def fake_copy(
    model: nn.Module, stubs: Mapping[int, nn.Module], mode: FakeTensorMode, narrow: frozenset[str]
) -> nn.Module:
    """A training-mode copy with fake tensors on the CPU: parameters in the trace dtype, floating buffers in float32.

    ``stubs``: modules (by id) that the copy replaces; nothing of a replaced module is copied. ``narrow``: full names of
    buffers that take the trace dtype instead.
    """
    memo: dict[int, Any] = dict(stubs)
    kept: list[tuple[str, nn.Module]] = []
    pending = [("", model)]
    while pending:
        prefix, module = pending.pop()
        if id(module) not in stubs:
            kept.append((prefix, module))
            pending.extend((f"{prefix}{name}.", child) for name, child in module.named_children())

    def fake(tensor: torch.Tensor, floating: torch.dtype) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=floating if tensor.is_floating_point() else tensor.dtype, device="cpu")

    with mode:
        for prefix, module in kept:
            for parameter in module._parameters.values():
                if parameter is not None and id(parameter) not in memo:
                    grad = parameter.requires_grad and parameter.is_floating_point()
                    memo[id(parameter)] = nn.Parameter(fake(parameter, TRACE_DTYPE), requires_grad=grad)
            for name, buffer in module._buffers.items():
                if buffer is not None and id(buffer) not in memo:
                    memo[id(buffer)] = fake(buffer, TRACE_DTYPE if prefix + name in narrow else torch.float32)
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        if getattr(module, "gradient_checkpointing", False) is True:
            module.__dict__["gradient_checkpointing"] = False  # recomputation is the plan's choice
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False) is True:
            config.use_cache = False  # not every forward has an argument for it
    return copied.train()


@dataclass(slots=True)
class Dtypes:
    """What of a model may not be as it is with weights in 16 bits; kept from one export of it to the next.

    ``narrow``: full names of buffers that take the dtype of the weights; ``made``: the dtype of what forward makes
    without saying which (by default as the caller has it); ``mixed``: whether what is float32 by itself may meet
    weights of another dtype (`autopar.graph.mixed_dtypes`).
    """

    narrow: frozenset[str] = frozenset()
    made: torch.dtype | None = None
    mixed: bool = False

    def widened(self, buffers: frozenset[str]) -> bool:
        """Allow one thing more; whether there was one."""
        if buffers - self.narrow:
            self.narrow |= buffers
        elif self.made is None:
            self.made = TRACE_DTYPE
        elif not self.mixed:
            self.mixed = True
        else:
            return False
        return True


def export(
    model: nn.Module, batch: BatchSpec, loss: Loss | None, fold: Fold | None, static_seq: bool, dtypes: Dtypes
) -> Exported:
    """Export ``model`` with its loss, batch dims symbolic, sequence dims symbolic unless ``static_seq``.

    Raises CannotFoldError when ``fold`` is given and its proof (or anything else) fails; without one, UnsupportedError
    with torch's reason when the model cannot be traced.
    """
    while True:
        try:
            return _export(model, batch, loss, fold, static_seq, dtypes)
        except (AutoparError, CannotFoldError) as error:
            place = raised_in(error)
            # Kinds of it are answered by tracing anew; many say where by themselves.
            if type(error) is not UnsupportedError or not place or "module " in str(error):
                raise
            raise UnsupportedError(f"{error} (in {place})") from error
        except Exception as error:
            # A float32 buffer, or constant, or what is cast to float32 may have met half-precision activations where
            # torch does not promote.
            if any(word in str(error) for word in ("dtype", "scalar type", "bias type", "weight type")):
                every = frozenset(name for name, _ in model.named_buffers(remove_duplicate=False))
                if dtypes.widened(every):
                    continue
            if fold is not None:
                raise CannotFoldError(str(error)) from error
            raise UnsupportedError(_reason(model, error, batch)) from error


def _export(
    model: nn.Module, batch: BatchSpec, loss: Loss | None, fold: Fold | None, static_seq: bool, dtypes: Dtypes
) -> Exported:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    copied = fake_copy(model, fold.stubs(model) if fold else {}, mode, dtypes.narrow)
    replace_experts(copied)
    told = (*forget_averages(copied), *every_stretch(copied), *follow_loops(copied))
    if fold:
        fold.watch(copied)
    with mode:
        tensors = {key: torch.zeros(shape, dtype=batch.dtypes[key]) for key, shape in batch.shapes.items()}
    dynamic = {
        key: {0: Dim.AUTO, **({} if static_seq else dict.fromkeys(batch.seq_dims[key], Dim.AUTO))} for key in tensors
    }
    rows = SortedRows(copied)
    ranges = ValueRanges(copied, small_numbers(model), batch.masks)
    taken = (
        warnings.catch_warnings(),
        unknown_lengths(),
        stopping(),
        scans_whole(copied),
        recurrent_whole(),
        Picks(whole_ctc, last_row, picked_loss),
        casts_traced(),
        masks_unread(),
        bags_taken_apart(),
        data_followed(),
        numbers_kept(),
        whole_numbers_counted(),
        quotients_whole(copied),
        computed_once(),
        mapped_first(),
        StridesFollowed(),
        WideTransforms(),
        RestsTold(copied),
        ranges,
        rows,
        torch.compiler.set_stance("force_eager"),
        default_dtype(dtypes.made),
    )
    with (
        contextlib.ExitStack() as stack,
        watched(copied) as fixed_in,
        every_layer() as skipping,
        checks_passed() as checks,
        MixedDtypes(cast=dtypes.mixed) as products,
    ):
        for context in taken:
            stack.enter_context(context)
        warnings.simplefilter("ignore")  # torch.export's notes about its own internals
        stack.enter_context(_lean(cached=fold is None and sum(1 for _ in model.modules()) > DEEP))
        program = torch.export.export(
            LossOf(copied, loss, ranges.batch), (tensors,), strict=False, dynamic_shapes=(dynamic,)
        )
        unmap(program.graph_module)
    notes = tuple(f"{NOTE} ({', '.join(sorted(skipping))})" for _ in range(bool(skipping)))
    notes += masks_told(ranges.relied) + rows.notes
    notes += (MIXED,) if products.met and dtypes.mixed else ()
    own = next(node.meta["val"] for node in program.graph.nodes if isinstance(node.meta.get("val"), FakeTensor))
    guards = tuple(guard.expr for guard in own.fake_mode.shape_env.guards)
    return Exported(program, fixed_in, told + notes + checks_told(checks), products.met and not dtypes.mixed, guards)


@contextlib.contextmanager
def _lean(cached: bool) -> Iterator[None]:
    """torch.export without what nothing here reads, a third of its time: where in Python each node was made, each
    graph as Python code, and, unless ``cached``, a cache of fake results, which costs few layers more than it saves."""
    fx: Any = fx_config
    before = getattr(fx, "do_not_emit_stack_traces", False)  # torch 2.11 has no such field, and reads none
    fx.do_not_emit_stack_traces = True
    try:
        with _use_lazy_graph_module(True), dynamo.patch(fake_tensor_cache_enabled=cached):
            yield
    finally:
        fx.do_not_emit_stack_traces = before


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """What is made without saying of which dtype is of this one; None: as it is outside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


_OF_SHAPES = (ValueError, RuntimeError, IndexError)
_DATA_DEPENDENT = ("DataDependent", "data-dependent", "Could not guard", "Could not extract")


def _reason(model: nn.Module, error: Exception, batch: BatchSpec) -> str:
    place = raised_in(error)
    if any(word in f"{type(error).__name__} {error}" for word in _DATA_DEPENDENT):
        return f"torch.export cannot trace {type(model).__name__}: {place or 'the model'} {from_values()}"
    if told := refused_samples(error):
        return f"torch.export cannot trace {type(model).__name__}: in {place or 'the model'}: {told}"
    if "FlexAttention" in str(error):
        return (
            f"{place or 'the model'} calls flex_attention, which autopar cannot take apart: write what it does to "
            "scores as a mask or bias of torch.nn.functional.scaled_dot_product_attention, or make a function of it a "
            "leaf (autopar.leaf)"
        )
    lines = str(error).strip().splitlines() or [type(error).__name__]
    where = f"in {place}: " if place else ""
    shapes = (f"{key} [{', '.join(map(str, ('b', *shape[1:])))}]" for key, shape in batch.shapes.items())
    given = f" (traced with {', '.join(shapes)}: inputs are of one sample)" if isinstance(error, _OF_SHAPES) else ""
    return f"torch.export cannot trace {type(model).__name__}: {where}{type(error).__name__}: {lines[0]}{given}"
