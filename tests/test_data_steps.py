"""Data steps where a class is rare, a domain's rows are long, a control fails, or an option has nothing to do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from brickyard.checks import data_management as check
from brickyard.core import registry
from brickyard.core.errors import UsageError
from brickyard.core.method import Claim
from brickyard.core.pool import Outcome, Pool
from brickyard.data import mix
from brickyard.data import select as selection
from brickyard.data._frozen import fit_head, head_losses


def test_a_rare_class_costs_only_its_own_rows_their_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of class 1 stand in fold 0 alone, so a head without fold 0 knows the classes 0 and 2."""
    g = np.random.default_rng(0)
    y_N, fold_N = np.tile([0, 2], 30), np.arange(60) % 5
    y_N[[0, 5]] = 1
    v_ND = np.eye(3)[y_N] + 0.3 * g.standard_normal((60, 3))
    loss_N, unknown_N = head_losses(v_ND, y_N, fold_N, 3, l2=1e-2)
    assert np.flatnonzero(unknown_N).tolist() == [0, 5] and loss_N[[0, 5]] == pytest.approx(np.log(3))
    x_ND = torch.from_numpy(v_ND)
    weight, bias = fit_head(x_ND[fold_N != 0], torch.from_numpy(y_N[fold_N != 0] // 2), 2, 1e-2)
    log_p = (x_ND @ weight + bias).log_softmax(1).numpy()
    mine = np.flatnonzero((fold_N == 0) & ~unknown_N)
    assert loss_N[mine] == pytest.approx(-log_p[mine, y_N[mine] // 2])
    assert head_losses(v_ND, y_N, np.zeros(60), 3, l2=1e-2)[1].all(), "no other fold, no head"

    texts, labels = [f"row {i}" for i in range(60)], [str(y) for y in y_N]
    monkeypatch.setattr(selection, "embeddings", lambda pool: (v_ND, {}))
    monkeypatch.setattr(Pool, "folds", lambda pool, count: fold_N)
    report = selection.run(selection.Config(by="loss", budget=0.5), Pool({"text": texts, "label": labels})).report
    assert report["label_not_in_other_folds"] == 2


def test_doremis_weights_are_shares_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one domain are ten times as long, in bytes: equal weights take ten times as many of the other's."""
    texts = ["é" * 50] * 100 + ["b" * 10] * 100
    given = Pool({"text": texts, "where": ["long"] * 100 + ["short"] * 100}, domain="where")
    monkeypatch.setattr(mix, "doremi", lambda streams, config, seed: (np.array([0.5, 0.5]), None, None))
    found = mix.run(mix.Config(by="doremi", rows=1100), given)
    written = [texts[row].encode() for row in found.rows]
    assert sum(len(text) for text in written if text[0] == ord("b")) == sum(map(len, written)) / 2 == 10_000
    assert found.report["weights"] == found.report["byte_shares"] == {"long": 0.5, "short": 0.5}
    assert found.report["row_shares"] == pytest.approx({"long": 1 / 11, "short": 10 / 11})
    plain = mix.run(mix.Config(by="uniform"), given).report
    assert plain["row_shares"] == plain["weights"] and plain["byte_shares"]["long"] == pytest.approx(10 / 11)


@pytest.mark.parametrize(("high", "destroyed"), [(0.02, False), (0.009, True)])
def test_selections_control_must_miss_the_gain(high: float, destroyed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shuffled labels choose nothing of use only where a gain of a point is excluded, at the balance of the arms."""
    labels = ["a", "b"] * 10
    pool = Pool({"text": [str(i) for i in range(20)], "label": labels})
    test = {"text": ["x"] * 4, "label": ["a", "b", "a", "b"]}
    nothing = np.zeros(20, bool)
    asked: list[selection.Config] = []

    def run(config: selection.Config, given: Pool) -> Outcome:
        asked.append(config)
        return Outcome(np.arange(6))

    gain = SimpleNamespace(difference=0.0, low=-0.02, high=high)
    monkeypatch.setattr(check, "planted", lambda claim, seed: check.Planted(pool, nothing, nothing, nothing, test))
    monkeypatch.setattr(check, "embeddings", lambda *given: (np.ones((20, 2)), {"seconds": 0}))
    monkeypatch.setattr(check.selection_step, "run", run)
    monkeypatch.setattr(check, "head_answers", lambda *given: np.zeros(4))
    monkeypatch.setattr(check, "paired", lambda *given: gain)
    found = check.selection(Claim(text="", seeds=2))
    assert found["control"]["destroyed"] is destroyed
    assert {config.balance for config in asked} == {"natural"}, "the control must differ by its labels alone"


@pytest.mark.parametrize(("rotated", "destroyed"), [(0.8, False), (1.1, True)])
def test_doremis_control_must_lose_the_whole_gain(
    rotated: float, destroyed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uniform weights leave an excess of 1 and DoReMi's one of 0.5: wrong weights at 0.8 still gain."""
    excess = {1 / 3: 1.0, 0.6: 0.5, 0.1: rotated, None: 0.0}
    monkeypatch.setattr(check.embedded, "data", lambda name: {s: {"text": ["abc"]} for s in ("train", "test")})
    monkeypatch.setattr(check, "read", lambda name: SimpleNamespace(splits=check.embedded.data(name)))
    monkeypatch.setattr(mix, "doremi", lambda streams, config, seed: (np.array([0.6, 0.3, 0.1]), None, None))
    monkeypatch.setattr(mix, "train_bytes", lambda streams, config, seed, weigh: weigh(None, None)[0])
    monkeypatch.setattr(check, "losses", lambda model, batches: np.array([excess[model]]))
    found: dict[str, Any] = check.doremi_worst_domain(Claim(text="", seeds=2), windows=8)
    assert found["measured"] == 0.5 and found["control"]["measured"] == pytest.approx(1 - rotated)
    assert found["control"]["destroyed"] is destroyed


@pytest.mark.parametrize(
    ("step", "ignored", "used", "owner"),
    [
        ("quality-filter", {"trusted": "x"}, {"classifier": True}, "classifier"),
        ("quality-filter", {"trusted": "x"}, {"perplexity": "ngram"}, "perplexity=ngram"),
        ("select", {"target": "x"}, {"by": "dsir"}, "dsir"),
        ("select", {"target": "x"}, {"by": "nearest"}, "nearest"),
        ("select", {"tau": 0.5}, {"by": "deita"}, "deita"),
        ("select", {"l2": 0.5}, {"by": "loss"}, "loss"),
        ("select", {"l2": 0.5}, {"by": "k-centre", "noisy": 0.1}, "noisy"),
        ("select", {"epochs": 9}, {"by": "confidence"}, "confidence"),
        ("select", {"lr": 0.5}, {"by": "forgetting"}, "forgetting"),
        ("mix", {"temperature": 2.0}, {"by": "temperature"}, "temperature"),
        *(
            ("mix", {name: value}, {"by": "doremi"}, "doremi")
            for name, value in {
                "eta": 0.5,
                "smoothing": 0.5,
                "steps": 9,
                "reference_steps": 9,
                "batch": 9,
                "context": 9,
                "width": 9,
                "lr": 0.5,
            }.items()
        ),
    ],
)
def test_an_option_that_nothing_reads_is_refused(step: str, ignored: dict, used: dict, owner: str) -> None:
    (name,) = ignored
    with pytest.raises(UsageError, match=rf"^{name}=.* belongs to .*{owner}"):
        registry.config(step, ignored)
    assert getattr(registry.config(step, {**ignored, **used}), name) == ignored[name]
    registry.config(step, {name: registry.find(step).options[name].default})  # the default, said aloud, is no claim
