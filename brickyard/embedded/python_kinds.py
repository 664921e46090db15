"""`embedded:python-kinds`: four kinds of Python text, as prompts labelled by what a model must be capable of.

docstrings (of modules, classes and functions of the standard library, without code), numeric (its modules for numbers
and dates), parsers (those that read and write text formats), and tests (test files of the standard library and numpy).
Code of the three is cut in the same way, so that no kind shows by where its documents begin.
A file stands in train or in test with all that was taken from it, and both sides have about as many documents of each
kind. `embedded:pylm` and its small sisters have seen some of the library's files, and none of the tests.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from brickyard.core.errors import BadData
from brickyard.embedded import _specialities, python_tests
from brickyard.embedded.python_source import _decoded

MOST = 150  # documents of a kind on a side, the first by their hashes
FEWEST = 50  # else the library is incomplete
SHORTEST = 300  # characters of a document
EXCERPT = 1000  # characters of a document, to the end of a line


def splits(library: Path | None = None) -> dict[str, dict[str, list]]:
    """Return {"train" | "test": {"text": [documents], "label": [docstrings, numeric, parsers or tests]}}.

    Args:
        library: folder of the standard library's sources; by default the running interpreter's own.

    Raises:
        BadData: the interpreter comes without (all of) its library's sources, or without tests.
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    out: dict[str, dict[str, list]] = {side: {"text": [], "label": []} for side in ("train", "test")}
    for kind, by_file in _kinds(library).items():
        for side, texts in _dealt(by_file).items():
            if len(texts) < FEWEST:
                raise BadData(
                    f"embedded:python-kinds found {len(texts)} documents of {kind} for {side} (needed: {FEWEST}) in "
                    f"{str(library)!r}. Use a Python with its full library and numpy with its tests."
                )
            out[side]["text"] += texts
            out[side]["label"] += [kind] * len(texts)
    return out


def _kinds(library: Path) -> dict[str, dict[str, list[str]]]:
    """Return the documents of each kind by their file."""
    found: dict[str, dict[str, list[str]]] = {kind: {} for kind in ("docstrings", "numeric", "parsers", "tests")}
    modules = {kind: set(_specialities.MODULES[name].split()) for kind, name in (("numeric",) * 2, ("parsers", "text"))}
    for inside, path in _specialities._files(library):
        source = _decoded(path.read_bytes())
        name = inside.split("/")[0].removesuffix(".py")
        kind = next((kind for kind, names in modules.items() if name in names), None)
        if kind is None:
            # Prose of other modules: what those two are about would tell them apart by their subject.
            found["docstrings"][inside] = [_excerpt(text) for text in _docstrings(source)]
        else:
            found[kind][inside] = [_excerpt(text) for text in _specialities.documents(source)]
    for root in python_tests._roots():
        for inside, path in python_tests._files(root):
            pieces = _specialities.documents(_decoded(path.read_bytes()))
            found["tests"][f"{root.name}/{inside}"] = [_excerpt(text) for text in pieces]
    return found


def _docstrings(source: str) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old files
        try:
            tree = ast.parse(source)
        except SyntaxError:  # a template, or code of another version
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def _excerpt(text: str) -> str:
    text = text.strip("\n")
    return text if len(text) <= EXCERPT else text[: text.rfind("\n", 0, EXCERPT) + 1] or text[:EXCERPT]


def _dealt(by_file: dict[str, list[str]]) -> dict[str, list[str]]:
    """Deal files out to the side with fewer documents so far, in the order of their names' hashes."""
    sides: dict[str, dict[str, None]] = {"train": {}, "test": {}}
    seen: set[str] = set()
    for file in sorted(by_file, key=_digest):
        texts = [text for text in dict.fromkeys(by_file[file]) if len(text) >= SHORTEST and text not in seen]
        seen.update(texts)
        sides[min(sides, key=lambda side: len(sides[side]))].update(dict.fromkeys(texts))
    return {side: sorted(texts, key=_digest)[:MOST] for side, texts in sides.items()}


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
