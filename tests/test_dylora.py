"""DyLoRA: which ranks a step uses and trains, and that the first b ranks are an ordinary LoRA of rank b."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from bridged import bert, logits, words
from bridged import stir as stir_adapter
from conftest import text_data
from peft import PeftModel, get_peft_model
from scipy.stats import chisquare

import brickyard
from brickyard.checks import dylora as checks
from brickyard.checks.run import Answers
from brickyard.core.base import open_base
from brickyard.core.errors import Refused, UsageError
from brickyard.core.export import export
from brickyard.core.inject import BrickyardConfig, BrickyardLinear, Leaf, register, to_lora
from brickyard.tune import dylora

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
register()
R = 4


def model(stirred: bool = True, **options: object) -> PeftModel:
    made = get_peft_model(bert(), BrickyardConfig(method="dylora", options={"r": R, "alpha": 8.0, **options}, seed=1))
    if stirred:
        stir_adapter(made, "default")
    return made.eval()


def layers(made: PeftModel) -> list[BrickyardLinear]:
    return [m for m in made.modules() if isinstance(m, BrickyardLinear)]


def at(made: PeftModel, rank: int) -> PeftModel:
    made.base_model.at_rank("default", rank)  # type: ignore[operator]
    return made


def leaf(name: str) -> Leaf:
    return Leaf(name=name, group="g", in_features=8, out_features=8, position=0, count=1)


@pytest.mark.parametrize("rank", range(1, R + 1))
def test_at_a_rank_it_is_the_lora_of_that_rank(rank: int, tmp_path: Path) -> None:
    made = at(model(), rank)
    layer = layers(made)[0]
    x, part = torch.randn(2, 3, layer.in_features), layer.part("default")
    wanted = layer.base_layer(x) + 8.0 / rank * (x @ part["a"][:rank].T) @ part["bt"][:rank]
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
    found = logits(made)
    to_lora(made, "default", tmp_path / "lora")
    plain = PeftModel.from_pretrained(bert(), str(tmp_path / "lora")).eval()
    assert plain.peft_config["default"].r == rank  # type: ignore[attr-defined]
    torch.testing.assert_close(logits(plain), found, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits(made.merge_and_unload()), found, rtol=1e-5, atol=1e-5)


def in_training(made: PeftModel) -> PeftModel:
    """In the midst of training, after a step that drew a rank other than the largest."""
    made.train()
    for _ in range(20):
        made(**words())
        if layers(made)[0].drawn["default"] not in (2, R):
            return made
    raise AssertionError("a rank below the largest was never drawn")


@pytest.mark.parametrize("chosen", [None, 2])
@pytest.mark.parametrize("handed_over", ["merged", "adapter", "lora"])
def test_what_a_step_drew_is_neither_merged_nor_exported(chosen: int | None, handed_over: str, tmp_path: Path) -> None:
    made = model()
    if chosen:
        at(made, chosen)
    wanted = logits(made)
    in_training(made)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if handed_over == "merged":
            plain = made.merge_and_unload()
        elif handed_over == "adapter":
            made.merge_adapter()
            plain = made
        else:
            to_lora(made, "default", tmp_path / "lora")
            plain = PeftModel.from_pretrained(bert(), str(tmp_path / "lora"))
            assert plain.peft_config["default"].r == (chosen or R)  # type: ignore[attr-defined]
    torch.testing.assert_close(logits(plain.eval()), wanted, rtol=1e-5, atol=1e-5)
    notices = [str(w.message) for w in said if "no rank was chosen" in str(w.message)]
    assert len(notices) == (0 if chosen else 1)
    assert chosen or "taken at its largest, 4" in notices[0]


def test_a_new_adapter_changes_nothing_at_any_rank() -> None:
    plain, made = logits(bert()), model(stirred=False)
    for rank in range(1, R + 1):
        torch.testing.assert_close(logits(at(made, rank)), plain, rtol=0, atol=0)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_trains_the_ranks_it_uses_or_the_topmost_alone(frozen: bool) -> None:
    made = model(frozen=frozen).train()
    seen = set()
    for _ in range(12):
        made.zero_grad()
        made(**words()).logits.square().sum().backward()
        drawn = {layer.drawn["default"] for layer in layers(made)}
        assert len(drawn) == 1  # the same for every layer
        b = drawn.pop()
        seen.add(b)
        for layer in layers(made):
            for name in ("a", "bt"):
                gradient = getattr(layer, f"brick_{name}")["default"].grad
                assert not gradient[b:].any()
                assert gradient[b - 1].any()
                assert bool(gradient[: b - 1].any()) == (not frozen and b > 1)
    assert len(seen) > 2


def test_the_topmost_ranks_gradient_is_the_same_frozen_or_not() -> None:
    found = []
    for frozen in (False, True):
        made = model(frozen=frozen).train()
        made(**words()).logits.square().sum().backward()
        b = layers(made)[0].drawn["default"]
        found.append(layers(made)[0].get_parameter("brick_a.default").grad[b - 1])  # type: ignore[index]
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_a_block_that_is_run_again_uses_the_rank_of_its_step() -> None:
    found = []
    for again in (False, True):
        made = model().train()
        if again:
            made.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        for module in made.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        made(**words()).logits.square().sum().backward()
        found.append([layer.get_parameter("brick_a.default").grad.clone() for layer in layers(made)])  # type: ignore[union-attr]
        assert int(made.base_model.brick_step["default"]) == 1  # type: ignore[index]
    for plain, rerun in zip(*found, strict=True):
        torch.testing.assert_close(plain, rerun, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"distribution": "geometric"}, {"unit": 2, "r_min": 2}], ids=str)
def test_draws_follow_the_distribution(options: dict) -> None:
    config = dylora.Config(r=8, **options)
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(dylora.draw(config, (leaf("x"),), generator)["x"] for _ in range(10_000))
    allowed = dylora.ranks(config)
    p = dylora.probabilities(config).numpy()
    assert set(drawn) == set(allowed) and p.sum() == pytest.approx(1)
    assert chisquare([drawn[b] for b in allowed], 10_000 * p).pvalue > 1e-3
    if options.get("distribution"):
        assert (np.diff(p) < 0).all()


def test_nothing_is_drawn_outside_training_and_a_resumed_run_goes_on_drawing(tmp_path: Path) -> None:
    made = model()
    assert torch.equal(logits(made), logits(made)) and torch.equal(logits(made), logits(at(made, R)))
    made.train()
    sequence = []
    for step in range(8):
        made(**words())
        sequence.append(layers(made)[0].drawn["default"])
        if step == 3:
            kept = {k: v.clone() for k, v in made.state_dict().items()}
    assert len(set(sequence)) > 1
    again = model(stirred=False)
    again.load_state_dict(kept)
    again.base_model.brick_step["default"] = torch.tensor(4)  # type: ignore[index]
    again.train()
    rest = []
    for _ in range(4):
        again(**words())
        rest.append(layers(again)[0].drawn["default"])
    assert rest == sequence[4:]


def test_a_brick_is_exported_at_every_rank(text_base: Path, tmp_path: Path) -> None:
    training = {"batch": 8, "epochs": 3, "lr": 5e-3}
    brickyard.tune(
        "dylora:r=4", base=str(text_base), data=text_data(), training=training, device="cpu", out=tmp_path / "run"
    )
    folder = next(path.parent for path in (tmp_path / "run").rglob("adapter_config.json"))
    base = open_base(str(text_base))
    sizes = []
    for rank in (1, 3):
        found = export(folder, "peft", tmp_path / f"r{rank}", rank=rank)
        assert found["max_gap"] <= 1e-4 and base.input == "text"
        sizes.append((tmp_path / f"r{rank}" / "adapter_model.safetensors").stat().st_size)
    assert sizes[0] < sizes[1]
    assert export(folder, "merged", tmp_path / "merged", rank=2)["max_gap"] <= 1e-4
    with pytest.raises(UsageError, match=r"trained for \[1, 2, 3, 4\]"):
        export(folder, "peft", tmp_path / "no", rank=5)


def test_a_rank_is_refused_where_a_method_has_one_only() -> None:
    with pytest.raises(Refused, match="one rank only"):
        at(get_peft_model(bert(), BrickyardConfig(method="sora", options={"r": 2})), 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{"r_min": 0}, {"r_min": 9}, {"unit": 3}, {"distribution": "normal"}, {"alpha": 0.0}], ids=str
)
def test_bad_options_are_refused(options: dict) -> None:
    with pytest.raises(UsageError):
        dylora.Config(**options)
    with pytest.raises(Refused, match="exceeds layer"):
        model(r=17)


def answers_of(rates: dict[str, float], seeds: int = 3, n: int = 4000) -> dict[str, Answers]:
    """Answers of which such a share is right, the easiest examples first; seeds differ by a twentieth of a point."""
    hard_N = np.random.Generator(np.random.PCG64(3)).permutation(n) / n
    wobble = lambda seed: 0.0005 * (seed - 1)  # noqa: E731
    return {
        name: Answers(np.ones(n, dtype=int), np.stack([hard_N < rate + wobble(s) for s in range(seeds)]).astype(int))
        for name, rate in rates.items()
    }


RATES = {"majority": 0.4, "lora8": 0.9, **{f"lora{r}": 0.88 for r in (1, 2, 4)}}
RATES |= {f"dylora@{r}": rate for r, rate in zip(checks.RANKS, (0.86, 0.88, 0.89, 0.90), strict=True)}
RATES |= {f"cut@{r} {checks.SCALINGS[0]}": rate for r, rate in zip(checks.RANKS, (0.50, 0.70, 0.80, 0.90), strict=True)}
RATES |= {f"cut@{r} {checks.SCALINGS[1]}": rate for r, rate in zip(checks.RANKS, (0.60, 0.65, 0.85, 0.90), strict=True)}
RATES |= {f"cut@{r} {checks.SVD}": 0.90 for r in checks.RANKS}


def test_the_better_scaling_of_a_cut_counts_and_singular_values_stand_beside_it() -> None:
    found = checks.judged(answers_of(RATES), "accuracy")
    part = found["against_cutting"]
    assert part["holds"] is True  # although singular values keep more than DyLoRA at every rank
    assert [p["b"] for p in part["comparisons"]] == [
        f"cut@1 {checks.SCALINGS[1]}",
        f"cut@2 {checks.SCALINGS[0]}",
        f"cut@4 {checks.SCALINGS[1]}",
    ]
    beside = part["figures"]["against_singular_values"]
    assert all(p["b"].endswith(checks.SVD) and p["measured"] < 0 for p in beside) and checks.SVD in part["detail"]
    near = {**RATES, f"cut@4 {checks.SCALINGS[0]}": 0.889}  # less than a point below DyLoRA
    assert checks.judged(answers_of(near), "accuracy")["against_cutting"]["holds"] is False


def test_the_spread_over_ranks_is_judged_against_half_of_a_cut_loras() -> None:
    part = checks.judged(answers_of(RATES), "accuracy")["spread"]
    assert part["figures"]["spread"] == pytest.approx({"dylora": 4.0, "cut": 30.0}, abs=0.05)
    assert (
        part["holds"] is True
        and part["measured"] == pytest.approx(4 - 15, abs=0.05)
        and part["low"] < part["measured"] < 0
    )
    steep = {**RATES, "dylora@1": 0.70}
    assert checks.judged(answers_of(steep), "accuracy")["spread"]["holds"] is False
    nearly = {**RATES, "dylora@1": 0.755}  # 14.5 points, where 15 are allowed
    assert checks.judged(answers_of(nearly), "accuracy")["spread"]["holds"] == "undecided"
    spoilt = {**RATES, "lora8": 0.45}
    assert {p["holds"] for p in checks.judged(answers_of(spoilt), "accuracy").values()} == {"set-up invalid"}
    assert {c.part for c in dylora.RECORD.claims if c.measure == "by_rank"} == {
        *checks.judged(answers_of(RATES), "accuracy")
    }


def bits_of(gains: dict[str, float], seeds: int = 3, n: int = 200) -> dict[str, Answers]:
    """Nats of documents of 100 bytes under models that need so much less than 2 bits a byte."""
    hard_N = np.random.Generator(np.random.PCG64(3)).normal(0, 0.1, n)
    nats = lambda gain, seed: np.log(2) * 100 * (2.0 + hard_N - gain * (1 + 0.02 * hard_N) + 1e-4 * seed)  # noqa: E731
    return {
        name: Answers(np.full(n, 100), np.stack([nats(gain, s) for s in range(seeds)])) for name, gain in gains.items()
    }


def test_on_a_language_model_shares_of_the_gain_over_the_untouched_base_count() -> None:
    gains = {"base": 0.0, **{f"lora{r}": 0.20 for r in checks.RANKS}, **{f"dylora@{r}": 0.19 for r in checks.RANKS}}
    for scaling, gain in zip(checks.SCALINGS, (0.05, 0.10), strict=True):
        gains |= {f"cut@{r} {scaling}": gain for r in checks.RANKS}
    gains |= {f"cut@{r} {checks.SVD}": 0.20 for r in checks.RANKS}
    found = checks.judged(bits_of(gains), "bits_per_byte")
    assert {name: part["holds"] for name, part in found.items() if name != "spread"} == {
        "every_rank": True,
        "against_cutting": True,
    }
    assert found["every_rank"]["gate"]["measured"] == pytest.approx(20, abs=0.1)
    assert found["every_rank"]["control"]["destroyed"] is True
    assert {p["b"].partition(" ")[2] for p in found["against_cutting"]["comparisons"]} == {checks.SCALINGS[1]}
    assert "dylora@1 - 0.9 lora1 +1.0" in found["every_rank"]["detail"] and "dylora@1 19.0" in found["spread"]["detail"]
    poor = {**gains, "dylora@2": 0.17}
    assert checks.judged(bits_of(poor), "bits_per_byte")["every_rank"]["holds"] is False
    nothing = {**gains, "lora8": 0.001}
    assert {p["holds"] for p in checks.judged(bits_of(nothing), "bits_per_byte").values()} == {"set-up invalid"}
