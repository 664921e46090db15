"""Bricks that nobody put in, groups of neurons found by what they serve; and how far two bricks are in conflict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from brickyard.audit import _neurons as neurons
from brickyard.audit._prompts import halves
from brickyard.audit.configurable_bricks import (
    Config,
    Scored,
    chance_overlap,
    highest,
    kept,
    model_of,
    overlaps,
    scored,
)
from brickyard.core import brick as bricks
from brickyard.core.arm import parse
from brickyard.core.base import open_base
from brickyard.core.build import build, resolve
from brickyard.core.data import read_data
from brickyard.core.errors import Refused, UsageError
from brickyard.core.ffn import FFN, by_keys, check_divides, every_ffn
from brickyard.core.forwards import evaluating
from brickyard.core.measure import environment
from brickyard.core.retention import fixed_inputs, inner
from brickyard.core.task import Task
from brickyard.merge._inputs import PIECE, Files, Source
from brickyard.merging.inputs import Ground, open_ground, open_inputs

KIND, ARM = "neuron group", "neuron-group"
_CAUSAL = Task("causal-lm", "bits_per_byte", None, 1, "text")


def find(
    base: str,
    data: Any,
    out: str | Path,
    *,
    share: float = Config.share,
    clusters: int = 0,
    prompts: int = Config.prompts,
    tokens: int = Config.tokens,
    seed: int = 0,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> list[dict[str, Any]]:
    """Write one brick a capability, OUT/NAME: the neurons that serve it, which the base loses with the brick on it.

    Args:
        base: a language model.
        data: rows of text and label (the capability).
        out: a new folder.
        share: of each layer's neurons that make a group, those with the highest average precision.
        clusters: 0, or into how many groups of like keys each layer is split; then whole groups are taken, by the mean
            average precision of their neurons.
        prompts, tokens, seed: as of the audit configurable-bricks, whose scores these are.

    Returns [{"capability", "folder", "neurons", "of", "precision": on the prompts that chose them,
    "precision_held_out": on others, "base_rate", "bytes"}]. Raises as the audit does, and UsageError where OUT is not
    empty.
    """
    config = Config(share=share, clusters=clusters, prompts=prompts, tokens=tokens, seed=seed)
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty; give a new folder with --out.")
    opened = open_base(base, trust_remote_code=trust_remote_code)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = model_of(opened, None).to(place)
    known_data = read_data(data, need=())
    half_a, half_b, names, report = halves(opened, known_data, config.prompts, config.tokens, config.seed)
    ffns = every_ffn(model, ARM)
    known, again = (scored(model, ffns, half, len(names), config.pool) for half in (half_a, half_b))
    set_LCF = known.sets(share) if not clusters else _clustered(ffns, known, clusters, share)
    first, held_out = kept(known, set_LCF)[0], kept(again, set_LCF)[0]
    plan = resolve(parse(ARM), _CAUSAL)
    attached = build(plan, opened, _CAUSAL, seed=0)
    rows, places = [], [_plain(name) for name in names]
    for c, name in enumerate(names):
        place_of = places[c] if places.count(places[c]) == 1 else f"{places[c]}-{c}"
        attached.load({key: x[c] for key, x in zip(attached.tensors(), set_LCF, strict=True)})
        count = {ffn.block: int(x[c].sum()) for ffn, x in zip(ffns, set_LCF, strict=True)}
        about = {
            "kind": KIND,
            "data": {"name": known_data.name, "fingerprint": known_data.fingerprint, "rows": len(half_a)},
            "environment": environment(),
            "receipt": {"matched": attached.matched, "trainable_parameters": 0},
            "scores": {},
            "parents": [],
            "found": {
                "capability": name,
                "share": share,
                "clusters": clusters,
                "neurons": count,
                "precision": first[c],
                "precision_held_out": held_out[c],
                "base_rate": 1 / len(names),
                "prompts": report,
                "seed": seed,
            },
        }
        made = bricks.save(folder / place_of, attached, plan, opened, _CAUSAL, seed=0, about=about)
        rows.append(
            {
                "capability": name,
                "folder": str(made.folder),
                "neurons": sum(count.values()),
                "of": sum(ffn.neurons for ffn in ffns),
                "precision": first[c],
                "precision_held_out": held_out[c],
                "base_rate": 1 / len(names),
                "bytes": made.bytes,
            }
        )
    return rows


def _plain(name: str) -> str:
    """A capability's name as that of a folder."""
    return "".join(sign if sign.isalnum() or sign in "-_." else "-" for sign in name).strip(".") or "group"


def _clustered(ffns: Sequence[FFN], known: Scored, clusters: int, share: float) -> list[Tensor]:
    """Take whole clusters of like keys, as many as the share asks for, by their neurons' mean average precision."""
    out = []
    for ffn, ap_CF in zip(ffns, known.precision, strict=True):
        check_divides(ffn, clusters, ARM)
        split = by_keys(ffn.keys_FD, clusters)[0]
        mean_CN = ap_CF @ split.members(ap_CF).T / split.size
        out.append(highest(mean_CN, share)[:, split.labels_F])
    return out


def conflict(
    base: str,
    one: str | Path,
    other: str | Path,
    *,
    share: float = Config.share,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Return how far two bricks of one base get in each other's way, in the weights and in what the neurons do.

    "both": share of all weights that both change; "sign": of those, the share that they move in opposite directions;
    "cosine": of their whole changes; "moved": the overlap |A and B| / |A or B| of the `share` of each layer's neurons
    whose contribution |da_j| |W_down[:, j]| each brick moves most, on fixed probe texts, and "moved_chance"; "states":
    the cosine of what they do to the last states. None where a brick moves nothing there. Raises as `merge` does where
    a brick is no change of this base's weights.
    """
    ground = open_ground(base, trust_remote_code=trust_remote_code)
    a, b = open_inputs([str(one), str(other)], ground, mixed=True, force=False)
    if "adapter" in (a.kind, b.kind):
        raise Refused("conflict is measured between bricks or checkpoints; merge a plain adapter into its base first.")
    out = _weights(ground, a.source, b.source)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    before = _activity(ground.opened.backbone(), ground, place)
    after = [_activity(_with(ground, path), ground, place) for path in (one, other)]
    norms = [neurons.down_norms(ffn) for ffn in every_ffn(ground.opened.backbone(), ARM)]
    sets = []
    for place_L, norm_F in enumerate(norms):
        moved = [(found[0][place_L] - before[0][place_L]).abs().mean(0).double() * norm_F for found in after]
        sets.append(highest(torch.stack(moved), share))
    states = [(found[1] - before[1]).flatten().double() for found in after]
    out["moved"] = float(overlaps(sets)[0, 1])
    out["moved_chance"] = chance_overlap(sets)
    out["states"] = _cosine(float(states[0] @ states[1]), float(states[0] @ states[0]), float(states[1] @ states[1]))
    return out


def _cosine(dot: float, one: float, other: float) -> float | None:
    return dot / math.sqrt(one * other) if one > 0 and other > 0 else None


def _weights(ground: Ground, one: Source, other: Source) -> dict[str, Any]:
    """Read both changes piece by piece and keep sums only."""
    files, raw = Files(), torch.empty(8 * PIECE, dtype=torch.uint8)
    dot = square_a = square_b = 0.0
    both = against = total = 0
    try:
        for name, (_, info) in ground.stored.places.items():
            total += info.elements
            if name not in one and name not in other:
                continue
            for start in range(0, info.elements, PIECE):
                count = min(PIECE, info.elements - start)
                base_n, a_n, b_n = torch.empty(count), torch.zeros(count), torch.zeros(count)
                ground.stored.weights(files, name, start, base_n, raw)
                for source, change_n in ((one, a_n), (other, b_n)):
                    if name in source:
                        source.read(files, name, start, base_n, change_n, raw, change=True)
                square_a += float(a_n.double().square().sum())
                square_b += float(b_n.double().square().sum())
                dot += float((a_n.double() * b_n.double()).sum())
                moved = (a_n != 0) & (b_n != 0)
                both += int(moved.sum())
                against += int((moved & ((a_n > 0) != (b_n > 0))).sum())
    finally:
        files.close()
    return {
        "both": both / total,
        "sign": against / both if both else None,
        "cosine": _cosine(dot, square_a, square_b),
    }


def _with(ground: Ground, path: str | Path) -> nn.Module:
    """The backbone with a brick on it, or that of a checkpoint."""
    if (Path(path) / bricks.MANIFEST).is_file():
        return inner(bricks.load(path).apply(ground.opened).model)
    return open_base(str(path)).backbone()


@torch.no_grad()
def _activity(model: nn.Module, ground: Ground, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Return what enters the last layer of every network on the probe texts, [tokens, F], and the last states."""
    model = model.to(device)
    ffns, seen = every_ffn(model, ARM), {}

    def see(place: int, layer: nn.Module, a_BTF: Tensor) -> None:
        seen[place] = a_BTF.float().flatten(0, 1).cpu()

    inputs = {name: x.to(device) for name, x in fixed_inputs(ground.opened, 8).items()}
    with evaluating(model), neurons.reading(ffns, see):
        states = model(**inputs).last_hidden_state.float().cpu()
    mask = inputs.get("attention_mask")
    real = torch.ones(states.shape[:2], dtype=torch.bool) if mask is None else mask.cpu().bool()
    flat = real.flatten()
    return [seen[place][flat] for place in range(len(ffns))], states[real]
