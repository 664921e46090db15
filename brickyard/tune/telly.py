"""Telly-K: freeze the embeddings and the bottom K layers, train the rest; frozen layers are computed once.

    H_0 = embed(x)                    frozen: token, position and type embeddings with their norm     H_l [B,T,D]
    H_l = block_l-1(H_l-1)            frozen for l <= K, trained for l > K (L blocks), as is the norm behind the last
    logits = head(H_L)                trained; a pre-trained pooler before it stays frozen
    K   = #{bottom layers with rho_l >= threshold}                            k=-1: chosen by a short full run

rho_l is the correlation of the layer's geometry before and after that run (see `brickyard show similarity`). The bottom
is a fixed function, always in evaluation mode (no dropout in it), so H_K is computed once for each row, kept on disk,
and every epoch starts at block K: that costs (L - K)/L of a pass forward and back. `store` says in which type H_K is
kept: float32 gives the losses of the ordinary pass; float16, half the bytes, rounds each value by at most 1 in 2048
(counted in `cost`). With cache=false the frozen layers run in every epoch. A brick is used with the ordinary model.

In a language model whose output layer is the embedding, freezing the one freezes the other: the receipt says so, and
untie=true trains a copy as output layer. Source: "Towards Efficient Fine-tuning of Pre-trained Code Models: An
Experimental Study and Beyond", ISSTA 2023, arXiv 2304.05216. Headline, UniXcoder-base (L=12), code search MRR: full
0.720, K=6 0.727, K=8 0.723, K=11 0.690; an epoch takes 17m14s, 9m04s (K=8), 6m21s (K=11). There the frozen layers still
run in each epoch, and K is fixed beforehand; here k is L/2 by default. Left out: encoder-decoders and staged networks
(one stack of blocks is expected), and a tuner other than full training in the upper layers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import nn

from brickyard.core import build as building
from brickyard.core.arm import Arm, Piece
from brickyard.core.attached import Attached, attach_in_place
from brickyard.core.errors import Refused, UsageError
from brickyard.core.loop import train
from brickyard.core.method import Claim, Record
from brickyard.core.prefix import Prefix, keep_at_rest
from brickyard.core.retention import inner
from brickyard.core.roles import blocks, own_head, roles
from brickyard.core.similarity import bottom_alike, cka, layer_means, rho

if TYPE_CHECKING:
    from brickyard.core.task import Task
    from brickyard.core.trial import Prepared

RECORD = Record(
    name="telly",
    family="tune",
    title="Telly-K: the bottom K layers frozen and computed once",
    paper="ISSTA 2023, arXiv 2304.05216",
    slot="tuner",
    search={"lr": (3e-5, 1e-4, 3e-4)},
    training={"lr": 1e-4, "wd": 0.01},
    claims=(
        Claim(
            text="Training only the upper half of the layers is at most 1 point worse than training them all.",
            inequality="telly >= full - 1.0",
            arms={"telly": "telly + linear-probe", "full": "full + linear-probe"},
            control={
                "what": "the top half frozen in place of the bottom half: as many parameters train, the wrong ones",
                "arm": "telly:top=true + linear-probe",
                "inequality": "telly > control",
            },
            gate="full > majority + 10.0",
            epochs=3,
            lr_factors=(1.0, 3.0),
            train_rows=600,
            batch=8,
            full={"train_rows": 0, "batch": 0, "max_length": 0, "seeds": 5},
        ),
        Claim(
            text="On a language model training only the upper half keeps nine tenths of full training's gain.",
            inequality="telly >= 0.9 full",
            arms={"telly": "telly", "full": "full"},
            control={
                "what": "the top half frozen in place of the bottom half: as many parameters train, the wrong ones",
                "arm": "telly:top=true",
                "inequality": "telly > control",
            },
            gate="full > base + 1.0",
            base="embedded:pylm",
            data="embedded:python-tests",
            epochs=4,
            lr_factors=(1.0, 3.0, 10.0),
            train_rows=200,
            batch=4,
            max_length=128,
            full={"epochs": 1, "train_rows": 0, "batch": 0, "max_length": 0, "seeds": 5},
        ),
        Claim(
            text="A step's time falls with K; at K = 2L/3 it is at most 0.65 of full training's, nothing cached.",
            measure="step_time",
        ),
        Claim(
            text="The bytes kept for backward fall linearly with K; the frozen layers keep none.",
            measure="saved_bytes",
            kind="counted",
        ),
        Claim(
            text="After full tuning rho does not rise with depth by more than 0.02, and the top layer's is the lowest.",
            measure="rho_curve",
            seeds=3,
            epochs=2,
            train_rows=600,
            batch=8,
            full={"epochs": 3, "train_rows": 0, "max_length": 0},
        ),
    ),
)

AUTO = -1
_WHOLE = "full"  # the tuner of the short run by which k is chosen


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of Telly-K; UsageError for values out of range. That k < L is checked when the base is known."""

    k: int | None = None
    """bottom layers that are frozen; none: half of them, -1: chosen by a short full run"""
    threshold: float = 0.95
    """k=-1: layers below the first whose rho is lower are frozen"""
    auto_steps: int = 300
    """k=-1: steps of the short run, at most those of the training itself"""
    auto_rows: int = 1000
    """k=-1: training rows by which rho is measured"""
    cache: bool = True
    """compute the states that leave the frozen layers once, not in every epoch"""
    store: Literal["float16", "float32"] = "float16"
    """type in which those states are kept"""
    untie: bool = False
    """train a copy of the embedding as output layer, where a language model has one matrix for both"""
    top: bool = False
    """negative control: freeze as many layers at the top (and the embeddings); nothing can be cached"""

    def __post_init__(self) -> None:
        if self.k is not None and self.k < AUTO:
            raise UsageError(f"telly: k={self.k}; give 0 or more layers to freeze, or -1 to have them chosen.")
        if not -1 <= self.threshold <= 1:
            raise UsageError(f"telly: threshold={self.threshold}; rho lies between -1 and 1.")
        if self.auto_steps < 1 or self.auto_rows < 2:
            raise UsageError(f"telly: auto_steps={self.auto_steps}, auto_rows={self.auto_rows}: at least 1 and 2.")


@dataclass(frozen=True)
class Layers:
    """Names in a model: its `blocks` from the input on, the modules of its `stem` below them, its `output` layer over a
    vocabulary ("" without one), and the parameters outside the blocks that telly never trains (`fixed`).
    """

    blocks: list[str]
    stem: list[str]
    fixed: list[str]
    output: str


def layers_of(model: nn.Module) -> Layers:
    """Read a model's structure; Refused where it is not one stack of blocks.

    A model lists its modules in the order in which it runs them. Below the blocks everything is embedding; above them
    norms belong to the top layer and train, and other weights are a pre-trained pooler. Relative positions may lie
    above, and are known by their role.
    """
    names = [name for name, _ in blocks(model)]
    stacks = sorted({name.rpartition(".")[0] for name in names})
    if len(stacks) != 1:
        raise Refused(
            f"telly freezes the bottom of one stack of layers; this base has {len(stacks)} "
            f"({', '.join(stacks[:4]) or 'none'}). For encoder-decoders and staged networks use lora or full."
        )
    first, modules = f"{names[0]}.", dict(model.named_modules())
    output = next((name for name, module in modules.items() if name and module is _output_layer(model)), "")
    own = tuple(f"{name}." for name in (*own_head(model), *([output] if output else []))) or ("\0",)
    stem: list[str] = []
    for name in modules:
        if name == names[0]:
            break
        if not first.startswith(f"{name}.") and name and not f"{name}.".startswith(own):
            stem.append(name)
    inside, kinds = tuple(f"{name}." for name in names), roles(model)
    fixed, above = [], False
    for name, _ in model.named_parameters():
        if name.startswith(inside):
            above = True
        elif not name.startswith(own) and not (above and kinds.get(name.rpartition(".")[0]) == "norm"):
            fixed.append(name)
    return Layers(names, stem, fixed, output)


def frozen_blocks(names: list[str], config: Config) -> list[str]:
    """Return the blocks that stay as they are: k at the bottom (or, the control, at the top); UsageError if k >= L."""
    count = len(names) // 2 if config.k is None else config.k
    if count == AUTO:
        raise UsageError(
            "telly: k=-1 is chosen by a short training run (brickyard tune or compare); here give k itself."
        )
    if count >= len(names):
        raise UsageError(f"telly: k={count} leaves no layer to train; this base has L={len(names)}, give 0 to L-1.")
    return names[len(names) - count :] if config.top else names[:count]


def attach(model: nn.Module, config: Config, task: Task) -> Attached:
    """Train the upper layers and the head of `model`; the rest is frozen and at rest."""
    found = layers_of(model)
    frozen = frozen_blocks(found.blocks, config)
    tie_again = _untie(model) if config.untie else None
    tied = _tied(model)
    still = (*(f"{name}." for name in frozen), "\0")
    trainable = [n for n, _ in model.named_parameters() if not n.startswith(still) and n not in set(found.fixed)]
    matched = {
        "frozen layers": frozen,
        "frozen with the embedding that it is: output layer": [found.output] if tied else [],
        "trained layers": [name for name in found.blocks if name not in frozen],
    }
    flat = [name for name, p in model.named_parameters() if p.ndim < 2]
    attached = attach_in_place(model, trainable, matched={k: v for k, v in matched.items() if v}, no_decay=flat)
    resting = keep_at_rest(model, [model.get_submodule(name) for name in (*found.stem, *frozen)])
    if frozen and config.cache and not config.top:
        attached.prefix = Prefix(model, frozen, store=config.store)
    put_back = attached.detach

    def detach() -> nn.Module:
        put_back()
        resting.remove()
        if attached.prefix is not None:
            attached.prefix.close()
        if tie_again is not None:
            tie_again()
        return model

    attached.detach = detach
    return attached


def choose(config: Config, ready: Prepared) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Choose k by a short full run on the training rows: ({"k": K}, report with the curve); None where k is given.

    The run has the arm's own head, learning rate and seed. rho is measured on `auto_rows` training rows.
    """
    if config.k != AUTO:
        return None
    started = time.monotonic()
    pieces = [piece if piece.name != RECORD.name else Piece(_WHOLE) for piece in ready.plan.arm.pieces]
    plan = building.resolve(Arm(tuple(pieces), ready.plan.arm.training), ready.task)
    setting, rows = ready.setting, ready.encoded["train"]
    whole = building.build(plan, ready.base, ready.task, seed=setting.seed, attention=setting.attention)
    layers_of(whole.model)  # refused now, not after the run
    index = np.random.Generator(np.random.PCG64(0)).permutation(len(rows))[: config.auto_rows]
    steps = min(config.auto_steps, ready.training.total_steps(len(rows)))
    whole.model.to(ready.device)
    before = layer_means(inner(whole.model), rows, index)
    train(whole, rows, None, ready.task, replace(ready.training, steps=steps), device=setting.device)
    after = layer_means(inner(whole.model), rows, index)
    curve = [rho(x, y) for x, y in zip(before, after, strict=True)]
    report = {
        "k": bottom_alike(curve, config.threshold),
        "rho": curve,
        "cka": [cka(x, y) for x, y in zip(before, after, strict=True)],
        "threshold": config.threshold,
        "steps": steps,
        "rows": len(index),
        "seconds": time.monotonic() - started,
    }
    return {"k": report["k"]}, report


def costliest(config: Config, ready: Prepared) -> tuple[dict[str, Any], int] | None:
    """What a probe takes for a k that is yet to be chosen: no frozen layer; and the steps that choosing takes."""
    return ({"k": 0}, config.auto_steps) if config.k == AUTO else None


def _output_layer(model: nn.Module) -> nn.Module | None:
    find: Any = getattr(model, "get_output_embeddings", None)
    return None if find is None else find()


def _tied(model: nn.Module) -> bool:
    """Whether a language model's output layer is its embedding."""
    output: Any = _output_layer(model)
    return output is not None and output.weight is model.get_input_embeddings().weight  # type: ignore[operator]


def _untie(model: Any) -> Any:
    """Give the output layer a copy of the embedding; return what ties it again. UsageError where they are not tied."""
    if not _tied(model):
        raise UsageError("telly: untie=true, but this model's output layer is not its embedding; leave it out.")
    output, shared = _output_layer(model), model.get_input_embeddings().weight
    output.weight = nn.Parameter(shared.detach().clone())  # type: ignore[union-attr]
    said, model.config.tie_word_embeddings = model.config.tie_word_embeddings, False

    def tie_again() -> None:
        output.weight, model.config.tie_word_embeddings = shared, said  # type: ignore[union-attr]

    return tie_again
