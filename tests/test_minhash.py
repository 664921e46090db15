"""MinHash against brute force over sets, the recall formula of its bands, and de-duplication: complete, idempotent."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import WORDS
from hypothesis import given, settings
from hypothesis import strategies as st

from brickyard.core import minhash
from brickyard.core.pool import Pool
from brickyard.data import dedup

TEXTS = st.lists(st.text(alphabet="ab cdé", max_size=20), min_size=1, max_size=12)


def grams(text: str, n: int, unit: str) -> set:
    units = text if unit == "characters" else text.split()
    return {tuple(units[i : i + n]) for i in range(max(1, len(units) - n + 1))}


def brute(a: str, b: str, n: int, unit: str) -> float:
    one, other = (grams(minhash.normalised(t), n, unit) for t in (a, b))
    return len(one & other) / len(one | other)


def sentences(rows: int, seed: int) -> list[str]:
    g = np.random.default_rng(seed)
    return [" ".join(f"{w}{g.integers(99)}" for w in g.choice(WORDS, 12)) for _ in range(rows)]


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.integers(1, 6), st.sampled_from(["characters", "words"]))
def test_the_true_jaccard_similarity_is_that_of_sets(texts: list[str], n: int, unit: str) -> None:
    i, j = (x.ravel() for x in np.meshgrid(np.arange(len(texts)), np.arange(len(texts))))
    found = minhash.jaccard(texts, i, j, minhash.Near(n=n, unit=unit))  # type: ignore[arg-type]
    assert found == pytest.approx([brute(texts[a], texts[b], n, unit) for a, b in zip(i, j, strict=True)])


def test_signatures_estimate_the_similarity_without_bias() -> None:
    texts = sentences(300, 0)
    cut = [text[: 30 + 3 * (i % 25)] + other for i, (text, other) in enumerate(zip(texts, texts[::-1], strict=True))]
    true = np.array([brute(a, b, 5, "characters") for a, b in zip(texts, cut, strict=True)])
    assert np.ptp(true) > 0.3
    ready = [minhash.normalised(t) for t in texts + cut]
    errors = []
    for seed in range(4):
        signature = minhash.signatures(minhash.shingle(ready, 5), 128, seed)
        errors.append((signature[:300] == signature[300:]).mean(1) - true)
    noise = np.sqrt((true * (1 - true) / 128).mean())
    assert abs(np.mean(errors)) < 3 * noise / math.sqrt(4 * 300) + 0.003
    assert np.std(errors) == pytest.approx(noise, rel=0.15)


def test_bands_find_as_many_pairs_as_their_formula_says() -> None:
    assert minhash.bands_for(128, 0.8) == (6, 21) and minhash.recall(0.8, 6, 21) > 0.995
    assert minhash.recall(0.8, 7, 18) < 0.995
    assert minhash.bands_for(8, 0.05) == (1, 8)
    base = sentences(1, 1)[0]
    texts, near = [base], minhash.Near(threshold=0.8)
    g = np.random.default_rng(0)
    for _ in range(400):  # copies with two changed letters lie around the threshold
        at = g.choice(len(base), 2, replace=False)
        texts.append("".join("#" if i in at else c for i, c in enumerate(base)))
    true = minhash.jaccard(texts, np.zeros(400, int), np.arange(1, 401), near)
    keys = minhash.band_keys(texts, near)
    found = (keys[1:] == keys[0]).any(1)
    assert found.mean() == pytest.approx(np.mean(minhash.recall(true, 6, 21)), abs=0.06)  # type: ignore[arg-type]


def test_near_duplicates_are_those_of_all_pairs() -> None:
    texts = sentences(120, 2)
    texts += [t[:-4] + "xyzw" for t in texts[:40]] + [t.upper() + "  " for t in texts[40:60]]
    near = minhash.Near(permutations=256)
    leader, similarity = minhash.leaders(texts, near, np.arange(len(texts)))
    sets = [grams(minhash.normalised(text), 5, "characters") for text in texts]
    true = {(i, j): len(sets[i] & sets[j]) / len(sets[i] | sets[j]) for j in range(len(texts)) for i in range(j)}
    alike = {j for (_, j), value in true.items() if value >= near.threshold}
    assert set(np.flatnonzero(leader >= 0)) == alike and len(alike) >= 50
    for row in alike:
        assert similarity[row] == pytest.approx(true[leader[row], row]) and similarity[row] >= near.threshold


def test_matches_across_two_sets() -> None:
    known = sentences(50, 3)
    texts = [*sentences(20, 4), known[7] + ".", known[31].upper()]
    found = minhash.matches(texts, known, minhash.Near())
    assert (found[:20] == -1).all() and found[20:].tolist() == [7, 31]
    assert minhash.matches([], known, minhash.Near()).tolist() == []


@settings(max_examples=40, deadline=None)
@given(TEXTS, st.sampled_from(["first", "longest"]), st.integers(0, 3))
def test_dedup_is_idempotent_and_loses_no_row(texts: list[str], keep: str, seed: int) -> None:
    config = dedup.Config(threshold=0.5, n=2, keep=keep)  # type: ignore[arg-type]
    whole = Pool({"text": texts}, seed=seed)
    found = dedup.run(config, whole)
    assert found.complete(len(texts))
    again = dedup.run(config, whole.take(found.rows))
    assert len(again.rows) == len(found.rows) and not again.drops


def test_the_longest_of_alike_rows_stays_whatever_the_order() -> None:
    texts = sentences(60, 5)
    texts += [t + " z" for t in texts[:20]] + texts[20:30]
    config = dedup.Config(keep="longest")
    kept = [
        sorted(shuffled[i] for i in dedup.run(config, Pool({"text": shuffled})).rows)
        for shuffled in ([texts[i] for i in np.random.default_rng(s).permutation(len(texts))] for s in range(3))
    ]
    assert kept[0] == kept[1] == kept[2] and len(kept[0]) == 60 and texts[60] in kept[0]


def test_semantic_duplicates_are_dropped_once_and_for_all() -> None:
    g = np.random.default_rng(0)
    v_ND = g.normal(size=(200, 16))
    v_ND[100:] = v_ND[:100] + 0.02 * g.normal(size=(100, 16))
    v_ND /= np.linalg.norm(v_ND, axis=1, keepdims=True)
    order = np.arange(200)
    for clusters in (1, 4):
        leader, cosine = dedup.semantic_leaders(v_ND, order, 0.05, clusters, 0)
        stay = np.flatnonzero(leader < 0)
        assert set(range(100)) >= set(stay[stay < 100]) and (cosine[leader >= 0] > 0.95).all()
        assert (dedup.semantic_leaders(v_ND[stay], np.arange(len(stay)), 0.05, clusters, 0)[0] < 0).all()
        if clusters == 1:
            assert stay.tolist() == list(range(100)) and leader[150] == 50
