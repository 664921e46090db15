"""CE-SSL, first two pieces: adapters that a step leaves out at random, and ranks shared out before training begins.

    y = W x + d B A x,   d ~ Bernoulli(1 - p), one draw a layer and step        A [r, n] ~ N(0, 0.02), B [m, r] = 0
    outside training and in what is merged:  y = W x + (1 - p) B A x

A layer that is left out runs as the plain base layer: no product, no gradient, and no rescaling of the others. With
`compress` = c one pass over the training rows scores every layer before training by

    I = mean over entries of (W * G A^T A)^2        dL/dB = G A^T at B = 0, so (dL/dB) A is a sketch of the gradient G

("fisher" leaves out W *), and the floor(c K) layers of the K with the lowest scores get rank 2 floor(r / 4).

Source: "CE-SSL: Computation-Efficient Semi-Supervised Learning for ECG-based Cardiovascular Diseases Detection", arXiv
2406.14377, and its released code, which also draws outside training; here evaluation is deterministic.
Headline claim: above semi-supervised methods with few labels, at less memory, time and storage.
The third piece, unlabelled data through batch norms, is `semi-bn`. Left out: adapters of convolutions, biases trained
along. `one_shot_rank_allocation` serves any PEFT LoRA.
Legend: n in, m out, r rank of a layer, T tokens of the batch, K layers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from brickyard.core import inject
from brickyard.core.attached import Attached
from brickyard.core.batches import Order
from brickyard.core.errors import NotFinite, Refused, UsageError
from brickyard.core.inject import BrickyardLinear, Leaf, Part, Plan
from brickyard.core.method import Claim, Record
from brickyard.core.task import Task
from brickyard.core.wrap import ADAPTER

if TYPE_CHECKING:
    from brickyard.core.trial import Prepared

RECORD = Record(
    name="ce-ssl",
    family="tune",
    title="LoRA with randomly deactivated layers and ranks allocated in one pass",
    paper="CE-SSL: Computation-Efficient Semi-Supervised Learning for ECG, arXiv 2406.14377",
    slot="tuner",
    search={"lr": (3e-4, 1e-3, 3e-3), "compress": (0.2, 0.6)},
    training={"lr": 1e-3},
    presets={"paper": {"r": 16, "p": 0.2, "compress": 0.6}},
    claims=(
        Claim(
            text="With 200 labels and 0.7 of its parameters CE-SSL is at most 0.3 points below LoRA of the same rank.",
            inequality="ce-ssl >= lora - 0.3",
            arms={
                "ce-ssl": "ce-ssl:r=16,p=0.2,compress=0.6",
                "lora": "lora:r=16,alpha=16,target=blocks",
                "deactivation": "ce-ssl:r=16,p=0.2",
                "allocation": "ce-ssl:r=16,p=0,compress=0.6",
            },
            control={
                "what": "training labels shuffled: there is nothing left to learn",
                "arm": "ce-ssl:r=16,p=0.2,compress=0.6",
                "labels": "shuffled",
                "inequality": "ce-ssl > control + 5.0",
            },
            gate="lora > majority + 10.0",
            epochs=8,
            seeds=5,
            train_rows=200,
            batch=8,
            full={"train_rows": 600, "max_length": 0},
        ),
        Claim(
            text="On a language model it keeps at least 90 % of what LoRA of its rank gains over the untouched base.",
            inequality="ce-ssl >= 0.9 lora",
            arms={
                "ce-ssl": "ce-ssl:r=16,p=0.2,compress=0.6",
                "lora": "lora:r=16,alpha=16,target=blocks",
            },
            control={
                "what": "every next token dealt out anew within its block: there is nothing left to learn",
                "arm": "ce-ssl:r=16,p=0.2,compress=0.6",
                "labels": "shuffled",
                "inequality": "ce-ssl > control + 0.5",
            },
            gate="lora > base + 1.0",
            base="embedded:pylm",
            data="embedded:python-tests",
            epochs=4,
            lr_factors=(3.0, 10.0, 30.0),
            train_rows=200,
            batch=4,
            max_length=128,
            full={"epochs": 1, "train_rows": 0, "batch": 0, "max_length": 0, "seeds": 5},
        ),
        Claim(
            text="Ranks shared out by importance do at least as well as ranks shared out against it.",
            inequality="informed >= inverse",
            arms={
                "informed": "ce-ssl:r=4,p=0,compress=0.8",
                "random": "ce-ssl:r=4,p=0,compress=0.8,importance=random",
                "inverse": "ce-ssl:r=4,p=0,compress=0.8,importance=inverse",
            },
            control={
                "what": "training labels shuffled: there is nothing left to learn",
                "arm": "ce-ssl:r=4,p=0,compress=0.8",
                "labels": "shuffled",
                "inequality": "informed > control + 5.0",
            },
            gate="informed > majority + 10.0",
            epochs=8,
            seeds=5,
            train_rows=200,
            batch=8,
            full={"train_rows": 600, "max_length": 0},
        ),
        Claim(text="A layer that is left out costs nothing: steps take less time.", measure="step_time"),
    ),
)
SCORES = ("taylor", "fisher", "inverse", "random")


@dataclass(frozen=True, kw_only=True)
class Config:
    r: int = 16
    """rank of a layer that keeps its rank"""
    scale: float = 1.0
    """scaling of B A, whatever the rank"""
    p: float = 0.2
    """probability that a step leaves a layer's adapter out"""
    compress: float = 0.0
    """share of the layers that get half the rank"""
    importance: str = "taylor"
    """what decides: taylor, fisher, or as controls inverse (of taylor) and random"""
    low: tuple[int, ...] = ()
    """places of the layers with half the rank, in the model's order; found before training where compress asks"""
    target: str | tuple[str, ...] = "blocks"
    """`blocks` (all linear layers of the repeated blocks), roles, `all-linear`, or patterns of layer names"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "low", tuple(self.low))
        if self.r < 1 or not self.scale > 0:
            raise UsageError(f"ce-ssl: r={self.r} must be at least 1 and scale={self.scale} positive.")
        for name in ("p", "compress"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"ce-ssl: {name}={getattr(self, name)}: a share from 0 to below 1 was expected.")
        if self.importance not in SCORES:
            raise UsageError(f"ce-ssl: importance={self.importance!r}; expected one of {', '.join(SCORES)}.")
        if (self.compress or self.low) and self.r < 4:
            raise UsageError(f"ce-ssl: half of r={self.r} is 2 floor(r / 4) = 0; use r >= 4 with compress.")

    @property
    def half(self) -> int:
        """Rank of the layers that lose."""
        return 2 * (self.r // 4)


def plan(config: Config, leaves: Sequence[Leaf], generator: torch.Generator) -> Plan:
    """Lay out A and B; Refused where a rank exceeds a layer or `low` names none, UsageError where `compress` does."""
    if config.low and max(config.low) >= len(leaves):
        raise Refused(f"ce-ssl: low={list(config.low)} names layer {max(config.low)}, but {len(leaves)} are adapted.")
    _check_share(config, len(leaves))
    made = Plan()
    for place, leaf in enumerate(leaves):
        n, m = leaf.in_features, leaf.out_features
        rank = config.half if place in config.low else config.r
        if rank > min(n, m):
            raise Refused(f"ce-ssl: rank {rank} exceeds layer {leaf.name} ({n} in, {m} out); use r <= {min(n, m)}.")
        made.own[leaf.name] = {
            "a": torch.randn(rank, n, generator=generator) * 0.02,
            "b": torch.zeros(m, rank),
        }
    return made


def _check_share(config: Config, count: int) -> None:
    """Raise UsageError where `compress` of `count` layers is less than one layer."""
    if config.compress and not config.low and math.floor(config.compress * count) == 0:
        raise UsageError(
            f"ce-ssl: compress={config.compress:g} of {count} layers is less than one, so no rank would be halved; "
            f"give at least {math.ceil(1000 / count) / 1000:g}, adapt more layers, or leave compress out."
        )


def draw(config: Config, leaves: Sequence[Leaf], generator: torch.Generator) -> dict[str, bool]:
    """Draw for each layer whether this step uses its adapter."""
    used = torch.rand(len(leaves), generator=generator) >= config.p
    return {leaf.name: bool(u) for leaf, u in zip(leaves, used, strict=True)}


def factors(config: Config, part: Part) -> tuple[Tensor, Tensor, float]:
    """Return (A, B, scaling) of the expectation over the draws, which is what is merged and exported."""
    return part["a"], part["b"], config.scale * (1.0 - config.p)


def around(config: Config, part: Part, x: Tensor, y: Tensor) -> Tensor:
    """Return y, or y + s B A x at full strength where the step uses this layer's adapter."""
    if not part.training:
        return inject.low_rank(x, y, *factors(config, part))
    return y if part.drawn is False else inject.low_rank(x, y, part["a"], part["b"], config.scale)


def allocate(scores_K: np.ndarray, compress: float) -> tuple[int, ...]:
    """Return the places of the floor(c K) lowest scores; of equal ones the first."""
    return tuple(sorted(np.argsort(scores_K, kind="stable")[: math.floor(compress * len(scores_K))].tolist()))


def layer_score(w_mn: Tensor, grad_b_mr: Tensor, a_rn: Tensor, rule: str) -> float:
    """Return I of one layer from dL/dB [m, r] at B = 0 and A [r, n]."""
    sketch_mn = grad_b_mr @ a_rn
    return float((sketch_mn if rule == "fisher" else w_mn * sketch_mn).square().mean())


def importances(
    model: nn.Module, losses: Iterable[Callable[[], Tensor]], rule: str = "taylor", adapter: str = ADAPTER
) -> tuple[list[str], np.ndarray]:
    """Return the adapted layers and their scores [K], means over `losses`, each a function that runs one batch.

    model: adapters of ours or PEFT's LoRA with B = 0. Nothing is updated; gradients are cleared. Raises UsageError
    where B is not 0, NotFinite where a gradient is not finite.
    """
    found = {name: factors_of(layer, adapter) for name, layer in model.named_modules() if _adapted(layer, adapter)}
    if not found:
        raise UsageError(f"no layer carries a low-rank adapter named {adapter!r}; attach LoRA or ce-ssl first.")
    trained = [name for name, (_, _, b_mr) in found.items() if bool(b_mr.detach().any())]
    if trained:
        raise UsageError(f"{trained[0]}: B is not 0; importances are taken before anything trains.")
    totals_K, batches = np.zeros(len(found)), 0
    for loss in losses:
        model.zero_grad(set_to_none=True)
        loss().backward()
        for k, (w_mn, a_rn, b_mr) in enumerate(found.values()):
            # A layer that the batch did not reach (a frozen tower, an unused head) gathers nothing.
            totals_K[k] += 0.0 if b_mr.grad is None else layer_score(w_mn, b_mr.grad, a_rn.detach(), rule)
        batches += 1
    model.zero_grad(set_to_none=True)
    if not batches:
        raise UsageError("importances need at least one batch; none was given.")
    if not np.isfinite(totals_K).all():
        bad = list(found)[int(np.flatnonzero(~np.isfinite(totals_K))[0])]
        raise NotFinite(f"the importance of {bad} is not finite; check the data and the base.")
    return list(found), totals_K / batches


def _adapted(layer: nn.Module, adapter: str) -> bool:
    if isinstance(layer, BrickyardLinear):
        return adapter in layer.bound and layer.bound[adapter].name == RECORD.name
    return isinstance(layer, LoraLayer) and adapter in layer.lora_A and isinstance(layer.get_base_layer(), nn.Linear)


def factors_of(layer: Any, adapter: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return W [m, n], A [r, n] and B [m, r] of an adapted layer, the live tensors."""
    if isinstance(layer, BrickyardLinear):
        part = layer.part(adapter)
        return part.weight, part["a"], part["b"]
    return layer.get_base_layer().weight.detach(), layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def one_shot_rank_allocation(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    r_high: int,
    r_low: int,
    compress: float,
    score: str = "taylor",
    adapter: str = ADAPTER,
) -> dict[str, int]:
    """Return PEFT's `rank_pattern`: layer name -> rank, r_low for the floor(c K) least important of K layers.

    model: a PeftModel with fresh LoRA adapters (B = 0); loss(model, batch) a scalar. Give the pattern to a new
    LoraConfig of rank r_high; with `alpha_pattern` = the same times alpha / r the scaling stays what it was.
    """
    if not 0 <= compress < 1 or not 1 <= r_low <= r_high or score not in SCORES[:2]:
        raise UsageError(
            f"compress={compress} must lie in [0, 1), 1 <= r_low={r_low} <= r_high={r_high}, score={score!r} be taylor "
            "or fisher."
        )
    names, scores_K = importances(model, (lambda b=batch: loss(model, b) for batch in batches), score, adapter)
    low = set(allocate(scores_K, compress))
    plain = [name.removeprefix("base_model.model.") for name in names]
    return {name: r_low if k in low else r_high for k, name in enumerate(plain)}


def choose(config: Config, ready: Prepared) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Name the layers that get half the rank, from one pass over the training rows before anything trains."""
    from brickyard.core.build import build
    from brickyard.core.loop import batch_loss, to_device, train_mode

    if not config.compress or config.low:
        return None
    started = time.monotonic()
    configs = {**ready.plan.configs, RECORD.name: replace(config, p=0.0, compress=0.0)}
    made = build(
        replace(ready.plan, configs=configs),
        ready.base,
        ready.task,
        seed=ready.setting.seed,
        attention=ready.setting.attention,
    )
    _check_share(config, len(list(made.model.base_model.layers())))  # type: ignore[union-attr,arg-type,operator]
    made.model.to(ready.device)
    train_mode(made.model)
    rows = ready.encoded["train"]
    order = Order(rows.lengths, ready.training.batch, seed=ready.setting.seed, bucket=False)
    losses = (
        lambda i=index: batch_loss(made, ready.task, to_device(rows.collate(i), ready.device))
        for index in order.epoch(0)
    )
    rule = "fisher" if config.importance == "fisher" else "taylor"
    with torch.random.fork_rng(devices=[ready.device] if ready.device.type == "cuda" else []):
        # Dropout draws in this pass, and the same seed must find the same layers.
        torch.manual_seed(ready.setting.seed)
        names, scores_K = importances(made.model, losses, rule)
    if config.importance == "inverse":
        scores_K = -scores_K
    elif config.importance == "random":
        scores_K = np.random.Generator(np.random.PCG64(ready.setting.seed)).random(len(scores_K))
    low = allocate(scores_K, config.compress)
    report = {"seconds": time.monotonic() - started, "layers": names, "importance": scores_K.tolist()}
    return {"low": list(low)}, report


def attach(model: nn.Module, config: Config, task: Task) -> Attached:
    """Put CE-SSL's adapters on the target layers of `model`, which carries the task's head."""
    return inject.attach(model, RECORD.name, config, task)
