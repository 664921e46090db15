"""Small models to split, arms on small bases, and what enters and leaves a feed-forward network: for tests of EMoE."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from conftest import text_data
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTModel,
)

from brickyard.core import trial
from brickyard.core.arm import parse
from brickyard.core.base import open_base
from brickyard.core.build import build, resolve
from brickyard.core.ffn import ffns
from brickyard.core.task import Task
from brickyard.tune.emoe import Config

TASK = Task("text-classification", "accuracy", ("a", "b"), 2, "text")
SMALL = Config(experts=8, topk=3, layers=0)
EMOE = "emoe:experts=8,topk=4"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
IDS = torch.randint(4, 40, (3, 7), generator=torch.Generator().manual_seed(0))


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bert(act: str = "gelu") -> nn.Module:
    config = BertConfig(vocab_size=40, hidden_act=act, hidden_dropout_prob=0.1, **SIZES)
    return BertForSequenceClassification(config)


MODELS = {
    "relu": lambda: bert("relu"),
    "gelu": bert,
    "swiglu": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=1, **SIZES)),
    "conv1d": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=2, n_inner=64)),
    "vit": lambda: ViTModel(ViTConfig(image_size=8, patch_size=4, **SIZES), add_pooling_layer=False),
}


def made(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with biases that are not zero, and what it reads."""
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * gaussian(*p.shape, seed=p.numel()))
    return model, {"pixel_values": gaussian(2, 3, 8, 8)} if kind == "vit" else {"input_ids": IDS}


def out(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return next(iter(model(**inputs).values()))


def seen(model: nn.Module, inputs: dict[str, Tensor], layer: int = 0) -> dict[str, Tensor]:
    """What enters and leaves the keys and enters and leaves the values of a block's feed-forward network in a pass."""
    [ffn] = ffns(model, (layer,), "test")
    found: dict[str, Tensor] = {}
    hooks = [
        ffn.key_layer.register_forward_hook(lambda m, args, y: found.update(x=args[0], pre=y)),
        ffn.value_layer.register_forward_hook(lambda m, args, y: found.update(hidden=args[0], y=y)),
    ]
    out(model, inputs)
    for hook in hooks:
        hook.remove()
    return found


def classifier(base: Path, arm: str, seed: int = 0) -> Any:
    return build(resolve(parse(arm), TASK), open_base(str(base)), TASK, seed=seed)


def batch() -> dict[str, Tensor]:
    return {"input_ids": IDS % 20 + 4, "attention_mask": torch.ones_like(IDS)}


def nonzero(model: nn.Module, layer: int = 0) -> int:
    counts = (seen(model, batch(), layer)["hidden"] != 0).sum(-1)
    assert counts.min() == counts.max()
    return int(counts.max())


def setting(base: Path, arm: str, **changes: Any) -> trial.Setting:
    training = {"epochs": 2, "batch": 16, "precision": "float32", "lr": 5e-3}
    return trial.Setting(
        arm=arm, base=str(base), data=text_data(), training=training, cache=False, device="cpu", **changes
    )


def run(base: Path, arm: str, folder: Path) -> dict[str, Any]:
    return trial.run({"setting": asdict(setting(base, arm)), "folder": str(folder)})
