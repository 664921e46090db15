"""Representation similarity against its equations: brute force, invariances, the command, and claims measured by it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_text_base, text_data, write_data
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from brickyard.checks import telly as checks
from brickyard.checks._rho_curve import judged, rho_curve
from brickyard.cli import main
from brickyard.core import registry, trial
from brickyard.core.base import open_base
from brickyard.core.batches import encode
from brickyard.core.errors import BadData, NotFinite, Refused, UsageError
from brickyard.core.similarity import bottom_alike, cka, layer_means, mean_over_tokens, rho
from brickyard.core.task import Task

TEXTS = Task("regression", "spearman", None, 1, "text")


def matrix(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(2, 9), st.integers(2, 9), st.integers(1, 50), st.integers(0, 99))
def test_rho_in_blocks_is_pearson_of_the_whole_triangles(n: int, d: int, e: int, block: int, seed: int) -> None:
    x, y = matrix(n, d, seed), matrix(n, e, seed + 100)
    unit = [(m / m.norm(dim=1, keepdim=True)).numpy() for m in (x, y)]
    u, v = ((m @ m.T)[np.triu_indices(n)] for m in unit)
    assert rho(x, y, block=block) == pytest.approx(np.corrcoef(u, v)[0, 1], abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 30), st.integers(2, 8), st.integers(0, 99))
def test_rho_and_cka_know_neither_themselves_nor_a_rotation_nor_a_scale(n: int, d: int, seed: int) -> None:
    x, y = matrix(n, d, seed), matrix(n, d, seed + 100)
    turn = torch.linalg.qr(matrix(d, d, seed + 200)).Q
    for index in (rho, cka):
        assert index(x, x) == pytest.approx(1.0, abs=1e-9)
        assert index(3 * x @ turn, y) == pytest.approx(index(x, y), abs=1e-9)
        assert index(x, y) == pytest.approx(index(y, x), abs=1e-9)
    assert rho(x, y) < 1 and 0 <= cka(x, y) < 1


def test_rho_keeps_its_digits_where_all_cosines_are_nearly_one() -> None:
    common, x, y = 1e3 * matrix(1, 8, 0), matrix(60, 8, 1), matrix(60, 8, 2)
    unit = [((m + common) / (m + common).norm(dim=1, keepdim=True)).numpy() for m in (x, y)]
    u, v = ((m @ m.T)[np.triu_indices(60)] for m in unit)
    assert rho(x + common, y + common, block=7) == pytest.approx(np.corrcoef(u, v)[0, 1], abs=1e-4)


def test_cka_is_the_formula_on_gram_matrices() -> None:
    x, y = matrix(20, 5, 1), matrix(20, 3, 2)
    k, m = ((z - z.mean(0)) @ (z - z.mean(0)).T for z in (x, y))
    assert cka(x, y) == pytest.approx(float((k * m).sum() / (k.norm() * m.norm())), abs=1e-12)


def test_no_matrix_of_all_pairs_is_held() -> None:
    """At 3,000 rows one such matrix takes 72 MB; the blocks are 4 MB each."""
    from brickyard.core import measure

    x = matrix(3000, 4, 0)
    assert measure.peak_bytes(lambda: rho(x, x.flip(1), block=64)).bytes < 20e6


def test_rows_without_a_geometry_are_refused() -> None:
    with pytest.raises(Refused, match="all alike"):
        rho(torch.ones(5, 3), matrix(5, 3, 0))
    with pytest.raises(Refused, match="all alike"):
        cka(torch.ones(5, 3), matrix(5, 3, 0))
    for n, m in ((1, 1), (4, 5)):
        with pytest.raises(BadData, match="at least 2"):
            rho(matrix(n, 3, 0), matrix(m, 3, 0))


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([1.0, 1.0, 0.99, 0.9, 0.99], 2),  # what lies above a changed layer does not count
        ([1.0, 1.0, 1.0, 1.0], 2),  # the top always trains
        ([0.9, 1.0, 1.0], 0),
        ([1.0, 0.9, 0.9], 0),
        ([1.0, 0.95, 0.5], 1),
    ],
)
def test_layers_are_alike_up_to_the_first_that_changed(curve: list[float], expected: int) -> None:
    assert bottom_alike(curve, 0.95) == expected


def test_means_are_over_tokens_and_with_paper_mean_over_padding_too(text_base: Path) -> None:
    base = open_base(str(text_base))
    data = trial.read_data(text_data(), need=("test",))
    rows = encode(data.splits["test"], base, TEXTS, max_length=64)
    model = base.backbone()
    index = np.array([5, 0, 3])
    found, padded = layer_means(model, rows, index), layer_means(model, rows, index, pad_to=20)
    assert len(found) == 3
    for i, row in enumerate(index):
        one = {k: v for k, v in rows.collate([row]).items() if k != "labels"}
        t = one["input_ids"].shape[1]
        wide = {k: torch.nn.functional.pad(v, (0, 20 - t)) for k, v in one.items()}
        with torch.no_grad():
            alone, all_of_it = (model(**b, output_hidden_states=True).hidden_states for b in (one, wide))
        for layer in range(3):
            torch.testing.assert_close(found[layer][i], alone[layer][0].mean(0), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(padded[layer][i], all_of_it[layer][0].mean(0), atol=1e-5, rtol=1e-4)
            assert not torch.allclose(found[layer][i], padded[layer][i], atol=1e-3)
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(mean_over_tokens(x, torch.tensor([[1, 1, 0], [1, 0, 0]]))[1], x[1, 0])
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(NotFinite, match="hidden state 0"):
        layer_means(model, rows, index)


def test_the_command_compares_a_base_with_a_brick_and_with_checkpoints(
    text_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "data", text_data())
    asked = trial.Setting(
        arm="telly:k=1", base=str(text_base), data=text_data(), cache=False, device="cpu",
        training={"epochs": 2, "lr": 1e-2, "precision": "float32"},
    )  # fmt: skip
    trial.tune(trial.prepare(asked), tmp_path / "run")

    def audit(*more: str) -> dict[str, Any]:
        assert main(["audit", "similarity", "--base", str(text_base), "--data", str(data), "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)

    tuned = audit("--brick", str(tmp_path / "run" / "brick"), "--sample", "30")
    assert [row["layer"] for row in tuned["table"]] == [0, 1, 2] and tuned["rows"] == 30
    # What telly froze did not move; what it trained did.
    assert [row["rho"] for row in tuned["table"][:2]] == pytest.approx([1.0, 1.0], abs=1e-9)
    assert tuned["table"][2]["rho"] < 1 - 1e-5 and tuned["alike"] == 1
    same = audit("--brick", str(text_base))
    assert all(row[i] == pytest.approx(1.0, abs=1e-9) for row in same["table"] for i in ("rho", "cka"))
    other = audit("--brick", str(make_text_base(tmp_path / "other", seed=3)), "--preset", "released")
    assert max(row["rho"] for row in other["table"]) < 0.99 and other["mean"] == "all 64 positions"
    assert main(["audit", "similarity", "--base", str(text_base), "--data", str(data), "--brick", str(text_base)]) == 0
    assert "rho" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["similarity"], "--brick"),
        (["similarity", "--sample", "1"], "sample=1"),
        (["similarity:paper=true"], "paper_mean"),
        (["lora"], "audit method"),
        (["similarty"], "similarity"),
        (["similarity", "--brick", "nowhere"], "nowhere"),
        (["similarity + lora"], "one method"),
    ],
)
def test_what_cannot_be_audited_is_one_clear_line(
    words: list[str], expected: str, text_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "data", text_data())
    assert main(["audit", *words, "--base", str(text_base), "--data", str(data)]) == 2
    assert expected in capsys.readouterr().err


def test_models_that_read_other_ids_or_are_of_another_depth_are_refused(text_base: Path, tmp_path: Path) -> None:
    method = registry.load("similarity")
    base, data = open_base(str(text_base)), trial.read_data(text_data(), need=())
    deeper = open_base(str(make_text_base(tmp_path / "deeper", layers=3)))
    with pytest.raises(Refused, match="as deep"):
        method.measure(base, deeper, method.Config(), data, device=torch.device("cpu"))
    with pytest.raises(Refused, match="different vocabularies"):
        method.measure(base, open_base("embedded:minilm"), method.Config(), data, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("top", "score", "holds"),
    [(0.3, 0.9, True), (0.999, 0.9, False), (0.3, 0.55, "set-up invalid"), (None, 0.9, "undecided")],
)
def test_the_curve_is_judged_over_seeds(top: float | None, score: float, holds: Any) -> None:
    curves = np.array([[1.0, 0.99, 0.98, top if top is not None else t] for t in (0.3, 0.97, 0.99)])
    found = judged(curves, curves, np.array([score] * 3), 0.5, np.ones(4))
    assert found["holds"] == holds and found["control"]["destroyed"] is True


def test_the_measured_claims_run_from_end_to_end(text_base: Path) -> None:
    claims = {claim.measure: claim for claim in registry.find("telly").record.claims}
    small = {name: replace(claim, base=str(text_base), data=text_data()) for name, claim in claims.items() if name}
    curve = rho_curve(replace(small["rho_curve"], seeds=2, epochs=4, train_rows=64))
    assert len(curve["figures"]["rho"]) == 2 and curve["control"]["destroyed"]
    counted = checks.saved_bytes(small["saved_bytes"], batch=4, tokens=8)
    assert counted["control"]["destroyed"] and counted["figures"]["bytes"][1] < counted["figures"]["bytes"][0]
    timed = checks.step_time(small["step_time"], batch=4, tokens=8, rounds=3)
    assert {"full", "k=0", "k=1", "k=1 kept", "top"} == timed["figures"]["seconds"].keys()
    json.dumps([curve, counted, timed])


def test_options_out_of_range_are_usage_errors() -> None:
    for options in ({"sample": 1}, {"length": 3}, {"threshold": 1.5}):
        with pytest.raises(UsageError, match=next(iter(options))):
            registry.config("similarity", options)
