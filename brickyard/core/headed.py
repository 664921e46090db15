"""A pre-trained backbone with a task's head on its last token states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput


class HeadedModel(nn.Module):
    """A backbone with a head on its last token states: `head(x_BTD, mask_BT) -> logits [B, width]`.

    x_BTD: states of the last layer [batch, tokens, width]; the maps of a convolutional backbone [B, D, H, W] come as
    H * W tokens. mask_BT: bool, True where a token counts.
    """

    base_model_prefix = "backbone"

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.config = backbone.config

    def forward(
        self, *, states: tuple[Tensor, Tensor] | None = None, labels: Tensor | None = None, **batch: Any
    ) -> SequenceClassifierOutput:
        """Return the logits of a batch as the backbone takes it, or of `states` = (x_BTD, mask_BT) computed before.

        `labels` may stand in the batch and are not used: the loss is the task's.
        """
        x_BTD, mask_BT = states if states is not None else self.states(**batch)
        given = (batch["input_ids"],) if getattr(self.head, "reads_ids", False) else ()
        return SequenceClassifierOutput(logits=self.head(x_BTD, mask_BT.bool(), *given))

    def states(self, **batch: Any) -> tuple[Tensor, Tensor]:
        """Return (x_BTD, mask_BT): the last token states of the batch and which of them count."""
        x_BTD = self.backbone(**batch).last_hidden_state
        if x_BTD.ndim == 4:
            x_BTD = x_BTD.flatten(2).transpose(1, 2)
        mask_BT = batch.get("attention_mask")
        if mask_BT is None or mask_BT.ndim != 2:
            return x_BTD, torch.ones(x_BTD.shape[:2], dtype=torch.bool, device=x_BTD.device)
        # Prefix tuning widens the mask by keys that have no states of their own.
        return x_BTD, mask_BT[:, -x_BTD.shape[1] :].bool()

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's token embedding, as PEFT asks for it."""
        return self.backbone.get_input_embeddings()  # type: ignore[operator,return-value]

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Recompute the backbone's activations in the backward pass instead of keeping them."""
        renamed: Any = getattr(self.backbone, "activation_checkpointing_enable", None)
        (renamed or self.backbone.gradient_checkpointing_enable)(**options)  # type: ignore[operator]

    def gradient_checkpointing_disable(self) -> None:
        renamed: Any = getattr(self.backbone, "activation_checkpointing_disable", None)
        (renamed or self.backbone.gradient_checkpointing_disable)()  # type: ignore[operator]

    @property
    def is_gradient_checkpointing(self) -> bool:
        # transformers 5.2x renamed it, and warns about the old name.
        name = "is_activation_checkpointing"
        renamed = hasattr(type(self.backbone), name)
        return bool(getattr(self.backbone, name if renamed else "is_gradient_checkpointing", False))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype
