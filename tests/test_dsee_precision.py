"""DSEE where types and devices differ: small changes survive half precision, and nothing leaves the model's device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bridged import bert
from test_dsee import HALVES, attached, pruner
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from brickyard.core.attached import Attached
from brickyard.tune import dsee

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.mark.parametrize("under_autocast", [False, True])
def test_a_small_change_of_a_coefficient_survives_half_precision(under_autocast: bool) -> None:
    base = bert() if under_autocast else bert().bfloat16()
    of = pruner(attached(stirred=False, model=base, **HALVES))
    layer = of.layers[of.parts[1].gate]
    x = torch.randn(3, 5, layer.base_weight().shape[1]).bfloat16()
    before = layer(x) if not under_autocast else None
    scale = layer.get_parameter("brick_scale.default")
    with torch.no_grad():
        scale.add_(torch.randn_like(scale) * 1e-3)  # below what bfloat16 can add to 1
    with torch.autocast("cpu", torch.bfloat16, enabled=under_autocast):
        found = layer(x)
    bias = layer.base_layer.bias.bfloat16()  # type: ignore[union-attr,operator]
    expected = F.linear((x * scale).bfloat16(), layer.base_weight().bfloat16(), bias)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert before is None or not torch.equal(found, before)


def test_the_dense_change_is_the_same_under_autocast() -> None:
    of = pruner(attached())
    part = next(iter(of.layers.values())).part("default")
    alone = dsee.weight(of.config, part)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(dsee.weight(of.config, part), alone, rtol=0, atol=0)


class OneDevice(TorchFunctionMode):
    """Stops where a tensor is indexed by one of another device, which a GPU refuses and the meta device does not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("index_select", "__getitem__", "__setitem__"):
            devices = {a.device for a in args if isinstance(a, torch.Tensor)}
            assert len(devices) < 2, f"{func.__name__} across {devices}"
        return func(*args, **(kwargs or {}))


def test_pruning_and_opening_stay_on_the_models_device(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every entry of S stays, for a tensor without numbers can be asked for none.
    monkeypatch.setattr("torch.fx.experimental._config.meta_nonzero_assume_all_nonzero", True)
    stored = attached(**HALVES)
    pruner(stored).prune(None, torch.Generator().manual_seed(0))
    tensors = {f"{k.removeprefix('base_model.')}.default": t for k, t in stored.tensors().items()}

    def elsewhere() -> Attached:
        made = attached(**HALVES)
        made.model.to("meta")
        for layer in pruner(made).layers.values():
            for name, box in layer.named_children():
                if name.startswith("brick_fixed_"):
                    box["default"] = box["default"].to("meta")  # type: ignore[index,operator]
        return made

    def all_of(made: Attached) -> set[str]:
        return {t.device.type for t in (*made.model.parameters(), *made.model.buffers())}

    drawn = elsewhere()
    with OneDevice():
        for unit in pruner(drawn).parts:
            pruner(drawn).keep(unit, torch.arange(unit.count // 2), None)  # drawn on the CPU, as with score=random
    assert all_of(drawn) == {"meta"}
    opened = elsewhere()
    for layer in pruner(opened).layers.values():
        # `fit` reads how many units are left here, not which.
        assert layer.brick_fixed_kept["default"].device.type == "meta"  # type: ignore[index]
    with OneDevice():
        pruner(opened).fit(tensors)
    assert pruner(opened).pruned and all_of(opened) == {"meta"}
    for name, tensor in opened.model.base_model.adapter_tensors("default").items():  # type: ignore[operator]
        assert tensor.shape == stored.model.base_model.adapter_tensors("default")[name].shape, name  # type: ignore[operator]
