"""Specialities of the standard library: documents of its modules by what they are for, and general ones beside them.

A document is a piece of a module, of up to EXCERPT characters, from its first class or function on (what stands above
is imports and a licence). Which modules belong to which speciality is written below.

A speciality has few files, so its documents are split by a hash of their text. `embedded:pylm` and its small sisters
have seen some of those files once, as they have seen the rest of the library: what an expert gains is gained on top.
General documents are of all other modules, and their split is that of their file in `embedded:python-source`, so that
none that is scored was in those models' training.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from brickyard.core.errors import BadData
from brickyard.embedded.python_source import LEFT_OUT, _decoded, _side
from brickyard.embedded.python_tests import _FIRST

MODULES = {
    "network": "asyncio http urllib xmlrpc wsgiref socket socketserver ssl selectors smtplib smtpd imaplib poplib "
    "nntplib ftplib telnetlib ipaddress email mailbox webbrowser asyncore asynchat",
    "numeric": "_pydecimal decimal fractions statistics random numbers datetime calendar zoneinfo heapq bisect "
    "colorsys _pylong _strptime turtle turtledemo",
    "text": "re _sre difflib textwrap string html xml json csv configparser tomllib plistlib tokenize shlex gettext "
    "locale codecs pprint reprlib stringprep quopri base64 _markupbase lib2to3",
}
EXCERPT, SHORTEST = 2000, 200  # characters of a document
MOST = {"validation": 40, "test": 60}  # documents, the first by their hashes
FEWEST = 20  # documents of a split, else the library is incomplete


def splits_of(speciality: str, library: Path | None = None) -> dict[str, dict[str, list]]:
    """Return {"train" | "validation" | "test": {"text": [documents]}} of network, numeric, text or general.

    Args:
        speciality: one of MODULES, or "general".
        library: folder of the standard library's sources; by default the running interpreter's own.

    Raises:
        BadData: the interpreter comes without (all of) its library's sources.
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    names = set(MODULES.get(speciality, " ".join(MODULES.values())).split())
    sides: dict[str, dict[str, None]] = {"train": {}, "validation": {}, "test": {}}
    seen: set[str] = set()
    for inside, path in _files(library):
        if (inside.split("/")[0].removesuffix(".py") in names) != (speciality in MODULES):
            continue
        for text in documents(_decoded(path.read_bytes())):
            if text not in seen:
                seen.add(text)
                sides[_side(text if speciality in MODULES else inside)][text] = None
    for split, texts in sides.items():
        if len(texts) < FEWEST:
            raise BadData(
                f"embedded:python-{speciality} needs the sources of the standard library, but {str(library)!r} gives "
                f"{len(texts)} documents for {split} (needed: {FEWEST}). Use a Python with its full library."
            )
    return {split: {"text": _some(list(texts), MOST.get(split))} for split, texts in sides.items()}


def documents(source: str) -> list[str]:
    """Return a module from its first class or function on, cut at the ends of lines into pieces of EXCERPT characters.

    A last piece that is shorter than SHORTEST is left out, and so is a module without a class or a function.
    """
    found = _FIRST.search(source)
    rest = source[found.start() :] if found else ""
    out = []
    while len(rest) >= SHORTEST:
        end = len(rest) if len(rest) <= EXCERPT else rest.rfind("\n", 0, EXCERPT) + 1 or EXCERPT
        out.append(rest[:end])
        rest = rest[end:]
    return out


def _files(library: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        generated = inside.parts[0].startswith(("_sysconfigdata", "config-")) or inside.name == "sitecustomize.py"
        if not generated and LEFT_OUT.isdisjoint(inside.parts):
            yield inside.as_posix(), path


def _some(texts: list[str], most: int | None) -> list[str]:
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())[:most]
