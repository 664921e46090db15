"""Sweeping the strength of a brick's change: what has one, and what has none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from brickyard.core.arm import parse
from brickyard.core.base import open_base
from brickyard.core.build import build, resolve
from brickyard.core.errors import Refused
from brickyard.core.scale import scaled
from brickyard.core.task import Task

TOPICS = Task("text-classification", "accuracy", ("a", "b", "c"), 3, "text")
IMAGES = Task("image-classification", "accuracy", ("a", "b"), 2, "image")
CLOUDS = Task("point-classification", "accuracy", ("ball", "table"), 2, "points")
P2P = "p2p:neighbours=4,dims=4,width=8,views=[2,2]"


@pytest.mark.parametrize("arm", ["bitfit", "full", "bitfit + moment-probing:p=28", "lora:r=2"])
def test_strength_0_is_the_base_and_1_the_brick(arm: str, text_base: Path) -> None:
    base = open_base(str(text_base))
    attached = build(resolve(parse(arm), TOPICS), base, TOPICS, seed=0)
    model = attached.model.eval()
    given = {"input_ids": torch.tensor([[4, 9, 14, 2]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    names = {id(p): n for n, p in model.named_parameters()}
    body = [p for p in attached.parameters() if not any(part in names[id(p)] for part in ("head.", "classifier"))]
    with torch.no_grad():
        brick = SimpleNamespace(tensors=attached.tensors, task=TOPICS)
        untouched = model(**given).logits
        for p in body:
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        changed = model(**given).logits
        found = []
        for s in (0.0, 0.5, 1.0):
            with scaled(model, base, brick, s):
                found.append(model(**given).logits)
        torch.testing.assert_close(found[0], untouched)
        torch.testing.assert_close(found[2], changed)
        assert not torch.allclose(found[1], found[0]) and not torch.allclose(found[1], found[2])
        torch.testing.assert_close(model(**given).logits, changed)


@pytest.mark.parametrize(
    ("arm", "task"),
    [
        ("lst:r=4,init=random", TOPICS),
        ("unipt:width=8", TOPICS),
        ("iapt:bottleneck=8", TOPICS),
        ("idpt:k=3", TOPICS),
        ("hst:widths=[8,12],heads=[2,3]", IMAGES),
        ("hst:widths=[8,12],heads=[2,3],detach=true", IMAGES),
        (P2P, CLOUDS),
    ],
)
def test_what_a_brick_adds_has_no_strength(arm: str, task: Task, text_base: Path, image_base: Path) -> None:
    base = open_base(str(text_base if task is TOPICS else image_base))
    attached = build(resolve(parse(arm), task), base, task, seed=0)
    brick = SimpleNamespace(tensors=attached.tensors, task=task)
    with pytest.raises(Refused, match=r"adds modules of its own.*such as lora.*full or bitfit"):  # noqa: SIM117
        with scaled(attached.model, base, brick, 0.5):
            raise AssertionError("it was scaled")


def test_a_base_without_some_of_its_heads_has_no_strength_0(text_base: Path) -> None:
    base = open_base(str(text_base))
    attached = build(resolve(parse("dsee:r=2,n_sparse=4,heads=0.5,neurons=0.5"), TOPICS), base, TOPICS, seed=0)
    brick = SimpleNamespace(tensors=attached.tensors, task=TOPICS)
    with scaled(attached.model, base, brick, 0.5):
        pass  # nothing is removed yet
    attached.callbacks[-1].prune(None, torch.Generator().manual_seed(0))
    with pytest.raises(Refused, match="removed heads or neurons from the base"):  # noqa: SIM117
        with scaled(attached.model, base, brick, 0.0):
            raise AssertionError("it was scaled")
