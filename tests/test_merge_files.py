"""What a merge leaves: an adapter that PEFT reads as meant, the heads of all inputs, and no half of another merge."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import text_data
from peft import PeftModel
from safetensors.torch import save_file
from test_merge import TASK, make_brick, plain_adapter, weights
from torch import Tensor

import brickyard
from brickyard.core.base import open_base
from brickyard.core.errors import Changed, NoEffect, NotFinite, ParityBroken, Refused, UsageError, WrongBase
from brickyard.core.files import read_tensors
from brickyard.merging import files, scores
from brickyard.merging.files import file_names
from brickyard.merging.merge import merge


def loaded(adapter: Path, base: Path) -> dict[str, Tensor]:
    """The backbone's weights with an adapter in them, as PEFT loads it."""
    model: Any = PeftModel.from_pretrained(open_base(str(base)).model(TASK, seed=0), str(adapter))  # type: ignore[arg-type]
    return {name: tensor.detach().clone() for name, tensor in model.merge_and_unload().bert.state_dict().items()}


def test_a_sum_of_adapters_has_the_layers_of_all_and_not_the_selectors_of_the_first(
    text_base: Path, tmp_path: Path
) -> None:
    first = plain_adapter(
        tmp_path / "first",
        text_base,
        init_lora_weights="gaussian",
        target_modules=["query", "key"],
        exclude_modules=["key"],
        layers_to_transform=[1],
        layers_pattern="layer",
    )
    second = plain_adapter(tmp_path / "second", text_base, r=3, target_modules=["key", "value"])
    out = tmp_path / "out"
    result = merge("task-arithmetic:scale=0.5", base=str(text_base), bricks=[first, second], out=out)
    said = json.loads((out / "adapter_config.json").read_text())
    assert said["init_lora_weights"] is True
    assert {said[key] for key in ("exclude_modules", "layers_to_transform", "layers_pattern")} == {None}
    start, found = open_base(str(text_base))._stored(), loaded(out, text_base)
    one, other = loaded(first, text_base), loaded(second, text_base)
    moved = 0
    for name in (name for name in start if start[name].is_floating_point()):
        wanted = start[name] + 0.5 * (one[name] - start[name]) + 0.5 * (other[name] - start[name])
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-6)
        moved += not torch.equal(found[name], start[name])
    assert moved == 5  # the query of one layer, key and value of two
    assert result["parity"]["layers"] == 5 and 0 <= result["parity"]["gap"] < 1e-6


def test_an_adapter_whose_products_differ_from_the_sum_is_not_kept(
    text_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [plain_adapter(tmp_path / name, text_base) for name in ("a", "b")]
    real = files.write_tensors

    def damaged(path: Path, tensors: dict[str, Tensor]) -> None:
        worst = next(name for name in tensors if "layer.1." in name and name.endswith("value.lora_B.weight"))
        real(path, {**tensors, worst: tensors[worst] * 1.001})

    monkeypatch.setattr(files, "write_tensors", damaged)
    with pytest.raises(ParityBroken, match=r"layer\.1\.attention\.self\.value.*differs by .*e-0"):
        merge("average", base=str(text_base), bricks=made, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_written_in_the_dtype_that_was_asked_for(text_base: Path, tmp_path: Path) -> None:
    made = [plain_adapter(tmp_path / name, text_base) for name in ("a", "b")]
    given = {"base": str(text_base), "bricks": made}
    whole = merge("average", out=tmp_path / "whole", **given)
    result = merge("average", out=tmp_path / "half", dtype="bfloat16", **given)
    assert (whole["form"], whole["dtype"], result["form"], result["dtype"]) == (
        "adapter",
        "float32",
        "adapter",
        "bfloat16",
    )
    one, other = (read_tensors(tmp_path / n / "adapter_model.safetensors") for n in ("whole", "half"))
    assert {name: t.bfloat16() for name, t in one.items()}.keys() == other.keys()
    assert all(torch.equal(one[name].bfloat16(), other[name]) for name in one)
    assert whole["parity"]["gap"] < 1e-6 < result["parity"]["gap"] < 0.02
    large = {**given, "arm": "task-arithmetic:scale=1000000.0", "dtype": "float16"}
    with pytest.raises(NotFinite, match="exceed float16"):
        merge(out=tmp_path / "large", **large)


def test_a_brick_that_holds_no_weight_of_the_base_is_refused_before_any_work(text_base: Path, tmp_path: Path) -> None:
    given: Any = {"base": str(text_base), "data": text_data(), "device": "cpu"}
    brickyard.tune("linear-probe", out=tmp_path / "probe", training={"steps": 2}, **given)
    made = plain_adapter(tmp_path / "made", text_base)
    for bricks in ([tmp_path / "probe" / "brick"], [made, tmp_path / "probe" / "brick"]):
        with pytest.raises(Refused, match="linear-probe trained parts beside the base and none of its weights"):
            merge("average", base=str(text_base), bricks=bricks, out=tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_merge_of_far_experts_is_known_as_a_child_of_its_base(
    text_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What long training has moved far is no stranger: the manifest says on which base the merge was made."""
    given: Any = {"base": str(text_base)}
    experts = [make_brick(tmp_path / f"e{seed}", text_base, "full", seed, size=0.1).folder for seed in (1, 2)]
    for name, more in (("child", {}), ("forced", {"force": True})):
        merge("average", bricks=experts, out=tmp_path / name, form="model", **given, **more)
    child = tmp_path / "child"
    result = merge("average", bricks=[child, experts[0]], out=tmp_path / "again", form="model", **given)
    assert result["inputs"][0]["kind"] == "checkpoint" and (tmp_path / "again" / "model.safetensors").is_file()
    with pytest.raises(WrongBase, match="forced does not look fine-tuned"):  # nobody had held its inputs against it
        merge("average", bricks=[tmp_path / "forced", experts[0]], out=tmp_path / "none", **given)
    other = str(shutil.copytree(text_base, tmp_path / "other"))
    tensors = read_tensors(Path(other) / "model.safetensors")
    save_file({k: t + 1 if t.is_floating_point() else t for k, t in tensors.items()}, Path(other) / "model.safetensors")
    with pytest.raises(WrongBase):
        merge("average", base=other, bricks=[child], out=tmp_path / "none")
    (child / "merge.json").unlink()
    with pytest.raises(WrongBase, match="child does not look fine-tuned"):
        merge("average", bricks=[child, experts[0]], out=tmp_path / "none", **given)


def test_no_model_at_all_is_an_error_of_its_own(text_base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model was given; name bricks"):
        merge("ties", base=str(text_base), bricks=[], out=tmp_path / "out")


def test_alpha_is_read_as_peft_reads_it(text_base: Path, tmp_path: Path) -> None:
    still = plain_adapter(tmp_path / "still", text_base, lora_alpha=0)
    for form in ("adapter", "model"):
        with pytest.raises(NoEffect, match=r"still (changes nothing|is the base)"):
            merge("average", base=str(text_base), bricks=[still], out=tmp_path / "none", form=form)
    made = plain_adapter(tmp_path / "made", text_base, r=2)
    said = json.loads((made / "adapter_config.json").read_text())
    del said["lora_alpha"]
    (made / "adapter_config.json").write_text(json.dumps(said))
    merge("average", base=str(text_base), bricks=[made], out=tmp_path / "out", form="model")
    wanted = loaded(made, text_base)
    for name, tensor in weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor, wanted[name].to(tensor), rtol=1e-5, atol=1e-6)


def test_heads_of_names_that_differ_in_punctuation_lie_side_by_side(text_base: Path, tmp_path: Path) -> None:
    made = [make_brick(tmp_path / name, text_base, "lora:r=3", seed) for seed, name in enumerate(("a b", "a_b"))]
    merge("average", base=str(text_base), bricks=[brick.folder for brick in made], out=tmp_path / "out")
    names = file_names(("a b", "a_b"))
    for brick in made:
        head = read_tensors(tmp_path / "out" / "heads" / f"{names[brick.folder.name]}.safetensors")
        own = {name: tensor for name, tensor in brick.tensors().items() if "classifier" in name}
        assert own and all(torch.equal(head[name.split("base_model.model.")[-1]], t) for name, t in own.items())
    assert file_names(["a/b", "a b", "a_b", "A_b", "a_b-2"]) == {
        "a/b": "a_b",
        "a b": "a_b-2",
        "a_b": "a_b-3",
        "A_b": "A_b-4",
        "a_b-2": "a_b-2-2",
    }


def cut(*args: Any, **options: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("what", ["nothing", "alpha", "reading", "code", "manifest"])
def test_a_killed_merge_goes_on_only_with_what_it_was_begun_with(
    what: str, text_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [plain_adapter(tmp_path / "a", text_base), make_brick(tmp_path / "b", text_base, "lora:r=3", 1).folder]
    given: dict[str, Any] = {"base": str(text_base), "bricks": made, "out": tmp_path / "out", "max_length": 16}
    with monkeypatch.context() as patch:
        patch.setattr(files, "_link", cut)
        with pytest.raises(KeyboardInterrupt):
            merge("ties", **given)
    assert (tmp_path / "out.merging" / "model.safetensors").is_file()
    if what == "alpha":
        path = made[0] / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 3}))
    if what == "manifest":
        os.utime(made[1] / "brick.json", ns=(1, 1))
    if what == "reading":
        given["max_length"] = 8
    if what == "code":
        monkeypatch.setattr(files, "code_digest", lambda: "of another release")
    if what == "nothing":
        merge("ties", **given)
        assert weights(tmp_path / "out")
        return
    named = {"alpha": "adapter_config.json", "manifest": "brick.json", "reading": "reading.max_length", "code": "code"}
    with pytest.raises(Changed, match=named[what]):
        merge("ties", **given)


def test_a_merge_that_was_killed_while_it_was_scored_is_scored_by_the_next_call(
    text_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [make_brick(tmp_path / name, text_base, "lora:r=3", seed, size=0.3).folder for seed, name in enumerate("ab")]
    given: dict[str, Any] = {"base": str(text_base), "bricks": made, "data": [text_data(), text_data()]}
    given |= {"device": "cpu", "out": tmp_path / "out"}
    wanted = merge("ties", **{**given, "out": tmp_path / "whole"})
    with monkeypatch.context() as patch:
        patch.setattr(scores, "answered", cut)
        with pytest.raises(KeyboardInterrupt):
            merge("ties", **given)
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    for other in ({"arm": "average"}, {"data": [text_data(), text_data(test=30)]}, {"bricks": made[::-1]}):
        with pytest.raises(Changed, match="not scored yet"):
            merge(**{"arm": "ties", **given, **other})
    with pytest.raises(UsageError, match="not empty"):
        merge("ties", **{**given, "data": []})
    found = merge("ties", **given)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(wanted)) and "request" not in found
    assert (tmp_path / "out" / "merge.json").read_bytes() == (tmp_path / "whole" / "merge.json").read_bytes()
    with pytest.raises(UsageError, match="not empty"):
        merge("ties", **given)
