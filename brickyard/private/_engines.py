"""Three ways to the gradients of single rows through a whole model, and the proof that picks the first that is right.

    Hooked      one batched pass; linear layers, tables and norms by the rules of `_per_sample`, other leaves by
                torch.func on what went through them. Cheapest, but only where a layer's parameters act through it.
    Vectorised  torch.func: vmap over the gradient of one row's loss. Any parameters; no control flow on values.
    RowByRow    a pass for every row. Always right, and what the others must equal.

A layer that mixes rows, is called past its `forward`, or shares its parameters in ways that no rule knows, would give
wrong norms without an error. So the first batch of two rows is a proof: norms and weighted sums must be RowByRow's,
dropout off. What fails it is not used.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from brickyard.core.errors import Refused
from brickyard.core.forwards import evaluating
from brickyard.private._per_sample import Lookup, Made, Outer, Term, cheaper, together

LEFT, RIGHT = " left", " right"  # a matrix's two factors among the sums
Inputs = dict[str, Any]
Losses = Callable[[Callable[..., Any], Inputs], Tensor]  # (the model, a batch) -> the loss of each row [B]
Weigh = Callable[[Tensor], Tensor]  # the norms of the rows' gradients [B] -> what each row counts [B]
Factors = Mapping[str, tuple[Tensor, Tensor]]  # matrix -> (L [P, R], R [R, D]) through which alone it is seen

_TOLERANCE = 1e-3
_NOTHING = 1e-6  # of the largest gradient: what counts as zero

_log = logging.getLogger(__name__)


class Uncovered(Exception):
    """A parameter or a layer for which an engine has no rule."""


class Engine(Protocol):
    """Adds the weighted gradients of a batch's rows to `sums` (float32, by name); returns losses and norms [B]."""

    named: Mapping[str, nn.Parameter]
    factors: Factors

    def add(self, losses: Losses, inputs: Inputs, weigh: Weigh, sums: dict[str, Tensor]) -> tuple[Tensor, Tensor]: ...


def part(inputs: Inputs, start: int, stop: int) -> Inputs:
    """Return rows start..stop of a batch whose tensors (and tuples of tensors) all have a row per example."""
    cut = lambda v: tuple(map(cut, v)) if isinstance(v, tuple) else v[start:stop]  # noqa: E731
    return {name: cut(value) for name, value in inputs.items()}


def settle(terms: Mapping[str, Term], weigh: Weigh, sums: dict[str, Tensor]) -> Tensor:
    """Add what the rows count to `sums`; return the norms [B] of their gradients over all parameters."""
    norm_B = torch.stack([term.squares() for term in terms.values()]).sum(0).sqrt()
    c_B = weigh(norm_B)
    for name, term in terms.items():
        sums[name] += term.weighted(c_B)
    return norm_B


def seen(name: str, term: Term, factors: Factors) -> dict[str, Term]:
    """Return the term by name, or the two through which alone its matrix is seen."""
    if name not in factors:
        return {name: term}
    return dict(zip((name + LEFT, name + RIGHT), term.through(*factors[name]), strict=True))


class RowByRow:
    """A forward and a backward pass for every row."""

    def __init__(self, model: nn.Module, named: Mapping[str, nn.Parameter]) -> None:
        self.model, self.named = model, named
        self.factors: Factors = {}

    def add(self, losses: Losses, inputs: Inputs, weigh: Weigh, sums: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """See Engine."""
        out, norms = [], []
        for row in range(len(inputs["labels"])):
            loss = losses(self.model, part(inputs, row, row + 1)).sum()
            found = torch.autograd.grad(loss, list(self.named.values()), allow_unused=True)
            terms: dict[str, Term] = {}
            for name, gradient in zip(self.named, found, strict=True):
                if gradient is not None:
                    terms |= seen(name, Made(gradient[None].float()), self.factors)
            out.append(loss.detach()[None])
            norms.append(settle(terms, weigh, sums))
        return torch.cat(out), torch.cat(norms)


class Vectorised:
    """The gradient of one row's loss, vectorised over rows."""

    def __init__(self, model: nn.Module, named: Mapping[str, nn.Parameter]) -> None:
        self.model, self.named = model, named
        self.factors: Factors = {}

    def add(self, losses: Losses, inputs: Inputs, weigh: Weigh, sums: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """See Engine."""

        def loss(parameters: dict[str, Tensor], row: Inputs) -> tuple[Tensor, Tensor]:
            call = lambda **given: functional_call(self.model, parameters, (), given)  # noqa: E731
            one = losses(call, _row_of_one(row))[0]
            return one, one.detach()

        parameters = {name: p.detach() for name, p in self.named.items()}
        each = vmap(grad(loss, has_aux=True), in_dims=(None, 0), randomness="different")
        found, losses_B = each(parameters, inputs)
        terms: dict[str, Term] = {}
        for name, gradient in found.items():
            terms |= seen(name, Made(gradient.float()), self.factors)
        return losses_B, settle(terms, weigh, sums)


def _row_of_one(row: Inputs) -> Inputs:
    widen = lambda v: tuple(map(widen, v)) if isinstance(v, tuple) else v[None]  # noqa: E731
    return {name: widen(value) for name, value in row.items()}


class Hooked:
    """One batched pass in which the layers' inputs and the gradients of their outputs are kept.

    Raises Uncovered for a parameter that stands in no layer with a rule.
    """

    def __init__(self, model: nn.Module, named: Mapping[str, nn.Parameter]) -> None:
        self.model, self.named = model, named
        self.factors: Factors = {}
        names = {id(p): name for name, p in named.items()}
        self.places: dict[nn.Module, dict[str, str]] = {}
        for module in model.modules():
            found = {leaf: names[id(p)] for leaf, p in module._parameters.items() if p is not None and id(p) in names}
            if found:
                if _rule(module) is None:
                    raise Uncovered(f"{type(module).__name__} holds parameters beside modules of its own")
                self.places[module] = found
        if missing := set(named) - {name for found in self.places.values() for name in found.values()}:
            raise Uncovered(f"{sorted(missing)[0]} stands in no module")

    def add(self, losses: Losses, inputs: Inputs, weigh: Weigh, sums: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """See Engine."""
        terms: dict[str, list[Term]] = defaultdict(list)
        with self._without_own_gradients():
            with self._listening(len(inputs["labels"]), terms):
                losses_B = losses(self.model, inputs)
            losses_B.sum().backward()
        joined = {name: together(found) for name, found in terms.items()}
        terms.clear()
        return losses_B.detach(), settle(joined, weigh, sums)

    @contextmanager
    def _without_own_gradients(self) -> Iterator[None]:
        """Autograd then makes no gradient of a parameter, which would be the sum over rows and of no use."""
        for p in self.named.values():
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in self.named.values():
                p.requires_grad_(True)

    @contextmanager
    def _listening(self, rows: int, terms: dict[str, list[Term]]) -> Iterator[None]:
        handles = [m.register_forward_hook(partial(self._watch, rows, terms)) for m in self.places]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, rows: int, terms: dict[str, list[Term]], module: nn.Module, args: Any, output: Any) -> Tensor:
        if len(args) != 1 or not isinstance(output, Tensor) or not torch.is_grad_enabled():
            raise Uncovered(f"{type(module).__name__} was not called with one tensor for another")
        x = args[0].detach()
        if len(output) != rows:
            if len(output) != 1:
                raise Uncovered(f"{type(module).__name__} gave {len(output)} rows for {rows}")
            # The same for all rows (embeddings of positions): told apart here, for its gradient is summed over them.
            output, x = output.expand(rows, *output.shape[1:]), x.expand(rows, *x.shape[1:])
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        output.register_hook(partial(self._take, terms, module, x))
        return output

    @torch.no_grad()
    def _take(self, terms: dict[str, list[Term]], module: nn.Module, x: Tensor, g: Tensor) -> None:
        rule = _rule(module)
        assert rule is not None
        names = self.places[module]
        for leaf, term in rule(module, x, g.float(), set(names)).items():
            for name, found in seen(names[leaf], term, self.factors).items():
                terms[name].append(cheaper(found) if isinstance(found, Outer) else found)


Rule = Callable[[Any, Tensor, Tensor, set[str]], dict[str, Term]]


def _linear(module: Any, x: Tensor, g: Tensor, wanted: set[str]) -> dict[str, Term]:
    left = g.reshape(len(g), -1, g.shape[-1])
    found: dict[str, Term] = {}
    if "weight" in wanted:
        right = x.float().reshape(len(g), -1, x.shape[-1])
        # transformers' Conv1D keeps its weight as [inputs, outputs].
        found["weight"] = Outer(right, left) if isinstance(module, Conv1D) else Outer(left, right)
    if "bias" in wanted:
        found["bias"] = Made(left.sum(1))
    return found


def _table(module: Any, ids: Tensor, g: Tensor, wanted: set[str]) -> dict[str, Term]:
    ids_BT, g_BTD = ids.reshape(len(g), -1), g.reshape(len(g), -1, g.shape[-1])
    if module.padding_idx is not None:
        g_BTD = g_BTD.masked_fill((ids_BT == module.padding_idx)[..., None], 0.0)
    return {"weight": Lookup(g_BTD, ids_BT, module.num_embeddings)}


def _layer_norm(module: Any, x: Tensor, g: Tensor, wanted: set[str]) -> dict[str, Term]:
    shape = module.normalized_shape
    scaled = {"bias": g}
    if "weight" in wanted:
        scaled["weight"] = g * F.layer_norm(x.float(), shape, eps=module.eps)
    return {leaf: Made(scaled[leaf].reshape(len(g), -1, *shape).sum(1)) for leaf in wanted}


def _leaf(module: nn.Module, x: Tensor, g: Tensor, wanted: set[str]) -> dict[str, Term]:
    """Any module without modules of its own: its vector-Jacobian product, row by row in one go."""
    parameters = {leaf: p.detach() for leaf, p in module.named_parameters() if leaf in wanted}

    def one(x_1: Tensor, g_1: Tensor) -> dict[str, Tensor]:
        pull = vjp(lambda given: functional_call(module, given, (x_1[None],))[0], parameters)[1]
        return pull(g_1)[0]

    with torch.enable_grad():
        found = vmap(one)(x, g.to(x.dtype) if x.is_floating_point() else g)
    return {leaf: Made(gradient.float()) for leaf, gradient in found.items()}


def _rule(module: nn.Module) -> Rule | None:
    forward = type(module).forward
    if forward in (nn.Linear.forward, Conv1D.forward):
        return _linear
    if forward is nn.Embedding.forward:
        table: Any = module
        return None if table.max_norm is not None or table.scale_grad_by_freq or table.sparse else _table
    if forward is nn.LayerNorm.forward:
        return _layer_norm
    return None if any(True for _ in module.children()) else _leaf


def choose(model: nn.Module, named: Mapping[str, nn.Parameter], losses: Losses, inputs: Inputs) -> Engine:
    """Return the first engine that agrees with RowByRow on two rows (`inputs`), and runs in training mode.

    What is chosen follows from the model's structure; of the rows only whether two computations agree is used.
    """
    reference = RowByRow(model, named)
    with _moved(named):
        with evaluating(model):
            expected, norms = _proof(reference, losses, inputs)
        for kind in (Hooked, Vectorised):
            try:
                engine = kind(model, named)
                with torch.random.fork_rng(devices=[]):
                    _proof(engine, losses, inputs)
                with evaluating(model):
                    found, found_norms = _proof(engine, losses, inputs)
                _compare(expected, found, norms, found_norms)
            except (Uncovered, RuntimeError, TypeError, KeyError, NotImplementedError) as reason:
                _log.info("%s does not fit this model: %s", kind.__name__, reason)
                continue
            return engine
    return reference


def _proof(engine: Engine, losses: Losses, inputs: Inputs) -> tuple[dict[str, Tensor], Tensor]:
    """Return a weighted sum of the rows' gradients, in which each row tells, and their norms."""
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in engine.named.items()}
    # Weights depend on the norm alone, as clipping's do, so that engines may take rows in any portions.
    _, norms = engine.add(losses, inputs, lambda norm_B: 1 / (1 + norm_B), sums)
    return sums, norms


def _compare(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], norms: Tensor, found_norms: Tensor) -> None:
    if not torch.allclose(norms, found_norms, rtol=_TOLERANCE):
        raise Uncovered(f"the norms are {found_norms.tolist()}, not {norms.tolist()}")
    largest = max(float(t.abs().max()) for t in expected.values())
    for name, tensor in expected.items():
        gap = float((tensor - found[name]).abs().max())
        # Gradients that cancel (of keys' biases) are rounding errors in either computation.
        if not gap <= _TOLERANCE * float(tensor.abs().max()) + _NOTHING * largest:
            raise Uncovered(f"the gradient of {name} is off by {gap:.3g}")


@contextmanager
@torch.no_grad()
def _moved(named: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Move every parameter a little: at their first values half of an adapter has a gradient of zero."""
    held = {name: p.detach().clone() for name, p in named.items()}
    for place, p in enumerate(named.values()):
        generator = torch.Generator().manual_seed(place)
        p.add_(0.05 * torch.randn(p.shape, generator=generator).to(p))
    try:
        with torch.enable_grad():
            yield
    finally:
        for name, p in named.items():
            p.copy_(held[name])


def refuse_mixing(model: nn.Module) -> None:
    """Refuse layers in training mode that compute statistics over the rows of a batch."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and any(p.requires_grad for p in module.parameters()):
            raise Refused(
                f"{name} is a batch norm: it mixes the rows of a batch, so no row has a gradient of its own. Freeze it "
                "(its stored statistics are then used), or take a base with layer or group norms."
            )
