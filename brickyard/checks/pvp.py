"""The claims of `pvp`: modules trained on some classes as the start on others, by the number of examples."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import t as student

from brickyard.checks._place import place_of
from brickyard.checks._runs import answers, trained
from brickyard.checks._takes import takes
from brickyard.checks.run import Answers, Inequality, judge
from brickyard.core import readers
from brickyard.core.method import Claim

SHOTS = (1, 2, 16)
TUNERS = {"prompts": "iapt:constant=true,tokens=8,bottleneck=32", "lora": "lora:r=8"}
RATES = {"prompts": 2e-3, "lora": 1e-3}
STEPS = 40  # of the second stage, the same for every number of examples
Rows = dict[str, dict[str, list]]


def halves(name: str) -> tuple[Rows, Rows]:
    """Return a data set in two, by its classes: every second one in the order of their names to each side."""
    source = readers.read(name)
    classes = sorted({str(v) for v in source.splits["train"]["label"]})
    out: tuple[Rows, Rows] = ({}, {})
    for split, columns in source.splits.items():
        for side, chosen in enumerate((set(classes[::2]), set(classes[1::2]))):
            rows = [i for i, v in enumerate(columns["label"]) if str(v) in chosen]
            out[side][split] = {k: [columns[k][i] for i in rows] for k in ("text", "label")}
    return out


@takes("base", "data")
def by_shots(claim: Claim, *, workers: int = 2, upstream_rows: int = 1500, **_: Any) -> dict[str, Any]:
    """Train both tuners on half of the classes; then start them there, and afresh, on the others.

    Every seed draws other examples, the same for all arms. Control: the start is taken from training on shuffled
    labels. Gate: sixteen fresh examples beat one by 5 points, so that examples matter.
    """
    upstream, downstream = halves(claim.data)
    with place_of("pvp", claim, upstream_rows) as folder:
        first = {
            "base": claim.base,
            "data": upstream,
            "max_length": claim.max_length or None,
            "train_rows": upstream_rows,
            "training": {"epochs": 2, "batch": 16},
        }
        up = {f"up-{name}": f"{text},lr={RATES[name]:g}" for name, text in TUNERS.items()}
        up["noise-lora"] = up["up-lora"]
        trained(up, first, 1, folder, workers, but={"noise-lora": {"shuffle_labels": True}})
        arms = {}
        for name, text in TUNERS.items():
            start = f"{text},lr={RATES[name]:g}"
            arms[name] = start
            arms[f"{name} pvp"] = f"{start} + pvp:brick={folder}/up-{name}-1/brick"
            arms[f"{name} frozen"] = f"{start} + pvp:brick={folder}/up-{name}-1/brick,freeze=true"
        arms["lora noise"] = f"{TUNERS['lora']},lr={RATES['lora']:g} + pvp:brick={folder}/noise-lora-1/brick"
        arms["probe"] = "linear-probe:lr=1e-2"
        found: dict[tuple[str, int], Answers] = {}
        for shots in SHOTS:
            asked = {
                "base": claim.base,
                "data": downstream,
                "max_length": claim.max_length or None,
                "shots": shots,
                "training": {"steps": STEPS, "batch": 8},
            }
            sub = folder / str(shots)
            trained(arms, asked, claim.seeds, sub, workers)
            found |= {(name, shots): answers(sub, name, claim.seeds) for name in arms}
    return judged(found)


def judged(found: dict[tuple[str, int], Answers]) -> dict[str, Any]:
    """Return the three parts of the claim from the answers of every arm at every number of examples."""

    def compare(a: tuple[str, int], b: tuple[str, int], margin: float) -> dict[str, Any]:
        names = {"a": found[a], "b": found[b]}
        what = {"a": f"{a[0]}@{a[1]}", "b": f"{b[0]}@{b[1]}", "margin": margin}
        # With as many examples a seed draws the same ones for both arms; with one and with sixteen it draws others.
        return {**what, **judge(Inequality("a", "b", margin), names, "accuracy", together=a[1] == b[1])}

    means = {f"{name}@{k}": 100 * float(np.mean(a.predictions == a.labels)) for (name, k), a in found.items()}
    gate = compare(("lora", 16), ("lora", 1), 5.0)
    gone = compare(("lora noise", 1), ("lora", 1), 1.0)
    control = {
        "what": "LoRA from training on shuffled labels",
        "inequality": "noise@1 >= lora@1 + 1.0",
        "destroyed": gone["holds"] is not True,
        **{k: gone[k] for k in ("measured", "low", "high")},
    }
    shared = {"gate": gate, "control": control, "figures": {"means": means}}
    valid = gate["holds"] is True

    def joined(parts: list[dict[str, Any]], inequality: str) -> dict[str, Any]:
        worst = min(parts, key=lambda p: p["low"] - p["margin"])
        said = [p["holds"] for p in parts]
        holds: Any = False if False in said else True if all(h is True for h in said) else "undecided"
        detail = "; ".join(
            f"{p['a']} - {p['b']} {p['measured']:+.1f} ({p['low']:+.1f} to {p['high']:+.1f})" for p in parts
        )
        return {
            "inequality": inequality,
            "holds": holds if valid else "set-up invalid",
            **{k: worst[k] for k in ("measured", "low", "high")},
            "detail": detail + " points",
            "comparisons": parts,
            **shared,
        }

    few, most = SHOTS[:-1], SHOTS[-1]
    out = {
        name: joined(
            [compare((f"{name} pvp", k), (name, k), margin) for k in few]
            + ([compare((f"{name} pvp", most), (name, most), 0.0)] if name == "prompts" else []),
            f"pvp >= fresh + {margin:g} with {few} examples a class",
        )
        for name, margin in (("prompts", 5.0), ("lora", 1.0))
    }
    low, mean, high = shrinks(found, few[0], most)
    out["shape"] = {
        "inequality": f"gain@{few[0]} > gain@{most}",
        "holds": (True if low > 0 else False if high < 0 else "undecided") if valid else "set-up invalid",
        "measured": mean,
        "low": low,
        "high": high,
        "detail": f"{mean:+.1f} points ({low:+.1f} to {high:+.1f}) more with {few[0]} a class than with {most}",
        **shared,
    }
    return out


def shrinks(found: dict[tuple[str, int], Answers], few: int, most: int) -> tuple[float, float, float]:
    """Return (low, mean, high) of the gain of prompts with `few` examples a class over that with `most`, in points.

    A seed draws the examples of all arms, so each gives one difference of gains; the 95 % interval is Student's over
    seeds, and of a single one all that is possible. The test rows are the same throughout.
    """

    def right_S(arm: str, shots: int) -> np.ndarray:
        of = found[arm, shots]
        return 100 * (of.predictions == of.labels).mean(axis=1)

    gain_S = {k: right_S("prompts pvp", k) - right_S("prompts", k) for k in (few, most)}
    more_S = gain_S[few] - gain_S[most]
    mean, reach = float(more_S.mean()), np.inf
    if len(more_S) > 1:
        reach = student.ppf(0.975, len(more_S) - 1) * more_S.std(ddof=1) / np.sqrt(len(more_S))
    return float(max(mean - reach, -200.0)), mean, float(min(mean + reach, 200.0))
