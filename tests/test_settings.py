"""Run files: typed, strict, and without YAML's surprises."""

from pathlib import Path

import pytest

from brickyard.core.errors import UsageError
from brickyard.core.settings import Wanted, read

WANTED = {
    "seeds": Wanted(int),
    "minutes": Wanted(float),
    "data": Wanted(str),
    "json": Wanted(bool),
    "methods": Wanted(str, many=True),
    "search": Wanted(str, choices=("random", "halving")),
}


def given(tmp_path: Path, text: str, name: str = "run.yaml") -> dict:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return read(tmp_path / name, WANTED)


def test_reads_yaml_and_toml_alike(tmp_path: Path) -> None:
    expected = {"seeds": 3, "minutes": 1e-4, "data": "no", "json": True, "methods": ["lora", "mos:r=7"]}
    assert given(tmp_path, 'seeds: 3\nminutes: 1e-4\ndata: "no"\njson: true\nmethods: [lora, "mos:r=7"]\n') == expected
    toml = 'seeds = 3\nminutes = 1e-4\ndata = "no"\njson = true\nmethods = ["lora", "mos:r=7"]\n'
    assert given(tmp_path, toml, "run.toml") == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seeds: 3\nseeds: 4\n", ["line 2", "twice"]),
        ("seeds: true\n", ["line 1", "bool", "int"]),
        ("data: no\n", ["line 1", "quotes"]),
        ('seeds: "3"\n', ["line 1", "without quotes"]),
        ("minutes: .nan\n", ["finite"]),
        ("sede: 3\n", ["line 1", "seeds"]),
        ("search: halve\n", ["halving"]),
        ("a: &a [1]\nb: *a\n", ["aliases"]),
        ("data: !!python/object/apply:os.system [ls]\n", ["line 1"]),
        ("data: [1\n", ["line"]),
        ("- a\n- b\n", ["option: value"]),
        ("1: 2\n", ["quotes"]),
        ("methods: [lora, 3]\n", ["line 1", "str"]),
    ],
)
def test_refuses_with_the_line_and_what_to_do(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        given(tmp_path, text)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_nested_aliases_are_refused_before_they_expand(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)]
    with pytest.raises(UsageError, match="aliases"):
        given(tmp_path, "\n".join(lines))


def test_large_missing_and_non_text_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read(tmp_path / "none.yaml", WANTED)
    (tmp_path / "big.yaml").write_bytes(b"#" * 1_000_001)
    with pytest.raises(UsageError, match="at most"):
        read(tmp_path / "big.yaml", WANTED)
    (tmp_path / "latin.yaml").write_bytes(b"data: caf\xe9\n")
    with pytest.raises(UsageError, match="UTF-8"):
        read(tmp_path / "latin.yaml", WANTED)
