"""The claims of `pudf` that are no plain inequality: recovery of simulated items, wrong labels, and the curriculum.

All data are embedded. The labels of a share of the training rows are made wrong (another class, drawn once), so that
there is something that a curriculum should keep for last.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.stats import binomtest, rankdata, t

from brickyard.checks._place import place_of
from brickyard.checks._runs import answers, arm_row, majority, trained, with_training
from brickyard.checks._takes import takes
from brickyard.checks.run import Inequality, judge
from brickyard.core.arm import parse
from brickyard.core.chosen import curriculum_of
from brickyard.core.method import Claim
from brickyard.core.readers import read
from brickyard.core.trial import Setting, prepare
from brickyard.data.pudf import AbilitySchedule, fit_irt

WRONG = 0.15  # of the training labels
SHARE = 0.8  # of the examples that pudf may process
MARGIN = -0.3  # points that it may lose
LONGEST = 5.0  # times the epochs that the baseline gets at most when it is given pudf's time


def recovery(claim: Claim, *, students: int = 20, items: int = 1000, repeats: int = 10) -> dict[str, Any]:
    """Simulate abilities spread over [-2, 2] and difficulties drawn from N(0, 1), and compare with what the fit says.

    Control: each student's answers are dealt out among the items, so that no item is harder than another.
    """
    found, control = [], []
    for seed in range(repeats):
        g = np.random.Generator(np.random.PCG64(seed))
        theta_J, b_I = np.linspace(-2, 2, students), g.standard_normal(items)
        right_JI = g.random((students, items)) < 1 / (1 + np.exp(b_I - theta_J[:, None]))
        difficulty_I, ability_J = fit_irt(right_JI)
        found.append((_correlation(rankdata(difficulty_I), rankdata(b_I)), _correlation(ability_J, theta_J)))
        control.append(_correlation(rankdata(fit_irt(g.permuted(right_JI, axis=1))[0]), rankdata(b_I)))
    rank, line = (_mean(values) for values in zip(*found, strict=True))
    gone = _mean(control)
    goals = {"rank": 0.85, "line": 0.99}
    low = rank[1] >= goals["rank"] and line[1] >= goals["line"]
    missed = rank[2] < goals["rank"] or line[2] < goals["line"]
    return {
        "inequality": "Spearman(b) >= 0.85 and Pearson(theta) >= 0.99",
        "holds": True if low else False if missed else "undecided",
        "measured": rank[0],
        "low": rank[1],
        "high": rank[2],
        "detail": (
            f"Spearman of difficulties {rank[0]:.3f} ({rank[1]:.3f} to {rank[2]:.3f}), Pearson of abilities "
            f"{line[0]:.4f} ({line[1]:.4f} to {line[2]:.4f}) over {repeats} simulations of {students} students"
        ),
        "figures": {"spearman": [pair[0] for pair in found], "pearson": [pair[1] for pair in found]},
        "control": {
            "what": "each student's answers dealt out among the items",
            "inequality": "Spearman(b) < 0.85",
            "measured": gone[0],
            "low": gone[1],
            "high": gone[2],
            "destroyed": gone[2] < goals["rank"],
        },
        "gate": None,
    }


@takes("base", "data")
def noise(claim: Claim, *, rows: int = 0, setting: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Make labels wrong, ask the crowd, and count the wrong ones in the hardest quartile of the training rows.

    Control: the same difficulties dealt out among the rows.
    """
    data, wrong_N = spoiled(claim.data, rows)
    asked = {"base": claim.base, "max_length": claim.max_length or 64, "data": data, **(setting or {})}
    small = {"min_size": 1}
    found = {}
    for name, options in (("pudf", small), ("control", {**small, "shuffled": True})):
        arm = "linear-probe + pudf:" + ",".join(f"{key}={value}" for key, value in options.items())
        ready = prepare(Setting(arm=str(parse(arm)), **asked), ("train", "validation"))
        schedule = curriculum_of(ready, ready.encoded)
        assert isinstance(schedule, AbilitySchedule)
        hardest = np.argsort(schedule.difficulty_N, kind="stable")[-len(wrong_N) // 4 :]
        share = binomtest(int(wrong_N[hardest].sum()), len(hardest)).proportion_ci(method="wilson")
        times = np.array([wrong_N[hardest].mean(), share.low, share.high]) / wrong_N.mean()
        found[name] = [float(value) for value in times]
    measured, low, high = found["pudf"]
    gone = found["control"]
    return {
        "inequality": "wrong labels in the hardest quartile >= 2 x their share",
        "holds": True if low >= 2 else False if high < 2 else "undecided",
        "measured": measured,
        "low": low,
        "high": high,
        "detail": (
            f"the hardest quartile holds {measured:.2f} times the wrong labels' share of all {len(wrong_N):,} rows "
            f"({low:.2f} to {high:.2f}); {100 * wrong_N.mean():.1f} % are wrong"
        ),
        "control": {
            "what": "the same difficulties dealt out among the rows",
            "inequality": "wrong labels in the hardest quartile < 2 x their share",
            "measured": gone[0],
            "low": gone[1],
            "high": gone[2],
            "destroyed": gone[2] < 2,
        },
        "gate": None,
    }


@takes("base", "data")
def curriculum(
    claim: Claim, *, rows: int = 0, setting: Mapping[str, Any] | None = None, workers: int = 2
) -> dict[str, Any]:
    """Train the claim's arms on spoiled labels, at equal examples and at equal time, the crowd's included.

    Holds where pudf on 0.8 times the examples is within 0.3 points of random order, and pudf on equal examples is above
    random difficulties under the competence schedule. Gate: random order beats the majority class by 10 points.
    """
    data, _ = spoiled(claim.data, rows)
    asked = {"base": claim.base, "max_length": claim.max_length or None, "data": data, **(setting or {})}
    arms = {name: with_training(text, epochs=float(claim.epochs)) for name, text in claim.arms.items()}
    arms["pudf-short"] = with_training(claim.arms["pudf"], epochs=SHARE * claim.epochs)
    with place_of("pudf", claim, rows, setting) as folder:
        runs = trained(arms, asked, claim.seeds, folder, workers)
        seconds = {
            name: float(np.median([run["cost"]["train_seconds"] for run in run_S])) for name, run_S in runs.items()
        }
        states = float(np.median([run["cost"].get("states_seconds", 0.0) for run in runs["random-order"]]))
        longer = (seconds["pudf"] - states) / max(seconds["random-order"] - states, 1e-6)
        epochs = claim.epochs * min(max(longer, 1.0), LONGEST)
        arms["equal-time"] = with_training(claim.arms["random-order"], epochs=epochs)
        runs |= trained({"equal-time": arms["equal-time"]}, asked, claim.seeds, folder, workers)
        found = {name: answers(folder, name, claim.seeds) for name in arms}
    found["majority"] = majority(found["pudf"])
    compare = lambda text: {"inequality": text, **judge(Inequality.read(text), found, "accuracy")}  # noqa: E731
    main = compare(f"pudf-short >= random-order - {-MARGIN}")
    control = compare("pudf > random-difficulty")
    gate = compare("random-order > majority + 10.0")
    others = [compare(f"pudf >= {other}") for other in ("random-order", "equal-time", "length", "loss", "shuffled")]
    spent = float(np.mean([run["curriculum"]["examples"] for run in runs["pudf-short"]]))
    full = float(np.mean([run["steps"] * run["training"]["batch"] for run in runs["random-order"]]))
    crowd = float(np.median([run["cost"]["curriculum_seconds"] for run in runs["pudf"]]))
    saved = (seconds["random-order"] - states) * (1 - SHARE)
    both = [main["holds"], control["holds"]]
    holds: Any = True if both == [True, True] else False if False in both else "undecided"
    return {
        **main,
        "holds": holds if gate["holds"] is True and spent <= SHARE * full + 1 else "set-up invalid",
        "detail": (
            f"{main['measured']:+.2f} points ({main['low']:+.2f} to {main['high']:+.2f}) on {spent / full:.2f} times "
            f"the examples; against random difficulties {control['measured']:+.2f} ({control['low']:+.2f} to "
            f"{control['high']:+.2f}); the crowd took {crowd:.1f} s, a run on {SHARE} of the examples saves "
            f"{saved:.1f} s: it pays for itself after {crowd / max(saved, 1e-6):.1f} fine-tunes"
        ),
        "arms": {name: arm_row(text, runs[name]) for name, text in arms.items()},
        "control": {
            "what": "random difficulties under the competence schedule",
            "destroyed": control["holds"] is True,
            **control,
        },
        "gate": gate,
        "figures": {
            "comparisons": others,
            "examples": {"pudf-short": spent, "random-order": full},
            "crowd_seconds": crowd,
            "break_even_runs": crowd / max(saved, 1e-6),
            "equal_time_epochs": epochs,
            "equal_time_capped": longer > LONGEST,
        },
    }


def spoiled(name: str, rows: int = 0, *, share: float = WRONG) -> tuple[dict[str, dict[str, list]], np.ndarray]:
    """Return the splits of a data set with `share` of its training labels made wrong, and which [rows].

    rows: training rows, drawn once; 0 takes all.
    """
    splits = {split: dict(columns) for split, columns in read(name).splits.items()}
    g = np.random.Generator(np.random.PCG64(0))
    total = len(splits["train"]["label"])
    chosen = np.sort(g.permutation(total)[: rows or total]).tolist()
    train = {column: [values[i] for i in chosen] for column, values in splits["train"].items()}
    classes = sorted(set(train["label"]))
    wrong_N = g.random(len(chosen)) < share
    other_N = g.integers(1, len(classes), len(chosen))
    train["label"] = [
        classes[(classes.index(label) + int(step)) % len(classes)] if wrong else label
        for label, wrong, step in zip(train["label"], wrong_N, other_N, strict=True)
    ]
    return {**splits, "train": train}, wrong_N


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def _mean(values: Any) -> tuple[float, float, float]:
    """Mean over seeds with its 95 % interval (Student's t)."""
    values = np.asarray(values, dtype=np.float64)
    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)
