"""Write tests/golden/mergekit.safetensors: a tiny base, three models, and what mergekit 0.1.5 makes of them.

    python -m venv mergekit && mergekit/bin/pip install mergekit==0.1.5
    mergekit/bin/python scripts/make_merge_golden.py

It runs in mergekit's own environment, whose pins exclude Brickyard's, and needs nothing of Brickyard. Keys are
`base/NAME`, `a/NAME`, ... for the inputs and `ties/NAME`, ... for the results, all float32.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "mergekit.safetensors"
CHANGES = {"a": 0.01, "b": 0.02, "c": 0.03}  # standard deviation of each model's change
FAR = {"a": 1.0, "b": 1.0}  # for slerp: far enough apart that the arc is no line


def write_models(folder: Path) -> dict[str, Path]:
    """Write the base, models near it, and two far from each other."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    base = LlamaForCausalLM(config)
    base.save_pretrained(folder / "base")
    start = {name: p.detach().clone() for name, p in base.named_parameters()}
    paths = {"base": folder / "base"}
    for kind, changes in (("", CHANGES), ("far-", FAR)):
        for label, spread in changes.items():
            with torch.no_grad():
                for name, p in base.named_parameters():
                    p.copy_(start[name] + spread * torch.randn(p.shape))
            base.save_pretrained(folder / f"{kind}{label}")
            paths[f"{kind}{label}"] = folder / f"{kind}{label}"
    return paths


def recipes(paths: dict[str, Path]) -> dict[str, dict]:
    """Return mergekit's configurations by the name of the result."""
    model = lambda label, **parameters: {"model": str(paths[label]), "parameters": parameters}  # noqa: E731
    shared = {"dtype": "float32", "base_model": str(paths["base"])}
    return {
        "linear": {"merge_method": "linear", "dtype": "float32", "models": [model(x, weight=1.0) for x in CHANGES]},
        "weighted": {
            "merge_method": "linear",
            "dtype": "float32",
            "models": [model(x, weight=w) for x, w in zip(CHANGES, (0.5, 0.2, 0.1), strict=True)],
        },
        "sum": {
            "merge_method": "task_arithmetic",
            **shared,
            "models": [model(x, weight=0.3) for x in CHANGES],
            "parameters": {"normalize": False},
        },
        "ties": {
            "merge_method": "ties",
            **shared,
            "models": [model(x, weight=1.0, density=0.4) for x in CHANGES],
            "parameters": {"normalize": True, "lambda": 0.7},
        },
        "slerp": {
            "merge_method": "slerp",
            "dtype": "float32",
            "base_model": str(paths["far-a"]),
            "models": [{"model": str(paths["far-a"])}, {"model": str(paths["far-b"])}],
            "parameters": {"t": 0.3},
        },
    }


def main() -> None:
    """Merge and write."""
    out: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        paths = write_models(folder)
        for label, path in paths.items():
            out |= {f"{label}/{name}": t.contiguous() for name, t in load_file(path / "model.safetensors").items()}
        for label, recipe in recipes(paths).items():
            config = MergeConfiguration.model_validate(yaml.safe_load(json.dumps(recipe)))
            run_merge(config, str(folder / f"out-{label}"), MergeOptions(copy_tokenizer=False, quiet=True))
            for shard in sorted((folder / f"out-{label}").glob("*.safetensors")):
                out |= {f"{label}/{name}": t.contiguous() for name, t in load_file(shard).items()}
    save_file(out, GOLDEN)
    sys.stdout.write(f"{len(out)} tensors in {GOLDEN}\n")


if __name__ == "__main__":
    main()
