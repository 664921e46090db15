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
    """One layer to adapt, and nothing else that would be counted with it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output."""
        return self.layer(x)


def flops(claim: Claim) -> dict[str, Any]:
    """Count the products of one 384 x 384 layer, forward and backward, the gradient of its input among them.

    The detail says at which of TOKENS HUT is the cheaper and at which it is not, for the whole step and for the forward
    pass alone, and what the rank-1 variant takes, which makes no product of its own. Control: PEFT's HiRA, the same
    change of the weight in two products, which must not come out cheaper.
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

    def over_lora(name: str, backward: bool = True) -> dict[int, float]:
        return {t: counts[name][t][backward] / counts["lora"][t][backward] for t in TOKENS}

    ratio, ahead, twice, single = over_lora("hut"), over_lora("hut", False), over_lora("hira"), over_lora("rank-1")
    wanted = [ratio[t] for t in TOKENS if t >= FROM]
    gone = max(twice[t] for t in TOKENS if t >= FROM)
    return {
        "inequality": f"FLOPs(hut) < FLOPs(lora) for T >= {FROM}",
        "holds": max(wanted) < 1,
        "measured": max(wanted),
        "low": max(wanted),
        "high": max(wanted),
        "detail": (
            f"FLOPs over LoRA's at r={RANK}, {WIDTH} x {WIDTH} (products, counted), by tokens: whole step "
            f"{_said(ratio)}; forward alone {_said(ahead)}; whole step of rank-1 {_said(single)}"
        ),
        "gate": None,
        "control": {
            "what": "PEFT's HiRA: the same change of the weight in two products",
            "inequality": f"FLOPs(hira) < FLOPs(lora) for T >= {FROM}",
            "measured": gone,
            "destroyed": gone >= 1,
        },
        "figures": {"flops": counts, "step": ratio, "forward": ahead, "hira": twice, "rank-1": single},
    }


def _said(ratio: dict[int, float]) -> str:
    """Return the ratios by tokens, and at which of them they are below 1."""
    cheaper = [str(t) for t, r in ratio.items() if r < 1]
    where = "everywhere" if len(cheaper) == len(ratio) else f"at {', '.join(cheaper)}" if cheaper else "nowhere"
    return f"{', '.join(f'{t}: {r:.2f}' for t, r in ratio.items())} (cheaper {where})"


def _count(config: Any, tokens: int, backward: bool) -> int:
    model = get_peft_model(One(), config).train()  # type: ignore[arg-type]
    x = torch.randn(tokens, WIDTH, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = model(x)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()
