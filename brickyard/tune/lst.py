"""Ladder side-tuning: a narrow transformer beside the frozen backbone, fed by its states; no backward through it.

    s = W_in H_0 + b_in                                            H_i [B, T, d] states, W_in [k, d], k = d / r
    for each side layer i:  g_i = sigmoid(alpha_i / tau)           alpha_i = 0 at the start, so g = 1/2; tau = 0.1
                            s = g_i s + (1 - g_i)(W_i H_i+1 + b_i)  the state after block i
                            s = SideBlock_i(s)                     block i's type, every width divided by r
    out = W_up LN(s) + b_up                                        W_up [d, k]; then the head, or the output layer

Side blocks start as cut out of the backbone's, by the squared gradients of the loss (`fisher`), by the size of the
weights (`magnitude`), or at random; ladders, W_in and W_up are random. The backbone runs in evaluation mode, unlike in
the released code, so that its states can be kept: an epoch from kept states runs no block of it. Generation keeps keys
and values of the side blocks in a second cache beside the first. Nothing can be merged.

Source: Sung, Cho and Bansal, "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning", NeurIPS
2022, arXiv 2206.06522, section 3. Headline claim: 69 % of the training memory of full tuning saved, 2.7 times as much
as by other methods, at about their score. Left out: encoder-decoders.
Legend: B rows, T tokens, d width, k = d / r.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from brickyard.core.attached import Attached
from brickyard.core.errors import Refused, UsageError
from brickyard.core.method import Claim, Record
from brickyard.core.roles import blocks
from brickyard.core.side import SIDE, attach_side, backbone_of, stack
from brickyard.core.task import Task
from brickyard.tune._slices import has_last_norm, narrow, sliced

if TYPE_CHECKING:
    from brickyard.core.trial import Prepared

RECORD = Record(
    name="lst",
    family="tune",
    title="Ladder side-tuning: a narrow network beside the frozen backbone",
    paper="LST: Ladder Side-Tuning, NeurIPS 2022, arXiv 2206.06522",
    slot="tuner",
    head="linear-probe",
    search={"lr": (1e-3, 3e-3), "r": (4, 8)},
    training={"lr": 3e-3},
    presets={"paper": {"r": 8}},
    claims=(
        Claim(
            text="LST r=8 comes within 2 points of LoRA.",
            inequality="lst >= lora - 2.0",
            arms={"lst": "lst:r=8,init=random", "lora": "lora:lr=1e-3", "probe": "linear-probe:lr=1e-2"},
            control={
                "what": "the ladder is cut: all side blocks are there, and read what enters the first block alone",
                "arm": "lst:r=8,init=random,ladder=false",
                "inequality": "lst > control + 3.0",
            },
            gate="lora > probe + 1.0",
            data="trec|embedded:stdlib-topics",
            epochs=8,
            train_rows=1000,
            batch=16,
            full={"train_rows": 2000, "max_length": 0, "lrs": (1e-3, 3e-3)},
        ),
        Claim(
            text="LST r=8 beats a linear probe on the last layer by 3 points.",
            inequality="lst >= probe + 3.0",
            arms={"lst": "lst:r=8,init=random", "probe": "linear-probe:lr=1e-2"},
            control={
                "what": "training labels shuffled: there is nothing left to learn",
                "arm": "lst:r=8,init=random",
                "labels": "shuffled",
                "inequality": "lst > control + 10.0",
            },
            gate="probe > majority + 10.0",
            data="trec|embedded:stdlib-topics",
            epochs=8,
            train_rows=1000,
            batch=16,
            full={"train_rows": 2000, "max_length": 0},
        ),
        Claim(
            text="After one epoch side blocks cut out by Fisher importance are at least as good as random ones.",
            inequality="fisher >= random",
            arms={
                "fisher": "lst:r=8,init=fisher,fisher_samples=256",
                "random": "lst:r=8,init=random",
                "magnitude": "lst:r=8,init=magnitude",
            },
            control={
                "what": "training labels shuffled: there is nothing left to learn",
                "arm": "lst:r=8,init=fisher,fisher_samples=256",
                "labels": "shuffled",
                "inequality": "fisher > control + 5.0",
            },
            gate="random > majority + 10.0",
            data="trec|embedded:stdlib-topics",
            epochs=1,
            train_rows=2000,
            batch=16,
            full={"train_rows": 2000, "max_length": 0},
        ),
        Claim(
            text="LST r=8 keeps at most 0.4 times the bytes for backward that LoRA keeps.",
            measure="saved_bytes",
            kind="counted",
        ),
        Claim(text="From kept states an epoch takes at most a third of LoRA's.", measure="epoch_time"),
    ),
)
_PROBE_EPOCHS = 3  # of the head that is trained before gradients are squared
# What changes rows or length of a cache.
_SHARED = (
    "reorder_cache",
    "crop",
    "batch_repeat_interleave",
    "batch_select_indices",
    "reset",
    "activate_past_recording",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the side network; UsageError for values out of range."""

    r: int = 8
    """what every width is divided by"""
    layers: tuple[int, ...] = ()
    """blocks that have a side block, counted from 0; empty: all of them"""
    temperature: float = 0.1
    """tau of the gates"""
    init: Literal["fisher", "magnitude", "random"] = "fisher"
    """how the side blocks start"""
    fisher_samples: int = 1024
    """training rows whose gradients are squared, one by one"""
    cache: bool = True
    """compute the states once, not in every epoch"""
    store: Literal["float16", "float32"] = "float16"
    """type in which they are kept"""
    ladder: bool = True
    """false: side blocks see no state beyond what enters the first block; the negative control"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.r < 1 or not self.temperature > 0 or self.fisher_samples < 1:
            raise UsageError(
                f"lst: r={self.r}, temperature={self.temperature}, fisher_samples={self.fisher_samples}: all must be "
                "positive."
            )
        if list(self.layers) != sorted(set(self.layers)) or (self.layers and self.layers[0] < 0):
            raise UsageError(f"lst: layers={list(self.layers)}: name blocks from 0 on, each once, rising.")


class Ladder(nn.Module):
    """The side network; `small` is a narrow network of the backbone's class whose blocks are the side blocks.

    Called with the states [H_0, H_i+1 for the side layers] and the batch, it returns [B, T, d]. Without the ladder it
    has neither rungs nor gates, and H_0 is all that it reads.
    """

    def __init__(self, backbone: Any, config: Config) -> None:
        super().__init__()
        count = len(stack(backbone))
        self.layers = list(config.layers) or list(range(count))
        if self.layers[-1] >= count:
            raise UsageError(f"lst: layers={self.layers}: this base has blocks 0 to {count - 1}.")
        self.small: Any = narrow(backbone, config.r, self.layers)
        wide, k = int(backbone.config.hidden_size), int(self.small.config.hidden_size)
        self.enter = nn.Linear(wide, k)
        self.rungs = nn.ModuleList(nn.Linear(wide, k) for _ in (self.layers if config.ladder else ()))
        self.alpha = nn.Parameter(torch.zeros(len(self.layers))) if config.ladder else None
        self.norm = nn.Identity() if has_last_norm(self.small) else nn.LayerNorm(k)
        self.leave = nn.Linear(k, wide)
        self.temperature = config.temperature
        self._states: list[Tensor] = []
        for j, (_, block) in enumerate(blocks(self.small)):
            block.register_forward_pre_hook(self._rung(j), with_kwargs=True)

    def trainable(self) -> list[str]:
        """Names of what trains: all but the narrow embedding, which is never read."""
        names, inside = list(dict(self.small.named_modules())), tuple(f"{n}." for n, _ in blocks(self.small))
        last = max(i for i, name in enumerate(names) if name.startswith(inside))
        after = tuple(f"{name}." for name in names[last + 1 :])
        kept = {f"small.{n}" for n, _ in self.small.named_parameters() if n.startswith((*inside, *after))}
        return [n for n, _ in self.named_parameters() if not n.startswith("small.") or n in kept]

    @property
    def gates(self) -> Tensor:
        """g_i of every side layer, where there is a ladder."""
        assert self.alpha is not None
        return torch.sigmoid(self.alpha / self.temperature)

    def _rung(self, j: int) -> Callable[..., Any]:
        def mix(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            below = self.enter(self._states[0]) if j == 0 else args[0] if args else kwargs["hidden_states"]
            mixed = below
            if self.rungs:
                g = self.gates[j]
                mixed = g * below + (1 - g) * self.rungs[j](self._states[j + 1])
            return ((mixed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": mixed})

        return mix

    def forward(self, states: list[Tensor], batch: dict[str, Any]) -> Tensor:
        self._states = states
        for module in self.small.modules():  # they are narrow, and in a second run would miss the states
            if getattr(module, "gradient_checkpointing", False):
                module.gradient_checkpointing = False
        try:
            if "pixel_values" in batch:
                found = self.small(pixel_values=batch["pixel_values"])
            else:
                given = {n: batch[n] for n in ("attention_mask", "position_ids") if batch.get(n) is not None}
                b, t = states[0].shape[:2]
                # A cache that is given is read and grows, whatever use_cache says of one that would be begun.
                if (cache := batch.get("past_key_values")) is not None:
                    given |= {"past_key_values": second_cache(cache, self.small.config, t), "use_cache": True}
                # What the embedding is given does not matter: the first rung takes its place.
                found = self.small(inputs_embeds=states[0].new_zeros(b, t, self.enter.out_features), **given)
            return self.leave(self.norm(found.last_hidden_state))
        finally:
            self._states = []


def second_cache(first: Any, config: Any, read: int) -> DynamicCache:
    """Return the side blocks' cache that goes with the backbone's, which has just read `read` tokens.

    What reorders or cuts that one does so with both, also in a copy of it. UsageError where the two differ in length.
    """
    if not hasattr(first, SIDE):
        first.__class__, first.side = _with_second(type(first)), DynamicCache(config=config)
    held, wanted = int(first.side.get_seq_length()), int(first.get_seq_length()) - read
    if held != wanted:
        raise UsageError(
            f"lst: the cache holds {wanted} tokens of the backbone and {held} of its side blocks; begin it with this "
            "model, in a pass that keeps its cache (use_cache not false)."
        )
    return first.side


@lru_cache(maxsize=8)  # one for each class of caches
def _with_second(kind: type) -> type:
    """Return a class of caches like `kind` with a second one, `side`, which shares its fate."""

    def both(name: str) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            getattr(self.side, name)(*args, **kwargs)
            return getattr(kind, name)(self, *args, **kwargs)

        return call

    return type(kind.__name__, (kind,), {name: both(name) for name in _SHARED if hasattr(kind, name)})


def attach(model: nn.Module, config: Config, task: Task) -> Attached:
    """Put the ladder beside the backbone of `model`; side blocks start at random until `initialise` is called."""
    made = Ladder(backbone_of(model), config)
    if config.init == "magnitude":
        _set(made, backbone_of(model), {n: p.detach().abs() for n, p in backbone_of(model).named_parameters()})
    layers = [0, *(i + 1 for i in made.layers)] if config.ladder else [0]
    return attach_side(model, made, layers, trainable=made.trainable(), cache=config.cache, store=config.store)


def initialise(config: Config, ready: Prepared, attached: Attached) -> dict[str, Any] | None:
    """Cut the side blocks out of the backbone by Fisher importance; None where another start was asked for.

    The gradients are those of the untouched base with the task's loss: of a language model with its own output layer,
    else with a linear head that is trained first, for the gradients under an untrained head are mostly noise.
    """
    if config.init != "fisher":
        return None
    started = time.monotonic()
    importance, rows = fisher(config, ready)
    side: Any = attached.model.get_submodule(SIDE)
    _set(side, backbone_of(attached.model), importance)
    return {"seconds": time.monotonic() - started, "init": "fisher", "rows": rows}


def fisher(config: Config, ready: Prepared) -> tuple[dict[str, Tensor], int]:
    """Return the summed squares of the gradients of single rows, by name in the backbone, and how many rows."""
    from brickyard.core.arm import Arm, Piece
    from brickyard.core.build import build, resolve
    from brickyard.core.loop import batch_loss, to_device, train
    from brickyard.core.trial import examples

    task, setting, rows = ready.task, ready.setting, ready.encoded["train"]
    if task.generative:
        model: nn.Module = ready.base.model(task, seed=setting.seed, attention=setting.attention)
    else:
        plan = resolve(Arm((Piece("linear-probe"),), {}), task)
        probe = build(plan, ready.base, task, seed=setting.seed, attention=setting.attention)
        training = replace(ready.training, lr=1e-2, epochs=_PROBE_EPOCHS, steps=0, patience=0)
        sets, _ = examples(replace(ready, plan=plan, encoded={"train": rows}), probe)
        train(probe, sets["train"], None, task, training, device=setting.device)
        model = probe.model
    backbone = backbone_of(model.to(ready.device).eval())
    model.requires_grad_(False)
    wanted = {n: p.requires_grad_() for n, p in backbone.named_parameters()}
    total = {n: torch.zeros_like(p) for n, p in wanted.items()}
    index = np.random.Generator(np.random.PCG64(setting.seed)).permutation(len(rows))[: config.fisher_samples]
    whole = Attached(model, [], dict, lambda t: None, lambda: model)
    for i in index:
        batch_loss(whole, task, to_device(rows.collate(np.array([i])), ready.device)).backward()
        for name, p in wanted.items():
            if p.grad is not None:
                total[name].addcmul_(p.grad, p.grad)
                p.grad = None
    return total, len(index)


@torch.no_grad()
def _set(side: Ladder, backbone: Any, importance: dict[str, Tensor]) -> None:
    embedding: Any = backbone.get_input_embeddings()
    name = next(n for n, m in backbone.named_modules() if m is embedding)
    score = importance.get(f"{name}.weight")
    width = int(backbone.config.hidden_size)
    # Of images the embedding is a convolution, whose rows are the channels.
    if score is None:
        score = next(t for n, t in importance.items() if n.startswith(f"{name}.") and n.endswith("weight"))
    first = score.sum(0) if score.ndim == 2 and score.shape[1] == width else score.flatten(1).sum(1)
    if first.shape != (width,):
        raise Refused("lst: the embedding of this base does not give its hidden width; use init=random.")
    cut = sliced(backbone, side.small, side.layers, {n: t.cpu() for n, t in importance.items()}, first.cpu())
    targets = dict(side.small.named_parameters())
    for target, tensor in cut.items():
        targets[target].copy_(tensor)


def parameter_count(d: int, inner: int, r: int, layers: int) -> int:
    """Trained parameters of a ladder beside a BERT-like backbone (biases, two norms a block), without the head."""
    k, f = d // r, inner // r
    block = 4 * (k * k + k) + (k * f + f) + (f * k + k) + 4 * k
    return (d * k + k) + layers * (d * k + k + 1 + block) + 2 * k + (k * d + d)
