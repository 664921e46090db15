"""The claims of dp-convex: its accuracy beside DP-SGD's at equal epsilon, and what its last iterate tells."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from brickyard.checks._takes import takes
from brickyard.checks.run import Answers, Inequality, judge
from brickyard.core.batches import Order
from brickyard.core.data import read_data
from brickyard.core.errors import RunFailed
from brickyard.core.method import Claim
from brickyard.private._hidden_state import HiddenStateGDP, contraction
from brickyard.private.dp_convex import PrivateGatedClassifier, descend_, summed_gradient

DELTA = 1e-5
TUNED = (4.0, math.inf)  # budgets at which settings are searched; what 4 found serves the other finite ones
CURVE = (0.25, 0.5, 1.0, 2.0, 4.0)  # under --full
SMALL = "embedded:digits"  # where there is no MNIST
GATES = {"convex": 64, "logistic": 0}
CONVEX_GRID = tuple({"lr": lr, "wd": wd} for lr in (2.0, 3.5) for wd in (1e-4, 1e-5))
RELU_GRID = tuple({"lr": lr} for lr in (0.25, 0.5, 1.0, 2.0))
PARTS = {
    "gates": "convex-plain >= logistic-plain + 1.5",
    "relu": "convex >= relu - 2.0",
    "logistic": "convex >= logistic + 0.0",
}
_GROUP = 500  # runs side by side in the attack; the work of a visit is the square of it
GATE, CONTROL = "relu-plain >= logistic-plain + 1.0", "convex > shuffled + 10.0"


@dataclass(frozen=True)
class Pixels:
    """Images of one split as features [N,D], with their classes."""

    x_ND: np.ndarray
    y_N: np.ndarray

    @classmethod
    def of(cls, images: list[bytes], labels: list[Any], rows: int = 0) -> Pixels:
        """Pool images larger than 16 pixels two by two and take each one's mean from it; `rows` 0: all of them.

        Nothing is learned from the images, so nothing of them leaks: what centres a row is that row's own mean.
        """
        keep = np.random.Generator(np.random.PCG64(0)).permutation(len(labels))[: rows or len(labels)]
        grey = np.stack([np.asarray(Image.open(io.BytesIO(images[i])).convert("L"), np.float32) for i in keep]) / 255
        while grey.shape[1] > 16:
            grey = (grey[:, ::2, ::2] + grey[:, 1::2, ::2] + grey[:, ::2, 1::2] + grey[:, 1::2, 1::2]) / 4
        x_ND = grey.reshape(len(grey), -1)
        return cls(x_ND - x_ND.mean(1, keepdims=True), np.array([int(labels[i]) for i in keep]))

    def shuffled(self, seed: int) -> Pixels:
        """Return the same images with classes drawn from each other's."""
        return Pixels(self.x_ND, np.random.Generator(np.random.PCG64(seed)).permutation(self.y_N))


@dataclass(frozen=True)
class Trainer:
    """Trains any arm on one set of images, with what all arms share: epochs, batch, and the networks' width.

    `multipliers` holds the noise multiplier of DP-SGD for each finite budget.
    """

    train: Pixels
    classes: int
    epochs: int
    batch: int
    width: int
    multipliers: dict[float, float]

    def parameters(self, arm: str) -> int:
        """Return how many numbers an arm trains."""
        features = self.train.x_ND.shape[1]
        if arm == "relu":
            return (features + 1) * self.width + (self.width + 1) * self.classes
        return features * max(1, GATES.get(arm, GATES["convex"])) * self.classes

    def fit(self, arm: str, epsilon: float, setting: dict[str, float], seed: int) -> Callable[[np.ndarray], np.ndarray]:
        """Return x_ND -> predicted classes [N] of an arm trained under a budget; an infinite one is no privacy."""
        data = self.train.shuffled(seed) if arm == "shuffled" else self.train
        if arm == "relu":
            return self._relu(epsilon, setting["lr"], seed)
        made = PrivateGatedClassifier(
            self.classes,
            epsilon=epsilon,
            delta=min(DELTA, 0.1 / len(data.y_N)),
            gates=GATES.get(arm, GATES["convex"]),
            epochs=self.epochs,
            batch=self.batch,
            seed=seed,
            lr=setting["lr"],
            wd=setting["wd"],
        )
        return made.fit(data.x_ND, data.y_N).predict

    def _relu(self, epsilon: float, lr: float, seed: int) -> Callable[[np.ndarray], np.ndarray]:
        """Train a two-layer ReLU network by Opacus's DP-SGD, or by SGD where there is no budget."""
        x_ND, y_N = torch.from_numpy(self.train.x_ND), torch.from_numpy(self.train.y_N)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module = nn.Sequential(
                nn.Linear(x_ND.shape[1], self.width), nn.ReLU(), nn.Linear(self.width, self.classes)
            )
            optimiser: Any = torch.optim.SGD(model.parameters(), lr=lr)
            if math.isinf(epsilon):
                order = Order(np.ones(len(y_N)), min(self.batch, len(y_N)), seed=seed, bucket=False)
                epochs = (
                    [(x_ND[i], y_N[i]) for i in map(torch.from_numpy, order.epoch(e))] for e in range(self.epochs)
                )
                trained = model
            else:
                trained, optimiser, loader = self._private(model, optimiser, (x_ND, y_N), epsilon)
                epochs = (loader for _ in range(self.epochs))
            for epoch in epochs:
                for x_BD, y_B in epoch:
                    optimiser.zero_grad()
                    nn.functional.cross_entropy(trained(x_BD), y_B).backward()
                    optimiser.step()

        @torch.no_grad()
        def predict(x: np.ndarray) -> np.ndarray:
            return model(torch.from_numpy(x)).argmax(1).numpy()

        return predict

    def _private(self, model: nn.Module, optimiser: Any, data: tuple[Tensor, Tensor], epsilon: float) -> Any:
        from opacus import PrivacyEngine

        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(*data), batch_size=min(self.batch, len(data[1]))
        )
        return PrivacyEngine(accountant="prv").make_private(
            module=model,
            optimizer=optimiser,
            data_loader=loader,
            noise_multiplier=self.multipliers[epsilon],
            max_grad_norm=1.0,
        )


def _multiplier(epsilon: float, rows: int, batch: int, epochs: int) -> float:
    """Return the noise multiplier with which DP-SGD spends `epsilon`, by Opacus's PRV accountant."""
    try:
        from opacus.accountants.utils import get_noise_multiplier
    except ModuleNotFoundError as cause:
        raise RunFailed("the baseline needs Opacus; run `pip install brickyard[private]`.") from cause
    return get_noise_multiplier(
        target_epsilon=epsilon,
        target_delta=min(DELTA, 0.1 / rows),
        sample_rate=1 / -(-rows // batch),
        epochs=epochs,
        accountant="prv",
    )


@takes("data")
def beside_dp_sgd(
    claim: Claim, *, rows: int | None = None, test_rows: int = 0, epochs: int = 60, batch: int = 512, width: int = 64
) -> dict[str, Any]:
    """Train the convex model, logistic regression and a ReLU network, with and without a budget; compare on test rows.

    Each arm's setting is the best on validation with seed 0, of as many for every arm; what that search spends of the
    budget is not counted, for any arm. Where `claim.data` is not there, digits stand in, which are known not to show
    the claim. With no limit of rows in the claim, accuracies at the epsilons of `CURVE` are measured too. Control:
    labels shuffled. Gate: without privacy the ReLU network beats logistic regression by a point.
    """
    found = not isinstance(claim.data, str) or claim.data.startswith("embedded:") or Path(claim.data).exists()
    read = read_data(claim.data if found else SMALL, task="image-classification")
    splits = read.splits
    limit = claim.train_rows if rows is None else rows
    images = {
        name: Pixels.of(splits[name]["image"], splits[name]["label"], count)
        for name, count in (("train", limit), ("validation", 0), ("test", test_rows))
    }
    budgets = (*(CURVE if claim.train_rows == 0 else (1.0, 4.0)), math.inf)
    size, classes = len(images["train"].y_N), int(images["train"].y_N.max()) + 1
    answers: dict[str, Answers] = {}
    table: dict[str, dict[str, Any]] = {}
    with warnings.catch_warnings():
        # Opacus says of every run that its noise is that of an experiment; these runs are one.
        warnings.filterwarnings("ignore", module="opacus")
        warnings.filterwarnings("ignore", message="Full backward hook")
        multipliers = {b: _multiplier(b, size, min(batch, size), epochs) for b in budgets if b < math.inf}
        trainer = Trainer(images["train"], classes, epochs, batch, width, multipliers)
        best = {
            (arm, budget): _search(trainer, images["validation"], arm, budget) for arm in _arms() for budget in TUNED
        }
        wanted = [(arm, budget) for arm in _arms() for budget in budgets] + [("shuffled", 4.0)]
        for arm, budget in wanted:
            setting = best["convex" if arm == "shuffled" else arm, math.inf if math.isinf(budget) else 4.0]
            models = [trainer.fit(arm, budget, setting, seed) for seed in range(1, claim.seeds + 1)]
            name = {math.inf: f"{arm}-plain", 4.0: arm}.get(budget, f"{arm}-{budget:g}")
            test = images["test"]
            answers[name] = Answers(test.y_N, np.stack([predict(test.x_ND) for predict in models]))
            right = (answers[name].predictions == test.y_N).mean(1)
            table[name] = {
                "arm": _said(arm, budget, setting),
                "mean": float(right.mean()),
                "per_seed": right.tolist(),
                "trainable_parameters": trainer.parameters(arm),
            }
    gate = {"inequality": GATE, **judge(Inequality.read(GATE), answers, "accuracy")}
    gone = judge(Inequality.read(CONTROL), answers, "accuracy")
    said = ", ".join(f"{name} {100 * row['mean']:.1f}" for name, row in table.items())
    where = f"{read.name}, {len(trainer.train.y_N):,} training rows, {claim.seeds} seeds"
    shared = {
        "gate": gate,
        "control": {
            "what": "training labels shuffled",
            "inequality": CONTROL,
            "destroyed": gone["holds"] is True,
            **gone,
        },
        "arms": table,
        "figures": {"epsilons": [b for b in budgets if b < math.inf], "delta": DELTA, "data": where},
    }
    out = {}
    for part, text in PARTS.items():
        one = judge(Inequality.read(text), answers, "accuracy")
        detail = f"{one['measured']:+.2f} points ({one['low']:+.2f} to {one['high']:+.2f}); accuracy on {where}: {said}"
        if not found:
            detail = f"{claim.data} is not there, and digits do not show the claim: {detail}"
        valid = found and gate["holds"] is True
        out[part] = {"inequality": text, **one, "holds": one["holds"] if valid else "set-up invalid", "detail": detail}
        out[part] |= shared
    return out


def _arms() -> tuple[str, ...]:
    return (*GATES, "relu")


def _search(trainer: Trainer, validation: Pixels, arm: str, epsilon: float) -> dict[str, float]:
    """Return the setting of the arm's grid that is right most often on validation."""
    grid = RELU_GRID if arm == "relu" else CONVEX_GRID
    right = [(trainer.fit(arm, epsilon, s, 0)(validation.x_ND) == validation.y_N).mean() for s in grid]
    return grid[int(np.argmax(right))]


def _said(arm: str, epsilon: float, setting: dict[str, float]) -> str:
    method = "DP-SGD" if arm == "relu" else "NoisyCGD"
    return f"{arm}, {method}, epsilon={epsilon:g}, " + ", ".join(f"{k}={v:g}" for k, v in setting.items())


def seen_from_outside(
    claim: Claim, *, runs: int = 20_000, batches: int = 4, epochs: int = 10, batch: int = 100, one_visit: float = 0.5
) -> dict[str, Any]:
    """Attack runs with and without one row: how far apart are they, by the last iterate and by all of them?

    The row stands in the last batch, all others are zeros, and its clipped gradient never changes: the worst case that
    steps with this contraction allow, but for curvature. Distances are in standard deviations, as mu is. `one_visit` is
    mu of a single gradient. Control: one who sees each iterate beside the one before it.
    """
    lr, wd, clip = 1.0, 0.05, 0.5
    accountant = HiddenStateGDP(
        contraction=contraction(lr, wd, wd + 0.5),
        batches=batches,
        epochs=epochs,
        batch=batch,
        noise=clip / (batch * one_visit),
        sensitivity=clip,
    )
    groups = [min(_GROUP, runs - start) for start in range(0, runs, _GROUP)]
    seen = {row: np.concatenate([_runs(accountant, row, n, lr, wd) for n in groups], 1) for row in (False, True)}
    last, every = (_apart(seen[True][i], seen[False][i]) for i in (0, 1))
    mu = accountant.mu
    holds: Any = True if last[2] <= mu else False if last[1] > mu else "undecided"
    return {
        "inequality": "mu(seen in the last iterate) <= mu(accountant)",
        "holds": holds,
        "measured": last[0],
        "low": last[1],
        "high": last[2],
        "detail": (
            f"{batches} batches, {epochs} epochs, c={accountant.contraction:g}, {runs:,} runs a side: the accountant "
            f"says mu={mu:.3f} of the last iterate and {accountant.composed_mu:.3f} of all; seen were {last[0]:.3f} "
            f"({last[1]:.3f} to {last[2]:.3f}) and {every[0]:.3f} ({every[1]:.3f} to {every[2]:.3f})"
        ),
        "gate": None,
        "control": {
            "what": "every iterate is seen",
            "inequality": "mu(seen in all iterates) <= mu(accountant)",
            "measured": every[0],
            "low": every[1],
            "high": every[2],
            "destroyed": every[1] > mu,
        },
        "figures": {"mu": mu, "composed_mu": accountant.composed_mu, "last": last, "every": every},
    }


@torch.no_grad()
def _runs(accountant: HiddenStateGDP, present: bool, runs: int, lr: float, wd: float) -> np.ndarray:
    """Return what each run shows of a row of class 0 in the last batch: [by the last iterate, by all its visits; runs].

    The runs are the gates of one weight: row i opens gate i alone, so that each run sees its own copy of the row.
    """
    x_BD, g_BP, y_B = torch.ones(runs, 1), torch.eye(runs), torch.zeros(runs, dtype=torch.int64)
    v_DPK, visits = torch.zeros(1, runs, 2), torch.zeros(runs)
    for step in range(accountant.batches * accountant.epochs):
        visited = step % accountant.batches == accountant.batches - 1
        total, before = torch.zeros_like(v_DPK), _margin(v_DPK)
        if visited and present:
            total, _ = summed_gradient(x_BD, g_BP, y_B, v_DPK, accountant.sensitivity)
        descend_(v_DPK, total, batch=accountant.batch, lr=lr, wd=wd, noise=accountant.noise)
        if visited:
            visits += _margin(v_DPK) - (1 - lr * wd) * before
    return torch.stack([_margin(v_DPK), visits]).double().numpy()


def _margin(v_DPK: Tensor) -> Tensor:
    """Return by how much class 0 leads in each run."""
    return v_DPK[0, :, 0] - v_DPK[0, :, 1]


def _apart(a_N: np.ndarray, b_N: np.ndarray) -> tuple[float, float, float]:
    """Return the distance of two means in their common standard deviation, with its 95 % interval."""
    spread = math.sqrt((a_N.var(ddof=1) + b_N.var(ddof=1)) / 2)
    distance = float(a_N.mean() - b_N.mean()) / spread
    reach = 1.96 * math.sqrt(1 / len(a_N) + 1 / len(b_N) + distance**2 / (2 * (len(a_N) + len(b_N))))
    return distance, distance - reach, distance + reach
