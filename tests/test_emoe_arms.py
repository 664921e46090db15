"""EMoE in arms: sparse in training, served as asked, and no hand-over that forgets it; the learned gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import asked
from mixtures import (
    EMOE,
    IDS,
    SMALL,
    TASK,
    batch,
    classifier,
    gaussian,
    made,
    nonzero,
    out,
    run,
    seen,
    setting,
)
from peft import LoraConfig, PeftModel, get_peft_model

from brickyard.core import brick as bricks
from brickyard.core import trial
from brickyard.core.answers import answer, predict
from brickyard.core.arm import parse
from brickyard.core.base import open_base
from brickyard.core.build import build, resolve
from brickyard.core.errors import BadBrick, Refused
from brickyard.core.export import export
from brickyard.core.ffn import ffns
from brickyard.core.measure import saved_for_backward
from brickyard.core.scale import scaled
from brickyard.core.structure import PREFIX
from brickyard.core.verify import verify
from brickyard.merging.inputs import open_ground, open_inputs
from brickyard.tune import emoe
from brickyard.tune.emoe import restructure, to_dense


@pytest.mark.parametrize("tuner", ["full", "lora:r=4,target=all-linear", "bitfit", "mos:r=3,e=2,p=1,l=2", "ia3"])
def test_it_is_sparse_in_training_and_served_as_asked(tuner: str, text_base: Path) -> None:
    for keep in ("sparse", "dense"):
        attached = classifier(text_base, f"{tuner} + {EMOE},keep={keep}")
        served = 32 if keep == "sparse" else 64
        assert nonzero(attached.model) == served and nonzero(attached.model, 1) == 64
        with attached.saving():
            assert nonzero(attached.model) == 32
            with attached.serving():
                assert nonzero(attached.model) == served
        with attached.untouched():
            assert nonzero(attached.model) == 64
        assert attached.matched["emoe"] == [
            "bert.encoder.layer.0.intermediate.dense",
            "bert.encoder.layer.0.output.dense",
        ]


def test_gates_follow_the_adapter(text_base: Path) -> None:
    """The experts chosen under LoRA are those of the merged weights, whatever the base's would be."""
    attached = classifier(text_base, f"lora:r=4,target=all-linear + {EMOE}")
    before = seen(attached.model, batch())["hidden"] != 0
    with torch.no_grad():
        for p in attached.parameters():
            p.add_(0.3 * gaussian(*p.shape, seed=p.numel()))
    adapted = seen(attached.model, batch())
    assert ((adapted["hidden"] != 0) != before).any()
    [gate] = emoe._gates(ffns(attached.model, (0,), "test")[0].key_layer)
    layer: Any = gate.ffn.key_layer
    weight_FD = layer.weight + layer.get_delta_weight("default")
    mean_ND = torch.stack([weight_FD[gate.split.labels_F == n].mean(0) for n in range(8)])  # type: ignore[union-attr]
    chosen = (adapted["x"] @ mean_ND.T).topk(4).indices.sort(-1).values
    works = adapted["hidden"].abs() @ gate.split.members(weight_FD).T != 0  # type: ignore[union-attr]
    assert torch.equal(works, F.one_hot(chosen, 8).sum(-2).bool())


@pytest.mark.parametrize("tuner", ["full", "lora:r=4"])
def test_a_sparse_brick_brings_the_neurons_that_it_was_tuned_with(tuner: str, text_base: Path, tmp_path: Path) -> None:
    result = run(text_base, f"{tuner} + {EMOE}", tmp_path)
    made_ = bricks.load(tmp_path / "brick")
    key = f"{PREFIX}bert.encoder.layer.0.expert_of"
    assert made_.tensors()[key].dtype == torch.int32 and made_.manifest["structure"]["topk"] == 4
    assert result["cost"]["structure_seconds"] > 0 and result["receipt"]["matched"]["emoe"]
    applied = made_.apply()
    ready = trial.prepare(setting(text_base, f"{tuner} + {EMOE}"), ("train", "test"))
    found = answer(applied.model, ready.encoded["test"], ready.task)
    labels = ready.encoded["test"].labels.numpy()
    assert ready.task.score(labels, found.predictions) == result["score"]["mean"]
    assert nonzero(applied.model) == 32
    # Another split in the file is another model: what stands there is used, not what a new clustering would give.
    other = dict(made_.tensors())
    other[key] = other[key].roll(5)
    applied.attached.load(other)
    assert not np.array_equal(answer(applied.model, ready.encoded["test"], ready.task).logits, found.logits)
    for wrong, words in ((torch.zeros(64, dtype=torch.int32), "one size"), (other[key][:32], "the model takes")):
        with pytest.raises(BadBrick, match=words):
            applied.attached.load({**other, key: wrong})
    with pytest.raises(BadBrick, match="the model takes"):
        applied.attached.load({k: v for k, v in other.items() if k != key})
    plain = applied.undo()
    assert nonzero(plain) == 64 and not any("emoe" in name for name in plain.state_dict())


def test_a_dense_brick_is_the_tuners_own(text_base: Path, tmp_path: Path) -> None:
    """EMoE-to-dense: it opens in plain PEFT, merges, and answers as it was evaluated at the end of training."""
    result = run(text_base, f"lora:r=4 + {EMOE},keep=dense", tmp_path)
    made_ = bricks.load(tmp_path / "brick")
    assert "structure" not in made_.manifest and not any(k.startswith(PREFIX) for k in made_.tensors())
    ready = trial.prepare(setting(text_base, "lora:r=4"), ("train", "test"))
    opened = PeftModel.from_pretrained(ready.base.model(ready.task, seed=9), str(tmp_path / "brick")).eval()
    answers = answer(opened, ready.encoded["test"], ready.task)
    labels = ready.encoded["test"].labels.numpy()
    assert ready.task.score(labels, answers.predictions) == result["score"]["mean"]
    assert nonzero(made_.apply().model) == 64
    done = export(tmp_path / "brick", "merged", tmp_path / "merged")
    assert done["max_gap"] < 1e-5
    assert verify(str(text_base), tmp_path / "brick", tmp_path / "merged")["holds"]
    assert export(tmp_path / "brick", "peft", tmp_path / "peft")["max_gap"] < 1e-5
    # The training itself was another than without EMoE.
    run(text_base, "lora:r=4", tmp_path / "plain")
    theirs = bricks.load(tmp_path / "plain" / "brick").tensors()
    assert any(not torch.equal(t, theirs[k]) for k, t in made_.tensors().items())


def test_no_hand_over_forgets_that_a_brick_is_sparse(text_base: Path, tmp_path: Path) -> None:
    for tuner in ("full", "lora:r=4"):
        folder = tmp_path / tuner[:4]
        run(text_base, f"{tuner} + {EMOE}", folder)
        assert verify(str(text_base), folder / "brick")["holds"]
        # Plain PEFT would open an adapter and run all of its layers.
        assert {p.name for p in (folder / "brick").iterdir()} == {"brick.json", "weights.safetensors"}
        for to in ("merged", "peft"):
            with pytest.raises(Refused, match=r"runs a part of its layers \(4 of 8 experts in 1 block\).*keep=dense"):
                export(folder / "brick", to, folder / to)
        assert not (folder / "merged").exists()
        with pytest.raises(Refused, match="merge bricks that were tuned with"):
            open_inputs([str(folder / "brick")], open_ground(str(text_base)), mixed=True, force=False)


def test_validation_sees_the_model_that_will_be_served(text_base: Path, tmp_path: Path) -> None:
    for keep in ("sparse", "dense"):
        result = run(text_base, f"full + {EMOE},keep={keep}", tmp_path / keep)
        model = bricks.load(tmp_path / keep / "brick").apply().model
        ready = trial.prepare(setting(text_base, "full"))
        found = answer(model, ready.encoded["validation"], ready.task)
        kept = next(p for p in result["history"] if p["step"] == result["best_step"])
        assert float(np.mean(found.losses)) == pytest.approx(kept["validation_loss"], rel=1e-4), keep


def test_a_resumed_run_has_the_split_of_the_base(text_base: Path) -> None:
    """Weights that move, or are read from a checkpoint, leave the split of a dense-kept run as it was."""
    attached = classifier(text_base, f"full + {EMOE},keep=dense")
    [gate] = emoe._gates(ffns(attached.model, (0,), "test")[0].key_layer)
    before = gate.split.labels_F.clone()  # type: ignore[union-attr]
    attached.load({k: t + gaussian(*t.shape) if t.is_floating_point() else t for k, t in attached.tensors().items()})
    with attached.saving():
        out(attached.model, batch())
    assert torch.equal(gate.split.labels_F, before)  # type: ignore[union-attr]


def test_the_base_that_a_change_is_compared_with_is_whole(causal_base: Path) -> None:
    """The reference of DPO under LoRA: the adapter off, and every neuron at work."""
    training = {"epochs": 1, "batch": 16}
    one = trial.Setting(
        arm=f"lora:r=4 + {EMOE}", base=str(causal_base), data=asked("preference"), training=training, device="cpu"
    )
    ready = trial.prepare(one, ("train",))
    attached = build(ready.plan, ready.base, ready.task, seed=0)
    rows = ready.encoded["train"].collate(np.arange(4))
    untouched = build(resolve(parse("lora:r=4"), ready.task), ready.base, ready.task, seed=0)
    with torch.no_grad():
        for p in attached.parameters():
            p.add_(0.1)
    with attached.saving():
        found: Any = attached.objective._reference(attached.model.get_base_model(), rows)  # type: ignore[union-attr]
    expected: Any = untouched.objective._reference(untouched.model.get_base_model(), rows)  # type: ignore[union-attr]
    torch.testing.assert_close(found.hidden, expected.hidden)


@pytest.mark.parametrize("tuner", ["full:lr=0.03", "lora:r=4,target=all-linear,lr=0.03"])
def test_a_sweep_of_strength_gates_by_the_swept_weights(tuner: str, text_base: Path, tmp_path: Path) -> None:
    run(text_base, f"{tuner} + {EMOE}", tmp_path)
    made_ = bricks.load(tmp_path / "brick")
    base = open_base(str(text_base))
    model = made_.apply().model
    start = classifier(text_base, f"full + {EMOE}").model
    with scaled(model, base, made_, 0.0):
        found = seen(model, batch())["hidden"]
    torch.testing.assert_close(found, seen(start, batch())["hidden"], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(seen(model, batch())["hidden"], found, atol=1e-3)


def test_what_stands_beside_it(text_base: Path) -> None:
    for arm, words in (
        ("emoe", "trains nothing"),
        ("linear-probe + emoe", "a head alone trains no layers below it"),
    ):
        with pytest.raises(Refused, match=words):
            resolve(parse(arm), TASK)
    with pytest.raises(Refused, match="kept states of layers"):
        classifier(text_base, f"telly:k=1 + {EMOE}")
    for arm in (f"lora:r=4 + s2a:group=16 + {EMOE}", f"full + zo-sgd + {EMOE},keep=dense"):
        attached = classifier(text_base, arm)
        with attached.saving():
            assert nonzero(attached.model) == 32
            attached.model.eval()  # zo looks at losses in evaluation mode
            assert nonzero(attached.model) == 32


def test_it_keeps_a_boolean_an_expert_for_the_backward_pass(text_base: Path) -> None:
    sizes = {}
    for arm in ("full", f"full + {EMOE}"):
        attached = classifier(text_base, arm)
        sizes[arm] = saved_for_backward(attached.model, batch(), lambda out: out.sum())
    extra = sizes[f"full + {EMOE}"].bytes - sizes["full"].bytes
    # Tokens x N booleans and the N x F matrix of members; the masked hidden takes the place of the plain one, which
    # the activation's own backward pass does not want.
    assert extra <= IDS.numel() * 8 + 4 * 8 * 64 and not sizes[f"full + {EMOE}"].hidden


# The learned gate and the control


def test_router_values_have_mean_one_over_the_chosen_and_carry_a_gradient() -> None:
    p_TN = gaussian(6, 8).softmax(-1).requires_grad_()
    m_TN = emoe.top(p_TN.detach(), 3)
    v_TN = emoe.router_values(p_TN, m_TN)
    assert ((v_TN != 0) == m_TN).all()
    torch.testing.assert_close(v_TN.sum(-1), torch.full((6,), 3.0))
    (v_TN**2).sum().backward()
    assert (p_TN.grad[m_TN] != 0).all()  # type: ignore[index]


def test_the_balance_loss_counts_real_tokens_alone() -> None:
    even = torch.full((1, 4, 4), 0.25)
    spread = torch.eye(4, dtype=torch.bool)[None]
    assert float(emoe.balance_loss(even, spread, None)) == pytest.approx(1.0)
    one = torch.zeros(1, 4, 4, dtype=torch.bool)
    one[..., 0] = True
    certain = one.float()
    assert float(emoe.balance_loss(certain, one, None)) == pytest.approx(4.0)
    padded = emoe.balance_loss(
        torch.cat([even, certain], 1), torch.cat([spread, one], 1), torch.tensor([[1] * 4 + [0] * 4])
    )
    assert float(padded) == pytest.approx(1.0)
    hidden = emoe._Padding(torch.tensor([[1, 0]])).of(torch.zeros(1, 5, 4))
    assert hidden.tolist() == [[1, 1, 1, 1, 0]]  # type: ignore[union-attr]


def test_a_learned_gate_trains_and_travels(text_base: Path, tmp_path: Path) -> None:
    arm = f"full + {EMOE},gate=learn,width=16"
    result = run(text_base, arm, tmp_path)
    moved = [entry["name"] for entry in result["receipt"]["moved"]]
    assert sum("emoe_router" in name for name in moved) == 4
    made_ = bricks.load(tmp_path / "brick")
    learned = {k for k in made_.tensors() if "emoe_router" in k}
    assert len(learned) == 4 and all(k.startswith(PREFIX) for k in learned)
    applied = made_.apply()
    ready = trial.prepare(setting(text_base, arm), ("train", "test"))
    first = predict(applied.model, ready.encoded["test"])
    np.testing.assert_array_equal(first, predict(applied.model, ready.encoded["test"]))  # no noise once it is tuned
    found = answer(applied.model, ready.encoded["test"], ready.task).predictions
    assert ready.task.score(ready.encoded["test"].labels.numpy(), found) == result["score"]["mean"]
    assert nonzero(applied.model) == 32
    loss = applied.attached.extra_loss
    applied.model.train()
    applied.model(**batch())
    assert loss is not None and loss().item() == pytest.approx(0.01, rel=0.5) and loss().item() == 0.0
    assert "emoe_router" not in " ".join(applied.undo().state_dict())


def test_dropout_at_the_same_activity_is_off_once_it_is_tuned(text_base: Path) -> None:
    attached = classifier(text_base, f"full + {EMOE},gate=dropout,keep=dense")
    model = attached.model
    with attached.saving():
        expected = seen(model, batch())["hidden"]
        assert (expected != 0).all()
        model.train()
        dropped = seen(model, batch())["hidden"]
    share = float((dropped != 0).float().mean())
    assert share == pytest.approx(0.5, abs=0.1)
    assert nonzero(model.eval()) == 64


def test_random_experts_are_equal_and_others(text_base: Path) -> None:
    labels = []
    for split in ("keys", "random"):
        attached = classifier(text_base, f"full + {EMOE},split={split}")
        labels.append(next(t for k, t in attached.tensors().items() if k.startswith(PREFIX)))
        assert torch.bincount(labels[-1]).tolist() == [8] * 8
    assert not torch.equal(*labels)


def test_it_works_on_anybodys_peft_model() -> None:
    model, inputs = made("swiglu")
    wrapped: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["gate_proj", "down_proj"]))
    expected = out(wrapped, inputs)
    structure = restructure(wrapped, SMALL)
    assert not torch.allclose(out(wrapped, inputs), expected) and structure.prepare() >= 0
    sparse = out(wrapped, inputs)
    wrapped.merge_adapter()
    torch.testing.assert_close(out(wrapped, inputs), sparse, atol=1e-5, rtol=1e-5)
    wrapped.unmerge_adapter()
    assert to_dense(wrapped) == 1
    torch.testing.assert_close(out(wrapped, inputs), expected)
