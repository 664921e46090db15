"""The claim of `hut` that is counted: the FLOPs of a training step beside LoRA's, by the tokens of the batch."""

from __future__ import annotations

from typing import Any

import torch
from peft import HiraConfig, LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from brickyard.core.inject import BrickyardConfig
from brickyard.core.method import Claim

WIDTH, RANK = 384, 8
TOKENS = (16, 64, 128, 256, 512, 1024, 4096)
FROM = 512  # tokens from which the claim says that HUT is the cheaper


class One(nn.Module):
    """A layer behind a layer, so that the gradient of the input is needed too."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output."""
        return self.layer(self.before(x))


def flops(claim: Claim) -> dict[str, Any]:
    """Count forward and backward of one 384 x 384 layer, less the frozen layer before it.

    Control: PEFT's HiRA, the same change of the weight in two products, which must not come out cheaper.
    """
    kinds: dict[str, Any] = {
        "lora": LoraConfig(r=RANK, target_modules=["layer"]),
        "hira": HiraConfig(r=RANK, target_modules=["layer"]),
        "hut": BrickyardConfig(method="hut", options={"r": RANK, "target": ["layer"]}, target_modules=["layer"]),
        "rank-1": BrickyardConfig(
            method="hut", options={"variant": "rank-1", "target": ["layer"]}, target_modules=["layer"]
        ),
    }
    counts = {
        name: {t: [_count(config, t, backward) for backward in (False, True)] for t in TOKENS}
        for name, config in kinds.items()
    }
    ratio = {t: counts["hut"][t][1] / counts["lora"][t][1] for t in TOKENS}
    ahead = {t: counts["hut"][t][0] / counts["lora"][t][0] for t in TOKENS}
    twice = {t: counts["hira"][t][1] / counts["lora"][t][1] for t in TOKENS}
    wanted = [ratio[t] for t in TOKENS if t >= FROM]
    gone = max(twice[t] for t in TOKENS if t >= FROM)
    said = ", ".join(f"{t}: {r:.2f}" for t, r in ratio.items())
    return {
        "inequality": f"FLOPs(hut) < FLOPs(lora) for T >= {FROM}",
        "holds": max(wanted) < 1,
        "measured": max(wanted),
        "low": max(wanted),
        "high": max(wanted),
        "detail": (
            f"FLOPs of a step over LoRA's at r={RANK}, {WIDTH} x {WIDTH} (counted), by tokens: {said}; forward alone "
            f"at {FROM}: {ahead[FROM]:.2f}"
        ),
        "gate": None,
        "control": {
            "what": "PEFT's HiRA: the same change of the weight in two products",
            "inequality": f"FLOPs(hira) < FLOPs(lora) for T >= {FROM}",
            "measured": gone,
            "destroyed": gone >= 1,
        },
        "figures": {"flops": counts, "step": ratio, "forward": ahead, "hira": twice},
    }


def _count(config: Any, tokens: int, backward: bool) -> int:
    model = get_peft_model(One(), config).train()  # type: ignore[arg-type]
    x = torch.randn(tokens, WIDTH, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = model(x)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()
