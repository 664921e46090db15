"""Drop rows of low quality: fixed heuristics, a perplexity band, and a classifier against a trusted set.

    heuristics   words, symbols / characters, repeated n-grams / words, stop words, blank or wrongly decoded text
    perplexity   keep the rows whose nats per token lie between the quantiles low and high of all rows
    classifier   q(x) = sigmoid(w . f(x) + b), trained on trusted = 1 against the pool = 0; drop q(x) < cut, or the
                 lowest share of the rows

f(x) are hashed counts of words and bigrams. A pool row is scored by a classifier that was fitted without it (folds by a
hash of the text), and so is the n-gram perplexity where no trusted set is given.

Source: Rae et al., "Scaling language models (Gopher)", arXiv 2112.11446, appendix A1.1 (heuristics); Wenzek et al.,
"CCNet", arXiv 1911.00359 (perplexity); Brown et al., arXiv 2005.14165, appendix A (classifier); boxes of the survey
arXiv 2312.01700. Survey: no measured claim. Left out: toxicity and age, which need models or dates of their own.

Stop words are English, so that rule is off by default: it removes other languages. The data card gives the keep rate of
every label and domain, and names those that are hit hardest.

Shapes: N rows.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.sparse import csr_matrix, vstack
from scipy.special import expit

from brickyard.core.errors import BadData, UsageError
from brickyard.core.method import Record
from brickyard.core.pool import Outcome, Pool, joined, read_pool
from brickyard.data._frozen import FOLDS
from brickyard.data._language import nats_per_token
from brickyard.data._ngrams import counts, fit_logistic, nats_per_character, tf
from brickyard.data._options import belong

RECORD = Record(
    name="quality-filter",
    family="data",
    title="drop rows by heuristics, perplexity quantiles or a classifier against a trusted set",
    paper="arXiv 2312.01700",
    needs=("text-classification", "pair-classification", "regression", "causal-lm"),
    part_of="data-management",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the filters; each rule is off at its neutral value. UsageError outside their ranges."""

    min_words: int = 1
    """fewest words of a row"""
    max_words: int = 100_000
    """most words of a row (Gopher's limit)"""
    max_symbols: float = 1.0
    """largest share of characters that are neither letters, digits nor space; 1: off"""
    max_repetition: float = 0.5
    """largest share of words that stand in a repeated 3-gram; 1: off"""
    min_stop_words: int = 0
    """fewest of Gopher's eight English stop words; 0: off"""
    broken: bool = True
    """drop text with replacement characters or UTF-8 read as Latin-1"""
    perplexity: Literal["off", "ngram", "base"] = "off"
    """band of nats per character of an n-gram model, or per token of --base"""
    low: float = 0.0
    """quantile of the perplexities below which rows go"""
    high: float = 1.0
    """quantile of the perplexities above which rows go"""
    classifier: bool = False
    """score rows by a classifier against the trusted set"""
    trusted: str = "validation"
    """what classifier and ngram compare with: the validation split, or another data set (its split train)"""
    cut: float = 0.0
    """drop rows whose probability of being trusted is below this; 0: off"""
    drop_share: float = 0.0
    """drop this share of the rows, those least like the trusted set; 0: off"""

    def __post_init__(self) -> None:
        if not 0 <= self.min_words <= self.max_words:
            raise UsageError(f"min_words={self.min_words}, max_words={self.max_words}: expected 0 <= min <= max.")
        if not 0 <= self.low < self.high <= 1:
            raise UsageError(f"low={self.low}, high={self.high}: quantiles 0 <= low < high <= 1 were expected.")
        for name in ("max_symbols", "max_repetition", "cut", "drop_share"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise UsageError(f"{name}={value}: a share between 0 and 1 was expected.")
        if not 0 <= self.min_stop_words <= len(STOP_WORDS):
            raise UsageError(f"min_stop_words={self.min_stop_words}: from 0 to {len(STOP_WORDS)} were expected.")
        if (self.cut or self.drop_share) and not self.classifier:
            raise UsageError("cut and drop_share belong to the classifier; say --classifier true too.")
        if (self.low > 0 or self.high < 1) and self.perplexity == "off":
            raise UsageError("low and high belong to the perplexity; say --perplexity ngram (or base) too.")
        compared = self.classifier or self.perplexity == "ngram"
        belong(self, ("trusted",), "classifier=true and perplexity=ngram", used=compared)


STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})  # Gopher, appendix A1.1
_BROKEN = re.compile("\ufffd|[ÃÂ][\u0080-\u00bf]|â\u20ac|â\u0080")
_L2 = 1e-2  # of the classifier: word weights stay small, so that what it learns holds for rows it has not seen


def words(text: str) -> list[str]:
    """Return the words of a text, split at white space."""
    return text.split()


def symbols(text: str) -> float:
    """Return the share of characters that are neither letters, digits nor white space; 0 for an empty text."""
    return sum(not (c.isalnum() or c.isspace()) for c in text) / len(text) if text else 0.0


def repetition(listed: list[str], n: int = 3) -> float:
    """Return the share of words that stand in an n-gram of words seen more than once."""
    grams = list(zip(*(listed[k:] for k in range(n)), strict=False))
    many = {gram for gram, count in Counter(grams).items() if count > 1}
    covered = {i + k for i, gram in enumerate(grams) if gram in many for k in range(n)}
    return len(covered) / len(listed) if listed else 0.0


def trust(pool_NM: csr_matrix, trusted_TM: csr_matrix, fold_N: np.ndarray, l2: float = _L2) -> np.ndarray:
    """Return the probability [N] that each row is of the trusted kind, by classifiers fitted without its fold."""
    out = np.full(len(fold_N), 0.5)
    for fold in np.unique(fold_N):
        others = int((fold_N != fold).sum())
        if not others:
            continue  # all texts are equal: there is nothing to tell apart
        y = np.concatenate([np.zeros(others), np.ones(trusted_TM.get_shape()[0])])
        w_M, b = fit_logistic(csr_matrix(vstack([pool_NM[fold_N != fold], trusted_TM])), y, l2)
        out[fold_N == fold] = expit(pool_NM[fold_N == fold] @ w_M + b)
    return out


def score(config: Config, pool: Pool) -> dict[str, np.ndarray]:
    """Return every score that the options ask for, each [N]."""
    listed = [words(text) for text in pool.texts]
    out = {
        "words": np.array([len(row) for row in listed], np.float64),
        "symbols": np.array([symbols(text) for text in pool.texts]),
        "repetition": np.array([repetition(row) for row in listed]),
        "stop_words": np.array([len(STOP_WORDS & {w.casefold() for w in row}) for row in listed], np.float64),
        "broken": np.array([bool(_BROKEN.search(text)) for text in pool.texts], np.float64),
    }
    if config.perplexity == "base":
        pool.must_have_words("quality-filter with --perplexity base")
        out["nats"] = nats_per_token(pool, pool.texts)[0]
    elif config.perplexity == "ngram":
        out["nats"] = _ngram(config, pool)
    if config.classifier:
        trusted = tf(counts(trusted_texts(config.trusted, pool)))
        out["trust"] = trust(tf(counts(pool.texts)), trusted, pool.folds(FOLDS))
    return out


def trusted_texts(name: str, pool: Pool) -> list[str]:
    """Return the texts of the trusted set; BadData where there is none."""
    if name != "validation":
        return joined(read_pool(name).splits["train"])
    if not pool.wanted_texts:
        raise BadData("these data have no validation split to trust; name a data set with --trusted.")
    return pool.wanted_texts


def _ngram(config: Config, pool: Pool) -> np.ndarray:
    if config.trusted != "validation" or pool.wanted_texts:
        return nats_per_character(pool.texts, trusted_texts(config.trusted, pool))
    out, fold_N = np.empty(len(pool)), pool.folds(FOLDS)
    for fold in np.unique(fold_N):
        mine = [text for text, f in zip(pool.texts, fold_N, strict=True) if f == fold]
        others = [text for text, f in zip(pool.texts, fold_N, strict=True) if f != fold]
        out[fold_N == fold] = nats_per_character(mine, others or mine)
    return out


def run(config: Config, pool: Pool) -> Outcome:
    """Drop the rows that break a rule; a row that breaks several stands under the first of them."""
    found = score(config, pool)
    nats, probability = found.get("nats", np.zeros(0)), found.get("trust", np.zeros(0))
    broken: dict[str, tuple[np.ndarray, str, str]] = {
        "blank": (found["words"] == 0, "words", "no word"),
        "broken encoding": (config.broken & (found["broken"] > 0), "broken", "replacement or misread characters"),
        "too short": (found["words"] < config.min_words, "words", f"words, fewer than {config.min_words}"),
        "too long": (found["words"] > config.max_words, "words", f"words, more than {config.max_words}"),
        "symbols": (found["symbols"] > config.max_symbols, "symbols", f"of characters, above {config.max_symbols}"),
        "repetition": (found["repetition"] > config.max_repetition, "repetition", f"above {config.max_repetition}"),
        "stop words": (found["stop_words"] < config.min_stop_words, "stop_words", f"below {config.min_stop_words}"),
    }
    limits: dict[str, float] = {}
    if len(nats):
        limits["low"], limits["high"] = (float(np.quantile(nats, q)) for q in (config.low, config.high))
        broken["perplexity too low"] = (nats < limits["low"], "nats", f"below {limits['low']:.3f}")
        broken["perplexity too high"] = (nats > limits["high"], "nats", f"above {limits['high']:.3f}")
    if len(probability):
        limits["trust"] = max(
            config.cut, float(np.quantile(probability, config.drop_share)) if config.drop_share else 0
        )
        broken["unlike the trusted set"] = (probability < limits["trust"], "trust", f"below {limits['trust']:.4f}")
    drops: dict[str, dict[int, str]] = {}
    gone = np.zeros(len(pool), bool)
    for rule, (breaks, name, words_) in broken.items():
        rows = np.flatnonzero(breaks & ~gone)
        if len(rows):
            drops[rule] = {int(row): f"{found[name][row]:.4g} {words_}" for row in rows}
        gone |= breaks
    alone = {rule: int(breaks.sum()) for rule, (breaks, _, _) in broken.items() if breaks.any()}
    return Outcome(np.flatnonzero(~gone), drops, found, {"limits": limits, "would_drop_alone": alone})
