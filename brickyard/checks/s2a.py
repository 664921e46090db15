"""The claims of s2a that are no inequality between arms: bytes kept, what that does to gradients, and step time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor

from brickyard.checks._takes import takes
from brickyard.core import measure
from brickyard.core.arm import parse
from brickyard.core.attached import Attached
from brickyard.core.base import open_base
from brickyard.core.batches import encode
from brickyard.core.build import build, resolve
from brickyard.core.data import read_data
from brickyard.core.loop import train_mode
from brickyard.core.method import Claim
from brickyard.core.roles import own_head
from brickyard.core.task import task_of

LORA, S2A, CONTROL = "lora", "lora + s2a", "lora + s2a:bits=1,slope_bits=1,operand_bits=1"
BESIDE = (
    "lora + s2a:preset=paper",
    "full",
    "full + s2a",
    "bitfit",
    "s2a-modules:kind=bias + s2a",
    "s2a-modules:kind=side + s2a",
)
SMALLER, COSINE, SLOWER = 4.0, 0.998, 1.4
BATCH, TOKENS, ROUNDS, DRAWS = 32, 64, 8, 4
CHECKPOINTS = "lora, checkpoints"


class Rows:
    """The longest training rows of a claim's data, in batches of one length, and the task's loss on them."""

    def __init__(self, claim: Claim, batch: int, tokens: int, count: int = 1) -> None:
        self.base = open_base(claim.base)
        data = read_data(claim.data)
        self.task = task_of(data)
        encoded = encode(data.splits["train"], self.base, self.task, max_length=tokens)
        longest = np.argsort(encoded.lengths, kind="stable")[-batch * count :]
        self.batches = [encoded.collate(part) for part in np.array_split(longest, count)]

    def attached(self, arm: str, attention: str = "eager") -> Attached:
        """An arm as in the midst of training: what starts at zero is drawn, so that every gradient is there."""
        attached = build(resolve(parse(arm), self.task), self.base, self.task, seed=0, attention=attention)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in attached.parameters():
                if not p.any():
                    p.copy_(0.02 * torch.randn(p.shape, generator=generator))
        return attached

    def loss(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        return inputs, lambda logits: self.task.loss(logits.float(), batch["labels"])

    def kept(self, arm: str, *, checkpoints: bool = False) -> measure.Saved:
        """What the last batch leaves for the backward pass of an arm (eager attention, dropout off)."""
        attached = self.attached(arm)
        inputs, loss = self.loss(self.batches[-1])
        if checkpoints:
            train_mode(attached.model)
            enable_checkpoints(attached.model, {"use_reentrant": False})
        with attached.saving():
            return measure.saved_for_backward(attached.model, inputs, loss)

    def gradient(self, attached: Attached, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(logits, gradient of all that trains) of one step of training, dropout on and drawn alike in every call."""
        inputs, loss = self.loss(batch)
        train_mode(attached.model)
        attached.model.zero_grad()
        torch.manual_seed(0)
        with attached.saving():
            logits = attached.model(**inputs).logits
            loss(logits).backward()
        inner: Any = attached.model.get_base_model()  # type: ignore[operator]
        head = {id(p) for name in own_head(attached.model) for p in inner.get_submodule(name).parameters()}
        parts = [p.grad.flatten() for p in attached.parameters() if p.grad is not None and id(p) not in head]
        attached.model.zero_grad()
        return logits.detach(), torch.cat(parts)


@takes("base", "data")
def saved_bytes(claim: Claim, *, batch: int = BATCH, tokens: int = TOKENS, draws: int = DRAWS) -> dict[str, Any]:
    """Count what LoRA keeps for backward with and without s2a (eager attention, dropout off) and compare gradients.

    It holds where LoRA keeps at least four times as much, nothing is kept out of the counter's sight, the logits are
    equal bit for bit and the cosine of the gradients is at least 0.998 in each of `draws` batches, dropout on. The
    gradient is that of the adapter alone: the head's, which is longer, is exact and would hide what happens to it.
    Control: one bit a value, whose gradient must point elsewhere. Beside it: other arms, and activation checkpointing.
    """
    rows = Rows(claim, batch, tokens, draws)
    sizes = {arm: rows.kept(arm) for arm in (LORA, S2A, *BESIDE)}
    sizes[CHECKPOINTS] = rows.kept(LORA, checkpoints=True)
    plain, coded, coarse = rows.attached(LORA), rows.attached(S2A), rows.attached(CONTROL)
    cosines, control, equal = [], [], True
    for one in rows.batches:
        logits, exact = rows.gradient(plain, one)
        found, gradient = rows.gradient(coded, one)
        equal = equal and torch.equal(logits, found)
        cosines.append(_cosine(exact, gradient))
        control.append(_cosine(exact, rows.gradient(coarse, one)[1]))
    ratio = sizes[LORA].bytes / sizes[S2A].bytes
    mib = ", ".join(f"{arm} {saved.bytes / 2**20:.1f}" for arm, saved in sizes.items())
    return {
        "inequality": f"bytes(lora) >= {SMALLER:g} bytes(lora + s2a), and cosine >= {COSINE}",
        "holds": bool(ratio >= SMALLER and min(cosines) >= COSINE and equal and not sizes[S2A].hidden),
        "measured": ratio,
        "low": ratio,
        "high": ratio,
        "detail": (
            f"{ratio:.2f} times fewer bytes (counted), cosine {min(cosines):.5f} at least (measured, {draws} batches), "
            f"logits {'equal' if equal else 'NOT equal'}; MiB at B={batch}, T={tokens}, eager: {mib}"
        ),
        "gate": None,
        "control": {
            "what": "one bit a value: the gradient points elsewhere",
            "inequality": f"cosine(control) < {COSINE}",
            "measured": max(control),
            "destroyed": bool(max(control) < COSINE),
        },
        "figures": {
            "bytes": {arm: saved.bytes for arm, saved in sizes.items()},
            "hidden": [str(h) for h in sizes[S2A].hidden],
            "cosine": cosines,
            "control_cosine": control,
        },
    }


@takes("base", "data")
def step_time(claim: Claim, *, batch: int = BATCH, tokens: int = TOKENS, rounds: int = ROUNDS) -> dict[str, Any]:
    """Time steps of LoRA with and without s2a in turn, with both attentions; each round gives a ratio.

    The claim is of the default attention (sdpa) and of eager attention both, and of the peak memory of their steps; the
    interval is over rounds.
    """
    rows = Rows(claim, batch, tokens)
    taken: dict[str, np.ndarray] = {}
    peaks: dict[str, int] = {}
    with ExitStack() as stack:
        steps = {}
        for attention in ("sdpa", "eager"):
            for arm in (LORA, S2A):
                name = f"{arm}, {attention}"
                attached = rows.attached(arm, attention)
                stack.enter_context(attached.saving())
                steps[name] = _step(attached, rows, rows.batches[0])
                peaks[name] = measure.peak_bytes(steps[name]).bytes  # the warm-up too
        found: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(rounds):
            for name in np.roll(list(steps), -turn):
                found[name].append(measure.step_time(steps[name], warmup=0, repeats=1))
        taken = {name: np.array(seconds) for name, seconds in found.items()}
    ratios = {kind: _ratio(taken[f"{S2A}, {kind}"] / taken[f"{LORA}, {kind}"]) for kind in ("sdpa", "eager")}
    mean, low, high = max(ratios.values())
    said = ", ".join(f"{kind} {m:.2f} ({a:.2f} to {b:.2f})" for kind, (m, a, b) in ratios.items())
    return {
        "inequality": f"t(lora + s2a) <= {SLOWER:g} t(lora), and peak(lora + s2a) < peak(lora)",
        "holds": _affordable(ratios, peaks),
        "measured": mean,
        "low": low,
        "high": high,
        "detail": (
            f"step time over LoRA's at B={batch}, T={tokens} (measured, {rounds} rounds): {said}; peak MiB (counted): "
            + ", ".join(f"{name} {size / 2**20:.0f}" for name, size in peaks.items())
        ),
        "gate": None,
        "control": None,
        "figures": {"seconds": {name: list(s) for name, s in taken.items()}, "ratios": ratios, "peaks": peaks},
    }


def _affordable(ratios: dict[str, tuple[float, float, float]], peaks: dict[str, int]) -> bool | str:
    """Judge the ratios (mean, low, high) of step times by attention, and the peaks in bytes by arm and attention.

    False where a peak does not fall; else the slower attention decides, "undecided" where SLOWER lies in its interval.
    """
    if not all(peaks[f"{S2A}, {kind}"] < peaks[f"{LORA}, {kind}"] for kind in ratios):
        return False
    _, low, high = max(ratios.values())
    return True if high <= SLOWER else False if low > SLOWER else "undecided"


def enable_checkpoints(model: Any, options: dict[str, Any]) -> None:
    """Let a transformers model recompute its blocks in the backward pass, by the name that this version has for it."""
    renamed = hasattr(model, "activation_checkpointing_enable")
    (model.activation_checkpointing_enable if renamed else model.gradient_checkpointing_enable)(options)


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


def _ratio(ratios_R: np.ndarray) -> tuple[float, float, float]:
    """Geometric mean of paired ratios and its 95 % interval over rounds."""
    logs_R = np.log(ratios_R)
    reach = student.ppf(0.975, len(logs_R) - 1) * logs_R.std(ddof=1) / np.sqrt(len(logs_R))
    return float(np.exp(logs_R.mean())), float(np.exp(logs_R.mean() - reach)), float(np.exp(logs_R.mean() + reach))


def _step(attached: Attached, rows: Rows, batch: dict[str, Any]) -> Callable[[], None]:
    """One step of training as the loop makes it: forward, backward, AdamW."""
    inputs, loss = rows.loss(batch)
    optimiser = torch.optim.AdamW(attached.parameters(), lr=1e-5, fused=True)
    train_mode(attached.model)

    def step() -> None:
        loss(attached.model(**inputs).logits).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step
