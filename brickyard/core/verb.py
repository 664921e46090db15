"""Packages that bear the name of a function of `brickyard`, such as `brickyard.compare` and `brickyard.tune`.

Python puts a package into its parent's namespace as soon as one of its modules is imported, in the function's place. So
such a package can be called itself, and hands the call on to the function. Imports no torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        return getattr(importlib.import_module("brickyard.api"), self.__name__.rpartition(".")[2])(*args, **options)


def make_callable(package: str) -> None:
    """Let the package called `brickyard.VERB` be called like the function `brickyard.api.VERB`."""
    sys.modules[package].__class__ = _Callable
