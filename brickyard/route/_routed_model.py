"""One dense model in memory, several experts as sparse residuals beside it, and a router that says which act.

At most one set of weights is active: `activate` writes D + sum_t w_t S_t in place, remembers what stood at the touched
places, and puts it back. Between requests the model is D, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from brickyard.core.answers import predict
from brickyard.core.arm import parse
from brickyard.core.base import Base, HeadedModel, open_base
from brickyard.core.batches import encode
from brickyard.core.build import build, resolve
from brickyard.core.encoded import Encoded
from brickyard.core.errors import BadBrick, Refused, UnknownName, UsageError
from brickyard.core.files import plain_file, read_json, read_tensors
from brickyard.core.fitted_head import FittedHead
from brickyard.core.generate import Decoding, continuations
from brickyard.core.names import same_names
from brickyard.core.split import Split
from brickyard.core.task import Task
from brickyard.core.template import Template
from brickyard.route._residual_store import Packed, read_expert, unpack
from brickyard.route._router import Router, Routes, read_router, states_of

MANIFEST, SCHEMA = "route.json", 1
LANGUAGE = Task("causal-lm", "bits_per_byte", None, 1, "text")
ENCODER = "embedded:minilm"
_REQUIRED = ("schema", "arm", "base", "tasks", "dense", "experts", "router", "heads", "bytes")


@dataclass(frozen=True)
class Head:
    """A task's own layers. `model` shares the backbone; `inside` are tensors of the task that lie within it (a pooler).

    about: "kind" (own, arm or fitted), "arm", "seed", "max_length".
    """

    task: Task
    about: dict[str, Any]
    model: nn.Module
    tensors: dict[str, Tensor]
    inside: dict[str, Tensor] = field(default_factory=dict)

    @property
    def template(self) -> Template | None:
        """The sentence that the head wants around every text."""
        arm = self.about.get("arm")
        return resolve(parse(arm), self.task).template if arm else None


def make_head(
    base: Base, backbone: nn.Module, task: Task, about: Mapping[str, Any], tensors: dict[str, Tensor]
) -> Head:
    """Build a task's head on the shared backbone.

    Raises Refused for a head that changes the backbone itself, BadBrick where the tensors are not those of the head.
    """
    if about["kind"] == "fitted":
        model: Any = HeadedModel(backbone, FittedHead(tensors["weight_KD"], tensors["bias_K"]))
        return Head(task, dict(about), model.eval(), tensors)
    if about["kind"] == "arm":
        plan = resolve(parse(about["arm"]), task)
        if getattr(plan.configs[plan.head or ""], "plus", False):
            raise Refused(f"{about['arm']} changes the backbone itself; route bricks with a head beside it.")
        model = build(plan, base, task, seed=about["seed"], objective=False).model
    else:
        model = base.model(task, seed=0)
    prefix = f"{model.base_model_prefix}."
    state = model.state_dict(keep_vars=True)
    missing = [name for name in state if not name.startswith(prefix) and name not in tensors]
    strange = [name for name in tensors if name not in state or state[name].shape != tensors[name].shape]
    if missing or strange:
        raise BadBrick(
            f"the head of {', '.join(task.labels or ())} does not fit {base.spec}: "
            f"{(missing or strange)[0]} is {'missing' if missing else 'not one of its tensors'}."
        )
    for name, tensor in tensors.items():
        if not name.startswith(prefix):
            state[name].data.copy_(tensor)
    setattr(model, model.base_model_prefix, backbone)
    model.requires_grad_(False)
    inside = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return Head(task, dict(about), model.eval(), tensors, inside)


class RoutedModel:
    """A dense model with sparse experts; see the module's docstring.

    Args:
        base: the dense model as a base: its tokenizer, context and tensor names (values are not read from it here).
        backbone: the network that holds D; its weights are overwritten while experts are active.
        experts: for every task the residuals by the base's tensor names.
        router: may be None: then only `activate` works.
        language: the model over the vocabulary that holds `backbone`, None where the base has no such output.
        heads: for tasks that are no language.
        encoder: the sentence encoder and its network, where the router reads its states and not the dense model.
    """

    def __init__(
        self,
        base: Base,
        backbone: nn.Module,
        experts: Mapping[str, Mapping[str, Packed]],
        router: Router | None = None,
        *,
        language: nn.Module | None = None,
        heads: Mapping[str, Head] | None = None,
        encoder: tuple[Base, nn.Module] | None = None,
    ) -> None:
        self.base, self.backbone, self.language, self.encoder = base, backbone, language, encoder
        self.experts = {task: dict(packed) for task, packed in experts.items()}
        self.router, self.heads = router, dict(heads or {})
        self.tasks = tuple(self.experts)
        touched = sorted({name for packed in self.experts.values() for name in packed})
        own = same_names(base.weights, backbone.state_dict()).own
        lost = [name for name in touched if name not in own]
        if lost:
            raise BadBrick(f"{len(lost)} routed tensors, such as {lost[0]}, are no weights of {base.spec}.")
        self._weights = {name: backbone.get_parameter(own[name]) for name in touched}
        self._active: dict[str, float] | None = None

    @property
    def active(self) -> dict[str, float] | None:
        """The experts' weights while they are active, else None."""
        return self._active

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    def to(self, device: str | torch.device) -> RoutedModel:
        """Move what is in memory to a device; sparse residuals stay on the CPU and travel when they act."""
        for module in (self.backbone, self.language, *(head.model for head in self.heads.values())):
            if module is not None:
                module.to(device)
        if self.encoder is not None:
            self.encoder[1].to(device)
        return self

    @contextmanager
    def activate(self, which: str | Mapping[str, float]) -> Iterator[nn.Module]:
        """Let one expert act, or several with weights that sum to 1; yields the network, and leaves it as it was.

        Raises UnknownName for a task that there is not, UsageError for weights that do not sum to 1 or are negative,
        and where other experts are active already.
        """
        weights = self._checked({which: 1.0} if isinstance(which, str) else which)
        if self._active is not None:
            raise UsageError(f"{', '.join(self._active)} is active already; leave that context first.")
        before: list[tuple[Tensor, Tensor, Tensor]] = []
        self._active = weights
        try:
            with torch.no_grad():
                for task, weight in weights.items():
                    for name, packed in self.experts[task].items():
                        self._add(name, packed, weight, before)
            yield self.language or self.backbone
        finally:
            # Values are put back and not subtracted again: in floating point, (D + S) - S is not D.
            for flat_N, places_K, held_K in reversed(before):
                flat_N.index_copy_(0, places_K, held_K)
            self._active = None

    def _add(self, name: str, packed: Packed, weight: float, before: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        flat_N = self._weights[name].data.view(-1)
        sparse = unpack(packed)
        places_K = sparse.places_K.to(flat_N.device)
        held_K = flat_N.index_select(0, places_K)
        before.append((flat_N, places_K, held_K))
        flat_N.index_copy_(0, places_K, held_K + (sparse.values_K * weight).to(flat_N))

    def _checked(self, which: Mapping[str, float]) -> dict[str, float]:
        for task in which:
            if task not in self.experts:
                raise UnknownName.among("task", task, self.tasks)
        weights = {task: float(weight) for task, weight in which.items() if weight != 0}
        total = sum(weights.values())
        if not all(weight > 0 for weight in weights.values()) or not abs(total - 1) < 1e-6:
            raise UsageError(f"weights of experts are {dict(which)}; expected none below 0, and a sum of 1.")
        return weights

    def route(self, texts: Sequence[str]) -> Routes:
        """Return which experts act on each prompt; the router sees the text alone.

        Raises UsageError where there is no router, or while an expert is active: its states are not the dense model's.
        """
        if self.router is None:
            raise UsageError("this model has no router; use activate(task).")
        if self._active is not None:
            raise UsageError(f"{', '.join(self._active)} is active; prompts are routed by the dense model alone.")
        base, network = self.encoder or (self.base, self.backbone)
        return self.router.routes(*states_of(network, base, texts, self.router.tokens, self.router.reads))

    def groups(self, w_NT: np.ndarray) -> Iterator[tuple[dict[str, float], np.ndarray]]:
        """Yield each distinct set of weights and the rows that have it, so that one switch serves them all."""
        each, place_N = np.unique(w_NT, axis=0, return_inverse=True)
        for number, w_T in enumerate(each):
            which = {task: float(w) for task, w in zip(self.tasks, w_T, strict=True) if w > 0}
            yield which, np.flatnonzero(place_N.reshape(-1) == number)

    def reader(self, task: str) -> nn.Module:
        """Return the network with a task's head, or with the output over the vocabulary where it has none."""
        if task not in self.heads:
            if self.language is None or task not in self.experts:
                raise UnknownName.among("task with a head", task, self.heads)
            return self.language
        head = self.heads[task]
        state = head.model.state_dict(keep_vars=True)
        for name, tensor in head.inside.items():
            state[name].data.copy_(tensor)
        return head.model

    def logits(self, task: str, rows: Encoded, w_NT: np.ndarray, *, precision: str = "float32") -> np.ndarray:
        """Return what a task's head says of encoded rows, each under its own weights of experts: [N, W].

        w_NT: rows that sum to 1, or rows of zeros for the dense model alone.
        """
        model, out = self.reader(task), np.empty((len(rows), self.heads[task].task.width), dtype=np.float32)
        for which, index in self.groups(w_NT):
            with self.activate(which) if which else nullcontext():
                out[index] = predict(model, rows.take(index), precision=precision)
        return out

    def encoded(self, task: str, split: Split, max_length: int | None = None) -> Encoded:
        """Return rows as a task's head reads them."""
        head = self.heads[task]
        limit = max_length or head.about.get("max_length")
        return encode(split, self.base, head.task, max_length=limit, template=head.template)

    def classify(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """Say of each text its most probable task, that task's answer, and how sure the router is."""
        routes = self.route(texts)
        out: list[dict[str, Any]] = [{} for _ in texts]
        for number, task in enumerate(self.tasks):
            index = np.flatnonzero(routes.best_N == number)
            if not len(index):
                continue
            if task not in self.heads:
                raise UsageError(f"task {task} writes text; use generate.")
            known = self.heads[task]
            rows = self.encoded(task, Split({"text": [texts[i] for i in index.tolist()]}))
            answers = known.task.predict(self.logits(task, rows, routes.w_NT[index]))
            for i, answer in zip(index, answers, strict=True):
                label = known.task.labels[int(answer)] if known.task.labels is not None else float(answer)
                out[i] = {"task": task, "prediction": label, "uncertainty": float(routes.u_N[i])}
        return out

    def generate(
        self,
        prompts: str | Sequence[str],
        decoding: Decoding | None = None,
        *,
        chat: bool = False,
        w_NT: np.ndarray | None = None,
    ) -> Any:
        """Return what the model writes after a prompt (or after each of several), under the experts it is routed to.

        w_NT: the experts' weights, where they are known already. Raises UsageError where the base has no output over a
        vocabulary; else as `core.generate.continuations`.
        """
        if self.language is None:
            raise UsageError(f"{self.base.spec} is no language model and writes nothing; use classify.")
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        out = [""] * len(texts)
        for which, index in self.groups(self.route(texts).w_NT if w_NT is None else w_NT):
            with self.activate(which):
                chosen = [texts[i] for i in index.tolist()]
                made = continuations(self.language, self.base, chosen, decoding or Decoding(), chat=chat)
            for i, text in zip(index, made, strict=True):
                out[i] = text
        return out[0] if isinstance(prompts, str) else out

    def bytes_held(self) -> dict[str, int]:
        """Return the bytes in this process: the dense network, the packed experts, the router's, the heads'."""
        size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
        whole = self.language or self.backbone
        unique = {id(t): t for t in (*whole.parameters(), *whole.buffers())}
        router = [] if self.router is None else list(self.router.tensors().values())
        encoder = [] if self.encoder is None else [*self.encoder[1].parameters(), *self.encoder[1].buffers()]
        return {
            "dense": size(unique.values()),
            "experts": sum(packed.bytes for own in self.experts.values() for packed in own.values()),
            "router": size(router),
            "encoder": size(encoder),
            "heads": sum(size(head.tensors.values()) for head in self.heads.values()),
        }


def is_routed(folder: Any) -> bool:
    """Whether a path is a folder that `brickyard route` wrote."""
    return folder is not None and (Path(folder) / MANIFEST).is_file()


def network_of(base: Base) -> tuple[nn.Module, nn.Module | None]:
    """Return the base's backbone and, of a language model, the whole that holds it; neither trains."""
    if base.generative:
        language: Any = base.model(LANGUAGE, seed=0).requires_grad_(False)
        return getattr(language, language.base_model_prefix), language
    return base.backbone().requires_grad_(False), None


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a routed folder's manifest; BadBrick where it is incomplete or of a later schema."""
    known = read_json(plain_file(folder, MANIFEST))
    missing = [key for key in _REQUIRED if key not in known] if isinstance(known, dict) else list(_REQUIRED)
    if missing:
        raise BadBrick(f"{folder / MANIFEST} lacks {', '.join(missing)}.")
    if known["schema"] > SCHEMA:
        raise BadBrick(f"{folder} has schema {known['schema']}; this release reads up to {SCHEMA}. Update Brickyard.")
    return known


def load_routed(folder: str | Path) -> RoutedModel:
    """Open a routed folder: the dense model, its experts packed as they are stored, the router and the heads.

    Raises BadBrick, WrongBase where a sparse file belongs to another dense model, UnsafeFile for damaged files.
    """
    folder = Path(folder)
    known, base = read_manifest(folder), open_base(str(folder))
    dense = known["dense"]["fingerprint"]
    if base.fingerprint != dense:
        raise BadBrick(
            f"{folder}: the dense model's fingerprint is {base.fingerprint[:12]}, {MANIFEST} says {dense[:12]}; its "
            "weights were changed. Route the models again."
        )
    elements = {name: info.elements for name, (_, info) in base.weights.items()}
    experts = {
        task: read_expert(plain_file(folder, entry["file"]), elements, dense, entry["sha256"])
        for task, entry in known["experts"].items()
    }
    backbone, language = network_of(base)
    heads = {}
    for task, entry in known["heads"].items():
        tensors = read_tensors(plain_file(folder, entry["file"]), entry["sha256"])
        asked = Task(**{**entry["task"], "labels": tuple(entry["task"]["labels"]) if entry["task"]["labels"] else None})
        heads[task] = make_head(base, backbone, asked, entry["about"], tensors)
    entry = known["router"]
    stored = read_tensors(plain_file(folder, entry["file"]), entry["sha256"])
    router = read_router(stored, entry["about"], len(known["tasks"]), entry.get("reads", "dense"))
    encoder = None
    if router.reads == "encoder":
        opened = open_base(entry["encoder"]["spec"])
        if opened.fingerprint != entry["encoder"]["fingerprint"]:
            raise BadBrick(f"{folder}: the router was fitted on another {opened.spec} than the one that is installed.")
        encoder = opened, opened.backbone().requires_grad_(False)
    return RoutedModel(base, backbone, experts, router, language=language, heads=heads, encoder=encoder)
