"""Reading data sets: forms of files, labels, cuts, duplicates, overlap and fingerprints; the faults stand apart."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tabular import Columns, fails, labelled, rows, three, write

from brickyard.core import readers
from brickyard.core.data import overlap_sentence, read_data
from brickyard.core.errors import BadData, BrickyardError


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_every_format_gives_the_same_data(tmp_path: Path, kind: str) -> None:
    data = read_data(write(tmp_path / "d", kind, three()))
    same = read_data(three())
    assert data.splits == same.splits
    assert data.fingerprint == same.fingerprint
    assert (data.name, data.input, data.kind) == ("d", "text", "text-classification")
    assert data.labels == ("class 0", "class 1")
    assert data.splits["train"]["label"][:4] == [0, 1, 0, 1]
    assert data.report["format"] == {"train": kind, "validation": kind, "test": kind}
    assert json.loads(json.dumps(data.report)) == data.report


def test_formats_may_differ_between_splits(tmp_path: Path) -> None:
    integers = {
        split: {**columns, "label": [i % 3 for i in range(len(columns["text"]))]} for split, columns in three().items()
    }
    write(tmp_path, "csv", {"train": integers["train"]})
    write(tmp_path, "jsonl", {"validation": integers["validation"]})
    write(tmp_path, "parquet", {"test": integers["test"]})
    data = read_data(tmp_path)
    assert data.labels == ("0", "1", "2")
    assert data.splits == read_data(integers).splits


def test_a_pair_and_an_image_set_are_recognised() -> None:
    pair = {split: {**columns, "text_pair": list(columns["text"])} for split, columns in three().items()}
    assert (read_data(pair).input, read_data(pair).kind) == ("pair", "pair-classification")
    image = {split: {"image": [t.encode() for t in c["text"]], "label": c["label"]} for split, c in three().items()}
    assert (read_data(image).input, read_data(image).kind) == ("image", "image-classification")
    stored = {s: {**c, "image": [{"bytes": b, "path": None} for b in c["image"]]} for s, c in image.items()}
    assert read_data(stored).fingerprint == read_data(image).fingerprint


def test_parquet_gives_class_names_and_image_bytes(tmp_path: Path) -> None:
    feature = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["cat", "dog", "eel"]}}}}
    for split, count in (("train", 30), ("test", 6)):
        images = [{"bytes": f"{split}{i}".encode(), "path": None} for i in range(count)]
        table = pa.table({"image": images, "label": [i % 2 for i in range(count)]})
        pq.write_table(
            table.replace_schema_metadata({"huggingface": json.dumps(feature)}), tmp_path / f"{split}.parquet"
        )
    data = read_data(tmp_path)
    assert data.labels == ("cat", "dog", "eel")
    assert data.splits["test"]["image"][0] == b"test0"
    assert data.report["classes"]["test"] == {"cat": 3, "dog": 3, "eel": 0}


def test_windows_newlines_and_a_byte_order_mark(tmp_path: Path) -> None:
    for split, start in (("train", 0), ("test", 50)):
        body = "".join(f'"line {i}, first\r\nsecond",{"yes" if i % 2 else "no"}\r\n' for i in range(start, start + 20))
        (tmp_path / f"{split}.csv").write_bytes(b"\xef\xbb\xbf" + f"text,label\r\n{body}".encode())
    data = read_data(tmp_path)
    assert data.splits["test"]["text"][0] == "line 50, first\r\nsecond"
    assert data.labels == ("no", "yes")
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "test.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert read_data(plain, need=("test",), labelled=False).splits["test"]["text"] == ["one", "two"]


def test_a_folder_with_a_name_beyond_ascii(tmp_path: Path) -> None:
    assert read_data(write(tmp_path / "données 数据", "csv", three())).name == "données 数据"


def test_hub_ids_go_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    made = {
        split: datasets.Dataset.from_dict(
            {"text": c["text"], "label": [i % 2 for i in range(len(c["text"]))]}, features
        )
        for split, c in {**three(), "extra": rows(4)}.items()
    }
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a: asked.append(a) or datasets.DatasetDict(made))
    data = read_data("owner/name:config")
    assert asked == [("owner/name", "config")]
    assert data.labels == ("bad", "good")
    assert data.report["origin"] == "hub"
    assert data.report["ignored_files"] == ["extra"]
    assert data.splits["train"]["text"] == three()["train"]["text"]


def test_a_failing_hub_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*_: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    fails("owner/name", "owner/name", "no route to host", "connection")


def test_only_hub_ids_reach_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "from_hub", lambda spec: pytest.fail(f"asked the hub for {spec}"))
    for spec in ("/no/such/folder", "./data", "../x", "a/b/c", "embedded:nothing", "~/data", ""):
        with pytest.raises(BrickyardError):
            read_data(spec)


def test_integers_sort_by_value_and_strings_by_character() -> None:
    assert labelled([10, 9, 2, 10]).labels == ("2", "9", "10")
    assert labelled([10, 9, 2, 10]).splits["train"]["label"] == [2, 1, 0, 2]
    assert labelled(["10", "9", "2", "10"]).labels == ("10", "2", "9")
    assert labelled([True, False, True]).labels == ("false", "true")
    assert labelled(list(np.array([3, 1, 3]))).labels == ("1", "3")


def test_floats_are_regression_and_task_overrides() -> None:
    data = labelled([0.5, 1, 2.5])
    assert (data.kind, data.labels) == ("regression", None)
    assert data.splits["train"]["label"] == [0.5, 1.0, 2.5]
    assert data.report["label_values"]["train"] == pytest.approx(
        {"least": 0.5, "greatest": 2.5, "mean": 4 / 3, "deviation": 0.8498366}
    )
    assert labelled([1, 2, 3], task="regression").splits["train"]["label"] == [1.0, 2.0, 3.0]
    assert labelled([1.0, 2.0, 1.0], task="text-classification").labels == ("1", "2")
    assert labelled(["0.5", "1"], task="regression").splits["train"]["label"] == [0.5, 1.0]


def test_csv_labels_are_read_as_what_all_of_them_spell(tmp_path: Path) -> None:
    def kinds(*labels: str) -> tuple[str, tuple[str, ...] | None]:
        for split in ("train", "test"):
            body = "".join(f"{split} {i},{label}\n" for i, label in enumerate(labels))
            (tmp_path / f"{split}.csv").write_text(f"text,label\n{body}", encoding="utf-8")
        data = read_data(tmp_path)
        return data.kind, data.labels

    assert kinds(*["0", "10", "9"] * 4) == ("text-classification", ("0", "9", "10"))
    assert kinds(*["0.5", "10", "9"] * 4) == ("regression", None)
    assert kinds(*["0", "10", "x"] * 4) == ("text-classification", ("0", "10", "x"))


def test_given_class_names_decide_the_indices() -> None:
    data = labelled(["b", "a", "b"], labels=("c", "b", "a"))
    assert data.labels == ("c", "b", "a")
    assert data.splits["train"]["label"] == [1, 2, 1]
    with pytest.raises(BadData, match=r"'z' of row 2 is outside the 2 classes \(a, b\)"):
        labelled(["a", "z", "b"], labels=("a", "b"))


def test_labels_may_be_absent_where_nothing_needs_them() -> None:
    data = read_data({"test": {"text": ["only"]}}, need=("test",), labelled=False)
    assert (data.labels, len(data.splits["test"])) == (None, 1)


def test_a_missing_validation_is_cut_from_train_class_by_class() -> None:
    train = {
        "text": [f"t{i}" for i in range(100)],
        "label": ["rare"] * 10 + ["common"] * 70 + ["single"] + ["some"] * 19,
    }
    splits = {"train": train, "test": {"text": ["x", "y"], "label": ["rare", "some"]}}
    data = read_data(splits)
    assert data.report["cut"] == {
        "split": "validation",
        "from": "train",
        "rows": 10,
        "share": 0.1,
        "seed": 0,
        "stratified": True,
        "by_group": False,
    }
    assert data.report["rows"] == {"train": 90, "validation": 10, "test": 2}
    assert data.report["classes"]["validation"] == {"common": 7, "rare": 1, "single": 0, "some": 2}
    both = data.splits["train"]["text"] + data.splits["validation"]["text"]
    assert sorted(both) == sorted(train["text"])
    order = [int(text[1:]) for text in data.splits["train"]["text"]]
    assert order == sorted(order)
    assert read_data(splits).fingerprint == data.fingerprint


def test_copies_of_a_row_are_never_parted_by_the_cut() -> None:
    train = {"text": [f"t{i % 30}" for i in range(300)], "label": [i % 30 % 2 for i in range(300)]}
    data = read_data({"train": train}, need=("train",))
    assert data.report["rows"] == {"train": 270, "validation": 30}
    assert not set(data.splits["train"]["text"]) & set(data.splits["validation"]["text"])
    assert data.report["duplicates"] == {"train": 270}


def test_rows_of_a_group_are_never_parted_by_the_cut() -> None:
    n = 300
    train = {
        "text": [f"t{i}" for i in range(n)],
        "label": [i % 2 for i in range(n)],
        "group": [f"speaker {i // 6}" for i in range(n)],
    }
    train["text"][299] = train["text"][0]  # a copy joins two groups
    data = read_data({"train": train}, need=("train",))
    group_of = dict(zip(train["text"][:299], train["group"][:299], strict=True))
    parts = [{group_of[text] for text in data.splits[split]["text"]} for split in ("train", "validation")]
    assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 50
    assert data.report["cut"]["by_group"] and data.report["cut"]["rows"] % 6 == 0
    assert 24 <= data.report["cut"]["rows"] <= 36
    ends = {text in data.splits["train"]["text"] for text in ("t0", "t294", "t298")}
    assert len(ends) == 1
    assert data.report["ignored_columns"] == {"train": []}
    # Without the column the same rows are cut as ever.
    del train["group"]
    assert read_data({"train": train}, need=("train",)).report["cut"]["by_group"] is False


def test_groups_on_both_sides_are_counted_and_gaps_refused() -> None:
    splits = {
        "train": {"text": ["a", "b", "c"], "label": [0, 1, 0], "group": ["x", "x", "y"]},
        "validation": {"text": ["d", "g"], "label": [1, 0], "group": ["z", "z"]},
        "test": {"text": ["e", "f"], "label": [0, 1], "group": ["y", "w"]},
    }
    data = read_data(splits)
    assert data.report["overlap"]["test_groups_in_train"] == 1
    assert "1 of 2 test rows belong to groups that train has too" in overlap_sentence(data.report["overlap"], 2)
    splits["train"]["group"][1] = " "
    with pytest.raises(BadData, match="split 'train': the group is empty in row 2"):
        read_data(splits)
    one = {"text": ["a", "b"], "label": [0, 1], "group": ["x", "x"]}
    with pytest.raises(BadData, match="1 distinct groups are too few"):
        read_data({"train": one}, need=("train",))
    lone = {"text": list("abcdefghij"), "label": [0] * 5 + [1] * 5, "group": list("xxxxxyyyyy")}
    with pytest.raises(BadData, match=r"too few|without 1 of its classes"):
        read_data({"train": lone}, need=("train",))


def test_regression_is_cut_without_classes_and_a_given_validation_is_kept() -> None:
    train = {"text": [f"t{i}" for i in range(50)], "label": [i / 7 for i in range(50)]}
    cut = read_data({"train": train}, need=("train",)).report["cut"]
    assert (cut["rows"], cut["stratified"]) == (5, False)
    assert read_data(three()).report["cut"] is None
    assert "validation" not in read_data({"test": rows(4)}, need=("test",)).splits


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), min_size=6, max_size=80))
def test_every_cut_keeps_rows_and_classes(pairs: list[tuple[int, int]]) -> None:
    train = {"text": [f"{text}/{label}" for text, label in pairs], "label": [label for _, label in pairs]}
    distinct = {label: len({t for t, other in pairs if other == label}) for _, label in pairs}
    if len(distinct) < 2 or max(distinct.values()) < 2:
        return
    data = read_data({"train": train}, need=("train",))
    parts = [list(zip(data.splits[s]["text"], data.splits[s]["label"], strict=True)) for s in ("train", "validation")]
    assert sorted(t for part in parts for t, _ in part) == sorted(train["text"])
    assert {label for _, label in parts[0]} == set(range(len(distinct)))
    assert not {t for t, _ in parts[0]} & {t for t, _ in parts[1]}
    assert parts[1]


def test_too_few_rows_to_cut_from() -> None:
    fails({"train": rows(2)}, "2 distinct rows are too few", "validation", need=("train",))


def test_overlap_is_reported_below_the_limit_and_refused_above() -> None:
    train, test = rows(200), rows(100, start=500)
    test["text"][7] = train["text"][3]
    test["text"][50] = train["text"][9].upper()  # another text: the comparison is exact
    data = read_data({"train": train, "test": test})
    assert np.flatnonzero(data.test_overlap).tolist() == [7]
    assert data.report["overlap"]["test_in_train"] == 1
    test["text"][10:16] = train["text"][20:26]
    message = r"7 of 100 test rows \(7.0%\) also stand in train.*limit of 5%.*row 8 of test, row 4 of train"
    fails({"train": train, "test": test}, message)
    allowed = read_data({"train": train, "test": test}, allow_overlap=True)
    assert allowed.test_overlap.sum() == 7
    assert allowed.report["overlap"]["test_in_train_share"] == pytest.approx(0.07)


def test_overlap_counts_rows_that_the_cut_moves() -> None:
    train = rows(100)
    test = {"text": [*train["text"][:4], *(f"new {i}" for i in range(96))], "label": ["class 0", "class 1"] * 50}
    assert read_data({"train": train, "test": test}).test_overlap.sum() == 4


def test_pairs_overlap_only_as_pairs() -> None:
    def split(pairs: list[tuple[str, str]]) -> Columns:
        return {
            "text": [a for a, _ in pairs],
            "text_pair": [b for _, b in pairs],
            "label": [i % 2 for i in range(len(pairs))],
        }

    train = split([("ab", "c"), ("x", "y"), ("1", "2"), ("3", "4")])
    assert not read_data({"train": train, "test": split([("a", "bc"), ("y", "x")])}, need=("test",)).test_overlap.any()
    fails({"train": train, "test": split([("ab", "c"), ("y", "x")])}, "1 of 2 test rows", need=("test",))


def test_duplicates_and_contradictions_are_counted() -> None:
    train = rows(40)
    train["text"][1] = train["text"][2] = train["text"][0]
    data = read_data(three(train=train))
    assert data.report["duplicates"] == {"train": 2, "validation": 0, "test": 0}
    assert data.report["contradictions"]["train"] == 3


def test_the_fingerprint_sees_every_change() -> None:
    first = read_data(three()).fingerprint
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert read_data(three()).fingerprint == first
    changed = three()
    changed["test"]["text"][3] += " "
    relabelled = three()
    relabelled["train"]["label"][0:2] = ["class 1", "class 0"]
    swapped = three()
    for column in swapped["train"].values():
        column[0], column[2] = column[2], column[0]
    others = {read_data(spec).fingerprint for spec in (changed, relabelled, swapped)}
    assert len(others | {first}) == 4


def test_what_is_not_read_is_named(tmp_path: Path) -> None:
    write(tmp_path, "csv", three())
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    (tmp_path / "README.md").write_text("x", encoding="utf-8")
    assert read_data(tmp_path).report["ignored_files"] == ["notes.txt"]
    extra = {split: {**columns, "id": list(columns["text"])} for split, columns in three().items()}
    assert read_data(extra).report["ignored_columns"]["test"] == ["id"]
