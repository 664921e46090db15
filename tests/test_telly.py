"""Telly-K against its card: what is frozen, what it costs, that kept states change nothing, and how k is chosen."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import documents, image_data, make_text_base, text_data
from transformers import T5Config, T5ForSequenceClassification

from brickyard.core import brick as bricks
from brickyard.core import measure, trial
from brickyard.core.answers import answer
from brickyard.core.arm import parse
from brickyard.core.attached import Attached
from brickyard.core.build import build, resolve, training_of
from brickyard.core.errors import ParityBroken, Refused, UsageError
from brickyard.core.loop import Training, train, train_mode
from brickyard.tune import telly

L = 4
DATA: dict[str, Any] = {"text": text_data(), "decoder": text_data(), "causal": documents(), "image": image_data()}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("four-layers")
    kinds: dict[str, dict[str, bool]] = {"text": {}, "decoder": {"decoder": True}, "causal": {"causal": True}}
    return {kind: make_text_base(folder / kind, layers=L, **flags) for kind, flags in kinds.items()}


@cache
def opened(base: Path, kind: str) -> trial.Prepared:
    asked = trial.Setting(arm="full", base=str(base), data=DATA[kind], task="causal-lm" if kind == "causal" else None)
    return trial.prepare(asked)


def prepared(arm: str, base: Path, kind: str = "text", **changes: Any) -> trial.Prepared:
    """What `trial.prepare` gives, with base and rows opened once for all tests."""
    training = {"steps": 12, "batch": 4, "precision": "float32", "lr": 3e-3, **changes.pop("training", {})}
    asked = trial.Setting(
        arm=arm,
        base=str(base),
        data=DATA[kind],
        task="causal-lm" if kind == "causal" else None,
        training=training,
        cache=False,
        device="cpu",
        **changes,
    )
    ready = opened(base, kind)
    plan = resolve(parse(arm), ready.task)
    known = training_of(plan, {**training, "seed": 0}, Training())
    return replace(ready, setting=asked, plan=plan, training=known)


def attached_of(ready: trial.Prepared) -> Attached:
    return build(ready.plan, ready.base, ready.task, seed=ready.setting.seed, attention=ready.setting.attention)


def losses(ready: trial.Prepared) -> tuple[np.ndarray, Attached, Any]:
    """The training loss after every step, the trained arm, and the rows that it read."""
    attached = attached_of(ready)
    sets, _ = trial.examples(ready, attached)
    every = replace(ready.training, evaluate_every=1)
    history = train(attached, sets["train"], None, ready.task, every, device="cpu").history
    return np.array([point["train_loss"] for point in history]), attached, sets


@pytest.mark.parametrize(
    ("kind", "arm"),
    [
        ("text", "telly"),
        ("text", "telly + linear-probe"),
        ("decoder", "telly"),
        ("causal", "telly"),
        ("image", "telly"),
    ],
)
def test_kept_states_give_the_losses_of_the_ordinary_pass(
    kind: str, arm: str, bases: dict[str, Path], image_base: Path
) -> None:
    base = bases.get(kind, image_base)
    k = 1 if kind == "image" else 3
    found = {}
    for options in (f"k={k},cache=false", f"k={k},store=float32", f"k={k}"):
        found[options] = losses(prepared(arm.replace("telly", f"telly:{options}"), base, kind))
    plain, kept, rounded = (f[0] for f in found.values())
    assert np.ptp(plain) > 0.01
    np.testing.assert_allclose(kept, plain, atol=1e-5)
    # Half precision rounds the states by at most 2^-11; over 12 large steps the losses move by little.
    np.testing.assert_allclose(rounded, plain, rtol=2e-2)
    assert np.abs(rounded - plain).max() > np.abs(kept - plain).max()
    sets = found[f"k={k}"][2]
    assert "entering" in sets["train"].collate(np.arange(2)) and sets["train"].entering.forwards > 0


def test_kept_states_skip_the_frozen_blocks(bases: dict[str, Path]) -> None:
    ready = prepared("telly:k=3", bases["text"])
    attached = attached_of(ready)
    sets, _ = trial.examples(ready, attached)
    batch = sets["train"].collate(np.arange(4))
    ran: list[int] = []
    layers = attached.model.bert.encoder.layer  # type: ignore[union-attr]
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    attached.model(**inputs)
    for i, layer in enumerate(layers):
        layer.attention.register_forward_hook(lambda *_, i=i: ran.append(i))
    kept = attached.model(**inputs).logits
    assert ran == [3]
    inputs.pop("entering")
    ran.clear()
    plain = attached.model(**inputs).logits
    assert ran == [0, 1, 2, 3]
    torch.testing.assert_close(kept, plain, atol=1e-3, rtol=1e-2)


def test_a_failed_pass_leaves_the_model_ordinary(bases: dict[str, Path]) -> None:
    ready = prepared("telly:k=3", bases["text"])
    model = attached_of(ready).model
    batch = {k: v for k, v in ready.encoded["test"].collate(np.arange(4)).items() if k != "labels"}
    before = model(**batch).logits
    with pytest.raises(RuntimeError):
        model(**batch, entering=torch.zeros(4, 3, 5))
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("kind", ["text", "decoder", "causal"])
def test_frozen_tensors_are_not_in_the_optimiser_and_stay_bit_identical(kind: str, bases: dict[str, Path]) -> None:
    ready = prepared("telly:k=2", bases[kind], kind, training={"wd": 0.5})
    attached = attached_of(ready)
    before = {n: p.detach().clone() for n, p in attached.model.named_parameters()}
    optimised = {id(p) for p in attached.parameters()}
    sets, _ = trial.examples(ready, attached)
    train(attached, sets["train"], None, ready.task, ready.training, device="cpu")
    for name, p in attached.model.named_parameters():
        bottom = any(
            part in name for part in ("embed", "bert.pooler", "layer.0.", "layer.1.", "layers.0.", "layers.1.")
        )
        assert bottom == (not p.requires_grad) == (id(p) not in optimised) == torch.equal(p, before[name]), name
        assert p.requires_grad or p.grad is None


def test_a_pretrained_pooler_is_frozen_and_one_that_is_new_trains(bases: dict[str, Path], image_base: Path) -> None:
    model = attached_of(prepared("telly:k=2", bases["text"])).model
    assert not any(p.requires_grad for n, p in model.named_parameters() if "pooler" in n)
    model.new_modules = ("bert.pooler",)  # type: ignore[assignment]
    telly.attach(model, telly.Config(k=2), prepared("full", bases["text"]).task)
    assert all(p.requires_grad for n, p in model.named_parameters() if "pooler" in n)


@pytest.mark.parametrize("kind", ["text", "causal"])
def test_bytes_kept_for_backward_fall_by_the_same_for_every_frozen_layer(kind: str, bases: dict[str, Path]) -> None:
    def kept(arm: str) -> int:
        ready = prepared(arm, bases[kind], kind, attention="eager")
        batch = ready.encoded["train"].collate(np.arange(2))
        labels = batch.pop("labels")
        model = attached_of(ready).model
        return measure.saved_for_backward_bytes(model, batch, lambda out: ready.task.loss(out, labels))

    sizes = [kept(f"telly:k={k},cache=false") for k in range(L)]
    falls = -np.diff(sizes)
    assert (falls > 0).all() and len(set(falls[1:])) == 1
    # What is left at k = L - 1 is one block and the head: the frozen ones add nothing.
    assert falls[1] * 1.0 <= sizes[-1] < kept("full") - (L - 1) * falls[1]


@pytest.mark.parametrize("cache", [True, False])
def test_frozen_layers_rest_while_the_others_train(cache: bool, bases: dict[str, Path]) -> None:
    """No dropout below, though the model's own rate is 0.1: two passes give one H_K, and other logits."""
    ready = prepared(f"telly:k=2,cache={str(cache).lower()}", bases["text"])
    model: Any = attached_of(ready).model
    train_mode(model)
    batch = {k: v for k, v in ready.encoded["train"].collate(np.arange(4)).items() if k != "labels"}
    states: list[torch.Tensor] = []
    model.bert.encoder.layer[2].register_forward_pre_hook(lambda _, args: states.append(args[0]))
    logits = [model(**batch).logits for _ in range(2)]
    assert torch.equal(*states) and not states[0].requires_grad and not torch.equal(*logits)
    modes = [{m.training for m in layer.modules()} for layer in model.bert.encoder.layer]
    assert modes == [{False}, {False}, {True}, {True}]


def test_the_brick_answers_in_an_ordinary_pass_over_whole_rows(bases: dict[str, Path], tmp_path: Path) -> None:
    for kind in ("text", "causal"):
        ready = prepared("telly:k=2,store=float32", bases[kind], kind)
        result = trial.tune(ready, tmp_path / kind)
        made = bricks.load(tmp_path / kind / "brick").apply().model
        again = answer(made, ready.encoded["test"], ready.task)
        assert ready.encoded["test"].entering is None
        table = __import__("pyarrow.parquet").parquet.read_table(tmp_path / kind / "answers.parquet")
        np.testing.assert_allclose(again.losses, table["loss"].to_numpy(), atol=1e-4)
        cost = result["cost"]
        assert cost["states_dtype"] == "float32" and cost["states_bytes"] > 0 and not cost["states_overflowed"]
        assert cost["train_seconds"] > cost["states_seconds"] > 0
        names = bricks.load(tmp_path / kind / "brick").tensors()
        assert not any("embed" in n or "layers.1." in n or "layer.1." in n for n in names)


def test_half_precision_is_counted_and_parity_refuses_what_it_breaks(bases: dict[str, Path]) -> None:
    ready = prepared("telly:k=3", bases["text"])
    attached = attached_of(ready)
    _, cost = trial.examples(ready, attached)
    assert cost["states_dtype"] == "float16" and 0 < cost["states_largest_rounding"] < 2**-9
    assert attached.prefix is not None
    batch = {k: v for k, v in ready.encoded["train"].collate(np.arange(4)).items() if k != "labels"}
    with pytest.raises(ParityBroken, match="float32"):
        attached.prefix.agree(batch, batch | {"entering": torch.zeros(*batch["input_ids"].shape, 32)})


def test_undo_takes_every_hook_off_and_ties_again(bases: dict[str, Path]) -> None:
    ready = prepared("telly:k=2,untie=true", bases["causal"], "causal")
    attached = attached_of(ready)
    model: Any = attached.model
    assert model.lm_head.weight is not model.model.embed_tokens.weight and model.lm_head.weight.requires_grad
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert "lm_head.weight" in attached.tensors()
    assert attached.detach() is model and not model._forward_pre_hooks
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings


def test_a_tied_output_layer_is_frozen_with_its_embedding_and_the_receipt_says_so(bases: dict[str, Path]) -> None:
    attached = attached_of(prepared("telly:k=2", bases["causal"], "causal"))
    said = {what: names for what, names in attached.matched.items() if "output layer" in what}
    assert list(said.values()) == [["lm_head"]]
    assert not attached.model.lm_head.weight.requires_grad  # type: ignore[union-attr]
    assert attached.model.model.norm.weight.requires_grad  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="is not its embedding"):
        attached_of(prepared("telly:untie=true", bases["text"]))


def test_the_control_trains_as_many_parameters_at_the_bottom(bases: dict[str, Path]) -> None:
    bottom, top = (attached_of(prepared(f"telly:k=1{more}", bases["text"])) for more in ("", ",top=true"))
    assert sum(p.numel() for p in bottom.parameters()) == sum(p.numel() for p in top.parameters())
    assert top.prefix is None and bottom.prefix is not None
    assert top.matched["frozen layers"] == ["bert.encoder.layer.3"]


@pytest.mark.parametrize(("k", "frozen"), [("none", 2), ("0", 0), ("3", 3)])
def test_half_of_the_layers_are_frozen_by_default(k: str, frozen: int, bases: dict[str, Path]) -> None:
    attached = attached_of(prepared(f"telly:k={k}", bases["text"]))
    assert len(attached.matched.get("frozen layers", [])) == frozen and (attached.prefix is None) == (frozen == 0)


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        ("telly:k=4", "L=4"),
        ("telly:k=-2", "k=-2"),
        ("telly:k=-1", "give k itself"),
        ("telly:threshold=2.0", "threshold=2.0"),
        ("telly:auto_rows=1", "auto_rows=1"),
    ],
)
def test_layers_that_there_are_not_are_a_usage_error(arm: str, words: str, bases: dict[str, Path]) -> None:
    task = prepared("full", bases["text"])
    with pytest.raises(UsageError, match=words):
        build(resolve(parse(arm), task.task), task.base, task.task, seed=0)


def test_two_stacks_are_refused(bases: dict[str, Path]) -> None:
    config = T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_decoder_layers=2, num_heads=2)
    with pytest.raises(Refused, match="has 2"):
        telly.layers_of(T5ForSequenceClassification(config))


def test_k_is_chosen_from_the_layers_that_tuning_left_alike(bases: dict[str, Path], tmp_path: Path) -> None:
    ready = prepared("telly:k=-1,threshold=0.9,auto_steps=8", bases["text"], training={"lr": 3e-4})
    result = trial.tune(ready, tmp_path)
    chosen = result["chosen"]["telly"]
    assert len(chosen["rho"]) == L + 1 and chosen["steps"] == 8 and chosen["rows"] == 96
    assert chosen["k"] == min(sum(np.cumprod(np.array(chosen["rho"][1:]) >= 0.9)), L - 1)
    made = bricks.load(tmp_path / "brick")
    assert made.manifest["arm"] == f"telly:auto_steps=8,k={chosen['k']},threshold=0.9"
    assert made.manifest["asked"] == result["arm"] == "telly:auto_steps=8,k=-1,threshold=0.9"
    assert made.manifest["chosen"] == result["chosen"]
    assert result["cost"]["train_seconds"] > chosen["seconds"]
    assert predicts_alike(made, ready, tmp_path)
    known = trial.probe({"setting": asdict(ready.setting), "batches": 1})
    assert known["choosing_seconds"] > 0 and known["states_of"] == ""


def predicts_alike(made: bricks.Brick, ready: trial.Prepared, folder: Path) -> bool:
    found = answer(made.apply().model, ready.encoded["test"], ready.task).predictions
    table = __import__("pyarrow.parquet").parquet.read_table(folder / "answers.parquet")
    return bool((found == table["prediction"].to_numpy()).mean() > 0.95)


@pytest.mark.parametrize(("rates", "lowest"), [({"lr": 0.0}, 1.0), ({"lr": 3e-2}, -1.0)])
def test_a_run_that_changes_nothing_freezes_all_but_the_top(rates: Any, lowest: float, bases: dict[str, Path]) -> None:
    ready = prepared("telly:k=-1,auto_steps=20", bases["text"], training=rates)
    _, reports = trial.settle(ready)
    if lowest == 1.0:
        assert reports["telly"]["rho"] == pytest.approx([1.0] * (L + 1)) and reports["telly"]["k"] == L - 1
    else:
        assert min(reports["telly"]["rho"]) < 0.95 and reports["telly"]["k"] < L - 1


def test_documents_longer_than_a_block_train_from_kept_states(bases: dict[str, Path], tmp_path: Path) -> None:
    short = documents(train=150)["train"]["text"]
    rows = {**documents(), "train": {"text": [" ".join(short[i : i + 5]) for i in range(0, 150, 5)]}}
    asked = trial.Setting(
        arm="telly:k=2", base=str(bases["causal"]), data=rows, task="causal-lm", max_length=8, device="cpu",
        training={"epochs": 1, "batch": 4, "precision": "float32", "lr": 3e-3},
    )  # fmt: skip
    ready = trial.prepare(asked)
    assert len(ready.encoded["train"]) > len(ready.encoded["train"].labels) == 30
    found = trial.tune(ready, tmp_path / "run")
    assert found["steps"] == -(-len(ready.encoded["train"]) // 4)
