"""The one bridge into PEFT for every method that changes layers: PEFT type BRICKYARD, whose config names our method.

`get_peft_model`, `PeftModel.from_pretrained`, Trainer, merge, disable, several adapters and mixed batches come from
PEFT; a method file brings its mathematics as module-level functions. `config` is the method's Config, `part` an
`inject_layer.Part` (`part["name"]` is a tensor of this layer or of its group), n and m the layer's in and out sides:

    fitted(config, leaves) -> Config                 optional: fills in options that go by the layers; stored with them
    plan(config, leaves, generator) -> Plan          the tensors of one adapter at their start, drawn from `generator`
    factors(config, part) -> (A_rn, B_mr, scaling)   low-rank: y = W x + scaling B A x; merge and exact LoRA for free
    weight(config, part) -> dW_mn                    any other change of the weight: merge, LoRA by SVD
    delta(config, part, x) -> y'                     y = W x + y', a faster path than `weight`, or the only one
    around(config, part, x, y) -> y                  the whole step from base output y, for rescalers and fused paths
    whole(config, part, x, bias) -> y                optional, beside `weight`: the layer in one product where no other
                                                     adapter is active; the base layer is not called
    together(configs, parts, x) -> y' or None        optional, beside `delta`: a mixed batch's, row i of x with the i-th
                                                     config and part, in one go; None where one by one is cheaper
    draw(config, leaves, generator) -> {name: any}   optional: once per training forward, seen as `part.drawn`
    at_rank(config, leaves, rank) -> {name: any}     optional: what `choose` sets where one adapter serves several ranks
    check(config, part) -> None                      optional: raise BadBrick for loaded tensors that cannot be right

A method that removes ranks in training says where they lie: RANK_AXES = {"name": axis}, see `core.ranks`.
`plan` and at least one of the next four are needed. In training `around` goes before `delta`, then `factors`, then
`weight`; outside training and autograd `factors` goes first, whose result is kept for the next call (KEEP_FACTORS =
False where `around` is as cheap without), but for a mixed batch, so they must agree. `config.dropout`, if there is one,
is applied to x as PEFT does; `config.target` holds the default targets.
"""

from __future__ import annotations

from brickyard.core.adapter_type import register
from brickyard.core.inject_attach import attach
from brickyard.core.inject_config import BrickyardConfig
from brickyard.core.inject_export import Exported, to_lora
from brickyard.core.inject_layer import BrickyardLinear, Leaf, Part, Plan, low_rank
from brickyard.core.inject_tuner import BrickyardTuner

__all__ = [
    "BrickyardConfig",
    "BrickyardLinear",
    "BrickyardTuner",
    "Exported",
    "Leaf",
    "Part",
    "Plan",
    "attach",
    "low_rank",
    "register",
    "to_lora",
]

register()
