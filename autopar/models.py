"""MODEL strings: a catalog name, a Hugging Face ``config.json``, or ``module.py:function``."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from autopar.errors import AutoparError, BadInputError
from autopar.graph.cache import cached_graph
from autopar.graph.ir import ModelGraph
from autopar.recent import Recent

if TYPE_CHECKING:
    from torch import nn

ARCHITECTURES = Path(__file__).parent / "catalog" / "architectures"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model on meta, and the example inputs and loss that its function gave with it."""

    model: nn.Module
    name: str
    inputs: Mapping[str, Any] | None = None
    loss: Callable[..., Any] | None = None


def catalog_names() -> tuple[str, ...]:
    """The architectures that come with autopar."""
    return tuple(sorted(path.stem for path in ARCHITECTURES.glob("*.yaml")))


def load_model(spec: str) -> nn.Module:
    """The model that ``spec`` names, on meta (no memory). Raises BadInputError."""
    return load(spec).model


def load(spec: str) -> LoadedModel:
    """`load_model` with the inputs and loss that a ``module.py:function`` may return along with its model."""
    path, colon, function = spec.rpartition(":")
    if colon and path.endswith(".py"):
        return _from_function(Path(path), function)
    name, config = _named_config(spec)
    return LoadedModel(_from_config(config, spec), name)


def build_config(spec: str, **changes: Any) -> nn.Module:
    """The model of a catalog name or config file, with some configuration fields changed, on meta."""
    name, config = _named_config(spec)
    return _from_config({**config, **changes}, name)


def model_graph(
    model: nn.Module | str, inputs: Mapping[str, Any] | None = None, loss: Callable[..., Any] | None = None
) -> ModelGraph:
    """The traced graph of a module or MODEL string; see `autopar.graph.trace.trace` for ``inputs`` and ``loss``.

    Graphs of catalog names and config files are kept in `autopar.graph.cache.cache_dir`, so that planning them again
    imports neither transformers nor torch.export. Raises BadInputError or UnsupportedError.
    """
    if not isinstance(model, str):
        return _trace(LoadedModel(model, type(model).__name__, inputs, loss))
    path, colon, _ = model.rpartition(":")
    if inputs is not None or loss is not None or (colon and path.endswith(".py")):
        loaded = load(model)
        return _trace(LoadedModel(loaded.model, loaded.name, inputs or loaded.inputs, loss or loaded.loss))
    name, config = _named_config(model)
    return cached_graph(
        name, {"name": name, "config": config}, lambda: _trace(LoadedModel(_from_config(config, model), name))
    )


_traced: Recent[ModelGraph] = Recent(16)
"""Graphs of modules by `autopar.graph.model_key`: a module is searched for, verified and emitted by one trace."""


def _trace(loaded: LoadedModel) -> ModelGraph:
    from autopar.graph.model_key import model_key
    from autopar.graph.plain_modules import check_plain
    from autopar.graph.trace import trace

    check_plain(loaded.model)

    def traced() -> ModelGraph:
        with _quiet(sys.modules.get("transformers")):
            return trace(loaded.model, inputs=loaded.inputs, loss=loaded.loss, name=loaded.name)

    key = model_key(loaded.model, loaded.inputs, loaded.loss)
    return traced() if key is None else _traced.get((key, loaded.name), traced)


def _named_config(spec: str) -> tuple[str, dict[str, Any]]:
    """(name, configuration) of a catalog entry or a config file."""
    if spec in catalog_names():
        return spec, _catalog(spec)
    path = Path(spec)
    if path.suffix == ".json" or path.is_dir():
        file = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(file.read_text(), object_hook=_special_float)
        except OSError as error:
            raise BadInputError(f"cannot read the model configuration {file}: {error.strerror}") from None
        except ValueError as error:
            raise BadInputError(f"{file} is not JSON: {error}") from None
        if not isinstance(config, dict) or "model_type" not in config:
            raise BadInputError(f"{file} is not a Hugging Face model configuration: it has no model_type")
        return file.stem if file.stem != "config" else file.resolve().parent.name or config["model_type"], config
    close = difflib.get_close_matches(spec, catalog_names(), n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise BadInputError(
        f"unknown model {spec!r}: {hint}A model is a catalog name ({', '.join(catalog_names())}), "
        "a Hugging Face config.json, or module.py:function"
    )


def _special_float(found: dict[str, Any]) -> Any:
    """What transformers writes of a number that JSON does not have: ``{"__float__": "Infinity"}``."""
    written = found.get("__float__")
    return float(written) if len(found) == 1 and isinstance(written, str) else found


@cache
def _catalog(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ARCHITECTURES / f"{name}.yaml").read_text())["config"]
    return config


def _from_config(config: Mapping[str, Any], spec: str) -> nn.Module:
    """A Hugging Face model for causal language modelling (or the class that the configuration names), on meta."""
    try:
        import transformers
    except ImportError:
        raise BadInputError(
            f"model {spec!r} is built by transformers, which is missing: pip install autopar[hf]"
        ) from None
    import torch

    fields = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    names = config.get("architectures") or []
    with _quiet(transformers), torch.device("meta"):
        try:
            built = transformers.AutoConfig.for_model(config["model_type"], **fields)
            if names and hasattr(transformers, names[0]):
                return getattr(transformers, names[0])(built)  # type: ignore[no-any-return]
            return transformers.AutoModelForCausalLM.from_config(built)  # type: ignore[no-any-return, no-untyped-call]
        except Exception as error:  # transformers and its validators raise many kinds
            raise BadInputError(f"transformers cannot build {spec!r}: {error}") from error


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' advice about configurations that we did not write."""
    if transformers is None:  # not imported: nothing to keep quiet
        yield
        return
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def _first(made: Any) -> Any:
    return made[0] if isinstance(made, tuple) and made else made


def _lost_buffers(model: nn.Module) -> bool:
    """Whether ``model``, made on meta, has buffers whose values cannot be told from it."""
    from autopar.graph.buffers import value_of

    names = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    return any(value_of(model, name) is None for name in names)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """While open, what modules register as parameters goes to meta at once; buffers are made as written."""
    from torch import nn

    plain = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        plain(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]


def _from_function(path: Path, function: str) -> LoadedModel:
    import torch
    from torch import nn

    if not path.is_file():
        raise BadInputError(f"no file {path} (model {path}:{function})")
    specification = importlib.util.spec_from_file_location(path.stem, path)
    if specification is None or specification.loader is None:
        raise BadInputError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(specification)
    sys.modules.setdefault(path.stem, module)
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        specification.loader.exec_module(module)
        build = getattr(module, function, None)
        if not callable(build):
            raise BadInputError(f"{path} has no function {function!r}")
        with torch.device("meta"):
            made = build()
        if isinstance(_first(made), nn.Module) and _lost_buffers(_first(made)):
            with _parameters_on_meta():
                made = build()
    except AutoparError:
        raise
    except Exception as error:
        raise BadInputError(f"{path}:{function} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    parts = made if isinstance(made, tuple) else (made,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], nn.Module):
        raise BadInputError(
            f"{path}:{function} must return a torch.nn.Module, or (module, inputs), or (module, inputs, loss); "
            f"got {type(made).__name__}"
        )
    return LoadedModel(parts[0], function, *parts[1:])
