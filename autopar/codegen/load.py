"""Emitted module text as a Python module in this process: the same text that a folder would hold."""

from __future__ import annotations

import hashlib
import linecache
import sys
from types import ModuleType


def load_module(source: str, name: str = "") -> ModuleType:
    """Run ``module.py`` text with autopar's own copy of the runtime. The module is not put into ``sys.modules``
    under a name that could be imported by accident, but is found by pickling and by tracebacks."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    name = name or f"autopar_emitted_{digest}"
    path = f"<{name}.py>"
    text = source.replace("\nfrom runtime.", "\nfrom autopar.codegen.runtime.")
    module = ModuleType(name)
    module.__file__ = path
    linecache.cache[path] = (len(text), None, text.splitlines(keepends=True), path)
    sys.modules[name] = module
    exec(compile(text, path, "exec"), module.__dict__)
    return module
