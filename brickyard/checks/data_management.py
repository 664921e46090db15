"""Claims of the data steps, on pools with defects that were planted and are therefore known.

A pool is drawn from the train split of the claim's data: 15 % of its labels are changed at random; to it come 20 % near
duplicates (copies with one or two typing errors) and 10 % rows of another domain (bodies of Python functions without
their docstrings). Every seed draws its own pool. Nothing here sees a test label but to score an arm at the end.
"""

from __future__ import annotations

import ast
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import cache
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from scipy.stats import t as student
from torch.nn import functional as F

from brickyard import embedded
from brickyard.checks._takes import takes
from brickyard.core.method import Claim
from brickyard.core.pool import Pool
from brickyard.core.readers import read
from brickyard.core.stats import paired
from brickyard.data import dedup, mix, quality_filter
from brickyard.data import select as selection_step
from brickyard.data._frozen import embeddings

ROWS = 2000  # of a pool before the duplicates and the other domain come to it
NOISE, COPIES, OTHERS = 0.15, 0.2, 0.1
BUDGET = 0.3
STEPS, BATCH, LR = 300, 32, 1e-2  # of the head that every selection trains
NOISE_AWARE = ("loss", "confidence", "noisy + random", "noisy + k-centre")
ARMS: dict[str, dict[str, Any]] = {
    "random": {},
    "loss": {"by": "loss"},
    "confidence": {"by": "confidence"},
    "noisy + random": {"noisy": 0.3},
    "noisy + k-centre": {"by": "k-centre", "noisy": 0.3},
    "variability": {"by": "variability"},
    "forgetting": {"by": "forgetting"},
    "k-centre": {"by": "k-centre"},
    "deita": {"by": "deita"},
    "dsir": {"by": "dsir"},
    "nearest": {"by": "nearest"},
}


@dataclass(frozen=True)
class Planted:
    """A pool with what is wrong with it: masks [N], and the row [N] that each copy was made of, -1 for the others."""

    pool: Pool
    noisy: np.ndarray
    other: np.ndarray
    copy_of: np.ndarray
    test: dict[str, list]


def planted(claim: Claim, seed: int) -> Planted:
    """Draw the pool of one seed."""
    splits = read(claim.data).splits
    draw = np.random.default_rng([seed, 1])
    source, names = splits["train"], sorted(set(splits["train"]["label"]))
    size = min(claim.train_rows or ROWS, len(source["text"]))
    chosen = draw.permutation(len(source["text"]))[:size]
    texts, labels = ([source[name][i] for i in chosen] for name in ("text", "label"))
    noisy = draw.permutation(size)[: int(NOISE * size)]
    for row in noisy:
        labels[row] = names[(names.index(labels[row]) + int(draw.integers(1, len(names)))) % len(names)]
    bodies = function_bodies()
    others = [bodies[i] for i in draw.permutation(len(bodies))[: int(OTHERS * size)]]
    copies = draw.integers(size, size=int(COPIES * size))
    texts += others + [mistyped(texts[i], draw) for i in copies]
    labels += [names[i] for i in draw.integers(len(names), size=len(others))] + [labels[i] for i in copies]
    copy_of = np.concatenate([np.full(size + len(others), -1), copies])
    noise = np.zeros(size, bool)
    noise[noisy] = True
    other = np.zeros(len(texts), bool)
    other[size : size + len(others)] = True
    pool = Pool({"text": texts, "label": labels}, splits["validation"], base=claim.base, seed=seed)
    noise = np.concatenate([noise, np.zeros(len(others), bool), noise[copies]])
    return Planted(pool, noise, other, copy_of, splits["test"])


def mistyped(text: str, draw: np.random.Generator) -> str:
    """Return a text with one typing error, two above 80 characters: a letter more, a letter less, or another one."""
    for _ in range(1 + (len(text) > 80)):
        at, kind = int(draw.integers(1, max(2, len(text) - 1))), int(draw.integers(3))
        letter = chr(ord("a") + int(draw.integers(26)))
        text = text[:at] + (letter if kind < 2 else "") + text[at + (kind > 0) :]
    return text


@cache
def function_bodies() -> list[str]:
    """Return the openings of the bodies of functions of the standard library, without their docstrings, each once."""
    found = set()
    for source in embedded.data("python-source")["train"]["text"]:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                body = [s for s in node.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
                text = "\n".join(map(ast.unparse, body))[:400]
                if len(text) > 60:
                    found.add(text)
    return sorted(found)


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Return the probability that a positive row scores above another one, ties counting half."""
    many = int(positive.sum())
    return float((rankdata(scores)[positive].sum() - many * (many + 1) / 2) / (many * (len(scores) - many)))


def over_seeds(values: list[float]) -> dict[str, float]:
    """Return the mean over seeds with its 95 % interval (Student's t); of one seed, no interval at all."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"measured": mean, "low": -np.inf, "high": np.inf}
    reach = float(student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return {"measured": mean, "low": mean - reach, "high": mean + reach}


def verdict(found: dict[str, float], threshold: float) -> bool | str:
    """Return True where the interval clears the threshold, False where it misses it, else "undecided"."""
    return True if found["low"] >= threshold else False if found["high"] < threshold else "undecided"


def all_of(verdicts: list[bool | str]) -> bool | str:
    """Return False where any does not hold, True where all do, else "undecided"."""
    return False if False in verdicts else True if all(v is True for v in verdicts) else "undecided"


def plain(found: dict[str, float]) -> dict[str, float | None]:
    """Return an interval as JSON can hold it: None where there is none."""
    return {name: value if np.isfinite(value) else None for name, value in found.items()}


@takes("base", "data")
def near_duplicates(claim: Claim) -> dict[str, Any]:
    """Recall of the planted copies, and precision of all that is dropped.

    A dropped row is rightly dropped where it is a planted copy, or where an independent measure (difflib's ratio of
    matching characters) finds it 80 % alike to the row that stays for it: docstrings repeat one another by nature.
    """
    recalls: list[float] = []
    precisions: list[float] = []
    strict: list[float] = []
    exact: list[float] = []
    for seed in range(claim.seeds):
        given = planted(claim, seed)
        found = dedup.run(dedup.Config(), given.pool)
        gone = np.setdiff1d(np.arange(len(given.pool)), found.rows)
        planted_rows = given.copy_of[gone] >= 0
        recalls.append(float(planted_rows.sum() / (given.copy_of >= 0).sum()))
        stays = found.scores["stays"].astype(int) - 1
        right = [
            copy or alike(given.pool.texts[row], given.pool.texts[stays[row]]) >= 0.8
            for row, copy in zip(gone, planted_rows, strict=True)
        ]
        precisions.append(float(np.mean(right)))
        strict.append(float(planted_rows.mean()))
        without = dedup.run(dedup.Config(near=False), given.pool)
        exact.append(float(1 - np.isin(np.flatnonzero(given.copy_of >= 0), without.rows).mean()))
    recall, precision = over_seeds(recalls), over_seeds(precisions)
    destroyed = float(np.mean(exact)) < 0.5
    return {
        "inequality": "recall >= 0.9 and precision >= 0.95",
        **plain(recall),
        "holds": all_of([verdict(recall, 0.9), verdict(precision, 0.95)]),
        "detail": f"recall {recall['measured']:.3f}, precision {precision['measured']:.3f} "
        f"({float(np.mean(strict)):.3f} if natural near duplicates count as errors); {claim.seeds} seeds",
        "figures": {"recall": recalls, "precision": precisions, "planted_only_precision": strict},
        "control": control("exact hashes alone find few of the copies", "exact recall < 0.5", exact, destroyed),
    }


def alike(a: str, b: str) -> float:
    """Return difflib's similarity of two texts, 0 to 1."""
    return SequenceMatcher(None, a, b, autojunk=False).ratio()


def control(what: str, inequality: str, values: list[float], destroyed: bool) -> dict[str, Any]:
    """Return a negative control as results hold it."""
    return {
        "what": what,
        "inequality": inequality,
        "measured": float(np.mean(values)),
        "per_seed": [float(v) for v in values],
        "destroyed": bool(destroyed),
    }


@takes("base", "data")
def label_noise(claim: Claim) -> dict[str, Any]:
    """AUC of finding the changed labels among the rows of the data's own domain."""
    figures: dict[str, list[float]] = {"loss": [], "confidence": [], "variability": [], "forgetting": []}
    shuffled = []
    for seed in range(claim.seeds):
        given = planted(claim, seed)
        mine = ~given.other
        for by, values in figures.items():
            found = selection_step.score(selection_step.Config(by=by), given.pool)[1][by]  # type: ignore[arg-type]
            sign = 1 if by in ("loss", "forgetting") else -1
            values.append(auc(sign * found[mine], given.noisy[mine]))
        labels = list(np.random.default_rng([seed, 2]).permutation(given.pool.columns["label"]))
        mixed = replace(given.pool, columns={**given.pool.columns, "label": labels})
        found = selection_step.score(selection_step.Config(by="loss"), mixed)[1]["loss"]
        shuffled.append(auc(found[mine], given.noisy[mine]))
    loss = over_seeds(figures["loss"])
    others = ", ".join(f"{name} {np.mean(values):.3f}" for name, values in figures.items() if name != "loss")
    return {
        "inequality": "AUC(loss) >= 0.8",
        **plain(loss),
        "holds": verdict(loss, 0.8),
        "detail": f"AUC of the cross-validated loss {loss['measured']:.3f}; {others}; {claim.seeds} seeds",
        "figures": figures,
        "control": control("labels shuffled over all rows", "AUC < 0.6", shuffled, float(np.mean(shuffled)) < 0.6),
    }


@takes("base", "data")
def off_domain(claim: Claim) -> dict[str, Any]:
    """AUC of finding the rows of the other domain, the validation split being the picture of the right one."""
    figures: dict[str, list[float]] = {"classifier": [], "dsir": [], "n-gram perplexity": [], "nearest": []}
    blind = []
    for seed in range(claim.seeds):
        given = planted(claim, seed)
        scores = quality_filter.score(quality_filter.Config(classifier=True, perplexity="ngram"), given.pool)
        figures["classifier"].append(auc(-scores["trust"], given.other))
        figures["n-gram perplexity"].append(auc(scores["nats"], given.other))
        for by in ("dsir", "nearest"):
            found = selection_step.score(selection_step.Config(by=by), given.pool)[1][by]
            figures[by].append(auc(-found, given.other))
        wrong = replace(given.pool, wanted={"text": function_bodies()[::10]})
        found = selection_step.score(selection_step.Config(by="dsir"), wrong)[1]["dsir"]
        blind.append(auc(-found, given.other))
    worst = min(("classifier", "dsir"), key=lambda name: np.mean(figures[name]))
    found = over_seeds(figures[worst])
    detail = ", ".join(f"{name} {np.mean(values):.3f}" for name, values in figures.items())
    return {
        "inequality": "AUC(classifier) >= 0.9 and AUC(dsir) >= 0.9",
        **plain(found),
        "holds": all_of([verdict(over_seeds(figures[name]), 0.9) for name in ("classifier", "dsir")]),
        "detail": f"AUC: {detail}; {claim.seeds} seeds",
        "figures": figures,
        "control": control(
            "dsir aimed at the other domain",
            "AUC < 0.5",
            blind,
            float(np.mean(blind)) < 0.5,
        ),
    }


@takes("base", "data")
def selection(claim: Claim) -> dict[str, Any]:
    """Accuracy on test of a linear head on frozen states, trained for equal steps on what each arm selected."""
    answers: dict[str, list[np.ndarray]] = {name: [] for name in (*ARMS, "full", "shuffled loss")}
    seconds = {name: 0.0 for name in ARMS}
    labels_N = np.zeros(0)
    for seed in range(claim.seeds):
        given = planted(claim, seed)
        names = sorted(set(given.pool.columns["label"]))
        started = time.monotonic()
        v_ND, cost = embeddings(given.pool)
        embedding_seconds = max(float(cost["seconds"]), time.monotonic() - started)
        test_ND, _ = embeddings(given.pool, given.test["text"])
        labels_N = np.array([names.index(label) for label in given.test["label"]])
        y_N = np.array([names.index(label) for label in given.pool.columns["label"]])

        def trained(rows: np.ndarray, seed: int = seed, v: Any = v_ND, y: Any = y_N, test: Any = test_ND) -> np.ndarray:
            return head_answers(v[rows], y[rows], test, int(y.max()) + 1, seed)

        for name, options in ARMS.items():
            started = time.monotonic()
            found = selection_step.run(selection_step.Config(budget=BUDGET, **options), given.pool)
            own = time.monotonic() - started
            seconds[name] += own + (embedding_seconds if options else 0.0)
            answers[name].append(trained(found.rows))
        answers["full"].append(trained(np.arange(len(given.pool))))
        # The same share of the rows is left out as for their loss, but under labels that say nothing.
        labels = list(np.random.default_rng([seed, 3]).permutation(given.pool.columns["label"]))
        blind = replace(given.pool, columns={**given.pool.columns, "label": labels})
        config = selection_step.Config(budget=BUDGET, noisy=0.3)
        answers["shuffled loss"].append(trained(selection_step.run(config, blind).rows))
    stacked = {name: np.stack(values) for name, values in answers.items()}
    compared = {
        name: paired(labels_N, values, stacked["random"], "accuracy")
        for name, values in stacked.items()
        if name != "random"
    }
    verdicts = [verdict({"low": compared[n].low, "high": compared[n].high}, 0.01) for n in NOISE_AWARE]
    worst = min(NOISE_AWARE, key=lambda name: compared[name].difference)
    majority = np.full_like(stacked["random"], np.bincount(labels_N.astype(int)).argmax())
    gate = paired(labels_N, stacked["random"], majority, "accuracy")
    means = {name: float((values == labels_N).mean()) for name, values in stacked.items()}
    blind_gain = compared["shuffled loss"]
    negative = [name for name, found in compared.items() if name in ARMS and found.difference < 0.01]
    valid = bool(gate.low >= 0.05)
    return {
        "inequality": f"{' and '.join(NOISE_AWARE)} >= random + 1.0",
        "measured": 100 * compared[worst].difference,
        "low": 100 * compared[worst].low,
        "high": 100 * compared[worst].high,
        "holds": all_of(verdicts) if valid else "set-up invalid",
        "detail": f"worst noise-aware arm {worst} {100 * compared[worst].difference:+.1f} points over random "
        f"({100 * means['random']:.1f} %; full {100 * means['full']:.1f} %); no gain of a point: "
        f"{', '.join(negative) or 'none'}; {STEPS} steps each, {claim.seeds} seeds",
        "figures": {
            name: {
                "accuracy": means[name],
                "points_over_random": 100 * compared[name].difference if name in compared else 0.0,
                "low": 100 * compared[name].low if name in compared else 0.0,
                "high": 100 * compared[name].high if name in compared else 0.0,
                "selection_seconds": seconds.get(name, 0.0) / claim.seeds,
            }
            for name in means
        },
        "control": control(
            "losses under shuffled labels choose nothing of use",
            "gain over random < 1.0, high end",
            [100 * blind_gain.difference],
            100 * blind_gain.high < 1.0,
        ),
        "gate": {"inequality": "random >= majority + 5.0", "measured": 100 * gate.difference, "holds": valid},
    }


def head_answers(v_ND: np.ndarray, y_N: np.ndarray, test_TD: np.ndarray, classes: int, seed: int) -> np.ndarray:
    """Return the answers [T] of a linear head after STEPS steps of Adam on batches drawn from the rows given."""
    draw = torch.Generator().manual_seed(seed)
    x_ND, y = torch.from_numpy(v_ND), torch.from_numpy(y_N)
    weight = (0.02 * torch.randn(v_ND.shape[1] + 1, classes, generator=draw)).requires_grad_()
    optimiser = torch.optim.Adam([weight], lr=LR)
    for _ in range(STEPS):
        rows = torch.randint(len(y), (BATCH,), generator=draw)
        loss = F.cross_entropy(x_ND[rows] @ weight[:-1] + weight[-1], y[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        return (torch.from_numpy(test_TD) @ weight[:-1] + weight[-1]).argmax(1).numpy()


def scaling_law(claim: Claim, noise: float = 1e-3) -> dict[str, Any]:
    """Largest relative error of the two exponents, fitted to 36 runs whose losses carry 0.1 % of noise."""
    errors, destroyed = [], []
    for seed in range(claim.seeds):
        draw = np.random.default_rng([seed, 4])
        (a, b), (at_size, at_data) = draw.uniform(0.25, 0.5, 2), draw.uniform(0.3, 1.0, 2)
        # Both terms are of the order of the floor at the smallest runs: a term that is nowhere seen has no exponent.
        law = mix.Law(1.7, at_size * 1e7**a, a, at_data * 1e9**b, b)
        size_R, data_R = (x.ravel() for x in np.meshgrid(np.geomspace(1e6, 1e9, 6), np.geomspace(1e8, 1e11, 6)))
        loss_R = law.loss(size_R, data_R) * np.exp(noise * draw.normal(size=36))
        for losses, out in ((loss_R, errors), (draw.permutation(loss_R), destroyed)):
            found = mix.fit_scaling(size_R, data_R, losses)
            out.append(max(abs(found.size_exponent / a - 1), abs(found.data_exponent / b - 1)))
    found = over_seeds(errors)
    return {
        "inequality": "relative error of both exponents <= 0.05",
        **plain(found),
        "holds": True if max(errors) <= 0.05 else False if found["low"] > 0.05 else "undecided",
        "detail": f"largest error {max(errors):.1%}, mean {np.mean(errors):.1%} over {claim.seeds} planted laws, "
        f"36 runs each with {noise:.1%} noise",
        "figures": {"errors": errors},
        "control": control(
            "losses shuffled over the runs", "error > 0.05", destroyed, float(np.median(destroyed)) > 0.05
        ),
    }


def generated_json(rows: int, seed: int) -> list[str]:
    """Return records of one scheme with random values."""
    draw = np.random.default_rng([seed, 5])
    kinds = ("alpha", "beta", "gamma")
    return [
        json.dumps(
            {
                "id": int(draw.integers(10**6)),
                "name": f"{kinds[draw.integers(3)]}{draw.integers(99)}",
                "ok": bool(draw.integers(2)),
                "values": [round(float(x), 3) for x in draw.random(int(draw.integers(1, 5)))],
            }
        )
        for _ in range(rows)
    ]


def doremi_worst_domain(claim: Claim, config: mix.Config | None = None, windows: int = 16384) -> dict[str, Any]:
    """Excess loss over a reference on the worst of three domains: trained with DoReMi's weights, and with uniform ones.

    The reference is trained four times as long as the models that are compared, so that each domain has something left
    to learn. Its control trains with DoReMi's weights handed to the wrong domains.
    """
    config = config or mix.Config(by="doremi", steps=500, reference_steps=2000, batch=32, width=128)
    code, prose = embedded.data("python-source"), read("embedded:stdlib-topics").splits
    train = [code["train"]["text"], prose["train"]["text"], generated_json(3000, 0)]
    test = [code["test"]["text"], prose["test"]["text"], generated_json(500, 1)]
    streams, held = ([mix.byte_stream(t, config.context) for t in texts] for texts in (train, test))
    draw = torch.Generator().manual_seed(0)
    batches = [mix.windows(stream, draw, windows, config.context) for stream in held]
    gains, wrong, weights, worst = [], [], [], []
    for seed in range(claim.seeds):
        w_D, _, reference = mix.doremi(streams, config, 100 * seed)
        known_D = losses(reference, batches)

        def excess(weights_D: np.ndarray, seed: int = seed, known_D: np.ndarray = known_D) -> float:
            weigh: Callable[..., np.ndarray] = lambda losses, batch: weights_D  # noqa: E731
            model = mix.train_bytes(streams, config, 100 * seed + 50, weigh)
            return float((losses(model, batches) - known_D).max())

        uniform, doremi, rotated = (excess(w) for w in (np.full(3, 1 / 3), w_D, np.roll(w_D, 1)))
        gains.append(uniform - doremi)
        wrong.append(uniform - rotated)
        weights.append(w_D.tolist())
        worst.append({"uniform": uniform, "doremi": doremi, "rotated": rotated})
    found = over_seeds(gains)
    mean = {name: float(np.mean([row[name] for row in worst])) for name in worst[0]}
    return {
        "inequality": "worst excess(uniform) - worst excess(doremi) > 0",
        **plain(found),
        "holds": verdict(found, 1e-9),
        "detail": f"worst-domain excess {mean['doremi']:.4f} nats a byte against {mean['uniform']:.4f} with uniform "
        f"weights; weights {np.round(np.mean(weights, axis=0), 2).tolist()}; {claim.seeds} seeds",
        "figures": {"worst_excess": worst, "weights": weights, "domains": ["python", "english", "json"]},
        "control": control("the weights handed to the wrong domains", "gain <= 0", wrong, bool(np.mean(wrong) <= 0)),
    }


def losses(model: mix.ByteModel, batches: list[torch.Tensor]) -> np.ndarray:
    """Return the mean loss of a byte model on each domain, nats a byte: [D]."""
    with torch.no_grad():
        return np.array([model(batch).mean().item() for batch in batches])
