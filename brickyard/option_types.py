"""How options are read that are not plain text: sizes and positive numbers. Imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

_UNITS = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9, "": 1}


def size(text: str) -> int:
    """Read a memory size such as 4GiB or 500MB."""
    digits = text.rstrip("KMGiBkmgb")
    unit = text[len(digits) :].lower()
    try:
        value = float(digits) * _UNITS[unit]
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write e.g. 4GiB or 500MB") from None
    if not 2**20 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is below 1MiB or not finite")
    return int(value)


def positive(kind: type) -> Callable[[str], Any]:
    """Return a reader of numbers of that kind above 0."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
        return value

    read.__name__ = kind.__name__
    return read
