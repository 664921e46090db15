"""The dense claim of `hst`: which pixels of a noisy image belong to its digit, read off the maps of the pyramid."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from brickyard.checks._place import finished, place_of
from brickyard.checks._takes import takes
from brickyard.checks.run import Answers, Inequality, judge
from brickyard.core.arm import parse
from brickyard.core.base import open_base
from brickyard.core.build import build, resolve
from brickyard.core.data import read_data
from brickyard.core.errors import Refused
from brickyard.core.jobs import Job
from brickyard.core.loop import train_mode
from brickyard.core.method import Claim
from brickyard.core.task import Task
from brickyard.tune.hst import maps

SIZE = 32  # side of the images
NOISE = 0.5  # standard deviation; black is 0, white is 1
BATCH = 32
DECODED = "decoder"  # the arm without a pyramid: linear maps from the last states to the pixels of their patch
ARMS = {
    "hst": "hst:stem=1,lr=3e-3",
    "pyramid": "hst:stem=1,ladder=false,lr=3e-3",
    "detached": "hst:stem=1,detach=true,lr=3e-3",
}
RATES = (1e-3, 3e-3, 1e-2)  # of the decoder, which is cheap: the best by validation
DECODER_EPOCHS = 10
CLASSES = Task("image-classification", "accuracy", tuple(map(str, range(10))), 10, "image")


def noisy(files: list[bytes], seed: int) -> tuple[Tensor, Tensor]:
    """Return digits under noise [N, 3, SIZE, SIZE], clipped to -1 to 1, and where they are drawn [N, SIZE, SIZE].

    Smaller images are enlarged by a whole factor and centred; a pixel above half of white belongs to the digit.
    """
    clean = np.zeros((len(files), SIZE, SIZE), np.float32)
    for i, file in enumerate(files):
        image = Image.open(io.BytesIO(file)).convert("L")
        factor = SIZE // max(image.size)
        drawn = image.resize((factor * image.width, factor * image.height), Image.Resampling.BILINEAR)
        top, left = (SIZE - drawn.height) // 2, (SIZE - drawn.width) // 2
        clean[i, top : top + drawn.height, left : left + drawn.width] = np.asarray(drawn, np.float32) / 255
    noise = np.random.default_rng(seed).standard_normal(clean.shape, np.float32) * NOISE
    seen = torch.from_numpy(2 * np.clip(clean + noise, 0, 1) - 1)
    return seen[:, None].expand(-1, 3, -1, -1), torch.from_numpy(clean > 0.5)


def overlap(found_NHW: Tensor, mask_NHW: Tensor) -> Tensor:
    """Return the intersection over the union of two sets of pixels of each image [N]; 1 where both are empty."""
    both = (found_NHW & mask_NHW).flatten(1).sum(1)
    either = (found_NHW | mask_NHW).flatten(1).sum(1)
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


class Decoder(nn.Module):
    """A sum of linear maps of the pyramid's scales, each resized to the image: logits [B, SIZE, SIZE]."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.scales = nn.ModuleList(nn.Conv2d(width, 1, 1) for width in widths)

    def forward(self, maps_BmHW: list[Tensor]) -> Tensor:
        size = (SIZE, SIZE)
        parts = [scale(x) for scale, x in zip(self.scales, maps_BmHW, strict=True)]
        return torch.stack([F.interpolate(x, size, mode="bilinear", align_corners=False)[:, 0] for x in parts]).sum(0)


def decoded_patches(states_BND: Tensor, layer: nn.Linear) -> Tensor:
    """Return logits [B, SIZE, SIZE]: every patch's state gives all pixels of its patch."""
    side = int(states_BND.shape[1] ** 0.5)
    pixels = layer(states_BND).transpose(1, 2).unflatten(-1, (side, side))
    return F.pixel_shuffle(pixels, SIZE // side)[:, 0]


def fit(forward: Any, parameters: list[nn.Parameter], count: int, masks: Tensor, *, lr: float, epochs: int) -> None:
    """Train with AdamW on binary cross-entropy, the rate falling to zero; `forward(rows)` gives the logits of rows."""
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=5e-4)
    steps = epochs * -(-count // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(epochs):
        for rows in torch.randperm(count).split(BATCH):
            optimiser.zero_grad()
            F.binary_cross_entropy_with_logits(forward(rows), masks[rows].float()).backward()
            optimiser.step()
            schedule.step()


def run(argument: dict[str, Any]) -> dict[str, Any]:
    """Train one arm with one seed and return its overlap with the mask of every test image: `{"overlaps": [...]}`."""
    torch.manual_seed(argument["seed"])
    sets = {split: noisy(files, seed) for seed, (split, files) in enumerate(argument["images"].items(), 1)}
    masks, base = sets["train"][1], open_base(argument["base"])
    if argument["shuffled"]:
        masks = masks[torch.randperm(len(masks))]
    if argument["arm"] == DECODED:
        found = _linear(base.backbone(), sets, masks, argument["seed"])
    else:
        found = _pyramid(argument["arm"], base, sets, masks, argument)
    return {"overlaps": overlap(found > 0, sets["test"][1]).tolist()}


def _linear(backbone: nn.Module, sets: dict[str, tuple[Tensor, Tensor]], masks: Tensor, seed: int) -> Tensor:
    with torch.inference_mode():
        states = {
            split: torch.cat([backbone(pixel_values=part).last_hidden_state[:, 1:] for part in x.split(250)])
            for split, (x, _) in sets.items()
        }
    states = {split: found.clone() for split, found in states.items()}
    tried = []
    for lr in RATES:
        torch.manual_seed(seed)
        layer = nn.Linear(states["train"].shape[-1], (SIZE**2) // states["train"].shape[1])
        fit(
            lambda rows, layer=layer: decoded_patches(states["train"][rows], layer),
            [*layer.parameters()],
            len(masks),
            masks,
            lr=lr,
            epochs=DECODER_EPOCHS,
        )
        with torch.no_grad():
            reached = overlap(decoded_patches(states["validation"], layer) > 0, sets["validation"][1]).mean()
            tried.append((float(reached), decoded_patches(states["test"], layer)))
    return max(tried, key=lambda pair: pair[0])[1]


def _pyramid(
    arm: str, base: Any, sets: dict[str, tuple[Tensor, Tensor]], masks: Tensor, argument: dict[str, Any]
) -> Tensor:
    plan = resolve(parse(arm), CLASSES)
    attached = build(plan, base, CLASSES, seed=argument["seed"])
    model = attached.model
    decoder = Decoder(plan.configs["hst"].widths)
    x = sets["train"][0]
    train_mode(model)
    fit(
        lambda rows: decoder(maps(model, x[rows])),
        [*attached.parameters(), *decoder.parameters()],  # the classifier's head gets no gradient and stays
        len(x),
        masks,
        lr=plan.training["lr"],
        epochs=argument["epochs"],
    )
    model.eval()
    with torch.no_grad():
        return torch.cat([decoder(maps(model, part)) for part in sets["test"][0].split(250)])


@takes("base", "data")
def digit_masks(
    claim: Claim, *, rows: int = 1000, test_rows: int = 500, workers: int = 2, epochs: int = 4, **_: Any
) -> dict[str, Any]:
    """Hold the pyramid's maps against a linear decoder of the frozen last states, by intersection over union.

    Gate: the decoder is 10 points better than the pixels that are drawn in most training images. Control: masks of
    other images.
    """
    splits = read_data(claim.data).splits
    most = {"train": rows, "validation": 200, "test": test_rows}
    images = {split: list(splits[split]["image"][:count]) for split, count in most.items()}
    if (size := getattr(open_base(claim.base).config, "image_size", None)) != SIZE:
        raise Refused(f"{claim.base} reads images of side {size}; the digits are drawn on {SIZE} x {SIZE}.")
    unlabelled = np.zeros(len(images["test"]))
    shared = {"images": images, "base": claim.base, "epochs": epochs}
    every = {**ARMS, DECODED: DECODED, "shuffled": ARMS["hst"]}
    with place_of("hst-masks", claim, most, epochs) as folder:
        jobs = [
            Job(
                key=f"{name}-{seed}",
                function="brickyard.checks._masks:run",
                argument={**shared, "arm": arm, "seed": seed, "shuffled": name == "shuffled"},
            )
            for name, arm in every.items()
            for seed in range(1, claim.seeds + 1)
        ]
        values = finished(jobs, workers, folder)
    found = {
        name: Answers(unlabelled, np.array([values[f"{name}-{s}"]["overlaps"] for s in range(1, claim.seeds + 1)]))
        for name in every
    }
    masks = {split: noisy(images[split], 0)[1] for split in ("train", "test")}
    usual = masks["train"].float().mean(0) > 0.5
    guessed = overlap(usual.expand_as(masks["test"]), masks["test"]).numpy()
    found["guess"] = Answers(unlabelled, np.tile(guessed, (claim.seeds, 1)))

    def compare(text: str) -> dict[str, Any]:
        # "loss" is a mean over examples, whatever the number stands for: here the overlap.
        return {"inequality": text, **judge(Inequality.read(text), found, "loss")}

    gate, gone = compare(f"{DECODED} > guess + 10.0"), compare("hst > shuffled + 10.0")
    means = {name: 100 * float(f.predictions.mean()) for name, f in found.items()}
    one = compare(f"hst > {DECODED}")
    said = ", ".join(f"{name} {mean:.1f}" for name, mean in means.items())
    return {
        **one,
        "holds": one["holds"] if gate["holds"] is True else "set-up invalid",
        "detail": f"{one['measured']:+.2f} ({one['low']:+.2f} to {one['high']:+.2f}) hundredths of IoU; {said}",
        "gate": gate,
        "control": {"what": "masks of other images", "destroyed": gone["holds"] is True, **gone},
        "arms": {name: {"arm": arm, "mean": means[name] / 100} for name, arm in every.items()},
        "figures": {"means": means, "ladder": compare("hst > pyramid")},
    }
