"""What `brickyard check --base` and `--data` change of a measurement: it says so itself, so that neither is ignored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from brickyard.core.errors import UsageError

WORDS = {"base": "a model", "data": "material"}


def takes(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a measurement as one of what its claim names under `names`, of "base" and "data"."""

    def marked(function: Callable[..., Any]) -> Callable[..., Any]:
        function.takes = frozenset(names)  # type: ignore[attr-defined]
        return function

    return marked


def taken(function: Callable[..., Any]) -> frozenset[str]:
    """Return which of "base" and "data" a measurement takes from its claim; none where it says nothing."""
    return getattr(function, "takes", frozenset())


def left_alone(names: frozenset[str] | set[str]) -> str:
    """Return the words for options that did not change a measurement."""
    return "; ".join(f"measured on {WORDS[n]} of its own, which --{n} does not change" for n in sorted(names))


def refuse(method: str, given: set[str], used: set[str]) -> None:
    """Raise UsageError for an option that no claim of the method takes."""
    for name in sorted(given - used):
        raise UsageError(
            f"check {method} was given --{name}, but every claim of it is {left_alone({name})}; leave --{name} out."
        )
