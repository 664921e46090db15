"""Comparisons: plan, run, verdict, report.

The package bears the name of the function `brickyard.compare`. Whichever of its modules is imported first would put the
package in the function's place, so the package itself can be called and hands the call on.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        return importlib.import_module("brickyard.api").compare(*args, **options)


sys.modules[__name__].__class__ = _Callable
