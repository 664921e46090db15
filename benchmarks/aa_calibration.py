"""How often do the statistics see a difference where there is none?

With folders of answers (OUT/answers/ARM, as `compare` leaves them) of one arm trained with several seeds, the seeds are
pooled; every repeat deals them out anew to two sides, takes a random half of the test examples and compares the sides.
An honest test at the 5 % level rejects in about 5 %; Brickyard's limit is 7 %. For instance

    brickyard compare --methods lora lora --seeds 8 --data D --out OUT
    python benchmarks/aa_calibration.py OUT/answers/lora OUT/answers/lora-2

With --simulate, made-up answers give the rejection rate, the coverage of the interval and the power as a table.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from scipy.special import ndtri

from brickyard.core.errors import BadData, BrickyardError
from brickyard.core.stats import interval, paired

LIMIT = 0.07
CLASS_SHARES = (0.3, 0.25, 0.2, 0.12, 0.08, 0.05)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A made-up pair of arms. An answer is right where `level + difficulty + seed + chance` is above 0.

    The difficulty of an example (standard deviation `spread`; the chance of one training on one example has 1) is
    common to both arms up to `own`; the seed's quality (`noise` for arm a, `noise * ratio` for arm b) moves all
    examples together. Arm a is right in `accuracy`, arm b in `accuracy - gap`, of all examples over all seeds.
    """

    accuracy: float = 0.85
    gap: float = 0.0
    spread: float = 2.5
    own: float = 0.0
    noise: float = 0.1
    ratio: float = 1.0

    def draw(
        self, rng: np.random.Generator, seeds: int, examples: int, metric: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return labels [N] and the answers of the two arms, [S, N] each."""
        difficulty = rng.normal(size=examples)
        names = len(CLASS_SHARES)
        labels = rng.choice(names, size=examples, p=CLASS_SHARES)
        mistaken = (labels + rng.choice([1, 1, 1, 2, 3], size=examples)) % names  # most mistakes are the same ones
        values = rng.normal(size=examples)
        arms = []
        for k in range(2):
            noise = self.noise * (self.ratio if k else 1.0)
            own = math.sqrt(self.own) * rng.normal(size=examples)
            mine = self.spread * (math.sqrt(1 - self.own) * difficulty + own)
            moved = mine + noise * rng.normal(size=(seeds, 1)) + rng.normal(size=(seeds, examples))
            total = math.sqrt(self.spread**2 + noise**2 + 1)
            if metric == "spearman":
                # The larger an example's difficulty and the worse the seed, the further off; the gap adds to it.
                sharper = 0.5 * noise * rng.normal(size=(seeds, 1))
                arms.append((1 + sharper) * values + 0.25 * (1 + 5 * k * self.gap) * moved)
            else:
                right = moved + ndtri(self.accuracy - k * self.gap) * total > 0
                arms.append(np.where(right, labels, mistaken))
        return (values if metric == "spearman" else labels), arms[0], arms[1]


def rejection(compare: Callable[[np.random.Generator], float], repeats: int, seed: int = 0) -> float:
    """Return the share of `repeats` in which `compare`, given a generator, returns a p below 0.05."""
    rng = np.random.default_rng(seed)
    return sum(compare(rng) < 0.05 for _ in range(repeats)) / repeats


def simulate(repeats: int, metrics: Sequence[str], seeds: Sequence[int], examples: Sequence[int]) -> None:
    """Print one JSON row per metric, number of seeds, number of examples, and noise between seeds.

    `aa` is the rejection rate of an arm against itself; `null` of another arm that is equally good with mistakes of its
    own; `uneven` of one whose seeds do not differ at all (for spearman not quite a null); `power` of one that is 3
    points worse; `covered` says how often the interval of one arm holds the score that it has on endless examples and
    seeds; `sd_points` how much the score varies between seeds.
    """
    for metric in metrics:
        for s in seeds:
            for n in examples:
                for noise in (0.0, 0.05, 0.1, 0.3):
                    same = Model(noise=noise)
                    other = replace(same, own=0.06)
                    kinds = {"aa": same, "null": other}
                    kinds |= {"uneven": replace(other, ratio=0.0), "power": replace(other, gap=0.03)}
                    row: dict[str, Any] = {"metric": metric, "seeds": s, "examples": n, "noise": noise}
                    row["sd_points"] = _spread(Model(noise=noise), metric)
                    for name, model in kinds.items():
                        row[name] = round(rejection(partial(_p, model, s, n, metric), repeats), 4)
                    row["covered"] = _coverage(Model(noise=noise), metric, s, n, repeats)
                    print(json.dumps(row), flush=True)


def _p(model: Model, seeds: int, examples: int, metric: str, rng: np.random.Generator) -> float:
    labels, a, b = model.draw(rng, seeds, examples, metric)
    return paired(labels, a, b, metric).p


def _spread(model: Model, metric: str) -> float:
    """Standard deviation of the score between seeds, in points, on so many examples that only the seeds differ."""
    labels, a, _ = model.draw(np.random.default_rng(1), 40, 20_000, metric)
    return round(100 * float(np.std(interval(labels, a, metric).per_seed, ddof=1)), 2)


def _coverage(model: Model, metric: str, seeds: int, examples: int, repeats: int) -> float:
    labels, a, _ = model.draw(np.random.default_rng(2), 200, 20_000, metric)
    truth = interval(labels, a, metric).mean
    rng = np.random.default_rng(3)
    inside = 0
    for _ in range(repeats):
        labels, a, _ = model.draw(rng, seeds, examples, metric)
        found = interval(labels, a, metric)
        inside += found.low <= truth <= found.high
    return round(inside / repeats, 4)


def read(folders: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Return labels [N] and the answers [S, N] of all seeds of all folders; BadData where they do not fit."""
    files = [path for folder in folders for path in sorted(folder.glob("seed*.parquet"))]
    if len(files) < 4:
        places = ", ".join(map(str, folders)) or "no folder"
        raise BadData(f"{len(files)} files seed*.parquet in {places}; expected at least four seeds of one arm.")
    tables = [pq.read_table(path, columns=["index", "label", "prediction"]) for path in files]
    for path, table in zip(files, tables, strict=True):
        if not all(table[name].equals(tables[0][name]) for name in ("index", "label")):
            raise BadData(f"{path} holds other examples or labels than {files[0]}; expected one arm on one test set.")
    answers_SN = np.stack([table["prediction"].to_numpy() for table in tables])
    if len(np.unique(answers_SN, axis=0)) == 1:
        raise BadData("all seeds gave the same answers, so there is nothing to calibrate; expected different seeds.")
    return tables[0]["label"].to_numpy(), answers_SN


def resample(
    labels: np.ndarray, answers_SN: np.ndarray, metric: str, *, seeds: int, repeats: int, seed: int = 0
) -> float:
    """Return the rejection rate over `repeats` deals of `seeds` seeds to each side and half of the examples."""
    n = len(labels)

    def compare(rng: np.random.Generator) -> float:
        dealt = rng.permutation(len(answers_SN))
        half = np.sort(rng.permutation(n)[: n // 2])
        a, b = answers_SN[dealt[:seeds]][:, half], answers_SN[dealt[seeds : 2 * seeds]][:, half]
        return paired(labels[half], a, b, metric).p

    return rejection(compare, repeats, seed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the result as JSON; return 0, or 3 where the rate is above the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--metric", default="accuracy")
    parser.add_argument("--seeds", type=int, default=3, help="seeds per side (at most half of those found)")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--simulate", action="store_true")
    given = parser.parse_args(arguments)
    if given.simulate:
        simulate(given.repeats, [given.metric], (1, 2, 3, 5), (500, 1821))
        return 0
    try:
        labels, answers_SN = read(given.folders)
        seeds = min(given.seeds, len(answers_SN) // 2)
        rate = resample(labels, answers_SN, given.metric, seeds=seeds, repeats=given.repeats)
    except BrickyardError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    result = {
        "rejection_rate": rate,
        "limit": LIMIT,
        "within_limit": rate <= LIMIT,
        "repeats": given.repeats,
        "metric": given.metric,
        "seeds_per_side": seeds,
        "seeds_in_pool": len(answers_SN),
        "examples_per_repeat": len(labels) // 2,
        "kind": "measured",
    }
    print(json.dumps(result, indent=2))
    return 0 if result["within_limit"] else 3


if __name__ == "__main__":
    sys.exit(main())
