"""IAPT: four soft prompts for each layer, made from the instruction itself by a small generator.

    z   = h W_down + b_down                        [n, m]      h [n, d] the instruction's states at the layer's input
    a   = softmax over the n tokens of z W_sap     [n, P]      self-attention pooling: any n gives P = 4 rows
    p_l = g_l(a^T z) W_up + b_up                   [P, d]      prompts of layer l, dropped before the next

    g_l(x) = sum_{0..6} a_j x^j / (1 + | sum_{1..5} b_i x^i |)  learned for each layer, begins as GELU

The layer's attention reads p_l as keys and values (see `_prompts`), so decoding costs P cache entries a layer and no
product; `share` lets the bricks of several tenants answer one batch, each row its own. Projections may be shared by
groups of layers; activations are not. Trained "jointly", or in two levels: for the first half of the steps the
generators learn on one half of the rows and the activations on the other, in turn; then the activations rest and the
generators learn on all rows. The backbone is frozen. Nothing can be merged.

Source: "IAPT: Instruction-Aware Prompt Tuning for Large Language Models", ACL 2024, arXiv 2405.18203; the shape of the
scores, m and the groups are ours. Headline claim: above P-tuning v2 and LoRA-like methods at as many parameters, and
faster decoding than un-merged LoRA. Left out: a gate that makes the first step the base's (not in the paper).
Legend: B rows, n tokens of the instruction, d width, m bottleneck, P prompts.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from scipy.optimize import lsq_linear
from scipy.special import erf
from torch import Tensor, nn

from brickyard.core import brick as bricks
from brickyard.core.attached import Attached, attach_in_place
from brickyard.core.base import Base
from brickyard.core.curriculum import Curriculum
from brickyard.core.errors import BadMix, Refused, UsageError
from brickyard.core.loop import State
from brickyard.core.method import Claim, Record
from brickyard.core.roles import own_head
from brickyard.core.side import backbone_of, stack
from brickyard.core.task import Task
from brickyard.tune._prompts import Prompts

if TYPE_CHECKING:
    from brickyard.core.trial import Prepared

RECORD = Record(
    name="iapt",
    family="tune",
    title="Instruction-aware prompts, generated for each layer",
    paper="IAPT: Instruction-Aware Prompt Tuning, ACL 2024, arXiv 2405.18203",
    needs=("text-classification", "pair-classification", "regression", "image-classification", "instruct"),
    because="prompts are made from the whole instruction, which a text without one does not have",
    slot="tuner",
    search={"lr": (1e-3, 3e-3), "bottleneck": (32, 64)},
    training={"lr": 2e-3},
    presets={"paper": {"tokens": 4, "training": "bilevel"}},
    claims=(
        Claim(
            text="Four prompts made from the example beat four that are the same for all by 2 points.",
            inequality="iapt >= constant + 2.0",
            arms={
                "iapt": "iapt:bottleneck=32",
                "constant": "iapt:bottleneck=32,constant=true",
                "gelu": "iapt:bottleneck=32,activation=gelu",
                "lora": "lora:r=16,lr=1e-3",
            },
            control={
                "what": "training labels shuffled: there is nothing left to learn",
                "arm": "iapt:bottleneck=32",
                "labels": "shuffled",
                "inequality": "iapt > control + 5.0",
            },
            gate="lora > majority + 10.0",
            data="trec|embedded:stdlib-topics",
            epochs=3,
            train_rows=1000,
            batch=8,
            full={"train_rows": 2000, "batch": 0, "max_length": 0, "lrs": (1e-3, 3e-3)},
        ),
        Claim(
            text="IAPT is at most a point below LoRA.",
            # At as many parameters: 153k and 150k.
            inequality="iapt >= lora - 1.0",
            arms={"iapt": "iapt:bottleneck=32", "lora": "lora:r=16,lr=1e-3"},
            control={
                "what": "training labels shuffled: there is nothing left to learn",
                "arm": "iapt:bottleneck=32",
                "labels": "shuffled",
                "inequality": "iapt > control + 5.0",
            },
            gate="lora > majority + 10.0",
            data="trec|embedded:stdlib-topics",
            epochs=3,
            train_rows=1000,
            batch=8,
            full={"train_rows": 2000, "batch": 0, "max_length": 0, "lrs": (1e-3, 3e-3)},
        ),
        Claim(
            text="Four prompts made from the example are at most half a point below 32 that are the same for all.",
            inequality="iapt >= wide - 0.5",
            arms={"iapt": "iapt:bottleneck=32", "wide": "iapt:bottleneck=32,tokens=32,constant=true"},
            control={
                "what": "training labels shuffled: there is nothing left to learn",
                "arm": "iapt:bottleneck=32",
                "labels": "shuffled",
                "inequality": "iapt > control + 5.0",
            },
            gate="wide > majority + 10.0",
            data="trec|embedded:stdlib-topics",
            epochs=3,
            train_rows=1000,
            batch=8,
            lrs=(2e-3, 6e-3),
            full={"train_rows": 2000, "batch": 0, "max_length": 0, "lrs": (1e-3, 3e-3)},
        ),
        Claim(
            text="Learned rational activations are at most 0.3 points below GELU (learned in turn, too: reported).",
            inequality="rational >= gelu - 0.3",
            arms={
                "rational": "iapt:bottleneck=32",
                "gelu": "iapt:bottleneck=32,activation=gelu",
                "bilevel": "iapt:bottleneck=32,training=bilevel",
            },
            control={
                "what": "training labels shuffled: there is nothing left to learn",
                "arm": "iapt:bottleneck=32",
                "labels": "shuffled",
                "inequality": "rational > control + 5.0",
            },
            gate="gelu > majority + 10.0",
            data="trec|embedded:stdlib-topics",
            epochs=3,
            train_rows=1000,
            batch=8,
            full={"train_rows": 2000, "batch": 0, "max_length": 0, "lrs": (1e-3, 3e-3)},
        ),
    ),
)
PROMPTS = "prompts"  # name of the generator in the model
_NUMERATOR, _DENOMINATOR = 7, 5  # coefficients: degrees (6, 5)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the generators; UsageError for values out of range."""

    tokens: int = 4
    """P, prompts for each layer"""
    bottleneck: int = 64
    """m, width of the generators"""
    groups: int = 0
    """groups of consecutive layers that share projections; 0: every layer has its own"""
    activation: Literal["rational", "gelu", "relu"] = "rational"
    """g_l"""
    training: Literal["joint", "bilevel"] = "joint"
    """whether rational activations learn with the generators, or in turn on rows of their own"""
    constant: bool = False
    """negative control: every example has the same prompts, made from nothing"""

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.bottleneck < 1 or self.groups < 0:
            raise UsageError(
                f"iapt: tokens={self.tokens}, bottleneck={self.bottleneck}, groups={self.groups}: prompts and widths "
                "must be positive, groups not negative."
            )
        if self.training == "bilevel" and self.activation != "rational":
            raise UsageError(f"iapt: training=bilevel learns activations; {self.activation} has nothing to learn.")


@lru_cache(maxsize=1)
def gelu_coefficients() -> tuple[np.ndarray, np.ndarray]:
    """Return (a [7], b [5]) with which the rational function is GELU on [-4, 4] to less than 0.01.

    b has even powers alone, none of them negative, so that the denominator needs no absolute value there. The fit is
    linear in a and b once multiplied by the denominator; weights undo that multiplication and are found in rounds.
    """
    x = np.linspace(-4, 4, 801)
    y = x * 0.5 * (1 + erf(x / np.sqrt(2)))
    system = np.concatenate([x[:, None] ** np.arange(_NUMERATOR), -y[:, None] * x[:, None] ** [2, 4]], axis=1)
    least = np.r_[np.full(_NUMERATOR, -np.inf), 0.0, 0.0]
    weight = np.ones_like(x)
    for _ in range(10):
        found = lsq_linear(system * weight[:, None], y * weight, bounds=(least, np.inf)).x
        weight = 1 / (1 + x[:, None] ** [2, 4] @ found[_NUMERATOR:])
    b = np.zeros(_DENOMINATOR)
    b[1], b[3] = found[_NUMERATOR:]
    return found[:_NUMERATOR], b


class Rational(nn.Module):
    """R(x) = P(x) / (1 + |Q(x)|), elementwise, in full precision; begins as GELU. It has no pole."""

    def __init__(self) -> None:
        super().__init__()
        a, b = gelu_coefficients()
        self.numerator = nn.Parameter(torch.tensor(a, dtype=torch.float32))
        self.denominator = nn.Parameter(torch.tensor(b, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            wide = x.float()
            top, low = self.numerator[-1].expand_as(wide), self.denominator[-1].expand_as(wide)
            for coefficient in self.numerator[:-1].flip(0):
                top = top * wide + coefficient
            for coefficient in self.denominator[:-1].flip(0):
                low = low * wide + coefficient
            return (top / (1 + (low * wide).abs())).to(x.dtype)


class Projections(nn.Module):
    """W_down, W_sap and W_up of one group of layers; the first two are not there where nothing is read."""

    def __init__(self, d: int, m: int, tokens: int, *, reads: bool) -> None:
        super().__init__()
        self.down = nn.Linear(d, m) if reads else None
        self.scores = nn.Linear(m, tokens, bias=False) if reads else None
        self.up = nn.Linear(m, d)


class Generator(nn.Module):
    """Makes the prompts of all layers: `self(l, h_BTd, mask_BT)` -> [B, P, d]; masked tokens count for nothing."""

    def __init__(self, layers: int, d: int, config: Config) -> None:
        super().__init__()
        groups = config.groups or layers
        if groups > layers:
            raise UsageError(f"iapt: groups={groups}, but this base has {layers} layers.")
        self.tokens = config.tokens
        self.group = [l * groups // layers for l in range(layers)]
        size = (d, config.bottleneck, config.tokens)
        self.projections = nn.ModuleList(Projections(*size, reads=not config.constant) for _ in range(groups))
        make = {"rational": Rational, "gelu": nn.GELU, "relu": nn.ReLU}[config.activation]
        self.activations = nn.ModuleList(make() for _ in range(layers))
        self.method_module = True
        self.seeds = nn.Parameter(torch.randn(layers, config.tokens, config.bottleneck)) if config.constant else None

    def forward(self, l: int, h_BTd: Tensor, mask_BT: Tensor) -> Tensor:
        made: Any = self.projections[self.group[l]]
        if self.seeds is not None:
            return made.up(self.activations[l](self.seeds[l])).expand(len(h_BTd), -1, -1)
        z_BTm = made.down(h_BTd)
        scores_BTP = made.scores(z_BTm).masked_fill(~mask_BT[..., None], float("-inf"))
        s_BPm = scores_BTP.softmax(dim=1).transpose(1, 2) @ z_BTm
        return made.up(self.activations[l](s_BPm))


class Tenants(nn.Module):
    """Generators of several bricks beside one backbone: every row of a batch has prompts made by its own."""

    def __init__(self, generators: Mapping[str, Generator]) -> None:
        super().__init__()
        self.generators = nn.ModuleList(generators.values())
        self.known = {name: i for i, name in enumerate(generators)}
        self.asked: list[str] = []

    def forward(self, l: int, h_BTd: Tensor, mask_BT: Tensor) -> Tensor:
        count = len(self.asked)
        if not count or len(h_BTd) % count:
            raise BadMix(
                f"a batch of {len(h_BTd)} rows came while {count} tenants were named; run the model inside "
                "`with rows([...])`, one name for each row."
            )
        owner = [self.known[name] for name in self.asked for _ in range(len(h_BTd) // count)]  # beams repeat a row
        made: Tensor | None = None
        for tenant in sorted(set(owner)):
            rows = torch.tensor([i for i, of in enumerate(owner) if of == tenant], device=h_BTd.device)
            p_RPd = self.generators[tenant](l, h_BTd[rows], mask_BT[rows])
            made = h_BTd.new_empty(len(h_BTd), *p_RPd.shape[1:]) if made is None else made
            made[rows] = p_RPd.to(made.dtype)
        assert made is not None
        return made


@dataclass(frozen=True)
class Shared:
    """One frozen backbone and the tenants on it. `close` leaves the model without them."""

    model: nn.Module
    tenants: Tenants
    close: Callable[[], None]

    @contextmanager
    def rows(self, names: Sequence[str]) -> Iterator[nn.Module]:
        """Answer batches of len(names) rows, each for the tenant named there; a step with the cache needs no names.

        Raises BadMix for names that are unknown, and (in the model's forward) for a batch of another size.
        """
        unknown = sorted(set(names) - self.tenants.known.keys())
        if unknown or not names or isinstance(names, str):
            raise BadMix(f"rows={names!r}: expected one name for each row, of {sorted(self.tenants.known)}.")
        before, self.tenants.asked = self.tenants.asked, list(names)
        try:
            yield self.model
        finally:
            self.tenants.asked = before


def share(base: Base, tenants: Mapping[str, str | Path], *, attention: str = "sdpa") -> Shared:
    """Put the generators of several iapt bricks on one backbone of `base`, a language model; name -> brick folder.

    Weights of the backbone are held once; a tenant costs its generators and, while it decodes, P cache entries a layer.

        shared = share(open_base("embedded:pylm"), {"ann": "bricks/a", "bob": "bricks/b"})
        with shared.rows(["ann", "bob", "ann"]) as model:
            model.generate(**three_rows)

    Raises WrongBase for a brick of another base, Refused for what is no iapt brick alone, answers through a head of its
    own, or makes another number of prompts than the others (rows of one batch need as many cache entries each).
    """
    if not tenants:
        raise UsageError("share: no tenants were given; give {name: brick folder, ...}.")
    generators: dict[str, Generator] = {}
    model: Any = None
    for name, folder in tenants.items():
        made = bricks.load(folder)
        if made.manifest["arm"].partition(":")[0].strip() != RECORD.name or "+" in made.manifest["arm"]:
            raise Refused(f"{folder} is a brick of {made.manifest['arm']}; share serves those of {RECORD.name} alone.")
        if not made.task.generative:
            raise Refused(
                f"{folder} was tuned on {made.task.kind}, with a head of its own; share serves language models."
            )
        applied = made.apply(base, attention=attention)
        found: Any = applied.model.get_submodule(PROMPTS)
        generators[name] = copy.deepcopy(found)  # undoing the brick takes its values back
        model = applied.undo()
    counts = {name: made.tokens for name, made in generators.items()}
    if len(set(counts.values())) > 1:
        raise Refused(f"tenants with different numbers of prompts cannot share a batch: {counts}.")
    together = Tenants(generators).eval().to(next(model.parameters()).device)
    prompts = Prompts(model, together)
    return Shared(model.eval(), together, prompts.close)


class Bilevel(Curriculum):
    """Generators and activations in turn, on rows of their own, for half of the steps; then generators alone on all.

    The task's own head learns with the generators.
    """

    needs_gradients = True

    def __init__(self, rows: int, seed: int, model: nn.Module) -> None:
        super().__init__(digest=f"iapt bilevel, {rows} rows, seed {seed}")
        order = np.random.Generator(np.random.PCG64(seed)).permutation(rows)
        self.halves = (np.sort(order[: (rows + 1) // 2]), np.sort(order[(rows + 1) // 2 :]))
        self.all = np.arange(rows)
        generator: Any = model.get_submodule(PROMPTS)
        self.theta = [p for p in generator.activations.parameters()]
        theta = {id(p) for p in self.theta}
        self.omega = [p for p in generator.parameters() if id(p) not in theta]
        self.omega += [p for name in own_head(model) for p in model.get_submodule(name).parameters()]

    def choose(self, state: State) -> tuple[np.ndarray, dict[str, Any]]:
        if 2 * state.step >= state.total:
            return self.all, {"learns": "generators"}
        activations = (self.epoch + 1) % 2 == 1
        return self.halves[activations], {"learns": "activations" if activations else "generators"}

    def before_step(self, state: State) -> None:
        """Leave the others without a gradient, so that the optimiser passes them by."""
        for p in self.omega if self.log[-1]["learns"] == "activations" else self.theta:
            p.grad = None


def curriculum(config: Config, ready: Prepared, sets: Any, device: torch.device, model: nn.Module) -> Curriculum | None:
    """Return what decides the rows of each epoch with training=bilevel; None for training=joint.

    Where half of the rows would not fill a batch both learn jointly, and a warning says so.
    """
    if config.training != "bilevel":
        return None
    rows = len(ready.encoded["train"])
    if rows < 2 * ready.training.batch:
        warnings.warn(
            f"iapt: half of {rows} training rows does not fill a batch of {ready.training.batch}, so generators and "
            "activations learn jointly on all rows; give more rows or a smaller batch for training=bilevel.",
            stacklevel=2,
        )
        return None
    return Bilevel(rows, ready.setting.seed, model)


def attach(model: nn.Module, config: Config, task: Task) -> Attached:
    """Put the generators into `model`; they and the task's own head train."""
    layers, d = len(stack(model)), int(backbone_of(model).config.hidden_size)  # type: ignore[union-attr, arg-type]
    made = Generator(layers, d, config).to(next(model.parameters()).device)
    prompts = Prompts(model, made)
    heads = tuple(f"{name}." for name in own_head(model)) or ("\0",)
    model.add_module(PROMPTS, made)
    found = [n for n, _ in model.named_parameters() if n.startswith((f"{PROMPTS}.", *heads))]
    flat = [n for n, p in model.named_parameters() if p.ndim < 2]
    attached = attach_in_place(model, found, matched={"layers": [name for name, _ in stack(model)]}, no_decay=flat)
    put_back = attached.detach

    def detach() -> nn.Module:
        put_back()
        prompts.close()
        delattr(model, PROMPTS)
        return model

    attached.detach = detach
    return attached
