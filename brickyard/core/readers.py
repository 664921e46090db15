"""Read the splits of a data set from a folder, the hub, the embedded sets or a Python dict: columns as they stand.

Nothing is judged here but the form of the files; `data` checks the rows. Row numbers in messages count from 1.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from brickyard import embedded
from brickyard.core.errors import BadData, UnknownName

SPLITS = ("train", "validation", "test")
FORMATS = ("parquet", "jsonl", "csv", "txt")
COLUMNS = (
    *("text", "text_pair", "image", "points", "label", "group"),
    *("prompt", "completion", "chosen", "rejected", "choices"),
)
LISTS = ("points", "choices")  # columns of lists, which a csv cannot hold
_RENAMED = {
    "training": "train",
    "tr": "train",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "eval": "validation",
    "testing": "test",
    "tests": "test",
}
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?(:[\w.-]+)?")


@dataclass
class Source:
    """The columns of each split as read.

    Attributes:
        splits: known columns of each split, as lists of one length.
        found: every column name of each split, in order.
        formats: "parquet", "jsonl", ... of each split.
        origin: "folder", "file", "hub", "embedded" or "python".
        names: class names from a ClassLabel feature, whose labels are their indices.
        textual: splits whose labels are text that may spell numbers (csv).
        ignored: files or splits beside train, validation and test.
        wanted: the column names that are kept.
        skipped: what a step that makes its own rows made none of: rule -> where.
    """

    name: str
    origin: str
    splits: dict[str, dict[str, list]] = field(default_factory=dict)
    found: dict[str, list[str]] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)
    names: tuple[str, ...] | None = None
    textual: set[str] = field(default_factory=set)
    ignored: list[str] = field(default_factory=list)
    wanted: tuple[str, ...] = COLUMNS
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def add(self, split: str, where: str, kind: str, found: Sequence[str], columns: dict[str, list]) -> None:
        """Store a split; two columns of one name are an error."""
        twice = sorted({name for name in found if list(found).count(name) > 1})
        if twice:
            raise BadData(f"{where} has the column {twice[0]!r} twice; every column needs a name of its own.")
        self.splits[split], self.found[split], self.formats[split] = columns, list(found), kind

    def class_names(self, names: Sequence[str] | None, where: str) -> None:
        """Store the names of a ClassLabel feature, which all splits must share."""
        if names is not None:
            if self.names is not None and tuple(names) != self.names:
                raise BadData(f"{where} names its classes {list(names)}, another split {list(self.names)}.")
            self.names = tuple(names)


def read(spec: Any, *, extra: Sequence[str] = (), single: bool = False) -> Source:
    """Read a folder, `embedded:NAME`, a hub id (`owner/name`, `name`, with `:config` if it has several) or a dict.

    Args:
        spec: the data set.
        extra: names of columns that are kept beside COLUMNS.
        single: accept one file too, as the split train.
    """
    wanted = (*COLUMNS, *extra)
    if isinstance(spec, Mapping):
        return from_columns(spec, "python", "python", wanted)
    text = str(spec)
    if text.startswith("embedded:"):
        return from_columns(embedded.data(text.removeprefix("embedded:")), text, "embedded", wanted)
    path = Path(text).expanduser()
    if path.is_dir():
        return from_folder(path, wanted)
    if path.exists() and single and (kind := path.suffix.lower().removeprefix(".")) in FORMATS:
        source = Source(path.stem, "file", wanted=wanted)
        _READERS[kind](source, "train", path)
        return source
    if path.exists():
        raise BadData(
            f"{text!r} is a file; expected a folder holding train, validation or test as .parquet, .jsonl, .csv or "
            f".txt. Put it into a folder as train{path.suffix} or test{path.suffix}."
        )
    if _HUB_ID.fullmatch(text):
        return from_hub(text, wanted)
    raise BadData(f"there is no folder {text!r}; expected a folder, embedded:NAME or a hub id such as owner/name.")


def from_columns(splits: Mapping[str, Any], name: str, origin: str, wanted: tuple[str, ...] = COLUMNS) -> Source:
    """Read {"train": {"text": [...], "label": [...]}, ...}; a value may be any sequence or array."""
    source = Source(name, origin, wanted=wanted)
    for split, columns in splits.items():
        if split not in SPLITS:
            raise UnknownName.among("split", str(split), SPLITS)
        columns = getattr(columns, "columns", columns)
        if not isinstance(columns, Mapping):
            raise BadData(f"split {split!r} is {type(columns).__name__}; expected a dict of columns.")
        lists = {str(key): _plain(value) for key, value in columns.items()}
        lengths = {key: len(value) for key, value in lists.items()}
        if len(set(lengths.values())) > 1:
            raise BadData(f"the columns of split {split!r} differ in length: {lengths}.")
        source.add(split, f"split {split!r}", origin, list(lists), {k: v for k, v in lists.items() if k in wanted})
    return source


def _plain(values: Any) -> list:
    """Return a column as a list of Python values; an image as `datasets` stores it gives its bytes."""
    values = values.tolist() if hasattr(values, "tolist") else list(values)
    return [v.get("bytes") if isinstance(v, Mapping) else v.item() if isinstance(v, np.generic) else v for v in values]


def from_folder(folder: Path, wanted: tuple[str, ...] = COLUMNS) -> Source:
    """Read the one file of each split; a second file for a split and a misnamed one are errors."""
    source = Source(folder.resolve().name, "folder", wanted=wanted)
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        kind = path.suffix.lower().removeprefix(".")
        if path.is_dir() or kind not in FORMATS:
            if path.stem in SPLITS:
                raise BadData(f"{path.name} cannot be read; expected {path.stem}.parquet, .jsonl, .csv or .txt.")
            continue
        if path.stem not in SPLITS:
            if (right := _RENAMED.get(path.stem.lower())) is not None:
                raise BadData(f"{path.name} would not be read; rename it to {right}{path.suffix}.")
            source.ignored.append(path.name)
        elif path.stem in files:
            raise BadData(f"{files[path.stem].name} and {path.name} both give the split {path.stem!r}; keep one.")
        else:
            files[path.stem] = path
    if not files:
        others = f" (found: {', '.join(source.ignored[:5])})" if source.ignored else ""
        raise BadData(
            f"folder {str(folder)!r} holds no train, validation or test as .parquet, .jsonl, .csv or .txt{others}."
        )
    for split in SPLITS:
        if split in files:
            _READERS[files[split].suffix.lower().removeprefix(".")](source, split, files[split])
    return source


def from_hub(spec: str, wanted: tuple[str, ...] = COLUMNS) -> Source:
    """Download `owner/name[:config]` through `datasets`, which caches it; nothing but this goes to the network."""
    import datasets  # slow to import, and needed by nothing else
    from datasets.table import embed_table_storage

    path, _, config = spec.partition(":")
    try:
        found = datasets.load_dataset(path, config or None)
    except Exception as cause:
        # The library raises its own, huggingface_hub's, the HTTP client's and OS errors.
        raise BadData(
            f"{spec!r} is no folder here, and the hub gave no such data set: {type(cause).__name__}: "
            f"{_short(cause)} Check the name and the connection; one of several configurations is OWNER/NAME:CONFIG."
        ) from cause
    source = Source(spec, "hub", wanted=wanted)
    if not isinstance(found, Mapping):
        raise BadData(f"{spec!r} came as {type(found).__name__}; expected splits such as train and test.")
    source.ignored = sorted(str(name) for name in found if name not in SPLITS)
    for split in (name for name in SPLITS if name in found):
        rows = found[split]
        feature = rows.features.get("label")
        source.class_names(getattr(feature, "names", None), f"split {split!r} of {spec}")
        table: Any = embed_table_storage(rows.with_format("arrow")[:])  # images by path become bytes
        source.add(split, spec, "hub", table.column_names, _from_arrow(source, table, f"split {split!r} of {spec}"))
    return source


def _parquet(source: Source, split: str, path: Path) -> None:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            found = list(file.schema_arrow.names)
            table = file.read([name for name in dict.fromkeys(found) if name in source.wanted])
            features = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
    except (pa.ArrowException, OSError, ValueError) as cause:
        raise BadData(f"{path.name} is not a readable parquet file: {_short(cause)} Write it again.") from cause
    label = ((features.get("info") or {}).get("features") or {}).get("label") or {}
    source.class_names(label.get("names") if label.get("_type") == "ClassLabel" else None, path.name)
    duplicated = len(table.column_names) != len(set(table.column_names))
    source.add(split, path.name, "parquet", found, {} if duplicated else _from_arrow(source, table, path.name))


def _from_arrow(source: Source, table: pa.Table, where: str) -> dict[str, list]:
    """Turn the known columns into lists; an image struct gives its bytes, a column of another type is an error."""
    columns: dict[str, list] = {}
    for name in (name for name in table.column_names if name in source.wanted):
        column = table[name]
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if name == "image":
            columns[name] = _images(column, where)
            continue
        if name == "points":
            columns[name] = _clouds(column, where)
            continue
        if name == "choices" and not (_is_list(column.type) and _is_text(column.type.value_type)):
            raise BadData(f"column 'choices' of {where} holds {column.type}; expected lists of strings.")
        number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
        countable = name == "label" or name not in COLUMNS
        if not (name == "choices" or _is_text(kind) or pa.types.is_null(kind) or (countable and number)):
            expected = "strings, integers or floats" if countable else "strings"
            raise BadData(f"column {name!r} of {where} holds {kind}; expected {expected}.")
        try:
            columns[name] = column.to_pylist()
        except UnicodeDecodeError as cause:
            _bad_utf8(column, name, where, cause)
    return columns


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _clouds(column: pa.ChunkedArray, where: str) -> list:
    """Return each cloud as an array [points, 3]; as nested lists where it is none, which `points` then explains."""
    kind: Any = column.type
    depth = 0
    while _is_list(kind):
        kind, depth = kind.value_type, depth + 1
    if depth != 2 or not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise BadData(f"column 'points' of {where} holds {column.type}; expected lists of [x, y, z] of numbers.")
    clouds: list[Any] = []
    for row in column:
        lengths = (
            pc.call_function("list_value_length", [row.values]).to_numpy(zero_copy_only=False)
            if row.is_valid
            else np.empty(0)
        )
        if len(lengths) and (lengths == 3).all():
            clouds.append(row.values.flatten().to_numpy(zero_copy_only=False).reshape(-1, 3))
        else:
            clouds.append(row.as_py())
    return clouds


def _images(column: pa.ChunkedArray, where: str) -> list:
    if pa.types.is_struct(column.type):
        if "bytes" not in column.type.names:
            raise BadData(f"column 'image' of {where} is {column.type}; expected bytes, or a struct of bytes and path.")
        column = column.flatten()[column.type.get_field_index("bytes")]
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type) or pa.types.is_null(column.type)):
        raise BadData(f"column 'image' of {where} holds {column.type}; expected the bytes of image files.")
    return column.to_pylist()


def _bad_utf8(column: pa.ChunkedArray, name: str, where: str, cause: UnicodeDecodeError) -> NoReturn:
    for row, value in enumerate(column.cast(pa.large_binary()), start=1):
        try:
            (value.as_py() or b"").decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadData(
                f"{where}: column {name!r} of row {row} is not valid UTF-8 (byte {error.start} of the value is "
                f"0x{error.object[error.start]:02x}). Write the file again as UTF-8."
            ) from error
    raise BadData(f"{where}: column {name!r} is not valid UTF-8: {_short(cause)}") from cause


def _text(path: Path) -> bytes:
    """Return the bytes of a text file without a byte-order mark, once they are known to be valid UTF-8."""
    raw = path.read_bytes()
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise BadData(
            f"{path.name} is not valid UTF-8: byte {error.start} (line {line}) is 0x{raw[error.start]:02x}. "
            "Save it as UTF-8."
        ) from error
    return raw.removeprefix(b"\xef\xbb\xbf")


def _csv(source: Source, split: str, path: Path) -> None:
    raw = _text(path).rstrip(b"\r\n")
    header, _, body = raw.replace(b"\r", b"\n").partition(b"\n")
    if not body:
        raise BadData(f"{path.name} holds no rows{' below its header' if header else ''}.")
    try:
        table = pyarrow.csv.read_csv(
            io.BytesIO(raw),
            # One block: a quoted value may hold newlines, and no value may straddle two blocks.
            read_options=pyarrow.csv.ReadOptions(block_size=len(raw) + 1, use_threads=False),
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=False),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types={name: pa.string() for name in source.wanted}, strings_can_be_null=False
            ),
        )
    except pa.ArrowException as cause:
        raise BadData(f"{path.name} is not a well-formed csv (the header is row 1): {_short(cause)}") from cause
    known = [name for name in table.column_names if name in source.wanted]
    if lists := [name for name in LISTS if name in known]:
        raise BadData(f"{path.name} has a column {lists[0]}, whose lists a csv cannot hold; give parquet or jsonl.")
    unique = table.select(known) if len(set(known)) == len(known) else None
    source.textual.add(split)
    columns = {} if unique is None else {name: unique[name].to_pylist() for name in known}
    source.add(split, path.name, "csv", table.column_names, columns)


def _jsonl(source: Source, split: str, path: Path) -> None:
    found: dict[str, None] = {}
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        try:
            row = json.loads(line, object_pairs_hook=_once)
        except (ValueError, RecursionError) as cause:
            shown = "an empty line" if not line.strip() else f"not valid JSON: {_short(cause)}"
            raise BadData(f"{path.name}, line {number} is {shown} Each line must be one JSON object.") from cause
        if not isinstance(row, dict):
            raise BadData(f"{path.name}, line {number} is a JSON {type(row).__name__}; expected an object.")
        found.update(dict.fromkeys(row))
        rows.append(row)
    known = [name for name in found if name in source.wanted]
    source.add(split, path.name, "jsonl", list(found), {name: [row.get(name) for row in rows] for name in known})


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice.")
    return row


def _txt(source: Source, split: str, path: Path) -> None:
    """One row a line; the only format without labels."""
    lines = _text(path).decode("utf-8").replace("\r\n", "\n").removesuffix("\n").split("\n")
    source.add(split, path.name, "txt", ["text"], {"text": [] if lines == [""] else lines})


_READERS = {"parquet": _parquet, "jsonl": _jsonl, "csv": _csv, "txt": _txt}


def _short(cause: BaseException) -> str:
    """Return the first line of an error's message, at most 200 characters, ending in a full stop."""
    text = " ".join(str(cause).split())
    return text[:200] + "..." if len(text) > 200 else text.rstrip(".") + "."
