"""A base's config.json: cleaned of what chooses code, files or repositories, then made into transformers' object."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PretrainedConfig,
)
from transformers.utils import logging as chatter

from brickyard.core import registry
from brickyard.core.base_files import ADAPTER, CONFIG, STEERING
from brickyard.core.errors import BadBase, UnknownName, UnsafeFile
from brickyard.core.files import plain_file, read_json

# Keys that belong to a task and not to the base, besides those that steer.
_TASK = frozenset({"id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "dtype", "torch_dtype"})
# Keys that count things of which each holds tensors.
_COUNTS = re.compile(r"(num|n)_.*(layer|block|expert|stage)s?|n_layers?|(encoder|decoder)?_?layers|depths?")
# Keys that ask for something Brickyard will not do; what is wrong with them.
_REFUSED = {
    "quantization_config": "its weights are quantised; Brickyard adapts float weights, so give the unquantised base",
    "compression_config": "its weights are compressed; give the uncompressed base",
    "use_pretrained_backbone": "it takes part of its weights from another model; save the whole model into one folder",
    "use_timm_backbone": "part of it is built by another library (timm); give a base that transformers builds alone",
}


def read_config(folder: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Return a base's config.json, cleaned of everything that chooses code, files, repositories or devices.

    Raises BadBase where it is missing, UnsafeFile where it asks for what Brickyard will not do.
    """
    if not os.path.lexists(folder / CONFIG):
        if os.path.lexists(folder / ADAPTER):
            raise BadBase(
                f"{folder} holds an adapter, not a base ({ADAPTER} and no {CONFIG}); give the base that it was made "
                "for, and the adapter as --brick."
            )
        raise BadBase(f"{folder} has no {CONFIG}; expected a folder written by transformers' save_pretrained.")
    path = plain_file(folder, CONFIG)
    raw = read_json(path, constants=True)
    if not isinstance(raw, dict):
        raise BadBase(f"{path}: expected a JSON object")
    kind = raw.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise BadBase(f"{path}: no model_type, so its architecture is unknown; save it again with transformers.")
    cleaned = _cleaned(raw, path)
    if trust_remote_code and isinstance(raw.get("auto_map"), dict):
        foreign = [str(ref) for ref in raw["auto_map"].values() if "--" in str(ref)]
        if foreign:
            raise UnsafeFile(
                f"{path}: auto_map names code of another repository ({foreign[0]}); copy that code into the folder, "
                "read it, and name it without the repository."
            )
        cleaned["auto_map"] = raw["auto_map"]
    cleaned["__needs_code__"] = "auto_map" in raw
    return cleaned


def _cleaned(value: Any, path: Path) -> Any:
    if isinstance(value, list):
        return [_cleaned(inner, path) for inner in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, inner in value.items():
        if inner and key in _REFUSED:
            raise UnsafeFile(f"{path}: {key} is set: {_REFUSED[key]}.")
        if key == "backbone" and isinstance(inner, str):
            raise UnsafeFile(f"{path}: backbone names another model, {inner!r}; save the whole model into one folder.")
        if key in STEERING or key in _TASK or key.startswith("_"):
            continue
        kept[key] = _cleaned(inner, path)
    return kept


def build_config(known: dict[str, Any], folder: Path, trusted: bool) -> PretrainedConfig:
    path = folder / CONFIG
    needs_code = known.pop("__needs_code__")
    kind = known["model_type"]
    reference = known.get("auto_map", {}).get("AutoConfig") if trusted else None
    if kind in {entry.record.name for entry in registry.records("models")}:
        registry.load(kind)  # an architecture of Brickyard's own; its file registers it with transformers
    if reference is None and kind not in CONFIG_MAPPING:
        if needs_code:
            raise BadBase(
                f"{path}: architecture {kind!r} needs Python code from the folder (auto_map), which Brickyard does not "
                "run. If you have read that code and trust it, say --trust-remote-code."
            )
        raise BadBase(f"{path}: {UnknownName.among('architecture', kind, CONFIG_MAPPING)}")
    try:
        with quiet():
            if reference is not None:
                from transformers.dynamic_module_utils import get_class_from_dynamic_module

                made = get_class_from_dynamic_module(reference, str(folder), local_files_only=True)
            else:
                made = CONFIG_MAPPING[kind]
            shadowing = [key for key in known if callable(getattr(made, key, None))]
            if shadowing:
                raise UnsafeFile(f"{path}: the key {shadowing[0]!r} would replace a function of the configuration.")
            config = made.from_dict(known)
    except UnsafeFile:
        raise
    except Exception as error:  # a configuration class may raise anything for values that make no sense
        raise BadBase(f"{path}: no valid {kind} configuration ({type(error).__name__}): {first_line(error)}") from error
    if trusted:
        config.name_or_path = str(folder)  # where the classes that auto_map names are looked for
    return config


def check_counts(known: Any, folder: Path, tensors: int) -> None:
    """Refuse counts of layers that no file of `tensors` tensors can fill, before any of them is built."""
    for key, value in known.items() if isinstance(known, dict) else ():
        values = value if isinstance(value, list) else [value]
        for number in values:
            if isinstance(number, int) and number > max(1000, tensors) and _COUNTS.fullmatch(key):
                raise BadBase(f"{folder / CONFIG}: {key} is {number:,}, but there are {tensors} tensors.")
            check_counts(number, folder, tensors)


def input_of(config: PretrainedConfig, folder: Path) -> Literal["text", "image"]:
    texts = (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING)
    text = any(type(config) in mapping for mapping in texts)
    image = type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    if text != image:
        return "text" if text else "image"
    if (folder / "preprocessor_config.json").is_file():
        return "image"
    if any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json", "vocab.txt")):
        return "text"
    raise BadBase(
        f"{folder}: cannot tell whether {config.model_type} reads text or images; expected a tokenizer or "
        "preprocessor_config.json beside the weights."
    )


def width_of(config: PretrainedConfig, folder: Path) -> int:
    width = getattr(config, "hidden_size", None)
    sizes = getattr(config, "hidden_sizes", None)
    if width is None and sizes:
        width = sizes[-1]
    if not isinstance(width, int) or width < 1:
        raise BadBase(f"{folder / CONFIG}: neither hidden_size nor hidden_sizes says how wide its states are.")
    return width


def architecture(config: PretrainedConfig) -> dict[str, Any]:
    """Return what changes a network's function without showing in its tensors.

    They are few and old fields, so that every release of transformers reads the same values out of one file.
    """

    def first(*names: str) -> Any:
        return next((value for name in names if (value := getattr(config, name, None)) is not None), None)

    heads = first("num_attention_heads", "num_heads")
    rope = getattr(config, "rope_parameters", None) or {}
    known = {
        "model_type": config.model_type,
        "heads": heads,
        "key_value_heads": first("num_key_value_heads") or heads,
        "activation": first("hidden_act", "hidden_activation", "activation_function", "activation"),
        "epsilon": first("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", "norm_eps"),
        "rope": first("rope_theta") or _thetas(rope),
        "depths": first("depths"),
        "sizes": [first("image_size"), first("patch_size"), first("window_size"), first("layer_type")],
    }
    return {key: value for key, value in known.items() if value is not None}


def _thetas(rope: Any) -> Any:
    if not isinstance(rope, dict):
        return None
    if "rope_theta" in rope:
        return rope["rope_theta"]
    return {key: theta for key, inner in sorted(rope.items()) if (theta := _thetas(inner)) is not None} or None


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:300]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' reports and progress bars; what matters of them is checked and raised."""
    before, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity(chatter.CRITICAL)
    chatter.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        chatter.set_verbosity(before)
        if bars:
            chatter.enable_progress_bar()
