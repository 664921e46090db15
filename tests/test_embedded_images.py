"""The generator of the image bases, their training script, and the two folders that it wrote."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from sklearn.linear_model import RidgeClassifier
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

from brickyard.core.errors import Changed
from brickyard.embedded import digits, images

ROOT = Path(__file__).parents[1]
BASES = {"tiny-vit": ROOT / "brickyard/embedded/tiny_vit", "tiny-conv": ROOT / "brickyard/embedded/tiny_conv"}
PALETTE = np.array(list(images.PALETTE.values()))


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_image_bases", ROOT / "scripts/train_image_bases.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


script = _script()


@pytest.fixture(scope="module")
def strokes() -> images.Digits:
    return script.training_digits()


@pytest.fixture(scope="module")
def clean(strokes: images.Digits) -> images.Images:
    return images.draw(600, seed=5, digits=strokes, augment=False)


def _nearest_colour(rgb: np.ndarray) -> int:
    return int(np.argmin(((PALETTE - rgb) ** 2).sum(axis=1)))


def test_the_same_seed_gives_the_same_images_and_another_seed_others(strokes: images.Digits) -> None:
    one, again, other = (images.draw(40, seed=seed, digits=strokes) for seed in ((3, 9), (3, 9), (3, 10)))
    assert np.array_equal(one.pixels, again.pixels) and np.array_equal(one.masks, again.masks)
    assert all(np.array_equal(one.labels[name], again.labels[name]) for name in images.FACTORS)
    assert not np.array_equal(one.pixels, other.pixels)


def test_labels_masks_and_pixels_have_the_documented_form(clean: images.Images) -> None:
    assert clean.pixels.dtype == np.uint8 and clean.pixels.shape == (600, 32, 32, 3)
    assert clean.masks.shape == (600, 32, 32) and clean.masks.min() >= 0 and clean.masks.max() <= 1
    assert set(clean.labels) == set(images.FACTORS)
    for name, values in images.FACTORS.items():
        seen = set(clean.labels[name].tolist()) - {images.NOT_APPLICABLE}
        assert seen == set(range(len(values))), name
    assert len(clean) == 600


def test_the_ink_is_the_colour_of_the_object_and_the_ground_that_of_the_rest(clean: images.Images) -> None:
    ink, ground = [], []
    for pixels, mask, k, g in zip(
        clean.pixels / 255, clean.masks, clean.labels["ink"], clean.labels["ground"], strict=True
    ):
        if (mask > 0.99).sum() >= 20:
            ink.append(_nearest_colour(pixels[mask > 0.99].mean(axis=0)) == k)
        ground.append(_nearest_colour(pixels[mask == 0].mean(axis=0)) == g)
    assert len(ink) > 500
    assert np.mean(ink) > 0.97 and np.mean(ground) > 0.97


def test_the_quadrant_is_where_the_object_is(clean: images.Images) -> None:
    grid = np.arange(32) + 0.5
    weight = clean.masks.sum(axis=(1, 2))
    x = (clean.masks * grid[None, None, :]).sum(axis=(1, 2)) / weight
    y = (clean.masks * grid[None, :, None]).sum(axis=(1, 2)) / weight
    found = 2 * (y > 16) + (x > 16)
    # Lopsided objects (an arc, a seven) near the middle may have their centre of mass across the border.
    assert (found == clean.labels["quadrant"]).mean() > 0.9
    round_ = np.isin(clean.labels["shape"], [images.SHAPES.index("disc"), images.SHAPES.index("ring")])
    assert (found == clean.labels["quadrant"])[round_].all()


def test_the_size_is_the_objects_radius() -> None:
    drawn = images.draw(900, seed=6, augment=False)
    touches = np.concatenate([drawn.masks[:, [0, -1]], drawn.masks[:, :, [0, -1]].transpose(0, 2, 1)], axis=1)
    whole = (drawn.labels["shape"] == images.SHAPES.index("disc")) & (touches.max(axis=(1, 2)) == 0)
    assert whole.sum() > 30
    radius = np.sqrt(drawn.masks[whole].sum(axis=(1, 2)) / np.pi) / 0.9  # a disc of 0.9 radii, stretched at equal area
    low, high = np.array(images.RADII)[drawn.labels["size"][whole]].T
    assert ((radius > low - 0.2) & (radius < high + 0.2)).all()


def test_a_plain_object_is_even_and_every_texture_is_not(clean: images.Images) -> None:
    spread: dict[str, list[float]] = {name: [] for name in images.TEXTURES}
    for pixels, mask, texture in zip(clean.pixels / 255, clean.masks, clean.labels["texture"], strict=True):
        if texture != images.NOT_APPLICABLE and (mask == 1).sum() >= 30:
            spread[images.TEXTURES[texture]].append(float(pixels[mask == 1].std(axis=0).max()))
    assert max(spread.pop("plain")) < 0.003  # rounding to bytes
    assert all(min(values) > 0.03 for values in spread.values()), {k: min(v) for k, v in spread.items()}


@pytest.mark.parametrize(
    ("shape", "middle"),
    [("disc", 1), ("square", 1), ("rhombus", 1), ("cross", 1), ("star", 1), ("ring", 0), ("frame", 0)],
)
def test_a_shape_is_filled_or_open_in_its_middle(shape: str, middle: int) -> None:
    drawn = images.draw(400, seed=7, augment=False)
    for mask in drawn.masks[drawn.labels["shape"] == images.SHAPES.index(shape)]:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if rows[0] > 0 and rows[-1] < 31 and columns[0] > 0 and columns[-1] < 31:
            assert round(float(mask[(rows[0] + rows[-1]) // 2, (columns[0] + columns[-1]) // 2])) == middle


def test_digits_stand_at_the_end_with_their_labels_and_no_texture() -> None:
    ring = np.zeros((2, 8, 8), np.float32)
    ring[0, 1:7, 3:5] = 1  # an upright stroke
    ring[1, 3:5, 1:7] = 1  # a level one
    drawn = images.draw(100, seed=8, digits=(ring, np.array([1, 7])), digit_share=0.25)
    assert (drawn.labels["digit"][:75] == images.NOT_APPLICABLE).all()
    assert set(drawn.labels["digit"][75:].tolist()) == {1, 7}
    for name in ("shape", "texture"):
        assert (drawn.labels[name][75:] == images.NOT_APPLICABLE).all()
        assert (drawn.labels[name][:75] >= 0).all()
    upright = drawn.masks[75:].any(axis=2).sum(axis=1) > drawn.masks[75:].any(axis=1).sum(axis=1)
    assert np.array_equal(upright, drawn.labels["digit"][75:] == 1)


def test_grey_images_carry_no_colour_label_and_coloured_ones_never_share_ink_and_ground() -> None:
    drawn = images.draw(500, seed=9)
    ink, ground = drawn.labels["ink"], drawn.labels["ground"]
    grey = ink == images.NOT_APPLICABLE
    assert np.array_equal(grey, ground == images.NOT_APPLICABLE)
    assert 20 < grey.sum() < 90
    assert (ink != ground)[~grey].all()
    tint = np.ptp(drawn.pixels.astype(float).mean(axis=(1, 2)), axis=1)
    assert tint[grey].max() < 1.5  # of 255: noise only
    assert np.median(tint[~grey]) > 20


@pytest.mark.parametrize(
    "wrong", [{"digit_share": 1.5}, {"digits": (np.zeros((3, 8, 8), np.float32), np.zeros(2, int))}]
)
def test_bad_arguments_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="expected"):
        images.draw(4, seed=0, **wrong)


@pytest.mark.parametrize("base", BASES)
def test_steps_on_one_batch_lower_its_loss(base: str, strokes: images.Digits) -> None:
    settings = script.Settings(base=base, steps=6, batch=8)
    model = script.new_training(base, 0).train()
    optimizer = script.new_optimizer(model, settings)
    batch = script.batch_at(0, settings, strokes)
    losses = []
    for _ in range(6):
        loss = model.loss(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("base", BASES)
def test_a_stopped_run_that_goes_on_ends_with_the_same_bits(base: str, strokes: images.Digits, tmp_path: Path) -> None:
    settings = script.Settings(base=base, steps=3, batch=4)
    script.train(settings, tmp_path / "whole", strokes)
    script.train(settings, tmp_path / "parts", strokes, stop_at=1)
    script.train(settings, tmp_path / "parts", strokes)
    with (
        safe_open(tmp_path / "whole" / script.CHECKPOINT, "pt") as whole,
        safe_open(tmp_path / "parts" / script.CHECKPOINT, "pt") as parts,
    ):
        assert whole.metadata()["step"] == parts.metadata()["step"] == "3"
        assert sorted(whole.keys()) == sorted(parts.keys())
        assert all(torch.equal(whole.get_tensor(name), parts.get_tensor(name)) for name in whole.keys())  # noqa: SIM118
        assert any(name.startswith("adam.") for name in whole.keys())  # noqa: SIM118
    with pytest.raises(Changed, match="same settings"):
        script.train(script.Settings(base=base, steps=3, batch=4, lr=5e-4), tmp_path / "whole", strokes)


def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero() -> None:
    settings = script.Settings(base="tiny-vit", steps=100, lr=0.5)
    rates = [script.learning_rate(step, settings) for step in range(100)]
    assert max(rates) == 0.5 and rates.index(0.5) in (4, 5) and rates[0] == pytest.approx(0.1) and rates[-1] < 0.001


@pytest.mark.parametrize("base", BASES)
def test_a_shipped_folder_is_complete_small_and_the_one_its_card_describes(base: str) -> None:
    folder = BASES[base]
    names = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    assert {file.name for file in folder.iterdir()} == names
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8_000_000
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() in card
    settings = json.loads(card.split("Settings: `")[1].split("`")[0])
    assert script.Settings(**settings).base == base
    assert f"{settings['steps'] * settings['batch']:,} images in {settings['steps']:,} steps" in card


@pytest.mark.parametrize("base", BASES)
def test_a_shipped_base_loads_whole_and_offline(base: str) -> None:
    model, info = AutoModel.from_pretrained(BASES[base], local_files_only=True, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert 1_000_000 <= sum(p.numel() for p in model.parameters()) <= 2_000_000
    assert all(torch.isfinite(p).all() for p in model.parameters())
    classifier = AutoModelForImageClassification.from_pretrained(BASES[base], num_labels=4, local_files_only=True)
    inner = dict(getattr(classifier, classifier.base_model_prefix).named_parameters())
    assert all(torch.equal(value, inner[name]) for name, value in model.named_parameters() if name in inner)
    assert set(dict(model.named_parameters())) - set(inner) <= {"pooler.dense.weight", "pooler.dense.bias"}


@pytest.mark.parametrize(("base", "shape"), [("tiny-vit", (2, 65, 160)), ("tiny-conv", (2, 192, 4, 4))])
@pytest.mark.parametrize(("mode", "side", "kind"), [("L", 28, "PNG"), ("RGB", 32, "JPEG")])
def test_the_processor_takes_grey_and_coloured_files(base: str, shape: tuple, mode: str, side: int, kind: str) -> None:
    bands = len(Image.new(mode, (1, 1)).getbands())
    noise = np.random.default_rng(0).integers(0, 256, (2, side, side, bands), dtype=np.uint8)
    pictures = []
    for pixels in noise:
        file = io.BytesIO()
        Image.fromarray(pixels[..., 0] if mode == "L" else pixels).save(file, kind)
        pictures.append(Image.open(file))
    processor = AutoImageProcessor.from_pretrained(BASES[base], local_files_only=True)
    values = processor(images=pictures, return_tensors="pt")["pixel_values"]
    assert values.shape == (2, 3, *[script.INPUT_SIDE[base]] * 2) and values.abs().max() <= 1
    model = AutoModel.from_pretrained(BASES[base], local_files_only=True)
    with torch.no_grad():
        assert model(pixel_values=values).last_hidden_state.shape == shape
    if side == 32:
        bytes_NHWC = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
        assert (script.model_input(model, bytes_NHWC) - values).abs().max() < 1.1 * 2 / 255  # a byte of rounding


@pytest.mark.parametrize("base", BASES)
def test_trained_features_separate_unseen_digits_better_than_untrained_ones(base: str) -> None:
    rows = digits.splits()
    pictures = {}
    for split in ("train", "test"):
        decoded = [Image.open(io.BytesIO(content)).convert("RGB") for content in rows[split]["image"][:300]]
        resized = [np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR)) for picture in decoded]
        pictures[split] = np.stack(resized), np.array(rows[split]["label"][:300])

    def score(backbone: torch.nn.Module) -> float:
        train, test = (script.features(backbone, pictures[split][0], "mean") for split in ("train", "test"))
        mean, scale = train.mean(axis=0), train.std(axis=0) + 1e-6
        probe = RidgeClassifier(alpha=10.0).fit((train - mean) / scale, pictures["train"][1])
        return float(probe.score((test - mean) / scale, pictures["test"][1]))

    trained = score(AutoModel.from_pretrained(BASES[base], local_files_only=True))
    untrained = score(script.new_backbone(base, 1))
    assert trained > untrained + 0.04
    assert trained > 0.9
