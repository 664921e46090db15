"""`embedded:stdlib-topics`: docstrings of this interpreter's standard library, labelled with their topic.

The label is the chapter of the Python library reference that lists the module; chapters too small to learn from are
merged with a neighbour. Modules since removed or deprecated stay in the chapter that described them. The rows are split
by source file, so no file stands on two sides, and nothing depends on hash order or on the clock.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import sys
import sysconfig
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

from brickyard.core.errors import BadData, DiskFull, UnsafeFile
from brickyard.core.files import cache_folder, read_json, write_json

WORDS = 60  # of a text at most: a batch has about 64 tokens a row
CHARACTERS = 400  # of a text at most, in whole words; drawn tables would else be hundreds of tokens
SHORTEST = 8  # words of a text; shorter ones ("Clear the cache.") seldom tell their topic
SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}
LARGEST_CLASS = 0.25  # of the rows of a split
FEWEST = {"train": 40, "validation": 4, "test": 10}  # rows of a class in a split, else the library is incomplete
LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "__pycache__"})

# Topic -> top-level modules. Private modules stand with the public module that they implement.
MODULES = {
    "concurrency and networking": (
        "threading _threading_local multiprocessing concurrent subprocess sched queue contextvars dummy_threading",
        "asyncio socket ssl selectors asyncore asynchat signal",
    ),
    "development tools": (
        "typing pydoc doctest unittest lib2to3",
        "bdb pdb profile cProfile pstats timeit trace tracemalloc _pyrepl",
        "distutils ensurepip venv zipapp",
    ),
    "files and operating system": (
        "pathlib posixpath ntpath genericpath nturl2path fileinput stat filecmp tempfile glob fnmatch linecache shutil",
        "pickle _compat_pickle copyreg shelve dbm sqlite3",
        "gzip bz2 lzma _compression compression zipfile tarfile",
        "csv configparser tomllib netrc plistlib xdrlib",
        "hashlib hmac secrets crypt",
        "os io _pyio argparse optparse getopt logging getpass curses platform ctypes _aix_support _osx_support",
        "pty tty pipes",
    ),
    "graphical interfaces and media": (
        "tkinter idlelib",
        "turtle turtledemo cmd shlex",
        "wave aifc sunau chunk colorsys imghdr sndhdr",
    ),
    "internet and markup": (
        "email json mailcap mailbox mimetypes base64 binhex quopri uu",
        "html xml _markupbase",
        "webbrowser wsgiref urllib http ftplib poplib imaplib smtplib smtpd uuid socketserver xmlrpc ipaddress",
        "cgi cgitb nntplib telnetlib",
    ),
    "language and runtime": (
        "sysconfig warnings _py_warnings dataclasses contextlib abc _py_abc traceback inspect site _sitebuiltins",
        "code codeop zipimport pkgutil modulefinder runpy importlib imp",
        "ast symtable token keyword tokenize tabnanny pyclbr py_compile compileall dis opcode _opcode_metadata",
        "pickletools annotationlib",
    ),
    "text and data types": (
        "string re sre_compile sre_constants sre_parse difflib textwrap stringprep rlcompleter struct codecs",
        "gettext locale",
        "datetime _pydatetime zoneinfo calendar _strptime collections _collections_abc heapq bisect",
        "weakref _weakrefset types copy pprint reprlib enum graphlib",
        "numbers decimal _pydecimal fractions random statistics functools operator",
    ),
}
_TOPIC_OF = {module: topic for topic, lines in MODULES.items() for line in lines for module in line.split()}


def splits(library: Path | None = None) -> dict[str, dict[str, list]]:
    """Collect, split and cap the docstrings, or take them from the cache: parsing takes some seconds.

    Args:
        library: folder of the standard library's sources; by default the running interpreter's own.

    Returns:
        {"train" | "validation" | "test": {"text": [...], "label": [topic names]}}.

    Raises:
        BadData: the interpreter comes without (all of) its library's sources.
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    return _kept("stdlib-topics", _key(library, __file__), lambda: build(library))


def _kept(name: str, key: str, build: Callable[[], dict[str, dict[str, list]]]) -> dict[str, dict[str, list]]:
    """Return what `build` makes from the cache, where it is made once."""
    entry = cache_folder() / "embedded" / f"{name}-{key[:32]}.json"
    try:
        return read_json(entry)
    except (OSError, UnsafeFile):
        built = build()  # absent, or damaged: made and written anew
    # Without room for the cache, the data are as good.
    with contextlib.suppress(OSError, DiskFull):
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_json(entry, built)
    return built


def build(library: Path) -> dict[str, dict[str, list]]:
    """Collect, split and cap the docstrings of a library; see `splits`."""
    by_topic: dict[str, dict[str, list[str]]] = {topic: {} for topic in MODULES}
    for file, topic, text in _unambiguous(_documented(library)):
        by_topic[topic].setdefault(file, []).append(text)
    sides: dict[str, dict[str, list[str]]] = {split: {} for split in SHARES}
    for topic, files in by_topic.items():
        for split, texts in _by_file(files).items():
            sides[split][topic] = texts
            if len(texts) < FEWEST[split]:
                raise BadData(
                    f"embedded:stdlib-topics needs the sources of the whole standard library, but {str(library)!r} "
                    f"gives {len(texts)} rows of the topic {topic!r} for {split}; needed: {FEWEST[split]}. "
                    "Use a Python with its full library (some systems ship parts such as tkinter apart)."
                )
    return {split: _capped(topics) for split, topics in sides.items()}


def _key(library: Path, *code: str) -> str:
    """Digest of what the rows depend on: files of code, the interpreter's parser, and the library's files by size."""
    digest = hashlib.sha256(b"".join(Path(file).read_bytes() for file in code) + sys.version.encode())
    for path, _topic in _files(library):
        digest.update(f"{path.relative_to(library).as_posix()} {path.stat().st_size}\n".encode())
    return digest.hexdigest()


def topic_of(file: str) -> str | None:
    """Name the topic of a source file (its path inside the library, with `/`), or None where it has none."""
    return _TOPIC_OF.get(file.split("/")[0].removesuffix(".py"))


def _files(library: Path) -> Iterator[tuple[Path, str]]:
    """Yield the source files that have a topic, with it, in the order of modules and paths."""
    for module, topic in sorted(_TOPIC_OF.items()):
        package = library / module
        for path in sorted(package.rglob("*.py")) if package.is_dir() else [library / f"{module}.py"]:
            if LEFT_OUT.isdisjoint(path.relative_to(library).parts) and path.is_file():
                yield path, topic


def _documented(library: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (file, topic, text) for every docstring, in the order of files and lines."""
    for path, topic in _files(library):
        for docstring in docstrings(path.read_bytes()):
            if text := opening(docstring):
                yield path.relative_to(library).as_posix(), topic, text


def docstrings(source: bytes) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and its functions."""
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        defines = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if defines and (text := ast.get_docstring(node)):
            yield text
        # Only statements can hold definitions; expressions, most of the tree, need no visit.
        pending.extend(child for child in reversed(list(ast.iter_child_nodes(node))) if _may_hold(child))


def _may_hold(node: ast.AST) -> bool:
    return isinstance(node, ast.stmt | ast.ExceptHandler) and not isinstance(node, ast.Expr | ast.Assign | ast.Return)


def opening(docstring: str) -> str:
    """Shorten a docstring to as many paragraphs as give `SHORTEST` words (else ""), within `WORDS` and `CHARACTERS`."""
    words: list[str] = []
    for paragraph in docstring.split("\n\n"):
        words += paragraph.split()
        if len(words) >= SHORTEST:
            return textwrap.shorten(" ".join(words[:WORDS]), CHARACTERS, placeholder="")
    return ""


def _unambiguous(rows: Iterator[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Keep the first of equal texts, and none of those that stand in two topics."""
    first: dict[str, tuple[str, str, str]] = {}
    ambiguous: set[str] = set()
    for row in rows:
        kept = first.setdefault(row[2], row)
        if kept[1] != row[1]:
            ambiguous.add(row[2])
    return [row for text, row in first.items() if text not in ambiguous]


def _by_file(files: dict[str, list[str]]) -> dict[str, list[str]]:
    """Give each file, in the order of a hash, to the split that lacks the largest part of its share and has room."""
    total = sum(len(texts) for texts in files.values())
    share = {split: part * total for split, part in SHARES.items()}
    sides: dict[str, list[str]] = {split: [] for split in SHARES}
    for _file, texts in sorted(files.items(), key=lambda item: _shuffled(item[0])):
        room = [split for split in SHARES if len(sides[split]) + len(texts) <= share[split]] or ["train"]
        sides[max(room, key=lambda split: 1 - len(sides[split]) / share[split])] += texts
    return sides


def _capped(topics: dict[str, list[str]]) -> dict[str, list]:
    """Thin out the largest topics to `LARGEST_CLASS` and mix the rows, both by a hash of the text."""
    limit = max(len(texts) for texts in topics.values())
    while limit > LARGEST_CLASS * sum(min(len(texts), limit) for texts in topics.values()):
        limit -= 1
    rows = [(text, topic) for topic, texts in topics.items() for text in sorted(texts, key=_shuffled)[:limit]]
    rows.sort(key=lambda row: _shuffled(row[0]))
    return {"text": [text for text, _ in rows], "label": [topic for _, topic in rows]}


def _shuffled(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
