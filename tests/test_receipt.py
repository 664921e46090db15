from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from brickyard.core.attached import Attached
from brickyard.core.errors import NoEffect, NotFinite, ParityBroken, Refused, Unmatched
from brickyard.core.receipt import (
    SAMPLES,
    TOLERANCE,
    assert_effect,
    assert_parity,
    logit_distance,
    parity,
    probe_logits,
    receipt,
    snapshot,
)


class Low(nn.Module):
    """A frozen linear layer plus a low-rank change, shaped like an adapter library's layer."""

    def __init__(self, base_layer: nn.Linear, rank: int = 2):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base_layer.in_features))
        self.up = nn.Parameter(torch.zeros(base_layer.out_features, rank))

    def forward(self, x_BD):
        return self.base_layer(x_BD) + x_BD @ self.down.T @ self.up.T


class Net(nn.Module):
    def __init__(self, depth: int = 3, width: int = 8):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x_BD):
        for layer in self.layers:
            x_BD = torch.relu(layer(x_BD))
        return SequenceClassifierOutput(logits=self.head(self.norm(self.dropout(x_BD))))


def adapted() -> Net:
    net = Net().requires_grad_(False)
    for index, layer in enumerate(net.layers):
        net.layers[index] = Low(layer)
    return net


BATCH = {"x_BD": torch.randn(16, 8, generator=torch.Generator().manual_seed(1))}


def attached(model: nn.Module, matched: dict[str, list[str]] | None = None) -> Attached:
    return Attached(
        model=model,
        parameter_groups=[{"params": [p for p in model.parameters() if p.requires_grad]}],
        tensors=dict,
        load=lambda tensors: None,
        detach=lambda: model,
        matched=matched or {},
    )


def stage(model: nn.Module, change, *, batch=BATCH) -> dict:
    """The receipt of a change of the model."""
    before, logits = snapshot(model), probe_logits(model, batch)
    change(model)
    return receipt(before, model, attached(model), batch, logits)


def descend(model: nn.Module, lr: float = 0.1, wd: float = 0.0, labels: int = 0, steps: int = 1) -> None:
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=wd)
    target = torch.full((16,), labels)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(**BATCH).logits, target, ignore_index=-100, reduction="sum")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def test_a_receipt_says_what_moved_and_how_far():
    model = adapted()

    def change(model):
        with torch.no_grad():
            model.layers[1].up[0, 0] = 3.0
            model.layers[1].up[1, 1] = 4.0
            model.layers[2].down.mul_(1.5)
            model.head.weight[0, 0] += 1.0  # frozen
            model.norm.running_mean.add_(1.0)

    found = stage(model, change)
    moved = {entry["name"]: entry for entry in found["moved"]}
    assert set(moved) == {"layers.1.up", "layers.2.down"}
    assert moved["layers.1.up"]["change"] == pytest.approx(5.0) and moved["layers.1.up"]["largest"] == 4.0
    assert moved["layers.1.up"]["relative"] is None  # it began at zero
    assert moved["layers.2.down"]["relative"] == pytest.approx(0.5, rel=1e-5)
    assert found["unmoved"] == ["layers.0.down", "layers.0.up", "layers.1.down", "layers.2.up"]
    assert found["frozen_moved"] == ["head.weight", "norm.running_mean"]
    assert found["trainable_tensors"] == 6 and found["trainable_parameters"] == 6 * 16
    assert found["change"] == pytest.approx(math.hypot(5.0, moved["layers.2.down"]["change"]))
    assert found["logits"]["rows"] == 16 and found["logits"]["max"] >= found["logits"]["mean"] > 0
    assert any("4 of 6 trainable" in text for text in found["warnings"])
    assert json.loads(json.dumps(found)) == found
    assert_effect(found)


def test_training_that_has_an_effect_passes():
    found = stage(adapted(), lambda m: descend(m, steps=3))
    assert_effect(found)
    assert found["unmoved"] == [] and found["not_finite"] == []


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("nothing", lambda m: None),
        ("learning rate 0", lambda m: descend(m, lr=0.0)),
        ("every label masked", lambda m: descend(m, labels=-100)),
        ("a copy trained instead", lambda m: descend(copy.deepcopy(m))),
    ],
)
def test_training_that_changes_nothing_fails(what, change):
    with pytest.raises(NoEffect, match="no trainable tensor moved: all 6 are bit-equal"):
        assert_effect(stage(adapted(), change))


def test_weight_decay_alone_is_no_effect():
    """Every label masked, with weight decay: the tensors move, by shrinking only."""
    found = stage(adapted(), lambda m: descend(m, lr=1e-3, wd=0.1, labels=-100, steps=5))
    assert len(found["moved"]) == 3 and all(entry["only_decayed"] for entry in found["moved"])
    with pytest.raises(NoEffect, match="3 of 6 trainable tensors only shrank"):
        assert_effect(found)
    found = stage(adapted(), lambda m: descend(m, lr=1e-3, wd=0.1, steps=2))
    assert not any(entry["only_decayed"] for entry in found["moved"])
    assert_effect(found)


def test_moved_tensors_that_do_not_reach_the_output_fail():
    model = adapted()
    model.spare = nn.Parameter(torch.zeros(8))
    found = stage(model, lambda m: m.spare.data.fill_(1.0))
    with pytest.raises(NoEffect, match="bit-equal to the base's"):
        assert_effect(found)


def test_nan_is_named():
    def change(model):
        model.layers[2].up.data[3, 1] = math.nan

    found = stage(adapted(), change)
    assert found["not_finite"] == ["layers.2.up", "logits on the probe batch"] and found["logits"]["kl"] is None
    with pytest.raises(NotFinite, match=r"layers\.2\.up"):
        assert_effect(found)

    def infinite(model):
        model.norm.running_var.fill_(-1.0)  # finite tensors, logits that are not

    with pytest.raises(NotFinite, match="logits"):
        assert_effect(stage(adapted(), infinite))


def test_resized_tensors_count_as_change():
    def narrower(model):
        model.layers[0].down = nn.Parameter(model.layers[0].down[:1].detach())
        model.layers[0].up = nn.Parameter(model.layers[0].up[:, :1].detach())

    model = adapted()
    before = snapshot(model)
    narrower(model)
    found = receipt(before, model, attached(model))
    assert [(e["name"], e["from"], e["to"]) for e in found["reshaped"]] == [
        ("layers.0.down", [2, 8], [1, 8]),
        ("layers.0.up", [8, 2], [8, 1]),
    ]
    assert found["logits"] is None
    assert_effect(found)


def test_an_unmatched_pattern_is_an_error():
    model = adapted()
    before = snapshot(model)
    descend(model)
    found = receipt(before, model, attached(model, {"query": ["layers.0"], "gate": []}))
    with pytest.raises(Unmatched, match="'gate' matched no module"):
        assert_effect(found)


def test_snapshot_copies_only_what_trains():
    model = adapted()
    kept = snapshot(model)
    assert set(kept.trainable) == {f"layers.{i}.{n}" for i in range(3) for n in ("down", "up")}
    assert all(t.data_ptr() != dict(model.named_parameters())[n].data_ptr() for n, t in kept.trainable.items())
    assert "head.weight" in kept.frozen and "norm.num_batches_tracked" in kept.frozen
    with pytest.raises(Refused, match="no values"):
        snapshot(nn.Linear(2, 2, device="meta"))


def test_frozen_fingerprint_sees_shape_type_and_sampled_values():
    class Holder(nn.Module):
        def __init__(self, tensor):
            super().__init__()
            self.register_buffer("t", tensor)

    def mark(tensor):
        return snapshot(Holder(tensor)).frozen["t"]

    big = torch.zeros(100, SAMPLES)
    changed = big.clone()
    changed[0, 0] = 1.0  # the first and last element are always sampled
    distinct = [
        big,
        changed,
        big.reshape(SAMPLES, 100),
        big.bfloat16(),
        big.double(),
        torch.zeros(0),
        torch.tensor(True),
    ]
    assert len({mark(t) for t in distinct}) == len(distinct)
    assert mark(big) == mark(big.clone()) == mark(torch.zeros(SAMPLES, 100).T)


def test_logit_distance_by_hand():
    base, tuned = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3.0)]])
    found = logit_distance(tuned, base)
    assert found["max"] == pytest.approx(math.log(3)) and found["mean"] == pytest.approx(math.log(3) / 2)
    assert found["kl"] == pytest.approx(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75), rel=1e-6)
    assert logit_distance(base, base) == {"max": 0.0, "mean": 0.0, "kl": 0.0, "rows": 1, "finite": True}
    assert logit_distance(torch.ones(4, 1), torch.zeros(4, 1))["kl"] is None
    with pytest.raises(Refused, match="cannot be compared"):
        logit_distance(torch.ones(4, 1), torch.zeros(4, 2))


def folded(model: Net, scale: float = 1.0) -> Net:
    """The adapted model with each change added into its layer."""
    plain = copy.deepcopy(model)
    for index, layer in enumerate(plain.layers):
        linear = layer.base_layer
        linear.weight.data += scale * layer.up.data @ layer.down.data
        plain.layers[index] = linear
    return plain


def tuned() -> Net:
    model = adapted()
    descend(model, steps=5)
    return model


def test_parity_of_a_right_merge_holds():
    model = tuned().train()
    found = parity(model, folded(model), {**BATCH, "labels": torch.zeros(16)})
    assert found["holds"] and found["max_gap"] < 1e-5 and found["dtype"] == "float32" and found["rows"] == 16
    assert found["tolerance"] == TOLERANCE[torch.float32]
    assert_parity(found, "merge")
    assert model.training and model.dropout.training
    again = parity(model, copy.deepcopy(model), BATCH)
    assert again["max_gap"] == 0.0 and again["worst_layer"] is None


def test_parity_of_a_wrong_merge_names_the_worst_layer():
    model = tuned()
    wrong = folded(model)
    wrong.layers[1] = copy.deepcopy(model.layers[1].base_layer)  # this layer's change was lost; later ones are innocent
    found = parity(model, wrong, BATCH)
    assert not found["holds"] and found["worst_layer"] == "layers.1" and found["worst_layer_gap"] > 0.01
    with pytest.raises(ParityBroken, match=r"merge: the largest logit gap is .* worst layer layers\.1"):
        assert_parity(found, "merge")
    assert not parity(model, folded(model, scale=0.5), BATCH)["holds"]
    assert parity(model, folded(model, scale=0.5), BATCH, tolerance=10.0)["holds"]


def test_parity_when_only_the_wiring_differs():
    class Swapped(Net):
        def forward(self, x_BD):
            return super().forward(x_BD.flip(-1))

    plain, swapped = Net(), Swapped()
    swapped.load_state_dict(plain.state_dict())
    found = parity(plain, swapped, BATCH)
    assert not found["holds"] and found["worst_layer"] is None
    with pytest.raises(ParityBroken, match="how layers are put together"):
        assert_parity(found, "export")


def test_parity_across_types_and_broken_values():
    plain = Net()
    half = copy.deepcopy(plain).bfloat16()

    class Cast(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.module = inner

        def forward(self, x_BD):
            return self.module(x_BD.bfloat16())

    found = parity(plain, Cast(half), BATCH)
    assert found["dtype"] == "bfloat16" and found["holds"] and found["max_gap"] > 1e-4
    assert found["worst_layer"] is not None
    broken = copy.deepcopy(plain)
    broken.layers[2].weight.data[0, 0] = math.nan
    found = parity(plain, broken, BATCH)
    assert not found["holds"] and found["max_gap"] == math.inf and found["worst_layer"] == "layers.2"
    narrower = copy.deepcopy(plain)
    narrower.head = nn.Linear(8, 2)
    with pytest.raises(ParityBroken, match="shape"):
        parity(plain, narrower, BATCH)
