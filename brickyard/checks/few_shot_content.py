"""The claims of `few-shot-content`, by macro-F1: a cloze head beside ordinary ones, modules begun on a near task."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from brickyard.checks._data import at_hand
from brickyard.checks._place import place_of
from brickyard.checks._runs import answers, arm_row, asked_by, majority, trained, tuned, with_training
from brickyard.checks._takes import takes
from brickyard.checks.run import Answers, Inequality, judge
from brickyard.core.influence import influence
from brickyard.core.method import Claim
from brickyard.tune.few_shot_content import krippendorff

METRIC = "macro-f1"
MODULES = {"lora": "lora:r=8,alpha=16", "adapter": "bottleneck-adapter"}
HEADS = {"cloze": "few-shot-content", "ordinary": "linear-probe:pool=cls"}
ARMS = {f"{module}-{head}": f"{MODULES[module]} + {HEADS[head]}" for module in MODULES for head in HEADS} | {
    "lora-mean": f"{MODULES['lora']} + linear-probe",
    "lora-warm": f"{MODULES['lora']} + {HEADS['cloze']}:warm=true",
}
FULL = {"full-cloze": f"full + {HEADS['cloze']}"}
FULL_LRS = (3e-5, 1e-4, 3e-4)  # all weights want lower ones than the modules
PROBE = "linear-probe:lr=1e-2"
NEAR = "sst2"  # opinions on films, before those on goods
NEAR_RATE = 1e-3
STEPS = 100  # on the few texts


@takes("base", "data")
def heads(claim: Claim, *, workers: int = 2) -> dict[str, Any]:
    """Train each module under a cloze head and under an ordinary one on a few texts of each class.

    Every seed draws other texts, the same for all arms; the learning rate of each is searched, that of the bare probe
    is given. Control: training labels shuffled. Gate: the ordinary head is 10 points above the majority class, for one
    that never left it would be no rival.
    """
    asked = {**asked_by(claim), "metric": METRIC}
    with place_of("few-shot-content", claim) as folder:
        arms = tuned(claim, ARMS, asked, folder, workers)
        arms |= tuned(replace(claim, lrs=FULL_LRS), FULL, asked, folder, workers) | {"probe": PROBE}
        controls = {f"{module}-control": arms[f"{module}-cloze"] for module in MODULES}
        arms |= controls
        runs = trained(
            arms, asked, claim.seeds, folder, workers, but={name: {"shuffle_labels": True} for name in controls}
        )
        found = {name: answers(folder, name, claim.seeds) for name in arms}
    rows = {name: arm_row(text, runs[name]) for name, text in arms.items()}
    return {module: {**judged(found, module), "arms": rows} for module in MODULES}


@takes("base", "data")
def pretuned(claim: Claim, *, workers: int = 2, near: Any = None, near_rows: int = 2000) -> dict[str, Any]:
    """Train LoRA and its cloze head on a near task with many labels, then LoRA anew on a few texts, from there or not.

    The second stage has a new head, and of every start its learning rate is searched. Every seed draws other texts, the
    same for all arms. Control: the start is taken from training on shuffled labels. Gate: the first stage learned its
    own task, by 10 points over the majority class.
    """
    text = ARMS["lora-cloze"]
    first = {**asked_by(claim), "shots": 0, "data": at_hand(NEAR) if near is None else near, "metric": METRIC}
    first |= {"train_rows": near_rows, "training": {"epochs": claim.epochs, "batch": 16}}
    few = {**asked_by(claim), "metric": METRIC, "training": {"steps": STEPS, "batch": claim.batch}}
    with place_of("few-shot-content", claim, near_rows) as folder:
        stages = {name: with_training(text, lr=NEAR_RATE) for name in ("near", "noise")}
        trained(stages, first, 1, folder, workers, but={"noise": {"shuffle_labels": True}})
        start = f"{text} + pvp:brick={folder}/near-1/brick"
        arms = tuned(claim, {"fresh": text, "begun": start}, few, folder, workers)
        arms |= {"control": arms["begun"].replace("/near-1/", "/noise-1/"), "probe": PROBE}
        runs = trained(arms, few, claim.seeds, folder, workers)
        found = {name: answers(folder, name, claim.seeds) for name in arms}
        own = answers(folder, "near", 1)
    rows = {name: arm_row(arm.replace(f"{folder}/", ""), runs[name]) for name, arm in arms.items()}
    return {**judged_start(found, own), "arms": rows}


def judged_start(found: dict[str, Answers], own: Answers) -> dict[str, Any]:
    """Return the outcome from the answers of the arms [S, N] and of the first stage to its own test rows [1, M]."""

    def compare(text: str, among: dict[str, Answers]) -> dict[str, Any]:
        return {"inequality": text, **judge(Inequality.read(text), among, METRIC, together=True)}

    outcome = compare("begun >= fresh + 3.0", found)
    gate = compare("near > majority + 10.0", {"near": own, "majority": majority(own)})
    gone = compare("begun > control + 3.0", found)
    scores = {name: 100 * influence(of.labels, of.predictions, METRIC)[0] for name, of in found.items()}
    needed = f"; {outcome['needed']['sentence']}" if outcome.get("needed") else ""
    said = ", ".join(f"{name} {score_S.mean():.1f}" for name, score_S in scores.items())
    reach = f"{outcome['low']:+.2f} to {outcome['high']:+.2f}"
    return {
        **outcome,
        "holds": outcome["holds"] if gate["holds"] is True else "set-up invalid",
        "metric": METRIC,
        "gate": gate,
        "control": {"what": "begun by training on shuffled labels", "destroyed": gone["holds"] is True, **gone},
        "figures": {"means": {name: float(score_S.mean()) for name, score_S in scores.items()}},
        "detail": f"measured {outcome['measured']:+.2f} points ({reach}){needed}; macro-F1: {said}",
    }


def judged(found: dict[str, Answers], module: str) -> dict[str, Any]:
    """Return the outcome of one module's claim from the answers [S, N] of every arm."""
    cloze, ordinary = f"{module}-cloze", f"{module}-ordinary"
    found = {**found, "majority": majority(found[ordinary])}

    def compare(text: str) -> dict[str, Any]:
        # A seed draws its labelled rows, the same for every arm.
        return {"inequality": text, **judge(Inequality.read(text), found, METRIC, together=True)}

    outcome, gate = compare(f"{cloze} >= {ordinary} + 2.0"), compare(f"{ordinary} > majority + 10.0")
    gone = compare(f"{cloze} > {module}-control + 5.0")
    scores = {name: 100 * influence(of.labels, of.predictions, METRIC)[0] for name, of in found.items()}
    several = len(scores[cloze]) > 1
    figures = {
        "means": {name: float(score_S.mean()) for name, score_S in scores.items()},
        "spread": {name: float(score_S.std(ddof=1)) for name, score_S in scores.items()} if several else {},
        # The seeds as coders of the same texts: how far would two of them agree?
        "alpha": {name: krippendorff(of.predictions) for name, of in found.items()} if several else {},
    }
    low, high = outcome["low"], outcome["high"]
    needed = f"; {outcome['needed']['sentence']}" if outcome.get("needed") else ""
    said = ", ".join(f"{name} {mean:.1f}" for name, mean in figures["means"].items())
    alpha = ", ".join(f"{name} {figures['alpha'][name]:.2f}" for name in (cloze, ordinary) if several)
    spread = ", ".join(f"{name} {figures['spread'][name]:.1f}" for name in (cloze, ordinary, "full-cloze") if several)
    return {
        **outcome,
        "holds": outcome["holds"] if gate["holds"] is True else "set-up invalid",
        "metric": METRIC,
        "gate": gate,
        "control": {
            "what": "training labels shuffled: there is nothing left to learn",
            "destroyed": gone["holds"] is True,
            **gone,
        },
        "figures": figures,
        "detail": f"measured {outcome['measured']:+.2f} points ({low:+.2f} to {high:+.2f}){needed}"
        f"; macro-F1: {said}"
        + (f"; standard deviation over seeds: {spread}; Krippendorff's alpha between them: {alpha}" if several else ""),
    }
