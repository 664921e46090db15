"""Bricks that nobody put in: which hidden neurons serve which capability, and what cutting them costs the others.

Prompts are labelled by capability c. Half A scores the neurons, half B, other prompts, measures; all are of one length.

    a_j       = act(x w_j), gated act(x g_j) (x u_j)                   activation of neuron j of a feed-forward network
    s_j       = max over the prompt's tokens of a_j                    or the mean; one score per prompt
    AP_{j,c}  = sum_n (R_n - R_{n-1}) P_n                              s_j as a score for "the prompt belongs to c"
    S_c       = the `share` of each layer's neurons with the highest AP_{.,c} on half A
    D[c, c']  = loss(B_c' | S_c zeroed) - loss(B_c')                   nats per token
    random    = the same with neurons outside S_c, as many per layer and of the same sqrt(mean_c a_j^2) |W_down[:, j]|

Capabilities are localised where mean D[c, c] >= 2 mean D[c, c'] and >= 3 mean random, each with its 95 % interval. Else
the report says "no localisation found at this size"; it also does where the model tells the capabilities apart neither
by its loss nor by any neuron, so that there was nothing to find (the gate). Beside it:

    sparsity  the share of a token's neurons, smallest |a_j| |W_down[:, j]| first, that can be zeroed before the
              network's output changes by `error`, and before the perplexity rises by 1 %
    overlap   |S_c and S_c'| / |S_c or S_c'|, and what chance would give; it depends on the share, so at 5 shares too
    mass      mean |a_j| |W_down[:, j]| of a capability, by layer and by clusters of neurons with like keys

Source: "Configurable Foundation Models: Building LLMs from a Modular Perspective", arXiv 2409.02877. Headline, without
a number: in 7-8B models neurons are sparsely active, functions are localised and their sets largely disjoint.
Left out: encoders with a head for each capability; quantised weights. No speed is claimed: zeros are still multiplied.
Legend: N prompts, F neurons of a layer, L layers, C capabilities, S sets. Data: rows of text and label.

`brickyard audit configurable-bricks --base embedded:pylm-small --data embedded:python-kinds`
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from brickyard.audit import _neurons as neurons
from brickyard.audit._localised import Found, judged
from brickyard.audit._prompts import halves
from brickyard.audit._wants import Wants
from brickyard.core.base import Base
from brickyard.core.brick import Applied
from brickyard.core.errors import NotFinite, Refused, UsageError
from brickyard.core.ffn import FFN, by_keys, check_divides, every_ffn
from brickyard.core.method import Claim, Record
from brickyard.core.task import Task

if TYPE_CHECKING:
    from torch import nn

    from brickyard.core.data import Data

RECORD = Record(
    name="configurable-bricks",
    family="audit",
    title="which neurons serve which capability: sparsity, function scores, localisation against random neurons",
    paper="Configurable Foundation Models, arXiv 2409.02877",
    needs=("causal-lm",),
    because="what a cut costs is the loss of a language model",
    claims=(
        Claim(
            text="Cutting a capability's neurons costs it twice what it costs the others, and thrice random ones.",
            measure="kinds_of_python",
            base="embedded:pylm",
            data="embedded:python-kinds",
            seeds=1,
            train_rows=200,
            max_length=64,
            full={"train_rows": 300, "max_length": 128},
        ),
    ),
)
WANTS = Wants(labelled=True)  # the capability of each prompt
_NAME = "configurable-bricks"
_CAUSAL = Task("causal-lm", "bits_per_byte", None, 1, "text")
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)  # of a token's neurons, for the sparsity curve
CURVE = 64  # prompts of half B on which that curve is measured
PERPLEXITY = 0.01  # by which it may rise
WIDER = 5  # times the share, at which the overlap is shown again
_SCORES = 2**24  # numbers sorted at once


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the audit; UsageError for values out of range."""

    share: float = 0.01
    """share of each layer's neurons that make a capability's set, and are cut together"""
    prompts: int = 200
    """prompts of each capability at most, half of them to score the neurons and half to measure"""
    tokens: int = 64
    """every prompt is cut to so many tokens and shorter ones are left out, so that no length gives a capability away;
    0: whole prompts, up to the base's context"""
    pool: Literal["max", "mean"] = "max"
    """a neuron's score for a prompt: its largest activation over the tokens, or the mean"""
    draws: int = 5
    """sets of random neurons for each capability"""
    error: float = 0.1
    """relative error of a feed-forward network's output that the sparsity curve is read at"""
    clusters: int = 0
    """groups of neurons with like keys, over which the activation mass is counted too; 0: none (k-means on a wide
    network takes minutes a layer)"""
    seed: int = 0
    """of the prompts drawn and of the random neurons"""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 0.5:
            raise UsageError(f"{_NAME}: share={self.share}; expected a share above 0 and at most 0.5, e.g. 0.01.")
        if self.prompts < 20 or self.draws < 1 or self.clusters < 0 or self.clusters == 1 or self.seed < 0:
            raise UsageError(
                f"{_NAME}: prompts={self.prompts}, draws={self.draws}, clusters={self.clusters}, seed={self.seed}; "
                "expected at least 20 prompts, 1 draw, no or at least 2 clusters, and a seed of at least 0."
            )
        if self.tokens < 0 or 0 < self.tokens < 8:
            raise UsageError(f"{_NAME}: tokens={self.tokens}; expected at least 8, or 0 for whole prompts.")
        if not 0 < self.error < 1:
            raise UsageError(f"{_NAME}: error={self.error}; expected a relative error between 0 and 1.")


def average_precision(score_NF: Tensor, member_CN: Tensor) -> Tensor:
    """Return the average precision of every neuron's scores for every capability, float64 [C, F].

    score_NF: pooled activations, higher for "belongs to it"; member_CN: bool, whose prompt it is, at least one of each.
    Tied prompts count as one threshold, so a constant neuron's is the base rate. One sort a neuron, of all
    capabilities. Raises NotFinite for scores that are no numbers.
    """
    if not score_NF.isfinite().all():
        raise NotFinite("a neuron's score is not finite, so prompts cannot be ranked by it.")
    count, width = score_NF.shape
    parts = []
    for part_NF in score_NF.split(max(1, _SCORES // count), dim=1):
        sorted_NF, order_NF = part_NF.sort(dim=0, descending=True)
        last_NF = torch.ones_like(sorted_NF, dtype=torch.bool)
        last_NF[:-1] = sorted_NF[:-1] != sorted_NF[1:]
        place_N1 = torch.arange(count, device=score_NF.device)[:, None]
        # The last place of each run of equal scores: the nearest one at or behind a place.
        end_NF = torch.where(last_NF, place_N1, count - 1).flip(0).cummin(0).values.flip(0)
        found = []
        for member_N in member_CN:
            hit_NF = member_N[order_NF].double()
            precision_NF = hit_NF.cumsum(0).gather(0, end_NF) / (end_NF + 1)
            found.append((hit_NF * precision_NF).sum(0) / hit_NF.sum(0))
        parts.append(torch.stack(found))
    return torch.cat(parts, dim=1) if width else score_NF.new_zeros(len(member_CN), 0, dtype=torch.float64)


def per_layer(share: float, neurons_F: int) -> int:
    """Return how many neurons of a layer a share is: at least one."""
    return max(1, round(share * neurons_F))


def highest(score_CF: Tensor, share: float) -> Tensor:
    """Return each capability's share of a layer's neurons with the highest scores, bool [C, F]; ties: the first."""
    order_CF = score_CF.sort(dim=1, descending=True, stable=True).indices
    chosen_CF = torch.zeros_like(score_CF, dtype=torch.bool)
    return chosen_CF.scatter_(1, order_CF[:, : per_layer(share, score_CF.shape[1])], True)


def matched(norm_F: np.ndarray, chosen_F: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Return as many neurons outside of `chosen_F` (bool) as it has, of about the same activation norms: bool [F].

    Half of the others are drawn by chance, and of those the ones that lie nearest in the norm's logarithm are taken,
    one for each (a linear assignment). UsageError where fewer neurons lie outside than are wanted.
    """
    inside, outside = np.flatnonzero(chosen_F), np.flatnonzero(~chosen_F)
    if len(outside) < len(inside):
        raise UsageError(f"{len(outside)} neurons are left to draw {len(inside)} from; give a smaller share.")
    drawn = draw.permutation(outside)[: max(len(inside), len(outside) // 2)]
    tiny = np.finfo(np.float64).tiny  # a neuron that never fires
    size_F = np.log(np.maximum(norm_F, tiny))
    _, places = linear_sum_assignment(np.abs(size_F[inside][:, None] - size_F[drawn][None]))
    out = np.zeros_like(chosen_F)
    out[drawn[places]] = True
    return out


def overlaps(set_LCF: list[Tensor]) -> np.ndarray:
    """Return |S_c and S_c'| / |S_c or S_c'| over all layers, float64 [C, C]."""
    both_CC = sum((x.double() @ x.double().T for x in set_LCF), torch.zeros(()))
    assert isinstance(both_CC, Tensor)
    size_C = both_CC.diagonal()
    return (both_CC / (size_C[:, None] + size_C[None] - both_CC)).numpy()


def chance_overlap(set_LCF: list[Tensor]) -> float:
    """Return the overlap that two sets of those sizes drawn by chance have: k^2/F of k neurons are common."""
    sizes = [(int(x[0].sum()), x.shape[1]) for x in set_LCF]
    both = sum(k * k / width for k, width in sizes)
    return both / (2 * sum(k for k, _ in sizes) - both)


def dealt_anew(label_N: Tensor, capabilities: int, seed: int) -> Tensor:
    """Return labels that say nothing: each capability's prompts are dealt out to all labels evenly, by chance.

    Merely shuffled labels agree with the true ones a little, and the best of many neurons would find that little.
    """
    draw, out_N = np.random.Generator(np.random.PCG64(seed)), torch.empty_like(label_N)
    for c in range(capabilities):
        own = torch.nonzero(label_N == c).flatten()
        out_N[own[draw.permutation(len(own))]] = (torch.arange(len(own)) + c) % capabilities
    return out_N


@dataclass(frozen=True)
class Scored:
    """Half A: the scores and norms of the neurons of every layer, each list with one tensor [C, F] a layer.

    precision: average precision; norm: sqrt(mean a_j^2) |W_down[:, j]| over a capability's tokens; mass: mean |a_j|
    |W_down[:, j]|.
    """

    precision: list[Tensor]
    norm: list[Tensor]
    mass: list[Tensor]
    down: list[Tensor]
    passes: int

    def sets(self, share: float) -> list[Tensor]:
        """Return S_c of every layer, bool [C, F]."""
        return [highest(score_CF, share) for score_CF in self.precision]


def scored(
    model: nn.Module,
    ffns: list[FFN],
    prompts: neurons.Prompts,
    capabilities: int,
    pool: str,
    shuffle: int | None = None,
) -> Scored:
    """Score every neuron for every capability in one pass over the prompts.

    shuffle: a seed that deals the prompts' labels out anew, so that the scores mean nothing (a negative control).
    """
    if shuffle is not None:
        prompts = replace(prompts, label_N=dealt_anew(prompts.label_N, capabilities, shuffle))
    member_CN = prompts.label_N == torch.arange(capabilities)[:, None]
    precision: list[Tensor] = [torch.zeros(0)] * len(ffns)

    def give(place: int, pooled_NF: Tensor) -> None:
        precision[place] = average_precision(pooled_NF, member_CN)

    done = neurons.read(model, ffns, prompts, capabilities, pool, give)
    down = [neurons.down_norms(ffn) for ffn in ffns]
    norm = [square.sqrt() * w for square, w in zip(done.square, down, strict=True)]
    mass = [size * w for size, w in zip(done.size, down, strict=True)]
    return Scored(precision, norm, mass, down, done.passes)


def localise(
    model: nn.Module, ffns: list[FFN], half_b: neurons.Prompts, known: Scored, share: float, draws: int, seed: int
) -> Found:
    """Cut each capability's neurons, and random ones of the same norm, and measure what half B loses."""
    set_LCF = known.sets(share)
    capabilities = len(set_LCF[0])
    none_and_sets = [torch.cat([torch.zeros_like(x[:1]), x]) for x in set_LCF]
    loss_SN = neurons.losses(model, ffns, half_b, none_and_sets)
    random_DN = torch.empty(draws, len(half_b), dtype=torch.float64)
    drawn: list[float] = []
    for c in range(capabilities):
        own = torch.nonzero(half_b.label_N == c).flatten()
        draw = np.random.Generator(np.random.PCG64([seed, c]))
        picks = [
            np.stack([matched(norm[c].numpy(), x[c].numpy(), draw) for _ in range(draws)])
            for norm, x in zip(known.norm, set_LCF, strict=True)
        ]
        wanted = sum(float((norm[c] * x[c]).sum()) for norm, x in zip(known.norm, set_LCF, strict=True))
        got = sum(float((norm[c].numpy() * pick).sum()) for norm, pick in zip(known.norm, picks, strict=True)) / draws
        drawn.append(got / wanted if wanted > 0 else float("nan"))
        found_DN = neurons.losses(model, ffns, half_b.take(own), [torch.from_numpy(pick) for pick in picks])
        random_DN[:, own] = found_DN - loss_SN[0, own]
    return Found(
        loss_N=loss_SN[0].numpy(),
        increase_CN=(loss_SN[1:] - loss_SN[0]).numpy(),
        random_DN=random_DN.numpy(),
        label_N=half_b.label_N.numpy(),
        norm_ratio=tuple(drawn),
    )


def model_of(base: Base, changed: Base | Applied | None) -> nn.Module:
    """Return the language model that is looked at; Refused for what is none."""
    if isinstance(changed, Applied):
        if changed.brick is not None and not changed.brick.task.generative:
            raise Refused(
                f"{_NAME} cuts neurons of a language model, and this brick is for {changed.brick.task.kind}; give a "
                "brick of a language model, or no --brick."
            )
        return changed.model
    opened = changed if isinstance(changed, Base) else base
    if not opened.generative:
        raise Refused(
            f"{_NAME} measures the loss of a language model, and {opened.spec} is none; give a decoder, such as "
            "--base embedded:pylm-small."
        )
    return opened.model(_CAUSAL, seed=0)


def measure(
    base: Base, changed: Base | Applied | None, config: Config, data: Data, *, device: torch.device
) -> dict[str, Any]:
    """Return {"table": D with its controls, "tables", "holds", "localisation", "sparsity", "overlap", ..., "detail"}.

    changed: a brick on `base` or another checkpoint, to look at in its place. Half A is the train split and half B the
    test split where the data have both, else two halves of all rows. Raises BadData for prompts without labels, of
    fewer than two capabilities or too few of one, Refused where no feed-forward network is recognised or the model is
    no language model.
    """
    model = model_of(base, changed).to(device)
    half_a, half_b, names, report = halves(base, data, config.prompts, config.tokens, config.seed)
    ffns = every_ffn(model, _NAME)
    for ffn in ffns if config.clusters else ():
        check_divides(ffn, config.clusters, _NAME)
    known = scored(model, ffns, half_a, len(names), config.pool)
    again = scored(model, ffns, half_b, len(names), config.pool)
    found = localise(model, ffns, half_b, known, config.share, config.draws, config.seed)
    set_LCF = known.sets(config.share)
    verdict = judged(found, names, *kept(again, set_LCF))
    curve = _curve(model, ffns, half_b, known, config)
    shared = {f"{s:g}": known.sets(s) for s in (config.share, min(0.5, WIDER * config.share))}
    overlap = {s: {"measured": overlaps(x).tolist(), "chance": chance_overlap(x)} for s, x in shared.items()}
    mass = _mass(ffns, known, names, config.clusters)
    cut = {ffn.block: per_layer(config.share, ffn.neurons) for ffn in ffns}
    share = sum(cut.values()) / sum(ffn.neurons for ffn in ffns)
    return {
        "title": "nats a token that a capability loses (columns) with neurons cut: its own, another's, random ones",
        "table": verdict.pop("table"),
        "tables": {
            "the smallest contributions of each token zeroed": curve.pop("table"),
            "what two sets have in common": _overlap_table(overlap, names),
            "activation mass by layer": mass.pop("table"),
        },
        "holds": verdict["holds"],
        "localisation": verdict,
        "sparsity": curve,
        "overlap": overlap,
        "mass": mass,
        "neurons": {"layers": len(ffns), "of_each": cut, "in_all": sum(ffn.neurons for ffn in ffns), "share": share},
        "prompts": report,
        "passes": known.passes,
        "detail": "\n".join(
            [
                f"{verdict['sentence']} ({share:.1%} of every layer's neurons cut, {len(half_b)} prompts)",
                curve["sentence"],
                _overlap_sentence(overlap),
                mass["sentence"],
                report["sentence"],
            ]
        ),
    }


def kept(again: Scored, set_LCF: list[Tensor]) -> tuple[list[float], list[float]]:
    """Return the mean and the highest average precision of each capability's chosen neurons on other prompts."""
    ap_CF, set_CF = torch.cat(again.precision, 1), torch.cat(set_LCF, 1)
    mean_C = (ap_CF * set_CF).sum(1) / set_CF.sum(1)
    return mean_C.tolist(), ap_CF.masked_fill(~set_CF, 0).amax(1).tolist()


def _curve(model: nn.Module, ffns: list[FFN], half_b: neurons.Prompts, known: Scored, config: Config) -> dict[str, Any]:
    some = half_b.take(np.linspace(0, len(half_b) - 1, min(CURVE, len(half_b))).round().astype(int))
    error_K, nats_K = neurons.sparsity(model, ffns, some, known.down, (0.0, *SHARES))
    rise_K = torch.expm1(nats_K - nats_K[0])
    rows = [
        {"zeroed": f"{s:.0%}", "error of an output": float(e), "perplexity": f"{float(r):+.2%}"}
        for s, e, r in zip(SHARES, error_K[1:], rise_K[1:], strict=True)
    ]
    free = {
        "at_error": _largest(error_K[1:] <= config.error),
        "at_perplexity": _largest(rise_K[1:] <= PERPLEXITY),
    }
    return {
        "table": rows,
        "shares": list(SHARES),
        "error": error_K[1:].tolist(),
        "perplexity_rise": rise_K[1:].tolist(),
        **free,
        "prompts": len(some),
        "sentence": (
            f"of a token's neurons {_least(free['at_error'])} can be zeroed before an output changes by "
            f"{config.error:.0%}, {_least(free['at_perplexity'])} before the perplexity rises by {PERPLEXITY:.0%}"
        ),
    }


def _largest(fine_K: Tensor) -> float:
    """The largest of SHARES up to which all are fine; 0 where not even the smallest is."""
    return float((0.0, *SHARES)[int(fine_K.long().cumprod(0).sum())])


def _least(share: float) -> str:
    return f"at least {share:.0%}" if share else f"fewer than {SHARES[0]:.0%}"


def _overlap_table(overlap: dict[str, dict[str, Any]], names: tuple[str, ...]) -> list[dict[str, Any]]:
    pairs = [(a, b) for a in range(len(names)) for b in range(a + 1, len(names))]
    rows: list[dict[str, Any]] = [
        {"sets": f"{names[a]}, {names[b]}", **{f"at {float(s):.1%}": x["measured"][a][b] for s, x in overlap.items()}}
        for a, b in pairs
    ]
    return [*rows, {"sets": "by chance", **{f"at {float(s):.1%}": x["chance"] for s, x in overlap.items()}}]


def _overlap_sentence(overlap: dict[str, dict[str, Any]]) -> str:
    said = []
    for share, found in overlap.items():
        pairs_CC = np.array(found["measured"])
        mean = float(pairs_CC[~np.eye(len(pairs_CC), dtype=bool)].mean())
        said.append(f"{mean:.1%} at a share of {float(share):.1%} (chance: {found['chance']:.1%})")
    return f"two capabilities' sets have in common: {'; '.join(said)}"


def _mass(ffns: list[FFN], known: Scored, names: tuple[str, ...], clusters: int) -> dict[str, Any]:
    by_layer_LC = torch.stack([mass_CF.sum(1) for mass_CF in known.mass])
    by_layer_LC = by_layer_LC / by_layer_LC.sum(0)
    rows = [
        {"layer": ffn.block, **{name: f"{float(v):.1%}" for name, v in zip(names, row_C, strict=True)}}
        for ffn, row_C in zip(ffns, by_layer_LC, strict=True)
    ]
    half = (by_layer_LC.sort(0, descending=True).values.cumsum(0) < 0.5).sum(0) + 1
    out: dict[str, Any] = {"table": rows, "by_layer": by_layer_LC.tolist(), "layers_with_half": half.tolist()}
    said = f"half of the activation mass lies in {_range(half.tolist())} of {len(ffns)} layers"
    if clusters:
        few, parts = max(1, clusters // 10), []
        for ffn, mass_CF in zip(ffns, known.mass, strict=True):
            labels_F = by_keys(ffn.keys_FD, clusters)[0].labels_F
            sums_CN = torch.zeros(len(names), clusters, dtype=torch.float64).index_add_(1, labels_F, mass_CF)
            parts.append(sums_CN.sort(1, descending=True).values[:, :few].sum(1) / sums_CN.sum(1))
        top_C = torch.stack(parts).mean(0)
        out["in_clusters"] = {"clusters": clusters, "fullest": few, "share": top_C.tolist()}
        said += f", and {_range([round(100 * v, 1) for v in top_C.tolist()])} % of it in {few} of {clusters} clusters"
    return {**out, "sentence": said}


def _range(values: list[Any]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"
