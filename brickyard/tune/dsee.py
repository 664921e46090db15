"""DSEE: a low-rank and a sparse update of a base that is itself pruned in the middle of the training.

    y = (W * M) (c x) + (alpha / r) (B A + S) x + bias       A [r, n], B [m, r] = 0, S zero but for N trained entries

Only query and value (`target`) carry B A + S. First all of W is there. After the share `at` of the steps it is pruned:
unstructured, M = 0 where |B A + S| (query, value) or |W| (the others) is smallest, globally in each of the two groups;
structured, the attention heads and feed-forward neurons with the smallest |c|, a coefficient for each that is trained
from 1 under an l1 penalty, are removed from the layers themselves. Then the rest is trained on. The entries of S stand
where a robust decomposition W ~ L + S finds the largest outliers; W stays frozen throughout.

Source: Chen et al., "DSEE: Dually Sparsity-embedded Efficient Tuning of Pre-trained Language Models", ACL 2023, arXiv
2111.00160, sec. 3 and the released code.
Headline claim: a quarter fewer inference FLOPs at comparable quality with 0.5 % of the parameters trained.
Unstructured zeros save no time here and none is claimed. The coefficients of what is left stay in the brick; exported
`--to merged` it is a plain checkpoint of its own sizes, where the model's configuration has words for them. Left out:
per-model (not per-block) removal of heads.
Legend: n in, m out, N entries of S, T tokens of the batch, K units that are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brickyard.core import inject
from brickyard.core.attached import Attached
from brickyard.core.errors import BadBrick, Refused, UsageError
from brickyard.core.inject import BrickyardLinear, Leaf, Part, Plan
from brickyard.core.method import Claim, Record
from brickyard.core.ranks import keep_best, take
from brickyard.core.roles import BLOCKS
from brickyard.core.slim import OUTPUTS, Slimmed, Unit, keep_units, units
from brickyard.core.task import Task
from brickyard.core.wrap import ADAPTER
from brickyard.tune._outliers import positions

if TYPE_CHECKING:
    from brickyard.core.loop import State

RECORD = Record(
    name="dsee",
    family="tune",
    title="Low-rank and sparse update of a base that is pruned while it is tuned",
    paper="DSEE: Dually Sparsity-embedded Efficient Tuning of Pre-trained Language Models, ACL 2023, arXiv 2111.00160",
    slot="tuner",
    search={"lr": (3e-4, 1e-3, 3e-3)},
    training={"lr": 1e-3},
    presets={"paper": {"r": 16, "n_sparse": 64, "alpha": 32.0}},
    claims=(
        Claim(
            text="64 sparse entries a matrix on top of LoRA r=4 cost nothing: at most 0.2 points below it.",
            inequality="dsee >= lora - 0.2",
            arms={
                "dsee": "dsee:r=4,alpha=16,n_sparse=64",
                "lora": "lora:r=4,alpha=16,target=[query,value]",
                "random": "dsee:r=4,alpha=16,n_sparse=64,support=random",
                "magnitude": "dsee:r=4,alpha=16,n_sparse=64,support=magnitude",
            },
            control={
                "what": "training labels shuffled: there is nothing left to learn",
                "arm": "dsee:r=4,alpha=16,n_sparse=64",
                "labels": "shuffled",
                "inequality": "dsee > control + 5.0",
            },
            gate="lora > majority + 10.0",
            epochs=3,
            lrs=(2e-3,),
            train_rows=600,
            batch=8,
            full={"train_rows": 0, "batch": 0, "max_length": 0, "lrs": (5e-4, 1e-3, 2e-3), "seeds": 5},
        ),
        Claim(
            text="On a language model it keeps at least 90 % of LoRA's gain over the untouched base.",
            inequality="dsee >= 0.9 lora",
            arms={
                "dsee": "dsee:r=4,alpha=16,n_sparse=64",
                "lora": "lora:r=4,alpha=16,target=[query,value]",
                "random": "dsee:r=4,alpha=16,n_sparse=64,support=random",
            },
            control={
                "what": "every next token dealt out anew within its block: there is nothing left to learn",
                "arm": "dsee:r=4,alpha=16,n_sparse=64",
                "labels": "shuffled",
                "inequality": "dsee > control + 0.5",
            },
            gate="lora > base + 1.0",
            base="embedded:pylm",
            data="embedded:python-tests",
            epochs=1,
            lr_factors=(10.0, 30.0, 100.0),
            train_rows=200,
            batch=16,
            max_length=128,
            full={"train_rows": 0, "batch": 0, "max_length": 0, "seeds": 5},
        ),
        Claim(
            text="Without a quarter of the heads and 40 % of the neurons it is within a point of the whole model.",
            inequality="dsee >= whole - 1.0",
            arms={
                "dsee": "dsee:r=4,alpha=16,n_sparse=64,heads=0.25,neurons=0.4",
                "whole": "dsee:r=4,alpha=16,n_sparse=64",
                "random-units": "dsee:r=4,alpha=16,n_sparse=64,heads=0.25,neurons=0.4,score=random",
            },
            control={
                "what": "heads and neurons removed at random: nothing chose what is left",
                "arm": "dsee:r=4,alpha=16,n_sparse=64,heads=0.25,neurons=0.4,score=random",
                "inequality": "dsee >= control",
            },
            gate="whole > majority + 10.0",
            epochs=5,
            lrs=(2e-3,),
            train_rows=600,
            batch=8,
            full={"train_rows": 0, "batch": 0, "max_length": 0, "lrs": (5e-4, 1e-3, 2e-3), "seeds": 5},
        ),
        Claim(
            text="With these heads and neurons removed at least 20 % of the FLOPs and 10 % of the time are saved.",
            measure="saved_work",
        ),
    ),
)
STRUCTURE = ("query", "key", "value", "out", "gate", "up", "down")


@dataclass(frozen=True, kw_only=True)
class Config:
    r: int = 16
    """rank of the low-rank update"""
    alpha: float = 32.0
    """numerator of the scaling alpha / r of both updates"""
    n_sparse: int = 64
    """trained entries of S in each matrix; 0: none"""
    support: str = "greedy"
    """where they stand: greedy (outliers of the decomposition), magnitude (largest |W|) or random"""
    target: str | tuple[str, ...] = ("query", "value")
    """roles that carry the updates"""
    heads: float = 0.0
    """share of each block's heads that is removed"""
    neurons: float = 0.0
    """share of each block's feed-forward neurons that is removed"""
    unstructured: float = 0.0
    """share of the single weights that becomes zero"""
    score: str = "update"
    """what decides: update (|B A + S| and |c|), magnitude (|W|) or random"""
    at: float = 0.5
    """share of the steps after which the base is pruned"""
    l1: float = 1e-4
    """weight of the sum of all |c| in the loss until then; 1e-4 as in EarlyBERT, whose coefficients these are"""
    head_width: int = 0
    """channels of a head, filled in from the base"""

    def __post_init__(self) -> None:
        roles = (self.target,) if isinstance(self.target, str) else tuple(self.target)
        object.__setattr__(self, "target", roles)
        if not set(roles) <= set(STRUCTURE):
            raise UsageError(f"dsee: target={list(roles)}; roles among {', '.join(STRUCTURE)} were expected.")
        if self.r < 1 or not self.alpha > 0 or self.n_sparse < 0 or self.l1 < 0:
            raise UsageError(f"dsee: r={self.r} >= 1, alpha={self.alpha} > 0, n_sparse={self.n_sparse} and l1 >= 0.")
        for name in ("heads", "neurons", "unstructured"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"dsee: {name}={getattr(self, name)}: a share from 0 to below 1 was expected.")
        if self.structured and self.unstructured:
            raise UsageError("dsee: give heads and neurons, or unstructured; not both.")
        if self.support not in ("greedy", "magnitude", "random") or self.score not in ("update", "magnitude", "random"):
            raise UsageError(f"dsee: support={self.support!r} or score={self.score!r} is unknown.")
        if not 0 < self.at < 1:
            raise UsageError(f"dsee: at={self.at}: a share between 0 and 1 was expected.")

    @property
    def structured(self) -> bool:
        """Whether heads or neurons are removed."""
        return self.heads > 0 or self.neurons > 0

    @property
    def scaling(self) -> float:
        """alpha / r."""
        return self.alpha / self.r


def pack(mask_mn: Tensor) -> Tensor:
    """Return a boolean mask as bits [m, ceil(n / 8)], uint8."""
    bits = F.pad(mask_mn.to(torch.uint8), (0, -mask_mn.shape[1] % 8)).view(len(mask_mn), -1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(-1, dtype=torch.uint8)


def unpack(bits: Tensor, n: int) -> Tensor:
    """Return the boolean mask [m, n] of `pack`."""
    shifted = bits[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (shifted & 1).view(len(bits), -1)[:, :n].bool()


def plan(config: Config, leaves: Sequence[Leaf], generator: torch.Generator) -> Plan:
    """Lay out the updates, coefficients, and what is kept; Refused where r or n_sparse does not fit a layer."""
    made = Plan()
    for leaf in leaves:
        n, m = leaf.in_features, leaf.out_features
        own: dict[str, Tensor] = {}
        fixed: dict[str, Tensor] = {}
        if leaf.role in config.target:
            if config.r > min(n, m) or config.n_sparse > n * m:
                raise Refused(
                    f"dsee: r={config.r} or n_sparse={config.n_sparse} exceeds layer {leaf.name} ({n} in, {m} out)."
                )
            own = {"a": torch.randn(config.r, n, generator=generator) * 0.02, "b": torch.zeros(m, config.r)}
            if config.n_sparse:
                # The places are found when training begins; a stored adapter brings its own.
                place_N = torch.randperm(n * m, generator=generator)[: config.n_sparse].sort().values
                own["values"] = torch.zeros(config.n_sparse)
                fixed |= {"rows": (place_N // n).int(), "cols": (place_N % n).int()}
        if config.structured:
            side = n if leaf.role in ("out", "down") else m
            fixed["kept"] = torch.arange(side, dtype=torch.int32)
            if leaf.role in ("out", "down"):
                own["scale"] = torch.ones(n // (config.head_width if leaf.role == "out" else 1))
        if config.unstructured:
            fixed["mask"] = pack(torch.ones(m, n, dtype=torch.bool))
        made.own[leaf.name], made.fixed[leaf.name] = own, fixed
    return made


def update(config: Config, part: Part) -> Tensor | None:
    """Return (alpha / r) (B A + S) [m, n], or None where the layer carries none."""
    if "a" not in part.tensors:
        return None
    with torch.autocast(part["a"].device.type, enabled=False):
        dense_mn = part["b"] @ part["a"]
    if "values" in part.tensors:
        dense_mn = dense_mn.index_put((part["rows"].long(), part["cols"].long()), part["values"], accumulate=True)
    return dense_mn * config.scaling


def _base(config: Config, part: Part) -> Tensor:
    """W * M with the coefficients on its columns, [m, n]."""
    w_mn = part.weight
    if "mask" in part.tensors:
        w_mn = w_mn * unpack(part["mask"], w_mn.shape[1])
    if "scale" in part.tensors:
        w_mn = w_mn * part["scale"].repeat_interleave(w_mn.shape[1] // len(part["scale"]))
    return w_mn


def weight(config: Config, part: Part) -> Tensor:
    """Return what the layer computes with, less W: [m, n] in float32 or wider."""
    wide = torch.promote_types(part.weight.dtype, torch.float32)
    changed_mn = _base(config, part).to(wide) - part.weight.to(wide)
    added_mn = update(config, part)
    return changed_mn if added_mn is None else changed_mn + added_mn


def whole(config: Config, part: Part, x: Tensor, bias: Tensor | None) -> Tensor:
    """Return the layer's output. S is N gathered products a token, not a dense matrix."""
    scaled = x
    if "scale" in part.tensors:
        # The product is rounded, not c, which stands close to 1.
        scaled = (x * part["scale"].repeat_interleave(x.shape[-1] // len(part["scale"]))).to(x.dtype)
    w_mn = part.weight
    if "mask" in part.tensors:
        w_mn = w_mn * unpack(part["mask"], w_mn.shape[1])
    y = F.linear(scaled, w_mn.to(x.dtype), bias)
    if "a" not in part.tensors:
        return y
    y = inject.low_rank(x, y, part["a"], part["b"], config.scaling)
    if "values" in part.tensors:
        picked_N = x.index_select(-1, part["cols"]) * (part["values"] * config.scaling).to(x.dtype)
        y = y.index_add(-1, part["rows"], picked_N.to(y.dtype))
    return y


class Pruner:
    """Chooses the support of S, prunes once, and knows what is left of each block."""

    def __init__(self, config: Config, layers: dict[str, BrickyardLinear], parts: list[Unit]) -> None:
        self.config, self.layers, self.parts = config, layers, parts
        self.slimmed = Slimmed()
        self.pruned = not (config.structured or config.unstructured)

    def coefficients(self) -> Sequence[Tensor]:
        """The coefficients c of all heads and neurons, while they are being judged."""
        held = [layer.get_parameter(f"brick_scale.{ADAPTER}") for layer in self.layers.values() if _has(layer, "scale")]
        return () if self.pruned else held

    def begin(self, state: State) -> None:
        """Find the places of S; a resumed run then loads its own."""
        if not self.config.n_sparse or self.config.support == "random":
            return
        generator = torch.Generator().manual_seed(state.training.seed)
        for layer in self.layers.values():
            if _has(layer, "a"):
                rows, cols = positions(
                    layer.base_weight().float().cpu(), self.config.n_sparse, self.config.support, generator
                )
                _box(layer, "rows")[ADAPTER].copy_(rows)
                _box(layer, "cols")[ADAPTER].copy_(cols)

    def after_step(self, state: State) -> None:
        """Prune when the time has come."""
        if not self.pruned and state.step + 1 >= math.ceil(self.config.at * state.total):
            self.prune(state.optimiser, torch.Generator().manual_seed(state.training.seed))

    def ready(self, state: State) -> bool:
        """Only weights of the pruned model may be kept as the best."""
        return self.pruned

    @torch.no_grad()
    def prune(self, optimiser: torch.optim.Optimizer | None, generator: torch.Generator) -> None:
        """Remove what scores lowest; Refused a second time, for shares are of the whole base."""
        if self.pruned:
            raise Refused("dsee: the base is pruned already, or nothing was to be removed; give the shares at once.")
        for unit in self.parts:
            share = self.config.heads if unit.kind == "heads" else self.config.neurons
            lost = math.floor(share * unit.count)
            if lost:
                score_U = self._score(unit, generator)
                kept = torch.sort(score_U, descending=True, stable=True).indices[: unit.count - lost].sort().values
                self.keep(unit, kept, optimiser)
        if self.config.unstructured:
            self._mask(generator)
        self.pruned = True

    def _score(self, unit: Unit, generator: torch.Generator) -> Tensor:
        if self.config.score == "random":
            return torch.rand(unit.count, generator=generator)
        if self.config.score == "update":
            return self.layers[unit.gate].get_parameter(f"brick_scale.{ADAPTER}").abs()
        w_mn = self.layers[unit.gate].base_weight().float()
        return w_mn.view(len(w_mn), unit.count, -1).square().sum((0, 2)).sqrt()

    def _mask(self, generator: torch.Generator) -> None:
        updated = [layer for layer in self.layers.values() if _has(layer, "a")]
        others = [layer for layer in self.layers.values() if not _has(layer, "a")]
        for group in (updated, others):
            scores = []
            for layer in group:
                w_mn = layer.base_weight().float()
                if self.config.score == "random":
                    w_mn = torch.rand(w_mn.shape, generator=generator)
                elif self.config.score == "update" and group is updated:
                    updated_mn = update(self.config, layer.part(ADAPTER))
                    assert updated_mn is not None
                    w_mn = updated_mn
                scores.append(w_mn.abs().flatten())
            total = sum(s.numel() for s in scores)
            masks = keep_best(scores, total - math.floor(self.config.unstructured * total)) if scores else []
            for layer, mask in zip(group, masks, strict=True):
                _box(layer, "mask")[ADAPTER].copy_(pack(mask.view(layer.base_weight().shape)))

    def keep(self, unit: Unit, kept: Tensor, optimiser: torch.optim.Optimizer | None) -> None:
        """Keep only the units `kept` of a block: in the base layers, and in what stands on them."""
        bases = {name: layer.get_base_layer() for name, layer in self.layers.items()}
        keep_units(self.slimmed, bases, unit, kept)
        for name, (side, _) in unit.layers.items():
            layer, index = self.layers[name], unit.index(name, kept)
            _follow(layer, side, index, optimiser)
            if name == unit.gate:
                scale = layer.get_parameter(f"brick_scale.{ADAPTER}")
                take(scale, 0, kept.to(scale.device), optimiser)

    def fit(self, stored: dict[str, Tensor]) -> None:
        """Remove what the stored tensors of a pruned model no longer have, before they are loaded."""
        for unit in self.parts:
            held = stored.get(f"model.{unit.gate}.brick_fixed_kept.{ADAPTER}")
            if held is None:
                return
            width = unit.layers[unit.gate][1]
            kept = held.long()[::width] // width
            here = len(_box(self.layers[unit.gate], "kept")[ADAPTER]) // width
            if len(kept) < here == unit.count and torch.equal(held.long(), unit.index(unit.gate, kept)):
                self.keep(unit, kept, None)
                self.pruned = True
        for name, layer in self.layers.items():
            at = f"model.{name}.brick_"
            if self.pruned and _has(layer, "values") and f"{at}values.{ADAPTER}" in stored:
                # What is left of S depends on its places, which are only now known.
                values = layer.get_parameter(f"brick_values.{ADAPTER}")
                # The file's tensors are on the CPU, wherever the model is.
                values.data = torch.zeros_like(stored[f"{at}values.{ADAPTER}"], device=values.device)
                for held in ("rows", "cols"):
                    known = stored[f"{at}fixed_{held}.{ADAPTER}"]
                    _box(layer, held)[ADAPTER] = torch.zeros_like(known, device=values.device)

    def state_dict(self) -> dict[str, Any]:
        """Whether the base has been pruned."""
        return {"pruned": self.pruned}

    def load_state_dict(self, kept: dict[str, Any]) -> None:
        """Take `state_dict` back."""
        self.pruned = kept["pruned"]


def _has(layer: BrickyardLinear, name: str) -> bool:
    return any(known == name for known, _ in layer.bound[ADAPTER].tensors)


def _box(layer: BrickyardLinear, name: str) -> Any:
    return getattr(layer, f"brick_fixed_{name}")


def _follow(layer: BrickyardLinear, side: str, index: Tensor, optimiser: torch.optim.Optimizer | None) -> None:
    """Cut the adapter's tensors of a layer to the outputs or inputs `index` that its base has left."""
    layer.in_features, layer.out_features = inject_sides(layer)
    box = _box(layer, "kept")
    index = index.to(box[ADAPTER].device)  # drawn or read on the CPU
    box[ADAPTER] = box[ADAPTER].index_select(0, index)
    if not _has(layer, "a"):
        return
    name, axis, places = ("b", 0, "rows") if side == OUTPUTS else ("a", 1, "cols")
    before = layer.get_parameter(f"brick_{name}.{ADAPTER}").shape[axis]
    take(layer.get_parameter(f"brick_{name}.{ADAPTER}"), axis, index, optimiser)
    if _has(layer, "values"):
        new = torch.full((before,), -1, dtype=torch.int32, device=index.device)
        new[index] = torch.arange(len(index), dtype=torch.int32, device=index.device)
        moved = new[_box(layer, places)[ADAPTER].long()]
        stay = (moved >= 0).nonzero()[:, 0]
        _box(layer, places)[ADAPTER] = moved
        for held in ("rows", "cols"):
            _box(layer, held)[ADAPTER] = _box(layer, held)[ADAPTER].index_select(0, stay)
        take(layer.get_parameter(f"brick_values.{ADAPTER}"), 0, stay, optimiser)


def inject_sides(layer: BrickyardLinear) -> tuple[int, int]:
    """Return (in_features, out_features) of the base layer as it is now."""
    m, n = layer.base_weight().shape
    return n, m


def check(config: Config, part: Part) -> None:
    """Raise BadBrick for places of S outside the layer."""
    if "values" in part.tensors:
        m, n = len(part["b"]), part["a"].shape[1]
        for name, most in (("rows", m), ("cols", n)):
            if ((part[name] < 0) | (part[name] >= most)).any():
                raise BadBrick(f"dsee: {name} of {part.leaf.name} in the file lie outside 0 .. {most - 1}.")


def attach(model: nn.Module, config: Config, task: Task) -> Attached:
    """Put DSEE on `model`, which carries the task's head; Refused where its heads or neurons cannot be removed.

    Raises UsageError where a share of them is less than one.
    """
    parts: list[Unit] = []
    target: tuple[str, ...] = config.target  # type: ignore[assignment]
    if config.structured:
        parts = units(model)
        _check_shares(config, parts)
        config = replace(config, head_width=next(u.layers[u.gate][1] for u in parts if u.kind == "heads"))
        target = tuple(sorted({name for unit in parts for name in unit.layers}))
    elif config.unstructured:
        target = (BLOCKS,)
    made = inject.attach(model, RECORD.name, config, task, target=target)
    tuner: Any = made.model.base_model
    pruner = Pruner(config, dict(tuner.layers()), parts)
    tuner.slimmed = {ADAPTER: pruner.slimmed}
    plain_load, plain_detach = made.load, made.detach

    def load(tensors: dict[str, Tensor]) -> None:
        pruner.fit({k.removeprefix("base_model.") + f".{ADAPTER}": t for k, t in tensors.items()})
        plain_load(tensors)

    def detach() -> nn.Module:
        pruner.slimmed.undo()
        return plain_detach()

    made.load, made.detach = load, detach
    made.callbacks = (*made.callbacks, pruner)
    if config.structured and config.l1:
        made.extra_loss = _penalty(config, pruner)
    return made


def _check_shares(config: Config, parts: Sequence[Unit]) -> None:
    """Raise UsageError where a share of a block's heads or neurons is less than one of them."""
    for unit in parts:
        share = config.heads if unit.kind == "heads" else config.neurons
        if share and math.floor(share * unit.count) == 0:
            raise UsageError(
                f"dsee: {unit.kind}={share:g} of the {unit.count} {unit.kind} of block {unit.block} is less than one, "
                f"so none would be removed; give at least {math.ceil(1000 / unit.count) / 1000:g}, or leave it out."
            )


def _penalty(config: Config, pruner: Pruner) -> Callable[[], Tensor]:
    def penalty() -> Tensor:
        held = pruner.coefficients()
        # A mean would pull each of a model's ten thousand coefficients by a ten-thousandth, which moves none.
        return config.l1 * torch.cat(tuple(held)).abs().sum() if held else torch.zeros(())

    return penalty
