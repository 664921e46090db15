"""Masked language modelling: guess hidden tokens from both sides; logits only where a token is hidden.

Shapes: B rows, T tokens, M hidden tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DataCollatorForLanguageModeling

from brickyard.core.encoded import IGNORED, Encoded
from brickyard.core.errors import Refused

TARGETS = "labels"


class MaskedRows:
    """Rows of which each batch hides other tokens; stands in for `Examples` in the loop.

    A token is hidden with probability `share`: 80 % become the mask token, 10 % a random token, 10 % stay. What is
    hidden comes from torch's global generator, which the loop seeds and keeps in its checkpoints.
    """

    def __init__(self, rows: Encoded, tokenizer: Any, share: float) -> None:
        if tokenizer.mask_token is None:
            raise Refused("the tokenizer has no mask token, so no masked pre-training; give another base.")
        self.rows, self.lengths, self.labels = rows, rows.lengths, rows.labels
        self.collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=share)
        self.special = torch.tensor(sorted(tokenizer.all_special_ids))
        self.digest = f"{rows.digest} masked {share}"

    def __len__(self) -> int:
        return len(self.rows)

    def collate(self, index: np.ndarray) -> dict[str, Tensor]:
        """Return the inputs of the rows with some tokens hidden, and `labels` [B, T]: -100 where none is."""
        batch = {k: v for k, v in self.rows.collate(index).items() if k != TARGETS}
        special_BT = torch.isin(batch["input_ids"], self.special)
        batch["input_ids"], batch[TARGETS] = self.collator.torch_mask_tokens(batch["input_ids"], special_BT)
        return batch


def hidden_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the logits [M, V] of a masked language model at the hidden tokens alone.

    Its head reads each token by itself, so it may as well read the hidden ones as one row.
    """
    asked_BT = batch[TARGETS] != IGNORED

    def only_hidden(module: nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[asked_BT][None]
        return output

    backbone: nn.Module = getattr(model, model.base_model_prefix)  # type: ignore[arg-type]
    handle = backbone.register_forward_hook(only_hidden)
    try:
        return model(**{k: v for k, v in batch.items() if k != TARGETS}).logits[0].float()
    finally:
        handle.remove()


def masked_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean cross entropy of the hidden tokens of a batch; 0 where chance hid none."""
    targets_M = batch[TARGETS][batch[TARGETS] != IGNORED]
    return F.cross_entropy(hidden_logits(model, batch), targets_M, reduction="sum") / max(1, len(targets_M))


@torch.no_grad()
def check_hidden(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """Refuse a masked language model whose head does not read each token by itself."""
    was_training = model.training
    model.eval()
    whole = model(**{k: v for k, v in batch.items() if k != TARGETS}).logits[batch[TARGETS] != IGNORED]
    found = hidden_logits(model, batch)
    model.train(was_training)
    if found.shape != whole.shape or not torch.allclose(found, whole.float(), atol=1e-4, rtol=1e-3):
        raise Refused(f"the head of {type(model).__name__} does not read each token by itself; give another base.")
