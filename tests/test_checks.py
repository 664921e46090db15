"""Claims: how an inequality is read and judged, and that gates and controls decide what they should."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import text_data, write_data

from brickyard import listing
from brickyard.checks import _data
from brickyard.checks import run as checks
from brickyard.checks._takes import taken, takes
from brickyard.checks.run import Answers, Inequality, judge
from brickyard.cli import main
from brickyard.compare import run as compare_run
from brickyard.compare.plan import Contestant, Request
from brickyard.core import registry
from brickyard.core.arm import parse
from brickyard.core.build import resolve
from brickyard.core.errors import BadData, RunFailed, UsageError
from brickyard.core.method import Claim, Record
from brickyard.core.task import Task

# What the embedded sets that claims name pose, in as few classes as a task can have.
TASKS = {
    "embedded:stdlib-topics": Task("text-classification", "accuracy", ("a", "b"), 2, "text"),
    "embedded:digits": Task("image-classification", "accuracy", ("0", "1"), 2, "image"),
    "embedded:docstring-pairs": Task("preference", "accuracy", None, 1, "text"),
    "embedded:python-tests": Task("causal-lm", "bits_per_byte", None, 1, "text"),
}


def answers(rates: list[float], n: int = 4000, seed: int = 0) -> Answers:
    """Seeds of an arm that is right on a share of the examples, the same ones first."""
    g = np.random.Generator(np.random.PCG64(seed))
    labels = g.integers(0, 2, n)
    hard = np.random.Generator(np.random.PCG64(9)).random(n)
    return Answers(
        labels=np.zeros(n, dtype=int), predictions=np.stack([(hard > r).astype(int) for r in rates]) + 0 * labels
    )


def test_inequalities_are_read_in_points() -> None:
    assert Inequality.read("mos >= lora16 - 0.7") == Inequality("mos", "lora16", -0.7)
    assert Inequality.read("lora > control + 5") == Inequality("lora", "control", 5.0, strict=True)
    assert Inequality.read("a>=b") == Inequality("a", "b", 0.0)
    assert Inequality.read("mos >= 0.9 lora16 + 1") == Inequality("mos", "lora16", 1.0, 0.9)
    for bad in ("a < b", "a >= b * 2", "a >= b - c", "a >= 2 b", "0.9 a >= b", ""):
        with pytest.raises(UsageError, match="no inequality"):
            Inequality.read(bad)


def test_holds_misses_and_undecided() -> None:
    known = {
        "good": answers([0.90, 0.91, 0.90]),
        "bad": answers([0.80, 0.81, 0.80]),
        "same": answers([0.90, 0.90, 0.91]),
    }
    assert judge(Inequality("good", "bad", 5.0), known, "accuracy")["holds"] is True
    assert judge(Inequality("bad", "good", -5.0), known, "accuracy")["holds"] is False
    close = judge(Inequality("good", "same", 0.0), known, "accuracy")
    assert close["holds"] == "undecided" and close["needed"]["sentence"]
    assert judge(Inequality("good", "same", -3.0), known, "accuracy")["holds"] is True


def bits(per_byte: list[float], n: int = 200) -> Answers:
    """Seeds of a language model that needs so many bits a byte of documents of 100 bytes, with noise of its own."""
    g = np.random.Generator(np.random.PCG64(0))
    hard = g.random(n)
    nats = [np.log(2) * 100 * (b + 0.1 * hard + 0.001 * g.standard_normal(n)) for b in per_byte]
    return Answers(labels=np.full(n, 100), predictions=np.stack(nats))


def test_a_share_of_a_gain_is_counted_from_the_untouched_base() -> None:
    known = {"base": bits([2.0, 2.0, 2.0]), "full": bits([1.5, 1.501, 1.5]), "most": bits([1.54, 1.541, 1.54])}
    for text, holds in (
        ("most >= full", False),
        ("most >= 0.9 full", True),  # 0.46 of 0.5: 92 %
        ("most >= 0.95 full", False),
        ("full > base + 49.0", True),
        ("full > base + 51.0", False),
        ("full >= most + 3.0", True),
    ):
        found = judge(Inequality.read(text), known, "bits_per_byte", base=known["base"])
        assert found["holds"] is holds, text
        assert found["low"] <= found["measured"] <= found["high"]
    found = judge(Inequality.read("most >= 0.9 full"), known, "bits_per_byte", base=known["base"])
    assert found["measured"] == pytest.approx(100 * (0.9 * 1.5 + 0.1 * 2.0 - 1.54), abs=0.05), (
        "0.01 bits a byte to spare"
    )
    assert judge(Inequality.read("most > full"), known, "bits_per_byte")["holds"] is True, "plain values without a base"
    with pytest.raises(UsageError, match="no gain over an untouched base"):
        judge(Inequality.read("a >= 0.9 b"), {"a": answers([0.9]), "b": answers([0.8])}, "accuracy")


def test_every_claim_in_the_records_is_well_formed() -> None:
    for entry in registry.records():
        for claim in entry.record.claims:
            if claim.measure:
                continue
            language = claim.data == "embedded:python-tests"
            names = {*claim.arms, "control", *(["base"] if language else ["majority", "coin"])}
            for text in filter(None, [claim.inequality, claim.gate, claim.control.get("inequality", "")]):
                found = Inequality.read(text)
                assert {found.left, found.right} <= names, (entry.record.name, text)
                assert found.share == 1 or language, (entry.record.name, text)
            # Whatever else is named, a check runs anywhere.
            assert claim.data.split("|")[-1].startswith("embedded:") and claim.base.startswith("embedded:")
            assert not any("lr=0" in arm.replace("lr=0.", "") for arm in claim.arms.values()), (
                "a run without effect fails"
            )


def test_every_check_names_arms_that_can_be_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A check meets its controls hours after it began: all it names must be arms of the task, each by one name."""
    ran: list[str] = []

    def stop(request: Request, folder: Path, *, arms: list[Contestant], **_: Any) -> None:
        data = str(request.data).split("|")[-1]  # of several sets the embedded one stands last
        for arm in arms:
            resolve(parse(arm.arm), TASKS[data])
        ran.append(data)
        raise RunFailed("nothing is trained here")

    monkeypatch.setattr(checks, "compare", stop)
    monkeypatch.chdir(tmp_path)
    for entry in registry.records():
        for full in (False, True):
            groups: dict[str, list[Claim]] = {}
            for claim in (replace(c, **c.full) if full else c for c in entry.record.claims if not c.measure):
                groups.setdefault(checks.setup_of(claim), []).append(claim)
            for claims in groups.values():
                with pytest.raises(RunFailed, match="nothing is trained here"):
                    checks._Run.of(entry.record.name, claims, lambda event: None)
    assert set(ran) == TASKS.keys()


def test_learning_rates_are_searched_on_each_arms_own_scale() -> None:
    claim = Claim(text="t", inequality="a >= b", lr_factors=(1.0, 3.0))
    assert checks._settings(claim, "full") == ({"lr": 1e-4}, {"lr": 3e-4})
    assert checks._settings(claim, "lora") == ({"lr": 1e-3}, {"lr": 3e-3})
    assert checks._settings(claim, "lora:lr=1e-2") == ({},)
    assert checks._settings(Claim(text="t", inequality="a >= b", lrs=(2e-3,)), "full") == ({"lr": 2e-3},)
    assert checks._settings(Claim(text="t", inequality="a >= b"), "full") == ({},)


@pytest.mark.parametrize("chosen, at_end", [("1e-3", True), ("3e-3", False), ("1e-2", True)])
def test_a_search_that_ends_at_an_end_of_its_grid_is_told(chosen: str, at_end: bool, tmp_path: Path) -> None:
    claim = Claim(text="t", inequality="a >= b", arms={"a": "lora", "b": "lora:lr=1e-3"}, lr_factors=(1.0, 3.0, 10.0))
    rows = {"a": {"setting_arm": f"lora:lr={chosen}"}, "b": {"setting_arm": "lora:lr=1e-3"}}
    run = checks._Run(tmp_path, {}, rows, {}, {})
    assert run._at_end(claim, "a") is at_end and not run._at_end(claim, "b")
    assert not run._at_end(replace(claim, lr_factors=(1.0,)), "a")


def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base: Path, claim: Claim) -> dict[str, Any]:
    entry = registry.find("lora")
    faked = registry.Entry(Record(name="lora", family="tune", title="t", claims=(claim,)), entry.path, entry.options)
    monkeypatch.setattr(checks.registry, "find", lambda name, family=None: faked if name == "lora-claim" else entry)
    monkeypatch.chdir(tmp_path)
    return checks.check("lora-claim", base=str(base), data=text_data(160, 120), out=tmp_path / "results")


def test_a_claim_is_measured_with_its_gate_and_control(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text_base: Path
) -> None:
    claim = Claim(
        text="learning beats not learning",
        inequality="lora > majority + 5.0",
        arms={"lora": "lora:r=8,lr=5e-3,batch=8,target=all-linear"},
        control={
            "what": "shuffled labels",
            "arm": "lora:r=8,lr=5e-3,batch=8,target=all-linear",
            "labels": "shuffled",
            "inequality": "lora > control + 5.0",
        },
        control_seeds=1,
        gate="lora > majority + 1.0",
        epochs=12,
        seeds=3,
    )
    found = check(monkeypatch, tmp_path, text_base, claim)["claims"][0]
    assert found["holds"] is True and found["control"]["destroyed"] is True and found["gate"]["holds"] is True
    assert {name: len(arm["per_seed"]) for name, arm in found["arms"].items()} == {"lora": 3, "control": 1}
    assert found["arms"]["lora"]["mean"] > 0.8 > found["arms"]["control"]["mean"]
    stored = json.loads((tmp_path / "results" / "lora-claim.json").read_text())
    assert stored.keys() == {"method", "claims", "environment", "full", "seconds", "date"}
    assert stored["claims"][0].keys() >= {
        "text",
        "inequality",
        "arms",
        "measured",
        "low",
        "high",
        "holds",
        "kind",
        "control",
    }


def test_a_claim_names_public_data_and_what_stands_in_for_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_data, "SHARED", Path("public"))
    assert _data.at_hand("words|embedded:stdlib-topics") == "embedded:stdlib-topics"
    with pytest.raises(BadData, match=r"no folder public/words or public/topics is here; put it there"):
        _data.at_hand("words|topics")
    write_data(tmp_path / "public" / "words", text_data(48, 60))
    assert _data.at_hand("words|embedded:stdlib-topics") == str(Path("public") / "words")
    assert _data.at_hand("embedded:digits") == "embedded:digits" and _data.at_hand("./here") == "./here"
    pairs, images = text_data(8, 8, pair=True), {"train": {"image": [b""], "label": ["a"]}}
    assert _data.same_input("public/words", text_data(8, 8))
    assert not any(_data.same_input(other, "public/words") for other in (pairs, images))


def test_data_replace_those_of_claims_that_read_their_kind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text_base: Path
) -> None:
    monkeypatch.setattr(_data, "SHARED", tmp_path / "public")
    write_data(tmp_path / "public" / "words", text_data(48, 60))
    write_data(tmp_path / "public" / "couples", text_data(48, 60, pair=True))
    common: dict[str, Any] = {
        "inequality": "lora > majority - 90.0", "arms": {"lora": "lora:r=2,batch=16"}, "epochs": 1, "seeds": 1,
        "base": str(text_base),
    }  # fmt: skip
    claims = [Claim(text=name, data=f"{name}|embedded:stdlib-topics", **common) for name in ("words", "couples")]
    claims.append(Claim(text="nowhere", data="absent", **common))
    entry = registry.find("lora")
    faked = registry.Entry(Record(name="lora", family="tune", title="t", claims=tuple(claims)), entry.path, {})
    monkeypatch.setattr(checks.registry, "find", lambda name, family=None: faked if name == "claims" else entry)
    monkeypatch.chdir(tmp_path)
    found = checks.check("claims", data=text_data(32, 40), out=tmp_path / "results")["claims"]
    assert [claim.get("rows", {}).get("test") for claim in found] == [40, 60, None]  # pairs stay what they were
    assert found[1]["data"] == "couples" and found[1]["holds"] is True
    assert found[2]["holds"] == "skipped" and "absent is here" in found[2]["detail"] and found[2]["measured"] is None
    with pytest.raises(UsageError, match="another kind of input"):
        checks.check("claims", data={"train": {"image": [b""], "label": ["a"]}}, out=tmp_path / "results")


def test_a_closed_gate_says_set_up_invalid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text_base: Path) -> None:
    claim = Claim(
        text="nothing was learned",
        inequality="lora > majority - 50.0",
        arms={"lora": "lora:r=4,lr=1e-8,batch=16"},
        gate="lora > majority + 5.0",
        epochs=1,
        seeds=2,
    )
    assert check(monkeypatch, tmp_path, text_base, claim)["claims"][0]["holds"] == "set-up invalid"
    # "Re-measured on demand": a finished check that is asked for again trains again, an interrupted one goes on.
    trials = (tmp_path / "runs").glob("checks/*/trials/*/result.json")
    old = {path: path.stat().st_mtime_ns for path in trials}
    (next(iter(old)).parents[2] / checks.FINISHED).unlink()
    check(monkeypatch, tmp_path, text_base, claim)
    assert {path: path.stat().st_mtime_ns for path in old} == old
    check(monkeypatch, tmp_path, text_base, claim)
    assert len(old) == 2 and all(path.stat().st_mtime_ns > before for path, before in old.items())


def test_the_fine_tuning_of_halo_takes_as_many_steps_as_its_card() -> None:
    claim = registry.find("halo").record.claims[1]
    steps = [round(one.epochs * one.train_rows / one.batch) for one in (claim, replace(claim, **claim.full))]
    assert steps == [300, 300]


def faked(monkeypatch: pytest.MonkeyPatch, **measures: Any) -> list[Claim]:
    """A method whose claims are measured by functions that note what they were given."""
    seen: list[Claim] = []

    def measure(names: tuple[str, ...]) -> Any:
        @takes(*names)
        def measured(claim: Claim) -> dict[str, Any]:
            seen.append(claim)
            return {"holds": True, "inequality": "a > b", "measured": 1.0, "detail": "as it should"}

        return measured

    module = ModuleType("brickyard.checks.lora")
    for name, names in measures.items():
        setattr(module, name, measure(names))
    monkeypatch.setitem(sys.modules, "brickyard.checks.lora", module)
    entry = registry.find("lora")
    claims = tuple(Claim(text=name, measure=name) for name in measures)
    record = Record(name="lora", family="tune", title="t", claims=claims)
    monkeypatch.setattr(
        checks.registry, "find", lambda name, family=None: registry.Entry(record, entry.path, entry.options)
    )
    return seen


def test_a_measurement_takes_the_base_and_data_it_was_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = faked(monkeypatch, both=("base", "data"), steps=("base",), own=())
    rows = text_data(24, 20)
    result = checks.check("any", base="mine", data=rows, out=tmp_path)
    assert [(c.base, c.data) for c in seen] == [
        ("mine", rows),
        ("mine", Claim(text="").data),
        (Claim(text="").base, Claim(text="").data),
    ]
    details = [claim["detail"] for claim in result["claims"]]
    assert details[0] == "as it should" and "--data does not change" in details[1] and "--base" not in details[1]
    assert "--base does not change" in details[2] and "--data does not change" in details[2]
    stored = json.loads((tmp_path / "any.json").read_text())["claims"]
    assert [claim["detail"] for claim in stored] == details


def test_one_claim_is_measured_alone_and_what_is_known_of_the_others_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = faked(monkeypatch, first=("base",), second=("base",), third=("base",))
    texts = [claim.text for claim in checks.registry.find("any").record.claims]
    alone = checks.check("any", only=[2], out=tmp_path)
    assert [claim["text"] for claim in alone["claims"]] == texts[1:2] and len(seen) == 1, "nothing is known of the rest"
    stored = json.loads((tmp_path / "any.json").read_text())
    del stored["claims"][0]["date"]  # as files were written before claims had dates of their own
    (tmp_path / "any.json").write_text(json.dumps({**stored, "date": "2001-02-03"}))
    found = checks.check("any", base="mine", only=[3, 1], out=tmp_path)["claims"]
    assert [claim["text"] for claim in found] == texts and len(seen) == 3
    assert [claim["date"] == "2001-02-03" for claim in found] == [False, True, False]
    assert json.loads((tmp_path / "any.json").read_text())["claims"] == found
    assert main(["check", "any", "--claim", "2", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "any holds: second" in said and "first" not in said, "nothing else was measured"
    for wrong in (0, 4):
        with pytest.raises(UsageError, match=f"any has no claim {wrong}; they count from 1 to 3"):
            checks.check("any", only=[wrong], out=tmp_path)


@pytest.mark.parametrize(
    ("control", "code"),
    [
        ({"destroyed": False}, 3),
        ({"destroyed": np.bool_(False)}, 3),
        ({"destroyed": True}, 0),
        ({"destroyed": None}, 0),
        ({}, 0),
        (None, 0),
    ],
)
def test_a_control_that_is_not_destroyed_is_told_and_no_success(
    control: dict[str, Any] | None, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    faked(monkeypatch, first=())
    about = {"what": "labels [shuffled]", "inequality": "a > control", "measured": 7.0, "low": 6.5, "high": 7.5}

    @takes()
    def measured(claim: Claim) -> dict[str, Any]:
        return {
            "holds": True, "inequality": "a > b", "detail": "as it should", "measured": 8.0,
            "control": control if control is None else about | control,
        }  # fmt: skip

    monkeypatch.setattr(sys.modules["brickyard.checks.lora"], "first", measured)
    results = tmp_path / "claims" / "results"
    assert main(["check", "lora", "--out", str(results)]) == code
    said = " ".join(capsys.readouterr().out.split())
    told = "labels [shuffled]: a > control; measured 7.00 (6.50 to 7.50)"
    assert json.loads((results / "lora.json").read_text())["claims"][0]["holds"] is True
    word = "holds, control not destroyed" if code else "holds"
    assert f"lora {word}: first" in said
    assert (f"negative control not destroyed: {told}" in said) is bool(code)
    monkeypatch.setattr(listing.resources, "files", lambda package: tmp_path)
    assert listing.verdict_of("lora") == word.replace(", control not destroyed", " (control not destroyed)")
    assert main(["show", "lora"]) == 0
    said = capsys.readouterr().out
    assert f"{word}: a > b; measured 8.00" in said
    assert (f"control: {told}: gain NOT destroyed" in said) is bool(code)
    if control is not None and not code:
        assert f"labels [shuffled]: gain {'destroyed' if control.get('destroyed') else 'not judged'}" in said


def test_a_verdict_counts_the_claims(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    faked(monkeypatch, first=(), second=(), third=())
    monkeypatch.setattr(listing.resources, "files", lambda package: tmp_path)
    path = tmp_path / "claims" / "results" / "lora.json"
    path.parent.mkdir(parents=True)
    for said, expected in (
        ((True, True, True), "all 3 hold"),
        ((True, True), "2 hold, 1 not measured"),
        ((False, True, False), "1 holds, 2 do not hold"),
        (("undecided", "undecided", True), "1 holds, 2 undecided"),
    ):
        texts = [claim.text for claim in listing.registry.find("lora").record.claims]
        claims = [{"text": text, "holds": holds} for text, holds in zip(texts, said, strict=False)]
        path.write_text(json.dumps({"claims": claims}))
        assert listing.verdict_of("lora") == expected


def test_what_is_kept_of_a_claim_says_how_it_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faked(monkeypatch, first=(), second=(), third=())
    path = tmp_path / "claims" / "results" / "lora.json"
    checks.check("lora", full=True, out=path.parent)
    stored = json.loads(path.read_text())
    assert not any(key in claim for claim in stored["claims"] for key in ("environment", "full", "seconds"))
    here = stored["environment"]
    older = {**stored, "environment": here | {"cpu": "old silicon", "threads": 99}, "seconds": 4321.0}
    path.write_text(json.dumps(older))  # a file as it was written before claims said this of themselves
    for last in (2, 3):
        checks.check("lora", only=[last], out=path.parent)
        stored = json.loads(path.read_text())
        first = stored["claims"][0]
        assert {key: first[key] for key in ("environment", "full", "seconds")} == {
            key: older[key] for key in ("environment", "full", "seconds")
        }
        assert (stored["environment"], stored["full"]) == (here, False)
        assert not {"environment", "full"} & stored["claims"][last - 1].keys()
    assert "seconds" in stored["claims"][1] and "full" not in stored["claims"][1], "of the second check, as the third"
    monkeypatch.setattr(listing.resources, "files", lambda package: tmp_path)
    assert main(["show", "lora"]) == 0
    said = capsys.readouterr().out.partition("claims:")[2]
    assert said.count("in 4321 s, on old silicon, with 99 threads, --full") == 1 and said.count("--full") == 1
    assert f"measured {stored['date']} in {stored['seconds']:.0f} s on {here['cpu']}\n" in said
    checks.check("lora", out=path.parent)
    stored = json.loads(path.read_text())
    assert not any(key in claim for claim in stored["claims"] for key in ("environment", "full", "seconds"))


def test_an_interrupted_check_goes_on_only_with_the_same_libraries_base_and_data(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text_base: Path, causal_base: Path
) -> None:
    folders: list[Path] = []

    def stop(request: Request, folder: Path, **_: Any) -> None:
        folders.append(folder)
        raise RunFailed("interrupted")

    def start() -> Path:
        with pytest.raises(RunFailed, match="interrupted"):
            checks.check("any", base="base", data="data", out=tmp_path / "results")
        return folders[-1]

    claim = Claim(text="t", inequality="a >= majority", arms={"a": "lora:r=2"}, data="embedded:stdlib-topics")
    entry = registry.find("lora")
    record = Record(name="lora", family="tune", title="t", claims=(claim,))
    monkeypatch.setattr(checks, "compare", stop)
    monkeypatch.setattr(
        checks.registry, "find", lambda name, family=None: replace(entry, record=record) if name == "any" else entry
    )
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data", text_data(48, 60))
    (tmp_path / "base").symlink_to(text_base)
    seen = [start()]
    assert start() == seen[0]
    write_data(tmp_path / "data", text_data(40, 60))
    seen.append(start())
    (tmp_path / "base").unlink()
    (tmp_path / "base").symlink_to(causal_base)
    seen.append(start())
    monkeypatch.setattr(compare_run.measure, "environment", lambda: {"numpy": "99.0"})
    seen.append(start())
    assert len(set(seen)) == 4


def test_an_option_that_changes_no_claim_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = faked(monkeypatch, steps=("base",), own=())
    with pytest.raises(UsageError, match="was given --data, but every claim of it is measured on material of its own"):
        checks.check("any", base="mine", data="rows", out=tmp_path)
    assert not seen and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "option"), [("lightning-attention", "base"), ("one-byte", "data"), ("zo2", "data")])
def test_methods_whose_claims_have_no_base_or_data_say_so(name: str, option: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {option: "mine"}
    with pytest.raises(UsageError, match=f"check {name} was given --{option}"):
        checks.check(name, **given, out=tmp_path)


def test_every_measurement_that_reads_its_claims_base_or_data_says_so() -> None:
    """By its source: nothing else that a measurement calls would tell before it has been running for minutes."""
    for entry in registry.records():
        for claim in entry.record.claims:
            if not claim.measure:
                continue
            module = importlib.import_module(f"brickyard.checks.{entry.path.stem}")
            function = getattr(module, claim.measure)
            source = inspect.getsource(function)
            for name in ("base", "data"):
                if f"claim.{name}" in source or "asked_by(claim" in source:
                    assert name in taken(function), (entry.record.name, claim.measure, name)
