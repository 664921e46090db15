"""Code to train on from the fixing commits of a git repository: what is read, what is not, and how it is dealt."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from brickyard.cli import main
from brickyard.core.data import read_data
from brickyard.core.errors import BadData, UsageError
from brickyard.core.fixes import GRANULARITIES
from brickyard.data.fix_commits import Config, source, tokens

WEAK = "import hashlib\n\n\ndef digest(text):\n    return hashlib.md5(text)\n\n\ndef other():\n    return 1\n"
FIXED = WEAK.replace("md5", "sha256")
FUNCTION = "def digest(text):\n    return hashlib.sha256(text)\n"
Commit = Callable[[str, dict[str, str | bytes]], str]


@pytest.fixture
def commit(tmp_path: Path) -> Commit:
    """Write files and commit them to a repository at tmp_path; the commit's name is returned."""

    def git(*command: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", "-C", str(tmp_path), *identity, *command], check=True, capture_output=True)
        return done.stdout.decode().strip()

    def made(message: str, files: dict[str, str | bytes]) -> str:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        git("add", "-A")
        git("commit", "-qm", message)
        return git("rev-parse", "HEAD")

    git("init", "-q")
    return made


ALL = {"validation": 0.0, "test": 0.0}  # every file goes to train


def test_a_fix_gives_the_code_before_and_after_and_where_it_is_from(commit: Commit, tmp_path: Path) -> None:
    commit("Begin", {"a.py": WEAK, "b.py": "x = 1\n", "LICENSE": "\n  Apache License\n"})
    commit("Change x", {"b.py": "x = 2\n"})
    name = commit("Avoid injection\n\nThis is cwe-327.", {"a.py": FIXED, "new.py": "y = 1\n"})
    columns = source(Config(**ALL), tmp_path, 0).splits["train"]
    (row,) = zip(*columns.values(), strict=True)
    assert dict(zip(columns, row, strict=True)) == {
        "text": FUNCTION,
        "before": FUNCTION.replace("sha256", "md5"),
        "commit": name,
        "file": "a.py",
        "subject": "Avoid injection",
        "cwe": "CWE-327",
        "licence": "Apache License",
    }
    lines = source(Config(granularity="line", words=(), **ALL), tmp_path, 0).splits["train"]
    assert lines["text"] == ["return hashlib.sha256(text)\n", "x = 2\n"], "newest first, whatever the subject says"
    assert source(Config(granularity="file", **ALL), tmp_path, 0).splits["train"]["text"] == [FIXED]


def test_what_is_not_read_is_counted(commit: Commit, tmp_path: Path) -> None:
    many = {f"many{i}.py": f"x = {i}\n" for i in range(4)}
    files = {"a.py": WEAK, "tests/test_a.py": "x = 1\n", "old.py": "print 1\n", "big.py": "x = 1\n" * 90}
    files |= {"latin.py": "x = 1\n", "gone.py": "x = 1\ny = 2\n", "readme.md": "1"}
    commit("Begin", {**many, **files})
    commit("Fix many", {name: text.replace("x", "y") for name, text in many.items()})
    commit("Fix a", {"a.py": FIXED, "tests/test_a.py": "x = 2\n", "readme.md": "2"})
    commit("Fix some", {"old.py": "print 2\n", "big.py": "x = 2\n" * 90, "latin.py": "x = 'é'\n".encode("latin-1")})
    commit("Fix more", {"gone.py": "y = 2\n"})
    made = source(Config(max_files=3, max_bytes=500, **ALL), tmp_path, 0)
    assert made.splits["train"]["text"] == [FUNCTION]
    assert made.skipped.pop("more than 3 files changed")[0].endswith("(Fix many)")
    assert {rule: [of.split()[0] for of in left] for rule, left in made.skipped.items()} == {
        "nothing is left of the code that was changed": ["gone.py"],
        "more than 500 bytes": ["big.py"],
        "not UTF-8": ["latin.py"],
        "does not parse": ["old.py"],
        "a test": ["tests/test_a.py"],
    }
    more = source(Config(granularity="line", tests=True, **ALL), tmp_path, 0)
    assert {"big.py", "many0.py", "tests/test_a.py"} <= set(more.splits["train"]["file"])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_fixed_file_that_does_not_parse_gives_no_row(granularity: str, commit: Commit, tmp_path: Path) -> None:
    commit(
        "Begin", {"a.py": WEAK, "old.py": "x = 1\n", "null.py": "x = 1\n", "deep.py": "x = 1\n", "cured.py": "x = (\n"}
    )
    deep = "x = " + "-" * 100_000 + "1\n"
    commit(
        "Fix", {"a.py": FIXED, "old.py": "print 2\n", "null.py": "x = 2 # \0\n", "deep.py": deep, "cured.py": "x = 2\n"}
    )
    made = source(Config(granularity=granularity, **ALL), tmp_path, 0)  # type: ignore[arg-type]
    assert set(made.splits["train"]["file"]) == {"a.py", "cured.py"}
    assert [of.split()[0] for of in made.skipped.pop("does not parse")] == ["deep.py", "null.py", "old.py"]
    assert not made.skipped


def test_a_file_is_in_one_split_whatever_the_commit(commit: Commit, tmp_path: Path) -> None:
    names = [f"part{i}.py" for i in range(30)]
    for value in range(3):
        commit("Fix all", {name: f"value = '{name} {value}'\n" for name in names})
    found = {seed: source(Config(max_files=30, validation=0.3, test=0.3), tmp_path, seed).splits for seed in (0, 0, 1)}
    files = {seed: {split: set(rows["file"]) for split, rows in splits.items()} for seed, splits in found.items()}
    assert files[0] != files[1]
    for dealt in files.values():
        assert sum(len(of) for of in dealt.values()) == 30 and set().union(*dealt.values()) == set(names)
        assert min(len(of) for of in dealt.values()) > 3


def test_the_verb_writes_what_a_language_model_trains_on(
    commit: Commit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit("Begin", {f"a{i}.py": WEAK.replace("text", f"text{i // 2}") for i in range(6)} | {"t_test.py": "x = 1\n"})
    commit(
        "Fix",
        {f"a{i}.py": FIXED.replace("text", f"text{i // 2}") + f"# {i}\n" for i in range(6)} | {"t_test.py": "x = 2\n"},
    )
    out = tmp_path / "out"
    step = "fix-commits:validation=0,test=0,granularity=file"
    assert main(["data", step, "--data", str(tmp_path), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "3 of 6 rows of train kept" in said and "1  not read: a test, e.g. t_test.py at " in said
    card = json.loads((out / "data_card.json").read_text())
    assert card["rules"]["same tokens"]["dropped"] == 3 and card["skipped"]["a test"]["count"] == 1
    table = pq.read_table(out / "train.parquet").to_pydict()
    assert [len(set(table[name])) for name in ("text", "commit", "file")] == [3, 1, 3]
    data = read_data(out, task="causal-lm", need=("train",))
    assert data.kind == "causal-lm" and len(data.splits["train"]) == 3


def test_tokens_leave_out_layout_and_comments_but_no_code() -> None:
    assert tokens("if x:  # why\n    y = 'a # b'\n") == tokens("if x:\n  y = 'a # b'") != tokens("if x:\n  y = 'a'")
    assert tokens("else:\n  (") == ("else:", "(")


def test_bad_input_is_refused(commit: Commit, tmp_path: Path) -> None:
    with pytest.raises(BadData, match="git cannot read"):
        source(Config(), tmp_path / "nowhere", 0)
    commit("Begin", {"a.py": WEAK})
    with pytest.raises(BadData, match=r"none of the 1 commits .* begins with one of fix, cve"):
        source(Config(), tmp_path, 0)
    commit("Fix", {"a.py": "def (:\n"})
    with pytest.raises(BadData, match=r"no row for train .*1 does not parse"):
        source(Config(), tmp_path, 0)
    for options in ({"granularity": "word"}, {"max_files": 0}, {"validation": 0.5, "test": 0.5}, {"test": -0.1}):
        with pytest.raises(UsageError):
            Config(**options)  # type: ignore[arg-type]
