"""CE-SSL's adapters: what a step leaves out, what is merged, and the ranks one pass gives each layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from bridged import bert, logits, stir, words
from conftest import documents, text_data
from peft import LoraConfig, PeftModel, get_peft_model

import brickyard
from brickyard.core import trial
from brickyard.core.errors import Refused, UsageError
from brickyard.core.export import export
from brickyard.core.inject import BrickyardConfig, BrickyardLinear, Leaf, register, to_lora
from brickyard.tune import ce_ssl

register()
R = 4


def model(stirred: bool = True, **options: object) -> PeftModel:
    made = get_peft_model(bert(), BrickyardConfig(method="ce-ssl", options={"r": R, **options}, seed=1))
    if stirred:
        stir(made, "default")
    return made.eval()


def layers(made: PeftModel) -> dict[str, BrickyardLinear]:
    return {name: m for name, m in made.named_modules() if isinstance(m, BrickyardLinear)}


def leaves(count: int) -> list[Leaf]:
    make = lambda i: Leaf(name=str(i), group="g", in_features=8, out_features=8, position=i, count=count)  # noqa: E731
    return [make(i) for i in range(count)]


def loss_of(made: torch.nn.Module, batch: dict) -> torch.Tensor:
    return made(**batch).logits.square().sum()


def without_dropout(made: PeftModel) -> PeftModel:
    for module in made.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return made.train()


def test_a_new_adapter_changes_nothing_whatever_is_drawn() -> None:
    plain = logits(bert())
    made = without_dropout(model(stirred=False))
    seen = set()
    for _ in range(5):
        torch.testing.assert_close(logits(made), plain, rtol=0, atol=0)
        seen.update(layer.drawn["default"] for layer in layers(made).values())
    assert seen == {True, False}
    torch.testing.assert_close(logits(made.eval()), plain, rtol=0, atol=0)


def test_draws_come_at_their_rate_and_independently() -> None:
    config, generator = ce_ssl.Config(p=0.2), torch.Generator().manual_seed(0)
    some = leaves(6)
    drawn = np.array([list(ce_ssl.draw(config, some, generator).values()) for _ in range(5000)])
    assert np.abs((1 - drawn.mean(axis=0)) - 0.2).max() < 0.02
    between = np.corrcoef(drawn.T) - np.eye(len(some))
    assert np.abs(between).max() < 0.06


def test_a_layer_that_is_left_out_runs_as_the_base_and_the_others_at_full_strength() -> None:
    made = without_dropout(model(p=0.5))
    made.zero_grad()
    loss_of(made, words()).backward()
    seen = set()
    for layer in layers(made).values():
        part, used = layer.part("default"), layer.drawn["default"]
        seen.add(used)
        assert (part["b"].grad is not None and bool(part["b"].grad.any())) == used
        x = torch.randn(2, layer.in_features)
        wanted = layer.base_layer(x) + used * (x @ part["a"].T) @ part["b"].T
        torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
    assert seen == {True, False}


def test_merged_is_the_expectation_and_so_is_evaluation(tmp_path: Path) -> None:
    made = model(p=0.2)
    found = logits(made)
    assert torch.equal(found, logits(made))
    name, layer = next(iter(layers(made).items()))
    part = layer.part("default")
    wanted = layer.base_layer.weight + 0.8 * part["b"] @ part["a"]
    to_lora(made, "default", tmp_path / "lora")
    plain = PeftModel.from_pretrained(bert(), str(tmp_path / "lora")).eval()
    torch.testing.assert_close(logits(plain), found, rtol=1e-5, atol=1e-5)
    merged = made.train().merge_and_unload().eval()  # what is merged does not depend on the mode
    torch.testing.assert_close(merged.get_submodule(name.removeprefix("base_model.model.")).weight, wanted)
    torch.testing.assert_close(logits(merged), found, rtol=1e-5, atol=1e-5)


def test_without_deactivation_it_is_pefts_lora() -> None:
    ours = without_dropout(model(p=0.0))
    targets = [name.removeprefix("base_model.model.") for name in layers(ours)]
    lora = without_dropout(get_peft_model(bert(), LoraConfig(r=R, lora_alpha=R, target_modules=targets)))  # type: ignore[arg-type]
    for name, layer in layers(ours).items():
        _, a_rn, b_mr = ce_ssl.factors_of(lora.get_submodule(name), "default")
        with torch.no_grad():
            a_rn.copy_(layer.part("default")["a"])
            b_mr.copy_(layer.part("default")["b"])
    torch.testing.assert_close(logits(ours), logits(lora), rtol=1e-6, atol=1e-6)
    for made in (ours, lora):
        loss_of(made, words()).backward()
    for name, layer in layers(ours).items():
        _, a_rn, b_mr = ce_ssl.factors_of(lora.get_submodule(name), "default")
        torch.testing.assert_close(layer.part("default")["a"].grad, a_rn.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.part("default")["b"].grad, b_mr.grad, rtol=1e-4, atol=1e-5)


def test_a_block_that_is_run_again_leaves_out_the_same_layers() -> None:
    found = []
    for again in (False, True):
        made = without_dropout(model(p=0.5))
        if again:
            made.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        loss_of(made, words()).backward()
        found.append([layer.part("default")["b"].grad for layer in layers(made).values()])
    assert any(g is None or not g.any() for g in found[0])
    for plain, rerun in zip(*found, strict=True):
        assert (plain is None) == (rerun is None)
        if plain is not None:
            torch.testing.assert_close(plain, rerun, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", ["taylor", "fisher"])
def test_scores_are_those_of_the_sketched_weight_gradient(rule: str) -> None:
    made = without_dropout(model(stirred=False, p=0.0))
    batches = [words(2), words(4)]
    names, scores_K = ce_ssl.importances(made, [lambda b=b: loss_of(made, b) for b in batches], rule)
    wanted = np.zeros(len(names))
    plain = bert().train()
    for module in plain.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for batch in batches:
        plain.zero_grad()
        loss_of(plain, batch).backward()
        for k, name in enumerate(names):
            weight = plain.get_submodule(name.removeprefix("base_model.model.")).weight
            a_rn = layers(made)[name].part("default")["a"].detach()
            sketch_mn = weight.grad @ a_rn.T @ a_rn
            wanted[k] += float(((1.0 if rule == "fisher" else weight.detach()) * sketch_mn).square().mean()) / 2
    np.testing.assert_allclose(scores_K, wanted, rtol=1e-4)
    assert all(p.grad is None for p in made.parameters()) and wanted.min() > 0


def test_ranks_are_shared_out_by_score() -> None:
    scores_K = np.array([3.0, 1.0, 2.0, 1.0, 5.0])
    assert ce_ssl.allocate(scores_K, 0.4) == (1, 3)
    assert ce_ssl.allocate(scores_K, 0.3) == (1,)  # of equal scores the first
    assert ce_ssl.allocate(scores_K, 0.0) == ()
    made = model(low=[0, 2], stirred=False)
    ranks = [len(layer.part("default")["a"]) for layer in layers(made).values()]
    assert ranks[0] == ranks[2] == R // 2 and set(ranks[1:2] + ranks[3:]) == {R}


def test_stock_lora_takes_the_pattern() -> None:
    plain = bert()
    targets = ["query", "value", "intermediate.dense"]
    lora = get_peft_model(plain, LoraConfig(r=8, target_modules=targets)).eval()  # type: ignore[arg-type]
    pattern = ce_ssl.one_shot_rank_allocation(lora, [words()], loss_of, r_high=8, r_low=4, compress=0.5)
    assert sorted(pattern.values()) == [4] * 6 + [8] * 6
    made = get_peft_model(bert(), LoraConfig(r=8, target_modules=targets, rank_pattern=pattern))  # type: ignore[arg-type]
    for name, rank in pattern.items():
        assert len(made.get_submodule(f"base_model.model.{name}").lora_A["default"].weight) == rank  # type: ignore[union-attr, arg-type]
    stir(lora, "default")
    with pytest.raises(UsageError, match="B is not 0"):
        ce_ssl.importances(lora, [lambda: loss_of(lora, words())])


def test_a_run_chooses_its_ranks_and_its_brick_keeps_them(text_base: Path, tmp_path: Path) -> None:
    training = {"batch": 8, "epochs": 2, "lr": 5e-3}
    given = {"base": str(text_base), "data": text_data(), "training": training, "device": "cpu"}
    brickyard.tune("ce-ssl:r=8,compress=0.6", out=tmp_path / "a", **given)
    folder = next(path.parent for path in (tmp_path / "a").rglob("adapter_config.json"))
    found = export(folder, "peft", tmp_path / "lora")
    assert found["max_gap"] <= 1e-4
    _, whole = brickyard.tune("ce-ssl:r=8", out=tmp_path / "b", **given)
    _, less = brickyard.tune("ce-ssl:r=8,compress=0.6", out=tmp_path / "c", **given)
    assert less["cost"]["trainable_parameters"] < 0.9 * whole["cost"]["trainable_parameters"]
    report = less["chosen"]["ce-ssl"]
    assert len(report["importance"]) == len(report["layers"]) and report["seconds"] > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"p": 1.0}, "share from 0"),
        ({"compress": 1.0}, "share from 0"),
        ({"compress": -0.1}, "share from 0"),
        ({"r": 2, "compress": 0.5}, "use r >= 4"),
        ({"importance": "luck"}, "expected one of"),
        ({"scale": 0.0}, "positive"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ce_ssl.Config(**options)


def test_ranks_and_places_beyond_the_model_are_refused() -> None:
    with pytest.raises(Refused, match="exceeds layer"):
        model(r=17)
    with pytest.raises(Refused, match="names layer 99"):
        model(low=[99])
    with pytest.raises(UsageError, match="no layer carries"):
        ce_ssl.importances(bert(), [])


def test_a_step_that_leaves_every_adapter_out_changes_nothing(causal_base: Path, tmp_path: Path) -> None:
    data = documents(train=40)
    _, found = brickyard.tune(
        "ce-ssl:r=2,p=0.9,target=[query]",
        base=str(causal_base),
        data=data,
        task="causal-lm",
        out=tmp_path,
        training={"steps": 30, "batch": 4, "lr": 1e-2, "evaluate_every": 30},
        device="cpu",
    )
    assert found["steps"] == 30 and all(np.isfinite(point["train_loss"]) for point in found["history"])


def test_the_pass_that_scores_layers_draws_from_the_seed_alone(text_base: Path) -> None:
    asked = trial.Setting(
        arm="ce-ssl:r=8,compress=0.6",
        base=str(text_base),
        data=text_data(),
        training={"batch": 8, "epochs": 1},
        cache=False,
        device="cpu",
    )
    prepared = trial.prepare(asked, ("train",))
    found = []
    for elsewhere in (1, 2):
        torch.manual_seed(elsewhere)
        before = torch.get_rng_state()
        chosen = ce_ssl.choose(prepared.plan.configs["ce-ssl"], prepared)
        assert chosen is not None
        assert elsewhere == 2 or torch.equal(torch.get_rng_state(), before)
        found.append(chosen[1]["importance"])
    assert found[0] == found[1]


def test_a_share_below_one_layer_is_refused_with_the_count(text_base: Path) -> None:
    with pytest.raises(UsageError, match=r"compress=0\.05 of 8 layers .* at least 0\.125"):
        model(target=["query", "value"], compress=0.05)
    with pytest.raises(UsageError, match=r"compress=0\.05 of 2 layers"):
        brickyard.tune(
            "ce-ssl:r=8,compress=0.05,target=[query]",
            base=str(text_base),
            data=text_data(),
            training={"steps": 1},
            device="cpu",
        )
