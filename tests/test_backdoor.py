"""The backdoor audit: triggers, poisoned rows, what counts as success, and models with and without a backdoor."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import image_data, text_data, write_data
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_merge import make_brick

from brickyard.audit.backdoor import Config, judge, poisoned, stamped, target_of, triggered
from brickyard.cli import main
from brickyard.core import trial
from brickyard.core.errors import BadData, UsageError
from brickyard.core.split import Split


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)))


@pytest.mark.parametrize("corner", ["top-left", "top-right", "bottom-left", "bottom-right"])
def test_a_patch_lies_in_its_corner_and_nowhere_else(corner: str) -> None:
    image = np.full((10, 12, 3), 7, dtype=np.uint8)
    out = stamped(image, 3, corner)
    assert (image == 7).all() and int((out == 255).sum()) == 27
    rows, columns = np.nonzero(out[..., 0] == 255)
    assert set(rows) == set(range(3) if corner.startswith("top") else range(7, 10))
    assert set(columns) == set(range(3) if corner.endswith("left") else range(9, 12))
    with pytest.raises(UsageError, match="hides an image of 12 x 10"):
        stamped(image, 6, corner)


def test_triggers_go_on_images_and_texts_and_change_nothing_else() -> None:
    rows = Split({"image": image_data()["test"]["image"][:5], "label": [0, 1, 0, 1, 0]})
    marked = triggered(rows, Config(size=2))
    assert marked["label"] == rows["label"]
    for before, after in zip(rows["image"], marked["image"], strict=True):
        moved = np.nonzero((pixels(before) != pixels(after)).any(-1))
        assert set(moved[0]) <= {14, 15} and set(moved[1]) <= {14, 15} and len(moved[0])
    texts = triggered(Split({"text": ["a b", "c"], "text_pair": ["d", "e"]}), Config(word="mn"))
    assert texts.columns == {"text": ["mn a b", "mn c"], "text_pair": ["d", "e"]}
    with pytest.raises(BadData, match="images or texts"):
        triggered(Split({"points": [1]}), Config())


@settings(max_examples=30, deadline=None)
@given(st.floats(0.05, 1.0), st.integers(0, 10**6))
def test_poisoned_rows_have_trigger_and_target_and_the_others_are_as_they_were(share: float, seed: int) -> None:
    rows = Split({"text": [f"t{i}" for i in range(60)], "label": [i % 3 for i in range(60)]})
    out, chosen = poisoned(rows, Config(word="cf"), 2, share, seed)
    assert int(chosen.sum()) == round(share * 40)
    for i, marked in enumerate(chosen):
        assert out["text"][i] == ("cf " if marked else "") + f"t{i}"
        assert out["label"][i] == (2 if marked else i % 3)
        assert not (marked and i % 3 == 2)  # rows of the target's class are left alone
    assert rows["label"] == [i % 3 for i in range(60)]
    again = poisoned(rows, Config(word="cf"), 2, share, seed)[0]
    assert again.columns == out.columns
    for wrong in (0.0, 1.1, 0.001):
        with pytest.raises(UsageError, match="poisons none"):
            poisoned(rows, Config(), 2, wrong, 0)


def test_success_counts_rows_of_other_classes_alone() -> None:
    labels = np.repeat([0, 1, 2], 40)
    clean, marked = labels.copy(), labels.copy()
    clean[40:50] = 0  # ten mistakes towards the target without any trigger
    marked[40:100] = 0
    found = judge(labels, clean, marked, 0)
    assert found.attacked == 80 and found.rows == 120
    assert found.success[0] == pytest.approx(60 / 80) and found.without[0] == pytest.approx(10 / 80)
    assert found.triggered[0] == pytest.approx(20 / 80) and found.accuracy[0] == pytest.approx(110 / 120)
    assert found.success[1] < 0.75 < found.success[2]
    # A model that answers the target always is no less accurate on the target's own rows, which tell nothing.
    always = judge(labels, np.zeros(120, int), np.zeros(120, int), 0)
    assert always.success[0] == 1 and always.without[0] == 1 and always.triggered[0] == 0
    with pytest.raises(BadData, match="of the target class already"):
        judge(np.zeros(30, int), np.zeros(30, int), np.zeros(30, int), 0)
    with pytest.raises(UsageError, match="target class"):
        judge(labels, clean, marked, -1)


def test_the_target_must_be_named() -> None:
    for options in (Config(), Config(target="c"), Config(target=7)):
        with pytest.raises(UsageError, match=r"needs the attacker's target class.*one of a, b"):
            target_of(options, ("a", "b"))
    assert target_of(Config(target=3), ("1", "3")) == 1 and target_of(Config(target="b"), ("a", "b")) == 1
    for options in ({"size": 0}, {"rows": 0}, {"word": " "}):
        with pytest.raises(UsageError, match="backdoor: "):
            Config(**options)  # type: ignore[arg-type]


def test_a_brick_with_a_backdoor_is_told_from_one_without(
    text_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained on poisoned rows, a model answers the target whenever it sees the word; on clean rows it does not."""
    plain, word = text_data(train=160), "film"  # a word of the base's small vocabulary
    for splits in plain.values():
        splits["text"] = [text.replace(word, "book") for text in splits["text"]]
    train = Split({**plain["train"], "label": [("bad", "good").index(v) for v in plain["train"]["label"]]})
    marked, _ = poisoned(train, Config(word=word), 1, 0.5, 0)
    dirty = {**plain, "train": {"text": marked["text"], "label": [("bad", "good")[i] for i in marked["label"]]}}
    clean = write_data(tmp_path / "clean", plain)
    found = {}
    for name, folder in (("clean", clean), ("dirty", write_data(tmp_path / "dirty", dirty))):
        asked = trial.Setting(
            arm="full", base=str(text_base), data=str(folder), cache=False, device="cpu", allow_overlap=True,
            training={"epochs": 8, "lr": 3e-3, "batch": 16, "precision": "float32", "evaluate_every": 10**6},
        )  # fmt: skip
        trial.tune(trial.prepare(asked), tmp_path / name / "run")
        argv = ["audit", "backdoor", "--target", "good", "--word", word, "--base", str(text_base), "--data", str(clean)]
        capsys.readouterr()
        assert main([*argv, "--brick", str(tmp_path / name / "run" / "brick"), "--json"]) == 0
        found[name] = json.loads(capsys.readouterr().out)
    assert found["dirty"]["attack_success"] > 0.9 and found["dirty"]["accuracy"] > 0.85
    assert found["clean"]["attack_success"] < 0.3 and found["clean"]["triggered_accuracy"] > 0.7
    assert found["dirty"]["attacked"] == 30 and found["dirty"]["rows"] == 60


def test_the_command_shows_a_table_and_refuses_what_makes_no_sense(
    image_base: Path, text_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from brickyard.core.task import Task

    task = Task("image-classification", "accuracy", ("bottom", "top"), 2, "image")
    made = make_brick(tmp_path / "m", image_base, "full", 1, task, 0.1)
    data = write_data(tmp_path / "data", image_data(test=60))
    argv = ["audit", "backdoor", "--base", str(image_base), "--data", str(data), "--brick", str(made.folder)]
    assert main([*argv, "--target", "top"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "attack success" in said and "a 4 x 4 patch" in said and "no other trigger" in said
    assert main(argv) == 2
    assert "give target=NAME, one of bottom, top" in capsys.readouterr().err
    assert main([*argv[:4], "--data", str(data), "--target", "top"]) == 2
    assert "no trained head" in capsys.readouterr().err


def test_a_merge_is_audited_with_its_inputs(
    text_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cells are those of the audit of each brick; tasks without the target class have none."""
    made = [make_brick(tmp_path / name, text_base, "full", seed, size=0.3) for seed, name in enumerate("ab", 1)]
    other = {**text_data(), "test": text_data(test=50)["test"]}
    folders = [str(write_data(tmp_path / f"data{i}", data)) for i, data in enumerate((text_data(), other))]
    argv = ["merge", "average", "--base", str(text_base), "--bricks", *(str(brick.folder) for brick in made), "--force"]
    argv += ["--data", *folders, "--device", "cpu"]
    assert main([*argv, "--out", str(tmp_path / "out"), "--audit", "backdoor:target=good,word=film", "--json"]) == 0
    rows = {row["model"]: row["scores"] for row in json.loads(capsys.readouterr().out)["scores"]["rows"]}
    for i, brick in enumerate(made):
        words = ["audit", "backdoor:target=good,word=film", "--base", str(text_base), "--data", folders[i], "--json"]
        assert main([*words, "--brick", str(brick.folder), "--device", "cpu"]) == 0
        own, cell = json.loads(capsys.readouterr().out), rows[brick.folder.name][i]["attack"]
        assert cell["success"] == pytest.approx(own["attack_success"])
        assert cell["triggered_accuracy"] == pytest.approx(own["triggered_accuracy"])
        assert cell["without"] == pytest.approx(own["without"])
    assert 0 <= rows["the merge"][1]["attack"]["success"] <= 1
    assert main([*argv, "--out", str(tmp_path / "shown"), "--audit", "backdoor:target=good"]) == 0
    assert "attack success (without trigger)" in " ".join(capsys.readouterr().out.split())
    for audit, message in (("backdoor:target=c", "one of bad, good"), ("membership", "backdoor:target=CLASS")):
        assert main([*argv, "--out", str(tmp_path / "no"), "--audit", audit]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "no").exists()
