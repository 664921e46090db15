"""Exact checkpoints of a training run: tensors, optimiser, generators and position, complete or absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from brickyard.core.errors import BadBrick, Changed
from brickyard.core.files import complete_folder, read_tensors, sha256, write_json, write_tensors

if TYPE_CHECKING:
    from brickyard.core.loop import State, Step


def differences(old: Any, new: Any, at: str = "") -> dict[str, tuple[Any, Any]]:
    """Return {dotted key: (old, new)} of two nested dictionaries."""
    if isinstance(old, dict) and isinstance(new, dict):
        out = {}
        for key in sorted(old.keys() | new.keys()):
            out.update(differences(old.get(key), new.get(key), f"{at}.{key}" if at else key))
        return out
    return {} if old == new else {at: (old, new)}


def same_or_refuse(old: dict[str, Any], new: dict[str, Any], allow: Sequence[str], where: str) -> dict[str, Any]:
    """Raise Changed with the list of differences unless each is allowed by name; return those that were allowed."""
    changed = differences(old, new)
    refused = {k: v for k, v in changed.items() if not any(k == a or k.startswith(a + ".") for a in allow)}
    if refused:
        lines = "; ".join(f"{k}: was {a!r}, now {b!r}" for k, (a, b) in refused.items())
        raise Changed(
            f"{where} was made with other settings ({lines}). Use another --out, or allow it: "
            + " ".join(f"--allow-change {k}" for k in refused)
        )
    return {k: {"was": a, "now": b} for k, (a, b) in changed.items()}


class Checkpoints:
    """The checkpoints of one run in one folder; only the newest complete one is kept."""

    def __init__(self, folder: Path | None, identity: dict[str, Any], allow_change: Sequence[str] = ()) -> None:
        self.folder, self.identity, self.allow = folder, identity, allow_change

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint, or None."""
        if self.folder is None or not self.folder.is_dir():
            return None
        complete = [p for p in self.folder.glob("step-*") if (p / "state.json").is_file()]
        return max(complete, key=lambda p: int(p.name.removeprefix("step-")), default=None)

    def save(self, state: State, step: Step) -> None:
        """Write the present state; earlier checkpoints go only after the new one stands."""
        if self.folder is None:
            return
        tensors: dict[str, Tensor] = {f"model:{k}": v for k, v in state.attached.tensors().items()}
        tensors |= {f"step:{k}": v for k, v in step.state_dict().items()}
        tensors |= {f"best:{k}": v for k, v in (state.best_tensors or {}).items()}
        tensors["generator:cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors |= {f"generator:cuda{i}": g for i, g in enumerate(torch.cuda.get_rng_state_all())}
        callbacks: list[Any] = []
        for i, callback in enumerate(state.hooks.callbacks if state.hooks else []):
            kept = callback.state_dict() if hasattr(callback, "state_dict") else {}
            tensors |= {f"callback{i}:{k}": v for k, v in kept.items() if isinstance(v, Tensor)}
            callbacks.append({k: v for k, v in kept.items() if not isinstance(v, Tensor)})
        target = self.folder / f"step-{state.step}"
        with complete_folder(target) as temporary:
            write_tensors(temporary / "tensors.safetensors", {k: v.contiguous() for k, v in tensors.items()})
            known = {
                "step": state.step,
                "examples": state.examples,
                "losses": state.losses,
                "history": state.history,
                "best": state.best,
                "waited": state.waited,
                "seconds": state.elapsed(),
                "callbacks": callbacks,
                "identity": self.identity,
                "sha256": sha256(temporary / "tensors.safetensors"),
            }
            write_json(temporary / "state.json", known)
        for old in self.folder.glob("step-*"):
            if old != target:
                shutil.rmtree(old, ignore_errors=True)

    def resume(self, state: State, step: Step) -> bool:
        """Load the newest complete checkpoint into `state`; return whether there was one."""
        latest = self.latest()
        if latest is None:
            return False
        known = json.loads((latest / "state.json").read_text(encoding="utf-8"))
        now = json.loads(json.dumps(self.identity))
        same_or_refuse(known["identity"], now, self.allow, str(latest))
        tensors = read_tensors(latest / "tensors.safetensors", expect_sha256=known["sha256"])
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, key = name.partition(":")
            parts.setdefault(part, {})[key] = tensor
        if "generator" not in parts:
            raise BadBrick(f"{latest} holds no generator state; delete the folder to start again.")
        for i, callback in enumerate(state.hooks.callbacks if state.hooks else []):
            kept = {**known["callbacks"][i], **parts.get(f"callback{i}", {})}
            if kept:
                callback.load_state_dict(kept)
        state.attached.load(parts.get("model", {}))
        step.load_state_dict(parts.get("step", {}))
        state.step, state.losses, state.history = known["step"], known["losses"], known["history"]
        state.best, state.best_tensors, state.waited = known["best"], parts.get("best"), known["waited"]
        state.seconds, state.examples = known["seconds"], known["examples"]
        torch.set_rng_state(parts["generator"]["cpu"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all([parts["generator"][f"cuda{i}"] for i in range(torch.cuda.device_count())])
        return True
