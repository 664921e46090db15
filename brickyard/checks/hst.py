"""The claims of `hst`: the pyramid with its ladder beside the one without, tuned norms, LoRA and a linear probe."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from brickyard.checks._masks import digit_masks
from brickyard.checks._place import finished, place_of
from brickyard.checks._runs import all_hold, answers, arm_row, in_words, majority, trained
from brickyard.checks._takes import takes
from brickyard.checks.run import Answers, Inequality, judge
from brickyard.core.answers import answer
from brickyard.core.attached import attach_in_place
from brickyard.core.build import build
from brickyard.core.data import read_data
from brickyard.core.errors import BadData
from brickyard.core.influence import influence
from brickyard.core.jobs import Job
from brickyard.core.loop import train
from brickyard.core.method import Claim
from brickyard.core.roles import roles
from brickyard.core.side import backbone_of
from brickyard.core.trial import Prepared, Setting, prepare
from brickyard.embedded.images import FACTORS, draw

__all__ = ["beside_the_pyramid", "digit_masks", "to_other_classes"]  # named by the claims of the record

TEXTURES = "generated:textures"
FACTOR = "texture"  # the factor that the heads of tiny-vit know least about
EPOCHS, BATCH = 12, 32
ARMS = {
    "hst": "hst:lr=3e-3",
    "pyramid": "hst:ladder=false,lr=3e-3",
    "detached": "hst:detach=true,lr=3e-3",
    "lora": "lora:r=4,lr=3e-3",
    "prompts": "iapt:constant=true,tokens=1,lr=3e-3",  # one trained prompt a layer, for VPT-deep's
    "probe": "linear-probe:lr=1e-2",
}
ON_OTHERS = {name: ARMS[name] for name in ("hst", "pyramid", "lora", "probe")}
ON_OTHERS["moments"] = "moment-probing:p=128,h=4,lr=1e-2"
USEFUL = "probe > majority + 10.0"


def textured(count: int, seed: int) -> dict[str, list]:
    """Return generated images as PNG files with the name of their texture."""
    made = draw(count, seed=seed, digit_share=0.0, augment=False)
    files = []
    for pixels in made.pixels:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        files.append(file.getvalue())
    return {"image": files, "label": [FACTORS[FACTOR][i] for i in made.labels[FACTOR]]}


def images_of(name: str, rows: int, test_rows: int) -> dict[str, dict[str, list]]:
    """Return the splits that are measured: the first rows of an image data set, or as many generated textures."""
    if name == TEXTURES:
        return {"train": textured(rows, 101), "validation": textured(300, 102), "test": textured(test_rows, 103)}
    found = read_data(name).splits
    most = {"train": rows, "validation": 300, "test": test_rows}
    return {split: {k: found[split][k][:count] for k in ("image", "label")} for split, count in most.items()}


@takes("base", "data")
def beside_the_pyramid(
    claim: Claim, *, rows: int = 1000, test_rows: int = 2000, workers: int = 2, epochs: int = EPOCHS, **_: Any
) -> dict[str, Any]:
    """Train all arms on a few images and hold them against each other.

    Control of all parts: labels shuffled. Gates: the frozen features are worth 10 points to a linear probe; for the
    part that is held against LoRA, that LoRA beats this probe by 2 points, for else all are as good as it.
    """
    data = images_of(claim.data, rows, test_rows)
    with place_of("hst", claim, rows, test_rows, epochs) as folder:
        measured = _Arms.of(claim, claim.base, data, ARMS, folder, workers, epochs, norms=True)
    return {
        "ladder": measured.held("hst >= pyramid + 1.0", USEFUL),
        "norms": measured.held("hst >= norms + 2.0", USEFUL),
        "lora": measured.held("hst >= lora - 1.0", "lora > probe + 2.0"),
    }


@takes("base", "data")
def to_other_classes(
    claim: Claim,
    *,
    rows: int = 1000,
    test_rows: int = 2500,
    pretraining_epochs: int = 6,
    workers: int = 2,
    epochs: int = EPOCHS,
    **_: Any,
) -> dict[str, Any]:
    """Train the whole base on every other class, then the arms on a few images of the rest; hold those together.

    Gate: the frozen features of the classes that the base learned are worth 10 points to a linear probe on the others.
    """
    splits = read_data(claim.data).splits
    if (count := len({str(v) for v in splits["train"]["label"]})) < 4:
        raise BadData(f"{claim.data} has {count} classes; to learn half of them and move to the rest takes 4 or more.")
    known, others = (_with_classes(splits, part) for part in (0, 1))
    most = {"train": rows, "validation": 300, "test": test_rows}
    few = {split: {k: v[: most[split]] for k, v in columns.items()} for split, columns in others.items()}
    with place_of("hst-others", claim, rows, test_rows, pretraining_epochs, epochs) as folder:
        job = Job(
            key="pretraining",
            function="brickyard.checks.hst:pretrained",
            argument={"base": claim.base, "data": known, "epochs": pretraining_epochs, "out": str(folder / "base")},
        )
        learned = finished([job], 1, folder)["pretraining"]
        measured = _Arms.of(claim, learned["base"], few, ON_OTHERS, folder, workers, epochs)
    texts = ("hst >= pyramid + 1.0", "hst >= lora - 1.0", "moments >= probe + 1.0")
    parts = [measured.judged(text) for text in texts]
    last, joint = measured.held(texts[0], USEFUL), all_hold(parts)
    means = ", ".join(f"{name} {mean:.1f}" for name, mean in last["figures"]["means"].items())
    before = f"on the classes learned before {100 * learned['accuracy']:.1f}"
    return {
        **last,
        **joint,
        "holds": last["holds"] if last["holds"] == "set-up invalid" else joint["holds"],
        "detail": f"{in_words(parts)}; accuracy: {means}; {before}",
        "figures": {**last["figures"], "pretraining": learned["accuracy"]},
    }


def pretrained(argument: dict[str, Any]) -> dict[str, Any]:
    """Train the whole base on images, write it as a base of its own; `{"base": folder, "accuracy": on test}`."""
    training = {"epochs": argument["epochs"], "batch": 64}
    ready = prepare(Setting(arm="full:lr=1e-3", base=argument["base"], data=argument["data"], training=training))
    attached = build(ready.plan, ready.base, ready.task, seed=0)
    rows = ready.encoded
    train(attached, rows["train"], rows["validation"], ready.task, ready.training, device=ready.setting.device)
    found = answer(attached.model, rows["test"], ready.task).predictions
    out, backbone = Path(argument["out"]), backbone_of(attached.model)
    backbone.save_pretrained(out)  # type: ignore[operator]
    ready.base.processor.save_pretrained(out)
    return {"base": str(out), "accuracy": float((found == rows["test"].labels.numpy()).mean())}


def _with_classes(splits: Any, part: int) -> dict[str, dict[str, list]]:
    """Return the rows of every other class, from the first or from the second on, in the order of their names."""
    chosen = set(sorted({str(v) for v in splits["train"]["label"]})[part::2])
    out = {}
    for split, columns in splits.items():
        places = [i for i, v in enumerate(columns["label"]) if str(v) in chosen]
        out[split] = {k: [columns[k][i] for i in places] for k in ("image", "label")}
    return out


@dataclass(frozen=True)
class _Arms:
    """What the arms of a claim answered to the test rows, and what their runs cost."""

    arms: dict[str, str]
    found: dict[str, Answers]
    runs: dict[str, list[dict[str, Any]]]
    metric: str

    @classmethod
    def of(
        cls,
        claim: Claim,
        base: str,
        data: Any,
        arms: dict[str, str],
        folder: Path,
        workers: int,
        epochs: int,
        *,
        norms: bool = False,
    ) -> _Arms:
        """Run the arms, `hst` with shuffled labels, and with `norms` the tuning of norms alone, with every seed."""
        asked = {"base": base, "data": data, "training": {"epochs": epochs, "batch": BATCH}}
        every, shuffled = {**arms, "shuffled": arms["hst"]}, {"shuffled": {"shuffle_labels": True}}
        runs = trained(every, asked, claim.seeds, folder, workers, but=shuffled)
        found = {name: answers(folder, name, claim.seeds) for name in (*arms, "shuffled")}
        found["majority"] = majority(found["probe"])
        ready = prepare(Setting(arm="linear-probe:lr=3e-3", **asked))
        if norms:
            tuned = [norms_tuned(ready, s) for s in range(1, claim.seeds + 1)]
            found["norms"] = Answers(found["hst"].labels, np.stack(tuned))
        return cls(arms, found, runs, ready.task.metric)

    def held(self, text: str, gate: str) -> dict[str, Any]:
        """Judge one inequality behind its gate, beside the control of shuffled labels."""
        gated, gone, one = (self.judged(t) for t in (gate, "hst > shuffled + 10.0", text))
        means = {
            n: 100 * float(influence(f.labels, f.predictions, self.metric)[0].mean()) for n, f in self.found.items()
        }
        said = ", ".join(f"{name} {mean:.1f}" for name, mean in means.items())
        return {
            **one,
            "holds": one["holds"] if gated["holds"] is True else "set-up invalid",
            "detail": f"{one['measured']:+.2f} points ({one['low']:+.2f} to {one['high']:+.2f}); accuracy: {said}",
            "gate": gated,
            "control": {"what": "training labels shuffled", "destroyed": gone["holds"] is True, **gone},
            "arms": {name: arm_row(text, self.runs[name]) for name, text in self.arms.items()},
            "figures": {"means": means},
        }

    def judged(self, text: str) -> dict[str, Any]:
        return {"inequality": text, **judge(Inequality.read(text), self.found, self.metric)}


def norms_tuned(ready: Prepared, seed: int) -> np.ndarray:
    """Return the test predictions after training the norms of the blocks and a linear head."""
    attached = build(ready.plan, ready.base, ready.task, seed=seed)
    model = attached.model
    norms = tuple(f"{name}." for name, kind in roles(model).items() if kind == "norm")
    names = [n for n, _ in model.named_parameters() if n.startswith((*norms, "head."))]
    tuned = attach_in_place(model, names, matched={}, no_decay=names)
    rows = ready.encoded
    train(tuned, rows["train"], rows["validation"], ready.task, ready.training, device=ready.setting.device)
    return answer(model, rows["test"], ready.task).predictions
