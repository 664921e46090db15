"""The path is the registry: `tune mos` means `brickyard/tune/mos.py`. Files are read by `ast`; torch stays out."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from brickyard.core.errors import UnknownName, UsageError
from brickyard.core.method import FAMILIES, Claim, Record

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Option:
    """One field of a method's Config as written in its source."""

    name: str
    annotation: str
    default: Any
    doc: str


@dataclass(frozen=True)
class Entry:
    """One method: its record, its file and its options."""

    record: Record
    path: Path
    options: dict[str, Option]

    @property
    def module_name(self) -> str:
        return f"brickyard.{self.record.family}.{self.path.stem}"


class BadRecord(UsageError):
    """A method file whose record or config is not made of literals."""


def records(family: str | None = None) -> list[Entry]:
    """Return every method, or those of one family, sorted by family and name."""
    if family is not None and family not in FAMILIES:
        raise UnknownName.among("family", family, FAMILIES)
    return [entry for entry in _all().values() if family in (None, entry.record.family)]


def find(name: str, family: str | None = None) -> Entry:
    """Return the method called `name`; UnknownName gives the nearest names."""
    known = _all()
    if name not in known or (family and known[name].record.family != family):
        among = [n for n, e in known.items() if family in (None, e.record.family)]
        raise UnknownName.among(
            "method" if family is None else f"{family} method", name, among, "See: brickyard methods."
        )
    return known[name]


def load(name: str) -> ModuleType:
    """Import the file of the method called `name`."""
    return importlib.import_module(find(name).module_name)


def check_options(name: str, options: dict[str, Any]) -> None:
    """Refuse an option that the method does not have, before anything heavy is imported."""
    entry = find(name)
    known = [*entry.options, *(["preset"] if entry.record.presets else [])]
    for key in options:
        if key not in known:
            raise UnknownName.among(f"option of {name}", key, known, f"See: brickyard show {name}.")


def config(name: str, options: dict[str, Any]) -> Any:
    """Build the method's Config from literal options; types are strict, `preset=NAME` sets its options first."""
    from pydantic import ConfigDict, ValidationError, create_model

    check_options(name, options)
    record, given = find(name).record, dict(options)
    if "preset" in given:
        preset = given.pop("preset")
        if preset not in record.presets:
            raise UnknownName.among(f"preset of {name}", str(preset), record.presets)
        given = {**record.presets[preset], **given}
    given = {**given, **record.fixed}
    cls = load(name).Config
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    hints = get_type_hints(cls)
    fields = {f.name: (hints[f.name], f.default) for f in dataclasses.fields(cls)}
    model = create_model(cls.__name__, __config__=ConfigDict(strict=True), **fields)  # type: ignore[call-overload]
    try:
        checked = model.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{name}: {first['loc'][0]}={first['input']!r}: {first['msg']}.") from None
    return cls(**{key: getattr(checked, key) for key in given})


@cache
def code_digest() -> str:
    """Return a digest of the package's source, so that a resumed run knows whether the code changed."""
    digest = hashlib.sha256()
    for path in sorted(ROOT.rglob("*.py")):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@cache
def _all() -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for family in FAMILIES:
        for path in sorted((ROOT / family).glob("*.py")):
            if path.name.startswith("_"):
                continue
            for entry in read(path, family):
                if entry.record.name in found:
                    raise BadRecord(f"{entry.record.name} is declared in {path} and {found[entry.record.name].path}.")
                found[entry.record.name] = entry
    return dict(sorted(found.items(), key=lambda item: (FAMILIES.index(item[1].record.family), item[0])))


def read(path: Path, family: str) -> list[Entry]:
    """Read the records and the options of one method file without importing it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    options: dict[str, Option] = {}
    found: list[Record] = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            options = _options(node, path)
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id in ("RECORD", "RECORDS"):
            value = _value(node.value, path)  # type: ignore[attr-defined]
            found.extend(value if isinstance(value, tuple | list) else [value])
    if not found:
        raise BadRecord(f"{path} declares no RECORD; a method file must.")
    for record in found:
        if record.family != family:
            raise BadRecord(f"{path} declares family {record.family!r} but lies in {family!r}.")
    return [Entry(record, path, {n: o for n, o in options.items() if n not in record.fixed}) for record in found]


def _options(node: ast.ClassDef, path: Path) -> dict[str, Option]:
    out = {}
    for item, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            if item.value is None:
                raise BadRecord(f"{path}: option {item.target.id} has no default.")
            doc = after.value.value if _is_text(after) else ""  # type: ignore[union-attr]
            out[item.target.id] = Option(
                item.target.id, ast.unparse(item.annotation), _value(item.value, path), " ".join(doc.split())
            )
    return out


def _is_text(node: ast.stmt | None) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _value(node: ast.expr, path: Path) -> Any:
    """Read a literal that may hold calls of Record and Claim with keywords."""
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("Record", "Claim")
        and not node.args
    ):
        made = {"Record": Record, "Claim": Claim}[node.func.id]
        try:
            return made(**{k.arg: _value(k.value, path) for k in node.keywords})  # type: ignore[misc]
        except TypeError as error:
            raise BadRecord(f"{path}: {error}") from None
    if isinstance(node, ast.Tuple | ast.List):
        return type(())(_value(item, path) for item in node.elts)
    if isinstance(node, ast.Dict):
        return {_value(k, path): _value(v, path) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise BadRecord(f"{path}, line {node.lineno}: {ast.unparse(node)!r} is not a literal.") from None
