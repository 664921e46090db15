"""Data that cannot be used: every fault stops with its class, its place, and what to do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tabular import fails, labelled, rows, three, write

from brickyard.core.data import read_data
from brickyard.core.errors import BadData, UnknownName, UsageError


@pytest.mark.parametrize(
    ("train", "test", "patterns"),
    [
        (["a", "a", "a"], None, ["one class only, 'a'", "two or more"]),
        ([1.5, 1.5, 1.5], None, ["one label value only"]),
        (["a", "b", "a"], ["a", "new"], ["'test' has labels that train never has: 'new'", "row 2"]),
        (["a", None, "b", ""], None, ["'train': the label is empty in rows 2, 4"]),
        (["a", 3, "b"], None, ["'train', row 2: the label is int 3", "row 1 is str"]),
        (["a", ["b"], "b"], None, ["row 2: the label is list"]),
        (["a", "b", "a"], [0, 1], ["labels are of different types", "train: str"]),
        ([0.5, float("nan"), 1.0], None, ["'train', row 2: the label nan is not a finite"]),
        ([0.5, 1e39, 1.0], None, ["'train', row 2", "float32"]),
        ([0.5, float("inf"), 1.0], None, ["'train', row 2: the label inf"]),
    ],
)
def test_labels_that_cannot_be_learned(train: list, test: list | None, patterns: list[str]) -> None:
    with pytest.raises(BadData) as caught:
        labelled(train, test)
    for pattern in patterns:
        assert re.search(pattern, str(caught.value)), str(caught.value)


def test_labels_that_do_not_fit_the_task() -> None:
    with pytest.raises(BadData, match=r"row 2: the label 1\.5 is no class"):
        labelled([1.0, 1.5, 2.0], task="text-classification")
    with pytest.raises(BadData, match="row 1: the label 'x' is no number"):
        labelled(["x", "y", "x"], task="regression")
    with pytest.raises(UsageError, match=r"pair-classification.*columns text; expected 'text-classification'"):
        labelled(["a", "b", "a"], task="pair-classification")
    with pytest.raises(UsageError, match="spearman"):
        labelled(["a", "b", "a"], metric="spearman")
    with pytest.raises(UnknownName, match="did you mean accuracy"):
        labelled(["a", "b", "a"], metric="acuracy")
    with pytest.raises(UnknownName, match="did you mean regression"):
        labelled(["a", "b", "a"], task="regresion")


@pytest.mark.parametrize("label", [7, -1])
def test_a_class_index_outside_the_named_classes(tmp_path: Path, label: int) -> None:
    feature = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["no", "yes"]}}}}
    for split in ("train", "test"):
        labels = [0, 1, 0, label if split == "test" else 1] * 5
        table = pa.table({"text": [f"{split} {i}" for i in range(20)], "label": labels})
        pq.write_table(
            table.replace_schema_metadata({"huggingface": json.dumps(feature)}), tmp_path / f"{split}.parquet"
        )
    message = fails(tmp_path, f"split 'test': the label {label} of rows 4, 8, 12, 16, 20 is outside the 2 classes")
    assert ("hidden labels" in message) == (label == -1)


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    fails(tmp_path, "holds no train, validation or test")
    fails(tmp_path / "absent", "there is no folder")
    write(tmp_path, "csv", three())
    fails(tmp_path / "train.csv", "is a file; expected a folder")
    (tmp_path / "val.csv").write_text("text,label", encoding="utf-8")
    fails(tmp_path, r"val.csv would not be read; rename it to validation.csv")
    (tmp_path / "val.csv").unlink()
    (tmp_path / "train.jsonl").write_text("{}", encoding="utf-8")
    fails(tmp_path, "train.csv and train.jsonl both give the split 'train'")
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "train.xlsx").write_bytes(b"")
    fails(tmp_path, "train.xlsx cannot be read")


def test_splits_that_are_missing_or_misnamed() -> None:
    fails({"train": rows()}, "has no test split; found: train")
    fails({"test": rows()}, "has no train split; found: test")
    fails({}, "no train and no test")
    fails({"training": rows()}, "did you mean train", error=UnknownName)
    fails({"train": {"text": ["a"], "label": [1, 2]}}, "differ in length: {'text': 1, 'label': 2}")


@pytest.mark.parametrize("count", [0, 1])
def test_no_row_and_one_row(count: int) -> None:
    fails(three(train=rows(count)), f"'train' has {count or 'no'} row")
    fails(three(test=rows(count)), f"'test' has {count or 'no'} row")


def test_columns_that_are_missing_or_too_many(tmp_path: Path) -> None:
    bad = {"text": ["a", "b"], "labels": [0, 1]}
    fails(three(test=bad), "'test'.*no column 'label'; found: text, labels.*Rename 'labels' to 'label'")
    fails(
        three(train={"sentence": ["a"], "label": [0]}), "no column 'text'; found: sentence, label. Rename 'sentence' to"
    )
    fails({s: {"text": ["a", "b"]} for s in three()}, "no column 'label'; found: text")
    fails(three(train={**rows(), "image": [b"x"] * 20}), "has the columns text and image; expected one kind of input")
    fails(three(test={**rows(), "text_pair": ["x"] * 20}), "'test' has a column text_pair, split 'train' has none")
    for name in ("train.txt", "test.txt"):
        (tmp_path / name).write_text("a\nb\n", encoding="utf-8")
    fails(tmp_path, "no column .label.; found: text", task="text-classification")


def test_the_same_column_twice(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("text,label,label\na,b,c\n", encoding="utf-8")
    fails(tmp_path, "train.csv has the column 'label' twice")
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").unlink()
        (tmp_path / f"{split}.jsonl").write_text('{"text": "a", "text": "b", "label": 1}\n', encoding="utf-8")
    fails(tmp_path, "train.jsonl, line 1", "the key 'text' stands twice")
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").unlink()
        pq.write_table(pa.table([pa.array(["a"])] * 2, names=["text", "text"]), tmp_path / f"{split}.parquet")
    fails(tmp_path, "train.parquet has the column 'text' twice")


def test_empty_texts_are_named_and_a_few_are_kept() -> None:
    train = rows(40)
    train["text"][3], train["text"][8] = "", " \t "
    fails(three(train=train), "'train': the column 'text' is empty in rows 4, 9")
    for nothing in (None, float("nan")):
        train = rows(400, start=1000)
        train["text"][3] = nothing
        fails(three(train=train), "'train': the column 'text' is empty in row 4")
    train["text"][3] = ""
    data = read_data(three(train=train))
    assert data.report["empty_texts"] == {"train": 1, "validation": 0, "test": 0}
    assert data.splits["train"]["text"][3] == ""
    image = {"image": [b"x", b""], "label": [0, 1]}
    fails({"train": image, "test": image}, "'train': the column 'image' is empty in row 2")


def test_values_of_the_wrong_type(tmp_path: Path) -> None:
    fails(
        three(test={"text": ["a", 5], "label": ["class 0", "class 1"]}), "'test', row 2: 'text' is int; expected text"
    )
    image = {"image": ["a.png", "b.png"], "label": [0, 1]}
    fails({"train": image, "test": image}, "row 1: 'image' is str; expected the bytes of an image file")
    for split in ("train", "test"):
        pq.write_table(pa.table({"text": [["a"], ["b"]], "label": [0, 1]}), tmp_path / f"{split}.parquet")
    fails(tmp_path, "column 'text' of train.parquet holds list")


def test_invalid_utf8_is_named_with_its_place(tmp_path: Path) -> None:
    write(tmp_path, "csv", three())
    good = (tmp_path / "test.csv").read_bytes()
    (tmp_path / "test.csv").write_bytes(good.replace(b"number 201", b"number \xe9"))
    at = good.index(b"201")
    fails(tmp_path, rf"test.csv is not valid UTF-8: byte {at} \(line 3\) is 0xe9")
    (tmp_path / "test.csv").unlink()
    (tmp_path / "test.jsonl").write_bytes(b'{"text": "a", "label": "b"}\n\xff\n')
    fails(tmp_path, r"test.jsonl is not valid UTF-8: byte 28 \(line 2\)")
    (tmp_path / "test.jsonl").unlink()
    raw = pa.array([b"fine", b"caf\xe9"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    pq.write_table(pa.table({"text": text, "label": ["a", "b"]}), tmp_path / "test.parquet")
    fails(tmp_path, "test.parquet: column 'text' of row 2 is not valid UTF-8", "byte 3 of the value is 0xe9")


def test_half_a_surrogate_pair(tmp_path: Path) -> None:
    for split in ("train", "test"):
        line = '{"text": "%s %d \\ud800", "label": %d}\n'
        (tmp_path / f"{split}.jsonl").write_text("".join(line % (split, i, i % 2) for i in range(4)), encoding="utf-8")
    fails(tmp_path, "'train', row 1: 'text' holds half of a surrogate pair at character 8")


@pytest.mark.parametrize(
    ("name", "content", "patterns"),
    [
        ("test.csv", b"", ["test.csv holds no rows"]),
        ("test.csv", b"text,label\r\n", ["test.csv holds no rows below its header"]),
        ("test.csv", b"text,label\na,1,2\n", ["test.csv", r"Row #2: Expected 2 columns, got 3"]),
        ("test.csv", b'text,label\n"a,1\nb,2\n', ["test.csv is not a well-formed csv"]),
        ("test.jsonl", b'{"text": "a", "label": 1}\n{"text": \n', ["test.jsonl, line 2 is not valid JSON"]),
        ("test.jsonl", b'{"text": "a", "label": 1}\n\n{"text": "b", "label": 1}', ["line 2 is an empty line"]),
        ("test.jsonl", b"[1, 2]\n", ["line 1 is a JSON list; expected an object"]),
        ("test.jsonl", b"[" * 100_000, ["line 1 is not valid JSON"]),
        ("test.jsonl", b'{"text": "a", "label": "class 0"}\n{"text": "b"}', ["'test': the label is empty in row 2"]),
        ("test.jsonl", b"", ["'test'.*(no row|no column)"]),
        ("test.parquet", b"PAR1", ["test.parquet is not a readable parquet file"]),
        ("test.parquet", b"", ["test.parquet is not a readable parquet file"]),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, patterns: list[str]) -> None:
    write(tmp_path, "csv", {"train": rows()})
    (tmp_path / name).write_bytes(content)
    fails(tmp_path, *patterns)


@pytest.mark.parametrize(("kind", "size"), [("csv", 5), ("jsonl", 50), ("parquet", 5)])
def test_a_huge_row_is_refused(tmp_path: Path, kind: str, size: int) -> None:
    big = three()
    big["test"]["text"][4] = "x" * (size * 10**6)
    write(tmp_path, kind, big)
    fails(tmp_path, f"'test', row 5: 'text' has {size},000,000 bytes, above the limit of 1,000,000")
    assert len(read_data(tmp_path, row_limit=10**8).splits["test"]["text"][4]) == size * 10**6


def test_the_row_limit_counts_bytes() -> None:
    data = three()
    data["train"]["text"][0] = "é" * 50
    assert read_data(data, row_limit=100).report["largest_row_bytes"]["train"] == 100
    fails(data, "row 1: 'text' has 100 bytes", row_limit=99)
