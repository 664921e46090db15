"""Open anybody's adapter on a base without trusting it: read it strictly, find its model class, put it on.

Works on every PEFT type that does not run or fetch anything named in its config, BRICKYARD included, and on bricks of
any kind. Nothing is loaded here yet: the caller first compares what the file holds with what the model expects.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import peft
import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.modeling_outputs import SequenceClassifierOutput

from brickyard.core import brick as bricks
from brickyard.core.arm import parse
from brickyard.core.base import Base
from brickyard.core.base_config import quiet
from brickyard.core.build import build, resolve
from brickyard.core.errors import BadBrick, Refused, UnknownName, UnsafeFile
from brickyard.core.files import plain_file, read_json, read_tensors
from brickyard.core.safetensors_check import PICKLES, refuse_pickle
from brickyard.core.structure import PREFIX as STRUCTURE

CONFIG, WEIGHTS, ADAPTER = "adapter_config.json", "adapter_model.safetensors", "default"
PREFIX = "base_model.model."
# Types whose config makes PEFT read other files or fetch other adapters.
_REFUSED = frozenset({"XLORA"})
_CLASSES = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "IMAGE_CLS": transformers.AutoModelForImageClassification,
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """An adapter as it lies on disk. `manifest` is `brick.json` where the folder is a brick; `config` is PEFT's."""

    folder: Path
    config: dict[str, Any] | None
    manifest: dict[str, Any] | None
    tensors: dict[str, Tensor]

    @property
    def kind(self) -> str:
        """PEFT's name of the adapter's type, or the arm of a brick that is no adapter."""
        return str(self.config["peft_type"]) if self.config else str((self.manifest or {})["arm"])


@dataclass(kw_only=True)
class Adapted:
    """A base with an adapter put on it that still has its starting values.

    `start` holds those values under the names that a stored adapter uses; `load` takes the same names; `config` is
    PEFT's config, None for a brick; `names` are the base's modules before the adapter; `own` names the parameters of
    the base that its checkpoint holds, `fresh` those it does not; `ignored` are options that this PEFT does not know.
    """

    model: nn.Module
    start: dict[str, Tensor]
    load: Callable[[dict[str, Tensor]], None]
    config: Any = None
    names: tuple[str, ...] = ()
    own: frozenset[str] = frozenset()
    fresh: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()

    def layers(self) -> dict[str, BaseTunerLayer]:
        """The adapted layers by name."""
        return {name: m for name, m in self.model.named_modules() if isinstance(m, BaseTunerLayer)}

    def fixed(self) -> set[str]:
        """Names of stored tensors that no training moves: buffers, such as indices, masks and random projections."""
        buffers = (name for name, _ in self.model.named_buffers(remove_duplicate=False))  # layers share some
        held = {name for name, t in self.start.items() if name.startswith(STRUCTURE) and not t.is_floating_point()}
        return ({name.removesuffix(f".{ADAPTER}") for name in buffers} & self.start.keys()) | held


class Logits(nn.Module):
    """Any transformers model as one that returns `.logits` in float32; inputs are cast to the model's type.

    A model without logits gives its first floating-point output: the hidden states of a bare backbone.
    """

    def __init__(self, module: nn.Module, last: int = 0):
        super().__init__()
        self.module = module
        self.last = last

    def forward(self, **inputs: Any) -> SequenceClassifierOutput:
        kind = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)
        out = self.module(**{k: v.to(kind) if v.is_floating_point() else v for k, v in inputs.items()})
        found = getattr(out, "logits", None)
        if found is None:
            found = next(v for v in out.values() if isinstance(v, Tensor) and v.is_floating_point())
        if (
            self.last and found.ndim == 3
        ):  # virtual tokens stand in front, a vocabulary is wide: the last tokens will do
            found = found[:, -self.last :]
        return SequenceClassifierOutput(logits=found.float().flatten(0, -2) if found.ndim > 2 else found.float())


def read_adapter(folder: str | Path) -> Stored:
    """Read an adapter or brick strictly. Raises UnsafeFile for pickles and damage, BadBrick for what is incomplete."""
    folder = Path(folder)
    if not folder.is_dir():
        raise BadBrick(f"{folder} is not a folder; --adapter takes a PEFT adapter folder or a brick.")
    manifest = dict(bricks.load(folder).manifest) if (folder / bricks.MANIFEST).is_file() else None
    if not (folder / CONFIG).is_file():
        if manifest is None:
            held = sorted(path.name for path in folder.iterdir())[:8]
            raise BadBrick(
                f"{folder} is no adapter: it has no {CONFIG}; it holds {held}. Give the folder that holds one."
            )
        return Stored(folder=folder, config=None, manifest=manifest, tensors=bricks.load(folder).tensors())
    config = read_json(plain_file(folder, CONFIG), constants=True)
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise BadBrick(f"{folder / CONFIG} names no peft_type; it is not the config of a PEFT adapter.")
    if not (folder / WEIGHTS).is_file():
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in PICKLES:
                refuse_pickle(path)
        raise BadBrick(f"{folder} has no {WEIGHTS}; the adapter is incomplete.")
    digest = (manifest or {}).get("files", {}).get(WEIGHTS)
    return Stored(
        folder=folder, config=config, manifest=manifest, tensors=read_tensors(plain_file(folder, WEIGHTS), digest)
    )


def open_model(auto: Any, base: Base, width: int | None) -> tuple[nn.Module, frozenset[str]]:
    """Build a base as a model of class `auto` with `width` labels, in float32 and evaluation mode.

    Returns it and the names that the checkpoint does not hold, whose values are drawn from seed 0.
    """
    config = _shaped(base.config, width)
    # Llama and its kin find a sequence's last token by the padding token, and refuse batches where there is none
    if base.input == "text" and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = base.tokenizer.pad_token_id
    state: dict[str, Tensor] = {}
    for path in sorted({path for path, _ in base.weights.values()}):
        state |= read_tensors(path, mapped=True)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        with accelerate.init_empty_weights(include_buffers=True):
            skeleton = auto.from_config(config, trust_remote_code=False)
        # Without a path, transformers reads no file and asks no server
        model, report = type(skeleton).from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    model.config.name_or_path = str(base.folder)
    return model.eval(), frozenset(report["missing_keys"]) | {entry[0] for entry in report["mismatched_keys"]}


def _shaped(config: Any, width: int | None) -> Any:
    config = copy.deepcopy(config)
    if width:
        config.num_labels = width
    return config


def outline(auto: Any, config: Any, width: int | None) -> nn.Module | None:
    """The model without its weights, or None where the class does not fit the architecture."""
    with quiet(), accelerate.init_empty_weights(include_buffers=True):
        try:
            return auto.from_config(_shaped(config, width), trust_remote_code=False)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


def _hits(keys: list[str], names: set[str]) -> int:
    """How many stored keys lie in a module of that name: the last one to three parts name the tensor itself."""
    return sum(any(key.rsplit(".", cut)[0] in names for cut in (1, 2, 3)) for key in keys)


def model_class(base: Base, stored: Stored) -> Any:
    """The transformers class that the adapter was made for: by its task, else the one that has the layers it names."""
    named = str((stored.config or {}).get("task_type") or "")
    heads = ["IMAGE_CLS"] if base.input == "image" else ["SEQ_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM", "TOKEN_CLS"]
    # Of classes with as many of the layers the first counts: a language model is one until a head says otherwise.
    heads.sort(key=lambda kind: kind != "CAUSAL_LM" if base.generative else 0)
    order = [named] if named in _CLASSES else [*heads, "FEATURE_EXTRACTION"]
    keys = [key.removeprefix(PREFIX) for key in stored.tensors]
    outlines = {kind: outline(_CLASSES[kind], base.config, None) for kind in order}
    scores = {kind: _hits(keys, {n for n, _ in model.named_modules()}) for kind, model in outlines.items() if model}
    if not scores:
        raise Refused(
            f"{base.spec} ({type(base.config).__name__}) has no model for the adapter's task {named or 'none'}."
        )
    return _CLASSES[max(scores, key=lambda kind: scores[kind])]


def head_width(auto: Any, base: Base, stored: Stored) -> int | None:
    """Labels of the stored head, found by the tensors whose shape follows their number; None without such a head."""
    two = [outline(auto, base.config, width) for width in (3, 5)]
    if two[0] is None or two[1] is None:
        return None
    other = dict(two[1].named_parameters())
    for name, parameter in two[0].named_parameters():
        differing = [d for d, (a, b) in enumerate(zip(parameter.shape, other[name].shape, strict=True)) if a != b]
        found = next((t for key, t in stored.tensors.items() if key.endswith(f".{name}") or key == name), None)
        if differing and found is not None and found.ndim == parameter.ndim:
            return int(found.shape[differing[0]])
    return None


def peft_config(stored: Stored) -> tuple[Any, tuple[str, ...]]:
    """PEFT's config of a stored adapter, with everything off by which a config could run or fetch something.

    Returns it and the options that this PEFT release does not know. Raises UnknownName, Refused or UnsafeFile.
    """
    given = dict(stored.config or {})
    kind = str(given["peft_type"])
    if kind not in peft.PeftType.__members__:
        raise UnknownName.among("PEFT type", kind, peft.PeftType.__members__, "Update peft if it is a new one.")
    if kind in _REFUSED:
        raise Refused(f"an adapter of type {kind} reads further adapters named in its config; verify those one by one.")
    if given.get("megatron_config"):
        raise UnsafeFile(f"{stored.folder / CONFIG}: megatron_config imports a module by name; remove it.")
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    known = {field.name for field in dataclasses.fields(cls) if field.init}
    unknown = tuple(sorted(key for key, value in given.items() if key not in known and value))
    given = {key: value for key, value in given.items() if key in known and key not in ("peft_type", "auto_mapping")}
    # The stored tensors replace whatever an initialisation would read or compute from text or files.
    given |= {"inference_mode": True, "base_model_name_or_path": None, "revision": None}
    given |= {key: "RANDOM" for key in ("prompt_tuning_init",) if key in given}
    given |= {key: None for key in ("tokenizer_kwargs", "prompt_tuning_init_state_dict_path") if key in given}
    with quiet():
        return cls(**given), unknown


def put_on(model: nn.Module, stored: Stored, fresh: frozenset[str]) -> Adapted:
    """Put the adapter on `model`, in place, with its starting values.

    Whatever PEFT raises on a config that does not fit is left to the caller to report.
    """
    config, unknown = peft_config(stored)
    names = tuple(name for name, _ in model.named_modules())
    own = frozenset(name for name, _ in model.named_parameters()) - fresh
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(model, config, adapter_name=ADAPTER)  # type: ignore[arg-type]
        start = peft.get_peft_model_state_dict(wrapped, adapter_name=ADAPTER, save_embedding_layers=False)
        start = {name: tensor.detach().clone() for name, tensor in start.items()}

    def load(tensors: dict[str, Tensor]) -> None:
        with quiet():
            peft.set_peft_model_state_dict(wrapped, tensors, adapter_name=ADAPTER)

    return Adapted(
        model=wrapped.eval(), start=start, load=load, config=config, names=names, own=own, fresh=fresh, ignored=unknown
    )


def put_brick_on(base: Base, stored: Stored) -> Adapted:
    """Build a brick's arm on the base, as it was before training."""
    brick = bricks.load(stored.folder)
    with quiet():
        plan = resolve(parse(brick.manifest["arm"]), brick.task)
        attached = build(plan, base, brick.task, seed=brick.manifest["seed"])
    return Adapted(model=attached.model.eval(), start=attached.tensors(), load=attached.load)


@contextmanager
def layers_off(adapted: Adapted) -> Iterator[None]:
    """With every adapted layer as in the base, while a head that the adapter brings stays on."""
    layers = list(adapted.layers().values())
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def silent_layers(adapted: Adapted, run: Callable[[], Any]) -> tuple[list[str], list[str]]:
    """Layers whose adapter changes nothing, bit for bit, on the inputs they get in `run`; and those never reached."""
    acts: dict[str, bool] = {}
    hooks = []

    def watch(name: str, layer: Any) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            layer.enable_adapters(False)
            try:
                bare = layer.forward(*args, **kwargs)  # not a call: hooks must not run again
            finally:
                layer.enable_adapters(True)
            pairs = zip(tree_leaves(bare), tree_leaves(output), strict=True)
            acts[name] = acts.get(name, False) or not all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))

        return hook

    layers = adapted.layers()
    try:
        for name, layer in layers.items():
            hooks.append(layer.register_forward_hook(watch(name, layer), with_kwargs=True))  # type: ignore[union-attr]
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name, effect in acts.items() if not effect], [name for name in layers if name not in acts]
