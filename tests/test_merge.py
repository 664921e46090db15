"""The verb merge on bricks and adapters: exact sums of adapters, heads that stay apart, the table of scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import documents, make_text_base, text_data
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from brickyard import api
from brickyard.cli import main
from brickyard.core import brick as bricks
from brickyard.core.arm import parse
from brickyard.core.base import open_base
from brickyard.core.brick import Brick
from brickyard.core.build import build, resolve
from brickyard.core.errors import NoEffect, Refused, UnsafeFile, UsageError, WrongBase
from brickyard.core.files import read_tensors
from brickyard.core.fitted_head import fit_on
from brickyard.core.task import Task
from brickyard.merging.inputs import open_ground, open_inputs
from brickyard.merging.merge import merge
from brickyard.merging.scores import overwrite

TASK = Task("text-classification", "accuracy", ("bad", "good"), 2, "text")
LANGUAGE = Task("causal-lm", "bits_per_byte", None, 1, "text")


def make_brick(folder: Path, base: Path, arm: str, seed: int, task: Task = TASK, size: float = 0.02) -> Brick:
    """Write a brick whose parameters were moved by noise instead of training."""
    opened = open_base(str(base))
    plan = resolve(parse(arm), task)
    attached = build(plan, opened, task, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in attached.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return bricks.save(folder, attached, plan, opened, task, seed=seed, about={"data": {"name": folder.name}})


def weights(folder: Path) -> dict[str, Tensor]:
    return read_tensors(folder / "model.safetensors")


def plain_state(brick: Brick, base: Path) -> dict[str, Tensor]:
    """The backbone's weights with the brick in them, by the base's names."""
    model: Any = brick.apply(open_base(str(base))).model
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    return {name: tensor.detach() for name, tensor in model.bert.state_dict().items()}


@pytest.fixture
def loras(text_base: Path, tmp_path: Path) -> list[Brick]:
    return [make_brick(tmp_path / name, text_base, "lora:r=3", seed) for seed, name in enumerate(("a", "b"))]


def test_adapters_add_up_exactly_as_one_adapter(loras: list[Brick], text_base: Path, tmp_path: Path) -> None:
    given = {"base": str(text_base), "bricks": [brick.folder for brick in loras]}
    result = merge("task-arithmetic:scale=0.5", out=tmp_path / "adapter", **given)
    assert result["form"] == "adapter" and result["ranks"] == {"largest": 6}
    merge("task-arithmetic:scale=0.5", out=tmp_path / "model", form="model", **given)
    opened = open_base(str(text_base))
    base, merged = opened._stored(), weights(tmp_path / "model")
    parts = [plain_state(brick, text_base) for brick in loras]
    applied: Any = PeftModel.from_pretrained(opened.model(TASK, seed=0), str(tmp_path / "adapter"))  # type: ignore[arg-type]
    found = applied.merge_and_unload().bert.state_dict()
    moved = 0
    for name, start in base.items():
        if start.is_floating_point():
            wanted = start + 0.5 * sum(part[name] - start for part in parts)
            torch.testing.assert_close(merged[name], wanted, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-6)
            moved += not torch.equal(wanted, start)
    assert moved == 4  # query and value of two layers
    assert not any("classifier" in name for name in merged)


def test_lines_scales_only_the_second_factor_of_an_adapter(loras: list[Brick], text_base: Path, tmp_path: Path) -> None:
    given = {"base": str(text_base), "bricks": [loras[0].folder]}
    result = merge("lines:alpha=0.2", out=tmp_path / "out", **given)
    assert result["form"] == "adapter" and result["scales"] == {"0.2": 2, "1": 2}
    # Blocks are counted in the base: an adapter of one layer a block has them too.
    narrow = make_brick(tmp_path / "narrow", text_base, "lora:r=3,target=query", 4)
    given["bricks"] = [narrow.folder]
    assert merge("lines:alpha=0.2", out=tmp_path / "narrow-out", **given)["scales"] == {"0.2": 1, "1": 1}
    start, found = loras[0].tensors(), read_tensors(tmp_path / "out" / "adapter_model.safetensors")
    scaling = 16 / 3
    for name, tensor in found.items():
        factor = 1.0 if "lora_A" in name else scaling * (0.2 if ".layer.0." in name else 1.0)
        torch.testing.assert_close(tensor, factor * start[name])
    assert read_tensors(tmp_path / "out" / "heads" / "a.safetensors").keys() == {"classifier.weight", "classifier.bias"}


def plain_adapter(folder: Path, base: Path, **options: Any) -> Path:
    """Write a PEFT adapter of another's making, whose factors were moved by noise."""
    chosen: Any = {"r": 2, "target_modules": ["query", "value"], **options}
    tuned = get_peft_model(open_base(str(base)).model(TASK, seed=0), LoraConfig(**chosen))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(7)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    tuned.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@pytest.mark.parametrize("start", ["pissa", "PiSSA_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga", 7])
def test_an_adapter_that_was_begun_in_the_base_is_refused(start: Any, text_base: Path, tmp_path: Path) -> None:
    made = plain_adapter(tmp_path / "made", text_base)
    said = json.loads((made / "adapter_config.json").read_text())
    (made / "adapter_config.json").write_text(json.dumps({**said, "init_lora_weights": start}))
    with pytest.raises(Refused, match=r"made: .*path_initial_model_for_weight_conversion.* merge it into its base"):
        merge("average", base=str(text_base), bricks=[made], out=tmp_path / "out")


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "mica"])
def test_an_adapter_that_leaves_the_base_alone_is_merged_as_peft_loads_it(
    start: Any, text_base: Path, tmp_path: Path
) -> None:
    made = plain_adapter(tmp_path / "made", text_base, init_lora_weights=start)
    merge("average", base=str(text_base), bricks=[made], out=tmp_path / "out", form="model")
    opened: Any = PeftModel.from_pretrained(open_base(str(text_base)).model(TASK, seed=0), str(made))  # type: ignore[arg-type]
    wanted, found = opened.merge_and_unload().bert.state_dict(), weights(tmp_path / "out")
    for name in (n for n in found if found[n].is_floating_point()):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6)


def test_what_is_no_sum_becomes_a_model(loras: list[Brick], text_base: Path, tmp_path: Path) -> None:
    given = {"base": str(text_base), "bricks": [brick.folder for brick in loras]}
    assert merge("ties:density=0.5", out=tmp_path / "ties", **given)["form"] == "model"
    with pytest.raises(Refused, match="weighted sum"):
        merge("ties:density=0.5", out=tmp_path / "no", form="adapter", **given)
    made = make_brick(tmp_path / "full", text_base, "full", 3)
    mixed = {**given, "bricks": [loras[0].folder, made.folder]}
    assert merge("average", out=tmp_path / "mixed", **mixed)["form"] == "model"
    with pytest.raises(Refused, match="full is no LoRA"):
        merge("average", out=tmp_path / "no", form="adapter", **mixed)
    base = open_base(str(text_base))._stored()
    a, b = plain_state(loras[0], text_base), plain_state(made, text_base)
    for name, tensor in weights(tmp_path / "mixed").items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, (a[name] + b[name]) / 2, rtol=1e-5, atol=1e-6)
    assert weights(tmp_path / "mixed").keys() == base.keys()
    assert {p.name for p in (tmp_path / "mixed" / "heads").iterdir()} == {"a.safetensors", "full.safetensors"}


def test_a_zero_adapter_is_named(loras: list[Brick], text_base: Path, tmp_path: Path) -> None:
    still = make_brick(tmp_path / "still", text_base, "lora:r=3", 5, size=0.0)
    with pytest.raises(NoEffect, match="still changes nothing"):
        merge("average", base=str(text_base), bricks=[loras[0].folder, still.folder], out=tmp_path / "out")


def test_a_merge_of_adapters_at_scale_zero_is_no_merge(loras: list[Brick], text_base: Path, tmp_path: Path) -> None:
    folders = [brick.folder for brick in loras]
    with pytest.raises(NoEffect, match="every scale is 0"):
        merge("task-arithmetic:scale=0.0", base=str(text_base), bricks=folders, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_changes_that_are_no_low_rank_product_are_taken_as_weights(text_base: Path, tmp_path: Path) -> None:
    made = make_brick(tmp_path / "mos", text_base, "mos:r=3,e=2,p=1,l=2", 1)
    merge("lines:alpha=1,beta=0", base=str(text_base), bricks=[made.folder], out=tmp_path / "out")
    wanted = plain_state(made, text_base)
    for name, tensor in weights(tmp_path / "out").items():
        if tensor.is_floating_point():
            assert torch.equal(tensor, wanted[name]), name


def test_every_input_and_the_merge_are_scored_on_every_task(text_base: Path, tmp_path: Path) -> None:
    made = [
        make_brick(tmp_path / "one", text_base, "full", 1, size=0.3),
        make_brick(tmp_path / "two", text_base, "lora", 2, size=0.5),
    ]
    data = [text_data(), text_data(test=40)]
    result = merge(
        "average",
        base=str(text_base),
        bricks=[brick.folder for brick in made],
        out=tmp_path / "out",
        data=data,
        device="cpu",
    )
    rows = {row["model"]: row for row in result["scores"]["rows"]}
    assert list(rows) == ["the base", "one", "two", "the merge"]
    assert [task["head"] for task in result["scores"]["tasks"]] == ["its brick's"] * 2
    assert [task["examples"] for task in result["scores"]["tasks"]] == [60, 40]
    for i, brick in enumerate(made):
        own = api.evaluate(brick=brick.folder, data=data[i], device="cpu", dtype="float32")
        assert rows[brick.folder.name]["scores"][i]["mean"] == pytest.approx(own["score"]["mean"])
    stored = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert stored["scores"]["rows"] == json.loads(json.dumps(result["scores"]["rows"]))
    # The merge's row is that of its weights, read through each brick's head.
    model: Any = made[0].apply(open_base(str(text_base))).model
    model.bert.load_state_dict(weights(tmp_path / "out"), strict=False)
    inputs = open_base(str(text_base)).tokenizer(data[0]["test"]["text"], padding=True, return_tensors="pt")
    guessed = model.eval()(**inputs).logits.argmax(-1)
    labels = torch.tensor([TASK.labels.index(name) for name in data[0]["test"]["label"]])  # type: ignore[union-attr]
    assert rows["the merge"]["scores"][0]["mean"] == pytest.approx(float((guessed == labels).float().mean()))


def test_the_metric_that_was_asked_for_is_used_with_a_bricks_own_head(text_base: Path, tmp_path: Path) -> None:
    made = make_brick(tmp_path / "one", text_base, "full", 1, size=0.3)
    given: dict[str, Any] = {"data": [text_data()], "device": "cpu", "metric": "macro-f1"}
    found = merge("lines:alpha=0.5", base=str(text_base), bricks=[made.folder], out=tmp_path / "out", **given)["scores"]
    own = api.evaluate(brick=made.folder, data=text_data(), device="cpu", dtype="float32", metric="macro-f1")["score"]
    assert found["tasks"][0]["head"] == "its brick's" and found["tasks"][0]["metric"] == "macro-f1" == own["metric"]
    assert found["rows"][1]["scores"][0]["mean"] == pytest.approx(own["mean"])


def test_a_row_replaces_the_backbone_and_leaves_the_head(loras: list[Brick], text_base: Path, tmp_path: Path) -> None:
    full = make_brick(tmp_path / "full", text_base, "full", 3)
    ground = open_ground(str(text_base))
    given = open_inputs([str(full.folder), str(loras[0].folder)], ground, mixed=False, force=False)
    model: Any = full.apply(open_base(str(text_base))).model
    head = model.classifier.weight.detach().clone()
    for source, wanted in (
        (given[1].source, plain_state(loras[0], text_base)),
        (None, open_base(str(text_base))._stored()),
        (given[0].source, plain_state(full, text_base)),
    ):
        overwrite(model, ground, source)
        for name, tensor in model.bert.state_dict().items():
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-7)
        assert torch.equal(model.classifier.weight, head)


def test_heads_fitted_on_the_base_serve_every_row(text_base: Path, tmp_path: Path) -> None:
    made = make_brick(tmp_path / "one", text_base, "full", 1, size=0.5)
    result = merge(
        "lines:alpha=0.3",
        base=str(text_base),
        bricks=[made.folder],
        out=tmp_path / "out",
        data=[text_data()],
        heads="base",
        device="cpu",
        force=True,
    )
    assert result["scores"]["tasks"][0]["head"] == "fitted on the base"
    rows = {row["model"]: row["mean"] for row in result["scores"]["rows"]}
    assert rows["the base"] > 0.7 and rows["the base"] > rows["one"]


def test_a_fitted_head_finds_what_separates_and_what_is_linear() -> None:
    generator = torch.Generator().manual_seed(0)
    v_ND = torch.randn(200, 5, generator=generator)
    labels = (v_ND[:, 1] > 0).long()
    head = fit_on(v_ND, labels, TASK)
    states, mask = v_ND[:, None].expand(-1, 3, -1).clone(), torch.tensor([True, True, False])
    states[:, 2] = 1e6  # a token that does not count
    logits = head(states, mask.expand(200, -1))
    assert float((logits.argmax(-1) == labels).float().mean()) > 0.98
    # What differs by rounding alone is no feature, even where it would separate the classes.
    rounding = torch.where(labels == 1, 1e-7, -1e-7)[:, None]
    beside = fit_on(torch.cat([v_ND, rounding, torch.zeros(200, 1)], dim=1), labels, TASK)
    assert not beside.weight_KD[:, 5:].any()
    assert torch.allclose(beside.weight_KD[:, :5], head.weight_KD, rtol=1e-3, atol=1e-3)
    assert not any(p.requires_grad for p in head.parameters())
    number = Task("regression", "spearman", None, 1, "text")
    head = fit_on(v_ND, 3 * v_ND[:, 0] - v_ND[:, 2] + 7, number, l2=1e-8)
    assert head.weight_KD[0].tolist() == pytest.approx([3, 0, -1, 0, 0], abs=1e-3)
    assert float(head.bias_K[0]) == pytest.approx(7, abs=1e-3)


def test_language_models_keep_their_tied_output_layer(causal_base: Path, tmp_path: Path) -> None:
    made = [make_brick(tmp_path / f"m{seed}", causal_base, "full", seed, LANGUAGE) for seed in (1, 2)]
    out = tmp_path / "out"
    given = {"base": str(causal_base), "bricks": [brick.folder for brick in made]}
    result = merge("average + lines:alpha=0.5", out=out, data=[documents()], device="cpu", max_length=16, **given)
    assert weights(out).keys() == open_base(str(causal_base)).weights.keys()
    assert result["edits"][0]["blocks"] == {"model.layers": 2}
    own = api.evaluate(base=str(out), data=documents(), task="causal-lm", device="cpu", max_length=16, dtype="float32")
    assert result["scores"]["rows"][-1]["mean"] == pytest.approx(own["score"]["mean"], rel=1e-5)


def test_bricks_of_another_base_and_damaged_ones_are_refused(
    loras: list[Brick], text_base: Path, tmp_path: Path
) -> None:
    other = make_text_base(tmp_path / "other", seed=1)
    stranger = make_brick(tmp_path / "stranger", other, "lora:r=3", 1)
    with pytest.raises(WrongBase, match="stranger was made for base"):
        merge("average", base=str(text_base), bricks=[loras[0].folder, stranger.folder], out=tmp_path / "out")
    path = loras[1].folder / "adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UnsafeFile, match="not those"):
        merge("average", base=str(text_base), bricks=[brick.folder for brick in loras], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_merges_and_says_what_it_kept(
    loras: list[Brick], text_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["merge", "task-arithmetic", "--scale", "0.4", "--base", str(text_base)]
    argv += ["--bricks", *(str(brick.folder) for brick in loras)]
    assert main([*argv, "--out", str(tmp_path / "out"), "--as", "model", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["arm"] == "task-arithmetic:scale=0.4" and result["family"] == "merge" and result["slot"] == ""
    assert open_base(str(tmp_path / "out")).width == 32
    assert main([*argv, "--out", str(tmp_path / "out")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main([*argv, "--out", str(tmp_path / "other")]) == 0
    said = capsys.readouterr().out
    assert "2 inputs merged by task-arithmetic:scale=0.4" in said and "adapter:" in said
    with pytest.raises(UsageError, match="own or base"):
        merge("average", base=str(text_base), bricks=[loras[0].folder], out=tmp_path / "x", heads="none")
    assert np.isfinite(result["changed"])
