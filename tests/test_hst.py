"""HST: tokens that enter and leave every block, a pyramid of scales, the norms that train, and the detached variant."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Here, image_data, write_data
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import ViTConfig, ViTModel

import brickyard
from brickyard.checks import _masks, _place
from brickyard.checks import hst as check
from brickyard.checks.hst import textured
from brickyard.core.arm import parse
from brickyard.core.attached import Attached
from brickyard.core.base import open_base
from brickyard.core.build import build, resolve
from brickyard.core.errors import BadData, Refused, UsageError
from brickyard.core.loop import train_mode
from brickyard.core.prefix import ENTERING
from brickyard.core.roles import blocks
from brickyard.core.side import SIDE, backbone_of
from brickyard.core.task import Task
from brickyard.embedded.digits import splits as embedded_digits
from brickyard.tune import hst

TASK = Task("image-classification", "accuracy", ("a", "b", "c"), 3, "image")
SMALL = "widths=[8,12],heads=[2,3]"


def made(options: str, folder: Path) -> Attached:
    return build(resolve(parse(f"hst:{SMALL}{options}"), TASK), open_base(str(folder)), TASK, seed=0)


def pixels(folder: Path, rows: int = 4) -> Tensor:
    size = int(open_base(str(folder)).config.image_size)
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_tokens_enter_and_leave_every_block_and_get_gradients(image_base: Path) -> None:
    attached = made(",tokens=2", image_base)
    model: Any = attached.model
    side, lengths = model.get_submodule(SIDE), []

    def enters(module: Any, args: Any, kwargs: Any) -> None:
        lengths.append((args or (kwargs["hidden_states"],))[0].shape[1])

    for _, block in blocks(backbone_of(model)):
        block.register_forward_pre_hook(enters, with_kwargs=True)
    train_mode(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(pixel_values=pixels(image_base)).logits.square().sum().backward()
    patches = side.grid[0] * side.grid[1]
    assert lengths == [patches + 1 + 2] * len(lengths) and len(lengths) == len(side.tokens)
    assert all(bool(side.tokens.grad[i].any()) for i in range(len(lengths)))
    torch.optim.AdamW(attached.parameters(), lr=1e-2).step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    inside = {n for n in changed if n.startswith("backbone.")}
    assert inside and all("norm" in n.lower() for n in inside)  # attention and MLPs stay, norms move
    assert any(n.startswith("side.") for n in changed) and any(n.startswith("head.") for n in changed)


def test_scales_halve_from_stage_to_stage(image_base: Path) -> None:
    x = pixels(image_base)
    for stem in (1, 2, 4):
        model: Any = made(f",stem={stem},detach=true", image_base).model
        reader, side = made(f",stem={stem},detach=true", image_base).prefix, model.get_submodule(SIDE)
        states = list(reader(pixel_values=x).last_hidden_state.chunk(len(reader.layers), -1))  # type: ignore[misc, union-attr]
        sizes = [tuple(f.shape[-2:]) for f in side.features(states, x)]
        assert sizes[0] == (x.shape[-1] // stem,) * 2 and sizes[1] == (-(-sizes[0][0] // 2),) * 2


def test_maps_for_dense_tasks_have_all_scales_and_reach_what_trains(image_base: Path) -> None:
    x = pixels(image_base)
    for options in (",stem=1", ",stem=1,detach=true"):
        attached = made(options, image_base)
        train_mode(attached.model)
        found = hst.maps(attached.model, x)
        side = x.shape[-1]
        assert [tuple(f.shape) for f in found] == [(4, 8, side, side), (4, 12, side // 2, side // 2)]
        torch.stack([f.square().sum() for f in found]).sum().backward()
        still = {n for n, p in attached.model.named_parameters() if p.requires_grad and p.grad is None}
        # Nothing reads the head here, and without tokens nothing reads their norms.
        assert all(n.startswith("head.") or (".norm_token." in n and "detach" in options) for n in still), still
        assert all(not stage._forward_hooks for stage in attached.model.get_submodule(SIDE).stages)  # type: ignore[union-attr]


def test_maps_are_resized_after_the_bridge_as_well_as_before() -> None:
    torch.manual_seed(0)
    stage = hst.Stage(torch.nn.Identity(), 6, 4, 2, 1)
    features, grid = torch.randn(2, 9, 6), (3, 3)

    def resize(x: Tensor) -> Tensor:
        maps = x.transpose(1, 2).unflatten(-1, grid)
        return interpolate(maps, size=(5, 5), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)

    torch.testing.assert_close(resize(stage.bridge(features)), stage.bridge(resize(features)), rtol=1e-5, atol=1e-6)


def test_attention_to_two_keys_is_a_sigmoid_of_their_difference() -> None:
    torch.manual_seed(0)
    block = hst.SideBlock(4, 1)
    u, kv = torch.randn(1, 3, 4), torch.randn(1, 2, 4)
    q, (k, v) = block.query(u), block.key_value(kv).unflatten(-1, (2, 4)).unbind(2)
    weight = torch.sigmoid((q @ (k[:, 0] - k[:, 1])[0]) / 2)[..., None]
    wanted = block.out(weight * v[:, :1] + (1 - weight) * v[:, 1:])
    torch.testing.assert_close(block._attend(u, kv), wanted, rtol=1e-5, atol=1e-6)


def test_without_the_ladder_the_vit_is_not_read(image_base: Path) -> None:
    x = pixels(image_base)
    for ladder in (True, False):
        attached = made(f",detach=true,ladder={str(ladder).lower()}", image_base)
        reader: Any = attached.prefix
        attached.model.eval()
        with torch.no_grad():
            states = reader(pixel_values=x).last_hidden_state
            a, b = (attached.model(pixel_values=x, **{ENTERING: s}).logits for s in (states, states.flip(0)))
        assert torch.allclose(a, b) != ladder


def test_detached_nothing_flows_back_and_states_are_kept(image_base: Path, tmp_path: Path) -> None:
    attached = made(",detach=true", image_base)
    train_mode(attached.model)
    attached.model(pixel_values=pixels(image_base)).logits.sum().backward()
    assert not any(p.grad is not None for p in backbone_of(attached.model).parameters())
    data = {"train": textured(60, 1), "validation": textured(20, 2), "test": textured(30, 3)}
    for options, kept in ((",detach=true", True), ("", False)):
        training = {"epochs": 2, "batch": 8}
        brick, result = brickyard.tune(
            f"hst:{SMALL}{options}",
            base=str(image_base),
            data=data,
            training=training,
            device="cpu",
            out=tmp_path / str(kept),
        )
        assert ("states_bytes" in result["cost"]) == kept
        again = brickyard.evaluate(brick=brick.folder, data=data, device="cpu")
        assert again["score"]["mean"] == pytest.approx(result["score"]["mean"], abs=1e-6 if not kept else 0.05)
        assert any(name.endswith("running_mean") for name in brick.tensors())


def test_a_last_batch_of_one_row_trains(image_base: Path, tmp_path: Path) -> None:
    data = {"train": textured(33, 1), "validation": textured(20, 2), "test": textured(10, 3)}
    _, result = brickyard.tune(
        f"hst:{SMALL},detach=true",
        base=str(image_base),
        data=data,
        training={"epochs": 2, "batch": 8},
        device="cpu",
        out=tmp_path / "run",
    )
    assert [point["step"] for point in result["history"]] == [5, 10]


def test_a_token_begins_alike_in_shallow_and_deep_networks() -> None:
    for count in (2, 32):
        config = ViTConfig(
            hidden_size=64, intermediate_size=64, num_hidden_layers=count, num_attention_heads=2, image_size=16,
            patch_size=4,
        )  # fmt: skip
        torch.manual_seed(0)
        side = hst.Pyramid(ViTModel(config), hst.Config(widths=(8, 12), heads=(2, 3), tokens=3))
        assert side.tokens is not None
        bound = (6 / (3 * 64 + 64)) ** 0.5  # of Xavier for each e_l [1, 3, 64]: fan in 3 * 64, fan out 64
        largest = side.tokens.detach().abs().amax((1, 2))
        assert (largest <= bound).all() and (largest > 0.9 * bound).all()


def test_detach_gives_the_model_back(image_base: Path) -> None:
    base = open_base(str(image_base))
    x = pixels(image_base)
    wanted = base.backbone().eval()(pixel_values=x).last_hidden_state
    for options in ("", ",detach=true"):
        attached = made(options, image_base)
        assert attached.model.states(pixel_values=x)[0].shape[-1] == 12  # type: ignore[operator]
        model: Any = attached.detach()
        torch.testing.assert_close(model.eval().states(pixel_values=x)[0], wanted)
        assert type(model.head).__name__ == "Probe" and not hasattr(model, SIDE)


def test_what_does_not_fit_is_refused(image_base: Path, text_base: Path) -> None:
    with pytest.raises(UsageError, match="evenly"):
        build(
            resolve(parse("hst:widths=[8,8,8,8,8],heads=[1,1,1,1,1]"), TASK), open_base(str(image_base)), TASK, seed=0
        )
    for options in ({"widths": (8,), "heads": (3,)}, {"widths": (), "heads": ()}, {"stem": 3}, {"tokens": 0}):
        with pytest.raises(UsageError):
            hst.Config(**options)  # type: ignore[arg-type]
    with pytest.raises(Refused, match="own head"):
        build(resolve(parse(f"hst:{SMALL} + moment-probing:p=28"), TASK), open_base(str(image_base)), TASK, seed=0)
    with pytest.raises(Refused, match="grids of patches"):
        resolve(parse("hst"), Task("text-classification", "accuracy", ("a", "b"), 2, "text"))
    assert open_base(str(text_base)).input == "text"


def test_the_check_measures_every_part_on_the_first_rows_of_images_or_of_textures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_place, "Local", Here)
    sizes = {"train": 60, "validation": 30, "test": 60}
    drawn = {split: check.textured(count, seed) for seed, (split, count) in enumerate(sizes.items())}
    name = str(write_data(tmp_path / "images", drawn))
    for source in (name, check.TEXTURES):
        rows = check.images_of(source, 40, 50)
        assert [(len(rows[split]["image"]), len(rows[split]["label"])) for split in ("train", "test")] == [
            (40, 40),
            (50, 50),
        ]
        assert len(set(rows["train"]["label"])) > 1
    claim = replace(hst.RECORD.claims[0], data=name, seeds=2)
    found = check.beside_the_pyramid(claim, rows=40, test_rows=50, epochs=1)
    assert set(found) == {"ladder", "norms", "lora"}
    for part in found.values():
        assert set(part["figures"]["means"]) == {*check.ARMS, "shuffled", "norms", "majority"}
        assert set(part["arms"]) == set(check.ARMS) and part["inequality"].startswith("hst >= ")
        assert part["holds"] in (True, False, "undecided", "set-up invalid")


def test_noisy_digits_know_which_pixels_are_drawn() -> None:
    files = embedded_digits()["train"]["image"][:20]
    seen, masks = _masks.noisy(files, 1)
    assert seen.shape == (20, 3, 32, 32) and masks.shape == (20, 32, 32)
    assert bool((seen.abs() <= 1).all()) and not torch.equal(seen, _masks.noisy(files, 2)[0])
    drawn, around = seen[:, 0][masks].mean(), seen[:, 0][~masks].mean()
    assert drawn > around + 0.5 and 0.05 < float(masks.float().mean()) < 0.5
    assert torch.equal(masks, _masks.noisy(files, 2)[1])


def test_overlap_is_the_intersection_over_the_union_of_each_image() -> None:
    mask = torch.tensor([[[1, 1], [0, 0]], [[1, 1], [0, 0]], [[0, 0], [0, 0]]]).bool()
    found = torch.tensor([[[1, 0], [1, 0]], [[1, 1], [0, 0]], [[0, 0], [0, 0]]]).bool()
    assert _masks.overlap(found, mask).tolist() == pytest.approx([1 / 3, 1.0, 1.0])


def test_a_linear_decoder_puts_every_patch_in_its_place() -> None:
    states = torch.arange(4.0)[None, :, None]  # one image of 2 x 2 patches
    layer = torch.nn.Linear(1, _masks.SIZE**2 // 4)
    with torch.no_grad():
        layer.weight.fill_(1.0), layer.bias.zero_()
    found, half = _masks.decoded_patches(states, layer)[0], _masks.SIZE // 2
    for patch, (row, column) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        block = found[row * half : (row + 1) * half, column * half : (column + 1) * half]
        assert bool((block == patch).all())


def test_the_dense_check_tells_a_decoder_that_learned_from_one_that_could_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_place, "Local", Here)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_masks, "ARMS", {"hst": "hst:stem=2,lr=3e-3", "pyramid": "hst:stem=2,ladder=false"})
    claim = replace(hst.RECORD.claims[3], data="embedded:digits", seeds=2)
    found = _masks.digit_masks(claim, rows=96, test_rows=500, epochs=2)  # more than there are
    means = found["figures"]["means"]
    assert set(means) == {"hst", "pyramid", "decoder", "shuffled", "guess"}
    assert means["hst"] > means["shuffled"] and means["decoder"] > means["guess"]
    assert found["inequality"] == "hst > decoder" and found["control"]["destroyed"] in (True, False)
    assert found["holds"] in (True, False, "undecided", "set-up invalid")


def test_classes_are_dealt_out_in_two_halves_without_a_common_one() -> None:
    splits = {"train": {"image": list("abcdef"), "label": [3, 1, 2, 0, 1, 4]}, "test": {"image": ["g"], "label": [2]}}
    first, second = (check._with_classes(splits, part) for part in (0, 1))
    assert first["train"] == {"image": list("cdf"), "label": [2, 0, 4]} and first["test"]["label"] == [2]
    assert second["train"] == {"image": list("abe"), "label": [3, 1, 1]} and second["test"] == {
        "image": [],
        "label": [],
    }


def test_the_check_on_other_classes_begins_with_the_base_that_learned_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_place, "Local", Here)
    monkeypatch.chdir(tmp_path)
    opened: list[Path] = []

    def spied(claim: Any, base: str, *rest: Any) -> Any:
        opened.append(Path(base))
        assert not torch.equal(*(next(open_base(b).backbone().parameters()) for b in (base, claim.base)))
        assert sorted(set(map(str, rest[0]["train"]["label"]))) == ["1", "3", "5", "7", "9"]
        return made_of(claim, base, *rest)

    made_of = check._Arms.of
    monkeypatch.setattr(check._Arms, "of", spied)
    claim = replace(hst.RECORD.claims[4], data="embedded:digits", seeds=2)
    found = check.to_other_classes(claim, rows=60, test_rows=60, pretraining_epochs=1, epochs=1)
    assert len(opened) == 1 and found["figures"]["pretraining"] > 0.2
    assert [one["inequality"] for one in found["comparisons"]] == found["inequality"].split(" and ")
    assert set(found["figures"]["means"]) == {*check.ON_OTHERS, "shuffled", "majority"}
    assert found["gate"]["inequality"] == "probe > majority + 10.0"


def test_bases_and_data_that_the_image_checks_cannot_use_are_refused(image_base: Path, tmp_path: Path) -> None:
    two = str(write_data(tmp_path / "two", image_data()))
    with pytest.raises(BadData, match="2 classes"):
        check.to_other_classes(replace(hst.RECORD.claims[4], data=two))
    with pytest.raises(Refused, match="reads images of side"):
        _masks.digit_masks(replace(hst.RECORD.claims[3], base=str(image_base), data="embedded:digits"))
