"""Functions of `brickyard`, found when they are called, and packages that bear the name of one.

Python puts a package such as `brickyard.tune` into its parent's namespace as soon as one of its modules is imported, in
the place of the function `brickyard.tune`. So such a package can be called itself, and hands the call on. Imports no
torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

# The others are in brickyard.api.
_ELSEWHERE = {
    "grow": "brickyard.growing",
    "merge": "brickyard.merging.merge",
    "route": "brickyard.routing.route",
    "run": "brickyard.recipe.run",
}


def function_of(verb: str) -> Any:
    """Import and return one of the functions that `brickyard` offers."""
    return getattr(importlib.import_module(_ELSEWHERE.get(verb, "brickyard.api")), verb)


class _Callable(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        return function_of(self.__name__.rpartition(".")[2])(*args, **options)


def make_callable(package: str) -> None:
    """Let the package called `brickyard.VERB` be called like the function."""
    sys.modules[package].__class__ = _Callable
