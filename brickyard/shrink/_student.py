"""A smaller network of the same kind as a base: its configuration scaled, its weights new, its vocabulary maybe cut."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PretrainedConfig,
)

from brickyard.core.base import Base, blocks
from brickyard.core.base_config import quiet
from brickyard.core.errors import BadData, Refused, UsageError
from brickyard.core.files import complete_folder, write_json

UNKNOWN = 0.005  # of the tokens may be unknown to a cut vocabulary
# What configurations call the width inside the feed-forward part; None there means four times the width.
_INNER = ("intermediate_size", "ffn_dim", "hidden_dim", "n_inner", "d_ff")
_SPECIAL = ("pad", "bos", "eos", "cls", "sep", "mask", "unk")


def scaled_config(config: PretrainedConfig, layers: int, width: int, heads: int, inner: int) -> PretrainedConfig:
    """Return a configuration of the same class with so many layers, heads, and numbers a token and a feed-forward part.

    What counts heads or lists layers beside these (key-value heads, layer types) is scaled or cut along with them; the
    output layer is tied to the embedding. Raises Refused where the class has no such sizes.
    """
    made = copy.deepcopy(config)
    names = ("num_hidden_layers", "num_attention_heads", "hidden_size")
    if not all(isinstance(getattr(made, name, None), int) for name in names):
        raise Refused(f"{config.model_type} does not say its layers, heads and width as one number each.")
    old_layers, old_heads = int(made.num_hidden_layers), int(made.num_attention_heads)
    if layers > old_layers:
        raise Refused(f"a student of {layers} layers is deeper than its base, which has {old_layers}.")
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == old_layers:
            setattr(made, name, value[:layers])
    if isinstance(groups := getattr(made, "num_key_value_heads", None), int):
        groups = max(1, heads * groups // old_heads)
        made.num_key_value_heads = next(g for g in range(groups, 0, -1) if heads % g == 0)
    if isinstance(getattr(made, "head_dim", None), int):
        made.head_dim = width // heads
    made.num_hidden_layers, made.num_attention_heads, made.hidden_size = layers, heads, width
    named = next((name for name in _INNER if isinstance(getattr(made, name, "absent"), int | None)), None)
    if named is not None:
        setattr(made, named, inner)
    made.tie_word_embeddings = True
    return made


def pretrained_as(base: Base) -> Any:
    """Return the class of transformers that pre-trains a network of the base's kind: masked or causal."""
    if type(base.config) in MODEL_FOR_MASKED_LM_MAPPING and not base.generative:
        return AutoModelForMaskedLM
    if type(base.config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    raise Refused(f"transformers cannot pre-train a {base.config.model_type} on text, neither masked nor causal.")


def cut_vocabulary(base: Base, texts: Sequence[str], size: int) -> tuple[Any, float]:
    """Return a tokenizer of the base's kind with at most `size` tokens learned from `texts`, and its share of unknowns.

    Raises BadData where more than 0.5 % of the tokens of `texts` are unknown to it: student and teacher would read
    different sentences. UsageError where `size` is no cut.
    """
    if not getattr(base.tokenizer, "is_fast", False):
        raise Refused(f"the tokenizer of {base.spec} is written in Python and cannot be learned anew.")
    if size >= len(base.tokenizer):
        raise UsageError(f"vocabulary={size} is no cut: the base has {len(base.tokenizer)} tokens; leave it out.")
    with quiet():
        made = base.tokenizer.train_new_from_iterator((texts[i : i + 1000] for i in range(0, len(texts), 1000)), size)
    unknown = unknown_share(made, texts)
    if unknown > UNKNOWN:
        raise BadData(
            f"a vocabulary of {len(made)} tokens leaves {unknown:.2%} of the text's tokens unknown, above the limit of "
            f"{UNKNOWN:.1%}: student and teacher would read different sentences. Raise vocabulary."
        )
    return made, unknown


def unknown_share(tokenizer: Any, texts: Sequence[str]) -> float:
    """Return which share of the tokens of `texts` stands for what the tokenizer does not know."""
    if tokenizer.unk_token_id is None:
        return 0.0
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return sum(row.count(tokenizer.unk_token_id) for row in ids) / max(1, sum(map(len, ids)))


def write_student(folder: Path, base: Base, config: PretrainedConfig, tokenizer: Any, seed: int) -> None:
    """Write a new network of this configuration, drawn from `seed`, with its tokenizer, as a base's folder."""
    config = copy.deepcopy(config)
    config.vocab_size = max(tokenizer.get_vocab().values()) + 1
    for name in _SPECIAL:
        if getattr(config, f"{name}_token_id", None) is not None:
            setattr(config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id", None))
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = pretrained_as(base).from_config(config)
    if len(blocks(model)) != config.num_hidden_layers:
        raise Refused(f"a {config.model_type} does not get {config.num_hidden_layers} layers by its configuration.")
    save_model(folder, model, tokenizer)


def save_model(folder: Path, model: nn.Module, tokenizer: Any, reports: dict[str, Any] | None = None) -> None:
    """Write a model with its tokenizer, and reports as JSON files by these names: complete or not at all."""
    with complete_folder(folder) as temporary, quiet():
        model.save_pretrained(temporary)  # type: ignore[operator]
        tokenizer.save_pretrained(temporary)
        for name, report in (reports or {}).items():
            write_json(temporary / name, report)
