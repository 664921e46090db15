"""The small language of arms: `mos:r=7,e=2 + moment-probing`, `lora:lr=1e-3`, `full + dp:epsilon=8`.

A piece is `name` or `name:option=literal,...`; pieces are joined by `+`. Values are Python literals, `true`, `false`,
`none` or bare words; nothing is ever evaluated. `lr`, `epochs`, `batch`, `wd` are accepted in every piece and fix the
training.
"""

from __future__ import annotations

import ast
import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

from brickyard.core import registry
from brickyard.core.errors import UsageError

TRAINING = {"lr": float, "epochs": float, "batch": int, "wd": float}
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*\Z")
_OPTION = re.compile(r"[a-z][a-z0-9_]*\Z")
_BARE = re.compile(r"(?:[A-Za-z_]|~?/|\.{1,2}/)[\w.*|/-]*\Z")  # words and paths
_WORDS = {"true": True, "false": False, "none": None}
_SIZE = 2000  # characters; longer arms are a mistake or an attack
_LONGEST = 200  # characters of a file name; file systems take 255, and a digest or a copy's number may follow
_TAIL = re.compile(r"(?:\A|_)[^\W\d_][^_]*-(?:\d+|[0-9a-f]{8})\Z")  # as a copy's number or a digest would end a name


@dataclass(frozen=True)
class Piece:
    """One method of an arm with the options given to it."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        given = ",".join(f"{k}={_written(v)}" for k, v in sorted(self.options.items()))
        return f"{self.name}:{given}" if given else self.name


@dataclass(frozen=True)
class Arm:
    """One contestant: its pieces and the training settings that it fixes."""

    pieces: tuple[Piece, ...]
    training: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the canonical text: options sorted, training settings written on the first piece."""
        first, *rest = self.pieces
        return " + ".join([str(Piece(first.name, {**first.options, **self.training})), *map(str, rest)])

    @property
    def slug(self) -> str:
        """Return a file name for the arm: letters, digits, `.`, `_`, `-`; no two arms share one.

        A name that does not tell all of the arm (`target=query*` from `target=query`) ends with a digest of its text.
        """
        text = str(self)
        plain = re.sub(r"[^\w.-]+", "_", text, flags=re.ASCII).strip("_")
        if len(plain) <= _LONGEST and not _TAIL.search(plain) and _reading(plain) == text:
            return plain
        return f"{plain[:_LONGEST]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _reading(plain: str) -> str:
    """Return the one arm that a plain file name stands for: methods, then their options, and values of these.

    Empty where it stands for none.
    """
    options = {e.record.name: {*e.options, "preset", *TRAINING} for e in registry.records()}
    pieces: list[tuple[str, list[tuple[str, list[str]]]]] = []
    words = plain.split("_")
    while words:
        known = options[pieces[-1][0]] if pieces else set()
        spans = ("_".join(words[:n]) for n in range(len(words), 0, -1))  # names of options hold `_` too
        word = words[0] if words[0] in options else next((span for span in spans if span in known), words[0])
        del words[: word.count("_") + 1]
        if word in options:
            pieces.append((word, []))
        elif word in known:
            pieces[-1][1].append((word, []))
        elif pieces and pieces[-1][1]:
            pieces[-1][1][-1][1].append(word)
        else:
            return ""
    shown = lambda values: values[0] if len(values) == 1 else f"[{','.join(values)}]"  # noqa: E731
    given = [(name, ",".join(f"{key}={shown(values)}" for key, values in pairs)) for name, pairs in pieces]
    return " + ".join(f"{name}:{text}" if text else name for name, text in given)


def parse(text: str) -> Arm:
    """Read an arm; UsageError says which part of `text` is wrong."""
    if len(text) > _SIZE:
        raise UsageError(f"an arm of {len(text)} characters was given; at most {_SIZE} are read.")
    pieces, training = [], {}
    for part in _split(text, "+", text):
        name, colon, rest = part.partition(":")
        name = name.strip()
        if not _NAME.match(name):
            raise UsageError(f"{name!r} in arm {text!r} is not a method name; write e.g. 'lora:r=8 + moment-probing'.")
        options = dict(_option(item, text) for item in _split(rest, ",", text)) if colon else {}
        if colon and len(options) != len(_split(rest, ",", text)):
            raise UsageError(f"arm {text!r} gives an option of {name} twice; give each once.")
        for key in TRAINING.keys() & options.keys():
            if key in training:
                raise UsageError(f"arm {text!r} fixes {key} twice; give it once.")
            training[key] = _training(key, options.pop(key), text)
        pieces.append(Piece(name, options))
    names = [piece.name for piece in pieces]
    if len(set(names)) != len(names):
        raise UsageError(f"arm {text!r} names a method twice; each method can stand in an arm once.")
    return Arm(tuple(pieces), training)


def _split(text: str, separator: str, whole: str) -> list[str]:
    """Split at `separator` outside brackets and quotes; an empty part is an error."""
    parts, depth, quote, start = [], 0, "", 0
    for i, c in enumerate(text):
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        elif c in "([":
            depth += 1
        elif c in ")]":
            depth -= 1
        # `1e+3` holds a plus sign that joins nothing.
        elif c == separator and depth == 0 and not (c == "+" and re.search(r"\d[eE]\Z", text[:i])):
            parts.append(text[start:i])
            start = i + 1
        if depth < 0:
            break
    parts.append(text[start:])
    if depth or quote:
        raise UsageError(f"brackets or quotes in arm {whole!r} do not close.")
    if any(not part.strip() for part in parts):
        raise UsageError(f"an empty part stands in arm {whole!r}; write e.g. 'lora:r=8,alpha=16 + moment-probing'.")
    return [part.strip() for part in parts]


def _option(item: str, whole: str) -> tuple[str, Any]:
    key, equals, value = item.partition("=")
    key, value = key.strip(), value.strip()
    if not equals or not value or not _OPTION.match(key):
        raise UsageError(f"{item!r} in arm {whole!r} is not option=value.")
    return key, literal(value, f"arm {whole!r}")


def literal(value: str, where: str) -> Any:
    """Read one literal value: a number, a quoted or bare word, true/false/none, or a list of these; UsageError else."""
    if value.lower() in _WORDS:
        return _WORDS[value.lower()]
    if value[0] == "[" and value[-1] == "]":
        inner = value[1:-1].strip()
        return [literal(item, where) for item in _split(inner, ",", inner)] if inner else []
    if _BARE.match(value):
        return value
    try:
        read = ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        read = ...
    if not isinstance(read, int | float | str) or (isinstance(read, float) and not abs(read) < float("inf")):
        raise UsageError(f"{value!r} in {where} is not a literal; numbers, words, true, false, none and [lists] are.")
    return read


def _training(key: str, value: Any, whole: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{key}={value!r} in arm {whole!r}: a number was expected.")
    kind = TRAINING[key]
    if kind is int and value != int(value):
        raise UsageError(f"{key}={value!r} in arm {whole!r}: a whole number was expected.")
    if value < 0 or (value == 0 and key in ("epochs", "batch")):
        raise UsageError(f"{key}={value!r} in arm {whole!r}: must be positive.")
    return kind(value)


def _written(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ",".join(_written(v) for v in value) + "]"
    if isinstance(value, str):
        return value if _BARE.match(value) and value.lower() not in _WORDS else repr(value)
    return str(value).lower() if value is None or isinstance(value, bool) else repr(value)
