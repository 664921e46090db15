"""SPDF: pre-train a language model under a fixed random mask, then fine-tune it dense.

    theta_s = M o theta_0          M in {0, 1}^[out, in] of each weight matrix of the blocks, round((1 - s) out in) ones
    theta_s <- AdamW(theta_s, M o grad L(M o theta_s))       sparse pre-training: M is drawn once and never changes
    theta   <- AdamW(theta_s, grad L(theta_s))               dense fine-tuning: M is dropped, theta starts at theta_s

theta_0: the dense initialisation, as it is (`rescale` divides it by sqrt(1 - s) instead, which keeps the variance of a
layer's output). M is uniformly random, with the same s in every matrix (`scheme=erk`: Erdos-Renyi rates). Embeddings,
positions, norms, biases and the output layer stay dense. The rule is per stored matrix: one that fuses query, key and
value gets one mask.

Training FLOPs a token = 6 (N_fixed + N_kept) + 12 L D T: N weights that multiply every token (the output layer among
N_fixed; the embedding look-up costs none), L layers of attention width D, T positions of a block. They are *counted*,
as hardware that skips zeros would spend them; here masked products are carried out in full, so masks save no time.

`brickyard grow spdf` pre-trains on a base's architecture and tokenizer and writes a model folder with the masks beside
the weights; `brickyard tune full --base` on that folder is the dense fine-tuning, and `start=base` goes on under the
masks instead. In one's own loop or in transformers' Trainer: `apply_static_sparsity`, `SparsityCallback`, `densify`.

Source: Thangarasa et al., "SPDF: Sparse Pre-training and Dense Fine-tuning for Large Language Models", UAI 2023,
sec. 2. Headline claim: a 1.3 B model at s = 0.75 needs 2.5 times fewer pre-training FLOPs and loses nothing significant
after dense fine-tuning, which beats sparse fine-tuning. Left out: sparsity that varies during pre-training, masks by
magnitude or that move (RigL, SET), block and 2:4 masks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from brickyard.core import inject_config, measure
from brickyard.core.answers import answer
from brickyard.core.attached import attach_in_place
from brickyard.core.errors import BadBase, Refused, UsageError
from brickyard.core.files import complete_folder, write_json
from brickyard.core.loop import train
from brickyard.core.method import Claim, Record
from brickyard.core.receipt import assert_effect, receipt, snapshot
from brickyard.core.trial import Prepared
from brickyard.grow._compact_masks import CompactMasks
from brickyard.grow._static_masks import FILE, StaticMasks, draw, read_masks
from brickyard.grow._training_flops import NO_TIME, count_flops

RECORD = Record(
    name="spdf",
    family="grow",
    title="Sparse pre-training under a fixed mask, for dense fine-tuning",
    paper="SPDF: Sparse Pre-training and Dense Fine-tuning for Large Language Models, UAI 2023, arXiv 2303.10464",
    needs=("causal-lm",),
    training={"lr": 1e-3, "wd": 0.1, "epochs": 1.0},
    claims=(
        Claim(
            text="A 1.3 B model at 75 % sparsity needs 2.5 times fewer pre-training FLOPs.",
            measure="flops",
            kind="counted",
        ),
        Claim(
            text="The pre-training loss grows with the sparsity: dense <= 50 % <= 75 %.",
            measure="loss_order",
            data="embedded:python-source",
            epochs=1,
            train_rows=200,
            max_length=128,
            full={"epochs": 4, "train_rows": 0, "max_length": 256, "lrs": (5e-4, 1e-3, 2e-3)},
        ),
        Claim(
            text="Dense fine-tuning narrows the gap between a model pre-trained at 75 % sparsity and a dense one.",
            measure="gap_narrows",
            data="embedded:python-source",
            epochs=1,
            train_rows=200,
            max_length=128,
            full={"epochs": 4, "train_rows": 0, "max_length": 256, "lrs": (5e-4, 1e-3, 2e-3)},
        ),
        Claim(
            text="Of one checkpoint of 75 % sparsity, dense fine-tuning beats sparse fine-tuning.",
            measure="dense_beats_sparse",
            data="embedded:python-source",
            epochs=1,
            train_rows=200,
            max_length=128,
            full={"epochs": 4, "train_rows": 0, "max_length": 256, "lrs": (5e-4, 1e-3, 2e-3)},
        ),
        Claim(
            text="After fine-tuning, the loss at 75 % sparsity is within 3 % of the dense model's.",
            measure="within_three_percent",
            data="embedded:python-source",
            epochs=1,
            train_rows=200,
            max_length=128,
            full={"epochs": 4, "train_rows": 0, "max_length": 256, "lrs": (5e-4, 1e-3, 2e-3)},
        ),
        Claim(
            text="After fine-tuning, the model of 75 % sparsity beats a smaller dense one of the same training FLOPs.",
            measure="beats_equal_flops",
            data="embedded:python-source",
            epochs=1,
            train_rows=200,
            max_length=128,
            full={"epochs": 4, "train_rows": 0, "max_length": 256, "lrs": (5e-4, 1e-3, 2e-3)},
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the masks."""

    sparsity: float = 0.75
    """share s of the weights that do not exist during pre-training, in [0, 1)"""
    scheme: Literal["uniform", "erk"] = "uniform"
    """`uniform`: the same s in every matrix; `erk`: Erdos-Renyi rates, which spare the smaller ones, s over all"""
    target: str | tuple[str, ...] = "blocks"
    """`blocks` (all linear layers of the repeated blocks), roles, or patterns of layer names"""
    rescale: bool = False
    """divide the initial weights by sqrt(1 - s); false keeps the dense initialisation"""
    start: Literal["fresh", "base"] = "fresh"
    """`fresh`: new weights and masks; `base`: the base's weights under its own masks (sparse fine-tuning; give lr)"""

    compact: bool = False
    """keep gradients and optimiser state of existing weights only (4 bytes a masked weight for 12 at s = 0.75)"""

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        if self.start == "base" and self.rescale:
            raise UsageError("spdf: rescale=true changes an initialisation; start=base has none.")


def check_sparsity(sparsity: float) -> None:
    """Raise UsageError unless `sparsity` is in [0, 1)."""
    if not 0 <= sparsity < 1:
        raise UsageError(f"spdf: sparsity={sparsity} is out of range; expected at least 0 and less than 1.")


def densities(shapes: Mapping[str, tuple[int, ...]], sparsity: float, scheme: str) -> dict[str, float]:
    """Return the share of each matrix's entries that exists.

    `uniform`: 1 - s. `erk`: proportional to (rows + columns) / (rows * columns) and scaled so that (1 - s) of all
    entries exist; where that would exceed 1, a matrix is dense and the others bear its part.

    Source: Mocanu et al. 2018, "Scalable training of artificial neural networks with adaptive sparse connectivity",
    eq. 1; Evci et al. 2020, "Rigging the lottery", sec. 3.
    """
    if scheme == "uniform" or sparsity == 0:
        return dict.fromkeys(shapes, 1 - sparsity)
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    rate = {name: sum(shape) / size[name] for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        budget = (1 - sparsity) * sum(size.values()) - sum(size[name] for name in dense)
        scale = budget / sum(rate[name] * size[name] for name in shapes if name not in dense)
        over = {name for name in shapes if name not in dense and scale * rate[name] > 1}
        if not over:
            return {name: 1.0 if name in dense else scale * rate[name] for name in shapes}
        dense |= over


def support(shapes: Mapping[str, tuple[int, ...]], sparsity: float, scheme: str) -> dict[str, int]:
    """Return how many entries of each matrix exist: its density times its size, rounded. Refused where that is 0."""
    kept = {name: round(share * math.prod(shapes[name])) for name, share in densities(shapes, sparsity, scheme).items()}
    empty = [name for name, count in kept.items() if count == 0]
    if empty:
        raise Refused(f"spdf: sparsity={sparsity} leaves no weight in {empty[0]} {list(shapes[empty[0]])}; lower it.")
    return kept


def masked_weights(model: nn.Module, target: str | Sequence[str]) -> dict[str, nn.Parameter]:
    """Return the weight matrices that a target means, by name; Refused where one is tied to a layer outside of it."""
    layers = dict.fromkeys(name for names in inject_config.find(model, target).values() for name in names)
    weights = {f"{name}.weight": model.get_parameter(f"{name}.weight") for name in layers}
    chosen = {id(weight): name for name, weight in weights.items()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in chosen and name not in weights:
            raise Refused(
                f"spdf: {chosen[id(parameter)]} is tied to {name}, which is not a target; a mask would thin out both. "
                "Leave it out of target."
            )
    return weights


def apply_static_sparsity(
    model: nn.Module,
    s: float,
    seed: int = 0,
    targets: str | Sequence[str] = "blocks",
    scheme: str = "uniform",
    *,
    rescale: bool = False,
    compact: bool = False,
) -> StaticMasks:
    """Draw masks for a model and put them in force, in place: see `StaticMasks`; `densify` takes them off again.

    The masks follow from `seed` and the layers' names, so data-parallel ranks agree. `compact` keeps gradients and
    optimiser state of existing weights alone (see `CompactMasks`; not for Trainer). Warns of rows or columns without
    any weight: units that are dead until the model is dense.

    Raises:
        UsageError: `s` outside [0, 1), or a model that already carries masks.
        Unmatched: a target that matches nothing.
        Refused: a layer left without any weight, or tied to one that is no target.
    """
    check_sparsity(s)
    _assert_bare(model)
    weights = masked_weights(model, targets)
    kept = support({name: tuple(weight.shape) for name, weight in weights.items()}, s, scheme)
    drawn = {name: draw(tuple(w.shape), kept[name], seed=seed, name=name) for name, w in weights.items()}
    if rescale:
        for name, weight in weights.items():
            weight.data.mul_((weight.numel() / kept[name]) ** 0.5)
    masks = _kind(compact)(weights, drawn)
    if dead := masks.dead():
        name, (rows, columns) = next(iter(dead.items()))
        warnings.warn(
            f"sparsity {s} leaves dead units in {len(dead)} of {len(weights)} weights, such as {rows} rows and "
            f"{columns} columns of {name} without any weight; lower it.",
            stacklevel=2,
        )
    return _carried(model, masks)


def load_masks(model: nn.Module, folder: str | Path, *, compact: bool = False) -> StaticMasks:
    """Put the masks of a model folder back on its weights, in place; errors as of `read_masks`."""
    _assert_bare(model)
    return _carried(model, read_masks(model, Path(folder), _kind(compact)))


def densify(model: nn.Module) -> nn.Module:
    """Take the masks off, in place: every weight trains, and the model's function is what it was.

    Raises UsageError where the model carries no masks, as one does that was just opened.
    """
    masks = getattr(model, "static_masks", None)
    if masks is None:
        raise UsageError("this model carries no masks; apply_static_sparsity or load_masks come before densify.")
    masks.lift()
    del model.static_masks
    return model


def _kind(compact: bool) -> type[StaticMasks]:
    return CompactMasks if compact else StaticMasks


def _carried(model: nn.Module, masks: StaticMasks) -> StaticMasks:
    model.static_masks = masks  # type: ignore[assignment]
    return masks


def _assert_bare(model: nn.Module) -> None:
    if hasattr(model, "static_masks"):
        raise UsageError("this model already carries masks; densify it first.")


class SparsityCallback(TrainerCallback):
    """Keeps a model's masks in `transformers.Trainer`, and writes them into its checkpoints.

    To resume, `load_masks(model, checkpoint)` on a model opened from that checkpoint, before Trainer goes on.
    """

    def __init__(self, masks: StaticMasks) -> None:
        if isinstance(masks, CompactMasks):
            raise Refused("spdf: Trainer's optimiser holds the weights themselves; apply the masks with compact=False.")
        self.masks = masks

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Refuse masks that are not those of the weights, which Trainer may just have loaded."""
        self.masks.assert_kept()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Clear the weights off the support."""
        self.masks.clear()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the mask file beside the checkpoint's weights."""
        if state.is_world_process_zero and args.output_dir is not None:
            self.masks.write(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def run(
    ready: Prepared,
    config: Config,
    out: Path,
    *,
    arm: str,
    code: str,
    checkpoints: Path,
    checkpoint_every: int = 0,
    callbacks: Sequence[Any] = (),
    allow_change: Sequence[str] = (),
) -> dict[str, Any]:
    """Pre-train under masks and write the model folder `out`, complete or not at all; return its `spdf.json`.

    The folder holds config.json, the weights, the tokenizer, the masks as packed bits and `spdf.json`. An interrupted
    run goes on from `checkpoints`. Raises NoEffect where nothing moved.
    """
    setting, task = ready.setting, ready.task
    model, masks = _start(ready, config)
    flat = [name for name, p in model.named_parameters() if p.ndim < 2]
    attached = attach_in_place(
        model, [name for name, _ in model.named_parameters()], matched={"masked": list(masks.weights)}, no_decay=flat
    )
    attached = masks.join(attached)
    before = snapshot(model)
    training, encoded = ready.training, ready.encoded
    done = train(
        attached,
        encoded["train"],
        encoded.get("validation"),
        task,
        replace(training, checkpoint_every=checkpoint_every),
        folder=checkpoints,
        identity={"arm": arm, "base": ready.base.fingerprint, "code": code},
        callbacks=callbacks,
        allow_change=allow_change,
        device=setting.device,
    )
    proof = receipt(before, model, attached)
    assert_effect(proof)
    masks.assert_kept()
    rows, block = len(encoded["train"]), int(encoded["train"].lengths[0])
    epochs, rest = divmod(done.steps, math.ceil(rows / training.batch))
    tokens = (epochs * rows + rest * training.batch) * block  # only the last batch of an epoch may be smaller
    flops = count_flops(model, masks.kept, block)
    known: dict[str, Any] = {
        "arm": arm,
        "base": {"spec": ready.base.spec, "fingerprint": ready.base.fingerprint},
        "data": {"name": ready.data.name, "fingerprint": ready.data.fingerprint},
        "seed": setting.seed,
        "training": asdict(training),
        "steps": done.steps,
        "best_step": done.best_step,
        "history": done.history,
        "masks": {
            "scheme": config.scheme,
            "rescaled": config.rescale,
            "sparsity": masks.sparsity,
            "kept": masks.kept,
            "dead_rows_and_columns": masks.dead(),
        },
        "flops": flops.compared(tokens, done.steps, done.seconds),
        "encoding": {name: rows.report for name, rows in encoded.items()},
        "receipt": proof,
        "environment": measure.environment(),
    }
    if "test" in encoded:
        answers = answer(model, encoded["test"], task, precision=training.precision)
        score = task.score(encoded["test"].labels.numpy(), answers.predictions)
        known["score"] = {"metric": task.metric, "mean": score}
    known["summary"] = (
        f"{masks.sparsity:.1%} of {flops.maskable:,} weights masked; training FLOPs a token (counted): "
        f"{flops.sparse:,} against {flops.dense:,} dense, {flops.ratio:.2f} times fewer. {NO_TIME}"
    )
    with complete_folder(out) as temporary:
        model.save_pretrained(temporary)  # type: ignore[operator]
        ready.base.tokenizer.save_pretrained(temporary)
        masks.write(temporary)
        write_json(temporary / "spdf.json", known)
    return known


def _start(ready: Prepared, config: Config) -> tuple[nn.Module, StaticMasks]:
    """Return the model and its masks, both in force, before the first step."""
    seed, attention = ready.setting.seed, ready.setting.attention
    if config.start == "fresh":
        model = ready.base.untrained(seed=seed, attention=attention)
        masks = apply_static_sparsity(
            model,
            config.sparsity,
            seed,
            config.target,
            config.scheme,
            rescale=config.rescale,
            compact=config.compact,
        )
        return model, masks
    if not (ready.base.folder / FILE).is_file():
        raise BadBase(
            f"base {ready.base.spec} has no {FILE}; start=base goes on with a model of `brickyard grow spdf`."
        )
    model = ready.base.model(ready.task, seed=seed, attention=attention)
    masks = load_masks(model, ready.base.folder, compact=config.compact)
    shapes = {name: tuple(w.shape) for name, w in masked_weights(model, config.target).items()}
    if support(shapes, config.sparsity, config.scheme) != masks.kept:
        raise UsageError(
            f"spdf: the masks of {ready.base.spec} have {masks.sparsity:.4f} sparsity in {len(masks.kept)} weights, "
            f"which sparsity={config.sparsity}, scheme={config.scheme}, target={config.target} would not give; name "
            "the options with which they were made."
        )
    return model, masks
