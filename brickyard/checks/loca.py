"""The claims of loca that are no inequality between arms: what learned positions bring, and what few cosines can keep.

Shapes: S seeds, D drawn matrices; p and q the sides of a matrix, K coefficients, r a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import ttest_1samp
from torch import Tensor

from brickyard.checks._takes import takes
from brickyard.core import trial
from brickyard.core.answers import answer
from brickyard.core.attached import Attached
from brickyard.core.build import build
from brickyard.core.loop import State, train
from brickyard.core.method import Claim
from brickyard.core.wrap import ADAPTER, targets
from brickyard.tune._cosines import POSITIONS, nearest
from brickyard.tune._dct import dct2
from brickyard.tune.loca import positions

OPTIONS = "n_frequency=300,lr=0.15"  # of 0.005 to 0.15 the best on validation rows, at this few steps
MOVED, WORSE, GATE = 0.05, 0.01, 0.10
SIDE, RANKS = 384, (1, 8)
LEARNED, FROZEN, SHUFFLED = "learned", "frozen", "shuffled"


class DealtOut:
    """Control: gives each position another one's gradient, so that positions move as far, but not to any purpose."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def before_step(self, state: State) -> None:
        """Permute the gradients of the positions of every layer."""
        for u_2K in _stored(state.attached):
            if u_2K.grad is not None:
                u_2K.grad = u_2K.grad[:, torch.randperm(u_2K.shape[1], generator=self.generator).to(u_2K.device)]


@dataclass(frozen=True)
class Runs:
    """What one arm's runs gave, by seed [S]: mean losses in nats, accuracy, and the share of positions that moved."""

    train_loss_S: np.ndarray
    test_loss_S: np.ndarray
    accuracy_S: np.ndarray
    moved_S: np.ndarray


@takes("base", "data")
def location(claim: Claim, *, options: str = OPTIONS) -> dict[str, Any]:
    """Train LoCA with learned, with fixed and, as control, with shuffled positions, from the same start and data order.

    It holds where 5 % of the positions or more moved and, paired by seed, learned positions end at a lower training
    loss than fixed ones and at a held-out loss at most 0.01 nats higher; the loss, because accuracy on a test set of
    this size cannot tell 0.3 points. Gate: the learned arm answers 10 points better than the majority class.
    """
    arms = {LEARNED: f"loca:{options}", FROZEN: f"loca:{options},locate=0", SHUFFLED: f"loca:{options}"}
    found = {name: _run(claim, arm, shuffled=name == SHUFFLED) for name, arm in arms.items()}
    return judged({name: runs for name, (runs, _) in found.items()}, found[LEARNED][1], arms)


def judged(runs: dict[str, Runs], majority: float, arms: dict[str, str]) -> dict[str, Any]:
    """Judge what `location` measured; `majority` is the accuracy of answering the most frequent class."""
    learned, frozen, shuffled = runs[LEARNED], runs[FROZEN], runs[SHUFFLED]
    gain, gain_low, gain_high = _over_seeds(frozen.train_loss_S - learned.train_loss_S)
    worse, worse_low, worse_high = _over_seeds(learned.test_loss_S - frozen.test_loss_S)
    control, control_low, control_high = _over_seeds(shuffled.train_loss_S - learned.train_loss_S)
    moved, above = float(learned.moved_S.min()), float(learned.accuracy_S.mean()) - majority
    if above <= GATE:
        holds: Any = "set-up invalid"
    elif moved < MOVED or gain_high < 0 or worse_low > WORSE:
        holds = False
    elif gain_low > 0 and worse_high <= WORSE:
        holds = True
    else:
        holds = "undecided"
    return {
        "inequality": f"moved >= 5 %, train loss(learned) < (fixed), test loss(learned) <= (fixed) + {WORSE:g}",
        "holds": holds,
        "measured": gain,
        "low": gain_low,
        "high": gain_high,
        "detail": (
            f"{100 * moved:.0f} % of the positions moved; training loss lower by {gain:.4f} nats ({gain_low:.4f} to "
            f"{gain_high:.4f}) than with fixed ones, held-out loss higher by {worse:.4f} ({worse_low:.4f} to "
            f"{worse_high:.4f})"
        ),
        "gate": {"inequality": "learned > majority + 10.0", "measured": 100 * above, "holds": above > GATE},
        "control": {
            "what": "each position gets another one's gradient: it moves as far, but not where the loss falls",
            "inequality": "train loss(learned) < train loss(control)",
            "measured": control,
            "low": control_low,
            "high": control_high,
            "destroyed": bool(control_low > 0),
        },
        "figures": {"options": arms, **{name: {k: v.tolist() for k, v in vars(r).items()} for name, r in runs.items()}},
    }


@takes("base", "data")
def reconstruction(claim: Claim, *, side: int = SIDE, ranks: tuple[int, ...] = RANKS) -> dict[str, Any]:
    """Compare, at equal numbers stored, the energy that best cosines, singular vectors and random cosines keep.

    The numbers are r (p + q): singular vectors of rank r; that many cosines at random places, which a seed draws; a
    third as many of the largest ones, which are stored with row and column. Judged on matrices of independent Gaussian
    entries, D draws. Control: a matrix of rank 2 in as much noise, of which singular vectors keep more. The change of
    the query and value matrices under a short full tuning stands beside, unjudged.
    """
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(side, side, generator=generator)  # noqa: E731
    kept_DR3 = np.array([[kept(draw(), rank, generator) for rank in ranks] for _ in range(claim.seeds)])
    low_rank = torch.randn(side, 2, generator=generator) @ torch.randn(2, side, generator=generator) / 2**0.5
    signal = kept(low_rank + draw(), 2, generator)
    real_R3 = _real(claim, ranks, generator)
    over_svd = _over_seeds((kept_DR3[..., 0] - kept_DR3[..., 1]).min(1))
    over_random = _over_seeds((kept_DR3[..., 1] - kept_DR3[..., 2]).min(1))
    if over_svd[1] > 0 and over_random[1] > 0:
        holds: Any = True
    else:
        holds = False if over_svd[2] < 0 or over_random[2] < 0 else "undecided"
    said = "; ".join(
        f"rank {rank}: {100 * best:.2f}, {100 * svd:.2f}, {100 * some:.2f} % (of a real change {100 * real[0]:.1f}, "
        f"{100 * real[1]:.1f}, {100 * real[2]:.1f} %)"
        for rank, (best, svd, some), real in zip(ranks, kept_DR3.mean(0), real_R3, strict=True)
    )
    return {
        "inequality": "energy kept: best cosines > singular vectors > random cosines",
        "holds": holds,
        "measured": over_svd[0],
        "low": over_svd[1],
        "high": over_svd[2],
        "detail": f"energy kept by best cosines, singular vectors and random cosines at as many numbers: {said}",
        "gate": None,
        "control": {
            "what": "a matrix of rank 2 in as much noise: singular vectors must keep more",
            "inequality": "singular vectors > best cosines",
            "measured": signal[1] - signal[0],
            "destroyed": bool(signal[1] > signal[0]),
        },
        "figures": {"ranks": ranks, "random": kept_DR3.tolist(), "real": real_R3.tolist(), "signal": signal},
    }


def kept(w_pq: Tensor, rank: int, generator: torch.Generator) -> tuple[float, float, float]:
    """Return the shares of ||W||^2 kept by the largest cosines, by `rank` singular vectors, and by random cosines."""
    p, q = w_pq.shape
    numbers = rank * (p + q)
    energy = (dct2(w_pq).flatten() ** 2).double()
    largest = energy.topk(numbers // 3).values.sum()
    some = energy[torch.randperm(p * q, generator=generator)[:numbers]].sum()
    singular = (torch.linalg.svdvals(w_pq)[:rank].double() ** 2).sum()
    whole = energy.sum()
    return float(largest / whole), float(singular / whole), float(some / whole)


def _real(claim: Claim, ranks: tuple[int, ...], generator: torch.Generator) -> np.ndarray:
    """Mean shares [R, 3] of the changes that full tuning makes to the query and value matrices."""
    ready = trial.prepare(_setting(claim, "full", 1), ("train",))
    attached = build(ready.plan, ready.base, ready.task, seed=1)
    modules = dict(attached.model.named_modules())
    names = [name for found in targets(attached.model, ("query", "value")).values() for name in found]
    before = {name: _weight(modules[name]).clone() for name in names}
    train(attached, ready.encoded["train"], None, ready.task, ready.training, device=str(ready.device))
    changes = [_weight(modules[name]) - before[name] for name in names]
    return np.array([[kept(w_pq, rank, generator) for rank in ranks] for w_pq in changes]).mean(0)


def _weight(module: Any) -> Tensor:
    return module.weight.detach().float().cpu()


def _run(claim: Claim, arm: str, *, shuffled: bool) -> tuple[Runs, float]:
    """Train one arm with every seed; return what it gave, and the accuracy of the most frequent class."""
    found, majority = [], 0.0
    for seed in range(1, claim.seeds + 1):
        ready = trial.prepare(_setting(claim, arm, seed), ("train", "test"))
        attached = build(ready.plan, ready.base, ready.task, seed=seed)
        before = _places(attached)
        train(
            attached,
            ready.encoded["train"],
            None,
            ready.task,
            ready.training,
            callbacks=[DealtOut()] if shuffled else [],
            device=str(ready.device),
        )
        pairs = zip(before, _places(attached), strict=True)
        moved = np.mean([float((old != new).any(0).double().mean()) for old, new in pairs])
        known = answer(attached.model, ready.encoded["train"], ready.task)
        new = answer(attached.model, ready.encoded["test"], ready.task)
        labels_N = ready.encoded["test"].labels.numpy()
        majority = np.bincount(labels_N.astype(int)).max() / len(labels_N)
        found.append((known.losses.mean(), new.losses.mean(), (new.predictions == labels_N).mean(), moved))
    return Runs(*np.array(found, dtype=np.float64).T), float(majority)


def _stored(attached: Attached) -> list[Tensor]:
    tuner: Any = attached.model.base_model
    return [layer.part(ADAPTER)[POSITIONS] for _, layer in tuner.layers()]


def _places(attached: Attached) -> list[Tensor]:
    tuner: Any = attached.model.base_model
    return [nearest(positions(layer.part(ADAPTER)).detach()).cpu() for _, layer in tuner.layers()]


def _over_seeds(values_S: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % interval (Student's t)."""
    found = ttest_1samp(values_S, 0.0).confidence_interval()
    return float(values_S.mean()), float(found.low), float(found.high)


def _setting(claim: Claim, arm: str, seed: int) -> trial.Setting:
    return trial.Setting(
        arm=arm,
        base=claim.base,
        data=claim.data,
        seed=seed,
        batch=claim.batch or None,
        max_length=claim.max_length or None,
        train_rows=claim.train_rows,
        training={"epochs": claim.epochs},
    )
