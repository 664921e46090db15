"""The claims of `pvp`: modules trained on some classes as the start on others, by the number of examples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from brickyard.checks._place import place_of
from brickyard.checks._runs import answers, trained, tuned, with_training
from brickyard.checks._takes import takes
from brickyard.checks.run import Answers, Inequality, judge
from brickyard.core import readers
from brickyard.core.method import Claim
from brickyard.core.split import support

SHOTS = (1, 2, 16)
TUNERS = {"prompts": "iapt:constant=true,tokens=8,bottleneck=32", "lora": "lora:r=8"}
RATES = {"prompts": 2e-3, "lora": 1e-3}  # of the first stage
GRID = (3e-4, 1e-3, 3e-3, 1e-2)  # of the second, searched by every start alike
MARGINS = {"prompts": 5.0, "lora": 1.0}
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


def search_rows(upstream: Rows, shots: int = 2, most: int = 300) -> Rows:
    """Return `shots` rows of each upstream class to train on, and others to validate on.

    They are upstream test rows: of other classes than those that judge, and not seen by the first stage.
    """
    held = upstream["test"]
    found = [str(v) for v in held["label"]]
    names = sorted(set(found))
    few = support([names.index(v) for v in found], names, shots, 0, all_of_few=True).tolist()
    known = {held["text"][i] for i in few}
    rest = [i for i, text in enumerate(held["text"]) if text not in known][:most]
    return {
        split: {k: [held[k][i] for i in rows] for k in ("text", "label")}
        for split, rows in (("train", few), ("validation", rest))
    }


@takes("base", "data")
def by_shots(claim: Claim, *, workers: int = 2, upstream_rows: int = 1500, **_: Any) -> dict[str, Any]:
    """Train both tuners on half of the classes; then start them there, and afresh, on the others.

    Every seed draws other examples, the same for all arms. Each arm has the learning rate, of one grid, that does best
    on the upstream classes with two examples each. Control: the start is taken from training on shuffled labels, at the
    rate of the true one. Gate: sixteen fresh examples beat one by 5 points, so that examples matter.
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
        up |= {f"noise-{name}": up[f"up-{name}"] for name in TUNERS}
        trained(up, first, 1, folder, workers, but={f"noise-{name}": {"shuffle_labels": True} for name in TUNERS})
        arms = _searched(claim, upstream, folder, workers)
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
    return judged(found, {name: text.partition(" + ")[0] for name, text in arms.items()})


def _searched(claim: Claim, upstream: Rows, folder: Path, workers: int) -> dict[str, str]:
    """Return the arms of the second stage, each at its learning rate."""
    arms = {}
    for name, text in TUNERS.items():
        start = f"{text} + pvp:brick={folder}/up-{name}-1/brick"
        arms |= {name: text, f"{name} pvp": start, f"{name} frozen": f"{start},freeze=true"}
    asked = {
        "base": claim.base,
        "data": search_rows(upstream),
        "max_length": claim.max_length or None,
        "training": {"steps": STEPS, "batch": 8},
    }
    found = tuned(replace(claim, lrs=GRID), arms, asked, folder / "search", workers)
    for name in TUNERS:
        found[f"{name} noise"] = found[f"{name} pvp"].replace(f"/up-{name}-1/", f"/noise-{name}-1/")
    return found | {"probe": with_training("linear-probe", lr=1e-2)}


def judged(found: dict[tuple[str, int], Answers], settings: dict[str, str] | None = None) -> dict[str, Any]:
    """Return the three parts of the claim from the answers of every arm at every number of examples."""
    few, most = SHOTS[:-1], SHOTS[-1]

    def compare(a: tuple[str, int], b: tuple[str, int], margin: float) -> dict[str, Any]:
        names = {"a": found[a], "b": found[b]}
        what = {"a": f"{a[0]}@{a[1]}", "b": f"{b[0]}@{b[1]}", "margin": margin}
        # With as many examples a seed draws the same ones for both arms; with one and with sixteen it draws others.
        return {**what, **judge(Inequality("a", "b", margin), names, "accuracy", together=a[1] == b[1])}

    means = {f"{name}@{k}": 100 * float(np.mean(a.predictions == a.labels)) for (name, k), a in found.items()}
    gate = compare(("lora", 16), ("lora", 1), 5.0)
    controls = {}
    for name, margin in MARGINS.items():
        gone = compare((f"{name} noise", few[0]), (name, few[0]), margin)
        controls[name] = {
            "what": f"{name} from training on shuffled labels",
            "inequality": f"{name} noise@{few[0]} >= {name}@{few[0]} + {margin:.1f}",
            "destroyed": gone["holds"] is False,
            **{k: gone[k] for k in ("measured", "low", "high", "holds")},
        }
    # What tuning adds to modules that stay as the other task left them.
    beyond = {name: [compare((f"{name} pvp", k), (f"{name} frozen", k), 0.0) for k in SHOTS] for name in TUNERS}
    figures = {"means": means, "settings": settings or {}, "over_frozen": beyond}
    valid = gate["holds"] is True

    def shared(name: str) -> dict[str, Any]:
        return {"gate": gate, "control": controls[name], "figures": figures}

    def told(parts: list[dict[str, Any]]) -> str:
        return "; ".join(
            f"{p['a']} - {p['b']} {p['measured']:+.1f} ({p['low']:+.1f} to {p['high']:+.1f})" for p in parts
        )

    def unsure(name: str) -> str:
        return "; the control is undecided" if controls[name]["holds"] == "undecided" else ""

    def joined(name: str, parts: list[dict[str, Any]], inequality: str) -> dict[str, Any]:
        worst = min(parts, key=lambda p: p["low"] - p["margin"])
        said = [p["holds"] for p in parts]
        holds: Any = False if False in said else True if all(h is True for h in said) else "undecided"
        beats = [str(p["a"].rpartition("@")[2]) for p in beyond[name] if p["low"] > 0]
        where = f"with {' and '.join(beats)} a class" if beats else "nowhere"
        detail = f"{told(parts)} points; beats the frozen-theta* probe {where}: {told(beyond[name])}"
        return {
            "inequality": inequality,
            "holds": holds if valid else "set-up invalid",
            **{k: worst[k] for k in ("measured", "low", "high")},
            "detail": detail + unsure(name),
            "comparisons": parts,
            **shared(name),
        }

    out = {}
    for name, margin in MARGINS.items():
        parts = [compare((f"{name} pvp", k), (name, k), margin) for k in few]
        text = f"pvp >= fresh + {margin:g} with {' and '.join(map(str, few))} examples a class"
        if name == "prompts":
            parts.append(compare((f"{name} pvp", most), (name, most), 0.0))
            text += f" and pvp >= fresh + 0 with {most}"
        out[name] = joined(name, parts, text)
    low, mean, high = shrinks(found, few[0], most)
    out["shape"] = {
        "inequality": f"gain@{few[0]} > gain@{most}",
        "holds": (True if low > 0 else False if high < 0 else "undecided") if valid else "set-up invalid",
        "measured": mean,
        "low": low,
        "high": high,
        "detail": f"{mean:+.1f} points ({low:+.1f} to {high:+.1f}) more with {few[0]} a class than with {most}"
        + unsure("prompts"),
        **shared("prompts"),
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
