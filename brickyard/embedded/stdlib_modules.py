"""`embedded:stdlib-modules`: docstrings of this interpreter's standard library, labelled with their module.

Many small classes, for tasks that are described in words (see `questions/stdlib_modules.yaml`). The texts are those of
`embedded:stdlib-topics`; a text that stands in two modules is left out. A module that implements another one in Python
(`_pydecimal`) bears its name. Rows are split by a hash of their text, for many modules are one file.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

from brickyard.core.errors import BadData
from brickyard.embedded import stdlib_topics

LARGEST = 90  # rows of a module, so that none dominates
FEWEST = 10  # rows of a module, else the library is incomplete
_NAMES = (
    "ast asyncio bdb calendar codecs collections concurrent configparser contextlib datetime decimal difflib "
    "doctest email enum functools http idlelib imaplib importlib inspect io ipaddress logging mailbox "
    "multiprocessing optparse pathlib pdb pydoc random shutil smtplib ssl statistics subprocess tarfile threading "
    "tkinter traceback turtle typing unittest urllib wsgiref xml xmlrpc zipfile"
)
MODULES = frozenset(_NAMES.split())
_SHARES = (("train", 60), ("validation", 70), ("test", 100))  # per cent, cumulated


def splits(library: Path | None = None) -> dict[str, dict[str, list]]:
    """Return {"train" | "validation" | "test": {"text": [...], "label": [module names]}}, cached.

    Args:
        library: folder of the standard library's sources; by default the running interpreter's own.

    Raises:
        BadData: the interpreter comes without (all of) its library's sources.
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    key = stdlib_topics._key(library, __file__, stdlib_topics.__file__)
    return stdlib_topics._kept("stdlib-modules", key, lambda: build(library))


def build(library: Path) -> dict[str, dict[str, list]]:
    """Collect, cap and split the docstrings of a library; see `splits`."""
    owner: dict[str, str] = {}
    for file, _topic, text in stdlib_topics._documented(library):
        name = file.split("/")[0].removesuffix(".py").removeprefix("_py").removeprefix("_")
        name = name.removesuffix("_abc")
        owner[text] = name if owner.get(text, name) == name else ""
    of_module: dict[str, list[str]] = {name: [] for name in sorted(MODULES)}
    for text, name in owner.items():
        if name in MODULES:
            of_module[name].append(text)
    for name, texts in of_module.items():
        if len(texts) < FEWEST:
            raise BadData(
                f"embedded:stdlib-modules needs the sources of the whole standard library, but {str(library)!r} gives "
                f"{len(texts)} docstrings of {name} (needed: {FEWEST}). Use a Python with its full library."
            )
    rows = [(text, name) for name, texts in of_module.items() for text in sorted(texts, key=_hashed)[:LARGEST]]
    out: dict[str, dict[str, list]] = {split: {"text": [], "label": []} for split, _ in _SHARES}
    for text, name in sorted(rows, key=lambda row: _hashed(row[0])):
        share = int.from_bytes(_hashed(text)[8:16], "big") % 100
        columns = out[next(split for split, limit in _SHARES if share < limit)]
        columns["text"].append(text)
        columns["label"].append(name)
    return out


def _hashed(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
