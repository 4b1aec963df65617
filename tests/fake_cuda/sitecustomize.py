"""Puts a make-believe CUDA device into every Python process that has this folder in PYTHONPATH; see device.py.

Python imports this module by itself when it starts, so the children of the process that is tested (forkserver,
torchrun, workers of a launcher) see the device too.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType


class AfterTorch(importlib.abc.MetaPathFinder):
    """Imports torch as ever, and installs the device behind it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def then_install(module: ModuleType) -> None:
            execute(module)
            import device

            device.install()

        spec.loader.exec_module = then_install  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, AfterTorch())
