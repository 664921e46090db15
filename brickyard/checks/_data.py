"""Which data a claim is measured on: a public set beside the checkout, or an embedded one that is always there.

Claim(data="trec|embedded:stdlib-topics")      the first that is at hand; a bare name is a folder of `SHARED`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from brickyard.core import readers
from brickyard.core.errors import BadData
from brickyard.core.inputs import input_of, plain

SHARED = Path("..") / "shared" / "data"  # where the public sets for tests and benchmarks lie, beside a checkout


def at_hand(names: str) -> str:
    """Return the first of the data sets `names`, which `|` separates, that is here; BadData names what is not."""
    for name in names.split("|"):
        if ":" in name or "/" in name:
            return name
        if (SHARED / name).is_dir():
            return str(SHARED / name)
    raise BadData(f"no folder {SHARED}/{names.replace('|', f' or {SHARED}/')} is here; put it there, or give --data.")


def same_input(a: Any, b: Any) -> bool:
    """Whether two data sets hold the same kind of input (texts, pairs, images, ...), so that one can replace another.

    a, b: as `read_data` takes them.
    """
    kinds = []
    for spec in (a, b):
        source = readers.read(spec)
        kinds.append(input_of(source, not plain(source)))
    return kinds[0] == kinds[1]
