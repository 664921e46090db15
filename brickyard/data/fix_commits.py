"""Fixing commits of a git repository as code to train on: the lines, blocks, functions or files as the fix left them.

    brickyard data fix-commits:granularity=function --data REPOSITORY --out DIR
    brickyard tune lora --base MODEL --data DIR --task causal-lm --out RUN

A commit fixes when a word of its subject begins with one of `words`. Of the Python files that it changes, and that
stood before, every edit gives a row: `text` is the fixed code (what a model reads; the changed lines where no block or
function is around them), `before` the code it replaced, beside them `commit`, `file`, `subject`, `cwe` (where the
message names one) and `licence` (the first line of the repository's). Files are dealt to train, validation and test by
their names, so that no file is in two of them. A row whose tokens equal an earlier one's, comments and spaces apart, is
dropped. Merges, tests, commits that change many files (refactoring), large files and files that do not parse once they
are fixed give no row at any granularity; the card counts them.

Source: "An Exploratory Study on Fine-Tuning Large Language Models for Secure Code Generation", arXiv 2408.09078, which
trains on the functions and blocks of fixes in C and C++. Here Python's own parser finds them. Its claim is that of
`secure-code`. Left out: other languages; CVE data bases.
"""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from brickyard.core.errors import BadData, UsageError
from brickyard.core.fixes import GRANULARITIES, parsed, pieces
from brickyard.core.method import Record
from brickyard.core.pool import Outcome, Pool
from brickyard.core.readers import SPLITS, Source

RECORD = Record(
    name="fix-commits",
    family="data",
    title="the fixed code of a git repository's fixing commits",
    paper="Secure Code Generation, arXiv 2408.09078",
    needs=("causal-lm",),
    part_of="secure-code",
)

COLUMNS = ("text", "before", "commit", "file", "subject", "cwe", "licence")
_CWE = re.compile(r"\bCWE-(\d+)\b", re.IGNORECASE)
_TIMEOUT = 60  # seconds that one call of git may take
_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of fix-commits; UsageError outside their ranges."""

    granularity: Literal["line", "block", "function", "file"] = "function"
    """what is taken of each edit: the changed lines, the statements around them, the function, or the whole file"""
    words: tuple[str, ...] = ("fix", "cve", "vulnerab", "security", "injection", "unsafe", "sanitiz")
    """beginnings of words, in any case, one of which the subject of a fixing commit holds; []: every commit fixes"""
    tests: bool = False
    """read test files too (those with `test` in their path)"""
    max_files: int = 10
    """Python files that a fix may change; commits with more are taken for refactoring"""
    max_bytes: int = 200_000
    """size of the largest file that is read"""
    limit: int = 1000
    """fixing commits that are read, the newest first"""
    validation: float = 0.1
    """share of the files that goes to validation"""
    test: float = 0.1
    """share of the files that goes to test"""

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            raise UsageError(f"granularity={self.granularity!r}; expected one of {', '.join(GRANULARITIES)}.")
        if min(self.max_files, self.max_bytes, self.limit) < 1:
            raise UsageError("fix-commits: max_files, max_bytes and limit must be positive.")
        if not (0 <= self.validation < 1 and 0 <= self.test < 1 and self.validation + self.test < 1):
            raise UsageError(
                f"validation={self.validation}, test={self.test}: two shares of the files that leave some to train."
            )


@dataclass(frozen=True)
class Commit:
    """One commit as `git log` tells of it."""

    name: str
    subject: str
    body: str

    @property
    def short(self) -> str:
        return self.name[:10]

    @property
    def cwe(self) -> str:
        found = _CWE.search(f"{self.subject}\n{self.body}")
        return f"CWE-{found[1]}" if found else ""


def source(config: Config, spec: Any, seed: int) -> Source:
    """Read the fixing commits of the repository `spec` and deal their files to the splits.

    Raises BadData where git cannot read it, no commit fixes, or train is left empty.
    """
    made = Source(Path(str(spec)).resolve().name, "git", wanted=COLUMNS)
    skipped: dict[str, list[str]] = defaultdict(list)
    columns: dict[str, dict[str, list]] = {split: {name: [] for name in COLUMNS} for split in SPLITS}
    licence = _licence(spec)
    for commit in _fixing(config, spec):
        for file, before, after in _changed(config, spec, commit, skipped):
            try:
                parsed(after)  # lines and whole files are taken without a parser, but are to be Python all the same
                found = pieces(before, after, config.granularity)
            except BadData:
                skipped["does not parse"].append(f"{file} at {commit.short}")
                continue
            if not found:
                skipped["nothing is left of the code that was changed"].append(f"{file} at {commit.short}")
            for was, now in found:
                row = (now, was, commit.name, file, commit.subject, commit.cwe, licence)
                for name, value in zip(COLUMNS, row, strict=True):
                    columns[_split(config, file, seed)][name].append(value)
    counts = {split: len(columns[split]["text"]) for split in SPLITS}
    if not counts["train"]:
        left = ", ".join(f"{len(of)} {rule}" for rule, of in skipped.items()) or "nothing"
        raise BadData(
            f"fix-commits: no row for train ({counts['validation']} for validation, {counts['test']} for test; not "
            f"read: {left}); give other words=, or lower validation= and test=."
        )
    for split in (split for split in SPLITS if counts[split]):
        made.add(split, f"split {split!r}", "git", COLUMNS, columns[split])
    made.skipped.update(skipped)
    return made


def run(config: Config, pool: Pool) -> Outcome:
    """Drop the rows whose tokens an earlier one has."""
    first: dict[tuple[str, ...], int] = {}
    drops: dict[int, str] = {}
    for row, text in enumerate(pool.texts):
        kept = first.setdefault(tokens(text), row)
        if kept != row:
            drops[row] = f"row {pool.numbered[kept]}"
    rows = np.setdiff1d(np.arange(len(pool)), list(drops))
    named = {"cwe": len([c for c in pool.columns["cwe"] if c]), "commits": len(set(pool.columns["commit"]))}
    return Outcome(rows, {"same tokens": drops} if drops else {}, report=named)


def tokens(code: str) -> tuple[str, ...]:
    """Return the tokens of a piece of Python without comments and layout; its words where it cannot be read."""
    try:
        found = [t.string for t in tokenize.generate_tokens(io.StringIO(code).readline) if t.type not in _LAYOUT]
    except (tokenize.TokenError, SyntaxError):
        return tuple(code.split())
    return tuple(found)


def _split(config: Config, file: str, seed: int) -> str:
    digest = hashlib.blake2b(f"{seed} {file}".encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "little") / 2**64
    if place < config.test:
        return "test"
    return "validation" if place < config.test + config.validation else "train"


def _fixing(config: Config, repository: Any) -> list[Commit]:
    """Return the fixing commits, the newest first."""
    log = _git(repository, "log", "--no-merges", "-z", "--format=%H%n%s%n%b").decode("utf-8", errors="replace")
    commits = []
    for entry in log.split("\0"):
        if entry:
            name, subject, *body = entry.split("\n", 2)
            commits.append(Commit(name, subject, "".join(body)))
    wanted = re.compile(rf"\b({'|'.join(re.escape(str(word)) for word in config.words)})", re.IGNORECASE)
    found = [commit for commit in commits if wanted.search(commit.subject)]
    if not found:
        raise BadData(
            f"fix-commits: none of the {len(commits)} commits of {str(repository)!r} has a word that begins with "
            f"one of {', '.join(config.words)} in its subject; give words=[...], or words=[] for all of them."
        )
    return found[: config.limit]


def _changed(
    config: Config, repository: Any, commit: Commit, skipped: dict[str, list[str]]
) -> Iterator[tuple[str, str, str]]:
    """Yield (file, text before, text after) of the Python files that a commit changed; note what is not read."""
    listed = _git(repository, "show", "--format=", "--name-only", "--diff-filter=M", "-z", commit.name)
    files = [name for name in listed.decode("utf-8", errors="surrogateescape").split("\0") if name.endswith(".py")]
    if len(files) > config.max_files:
        skipped[f"more than {config.max_files} files changed"].append(f"{commit.short} ({commit.subject})")
        return
    for file in files:
        where = f"{file} at {commit.short}"
        if not config.tests and "test" in file.lower():
            skipped["a test"].append(where)
            continue
        blobs = (f"{commit.name}^:{file}", f"{commit.name}:{file}")
        before, after = (_git(repository, "cat-file", "blob", blob) for blob in blobs)
        if max(len(before), len(after)) > config.max_bytes:
            skipped[f"more than {config.max_bytes:,} bytes"].append(where)
            continue
        try:
            was, now = (blob.decode("utf-8-sig").replace("\r\n", "\n") for blob in (before, after))
        except UnicodeDecodeError:
            skipped["not UTF-8"].append(where)
            continue
        yield file, was, now


def _licence(repository: Any) -> str:
    """Return the first line of the repository's licence file; "" where there is none."""
    names = _git(repository, "ls-tree", "--name-only", "-z", "HEAD").decode("utf-8", errors="surrogateescape")
    for name in names.split("\0"):
        if name.upper().startswith(("LICENSE", "LICENCE", "COPYING")):
            text = _git(repository, "cat-file", "-p", f"HEAD:{name}").decode("utf-8", errors="replace")
            return next((line.strip() for line in text.splitlines() if line.strip()), "")
    return ""


def _git(repository: Any, *command: str) -> bytes:
    # cat-file and --name-only run no filter or helper that the repository's own configuration names.
    try:
        done = subprocess.run(
            ["git", "-C", str(repository), *command], capture_output=True, timeout=_TIMEOUT, check=True
        )
    except (OSError, subprocess.SubprocessError) as cause:
        said = (getattr(cause, "stderr", b"") or b"").decode(errors="replace").strip()
        raise BadData(
            f"git cannot read {str(repository)!r}: {said or cause}. Give the folder of a repository."
        ) from cause
    return done.stdout
