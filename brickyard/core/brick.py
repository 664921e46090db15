"""A brick: what one run produced, as a folder with `brick.json` and safetensors only.

For a weight-delta tuner the folder is at the same time a PEFT adapter, so `PeftModel.from_pretrained` opens it, unless
it is served with a structure of which PEFT knows nothing.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from brickyard.core import registry
from brickyard.core.arm import parse
from brickyard.core.attached import Attached
from brickyard.core.base import Base, open_base
from brickyard.core.build import Plan, build, resolve
from brickyard.core.checkpoint import same_or_refuse
from brickyard.core.errors import BadBrick, NotFinite, UnknownName, WrongBase
from brickyard.core.files import complete_folder, plain_file, read_tensors, sha256, write_json, write_tensors
from brickyard.core.measure import folder_bytes
from brickyard.core.structure import Structure
from brickyard.core.task import Task
from brickyard.core.template import Template

SCHEMA = 1
MANIFEST = "brick.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
KEPT_ASIDE = ".bricks"  # folder of bricks that were replaced or removed, beside those that are installed
_REQUIRED = ("schema", "arm", "base", "task", "seed", "weights", "files")


@dataclass(frozen=True)
class Brick:
    """One stored brick. `manifest` is `brick.json`; nothing of the tensors is read before `tensors()` or `apply()`."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def task(self) -> Task:
        """The task that the brick was trained for."""
        known = self.manifest["task"]
        return Task(**{**known, "labels": tuple(known["labels"]) if known["labels"] is not None else None})

    @property
    def template(self) -> Template | None:
        """The sentence that its head wants around every text."""
        return resolve(parse(self.manifest["arm"]), self.task).template

    @property
    def structure(self) -> str:
        """What of its layers a model with this brick runs, as text; "" where it runs all, as plain models do."""
        return str(self.manifest.get("structure", {}).get("runs", ""))

    @property
    def kind(self) -> str:
        """What its tensors are: "adapter", "head", "structure", "neuron group", else "weights": values of their own."""
        if known := self.manifest.get("kind"):
            return str(known)
        if self.structure:
            return "structure"
        with contextlib.suppress(UnknownName):  # of a later release
            if registry.find(self.manifest["method"]).record.slot == "head":
                return "head"
        return "adapter" if self.manifest["weights"] == ADAPTER_WEIGHTS else "weights"

    @property
    def attach_points(self) -> tuple[str, ...]:
        """The base's modules or parameters that it changes, by name; none where its run did not record them."""
        matched = self.manifest.get("receipt", {}).get("matched", {})
        return tuple(sorted({name for names in matched.values() for name in names}))

    @property
    def made(self) -> list[Any]:
        """What tells it from other bricks: what was trained how, and its bytes."""
        return [self.manifest[key] for key in ("arm", "files", "seed", "task")]

    @property
    def requires(self) -> str:
        """The fingerprint of the base that it was made for."""
        return str(self.manifest["base"]["fingerprint"])

    @property
    def metrics(self) -> dict[str, Any]:
        """The scores that its run recorded: "score" on test and "validation", as far as there were such rows."""
        return dict(self.manifest.get("scores", {}))

    @property
    def cost(self) -> dict[str, Any]:
        """What making it took (trainable_parameters, steps or epochs, rows) and what storing it takes (bytes)."""
        training = self.manifest.get("training", {})
        length = {"steps": training["steps"]} if training.get("steps") else {"epochs": training.get("epochs")}
        return {
            "bytes": self.bytes,
            "trainable_parameters": self.manifest.get("receipt", {}).get("trainable_parameters", 0),
            **(length if training else {}),
            "rows": self.manifest.get("data", {}).get("rows"),
        }

    @property
    def bytes(self) -> int:
        """Bytes of its tensors on disk."""
        return sum(
            (self.folder / name).stat().st_size for name in self.manifest["files"] if (self.folder / name).exists()
        )

    def tensors(self) -> dict[str, Tensor]:
        """Read and check its tensors."""
        name = self.manifest["weights"]
        if not (self.folder / name).exists() and len(self.manifest["files"]) > 1:
            log = next(other for other in self.manifest["files"] if other != name)
            raise BadBrick(
                f"{self.folder} holds {log} and not the weights that it makes; write them first: "
                f"brickyard export {self.folder} --to brick --out NEW"
            )
        return read_tensors(plain_file(self.folder, name), expect_sha256=self.manifest["files"][name])

    def apply(self, base: Base | None = None, *, force: bool = False, attention: str = "sdpa") -> Applied:
        """Build the arm on `base` (by default the brick's own) and load the brick into it.

        Raises WrongBase when the base's fingerprint is not the one that the brick was made for, unless `force`.
        """
        base = base or open_base(self.manifest["base"]["spec"])
        made_for = self.manifest["base"]["fingerprint"]
        if base.fingerprint != made_for and not force:
            raise WrongBase(
                f"brick {self.folder} was made for base {self.manifest['base']['spec']} (fingerprint {made_for[:12]}), "
                f"the base given is {base.spec} ({base.fingerprint[:12]}). Give the right --base, or --force."
            )
        plan, seed = resolve(parse(self.manifest["arm"]), self.task), self.manifest["seed"]
        attached = build(plan, base, self.task, seed=seed, attention=attention, objective=False)
        attached.load(self.tensors())
        attached.model.eval()
        return Applied(attached, self)


@dataclass(frozen=True)
class Applied:
    """A base with a brick on it. `undo` gives the model as it was before, bit for bit."""

    attached: Attached
    brick: Brick | None = None

    @property
    def model(self) -> nn.Module:
        return self.attached.model

    def undo(self) -> nn.Module:
        """Take the brick off again."""
        return self.attached.detach()


def save(
    folder: Path, attached: Attached, plan: Plan, base: Base, task: Task, *, seed: int, about: dict[str, Any]
) -> Brick:
    """Write a brick, complete or not at all; NotFinite names the first tensor that holds NaN or infinity.

    `about` (data, training, environment, receipt, scores) goes into the manifest as it is.
    """
    tensors = attached.tensors()
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise NotFinite(f"tensor {name} of the brick holds NaN or infinity; nothing was saved in {folder}.")
    structure = _served(attached)
    adapter = attached.peft and structure is None  # plain PEFT would run all of the layers, without a word
    weights = ADAPTER_WEIGHTS if adapter else "weights.safetensors"
    with complete_folder(folder) as temporary:
        write_tensors(temporary / weights, tensors)
        for name, content in attached.beside.items():
            (temporary / name).write_bytes(content)
        files = {name: sha256(temporary / name) for name in (weights, *attached.beside)}
        if adapter:
            _write_adapter_config(temporary, attached, base)
        manifest = {
            "schema": SCHEMA,
            "arm": str(plan.arm),
            "method": plan.method,
            "config": {name: asdict(config) for name, config in plan.configs.items()},
            "base": {"spec": base.spec, "fingerprint": base.fingerprint},
            "task": asdict(task),
            "seed": seed,
            "weights": weights,
            "files": files,
            **({"structure": structure.about} if structure else {}),
            **about,
        }
        write_json(temporary / MANIFEST, manifest)
    return load(folder)


def same_or_new(folder: Path, now: dict[str, Any], allow: Sequence[str]) -> None:
    """Raise Changed where `folder` holds another run's finished brick, which writing here would take away.

    `now` is what this run's manifest is going to say; differences whose keys `allow` names are let through.
    """
    if (folder / MANIFEST).is_file():
        known = load(folder).manifest
        old = {**known, "arm": known.get("asked", known["arm"])}
        same_or_refuse(
            {key: old.get(key) for key in now}, json.loads(json.dumps(now)), allow, f"the finished brick in {folder}"
        )


def _served(attached: Attached) -> Structure | None:
    """The structure that is at work at serving too."""
    structure = attached.structure
    return structure if structure is not None and structure.serves else None


def _write_adapter_config(folder: Path, attached: Attached, base: Base) -> None:
    config: Any = next(iter(attached.model.peft_config.values()))  # type: ignore[union-attr]
    before, config.inference_mode = config.inference_mode, True
    config.base_model_name_or_path = base.spec
    config.save_pretrained(str(folder))
    config.inference_mode, config.base_model_name_or_path = before, None
    # PEFT writes sets as they come, in another order in every process; equal runs leave equal files.
    written = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    sets = [key for key in written if isinstance(getattr(config, key, None), set)]
    write_json(folder / ADAPTER_CONFIG, {**written, **{key: sorted(written[key]) for key in sets}})


def load(folder: str | Path) -> Brick:
    """Open a brick's manifest; BadBrick when it is missing, incomplete or of a later schema."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise BadBrick(
            f"{folder} is not a brick: it has no {MANIFEST}. Give a folder written by `brickyard tune --out`."
        )
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadBrick(f"{folder / MANIFEST} is damaged: {error}.") from None
    missing = [key for key in _REQUIRED if key not in manifest]
    if missing:
        raise BadBrick(f"{folder / MANIFEST} lacks {', '.join(missing)}.")
    if manifest["schema"] > SCHEMA:
        raise BadBrick(
            f"{folder} has schema {manifest['schema']}; this release reads up to {SCHEMA}. Update Brickyard."
        )
    return Brick(folder, manifest)


def installed(folder: str | Path, fingerprint: str, left_out: dict[str, str] | None = None) -> list[Brick]:
    """Return the bricks under `folder` that were made for a base, by their paths.

    What is no whole brick is none; why it is not is written to `left_out`, by its folder.
    """
    out = []
    for path in sorted(Path(folder).rglob(MANIFEST)):
        if KEPT_ASIDE in path.relative_to(folder).parts:
            continue
        try:
            found = load(path.parent)
        except BadBrick as error:
            if left_out is not None:
                left_out[str(path.parent)] = str(error)
            continue
        if found.requires == fingerprint:
            out.append(found)
    return out


def listed(folder: str | Path, fingerprint: str) -> list[dict[str, Any]]:
    """Return the bricks under `folder` that were made for a base: what they are, cost and scored, and where.

    Bricks that were replaced or removed, which lie in KEPT_ASIDE, are none of them.
    """
    out = []
    for found in installed(folder, fingerprint):
        out.append(
            {
                "folder": str(found.folder),
                "arm": found.manifest["arm"],
                "bytes": found.bytes,
                "task": found.manifest["task"]["kind"],
                "data": found.manifest.get("data", {}).get("name"),
                "scores": found.metrics,
                "measured": folder_bytes(found.folder),
                "kind": found.kind,
                "method": found.manifest["method"],
                "requires": found.requires,
                "attach_points": list(found.attach_points),
                "cost": found.cost,
            }
        )
    return out
