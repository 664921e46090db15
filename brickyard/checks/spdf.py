"""What SPDF's paper claims, measured on a small code model: sparse pre-training on library files, tuning on test files.

Arms, all from the same initialisations, data order and steps: dense; 50 and 75 % sparsity; a smaller dense model whose
training FLOPs, both phases together, are those of the 75 % arm; no pre-training at all. Each is then fine-tuned dense
for a fifth of the steps, the 75 % arm also under its masks.

Shapes: S seeds, N held-out documents. All losses are nats of whole documents, [S, N], compared in nats per token.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from brickyard.checks._place import finished, place_of
from brickyard.core.answers import answer
from brickyard.core.attached import attach_in_place
from brickyard.core.base import open_base
from brickyard.core.batches import encode
from brickyard.core.data import read_data
from brickyard.core.documents import EncodedBlocks
from brickyard.core.files import read_tensors, write_tensors
from brickyard.core.jobs import Job
from brickyard.core.loop import Training, train
from brickyard.core.method import Claim
from brickyard.core.split import Split
from brickyard.core.stats import paired
from brickyard.core.task import Task
from brickyard.grow.spdf import (
    NO_TIME,
    StaticMasks,
    apply_static_sparsity,
    count_flops,
    densify,
    masked_weights,
    support,
)

TASK = Task("causal-lm", "nats_per_token", None, 1, "text")
SOURCE, TARGET = "embedded:python-source", "embedded:python-tests"
VOCABULARY, WIDTH, LAYERS, HEADS = 2048, 96, 3, 2
FINE_TUNING = 0.2  # of the pre-training steps
LR = 3e-3  # of pre-training, in every arm
TOLERANCE = 1.03  # of the dense model's loss
LONGEST = 30_000  # characters of a held-out document; longer ones would take most of the time
END = "<|end|>"


@dataclass(frozen=True)
class Scale:
    """How large the measurement is; `documents` of each domain are trained on (0: all)."""

    epochs: float
    block: int
    batch: int
    seeds: int
    documents: int
    lrs: tuple[float, ...]
    held_out: int = 40

    @classmethod
    def of(cls, claim: Claim) -> Scale:
        """Read it off a claim's fields."""
        return cls(
            claim.epochs, claim.max_length, claim.batch or 16, claim.seeds, claim.train_rows, claim.lrs or (1e-3,)
        )


@dataclass(frozen=True)
class Runs:
    """What the arms answered: nats [S, N] by (arm, stage), tokens [N] by domain, and what each arm cost."""

    tokens: dict[str, np.ndarray]
    nats: dict[tuple[str, str], np.ndarray]
    about: dict[str, Any]

    def mean(self, arm: str, stage: str) -> float:
        """Nats per token over all seeds."""
        domain = "source" if stage == "source" else "target"
        return float(self.nats[arm, stage].mean(axis=0).sum() / self.tokens[domain].sum())


def llama(width: int, block: int) -> LlamaConfig:
    """Return the shape of a model of the check."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=round(width / 3) * 8,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=block,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        use_cache=False,
        tie_word_embeddings=True,
    )


def cost(width: int, block: int, sparsity: float) -> Any:
    """Return the `Flops` of a model of the check."""
    with torch.device("meta"):
        return _flops(LlamaForCausalLM(llama(width, block)), block, sparsity)


def _flops(model: Any, block: int, sparsity: float) -> Any:
    shapes = {name: tuple(w.shape) for name, w in masked_weights(model, "blocks").items()}
    return count_flops(model, support(shapes, sparsity, "uniform"), block)


def smaller_width(block: int) -> int:
    """Return the width of the dense model whose FLOPs of both phases are nearest to those of 75 % sparsity."""
    sparse = cost(WIDTH, block, 0.75)
    wanted = (sparse.sparse + FINE_TUNING * sparse.dense) / (1 + FINE_TUNING)
    return min(range(8, WIDTH, 4), key=lambda width: abs(cost(width, block, 0.0).dense - wanted))


def flops(claim: Claim) -> dict[str, Any]:
    """Count the training FLOPs of the paper's 1.3 B model, and of the one that this check trains."""
    block = claim.max_length or 128
    with torch.device("meta"):
        large = GPT2LMHeadModel(GPT2Config(n_embd=2048, n_layer=24, n_head=16, n_positions=2048))
    paper, here = _flops(large, 2048, 0.75), cost(WIDTH, block, 0.75)
    return {
        "inequality": "dense / sparse FLOPs a token >= 2.45 (2.5 in the paper's digits)",
        "measured": paper.ratio,
        "low": paper.ratio,
        "high": paper.ratio,
        "holds": paper.ratio >= 2.45,
        "figures": {"paper's 1.3 B": asdict(paper), "this check's model": {**asdict(here), "fewer_by": here.ratio}},
        "control": None,
        "gate": None,
        "detail": f"{paper.ratio:.2f} times fewer for the paper's shapes (24 layers of width 2,048, 2,048 positions); "
        f"{here.ratio:.2f} times for this check's small model, whose output layer and attention weigh more. {NO_TIME}",
    }


def loss_order(claim: Claim) -> dict[str, Any]:
    """Measure the loss on held-out library files after pre-training."""
    runs = _runs(Scale.of(claim))
    tokens, nats = runs.tokens["source"], runs.nats
    steps = [
        _at_most(tokens, nats[lower, "source"], nats[higher, "source"])
        for lower, higher in (("dense", "half"), ("half", "sparse"))
    ]
    found = [step["holds"] for step in steps]
    holds = all(h is True for h in found) or (False if False in found else "undecided")
    whole = _at_most(tokens, nats["dense", "source"], nats["sparse", "source"])
    shown = ", ".join(f"{label} {runs.mean(label, 'source'):.4f}" for label in ("dense", "half", "sparse"))
    return _result(
        runs,
        "dense <= half <= sparse",
        {**whole, "holds": holds},
        f"nats per token after pre-training: {shown}; dense minus half {_shown(steps[0])}, half minus sparse "
        f"{_shown(steps[1])}",
        room=None,
    )


def gap_narrows(claim: Claim) -> dict[str, Any]:
    """Measure the gap between the sparse and the dense arm on held-out test files, before and after fine-tuning."""
    runs = _runs(Scale.of(claim))
    tokens, nats = runs.tokens["target"], runs.nats
    after = nats["sparse", "after"] + nats["dense", "before"]
    found = _at_most(tokens, after, nats["dense", "after"] + nats["sparse", "before"], together=True)
    gap = {stage: runs.mean("sparse", stage) - runs.mean("dense", stage) for stage in ("before", "after")}
    return _result(
        runs,
        "(sparse - dense) after <= (sparse - dense) before",
        found,
        f"gap {gap['before']:+.4f} nats per token before fine-tuning, {gap['after']:+.4f} after;"
        f" change {_shown(found)}",
        room=_at_most(tokens, nats["dense", "before"], nats["sparse", "before"]),
    )


def dense_beats_sparse(claim: Claim) -> dict[str, Any]:
    """Compare dense with sparse fine-tuning of the same checkpoints."""
    runs = _runs(Scale.of(claim))
    after, masked = runs.nats["sparse", "after"], runs.nats["sparse", "after_masked"]
    found = _at_most(runs.tokens["target"], after, masked, together=True)
    return _result(
        runs,
        "sparse, tuned dense <= sparse, tuned under its masks",
        found,
        f"{runs.mean('sparse', 'after'):.4f} nats per token tuned dense, {runs.mean('sparse', 'after_masked'):.4f} "
        f"under the masks: {_shown(found)}",
        room=None,
    )


def within_three_percent(claim: Claim) -> dict[str, Any]:
    """Compare the fine-tuned sparse arm with 1.03 times the loss of the dense one; the control was not pre-trained."""
    runs = _runs(Scale.of(claim))
    tokens, bound = runs.tokens["target"], TOLERANCE * runs.nats["dense", "after"]
    found = _at_most(tokens, runs.nats["sparse", "after"], bound)
    control = _at_most(tokens, runs.nats["scratch", "after"], bound)
    relative = runs.mean("sparse", "after") / runs.mean("dense", "after") - 1
    out = _result(
        runs,
        f"sparse after <= {TOLERANCE} dense after",
        found,
        f"{runs.mean('sparse', 'after'):.4f} against {runs.mean('dense', 'after'):.4f} nats per token, "
        f"{relative:+.2%}; distance to the bound {_shown(found)}",
        room=None,
    )
    out["control"] = {
        "what": "no pre-training at all",
        "inequality": f"scratch > {TOLERANCE} dense after",
        **{key: control[key] for key in ("measured", "low", "high")},
        "destroyed": control["holds"] is False,
    }
    return out


def beats_equal_flops(claim: Claim) -> dict[str, Any]:
    """Compare with a smaller dense model that costs as many FLOPs in both phases together."""
    runs = _runs(Scale.of(claim))
    found = _at_most(runs.tokens["target"], runs.nats["sparse", "after"], runs.nats["small", "after"])
    return _result(
        runs,
        "sparse after <= small after",
        found,
        f"{runs.mean('sparse', 'after'):.4f} against {runs.mean('small', 'after'):.4f} nats per token of a dense model "
        f"of width {runs.about['small_width']} in place of {WIDTH}: {_shown(found)}",
        room=None,
    )


def _at_most(tokens: np.ndarray, a: np.ndarray, b: np.ndarray, *, together: bool = False) -> dict[str, Any]:
    """Measure a <= b in nats per token: {"measured": a - b, "low", "high", "holds"}.

    together: both are of the same pre-trained models, seed by seed.
    """
    found = paired(tokens, a, b, "nats_per_token", together=together)
    holds: Any = True if found.high <= 0 else False if found.low > 0 else "undecided"
    return {"measured": found.difference, "low": found.low, "high": found.high, "holds": holds}


def _shown(found: dict[str, Any]) -> str:
    return f"{found['measured']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})"


def _result(
    runs: Runs, inequality: str, found: dict[str, Any], detail: str, *, room: dict[str, Any] | None
) -> dict[str, Any]:
    """Complete a finding; set-up invalid where pre-training taught nothing, or there was no gap (`room`) to narrow."""
    gate = _at_most(runs.tokens["target"], runs.nats["dense", "after"], runs.nats["scratch", "after"])
    gates = {"dense after <= scratch after": gate, **({"dense before <= sparse before": room} if room else {})}
    closed = [text for text, one in gates.items() if one["holds"] is not True]
    return {
        "inequality": inequality,
        "metric": "nats_per_token",
        **found,
        **({"holds": "set-up invalid"} if closed else {}),
        "figures": {
            "nats_per_token": {f"{arm}, {stage}": runs.mean(arm, stage) for arm, stage in runs.nats},
            "seeds": {f"{arm}, {stage}": len(nats) for (arm, stage), nats in runs.nats.items()},
            **runs.about,
        },
        "control": None,
        "gate": gates,
        "detail": detail + (f"; set-up invalid: {closed[0]} does not hold" if closed else ""),
    }


@cache
def _runs(scale: Scale) -> Runs:
    """Train every arm once, two at a time in processes of their own; the claims share them."""
    with place_of("spdf", scale) as folder:
        about = prepare(folder, scale)
        # The longest chains first, so that none runs alone at the end.
        seeds = {"sparse": scale.seeds, "dense": scale.seeds, "half": 1, "small": scale.seeds, "scratch": 1}
        jobs = [
            Job(
                key=f"{arm} {seed}",
                function=f"{__name__}:chain",
                argument={"folder": str(folder), "scale": asdict(scale), "arm": arm, "seed": seed},
            )
            for arm, count in seeds.items()
            for seed in range(count)
        ]
        done = finished(jobs, 2, folder)
    nats: dict[tuple[str, str], list[list[float]]] = {}
    for job in jobs:
        for stage, values in done[job.key]["nats"].items():
            nats.setdefault((job.argument["arm"], stage), []).append(values)
    some = done["dense 0"]
    about["pretraining_seconds"] = {key: value["seconds"] for key, value in done.items()}
    about["fine_tuning_lr"] = {key: value["lr"] for key, value in done.items() if value["lr"]}
    about["note"] = NO_TIME
    return Runs(
        {domain: np.asarray(tokens) for domain, tokens in some["tokens"].items()},
        {key: np.asarray(values) for key, values in nats.items()},
        about,
    )


def prepare(folder: Path, scale: Scale) -> dict[str, Any]:
    """Write both bases (tokenizer, shapes) and the encoded texts into `folder`; return what they are."""
    source, target = (read_data(name).splits for name in (SOURCE, TARGET))
    chosen = {
        "pretraining": _some(source["train"], scale.documents, None),
        "source": _some(source["test"], scale.held_out, LONGEST),
        "tuning": _some(target["train"], math.ceil(FINE_TUNING * scale.documents), None),
        "validation": _some(target["validation"], scale.held_out // 2, LONGEST),
        "target": _some(target["test"], scale.held_out, LONGEST),
    }
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        chosen["pretraining"],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    small = smaller_width(scale.block)
    for name, width in (("dense", WIDTH), ("small", small)):
        LlamaForCausalLM(llama(width, scale.block)).save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END).save_pretrained(folder / name)
    base = open_base(str(folder / "dense"))
    sizes = {}
    for name, texts in chosen.items():
        rows = encode(Split({"text": texts}), base, TASK, max_length=scale.block)
        assert isinstance(rows, EncodedBlocks)
        stored = {**rows.columns, "bytes": rows.bytes, "tokens": rows.tokens}
        write_tensors(folder / f"{name}.safetensors", {key: torch.from_numpy(v) for key, v in stored.items()})
        sizes[name] = {key: rows.report[key] for key in ("documents", "tokens", "bytes")}
    sparse, dense = cost(WIDTH, scale.block, 0.75), cost(small, scale.block, 0.0)
    return {
        "texts": sizes,
        "small_width": small,
        "flops_per_token": {
            "dense": sparse.dense,
            "sparse": sparse.sparse,
            "small": dense.dense,
            "sparse, both phases": (sparse.sparse + FINE_TUNING * sparse.dense) / (1 + FINE_TUNING),
            "fewer_by": sparse.ratio,
        },
        "weights": {"masked": sparse.maskable, "output layer": sparse.fixed},
    }


def _some(split: Split, count: int, longest: int | None) -> list[str]:
    """Draw documents, the same ones every time; of held-out ones only those up to `longest` characters."""
    texts = [text for text in split["text"] if longest is None or len(text) <= longest]
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(texts))
    return [texts[i] for i in order[: count or len(texts)]]


def chain(argument: dict[str, Any]) -> dict[str, Any]:
    """Pre-train one arm with one seed, then fine-tune it; return the nats of held-out documents after each stage."""
    folder, arm, seed = Path(argument["folder"]), argument["arm"], argument["seed"]
    scale = Scale(**{**argument["scale"], "lrs": tuple(argument["scale"]["lrs"])})
    sets = {path.stem: _read(path) for path in sorted(folder.glob("*.safetensors"))}
    steps = math.ceil(scale.epochs * math.ceil(len(sets["pretraining"]) / scale.batch))
    recipe = Training(lr=LR, wd=0.1, batch=scale.batch, steps=steps, seed=seed, evaluate_every=10**9)
    model: Any = open_base(str(folder / ("small" if arm == "small" else "dense"))).untrained(seed=seed)
    sparsity = {"half": 0.5, "sparse": 0.75}.get(arm, 0.0)
    masks = apply_static_sparsity(model, sparsity, seed)
    nats: dict[str, list[float]] = {}
    seconds = 0.0
    if arm != "scratch":
        seconds = _train(model, sets["pretraining"], recipe, masks)
        nats["source"], nats["before"] = _nats(model, sets["source"]), _nats(model, sets["target"])
    tuning = replace(recipe, steps=max(1, round(FINE_TUNING * steps)))
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rates: dict[str, float] = {}

    def tune(stage: str, held: StaticMasks | None) -> None:
        tried = []
        for lr in scale.lrs:
            model.load_state_dict(start)
            _train(model, sets["tuning"], replace(tuning, lr=lr), held)
            loss = sum(_nats(model, sets["validation"])) if len(scale.lrs) > 1 else 0.0
            tried.append((loss, lr, _nats(model, sets["target"])))
        _, rates[stage], nats[stage] = min(tried)

    if arm == "sparse":
        tune("after_masked", masks)
    if arm != "half":
        densify(model)
        tune("after", None)
    tokens = {domain: sets[domain].tokens.tolist() for domain in ("source", "target")}
    return {"nats": nats, "seconds": seconds, "tokens": tokens, "lr": rates}


def _train(model: Any, rows: EncodedBlocks, recipe: Training, masks: StaticMasks | None = None) -> float:
    flat = [name for name, p in model.named_parameters() if p.ndim < 2]
    attached = attach_in_place(model, [name for name, _ in model.named_parameters()], matched={}, no_decay=flat)
    attached = masks.join(attached) if masks else attached
    return train(attached, rows, None, TASK, recipe, device="cpu").seconds


def _nats(model: Any, rows: EncodedBlocks) -> list[float]:
    return answer(model, rows, TASK).predictions.tolist()


def _read(path: Path) -> EncodedBlocks:
    stored = {name: tensor.numpy() for name, tensor in read_tensors(path).items()}
    sizes = stored.pop("bytes"), stored.pop("tokens")
    return EncodedBlocks(stored, sizes, torch.from_numpy(sizes[1].astype(np.float64)), report={"unit": "document"})
