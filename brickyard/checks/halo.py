"""The claims of halo: the error of one layer's three products, and what low precision does to a fine-tuning.

Both are emulated where the machine has no int8 or float8 instructions: the operands are quantised as they would be, and
the products of their codes are exact. They say what happens to quality, and nothing of speed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from brickyard.checks._steps import mean_ratio
from brickyard.checks._takes import takes
from brickyard.core.answers import answer
from brickyard.core.arm import parse
from brickyard.core.base import Base, open_base
from brickyard.core.batches import encode
from brickyard.core.build import build, resolve
from brickyard.core.data import read_data
from brickyard.core.documents import EncodedBlocks
from brickyard.core.errors import ParityBroken
from brickyard.core.loop import Training, batch_loss, train
from brickyard.core.method import Claim
from brickyard.core.roles import LINEAR, blocks, roles
from brickyard.core.split import Split
from brickyard.core.stats import paired
from brickyard.core.task import Task
from brickyard.optim.halo import Config, HaloForward, LowPrecision

TASK = Task("causal-lm", "nats_per_token", None, 1, "text")
OUTLIERS, FACTOR = 4, 30.0  # channels (or tokens), and how much larger they are
LOWER, DEARER, HURT = 4.0, 1.1, 3.0  # times: gain with outliers, loss without, and what outliers do to plain INT8
PLAIN, ROTATED = "int8 level 0", "int8 level 2"
LR = 1e-4
NEAR, LEFT = 1.01, 0.3  # of the loss in float32, and of plain INT8's gap to it
HELD_OUT, LONGEST = 30, 3_000  # documents, and characters of one
CHARACTERS = 8  # of source for a token, at the most
# Name -> (arm, whether the model has outliers).
RUNS = {
    "float32": ("full", True),
    "int8": ("full + halo:level=0", True),
    "halo-1": ("full + halo:level=1", True),
    "halo-2": ("full + halo", True),
    "float32, no outliers": ("full", False),
    "int8, no outliers": ("full + halo:level=0", False),
}


def one_layer(claim: Claim, *, tokens: int = 256, width: int = 512, draws: int = 20) -> dict[str, Any]:
    """Measure the relative error of Y, E_X and G of one layer against float64, by level and type, in `draws` draws.

    It holds where rotation lowers the INT8 error of Y (outliers in channels of X) and of E_X (in tokens of E) at least
    4 times, and without outliers raises neither by more than a tenth; intervals are over draws. Gate: outliers make
    plain INT8 at least 3 times worse. Control: without outliers there is nothing to gain. Of FP8, and of G, which only
    a rotation over tokens of both operands would help, nothing is claimed.
    """
    configs = {f"{t} level {level}": Config(level=level, dtype=t) for t in ("int8", "fp8") for level in (0, 1, 2)}
    errors = {
        (name, outliers): [_errors(config, tokens, width, seed, outliers) for seed in range(draws)]
        for name, config in configs.items()
        for outliers in (True, False)
    }

    def ratio(a: tuple[str, bool], b: tuple[str, bool], what: str) -> tuple[float, float, float]:
        return mean_ratio(np.array([x[what] / y[what] for x, y in zip(errors[a], errors[b], strict=True)]))

    gain = {what: ratio((PLAIN, True), (ROTATED, True), what) for what in ("Y", "E_X", "G")}
    loss = {what: ratio((ROTATED, False), (PLAIN, False), what) for what in ("Y", "E_X", "G")}
    hurt = {what: ratio((PLAIN, True), (PLAIN, False), what) for what in ("Y", "E_X")}
    fp8 = {what: ratio(("fp8 level 0", True), ("fp8 level 2", True), what) for what in ("Y", "E_X", "G")}
    kept = [gain[what][1] >= LOWER and loss[what][2] <= DEARER for what in ("Y", "E_X")]
    missed = [gain[what][2] < LOWER or loss[what][1] > DEARER for what in ("Y", "E_X")]
    holds: Any = True if all(kept) else False if any(missed) else "undecided"
    valid = all(low >= HURT for _, low, _ in hurt.values())
    nothing = {what: ratio((PLAIN, False), (ROTATED, False), what) for what in ("Y", "E_X")}
    worst = min(gain["Y"], gain["E_X"])
    return {
        "inequality": f"error(INT8) >= {LOWER:g} error(HALO-2) with outliers, >= 1 / {DEARER:g} without, for Y and E_X",
        "holds": holds if valid else "set-up invalid",
        "measured": worst[0],
        "low": worst[1],
        "high": worst[2],
        "detail": (
            f"INT8 error with outliers over HALO-2's: {_line(gain)}; HALO-2's without outliers over plain: "
            f"{_line(loss)}; FP8, level 0 over level 2: {_line(fp8)} ({tokens} x {width} x {width}, {draws} draws)"
        ),
        "gate": {
            "inequality": f"error(INT8, outliers) >= {HURT:g} error(INT8, none)",
            "measured": min(hurt.values())[0],
            "low": min(hurt.values())[1],
            "high": min(hurt.values())[2],
            "holds": valid,
        },
        "control": {
            "what": "no outliers: a rotation has nothing to spread",
            "inequality": f"error(INT8) < {LOWER:g} error(HALO-2)",
            "measured": max(nothing.values())[0],
            "low": max(nothing.values())[1],
            "high": max(nothing.values())[2],
            "destroyed": max(high for _, _, high in nothing.values()) < LOWER,
        },
        "figures": {
            "errors": {
                f"{name}, {'outliers' if outliers else 'none'}": {
                    w: float(np.mean([e[w] for e in found])) for w in found[0]
                }
                for (name, outliers), found in errors.items()
            },
            "fp8_gain": fp8,
        },
    }


def _errors(config: Config, tokens: int, width: int, seed: int, outliers: bool) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    x_BM, w_NM, e_BN = (torch.randn(n, width, generator=generator) for n in (tokens, width, tokens))
    if outliers:
        x_BM[:, torch.randperm(width, generator=generator)[:OUTLIERS]] *= FACTOR
        e_BN[torch.randperm(tokens, generator=generator)[:OUTLIERS]] *= FACTOR
    x_BM.requires_grad_()
    w_NM = (0.02 * w_NM).requires_grad_()
    y_BN = LowPrecision.apply(x_BM, w_NM, None, config)
    found = (y_BN.detach(), *torch.autograd.grad(y_BN, (x_BM, w_NM), e_BN))
    x, w, e = (t.detach().double() for t in (x_BM, w_NM, e_BN))
    exact = {"Y": x @ w.t(), "E_X": e @ w, "G": e.t() @ x}
    return {what: float((a - b).norm() / b.norm()) for (what, b), a in zip(exact.items(), found, strict=True)}


def _line(ratios: dict[str, tuple[float, float, float]]) -> str:
    return ", ".join(f"{what} {mean:.2f} ({low:.2f} to {high:.2f})" for what, (mean, low, high) in ratios.items())


@takes("base", "data")
def fine_tuning(claim: Claim, *, held_out: int = HELD_OUT) -> dict[str, Any]:
    """Tune a language model that has outliers on text it has not seen, in float32 and in INT8 with and without HALO.

    The outliers change no output: norm gains times 30, the columns that read them divided by 30. All arms see the same
    batches; a seed draws their order. Held-out documents are then read with the ordinary float32 weights. Gates: the
    tuning teaches, and plain INT8 loses. Control: without outliers plain INT8 has no such gap.

    The base is pylm-small because the start token of embedded:pylm is a zero vector: RMSNorm multiplies the gradient at
    that one token by 1 / sqrt(eps) a layer, so that it takes the whole range of an INT8 error and of the other tokens
    nothing is left. There every level loses the same; no rotation over tokens can spread a token 1e5 times too large.
    """
    base, data = open_base(claim.base), read_data(claim.data).splits
    wanted = claim.train_rows * claim.max_length * CHARACTERS
    train_rows = encode(Split({"text": _some(data["train"]["text"], wanted)}), base, TASK, max_length=claim.max_length)
    train_rows = train_rows.take(np.arange(min(claim.train_rows, len(train_rows))))
    texts = [text for text in data["test"]["text"] if len(text) <= LONGEST][:held_out]
    test = encode(Split({"text": texts}), base, TASK, max_length=base.context)
    assert isinstance(test, EncodedBlocks)
    nats: dict[str, np.ndarray] = {}
    seconds: dict[str, float] = {}
    shares: dict[str, float] = {}
    for name, (arm, outliers) in RUNS.items():
        made = [_tuned(claim, base, arm, train_rows, test, seed, outliers) for seed in range(1, claim.seeds + 1)]
        nats[name] = np.stack([answers for answers, _, _ in made])
        seconds[name] = float(np.mean([s for _, s, _ in made]))
        shares[name] = made[0][2]
    untouched = np.tile(answer(base.model(TASK, seed=0), test, TASK).predictions, (claim.seeds, 1))
    return _judged(test.tokens, nats, untouched, {"seconds": seconds, "low_precision_share": shares})


def _some(texts: list[str], characters: int) -> list[str]:
    """Draw documents, the same ones every time, until they have so many characters together."""
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(texts))
    until = int(np.searchsorted(np.cumsum([len(texts[i]) for i in order]), characters)) + 1
    return [texts[i] for i in order[:until]]


def _judged(
    tokens: np.ndarray, nats: dict[str, np.ndarray], untouched: np.ndarray, about: dict[str, Any]
) -> dict[str, Any]:
    """Judge both inequalities from nats [S, N] by arm."""
    exact, plain, halo = nats["float32"], nats["int8"], nats["halo-2"]
    near = _at_most(tokens, halo, NEAR * exact)
    closes = _at_most(tokens, halo, (1 - LEFT) * exact + LEFT * plain)
    gates = {
        "float32 < untouched": _at_most(tokens, exact, untouched),
        "float32 < int8": _at_most(tokens, exact, plain),
    }
    control = _at_most(
        tokens,
        nats["int8, no outliers"] + LEFT * exact,
        nats["float32, no outliers"] + LEFT * plain,
    )
    mean = {name: float(found.mean(axis=0).sum() / tokens.sum()) for name, found in nats.items()}
    closed = [text for text, found in gates.items() if found["holds"] is not True]
    both = [near["holds"], closes["holds"]]
    holds: Any = True if all(h is True for h in both) else False if False in both else "undecided"
    gap = {name: mean[name] - mean["float32"] for name in ("int8", "halo-1", "halo-2")}
    shown = ", ".join(f"{name} {value:+.4f}" for name, value in gap.items())
    return {
        "inequality": f"halo-2 <= {NEAR:g} float32, and halo-2 - float32 <= {LEFT:g} (int8 - float32)",
        "metric": "nats_per_token",
        "holds": "set-up invalid" if closed else holds,
        "measured": near["measured"],
        "low": near["low"],
        "high": near["high"],
        "detail": (
            f"float32 {mean['float32']:.4f} nats per token; gaps to it: {shown}; halo-2 less {NEAR:g} float32 "
            f"{_shown(near)}; less what {LEFT:g} of the gap allows {_shown(closes)}; share of multiplies in low "
            f"precision {about['low_precision_share']['halo-2']:.3f} (counted, head and all)"
            + (f"; set-up invalid: {closed[0]} does not hold" if closed else "")
        ),
        "gate": gates,
        "control": {
            "what": "no outliers: plain INT8 has no such gap",
            "inequality": f"gap(int8, no outliers) <= {LEFT:g} gap(int8)",
            **{key: control[key] for key in ("measured", "low", "high")},
            "destroyed": control["holds"] is True,
        },
        "figures": {"nats_per_token": mean, "closes": closes, **about},
    }


def _at_most(tokens: np.ndarray, a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Measure a <= b in nats per token: {"measured": a - b, "low", "high", "holds"}."""
    found = paired(tokens, a, b, "nats_per_token")
    holds: Any = True if found.high <= 0 else False if found.low > 0 else "undecided"
    return {"measured": found.difference, "low": found.low, "high": found.high, "holds": holds}


def _shown(found: dict[str, Any]) -> str:
    return f"{found['measured']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})"


def _tuned(
    claim: Claim, base: Base, arm: str, rows: Any, test: EncodedBlocks, seed: int, outliers: bool
) -> tuple[np.ndarray, float, float]:
    """Return the nats of held-out documents after one run, its seconds, and its share of low-precision multiplies."""
    attached = build(resolve(parse(arm), TASK), base, TASK, seed=seed)
    attached.model.float()
    batch = rows.collate(np.arange(claim.batch))
    if outliers:
        make_outliers(attached.model, {k: v for k, v in batch.items() if k != "labels"})
    with attached.saving():
        attached.model.train()
        share = low_precision_share(attached.model, lambda: batch_loss(attached, TASK, batch))
    epoch = -(-len(rows) // claim.batch)
    steps = max(1, round(claim.epochs * epoch))
    recipe = Training(lr=LR, batch=claim.batch, steps=steps, seed=seed, evaluate_every=10**9)
    seconds = train(attached, rows, None, TASK, recipe, device="cpu").seconds
    return answer(attached.model, test, TASK).predictions, seconds, share


@torch.no_grad()
def make_outliers(model: nn.Module, inputs: dict[str, Tensor], *, seed: int = 0) -> dict[str, list[str]]:
    """Multiply a few gains of every norm in the blocks, and divide the columns that read them; in place.

    Returns the linear layers by the norm that they read. ParityBroken where the outputs changed, as they do if
    something else reads a norm.
    """
    inside = tuple(f"{name}." for name, _ in blocks(model))
    norms = {name: model.get_submodule(name) for name, kind in roles(model).items() if kind == "norm"}
    norms = {name: norm for name, norm in norms.items() if name.startswith(inside)}
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    normed: dict[int, tuple[str, Tensor]] = {}
    readers: dict[str, list[str]] = {name: [] for name in norms}

    def leaves(name: str) -> Callable[..., None]:
        return lambda module, args, output: normed.update({id(output): (name, output)})

    def enters(name: str) -> Callable[..., None]:
        return lambda module, args: readers[normed[id(args[0])][0]].append(name) if id(args[0]) in normed else None

    hooks = [norm.register_forward_hook(leaves(name)) for name, norm in norms.items()]
    hooks += [module.register_forward_pre_hook(enters(name)) for name, module in linear.items()]
    model.eval()
    before = model(**inputs).logits
    for hook in hooks:
        hook.remove()
    generator = torch.Generator().manual_seed(seed)
    for name, norm in norms.items():
        gains: Any = norm.weight
        channels = torch.randperm(len(gains), generator=generator)[:OUTLIERS]
        gains[channels] *= FACTOR
        for reader in readers[name]:
            weight: Any = linear[reader].weight
            weight[:, channels] /= FACTOR
    gap = float((model(**inputs).logits - before).abs().max() / before.abs().max())
    if gap > 1e-4:
        raise ParityBroken(f"outliers changed the outputs by {gap:.2g} of their largest; a norm here feeds more.")
    return readers


def low_precision_share(model: nn.Module, loss: Callable[[], Tensor]) -> float:
    """Count multiplies on quantised operands over all multiplies in the three products of all linear layers.

    One forward of `loss` is looked at: a layer multiplies once for its output, once more if its input needs a gradient,
    and once more if its weight does.
    """
    low = total = 0

    def count(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        nonlocal low, total
        x: Tensor = args[0]
        products = 1 + int(x.requires_grad) + int(module.weight.requires_grad)
        multiplies = products * (x.numel() // x.shape[-1]) * module.weight.numel()
        total += multiplies
        low += multiplies if isinstance(vars(module).get("forward"), HaloForward) else 0

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, LINEAR)]
    loss()
    for hook in hooks:
        hook.remove()
    return low / total
