"""`brickyard grow`: the command leaves a model folder that any verb takes; faults are said before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import documents, write_data

from brickyard.cli import main
from brickyard.core.errors import UsageError
from brickyard.core.files import read_tensors
from brickyard.core.loop import State
from brickyard.grow._static_masks import FILE, unpack
from brickyard.growing import grow


class Interrupt(Exception):
    pass


class StopAt:
    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, state: State) -> None:
        if state.step + 1 == self.step:
            raise Interrupt


COMMON = ["--dtype", "float32", "--device", "cpu", "--batch-size", "4", "--max-length", "16", "--threads", "1"]


def zeros(folder: Path, masks: dict[str, torch.Tensor]) -> list[float]:
    """The share of zeros off the support of each masked weight in a model folder."""
    weights = read_tensors(folder / "model.safetensors")
    out = []
    for key in (name for name in masks if name.endswith(":bits")):
        name = key.removesuffix(":bits")
        mask = unpack(masks[key], tuple(masks[f"{name}:shape"].tolist()))
        out.append(float((weights[name][~mask] == 0).float().mean()))
    return out


def test_the_command_pretrains_sparsely_and_full_tunes_it_densely(
    causal_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_data(tmp_path / "data", documents()), tmp_path / "sparse"
    argv = [
        "grow",
        "spdf:lr=1e-2",
        "--sparsity",
        "0.5",
        "--base",
        str(causal_base),
        "--data",
        str(data),
        "--epochs",
        "4",
    ]
    assert main([*argv, "--out", str(out), *COMMON]) == 0
    said = capsys.readouterr().out
    assert "50.0%" in said and "times fewer" in said and "saved no time" in said and "bits_per_byte" in said
    assert {p.name for p in out.iterdir()} >= {"config.json", "model.safetensors", FILE, "spdf.json", "tokenizer.json"}
    assert not (tmp_path / "sparse.training").exists()
    masks = read_tensors(out / FILE)
    assert zeros(out, masks) == [1.0] * 14
    known = json.loads((out / "spdf.json").read_text())
    assert known["masks"]["sparsity"] == 0.5 and known["training"]["lr"] == 1e-2 and known["training"]["wd"] == 0.1
    blocks = known["encoding"]["train"]["rows"]
    assert known["flops"]["equal_steps"]["tokens"] == 4 * blocks * 16
    assert known["flops"]["per_token"]["fewer_by"] > 1
    # Fresh weights: the base's own have no part in it.
    assert known["score"]["mean"] < known["history"][0]["validation_score"]

    assert main([*argv, "--out", str(out), *COMMON]) == 2
    assert "not empty" in capsys.readouterr().err

    tune = ["tune", "full:lr=1e-3", "--base", str(out), "--data", str(data), "--task", "causal-lm", "--epochs", "1"]
    assert main([*tune, "--out", str(tmp_path / "dense"), "--json", *COMMON]) == 0
    tuned = json.loads(capsys.readouterr().out)
    stored = read_tensors(Path(tuned["brick"]) / "weights.safetensors")
    assert all(float((stored[n.removesuffix(":bits")] == 0).float().mean()) < 0.1 for n in masks if n.endswith(":bits"))

    again = ["grow", "spdf:sparsity=0.5,start=base,lr=1e-3", "--base", str(out), "--data", str(data), "--epochs", "1"]
    assert main([*again, "--out", str(tmp_path / "still-sparse"), *COMMON]) == 0
    kept = read_tensors(tmp_path / "still-sparse" / FILE)
    assert kept.keys() == masks.keys() and all(torch.equal(kept[name], masks[name]) for name in masks)
    assert zeros(tmp_path / "still-sparse", masks) == [1.0] * 14
    now, then = (read_tensors(tmp_path / name / "model.safetensors") for name in ("still-sparse", "sparse"))
    assert any(not torch.equal(now[name], then[name]) for name in then)


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        ("spdf:sparsity=1", ["less than 1"]),
        ("spdf:sparsty=0.5", ["sparsity"]),
        ("spdf:scheme=magnitude", ["scheme"]),
        ("lora", ["grow method"]),
        ("spdf + lora", ["one method"]),
        ("spdf:start=base", ["no masks.safetensors"]),
        ("spdf:target=q_prj", ["q_prj", "q_proj"]),
    ],
)
def test_bad_commands_are_one_clear_line(
    arm: str, words: list[str], causal_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "data", documents())
    argv = ["grow", arm, "--base", str(causal_base), "--data", str(data), "--out", str(tmp_path / "out"), *COMMON]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("brickyard: ") and all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


def test_masks_of_other_options_are_refused_on_the_way_on(causal_base: Path, tmp_path: Path) -> None:
    shared = {"data": documents(), "max_length": 16, "batch": 4, "device": "cpu", "dtype": "float32"}
    grow("spdf:sparsity=0.5", base=str(causal_base), out=tmp_path / "a", training={"steps": 2}, **shared)
    for arm in ("spdf:start=base", "spdf:start=base,sparsity=0.5,scheme=erk", "spdf:start=base,sparsity=0.5,target=up"):
        with pytest.raises(UsageError, match="would not give"):
            grow(arm, base=str(tmp_path / "a"), out=tmp_path / "b", **shared)


def test_an_interrupted_command_goes_on_to_the_same_bits(causal_base: Path, tmp_path: Path) -> None:
    shared = {"base": str(causal_base), "data": documents(), "max_length": 16, "batch": 4, "device": "cpu"}
    asked: dict[str, Any] = {**shared, "dtype": "float32", "training": {"steps": 12}, "checkpoint_every": 5, "seed": 3}
    grow("spdf:lr=1e-2,sparsity=0.5", out=tmp_path / "whole", **asked)
    with pytest.raises(Interrupt):
        grow("spdf:lr=1e-2,sparsity=0.5", out=tmp_path / "cut", callbacks=[StopAt(8)], **asked)
    assert not (tmp_path / "cut").exists() and list((tmp_path / "cut.training").glob("checkpoints/step-5"))
    grow("spdf:lr=1e-2,sparsity=0.5", out=tmp_path / "cut", **asked)
    for name in ("model.safetensors", FILE, "config.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_minutes_become_steps_once(causal_base: Path, tmp_path: Path) -> None:
    made = grow(
        "spdf:sparsity=0.5",
        base=str(causal_base),
        data=documents(),
        out=tmp_path / "out",
        minutes=0.002,
        max_length=16,
        batch=4,
        device="cpu",
        dtype="float32",
    )
    assert made["steps"] == made["training"]["steps"] >= 1 and np.isfinite(made["score"]["mean"])
