"""From files before and after a fix to what a language model trains on: lines, blocks, functions or whole files.

    line       the changed lines
    block      the statements around them, up to the nearest `if`, `for`, `with`, `try` or `def`, without its head
    function   the whole function (decorators too) around them
    file       the whole file

Source of the four granularities: "An Exploratory Study on Fine-Tuning Large Language Models for Secure Code
Generation", arXiv 2408.09078. Python's own parser finds the blocks, so files must parse.
"""

from __future__ import annotations

import ast
import re
import subprocess
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

from brickyard.core.errors import BadData, UsageError

GRANULARITIES = ("line", "block", "function", "file")
_TIMEOUT = 60  # seconds that one call of git may take
_FIX = re.compile(r"\b(fix|cve|vulnerab|security|injection|unsafe|sanitiz)", re.IGNORECASE)


@dataclass(frozen=True)
class Edit:
    """Lines `start` to `end` (from 0, end excluded) of the old file are replaced by `text`."""

    start: int
    end: int
    text: str


def edits(before: str, after: str, granularity: str) -> list[Edit]:
    """Return what turns `before` into `after`, in pieces of the granularity; nothing where they are equal.

    Raises UsageError for an unknown granularity, BadData where a block or a function is asked of a file that does not
    parse.
    """
    if granularity not in GRANULARITIES:
        raise UsageError(f"granularity={granularity!r}; expected one of {', '.join(GRANULARITIES)}.")
    old, new = before.splitlines(keepends=True), after.splitlines(keepends=True)
    steps = SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    changed = [(j1, j2) for kind, _, _, j1, j2 in steps if kind != "equal"]
    if not changed:
        return []
    if granularity == "file":
        return [Edit(0, len(old), after)]
    ranges = changed if granularity == "line" else [_around(after, start, end, granularity) for start, end in changed]
    found = [_aligned(steps, start, end) for start, end in ranges]
    merged: list[tuple[int, int, int, int]] = []
    for i1, i2, j1, j2 in sorted(found):
        if merged and (i1 < merged[-1][1] or j1 < merged[-1][3]):
            p = merged[-1]
            merged[-1] = (p[0], max(p[1], i2), p[2], max(p[3], j2))
        else:
            merged.append((i1, i2, j1, j2))
    return [Edit(i1, i2, "".join(new[j1:j2])) for i1, i2, j1, j2 in merged]


def apply(before: str, changes: list[Edit]) -> str:
    """Return the old file with the edits made."""
    lines = before.splitlines(keepends=True)
    for edit in sorted(changes, key=lambda e: e.start, reverse=True):
        lines[edit.start : edit.end] = [edit.text]
    return "".join(lines)


def _aligned(steps: Sequence[tuple[str, int, int, int, int]], start: int, end: int) -> tuple[int, int, int, int]:
    """Widen lines start..end of the new file to whole changes; return the ranges in the old and in the new file."""
    touched = [
        step
        for step in steps
        if step[0] != "equal"
        and ((step[3] < end and step[4] > start) or (step[3] == step[4] and start <= step[3] <= end))
    ]
    start, end = min([start, *(s[3] for s in touched)]), max([end, *(s[4] for s in touched)])
    begins, ends = {s[3]: s[1] for s in reversed(touched)}, {s[4]: s[2] for s in touched}

    def unchanged(line: int) -> int:
        return next(i1 + line - j1 for kind, i1, _, j1, j2 in steps if kind == "equal" and j1 <= line <= j2)

    old_start = begins[start] if start in begins else unchanged(start)
    return old_start, ends[end] if end in ends else unchanged(end), start, end


def _around(source: str, start: int, end: int, granularity: str) -> tuple[int, int]:
    """Return the lines of the smallest block or function that holds lines start..end; the lines where none does."""
    try:
        tree = ast.parse(source)
    except SyntaxError as cause:
        raise BadData(f"a fixed file does not parse (line {cause.lineno}); give granularity=line or file.") from cause
    best = (start, end)
    size = 10**9
    for node in ast.walk(tree):
        for first, last in _spans(node, granularity):
            if first <= start and max(end, start + 1) <= last and last - first < size:
                best, size = (first, last), last - first
    return best


def _spans(node: ast.AST, granularity: str) -> Iterator[tuple[int, int]]:
    function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    if granularity == "function":
        if function:
            heads = [node.lineno, *(d.lineno for d in node.decorator_list)]  # type: ignore[attr-defined]
            yield min(heads) - 1, node.end_lineno  # type: ignore[attr-defined, misc]
        return
    if isinstance(node, ast.Module | ast.ClassDef):
        return
    for name in ("body", "orelse", "finalbody"):
        statements = getattr(node, name, None)
        if isinstance(statements, list) and statements:
            yield statements[0].lineno - 1, statements[-1].end_lineno


def training_texts(before: str, after: str, granularity: str) -> list[str]:
    """Return the fixed code of each edit, without the indentation that is common to its lines."""
    return [
        t for edit in edits(before, after, granularity) if (t := textwrap.dedent(edit.text).strip("\n") + "\n").strip()
    ]


def from_git(repository: str | Path, *, limit: int = 1000) -> Iterator[dict[str, str]]:
    """Yield {"commit", "file", "before", "after"} of the Python files that fixing commits of a repository changed.

    A commit fixes when its subject says so (fix, CVE, security, injection, ...); merges, tests and files of more than
    200 kB are left out. Raises BadData where git cannot read the folder.
    """
    subjects = _git(repository, "log", "--no-merges", "--format=%H %s")
    for line in [line for line in subjects.splitlines() if _FIX.search(line[41:])][:limit]:
        commit = line[:40]
        for file in _git(repository, "show", "--format=", "--name-only", "--diff-filter=M", commit).splitlines():
            if not file.endswith(".py") or "test" in file:
                continue
            before, after = (_git(repository, "show", f"{at}:{file}") for at in (f"{commit}^", commit))
            if max(len(before), len(after)) <= 200_000:
                yield {"commit": commit, "file": file, "before": before, "after": after}


def _git(repository: str | Path, *command: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(repository), *command], capture_output=True, timeout=_TIMEOUT, check=True
        )
    except (OSError, subprocess.SubprocessError) as cause:
        said = (getattr(cause, "stderr", b"") or b"").decode(errors="replace").strip()
        raise BadData(
            f"git cannot read {str(repository)!r}: {said or cause}. Give the folder of a repository."
        ) from cause
    return done.stdout.decode("utf-8", errors="replace")
