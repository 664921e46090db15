"""From files before and after a fix to what a language model trains on: lines, blocks, functions or whole files.

    line       the changed lines
    block      the statements around them, up to the nearest `if`, `for`, `with`, `try` or `def`, without its head
    function   the whole function (decorators too) around them
    file       the whole file

Source of the four granularities: "An Exploratory Study on Fine-Tuning Large Language Models for Secure Code
Generation", arXiv 2408.09078. Python's own parser finds the blocks, so files must parse.

A line is what the parser takes for one: it ends with \\n, \\r\\n or \\r, and no other character ends it.
"""

from __future__ import annotations

import ast
import io
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from brickyard.core.errors import BadData, UsageError

GRANULARITIES = ("line", "block", "function", "file")


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
    old, new = _lines(before), _lines(after)
    steps = SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    changed = [(j1, j2) for kind, _, _, j1, j2 in steps if kind != "equal"]
    if not changed:
        return []
    if granularity == "file":
        return [Edit(0, len(old), after)]
    spans = [] if granularity == "line" else _spans(after, granularity)
    ranges = [_around(spans, start, end) for start, end in changed]
    found = [_aligned(steps, start, end) for start, end in ranges]
    merged: list[tuple[int, int, int, int]] = []
    for i1, i2, j1, j2 in sorted(found):
        while merged and (i1 < merged[-1][1] or j1 < merged[-1][3]):  # one that grew may reach the one before it too
            p = merged.pop()
            i1, i2, j1, j2 = min(p[0], i1), max(p[1], i2), min(p[2], j1), max(p[3], j2)
        merged.append((i1, i2, j1, j2))
    return [Edit(i1, i2, "".join(new[j1:j2])) for i1, i2, j1, j2 in merged]


def apply(before: str, changes: list[Edit]) -> str:
    """Return the old file with the edits made."""
    lines = _lines(before)
    for edit in sorted(changes, key=lambda e: (e.start, e.end), reverse=True):  # what is put in there goes in last
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


def _around(spans: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """Return the smallest of `spans` that holds lines start..end; those lines where none does."""
    holding = [(first, last) for first, last in spans if first <= start and max(end, start + 1) <= last]
    return min(holding, key=lambda span: span[1] - span[0], default=(start, end))


def _spans(source: str, granularity: str) -> list[tuple[int, int]]:
    """Return the lines of each block or function."""
    try:
        tree = parsed(source)
    except BadData as cause:
        raise BadData(f"{cause} Give granularity=line or file.") from cause
    return [span for node in ast.walk(tree) for span in _spans_of(node, granularity)]


def parsed(source: str) -> ast.Module:
    """Return the syntax tree of a fixed file; BadData where it does not parse."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as cause:  # a null byte; expressions nested too deep
        raise BadData(f"a fixed file does not parse: {cause}.") from cause


def _lines(text: str) -> list[str]:
    # str.splitlines also breaks at form feeds, \x1c, \x85, U+2028 and others, which would shift the parser's numbers.
    return list(io.StringIO(text, newline=""))


def _spans_of(node: ast.AST, granularity: str) -> Iterator[tuple[int, int]]:
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


def pieces(before: str, after: str, granularity: str) -> list[tuple[str, str]]:
    """Return (old, new) code of each edit that leaves any, without the indentation that is common to its lines.

    Lines end with \\n in what is returned; a change of line ends alone is none.
    """
    before, after = (text.replace("\r\n", "\n").replace("\r", "\n") for text in (before, after))
    old = _lines(before)
    found = [("".join(old[e.start : e.end]), e.text) for e in edits(before, after, granularity) if e.text.strip()]
    return [(_outdented(was), _outdented(now)) for was, now in found]


def training_texts(before: str, after: str, granularity: str) -> list[str]:
    """Return the fixed code of each edit, without the indentation that is common to its lines."""
    return [now for _, now in pieces(before, after, granularity)]


def _outdented(code: str) -> str:
    return textwrap.dedent(code).strip("\n") + "\n"
