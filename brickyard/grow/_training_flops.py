"""What training a language model costs in floating-point operations, counted, with and without masked products."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from brickyard.core.roles import LINEAR

NO_TIME = "Counted as if masked products were skipped; they are carried out in full here, so the masks saved no time."


@dataclass(frozen=True, kw_only=True)
class Flops:
    """What training on one token costs, counted; a multiply-add is two operations, the backward pass twice the forward.

    Attributes:
        fixed: weights outside the masks that multiply every token, the output layer among them.
        maskable, kept: weights under the masks, and those of them that exist.
        attention: operations of scores and mixing over whole blocks, forward and backward.
    """

    fixed: int
    maskable: int
    kept: int
    attention: int

    @property
    def dense(self) -> int:
        """Operations a token without masks: of the dense baseline, and of dense fine-tuning."""
        return 6 * (self.fixed + self.maskable) + self.attention

    @property
    def sparse(self) -> int:
        """Operations a token where masked products are skipped."""
        return 6 * (self.fixed + self.kept) + self.attention

    @property
    def ratio(self) -> float:
        """How many times fewer operations the masks leave."""
        return self.dense / self.sparse

    def compared(self, tokens: int, steps: int, seconds: float) -> dict[str, Any]:
        """Return a run of `steps` steps over `tokens` tokens beside a dense one: at equal steps, FLOPs and time."""
        return {
            "per_token": {
                "dense_pretraining": self.dense,
                "sparse_pretraining": self.sparse,
                "dense_fine_tuning": self.dense,
                "sparse_fine_tuning": self.sparse,
                "fewer_by": self.ratio,
                **asdict(self),
            },
            "equal_steps": {
                "steps": steps,
                "tokens": tokens,
                "dense_flops": tokens * self.dense,
                "this_flops": tokens * self.sparse,
            },
            "equal_flops": {"this_steps": steps, "dense_steps": math.floor(steps / self.ratio)},
            "equal_time": {"seconds": seconds, "this_steps": steps, "dense_steps": steps, "note": NO_TIME},
        }


def count_flops(model: nn.Module, kept: Mapping[str, int], context: int) -> Flops:
    """Count a language model's training FLOPs in blocks of `context` positions; `kept` as of `StaticMasks`.

    Linear layers and attention are counted; experts or mixers that are no linear layers are not.
    """
    linear = {f"{name}.weight": m.weight.numel() for name, m in model.named_modules() if isinstance(m, LINEAR)}
    maskable = sum(linear[name] for name in kept)
    config: Any = model.config
    heads = getattr(config, "num_attention_heads", 0)
    width = heads * (getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0))
    return Flops(
        fixed=sum(linear.values()) - maskable,
        maskable=maskable,
        kept=sum(kept.values()),
        attention=12 * config.num_hidden_layers * width * context,
    )
