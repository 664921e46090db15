"""The claims of lightning attention: its three forms agree, and its time per token does not grow with the length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor
from torch.nn import functional as F

from brickyard.core import measure
from brickyard.core.method import Claim
from brickyard.models.lightning_attention import (
    BLOCK,
    decode_step,
    geometric_slopes,
    lightning_attention,
    matrix_form,
)

LENGTHS = (1, 63, 64, 65, 1000)
DECAYS = (0.3, 0.9, 0.99, 0.9999)
HEADS, WIDTH = 4, 64  # of the speed measurements
FLAT, FASTER, GROWN, LIMIT_PPM = 1 / 0.7, 3.0, 3.0, 100.0  # the last: parts in a million
Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def agreement(claim: Claim, *, lengths: Sequence[int] = LENGTHS) -> dict[str, Any]:
    """Compare outputs, final states and gradients (of q, k, v and the initial state) with the two other forms.

    Control: the state is not passed from block to block; the error must then be far beyond the limit.
    """
    slopes_H = -torch.log(torch.tensor(DECAYS))
    worst, cut = 0.0, 0.0
    for length in lengths:
        g = torch.Generator().manual_seed(length)
        shapes = [(1, len(DECAYS), length, w) for w in (24, 24, 40)] + [(1, len(DECAYS), 24, 40)]
        given = [torch.randn(shape, generator=g).requires_grad_() for shape in shapes]
        q, k, v, state = given
        weights = [torch.randn(shape, generator=g) for shape in (v.shape, state.shape)]
        tiled = _with_gradients(lightning_attention(q, k, v, slopes_H, state, True), given, weights)
        for other in (matrix_form(q, k, v, slopes_H, state), _recurrent(q, k, v, slopes_H, state)):
            expected = _with_gradients(other, given, weights)
            worst = max(worst, *(_error(a, b) for a, b in zip(tiled, expected, strict=True)))
        if length > 2 * BLOCK:
            ends = torch.tensor([*range(0, length, BLOCK), length])
            alone, _ = lightning_attention(q, k, v, slopes_H, cu_seqlens=ends)
            cut = max(cut, _error(alone, tiled[0]))
    ppm, control = 1e6 * worst, 1e6 * cut
    return {
        "inequality": f"largest relative error <= {LIMIT_PPM:g} ppm",
        "holds": ppm <= LIMIT_PPM,
        "measured": ppm,
        "low": ppm,
        "high": ppm,
        "detail": (
            f"largest relative error of outputs, states and gradients {ppm:.2f} ppm over N in {tuple(lengths)}, d=24, "
            f"e=40, decays {DECAYS}; states cut between blocks: {control:.0f} ppm"
        ),
        "gate": None,
        "control": {
            "what": "the state is not passed between blocks",
            "inequality": f"error > {100 * LIMIT_PPM:g} ppm",
            "measured": control,
            "low": control,
            "high": control,
            "destroyed": control > 100 * LIMIT_PPM,
        },
    }


def speed(claim: Claim, *, short: int = 1024, long: int = 8192, rounds: int = 25) -> dict[str, Any]:
    """Time forward and backward in turn; each round gives one ratio, and the interval is over rounds.

    Control: the same yardstick on softmax attention must see its time per token grow. Memory is counted.
    """
    forms = {"tiled": tiled_form(), "sdpa": softmax_form}
    wanted = [(name, n) for name in forms for n in (short, long)]
    taken = timed({(name, n): (forms[name], n) for name, n in wanted}, rounds, at_least=long)
    grows = ratio(taken["tiled", long], taken["tiled", short])
    faster = ratio(taken["sdpa", long], taken["tiled", long])
    softmax = ratio(taken["sdpa", long], taken["sdpa", short])
    memory = [measure.peak_bytes(step(forms["tiled"], n)).bytes for n in (short, 2 * short, 4 * short)]
    linear = (memory[2] - memory[1]) / (2 * (memory[1] - memory[0]))
    if grows[2] <= FLAT and faster[1] >= FASTER and linear <= 1.05:
        holds: Any = True
    elif grows[1] > FLAT or faster[2] < FASTER or linear > 1.05:
        holds = False
    else:
        holds = "undecided"
    said = ", ".join(f"{name} {n}: {1e6 * float(np.median(times)):.1f}" for (name, n), times in taken.items())
    return {
        "inequality": f"t({long}) <= {FLAT:.3g} t({short}), sdpa >= {FASTER:g} tiled at {long}",
        "holds": holds,
        "measured": grows[0],
        "low": grows[1],
        "high": grows[2],
        "detail": (
            f"microseconds a token, forward and backward, H={HEADS}, d={WIDTH}, float32, {torch.get_num_threads()} "
            f"threads, medians of {rounds} rounds: {said}; growth {short} to {long}: {grows[0]:.2f} ({grows[1]:.2f} to "
            f"{grows[2]:.2f}), limit {FLAT:.3g}; faster than sdpa at {long}: {faster[0]:.2f} ({faster[1]:.2f} to "
            f"{faster[2]:.2f}), limit {FASTER:g}; peak bytes of twice the length over twice those of the half: "
            f"{linear:.3f} (counted)"
        ),
        "gate": None,
        "control": {
            "what": "softmax attention in its place: the time per token must grow threefold",
            "inequality": f"t({long}) >= {GROWN:g} t({short})",
            "measured": softmax[0],
            "low": softmax[1],
            "high": softmax[2],
            "destroyed": softmax[1] >= GROWN,
        },
    }


def tiled_form(block: int = BLOCK, device: str = "cpu") -> Form:
    """Lightning attention with the geometric slopes."""
    slopes_H = torch.tensor(geometric_slopes(HEADS), device=device)
    return lambda q, k, v: lightning_attention(q, k, v, slopes_H, block=block)[0]


def softmax_form(q_BHNd: Tensor, k_BHNd: Tensor, v_BHNd: Tensor) -> Tensor:
    """Causal softmax attention as PyTorch ships it."""
    return F.scaled_dot_product_attention(q_BHNd, k_BHNd, v_BHNd, is_causal=True)


def step(form: Form, length: int, **options: Any) -> Callable[[], object]:
    """Return a function that runs `form` forward and backward on fixed inputs [1, HEADS, length, WIDTH]."""
    q, k, v, g = (torch.randn(1, HEADS, length, WIDTH, **options) for _ in range(4))
    given = [x.requires_grad_() for x in (q, k, v)]
    return lambda: torch.autograd.grad(form(*given), given, g)


def timed(runs: dict[Any, tuple[Form, int]], rounds: int, *, at_least: int, **options: Any) -> dict[Any, np.ndarray]:
    """Return the seconds a token of each of `runs` (form, length) in each round, the runs in turn.

    Short lengths are run several times, to `at_least` tokens, so that no measurement is a blink.
    """
    steps = {name: step(form, length, **options) for name, (form, length) in runs.items()}
    times = {name: max(1, at_least // length) for name, (_, length) in runs.items()}
    taken: dict[Any, list[float]] = {name: [] for name in runs}

    def repeated(name: Any) -> None:
        for _ in range(times[name]):
            steps[name]()

    names = list(runs)
    for turn in range(-1, rounds):  # the first is the warm-up
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds = measure.interleaved({"": lambda name=name: repeated(name)}, 1, warmup=0)[""]
            if turn >= 0:
                taken[name].append(seconds / times[name] / runs[name][1])
    return {name: np.array(found) for name, found in taken.items()}


def ratio(above_R: np.ndarray, below_R: np.ndarray) -> tuple[float, float, float]:
    """Return the geometric mean of ratios over rounds, with its 95 % interval."""
    logs_R = np.log(above_R / below_R)
    mean, count = logs_R.mean(), len(logs_R)
    reach = student.ppf(0.975, count - 1) * logs_R.std(ddof=1) / count**0.5 if count > 1 else np.inf
    return float(np.exp(mean)), float(np.exp(mean - reach)), float(np.exp(mean + reach))


def _recurrent(q: Tensor, k: Tensor, v: Tensor, slopes_H: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    out = []
    for t in range(q.shape[2]):
        o, state = decode_step(q[:, :, t], k[:, :, t], v[:, :, t], slopes_H, state)
        out.append(o)
    return torch.stack(out, 2), state


def _with_gradients(outputs: Any, given: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    gradients = torch.autograd.grad(outputs, given, weights, retain_graph=True)
    return [x.detach() for x in (*outputs, *gradients)]


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach() - expected).norm() / expected.norm().clamp(min=1e-12))
