"""Reading of run files (YAML or TOML): strict types, known keys only, no aliases, no tags, no duplicate keys."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from brickyard.core.errors import UnknownName, UsageError

_SIZE = 1_000_000  # bytes; a run file is a page, not a book


@dataclass(frozen=True)
class Wanted:
    """What one key takes: `kind` is bool, int, float or str; `many` a list of them."""

    kind: type
    many: bool = False
    choices: tuple[str, ...] = ()


class _Loader(yaml.SafeLoader):
    """Safe YAML without its surprises: no anchors, no duplicate keys, `1e-4` is a number."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise UsageError(
                f"line {self.peek_event().start_mark.line + 1}: aliases (*name) are not accepted; write the value out."
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise UsageError(f"line {key_node.start_mark.line + 1}: key {key!r} is not a word; put it in quotes.")
            if key in seen:
                raise UsageError(f"line {key_node.start_mark.line + 1}: key {key!r} stands twice; keep one.")
            seen.add(key)
        return super().construct_mapping(node, deep=True)


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+\Z"), list("-+0123456789")
)


def read(path: str | Path, wanted: Mapping[str, Wanted]) -> dict[str, Any]:
    """Read a run file whose keys are option names (with `-` or `_`); every fault is a UsageError with its line."""
    path, named = Path(path), f"--config {path}"
    text = _text(path, named)
    values, lines = _toml(path, text) if path.suffix == ".toml" else _yaml(named, text)
    out: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        where = f"--config {path}, line {lines.get(key, '?')}"
        if name not in wanted:
            raise UnknownName.among(f"key in {where}", key, [k.replace("_", "-") for k in wanted])
        if name in out:
            raise UsageError(f"{where}: key {key!r} stands twice; keep one.")
        out[name] = _typed(value, wanted[name], f"{where}: {key}")
    return out


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that is a mapping, by the same strict rules; every fault is a UsageError with its line."""
    path = Path(path)
    return _yaml(str(path), _text(path, str(path)))[0]


def read_placed(path: str | Path) -> tuple[dict[str, Any], dict[tuple[str | int, ...], int]]:
    """Read a YAML file that is a mapping, and the line on which each value begins.

    Returns the values, and {("steps", "a", "data", 0): line}: keys and places in lists from the top, lines from 1. The
    rules and errors are those of `read_yaml`; numbers that are not finite and dates are refused too.
    """
    named = str(path)
    text = _text(Path(path), named)
    values, _ = _yaml(named, text)
    lines: dict[tuple[str | int, ...], int] = {}
    _place(yaml.compose(text, Loader=_Loader), (), lines)
    _literal(values, (), lines, named)
    return values, lines


def _place(node: Any, at: tuple[str | int, ...], lines: dict[tuple[str | int, ...], int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines[*at, key.value] = key.start_mark.line + 1
            _place(value, (*at, key.value), lines)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[*at, i] = value.start_mark.line + 1
            _place(value, (*at, i), lines)


def _literal(value: Any, at: tuple[str | int, ...], lines: dict[tuple[str | int, ...], int], named: str) -> None:
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _literal(inner, (*at, key), lines, named)
    elif isinstance(value, float) and not abs(value) < float("inf"):
        raise UsageError(f"{named}, line {lines[at]}: {at[-1]}: {value} is no finite number.")
    elif not isinstance(value, bool | int | float | str | None):
        raise UsageError(
            f"{named}, line {lines[at]}: {at[-1]}: {value} was read as a {type(value).__name__}; put it in quotes if a "
            "word is meant."
        )


def _text(path: Path, named: str) -> str:
    if not path.is_file():
        raise UsageError(f"{named}: no such file.")
    if path.stat().st_size > _SIZE:
        raise UsageError(f"{named}: {path.stat().st_size:,} bytes; at most {_SIZE:,} are read.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{named}: not UTF-8 at byte {error.start}.") from None


def _yaml(named: str, text: str) -> tuple[dict[str, Any], dict[str, int]]:
    try:
        node = yaml.compose(text, Loader=_Loader)
        values = _Loader(text).get_single_data()
    except UsageError as error:
        raise UsageError(f"{named}, {error}") from None
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{named}{line}: {getattr(error, 'problem', None) or 'not readable YAML'}.") from None
    if not isinstance(values, dict):
        raise UsageError(f"{named}: option: value lines were expected.")
    return values, {k.value: k.start_mark.line + 1 for k, _ in node.value}


def _toml(path: Path, text: str) -> tuple[dict[str, Any], dict[str, int]]:
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"--config {path}: {error}.") from None
    keys = (re.match(r'\s*"?([\w-]+)"?\s*=', line) for line in text.splitlines())
    return values, {m.group(1): i for i, m in enumerate(keys, start=1) if m}


def _typed(value: Any, wanted: Wanted, where: str) -> Any:
    if wanted.many:
        items = value if isinstance(value, list) else [value]
        return [_typed(item, Wanted(wanted.kind, choices=wanted.choices), where) for item in items]
    if wanted.kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not wanted.kind:
        hint = ""
        if wanted.kind is str:
            word = str(value).lower() if isinstance(value, bool) else value
            hint = f'; write it in quotes ("{word}") if a word is meant'
        elif wanted.kind in (int, float) and isinstance(value, str):
            hint = "; write it without quotes"
        raise UsageError(f"{where}={value!r} is a {type(value).__name__}; a {wanted.kind.__name__} was expected{hint}.")
    if isinstance(value, float) and not abs(value) < float("inf"):
        raise UsageError(f"{where}={value!r}: a finite number was expected.")
    if wanted.choices and value not in wanted.choices:
        raise UnknownName.among(where, str(value), wanted.choices)
    return value
