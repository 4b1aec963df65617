"""kitbench: which attention should restore my images, and does k-NN attention do what its paper claims?

From Python (docs/python.md): `attention`, `psnr`, `ssim`, `results` and `run`, imported when they are first used.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

NUMERICS = 1
"""Incremented by hand whenever a change of the code changes a number that a run produces. It is part of every key, so
that results of different code are never mixed. A test compares stored numbers and fails where this was forgotten."""

_PUBLIC = {
    "psnr": ("kitbench.api.arrays", "array_psnr"),
    "ssim": ("kitbench.api.arrays", "array_ssim"),
    "results": ("kitbench.api.runs", "results_table"),
    "run": ("kitbench.api.runs", "run_from_python"),
    "InputError": ("kitbench.errors", "InputError"),
    "RunError": ("kitbench.errors", "RunError"),
}
"""Module and name of what is offered here."""


def __getattr__(name: str) -> Any:
    if name == "attention":
        return importlib.import_module("kitbench.attention")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'kitbench' has no attribute {name!r}; it offers attention, {', '.join(_PUBLIC)}")
    module, attribute = _PUBLIC[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, "attention"})


class _CallablePackage(ModuleType):
    """The package kitbench.attention, which is also the function of that name: see kitbench/api/layers.py."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return importlib.import_module("kitbench.api.layers").attention_layer(*arguments, **options)


class _Kitbench(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        if name == "attention" and isinstance(value, ModuleType):  # Python sets it when the package is imported
            value.__class__ = _CallablePackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Kitbench
