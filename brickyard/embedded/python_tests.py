"""`embedded:python-tests`: test files, a domain beside the library files of `embedded:python-source`.

They come from the standard library's `test` package, where the interpreter has it, and from numpy, which is always
installed. A file's split is a hash of its path.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from brickyard.core.errors import BadData
from brickyard.embedded.python_source import FEWEST, _decoded, _side

FOLDERS = frozenset({"test", "tests", "idle_test"})
LONGEST = 200_000  # bytes of a file; longer ones are mostly tables


def splits(roots: tuple[Path, ...] | None = None) -> dict[str, dict[str, list]]:
    """Return {"train" | "validation" | "test": {"text": [whole files]}}: 8, 1 and 1 files of ten.

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
            text = _decoded(path.read_bytes())
            if text.strip() and text not in seen:
                seen.add(text)
                sides[_side(f"{root.name}/{inside}")][text] = None
    for split, texts in sides.items():
        if len(texts) < FEWEST:
            raise BadData(
                f"embedded:python-tests found {len(texts)} test files for {split} (needed: {FEWEST}) in "
                f"{', '.join(str(root) for root in roots)}. Install numpy with its tests, or a Python with its own."
            )
    return {split: {"text": list(texts)} for split, texts in sides.items()}


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
