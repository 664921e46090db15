"""The claims of `one-byte`: what travels, that replicas stay the same, and what a byte costs in quality."""

from __future__ import annotations

import io
import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.stats import t as student
from torch import Tensor
from torch.nn import functional as F

from brickyard.checks._federation import alone, network, shard_loss, together
from brickyard.core.files import write_tensors
from brickyard.core.method import Claim
from brickyard.distribute.one_byte import Config, Log, Member, fingerprint, replay, trainable
from brickyard.embedded import digits

WIDTHS = (64, 32, 10)  # 2,410 parameters
PLAIN: dict[str, Any] = {"lr": 8e-3, "estimates": 16, "hash_every": 0}
MEMBERS = 4
SHIFT = 0.03


def wire(claim: Claim, *, rounds: int = 50) -> dict[str, Any]:
    """Count what four members hand to collectives a round, and read off their sockets what left the process.

    Control: the same socket counter on an all-reduce of gradients must see the 4 d bytes that it sends.
    """
    with tempfile.TemporaryDirectory(prefix="brickyard-one-byte-") as place:
        folder = Path(place)
        data = write_digits(folder)
        ours = together([_asked(data, folder / f"{i}.zolog", rounds) for i in range(MEMBERS)], folder)
        theirs = together([{**_asked(data, folder, rounds), "all_reduce": True} for _ in range(MEMBERS)], folder)
    n, d = PLAIN["estimates"], ours[0]["numbers"]
    share = n // MEMBERS
    right = all(report["payload"] == rounds * share for report in ours)
    sent = sum(report["socket"]["sent"] for report in ours) / rounds
    reduced = sum(report["socket"]["sent"] for report in theirs) / rounds
    return {
        "inequality": f"payload = {share} bytes a member and round, 1 an estimate",
        "holds": right,
        "measured": ours[0]["payload"] / (rounds * share),
        "low": ours[0]["payload"] / (rounds * share),
        "high": ours[0]["payload"] / (rounds * share),
        "detail": (
            f"payload {ours[0]['payload'] / rounds:g} bytes a member and round for {share} estimates (counted), "
            f"all-reduce of gradients {4 * d:,} (counted; ratio {4 * d / share:,.0f}); at the sockets of all "
            f"{MEMBERS} members {sent:,.0f} bytes a round against {reduced:,.0f} (measured, TCP streams on loopback)"
        ),
        "gate": None,
        "control": {
            "what": "an all-reduce of gradients under the same counter of sockets",
            "inequality": "bytes at the sockets a round >= 4 d",
            "measured": reduced,
            "low": reduced,
            "high": reduced,
            "destroyed": reduced >= 4 * d,
        },
    }


def replicas(claim: Claim, *, rounds: int = 40) -> dict[str, Any]:
    """Compare four members after every round with each other, with one machine alone, and with a replay of the log.

    Control: weights of one member, moved by one unit in the last place, must be found.
    """
    with tempfile.TemporaryDirectory(prefix="brickyard-one-byte-") as place:
        folder = Path(place)
        data = write_digits(folder)
        found = {}
        for codec in ("byte", "f32"):
            changes = {"config": {**PLAIN, "codec": codec}, "hashes": True}
            one = alone({**_asked(data, folder / f"{codec}-alone.zolog", rounds), **changes})
            four = together(
                [{**_asked(data, folder / f"{codec}-{i}.zolog", rounds), **changes} for i in range(MEMBERS)], folder
            )
            again = trainable(network(WIDTHS, 0))
            replay(again, Log(folder / f"{codec}-1.zolog"))
            found[codec] = {
                "after every round": all(report["hashes"] == one["hashes"] for report in four),
                "replay": fingerprint(again) == one["hash"],
                "learned": one["hash"] != fingerprint(trainable(network(WIDTHS, 0))),
            }
        noticing = {"config": {**PLAIN, "hash_every": 5}}
        nudged = [{**_asked(data, folder / f"nudged-{i}.zolog", 10), **noticing} for i in range(MEMBERS)]
        nudged[2]["nudge"] = 3
        noticed = [report.get("error") == "ParityBroken" for report in together(nudged, folder)]
    failed = [f"{codec}: {what}" for codec, parts in found.items() for what, ok in parts.items() if not ok]
    return {
        "inequality": "replicas that differ = 0",
        "holds": not failed,
        "measured": len(failed),
        "low": len(failed),
        "high": len(failed),
        "detail": (
            f"{MEMBERS} processes, one alone and a replay without data, {rounds} rounds, byte and f32: "
            + ("; ".join(failed) or "equal bit for bit after every round")
        ),
        "gate": None,
        "control": {
            "what": "one layer of one member moved by a unit in the last place",
            "inequality": "every member stops",
            "measured": sum(noticed),
            "low": sum(noticed),
            "high": sum(noticed),
            "destroyed": all(noticed),
        },
    }


def quality(claim: Claim, *, rounds: int = 300) -> dict[str, Any]:
    """Train with the byte and with float32 scalars on the same estimates, seed by seed; one machine stands for all.

    Gate: with float32 the loss falls by 30 %. Control: with the signs of the scalars drawn at random, so that as many
    bytes of the same sizes travel, it must not.
    """
    losses: dict[str, list[float]] = {"start": [], "byte": [], "f32": [], "random signs": []}
    with tempfile.TemporaryDirectory(prefix="brickyard-one-byte-") as place:
        folder = Path(place)
        data = digits_tensors()
        for seed, name in itertools.product(range(1, claim.seeds + 1), losses):
            if name == "random signs" and seed > (claim.control_seeds or claim.seeds):
                continue
            model = network(WIDTHS, seed)
            if name != "start":
                config = Config(**{**PLAIN, "codec": "f32" if name == "f32" else "byte"})
                worker = Member(trainable(model), config, seed=seed, log=folder / f"{name}-{seed}.zolog", model=model)
                loss = shard_loss(model, data, seed, config.estimates)
                for _ in range(rounds):
                    worker.round(_signed(loss, seed) if name == "random signs" else loss)
            with torch.no_grad():
                losses[name].append(float(F.cross_entropy(model(data["test_x"]), data["test_labels"])))
    logs_S = np.log(np.array(losses["byte"]) / np.array(losses["f32"]))
    reach = student.ppf(0.975, claim.seeds - 1) * logs_S.std(ddof=1) / np.sqrt(claim.seeds)
    shift, low, high = (float(np.expm1(logs_S.mean() + x)) for x in (0.0, -reach, reach))
    means = {name: float(np.mean(values)) for name, values in losses.items()}
    if low > SHIFT or high < -SHIFT:
        holds: Any = False
    else:
        holds = True if low >= -SHIFT and high <= SHIFT else "undecided"
    learns = means["f32"] <= 0.5 * means["start"]
    if not learns:
        holds = "set-up invalid"
    return {
        "inequality": f"|byte / f32 - 1| <= {100 * SHIFT:g} %",
        "holds": holds,
        "measured": 100 * shift,
        "low": 100 * low,
        "high": 100 * high,
        "arms": {name: {"mean": means[name], "per_seed": values} for name, values in losses.items()},
        "detail": (
            f"final test loss with the byte {means['byte']:.3f}, with float32 scalars {means['f32']:.3f} "
            f"({100 * shift:+.1f} %, {100 * low:+.1f} to {100 * high:+.1f}, {claim.seeds} seeds), untrained "
            f"{means['start']:.3f}; digits, {rounds} rounds of {PLAIN['estimates']} estimates"
        ),
        "gate": {"inequality": "f32 <= 0.5 untrained", "measured": means["f32"] / means["start"], "holds": learns},
        "control": {
            "what": "the signs of the scalars drawn at random",
            "inequality": "loss > 0.9 untrained",
            "measured": means["random signs"],
            "low": min(losses["random signs"]),
            "high": max(losses["random signs"]),
            "destroyed": means["random signs"] > 0.9 * means["start"],
        },
    }


def digits_tensors() -> dict[str, Tensor]:
    """Return the embedded digits with their labels: x [rows, 64] in [-1, 1] of train, test_x of test."""
    out: dict[str, Tensor] = {}
    for split, prefix in (("train", ""), ("test", "test_")):
        rows = digits.splits()[split]
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in rows["image"]])
        out[f"{prefix}x"] = torch.from_numpy(pixels.reshape(len(pixels), -1)).float() / 127.5 - 1
        out[f"{prefix}labels"] = torch.tensor(rows["label"])
    return out


def write_digits(folder: Path) -> str:
    """Write the digits where processes of a run can read them; return the path."""
    path = folder / "digits.safetensors"
    write_tensors(path, digits_tensors())
    return str(path)


def _asked(data: str, log: Path, rounds: int) -> dict[str, Any]:
    return {"data": data, "log": str(log), "widths": WIDTHS, "base": 0, "config": PLAIN, "seed": 1, "rounds": rounds}


def _signed(loss: Any, seed: int) -> Any:
    """Return a loss whose sign is drawn for each estimate, so that its slope keeps its size only."""

    def signed(t: int, j: int) -> Tensor:
        g = torch.Generator().manual_seed((seed * 10_007 + t) * 1_009 + j)
        return loss(t, j) * (1 if torch.rand((), generator=g) < 0.5 else -1)

    return signed
