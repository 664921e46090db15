"""Hashed n-grams of words as sparse counts, and what can be fitted to them in seconds: a classifier, a language model.

Shapes: N rows, M hash buckets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from scipy.special import expit

from brickyard.core.minhash import normalised, shingle

BUCKETS = 10_000  # DSIR, section 4: unigrams and bigrams in 10k buckets
_MARK = re.compile(r"([^\w\s])")
_CHUNK = 4096  # rows hashed at once


def counts(texts: Sequence[str], buckets: int = BUCKETS) -> csr_matrix:
    """Return how often each bucket of hashed words, marks and their bigrams stands in each text: [N, M], float64.

    Bigrams of a text of one word are that word again. Case, Unicode form and white space do not matter.
    """
    parts = []
    for begin in range(0, len(texts), _CHUNK):
        words = [_MARK.sub(r" \1 ", normalised(text)) for text in texts[begin : begin + _CHUNK]]
        for n in (1, 2):
            found = shingle(words, n, "words")
            row = np.repeat(np.arange(len(found)), np.diff(found.starts)) + begin
            parts.append((row, (found.hashes % np.uint64(buckets)).astype(np.int64)))
    row_S, bucket_S = (np.concatenate(column) for column in zip(*parts, strict=True))
    return csr_matrix((np.ones(len(row_S)), (row_S, bucket_S)), shape=(len(texts), buckets))


def log_shares(x_NM: csr_matrix, smoothing: float = 1.0) -> np.ndarray:
    """Return the log of each bucket's share of all n-grams, with `smoothing` added to every count: [M]."""
    total_M = np.asarray(x_NM.sum(0)).ravel() + smoothing
    return np.log(total_M) - np.log(total_M.sum())


def fit_logistic(x_NM: csr_matrix, y_N: np.ndarray, l2: float) -> tuple[np.ndarray, float]:
    """Return weights [M] and bias of a ridge-penalised logistic regression in which both classes weigh the same.

    Minimises mean_i c(y_i) log(1 + exp(-s_i (w x_i + b))) + l2 / 2 |w|^2 by L-BFGS; s is +1 for y = 1, -1 for y = 0.
    """
    sign_N = np.where(y_N > 0, 1.0, -1.0)
    weight_N = np.where(y_N > 0, 0.5 / max((y_N > 0).mean(), 1e-12), 0.5 / max((y_N <= 0).mean(), 1e-12)) / len(y_N)

    def loss(wb: np.ndarray) -> tuple[float, np.ndarray]:
        margin_N = sign_N * (x_NM @ wb[:-1] + wb[-1])
        pull_N = -weight_N * sign_N * expit(-margin_N)
        gradient = np.append(x_NM.T @ pull_N + l2 * wb[:-1], pull_N.sum())
        return float((weight_N * np.logaddexp(0, -margin_N)).sum() + l2 / 2 * (wb[:-1] ** 2).sum()), gradient

    found = minimize(loss, np.zeros(x_NM.get_shape()[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 100})
    return found.x[:-1], float(found.x[-1])


def tf(x_NM: csr_matrix) -> csr_matrix:
    """Return log(1 + count), each row scaled to length 1: features that do not grow with the length of a text."""
    x = csr_matrix((np.log1p(x_NM.data), x_NM.indices, x_NM.indptr), shape=x_NM.shape)
    length_N = np.sqrt(np.asarray(x.multiply(x).sum(1)).ravel())
    return csr_matrix(x.multiply(1 / np.maximum(length_N, 1e-12)[:, None]))


def nats_per_character(texts: Sequence[str], known: Sequence[str], order: int = 5) -> np.ndarray:
    """Return the mean nats of a character of each text under a character language model of `known`: [N].

    p_m(c | the m - 1 characters before) = (count(those and c) + a p_{m-1}(c | ...)) / (count(those) + a), m = 1..order,
    p_0 = 1 / 256, a = 2, with counts hashed into 2^20 buckets; what collides makes the probabilities sum to about 1.
    """
    start = " " * (order - 1)
    ready, seen = ([start + (normalised(t) or " ") for t in given] for given in (texts, known))
    length_N = np.array([len(t) - len(start) for t in ready])
    inside = np.arange(length_N.sum()) - np.repeat(np.cumsum(length_N) - length_N, length_N)
    probability, context = np.full(len(inside), 1 / 256), np.full(len(inside), float(sum(map(len, seen))))
    for m in range(1, order + 1):
        table = np.bincount(_bucket(shingle(seen, m).hashes), minlength=_TABLE)
        found = shingle(ready, m)
        first = np.repeat(found.starts[:-1], length_N) + inside
        probability = (table[_bucket(found.hashes[first + order - m])] + _BACK_OFF * probability) / (
            context + _BACK_OFF
        )
        if m < order:  # the same characters, with one more before them, are the context of the next order
            context = table[_bucket(found.hashes[first + order - m - 1])]
    return -np.add.reduceat(np.log(probability), np.cumsum(length_N) - length_N) / length_N


_TABLE = 1 << 20
_BACK_OFF = 2.0


def _bucket(hashes: np.ndarray) -> np.ndarray:
    return (hashes % np.uint64(_TABLE)).astype(np.int64)
