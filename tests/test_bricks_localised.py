"""What configurable-bricks finds: planted neurons, the judgement, prompts in halves, the command and its check."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS, write_data
from test_configurable_bricks import prompts
from torch import Tensor, nn

from brickyard import embedded
from brickyard.audit import _neurons as neurons
from brickyard.audit._localised import NONE, Found, judged
from brickyard.audit._prompts import halves
from brickyard.audit.configurable_bricks import (
    Config,
    dealt_anew,
    kept,
    localise,
    scored,
)
from brickyard.checks import configurable_bricks as checks
from brickyard.cli import main
from brickyard.core import registry
from brickyard.core.base import open_base
from brickyard.core.data import read_data
from brickyard.core.encoded import IGNORED
from brickyard.core.errors import UsageError
from brickyard.core.ffn import every_ffn
from brickyard.embedded import python_kinds


class Block(nn.Module):
    def __init__(self, width: int, neurons_F: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, neurons_F, bias=False)
        self.down_proj = nn.Linear(neurons_F, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD + self.down_proj(torch.relu(self.up_proj(x_BTD)))


TWINS = 4


class Planted(nn.Module):
    """Each token's next one is written by a neuron of its own; its twins fire alike and write nothing of use."""

    def __init__(self, vocabulary: int = 20, *, useful: bool = True) -> None:
        super().__init__()
        width = (1 + TWINS) * vocabulary
        self.layers, self.vocabulary = nn.ModuleList([Block(width, width)]), vocabulary
        place = torch.arange(vocabulary)
        following = torch.where(place % 10 == 9, place - 9, place + 1)
        every = torch.eye(width)
        writes = torch.cat([every[following], every[vocabulary:]])
        block: Any = self.layers[0]
        with torch.no_grad():
            block.up_proj.weight.copy_(every[:vocabulary].repeat(1 + TWINS, 1))
            block.down_proj.weight.copy_(3 * (writes if useful else writes.roll(vocabulary, 0)).T)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        x_BTD = nn.functional.one_hot(input_ids, (1 + TWINS) * self.vocabulary).float()
        return SimpleNamespace(logits=(self.layers[0](x_BTD) - x_BTD)[..., : self.vocabulary])


def cycles(count: int, seed: int) -> neurons.Prompts:
    """Capability 0 counts through the tokens 0 to 9, capability 1 through 10 to 19."""
    draw = np.random.default_rng(seed)
    rows = [[10 * (i % 2) + (int(s) + t) % 10 for t in range(12)] for i, s in enumerate(draw.integers(0, 10, count))]
    return prompts(rows, [i % 2 for i in range(count)])


def planted(useful: bool, shuffle: int | None = None) -> tuple[Found, dict[str, Any]]:
    model = Planted(useful=useful)
    ffns = every_ffn(model, "test")
    known = scored(model, ffns, cycles(60, 0), 2, "max", shuffle)
    again = scored(model, ffns, cycles(60, 1), 2, "max")
    found = localise(model, ffns, cycles(60, 1), known, 0.1, 5, 0)
    return found, judged(found, ("low", "high"), *kept(again, known.sets(0.1)))


def test_planted_neurons_are_found_and_their_twins_of_the_same_norm_are_not_missed() -> None:
    found, verdict = planted(useful=True)
    assert verdict["holds"] is True and verdict["sentence"].startswith("localised")
    matrix = np.array(verdict["matrix"])
    assert matrix.diagonal().min() > 1 and abs(matrix[0, 1]) < 0.2 and abs(matrix[1, 0]) < 0.2
    assert found.norm_ratio == pytest.approx((1.0, 1.0), rel=0.02)
    # What fires for a capability and does nothing for it is no localisation.
    idle = planted(useful=False)[1]
    assert idle["holds"] is not True and idle["sentence"].startswith(NONE)


def test_sets_scored_by_labels_dealt_out_anew_localise_nothing() -> None:
    assert all(planted(useful=True, shuffle=seed)[1]["holds"] is not True for seed in range(3))
    label_N = torch.arange(90) % 3
    dealt_N = dealt_anew(label_N, 3, 0)
    assert torch.bincount(3 * label_N + dealt_N).tolist() == [10] * 9 and not torch.equal(dealt_N, label_N)


# The judgement


def found_of(own: float, others: float, random: float, *, spread: float = 0.1, apart: float = 1.0) -> Found:
    draw = np.random.default_rng(0)
    label_N = np.arange(300) % 3
    noise = lambda *shape: spread * draw.normal(size=shape)  # noqa: E731
    increase_CN = others + noise(3, 300)
    increase_CN[label_N, np.arange(300)] = own + noise(300)
    return Found(apart * label_N + noise(300), increase_CN, random + noise(5, 300), label_N, (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("found", "holds"),
    [
        (found_of(0.5, 0.1, 0.1), True),
        (found_of(0.5, 0.4, 0.1), False),  # it hurts everyone
        (found_of(0.5, 0.1, 0.4), False),  # as any neurons of that norm do
        (found_of(-0.2, -0.4, -0.4), False),  # twice a negative number is smaller than it
        (found_of(0.2, 0.1, 0.0, spread=0.5), "undecided"),
        (found_of(0.5, 0.1, 0.1, apart=0.0), "set-up invalid"),
    ],
)
def test_both_inequalities_must_clear_their_intervals(found: Found, holds: Any) -> None:
    verdict = judged(found, ("a", "b", "c"), [0.4] * 3, [0.45] * 3)
    assert verdict["holds"] == holds and verdict["sentence"].startswith(NONE) is (holds is not True)
    assert verdict["matrix"][0][1] == pytest.approx(found.increase_CN[0, found.label_N == 1].mean())
    assert verdict["random"][2][4] == pytest.approx(found.random_DN[4, found.label_N == 2].mean())
    assert verdict["diagonal"] == pytest.approx(np.diag(verdict["matrix"]).mean())
    off = ~np.eye(3, dtype=bool)
    assert verdict["off_diagonal"] == pytest.approx(np.array(verdict["matrix"])[off].mean())
    if holds == "set-up invalid":  # unless single neurons tell them apart
        assert judged(found, ("a", "b", "c"), [0.4] * 3, [0.9] * 3)["holds"] is True


# Prompts, the command and the check


def labelled(rows: int = 120, seed: int = 0, words: int = 14) -> dict[str, list]:
    """Three capabilities: the words of a third of the list each, mostly one behind the other."""
    draw = np.random.default_rng(seed)
    out: dict[str, list] = {"text": [], "label": []}
    for i in range(rows):
        own = WORDS[7 * (i % 3) : 7 * (i % 3) + 7]
        out["text"].append(" ".join(own[int(k)] for k in draw.integers(0, 7, words)))
        out["label"].append(("praise", "blame", "things")[i % 3])
    return out


def test_halves_share_no_prompt_and_all_are_of_one_length(causal_base: Path) -> None:
    base = open_base(str(causal_base))
    given_rows = labelled()
    given_rows["text"][0] += " the film"  # longer; cut
    given_rows["text"][1] = "too short"
    given_rows["text"][5] = given_rows["text"][2]  # the same prompt of the same capability
    data = read_data({"test": given_rows}, need=())
    a, b, names, report = halves(base, data, 200, 14, 0)
    assert names == ("blame", "praise", "things") and (report["short"], report["alike"], report["cut"]) == (1, 1, 1)
    for half, count in ((a, 20), (b, 19)):
        assert half.targets_NT.shape[1] == 14 and (half.targets_NT != IGNORED).all()
        assert torch.bincount(half.label_N).tolist() == [count] * 3
        assert half.ids_NT[:, 0].eq(3).all() and not half.real_NT[:, 0].any()
        assert torch.equal(half.ids_NT[:, 1:], half.targets_NT[:, :-1])
    keys = [{tuple(row) for row in half.targets_NT.tolist()} for half in (a, b)]
    assert not keys[0] & keys[1]
    both = {"train": labelled(90, 1), "test": labelled(60, 2)}
    a, b, _, report = halves(base, read_data(both, need=()), 200, 14, 0)
    assert report["halves"] == "train and test" and report["of_each_capability"] == [30, 20]
    whole, _, _, _ = halves(base, read_data({"test": labelled(words=9) | {}}, need=()), 200, 0, 0)
    assert whole.targets_NT.shape[1] == 9


def test_the_command_prints_its_tables_and_says_what_it_did_not_find(
    causal_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "data", {"test": labelled()})
    argv = ["audit", "configurable-bricks", "--base", str(causal_base), "--data", str(data), "--tokens", "12"]
    argv += ["--share", "0.05", "--clusters", "8", "--device", "cpu"]
    assert main([*argv, "--json"]) in (0, 3)
    found = json.loads(capsys.readouterr().out)
    assert [row["neurons of"] for row in found["table"]] == ["blame", "praise", "things"]
    assert found["neurons"]["of_each"] == {"model.layers.0": 3, "model.layers.1": 3} and found["passes"] == 1
    assert np.array(found["localisation"]["random"]).shape == (3, 5) and len(found["sparsity"]["error"]) == 11
    assert np.sum(found["mass"]["by_layer"], 0) == pytest.approx([1, 1, 1]) and "in_clusters" in found["mass"]
    assert found["overlap"]["0.05"]["chance"] == pytest.approx(9 / 64 / (6 - 9 / 64))
    code = main(argv)
    shown = capsys.readouterr().out
    assert code == (3 if found["holds"] is False else 0)
    for words in ("what two sets have in common", "activation mass by layer", "perplexity"):
        assert words in shown
    assert (NONE in " ".join(shown.split())) is (found["holds"] is not True)
    assert main([*argv, "--json"]) in (0, 3) and json.loads(capsys.readouterr().out) == found


@pytest.mark.parametrize(
    ("rows", "words", "options"),
    [
        ({"test": {"text": labelled()["text"]}}, "has no labels, and configurable-bricks", []),
        ({"test": {**labelled(), "label": ["one"] * 120}}, "at least 2", []),
        ({"test": labelled(40)}, "too few prompts", []),
        ({"test": labelled()}, "too few prompts|long enough", ["--tokens", "40"]),
        ({"test": labelled()}, "context of 64", ["--tokens", "100"]),
        ({"test": labelled()}, "share=0.9", ["--share", "0.9"]),
        ({"test": labelled()}, "do not divide", ["--clusters", "7"]),
        ({"test": labelled()}, "expected at least 8", ["--tokens", "3"]),
    ],
)
def test_what_cannot_be_audited_is_said_in_a_sentence(
    rows: Any, words: str, options: list[str], causal_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "data", rows)
    argv = ["audit", "configurable-bricks", "--base", str(causal_base), "--data", str(data)]
    assert main([*argv, *(options if "--tokens" in options else [*options, "--tokens", "12"])]) == 2
    error = capsys.readouterr().err
    assert any(word in error for word in words.split("|")), error


def test_an_encoder_is_refused(text_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_data(tmp_path / "data", {"test": labelled()})
    argv = ["audit", "configurable-bricks", "--base", str(text_base), "--data", str(data), "--tokens", "12"]
    assert main(argv) == 2 and "is none; give a decoder" in capsys.readouterr().err


def test_the_check_runs_from_end_to_end_and_its_control_and_gate_can_fail(causal_base: Path) -> None:
    claim = registry.find("configurable-bricks").record.claims[0]
    small = replace(claim, base=str(causal_base), data={"test": labelled(240)}, train_rows=80, max_length=12)  # type: ignore[arg-type]
    found = checks.kinds_of_python(small, shares=(0.05, 0.1))
    json.dumps(found)
    assert found["holds"] in (False, "undecided", "set-up invalid") and found["detail"].startswith(NONE)
    assert set(found["figures"]) == {"0.05", "0.1", "shuffled"} and "own" in found["inequality"]
    assert found["low"] <= found["measured"] <= found["high"]
    good = judged(found_of(0.5, 0.1, 0.1), ("a", "b", "c"), [0.4] * 3, [0.9] * 3)
    bad = judged(found_of(0.1, 0.1, 0.1), ("a", "b", "c"), [0.4] * 3, [0.9] * 3)
    words = {0.01: "1 of 64", 0.03: "2 of 64"}
    fine = checks.verdict({0.01: good, 0.03: good}, bad, words)
    assert fine["holds"] is True and fine["control"]["destroyed"] and fine["detail"].startswith("1% (1 of 64")
    assert checks.verdict({0.01: good, 0.03: bad}, bad, words)["holds"] is False
    assert not checks.verdict({0.01: good, 0.03: good}, good, words)["control"]["destroyed"]
    # Meaningless sets that hurt their own twice as much as the others would be no control, whatever random ones do.
    half = judged(found_of(0.5, 0.1, 0.4), ("a", "b", "c"), [0.4] * 3, [0.9] * 3)
    assert half["holds"] is False and not checks.verdict({0.01: good}, half, words)["control"]["destroyed"]
    nothing = judged(found_of(0.5, 0.1, 0.1, apart=0.0), ("a", "b", "c"), [0.4] * 3, [0.4] * 3)
    assert checks.verdict({0.01: nothing, 0.03: nothing}, bad, words)["holds"] == "set-up invalid"


def test_options_out_of_range_are_refused() -> None:
    for options in ({"prompts": 5}, {"draws": 0}, {"clusters": 1}, {"seed": -1}, {"error": 1.0}, {"share": 0.0}):
        with pytest.raises(UsageError):
            Config(**options)  # type: ignore[arg-type]


def test_the_embedded_kinds_share_no_file_and_are_cut_alike() -> None:
    found = embedded.data("python-kinds")
    for side in ("train", "test"):
        counts = Counter(found[side]["label"])
        assert set(counts) == {"docstrings", "numeric", "parsers", "tests"} and min(counts.values()) >= 100
        assert all(len(text) <= 1001 for text in found[side]["text"])
    assert not set(found["train"]["text"]) & set(found["test"]["text"])
    by_file = {f"file {i}": [f"{i} {k} " + 300 * "x" for k in range(1 + i % 7)] for i in range(40)}
    sides = python_kinds._dealt(by_file)
    files = [{text.split()[0] for text in texts} for texts in sides.values()]
    assert not files[0] & files[1] and abs(len(sides["train"]) - len(sides["test"])) <= 7
