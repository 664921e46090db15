"""Private convex ReLU: a convex stand-in for a two-layer ReLU network, of which only the last iterate is released.

B rows, D features, P gates, K classes. The directions u_i ~ N(0, I_D) are drawn once, without a look at the data.

    f(x; V) = sum_{i=1..P} 1[u_i . x >= 0] V_i^T x = V^T phi(x)       V [D,P,K], phi(x) = [1[u_i . x >= 0] x]_i
    min_V  (1/n) sum_j CE(f(x_j; V), y_j) + (lambda/2) ||V||^2        lambda-strongly convex; M = lambda + R^2 / 2
    V <- V - eta [ (1/b) sum_{j in batch} clip_C(grad CE_j) + lambda V + Z ],   Z ~ N(0, sigma^2 I)

x is scaled so that ||phi(x)|| <= R (the softmax's Hessian is at most 1/2, hence M). The n rows are cut once into
k = n/b disjoint batches, swept in the same order for E epochs; sigma follows from (epsilon, delta) by the guarantee of
the last iterate (`_hidden_state`), bounded in E. eta, lambda, b and E are the training's lr, wd, batch and epochs.

A row's gradient is phi(x) r^T with r = softmax - onehot, so its norm is ||phi(x)|| ||r|| <= sqrt(2) R. The guarantee
needs the clipped field to be the gradient of a convex function: it is for two classes, where clipping makes a Huber
loss. For more it is not: the Jacobian of clip_C is no longer symmetric. So by default C = sqrt(2) R, where nothing is
ever clipped and epsilon is *certified* for any number of classes; for a smaller C and K > 2 epsilon is an *estimate*,
and what composition certifies stands beside it.

Source: Koskela and Romijnders, "Convex Approximation of Two-Layer ReLU Networks for Hidden State Differential Privacy",
arXiv 2407.04884; the reformulation: Pilanci and Ergen, arXiv 2002.10553. Headline: on MNIST and Fashion-MNIST as good
at equal epsilon as DP-SGD on the ReLU network, and better than logistic regression trained in the same way. Left out:
the cone constraints of the reformulation (as in the paper), convolutions, and a defence against attacks on
floating-point noise. What is evaluated on the way, or printed of the training rows, is not covered: only V is. While
a run lasts its checkpoints hold an earlier V; they are deleted once the brick stands.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from brickyard.core.batches import Order
from brickyard.core.errors import BadData, Changed, NotFinite, Refused, UsageError
from brickyard.core.method import Claim, Record
from brickyard.private._entropy import gaussian, generator
from brickyard.private._hidden_state import HiddenStateGDP, contraction, gdp_epsilon

if TYPE_CHECKING:
    from collections.abc import Sequence

    from brickyard.core.attached import Attached
    from brickyard.core.loop import State, Training
    from brickyard.core.task import Task

RECORD = Record(
    name="dp-convex",
    family="private",
    title="private convex stand-in for a ReLU network on frozen features; only the last iterate is released",
    paper="arXiv 2407.04884",
    needs=("text-classification", "pair-classification", "image-classification"),
    because="the guarantee is that of a softmax over classes",
    slot="head",
    presets={"paper": {"clip": 1.0}},
    search={"lr": (1.0, 2.0, 3.5)},
    training={
        "lr": 2.0,
        "wd": 1e-4,
        "epochs": 60,
        "batch": 512,
        "warmup": 0.0,
        "schedule": "constant",
        "evaluate_every": 1_000_000_000,
    },
    claims=(
        Claim(
            text="Without privacy, random gates beat logistic regression by 1.5 points.",
            measure="beside_dp_sgd",
            part="gates",
            data="../shared/data/mnist",
            train_rows=10_000,
            full={"train_rows": 0, "seeds": 5},
        ),
        Claim(
            text="At epsilon = 4 the convex model is within 2 points of DP-SGD on the ReLU network.",
            measure="beside_dp_sgd",
            part="relu",
            data="../shared/data/mnist",
            train_rows=10_000,
            full={"train_rows": 0, "seeds": 5},
        ),
        Claim(
            text="At epsilon = 4 the convex model is no worse than logistic regression trained in the same way.",
            measure="beside_dp_sgd",
            part="logistic",
            data="../shared/data/mnist",
            train_rows=10_000,
            full={"train_rows": 0, "seeds": 5},
        ),
        Claim(
            text="The last iterate tells no more than the accountant says; whoever sees every step is told more.",
            measure="seen_from_outside",
        ),
    ),
)

Pool = Literal["mean", "cls"]
Adjacency = Literal["zero-out", "replace-one"]
_COVERS = (
    "the last iterate's weights, towards one row of train; not the learning curve, the receipt, the scores, or the "
    "checkpoints of a run that did not finish"
)
_PLANNED = ("epsilon", "delta", "kind", "adjacency", "mechanisms")
_LARGEST = 2**30  # bytes of V: beyond it, gates are a mistake


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the private convex head; UsageError for a budget, a bound or a number of gates out of range."""

    epsilon: float = 4.0
    """budget of one run; every further run on the same rows adds to the total"""
    delta: float = 1e-5
    """probability beyond epsilon; below 1 / rows"""
    gates: int = 64
    """random gates P; 0: none, which is logistic regression"""
    radius: float = 1.0
    """R: rows with a longer phi(x) are scaled to this length"""
    clip: float = 0.0
    """C: bound on a row's gradient; 0: sqrt(2) radius, which no gradient exceeds"""
    adjacency: Literal["zero-out", "replace-one"] = "zero-out"
    """what must not be told from outside: whether a row took part (sensitivity C), or which row it was (2 C)"""
    pool: Literal["mean", "cls"] = "mean"
    """x is the mean of the valid tokens, or the first (cls) token"""

    def __post_init__(self) -> None:
        if not self.epsilon > 0:
            raise UsageError(f"epsilon={self.epsilon}: a budget above 0 was expected, e.g. 4.0.")
        if not 0 < self.delta < 1:
            raise UsageError(f"delta={self.delta}: a probability well below 1 / rows was expected, e.g. 1e-5.")
        if self.gates < 0:
            raise UsageError(f"gates={self.gates}: give 0 for logistic regression, or the number of random gates.")
        if not 0 < self.radius < math.inf:
            raise UsageError(f"radius={self.radius}: a bound above 0 was expected, e.g. 1.0.")
        if not 0 <= self.clip < math.inf:
            raise UsageError(f"clip={self.clip}: give a bound on a row's gradient, or 0 for sqrt(2) radius.")

    @property
    def longest(self) -> float:
        """The largest norm of a row's gradient after clipping."""
        unclipped = math.sqrt(2) * self.radius
        return min(self.clip or unclipped, unclipped)

    def certified(self, classes: int) -> bool:
        """Whether the gradients, clipped as they are, belong to a convex loss."""
        return classes <= 2 or self.longest >= math.sqrt(2) * self.radius


def gated(x_BD: Tensor, u_PD: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Return (x_BD scaled so that ||phi(x)|| <= `radius`, gates g_BP of zeros and ones); without directions P is 1."""
    g_BP = (x_BD @ u_PD.T >= 0).to(x_BD.dtype) if len(u_PD) else x_BD.new_ones(len(x_BD), 1)
    norm_B1 = _norm(x_BD, g_BP).unsqueeze(1)
    return x_BD * (radius / norm_B1.clamp_min(radius)), g_BP


def _norm(x_BD: Tensor, g_BP: Tensor) -> Tensor:
    """Return ||phi(x)|| [B]: every open gate shows x once."""
    return g_BP.sum(1).sqrt() * torch.linalg.vector_norm(x_BD, dim=1)


def logits(x_BD: Tensor, g_BP: Tensor, v_DPK: Tensor) -> Tensor:
    """Return f(x; V) [B,K]; phi, which would be [B, P D], is never made."""
    h_BPK = (x_BD @ v_DPK.flatten(1)).unflatten(1, v_DPK.shape[1:])
    return torch.einsum("bp,bpk->bk", g_BP, h_BPK)


def summed_gradient(
    x_BD: Tensor, g_BP: Tensor, y_B: Tensor, v_DPK: Tensor, clip: float = math.inf
) -> tuple[Tensor, Tensor]:
    """Return the sum [D,P,K] of the rows' gradients, each of norm at most `clip`, and the rows' losses [B] in nats.

    A row's gradient is the outer product of phi(x) and r = softmax - onehot: neither it nor its norm needs autograd.
    """
    z_BK = logits(x_BD, g_BP, v_DPK)
    logp_BK = z_BK.log_softmax(1)
    r_BK = logp_BK.exp() - nn.functional.one_hot(y_B, z_BK.shape[1])
    if clip < math.inf:
        norm_B1 = (_norm(x_BD, g_BP) * torch.linalg.vector_norm(r_BK, dim=1)).unsqueeze(1)
        r_BK = r_BK * (clip / norm_B1.clamp_min(clip))
    gated_BPK = g_BP.unsqueeze(2) * r_BK.unsqueeze(1)
    gradient_DPK = (x_BD.T @ gated_BPK.flatten(1)).unflatten(1, v_DPK.shape[1:])
    return gradient_DPK, -logp_BK.gather(1, y_B.unsqueeze(1)).squeeze(1)


def descend_(v_DPK: Tensor, sum_DPK: Tensor, *, batch: int, lr: float, wd: float, noise: float) -> None:
    """Take one noisy step in place: V <- V - lr [sum / batch + wd V + Z], Z of standard deviation `noise`.

    The noise comes from the operating system's entropy, anew for each step; nothing of it is kept.
    """
    v_DPK.mul_(1 - lr * wd).sub_(sum_DPK, alpha=lr / batch)
    v_DPK.sub_(gaussian(v_DPK.shape, generator(), v_DPK.device), alpha=lr * noise)


def guarantee(config: Config, *, rows: int, batch: int, epochs: int, lr: float, wd: float) -> HiddenStateGDP:
    """Return the accountant of a run, with the noise that `config` asks for; UsageError where nothing is guaranteed."""
    if config.delta * rows >= 1:
        raise UsageError(
            f"delta={config.delta:g} with {rows} rows allows to publish one of them; give less than {1 / rows:.1e}."
        )
    if batch < 1:
        raise UsageError(f"batch={batch}: give 1 row or more.")
    batch = min(batch, rows)
    return HiddenStateGDP.for_budget(
        config.epsilon,
        config.delta,
        contraction=contraction(lr, wd, wd + config.radius**2 / 2),
        batches=-(-rows // batch),
        epochs=epochs,
        batch=batch,
        sensitivity=config.longest * (2 if config.adjacency == "replace-one" else 1),
    )


class Cycle:
    """The same disjoint batches in the same order in every epoch; which rows share one, the public `seed` says.

    The last batch may be smaller: it is divided by the size of the others, as if rows without a gradient filled it.
    """

    def __init__(self, rows: int, batch: int, seed: int) -> None:
        # Not by length: how long the rows are is data.
        self.batches = Order(np.ones(rows), min(batch, rows), seed=seed, bucket=False).epoch(0)

    def epoch(self, k: int) -> Sequence[np.ndarray]:
        """Return the batches; `k` makes no difference."""
        return self.batches


class GatedClassifier(nn.Module):
    """Head on token states [B,T,D] with a mask [B,T] that is true on tokens; returns logits [B,classes].

    `directions` [P,D] are drawn from torch's generator and never trained; `weight` [D,P,classes] starts at zero. Raises
    UsageError where the weight would be too large, BadData where a row has no valid token.
    """

    def __init__(self, width: int, classes: int, gates: int, *, radius: float = 1.0, pool: Pool = "mean") -> None:
        super().__init__()
        shape = (width, max(1, gates), classes)
        if 4 * math.prod(shape) > _LARGEST:
            raise UsageError(
                f"gates={gates} on {width} features and {classes} classes make {math.prod(shape):,} weights, "
                f"{4 * math.prod(shape) / 2**30:.1f} GiB; give at most {_LARGEST // (4 * width * classes)} gates."
            )
        self.frozen_pool: Pool = pool
        self.radius = radius
        self.register_buffer("directions", torch.randn(gates, width))
        self.weight = nn.Parameter(torch.zeros(shape))

    def features(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Return (x_BD of bounded length, its gates g_BP)."""
        return gated(x_BD, self.get_buffer("directions"), self.radius)

    def pooled(self, x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Return one vector a row [B,D]."""
        if self.frozen_pool == "cls":
            return x_BTD[:, 0]
        count_B1 = mask_BT.sum(1, keepdim=True)
        if not bool(count_B1.all()):
            raise BadData(f"row {int((count_B1 == 0).nonzero()[0, 0])} of the batch has no valid token.")
        return x_BTD.masked_fill(~mask_BT.unsqueeze(-1), 0).sum(1) / count_B1

    def forward(self, x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        return logits(*self.features(self.pooled(x_BTD, mask_BT)), self.weight)


def head(config: Config, task: Task, width: int) -> GatedClassifier:
    """Return the head for `task.width` classes on tokens of `width` channels."""
    return GatedClassifier(width, task.width, config.gates, radius=config.radius, pool=config.pool)


def step(config: Config, attached: Attached, training: Training, *, rows: int, task: Task) -> NoisyCGD:
    """Return the step that trains this head on `rows` rows."""
    return NoisyCGD(config, attached, training, rows=rows, classes=task.width)


class NoisyCGD:
    """Noisy gradient descent on the head alone, over fixed batches in a fixed order, in float32.

    Refused where anything but this head trains; UsageError for training settings that would release, or choose among,
    other iterates than the last.
    """

    backward = False
    optimiser = None
    only_last = True

    def __init__(self, config: Config, attached: Attached, training: Training, *, rows: int, classes: int) -> None:
        module = getattr(attached.model, "head", None)
        if not attached.frozen_states or not isinstance(module, GatedClassifier):
            raise Refused("dp-convex is convex on frozen features alone; give it an arm of its own.")
        if training.schedule != "constant" or training.warmup:
            raise UsageError(
                f"schedule={training.schedule}, warmup={training.warmup}: the guarantee of the last iterate is that of "
                "one step size throughout; give schedule=constant and warmup=0."
            )
        total, self.batches = training.total_steps(rows), -(-rows // min(training.batch, rows))
        if 0 < training.evaluate_every < total or (not training.evaluate_every and total > self.batches):
            raise UsageError(
                f"evaluate_every={training.evaluate_every} would look at other iterates than the last one, which alone "
                f"is private; give at least the {total} steps of the run."
            )
        self.config, self.module, self.training, self.rows, self.classes = config, module, training, rows, classes
        self.accountant = guarantee(
            config,
            rows=rows,
            batch=training.batch,
            epochs=-(-total // self.batches),
            lr=training.lr,
            wd=training.wd,
        )
        self.done = 0

    def sampler(self, lengths: np.ndarray, training: Training) -> Cycle:
        """Return the fixed batches; Refused where only some of the rows are to be trained on."""
        if len(lengths) != self.rows:
            raise Refused(f"dp-convex visits all {self.rows} rows in every epoch; {len(lengths)} were chosen for one.")
        return Cycle(self.rows, training.batch, training.seed)

    @torch.no_grad()
    def __call__(self, state: State, batches: list[tuple[float, dict[str, Any]]]) -> float:
        """Take one step and return the mean loss of its rows; NotFinite where V no longer is."""
        assert state.hooks is not None
        weight, mean = self.module.weight, 0.0
        total = torch.zeros_like(weight)
        for share, inputs in batches:
            x_BTD, mask_BT = inputs["states"]
            x_BD, g_BP = self.module.features(self.module.pooled(x_BTD, mask_BT.bool()))
            gradient, losses = summed_gradient(x_BD, g_BP, inputs["labels"], weight, self.config.longest)
            total += gradient
            mean += share * losses.mean().item()
        state.hooks("before_step", state)
        a = self.accountant
        descend_(weight, total, batch=a.batch, lr=self.training.lr, wd=self.training.wd, noise=a.noise)
        state.hooks("after_step", state)
        self.done += 1
        if not bool(weight.isfinite().all()):
            raise NotFinite(f"the head's weight is not finite after step {state.step + 1}; check the features.")
        return mean

    def report(self) -> dict[str, Any]:
        """Return what the run spent: epsilon at delta, whether it is certified, and the accountant's figures.

        A mu-private release is as private as one Gaussian mechanism whose noise is 1 / mu of its sensitivity: that is
        what `mechanisms` holds, by which several runs on the same rows add up.
        """
        accountant, delta = self.accountant, self.config.delta
        found = {
            "epsilon": accountant.get_epsilon(delta),
            "delta": delta,
            "kind": "certified" if self.config.certified(self.classes) else "estimate",
            "mu": accountant.mu,
            "composed_epsilon": gdp_epsilon(accountant.composed_mu, delta),
            "adjacency": self.config.adjacency,
            "steps": self.done,
            "clip": self.config.longest,
            "rows": self.rows,
            "covers": _COVERS,
            "mechanisms": [{"noise_multiplier": 1 / accountant.mu, "sample_rate": 1.0, "steps": 1}],
            "accountant": asdict(accountant),
        }
        return {"privacy": found}

    def planned(self) -> dict[str, Any]:
        """Return what the run will have cost, to be composed with other runs."""
        found = self.report()["privacy"]
        return {key: found[key] for key in _PLANNED}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the accountant and the steps taken; no noise, for that is drawn and forgotten."""
        kept = [*asdict(self.accountant).values(), self.training.lr, self.training.wd]
        return {"accountant": torch.tensor(kept, dtype=torch.float64), "done": torch.tensor(self.done)}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Go on where a checkpoint stands; Changed where its steps were accounted for otherwise."""
        if not torch.equal(tensors["accountant"], self.state_dict()["accountant"]):
            raise Changed(
                "the checkpoint's steps had another noise, step size or number of epochs, and one guarantee cannot "
                "cover both; start again with another --out."
            )
        self.done = int(tensors["done"])


class PrivateGatedClassifier:
    """Fit and predict on feature vectors, in the manner of scikit-learn, by the same steps as the head.

    `x` is [n,D]; `y` holds class numbers 0..classes-1 (how many there are is told, not looked up in private rows).
    An infinite `epsilon` trains without noise. `seed` decides the gates and which rows share a batch, never the noise.
    After `fit`: `accountant_`, with `get_epsilon(delta)`, and `module_`.
    """

    def __init__(
        self,
        classes: int,
        *,
        epsilon: float = 4.0,
        delta: float = 1e-5,
        gates: int = 64,
        radius: float = 1.0,
        clip: float = 0.0,
        adjacency: Adjacency = "zero-out",
        lr: float = 2.0,
        wd: float = 1e-4,
        epochs: int = 60,
        batch: int = 512,
        seed: int = 0,
    ) -> None:
        self.config = Config(epsilon=epsilon, delta=delta, gates=gates, radius=radius, clip=clip, adjacency=adjacency)
        self.classes, self.lr, self.wd, self.epochs, self.batch, self.seed = classes, lr, wd, epochs, batch, seed

    @torch.no_grad()
    def fit(self, x: Any, y: Any) -> PrivateGatedClassifier:
        """Train on the rows of `x`; BadData for features or labels that do not fit."""
        x_ND, y_N = _features(x), torch.as_tensor(y)
        if y_N.shape != x_ND.shape[:1] or y_N.is_floating_point():
            raise BadData(f"{len(x_ND)} rows came with labels {tuple(y_N.shape)} {y_N.dtype}; give one class each.")
        if len(y_N) == 0 or not 0 <= int(y_N.min()) <= int(y_N.max()) < self.classes:
            raise BadData(f"labels must be classes 0..{self.classes - 1} of at least one row; others were given.")
        self.accountant_ = guarantee(
            self.config, rows=len(x_ND), batch=self.batch, epochs=self.epochs, lr=self.lr, wd=self.wd
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.module_ = GatedClassifier(x_ND.shape[1], self.classes, self.config.gates, radius=self.config.radius)
        x_ND, g_NP = self.module_.features(x_ND)
        batches = [torch.from_numpy(rows) for rows in Cycle(len(x_ND), self.batch, self.seed).epoch(0)]
        weight, settings = self.module_.weight, {"batch": self.accountant_.batch, "lr": self.lr, "wd": self.wd}
        for _ in range(self.epochs):
            for rows in batches:
                total, _ = summed_gradient(x_ND[rows], g_NP[rows], y_N[rows].long(), weight, self.config.longest)
                descend_(weight, total, noise=self.accountant_.noise, **settings)
        return self

    @torch.no_grad()
    def predict_proba(self, x: Any) -> np.ndarray:
        """Return probabilities [n, classes]."""
        parts = _features(x).split(1024)
        return torch.cat([self.module_(part.unsqueeze(1), _one_token(part)).softmax(1) for part in parts]).numpy()

    def predict(self, x: Any) -> np.ndarray:
        """Return the most probable class of each row."""
        return self.predict_proba(x).argmax(1)

    def score(self, x: Any, y: Any) -> float:
        """Return the accuracy on rows with labels `y`."""
        return float((self.predict(x) == np.asarray(y)).mean())


def _features(x: Any) -> Tensor:
    """Return float32 features [n,D]; BadData where they are none, or not finite."""
    x_ND = torch.as_tensor(x, dtype=torch.float32)
    if x_ND.ndim != 2:
        raise BadData(f"features of shape {tuple(x_ND.shape)} were given; [rows, features] was expected.")
    if not bool(x_ND.isfinite().all()):
        raise BadData(f"row {int((~x_ND.isfinite()).any(1).nonzero()[0, 0])} holds NaN or infinity; drop or mend it.")
    return x_ND


def _one_token(x_BD: Tensor) -> Tensor:
    return torch.ones(len(x_BD), 1, dtype=torch.bool)
