"""The command line: exit codes, nearest names, run files, and one clear error for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from conftest import text_data, write_data

from brickyard.cli import main, parse
from brickyard.core.errors import UsageError

RESULTS = Path(__file__).parent.parent / "brickyard" / "claims" / "results"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["cmpare"], ["compare"]),
        (["compare", "--method", "lora"], ["--methods"]),
        (["compare", "--methods", "lorra", "--data", "embedded:digits"], ["lorra", "lora"]),
        (["compare", "--methods", "lora:rank=8", "--data", "embedded:digits"], ["rank", "r", "show lora"]),
        (["compare", "--methods", "lora:r=__import__('os')", "--data", "embedded:digits"], ["literal"]),
        (["compare", "--seeds", "0"], ["positive"]),
        (["compare", "--memory", "lots"], ["4GiB"]),
        (["compare", "--search", "grid"], ["random"]),
        (["compare", "--minutes", "nan"], ["positive"]),
        (["tune"], ["ARM"]),
        (["tune", "lora", "--data", "x", "--rr", "3"], ["--rr"]),
        (["tune", "zlora", "--data", "x"], ["lora"]),
        (["show", "lorra"], ["lora"]),
        (["methods", "tunes"], ["tune"]),
        (["verify"], ["--adapter"]),
        (["report", "nowhere"], ["result.json"]),
        (["tune", "lora:r=0", "--data", "embedded:digits"], ["r=0"]),
    ],
)
def test_bad_usage_is_one_clear_line_and_exit_code_2(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("brickyard: ") and "Traceback" not in said
    assert all(word in said for word in words), said


def test_a_methods_own_options_follow_the_arm() -> None:
    args = parse(["tune", "lora:dropout=0.1", "--r", "16", "--data", "d", "--lr=1e-3", "--seed", "3"])
    assert args.arm == "lora:dropout=0.1,lr=0.001,r=16" and args.seed == 3
    with pytest.raises(UsageError, match="lacks its value"):
        parse(["tune", "lora", "--data", "d", "--r"])


def test_a_run_file_gives_options_and_the_command_line_wins(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("methods: [lora, full]\nseeds: 5\nminutes: 2\nmemory: 2GiB\njson: true\n")
    args = parse(["compare", "--config", str(path), "--seeds", "2"])
    assert args.methods == ["lora", "full"] and args.seeds == 2 and args.minutes == 2.0 and args.json is True
    assert args.memory == 2 * 2**30


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sedes: 3\n", ["line 1", "seeds"]),
        ("seeds: true\n", ["bool"]),
        ("trust-remote-code: true\n", ["trust-remote-code"]),
        ("memory: lots\n", ["4GiB"]),
        ("seeds: -1\n", ["positive"]),
    ],
)
def test_a_run_file_is_refused_with_the_reason(
    tmp_path: Path, text: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    assert main(["compare", "--config", str(tmp_path / "run.yaml")]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said


def test_help_of_every_verb_and_the_lists(capsys: pytest.CaptureFixture[str]) -> None:
    from brickyard.cli import VERBS

    for verb in VERBS:
        assert main([verb, "--help"]) == 0
    assert main(["--help"]) == 0 and main(["--version"]) == 0
    capsys.readouterr()
    assert main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows} >= {"lora", "mos", "moment-probing", "adalora"}
    assert all(row.keys() == {"name", "family", "title", "needs", "status", "presets", "claims"} for row in rows)
    assert main(["show", "adalora"]) == 0
    said = capsys.readouterr().out
    assert "init_r = 12" in said and "Ibar" in said and "claims:" in said


def test_unknown_names_are_refused_before_anything_slow_is_imported() -> None:
    """What takes seconds to import; that the answer then takes none is measured by benchmarks/startup.py."""
    slow = ("torch", "transformers", "peft", "numpy", "scipy", "pyarrow", "rich", "accelerate", "datasets")
    code = "import sys; from brickyard.cli import main; code = main(['compare', '--methods', 'lorra']); "
    code += f"print(code, [name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "2 []" and "did you mean lora" in done.stderr


def test_a_users_whole_way(text_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """tune, evaluate, sweep, predict, export both ways, verify both, list."""
    data = write_data(tmp_path / "data", text_data(160))
    common = ["--dtype", "float32", "--device", "cpu"]
    run = [
        "tune",
        "lora:r=4,lr=1e-2,target=all-linear",
        "--base",
        str(text_base),
        "--data",
        str(data),
        "--epochs",
        "10",
        "--batch-size",
        "16",
    ]
    assert main([*run, "--out", str(tmp_path / "run"), *common, "--json"]) == 0
    tuned = json.loads(capsys.readouterr().out)
    brick = tuned["brick"]
    assert tuned["score"]["mean"] > 0.8

    answers = tmp_path / "answers.parquet"
    scored = ["evaluate", "--base", str(text_base), "--brick", brick, "--data", str(data), "--json", "--scale", "0:2:1"]
    assert main([*scored, "--predictions", str(answers), *common]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["score"]["mean"] == pytest.approx(tuned["score"]["mean"])
        and found["score"]["low"] < found["score"]["high"]
    )
    columns = ["index", "label", "prediction", "loss", "label_name", "prediction_name", "logits"]
    assert found["examples"] == 60 and pq.read_table(answers).column_names == columns
    told = pq.read_table(answers).to_pydict()
    assert told["label_name"] == text_data(160)["test"]["label"]  # the classes' names, in the order of the data
    same = [a == b for a, b in zip(told["label"], told["prediction"], strict=True)]
    assert same == [a == b for a, b in zip(told["label_name"], told["prediction_name"], strict=True)]
    assert [p["scale"] for p in found["scale"]] == [0.0, 1.0, 2.0]
    assert found["scale"][1]["mean"] == found["score"]["mean"] > found["scale"][0]["mean"]

    unlabelled = write_data(tmp_path / "new", {"test": {"text": ["a good film", "the awful book"]}})
    assert (
        main(["predict", "--brick", brick, "--data", str(unlabelled), "--out", str(tmp_path / "p.parquet"), *common])
        == 0
    )
    assert set(pq.read_table(tmp_path / "p.parquet")["prediction"].to_pylist()) <= {"good", "bad"}

    for to in ("peft", "merged"):
        assert main(["export", brick, "--to", to, "--out", str(tmp_path / to)]) == 0
    capsys.readouterr()
    verify = ["verify", "--base", str(text_base), "--adapter", str(tmp_path / "peft"), "--data", str(data)]
    assert main([*verify, "--merged", str(tmp_path / "merged")]) == 0, capsys.readouterr().out
    merged = ["evaluate", "--base", str(tmp_path / "merged"), "--data", str(data), "--json", *common]
    capsys.readouterr()
    assert main(merged) == 0
    assert json.loads(capsys.readouterr().out)["score"]["mean"] == pytest.approx(found["score"]["mean"])
    assert main(["bricks", str(text_base), "--in", str(tmp_path), "--json"]) == 0
    rows = {Path(row["folder"]).name: row["arm"] for row in json.loads(capsys.readouterr().out)}
    assert rows == {"brick": "lora:lr=0.01,r=4,target=all-linear", "peft": "LORA r=4"}


def test_training_that_changes_nothing_ends_with_3_and_saves_nothing(
    text_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "data", text_data(32, 24))
    argv = [
        "tune",
        "lora:lr=0",
        "--base",
        str(text_base),
        "--data",
        str(data),
        "--epochs",
        "1",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main([*argv, "--dtype", "float32"]) == 3
    assert "no trainable tensor moved" in capsys.readouterr().err and not (tmp_path / "run" / "brick").exists()


def test_the_tuned_run_resumes_after_a_kill(text_base: Path, tmp_path: Path) -> None:
    """kill -9 in the middle, the same command again: the brick's bits are those of a run that was left alone."""
    data = write_data(tmp_path / "data", text_data(640, 24))
    argv = [
        "tune",
        "lora:r=4",
        "--base",
        str(text_base),
        "--data",
        str(data),
        "--epochs",
        "3",
        "--batch-size",
        "4",
        "--checkpoint-every",
        "10",
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    assert main([*argv, "--out", str(tmp_path / "whole")]) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "brickyard.cli", *argv, "--out", str(tmp_path / "cut")], stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "cut").glob("checkpoints/step-*/state.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (tmp_path / "cut" / "brick").exists(), "the run ended before it could be killed"
    assert main([*argv, "--out", str(tmp_path / "cut")]) == 0
    weights = "brick/adapter_model.safetensors"
    assert (tmp_path / "cut" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def test_a_finished_brick_gives_way_to_its_own_run_alone(
    text_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_data(tmp_path / "data", text_data(32, 24)), tmp_path / "run"
    common = ["--base", str(text_base), "--data", str(data), "--steps", "4", "--device", "cpu", "--out", str(out)]
    assert main(["tune", "linear-probe", *common]) == 0
    weights = next((out / "brick").glob("*.safetensors"))
    kept = weights.read_bytes()
    assert main(["tune", "linear-probe", *common]) == 0
    for other in (["lora", *common], ["linear-probe", *common, "--seed", "3"]):
        capsys.readouterr()
        assert main(["tune", *other]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "the finished brick in" in said and "Use another --out" in said
        assert weights.read_bytes() == kept
    assert main(["tune", "linear-probe", *common, "--seed", "3", "--allow-change", "seed", "training.seed"]) == 0
    assert weights.read_bytes() != kept


@pytest.mark.parametrize("name", sorted(p.stem for p in RESULTS.glob("*.json")))
def test_every_measured_claim_is_shown(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", name]) == 0
    said = capsys.readouterr().out
    claims = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["claims"]
    assert claims and "measured 20" in said
    for claim in claims:
        assert claim["text"] in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_here_is_said_before_anything_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--data", "nowhere", "--methods", "lora", "--device", "cuda"]) == 2
    assert "torch finds no CUDA device here; leave --device out" in capsys.readouterr().err


def test_test_rows_that_stand_in_train_are_told_below_the_limit_too(
    text_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = text_data(64, 40)
    rows["test"]["text"][3] = rows["train"]["text"][5]
    common = ["--base", str(text_base), "--data", str(write_data(tmp_path / "rows", rows)), "--device", "cpu"]
    assert main(["tune", "linear-probe", "--steps", "4", "--out", str(tmp_path / "one"), *common]) == 0
    assert "; 1 of 40 test rows (2.5%) also stand in train." in " ".join(capsys.readouterr().out.split())
    asked = ["compare", "--methods", "linear-probe", "--steps", "4", "--seeds", "1", "--out", str(tmp_path / "all")]
    assert main([*asked, *common]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1 of 40 test rows (2.5%) also stand in train. The report says what the result is without them." in said


def test_validation_rows_can_be_scored_too(text_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = text_data(64, 40)
    rows["validation"] = text_data(30, 0)["train"]
    common = ["--base", str(text_base), "--data", str(write_data(tmp_path / "rows", rows)), "--device", "cpu"]
    assert main(["tune", "linear-probe", "--steps", "4", "--out", str(tmp_path / "one"), *common]) == 0
    scored = ["evaluate", "--brick", str(tmp_path / "one" / "brick"), *common]
    for split, count in (("validation", 30), ("test", 40)):
        capsys.readouterr()
        assert main([*scored, "--split", split]) == 0
        assert f"on {count} {split} examples" in " ".join(capsys.readouterr().out.split())
    del rows["validation"]
    bare = ["evaluate", "--brick", str(tmp_path / "one" / "brick"), "--device", "cpu", "--split", "validation"]
    assert main([*bare, "--data", str(write_data(tmp_path / "other", rows))]) == 2
    assert "no validation split; found: train, test" in " ".join(capsys.readouterr().err.split())


def test_predictions_are_parquet_and_say_so(
    text_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_data(tmp_path / "rows", text_data(8, 8))
    asked = ["predict", "--base", str(text_base), "--data", str(rows), "--out", str(tmp_path / "answers.csv")]
    assert main(asked) == 2
    assert "name a file that ends in .parquet" in capsys.readouterr().err and not (tmp_path / "answers.csv").exists()


def test_evaluate_says_how_many_rows_it_cut(
    text_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_data(tmp_path / "rows", text_data(64, 40))
    common = ["--base", str(text_base), "--data", str(rows), "--device", "cpu"]
    assert main(["tune", "linear-probe", "--steps", "4", "--out", str(tmp_path / "out"), *common]) == 0
    scored = ["evaluate", "--brick", str(tmp_path / "out" / "brick"), *common]
    capsys.readouterr()
    assert main(scored) == 0 and "truncated" not in capsys.readouterr().out
    assert main([*scored, "--max-length", "4"]) == 0
    assert "of 40 rows were truncated to 4 tokens" in capsys.readouterr().out
