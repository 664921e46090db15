"""Prompts that are made from the example itself, block by block, and reach a block as keys and values of its attention.

A generator reads the states that enter block l and returns P prompt tokens p_l [B, P, d]. The block's own norm and
projections turn them into keys and values, which its attention sees beside those of the text. Prompts ask nothing
themselves, so nothing is computed at their positions: masks, positions (rotary phases too) and the length of the cache
stay as they are. A prompt key stands at position 0, where a rotary phase is none.

In generation prompts are made once, from what the first pass is given, and stay with the cache; a step with the cache
makes none. A layer of a growing cache holds them before the tokens, and does not count them, so that no step puts them
there again. Every row may have prompts of its own, so several tenants share one backbone.
Legend: B rows, T tokens, d width, P prompts.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer

from brickyard.core.errors import BadData, Refused, UsageError
from brickyard.core.roles import roles
from brickyard.core.side import backbone_of, stack
from brickyard.tune._slices import execution_order

INSTRUCTION = "instruction_mask"  # in a batch: true on the tokens that prompts may be made from
_NAME = "brickyard_prompts"  # in transformers' AttentionInterface
Generate = Callable[[int, Tensor, Tensor], Tensor]


class PromptedLayer(DynamicLayer):
    """A layer of a cache whose first `count` keys and values are prompts, which are no tokens of it."""

    def __init__(self, layer: DynamicLayer, key_BHPD: Tensor, value_BHPD: Tensor) -> None:
        super().__init__()
        assert layer.keys is not None and layer.values is not None
        self.lazy_initialization(layer.keys, layer.values)
        self.keys = torch.cat([key_BHPD, layer.keys], dim=2)
        self.values = torch.cat([value_BHPD, layer.values], dim=2)
        self.count = key_BHPD.shape[2]

    def get_seq_length(self) -> int:
        """Return how many tokens the layer holds."""
        return max(super().get_seq_length() - self.count, 0)

    def reset(self) -> None:
        """Forget tokens and prompts; the next text brings its own."""
        super().reset()
        self.count = 0


class Prompts:
    """Gives the attention of each chosen block of `model` what `generate(l, h_BTd, mask_BT)` makes of its input.

    Where a batch holds `instruction_mask`, only those tokens are shown to the generator; else all valid ones are.
    Raises Refused where a block's attention is out of reach, BadData where a row has no token to make prompts from.
    """

    def __init__(self, model: nn.Module, generate: Generate, layers: list[int] | None = None) -> None:
        self.generate = generate
        self.instruction: Tensor | None = None
        self.mask: Tensor | None = None
        self.made: dict[int, tuple[Tensor, Tensor]] = {}
        self.reused = False
        self.places: dict[int, int] = {}  # block -> its layer in a cache
        self.held: set[int] = set()  # blocks whose cache holds the prompts itself
        found = stack(model)
        self.layers = list(range(len(found))) if layers is None else layers
        kinds = {model.get_submodule(name): kind for name, kind in roles(model).items()}
        backbone = backbone_of(model)
        order = [backbone.get_submodule(name) for name in execution_order(backbone)]
        self._undo: list[Callable[[], Any]] = []
        for l in self.layers:
            self._equip(l, found[l][1], *_attention(found[l][1], kinds, order))
        for handle in (
            model.register_forward_pre_hook(self._asked, with_kwargs=True),
            backbone.register_forward_pre_hook(self._begin, with_kwargs=True),
            backbone.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ):
            self._undo.append(handle.remove)
        model.reads_instructions = True  # type: ignore[assignment]
        self._undo.append(lambda: delattr(model, "reads_instructions"))

    def close(self) -> None:
        """Leave the model as it was."""
        while self._undo:
            self._undo.pop()()

    def _equip(self, l: int, block: nn.Module, attention: Any, key: nn.Module, value: nn.Module, norm: Any) -> None:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.reused:
                return
            h_BTd = args[0] if args else kwargs["hidden_states"]
            mask = h_BTd.new_ones(h_BTd.shape[:2], dtype=torch.bool) if self.mask is None else self.mask.bool()
            p_BPd = self.generate(l, h_BTd, mask).to(h_BTd.dtype)
            p_BPd = p_BPd if norm is None else norm(p_BPd)
            self.made[l] = (key(p_BPd), value(p_BPd))

        handle = block.register_forward_pre_hook(before, with_kwargs=True)
        self._undo.append(handle.remove)
        here = inspect.unwrap(type(attention).forward).__globals__
        # A name of its own, so that what saves memory can put itself below the prompts and see their keys and values.
        attention.inner_attention = here["ALL_ATTENTION_FUNCTIONS"].get_interface(
            attention.config._attn_implementation, here["eager_attention_forward"]
        )

        if isinstance(place := getattr(attention, "layer_idx", None), int):
            self.places[l] = place

        def causal() -> bool:
            return bool(getattr(attention, "is_causal", False))

        def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Any, **options: Any) -> Any:
            if l in self.held:
                if mask is not None or query.shape[2] > 1:  # one token sees all keys: nothing is spent on it
                    count = self.made[l][0].shape[1]
                    mask = widened(mask, query, keys[:, :, count:], count, causal=causal())
            else:
                k, v = (_as_heads(x, keys) for x in self.made[l])
                mask = widened(mask, query, keys, k.shape[2], causal=causal())
                keys, values = torch.cat([k, keys], 2), torch.cat([v, values], 2)
            return attention.inner_attention(attention, query, keys, values, mask, **options)

        # Only this module's view of the config changes: masks are still made for the model's own attention.
        config, own = copy.deepcopy(attention.config), attention.config
        config._attn_implementation = _NAME
        AttentionInterface.register(_NAME, _attend)
        attention.prompted_attention, attention.config = attend, config

        def restore() -> None:
            del attention.prompted_attention, attention.inner_attention
            attention.config = own

        self._undo.append(restore)

    def _asked(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self.instruction = kwargs.pop(INSTRUCTION, None)
        return args, kwargs

    def _begin(self, backbone: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask, self.instruction, self.made = self.instruction, None, {}
        valid = kwargs.get("attention_mask")
        if mask is None and isinstance(valid, Tensor) and valid.ndim == 2:
            mask = valid
        self.mask = mask
        cache = kwargs.get("past_key_values")
        self.reused = cache is not None and cache.get_seq_length() > 0
        if self.reused:
            if cache is None or not hasattr(cache, "prompts"):
                raise UsageError("this cache was filled without prompts; begin with the whole text.")
            self.made = cache.prompts
            self.held = {l for l, place in self.places.items() if isinstance(_layer(cache, place), PromptedLayer)}
        elif mask is not None and bool((~mask.bool().any(1)).any()):
            row = int((~mask.bool().any(1)).nonzero()[0, 0])
            raise BadData(f"row {row} of the batch has no token that prompts could be made from.")

    def _end(self, backbone: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        cache = kwargs.get("past_key_values")
        cache = getattr(output, "past_key_values", None) if cache is None else cache
        if cache is not None and self.made:
            cache.prompts = self.made
            for l, place in self.places.items() if not self.reused else ():
                layer = _layer(cache, place)
                if type(layer) in (DynamicLayer, PromptedLayer) and layer.keys is not None:
                    cache.layers[place] = PromptedLayer(layer, *(_as_heads(x, layer.keys) for x in self.made[l]))
        # A block that is run again in the backward pass needs its prompts, or the mask to make them, a second time.
        again = torch.is_grad_enabled() and any(getattr(m, "gradient_checkpointing", False) for m in backbone.modules())
        self.made, self.reused, self.held = (self.made if again else {}), False, set()


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
    return module.prompted_attention(query, key, value, attention_mask, **options)


def _layer(cache: Any, place: int) -> Any:
    layers = getattr(cache, "layers", ())
    return layers[place] if place < len(layers) else None


def _as_heads(x_BPm: Tensor, like_BHSD: Tensor) -> Tensor:
    heads, size = like_BHSD.shape[1], like_BHSD.shape[3]
    return x_BPm.unflatten(-1, (heads, size)).transpose(1, 2).to(like_BHSD.dtype)


def widened(mask: Tensor | None, query: Tensor, keys: Tensor, count: int, *, causal: bool) -> Tensor | None:
    """Return an attention mask [.., T, S] with `count` keys before all others, which every query sees.

    None stays None where it means that all keys are seen; where it stands for the causal mask, that is written out.
    """
    rows, columns = query.shape[2], keys.shape[2]
    if mask is None:
        if not causal or rows == 1:
            return None
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)[None, None]
    seen = mask.new_ones if mask.dtype == torch.bool else mask.new_zeros
    return torch.cat([seen((*mask.shape[:-1], count)), mask], dim=-1)


def _attention(block: nn.Module, kinds: dict[nn.Module, str], order: list[nn.Module]) -> tuple[Any, ...]:
    """Return a block's attention module, its key and value projections, and the norm before them (None without one)."""
    inside = {kinds[m]: m for m in block.modules() if m in kinds}
    where = type(block).__name__
    if not {"query", "key", "value"} <= inside.keys():
        raise Refused(f"{where} has no separate query, key and value projections, through which prompts could be read.")
    key, value = inside["key"], inside["value"]
    attention: Any = next(m for m in block.modules() if key in m.children())
    where = type(attention).__name__
    if any(kinds.get(m) == "norm" for m in attention.modules()):
        raise Refused(f"{where} normalises its queries or keys itself, which prompts would not pass.")
    forward: Any = inspect.unwrap(type(attention).forward)
    if not hasattr(attention, "config") or "ALL_ATTENTION_FUNCTIONS" not in forward.__globals__:
        raise Refused(f"{where} does not look its attention up, so it cannot be given prompts.")
    # In a pre-norm block a norm runs before the key projection; in a post-norm block nothing does.
    members = set(block.modules())
    ran = [m for m in order if m in members]
    norms = [m for m in ran[: ran.index(key)] if kinds.get(m) == "norm"]
    return attention, key, value, norms[-1] if norms else None
