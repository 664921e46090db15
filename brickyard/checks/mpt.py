"""The claims of `mpt`: what a pool without labels gains when prompts label it, and what mixing prompts is worth."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student

from brickyard.checks._place import finished, place_of
from brickyard.checks._runs import all_hold, in_words
from brickyard.checks._takes import takes
from brickyard.checks.run import Answers, Inequality, judge
from brickyard.core import readers
from brickyard.core.answers import Examples, answer, predict
from brickyard.core.arm import parse
from brickyard.core.build import build, resolve
from brickyard.core.encoded import IGNORED
from brickyard.core.jobs import Job
from brickyard.core.loop import Training, train
from brickyard.core.measure import cpu_bfloat16_is_fast
from brickyard.core.method import Claim
from brickyard.core.objective import WithColumns
from brickyard.core.trial import Prepared, Setting, prepare
from brickyard.tune import mpt
from brickyard.tune.mpt import Config, Prompted, PseudoLabels

# One word of a usual English vocabulary for each class, in the order of their names; a set without has its classes'.
WORDS = {
    "embedded:stdlib-topics": ("network", "development", "file", "graphics", "internet", "language", "text"),
    "trec": ("description", "entity", "abbreviation", "person", "location", "number"),
    "sst2": ("bad", "good"),
}
# Templates of a sentiment, as PET's for reviews; those of mpt itself name a topic.
TEMPLATES = {
    "sst2": {
        "manual": ("It was [MASK] . {text}", "{text} All in all , it was [MASK] ."),
        "continuous": ("Just [MASK] ! {text}", "{text} In summary , it is [MASK] ."),
    }
}
LR = 1e-4  # of every classifier here
LABELLED = -1  # in place of the guess at a row whose label a seed was given


@takes("base", "data")
def few_labels(
    claim: Claim,
    *,
    pool: int = 1200,
    epochs: float = 6,
    few_epochs: float = 8,
    head_steps: int = 100,
    options: str = "",
    workers: int = 2,
) -> dict[str, Any]:
    """Train prompts on few labels, and the arm's model on what they say of a pool; hold the other ways side by side.

    Every seed draws other labelled rows. All prompt models of a seed serve all arms: alone, words only, vectors only,
    mixed. Beside them: fine-tuning on the labelled rows; self-training, in which that model labels the pool; and the
    pool's true labels as ceiling. Control: the pseudo-labels dealt out anew. Gate: the ceiling gains 3 points.
    """
    name = Path(claim.data).name if isinstance(claim.data, str) else ""
    words = WORDS.get(name, ())
    given = f"words=[{','.join(words)}]," if words else ""
    shared = {
        "arm": f"full + mpt:{given}head_steps={head_steps}{',' + options if options else ''}",
        "base": claim.base,
        "templates": TEMPLATES.get(name, {}),
        "data": _first_rows(claim.data, pool),
        "shots": claim.shots,
        "max_length": claim.max_length or None,
        "epochs": epochs,
        "few_epochs": few_epochs,
    }
    with place_of("mpt", claim, shared["arm"], pool, epochs, few_epochs) as folder:
        jobs = [
            Job(key=f"seed {s}", function="brickyard.checks.mpt:one_seed", argument={**shared, "seed": s})
            for s in range(1, claim.seeds + 1)
        ]
        ran = list(finished(jobs, workers, folder).values())

    def gathered(what: str, labels: list[int]) -> dict[str, Answers]:
        return {name: Answers(np.array(labels), np.array([one[what][name] for one in ran])) for name in ran[0][what]}

    # A text has the same class for every seed that saw it, and LABELLED, the least number, for the others.
    truth_U = np.max([one["truth"] for one in ran], axis=0)
    return judged(gathered("found", ran[0]["labels"]), gathered("pooled", truth_U), [one["report"] for one in ran])


def one_seed(argument: dict[str, Any]) -> dict[str, Any]:
    """Train every arm of a seed; return their answers to test, what they say of the pool's texts, and a report.

    found and labels: arm -> classes [N] of the test rows, and the true ones. pooled and truth: arm -> the guess at
    every distinct text of train, and the true class; LABELLED where the seed gave the label, or the text is no row.
    """
    data, arm, seed = argument["data"], argument["arm"], argument["seed"]
    unique = {text: i for i, text in enumerate(dict.fromkeys(data["train"]["text"]))}
    truth_U = np.full(len(unique), LABELLED)
    setting = Setting(
        arm=arm,
        base=argument["base"],
        data=data,
        seed=seed,
        shots=argument["shots"],
        max_length=argument["max_length"],
        training={"precision": "bfloat16" if cpu_bfloat16_is_fast() else "float32"},
    )
    ready, config = prepare(setting), replace(resolve(parse(arm)).configs["mpt"], **argument["templates"])
    labels = ready.encoded["train"].labels
    truth = torch.from_numpy(_truth(data, ready))
    given_N = labels.numpy() != IGNORED
    place_N = np.array([unique[text] for text in ready.data.splits["train"]["text"]])
    truth_U[place_N] = truth.numpy()
    prompted = mpt.ask(config, ready)
    few = ready.encoded["train"].take(np.flatnonzero(given_N))
    tuned, own = _trained(ready, few, argument["few_epochs"])
    alone = replace(config, manual=config.manual[:1], continuous=())  # who labels without templates
    said = {"self-training": (alone, Prompted(own[None], np.ones(1), np.ones(1), {}))}
    said |= {f"prompt {p}": _only(config, prompted, [p]) for p in range(len(config.prompts))}
    words_only = list(range(len(config.manual)))
    said["words"] = _only(config, prompted, words_only)
    said["vectors"] = _only(config, prompted, list(range(len(words_only), len(config.prompts))))
    said["mpt"] = (config, prompted)
    pooled = {}
    for name, (using, answers) in said.items():
        weight_P = answers.before_P if using.weights == "accuracy" else np.ones(len(answers.before_P))
        guess_U = np.full(len(unique), LABELLED)
        guess_U[place_N[~given_N]] = mpt.ensemble(answers.scores_PNC, weight_P).argmax(1)[~given_N]
        pooled[name] = guess_U
    said["ceiling"] = (replace(alone, soft=False), _true(truth, ready.task.width))
    names = ready.task.labels or ()
    # Who gives no row to some class is judged as it is.
    targets = {
        name: mpt.decide(*said[name], labels, names, every_class=False) for name in ("self-training", "mpt", "ceiling")
    }
    report = targets["mpt"].report
    targets["control"] = _dealt_out(targets["mpt"], given_N, seed)
    found = {"fine-tuning": tuned}
    for name, columns in targets.items():
        learned, _ = _trained(ready, WithColumns(ready.encoded["train"], columns), argument["epochs"], config)
        found[name] = learned
    return {
        "labels": ready.encoded["test"].labels.tolist(),
        "truth": truth_U.tolist(),
        "found": {name: learned.tolist() for name, learned in found.items()},
        "pooled": {name: guess.tolist() for name, guess in pooled.items()},
        "report": report,
    }


def _first_rows(name: str, pool: int) -> dict[str, dict[str, list]]:
    """Return a data set whose train split has at most `pool` rows, the first: rows stand in no order."""
    splits = readers.read(name).splits
    return {
        split: {k: columns[k][: pool if split == "train" else None] for k in ("text", "label")}
        for split, columns in splits.items()
    }


def _truth(data: dict[str, dict[str, list]], ready: Prepared) -> np.ndarray:
    """Return the true classes of train's rows, which `ready` does not hold, by their texts."""
    label = dict(zip(data["train"]["text"], data["train"]["label"], strict=True))
    names = list(ready.task.labels or ())
    return np.array([names.index(str(label[text])) for text in ready.data.splits["train"]["text"]])


def _only(config: Config, prompted: Prompted, places: list[int]) -> tuple[Config, Prompted]:
    """Return the same with some of the prompts."""
    manual = tuple(t.pattern for t, trained in (config.prompts[p] for p in places) if not trained)
    vectors = tuple(t.pattern for t, trained in (config.prompts[p] for p in places) if trained)
    some = Prompted(prompted.scores_PNC[places], prompted.before_P[places], prompted.after_P[places], prompted.head)
    return replace(config, manual=manual, continuous=vectors), some


def _true(truth_N: torch.Tensor, classes: int) -> Prompted:
    """Return prompts that always know."""
    return Prompted(50.0 * np.eye(classes)[truth_N.numpy()][None], np.ones(1), np.ones(1), {})


def _dealt_out(made: PseudoLabels, given_N: np.ndarray, seed: int) -> PseudoLabels:
    """Return the same targets, those of the pool dealt out anew among its rows."""
    pool = np.flatnonzero(~given_N)
    order = np.arange(len(given_N))
    order[pool] = np.random.Generator(np.random.PCG64(seed)).permutation(pool)
    q_NC, weight_N, temperature_N = (column[torch.from_numpy(order)] for column in made.columns)
    return PseudoLabels(q_NC, weight_N, temperature_N, {})


def _trained(
    ready: Prepared, rows: Examples, epochs: float, config: Config | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Train a fresh classifier on rows; return its predictions of test [N], and its logits of train's rows [M, C]."""
    plan, seed = resolve(parse("full"), ready.task), ready.setting.seed
    attached = build(plan, ready.base, ready.task, seed=seed)
    if config is not None:
        attached.objective = lambda model, batch: _loss(config, model, batch)
    training = Training(**{**asdict(ready.training), "lr": LR, "epochs": epochs, "batch": 16 if config is None else 32})
    train(attached, rows, None, ready.task, training, device=ready.setting.device)
    kind = training.precision
    answers = answer(attached.model, ready.encoded["test"], ready.task, precision=kind)
    return answers.predictions, predict(attached.model, ready.encoded["train"], precision=kind)


def _loss(config: Config, model: Any, batch: dict[str, Any]) -> torch.Tensor:
    inputs = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor) and k != "labels"}
    found = mpt.loss_of_logits(config, model(**inputs).logits.float(), batch)
    return found if isinstance(found, torch.Tensor) else found[0]


def judged(
    arms: dict[str, Answers], labelling: dict[str, Answers], details: list[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return the two parts of the claim: answers to the test rows by arm, and to the pool's rows by labeller.

    Of the pool's rows a seed's guess is LABELLED where it had the label.
    """

    def compare(text: str, among: dict[str, Answers], metric: str) -> dict[str, Any]:
        # A seed draws its labelled rows, the same for every arm.
        return {"inequality": text, **judge(Inequality.read(text), among, metric, together=True)}

    gate = compare("ceiling >= fine-tuning + 3.0", arms, "macro-f1")
    gain = [compare(f"mpt >= {other}", arms, "macro-f1") for other in ("fine-tuning + 3.0", "self-training + 1.0")]
    gone = compare("control >= fine-tuning + 3.0", arms, "macro-f1")
    hits = {name: _hits(a) for name, a in labelling.items()}
    mixed_S, mixed_SU = hits["mpt"]
    mixture = [
        _by_seed(f"mpt >= {other} - 0.5", -0.5, mixed_S - hits[other][0], [mixed_SU - hits[other][1]])
        for other in ("words", "vectors")
    ]
    final_S, final_SN = _hits(arms["mpt"])
    mixture.append(
        _by_seed("accuracy(mpt) >= accuracy(its labels) - 2.0", -2.0, final_S - mixed_S, [final_SN, mixed_SU])
    )
    means = {name: 100 * float(np.mean(a.predictions == a.labels)) for name, a in arms.items()}
    pool = {name: float(accuracy_S.mean()) for name, (accuracy_S, _) in hits.items()}
    unsure = "; the control is undecided" if gone["holds"] == "undecided" else ""
    shared = {
        "gate": gate,
        "control": {
            "what": "the pseudo-labels dealt out anew among the pool's rows",
            "destroyed": gone["holds"] is False,
            **gone,
        },
        "figures": {"test_accuracy": means, "pool_accuracy": pool, "runs": details},
    }
    said = {
        "gain": "test accuracy: " + ", ".join(f"{name} {mean:.1f}" for name, mean in means.items()),
        "mixture": "accuracy on the pool: " + ", ".join(f"{name} {mean:.1f}" for name, mean in pool.items()),
    }
    return {
        name: {**all_hold(rows), **shared, "detail": f"{in_words(rows)}; {said[name]}{unsure}"}
        if gate["holds"] is True
        else {**all_hold(rows), **shared, "holds": "set-up invalid", "detail": f"{in_words([gate])}; {said[name]}"}
        for name, rows in (("gain", gain), ("mixture", mixture))
    }


def _hits(of: Answers) -> tuple[np.ndarray, np.ndarray]:
    """Return each seed's accuracy [S] on the rows that it had to answer, in points, and each one's influence [S, N]."""
    asked_SN = of.predictions != LABELLED
    count_S1 = asked_SN.sum(1, keepdims=True)
    right_SN = 100.0 * (asked_SN & (of.predictions == of.labels))
    mean_S1 = right_SN.sum(1, keepdims=True) / count_S1
    return mean_S1[:, 0], asked_SN * (right_SN - mean_S1) * (asked_SN.shape[1] / count_S1)


def _by_seed(text: str, margin: float, gain_S: np.ndarray, samples: list[np.ndarray]) -> dict[str, Any]:
    """Judge the mean of each seed's difference; `samples` hold the influence [S, N] of the rows of independent samples.

    Seeds label other rows, so that `judge` cannot pair them. The 95 % interval is Student's with Satterthwaite's
    degrees of freedom, for new rows and new seeds; what is left between the two counts in both, which only widens it.
    """
    seeds, mean = len(gain_S), float(gain_S.mean())
    parts = [(float(psi_SN.mean(0).var(ddof=1) / psi_SN.shape[1]), psi_SN.shape[1] - 1) for psi_SN in samples]
    if seeds > 1:
        parts.append((float(gain_S.var(ddof=1) / seeds), seeds - 1))
    total, squares = sum(v for v, _ in parts), sum(v**2 / df for v, df in parts)
    half = float(student.ppf(0.975, total**2 / squares)) * total**0.5 if squares > 0 else 0.0
    low, high = mean - half, mean + half
    holds: Any = True if low >= margin else False if high < margin else "undecided"
    return {"inequality": text, "measured": mean, "low": low, "high": high, "holds": holds}
