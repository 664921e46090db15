"""What the modules of a network are: its repeated blocks, the role of every leaf, its own head; and patterns over them.

Nothing here knows a model family. A leaf's role follows from its type (embedding, norm) or from the last part of its
name, which a few dozen words cover for most published architectures; words that two roles share (`dense`, `wo`,
`c_proj`) are settled by whether an attention module stands above. What stays unclear is "other", never a guess: above
all projections that fuse several roles into one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from torch import nn
from transformers.pytorch_utils import Conv1D

from brickyard.core.errors import Refused, Unmatched

Role = Literal["query", "key", "value", "out", "gate", "up", "down", "norm", "embedding", "head", "other"]
ROLES: tuple[str, ...] = get_args(Role)
ALL_LINEAR = "all-linear"
BLOCKS = "blocks"
LINEAR = (nn.Linear, Conv1D)
WEIGHTED = (*LINEAR, nn.Conv1d, nn.Conv2d, nn.Conv3d)

# The last part of a leaf's name -> its role, wherever it stands.
_NAMES: dict[str, Role] = {
    **dict.fromkeys(("query", "q_proj", "q_lin", "q", "wq", "query_proj", "to_q", "linear_q", "q_linear"), "query"),
    **dict.fromkeys(("key", "k_proj", "k_lin", "k", "wk", "key_proj", "to_k", "linear_k", "k_linear"), "key"),
    **dict.fromkeys(("value", "v_proj", "v_lin", "v", "wv", "value_proj", "to_v", "linear_v", "v_linear"), "value"),
    **dict.fromkeys(("o_proj", "out_lin", "to_out", "o"), "out"),
    **dict.fromkeys(("gate_proj", "wi_0"), "gate"),
    **dict.fromkeys(("up_proj", "intermediate", "fc1", "lin1", "linear1", "dense1", "c_fc", "wi", "wi_1"), "up"),
    **dict.fromkeys(("dense_h_to_4h", "pwconv1", "ffn", "ff1", "fc_in"), "up"),
    **dict.fromkeys(("down_proj", "fc2", "lin2", "linear2", "dense2", "dense_4h_to_h", "pwconv2"), "down"),
    **dict.fromkeys(("ffn_output", "ff2", "fc_out"), "down"),
}
# Words that name the last projection of whatever they stand in: attention -> out, else (inside a block) down.
_LAST = frozenset({"output", "wo", "c_proj", "out_proj", "proj_out"})
# Words that say nothing; the part before them decides.
_EMPTY = frozenset({"dense", "linear", "proj", "projection", "base_layer", "conv", "convolution", "lin"})
ATTENTION = re.compile(r"att(n|ention)")


def own_head(model: nn.Module) -> list[str]:
    """Return the names of the modules that hold parameters and belong to the task instead of the pre-trained backbone.

    They are the top-level modules beside the backbone (`["classifier"]`, `["head"]`), in order, and, where the
    checkpoint had no pooler but the model needs one, that pooler too (`["classifier", "bert.pooler"]`): it is new, so
    it must train with the head. A language model has none: its output layer came with it. Nor is a module the task's
    that a method put beside the backbone (`method_module` is true on it).
    """
    model = _unwrapped(model)
    if _vocabulary_layer(model) is not None:
        return []
    own = [name for name in _beside(model) if not getattr(model.get_submodule(name), "method_module", False)]
    return [*own, *getattr(model, "new_modules", ())]


def _beside(model: nn.Module) -> list[str]:
    """The top-level modules with parameters beside the backbone."""
    backbone = _backbone(model)
    if backbone is None:
        return []
    return [
        name
        for name, module in model.named_children()
        if module is not backbone and any(True for _ in module.parameters())
    ]


def _vocabulary_layer(model: nn.Module) -> nn.Module | None:
    """The layer of a language model that scores the vocabulary; it is pre-trained, unlike the head of a task."""
    find = getattr(model, "get_output_embeddings", None)
    found = find() if callable(find) else None
    return found if isinstance(found, nn.Module) else None


def _heads(model: nn.Module) -> list[str]:
    """The modules that no method may take for a layer of the backbone: the task's head, or the output layer."""
    return [*_beside(model), *getattr(model, "new_modules", ())]


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the repeated blocks of the backbone as (dotted name, module), from the input to the output.

    A block is an element of a list of modules that holds at least two weight layers. Where such elements are stages,
    which themselves are made of a list of equal blocks (ResNet, Swin), the blocks are the inner ones.
    """
    model = _unwrapped(model)
    return list(_walk(model, "", _heads(model)))


def entering_width(block: nn.Module) -> int:
    """Return the width of the states that enter a block: its first linear layer reads them. Refused without one."""
    layer: Any = next((m for m in block.modules() if isinstance(m, LINEAR)), None)
    if layer is None:
        raise Refused(
            f"{type(block).__name__} has no linear layer; methods beside a block need a transformer's blocks."
        )
    return layer.in_features if isinstance(layer, nn.Linear) else layer.weight.shape[0]


def roles(model: nn.Module) -> dict[str, str]:
    """Return the role of every leaf, a module without children that holds parameters: dotted name -> one of ROLES."""
    model = _unwrapped(model)
    heads = _heads(model)
    inside = tuple(f"{name}." for name, _ in blocks(model))
    found: dict[str, str] = {}
    for name, module in _leaves(model):
        if any(name == head or name.startswith(f"{head}.") for head in heads):
            found[name] = "head"
            continue
        prefix = next((p for p in inside if name.startswith(p)), None)
        found[name] = _role(name, module, None if prefix is None else name[len(prefix) :])
    _split_fused(model, found)
    return found


def match(
    model: nn.Module, patterns: Sequence[str], *, types: tuple[type[nn.Module], ...] = ()
) -> dict[str, list[str]]:
    """Return for each pattern the leaves that it matches, in the model's order.

    A pattern is, in this order of precedence: a role ("query"); "all-linear" (every Linear and Conv1D but the head);
    "blocks" (those of the repeated blocks alone: a pooler has no equals); a glob over dotted names, `*` crossing dots
    ("*.layer.0.*"); or a name or its last parts, as PEFT takes them ("q_proj", "attention.output.dense"). The head's
    own leaves are matched by the role "head" only, as they train
    anyway. `types` restricts what a method can work on.

    Raises Unmatched, with the nearest names, where a pattern matches nothing, matches only modules that hold others, or
    matches a leaf that is not of `types`.
    """
    model = _unwrapped(model)
    kinds = roles(model)
    modules = dict(model.named_modules())
    inside = tuple(f"{name}." for name, _ in blocks(model))
    matched: dict[str, list[str]] = {}
    for pattern in patterns:
        names = _matching(pattern, kinds, modules, inside)
        if not names:
            raise Unmatched(_nothing(pattern, kinds, modules))
        wrong = [name for name in names if types and not isinstance(modules[name], types)]
        if wrong:
            raise Unmatched(
                f"pattern {pattern!r} matches {len(wrong)} of {len(names)} modules that this method cannot work on, "
                f"such as {wrong[0]} ({type(modules[wrong[0]]).__name__}); "
                f"expected {', '.join(kind.__name__ for kind in types)}. Narrow the pattern."
            )
        matched[pattern] = names
    return matched


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a PEFT model, whose adapters sit in it."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model  # type: ignore[return-value]


def _backbone(model: nn.Module) -> nn.Module | None:
    prefix = getattr(model, "base_model_prefix", "")
    return getattr(model, prefix, None) if isinstance(prefix, str) and prefix else None


def _leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if not any(True for _ in module.children()) and any(True for _ in module.parameters(recurse=False)):
            yield name, module


def _weight_layers(module: nn.Module) -> int:
    return sum(isinstance(leaf, WEIGHTED) for leaf in module.modules())


def _block_list(module: nn.Module) -> list[nn.Module]:
    """The elements of a module list each of which is large enough to be a block; else nothing."""
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return []
    elements = list(module)
    return elements if all(_weight_layers(element) >= 2 for element in elements) else []


def _walk(module: nn.Module, name: str, skip: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    if name in skip:
        return
    elements = _block_list(module)
    if not elements:
        for child_name, child in module.named_children():
            yield from _walk(child, f"{name}.{child_name}" if name else child_name, skip)
        return
    for index, element in enumerate(elements):
        inner = [
            (f"{name}.{index}.{child_name}", child)
            for child_name, child in element.named_children()
            if (found := _block_list(child)) and len({type(block) for block in found}) == 1
        ]
        if not inner:
            yield f"{name}.{index}", element
        for inner_name, child in inner:
            yield from _walk(child, inner_name, skip)


def _role(name: str, module: nn.Module, inside: str | None) -> Role:
    """The role of a leaf of the backbone; `inside` is its name within its block, None where it is in none."""
    kind = type(module).__name__
    if "Embedding" in kind:
        return "embedding"
    if "Norm" in kind:
        return "norm"
    parts = [part.lower() for part in name.split(".")]
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and inside is None:
        # The layer that turns pixels into tokens is to images what the embedding is to text.
        return "embedding" if any("embed" in part for part in parts) else "other"
    if not isinstance(module, WEIGHTED) or inside is None:
        return "other"
    within = [part for part in inside.lower().split(".") if not part.isdigit()]
    while within and within[-1] in _EMPTY:
        within.pop()
    in_attention = any(ATTENTION.search(part) for part in within)
    if not within:
        return "other"
    last, above = within[-1], within[:-1]
    if last in _NAMES:
        return _NAMES[last]
    if last in _LAST:
        return "out" if any(ATTENTION.search(part) for part in above) else "down"
    # What is left of `attention.dense`: the projection that closes the attention.
    return "out" if in_attention and ATTENTION.search(last) and last != inside.lower().split(".")[-1] else "other"


def _split_fused(model: nn.Module, found: dict[str, str]) -> None:
    """Call an "up" other where it feeds twice what its "down" takes: it fuses gate and up into one matrix."""
    modules = dict(model.named_modules())
    by_parent: dict[str, dict[str, str]] = {}
    for name, role in found.items():
        by_parent.setdefault(name.rpartition(".")[0], {})[role] = name
    for siblings in by_parent.values():
        up, down = siblings.get("up"), siblings.get("down")
        if up is not None and down is not None and _sizes(modules[up])[1] == 2 * _sizes(modules[down])[0]:
            found[up] = "other"


def _sizes(module: Any) -> tuple[int, int]:
    """(inputs, outputs) of a weight layer."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return module.weight.shape[1], module.weight.shape[0]


def _matching(pattern: str, kinds: dict[str, str], modules: dict[str, nn.Module], inside: tuple[str, ...]) -> list[str]:
    if pattern in ROLES:
        return [name for name, role in kinds.items() if role == pattern]
    body = [name for name, role in kinds.items() if role != "head"]
    if pattern == ALL_LINEAR:
        return [name for name in body if isinstance(modules[name], LINEAR)]
    if pattern == BLOCKS:
        return [name for name in body if isinstance(modules[name], LINEAR) and name.startswith(inside)]
    if any(sign in pattern for sign in "*?["):
        return [name for name in body if fnmatchcase(name, pattern)]
    return [name for name in body if name == pattern or name.endswith(f".{pattern}")]


def _nothing(pattern: str, kinds: dict[str, str], modules: dict[str, nn.Module]) -> str:
    """Why `pattern` matches no leaf, and what comes near."""
    present = [role for role in ROLES if role in kinds.values()]
    if pattern == BLOCKS:
        return "this model has no repeated blocks with linear layers; name the layers in target."
    if pattern in ROLES:
        fused = [name for name, role in kinds.items() if role == "other" and isinstance(modules[name], LINEAR)]
        hint = f"; it has layers of no single role, such as {fused[0]}: name them directly" if fused else ""
        return f"no module of this model has the role {pattern!r}; roles here: {', '.join(present)}{hint}."
    glob = any(sign in pattern for sign in "*?[")
    hit = [
        name
        for name in modules
        if name and (fnmatchcase(name, pattern) if glob else name == pattern or name.endswith(f".{pattern}"))
    ]
    if any(kinds.get(name) == "head" or name in kinds for name in hit):
        return (
            f"pattern {pattern!r} matches only the task's own head ({hit[0]}), which trains anyway; say 'head' for it."
        )
    if hit:
        inner = [name for name in kinds if name.startswith(f"{hit[0]}.")]
        advice = f"; name what is in it, such as {inner[0]}" if inner else ""
        return f"pattern {pattern!r} matches only modules that hold others, such as {hit[0]}{advice}."
    tails = {".".join(name.split(".")[-n:]) for name in kinds for n in (1, 2, 3)} | set(kinds) | set(present)
    near = get_close_matches(pattern, sorted(tails), n=3, cutoff=0.5)
    advice = f"did you mean {' or '.join(near)}?" if near else f"roles here: {', '.join(present)}; blocks, all-linear."
    return f"pattern {pattern!r} matches no module; {advice}"
