"""Hand a brick over: as a plain PEFT adapter or as a merged model, with the proof that it behaves the same."""

from __future__ import annotations

import copy
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSequenceClassification

from brickyard.core import brick as bricks
from brickyard.core.base import Base, HeadedModel, open_base
from brickyard.core.brick import Brick
from brickyard.core.errors import ParityBroken, Refused, UsageError
from brickyard.core.files import complete_folder, write_json, write_tensors
from brickyard.core.inject_export import to_lora
from brickyard.core.inject_layer import BrickyardLinear
from brickyard.core.inject_tuner import BrickyardTuner
from brickyard.core.receipt import assert_parity, parity
from brickyard.core.relog import write_log, write_weights
from brickyard.core.retention import fixed_inputs
from brickyard.core.side import SIDE
from brickyard.core.slim import resize_config
from brickyard.core.wrap import ADAPTER


def export(
    folder: str | Path,
    to: str,
    out: Path,
    *,
    base: str | None = None,
    rank: int | None = None,
    max_rank: int | None = None,
) -> dict[str, Any]:
    """Write the brick in `folder` as `to` into `out`; return {"max_gap", "error", "sentence"}.

    `to` is "peft" or "merged"; of a run that kept its log, "log" (what rebuilds its weights) or "brick" (rebuilt).

    Raises Refused where a brick has no such form, and ParityBroken where the written artefact answers differently; of
    either nothing is left in `out`.
    """
    made = bricks.load(folder)
    opened = open_base(base or made.manifest["base"]["spec"])
    if made.structure and to in ("peft", "merged"):
        raise Refused(
            f"{made.manifest['arm']} runs a part of its layers ({made.structure}), of which no plain adapter or model "
            "can tell; load the brick with Brickyard, or tune with keep=dense for one that is served whole."
        )
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty; give a new folder.")
    if to == "peft":
        with _gone_unless_proven(out):
            return _peft(made, opened, out, rank, max_rank)
    if to in ("log", "brick"):
        if rank or max_rank:
            raise UsageError(f"--rank and --max-rank belong to adapters and models; --to {to} keeps what the run made.")
        return write_log(made, out) if to == "log" else write_weights(made, opened, out)
    if max_rank is not None:
        raise UsageError("--max-rank belongs to --to peft; a merged model holds the whole change.")
    with _gone_unless_proven(out):
        return _merged(made, opened, out, rank)


@contextmanager
def _gone_unless_proven(out: Path) -> Iterator[None]:
    """Remove what was written to `out`, new or empty before, where it turns out not to answer as the brick does."""
    try:
        yield
    except ParityBroken:
        shutil.rmtree(out, ignore_errors=True)
        raise


def at_rank(model: nn.Module, rank: int | None) -> None:
    """Use the model's adapter at `rank`, where one is given; Refused where it was trained for one rank only."""
    if rank is None:
        return
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, BrickyardTuner):
        raise Refused("--rank: this brick was trained for one rank only; leave the option out, or use --max-rank.")
    tuner.at_rank(ADAPTER, rank)


def _peft(made: Brick, base: Base, out: Path, rank: int | None, max_rank: int | None) -> dict[str, Any]:
    model = made.apply(base).model
    at_rank(model, rank)
    if not isinstance(model, PeftModel):
        raise Refused(
            f"{made.manifest['arm']} is no adapter on layers, so PEFT has no form for it; load the brick with "
            "Brickyard, or try --to merged where it changes weights of the base and its head is one of transformers'."
        )
    error = 0.0
    if any(isinstance(m, BrickyardLinear) for m in model.modules()):
        error = to_lora(model, ADAPTER, out, max_rank=max_rank).error
    elif max_rank is not None:
        raise Refused(f"--max-rank: {made.manifest['method']} is written as it is; leave the option out.")
    elif any(isinstance(m, AdaLoraLayer) for m in model.modules()):
        _fold(model, out)
    else:
        with complete_folder(out) as temporary:
            for name in ("adapter_config.json", made.manifest["weights"]):
                shutil.copyfile(made.folder / name, temporary / name)
    head = isinstance(model.get_base_model(), HeadedModel)
    if head:
        return {
            "max_gap": None,
            "error": error,
            "sentence": "written; its head is Brickyard's own, so plain PEFT opens the backbone's change only.",
        }
    with torch.random.fork_rng(devices=[]):
        fresh = base.model(made.task, seed=made.manifest["seed"] + 1)
        again = PeftModel.from_pretrained(fresh, str(out)).eval()  # type: ignore[arg-type]
    proof = parity(model, again, fixed_inputs(base, 4))
    if not error:
        assert_parity(proof, "the exported adapter against the brick")
    gap = proof["max_gap"]
    kind = "exact" if not error else f"by SVD, relative error {error:.2e}"
    return {
        "max_gap": gap,
        "error": error,
        "sentence": f"plain PEFT adapter, {kind}; reloaded logits differ by at most {gap:.1e}.",
    }


@torch.no_grad()
def _fold(model: PeftModel, out: Path) -> None:
    """Write AdaLoRA as LoRA: A' = A * E * alpha / r0, B' = B, with the rank that each layer kept and scaling 1."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, AdaLoraLayer):
            scaling = layer.scaling[ADAPTER] / (layer.ranknum[ADAPTER] + 1e-5)
            a_rn = layer.lora_A[ADAPTER] * layer.lora_E[ADAPTER] * scaling
            if len(a_rn) == 0:
                continue  # a layer without ranks has no change; LoRA knows no rank 0
            ranks[name.removeprefix("base_model.model.")] = len(a_rn)
            tensors[f"{name}.lora_A.weight"] = a_rn.contiguous().cpu()
            tensors[f"{name}.lora_B.weight"] = layer.lora_B[ADAPTER].contiguous().cpu()
    config: Any = model.peft_config[ADAPTER]
    exactly = {rf"^{re.escape(name)}$": rank for name, rank in ranks.items()}
    lora = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=exactly,
        alpha_pattern=dict(exactly),
        target_modules=sorted(ranks),
        modules_to_save=config.modules_to_save,
        inference_mode=True,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*invalid shape")  # a layer without ranks, left out above
        state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    heads = {k: t.detach().cpu() for k, t in state.items() if ".lora_" not in k}
    with complete_folder(out) as temporary:
        write_tensors(temporary / "adapter_model.safetensors", {**tensors, **heads})
        known = lora.to_dict()
        known["target_modules"] = sorted(known["target_modules"])
        write_json(temporary / "adapter_config.json", {k: getattr(v, "value", v) for k, v in known.items()})


def _merged(made: Brick, base: Base, out: Path, rank: int | None) -> dict[str, Any]:
    applied = made.apply(base).model
    plain: Any = made.apply(base).model
    at_rank(applied, rank)
    at_rank(plain, rank)
    sizes: dict[str, int] = {}
    if isinstance(plain, PeftModel):
        tuner = plain.base_model
        slimmed = isinstance(tuner, BrickyardTuner) and any(s.before for s in tuner.slimmed.values())
        try:
            plain = plain.merge_and_unload(safe_merge=True)
        except (ValueError, NotImplementedError) as error:
            raise Refused(f"{made.manifest['arm']} cannot be merged: {error}") from error
        if slimmed:
            plain.config = copy.deepcopy(plain.config)  # the base's own is that of the whole model
            sizes = resize_config(plain)
    if hasattr(plain, SIDE):
        raise Refused(f"{made.manifest['arm']} works beside the base and changes none of its weights; load the brick.")
    if isinstance(plain, HeadedModel):
        raise Refused(
            f"the head of {made.manifest['arm']} is Brickyard's own, which no transformers class can hold; "
            "load the brick instead."
        )
    if own := sorted({type(m).__name__ for m in plain.modules() if type(m).__module__.startswith("brickyard.")}):
        raise Refused(
            f"{made.manifest['arm']} is no change of the base's weights: it adds modules ({', '.join(own)}) that no "
            "transformers class has; load the brick."
        )
    if made.task.labels is not None:
        plain.config.id2label = dict(enumerate(made.task.labels))
        plain.config.label2id = {name: i for i, name in enumerate(made.task.labels)}
    with complete_folder(out) as temporary:
        plain.save_pretrained(temporary, safe_serialization=True)
        (base.tokenizer if base.input == "text" else base.processor).save_pretrained(temporary)
    opener: Any = AutoModelForSequenceClassification if base.input == "text" else AutoModelForImageClassification
    again = (AutoModelForCausalLM if made.task.generative else opener).from_pretrained(out).eval()
    proof = parity(applied, again, fixed_inputs(base, 4))
    assert_parity(proof, "the merged model against base + brick")
    gap = proof["max_gap"]
    smaller = f" ({', '.join(f'{name} {size}' for name, size in sizes.items())})" if sizes else ""
    return {
        "max_gap": gap,
        "error": 0.0,
        "sentence": f"merged model{smaller}; reloaded logits differ by at most {gap:.1e} from base + brick.",
    }
