"""Hybrid networks, in each of which one part trains, the shards that they leave, and the whole made of the shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from brickyard.core.attached import Attached, attach_in_place, copy_into
from brickyard.core.errors import BadBrick, ParityBroken, Refused
from brickyard.core.files import read_tensors, write_tensors
from brickyard.core.forwards import evaluating
from brickyard.core.prefix import keep_at_rest
from brickyard.core.receipt import assert_effect, receipt, snapshot
from brickyard.grow._assembling_plan import META, Plan, tensors_of

FORMAT = "model-assembling 1"
Trainer = Callable[[Attached], Mapping[str, Any]]  # trains what is attached; what it returns, JSON-like, is kept


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors: names, shapes and values."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


@dataclass(frozen=True)
class Shard:
    """What one phase leaves in one file: a part's tensors by the target's names, or the meta network's by its own.

    Attributes:
        plan: digest of the plan.
        part: from 1, or 0 for the meta network.
        meta: digest of the meta network's tensors; a part was trained within that network.
        tensors: on the CPU.
        identity: what decided the training (settings, data, code).
        report: what it took and did.
    """

    plan: str
    part: int
    meta: str
    tensors: dict[str, Tensor] = field(repr=False)
    identity: dict[str, Any] = field(default_factory=dict, repr=False)
    report: dict[str, Any] = field(default_factory=dict, repr=False)

    def write(self, path: Path) -> None:
        """Write the file, complete or not at all. Raises NotFinite, DiskFull."""
        known = {name: value for name, value in asdict(replace(self, tensors={})).items() if name != "tensors"}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, self.tensors, {"format": FORMAT, "shard": json.dumps(known, sort_keys=True, default=str)})

    @classmethod
    def read(cls, path: str | Path) -> Shard:
        """Read a file that `write` left. Raises UnsafeFile for a damaged file, BadBrick for another kind of file."""
        tensors = read_tensors(path)
        with safe_open(str(path), framework="pt") as file:
            said = file.metadata() or {}
        if said.get("format") != FORMAT:
            raise BadBrick(f"{path} is no shard of model-assembling; give the files that train_part wrote.")
        known = json.loads(said["shard"])
        return cls(known["plan"], known["part"], known["meta"], tensors, known["identity"], known["report"])


def meta(plan: Plan, *, seed: int = 0) -> nn.Module:
    """Return the meta network with new weights: `meta_depth` blocks a part between the target's stem and head."""
    return plan.build(plan.sources(), seed=plan.seed(seed))


def meta_shard(
    plan: Plan, model: nn.Module, *, identity: Mapping[str, Any] | None = None, report: Mapping[str, Any] | None = None
) -> Shard:
    """Return a trained meta network as what `train_part` takes, and what can be written for other machines."""
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors_of(model).items()}
    return Shard(plan.digest, META, digest_of(tensors), tensors, dict(identity or {}), dict(report or {}))


@dataclass(frozen=True, eq=False)
class Hybrid:
    """The network in which one part trains between stand-ins: m_K ... m_{i+1} M_i m_{i-1} ... m_1.

    `own` maps its tensors that are the part's to the target's names, `held` those that are the meta network's to its
    names; every tensor is one or the other. `carried` of the latter go into this part's shard all the same, as nobody
    else has them. `resting` are the modules held in evaluation mode.
    """

    model: nn.Module
    part: int
    own: dict[str, str]
    held: dict[str, str]
    carried: tuple[str, ...]
    resting: list[nn.Module]

    def attached(self) -> Attached:
        """Return the model ready to train: the part's parameters, and no others, train."""
        trained = [name for name, _ in self.model.named_parameters() if name in self.own]
        flat = [name for name, p in self.model.named_parameters() if p.ndim < 2]
        return attach_in_place(self.model, trained, matched={f"part {self.part}": trained}, no_decay=flat)

    def shard(self) -> dict[str, Tensor]:
        """Return the part's tensors by the target's names."""
        live = tensors_of(self.model)
        named = {**self.own, **{name: name for name in self.carried}}
        return {target: live[name].detach().cpu().clone() for name, target in named.items()}

    def assert_held(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise ParityBroken unless what is the meta network's is bit for bit what `tensors` say."""
        live = tensors_of(self.model)
        moved = [name for name, source in self.held.items() if not torch.equal(live[name].cpu(), tensors[source])]
        if moved:
            raise ParityBroken(
                f"{moved[0]} and {len(moved) - 1} more tensors of the frozen meta network changed while part "
                f"{self.part} trained; the parts would no longer fit each other. Was something else trained along?"
            )


def hybrid(
    plan: Plan,
    part: int,
    tensors: Mapping[str, Tensor],
    *,
    seed: int = 0,
    begin: Mapping[str, Tensor] | None = None,
) -> Hybrid:
    """Return hybrid `part`: its own blocks new, drawn from `seed` and its number; all else the meta network's.

    `begin` holds other values for what is its own to begin at, by the target's names. With part 1 goes the stem, with
    part K the head; what is shared comes from the meta network in every hybrid. The meta network's modules are held in
    evaluation mode, so that a part meets the same neighbours in every step.
    """
    slots = plan.own_slots(part)
    model = plan.build(plan.sources(part), seed=plan.seed(seed, part))
    first, shift = plan.blocks(part)[0] - slots[0], plan.meta_depth - len(slots)
    mine = set(plan.outside(part)) - set(plan.shared)
    own: dict[str, str] = {}
    held: dict[str, str] = {}
    for name in tensors_of(model):
        inside = name.removeprefix(f"{plan.path}.") if name.startswith(f"{plan.path}.") else ""
        number, _, rest = inside.partition(".")
        if not inside:
            (own if name in mine else held)[name] = name
        elif int(number) in slots:
            own[name] = f"{plan.path}.{int(number) + first}.{rest}"
        else:
            behind = int(number) >= slots.stop
            held[name] = f"{plan.path}.{int(number) + (shift if behind else 0)}.{rest}"
    live = tensors_of(model)
    copy_into({n: live[n] for n in held}, {n: tensors[source] for n, source in held.items()}, f"hybrid {part}")
    if begin is not None:
        copy_into({own[n]: live[n] for n in own}, dict(begin), f"part {part}")
    resting = _resting(plan, part, model, own)
    if resting:
        keep_at_rest(model, resting)
    return Hybrid(model, part, own, held, plan.shared if part == 1 else (), resting)


def _resting(plan: Plan, part: int, model: nn.Module, own: Mapping[str, str]) -> list[nn.Module]:
    """The topmost modules of a hybrid in which nothing is the part's own."""
    # Dropout and the like have no tensors to tell whose they are; when they run tells it.
    alien = {*(plan.early if part != 1 else ()), *(plan.late if part != plan.parts else ())}

    def walk(module: nn.Module, name: str) -> list[nn.Module]:
        start = f"{name}." if name else ""
        if not any(True for _ in module.parameters()) and not any(True for _ in module.buffers()):
            return [module] if name in alien else []
        if start and name != plan.path and not any(key.startswith(start) for key in own):
            return [module] if any(True for _ in module.parameters()) or name in alien else []
        return [found for child_name, child in module.named_children() for found in walk(child, start + child_name)]

    return walk(model, "")


def train_part(
    plan: Plan,
    part: int,
    meta: Shard,
    trainer: Trainer,
    out: str | Path,
    *,
    seed: int = 0,
    identity: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    begin: Mapping[str, Tensor] | None = None,
) -> Shard:
    """Train one part inside the meta network and leave it as one shard; it needs nothing of the other parts.

    Args:
        plan: the same plan on every machine.
        part: 1 to K.
        meta: the trained meta network (`meta_shard`, or `Shard.read` of its file).
        trainer: trains an `Attached`: our loop, or transformers' Trainer on its `.model`.
        out: the shard's file.
        seed: of the part's initial weights; together with `part` it decides them.
        identity: kept in the shard.
        device: where the hybrid lies while it trains.
        begin: where the part begins in place of random weights, by the target's names.

    Raises:
        Refused: a meta network of another plan.
        ParityBroken: the frozen neighbours changed.
        NoEffect: nothing of the part moved.
    """
    if meta.part != META or meta.plan != plan.digest:
        raise Refused(
            f"part {part} was given {'a part' if meta.part != META else 'the meta network of another plan'} "
            f"({meta.plan[:12]}, expected {plan.digest[:12]}); give the meta network of this plan."
        )
    made = hybrid(plan, part, meta.tensors, seed=seed, begin=begin)
    made.model.to(device)
    attached = made.attached()
    before = snapshot(made.model)
    report = dict(trainer(attached))
    proof = receipt(before, made.model, attached)
    assert_effect(proof)
    made.assert_held(meta.tensors)
    moved = {"moved": len(proof["moved"]), "unmoved": proof["unmoved"]}
    shard = Shard(plan.digest, part, meta.meta, made.shard(), dict(identity or {}), {**report, "tensors": moved})
    shard.write(Path(out))
    return shard


def assemble(plan: Plan, shards: Sequence[Shard | str | Path], *, same_meta: bool = True) -> nn.Module:
    """Return the target made of the shards of all parts, in any order; every tensor is filled once.

    Args:
        same_meta: refuse parts that were trained within different meta networks, as they do not fit each other.

    Raises:
        Refused: a shard of another plan, of another meta network, a part twice, or one that is missing.
        BadBrick: a shard that lacks tensors of its part, or has others.
    """
    found: dict[int, Shard] = {}
    for given in shards:
        shard = given if isinstance(given, Shard) else Shard.read(given)
        if shard.plan != plan.digest:
            raise Refused(
                f"the shard of part {shard.part} was made by another plan ({shard.plan[:12]}, this one is "
                f"{plan.digest[:12]}): another architecture, cut or meta network. Train it again by this plan."
            )
        if shard.part in found or not 1 <= shard.part <= plan.parts:
            what = "stands twice among the shards" if shard.part in found else "is not one of the plan's"
            raise Refused(f"part {shard.part} {what}; give the shards of the parts 1 to {plan.parts}, once each.")
        found[shard.part] = shard
    missing = sorted(set(range(1, plan.parts + 1)) - set(found))
    if missing:
        raise Refused(f"the shard of part {missing[0]} is missing ({len(found)} of {plan.parts} were given).")
    if same_meta and len({shard.meta for shard in found.values()}) > 1:
        raise Refused(
            "the parts were trained within different meta networks, so they do not fit each other; train them within "
            "one, or say same_meta=False."
        )
    model = plan.target(0)
    live = tensors_of(model)
    for part, shard in found.items():
        copy_into({name: live[name] for name in plan.names(part)}, shard.tensors, f"part {part}")
    return model


@torch.no_grad()
def statistics(model: nn.Module, path: str, ends: Sequence[int], batch: Mapping[str, Any]) -> list[dict[str, float]]:
    """Return mean and standard deviation of the states [B, T, D] behind the blocks `ends`, without padding.

    A part must hand on what its neighbours learned to read, so these should be near the meta network's.
    """
    seen: dict[int, Tensor] = {}

    def keep(end: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            seen[end] = (output if isinstance(output, Tensor) else output[0]).float()

        return hook

    handles = [model.get_submodule(f"{path}.{end}").register_forward_hook(keep(end)) for end in ends]
    try:
        with evaluating(model):
            model(**{name: value for name, value in batch.items() if name != "labels"})
    finally:
        for handle in handles:
            handle.remove()
    mask = batch.get("attention_mask")
    out = []
    for end in ends:
        state = seen[end]
        fits = mask is not None and mask.shape == state.shape[:2]
        chosen = state[mask.bool()] if fits else state  # type: ignore[union-attr]
        out.append({"mean": float(chosen.mean()), "std": float(chosen.std())})
    return out


def ends(plan: Plan, *, stand_ins: bool = False) -> list[int]:
    """Return the last block of every part, in the target or (`stand_ins`) in the meta network."""
    if stand_ins:
        return [j * plan.meta_depth - 1 for j in range(1, plan.parts + 1)]
    return [plan.blocks(j)[-1] for j in range(1, plan.parts + 1)]
