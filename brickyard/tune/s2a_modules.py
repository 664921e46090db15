"""S2A, first half: tuners whose gradient needs little of what the forward computes.

    kind=bias   y = W x + (b + db)                  dL/db = sum of g over tokens: nothing is kept, W is frozen
    kind=side   H' = block(H) + U relu(D H)         D [r, d], U [d, r], U = 0 at the start; kept are D H [B, T, r] and
                                                    H as 4-bit codes (`s2a`), not H
    kind=prompt H' = block([P_l; H]) without the prompts' outputs, P_l [n, d] learned for every block

W, and every block, frozen; the head of the task trains too. A fresh bias or branch changes nothing; fresh prompts are
read from the first step on. Norms train their shift with kind=bias and never their scale, whose gradient needs the
normalised input. `s2a-modules:kind=side + s2a` codes the rest of what is kept. Biases are part of the model, so they
cost nothing afterwards; branches and prompts stay. Prompts reach a block as keys and values of its attention alone, so
no sequence grows.

Source: "Structure-Activation Synergy: A Dual Efficiency Framework for Parameter-Memory Optimized Transfer Learning",
arXiv 2503.08154, of which abstract and summary were at hand: S2A (reimplementation). Headline: 98.7 % of full tuning's
accuracy with 0.9 % of its parameters. Left out: pooling of the branch's input over tokens, which would let a language
model look ahead.
Legend: B batch, T tokens, d width of the block, r rank of the branch, n prompts, g the gradient at y.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brickyard.core.attached import Attached, also_undo, attach_in_place
from brickyard.core.errors import Refused, UsageError
from brickyard.core.method import Claim, Record
from brickyard.core.roles import blocks, entering_width, own_head
from brickyard.core.side import backbone_of, stack
from brickyard.core.task import Task
from brickyard.tune._coded import Once, Trained
from brickyard.tune._codes import Grouped
from brickyard.tune._prompts import Prompts

RECORD = Record(
    name="s2a-modules",
    family="tune",
    title="Bias, prompt and side modules that keep few inputs (S2A, reimplementation)",
    paper="Structure-Activation Synergy, arXiv 2503.08154",
    slot="tuner",
    search={"lr": (1e-3, 3e-3)},
    training={"lr": 2e-3},
    claims=(
        Claim(
            text="The side module with 4-bit saved activations is no worse than BitFit by more than 0.2 points.",
            inequality="side >= bitfit - 0.2",
            arms={"side": "s2a-modules:kind=side + s2a:preset=paper", "bitfit": "bitfit"},
            control={
                "what": "training labels shuffled: there is nothing left to learn",
                "arm": "s2a-modules:kind=side + s2a:preset=paper",
                "labels": "shuffled",
                "inequality": "side > control + 5.0",
            },
            gate="bitfit > majority + 10.0",
            epochs=2,
            lr_factors=(1.0, 3.0),
            train_rows=600,
            batch=8,
            full={"epochs": 3, "train_rows": 0, "batch": 0, "max_length": 0, "seeds": 5},
        ),
        Claim(
            text="4-bit saved activations cost prompts at most 0.5 points.",
            inequality="coded-prompt >= prompt - 0.5",
            arms={"coded-prompt": "s2a-modules:kind=prompt + s2a:preset=paper", "prompt": "s2a-modules:kind=prompt"},
            control={
                "what": "training labels shuffled: there is nothing left to learn",
                "arm": "s2a-modules:kind=prompt + s2a:preset=paper",
                "labels": "shuffled",
                "inequality": "coded-prompt > control + 5.0",
            },
            gate="prompt > majority + 10.0",
            epochs=2,
            lr_factors=(1.0, 3.0),
            train_rows=600,
            batch=8,
            full={"epochs": 3, "train_rows": 0, "batch": 0, "max_length": 0, "seeds": 5},
        ),
        Claim(
            text="4-bit saved activations cost the bias module at most 0.5 points.",
            inequality="coded-bias >= bias - 0.5",
            arms={"coded-bias": "s2a-modules:kind=bias + s2a:preset=paper", "bias": "s2a-modules:kind=bias"},
            control={
                "what": "training labels shuffled: there is nothing left to learn",
                "arm": "s2a-modules:kind=bias + s2a:preset=paper",
                "labels": "shuffled",
                "inequality": "coded-bias > control + 5.0",
            },
            gate="bias > majority + 10.0",
            epochs=2,
            lr_factors=(1.0, 3.0),
            train_rows=600,
            batch=8,
            full={"epochs": 3, "train_rows": 0, "batch": 0, "max_length": 0, "seeds": 5},
        ),
        Claim(
            text="The bias module in 4 bits keeps a quarter of full tuning's bytes and 1 / 2.5 of LoRA's, or fewer.",
            measure="saved_bytes",
            kind="counted",
        ),
    ),
)

_SIDE = "s2a_side"  # the branch's name in its block
_PROMPT = "s2a_prompt"  # the prompts' name in the model
_INIT = 0.02  # standard deviation of fresh prompts: that of most transformers' embeddings


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of S2A's modules; UsageError for values out of range."""

    kind: Literal["bias", "prompt", "side"] = "side"
    """what trains: the biases and shifts, prompts before each block, or a branch beside it"""
    r: int = 8
    """kind=side: rank of the branch"""
    bits: int = 4
    """kind=side: bits in which the branch keeps its input; 32: as it is"""
    tokens: int = 10
    """kind=prompt: prompts of each block"""
    add_bias: bool = False
    """kind=bias: give linear layers without a bias one, zero at the start"""

    def __post_init__(self) -> None:
        if self.r < 1 or self.tokens < 1:
            raise UsageError(f"s2a-modules: r={self.r} and tokens={self.tokens} must be at least 1.")
        if self.bits not in (1, 2, 4, 8, 32):
            raise UsageError(f"s2a-modules: bits={self.bits}; use 1, 2, 4 or 8 (or 32: exact).")
        if self.add_bias and self.kind != "bias":
            raise UsageError("s2a-modules: add_bias=true goes with kind=bias.")


class Side(nn.Module):
    """U relu(D x) of rank `r` for x [..., width]; D drawn as nn.Linear draws, U = 0."""

    def __init__(self, width: int, r: int, bits: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, r, bias=False)
        self.up = nn.Linear(r, width, bias=False)
        nn.init.zeros_(self.up.weight)
        self.once = Once(Grouped(bits))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.down.weight.dtype)  # the branch is in full precision beside a base in half
        if torch.is_grad_enabled():
            u = Trained.apply(x, self.down.weight, None, self.down.forward, False, self.once)
        else:
            u = self.down(x)
        return self.up(F.relu(u))


class Tokens(nn.Module):
    """Learned prompts of all blocks: `self(l, h_BTd, mask_BT)` -> [B, n, d], whatever the example."""

    def __init__(self, layers: int, tokens: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(layers, tokens, width) * _INIT)
        self.method_module = True

    def forward(self, l: int, h_BTd: Tensor, mask_BT: Tensor) -> Tensor:
        return self.weight[l].expand(len(h_BTd), -1, -1)


def attach(model: nn.Module, config: Config, task: Task) -> Attached:
    """Add what `config.kind` says to `model` and train it with the head; Refused where the base has no place for it."""
    undo = ExitStack()
    if config.kind == "side":
        added = _add_sides(model, config, undo)
        matched = {"blocks": [name for name, _ in blocks(model)]}
    elif config.kind == "prompt":
        added = _add_prompts(model, config, undo)
        matched = {"blocks": [name for name, _ in stack(model)]}
    else:
        added = _biases(model, config.add_bias, undo)
        matched = {"*bias": added}
    heads = _heads(model)
    head = [n for n, _ in model.named_parameters() if n.startswith(heads)]
    attached = attach_in_place(model, [*added, *head], matched=matched, no_decay=added if config.kind == "bias" else ())
    return also_undo(attached, undo.close)


def _heads(model: nn.Module) -> tuple[str, ...]:
    return tuple(f"{name}." for name in own_head(model)) or ("\0",)


def _biases(model: nn.Module, add: bool, undo: ExitStack) -> list[str]:
    """Names of the biases and shifts of the backbone, those added to layers without one included."""
    heads = _heads(model)
    if add:
        output = getattr(model, "get_output_embeddings", lambda: None)()
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear) or module is output or f"{name}.".startswith(heads):
                continue
            if module.bias is None:
                undo.callback(setattr, module, "bias", None)
                module.bias = nn.Parameter(module.weight.new_zeros(module.out_features))
    names = [n for n, _ in model.named_parameters() if n.endswith("bias") and not n.startswith(heads)]
    if not names:
        raise Refused(
            "s2a-modules: this base has no biases (Llama-like models have none); add_bias=true gives its linear layers "
            "some, kind=side needs none."
        )
    return names


def _add_sides(model: nn.Module, config: Config, undo: ExitStack) -> list[str]:
    """Put a branch beside every block; return the names of its parameters."""
    found = blocks(model)
    if not found:
        raise Refused("s2a-modules: this base has no repeated blocks to put a branch beside; kind=bias needs none.")
    names = []
    for name, block in found:
        weight = next(p for p in block.parameters() if p.is_floating_point())
        side = Side(entering_width(block), config.r, config.bits).to(weight.device)
        block.add_module(_SIDE, side)
        handle = block.register_forward_hook(_beside, with_kwargs=True)
        undo.callback(handle.remove)
        undo.callback(delattr, block, _SIDE)
        names += [f"{name}.{_SIDE}.{part}" for part, _ in side.named_parameters()]
    return names


def _add_prompts(model: nn.Module, config: Config, undo: ExitStack) -> list[str]:
    """Let every block read prompts; return the name of their parameter."""
    made = Tokens(len(stack(model)), config.tokens, int(backbone_of(model).config.hidden_size))  # type: ignore[union-attr, arg-type]
    undo.callback(Prompts(model, made).close)
    model.add_module(_PROMPT, made.to(next(model.parameters()).device))
    undo.callback(delattr, model, _PROMPT)
    return [f"{_PROMPT}.weight"]


def _beside(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    """Add the branch's output to the block's."""
    x = args[0] if args else kwargs["hidden_states"]
    side: Callable[[Tensor], Tensor] = getattr(block, _SIDE)
    first = out[0] if isinstance(out, tuple) else out
    first = first + side(x).to(first.dtype)
    return (first, *out[1:]) if isinstance(out, tuple) else first
