"""The bricks on a base: listed, scored against it, found in it, replaced and removed, and held against each other."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS, documents, make_text_base, text_data, write_data
from torch import Tensor

import brickyard
from brickyard import api
from brickyard.bricks import updates
from brickyard.bricks.groups import conflict, find
from brickyard.bricks.scores import Course, scored
from brickyard.cli import main
from brickyard.core import brick as bricks
from brickyard.core import trial
from brickyard.core.arm import parse
from brickyard.core.base import open_base
from brickyard.core.brick import Brick
from brickyard.core.build import build, resolve
from brickyard.core.errors import BadBrick, Refused, UsageError, WrongBase
from brickyard.core.export import export
from brickyard.core.stats import paired
from brickyard.core.task import Task
from brickyard.merging.merge import merge

CAUSAL = Task("causal-lm", "bits_per_byte", None, 1, "text")
CPU = torch.device("cpu")


def labelled(rows: int = 120) -> dict[str, list]:
    """Two capabilities: words of the first half of the list, and of the second."""
    draw, out = np.random.default_rng(0), {"text": [], "label": []}
    for i in range(rows):
        own = WORDS[11 * (i % 2) : 11 * (i % 2) + 11]
        out["text"].append(" ".join(own[int(k)] for k in draw.integers(0, 11, 12)))
        out["label"].append(("first half", "second")[i % 2])
    return out


def tuned(arm: str, base: Path, folder: Path, data: Any, task: str | None = None, **training: Any) -> Brick:
    """One short run's brick."""
    asked = trial.Setting(
        arm=arm, base=str(base), data=data, task=task, cache=False, device="cpu",
        training={"epochs": 1, "precision": "float32", "batch": 4 if task else 16, **training},
    )  # fmt: skip
    trial.run({"setting": asdict(asked), "folder": str(folder)})
    return bricks.load(folder / "brick")


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A language model and a folder with a LoRA that learned its documents, one of full weights, and two groups."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BRICKYARD_CACHE", str(tmp_path_factory.mktemp("cache")))
        base = make_text_base(tmp_path_factory.mktemp("base"), causal=True)
        folder = tmp_path_factory.mktemp("runs")
        tuned("lora:r=4,lr=0.05", base, folder / "lora", documents(), "causal-lm", epochs=4)
        tuned("full:lr=0.02", base, folder / "full", documents(), "causal-lm", epochs=4)
        find(str(base), {"test": labelled()}, folder / "groups", share=0.1, tokens=10, device="cpu")
    return base, folder


# A group of neurons is a brick like any other


def group_on(base: Path, share: float = 0.2) -> tuple[Any, dict[str, Tensor]]:
    attached = build(resolve(parse("neuron-group"), CAUSAL), open_base(str(base)), CAUSAL, seed=0)
    draw = torch.Generator().manual_seed(0)
    return attached, {name: torch.rand(t.shape, generator=draw) < share for name, t in attached.tensors().items()}


def test_a_group_zeroes_its_columns_and_undo_brings_every_bit_back(causal_base: Path) -> None:
    attached, masks = group_on(causal_base)
    before = {name: t.clone() for name, t in attached.model.state_dict().items()}
    attached.load({name: torch.zeros_like(m) for name, m in masks.items()})
    assert all(torch.equal(t, before[name]) for name, t in attached.model.state_dict().items())  # the empty group
    for _ in range(2):  # a second group takes the place of the first
        attached.load(masks)
        for name, t in attached.model.state_dict().items():
            mask = masks.get(name.replace(".weight", ".neurons"))
            expected = before[name] if mask is None else before[name].masked_fill(mask, 0)
            assert torch.equal(t, expected), name
        masks = {name: ~mask for name, mask in masks.items()}
    assert all(torch.equal(t, before[name]) for name, t in attached.detach().state_dict().items())
    assert not any(mask.any() for mask in attached.tensors().values())
    with pytest.raises(BadBrick, match="the base takes"):
        attached.load({name: mask[:-1] for name, mask in masks.items()})


def test_equal_runs_leave_equal_adapter_files(text_base: Path, tmp_path: Path) -> None:
    """PEFT keeps the names of layers in a set, whose order is another one in every process."""
    given: Any = {"base": str(text_base), "data": text_data(), "device": "cpu", "training": {"steps": 2}}
    brickyard.tune("lora:target=all-linear", out=tmp_path, **given)
    names = json.loads((tmp_path / "brick" / "adapter_config.json").read_text())["target_modules"]
    assert len(names) > 8 and names == sorted(names)


def test_adding_and_removing_any_brick_is_reversible_bitwise(yard: tuple[Path, Path]) -> None:
    base = open_base(str(yard[0]))
    bare = base.model(CAUSAL, seed=0).state_dict()
    made = bricks.installed(yard[1], base.fingerprint)
    assert [brick.kind for brick in made] == ["weights", "neuron group", "neuron group", "adapter"]
    for brick in made:
        applied = brick.apply(base)
        changed = any(
            name not in bare or not torch.equal(t, bare[name]) for name, t in applied.model.state_dict().items()
        )
        after = applied.undo().state_dict()
        assert changed and after.keys() == bare.keys() and all(torch.equal(after[name], bare[name]) for name in bare)


def test_a_group_exports_and_merges_as_the_weights_that_it_makes(yard: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = yard
    group = next(brick for brick in bricks.installed(folder, open_base(str(base)).fingerprint) if brick.kind[0] == "n")
    assert export(group.folder, "merged", tmp_path / "m")["max_gap"] == 0
    with pytest.raises(Refused, match="no adapter"):
        export(group.folder, "peft", tmp_path / "p")
    merge(
        "task-arithmetic:scale=1.0", base=str(base), bricks=[str(group.folder), str(folder / "full" / "brick")],
        out=tmp_path / "both",
    )  # fmt: skip
    both = open_base(str(tmp_path / "both")).model(CAUSAL, seed=0).state_dict()
    full = bricks.load(folder / "full" / "brick").tensors()
    bare = open_base(str(base)).model(CAUSAL, seed=0).state_dict()
    for name, mask in group.tensors().items():
        key = name.replace(".neurons", ".weight")
        expected = full[key] - bare[key] * mask
        torch.testing.assert_close(both[key], expected, atol=1e-6, rtol=1e-5)


def test_a_group_is_found_and_never_trained(
    causal_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "data", documents())
    argv = ["tune", "neuron-group", "--base", str(causal_base), "--data", str(data), "--task", "causal-lm"]
    assert main([*argv, "--out", str(tmp_path / "run")]) == 2 and "no trainable parameter" in capsys.readouterr().err


# find


def test_find_writes_the_neurons_that_serve_each_capability(yard: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = yard
    for name in ("first-half", "second"):
        made = bricks.load(folder / "groups" / name)
        assert made.kind == "neuron group" and made.manifest["found"]["neurons"] == {
            f"model.layers.{i}": 6 for i in range(2)
        }
        assert [int(mask.sum()) for mask in made.tensors().values()] == [6, 6] and made.cost[
            "trainable_parameters"
        ] == 0
        found = made.manifest["found"]
        assert found["precision"] > 0.8 and found["precision_held_out"] > 0.6  # of the base rate 0.5
    one, other = (bricks.load(folder / "groups" / name).tensors() for name in ("first-half", "second"))
    assert not any((one[name] & other[name]).any() for name in one)
    rows = find(str(base), {"test": labelled()}, tmp_path / "c", share=0.1, tokens=10, clusters=8, device="cpu")
    masks = bricks.load(rows[0]["folder"]).tensors()
    assert [int(mask.sum()) for mask in masks.values()] == [8, 8]  # one whole group of a layer's eight
    with pytest.raises(UsageError, match="not empty"):
        find(str(base), {"test": labelled()}, folder / "groups", tokens=10)


def test_a_base_with_a_brick_on_it_is_audited_in_its_place(yard: tuple[Path, Path], text_base: Path) -> None:
    base, folder = yard
    asked = {"base": str(base), "data": {"test": labelled()}, "device": "cpu"}
    audit = lambda **more: api.audit("configurable-bricks:share=0.1,tokens=10", **asked, **more)  # noqa: E731
    bare, tuned_ = audit(), audit(brick=folder / "lora" / "brick")
    group = audit(brick=folder / "groups" / "second")
    assert bare["localisation"]["loss"] != tuned_["localisation"]["loss"]
    assert np.ptp([x["neurons"]["in_all"] for x in (bare, tuned_, group)]) == 0
    assert group["localisation"]["loss"] != bare["localisation"]["loss"]
    with pytest.raises(Refused, match="give a decoder"):
        audit(brick=str(text_base))


# the table


def test_a_table_says_what_a_brick_improves_and_what_it_damages(yard: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = yard
    against = {"test": {"text": [" ".join(reversed(text.split())) for text in documents()["test"]["text"]]}}
    specs = [str(write_data(tmp_path / "home", documents())), str(write_data(tmp_path / "backwards", against))]
    rows = {Path(row["folder"]).parent.name: row for row in scored(folder, str(base), specs, device="cpu")}
    home, backwards = rows["lora"]["on"]
    assert (home["verdict"], home["metric"], home["examples"]) == ("improves", "bits_per_byte", 40)
    assert home["difference"] > 0 and home["brick"] < home["base"] and home["low"] > 0 and home["p"] <= home["p_holm"]
    assert backwards["verdict"] == "damages" and backwards["high"] < 0
    course = Course(specs[0], open_base(str(base)), CPU, 500, None)
    made = bricks.load(folder / "lora" / "brick")
    labels = course.test.labels.numpy()
    pair = paired(labels, course.answers(made), course.answers(None), "bits_per_byte")
    assert home["difference"] == pytest.approx(-pair.difference) and home["low"] == pytest.approx(-pair.high)
    assert course.task.score(labels, course.answers(made)) == pytest.approx(home["brick"])
    few = scored(folder, str(base), specs[:1], rows=30, device="cpu")
    assert {entry["examples"] for row in few for entry in row["on"]} == {30}


def test_answers_are_remembered_by_content(yard: tuple[Path, Path], tmp_path: Path, monkeypatch: Any) -> None:
    base, folder = yard
    monkeypatch.setenv("BRICKYARD_CACHE", str(tmp_path / "cache"))
    data = [str(write_data(tmp_path / "data", documents()))]
    first = scored(folder, str(base), data, device="cpu")
    monkeypatch.setattr("brickyard.bricks.scores.answer", lambda *a: pytest.fail("asked again"))
    assert scored(folder, str(base), data, device="cpu") == first
    write_data(tmp_path / "data", documents(test=41))
    with pytest.raises(BaseException, match="asked again"):
        scored(folder, str(base), data, device="cpu")


def test_labelled_rows_are_read_through_a_head_that_belongs_to_the_base(text_base: Path, tmp_path: Path) -> None:
    made = tuned("lora:r=4,lr=0.02,target=all-linear", text_base, tmp_path / "runs" / "a", text_data(), epochs=3)
    still = tuned("linear-probe", text_base, tmp_path / "runs" / "b", text_data())
    turned = text_data()
    for columns in turned.values():
        columns["label"] = [f"not {label}" for label in columns["label"]]
    rows = scored(tmp_path / "runs", str(text_base), [text_data(), turned], device="cpu")
    (home, away), (_, probe_away) = (row["on"] for row in rows)
    assert [row["kind"] for row in rows] == ["adapter", "head"]
    assert (home["head"], away["head"]) == ("its own", "the base's") and home["metric"] == "accuracy"
    assert home["base"] == away["base"]  # the same head but for the labels' names
    assert probe_away["verdict"] == "unchanged" and probe_away["difference"] == 0  # a head changes no backbone
    assert made.attach_points and made.requires == still.requires and made.metrics["score"]["metric"] == "accuracy"
    lacking = scored(tmp_path / "runs", str(text_base), [{"test": text_data()["test"]}], device="cpu")
    assert lacking[0]["on"][0]["verdict"] == "not scored" and "no train rows" in lacking[0]["on"][0]["why"]


def test_the_listing_keeps_its_keys_and_the_command_marks_what_it_found(
    yard: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, folder = yard
    assert main(["bricks", str(base), "--in", str(folder), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"folder", "arm", "bytes", "task", "data", "scores", "measured"} < rows[0].keys() and len(rows) == 4
    assert rows == json.loads(json.dumps(api.bricks_in(folder, str(base))))
    data = write_data(tmp_path / "data", documents())
    assert main(["bricks", str(base), "--in", str(folder), "--data", str(data), "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "improves" in shown and "bits_per_byte" in shown and "neuron group" in shown and "Holm" in shown
    assert main(["bricks", str(base), "--in", str(tmp_path)]) == 0 and "no brick for" in capsys.readouterr().out
    assert main(["bricks", str(base), "--in", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: there is no such folder" in " ".join(capsys.readouterr().err.split())


# update


def copied(yard: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(yard[1], tmp_path / "runs"))


def bytes_of(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and ".bricks" not in p.parts)
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def test_replacing_and_removing_is_recorded_and_undone_bit_for_bit(yard: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = str(yard[0]), copied(yard, tmp_path)
    before = bytes_of(folder)
    old, new = folder / "groups" / "second", folder / "lora" / "brick"
    made = updates.replace(folder, old, new, base)
    assert bytes_of(old) == bytes_of(new) and made["brick"] == "groups/second" and made["by"] == str(new)
    updates.remove(folder, folder / "full" / "brick", base)
    left = [Path(row["folder"]).relative_to(folder).as_posix() for row in api.bricks_in(folder, base)]
    assert left == ["groups/first-half", "groups/second", "lora/brick"]
    assert [r["operation"] for r in updates.records(folder)] == ["replace", "remove"]
    for _ in range(2):
        updates.undo(folder)
    assert bytes_of(folder) == before and all(r["undone"] for r in updates.records(folder))
    with pytest.raises(UsageError, match="taken back already"):
        updates.undo(folder)
    assert updates.remove(folder, old, base)["number"] == 3


def test_what_cannot_be_undone_is_left_alone(yard: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = str(yard[0]), copied(yard, tmp_path)
    with pytest.raises(UsageError, match="nothing was replaced"):
        updates.undo(folder)
    old = folder / "groups" / "second"
    updates.remove(folder, old, base)
    shutil.copytree(folder / "lora" / "brick", old)
    with pytest.raises(BadBrick, match="something else"):
        updates.undo(folder)
    shutil.rmtree(old)
    kept = folder / ".bricks" / "0001" / "brick" / "weights.safetensors"
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-1])
    with pytest.raises(BadBrick, match="its files changed"):
        updates.undo(folder)
    kept.write_bytes(whole)
    assert updates.undo(folder)["undone"] and (old / "brick.json").is_file()


def test_a_kill_between_the_steps_leaves_a_brick_that_undo_finds(
    yard: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folder = str(yard[0]), copied(yard, tmp_path)
    before, old, new = bytes_of(folder), folder / "groups" / "second", folder / "lora" / "brick"
    for step in ("os.rename", "_copy"):
        with monkeypatch.context() as patch:
            patch.setattr(f"brickyard.bricks.updates.{step}", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                updates.replace(folder, old, new, base)
        updates.undo(folder)
        assert bytes_of(folder) == before


def test_a_kill_before_the_record_stands_in_nobodys_way(
    yard: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folder = str(yard[0]), copied(yard, tmp_path)
    before, old = bytes_of(folder), folder / "groups" / "second"
    with monkeypatch.context() as patch:
        patch.setattr(updates, "write_json", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            updates.remove(folder, old, base)
    assert bytes_of(folder) == before and (folder / ".bricks" / "0001").is_dir()
    assert updates.remove(folder, old, base)["number"] == 2
    updates.undo(folder)
    assert bytes_of(folder) == before


def test_updates_that_make_no_sense_are_refused(yard: tuple[Path, Path], text_base: Path, tmp_path: Path) -> None:
    base, folder = str(yard[0]), copied(yard, tmp_path)
    lora = folder / "lora" / "brick"
    with pytest.raises(WrongBase, match="another base"):
        updates.remove(folder, lora, str(text_base))
    with pytest.raises(UsageError, match="not installed under"):
        updates.remove(folder / "groups", lora, base)
    with pytest.raises(UsageError, match="cannot replace itself"):
        updates.replace(folder, lora, lora, base)
    with pytest.raises(BadBrick, match="is not a brick"):
        updates.remove(folder, folder / "groups", base)
    assert not (folder / ".bricks").exists() and lora.is_dir()


# conflict


def test_a_brick_agrees_with_itself_and_groups_that_share_no_weight_have_no_signs(
    yard: tuple[Path, Path], tmp_path: Path
) -> None:
    base, folder = str(yard[0]), yard[1]
    full = folder / "full" / "brick"
    twin = shutil.copytree(full, tmp_path / "twin")
    same = conflict(base, full, twin, device="cpu")
    assert same["sign"] == 0 and same["cosine"] == pytest.approx(1) and same["states"] == pytest.approx(1)
    assert same["moved"] == 1 and same["both"] > 0.9
    a, b = (folder / "groups" / name for name in ("first-half", "second"))
    apart = conflict(base, a, b, device="cpu")
    assert apart["both"] == 0 and apart["sign"] is None and apart["cosine"] == 0
    found = conflict(base, full, folder / "lora" / "brick", device="cpu")
    bare = open_base(base).model(CAUSAL, seed=0).state_dict()
    models = [bricks.load(path).apply(open_base(base)).model for path in (full, folder / "lora" / "brick")]
    states = [models[0].state_dict(), models[1].merge_and_unload().state_dict()]  # type: ignore[operator]
    changes = [
        torch.cat([(s[name] - bare[name]).flatten() for name in bare if name != "lm_head.weight"]) for s in states
    ]
    cosine = torch.nn.functional.cosine_similarity(changes[0].double(), changes[1].double(), dim=0)
    assert found["cosine"] == pytest.approx(float(cosine), abs=1e-4)
    moved = (changes[0] != 0) & (changes[1].abs() > 1e-8)
    opposed = (changes[0][moved].sign() != changes[1][moved].sign()).float().mean()
    assert found["sign"] == pytest.approx(float(opposed), abs=0.02)


def test_the_verbs_work_on_the_command_line(
    yard: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, folder = str(yard[0]), copied(yard, tmp_path)
    data = write_data(tmp_path / "kinds", {"test": labelled()})
    common = ["bricks", base, "--in", str(folder)]
    assert main([*common, "--find", str(data), "--out", str(tmp_path / "g"), "--tokens", "10", "--device", "cpu"]) == 0
    assert "neurons for first half" in capsys.readouterr().out
    lora, full = str(folder / "lora" / "brick"), str(folder / "full" / "brick")
    assert main([*common, "--conflict", lora, full, "--device", "cpu"]) == 0 and "cosine" in capsys.readouterr().out
    assert main([*common, "--replace", lora, full]) == 0 and "was replaced by" in capsys.readouterr().out
    assert main([*common, "--undo"]) == 0 and "bit for bit" in capsys.readouterr().out
    for words, named in (
        (["--undo", "--rows", "10"], "--rows would not be read by --undo; leave it out"),
        (["--conflict", lora, full, "--data", str(data), "--max-length", "8"], "--data, --max-length would not"),
        (["--remove", lora, "--share", "0.5"], "--share would not be read by --remove"),
        (["--find", str(data), "--out", "y", "--rows", "3"], "--rows would not be read by --find"),
        (["--prompts", "3"], "--prompts would not be read by the table of bricks"),
    ):
        assert main([*common, *words]) == 2, words
        assert named in " ".join(capsys.readouterr().err.split())
    for words in (["--find", str(data)], ["--out", "x"], ["--undo", "--remove", lora], ["--remove", str(tmp_path)]):
        assert main([*common, *words]) == 2, words
        assert capsys.readouterr().err
