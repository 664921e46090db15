"""EMoE: a trained feed-forward network tunes as a mixture of experts that it already holds. Stands beside any tuner.

    neurons f = 1..F of a late block, split into N experts C_i of F/N by the directions of their keys (rows of W1)
    a_TF = x_TD W1' + b1                                        pre-activations, adapters and all
    s_i(x) = mean_{f in C_i} (a_f - b1_f) = x . mean_{f in C_i} W1_f        gate: no parameter, no gradient
    m_i(x) = 1 for the k largest s_i, else 0                    ties: the expert with the lower number
    h = (act(a) * m) W2' + b2                                   gated networks: (act(gate) * up * m) W2'

In this mask form no token is dropped: the same numbers as a dispatch to k experts whose outputs are summed
with weight 1. Gates read the pre-activations, so they follow every update of weights or adapters. No parameter is added
(but for gate=learn), none is renamed or moved; a token's k F/N neurons alone work, and alone get a gradient from it. It
is no faster: what is masked is still multiplied.

`full + emoe` or `lora + emoe` trains so. With keep=sparse the model is also served so: the brick holds the split, so
that the same neurons work together as in training. With keep=dense all experts run from the first evaluation on
(EMoE-to-dense): the brick is the tuner's own, and exports and merges like any other.

Source: "Unlocking Emergent Modularity in Large Language Models", arXiv 2310.10908 (NAACL 2024). Headline: tuned so,
models of 22 M to 30 B are about half a point to a point better on GLUE than tuned densely, and stay better run densely.
From released code differ: no capacity, hence no dropped token; b2 added once; no dropout before the activation; keys
need no update after each step. gate=learn is EMoE-learn: a cosine router with noise and a balance loss; its values, a
softmax over the chosen experts, have mean 1 here, so that the output keeps its size. Left out: clusters by
co-activation (give `restructure` any split), expert parallelism, a GPU kernel that skips masked blocks.
Legend: T tokens (any leading shape), D width, F neurons, N experts, k = topk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brickyard.core.errors import BadBrick, Refused, UsageError
from brickyard.core.ffn import FFN, Split, at_random, by_keys, check_divides, ffns, permute_, plain
from brickyard.core.method import Claim, Record
from brickyard.core.structure import PREFIX, Structure

RECORD = Record(
    name="emoe",
    family="tune",
    title="Emergent mixture of experts: a late layer tunes with the best k of its N groups of neurons (EMoE)",
    paper="Unlocking Emergent Modularity in Large Language Models, arXiv 2310.10908",
    slot="structure",
    claims=(
        Claim(
            text="Tuned with half of a layer's experts it is at most 0.3 points below dense tuning, unseen domain too.",
            measure="transfer",
            part="kept",
            data="sst2|embedded:stdlib-topics",
            epochs=2,
            lrs=(5e-5,),
            train_rows=600,
            batch=16,
            full={
                "arms": {"learned": "full + emoe:experts=32,topk=16,layers=4,gate=learn"},
                "train_rows": 3000,
                "lrs": (2e-5, 5e-5),
                "batch": 32,
                "max_length": 64,
            },
        ),
        Claim(
            text="Run with all experts after tuning (EMoE-to-dense) it stays within 0.5 points.",
            measure="transfer",
            part="dense",
            data="sst2|embedded:stdlib-topics",
            epochs=2,
            lrs=(5e-5,),
            train_rows=600,
            batch=16,
            full={"train_rows": 3000, "lrs": (2e-5, 5e-5), "batch": 32, "max_length": 64},
        ),
        Claim(
            text="A token has exactly k F/N neurons at work; with all experts the model is the dense one.",
            measure="transfer",
            part="sparse",
            kind="counted",
            data="sst2|embedded:stdlib-topics",
            epochs=2,
            lrs=(5e-5,),
            train_rows=600,
            batch=16,
            full={"train_rows": 3000, "lrs": (2e-5, 5e-5), "batch": 32, "max_length": 64},
        ),
        Claim(
            text="On questions, whose classes are many, it is at most 0.3 points below dense tuning.",
            inequality="emoe >= full - 0.3",
            arms={"full": "full", "emoe": "full + emoe:experts=32,topk=16,layers=4"},
            control={
                "what": "training labels shuffled: there is nothing left to learn",
                "arm": "full + emoe:experts=32,topk=16,layers=4",
                "labels": "shuffled",
                "inequality": "emoe > control + 5.0",
            },
            control_seeds=1,
            gate="full > majority + 5.0",
            data="trec|embedded:stdlib-topics",
            epochs=2,
            lrs=(1e-4,),
            train_rows=400,
            batch=16,
            full={"train_rows": 3000, "lrs": (2e-5, 5e-5, 1e-4), "batch": 32, "max_length": 0},
        ),
    ),
)

_ROUTER = "emoe_router"  # of the model, where the gate is learned
_HOTTEST = math.log(100.0)  # largest log scale of the router's cosines


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of EMoE; UsageError for values out of range."""

    experts: int = 64
    """groups of neurons a layer is split into; must divide its neurons"""
    topk: int = 32
    """experts that run for a token; as many as there are: the dense model (a control)"""
    layers: int | tuple[int, ...] = -2
    """blocks to split, 0-based or from the end (-2: the last but one); the paper takes one or two of the last ones"""
    split: Literal["keys", "random"] = "keys"
    """experts by the directions of the neurons' keys, or by chance (a control)"""
    gate: Literal["avg", "learn", "dropout"] = "avg"
    """avg: the mean key, no parameter; learn: a trained cosine router; dropout: no gate, but as many neurons dropped by
    chance in training (a control)"""
    keep: Literal["sparse", "dense"] = "sparse"
    """how the tuned model is served: with topk experts, as it was tuned, or with all"""
    split_seed: int = 0
    """seed of the split, whatever the seed of training"""
    width: int = 256
    """width in which gate=learn compares tokens and experts"""
    noise: float = 1.0
    """gate=learn: noise / experts is the deviation of what training adds to its scores"""
    balance: float = 0.01
    """gate=learn: weight of the loss that spreads tokens over experts"""

    def __post_init__(self) -> None:
        if self.experts < 2:
            raise UsageError(f"emoe: experts={self.experts}; a split has at least 2.")
        if not 1 <= self.topk <= self.experts:
            raise UsageError(f"emoe: topk={self.topk} of experts={self.experts}; expected 1 to {self.experts}.")
        if not self.places:
            raise UsageError("emoe: layers=[] names no block; give at least one.")
        if self.gate == "dropout" and self.keep == "sparse":
            raise UsageError("emoe: gate=dropout drops nothing once it is tuned; write keep=dense with it.")
        if self.gate == "learn" and self.keep == "dense":
            raise UsageError("emoe: gate=learn trains a gate, which keep=dense would leave unused; use keep=sparse.")
        if self.width < 1 or not self.noise >= 0 or not self.balance >= 0 or math.isinf(self.noise + self.balance):
            raise UsageError(
                f"emoe: width={self.width}, noise={self.noise}, balance={self.balance}; expected a width of at least 1 "
                "and finite numbers of at least 0."
            )

    @property
    def places(self) -> tuple[int, ...]:
        """The blocks, also where one is given as a number."""
        return (self.layers,) if isinstance(self.layers, int) else self.layers

    @property
    def activity(self) -> float:
        """Share of a split layer's neurons that work for a token."""
        return self.topk / self.experts


def gate_scores(pre_TF: Tensor, bias_F: Tensor | None, split: Split) -> Tensor:
    """Return s_TN, the mean pre-activation of each expert's neurons less their mean bias, at least in float32."""
    a_TF = pre_TF if pre_TF.dtype == torch.float64 else pre_TF.float()
    with torch.autocast(a_TF.device.type, enabled=False):
        s_TN = _gathered(a_TF, split)
        if bias_F is not None:
            s_TN = s_TN - _gathered(bias_F.to(a_TF), split)
    return s_TN


def _gathered(a_TF: Tensor, split: Split) -> Tensor:
    """Mean over each expert's neurons."""
    if split.contiguous:
        return a_TF.unflatten(-1, (split.experts, split.size)).mean(-1)
    return a_TF @ split.members(a_TF).T / split.size


def top(s_TN: Tensor, k: int) -> Tensor:
    """Return m_TN, bool: the k experts with the largest scores; of equal ones those with the lower number."""
    order_TN = torch.sort(s_TN, dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(s_TN, dtype=torch.bool).scatter_(-1, order_TN[..., :k], True)


def masked(h_TF: Tensor, m_TN: Tensor, split: Split) -> Tensor:
    """Return the hidden activations with the neurons of the experts that m_TN leaves out set to zero.

    For the backward pass the N booleans of a token are kept, not F numbers.
    """
    return _Masked.apply(h_TF, m_TN, None if split.contiguous else split.members(h_TF))


class _Masked(torch.autograd.Function):
    generate_vmap_rule = True  # per-sample gradients

    @staticmethod
    def forward(h_TF: Tensor, m_TN: Tensor, members_NF: Tensor | None) -> Tensor:
        return _times(h_TF, m_TN, members_NF)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _times(gradients[0], *ctx.saved_tensors), None, None


def _times(h_TF: Tensor, w_TN: Tensor, members_NF: Tensor | None) -> Tensor:
    """Multiply each neuron by the weight of its expert; neurons in contiguous experts where `members_NF` is None."""
    if members_NF is None:
        return (h_TF.unflatten(-1, (w_TN.shape[-1], -1)) * w_TN.to(h_TF.dtype).unsqueeze(-1)).flatten(-2)
    return h_TF * (w_TN.to(h_TF.dtype) @ members_NF.to(h_TF.dtype))  # one term a sum, so it is exact


def router_values(p_TN: Tensor, m_TN: Tensor) -> Tensor:
    """Return v_TN, the probabilities of the chosen experts scaled to a mean of 1 over them; 0 for the others."""
    chosen_TN = p_TN * m_TN
    return chosen_TN * m_TN.sum(-1, keepdim=True) / chosen_TN.sum(-1, keepdim=True)


def balance_loss(p_TN: Tensor, m_TN: Tensor, real_T: Tensor | None) -> Tensor:
    """N sum_i (share of choices that fall on i) (mean probability of i): 1 where all are alike. Padding counts not."""
    weight_T = torch.ones_like(p_TN[..., 0]) if real_T is None else real_T.to(p_TN)
    share_N = (m_TN * weight_T.unsqueeze(-1)).flatten(0, -2).sum(0)
    mean_N = (p_TN * weight_T.unsqueeze(-1)).flatten(0, -2).sum(0) / weight_T.sum()
    return p_TN.shape[-1] * (share_N / share_N.sum() * mean_N).sum()


class Router(nn.Module):
    """Scores of experts as scaled cosines of projected tokens with learned directions: x [..., D] -> [..., N]."""

    def __init__(self, width: int, experts: int, inner: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, inner)
        self.directions = nn.Parameter(torch.randn(experts, inner) / math.sqrt(inner))
        self.log_scale = nn.Parameter(torch.tensor(math.log(2.0)))

    def forward(self, x: Tensor) -> Tensor:
        cosines = F.normalize(self.project(x), dim=-1) @ F.normalize(self.directions, dim=-1).T
        return cosines * self.log_scale.clamp(max=_HOTTEST).exp()


@dataclass
class _Padding:
    """Remembers which tokens of the batch under way are real."""

    real_BT: Tensor | None = None

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self.real_BT = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def of(self, p_BTN: Tensor) -> Tensor | None:
        """Which of the tokens are real; those that a method put before a row's own (prompts) are."""
        real_BT = self.real_BT
        if real_BT is None or p_BTN.ndim != 3:
            return None
        return F.pad(real_BT, (p_BTN.shape[1] - real_BT.shape[1], 0), value=1)


@dataclass
class _Gate:
    """The gate of one feed-forward network: reads its keys' outputs, masks what enters its values."""

    ffn: FFN
    config: Config
    padding: _Padding
    router: Router | None = None
    split: Split | None = None
    structure: Structure | None = None
    balance: Tensor | None = None
    weights: Tensor | None = field(default=None, repr=False)
    handles: list[Any] = field(default_factory=list)

    def prepare(self) -> float:
        """Split the neurons by their present keys; returns the seconds that it took, now or when it was done first."""
        config, seconds = self.config, 0.0
        if self.split is None:
            if config.split == "random":
                self.split = at_random(self.ffn.neurons, config.experts, seed=config.split_seed)
            else:
                self.split, seconds = by_keys(self.ffn.keys_FD, config.experts, seed=config.split_seed)
        return seconds

    def attach(self) -> None:
        self.handles = [
            self.ffn.key_layer.register_forward_hook(self.read),
            self.ffn.value_layer.register_forward_pre_hook(self.mask),
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def read(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """After the keys: choose the experts of every token."""
        assert self.structure is not None
        self.weights = None
        if not self.structure.on or self.config.gate == "dropout":
            return
        self.prepare()
        assert self.split is not None
        if self.router is not None:
            self.weights = self._routed(self.router, args[0])
            return
        with torch.no_grad():
            bias: Any = getattr(plain(layer), "bias", None)
            self.weights = top(gate_scores(output.detach(), bias, self.split), self.config.topk)

    def _routed(self, router: Router, x_TD: Tensor) -> Tensor:
        scores_TN = router(x_TD).float()
        p_TN = scores_TN.softmax(-1)
        if router.training:
            scores_TN = scores_TN + torch.randn_like(scores_TN) * self.config.noise / self.config.experts
        m_TN = top(scores_TN.detach(), self.config.topk)
        if router.training and torch.is_grad_enabled():
            self.balance = balance_loss(p_TN, m_TN, self.padding.of(p_TN))
        return router_values(p_TN, m_TN)

    def mask(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Before the values: let only the chosen experts' neurons through."""
        assert self.structure is not None
        if not self.structure.on:
            return None
        if self.config.gate == "dropout":
            return (F.dropout(args[0], 1 - self.config.activity, layer.training), *args[1:])
        if self.weights is None or self.split is None:
            raise Refused(f"emoe: {self.ffn.value} ran without {self.ffn.key} before it; this model cannot be split.")
        weights_TN, self.weights = self.weights, None
        if weights_TN.dtype == torch.bool:
            return (masked(args[0], weights_TN, self.split), *args[1:])
        members_NF = None if self.split.contiguous else self.split.members(args[0])
        return (_times(args[0], weights_TN, members_NF), *args[1:])

    @property
    def key(self) -> str:
        """Name of its split in a brick."""
        return f"{PREFIX}{self.ffn.block}.expert_of"


def restructure(
    model: nn.Module, config: Config, *, splits: dict[str, Split] | None = None, permute: bool = False
) -> Structure:
    """Put EMoE on `model`, plain or under adapters, in place; it is at work until `remove` or `to_dense`.

    splits: block name -> the split to use there, in place of one made by `config.split`. permute: also reorder the
    neurons of the split layers in place so that experts are contiguous, which saves two small products a pass; `remove`
    gives the old order back bit for bit.
    Raises UsageError for layers out of range and experts that do not divide the neurons, Refused for a model that is
    converted already, whose blocks hold no feed-forward network, or (permute) that carries adapters.
    """
    found = ffns(model, config.places, "emoe")
    for ffn in found:
        check_divides(ffn, config.experts, "emoe")
        if _gates(ffn.key_layer):
            raise Refused(f"emoe: {ffn.block} is split already; take the first structure off with emoe.to_dense.")
    inner, padding = found[0].model, _Padding()
    given = splits or {}
    if unknown := sorted(given.keys() - {ffn.block for ffn in found}):
        raise UsageError(f"emoe: splits are given for {', '.join(unknown)}; split are {[f.block for f in found]}.")
    gates = [_Gate(ffn, config, padding, split=given.get(ffn.block)) for ffn in found]
    routers = nn.ModuleDict()
    if config.gate == "learn":
        for gate in gates:
            gate.router = Router(gate.ffn.keys_FD.shape[1], config.experts, config.width)
            routers[gate.ffn.block.replace(".", "_")] = gate.router
        routers.to(found[0].keys_FD.device).train(model.training)
        routers.method_module = True  # type: ignore[assignment]
        inner.add_module(_ROUTER, routers)
        handle = inner.register_forward_pre_hook(padding, with_kwargs=True)
    orders: dict[str, Tensor] = {}
    if permute:
        for gate in gates:
            gate.prepare()
            assert gate.split is not None
            orders[gate.ffn.block] = gate.split.order_F
            permute_(gate.ffn, gate.split.order_F)
            gate.split = Split(gate.split.labels_F[gate.split.order_F], config.experts)

    def remove() -> None:
        for gate in gates:
            gate.remove()
            if gate.ffn.block in orders:
                permute_(gate.ffn, torch.argsort(orders.pop(gate.ffn.block)))
        if hasattr(inner, _ROUTER):
            handle.remove()
            delattr(inner, _ROUTER)

    def tensors() -> dict[str, Tensor]:
        if config.keep == "dense":
            return {}
        stored: dict[str, Tensor] = {}
        for gate in gates:
            gate.prepare()
            assert gate.split is not None
            stored[gate.key] = gate.split.labels_F.to(torch.int32)
        learned = {f"{PREFIX}{_ROUTER}.{name}": p.detach().cpu().clone() for name, p in routers.state_dict().items()}
        return {**stored, **learned}

    def load(given: dict[str, Tensor]) -> None:
        if config.keep == "dense" and not given:
            return
        live = {f"{PREFIX}{_ROUTER}.{name}": p for name, p in routers.state_dict().items()}
        expected = {**{gate.key: (gate.ffn.neurons,) for gate in gates}, **{n: tuple(p.shape) for n, p in live.items()}}
        shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
        if shapes != expected:
            raise BadBrick(f"emoe: the split given is {shapes}; the model takes {expected}.")
        for gate in gates:
            gate.split = Split(given[gate.key].long().cpu(), config.experts)
        with torch.no_grad():
            for name, p in live.items():
                p.copy_(given[name])

    def balance() -> Tensor:
        losses = [gate.balance for gate in gates if gate.balance is not None]
        for gate in gates:
            gate.balance = None
        return config.balance * torch.stack(losses).sum() if losses else torch.zeros(())

    structure = Structure(
        about={
            "method": "emoe",
            "runs": f"{config.topk} of {config.experts} experts in {len(gates)} block{'s' if len(gates) > 1 else ''}",
            "keep": config.keep,
            "experts": config.experts,
            "topk": config.topk,
            "blocks": [gate.ffn.block for gate in gates],
        },
        serves=config.keep == "sparse",
        prepare=lambda: sum(gate.prepare() for gate in gates),
        tensors=tensors,
        load=load,
        remove=remove,
        matched={"emoe": [name for gate in gates for name in (gate.ffn.key, gate.ffn.value)]},
        parameter_groups=[{"params": list(routers.parameters())}] if len(routers) else [],
        extra_loss=balance if len(routers) and config.balance else None,
    )
    for gate in gates:
        gate.structure = structure
        gate.attach()
    return structure


def to_dense(model: nn.Module) -> int:
    """Take EMoE off a model, so that all experts run with the weights as they are; returns on how many layers."""
    gates = [gate for module in model.modules() for gate in _gates(module)]
    for structure in {id(gate.structure): gate.structure for gate in gates}.values():
        assert structure is not None
        structure.remove()
    return len(gates)


def _gates(layer: nn.Module) -> list[_Gate]:
    """The gates that read a layer."""
    owners = (getattr(hook, "__self__", None) for hook in layer._forward_hooks.values())
    return [owner for owner in owners if isinstance(owner, _Gate)]
