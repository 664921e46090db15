"""semi-bn: unlabelled rows move the statistics and the encoder's gradient, and nothing behind the encoder sees them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import resnet
from PIL import Image
from torch import nn

import brickyard
from brickyard.checks._signals import CLASSES, LEADS, SAMPLES, SignalNet, Signals, recordings
from brickyard.checks.semi_bn import TASK, estimate, memory, unlabelled
from brickyard.core.attached import attach_in_place
from brickyard.core.errors import BadData, Refused, UsageError
from brickyard.core.loop import Training, train
from brickyard.data import semi_bn
from brickyard.data.semi_bn import Config, SplitAfter, splitting_module, weakly


def net() -> SignalNet:
    torch.manual_seed(0)
    made = SignalNet(width=16)
    made.transformer.dropout.p = made.transformer.dropout1.p = made.transformer.dropout2.p = 0.0
    made.transformer.self_attn.dropout = 0.0
    return made.train()


def rows(count: int, seed: int = 1) -> Signals:
    return Signals(*recordings(count, 1, seed))


def gradients(model: nn.Module, few: Signals, more: torch.Tensor | None) -> dict[str, torch.Tensor]:
    batch = few.collate(np.arange(len(few)))
    if more is None:
        loss = TASK.loss(model(pixel_values=batch["pixel_values"]).logits, batch["labels"])
    else:
        with SplitAfter(model, "encoder", lambda n: {"pixel_values": more}):
            loss = TASK.loss(model(pixel_values=batch["pixel_values"]).logits, batch["labels"])
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_what_stands_behind_the_encoder_sees_labelled_rows_only() -> None:
    few, more = rows(6), rows(10, 2).x.requires_grad_()
    model, plain = net(), net()
    seen: list[int] = []
    model.transformer.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    joined = gradients(model, few, more)
    assert seen == [6]
    # The reference is written out: encode both, keep the labelled half, judge it.
    batch = few.collate(np.arange(6))
    h = plain.encoder(torch.cat([batch["pixel_values"], more.detach()]))[:6]
    logits = plain.head(plain.transformer(h.transpose(1, 2)).mean(dim=1))
    TASK.loss(logits, batch["labels"]).backward()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(joined[name], p.grad, rtol=1e-4, atol=1e-6)
    for a, b in zip(semi_bn.norms(model).values(), semi_bn.norms(plain).values(), strict=True):
        torch.testing.assert_close(a.running_mean, b.running_mean)
        torch.testing.assert_close(a.running_var, b.running_var)
    assert more.grad is not None and more.grad.abs().max() > 0  # through the batch statistics, which are not detached


def test_unlabelled_rows_move_statistics_and_the_encoders_gradient() -> None:
    few = rows(6)
    model, plain = net(), net()
    joined, alone = gradients(model, few, rows(10, 2).x), gradients(plain, few, None)
    assert not torch.allclose(joined["encoder.0.first.weight"], alone["encoder.0.first.weight"], rtol=1e-3)
    a, b = (m.encoder[0].norm1.running_mean for m in (model, plain))
    assert not torch.allclose(a, b, rtol=1e-3)


def test_outside_training_and_afterwards_the_model_is_what_it_was() -> None:
    model, x = net(), rows(4).x
    wanted = model.eval()(pixel_values=x).logits
    with SplitAfter(model, "encoder", lambda n: {"pixel_values": rows(5, 2).x}):
        assert torch.equal(model(pixel_values=x).logits, wanted)
        assert len(model.train()(pixel_values=x).logits) == 4
    assert len(model.encoder(x)) == 4 and not model.encoder._forward_hooks and not model._forward_pre_hooks


@pytest.mark.parametrize("name", list(semi_bn.AUGMENTATIONS))
def test_each_augmentation_does_what_it_says(name: str) -> None:
    x = rows(5).x
    out = weakly(x, (name,), torch.Generator().manual_seed(0))
    assert out.shape == x.shape and not torch.equal(out, x)
    if name == "flip":
        assert torch.equal(out, x.flip(-1))
    elif name == "channels":
        assert torch.equal(out.sort(dim=1).values, x.sort(dim=1).values)
    elif name == "burst":
        gone = out == 0
        assert gone.sum(-1).eq(SAMPLES // 10).all() and torch.equal(out[~gone], x[~gone])
    else:
        assert (out - x).std() == pytest.approx(0.05, rel=0.05)
    image = torch.randn(3, 2, 8, 10)
    assert weakly(image, (name,), torch.Generator().manual_seed(0)).shape == image.shape
    assert weakly(x, (), torch.Generator()) is x


def trained(folder: Path | None, steps: int, pool: Signals) -> dict[str, torch.Tensor]:
    model = net()
    attached = attach_in_place(model, [n for n, _ in model.named_parameters()], matched={})
    training = Training(lr=1e-3, steps=6, batch=4, checkpoint_every=3, evaluate_every=10**9)
    callbacks: list[Any] = [unlabelled(model, pool, 0)]
    if steps < 6:
        callbacks.append(Killed(steps))
    train(attached, rows(8), None, TASK, training, folder=folder, callbacks=callbacks, device="cpu")
    return attached.tensors()


class Killed:
    def __init__(self, at: int) -> None:
        self.at = at

    def before_step(self, state: Any) -> None:
        if state.step == self.at:
            raise KeyboardInterrupt


def test_labels_of_unlabelled_rows_change_nothing_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    pool = rows(12, 3)
    whole = trained(tmp_path / "whole", 6, pool)
    hidden = Signals(pool.x.numpy(), (pool.labels.numpy() + 1) % CLASSES)
    for name, tensor in trained(None, 6, hidden).items():
        assert torch.equal(tensor, whole[name]), name
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", 4, pool)
    model = net()
    attached = attach_in_place(model, [n for n, _ in model.named_parameters()], matched={})
    training = Training(lr=1e-3, steps=6, batch=4, checkpoint_every=3, evaluate_every=10**9)
    callbacks: list[Any] = [unlabelled(model, pool, 0), Killed(99)]
    train(attached, rows(8), None, TASK, training, folder=tmp_path / "cut", callbacks=callbacks, device="cpu")
    for name, tensor in attached.tensors().items():
        assert torch.equal(tensor, whole[name]), name


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def images() -> dict[str, Any]:
    def split(count: int, seed: int) -> dict[str, list]:
        rng = np.random.default_rng(seed)
        labels = rng.integers(2, size=count)
        pixels = rng.integers(0, 120, (count, 16, 16, 3))
        pixels[:, 8:] += 100 * labels[:, None, None, None]
        return {"image": [png(p.astype(np.uint8)) for p in pixels], "label": labels.tolist()}

    return {"train": split(60, 0), "validation": split(20, 1), "test": split(30, 2)}


def test_a_run_uses_the_rows_that_it_has_no_labels_for(tmp_path: Path) -> None:
    given: dict[str, Any] = {"base": resnet(tmp_path / "base"), "data": images(), "device": "cpu", "train_rows": 20}
    training = {"batch": 8, "epochs": 4, "lr": 1e-2}
    brick, result = brickyard.tune("full + semi-bn:ratio=2", training=training, out=tmp_path / "a", **given)
    assert result["score"]["mean"] > 0.5
    other, _ = brickyard.tune("full", training=training, out=tmp_path / "b", **given)
    mean = "resnet.embedder.embedder.normalization.running_mean"
    tensors = [made.tensors()[mean] for made in (brick, other)]
    assert not torch.allclose(*tensors)
    arrays = {"image": [np.zeros((16, 16, 3), np.uint8)] * 4, "label": [0, 1, 0, 1]}
    with pytest.raises(BadData, match="expected the bytes of an image file"):
        brickyard.tune("full", training=training, **(given | {"data": {"train": arrays, "test": arrays}}))
    with pytest.raises(UsageError, match="no unlabelled rows"):
        brickyard.tune("full + semi-bn", training=training, **(given | {"train_rows": 0}))
    for arm in ("linear-probe + semi-bn", "lora:target=[convolution] + semi-bn"):
        with pytest.raises((Refused, UsageError)):
            brickyard.tune(arm, training=training, **given)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(Refused, match="no batch norm"):
        splitting_module(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), "")
    frozen = net()
    frozen.requires_grad_(False)
    with pytest.raises(Refused, match="frozen"):
        splitting_module(frozen, "")
    assert splitting_module(net(), "") == "encoder"
    with pytest.raises(UsageError, match="names no module"):
        splitting_module(net(), "backbone")
    with pytest.raises(UsageError, match="stands outside"):
        splitting_module(net(), "encoder.0")
    for options in ({"ratio": 0.0}, {"augment": ("mixup",)}):
        with pytest.raises(UsageError):
            Config(**options)  # type: ignore[arg-type]
    with (
        pytest.raises(UsageError, match="need the same inputs"),
        SplitAfter(net(), "encoder", lambda n: {"pixel_values": torch.zeros(2, LEADS + 1, SAMPLES)}) as split,
    ):
        split.model(pixel_values=rows(2).x)


def test_recordings_are_what_the_generator_says() -> None:
    x, labels = recordings(400, 0, 5)
    assert x.shape == (400, LEADS, SAMPLES) and set(labels) == set(range(CLASSES)) and np.isfinite(x).all()
    again, _ = recordings(400, 0, 5)
    assert np.array_equal(x, again)
    shifted, _ = recordings(400, 1, 5)
    assert shifted.std() > 1.3 * x.std() and abs(np.corrcoef(x[0, 0], shifted[0, 0])[0, 1]) < 0.9


def test_memory_is_counted_between_one_and_two_steps() -> None:
    found = memory(batch=8)
    assert 1 < found["measured"] < found["control"]["measured"] < 2  # the weights are there once
    counted = found["figures"]["bytes"]
    assert counted["pseudo"]["saved for backward"] == pytest.approx(
        2 * counted["labels"]["saved for backward"], rel=0.05
    )


def test_statistics_are_estimated_anew() -> None:
    model, pool = net(), rows(128, 4)
    before = model.encoder[0].norm1.running_mean.clone()
    estimate(model, pool)
    y = model.encoder[0].first(pool.x)
    torch.testing.assert_close(model.encoder[0].norm1.running_mean, y.mean(dim=(0, 2)), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(before, model.encoder[0].norm1.running_mean)
