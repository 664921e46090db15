"""`embedded:python-tests`: test files, a domain beside the library files of `embedded:python-source`.

They come from the standard library's `test` package, where the interpreter has it, and from numpy, which is always
installed. A file's split is a hash of its path. A document is an excerpt of a file, from its first class or function on
(what stands above is imports and a licence): about a million tokens to train on and few enough to score in a minute.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from brickyard.core.errors import BadData
from brickyard.embedded.python_source import FEWEST, _decoded, _side

FOLDERS = frozenset({"test", "tests", "idle_test"})
LONGEST = 200_000  # bytes of a file; longer ones are mostly tables
EXCERPT = 4000  # characters of a document, to the end of a line
MOST = {"validation": 40, "test": 100}  # documents, the first by their hashes
_FIRST = re.compile(r"^(?:@|class |def |async def )", re.MULTILINE)


def splits(roots: tuple[Path, ...] | None = None) -> dict[str, dict[str, list]]:
    """Return {"train" | "validation" | "test": {"text": [excerpts]}}: of 8, 1 and 1 files of ten.

    Args:
        roots: folders to look into; by default the running interpreter's standard library and numpy.

    Raises:
        BadData: too few test files are installed.
    """
    roots = roots or _roots()
    sides: dict[str, dict[str, None]] = {"train": {}, "validation": {}, "test": {}}
    seen: set[str] = set()
    for root in roots:
        for inside, path in _files(root):
            text = excerpt(_decoded(path.read_bytes()))
            if text.strip() and text not in seen:
                seen.add(text)
                sides[_side(f"{root.name}/{inside}")][text] = None
    for split, texts in sides.items():
        if len(texts) < FEWEST:
            raise BadData(
                f"embedded:python-tests found {len(texts)} test files for {split} (needed: {FEWEST}) in "
                f"{', '.join(str(root) for root in roots)}. Install numpy with its tests, or a Python with its own."
            )
    return {split: {"text": _some(list(texts), MOST.get(split))} for split, texts in sides.items()}


def excerpt(source: str) -> str:
    """Return up to EXCERPT characters of whole lines from the first class or function on, or from the start."""
    found = _FIRST.search(source)
    text = source[found.start() if found else 0 :][: EXCERPT + 1]
    return text if len(text) <= EXCERPT else text[: text.rfind("\n", 0, EXCERPT) + 1] or text[:EXCERPT]


def _some(texts: list[str], most: int | None) -> list[str]:
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())[:most]


def _roots() -> tuple[Path, ...]:
    spec = importlib.util.find_spec("numpy")
    places = spec.submodule_search_locations if spec else None
    return (Path(sysconfig.get_paths()["stdlib"]), *(Path(place) for place in places or ()))


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if {"site-packages", "dist-packages", "__pycache__"} & set(inside.parts):
            continue
        # Other files beside the tests are their data, some of them broken on purpose.
        test = path.name.startswith("test") and not FOLDERS.isdisjoint(inside.parts[:-1])
        if not test or path.stat().st_size > LONGEST:
            continue
        yield inside.as_posix(), path
