"""The claims of `p2p`: the same painter before a well trained, an under-trained and a random image model.

The image models are small residual networks, trained here on handwritten digits: MNIST where a folder of it is at hand,
else `embedded:digits`. Each seed trains its own, draws its own random one, and begins the painters anew.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel, ViTImageProcessorPil
from transformers.modeling_outputs import ImageClassifierOutput

from brickyard.checks._data import at_hand
from brickyard.checks._runs import majority, with_training
from brickyard.checks.run import Answers, Inequality, judge
from brickyard.core import readers
from brickyard.core.answers import answer
from brickyard.core.attached import Attached, attach_in_place
from brickyard.core.base_config import quiet
from brickyard.core.build import build
from brickyard.core.loop import train
from brickyard.core.method import Claim
from brickyard.core.side import backbone_of
from brickyard.core.trial import Prepared, Setting, prepare
from brickyard.embedded import shapes
from brickyard.tune import p2p

IMAGES = "mnist|embedded:digits"  # what the image models are trained on
SIDE = 28  # of a picture; an object fills 24
POINTS = 256
RATES = (2e-3, 1e-2)  # tried on validation with seed 0 by arms whose painter has nothing to learn
KINDS = ("strong", "weak", "random")
# Half of the paper's width and neighbours, and four views: a check takes minutes.
PAINTED = "p2p:width=32,neighbours=16,views=[4,1]"
SILHOUETTE = "p2p:colour=silhouette,train=head,views=[4,1]"
MOST = 0.25  # of the parameters of image model and painter that may train
CLOUDS = {"train": 11, "validation": 12, "test": 13}  # seeds of the splits


class PointNet(nn.Module):
    """A network on points alone: a shared MLP, the maximum over points, an MLP; [B, N, 3] -> logits.

    Source: Qi et al. 2017, "PointNet", without its transforms.
    """

    def __init__(self, classes: int, width: int = 128) -> None:
        super().__init__()
        self.points = nn.Sequential(*_layers(3, 64), *_layers(64, width), nn.Conv1d(width, 4 * width, 1))
        self.head = nn.Sequential(nn.Linear(4 * width, width), nn.ReLU(), nn.Linear(width, classes))

    def forward(self, points: Tensor, rows: Tensor) -> ImageClassifierOutput:
        """Return an output with `logits`; `rows` stand in every batch of clouds and are not used."""
        return ImageClassifierOutput(logits=self.head(self.points(points.transpose(1, 2)).amax(dim=2)))  # type: ignore[arg-type]


def _layers(n: int, m: int) -> list[nn.Module]:
    return [nn.Conv1d(n, m, 1, bias=False), nn.BatchNorm1d(m), nn.ReLU()]


def clouds(train: int, validation: int, test: int) -> dict[str, dict[str, list]]:
    """Return generated clouds of POINTS points and the names of their families."""
    splits = {}
    for (split, seed), count in zip(CLOUDS.items(), (train, validation, test), strict=True):
        points, labels = shapes.draw(count, seed=seed, points=POINTS)
        splits[split] = {"points": list(points), "label": [shapes.FAMILIES[i] for i in labels]}
    return splits


def digits(rows: int) -> tuple[str, dict[str, dict[str, list]]]:
    """Return the name of the pictures that image models are trained on, and their first `rows` (1,000 to validate)."""
    name = at_hand(IMAGES)
    most = {"train": rows, "validation": 1000}
    splits = readers.read(name).splits
    return name, {s: {k: v[:count] for k, v in splits[s].items()} for s, count in most.items()}


def image_models(
    folder: Path, seed: int, *, widths: tuple[int, ...], rows: int, epochs: int, weak_steps: int
) -> tuple[dict[str, Path], dict[str, Any]]:
    """Write a trained, an under-trained and a random image model of one shape; return their folders and accuracies."""
    config = ResNetConfig(
        embedding_size=widths[0], hidden_sizes=list(widths), depths=[1] * len(widths), layer_type="basic"
    )
    out = {kind: folder / f"{kind}-{seed}" for kind in KINDS}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _write(ResNetModel(config), out["random"])
    name, data = digits(rows)
    setting = Setting(arm="full:lr=2e-3", base=str(out["random"]), data=data, seed=seed)
    ready = prepare(setting, ("train", "validation"))
    scores: dict[str, Any] = {"data": name}
    for kind, length in (("strong", {"epochs": epochs}), ("weak", {"steps": weak_steps})):
        training = replace(ready.training, **length)
        attached = build(ready.plan, ready.base, ready.task, seed=seed)
        train(attached, ready.encoded["train"], None, ready.task, training, device="cpu")
        _write(backbone_of(attached.model), out[kind])
        found = answer(attached.model, ready.encoded["validation"], ready.task).predictions
        scores[kind] = ready.task.score(ready.encoded["validation"].labels.numpy(), found)
    return out, scores


def _write(backbone: Any, folder: Path) -> None:
    with quiet():
        backbone.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_convert_rgb=True).save_pretrained(folder)


def by_image_model(
    claim: Claim,
    *,
    validation_rows: int = 200,
    test_rows: int = 600,
    image_rows: int = 4000,
    image_epochs: int = 2,
    weak_steps: int = 8,
    widths: tuple[int, ...] = (64, 128, 192),
    learned: str = PAINTED,
    silhouette: str = SILHOUETTE,
    **_: Any,
) -> dict[str, Any]:
    """Train the painter before three image models, a silhouette with its head, and a PointNet; hold them together.

    The silhouette's rate is chosen on validation (RATES). Control: P2P with shuffled labels, first seed. Gates: the
    strong image model beats the weak one by 5 points at its own task, so that there is a quality to rise with; and P2P
    beats the majority class by 20, so that something was learned.
    """
    data = clouds(claim.train_rows, validation_rows, test_rows)
    common: dict[str, Any] = {"data": data, "training": {"epochs": claim.epochs, "batch": claim.batch}}
    plain = ""
    voted: dict[str, list[np.ndarray]] = {}
    single: dict[str, list[np.ndarray]] = {}
    images: list[dict[str, Any]] = []
    parameters: dict[str, int] = {}
    for seed in range(1, claim.seeds + 1):
        with tempfile.TemporaryDirectory(prefix="brickyard-p2p-") as place:
            bases, scores = image_models(
                Path(place), seed, widths=widths, rows=image_rows, epochs=image_epochs, weak_steps=weak_steps
            )
            images.append(scores)
            plain = plain or _chosen(silhouette, {**common, "base": str(bases["strong"])})
            arms = {kind: (learned, kind) for kind in KINDS} | {"silhouette": (plain, "strong")}
            if seed == 1:
                arms["shuffled"] = (learned, "strong")
            for name, (text, kind) in arms.items():
                shuffled = name == "shuffled"
                asked = Setting(arm=text, base=str(bases[kind]), seed=seed, shuffle_labels=shuffled, **common)
                ready = prepare(asked)
                attached = _trained(ready)
                voted.setdefault(name, []).append(_answered(ready, attached))
                with p2p.views(attached.model, 1, 1):
                    single.setdefault(name, []).append(_answered(ready, attached))
                if name == "strong":
                    parameters = {
                        "trained": sum(x.numel() for x in attached.parameters()),
                        "all": sum(x.numel() for x in attached.model.parameters()),
                    }
            ready = prepare(Setting(arm=learned, base=str(bases["strong"]), seed=seed, **common))
            voted.setdefault("pointnet", []).append(_answered(ready, _trained(ready, _pointnet(ready))))
    labels = ready.encoded["test"].labels.numpy()
    found = {name: Answers(labels, np.stack(rows)) for name, rows in voted.items()}
    once = {name: _mean(labels, rows) for name, rows in single.items()}
    figures = {
        "voted": {name: _mean(labels, rows) for name, rows in voted.items()},
        "single_view": once,
        "image_models": images,
        "parameters": parameters,
        "arms": {"p2p": learned, "silhouette": plain},
    }
    return judged(found, figures)


def judged(found: dict[str, Answers], figures: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of the claim from the answers of every arm and what is known of the image models."""
    found = {**found, "majority": majority(found["strong"])}
    found["first"] = Answers(found["strong"].labels, found["strong"].predictions[:1])

    def compare(text: str) -> dict[str, Any]:
        return {"inequality": text, **judge(Inequality.read(text), found, "accuracy")}

    learns, gone = compare("strong > majority + 20.0"), compare("first > shuffled + 10.0")
    apart = min(scores["strong"] - scores["weak"] for scores in figures["image_models"])
    valid = learns["holds"] is True and apart >= 0.05
    shared = {
        "gate": {**learns, "image_models_apart": 100 * apart, "holds": valid},
        "control": {"what": "training labels shuffled", "destroyed": gone["holds"] is True, **gone},
        "figures": figures,
    }
    once = figures["single_view"]
    said = ", ".join(
        f"{name} {mean:.1f}" + (f" ({once[name]:.1f})" if name in once else "")
        for name, mean in figures["voted"].items()
    )
    out = {}
    for part, text in (
        ("random", "strong >= random + 3.0"),
        ("weak", "strong >= weak + 0.0"),
        ("silhouette", "strong >= silhouette + 2.0"),
    ):
        one = compare(text)
        detail = f"{one['measured']:+.2f} points ({one['low']:+.2f} to {one['high']:+.2f}); accuracy voted (one view): "
        out[part] = {**one, "holds": one["holds"] if valid else "set-up invalid", "detail": detail + said, **shared}
    trained, every = figures["parameters"]["trained"], figures["parameters"]["all"]
    share = trained / every
    out["parameters"] = {
        "inequality": f"trained <= {MOST:g} of image model and painter",
        "holds": share <= MOST,
        "measured": share,
        "low": share,
        "high": share,
        "detail": f"{trained:,} of {every:,} parameters train: {share:.1%}",
        "gate": None,
        "control": {
            "what": "full tuning of the image model",
            "inequality": f"all parameters <= {MOST:g} of them",
            "measured": 1.0,
            "low": 1.0,
            "high": 1.0,
            "destroyed": True,
        },
        "figures": figures,
    }
    return out


def _mean(labels: np.ndarray, rows: list[np.ndarray]) -> float:
    return 100 * float((np.stack(rows) == labels).mean())


def _chosen(text: str, asked: dict[str, Any]) -> str:
    """Return the arm with the rate of RATES that validates best with seed 0."""
    arms = [with_training(text, lr=lr) for lr in RATES]
    scores = []
    for arm in arms:
        ready = prepare(Setting(arm=arm, seed=0, **asked))
        found = _answered(ready, _trained(ready), "validation")
        scores.append(ready.task.score(ready.encoded["validation"].labels.numpy(), found))
    return arms[int(np.argmax(scores))]


def _trained(ready: Prepared, attached: Attached | None = None) -> Attached:
    """Train the arm of a setting, or what is given in its place, in this process."""
    attached = attached or build(ready.plan, ready.base, ready.task, seed=ready.setting.seed)
    rows = ready.encoded
    train(attached, rows["train"], rows["validation"], ready.task, ready.training, device="cpu")
    return attached


def _answered(ready: Prepared, attached: Attached, split: str = "test") -> np.ndarray:
    return answer(attached.model, ready.encoded[split], ready.task).predictions


def _pointnet(ready: Prepared) -> Attached:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(ready.setting.seed)
        model = PointNet(ready.task.width)
    names = [name for name, _ in model.named_parameters()]
    return attach_in_place(model, names, matched={"network": ["points", "head"]})
