"""PVP: a tuner begins exactly where another task's training left its modules, and nothing else comes along."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_text_base, text_data

import brickyard
from brickyard.checks import _runs
from brickyard.checks import pvp as check
from brickyard.checks.pvp import SHOTS, TUNERS, halves, judged, search_rows, shrinks
from brickyard.checks.run import Answers
from brickyard.core import trial
from brickyard.core.arm import parse
from brickyard.core.build import build, resolve
from brickyard.core.chosen import initialise
from brickyard.core.errors import Refused, UsageError, WrongBase
from brickyard.core.trial import Setting, prepare
from brickyard.tune import pvp

ARMS = ("lora:r=2", "iapt:bottleneck=8,constant=true", "lst:r=2,init=random", "mos:r=3,e=2,p=1,l=2")


def other_labels() -> dict[str, dict[str, list]]:
    """The same texts under two classes in place of their own, so that the head has another shape."""
    return {
        split: {"text": rows["text"], "label": ["odd" if len(t) % 2 else "even" for t in rows["text"]]}
        for split, rows in text_data().items()
    }


def upstream(arm: str, base: Path, folder: Path, **more: Any) -> Path:
    training = {"epochs": 1, "batch": 8, "lr": 1e-2}
    given = {"base": str(base), "data": other_labels(), "training": training, "device": "cpu", **more}
    brick, _ = brickyard.tune(arm, out=folder, **given)
    return brick.folder


@pytest.mark.parametrize("arm", ARMS)
def test_modules_begin_where_the_other_task_left_them(arm: str, text_base: Path, tmp_path: Path) -> None:
    folder = upstream(arm, text_base, tmp_path / "up")
    ready = prepare(Setting(arm=f"{arm} + pvp:brick={folder}", base=str(text_base), data=text_data(), device="cpu"))
    attached = build(ready.plan, ready.base, ready.task, seed=0)
    fresh = attached.tensors()
    report = initialise(ready, attached)["pvp"]
    stored, now = brickyard.load(folder).tensors(), attached.tensors()
    names = pvp.modules_of(attached)
    assert report["tensors"] == len(names) > 0
    assert all(torch.equal(now[n], stored[n]) for n in names)
    assert any(not torch.equal(fresh[n], stored[n]) for n in names)
    assert all(torch.equal(now[n], fresh[n]) for n in now if n not in names)  # the head is new
    # Before any step the features are those of the first stage, bit for bit.
    model: Any = brickyard.load(folder).apply(ready.base).model
    ids = torch.randint(4, 20, (3, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = brickyard.api.backbone(model.eval())(input_ids=ids).last_hidden_state
        found = brickyard.api.backbone(attached.model.eval())(input_ids=ids).last_hidden_state
    assert torch.equal(wanted, found)


def test_a_run_starts_there_and_its_brick_needs_it_no_more(text_base: Path, tmp_path: Path) -> None:
    folder = upstream("lora:r=2", text_base, tmp_path / "up")
    training = {"epochs": 2, "batch": 8}
    given: dict[str, Any] = {"base": str(text_base), "data": text_data(), "training": training, "device": "cpu"}
    brick, result = brickyard.tune(f"lora:r=2 + pvp:brick={folder}", out=tmp_path / "run", **given)
    assert result["chosen"]["pvp"]["from"] == [str(folder)]
    frozen, kept = brickyard.tune(f"lora:r=2 + pvp:brick={folder},freeze=true", out=tmp_path / "frozen", **given)
    stored, after = brickyard.load(folder).tensors(), frozen.tensors()
    modules = [n for n in after if "lora_" in n]
    assert modules and all(torch.equal(after[n], stored[n]) for n in modules)
    assert kept["cost"]["trainable_parameters"] < result["cost"]["trainable_parameters"]
    folder.rename(tmp_path / "gone")
    again = brickyard.evaluate(brick=brick.folder, data=text_data(), device="cpu")
    assert again["score"]["mean"] == pytest.approx(result["score"]["mean"], abs=1e-6)


def test_of_several_bricks_the_mean_is_taken(text_base: Path, tmp_path: Path) -> None:
    folders = [upstream("lora:r=2", text_base, tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    arm = f"lora:r=2 + pvp:brick=[{folders[0]},{folders[1]}]"
    ready = prepare(Setting(arm=arm, base=str(text_base), data=text_data(), device="cpu"))
    attached = build(ready.plan, ready.base, ready.task, seed=0)
    initialise(ready, attached)
    a, b = (brickyard.load(folder).tensors() for folder in folders)
    for name in pvp.modules_of(attached):
        torch.testing.assert_close(attached.tensors()[name], (a[name] + b[name]) / 2)


def test_options_are_compared_as_they_are_read_not_as_they_are_written(text_base: Path, tmp_path: Path) -> None:
    folder = upstream("lora", text_base, tmp_path / "up")
    given: dict[str, Any] = {"base": str(text_base), "data": text_data(), "device": "cpu"}
    ready = prepare(Setting(arm=f"lora:alpha=16,r=8 + pvp:brick={folder}", **given))
    attached = build(ready.plan, ready.base, ready.task, seed=0)
    assert initialise(ready, attached)["pvp"]["tensors"] == len(pvp.modules_of(attached)) > 0


def test_what_does_not_fit_is_refused(text_base: Path, tmp_path: Path) -> None:
    folder = upstream("lora:r=2", text_base, tmp_path / "up")
    given: dict[str, Any] = {"data": text_data(), "device": "cpu"}
    with pytest.raises(UsageError, match="the same tuner was expected: lora:r=4"):
        trial.tune(prepare(Setting(arm=f"lora:r=4 + pvp:brick={folder}", base=str(text_base), **given)), tmp_path / "a")
    other = make_text_base(tmp_path / "other", seed=5)
    with pytest.raises(WrongBase, match="only fit the base"):
        trial.tune(prepare(Setting(arm=f"lora:r=2 + pvp:brick={folder}", base=str(other), **given)), tmp_path / "b")
    with pytest.raises(UsageError, match="is missing"):
        resolve(parse("lora + pvp"))
    with pytest.raises(Refused, match="beside a tuner"):
        resolve(parse(f"linear-probe + pvp:brick={folder}"))


def test_the_claim_is_judged_on_common_draws() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 400)

    def made(right: float) -> Answers:
        good = rng.random((5, 400)) < right
        return Answers(labels, np.where(good, labels, (labels + 1) % 4))

    share = {1: 0.4, 2: 0.5, 16: 0.8}
    found = {(n, k): made(share[k]) for n in (*TUNERS, *(f"{n} noise" for n in TUNERS), "probe") for k in SHOTS}
    for name in TUNERS:
        found |= {(f"{name} pvp", k): made(share[k] + (0.2 if k < 16 else 0.03)) for k in SHOTS}
        found |= {(f"{name} frozen", k): made(share[k]) for k in SHOTS}
    out = judged(found)
    assert [out[part]["holds"] for part in ("prompts", "lora", "shape")] == [True, True, True]
    assert all(out[part]["control"]["destroyed"] for part in out)
    assert out["prompts"]["control"]["what"].startswith("prompts") and "lora" in out["lora"]["control"]["inequality"]
    assert out["prompts"]["inequality"].endswith("with 1 and 2 examples a class and pvp >= fresh + 0 with 16")
    assert "beats the frozen-theta* probe with 1 and 2" in out["prompts"]["detail"]
    half = np.where(np.arange(5)[:, None] < 2, made(0.1).predictions, made(0.9).predictions)
    unsure = judged({**found, ("prompts noise", 1): Answers(labels, half)})["prompts"]
    assert unsure["control"]["holds"] == "undecided" and not unsure["control"]["destroyed"]
    assert "the control is undecided" in unsure["detail"] and "undecided" not in out["prompts"]["detail"]
    # With sixteen examples the prompts must not lose either.
    lost = judged({**found, ("prompts pvp", 16): made(0.6)})["prompts"]
    assert lost["holds"] is False and lost["measured"] < -10
    flat = judged({**found, **{("lora pvp", k): made(share[k] - 0.1) for k in SHOTS}})
    assert flat["lora"]["holds"] is False
    nothing = judged({**found, ("lora", 16): made(0.4)})
    assert nothing["prompts"]["holds"] == "set-up invalid"


def test_the_gain_shrinks_only_if_it_does_so_from_one_draw_of_examples_to_the_next() -> None:
    labels = np.zeros(1000, dtype=int)

    def right(shares: list[float]) -> Answers:
        return Answers(labels, np.stack([(np.arange(1000) >= 1000 * share).astype(int) for share in shares]))

    def told(gains: list[float]) -> tuple[float, float, float]:
        found = {("prompts", k): right([0.3] * 5) for k in (1, 16)}
        found |= {("prompts pvp", 1): right([0.3 + g for g in gains]), ("prompts pvp", 16): right([0.3] * 5)}
        return shrinks(found, 1, 16)

    low, mean, high = told([0.5, -0.2, 0.6, -0.25, 0.1])  # 15 points on average, from draws that say this and that
    gains = 100 * np.array([0.5, -0.2, 0.6, -0.25, 0.1])
    reach = 2.776445 * gains.std(ddof=1) / 5**0.5  # Student's t with 4 degrees of freedom
    assert mean == pytest.approx(15) and (low, high) == (pytest.approx(15 - reach), pytest.approx(15 + reach))
    assert low < 0 < told([0.14, 0.15, 0.16, 0.15, 0.15])[0]
    single = {(name, k): right([0.3]) for name in ("prompts", "prompts pvp") for k in (1, 16)}
    assert shrinks(single, 1, 16) == (-200, 0, 200)  # one draw tells nothing


def test_classes_are_dealt_to_two_sides() -> None:
    up, down = halves("embedded:stdlib-topics")
    sides = [set(rows["train"]["label"]) for rows in (up, down)]
    assert not sides[0] & sides[1] and min(map(len, sides)) > 2
    assert all(set(rows["test"]["label"]) == side for rows, side in zip((up, down), sides, strict=True))


def test_rates_are_searched_on_other_classes_than_those_that_judge() -> None:
    up, down = halves("embedded:stdlib-topics")
    rows = search_rows(up)
    assert set(rows["validation"]["label"]) == set(up["train"]["label"]) and len(rows["validation"]["text"]) == 300
    assert sorted(Counter(rows["train"]["label"]).values()) == [2] * 4
    seen = set(rows["train"]["text"]) | set(rows["validation"]["text"])
    assert not seen & {*up["train"]["text"], *down["test"]["text"], *down["train"]["text"]}
    assert not set(rows["train"]["text"]) & set(rows["validation"]["text"])


def test_the_check_runs_and_every_start_searches_the_same_grid(
    text_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[str] = []

    def here(jobs: Any, workers: int, folder: Path) -> dict[str, Any]:
        searched.extend(job.key for job in jobs if job.argument.get("role") == "search")
        return {job.key: trial.run(job.argument) for job in jobs}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_runs, "finished", here)
    monkeypatch.setattr(check, "SHOTS", (1, 16))
    monkeypatch.setattr(check, "GRID", (1e-3, 1e-2))
    monkeypatch.setattr(check, "STEPS", 4)
    given = text_data(128)
    data = {}
    for split, rows in given.items():
        label = [f"{v} {i // 2 % 2}" for i, v in enumerate(rows["label"])]
        data[split] = {"text": rows["text"], "label": label}
    claim = replace(pvp.RECORD.claims[0], base=str(text_base), data=data, seeds=1, max_length=16)  # type: ignore[arg-type]
    found = check.by_shots(claim, upstream_rows=16)
    assert found.keys() == {"prompts", "lora", "shape"}
    names = [f"{name}{more}" for name in TUNERS for more in ("", " pvp", " frozen")]
    assert sorted(searched) == sorted(f"{name} {lr}" for name in names for lr in (1e-3, 1e-2))
    settings = found["prompts"]["figures"]["settings"]
    assert settings["prompts noise"] == settings["prompts pvp"] and "lr=" in settings["lora"]
    assert "lora noise@1" in found["lora"]["figures"]["means"]
