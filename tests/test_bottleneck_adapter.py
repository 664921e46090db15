"""Bottleneck adapters: the equation behind every block, nothing at the start, what trains, what they refuse."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import text_data
from torch.nn.functional import relu

from brickyard.core import export as exports
from brickyard.core import trial
from brickyard.core.arm import parse
from brickyard.core.attached import Attached
from brickyard.core.base import open_base
from brickyard.core.build import build, resolve
from brickyard.core.errors import ParityBroken, Refused, UsageError
from brickyard.core.loop import train_mode
from brickyard.core.roles import blocks
from brickyard.core.task import Task
from brickyard.core.trial import Setting
from brickyard.tune.bottleneck_adapter import NAME, Bottleneck, Config

TASK = Task("text-classification", "accuracy", ("a", "b"), 2, "text")
TOKENS = torch.arange(4, 24).view(4, 5)


def made(folder: Path, options: str = ":reduction=8") -> Attached:
    return build(resolve(parse(f"bottleneck-adapter{options}"), TASK), open_base(str(folder)), TASK, seed=0)


def test_an_adapter_is_its_equation_and_the_identity_at_the_start() -> None:
    torch.manual_seed(0)
    adapter, x = Bottleneck(6, 2), torch.randn(3, 5, 6)
    assert torch.equal(adapter(x), x)
    with torch.no_grad():
        adapter.up.weight.normal_(), adapter.up.bias.normal_()
    inner = relu(x @ adapter.down.weight.T + adapter.down.bias)
    torch.testing.assert_close(adapter(x), x + inner @ adapter.up.weight.T + adapter.up.bias)


@pytest.mark.parametrize("base", ["text_base", "decoder_base"])
def test_it_stands_behind_every_block_and_alone_with_the_head_it_trains(
    base: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(base)
    attached = made(folder)
    model: Any = attached.model
    found = blocks(model)
    sizes = [sum(p.numel() for p in block.get_submodule(NAME).parameters()) for _, block in found]
    width = int(open_base(str(folder)).config.hidden_size)
    assert sizes == [2 * width * (width // 8) + width // 8 + width] * len(found)
    seen: list[torch.Tensor] = []
    for _, block in found:
        block.get_submodule(NAME).register_forward_hook(lambda *given: seen.append(given[2]))
    train_mode(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits.square().sum().backward()
    assert len(seen) == len(found) and all(x.shape == (4, 5, width) for x in seen)
    torch.optim.AdamW(attached.parameters(), lr=1e-2).step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all(f".{NAME}." in n or n.startswith(("classifier", "score", "bert.pooler")) for n in changed)
    assert {n for n in before if n.endswith(f"{NAME}.up.weight")} <= changed


def test_biases_do_not_decay(text_base: Path) -> None:
    attached = made(text_base)
    names = {id(p): n for n, p in attached.model.named_parameters()}
    free = {
        names[id(p)] for group in attached.parameter_groups if group.get("weight_decay") == 0.0 for p in group["params"]
    }
    assert free and all(n.endswith("bias") for n in free)
    assert {n for n in names.values() if f".{NAME}." in n and n.endswith("bias")} <= free


def test_what_does_not_fit_is_refused(text_base: Path) -> None:
    with pytest.raises(UsageError, match="reduction=0"):
        Config(reduction=0)
    with pytest.raises(Refused, match="reduction=4000 leaves nothing of the width"):
        made(text_base, ":reduction=4000")


def test_a_model_of_transformers_cannot_hold_it_and_nothing_is_left_of_the_attempt(
    text_base: Path, tmp_path: Path
) -> None:
    asked = Setting(
        arm="bottleneck-adapter:reduction=8", base=str(text_base), data=text_data(), device="cpu", cache=False
    )
    trial.run({"setting": asdict(asked), "folder": str(tmp_path)})
    for to, why in (
        ("merged", "adds modules .Bottleneck. that no transformers class has"),
        ("peft", "PEFT has no form"),
    ):
        with pytest.raises(Refused, match=why):
            exports.export(tmp_path / "brick", to, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["merged", "peft"])
def test_an_export_that_answers_otherwise_is_not_left_behind(
    to: str, text_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Setting(arm="lora:r=2", base=str(text_base), data=text_data(), device="cpu", cache=False)
    trial.run({"setting": asdict(asked), "folder": str(tmp_path)})
    monkeypatch.setattr(exports, "parity", lambda *_: {"max_gap": 1.0, "scale": 1.0, "tolerance": 1e-4, "layers": []})

    def broken(*_: Any) -> None:
        assert (tmp_path / "out").is_dir()
        raise ParityBroken("the logits differ")

    monkeypatch.setattr(exports, "assert_parity", broken)
    with pytest.raises(ParityBroken):
        exports.export(tmp_path / "brick", to, tmp_path / "out")
    assert not (tmp_path / "out").exists()
