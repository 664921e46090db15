"""The frozen bottom of a model: run alone up to one block, or skipped because its result is given.

    H_K = block_K-1( ... block_0(embed(x)))      H_K [B, T, D], the state that enters block K; a pure function of x

A batch that holds `entering` = H_K passes the bottom blocks by: each hands H_K on as it is, and block K begins with it.
All else (masks, positions, rotary tables, the head) the model computes from the same batch as ever, so nothing here
knows how a model is put together, and a batch without `entering` takes the ordinary way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from brickyard.core.errors import ParityBroken, Refused
from brickyard.core.receipt import TOLERANCE, probe_logits

ENTERING = "entering"  # key of H_K in a batch


class _Reached(Exception):
    """Ends a forward pass at the last block of the prefix, with its state."""

    def __init__(self, state: Tensor) -> None:
        super().__init__()
        self.state = state


class Prefix(nn.Module):
    """The embeddings and bottom blocks of `model`, frozen; called as a backbone it gives H_K as its last state.

    Args:
        model: the whole model; it stays the owner of its modules.
        names: dotted names of the bottom blocks, from the input on; at least one.
        store: type in which H_K is kept ("float16" or "float32").
    """

    def __init__(self, model: nn.Module, names: Sequence[str], *, store: str = "float16") -> None:
        super().__init__()
        self.model, self.store, self.label = model, store, f"the states that enter the block after {names[-1]}"
        self._blocks = [model.get_submodule(name) for name in names]
        # What a block returns: the state alone, or the first of so many values.
        self._arity: dict[nn.Module, int] = {}
        self._handle = model.register_forward_pre_hook(self._divert, with_kwargs=True)

    def forward(self, **batch: Any) -> BaseModelOutput:
        """Run the model up to H_K and no further; Refused where something that trains stands below it."""

        def stop(block: nn.Module, args: Any, output: Any) -> None:
            raise _Reached(_state(output))

        handle = self._blocks[-1].register_forward_hook(stop)
        try:
            self.model(**batch)
        except _Reached as reached:
            if reached.state.requires_grad:
                raise Refused(
                    "the states above the frozen layers depend on a parameter that trains, so they cannot be kept; "
                    "this base reads something trained below its blocks. Train it with full or lora."
                ) from None
            return BaseModelOutput(last_hidden_state=reached.state)  # type: ignore[arg-type]
        finally:
            handle.remove()
        raise Refused("the frozen blocks did not run in a pass through this base; train it with full or lora.")

    def agree(self, batch: dict[str, Any], entering: dict[str, Any]) -> None:
        """Raise ParityBroken unless `entering`, the same rows with H_K, give the logits of the ordinary pass."""
        plain, kept = probe_logits(self.model, batch).float(), probe_logits(self.model, entering).float()
        gap, scale = float((plain - kept).abs().max()), float(plain.abs().max())
        tolerance = TOLERANCE[getattr(torch, self.store)]
        if not gap <= tolerance * scale:
            raise ParityBroken(
                f"with {self.store} states kept at the frozen layers the logits differ by {gap:.3g}, accepted is "
                f"{tolerance:.3g} x {scale:.3g}; keep them as float32, or do not keep them."
            )

    def close(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()

    def _divert(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Before a pass of the model: with H_K in its batch, the blocks of the prefix hand it on."""
        if (state := kwargs.pop(ENTERING, None)) is None:
            return None
        undo = [_replace(block, self._handing_on(block, state)) for block in self._blocks]

        def restore(*_: Any) -> None:
            after.remove()
            for put_back in undo:
                put_back()

        after = model.register_forward_hook(restore, always_call=True)
        return args, kwargs

    def _handing_on(self, block: nn.Module, state: Tensor) -> Callable[..., Any]:
        """A forward for `block` that returns `state` in the form in which the block returns its own."""
        ordinary = block.forward

        def handed(*args: Any, **kwargs: Any) -> Any:
            if block not in self._arity:  # the first time it runs once, to show that form
                with torch.no_grad():
                    self._arity[block] = _arity(ordinary(*args, **kwargs))
            extra = self._arity[block]
            return state if extra == 0 else (state, *[None] * (extra - 1))

        return handed


def keep_at_rest(model: nn.Module, modules: Sequence[nn.Module]) -> Any:
    """Hold `modules` in evaluation mode (no dropout) in every pass of `model`, whoever trains it."""

    def rest(*_: Any) -> None:
        for module in modules:
            if module.training:
                module.eval()

    return model.register_forward_pre_hook(rest)


def _state(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _arity(output: Any) -> int:
    """0 where a block returns its state alone, else the length of its tuple; Refused where later blocks need more."""
    if isinstance(output, Tensor):
        return 0
    if any(value is not None for value in output[1:]):
        raise Refused("the blocks of this base hand on more than one state, which cannot be kept; train without it.")
    return len(output)


def _replace(block: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Give `block` another forward; the function returned puts the former one back."""
    own = block.__dict__.get("forward")
    block.forward = forward

    def put_back() -> None:
        if own is None:
            del block.forward
        else:
            block.forward = own

    return put_back
