"""The small language of arms: `mos:r=7,e=2 + moment-probing`, `lora:lr=1e-3`, `full + dp:epsilon=8`.

A piece is `name` or `name:option=literal,...`; pieces are joined by `+`. Values are Python literals, `true`, `false`,
`none` or bare words; nothing is ever evaluated. `lr`, `epochs`, `batch`, `wd` are accepted in every piece and fix the
training.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from typing import Any

from brickyard.core.errors import UsageError

TRAINING = {"lr": float, "epochs": float, "batch": int, "wd": float}
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*\Z")
_OPTION = re.compile(r"[a-z][a-z0-9_]*\Z")
_BARE = re.compile(r"(?:[A-Za-z_]|~?/|\.{1,2}/)[\w.*|/-]*\Z")  # words and paths
_WORDS = {"true": True, "false": False, "none": None}
_SIZE = 2000  # characters; longer arms are a mistake or an attack


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
        """Return a file name for the arm: letters, digits, `.`, `_`, `-`."""
        return re.sub(r"[^\w.-]+", "_", str(self)).strip("_")


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
