"""A network beside a frozen backbone: it reads the states of chosen blocks and gives the last state in their place.

    H_0 = what enters block 0,  H_i = what leaves block i        [B, T, D], without gradient, in evaluation mode
    out = side(H_i of the chosen layers, batch)                  [B, T, D], what the head or output layer then reads

The model stays the object that it was, so its head, its loss and `generate` work as ever; only its backbone's forward
is another. States are a pure function of the input, so they can be kept: a batch that holds them as `entering`, side by
side in its last dimension, runs no block of the backbone. Used by lst, unipt and hst.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast

from brickyard.core.attached import Attached, attach_in_place
from brickyard.core.errors import ParityBroken, Refused, UsageError
from brickyard.core.prefix import ENTERING, keep_at_rest
from brickyard.core.receipt import TOLERANCE, probe_logits
from brickyard.core.roles import blocks, own_head

SIDE = "side"  # name of the side network in the model


def backbone_of(model: nn.Module) -> nn.Module:
    """Return the pre-trained part of a model below its head; Refused where there is none."""
    found = getattr(model, str(getattr(model, "base_model_prefix", "")), None)
    if not isinstance(found, nn.Module):
        raise Refused(f"{type(model).__name__} has no backbone below its head that a side network could read.")
    return found


def stack(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the blocks of a model of one stack as (name, module); Refused for several (encoder-decoders, stages)."""
    found = blocks(model)
    parents = sorted({name.rpartition(".")[0] for name, _ in found})
    if len(parents) != 1:
        raise Refused(
            f"a side network reads one stack of blocks; this base has {len(parents)} "
            f"({', '.join(parents[:4]) or 'none'}). For encoder-decoders and staged networks use lora or full."
        )
    return found


class Reader(nn.Module):
    """The frozen backbone as a function from a batch to the states of some layers; called, it gives them side by side.

    Args:
        model: the whole model; it stays the owner of its modules, and calls `side` from now on.
        side: called with the list of states [B, T, D] and the batch as the backbone got it; returns [B, T, D].
        layers: 0 for what enters the first block, i for what leaves block i - 1; rising.
        store: type in which the states are kept ("float16" or "float32").
        modules: what counts as blocks; None: those of the model's one stack.
    """

    def __init__(
        self,
        model: nn.Module,
        side: nn.Module,
        layers: Sequence[int],
        *,
        store: str = "float16",
        modules: Sequence[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        found = [module for _, module in stack(model)] if modules is None else list(modules)
        self.layers, self.store = tuple(layers), store
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise UsageError(f"layers={list(self.layers)}: name each layer once, rising.")
        if not 0 <= self.layers[0] <= self.layers[-1] <= len(found):
            raise UsageError(f"layers={list(self.layers)}: this base has layers 0 to {len(found)}.")
        self.label = f"the states of layers {list(self.layers)}"
        self.passes = 0  # how often the backbone ran
        self.model = model
        # None of these is registered a second time: they belong to the model.
        self._side, self._blocks, self._backbone = [side], found, [backbone_of(model)]
        self._ordinary = self._backbone[0].forward
        self._entering: Tensor | None = None
        self._backbone[0].forward = self._beside
        self._handles = [
            model.register_forward_pre_hook(self._take, with_kwargs=True),
            model.register_forward_hook(self._forget, always_call=True),
        ]

    def forward(self, **batch: Any) -> BaseModelOutput:
        """Return the states side by side, [B, T, layers * D], as the last state of an output."""
        return BaseModelOutput(last_hidden_state=torch.cat(self._run((), batch)[0], dim=-1))  # type: ignore[arg-type]

    def agree(self, batch: dict[str, Any], entering: dict[str, Any]) -> None:
        """Raise ParityBroken unless `entering`, the same rows with their states, give the logits of the whole pass."""
        plain, kept = (probe_logits(self.model, given).float() for given in (batch, entering))
        gap, scale = float((plain - kept).abs().max()), float(plain.abs().max())
        tolerance = TOLERANCE[getattr(torch, self.store)]
        if not gap <= tolerance * scale:
            raise ParityBroken(
                f"with {self.store} states kept the logits differ by {gap:.3g}, accepted is {tolerance:.3g} x "
                f"{scale:.3g}; keep them as float32 (store=float32), or do not keep them (cache=false)."
            )

    def close(self) -> None:
        """Give the backbone its own forward back and take the hooks off the model."""
        self._backbone[0].__dict__.pop("forward", None)
        for handle in self._handles:
            handle.remove()

    def _take(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._entering = kwargs.pop(ENTERING, None)
        return args, kwargs

    def _forget(self, *_: Any) -> None:
        self._entering = None

    def _beside(self, *args: Any, **kwargs: Any) -> Any:
        if self._entering is not None:
            states, out = list(self._entering.chunk(len(self.layers), dim=-1)), BaseModelOutputWithPast()
        else:
            states, out = self._run(args, kwargs)
        given = dict(kwargs)
        if args and "input_ids" not in given:
            given["input_ids" if args[0].dtype == torch.int64 else "pixel_values"] = args[0]
        if given.get("past_key_values") is None and given.get("use_cache") is not False:
            # A cache that the backbone just began: language models begin one unless they are told not to.
            given["past_key_values"] = getattr(out, "past_key_values", None)
        out.last_hidden_state = self._side[0](states, given)
        return out

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], Any]:
        """Run the backbone without gradient; return the chosen states and its output."""
        seen: dict[int, Tensor] = {}
        handles = []
        if 0 in self.layers:

            def enters(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
                seen[0] = given[0] if given else named["hidden_states"]

            handles.append(self._blocks[0].register_forward_pre_hook(enters, with_kwargs=True))
        for i in self.layers:
            if i:
                handles.append(self._blocks[i - 1].register_forward_hook(_keep(seen, i)))
        try:
            with torch.no_grad():
                out = self._ordinary(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        self.passes += 1
        if missing := [i for i in self.layers if i not in seen]:
            raise Refused(f"layer {missing[0]} of this base did not run in a pass through it.")
        return [seen[i] for i in self.layers], out


def _keep(seen: dict[int, Tensor], i: int) -> Any:
    def leaves(module: nn.Module, args: Any, output: Any) -> None:
        seen[i] = output if isinstance(output, Tensor) else output[0]

    return leaves


def valid_tokens(states: Sequence[Tensor], batch: dict[str, Any]) -> Tensor:
    """Return mask_BT, true where a token of the states counts."""
    x = states[-1]
    mask_BT = batch.get("attention_mask")
    if mask_BT is None or mask_BT.ndim != 2:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    return mask_BT[:, -x.shape[1] :].bool()


def attach_side(
    model: nn.Module,
    side: nn.Module,
    layers: Sequence[int],
    *,
    trainable: Sequence[str] | None = None,
    cache: bool = True,
    store: str = "float16",
    modules: Sequence[tuple[str, nn.Module]] | None = None,
    no_decay: Sequence[str] = (),
) -> Attached:
    """Put `side` beside the frozen backbone of `model`; it and the task's own head train.

    trainable: names of the side network's parameters that train; None: all of them. cache: let the loop keep the states
    of each row (of one size all). modules: (name, module) of what is read, see Reader. no_decay: names of the side
    network's parameters that weight decay leaves alone beside those with one axis: gains and biases of several layers
    in one tensor. A brick stores what trains.
    """
    if hasattr(model, SIDE):
        raise Refused("this model already has a side network; take it off first.")
    read = stack(model) if modules is None else list(modules)
    side.method_module = True  # type: ignore[assignment]
    model.add_module(SIDE, side.to(next(model.parameters()).device))
    reader = Reader(model, side, layers, store=store, modules=[module for _, module in read])
    heads = tuple(f"{name}." for name in own_head(model)) or ("\0",)
    inside = [name for name, _ in side.named_parameters()] if trainable is None else trainable
    wanted = {f"{SIDE}.{name}" for name in inside}
    found = [n for n, _ in model.named_parameters() if n in wanted or n.startswith(heads)]
    spared = {f"{SIDE}.{name}" for name in no_decay}
    flat = [n for n, p in model.named_parameters() if p.ndim < 2 or n in spared]
    matched = {"read": ["what enters the first block" if i == 0 else read[i - 1][0] for i in layers]}
    attached = attach_in_place(model, found, matched=matched, no_decay=flat)
    resting = keep_at_rest(model, [backbone_of(model)])
    if cache:
        attached.prefix = reader  # type: ignore[assignment]
    put_back = attached.detach

    def detach() -> nn.Module:
        put_back()
        resting.remove()
        reader.close()
        delattr(model, SIDE)
        return model

    attached.detach = detach
    return attached
