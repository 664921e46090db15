"""The comparison in a terminal: it fits, figures stay whole, reasons and verdict stand below."""

from __future__ import annotations

import io
from typing import Any

import pytest
from made_up_result import made_up
from rich.console import Console
from rich.table import Table

from brickyard.compare import shown
from brickyard.compare.table import show, terminal_table
from brickyard.console import estimates


def written(result: dict[str, Any], width: int, encoding: str = "utf-8") -> list[str]:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    show(result, Console(file=file, width=width))
    return raw.getvalue().decode(encoding).splitlines()


def heading(lines: list[str]) -> list[str]:
    return lines[0].split()


@pytest.mark.parametrize("width", [24, 30, 40, 60, 80, 100, 120, 200])
def test_it_fits_and_no_figure_is_broken(width: int) -> None:
    result = made_up()
    lines = written(result, width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for m in shown.in_order(result):
        s = shown.score(m)
        if s.mean is not None:
            metric = shown.metric("accuracy")
            assert f"{metric.show(s.mean, unit=False)} {metric.interval(s.low, s.high)}" in text
    if width >= 80:
        assert "22.7\u00a0M" in text and "86.7\u00a0MiB" in text and "112" in text and "trainable" in lines[0]


def test_columns_give_way_in_a_sensible_order_and_are_named() -> None:
    wide, narrow = written(made_up(), 140), written(made_up(), 80)
    assert " ".join(heading(wide)) == "arm Accuracy, % trainable saved MiB peak MiB step ms train s brick"
    assert " ".join(heading(narrow)) == "arm Accuracy, % trainable saved MiB brick"
    assert any("too narrow for train s, peak MiB, step ms" in line for line in narrow)
    assert not any("too narrow" in line for line in wide)


def test_the_recommended_row_is_marked_and_reasons_and_verdict_stand_below() -> None:
    lines = written(made_up(), 140)
    assert [line.split()[1] for line in lines if line.startswith("▸")] == ["mos:r=7,e=2"]
    assert any("linear-probe (baseline)" in line for line in lines)
    below = lines.index(
        "out-of-memory galore:rank=256: needed 4.3 GiB at step 1, the limit is 4 GiB; the next smaller: batch=8"
    )
    verdict = next(i for i, line in enumerate(lines) if line.startswith("mos:r=7,e=2: 85.8 %"))
    assert below < verdict and lines[-1].startswith("Without the 9 test rows that also stand in train: mos")


def test_markup_escapes_and_control_characters_are_shown_as_text() -> None:
    result = made_up(arms=2)
    result["methods"][0]["arm"] = "[red]x[/red]\x1b[2J\u202e"
    result["methods"][-1]["reason"] = "[link=http://x]\x1b]0;title\x07"
    text = "\n".join(written(result, 140))
    assert "[red]x[/red]\\x1b[2J\\u202e" in text and "[link=http://x]\\x1b]0;title\\x07" in text
    assert "\x1b" not in text and "\u202e" not in text


def test_an_ascii_terminal_gets_ascii() -> None:
    lines = written(made_up(), 100, encoding="ascii")
    assert any(line.startswith(">  mos:r=7,e=2") for line in lines) and any(" - " in line for line in lines)


@pytest.mark.parametrize("arms", [0, 1])
def test_failed_arms_only_and_one_arm(arms: int) -> None:
    lines = written(made_up(arms=arms), 80)
    assert any("timeout rigl:density=0.1: stopped after 600 s" in line for line in lines)
    assert isinstance(terminal_table(made_up(arms=arms)), Table)
    bare = written({"methods": [{"arm": "lora", "status": "failed"}]}, 80)
    assert bare[-1] == "No verdict was reached." and "failed lora: no reason was recorded" in bare


def test_estimates_stay_whole_in_a_narrow_terminal_and_reasons_below() -> None:
    arm, reason = "lora:r=4,target=all-linear + moment-probing:p=64 + s2a:group=16", "hst works on images: " + "x " * 60
    numbers = {
        "trainable_parameters": 22_715_911,
        "saved_for_backward_bytes": 1234.5 * 2**20,
        "peak_bytes": 12_345 * 2**20,
        "step_ms": 1862.1,
        "steps": 1380,
        "train_seconds": 2733.0,
    }
    rows = [
        {"arm": arm, "status": "done", **numbers},
        {"arm": "hst", "status": "refused", "reason": reason.strip()},
    ]
    raw = io.StringIO()
    estimates(rows, Console(file=raw, width=80))
    lines = raw.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    for figure in ("22,715,911", "1,234.5", "12,345", "1,862.1", "1,380", "45 min 33 s"):
        assert figure in lines[2]
    end = next(i for i, line in enumerate(lines) if line.startswith("From a short probe"))
    assert "".join(line[:14].strip() for line in lines[2:end]).replace(" ", "").startswith("lora:r=4")
    assert " ".join("\n".join(lines).split()).endswith(f"refused hst: {reason.strip()}")
