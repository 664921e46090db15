"""What an adaptation kept: the score on another task through a head fitted on the base, or the drift of the states.

The head is fitted on the features of the untouched base and frozen. A head that trained along would hide forgetting.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from brickyard.core.base import Base, HeadedModel
from brickyard.core.batches import Encoded, encode
from brickyard.core.data import read_data
from brickyard.core.errors import UsageError
from brickyard.core.side import SIDE
from brickyard.core.task import Task, task_of

if TYPE_CHECKING:
    from brickyard.core.attached import Attached
    from brickyard.core.trial import Prepared

# Plain sentences of several registers; what matters is that they are the same for everyone.
TEXTS = (
    "The committee postponed its decision until the end of the month.",
    "Water boils at a lower temperature in the mountains.",
    "def area(width, height): return width * height",
    "How far is it from the station to the old harbour?",
    "She laughed, closed the book and switched off the light.",
    "The film is long, loud and never once surprising.",
    "Prices rose by three per cent while wages stood still.",
    "Please restart the computer after the update has been installed.",
)
_ROWS = 2000  # of D2's training rows; enough for a linear head on a few hundred features


def inner(model: nn.Module) -> nn.Module:
    """Return the backbone inside a model with a head, adapters included."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if isinstance(plain, HeadedModel):
        return plain.backbone
    return getattr(plain, str(getattr(plain, "base_model_prefix", "")), plain)


def watched(ready: Prepared, attached: Attached) -> Drift | Retention | None:
    """Return what will say what an untrained arm's training kept: of `retain`, else the drift on fixed inputs.

    None where the base's states cannot change, which a network beside it only reads. Raises UsageError where the
    arm's states are not as wide as the base's, so that no head of the base can read them.
    """
    base, retain = ready.base, ready.setting.retain
    beside = any(name.rpartition(".")[2] == SIDE for name, _ in attached.model.named_modules())
    if attached.frozen_states or (beside and retain is None):
        return None
    model = attached.model
    if beside or getattr(model, "reads_instructions", False):  # prompts and side networks are no base, even untrained
        model = base.model(ready.task, seed=0, attention=ready.setting.attention).to(ready.device)
        few = {name: rows.to(ready.device) for name, rows in fixed_inputs(base, 1).items()}
        own, untouched = pooled(attached.model, few).shape[1], pooled(model, few).shape[1]
        if own != untouched:
            raise UsageError(
                f"--retain: {ready.plan.arm} leaves states of width {own}, and a head fitted on the base's reads "
                f"{untouched}; leave --retain out."
            )
    if retain is None:
        return Drift.before(model, base)
    return Retention.before(model, base, retain, max_length=ready.setting.max_length)


@torch.no_grad()
def pooled(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the mean over valid tokens of the backbone's last states: [batch, width], float32."""
    model.eval()
    x = inner(model)(**inputs).last_hidden_state.float()
    if x.ndim == 4:
        return x.mean(dim=(2, 3))
    mask = inputs.get("attention_mask")
    if mask is None:
        return x.mean(dim=1)
    weight_BT1 = mask[:, :, None].to(x)
    return (x * weight_BT1).sum(dim=1) / weight_BT1.sum(dim=1)


def fixed_inputs(base: Base, images: int) -> dict[str, Tensor]:
    """Return the fixed texts as the base reads them or, for a base of images, that many fixed random ones."""
    if base.input == "text":
        return dict(base.tokenizer(list(TEXTS), return_tensors="pt", padding=True))
    # What the processor makes of a blank image says its size; a configuration need not (those of ConvNets do not).
    blank = base.processor(images=[Image.new("RGB", (64, 64))], return_tensors="np")["pixel_values"]
    shape = (images, *np.asarray(blank).shape[1:])
    return {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(0))}


@dataclass
class Drift:
    """The pooled states of fixed inputs before a change."""

    inputs: dict[str, Tensor]
    states: Tensor

    @classmethod
    def before(cls, model: nn.Module, base: Base) -> Drift:
        """Remember the states of `model` on the fixed texts (or, for images, on fixed pixels)."""
        device = next(model.parameters()).device
        inputs = {k: v.to(device) for k, v in fixed_inputs(base, 8).items()}
        return cls(inputs, pooled(model, inputs))

    def after(self, model: nn.Module) -> dict[str, Any]:
        """Return 1 - cosine between the states before and after, mean over the fixed inputs."""
        cosine = torch.cosine_similarity(self.states, pooled(model, self.inputs), dim=-1)
        return {"what": "drift of the base's states on fixed inputs", "drift": float((1 - cosine).mean().clamp(min=0))}


@dataclass
class Retention:
    """Another task's test score through a linear head that was fitted on the base and frozen."""

    name: str
    task: Task
    test: Encoded
    weight: Tensor
    bias: Tensor
    score: float

    @classmethod
    def before(cls, model: nn.Module, base: Base, spec: Any, *, max_length: int | None = None) -> Retention:
        """Fit the head on the features of `model` as it is now, and score it on the test rows of `spec`."""
        data = read_data(spec, need=("train", "test"))
        task = task_of(data)
        train = encode(data.splits["train"], base, task, max_length=max_length)
        test = encode(data.splits["test"], base, task, max_length=max_length)
        rows = np.random.Generator(np.random.PCG64(0)).permutation(len(train))[:_ROWS]
        weight, bias = fit(_features(model, train, rows), train.labels[torch.from_numpy(rows)], task)
        kept = cls(data.name, task, test, weight, bias, math.nan)
        kept.score = kept._scored(model)
        return kept

    def _scored(self, model: nn.Module) -> float:
        logits = _features(model, self.test, np.arange(len(self.test))) @ self.weight.T + self.bias
        return self.task.score(self.test.labels.numpy(), self.task.predict(logits.numpy()))

    def after(self, model: nn.Module) -> dict[str, Any]:
        """Return the score before and after the change."""
        return {"what": self.name, "metric": self.task.metric, "before": self.score, "after": self._scored(model)}


def _features(model: nn.Module, rows: Encoded, index: np.ndarray) -> Tensor:
    device = next(model.parameters()).device
    order = index[np.argsort(rows.lengths[index], kind="stable")]
    out: Tensor | None = None
    place = {int(r): i for i, r in enumerate(index)}
    for part in np.array_split(order, max(1, len(order) // 64)):
        inputs = {k: v.to(device) for k, v in rows.collate(part).items() if k != "labels"}
        states = pooled(model, inputs).cpu()
        out = torch.empty(len(index), states.shape[1]) if out is None else out
        out[[place[int(r)] for r in part]] = states
    assert out is not None
    return out


def fit(x_ND: Tensor, labels_N: Tensor, task: Task, *, decay: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Fit a linear head by L-BFGS on standardised features; return weight [width, D] and bias [width] for raw ones."""
    mean_D, std_D = x_ND.mean(dim=0), x_ND.std(dim=0).clamp(min=1e-6)
    z_ND = ((x_ND - mean_D) / std_D).double()
    weight = torch.zeros(task.width, x_ND.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(task.width, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = task.loss(z_ND @ weight.T + bias, labels_N) + decay * weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)  # type: ignore[arg-type]
    w = (weight.detach() / std_D).float()
    return w, (bias.detach() - w.double() @ mean_D.double()).float()
