"""Import an emitted folder into this process, any number of them one after another."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

_TOP_LEVEL = ("train", "module", "runtime")


def load_train(folder: Path) -> ModuleType:
    """The folder's train.py as a module (``.module`` is its module.py); leaves no trace in ``sys.modules``.

    The emitted files import each other as ``module`` and ``runtime``: names that a second folder, or the caller, may
    use for something else.
    """
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in _TOP_LEVEL}
    written = sys.dont_write_bytecode
    sys.path.insert(0, str(folder.resolve()))
    sys.dont_write_bytecode = True
    importlib.invalidate_caches()
    try:
        return importlib.import_module("train")
    finally:
        sys.dont_write_bytecode = written
        sys.path.remove(str(folder.resolve()))
        for name in [name for name in sys.modules if name.split(".")[0] in _TOP_LEVEL]:
            del sys.modules[name]
        sys.modules.update(kept)
