"""Tiny models and made-up methods by which the bridge's tests show what a method file may bring."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, GPT2Config, GPT2LMHeadModel

from brickyard.core import inject_config
from brickyard.core.inject import BrickyardConfig, Plan

MOS = {"r": 4, "e": 2, "p": 1, "l": 4, "dropout": 0.0}


def bert(seed: int = 0, **changes: object) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = BertConfig(**{**sizes, "intermediate_size": 32, "num_labels": 3, "initializer_range": 0.3, **changes})  # type: ignore[arg-type]
    return AutoModelForSequenceClassification.from_config(config).eval()


def gpt2(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **changes})).eval()  # type: ignore[arg-type]


def words(rows: int = 4) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 40, (rows, 6), generator=torch.Generator().manual_seed(3))}


@dataclass(frozen=True)
class Options:
    rank: int = 2


def method(name: str, **functions: object) -> ModuleType:
    module = ModuleType(name)
    for key, function in {"Config": Options, **functions}.items():
        setattr(module, key, function)
    return module


def own(shape, fill=None):
    """A plan with one own tensor per layer."""

    def plan(config, leaves, generator):
        made = {}
        for leaf in leaves:
            size = shape(config, leaf)
            made[leaf.name] = {"values": torch.zeros(size) if fill is None else torch.randn(size, generator=generator)}
        return Plan(own=made)

    return plan


def rescale(config, part, x, y):
    return y * (1 + part["values"])


SCALED = method("scaled", plan=own(lambda c, leaf: (leaf.out_features,)), around=rescale)
SCALED_WEIGHT = method(
    "scaled-weight",
    plan=own(lambda c, leaf: (leaf.out_features,)),
    around=rescale,
    weight=lambda config, part: part["values"][:, None] * part.weight,
)
DENSE = method(
    "dense", plan=own(lambda c, leaf: (leaf.out_features, leaf.in_features)), weight=lambda c, part: part["values"]
)


def nested_plan(config, leaves, generator):
    a = {leaf.name: {"a": torch.randn(config.rank, leaf.in_features, generator=generator)} for leaf in leaves}
    for leaf in leaves:
        a[leaf.name]["b"] = torch.zeros(config.rank, leaf.out_features)
    return Plan(own=a)


def nested(config, part):
    keep = part.drawn or config.rank
    return part["a"][:keep], part["b"][:keep].t(), 1.0 / keep


def draw(config, leaves, generator):
    keep = int(torch.randint(1, config.rank + 1, (), generator=generator))
    return {leaf.name: keep for leaf in leaves}


NESTED = method("nested", plan=nested_plan, factors=nested, draw=draw)


def ragged(config, part):
    rank = part.leaf.position % 3
    return part["a"][:rank], part["b"][:rank].t(), 0.3


RAGGED = method("ragged", plan=nested_plan, factors=ragged)
TESTED = {m.__name__: m for m in (SCALED, SCALED_WEIGHT, DENSE, NESTED, RAGGED)}


@pytest.fixture
def made_up_methods(monkeypatch):
    """Let the bridge find the methods of this file by name, as if they were files of a family."""
    found = inject_config.resolve

    def resolve(name, options):
        return (TESTED[name], Options(**options)) if name in TESTED else found(name, options)

    monkeypatch.setattr(inject_config, "resolve", resolve)


def config(name: str = "mos", options: dict | None = None, **more: object) -> BrickyardConfig:
    options = MOS if name == "mos" and options is None else options or {}
    more.setdefault("target_modules", ["query", "value", "intermediate.dense"])
    return BrickyardConfig(method=name, options=dict(options), **{"seed": 1, **more})  # type: ignore[arg-type]


def stir(model: nn.Module, adapter: str, seed: int = 5, size: float = 0.2) -> None:
    """Give every trained tensor of an adapter random values, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if adapter in name.split("."):
                p.copy_(torch.randn(p.shape, generator=generator) * size)


def wrapped(name: str = "mos", adapter: str = "default", model: nn.Module | None = None, **more: object) -> PeftModel:
    return get_peft_model(model or bert(), config(name, **more), adapter_name=adapter).eval()


def stirred(name: str = "mos", adapter: str = "default", model: nn.Module | None = None, **more: object) -> PeftModel:
    made = wrapped(name, adapter, model, **more)
    stir(made, adapter)
    return made


@torch.no_grad()
def logits(model: nn.Module, **more: object) -> torch.Tensor:
    return model(**words(), **more).logits


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b)
