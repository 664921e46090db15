"""Drop duplicates: exact ones by hash, near ones by MinHash, and ones of equal meaning by frozen embeddings.

    exact     t_i = t_j
    near      J(S(t_i), S(t_j)) >= threshold,          S: 5-grams of characters or words (see `core.minhash`)
    semantic  cos(v_i, v_j) > 1 - eps,                 v [N,D]: mean of the base's final states, of length 1

In each way the earliest row of those that are alike stays; a row that goes is listed with the row that stays for it.
Near duplicates are proposed by MinHash bands and decided by their true Jaccard similarity. For semantic ones, the
embeddings are clustered by k-means and compared inside each cluster, again and again until a pass drops nothing. The
whole step, run on its own output, therefore drops nothing.

Source: Lee et al., "Deduplicating training data makes language models better", arXiv 2107.06499; Abbas et al.,
"SemDeDup", arXiv 2303.09540; boxes of the survey arXiv 2312.01700. Survey: no measured claim. Left out: suffix-array
removal of repeated substrings inside documents.

Shapes: N rows, D channels, K clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from brickyard.core import minhash
from brickyard.core.errors import UsageError
from brickyard.core.method import Record
from brickyard.core.pool import Outcome, Pool
from brickyard.data._frozen import embeddings

RECORD = Record(
    name="dedup",
    family="data",
    title="drop exact, near (MinHash) and semantic duplicates",
    paper="arXiv 2312.01700",
    needs=("text-classification", "pair-classification", "regression", "causal-lm"),
    part_of="data-management",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of de-duplication; UsageError outside their ranges."""

    near: bool = True
    """drop near duplicates, by MinHash and true Jaccard similarity"""
    semantic: bool = False
    """drop rows of equal meaning too, by the embeddings of --base"""
    threshold: float = 0.8
    """Jaccard similarity of near duplicates"""
    permutations: int = 128
    """values of a MinHash signature"""
    n: int = 5
    """units of a shingle"""
    unit: Literal["characters", "words"] = "characters"
    """units of a shingle; words suit documents of several hundred words"""
    normalise: bool = True
    """compare near duplicates in Unicode NFKC, case-folded, with single spaces"""
    keep: Literal["first", "longest"] = "first"
    """which of the rows that are alike stays; longest does not depend on the order of the rows"""
    eps: float = 0.05
    """semantic duplicates have a cosine above 1 - eps"""
    clusters: int = 0
    """clusters of the embeddings; 0: one for every 4,096 rows"""

    def __post_init__(self) -> None:
        minhash.Near(threshold=self.threshold, permutations=self.permutations, n=self.n, unit=self.unit)
        if not 0 < self.eps < 1:
            raise UsageError(f"eps={self.eps}: a distance between 0 and 1 was expected, e.g. 0.05.")
        if self.clusters < 0:
            raise UsageError(f"clusters={self.clusters}: give 0 for the default, or how many.")


_CLUSTER = 4096  # rows of a cluster by default: its cosines take 64 MB
_ROUNDS = 10  # of k-means: SemDeDup needs groups, not optimal ones


def exact_leaders(texts: list[str], order: np.ndarray) -> np.ndarray:
    """Return for each text the earliest equal one in `order`, or -1 where it is that one itself: [N]."""
    first: dict[str, int] = {}
    leader = np.full(len(texts), -1, np.int64)
    for row in order.tolist():
        kept = first.setdefault(texts[row], row)
        if kept != row:
            leader[row] = kept
    return leader


def k_means(v_ND: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Return the cluster [N] of each unit vector: spherical k-means from rows drawn by `seed`."""
    draw = np.random.PCG64(np.random.SeedSequence([seed, clusters])).random_raw(len(v_ND))
    centre_KD = v_ND[np.argsort(draw, kind="stable")[:clusters]]
    cluster = np.zeros(len(v_ND), np.int64)
    for _ in range(_ROUNDS if clusters > 1 else 0):
        cluster = (v_ND @ centre_KD.T).argmax(1)
        total_KD = np.zeros_like(centre_KD)
        np.add.at(total_KD, cluster, v_ND)
        length_K1 = np.linalg.norm(total_KD, axis=1, keepdims=True)
        centre_KD = np.where(length_K1 > 0, total_KD / np.maximum(length_K1, 1e-12), centre_KD)
    return cluster


def semantic_leaders(
    v_ND: np.ndarray, order: np.ndarray, eps: float, clusters: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each unit vector its leader (-1 where it stays) and their cosine: [N] and [N].

    Every pass clusters the rows that are left and, inside each cluster, drops a row with cos > 1 - eps to an earlier
    one that stays; the last pass drops nothing.
    """
    leader, cosine = np.full(len(v_ND), -1, np.int64), np.ones(len(v_ND))
    while True:
        alive = order[leader[order] < 0]
        cluster = k_means(v_ND[alive], clusters or -(-len(alive) // _CLUSTER), seed)
        before = int((leader >= 0).sum())
        for k in range(int(cluster.max(initial=0)) + 1):
            rows = alive[cluster == k]
            alike = np.triu(v_ND[rows] @ v_ND[rows].T, 1)
            for i in range(len(rows)):
                if leader[rows[i]] < 0:
                    fall = np.flatnonzero((alike[i] > 1 - eps) & (leader[rows] < 0))
                    leader[rows[fall]], cosine[rows[fall]] = rows[i], alike[i, fall]
        if int((leader >= 0).sum()) == before:
            return leader, cosine


def run(config: Config, pool: Pool) -> Outcome:
    """Drop the duplicates of a pool; `scores["similarity"]` is that to the row it fell to, 0 for a row that stays."""
    texts, size = pool.texts, len(pool)
    order = np.arange(size)
    if config.keep == "longest":
        order = np.array(sorted(range(size), key=lambda row: (-len(texts[row]), texts[row])), np.int64)
    leader, similarity = exact_leaders(texts, order), np.ones(size)
    rule = np.where(leader >= 0, "exact duplicate", "").astype(object)
    if config.near:
        near = minhash.Near(
            threshold=config.threshold,
            permutations=config.permutations,
            n=config.n,
            unit=config.unit,
            normalise=config.normalise,
            seed=pool.seed,
        )
        alive = order[leader[order] < 0]
        found, value = minhash.leaders([texts[row] for row in alive], near, np.arange(len(alive)))
        _fall(leader, similarity, rule, alive, found, value, "near duplicate")
    if config.semantic:
        pool.must_have_words("dedup")
        alive = order[leader[order] < 0]
        v_ND, _ = embeddings(pool.take(alive))
        found, value = semantic_leaders(v_ND, np.arange(len(alive)), config.eps, config.clusters, pool.seed)
        _fall(leader, similarity, rule, alive, found, value, "semantic duplicate")
    root, number = minhash.roots(leader), pool.numbered
    drops: dict[str, dict[int, str]] = {}
    for row in np.flatnonzero(leader >= 0).tolist():
        what = f"row {number[root[row]]} stays for it"
        if rule[row] != "exact duplicate":
            via = "it" if root[row] == leader[row] else f"row {number[leader[row]]}, which is like it,"
            what += f"; similarity to {via} {similarity[row]:.3f}"
        drops.setdefault(str(rule[row]), {})[row] = what
    scores = {"similarity": np.where(leader >= 0, similarity, 0.0), "stays": number[root]}
    labels = pool.labels
    report = {
        "by_way_of_another": int((root[leader >= 0] != leader[leader >= 0]).sum()),
        "dropped_with_another_label": None
        if labels is None
        else sum(labels[row] != labels[root[row]] for row in np.flatnonzero(leader >= 0)),
        "bands": dict(zip(("rows", "bands"), minhash.bands_for(config.permutations, config.threshold), strict=True)),
    }
    return Outcome(np.flatnonzero(leader < 0), drops, scores, report)


def _fall(
    leader: np.ndarray,
    similarity: np.ndarray,
    rule: np.ndarray,
    alive: np.ndarray,
    found: np.ndarray,
    value: np.ndarray,
    name: str,
) -> None:
    """Enter what was found among the rows `alive` into `leader`, `similarity` and `rule`, in place."""
    fell = found >= 0
    leader[alive[fell]], similarity[alive[fell]] = alive[found[fell]], value[fell]
    rule[alive[fell]] = name
