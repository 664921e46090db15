"""Read the hidden neurons of feed-forward networks while a model reads prompts, cut some of them, and put it back.

    h = a W_down',  a_j = act(x w_j)  or, gated,  act(x g_j) (x u_j)          a: what enters the last layer

so both are hooks before the last layer of each network. Of several sets of neurons, each row of one expanded batch
loses another one. Legend: N prompts, T tokens, L networks, F neurons, S sets, B = S n rows, C capabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from brickyard.core.base import Base
from brickyard.core.documents import boundary
from brickyard.core.encoded import IGNORED, known_to
from brickyard.core.errors import NotFinite
from brickyard.core.ffn import FFN, plain
from brickyard.core.forwards import evaluating

_POSITIONS = 4096  # of one forward pass
_LOGITS = 2**27  # numbers of logits held at once: half a GiB
POOLED = 2**31  # bytes of pooled activations held at once; beyond it, the prompts are read several times
_COLUMNS = 2**24  # numbers of an identity that goes through a layer at once


@dataclass(frozen=True)
class Prompts:
    """Prompts as a language model reads them: a start token, then the prompt's own tokens, of which each is guessed.

    ids_NT: int64, padded; targets_NT: the token that follows, -100 where there is none; real_NT: where the prompt's own
    tokens stand among the inputs (the start token is the same everywhere and says nothing of a prompt); label_N: the
    capability's index.
    """

    ids_NT: Tensor
    targets_NT: Tensor
    real_NT: Tensor
    label_N: Tensor

    def __len__(self) -> int:
        return len(self.label_N)

    def take(self, index: Any) -> Prompts:
        """Return some of them, in the order of `index`."""
        rows = torch.as_tensor(index)
        return Prompts(self.ids_NT[rows], self.targets_NT[rows], self.real_NT[rows], self.label_N[rows])

    def batch(self, rows: Any, times: int, device: torch.device) -> dict[str, Tensor]:
        """Return the model's inputs of some prompts, all of them `times` over."""
        asked = (self.targets_NT[rows] != IGNORED).long()
        given = {"input_ids": self.ids_NT[rows], "attention_mask": asked}
        return {name: x.repeat(times, 1).to(device) for name, x in given.items()}


def tokens_of(texts: Sequence[str], base: Base) -> list[np.ndarray]:
    """Return the tokens of each text, without any that the tokenizer would add."""
    made = base.tokenizer(list(texts), verbose=False, return_attention_mask=False, add_special_tokens=False)
    return [np.asarray(ids, dtype=np.int64) for ids in made["input_ids"]]


def prompts_of(rows: Sequence[np.ndarray], labels: Sequence[int], base: Base) -> Prompts:
    """Put tokenised prompts side by side; BadBase where the tokenizer does not fit the base."""
    start, end = boundary(base)
    known_to(max((int(ids.max(initial=0)) for ids in rows), default=0), max(start, end), base)
    lengths = torch.tensor([len(ids) for ids in rows])
    targets = nn.utils.rnn.pad_sequence([torch.from_numpy(ids) for ids in rows], True, IGNORED)
    place = torch.arange(targets.shape[1])
    given = torch.full_like(targets, end)
    given[:, 0] = start
    given[:, 1:] = torch.where(targets[:, :-1] == IGNORED, end, targets[:, :-1])
    real = (place > 0) & (place < lengths[:, None])
    return Prompts(given, targets, real, torch.tensor(labels))


def down_norms(ffn: FFN) -> Tensor:
    """Return |column j of W_down| of every neuron, float64 [F] on the CPU; with adapters, of the weight they make."""
    layer: Any = ffn.value_layer
    if plain(layer) is layer:
        w_DF = layer.weight.detach()
        w_DF = w_DF.T if isinstance(layer, Conv1D) else w_DF
        return torch.linalg.vector_norm(w_DF, dim=0, dtype=torch.float64).cpu()
    weight: Any = plain(layer).weight
    out, device, dtype = [], weight.device, weight.dtype
    with torch.no_grad(), evaluating(ffn.model):
        nothing = layer(torch.zeros(1, ffn.neurons, device=device, dtype=dtype))
        for part in torch.arange(ffn.neurons, device=device).split(max(1, _COLUMNS // ffn.neurons)):
            one_hot = nn.functional.one_hot(part, ffn.neurons).to(dtype)
            out.append(torch.linalg.vector_norm(layer(one_hot) - nothing, dim=1, dtype=torch.float64).cpu())
    return torch.cat(out)


@contextmanager
def reading(ffns: Sequence[FFN], see: Callable[[int, nn.Module, Tensor], Tensor | None]) -> Iterator[None]:
    """Call `see(network, its last layer, a [B, T, F])` in every forward; what it returns stands in place of a.

    The hooks go with the context, whatever happens in it.
    """

    def hook(place: int) -> Callable[..., Any]:
        def before(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            changed = see(place, layer, args[0])
            return None if changed is None else (changed, *args[1:])

        return before

    handles = [ffn.value_layer.register_forward_pre_hook(hook(place)) for place, ffn in enumerate(ffns)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def cutting(ffns: Sequence[FFN], cut_LSF: Sequence[Tensor]) -> Iterator[None]:
    """Zero neurons: of a batch of S groups of rows, group s loses `cut_LSF[l][s]` (bool [F]) of network l.

    Every neuron outside of its row's set keeps its number bit for bit.
    """

    def see(place: int, layer: nn.Module, a_BTF: Tensor) -> Tensor:
        cut_SF = cut_LSF[place].to(a_BTF.device)
        grouped = a_BTF.unflatten(0, (len(cut_SF), -1))
        return grouped.masked_fill(cut_SF[:, None, None, :], 0).flatten(0, 1)

    with reading(ffns, see):
        yield


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _at_once(prompts: Prompts, model: nn.Module) -> int:
    """Rows of one forward pass."""
    vocabulary = int(getattr(getattr(model, "config", None), "vocab_size", 1) or 1)
    return max(1, min(_POSITIONS, _LOGITS // vocabulary) // prompts.ids_NT.shape[1])


@torch.no_grad()
def losses(model: nn.Module, ffns: Sequence[FFN], prompts: Prompts, cut_LSF: Sequence[Tensor]) -> Tensor:
    """Return the nats per token of every prompt under every set of cut neurons, float64 [S, N] on the CPU.

    cut_LSF: for each network the neurons that each of the S sets loses, bool [S, F]. Raises NotFinite.
    """
    device, sets = _device(model), len(cut_LSF[0])
    out = torch.empty(sets, len(prompts), dtype=torch.float64)
    rows = _at_once(prompts, model)
    together = min(sets, rows)
    with evaluating(model):
        for some in torch.arange(sets).split(together):
            for index in torch.arange(len(prompts)).split(max(1, rows // together)):
                with cutting(ffns, [cut_SF[some] for cut_SF in cut_LSF]):
                    out[some[:, None], index] = _nats(model, prompts, index, len(some), device)
    if not out.isfinite().all():
        raise NotFinite("the loss of a prompt is not finite; the model or its weights are damaged.")
    return out


def _nats(model: nn.Module, prompts: Prompts, index: Tensor, times: int, device: torch.device) -> Tensor:
    logits = model(**prompts.batch(index, times, device)).logits.float()
    targets = prompts.targets_NT[index].repeat(times, 1).to(device)
    nats = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    per_token = nats.view(targets.shape).double().sum(1) / (targets != IGNORED).sum(1)
    return per_token.view(times, -1).cpu()


@dataclass(frozen=True)
class Read:
    """How strongly the neurons of L networks fired: each list has a tensor float64 [C, F] for every network.

    size: the mean |a_j| over all tokens of a capability's prompts; square: the mean a_j^2. `passes` over the prompts
    were needed.
    """

    size: list[Tensor]
    square: list[Tensor]
    passes: int


class _Tally:
    """Sums over the tokens of one batch after another, and pools each prompt's activations."""

    def __init__(self, ffns: Sequence[FFN], prompts: Prompts, capabilities: int, pool: str) -> None:
        self.prompts, self.pool = prompts, pool
        self.pooled = [torch.empty(len(prompts), ffn.neurons) for ffn in ffns]
        self.size = [torch.zeros(capabilities, ffn.neurons, dtype=torch.float64) for ffn in ffns]
        self.square = [torch.zeros_like(x) for x in self.size]
        self.index = torch.zeros(0, dtype=torch.long)

    def see(self, place: int, layer: nn.Module, a_BTF: Tensor) -> None:
        a_BTF = a_BTF.float()
        real_BT, label_B = self.prompts.real_NT[self.index].to(a_BTF.device), self.prompts.label_N[self.index]
        outside = ~real_BT[:, :, None]
        zeroed = a_BTF.masked_fill(outside, 0)
        if self.pool == "max":
            found = a_BTF.masked_fill(outside, -torch.inf).amax(1)
        else:
            found = zeroed.sum(1) / real_BT.sum(1, keepdim=True)
        self.pooled[place][self.index] = found.cpu()
        self.size[place].index_add_(0, label_B, zeroed.abs().sum(1).double().cpu())
        self.square[place].index_add_(0, label_B, zeroed.square().sum(1).double().cpu())


@torch.no_grad()
def read(
    model: nn.Module,
    ffns: Sequence[FFN],
    prompts: Prompts,
    capabilities: int,
    pool: str,
    give: Callable[[int, Tensor], None],
) -> Read:
    """Run the prompts once and give `give(network, pooled [N, F])` the pooled activations of each network in turn.

    pool: "max" or "mean" over a prompt's own tokens. Where the pooled activations of all networks do not fit into
    POOLED bytes, a few networks are read at a time, in as many passes over the prompts. Raises NotFinite.
    """
    device, most = _device(model), max(ffn.neurons for ffn in ffns)
    each = max(1, POOLED // (4 * len(prompts) * most))
    tallies: list[_Tally] = []
    for start in range(0, len(ffns), each):
        some = ffns[start : start + each]
        tally = _Tally(some, prompts, capabilities, pool)
        with evaluating(model), reading(some, tally.see):
            for index in torch.arange(len(prompts)).split(_at_once(prompts, model)):
                tally.index = index
                model(**prompts.batch(index, 1, device))
        for place, ffn in enumerate(some):
            if not tally.pooled[place].isfinite().all():
                raise NotFinite(f"a neuron of {ffn.block} is not finite; the model's weights are damaged.")
            give(start + place, tally.pooled[place])
        tally.pooled.clear()
        tallies.append(tally)
    tokens_C = torch.zeros(capabilities, dtype=torch.float64)
    tokens_C.index_add_(0, prompts.label_N, prompts.real_NT.sum(1).double())
    per_C1 = tokens_C.clamp(min=1)[:, None]
    size, square = ([x / per_C1 for t in tallies for x in getattr(t, name)] for name in ("size", "square"))
    return Read(size, square, len(tallies))


def smallest(a_BTF: Tensor, norm_F: Tensor, share: float) -> Tensor:
    """Return the share of each token's neurons with the smallest |a_j| |W_down column j|, bool [B, T, F].

    At most that share, rounded down, but for neurons that tie with the last of them.
    """
    size_BTF = a_BTF.float().abs() * norm_F.to(a_BTF.device)
    gone = int(share * a_BTF.shape[-1])
    if gone == 0:
        return torch.zeros_like(size_BTF, dtype=torch.bool)
    return size_BTF <= size_BTF.kthvalue(gone, dim=-1, keepdim=True).values


class _Errors:
    """How far each network's own output moves where a share of every token's neurons is zeroed."""

    def __init__(self, norms: Sequence[Tensor], shares: Sequence[float]) -> None:
        self.norms, self.shares = norms, shares
        self.total_K = torch.zeros(len(shares), dtype=torch.float64)
        self.real_BT = torch.zeros(0)

    def see(self, place: int, layer: Any, a_BTF: Tensor) -> None:
        nothing = layer.forward(torch.zeros_like(a_BTF[:1, :1]))  # the bias; forward itself passes this hook by
        whole_BT = torch.linalg.vector_norm(layer.forward(a_BTF) - nothing, dim=-1).clamp(min=1e-30)
        for k, share in enumerate(self.shares):
            lost = layer.forward(a_BTF.masked_fill(~smallest(a_BTF, self.norms[place], share), 0)) - nothing
            relative_BT = torch.linalg.vector_norm(lost, dim=-1) / whole_BT
            self.total_K[k] += float(relative_BT[self.real_BT].double().sum())


@torch.no_grad()
def sparsity(
    model: nn.Module, ffns: Sequence[FFN], prompts: Prompts, norms: Sequence[Tensor], shares: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Zero, token by token, the share of a network's neurons with the smallest |a_j| |W_down column j|.

    norms: |W_down column j| of each network, [F]. Returns what each share costs: the relative error of a network's own
    output, |W a_cut| / |W a| as a mean over tokens and networks, float64 [K]; and the nats per token with all networks
    cut at once, float64 [K].
    """
    device, columns = _device(model), [norm.float() for norm in norms]
    errors, nats_K = _Errors(columns, shares), torch.zeros(len(shares), dtype=torch.float64)

    def cut(share: float, place: int, layer: nn.Module, a_BTF: Tensor) -> Tensor:
        return a_BTF.masked_fill(smallest(a_BTF, columns[place], share), 0)

    with evaluating(model):
        for index in torch.arange(len(prompts)).split(_at_once(prompts, model)):
            errors.real_BT = prompts.real_NT[index].to(device)
            with reading(ffns, errors.see):
                model(**prompts.batch(index, 1, device))
            for k, share in enumerate(shares):
                with reading(ffns, partial(cut, share)):
                    nats_K[k] += float(_nats(model, prompts, index, 1, device).sum())
    return errors.total_K / (prompts.real_NT.sum() * len(ffns)), nats_K / len(prompts)
