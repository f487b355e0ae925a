"""Traced graphs kept on disk, keyed by everything they depend on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from autopar.graph.ir import ModelGraph
from autopar.graph.serialize import model_from_json, model_to_json
from autopar.recent import Recent


def cache_dir() -> Path:
    """``$AUTOPAR_CACHE``, or ``~/.cache/autopar``."""
    return Path(os.environ.get("AUTOPAR_CACHE") or Path.home() / ".cache" / "autopar")


_held: Recent[ModelGraph] = Recent(8)
"""Graphs by file: what is looked up by graph, such as rules, is found again with it."""


def cached_graph(name: str, content: Any, build: Callable[[], ModelGraph]) -> ModelGraph:
    """The graph for ``content`` (JSON values that say what the model is), from disk or from ``build``.

    What this process had last it has again, the same object. A file that cannot be read as a graph is replaced; a
    directory that cannot be written is done without.
    """
    path = cache_dir() / "graphs" / f"{name}-{cache_key(content)}.json"
    return _held.get(path, lambda: _from_disk(path, build))


def _from_disk(path: Path, build: Callable[[], ModelGraph]) -> ModelGraph:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return model_from_json(json.loads(path.read_text()))
    graph = build()
    from autopar.graph.leaves import FOUND  # torch is here by now: it built the graph

    # What was found of a Function by trying it, this process alone knows.
    if not any(node.op in FOUND for kind in graph.kinds.values() for node in kind.graph.of("op")):
        with contextlib.suppress(OSError):
            _write(path, json.dumps(model_to_json(graph), separators=(",", ":")))
    return graph


def cache_key(content: Any) -> str:
    """Sixteen hex digits over ``content``, our own sources, and the versions that shape a trace."""
    parts = {
        "content": content,
        "sources": _sources(),
        "python": list(sys.version_info[:2]),
        **{package: _version(package) for package in ("torch", "transformers")},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)  # reads files, imports nothing
    except metadata.PackageNotFoundError:
        return None


@cache
def _sources() -> str:
    """A hash of the front end's source files."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in sorted([*here.glob("*.py"), here.parent / "models.py"]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _write(path: Path, text: str) -> None:
    """Write so that a reader sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
