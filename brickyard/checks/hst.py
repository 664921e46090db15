"""The claims of `hst`: the pyramid with its ladder beside the one without, tuned norms, LoRA and a linear probe."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from brickyard.checks._masks import digit_masks
from brickyard.checks._place import place_of
from brickyard.checks._runs import answers, arm_row, majority, trained
from brickyard.checks._takes import takes
from brickyard.checks.run import Answers, Inequality, judge
from brickyard.core.answers import answer
from brickyard.core.attached import attach_in_place
from brickyard.core.build import build
from brickyard.core.data import read_data
from brickyard.core.influence import influence
from brickyard.core.loop import train
from brickyard.core.method import Claim
from brickyard.core.roles import roles
from brickyard.core.trial import Prepared, Setting, prepare
from brickyard.embedded.images import FACTORS, draw

__all__ = ["beside_the_pyramid", "digit_masks"]  # named by the claims of the record

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

    Control of all parts: labels shuffled. Gate: LoRA beats the linear probe by 2 points, so that there is something to
    adapt.
    """
    data = images_of(claim.data, rows, test_rows)
    asked = {"base": claim.base, "data": data, "training": {"epochs": epochs, "batch": BATCH}}
    with place_of("hst", claim, rows, test_rows, epochs) as folder:
        every, shuffled = {**ARMS, "shuffled": ARMS["hst"]}, {"shuffled": {"shuffle_labels": True}}
        runs = trained(every, asked, claim.seeds, folder, workers, but=shuffled)
        found = {name: answers(folder, name, claim.seeds) for name in (*ARMS, "shuffled")}
    found["majority"] = majority(found["probe"])
    ready = prepare(Setting(arm="linear-probe:lr=3e-3", **asked))
    found["norms"] = Answers(found["hst"].labels, np.stack([norms_tuned(ready, s) for s in range(1, claim.seeds + 1)]))
    metric = ready.task.metric

    def compare(text: str) -> dict[str, Any]:
        return {"inequality": text, **judge(Inequality.read(text), found, metric)}

    gate, gone = compare("lora > probe + 2.0"), compare("hst > shuffled + 10.0")
    means = {name: 100 * float(influence(f.labels, f.predictions, metric)[0].mean()) for name, f in found.items()}
    said = ", ".join(f"{name} {mean:.1f}" for name, mean in means.items())
    shared = {
        "gate": gate,
        "control": {"what": "training labels shuffled", "destroyed": gone["holds"] is True, **gone},
        "arms": {name: arm_row(text, runs[name]) for name, text in ARMS.items()},
        "figures": {"means": means},
    }
    out = {}
    for part, text in (
        ("ladder", "hst >= pyramid + 1.0"),
        ("norms", "hst >= norms + 2.0"),
        ("lora", "hst >= lora - 1.0"),
    ):
        one = compare(text)
        holds = one["holds"] if gate["holds"] is True else "set-up invalid"
        detail = f"{one['measured']:+.2f} points ({one['low']:+.2f} to {one['high']:+.2f}); accuracy: {said}"
        out[part] = {**one, "holds": holds, "detail": detail, **shared}
    return out


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
