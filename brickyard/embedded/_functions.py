"""Functions of the standard library that say in a docstring what they do: what the embedded text tasks are made of."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from brickyard.core.errors import BadData
from brickyard.embedded.python_source import LEFT_OUT, _decoded, _side

SPLITS = ("train", "validation", "test")
LONGEST = 300  # bytes of a signature or summary; longer ones are mostly tables of options
SHORTEST = 15  # bytes of a summary; shorter ones say nothing ("See above.")
FEWEST = 100  # functions of a split, else the library is incomplete


@dataclass(frozen=True)
class Function:
    """One function: the file it stands in, its `def` line, and the first paragraph of its docstring on one line."""

    file: str
    signature: str
    summary: str

    @property
    def prompt(self) -> str:
        """The signature and the opening of the docstring, as they stand in a source file."""
        return f'{self.signature}\n    """'


def functions(name: str, library: Path | None = None) -> dict[str, list[Function]]:
    """Return the documented functions of each split, by the split of their file; every summary stands once.

    Args:
        name: of the embedded set, for the message.
        library: folder of the standard library's sources; by default the running interpreter's own.

    Raises:
        BadData: too few functions are found.
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    out: dict[str, list[Function]] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if not LEFT_OUT.isdisjoint(inside.parts):
            continue
        for found in _documented(_decoded(path.read_bytes()), inside.as_posix()):
            if found.summary not in seen:
                seen.add(found.summary)
                out[_side(found.file)].append(found)
    for split, rows in out.items():
        if len(rows) < FEWEST:
            raise BadData(
                f"embedded:{name} needs the sources of the standard library, but {str(library)!r} gives {len(rows)} "
                f"documented functions for {split} (needed: {FEWEST}). Use a Python with its full library."
            )
    return out


def _documented(text: str, file: str) -> Iterator[Function]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old files
        try:
            tree = ast.parse(text)
        except SyntaxError:  # a template, or code of another version
            return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        summary = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        signature = f"def {node.name}({ast.unparse(node.args)}):"
        if SHORTEST <= len(summary.encode()) <= LONGEST and len(signature.encode()) <= LONGEST and '"""' not in summary:
            yield Function(file, signature, summary)


def neighbours(rows: list[Function], count: int) -> Iterator[tuple[Function, list[Function]]]:
    """Yield each function with the `count` others of its file whose summaries are nearest in length.

    Files with fewer functions are left out. Nearness in length keeps a model from telling the right one by its length.
    """
    by_file: dict[str, list[Function]] = {}
    for row in rows:
        by_file.setdefault(row.file, []).append(row)
    for group in by_file.values():
        if len(group) <= count:
            continue
        for row in group:
            others = [other for other in group if other is not row]
            others.sort(key=lambda o, r=row: (abs(len(o.summary) - len(r.summary)), o.summary))
            yield row, others[:count]


def draw(text: str, count: int) -> int:
    """Return a number below `count` that depends on `text` alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % count
