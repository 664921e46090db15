"""Train the embedded image bases `tiny-vit` and `tiny-conv` on generated images, measure them, write the card.

    python scripts/train_image_bases.py --base tiny-vit --work RUN --out brickyard/embedded/tiny_vit \
        --probe MNIST_FOLDER CIFAR_FOLDER

Batch k is `images.draw(batch, seed=(seed, k))` and the learning rate is a function of k, so a run that is stopped and
started again with the same command continues from RUN's checkpoint and ends with the same bits as one that was not
stopped. The images of `--probe` (folders with train.parquet and test.parquet) are measured on, never trained on; of the
handwritten digits only the training rows of `embedded:digits` are shown.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, ResNetConfig, ResNetModel, ViTConfig, ViTModel

from brickyard.core.errors import Changed
from brickyard.embedded import digits, images

INPUT_SIDE = {"tiny-vit": 32, "tiny-conv": 128}  # a ResNet divides the side by 32: 128 leaves a last map of 4 x 4
MEAN = STD = 0.5  # pixels go from [0, 1] to [-1, 1]
SKETCH = 8  # side of the thumbnail
SKETCH_WEIGHT = 4.0  # its mean squared error starts at 1, the summed cross-entropies near 15
CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the weights; a checkpoint continues only under equal settings."""

    base: str
    steps: int
    batch: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.05  # part of the steps
    clip: float = 1.0
    digit_share: float = 0.3
    seed: int = 0


class Pretraining(nn.Module):
    """A backbone and linear heads over the classes of all factors: one on each pooled state and one on every place.

    The head on places (patch tokens, or points of the last map) has one more output: the part of the place that the
    object covers. It names the object's factors where the object is, and the ground's elsewhere.

    A second head on each pooled state draws the image's thumbnail (brightness, SKETCH x SKETCH, standardised). Without
    it a short run learns colours first and forgets the arrangement of the image, which other tasks need.
    """

    def __init__(self, backbone: PreTrainedModel, width: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.sizes = [len(values) for values in images.FACTORS.values()]
        names = ("mean", "first", "pooled") if isinstance(backbone, ViTModel) else ("mean",)
        self.heads = nn.ModuleDict({name: nn.Linear(width, sum(self.sizes)) for name in names})
        self.sketch_heads = nn.ModuleDict({name: nn.Linear(width, SKETCH**2) for name in names})
        self.place_head = nn.Linear(width, sum(self.sizes) + 1)

    def factors(self, logits: Tensor) -> dict[str, Tensor]:
        """Split [..., sum of classes] into one tensor per factor."""
        return dict(zip(images.FACTORS, logits.split(self.sizes, dim=-1), strict=True))

    def forward(self, pixels_NHWC: Tensor) -> dict[str, dict[str, Tensor]]:
        """State name -> factor -> logits [N, classes], from bytes [N, 32, 32, 3]."""
        states = pooled(self.backbone, model_input(self.backbone, pixels_NHWC))
        return {name: self.factors(head(states[name])) for name, head in self.heads.items()}

    def loss(self, pixels_NHWC: Tensor, masks_NHW: Tensor, labels: dict[str, Tensor]) -> Tensor:
        """Summed cross-entropy of all factors, averaged over the pooled states; the same over places; thumbnails."""
        states = pooled(self.backbone, model_input(self.backbone, pixels_NHWC))
        sketch = sketched(pixels_NHWC)
        drawn = [F.mse_loss(head(states[name]), sketch) for name, head in self.sketch_heads.items()]
        whole = [self._classified(self.factors(head(states[name])), labels) for name, head in self.heads.items()]
        places = states["places"]
        side = math.isqrt(places.shape[1])
        cover = F.adaptive_avg_pool2d(masks_NHW[:, None], side).flatten(1)
        logits = self.place_head(places)
        on_object = cover > 0.25
        local = {
            name: torch.where(on_object ^ (name in ("ground", "backdrop")), label[:, None], images.NOT_APPLICABLE)
            for name, label in labels.items()
        }
        covered = F.binary_cross_entropy_with_logits(logits[..., -1], cover)
        named = self._classified({k: v.flatten(0, 1) for k, v in self.factors(logits[..., :-1]).items()}, local)
        return torch.stack(whole).mean() + SKETCH_WEIGHT * torch.stack(drawn).mean() + named + covered

    @staticmethod
    def _classified(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
        """Cross-entropy averaged over the rows to which a factor applies, summed over the factors."""
        total = torch.zeros(())
        for name, target in labels.items():
            shown = (target != images.NOT_APPLICABLE).sum().clamp(min=1)
            summed = F.cross_entropy(
                logits[name], target.flatten(), ignore_index=images.NOT_APPLICABLE, reduction="sum"
            )
            total = total + summed / shown
        return total


def new_backbone(base: str, seed: int) -> PreTrainedModel:
    """The untrained architecture, initialised from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if base == "tiny-vit":
            config = ViTConfig(
                image_size=32,
                patch_size=4,
                hidden_size=160,
                intermediate_size=320,
                num_hidden_layers=6,
                num_attention_heads=4,
                layer_norm_eps=1e-6,
            )
            backbone = ViTModel(config)
            backbone.embeddings.position_embeddings.data.copy_(place_waves(8, config.hidden_size))
            return backbone
        return ResNetModel(
            ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64, 192], depths=[2, 2, 2, 2], layer_type="basic")
        )


def place_waves(side: int, width: int) -> Tensor:
    """Sines and cosines of row and column [1, 1 + side * side, width], zero for the first token.

    A short run does not find the plane of the patches by itself; the amplitude, a quarter, is near the patches' own.
    """
    rates = 1.0 / 100 ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * rates[None, :]
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, width / 2]
    rows = waves[:, None, :].expand(side, side, -1)
    columns = waves[None, :, :].expand(side, side, -1)
    plane = torch.cat([rows, columns], dim=2).reshape(side * side, width)
    return 0.25 * torch.cat([torch.zeros(1, width), plane])[None]


def new_training(base: str, seed: int) -> Pretraining:
    """Backbone and heads before the first step."""
    backbone = new_backbone(base, seed)
    width = backbone.config.hidden_size if base == "tiny-vit" else backbone.config.hidden_sizes[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        model = Pretraining(backbone, width)
    return model.to(memory_format=torch.channels_last) if base == "tiny-conv" else model


def model_input(backbone: nn.Module, pixels_NHWC: Tensor) -> Tensor:
    """Bytes [N, h, w, 3] -> what the shipped image processor makes of them, up to its rounding to bytes."""
    x = (pixels_NHWC.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD
    side = INPUT_SIDE["tiny-vit" if isinstance(backbone, ViTModel) else "tiny-conv"]
    return x if x.shape[-1] == side else F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)


def sketched(pixels_NHWC: Tensor) -> Tensor:
    """Thumbnails of the brightness [N, SKETCH * SKETCH], each with mean 0 and variance 1."""
    small = F.adaptive_avg_pool2d(pixels_NHWC.float().mean(dim=3)[:, None] / 255, SKETCH).flatten(1)
    centred = small - small.mean(dim=1, keepdim=True)
    return centred / (centred.pow(2).mean(dim=1, keepdim=True) + 1e-4).sqrt()


def pooled(backbone: nn.Module, x_NCHW: Tensor) -> dict[str, Tensor]:
    """State vectors [N, width]: the mean over places and, of a ViT, the first token and the pooler's output too.

    "places" holds the states [N, places, width] themselves.
    """
    out = backbone(pixel_values=x_NCHW)
    last = out.last_hidden_state
    if last.ndim == 4:
        return {"mean": last.mean(dim=(2, 3)), "places": last.flatten(2).transpose(1, 2)}
    return {
        "mean": last[:, 1:].mean(dim=1),
        "first": last[:, 0],
        "pooled": out.pooler_output,
        "places": last[:, 1:],
    }


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    warm = max(1, round(settings.steps * settings.warmup))
    if step < warm:
        return settings.lr * (step + 1) / warm
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, settings.steps - warm)))


def new_optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW that decays matrices and kernels only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95))


def batch_at(step: int, settings: Settings, strokes: images.Digits) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Batch `step` of the run: pixels, masks and labels."""
    drawn = images.draw(settings.batch, seed=(settings.seed, step), digits=strokes, digit_share=settings.digit_share)
    labels = {name: torch.from_numpy(value) for name, value in drawn.labels.items()}
    return torch.from_numpy(drawn.pixels), torch.from_numpy(drawn.masks), labels


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.AdamW, facts: dict[str, str]) -> None:
    """Weights, buffers, moments and `facts` in one file, written beside and renamed."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{name}": value for name, value in state.items()}
    beside = path.with_suffix(".tmp")
    save_file({name: value.detach().contiguous() for name, value in tensors.items()}, beside, metadata=facts)
    os.replace(beside, path)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.AdamW, settings: Settings) -> dict[str, str]:
    """Restore what `save_checkpoint` wrote and return its facts; Changed under other settings."""
    with safe_open(path, framework="pt") as file:
        facts = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    if json.loads(facts["settings"]) != asdict(settings):
        raise Changed(f"{path} was written under {facts['settings']}; give the same settings or another --work folder")
    model.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("adam."):
            _, index, leaf = name.split(".")
            moments.setdefault(int(index), {})[leaf] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return facts


def train(
    settings: Settings, work: Path, strokes: images.Digits, *, save_every: int = 200, stop_at: int | None = None
) -> tuple[Pretraining, float]:
    """Train to the end, or to step `stop_at`, continuing from a checkpoint in `work`; the model and its CPU seconds."""
    work.mkdir(parents=True, exist_ok=True)
    model = new_training(settings.base, settings.seed).train()
    optimizer = new_optimizer(model, settings)
    path, first, spent = work / CHECKPOINT, 0, 0.0
    if path.exists():
        facts = load_checkpoint(path, model, optimizer, settings)
        first, spent = int(facts["step"]), float(facts["cpu_seconds"])
        print(f"continuing at step {first}", flush=True)
    began = time.process_time()
    last = min(settings.steps, stop_at if stop_at is not None else settings.steps)
    recent: list[float] = []
    for step in range(first, last):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        loss = model.loss(*batch_at(step, settings, strokes))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip, error_if_nonfinite=True)
        optimizer.step()
        recent.append(loss.item())
        done = step + 1
        if done % 50 == 0 or done == last:
            seconds = spent + time.process_time() - began
            print(f"step {done} loss {np.mean(recent):.4f} cpu {seconds:.0f} s", flush=True)
            recent.clear()
        if done % save_every == 0 or done == last:
            seconds = spent + time.process_time() - began
            facts = {"settings": json.dumps(asdict(settings)), "step": str(done), "cpu_seconds": str(seconds)}
            save_checkpoint(path, model, optimizer, facts)
    return model, spent + time.process_time() - began


@torch.no_grad()
def factor_accuracy(model: Pretraining, settings: Settings, strokes: images.Digits, count: int = 2048) -> dict:
    """Accuracy per factor on images that were not trained on (another seed), best state, in eval mode."""
    model.eval()
    drawn = images.draw(count, seed=(settings.seed, 2**31), digits=strokes, digit_share=settings.digit_share)
    parts = [model(torch.from_numpy(part)) for part in np.array_split(drawn.pixels, max(1, count // 128))]
    scores = {}
    for factor, target in drawn.labels.items():
        shown = target != images.NOT_APPLICABLE
        answers = [torch.cat([part[name][factor] for part in parts]).argmax(dim=1).numpy() for name in model.heads]
        scores[factor] = max(float((answer[shown] == target[shown]).mean()) for answer in answers)
    return scores


def write_folder(backbone: PreTrainedModel, base: str, out: Path) -> str:
    """config.json, model.safetensors and preprocessor_config.json; the sha256 of the weights."""
    backbone.to(memory_format=torch.contiguous_format).eval().save_pretrained(out)
    side = INPUT_SIDE[base]
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
    }
    (out / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def read_images(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` rows of a parquet file as bytes [N, 32, 32, 3] and labels [N]."""
    rows = parquet.read_table(path).slice(0, count).to_pylist()
    decoded = []
    for row in rows:
        content = row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"]
        with Image.open(io.BytesIO(content)) as picture:
            resized = picture.convert("RGB").resize((images.SIDE, images.SIDE), Image.Resampling.BILINEAR)
            decoded.append(np.asarray(resized))
    return np.stack(decoded), np.array([row["label"] for row in rows])


@torch.no_grad()
def features(backbone: nn.Module, pixels: np.ndarray, state: str) -> np.ndarray:
    """State vectors of `pixels` in eval mode, float32 [N, width]."""
    backbone.eval()
    parts = np.array_split(pixels, max(1, len(pixels) // 128))
    return np.concatenate(
        [pooled(backbone, model_input(backbone, torch.from_numpy(part)))[state].numpy() for part in parts]
    )


def linear_probe(train: np.ndarray, labels: np.ndarray, test: np.ndarray, answers: np.ndarray) -> tuple[float, float]:
    """Test accuracy of a logistic regression on standardised features, and half its 95 % interval (binomial).

    The penalty is chosen on the last fifth of the training rows, in the same way for every kind of features.
    """
    mean, scale = train.mean(axis=0), train.std(axis=0) + 1e-6
    train, test = (train - mean) / scale, (test - mean) / scale
    cut = len(train) * 4 // 5

    def fit(strength: float, x: np.ndarray, y: np.ndarray) -> LogisticRegression:
        return LogisticRegression(C=strength, max_iter=3000, tol=1e-3).fit(x, y)

    grid = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    best = max(grid, key=lambda c: fit(c, train[:cut], labels[:cut]).score(train[cut:], labels[cut:]))
    accuracy = float(fit(best, train, labels).score(test, answers))
    return accuracy, 1.96 * math.sqrt(accuracy * (1 - accuracy) / len(test))


def transfer(base: str, trained: nn.Module, folder: Path, rows: tuple[int, int]) -> list[tuple[str, str]]:
    """Rows (features, accuracy) of one data set: raw pixels, the untrained architecture, the trained base."""
    (train_x, train_y), (test_x, test_y) = (
        read_images(folder / f"{name}.parquet", count) for name, count in zip(("train", "test"), rows, strict=True)
    )

    def shown(name: str, train: np.ndarray, test: np.ndarray) -> tuple[str, str]:
        accuracy, half = linear_probe(train, train_y, test, test_y)
        print(f"{folder.name} {name}: {accuracy:.4f} +- {half:.4f}", flush=True)
        return name, f"{100 * accuracy:.1f} ± {100 * half:.1f}"

    flat = [x.reshape(len(x), -1).astype(np.float32) / 255 for x in (train_x, test_x)]
    table = [shown("raw pixels", flat[0], flat[1])]
    for state in ("mean", "first") if base == "tiny-vit" else ("mean",):
        where = {"mean": "mean over places", "first": "first token"}[state]
        for seed in (1, 2, 3):
            untrained = new_backbone(base, seed)
            pair = [features(untrained, x, state) for x in (train_x, test_x)]
            table.append(shown(f"untrained, seed {seed}, {where}", pair[0], pair[1]))
        pair = [features(trained, x, state) for x in (train_x, test_x)]
        table.append(shown(f"**trained, {where}**", pair[0], pair[1]))
    return table


CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-feature-extraction
---
# {base}: an image base for tests, claims and demonstrations

{what}
{parameters:,} parameters, {size:,} bytes. Trained from scratch on generated images (`brickyard/embedded/images.py`) and
the training rows of scikit-learn's 8 x 8 handwritten digits (`embedded:digits`; its validation and test rows were not
shown). It is small and has seen no photograph: use it to try and compare methods, not to solve vision tasks.

sha256 of model.safetensors: `{sha256}`

## Input
`preprocessor_config.json` (PIL only, no torchvision): RGB, {side} x {side} by bilinear resizing, values from -1 to 1.

## Training
Linear heads on {states} classify eight factors of every image at once; the heads are not shipped.
Command: `{command}`
Settings: `{settings}`
Seen: {seen:,} images in {steps:,} steps, {cpu:,.0f} CPU seconds on one thread of {hardware}.

Accuracy of the heads on generated images of another seed (per cent): {factors}.

## Transfer (measured)
Logistic regression on frozen features, first {train_rows:,} training and first {test_rows:,} test rows, accuracy in per
cent with half the 95 % interval; the penalty is chosen on a fifth of the training rows for every line alike. None of
these rows was trained on.

{tables}
Made with torch {torch}, numpy {numpy}.
"""
WHAT = {
    "tiny-vit": "A pre-norm vision transformer (`ViTModel`: 6 layers, width 160, 4 heads, 8 x 8 patches of 4 pixels).",
    "tiny-conv": "A residual network with batch normalisation (`ResNetModel`: 4 stages of 2 basic blocks, widths\n"
    "16, 32, 64 and 192, last map 4 x 4).",
}
STATES = {
    "tiny-vit": "the first token, the pooler's output and the mean of the patch tokens",
    "tiny-conv": "the mean of the last map",
}


def training_digits() -> images.Digits:
    """The training rows of `embedded:digits` as strokes [M, h, w] in [0, 1] and labels [M]."""
    rows = digits.splits()["train"]
    pictures = []
    for content in rows["image"]:
        with Image.open(io.BytesIO(content)) as picture:
            pictures.append(np.asarray(picture.convert("L"), dtype=np.float32) / 255)
    return np.stack(pictures), np.array(rows["label"], dtype=np.int64)


def processor_name() -> str:
    """The processor's model name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, choices=sorted(INPUT_SIDE))
    parser.add_argument("--work", required=True, type=Path, help="folder of the checkpoint")
    parser.add_argument("--out", required=True, type=Path, help="folder of the finished base")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--probe", type=Path, nargs="*", default=[], help="folders with train.parquet and test.parquet")
    parser.add_argument("--probe-rows", type=int, nargs=2, default=(5000, 2000), metavar=("TRAIN", "TEST"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings(base=given.base, steps=given.steps, batch=given.batch, lr=given.lr, seed=given.seed)
    strokes = training_digits()
    model, cpu_seconds = train(settings, given.work, strokes)
    factors = factor_accuracy(model, settings, strokes)
    print(factors, flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    sha256 = write_folder(model.backbone, given.base, given.out)
    backbone = AutoModel.from_pretrained(given.out, local_files_only=True)
    tables = []
    for folder in given.probe:
        rows = transfer(given.base, backbone, folder, tuple(given.probe_rows))
        body = "".join(f"| {name} | {score} |\n" for name, score in rows)
        tables.append(f"| {folder.name} | accuracy |\n|---|---|\n{body}")
    card = CARD.format(
        base=given.base,
        what=WHAT[given.base],
        parameters=sum(p.numel() for p in backbone.parameters()),
        sha256=sha256,
        size=(given.out / "model.safetensors").stat().st_size,
        side=INPUT_SIDE[given.base],
        states=STATES[given.base],
        command=f"python scripts/train_image_bases.py --base {given.base} --steps {given.steps} --batch {given.batch} "
        f"--lr {given.lr} --seed {given.seed} --work RUN --out OUT --probe MNIST CIFAR10",
        settings=json.dumps(asdict(settings)),
        seen=settings.steps * settings.batch,
        steps=settings.steps,
        cpu=cpu_seconds,
        hardware=processor_name(),
        torch=torch.__version__,
        numpy=np.__version__,
        factors=", ".join(f"{name} {100 * score:.1f}" for name, score in factors.items()),
        train_rows=given.probe_rows[0],
        test_rows=given.probe_rows[1],
        tables="\n".join(tables) or "Not measured.\n",
    )
    (given.out / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
