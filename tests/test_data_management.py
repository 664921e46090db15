"""Data steps: the mathematics against brute force, their invariants, what they refuse, and the command end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import WORDS, text_data, write_data
from hypothesis import given, settings
from hypothesis import strategies as st

from brickyard import api
from brickyard.cli import main
from brickyard.core import pool, registry
from brickyard.core.base import open_base
from brickyard.core.curate import Request, curate
from brickyard.core.data import read_data
from brickyard.core.errors import BadData, BrickyardError, Refused, UsageError
from brickyard.core.minhash import normalised
from brickyard.core.pool import Outcome, Pool, read_pool
from brickyard.data import data_management, dedup, mix, quality_filter
from brickyard.data import select as selection
from brickyard.data._ngrams import counts, nats_per_character


def sentences(rows: int, seed: int) -> list[str]:
    g = np.random.default_rng(seed)
    return [" ".join(f"{w}{g.integers(99)}" for w in g.choice(WORDS, 12)) for _ in range(rows)]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "blank"),
        ("   \t ", "blank"),
        ("the cafÃ© is closed to us today", "broken encoding"),
        ("bad \ufffd byte in this row of text", "broken encoding"),
        ("two words", "too short"),
        ("#$ %& *( )( ~~ a b", "symbols"),
        ("buy now please " * 6, "repetition"),
    ],
)
def test_each_rule_drops_what_it_should(text: str, rule: str) -> None:
    clean = ["The café in the old town is open until late.", "A plain row, with nothing wrong in it at all."]
    found = quality_filter.run(quality_filter.Config(min_words=3, max_symbols=0.5), Pool({"text": [*clean, text]}))
    assert found.rows.tolist() == [0, 1] and found.drops.keys() == {rule} and 2 in found.drops[rule]


def test_perplexity_keeps_the_middle_quantiles() -> None:
    texts = [f"the film was very good and the meal was fine {i}" for i in range(30)] + ["qzx jkv wqx zzj kqv xxj"] * 3
    config = quality_filter.Config(perplexity="ngram", low=0.05, high=0.9)
    found = quality_filter.run(config, Pool({"text": texts}, {"text": texts[:20]}))
    assert set(found.drops["perplexity too high"]) >= {30, 31, 32} and "perplexity too low" in found.drops
    nats = nats_per_character(["the film was good"], ["the film was good"] * 50)
    assert nats[0] < 0.5 < nats_per_character(["zqxj vkw"], ["the film was good"] * 50)[0]


def test_the_character_model_is_nearly_a_distribution() -> None:
    known, context = ["abcabcabd", "bca bcd"], "abcabcabc"
    plain = [chr(c) for c in range(33, 256) if normalised(chr(c)) == chr(c)]  # the others become one of these, or two
    nats_N = nats_per_character([context, *(context + c for c in plain)], known)
    after_N = np.exp(9 * nats_N[0] - 10 * nats_N[1:])
    assert 0.85 < after_N.sum() < 1.02 and plain[after_N.argmax()] == "a"


@pytest.mark.parametrize("name", ["quality", "dsir"])
def test_scores_follow_their_rows_and_find_the_other_domain(name: str) -> None:
    wanted = sentences(60, 6)
    texts = sentences(60, 7) + [f"def f{i}(x): return x[{i}] ** {i} != {{}}" for i in range(12)]
    whole = Pool({"text": texts}, {"text": wanted})

    def scores(p: Pool) -> np.ndarray:
        if name == "dsir":
            return selection.score(selection.Config(by="dsir"), p)[1]["dsir"]
        return quality_filter.score(quality_filter.Config(classifier=True), p)["trust"]

    order = np.random.default_rng(0).permutation(len(texts))
    assert scores(whole.take(order)) == pytest.approx(scores(whole)[order], rel=1e-4, abs=1e-6)
    assert scores(whole)[60:].max() < np.median(scores(whole)[:60])


def test_hashed_counts_are_those_of_words_and_bigrams() -> None:
    x_NM = counts(["good film, good", "GOOD  film , good", ""])
    assert (x_NM[0] != x_NM[1]).nnz == 0
    assert x_NM[0].sum() == 4 + 3  # good film , good, and three bigrams
    assert x_NM[0].max() == 2.0


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_budget_is_exact_and_its_rows_unique(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 40))
    scores = np.array(data.draw(st.lists(st.sampled_from([-np.inf, 0.0, 1.0, 2.5]), min_size=size, max_size=size)))
    group = np.array(data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size)))
    budget = data.draw(st.integers(1, size))
    balance = data.draw(st.sampled_from(["natural", "equal", "free"]))
    able = int((scores > -np.inf).sum())
    if budget > able:
        with pytest.raises(UsageError, match="ask for fewer"):
            selection.select(scores, budget, group, balance=balance)
        return
    rows = selection.select(scores, budget, group, balance=balance)
    assert len(set(rows.tolist())) == len(rows) == budget and (scores[rows] > -np.inf).all()
    if balance == "free":
        assert scores[rows].sum() == np.sort(scores)[::-1][:budget].sum()
    for g in range(4):  # inside a group, nobody better was passed over
        mine, other = rows[group[rows] == g], np.setdiff1d(np.flatnonzero(group == g), rows)
        if balance != "free" and len(mine) and len(other):
            assert scores[mine].min() >= scores[other].max()


def test_quotas_keep_shares_and_hand_on_what_a_group_lacks() -> None:
    assert selection.quotas(np.array([50, 30, 20]), np.array([50, 30, 20]), 10).tolist() == [5, 3, 2]
    assert selection.quotas(np.array([50, 1, 20]), np.array([1, 1, 1]), 21).tolist() == [10, 1, 10]
    assert selection.quotas(np.array([2, 0, 3]), np.array([0, 1, 0]), 5).tolist() == [2, 0, 3]


def test_k_centre_takes_the_farthest_and_deita_the_different() -> None:
    v_ND = np.array([[0.0, 0.0], [0.1, 0.0], [5.0, 0.0], [0.0, 3.0], [0.1, 0.1]])
    chosen = selection.k_centre(v_ND, 3)
    assert set(chosen.tolist()) >= {2, 3} and len(set(selection.k_centre(v_ND, 5).tolist())) == 5
    unit = np.eye(3)[[0, 0, 1, 2]]
    rows, filled = selection.diverse(np.array([4.0, 3.0, 2.0, 1.0]), unit, 3, 0.9)
    assert rows.tolist() == [0, 2, 3] and filled == 0
    assert selection.diverse(np.array([4.0, 3.0, 2.0, 1.0]), unit, 4, 0.9)[1] == 1


def test_gumbel_top_k_draws_by_weight() -> None:
    log_weights = np.log(np.array([8.0, 1.0, 1.0]))
    first = [int((log_weights + selection.gumbel(3, seed)).argmax()) for seed in range(2000)]
    assert np.bincount(first)[0] / 2000 == pytest.approx(0.8, abs=0.03)


def test_forgetting_counts_turns_to_the_worse() -> None:
    p_EN = np.array([[0.9, 0.2], [0.3, 0.6], [0.8, 0.7], [0.1, 0.9]])
    assert selection.forgotten(p_EN).tolist() == [2.0, 0.0]


def test_selection_by_frozen_states(text_base: Path, quiet_libraries: None) -> None:
    """Wrong labels have the highest cross-validated loss; every way of selecting keeps its budget and its seed."""
    rows = text_data(160)["train"]
    wrong = [3, 40, 77, 120]
    labels = list(rows["label"])
    for row in wrong:
        labels[row] = "bad" if labels[row] == "good" else "good"
    whole = Pool({"text": rows["text"], "label": labels}, text_data()["validation"], base=str(text_base), device="cpu")
    value, found, _, _ = selection.score(selection.Config(by="loss"), whole)
    assert len(set(np.argsort(value)[:8]) & set(wrong)) >= 3 and (value == -found["loss"]).all()
    order = np.random.default_rng(0).permutation(160)
    moved = selection.score(selection.Config(by="loss"), whole.take(order))[1]["loss"]
    assert moved == pytest.approx(found["loss"][order], rel=2e-2, abs=2e-3)
    for by in ("random", "loss", "confidence", "variability", "forgetting", "k-centre", "deita", "nearest"):
        config = selection.Config(by=by, budget=0.3, noisy=0.05)  # type: ignore[arg-type]
        first = selection.run(config, whole)
        assert len(first.rows) == len(set(first.rows)) == 48 and first.complete(160), by
        assert len(first.drops["noisy"]) == 8 and not set(first.drops["noisy"]) & set(first.rows)
        assert (selection.run(config, whole).rows == first.rows).all()
        assert abs(sum(labels[i] == "good" for i in first.rows) - 24) <= 2


def test_instruction_following_difficulty_is_a_ratio_of_losses(causal_base: Path, quiet_libraries: None) -> None:
    columns = {
        "prompt": ["the film was", "a book is", "it was"] * 4,
        "completion": ["very good", "dull", "not fine"] * 4,
    }
    whole = Pool(columns, base=str(causal_base), device="cpu")
    found = selection.run(selection.Config(by="ifd", budget=4.0), whole)
    scores = found.scores
    assert scores["ifd"] == pytest.approx(scores["nats_after"] / scores["nats_alone"]) and len(found.rows) == 4
    with pytest.raises(Refused, match="prompt, completion"):
        selection.run(selection.Config(by="ifd"), Pool({"text": ["a", "b"]}, base=str(causal_base)))
    alone = quality_filter.score(
        quality_filter.Config(perplexity="base"), Pool({"text": ["very good"]}, base=str(causal_base))
    )
    assert alone["nats"][0] == pytest.approx(scores["nats_alone"][0], rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.01, 1), min_size=2, max_size=6),
    st.lists(st.floats(-3, 3), min_size=6, max_size=6),
    st.floats(0.1, 3),
    st.floats(0, 0.5),
)
def test_doremi_weights_stay_a_distribution_and_follow_the_excess(
    given_w: list[float], excess: list[float], eta: float, smoothing: float
) -> None:
    w_D, e_D = np.array(given_w) / sum(given_w), np.array(excess[: len(given_w)])
    new_D = mix.doremi_update(w_D, e_D, eta=eta, smoothing=smoothing)
    raw_D = w_D * np.exp(eta * np.maximum(e_D, 0))
    assert new_D == pytest.approx((1 - smoothing) * raw_D / raw_D.sum() + smoothing / len(w_D))
    assert new_D.sum() == pytest.approx(1) and (new_D >= smoothing / len(w_D) - 1e-12).all()
    assert mix.doremi_update(w_D, -abs(e_D), eta=eta, smoothing=0) == pytest.approx(w_D)


def test_temperature_runs_from_proportional_to_uniform() -> None:
    sizes = np.array([100.0, 10.0, 1.0])
    assert mix.tempered(sizes, 1.0) == pytest.approx(sizes / 111)
    assert mix.tempered(sizes, np.inf) == pytest.approx([1 / 3] * 3)
    assert mix.tempered(sizes, 2.0) == pytest.approx(np.sqrt(sizes) / np.sqrt(sizes).sum())


def test_repeated_rows_are_worth_less_and_less() -> None:
    assert mix.worth(np.array([100.0]), np.array([60.0, 100.0])).tolist() == [60.0, 100.0]
    found = mix.worth(np.array([100.0]), np.array([200.0, 1600.0, 1e6]))
    assert found[0] == pytest.approx(100 + 1540 * (1 - math.exp(-1 / 15.4))) and 190 < found[0] < 200
    assert found[1] < 1600 and found[2] == pytest.approx(100 * 16.4)


def test_the_scaling_fit_recovers_planted_exponents() -> None:
    n, d = (x.ravel() for x in np.meshgrid(np.geomspace(1e6, 1e9, 5), np.geomspace(1e8, 1e11, 5)))
    law = mix.Law(1.7, 400.0, 0.34, 410.0, 0.28)
    found = mix.fit_scaling(n, d, law.loss(n, d))
    assert found.size_exponent == pytest.approx(0.34, rel=0.01) and found.data_exponent == pytest.approx(0.28, rel=0.01)
    assert found.floor == pytest.approx(1.7, rel=0.01) and found.by_size == pytest.approx(400, rel=0.1)
    for bad in ((n[:5], d[:5], law.loss(n, d)[:5]), (n, np.full(25, 1e9), law.loss(n, d)), (n, d, -law.loss(n, d))):
        with pytest.raises(BadData):
            mix.fit_scaling(*bad)


def test_windows_end_in_text_and_do_not_cross_it() -> None:
    stream = mix.byte_stream(["ab", "é"], 3)
    assert stream.tolist() == [256] * 3 + [97, 98] + [256] * 3 + list("é".encode())
    found = mix.windows(stream, torch.Generator().manual_seed(0), 200, 3)
    assert set(map(tuple, found.tolist())) == {
        (256, 256, 256, 97),
        (256, 256, 97, 98),
        (256, 256, 256, 195),
        (256, 256, 195, 169),
    }


def test_doremi_gives_weight_to_what_is_still_to_be_learned() -> None:
    easy, hard = ["aaaaaaaaaaaaaaaa"] * 20, sentences(40, 8)
    config = mix.Config(by="doremi", steps=40, reference_steps=160, batch=16, context=4, width=32)
    w_D, steps_SD, _ = mix.doremi([mix.byte_stream(t, 4) for t in (easy, hard)], config, 0)
    assert steps_SD.sum(1) == pytest.approx(np.ones(40)) and w_D == pytest.approx(steps_SD.mean(0))
    assert w_D[1] > 0.6
    again = mix.mix(config, {"easy": easy, "hard": hard}, 0)
    assert again.tolist() == w_D.tolist()


def test_a_mixture_has_its_rows_and_repeats_evenly() -> None:
    columns = {"text": sentences(60, 9), "where": ["a"] * 50 + ["b"] * 10}
    found = mix.run(mix.Config(by="uniform", rows=90), Pool(columns, domain="where"))
    copies = np.bincount(found.rows, minlength=60)
    assert len(found.rows) == 90 and copies[:50].sum() == 45 and set(copies[50:]) == {4, 5} and copies[:50].max() == 1
    assert found.complete(60) and found.report["passes"]["b"] == 4.5
    with pytest.raises(UsageError, match="'b'"):
        mix.run(mix.Config(rows=2), Pool({"text": ["x"] * 101, "where": ["a"] * 100 + ["b"]}, domain="where"))


@pytest.mark.parametrize(
    ("step", "options", "columns", "words"),
    [
        ("select", {"budget": 99.0}, {"text": ["a b", "c d"]}, ["99", "2"]),
        ("select", {"budget": 1.5}, {"text": ["a b", "c d"]}, ["1.5"]),
        ("select", {"by": "loss"}, {"text": ["a b", " "]}, ["blank", "row 2", "quality-filter"]),
        ("select", {"by": "dsir"}, {"text": ["a b", "c d"]}, ["validation", "--target"]),
        ("mix", {}, {"text": ["a", "b"]}, ["--domain-column"]),
        ("mix", {}, {"text": ["a", "b"], "label": ["x", "x"]}, ["one domain"]),
        ("mix", {"by": "doremi"}, {"text": ["a", " "], "label": ["x", "y"]}, ["'y'", "no text"]),
        ("quality-filter", {"min_words": 9}, {"text": ["a b", "c"]}, ["every row"]),
        ("quality-filter", {"min_words": 2}, {"text": ["a b", "c"], "label": ["x", "y"]}, ["'y'"]),
        ("quality-filter", {"cut": 0.5}, {"text": ["a"]}, ["classifier"]),
        ("dedup", {"threshold": 1.5}, {"text": ["a"]}, ["1.5"]),
        ("dedup", {"threshold": "high"}, {"text": ["a"]}, ["high"]),
        ("dedup", {}, {"text": ["a", None]}, ["row 2", "empty"]),
        ("dedup", {}, {"text": ["a", 3]}, ["row 2", "int"]),
        ("dedup", {}, {"text": []}, ["no rows"]),
        ("dedup", {}, {"text": ["a", "\udce9t\udce9"]}, ["row 2", "encoding"]),
        ("dedup", {}, {"body": ["a"]}, ["text", "body", "--text-column"]),
        ("data-management", {"steps": ("data-management",)}, {"text": ["a"]}, ["steps"]),
        ("lora", {}, {"text": ["a"]}, ["lora"]),
    ],
)
def test_bad_input_is_refused_and_nothing_written(
    step: str, options: dict, columns: dict, words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(BrickyardError) as caught:
        curate(Request(step=step, data={"train": columns}, out=tmp_path / "out", options=options))
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / "out").exists()


def test_a_huge_line_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "big.txt").write_bytes(b"short line\n" + b"x" * 60_000_000)
    monkeypatch.setattr(dedup, "run", lambda config, given: pytest.fail("the step was reached"))
    with pytest.raises(BadData, match=r"row 2: 'text' has 60,000,000 bytes.*50,000,000"):
        curate(Request(step="dedup", data=tmp_path / "big.txt", out=tmp_path / "out"))
    (tmp_path / "latin.txt").write_bytes("a\ncafé\n".encode("latin-1"))
    with pytest.raises(BadData, match="line 2"):
        curate(Request(step="dedup", data=tmp_path / "latin.txt", out=tmp_path / "out"))


def test_a_step_that_loses_a_row_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Outcome(np.array([0, 0, 2]), {"rule": {1: ""}}).complete(3)
    assert not Outcome(np.array([0, 2]), {}).complete(3)
    assert not Outcome(np.array([0, 2]), {"a": {1: ""}, "b": {1: ""}}).complete(3)
    assert not Outcome(np.array([0, 1, 2]), {"a": {1: ""}}).complete(3)
    monkeypatch.setattr(dedup, "run", lambda config, given: Outcome(np.array([0])))
    with pytest.raises(BrickyardError, match="nothing was written"):
        curate(Request(step="dedup", data={"train": {"text": ["a", "b"]}}, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    splits = text_data(160)
    train = splits["train"]
    train["text"][5] = splits["test"]["text"][0]
    train["text"][6] = train["text"][9].upper()
    train["text"][7] = train["text"][8]
    train["where"] = ["web"] * 80 + ["book"] * 80
    return write_data(tmp_path / "given", splits)


def test_the_command_end_to_end(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    argv = ["data", "dedup", "--data", str(folder), "--domain-column", "where", "--permutations", "64", "--json"]
    assert main([*argv, "--out", str(out)]) == 0
    card = json.loads(capsys.readouterr().out)
    assert card == json.loads((out / "data_card.json").read_text())
    assert card["options"]["permutations"] == 64 and card["seed"] == 0 and card["seconds"]["step"] >= 0
    assert card["contamination"]["exact"] == 1 and card["contamination"]["removed"]
    assert card["rules"]["in test"]["examples"][0] | {"excerpt": ""} == {
        "row": 6,
        "why": "row 1 of test",
        "excerpt": "",
    }
    dropped = {rule: found["dropped"] for rule, found in card["rules"].items()}
    assert card["rows"] == {"read": 160, "kept": 160 - sum(dropped.values()), "written": 160 - sum(dropped.values())}
    assert dropped["exact duplicate"] == 1 and dropped["near duplicate"] >= 1
    assert card["groups"]["domain"]["web"]["kept"] + card["groups"]["domain"]["book"]["kept"] == card["rows"]["kept"]
    lines = pq.read_table(out / "card" / "rows.parquet").to_pylist()
    assert [line["row"] for line in lines] == list(range(1, 161))
    assert all((line["copies"] == 0) == (line["rule"] is not None and line["excerpt"] is not None) for line in lines)
    assert lines[8]["rule"] == "exact duplicate" and lines[8]["why"] == "row 8 stays for it"
    assert pq.read_table(out / "test.parquet") == pq.read_table(folder / "test.parquet")
    assert pq.read_table(out / "train.parquet").column_names == ["text", "label", "where"]

    assert main([*argv, "--out", str(tmp_path / "again")]) == 0
    names = ("train.parquet", "card/rows.parquet")
    assert all((tmp_path / "again" / n).read_bytes() == (out / n).read_bytes() for n in names), "not deterministic"
    argv[3] = str(out)
    assert main([*argv, "--out", str(tmp_path / "twice")]) == 0  # its own output loses nothing
    assert pq.read_table(tmp_path / "twice" / "train.parquet") == pq.read_table(out / "train.parquet")

    data = read_data(out)
    assert len(data.splits["train"]) == card["rows"]["kept"] and not data.report["overlap"]["test_in_train"]
    capsys.readouterr()
    report = [
        "data",
        "data-management",
        "--data",
        str(folder),
        "--out",
        str(tmp_path / "r"),
        "--contamination",
        "report",
    ]
    assert main([*report, "--steps", "dedup:threshold=0.7", "quality-filter"]) == 0
    said = capsys.readouterr().out
    assert "160 of 160 rows" in said and "left in train" in said
    steps = json.loads((tmp_path / "r" / "data_card.json").read_text())["report"]["steps"]
    assert steps["dedup:threshold=0.7"]["would_drop"]["exact duplicate"] == 1 and "agreement" in steps


def test_a_random_subset_has_as_many_tokens(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["data", "select", "--by", "random", "--budget", "0.4", "--data", str(folder), "--seed", "3"]
    places = {name: tmp_path / name for name in ("chosen", "drawn", "again", "drawn2")}
    assert main([*argv, "--out", str(places["chosen"]), "--baseline", str(places["drawn"])]) == 0
    assert "random subset:" in capsys.readouterr().out
    assert main([*argv, "--out", str(places["again"]), "--baseline", str(places["drawn2"])]) == 0
    read = {name: read_pool(str(place)).splits for name, place in places.items()}
    assert read["drawn"] == read["drawn2"] and read["drawn"]["test"] == read["chosen"]["test"]
    assert read["drawn"]["train"] != read["chosen"]["train"]
    tokenizer: Any = open_base("embedded:minilm").tokenizer
    count = {
        name: sum(len(ids) for ids in tokenizer(part["train"]["text"], add_special_tokens=False)["input_ids"])
        for name, part in read.items()
    }
    longest = max(len(ids) for ids in tokenizer(read["chosen"]["train"]["text"])["input_ids"])
    assert abs(count["drawn"] - count["chosen"]) <= longest
    card = json.loads((places["chosen"] / "data_card.json").read_text())["baseline"]
    assert (card["tokens"], card["budget"]) == (count["drawn"], count["chosen"])
    beside = json.loads((places["drawn"] / "data_card.json").read_text())
    assert beside["step"] == "random subset" and beside["options"] == {"tokens": count["chosen"], "of": "select"}
    test = set(read["drawn"]["test"]["text"])
    for seed in range(3):  # nearly all rows are drawn, but never one that stands in test
        api.data("dedup", data=str(folder), out=tmp_path / f"d{seed}", baseline=tmp_path / f"b{seed}", seed=seed)
        assert not test & set(read_pool(str(tmp_path / f"b{seed}")).splits["train"]["text"])
    with pytest.raises(UsageError, match="folder of its own"):
        api.data("dedup", data=str(folder), out=tmp_path / "x", baseline=tmp_path / "x")


def test_a_folder_that_holds_something_is_never_written_over(tmp_path: Path) -> None:
    """Least of all the data set itself: what its rows were before would be gone."""
    (tmp_path / "rows").mkdir()
    lines = "a line of text\nanother one here\na line of text\n"
    (tmp_path / "rows" / "train.txt").write_text(lines, "utf-8")
    for more in ({"out": tmp_path / "rows"}, {"out": tmp_path / "new", "baseline": tmp_path / "rows"}):
        with pytest.raises(UsageError, match="is not empty; give a new folder"):
            curate(Request(step="dedup", data=tmp_path / "rows", **more))
    assert (tmp_path / "rows" / "train.txt").read_text("utf-8") == lines and not (tmp_path / "new").exists()


def test_text_files_stay_text_and_columns_are_renamed(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train.txt").write_text("a line of text\nanother one here\na line of text\n\n", "utf-8")
    (tmp_path / "corpus" / "test.txt").write_text("something else\n", "utf-8")
    card = curate(Request(step="dedup", data=tmp_path / "corpus", out=tmp_path / "a"))
    assert (tmp_path / "a" / "train.txt").read_text("utf-8") == "a line of text\nanother one here\n\n"
    assert card["rows"] == {"read": 4, "kept": 3, "written": 3}
    (tmp_path / "rows.jsonl").write_text('{"body": "x y z", "n": 1}\n{"body": "u v w", "n": 2}\n', "utf-8")
    curate(
        Request(step="dedup", data=tmp_path / "rows.jsonl", out=tmp_path / "b", text_column="body", domain_column="n")
    )
    assert pq.read_table(tmp_path / "b" / "train.parquet").to_pydict() == {"text": ["x y z", "u v w"], "n": [1, 2]}
    with pytest.raises(BadData, match="no column 'where'"):
        curate(Request(step="dedup", data=tmp_path / "rows.jsonl", out=tmp_path / "c", domain_column="where"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["data"], ["STEP"]),
        (["data", "dedupe", "--data", "x", "--out", "y"], ["dedup"]),
        (["data", "dedup", "--data", "x", "--out", "y", "--thresold", "1"], ["--threshold"]),
        (["data", "dedup", "--data", "x", "--out", "y", "--near", "maybe"], ["maybe", "true nor false"]),
        (["data", "dedup:n=3", "--data", "x", "--out", "y", "--n", "4"], ["twice"]),
        (["data", "dedup + select", "--data", "x", "--out", "y"], ["one after the other"]),
        (["data", "select", "--by", "luck", "--data", "embedded:digits", "--out", "y"], ["luck", "dsir"]),
        (["check", "dedup"], ["data-management"]),
    ],
)
def test_bad_usage_of_the_command(argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said


def test_a_steps_options_stand_in_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "dedup", "--help"]) == 0
    assert "--permutations" in capsys.readouterr().out
    assert main(["show", "dedup"]) == 0
    assert "see brickyard show data-management" in capsys.readouterr().out


def test_every_step_agrees_with_its_contract() -> None:
    steps = [e.record.name for e in registry.records("data") if not e.record.slot]
    assert {"data-management", "dedup", "mix", "quality-filter", "select"} <= set(steps)
    assert (
        data_management.agreement({1, 2}, {2, 3}) == pytest.approx(1 / 3)
        and data_management.agreement(set(), set()) == 1
    )
    found = pool.shares(["a", "b", "a"], np.array([True, False, False]))
    assert found == {"a": {"read": 2, "kept": 1, "rate": 0.5}, "b": {"read": 1, "kept": 0, "rate": 0.0}}
