"""The linear probe: the right pooling, the right sizes, and nothing learned from labels that say nothing."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import text_data
from torch import Tensor, nn

from brickyard.core import brick as bricks
from brickyard.core import trial
from brickyard.core.errors import BadData, Refused, UsageError
from brickyard.core.fitted_head import fit_head
from brickyard.core.trial import Setting
from brickyard.tune import linear_probe
from brickyard.tune.linear_probe import Config, Probe, pooled

D, K = 12, 4
TASK: Any = SimpleNamespace(width=K)


def rows(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(len(lengths), max(lengths), D, generator=torch.Generator().manual_seed(seed))
    return x, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def test_the_mean_is_over_valid_tokens_only():
    x, mask = rows([5, 1, 3])
    x[~mask] = float("nan")
    expected = torch.stack([x[b, :n].mean(0) for b, n in enumerate([5, 1, 3])])
    torch.testing.assert_close(pooled(x, mask, "mean"), expected)
    torch.testing.assert_close(pooled(x, mask.long(), "mean"), expected)
    torch.testing.assert_close(pooled(x[:1], None, "mean"), expected[:1])
    assert torch.equal(pooled(x, mask, "cls"), x[:, 0])


def test_a_row_without_tokens_is_named():
    x, mask = rows([5, 2])
    mask[1] = False
    with pytest.raises(BadData, match="row 1 of the batch has no valid token"):
        Probe(D, K)(x, mask)


def test_it_is_one_linear_layer():
    head, (x, mask) = linear_probe.head(Config(), TASK, D), rows([5, 3])
    assert sum(p.numel() for p in head.parameters()) == D * K + K
    v = pooled(x, mask, "mean")
    torch.testing.assert_close(head(x, mask), v @ head.output.weight.T + head.output.bias)
    # Linear in v, so the logits of a mean are the mean of logits.
    torch.testing.assert_close(head(x[:1, :5]), torch.stack([head(x[:1, t : t + 1]) for t in range(5)]).mean(0))


def test_a_hidden_layer_makes_an_mlp():
    head, (x, mask) = linear_probe.head(Config(hidden=7), TASK, D), rows([5, 3])
    assert sum(p.numel() for p in head.parameters()) == (D * 7 + 7) + (7 * K + K)
    linear: Any = head.hidden[0]  # type: ignore[index]
    expected = head.output(nn.functional.gelu(linear(pooled(x, mask, "mean"))))
    torch.testing.assert_close(head(x, mask), expected)
    with pytest.raises(UsageError, match="hidden=-1"):
        Config(hidden=-1)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_pooled_states_give_the_same_logits(pool: Any):
    """What the provider of cached states stores for this head, one vector per row, is all that it needs."""
    head, (x, mask) = Probe(D, K, pool=pool), rows([5, 3])
    assert head.frozen_pool == pool
    kept = pooled(x, mask, pool).unsqueeze(1)
    torch.testing.assert_close(head(kept, torch.ones(2, 1, dtype=torch.bool)), head(x, mask))


def fit(x: Tensor, mask: Tensor, y: Tensor, options: Config) -> nn.Module:
    torch.manual_seed(0)
    head = linear_probe.head(options, TASK, D)
    optimiser = torch.optim.AdamW(head.parameters(), lr=linear_probe.RECORD.training["lr"], weight_decay=0.0)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(head(x, mask), y).backward()
        optimiser.step()
    return head


@pytest.mark.parametrize("hidden", [0, 16])
def test_it_beats_the_majority_class_and_shuffled_labels_destroy_that(hidden: int):
    lengths = [3 + i % 6 for i in range(400)]
    x, mask = rows(lengths)
    centres = torch.randn(K, D, generator=torch.Generator().manual_seed(9))
    y = torch.randint(0, K, (400,), generator=torch.Generator().manual_seed(8))
    x = x + centres[y][:, None]
    train, test = slice(0, 300), slice(300, 400)
    majority = (y[test] == y[train].mode().values).float().mean().item()
    head = fit(x[train], mask[train], y[train], Config(hidden=hidden))
    score = (head(x[test], mask[test]).argmax(1) == y[test]).float().mean().item()
    assert score > majority + 0.4
    shuffled = y[train][torch.randperm(300, generator=torch.Generator().manual_seed(7))]
    control = fit(x[train], mask[train], shuffled, Config(hidden=hidden))
    assert (control(x[test], mask[test]).argmax(1) == y[test]).float().mean().item() < majority + 0.15


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_a_fitted_head_is_the_best_one_for_the_base_and_stays_so(
    tuner: str, text_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    setting = Setting(arm=f"{tuner} + linear-probe:fitted=true", base=str(text_base), data=text_data(), seed=0)
    ready = trial.prepare(setting)
    found = trial.run({"setting": asdict(setting), "folder": str(tmp_path / "run")})
    wanted = fit_head(ready.base.backbone(), ready.encoded["train"], ready.task)
    applied = bricks.load(tmp_path / "run" / "brick").apply(ready.base).model
    # PEFT leaves the head that it copied in the module tree, unused.
    kept = [m for name, m in applied.named_modules() if isinstance(m, Probe) and "original_module" not in name]
    for probe in kept:
        torch.testing.assert_close(probe.output.weight, wanted.weight_KD, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(probe.output.bias, wanted.bias_K, rtol=1e-4, atol=1e-5)
    assert kept and found["chosen"]["linear-probe"]["rows"] == len(ready.encoded["train"])
    plain = asdict(replace(setting, arm=f"{tuner} + linear-probe"))
    other = trial.run({"setting": plain, "folder": str(tmp_path / "plain")})
    head = sum(p.numel() for p in kept[0].parameters())
    count = other["cost"]["trainable_parameters"] - found["cost"]["trainable_parameters"]
    assert count == head


def test_a_fitted_head_needs_a_tuner_beside_it(text_base: Path, tmp_path: Path):
    alone = Setting(arm="linear-probe:fitted=true", base=str(text_base), data=text_data(), seed=0)
    with pytest.raises(Refused, match=r"give a tuner, as lora [+] linear-probe"):
        trial.run({"setting": asdict(alone), "folder": str(tmp_path / "run")})
    with pytest.raises(UsageError, match="leave out pool and hidden"):
        Config(fitted=True, hidden=8)
    with pytest.raises(UsageError, match="leave out pool and hidden"):
        Config(fitted=True, pool="cls")
