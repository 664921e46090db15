"""The report as text: what stands in it, in which order, escaped, and sensible when parts are missing."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import unicodedata
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_result import made_up

from brickyard.compare import details, report, shown
from brickyard.compare.report import page, render, report_picture
from brickyard.core.errors import BrickyardError, UsageError

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
VOID = {"meta", "link", "wbr", "input", "br", "hr", "img"}


class Outline(HTMLParser):
    """Every element with its attributes, the text, and whether the elements nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html.replace("<wbr>", ""))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def ids(self) -> list[str]:
        return [str(a["id"]) for tag, a in self.elements if tag == "section"]


@pytest.fixture(scope="module")
def full() -> str:
    return page(made_up())


def test_everything_stands_in_the_promised_order(full: str) -> None:
    outline = Outline(full)
    assert outline.ids() == [
        "table",
        "quality",
        "seeds",
        "curves",
        "pairs",
        "confusion",
        "retained",
        "receipts",
        "data",
        "setup",
    ]
    order = [
        "Which of 16 ways",
        "Use mos:r=7,e=2.",
        "85.8 % accuracy (84.1",
        "Without the 9 test rows",
        "+6.4",
        "linear-probe",
    ]
    places = [outline.words.index(words) for words in order]
    assert places == sorted(places)
    links = {a["href"] for tag, a in outline.elements if tag == "a"}
    assert links == {f"#{name}" for name in outline.ids()}
    assert outline.words.rstrip().endswith("not observed") and "--memory 4GiB --seeds 3" in outline.words


def test_the_file_is_self_contained(full: str) -> None:
    outline = Outline(full)
    policies = [a["content"] for tag, a in outline.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == [POLICY]
    for tag, attributes in outline.elements:
        assert tag not in ("iframe", "object", "embed", "base", "form", "img")
        for name in ("src", "href", "action", "data", "poster"):
            assert re.match(r"#|data:", attributes.get(name) or "#"), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"https?://|//[a-z]|@import|url\(", full)
    ids = [a["id"] for _, a in outline.elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_it_stays_small_with_twelve_arms_and_long_curves() -> None:
    assert len(page(made_up(points=2000)).encode()) < 400_000


def test_the_same_result_gives_the_same_file(full: str) -> None:
    assert page(made_up()) == full


def test_render_writes_one_file_and_keeps_the_old_one_on_error(tmp_path: Path, full: str) -> None:
    path = tmp_path / "new" / "report.html"
    assert render(made_up(), path) == path
    assert path.read_bytes() == full.encode("utf-8") and list(path.parent.iterdir()) == [path]
    with pytest.raises(UsageError, match=r"result\.json"):
        render({"verdict": {}}, path)
    assert path.read_bytes() == full.encode("utf-8")


def test_scores_are_per_cent_with_intervals_and_every_figure_says_how_it_was_found(full: str) -> None:
    row = re.search(r'<tr class="best">.*?</tr>', full, re.S)
    assert row and "<b>85.8</b><i>[84.1,\u00a087.5]</i>" in row[0] and "recommended" in row[0] and "41,230" in row[0]
    heads = re.findall(r"<th scope=\"col\".*?</th>", full[full.index('id="table"') : full.index('id="quality"')], re.S)
    kinds = [re.findall(r'class="kind">(\w+)<', head) for head in heads]
    counted, measured = ["counted"], ["measured"]
    assert kinds == [[], measured, counted, counted, measured, measured, measured, counted, counted]
    facts = re.findall(r"<div><dt>.*?</div>", full, re.S)
    assert len(facts) == 8 and all(re.search(r'class="kind">(measured|counted)<', fact) for fact in facts)


def test_a_run_may_say_how_a_cost_was_found() -> None:
    result = made_up(arms=2)
    assert report.kind_of(shown.COSTS[2], result["methods"]) == "measured"
    result["methods"][1]["cost"]["how"] = {"peak_bytes": "counted: tensor storages", "step_ms": "nonsense"}
    assert report.kind_of(shown.COSTS[2], result["methods"]) == "counted"
    assert report.kind_of(shown.COSTS[3], result["methods"]) == "measured"


def test_failed_refused_and_baseline_rows_are_marked_with_reasons(full: str) -> None:
    words = Outline(full).words
    for text in ("failed loss was NaN at step 37", "timeout stopped after 600 s", "out of memory needed 4.3 GiB"):
        assert text in words
    assert "refused fits no classification task" in words and full.count(">baseline</span>") == 3
    assert full.count('class="badge tie"') == 2 and "Arms with a score: 12 of 16" in words


def test_pairs_are_seen_from_the_recommended_arm_in_words() -> None:
    result = made_up(arms=4, failed=False)
    result["pairs"] = [
        {
            "a": "lora",
            "b": "mos:r=7,e=2",
            "difference": -0.05,
            "low": -0.08,
            "high": -0.02,
            "p": 0.001,
            "p_holm": 0.003,
        },
        {"a": "mos:r=7,e=2", "b": "full", "difference": -0.04, "low": -0.07, "high": -0.01, "p": 0.01, "p_holm": 0.02},
        {"a": "lora", "b": "full", "difference": -0.01, "low": -0.03, "high": 0.01, "p": 0.4, "p_holm": 0.4},
    ]
    groups = report.view(result)["pairs"]["groups"]
    (first, seen), (second, rest) = groups
    assert (first, second) == (True, False)
    told = [(row["b"], row["word"], row["difference"], row["interval"]) for row in seen]
    assert told == [
        ("full", "worse", "−4.0", "[−7.0,\u00a0−1.0]"),
        ("lora", "better", "+5.0", "[+2.0,\u00a0+8.0]"),
    ]
    assert [(row["a"], row["b"], row["word"]) for row in rest] == [("lora", "full", "cannot tell")]


@pytest.mark.parametrize(
    ("difference", "low", "high", "p", "word"),
    [
        (0.02, 0.01, 0.03, 0.05, "better"),
        (-0.02, -0.03, -0.01, 0.05, "worse"),
        (0.02, 0.01, 0.03, 0.051, "cannot tell"),
        (0.02, 0.0, 0.04, 0.01, "cannot tell"),
        (0.02, None, None, 0.01, "better"),
        (0.02, 0.01, 0.03, None, "cannot tell"),
        (float("nan"), 0.01, 0.03, 0.01, "cannot tell"),
        (0.0, None, None, 0.01, "cannot tell"),
    ],
)
def test_a_pair_differs_only_when_p_and_interval_agree(
    difference: float, low: float | None, high: float | None, p: float | None, word: str
) -> None:
    pair = {"difference": difference, "low": low, "high": high, "p_holm": p}
    assert shown.pair_word(pair) == word
    swapped = {"better": "worse", "worse": "better", "cannot tell": "cannot tell"}
    assert shown.pair_word(pair, lower_is_better=True) == swapped[word]


def test_a_metric_where_less_is_better_turns_order_and_words() -> None:
    result = made_up(arms=4, failed=False)
    result["task"]["metric"] = "bits_per_byte"
    for m, value in zip(result["methods"], (1.9, 1.2, 1.5, 0.9), strict=True):
        m["score"] |= {
            "metric": "bits_per_byte",
            "mean": value,
            "low": value - 0.05,
            "high": value + 0.05,
            "per_seed": [value],
        }
    assert [m["score"]["mean"] for m in shown.in_order(result)] == [0.9, 1.2, 1.5, 1.9]
    html = page(result)
    assert "Lower is better" in html and "1.200" in html and 'data-first="ascending" aria-sort="ascending"' in html


CONTROL = "\u202e\u2066\u200e\u200b\ufeff\u00ad\x00\x1b\x7f\x9b\u2028\ud800\n"


def test_control_and_bidirectional_characters_are_written_as_escapes() -> None:
    assert shown.visible("a\u202eb\x1b[2Jc\ud800") == "a\\u202eb\\x1b[2Jc\\ud800"
    assert shown.visible("é 漢字 می\u200cخواهم 👩\u200d💻") == "é 漢字 می\u200cخواهم 👩\u200d💻"
    for character in CONTROL:
        assert character not in shown.visible(f"x{character}y")


@settings(max_examples=12, deadline=None)
@given(st.text(st.one_of(st.characters(), st.sampled_from(CONTROL + "<>&\"'{}%`/")), min_size=1, max_size=24))
def test_no_text_from_outside_becomes_markup(text: str) -> None:
    hostile = text + "</script><script>alert(1)</script>{{7*7}}\u202e"
    result = made_up(arms=2, failed=True, labels=("a", hostile), points=8)
    result["methods"][0]["arm"] = result["verdict"]["recommended"] = result["confusion"]["arm"] = hostile
    result["methods"][-1]["reason"] = result["verdict"]["sentence"] = result["command"] = hostile
    result["methods"][1]["receipt"] = {"warnings": [hostile], "matched": {hostile: [hostile]}, hostile: hostile}
    result["methods"][1]["setting"] = {hostile: hostile}
    result["curves"] = {hostile: next(iter(result["curves"].values()))}
    result["environment"] = {hostile: [hostile]}
    html = page(result)
    outline = Outline(html)
    assert [tag for tag, _ in outline.elements].count("script") == 1
    assert "{{7*7}}" in outline.words and "\\u202e" in outline.words
    allowed = html.replace("\n", "")
    assert not [
        c for c in allowed if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\u200c\u200d"
    ]
    picture = report_picture(result)
    assert "<script" not in picture and ElementTree.fromstring(picture).tag.endswith("svg")


def without(*keys: str) -> dict[str, Any]:
    result = made_up()
    for key in keys:
        result[key] = None
    return result


PARTS = (
    "pairs",
    "verdict",
    "environment",
    "budget",
    "data",
    "base",
    "task",
    "command",
    "curves",
    "confusion",
    "without_overlap",
)


@pytest.mark.parametrize("missing", [(), ("curves", "confusion", "without_overlap"), PARTS])
def test_parts_that_are_none_are_left_out(missing: tuple[str, ...]) -> None:
    result = without(*missing)
    for m in result["methods"] if missing == PARTS else []:
        m["retained"] = m["receipt"] = None
    ids = Outline(page(result)).ids()
    assert not {"curves", "confusion"} & set(ids) if missing else "curves" in ids
    if missing == PARTS:
        assert ids == ["table", "quality", "seeds", "setup"]
        for key in PARTS:
            del result[key]
        assert Outline(page(result)).ids() == ids


def test_nothing_but_the_arms_is_needed() -> None:
    html = page({"methods": [{"arm": "lora", "status": "failed", "reason": "crashed"}]})
    assert Outline(html).ids() == ["table", "setup"] and "crashed" in html and "No verdict was reached" in html
    odd = {
        "methods": [{"arm": "lora", "score": {"mean": float("nan"), "low": None}, "cost": {"step_ms": float("inf")}}]
    }
    assert "nan" not in Outline(page(odd)).words and Outline(page({"methods": []})).ids() == ["setup"]


def test_the_verdict_without_overlapping_rows_stands_at_the_top_and_with_the_data() -> None:
    result = made_up(arms=4)
    same = Outline(page(result)).words
    assert "Without the 9 test rows that also stand in train, the recommendation stays mos:r=7,e=2." in same
    full = "Without the 9 test rows that also stand in train: mos:r=7,e=2: 85.7 % accuracy (84.0 to 87.4)."
    assert same.count(full) == 1
    result["without_overlap"]["verdict"] = {"recommended": "lora", "sentence": "lora: 84.0 % accuracy."}
    result["without_overlap"]["removed"] = 1
    other = "Without the test row that also stands in train: lora: 84.0 % accuracy."
    assert Outline(page(result)).words.count(other) == 2


def test_one_arm_and_failed_arms_only() -> None:
    one = Outline(page(made_up(arms=1, failed=False)))
    assert "Does lora work for embedded:minilm" in one.words and "pairs" not in one.ids()
    lost = Outline(page(made_up(arms=0)))
    assert "quality" not in lost.ids() and "needed 4.3 GiB" in lost.words and "nothing to recommend" in lost.words


def test_many_classes_stay_readable() -> None:
    thirty = page(made_up(labels=tuple(f"class {i}" for i in range(30))))
    table = thirty[thirty.index('class="matrix"') : thirty.index('id="retained"')]
    assert len(re.findall("<td", table)) == 31 * 31
    fifty = page(made_up(labels=tuple(f"class {i}" for i in range(50))))
    assert 'class="matrix"' not in fifty and "The matrix of 50 classes is too large" in fifty


def test_the_confusion_matrix_counts() -> None:
    seen = details.confusion({"arm": "x", "labels": ["cat", "dog", "owl"], "matrix": [[8, 2, 0], [1, 5, 4], [0, 0, 0]]})
    assert [line["recall"] for line in seen["lines"]] == ["80", "50", "–"] and seen["precision"] == ["89", "71", "0"]
    assert seen["largest"] == [("dog", "owl", 4), ("cat", "dog", 2), ("dog", "cat", 1)]
    assert seen["lines"][0]["cells"] == [(8, "d5"), (2, "e3"), (0, "")] and seen["lines"][1]["cells"][2] == (4, "e6")


def test_receipts_and_data_are_told(full: str) -> None:
    words = Outline(full).words
    assert "encoder.layer.{0–5}.attention.self.query (6)" in words and "24 of 25" in words
    assert (
        "1 of 25 trainable tensors did not move: classifier.bias" in words
        and "9 test rows also stand in train" in words
    )
    table = details.data_report(made_up()["data"])["splits"]
    assert table["columns"] == ["Rows", "Duplicates", "Contradictions", "Largest row", "Truncated", "Longest"]
    assert [text for _, text in table["rows"][0][1]] == [
        "5,370",
        "17",
        "2",
        "3.92 KiB".replace(" ", "\u00a0"),
        "41",
        "311",
    ]


@given(st.lists(st.from_regex(r"\A[a-c]\.([0-9]|1[0-9])\.[xy]([0-3])?\Z"), max_size=30, unique=True))
def test_folded_names_can_be_unfolded(names: list[str]) -> None:
    unfolded = []
    for text in details.fold(names):
        name, _, count = text.partition(" (")
        head, brace, rest = name.partition("{")
        if not brace:
            unfolded.append(name)
            continue
        ranges, _, tail = rest.partition("}")
        numbers = [
            n for part in ranges.split(",") for a, _, b in [part.partition("–")] for n in range(int(a), int(b or a) + 1)
        ]
        assert count == f"{len(numbers)})"
        unfolded += [f"{head}{n}{tail}" for n in numbers]
    assert sorted(unfolded) == sorted(names)


def test_what_was_kept_is_named_by_the_written_change() -> None:
    result = made_up(arms=3, failed=False)
    for m, after in zip(result["methods"], (0.71214, 0.68, 0.75), strict=True):
        m["retained"] = {"what": "d2", "metric": "accuracy", "before": 0.7121, "after": after}
    assert {row["arm"]: row["word"] for row in report.view(result)["retained"]["rows"]} == {
        "lora": "as before",
        "mos:r=7,e=2": "forgot",
        "full": "gained",
    }
    result["methods"][0]["retained"] |= {"metric": "loss", "before": 2.0, "after": 2.5}
    assert report.view(result)["retained"]["rows"][-1]["word"] == "forgot"
    drift = {"what": "drift of the base's states on fixed inputs", "drift": 0.02}
    for m in result["methods"]:
        m["retained"] = drift
    assert report.view(result)["retained"]["scored"] is False


def test_the_picture_stands_alone() -> None:
    text = report_picture(made_up())
    root = ElementTree.fromstring(text)
    shapes = list(root.iter())
    assert {e.tag.rpartition("}")[2] for e in shapes} <= {
        "svg",
        "style",
        "rect",
        "text",
        "path",
        "circle",
        "g",
        "title",
    }
    card = next(e for e in shapes if e.tag.endswith("rect"))
    assert card.get("fill") == "#fff" and card.get("width") == "791"
    words = " ".join(e.text or "" for e in shapes)
    assert "memory saved for the backward pass" in words and "mos:r=7,e=2" in words and "var(" not in text
    assert "Size of the brick" in report_picture(made_up(), "brick_bytes")
    with pytest.raises(BrickyardError, match="at least one that finished"):
        report_picture(made_up(arms=0))


def test_every_text_colour_has_enough_contrast() -> None:
    style = (Path(report.__file__).parent / "templates" / "report.css.j2").read_text(encoding="utf-8")
    palettes = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)]
    assert len(palettes) == 3
    for palette in palettes:
        for text in ("ink", "muted", "accent", "front", "warn"):
            for paper in ("paper", "soft", "tint", "wash"):
                assert contrast(palette[text], palette[paper]) >= 4.5, (text, paper)
        for level in (46, 38, 30):  # the strongest cells of the heat map
            for colour in ("accent", "warn"):
                assert contrast(palette["ink"], mixed(palette[colour], palette["paper"], level)) >= 4.5
        assert contrast(palette["mark"], palette["paper"]) >= 3


def mixed(a: str, b: str, share: int) -> str:
    parts = [(int(a[i : i + 2], 16) * share + int(b[i : i + 2], 16) * (100 - share)) // 100 for i in (1, 3, 5)]
    return "#" + "".join(f"{p:02x}" for p in parts)


def contrast(a: str, b: str) -> float:
    """Return the contrast ratio of WCAG 2."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_the_report_needs_no_torch_and_changes_nothing() -> None:
    code = "import sys, brickyard.compare.report, brickyard.compare.table; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    result = made_up()
    before = copy.deepcopy(result)
    page(result)
    assert result == before
