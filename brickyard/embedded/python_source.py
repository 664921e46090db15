"""`embedded:python-source`: the standard library's own source files, for language models.

A file's split is a hash of its path, so it stays on its side from one Python version to the next. Left out are tests,
what a build generates, tables of character sets, and the documentation's topics.
"""

from __future__ import annotations

import hashlib
import io
import sysconfig
import tokenize
from pathlib import Path

from brickyard.core.errors import BadData

LEFT_OUT = frozenset(
    {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "encodings",
        "pydoc_data",
        "lib-dynload",
    }
)
FEWEST = 20  # files in a split, else the library is incomplete


def splits(library: Path | None = None) -> dict[str, dict[str, list]]:
    """Return {"train" | "validation" | "test": {"text": [whole files]}}: 8, 1 and 1 files of ten.

    Args:
        library: folder of the standard library's sources; by default the running interpreter's own.

    Raises:
        BadData: the interpreter comes without its library's sources.
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    sides: dict[str, dict[str, None]] = {"train": {}, "validation": {}, "test": {}}
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        generated = inside.parts[0].startswith(("_sysconfigdata", "config-")) or inside.name in ("sitecustomize.py",)
        if generated or not LEFT_OUT.isdisjoint(inside.parts):
            continue
        text = _decoded(path.read_bytes())
        if text.strip():
            sides[_side(inside.as_posix())][text] = None
    seen: set[str] = set()
    for split, texts in sides.items():
        for text in [text for text in texts if text in seen]:
            del texts[text]  # a copy of a file of another side
        seen.update(texts)
        if len(texts) < FEWEST:
            raise BadData(
                f"embedded:python-source needs the sources of the standard library, but {str(library)!r} gives "
                f"{len(texts)} files for {split} (needed: {FEWEST}). Use a Python with its full library."
            )
    return {split: {"text": list(texts)} for split, texts in sides.items()}


def _side(file: str) -> str:
    tenth = int.from_bytes(hashlib.sha256(file.encode()).digest()[:8], "big") % 10
    return {8: "validation", 9: "test"}.get(tenth, "train")


def _decoded(source: bytes) -> str:
    encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
    return source.decode(encoding).replace("\r\n", "\n")
