"""Brickyard: which way of adapting a pre-trained model should I use here, and did it really work?"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from typing import Any

__version__ = "0.1.0"
__all__ = [
    "audit",
    "check",
    "compare",
    "data",
    "evaluate",
    "grow",
    "load",
    "merge",
    "plan",
    "predict",
    "route",
    "run",
    "shrink",
    "tune",
    "verify",
]


def __getattr__(name: str) -> Any:
    # Lazy, so that `brickyard --help` never imports torch.
    if name in __all__:
        return importlib.import_module("brickyard.core.verb").function_of(name)
    raise AttributeError(f"module 'brickyard' has no attribute {name!r}")


class _AfterPeft(importlib.abc.MetaPathFinder):
    """Registers our PEFT type as soon as the user's program imports peft, without importing it for everyone else."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != "peft":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("peft")
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                importlib.import_module("brickyard.core.inject").register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "peft" in sys.modules:
    importlib.import_module("brickyard.core.inject").register()
elif not any(type(finder).__name__ == "_AfterPeft" for finder in sys.meta_path):
    sys.meta_path.insert(0, _AfterPeft())
