"""Open a pre-trained base safely, know it by its content, and build models on it.

A base is a folder with config.json, safetensors, and a tokenizer or image processor; a hub id; or `embedded:NAME`.
Models compute in float32 (half-precision weights are widened, which is exact).
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
)

from brickyard import embedded
from brickyard.core import base_files
from brickyard.core.base_config import (
    architecture,
    build_config,
    check_counts,
    first_line,
    input_of,
    quiet,
    read_config,
    width_of,
)
from brickyard.core.errors import BadBase, BrickyardError, NotFinite, Refused, UnsafeFile, UsageError
from brickyard.core.files import TensorInfo, plain_file, read_json, read_tensors
from brickyard.core.headed import HeadedModel
from brickyard.core.roles import WEIGHTED, blocks, match, own_head, roles
from brickyard.core.task import Task

__all__ = ["Base", "HeadedModel", "blocks", "match", "open_base", "own_head", "roles"]

# Buffers of older releases that checkpoints still carry; they follow from the configuration.
_OLD_BUFFERS = frozenset({"position_ids", "masked_bias", "inv_freq", "relative_position_index"})
_NO_LIMIT = 10**9  # tokenizers without a limit say 10^30


@dataclass(frozen=True, eq=False)
class Base:
    """A pre-trained base. `input` is "text" or "image"; `width` the size of its last token states.

    `weights` maps each stored tensor to its file and place; nothing of them is read before a model is built.
    """

    spec: str
    folder: Path
    config: PretrainedConfig = field(repr=False)
    input: Literal["text", "image"]
    width: int
    weights: dict[str, tuple[Path, TensorInfo]] = field(repr=False)
    trust_remote_code: bool = False

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the tensors and of what of the architecture they cannot show."""
        return base_files.fingerprint(self.weights, architecture(self.config))

    @property
    def generative(self) -> bool:
        """Whether the checkpoint is a causal language model with its output layer."""
        return next(iter(self.config.architectures or []), "").endswith(("LMHeadModel", "ForCausalLM"))

    @property
    def masked(self) -> bool:
        """Whether the checkpoint is a masked language model with its output layer."""
        return next(iter(self.config.architectures or []), "").endswith("ForMaskedLM")

    @cached_property
    def lent_head(self) -> Path | None:
        """The masked-language head that Brickyard has for this base, which came without one; None where it has none.

        A file of tensors by their names in the masked language model; those of top blocks replace the base's there.
        """
        return None if self.masked else embedded.masked_head(self.fingerprint)

    @cached_property
    def own_task(self) -> Task:
        """The task that the checkpoint's own output layer was trained for; BadBase where it has none."""
        if self.generative:
            return Task("causal-lm", "bits_per_byte", None, 1, "text")
        architecture = next(iter(self.config.architectures or []), "")
        if "Classification" not in architecture:
            raise BadBase(
                f"{self.spec} is a bare {architecture or 'backbone'} with no trained head; give --brick, or tune one "
                "first."
            )
        names = self._own_labels()
        if len(names) == 1:
            return Task("regression", "spearman", None, 1, self.input)
        kind = "image-classification" if self.input == "image" else "text-classification"
        return Task(kind, "accuracy", names, len(names), self.input)

    def _own_labels(self) -> tuple[str, ...]:
        """Names of the classes in the order of the outputs, from the file: the cleaned configuration has none."""
        known = read_json(plain_file(self.folder, base_files.CONFIG), constants=True).get("id2label")
        if known is None:
            known = self.config.id2label or {}  # transformers' own default
        try:
            names = {int(index): str(name) for index, name in known.items()}
        except (AttributeError, ValueError, TypeError):
            names = {}
        if sorted(names) != list(range(len(names))) or not names or len(set(names.values())) < len(names):
            raise BadBase(f"{self.folder / base_files.CONFIG}: id2label does not name the outputs 0, 1, ... once each.")
        return tuple(names[index] for index in range(len(names)))

    @cached_property
    def tokenizer(self) -> Any:
        """The base's tokenizer; pads on the right with the token that the model takes for padding.

        A decoder without one gets its end-of-text token for it. Raises BadBase where there is none, or it is damaged.
        """
        if self.input != "text":
            raise BadBase(f"base {self.spec} reads images; it has no tokenizer.")
        tokenizer = self._side(AutoTokenizer, "tokenizer", "tokenizer.json (or its vocabulary)")
        padding = getattr(self.config, "pad_token_id", None)
        if padding is not None and 0 <= padding < len(tokenizer):
            # The model finds the last token of a row, or its positions, by this number.
            if tokenizer.pad_token_id != padding:
                tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
        elif tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise BadBase(
                f"the tokenizer of base {self.spec} has no token that could pad a batch; give it a pad_token."
            )
        tokenizer.padding_side = "right"
        return tokenizer

    @cached_property
    def processor(self) -> Any:
        """The base's image processor. Raises BadBase where there is none."""
        if self.input != "image":
            raise BadBase(f"base {self.spec} reads text; it has no image processor.")
        return self._side(AutoImageProcessor, "image processor", "preprocessor_config.json")

    @cached_property
    def context(self) -> int | None:
        """The most tokens that a row may have; None for images and for models without a limit."""
        if self.input != "text":
            return None
        limits = [getattr(self.config, name, None) for name in ("max_position_embeddings", "max_sequence_length")]
        limits.append(self.tokenizer.model_max_length)
        for name, module in self.outline().named_modules():
            if isinstance(module, nn.Embedding) and "position" in name.rpartition(".")[2]:
                # Where a padding index exists, positions are counted from behind it.
                limits.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
        known = [int(limit) for limit in limits if isinstance(limit, int | float) and 0 < limit < _NO_LIMIT]
        return min(known, default=None)

    def model(self, task: Task, *, seed: int, attention: str = "sdpa", stored_head: bool = False) -> nn.Module:
        """Return the base with `task.width` outputs, in float32 and evaluation mode.

        The output layer is new, drawn from `seed`, unless `stored_head` asks for the checkpoint's own (BadBase where it
        holds none of that size); so is whatever else of the head the checkpoint lacks. The
        global random state stays as it was. `attention` falls back to eager where the architecture has no other.
        Raises Refused where the base does not fit the task, BadBase or NotFinite where its weights are not what its
        configuration says.
        """
        self._assert_reads(task)
        if task.generative:
            return self._language_model(attention)
        auto, config = self._classifier(task)
        return self._load(auto, config, seed, attention, stored_head)

    def _classifier(self, task: Task) -> tuple[Any, PretrainedConfig]:
        """Return the form of a model with `task.width` outputs, and its configuration; Refused where there is none."""
        mapping, auto = _FORMS[self.input]
        if type(self.config) not in mapping and not self.trust_remote_code:
            raise Refused(
                f"transformers has no {self.input} classifier for {self.config.model_type}; "
                "use a head on its token states (such as + linear-probe), or another base."
            )
        config = copy.deepcopy(self.config)
        labels = task.labels if task.labels is not None and len(task.labels) == task.width else range(task.width)
        config.id2label = {i: str(label) for i, label in enumerate(labels)}
        config.label2id = {name: i for i, name in config.id2label.items()}
        regression = task.kind == "regression"
        config.problem_type = "regression" if regression else "single_label_classification" if task.width > 1 else None
        if self.input == "text" and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = self.tokenizer.pad_token_id
        return auto, config

    def skeleton(self, task: Task, *, attention: str = "sdpa") -> nn.Module:
        """Return the model for `task` without memory for its weights: its class, configuration, names and shapes.

        It lies on the meta device, with the attention that `model` would choose. Refused and BadBase as for `model`.
        """
        self._assert_reads(task)
        if task.generative:
            self._assert_generative()
            auto, config = AutoModelForCausalLM, copy.deepcopy(self.config)
        else:
            auto, config = self._classifier(task)
        if hasattr(config, "use_cache"):
            config.use_cache = False
        with quiet(), self._explained():
            made = self._skeleton(auto, config)
            if attention != "sdpa" or not getattr(made, "_supports_sdpa", False):
                made.config._attn_implementation = "eager" if attention == "sdpa" else attention
        return made

    def untrained(self, *, seed: int, attention: str = "sdpa") -> nn.Module:
        """Return a language model of this architecture with new weights, as its class draws them from `seed`.

        In float32 and training mode; nothing of the stored weights is read. Refused as for `model`.
        """
        self._assert_generative()
        config = copy.deepcopy(self.config)
        if hasattr(config, "use_cache"):
            config.use_cache = False
        with quiet(), self._explained(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            skeleton = self._skeleton(AutoModelForCausalLM, config)
            sdpa = attention != "sdpa" or getattr(skeleton, "_supports_sdpa", False)
            return AutoModelForCausalLM.from_config(
                config,
                dtype=torch.float32,
                attn_implementation=attention if sdpa else "eager",
                trust_remote_code=self.trust_remote_code,
            )

    def _language_model(self, attention: str) -> nn.Module:
        """Return the base with its own output layer over the vocabulary."""
        self._assert_generative()
        return self._load(AutoModelForCausalLM, copy.deepcopy(self.config), 0, attention, stored_head=True)

    def _assert_reads(self, task: Task) -> None:
        if task.reads != self.input:
            raise Refused(
                f"base {self.spec} reads {self.input}, the task is about {task.input}; give a base that reads "
                f"{task.reads}."
            )

    def _assert_generative(self) -> None:
        if type(self.config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not self.trust_remote_code:
            raise Refused(f"transformers has no causal language model for {self.config.model_type}; give a decoder.")
        if not self.generative:
            architecture = next(iter(self.config.architectures or []), "")
            raise Refused(
                f"base {self.spec} is a {architecture or 'bare backbone'}, not a causal language model; give a decoder "
                "with its output layer."
            )

    def masked_model(self, attention: str = "sdpa", *, new_head: int | None = None, lent: bool = False) -> nn.Module:
        """Return the base as a masked language model with its own output layer; BadBase where it has none.

        With `new_head`, a seed, what the checkpoint lacks of that layer is drawn from it. `lent`: a base without one
        gets `lent_head`, and the top blocks that belong to it, where Brickyard has one for it.
        """
        if type(self.config) not in MODEL_FOR_MASKED_LM_MAPPING:
            raise Refused(f"transformers has no masked language model for {self.config.model_type}; give an encoder.")
        known, fresh = copy.deepcopy(self.config), new_head is not None
        over = read_tensors(self.lent_head) if lent and self.lent_head else {}
        return self._load(
            AutoModelForMaskedLM, known, new_head or 0, attention, stored_head=True, new_head=fresh, over=over
        )

    def backbone(self, attention: str = "sdpa") -> nn.Module:
        """Return the base without any head, in float32 and evaluation mode."""
        if getattr(self.config, "is_encoder_decoder", False):
            raise Refused(
                f"base {self.spec} is an encoder-decoder; a head on token states needs one or the other alone."
            )
        return self._load(AutoModel, copy.deepcopy(self.config), 0, attention)

    def outline(self) -> nn.Module:
        """Return the backbone's modules without memory for their weights, to look at names, shapes and blocks."""
        with quiet(), self._explained():
            return self._skeleton(AutoModel, copy.deepcopy(self.config))

    def headed(self, head: nn.Module, attention: str = "sdpa") -> HeadedModel:
        """Return the base with `head` on its last token states."""
        return HeadedModel(self.backbone(attention), head)

    def _side(self, auto: Any, what: str, files: str) -> Any:
        """Load the tokenizer or image processor from its own files alone."""
        trusted = self.trust_remote_code
        try:
            with quiet(), contextlib.ExitStack() as stack:
                folder = self.folder if trusted else stack.enter_context(base_files.staged(self.folder))
                made = auto.from_pretrained(
                    str(folder), config=copy.deepcopy(self.config), local_files_only=True, trust_remote_code=trusted
                )
        except (BadBase, UnsafeFile):
            raise
        except Exception as error:  # whatever a damaged file makes of the parsers
            raise BadBase(
                f"{self.folder}: no usable {what} ({type(error).__name__}: {first_line(error)}); expected {files} "
                f"beside {base_files.CONFIG}."
            ) from error
        if hasattr(made, "name_or_path"):
            made.name_or_path = str(self.folder)
        return made

    def _load(
        self,
        auto: Any,
        config: PretrainedConfig,
        seed: int,
        attention: str,
        stored_head: bool = False,
        new_head: bool = False,
        over: Mapping[str, Tensor] | None = None,
    ) -> nn.Module:
        if "/" in attention or ":" in attention:
            raise UsageError(
                f"attention {attention!r} names code on the hub; expected sdpa, eager or another local name."
            )
        if hasattr(config, "use_cache"):
            config.use_cache = False  # keys and values are of no use without generation, and cost memory
        with quiet(), self._explained(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            skeleton = self._skeleton(auto, config)
            if attention == "sdpa" and not getattr(skeleton, "_supports_sdpa", False):
                attention = "eager"
            state = self._stored() | dict(over or {})
            for name in _output_layer(skeleton):
                if not stored_head:
                    state.pop(name, None)
                elif name not in state:
                    raise BadBase(
                        f"{self.folder}: no trained output layer ({name}) is stored; tune one, or give --brick."
                    )
            model, report = type(skeleton).from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=torch.float32,
                attn_implementation=attention,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        # A folder, so that nobody (PEFT does) asks the hub about it later.
        model.config.name_or_path = str(self.folder)
        model.new_modules = self._verified(model, report, new_head)
        return model.eval()

    def _stored(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for path in sorted({path for path, _ in self.weights.values()}):
            tensors |= read_tensors(path, mapped=True)
        return tensors

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn whatever transformers raises for weights and values that make no sense into BadBase."""
        try:
            yield
        except (BrickyardError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if "memory" in str(error) or "bad_alloc" in str(error):  # how torch's CPU allocator says that it ran out
                raise
            raise BadBase(
                f"{self.folder}: transformers cannot build it ({type(error).__name__}): {first_line(error)}"
            ) from error

    def _skeleton(self, auto: Any, config: PretrainedConfig) -> Any:
        """Build the network without memory for its weights.

        A configuration that describes a far larger one than the file holds is refused before any memory is taken.
        """
        with torch.device("meta"):
            skeleton = auto.from_config(config, trust_remote_code=self.trust_remote_code)
        stored = sum(info.elements for _, info in self.weights.values())
        described = sum(t.numel() for t in (*skeleton.parameters(), *skeleton.buffers()))
        if described > 4 * stored + 2**26:
            raise BadBase(
                f"{self.folder}: its configuration describes {described:,} numbers, its weights hold {stored:,}; "
                "the two do not belong together."
            )
        return skeleton

    def _verified(self, model: nn.Module, report: dict[str, Any], new_head: bool) -> tuple[str, ...]:
        """Check that every weight of the backbone came from the file; return the modules that are new inside it."""
        prefix = getattr(model, "base_model_prefix", "")
        beside = [name for name, _ in model.named_children() if new_head and name != prefix]
        heads = tuple(f"{name}." for name in (*own_head(model), *beside))
        backbone = getattr(model, prefix, model) if prefix else model
        parts = {name for name, _ in backbone.named_children()}
        fresh, missing = set(), []
        for name in sorted(report["missing_keys"]):
            pieces = name.split(".")
            if "pooler" in pieces:
                fresh.add(".".join(pieces[: pieces.index("pooler") + 1]))
            elif not name.startswith(heads or ("\0",)):
                missing.append(name)
        extra = []
        for name in sorted(report["unexpected_keys"]):
            first = name.removeprefix(f"{prefix}.").split(".")[0]
            if first in parts and first != "pooler" and name.rpartition(".")[2] not in _OLD_BUFFERS:
                extra.append(name)
        wrong = [
            f"{name} ({list(found)} stored, {list(expected)} expected)"
            for name, found, expected in sorted(report["mismatched_keys"])
        ]
        for names, what in ((missing, "are missing"), (extra, "have no place"), (wrong, "have another size")):
            if names:
                raise BadBase(
                    f"{self.folder}: {len(names)} tensors {what} in a {type(model).__name__} of this configuration, "
                    f"such as {names[0]}; weights and {base_files.CONFIG} do not belong together."
                )
        if report["error_msgs"]:
            raise BadBase(f"{self.folder}: transformers cannot load it: {report['error_msgs'][0]}")
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and tensor.numel() and not _finite(tensor):
                raise NotFinite(f"base {self.spec}: tensor {name} holds NaN or infinity; fetch the base again.")
        return tuple(
            sorted(name for name in fresh if not name.startswith(heads or ("\0",)) and f"{name}." not in heads)
        )


_FORMS: dict[str, tuple[Any, Any]] = {
    "text": (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification),
    "image": (MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoModelForImageClassification),
}


def open_base(spec: str, *, trust_remote_code: bool = False) -> Base:
    """Open the base that `spec` names: a folder, a hub id (`org/name[@revision]`), or `embedded:NAME`.

    Nothing in the folder runs, reaches the network or leads out of it; `trust_remote_code` (the argument, never a
    file's value) allows the Python files in the folder itself. Only a hub id is looked up on the network.

    Raises BadBase where it is missing, incomplete or of an unknown architecture, UnsafeFile where a file is malformed,
    leads out of the folder or is a pickle.
    """
    folder = base_files.locate(spec, trust_remote_code=trust_remote_code)
    known = read_config(folder, trust_remote_code=trust_remote_code)
    weights = base_files.weight_files(folder)
    check_counts(known, folder, len(weights))
    config = build_config(known, folder, trust_remote_code)
    return Base(spec, folder, config, input_of(config, folder), width_of(config, folder), weights, trust_remote_code)


def _output_layer(skeleton: nn.Module) -> list[str]:
    """The parameters of the last layer of a model's own head, whose size is the task's."""
    modules = dict(skeleton.named_modules())
    leaves = [
        name
        for name, module in modules.items()
        if isinstance(module, WEIGHTED) and any(name == h or name.startswith(f"{h}.") for h in own_head(skeleton))
    ]
    return [f"{leaves[-1]}.{name}" for name, _ in modules[leaves[-1]].named_parameters()] if leaves else []


def _finite(tensor: Tensor) -> bool:
    low, high = tensor.detach().aminmax()  # NaN comes through both; nothing of the tensor's size is allocated
    return math.isfinite(low) and math.isfinite(high)
