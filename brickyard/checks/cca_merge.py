"""The claims of `cca-merge`: networks of different seeds, every way to average them in one table.

Perceptrons 64-w-w-w-10 on scikit-learn's digits (60 % to train on, 40 % to test), and a small convolutional network
with BatchNorm. All merges see the training inputs alone, without labels, and CCA chooses its ridge on them by agreement
with the ensemble; the single ridges stand in the table beside it, chosen by nobody.

An example's error under an arm is that of the arm's network; of "single" it is the mean over the networks of a seed.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from brickyard.checks._takes import takes
from brickyard.core import readers
from brickyard.core.method import Claim
from brickyard.core.stats import paired
from brickyard.merge.cca_merge import GRID, align, average, merge

EPOCHS, BATCH, LR = 60, 32, 1e-3
TRAIN = 0.6
MANY = 5
WIDTHS = (32, 128)
ALIGNED = 2000  # training images that features are compared on
TESTED = 2000
DIRECT = 65.0  # the card's gate: percent that the direct average must stay below
NOISE, RANDOM = "noise", "untrained"


@dataclass
class Errors:
    """Errors of an arm's test examples by seed: lists of [N]."""

    rows: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add(self, arm: str, error_N: np.ndarray) -> None:
        self.rows.setdefault(arm, []).append(error_N)

    def stacked(self, *arms: str) -> np.ndarray:
        """Return the errors of one arm [S, N], or what the second has more than the first."""
        first, *second = (np.stack(self.rows[arm]) for arm in arms)
        return second[0] - first if second else first

    def accuracy(self, arm: str) -> float:
        return 100 * (1 - float(self.stacked(arm).mean()))

    def compare(self, text: str, a_SN: np.ndarray, b_SN: np.ndarray, margin: float) -> dict[str, Any]:
        """Return by how many points errors `a` are below `b`, and whether that reaches the margin."""
        found = paired(None, b_SN, a_SN, "loss", together=True)  # the arms of a seed share its networks
        points = {"measured": 100 * found.difference, "low": 100 * found.low, "high": 100 * found.high}
        holds: Any = True if points["low"] >= margin else False if points["high"] < margin else "undecided"
        return {"inequality": text, **points, "margin": margin, "holds": holds}

    def above(self, a: str, b: str, margin: float) -> dict[str, Any]:
        return self.compare(f"{a} >= {b} {margin:+g}", self.stacked(a), self.stacked(b), margin)


def perceptron(width: int, seed: int) -> nn.Sequential:
    """Return a network as its seed draws it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = (64, width, width, width)
        hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(width, 10))


def trained(width: int, seeds: Sequence[int], x_ND: Tensor, labels: Sequence[Tensor], epochs: int) -> list[nn.Module]:
    """Train one perceptron a seed, each on labels of its own, side by side: as many small products in one call.

    Each has its own order of the rows, and AdamW works entry by entry, so that none knows of the others.
    """
    networks = [perceptron(width, seed) for seed in seeds]
    places = [i for i, layer in enumerate(networks[0]) if isinstance(layer, nn.Linear)]
    stacked = [
        [nn.Parameter(torch.stack([getattr(n[i], leaf).detach() for n in networks])) for leaf in ("weight", "bias")]
        for i in places
    ]
    optimiser = torch.optim.AdamW([p for pair in stacked for p in pair], lr=LR)
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    label_MN = torch.stack(list(labels))
    for _ in range(epochs):
        order_MN = torch.stack([torch.randperm(len(x_ND), generator=draw) for draw in draws])
        for rows_MB in order_MN.split(BATCH, dim=1):
            h = x_ND[rows_MB]
            for k, (weight, bias) in enumerate(stacked):
                h = torch.baddbmm(bias[:, None], h, weight.transpose(1, 2))
                h = h.relu() if k < len(stacked) - 1 else h
            loss = F.cross_entropy(h.flatten(0, 1), label_MN.gather(1, rows_MB).flatten(), reduction="sum")
            optimiser.zero_grad()
            (loss / rows_MB.shape[1]).backward()
            optimiser.step()
    with torch.no_grad():
        for m, network in enumerate(networks):
            for i, (weight, bias) in zip(places, stacked, strict=True):
                layer: Any = network[i]
                layer.weight.copy_(weight[m])
                layer.bias.copy_(bias[m])
    return [network.eval() for network in networks]


@torch.no_grad()
def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part) for part in x.split(500)])


def error(logits_NK: Tensor, labels_N: Tensor) -> np.ndarray:
    return (logits_NK.argmax(-1) != labels_N).double().numpy()


def arms_of(
    errors: Errors,
    networks: Sequence[nn.Module],
    others: Mapping[str, nn.Module],
    inputs: Tensor,
    test: tuple[Tensor, Tensor],
) -> None:
    """Merge two networks in every way, and the first with each of `others`; add the test errors."""
    x, labels = test
    pair = list(networks[:2])
    outputs = [logits_of(network, x) for network in pair]
    errors.add("single", np.mean([error(out, labels) for out in outputs], axis=0))
    errors.add("ensemble", error(torch.stack([out.softmax(-1) for out in outputs]).mean(0), labels))

    def add(arm: str, models: list[nn.Module], **options: Any) -> None:
        errors.add(arm, error(logits_of(merge(models, inputs, **options)[0], x), labels))

    for arm, method in (("direct", "identity"), ("permute", "permute"), ("weights", "weight-matching")):
        add(arm, pair, method=method)
    add("orthogonal", pair, method="orthogonal")
    add("cca", pair)
    for gamma in GRID:
        add(f"cca, gamma {gamma:g}", pair, gamma=gamma)
    for name, other in others.items():
        add(f"cca with {name}", [pair[0], other])
        add(f"permute with {name}", [pair[0], other], method="permute")


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (pixels [N, 64] in [0, 1], labels) of the training and of the test digits, drawn class by class."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels / 16, labels, train_size=TRAIN, random_state=0, stratify=labels)
    x, y, a, b = (torch.tensor(part) for part in parts)
    return (x.float(), a), (y.float(), b)


def of_digits(claim: Claim, *, epochs: int = EPOCHS, widths: Sequence[int] = WIDTHS, **_: Any) -> dict[str, Any]:
    """Measure the claims on perceptrons; see the module's docstring for the set-up.

    Control: the second network was trained on shuffled labels. Gate: the direct average stays below 65 %.
    """
    (x, labels), test = digits()
    out: dict[str, Any] = {}
    tables = {}
    for i, width in enumerate(widths):
        count = MANY if i == 0 else 2
        seeds = [1000 * s + k for s in range(1, claim.seeds + 1) for k in range(count + 1)]
        given = [labels if s % 1000 < count else _shuffled(labels, s) for s in seeds]
        networks = trained(width, seeds, x, given, epochs)
        errors = Errors()
        for s in range(claim.seeds):
            *own, noise = networks[s * (count + 1) : (s + 1) * (count + 1)]
            arms_of(errors, own, {NOISE: noise, RANDOM: perceptron(width, 77_000 + s).eval()}, x, test)
            if i == 0:
                for method in ("cca", "permute"):
                    for k in range(3, MANY + 1):
                        model = merge(own[:k], x, method=method)[0]
                        errors.add(f"{method} of {k}", error(logits_of(model, test[0]), test[1]))
        tables[width] = errors
    narrow, wide = (tables[width] for width in widths)
    out["width 32"] = judged(narrow, 5.0, -4.0)
    out["width 128"] = judged(wide, 1.0, -1.0)
    out["more networks"] = judged_many(narrow)
    return out


def _shuffled(labels: Tensor, seed: int) -> Tensor:
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


def judged(errors: Errors, gain: float, loss: float) -> dict[str, Any]:
    """Judge "at least `gain` points above the permutation, and at least `loss` of the single networks"."""
    parts = [errors.above("cca", "permute", gain), errors.above("cca", "single", loss)]
    said = [part["holds"] for part in parts]
    holds: Any = False if False in said else True if all(h is True for h in said) else "undecided"
    noise = errors.compare(f"cca with noise >= permute {gain:+g}", errors.stacked(f"cca with {NOISE}"),
                           errors.stacked("permute"), gain)  # fmt: skip
    control = {
        "what": "the second network was trained on shuffled labels",
        **noise,
        "destroyed": noise["holds"] is False,
    }
    return _report(errors, parts, holds, control)


def judged_many(errors: Errors) -> dict[str, Any]:
    """Judge "from 2 to 5 networks, CCA loses less than the permutation"."""
    cca, permuted = errors.stacked("cca", f"cca of {MANY}"), errors.stacked("permute", f"permute of {MANY}")
    part = errors.compare(f"loss of cca from 2 to {MANY} < that of permute", cca, permuted, 0.0)
    holds = True if part["low"] > 0 else False if part["high"] <= 0 else "undecided"
    # Without the maps there is nothing to lose less of: the permutation against itself.
    self_ = errors.compare("loss of permute < that of permute", permuted, permuted, 0.0)
    control = {"what": "the permutation in the place of CCA", **self_, "destroyed": not self_["low"] > 0}
    return _report(errors, [part], holds, control)


def _report(errors: Errors, parts: Sequence[dict[str, Any]], holds: Any, control: dict[str, Any]) -> dict[str, Any]:
    means = {arm: errors.accuracy(arm) for arm in errors.rows}
    gate = {"inequality": f"direct < {DIRECT:g} %", "measured": means["direct"], "holds": means["direct"] < DIRECT}
    said = "; ".join(f"{p['inequality']}: {p['measured']:+.1f} ({p['low']:+.1f} to {p['high']:+.1f})" for p in parts)
    shown = ", ".join(f"{arm} {mean:.1f}" for arm, mean in means.items() if "gamma" not in arm)
    return {
        "inequality": "; ".join(part["inequality"] for part in parts),
        "holds": holds if gate["holds"] else "set-up invalid",
        **{key: parts[0][key] for key in ("measured", "low", "high")},
        "detail": f"{said} points; accuracy: {shown} %",
        "comparisons": list(parts),
        "gate": gate,
        "control": control,
        "figures": {"accuracy": means},
    }


class ConvNet(nn.Module):
    """Three convolutions with BatchNorm: grey images [B, 1, H, W] -> logits [B, classes]."""

    def __init__(self, classes: int, widths: Sequence[int] = (16, 32, 32)) -> None:
        super().__init__()
        before = (1, *widths)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(before))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.max_pool2d(F.relu(norm(conv(x))), 2)
        return self.head(x.mean((2, 3)))


def images(name: str, split: str, rows: int) -> tuple[Tensor, Tensor]:
    """Return grey images [N, 1, H, W] in [0, 1] and labels of a split: `rows` of them, drawn evenly (0: all)."""
    columns = readers.read(name).splits[split]
    count = len(columns["label"])
    picked = np.unique(np.linspace(0, count - 1, rows or count).round().astype(int))
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(columns["image"][i])).convert("L")) for i in picked])
    names = {label: i for i, label in enumerate(sorted(set(map(str, columns["label"]))))}
    labels = torch.tensor([names[str(columns["label"][i])] for i in picked])
    return torch.from_numpy(pixels)[:, None].float() / 255, labels


def convnet(x: Tensor, labels: Tensor, classes: int, epochs: float, seed: int) -> nn.Module:
    """Train a convolutional network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ConvNet(classes)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(round(epochs)):
        for rows in torch.randperm(len(x), generator=draw).split(64):
            loss = F.cross_entropy(model(x[rows]), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model.eval()


@takes("data")
def of_images(claim: Claim, *, aligned: int = ALIGNED, tested: int = TESTED, **_: Any) -> dict[str, Any]:
    """Measure the claim on convolutional networks; control and gate as for perceptrons."""
    x, labels = images(claim.data, "train", claim.train_rows)
    test = images(claim.data, "test", tested)
    classes = int(labels.max()) + 1
    errors = Errors()
    inputs = x[:: max(1, len(x) // aligned)]
    for seed in range(1, claim.seeds + 1):
        pair = [convnet(x, labels, classes, claim.epochs, 10 * seed + k) for k in (0, 1)]
        noise = convnet(x, _shuffled(labels, seed), classes, claim.epochs, 10 * seed + 2)
        arms_of(errors, pair, {NOISE: noise}, inputs, test)
        done = align(pair, inputs)
        stale = ConvNet(classes).eval()
        stale.load_state_dict(average(done.states))
        released = merge(pair, inputs, folds=False)[0]
        errors.add("cca, norms as released", error(logits_of(released, test[0]), test[1]))
        errors.add("cca, statistics averaged", error(logits_of(stale, test[0]), test[1]))
    return judged(errors, 1.0, -4.0)
