"""Rows a second of exact and MinHash de-duplication, as ratios to plain Python in the same run.

`python benchmarks/dedup.py [--rows N]` makes N short texts (a tenth are near copies), measures the library on all of
them and the plain reference, a set of shingles and 128 permutations a row in Python, on a part; and estimates 1M rows.
"""

from __future__ import annotations

import argparse
import json
import random
import time
import zlib
from collections.abc import Callable

import numpy as np

from brickyard.core import minhash
from brickyard.data.dedup import exact_leaders

PLAIN_ROWS = 300
PRIME = (1 << 61) - 1


def texts(rows: int) -> list[str]:
    """Return texts of about 110 characters; every tenth is a copy of an earlier one with one letter changed."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(5000)]
    out: list[str] = []
    for row in range(rows):
        text = " ".join(draw.choices(words, k=17))
        if row % 10 == 9:
            text = out[draw.randrange(row)]
            at = draw.randrange(len(text))
            text = text[:at] + "#" + text[at + 1 :]
        out.append(text)
    return out


def plain_signatures(given: list[str], permutations: int = 128, n: int = 5) -> list[tuple[int, ...]]:
    """MinHash as the textbook writes it: one pass over the shingles of a text for each permutation."""
    draw = random.Random(1)
    moves = [(draw.randrange(1, PRIME), draw.randrange(PRIME)) for _ in range(permutations)]
    out = []
    for text in given:
        text = minhash.normalised(text)
        hashes = {zlib.crc32(text[i : i + n].encode()) for i in range(max(1, len(text) - n + 1))}
        out.append(tuple(min((a * x + b) % PRIME for x in hashes) for a, b in moves))
    return out


def plain_exact(given: list[str]) -> list[str]:
    """Return the first of equal texts, with a set."""
    seen: set[str] = set()
    return [text for text in given if not (text in seen or seen.add(text))]


def seconds(run: Callable[[], object]) -> float:
    """Return the processor time of one run: other processes do not count."""
    started = time.process_time()
    run()
    return time.process_time() - started


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    rows = parser.parse_args().rows
    given, near = texts(rows), minhash.Near()
    order = np.arange(rows)
    found: list[np.ndarray] = []
    plain = seconds(lambda: plain_signatures(given[:PLAIN_ROWS])) / PLAIN_ROWS
    keys = seconds(lambda: minhash.band_keys(given, near)) / rows
    whole = seconds(lambda: found.append(minhash.leaders(given, near, order)[0])) / rows
    exact, plain_set = seconds(lambda: exact_leaders(given, order)) / rows, seconds(lambda: plain_exact(given)) / rows
    planted = sum(text.count("#") > 0 for text in given)
    out = {
        "rows": rows,
        "rows_per_s": {"minhash keys": 1 / keys, "minhash dedup": 1 / whole, "exact": 1 / exact},
        "times_plain_python": {"minhash keys": plain / keys, "exact": plain_set / exact},
        "copies": {"planted": planted, "dropped": int((found[0] >= 0).sum())},
        "bytes_per_row_kept": 8 * minhash.bands_for(near.permutations, near.threshold)[1],
        "predicted_seconds_for_1M_rows": 1e6 * whole,
        "kinds": {"rows_per_s": "measured", "bytes_per_row_kept": "counted", "1M rows": "predicted"},
    }
    print(json.dumps(out, indent=2))


if __name__ == "__main__":
    main()
