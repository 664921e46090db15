"""Near duplicates among many texts: shingles, MinHash signatures, banded candidates, and their true Jaccard similarity.

    S(t)    = the n-grams of characters or words of a text
    J(s, t) = |S(s) & S(t)| / |S(s) | S(t)|
    sig_p   = min over x in S of (a_p x + b_p mod 2^32),   P[sig_p(s) = sig_p(t)] = J(s, t)
    P[s and t share one of B bands of R values] = 1 - (1 - J^R)^B

Candidates are only what the bands propose: each pair is compared by its true J, so that no row is called a duplicate by
an accident of hashing. Text is worked on in chunks; what is kept of a row are the 8 B bytes of its band keys.

Source: Broder, "On the resemblance and containment of documents" (1997); Leskovec, Rajaraman and Ullman, "Mining of
Massive Datasets", section 3.4. Shapes: N rows, S shingles, P permutations, B bands.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from brickyard.core.errors import UsageError

Unit = Literal["characters", "words"]

_BLOCK = 1 << 15  # shingles hashed at once, so that the work stays in the processor's cache
_CHUNK = 1 << 21  # characters whose shingles are held at once
_PAIRS = 1 << 14  # pairs compared at once; their number leaves 50 bits of each shingle
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd; 2^64 over the golden ratio


@dataclass(frozen=True)
class Shingles:
    """Hashes of the n-grams of N texts: row i has `hashes[starts[i]:starts[i + 1]]`, at least one, repeats included."""

    hashes: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1


@dataclass(frozen=True, kw_only=True)
class Near:
    """How near duplicates are found.

    Attributes:
        threshold: Jaccard similarity from which two texts are near duplicates.
        permutations: values of a signature.
        n: units of a shingle.
        unit: "characters" or "words" (split at white space).
        normalise: compare texts in Unicode NFKC, case-folded, with single spaces.
        seed: of the permutations.

    Raises:
        UsageError: a value outside its range.
    """

    threshold: float = 0.8
    permutations: int = 128
    n: int = 5
    unit: Unit = "characters"
    normalise: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise UsageError(f"threshold={self.threshold}: a Jaccard similarity above 0, at most 1, was expected.")
        if not 8 <= self.permutations <= 4096:
            raise UsageError(f"permutations={self.permutations}: from 8 to 4096 were expected; 128 is usual.")
        if not 1 <= self.n <= 64:
            raise UsageError(f"n={self.n}: shingles of 1 to 64 units were expected; 5 is usual.")
        if self.unit not in ("characters", "words"):
            raise UsageError(f"unit={self.unit!r}: characters or words were expected.")
        if self.seed < 0:
            raise UsageError(f"seed={self.seed}: a seed is not negative.")

    def prepared(self, text: str) -> str:
        """Return the text whose shingles are compared."""
        return normalised(text) if self.normalise else text


def normalised(text: str) -> str:
    """Return a text in Unicode NFKC, case-folded, with every run of white space as one space and none at the ends."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def shingle(texts: Sequence[str], n: int, unit: Unit = "characters") -> Shingles:
    """Hash the n-grams of each text; a text shorter than n units has one shingle, all of it."""
    counts = np.fromiter(map(len, texts), np.int64, len(texts))
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    units = _mixed(codes.astype(np.uint64) + np.uint64(1))
    if unit == "words":
        units, counts = _words(codes, units, counts)
    # A gap of zeros behind each row: the one window of a short row, even of an empty one, reaches no further.
    gap = n
    first = np.cumsum(counts + gap) - counts - gap
    laid = np.zeros(int((counts + gap).sum()) + n, np.uint64)
    laid[np.arange(len(units)) + np.repeat(np.arange(len(counts)) * gap, counts)] = units
    size = len(laid) - n
    window, factor = np.zeros(size, np.uint64), np.uint64(1)
    with np.errstate(over="ignore"):
        for k in range(n):
            window += laid[k : k + size] * factor
            factor = factor * _BASE
    kept = np.maximum(counts - n + 1, 1)
    starts = np.concatenate([[0], np.cumsum(kept)])
    place = np.arange(starts[-1]) + np.repeat(first - starts[:-1], kept)
    return Shingles(_mixed(window[place]), starts)


def _words(codes: np.ndarray, units: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hash the words of rows of characters: the hash of each word, and how many each row has."""
    row = np.repeat(np.arange(len(counts)), counts)
    letter = ~np.isin(codes, _SPACES)
    begins = letter.copy()
    begins[1:] &= ~(letter[:-1] & (row[1:] == row[:-1]))
    start = np.flatnonzero(begins)
    if not len(start):
        return np.zeros(0, np.uint64), np.zeros(len(counts), np.int64)
    word = np.cumsum(begins) - 1
    inside = np.where(letter, np.arange(len(codes)) - start[np.maximum(word, 0)], 0)
    with np.errstate(over="ignore"):
        power = np.cumprod(np.full(int(inside.max()) + 1, _BASE, np.uint64))
        hashed = np.add.reduceat(np.where(letter, units * power[inside], np.uint64(0)), start)
    return _mixed(hashed), np.bincount(row[start], minlength=len(counts))


_SPACES = np.array([9, 10, 11, 12, 13, 28, 29, 30, 31, 32, 133, 160, 8232, 8233, 12288], np.uint32)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Scatter 64-bit integers: the finaliser of splitmix64 (Steele, Lea and Flood 2014); a bijection."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def signatures(shingles: Shingles, permutations: int, seed: int = 0) -> np.ndarray:
    """Return the MinHash signatures [N, P] (uint32): the share of equal entries of two rows estimates their J."""
    draw = np.random.PCG64(np.random.SeedSequence([seed, permutations])).random_raw(2 * permutations)
    a_P, b_P = (draw >> np.uint64(32)).astype(np.uint32).reshape(2, permutations)
    a_P |= np.uint32(1)
    out = np.full((permutations, len(shingles)), np.iinfo(np.uint32).max, np.uint32)
    high = (shingles.hashes >> np.uint64(32)).astype(np.uint32)
    for rows in _blocks(shingles.starts, _BLOCK):
        begin, end = shingles.starts[rows.start], shingles.starts[rows.stop]
        x, starts = high[begin:end], shingles.starts[rows.start : rows.stop] - begin
        moved = np.empty_like(x)
        for p in range(permutations):
            np.multiply(x, a_P[p], out=moved)
            np.add(moved, b_P[p], out=moved)
            np.minimum.reduceat(moved, starts, out=out[p, rows])
    return out.T


def _blocks(starts: np.ndarray, size: int) -> Iterator[slice]:
    """Cut rows into consecutive slices of about `size` entries, at least one row each."""
    at, rows = 0, len(starts) - 1
    while at < rows:
        stop = max(at + 1, int(np.searchsorted(starts, starts[at] + size, side="right")) - 1)
        yield slice(at, min(stop, rows))
        at = stop


def recall(similarity: float, rows: int, bands: int) -> float:
    """Return the probability 1 - (1 - J^R)^B that two texts of Jaccard similarity J become candidates."""
    return 1 - (1 - similarity**rows) ** bands


def bands_for(permutations: int, threshold: float, least: float = 0.995) -> tuple[int, int]:
    """Return (rows R, bands B) of the longest bands that still find a pair at the threshold with probability `least`.

    Long bands propose few pairs that are none; where even R = 1 finds too few, R = 1 it is.
    """
    fitting = [r for r in range(1, permutations + 1) if recall(threshold, r, permutations // r) >= least]
    rows = max(fitting, default=1)
    return rows, permutations // rows


def band_keys(texts: Sequence[str], near: Near) -> np.ndarray:
    """Return the band keys [N, B] (uint64): rows that agree in one are candidates."""
    rows, bands = bands_for(near.permutations, near.threshold)
    draw = np.random.PCG64(np.random.SeedSequence([near.seed, rows, bands])).random_raw(rows) | np.uint64(1)
    out = np.empty((len(texts), bands), np.uint64)
    sizes = np.concatenate([[0], np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)) + near.n)])
    for part in _blocks(sizes, _CHUNK):
        found = shingle([near.prepared(texts[row]) for row in range(part.start, part.stop)], near.n, near.unit)
        signature = signatures(found, near.permutations, near.seed)[:, : rows * bands].reshape(-1, bands, rows)
        with np.errstate(over="ignore"):
            out[part] = _mixed((signature.astype(np.uint64) * draw).sum(-1, dtype=np.uint64))
    return out


def jaccard(texts: Sequence[str], left: np.ndarray, right: np.ndarray, near: Near) -> np.ndarray:
    """Return the true Jaccard similarity of the rows `left` [M] and `right` [M] of `texts`: [M].

    Shingles are compared by 50 bits of their hash: two texts of 10,000 shingles look more alike than they are by one
    shingle with probability below 1e-7.
    """
    out = np.empty(len(left))
    for begin in range(0, len(left), _PAIRS):
        i, j = left[begin : begin + _PAIRS], right[begin : begin + _PAIRS]
        rows, where = np.unique(np.concatenate([i, j]), return_inverse=True)
        sets = shingle([near.prepared(texts[int(row)]) for row in rows], near.n, near.unit)
        counts = np.diff(sets.starts)[where]
        pair = np.repeat(np.tile(np.arange(len(i)), 2), counts).astype(np.uint64)
        place = np.arange(counts.sum()) + np.repeat(sets.starts[where] - np.cumsum(counts) + counts, counts)
        key = (pair << np.uint64(50)) | (sets.hashes[place] >> np.uint64(14))
        half = int(counts[: len(i)].sum())
        both = np.sort(np.concatenate([np.unique(key[:half]), np.unique(key[half:])]))
        shared = both[1:][both[1:] == both[:-1]] >> np.uint64(50)
        common = np.bincount(shared.astype(np.int64), minlength=len(i))
        total = np.bincount((both >> np.uint64(50)).astype(np.int64), minlength=len(i))
        out[begin : begin + _PAIRS] = common / (total - common)
    return out


def leaders(texts: Sequence[str], near: Near, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the near duplicates of earlier rows: leader [N] (-1 for the rows that stay) and its true similarity [N].

    `order` [N] says which of two rows is the earlier one. In each band the earliest row with a key is compared with all
    others of that key, those that are alike fall to it, and the earliest of the rest is next. So rows that stay have
    been compared wherever they share a key, and a second pass over them finds nothing. A row's leader may itself fall
    to an earlier one later on; `roots` follows the chain.
    """
    leader = np.full(len(texts), -1, np.int64)
    similarity = np.ones(len(texts))
    for key_N in band_keys(texts, near).T:
        alive = order[leader[order] < 0]
        sort = np.argsort(key_N[alive], kind="stable")
        rows, key = alive[sort], key_N[alive][sort]
        while len(rows):
            first = np.concatenate([[True], key[1:] != key[:-1]])
            head = rows[first][np.cumsum(first) - 1]
            head, rows, key = head[~first], rows[~first], key[~first]
            found = jaccard(texts, head, rows, near)
            alike = found >= near.threshold
            leader[rows[alike]], similarity[rows[alike]] = head[alike], found[alike]
            rows, key = rows[~alike], key[~alike]
    return leader, similarity


def roots(leader: np.ndarray) -> np.ndarray:
    """Return for each row the row that stays for it [N]: itself where it stays."""
    root = np.where(leader < 0, np.arange(len(leader)), leader)
    while not np.array_equal(further := root[root], root):
        root = further
    return root


def matches(texts: Sequence[str], known: Sequence[str], near: Near) -> np.ndarray:
    """Return for each text a row of `known` that it nearly duplicates, or -1: [N]."""
    found = np.full(len(texts), -1, np.int64)
    if not len(texts) or not len(known):
        return found
    both = [*texts, *known]
    for mine, theirs in zip(band_keys(texts, near).T, band_keys(known, near).T, strict=True):
        sort = np.argsort(theirs, kind="stable")
        low, high = (np.searchsorted(theirs[sort], mine, side) for side in ("left", "right"))
        open_rows = np.flatnonzero((found < 0) & (high > low))
        while len(open_rows):
            candidate = sort[low[open_rows]]
            alike = jaccard(both, open_rows, candidate + len(texts), near) >= near.threshold
            found[open_rows[alike]] = candidate[alike]
            low[open_rows] += 1
            open_rows = open_rows[~alike]
            open_rows = open_rows[high[open_rows] > low[open_rows]]
    return found
