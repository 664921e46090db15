"""DAM: merge experts through a learned mask that also makes the merge deaf to universal perturbations of its input.

    theta  = theta_0 + sum_t lam_t (Mbar tau_t)          tau_t = theta_t - theta_0; lam [T, P] by tensor, or [T, 1]
    M      = sigmoid((m + log u - log(1 - u)) / 0.5)     m: a logit for every parameter, shared by all tasks; u uniform
    Mbar   = M / mean(M)                                 tensor by tensor
    H(p)   = mean entropy of softmax predictions

Each step draws unlabelled batches x_t and u, then
    1. lam    <- 0.3, and one step of Adam (or SGD) on sum_t H(f(x_t)); Mbar is a constant
    2. delta  <- a step of Adam down sum_t -CE(f(x_t + delta_t), argmax f(x_t)); theta is a constant
    3. m      <- a step of Adam down sum_t [H(f(x_t)) + w H(f(clamp(x_t + delta_t)))]; lam and delta are constants
so that delta_t, one perturbation a task, stands in for a trigger that nobody knows. At last one mask is drawn and kept,
lam starts anew at 0.3, and plain AdaMerging trains it on sum_t H(f(x_t)). With w = 0 this is Concrete AdaMerging.

No graph through theta is kept: with g = dL/dtheta and S = sum_t lam_t tau_t, tensor by tensor,
    dL/dlam_t = <g, Mbar tau_t>,   dL/dMbar = g S,   dL/dM = (dL/dMbar - mean(Mbar dL/dMbar)) / mean(M)

`masks=1` is the released code. `masks=2` is the paper's text: Mbar is made of M1 M2, of which m1 learns from the first
term of step 3 and m2 from the second, in turn. Of images delta is counted in pixels of [0, 1], and clamped there (the
released code clamps normalised inputs, which erases half of every image). Of text it is added to the token embeddings,
which have no bounds. Batches come from the train rows of every task, without labels; the paper adapts on test inputs.

Source: Yang et al., "Mitigating the Backdoor Effect for Multi-Task Model Merging via Safety-Aware Subspace", ICLR 2025,
arXiv 2410.13910. Headline claim: attack success falls by 2 to 10 points against the best other merges, at about one
point of accuracy. Left out: the bound on the perturbation, which the released code declares and never uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from brickyard.core.errors import NotFinite, Refused, RunFailed, UsageError
from brickyard.core.method import Claim, Record
from brickyard.merge._from_data import Expert, Made, Stage, Waiting

RECORD = Record(
    name="dam",
    family="merge",
    title="Merge through a learned mask that suppresses backdoors",
    paper="arXiv 2410.13910",
    needs=("text-classification", "pair-classification", "image-classification"),
    because="the entropy that it lowers is that of classes",
    presets={"paper": {"masks": 2}, "released": {"masks": 1}},
    claims=(
        Claim(
            text="Attack success is at least 2 points below Concrete AdaMerging's, at 1.5 points of accuracy at most.",
            measure="suppression",
            data="mnist|embedded:digits",
            base="",
            seeds=3,
            full={"seeds": 5, "train_rows": 0},
            train_rows=4000,
        ),
    ),
)
_TINY = 1e-7  # keeps uniform numbers away from 0 and 1, whose logits are infinite
_EPS = 1e-8  # of Adam, as in torch
_LOOKED_AT = 256  # rows a task by which a collapse is seen


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of DAM."""

    steps: int = 1000
    """steps on the mask; a logit moves at most by mask_lr in each, so that few steps do nothing"""
    adapt_steps: int = 1000
    """steps of AdaMerging on lam afterwards, the mask being kept"""
    lam: Literal["layer", "task", "fixed"] = "layer"
    """scales: one for each tensor of each task, one a task, or fixed at lam_init (then the paper takes 2000 steps)"""
    lam_init: float = 0.3
    """where lam starts"""
    lam_lr: float = 1e-3
    """learning rate of AdaMerging"""
    inner: Literal["adam", "sgd"] = "adam"
    """the step on lam before each on the mask; one step of Adam is inner_lr in the gradient's sign, sgd is gentler"""
    inner_lr: float = 1.0
    """learning rate of that step"""
    mask_init: float = 0.0
    """first logit of every parameter; 0 keeps each with probability 1/2"""
    mask_lr: float = 1e-3
    """learning rate of the mask's logits"""
    temperature: float = 0.5
    """of the relaxed Bernoulli draw"""
    masks: Literal[1, 2] = 1
    """1: one mask for both terms (released code); 2: one for each (paper)"""
    discrete: bool = False
    """draw 0 or 1 for the mask that is kept"""
    adversary_lr: float = 1e-4
    """learning rate of the perturbations, in pixels of [0, 1] or units of the token embeddings"""
    adversary_weight: float = 0.1
    """w: what the perturbed inputs count; 0 is Concrete AdaMerging"""
    rows: int = 16
    """rows of each task in a step"""
    seed: int = 0
    """of the batches and the masks"""

    def __post_init__(self) -> None:
        if self.steps < 0 or self.adapt_steps < 0 or self.rows < 1 or self.seed < 0:
            raise UsageError("dam: steps, adapt_steps and seed must be 0 or more, rows at least 1.")
        for name in ("lam_lr", "inner_lr", "mask_lr", "temperature", "adversary_lr"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(f"dam: {name}={getattr(self, name)}; expected a finite number above 0.")
        if not 0 <= self.adversary_weight < float("inf"):
            raise UsageError(f"dam: adversary_weight={self.adversary_weight}; expected 0 or more.")
        if self.masks == 2 and self.adversary_weight == 0:
            raise UsageError("dam: masks=2 without adversary_weight leaves the second mask at random; take masks=1.")


def entropy(logits_BK: Tensor) -> Tensor:
    """Return the mean entropy of the softmax predictions, a scalar in nats."""
    log_p = logits_BK.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def relaxed(m: Tensor, u: Tensor, temperature: float) -> Tensor:
    """Return the relaxed Bernoulli sample of logits m under uniform noise u of the same shape; in (0, 1)."""
    u = u.clamp(_TINY, 1 - _TINY)
    return ((m + u.log() - (-u).log1p()) / temperature).sigmoid()


def normalised(mask: Tensor) -> Tensor:
    """Return M / mean(M) of one tensor; NotFinite where the whole mask is 0."""
    mean = mask.mean()
    if not mean > 0:
        raise NotFinite("dam: a tensor's mask is 0 throughout and cannot be rescaled; take discrete=false.")
    return mask / mean


def combine(base: Tensor, taus: Sequence[Tensor], lam: Sequence[float] | Tensor, kept: Tensor | float) -> Tensor:
    """Return theta_0 + Mbar sum_t lam_t tau_t of one tensor; `kept` is Mbar."""
    return base + kept * summed(taus, lam)


def summed(taus: Sequence[Tensor], lam: Sequence[float] | Tensor) -> Tensor:
    """Return S = sum_t lam_t tau_t of one tensor."""
    out = taus[0] * float(lam[0])
    for tau, scale in zip(taus[1:], lam[1:], strict=True):
        out.add_(tau, alpha=float(scale))
    return out


def mask_gradient(g: Tensor, s: Tensor, mask: Tensor, others: Tensor | float = 1.0) -> Tensor:
    """Return dL/dM of one tensor from g = dL/dtheta and S, where Mbar is M `others` over its mean.

    The mean of a tensor depends on every entry, which is the second term. `others` is the other of two masks.
    """
    joint = mask * others
    mean = joint.mean()
    by_kept = g * s
    return others * (by_kept - (by_kept * joint).mean() / mean) / mean


def logit_gradient(by_mask: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """Return dL/dm from dL/dM of a relaxed sample M."""
    return by_mask * mask * (1 - mask) / temperature


class Draws:
    """Unlabelled batches of one task, shuffled anew whenever all rows were seen; they depend on the seed alone."""

    def __init__(self, rows: int, batch: int, seed: int) -> None:
        self.rows, self.batch = rows, batch
        self._bits = np.random.Generator(np.random.PCG64(seed))
        self._left = np.empty(0, dtype=np.int64)

    def next(self) -> np.ndarray:
        """Return the places of the next rows, rising."""
        while len(self._left) < self.batch:
            self._left = np.concatenate([self._left, self._bits.permutation(self.rows)])
        taken, self._left = self._left[: self.batch], self._left[self.batch :]
        return np.sort(taken)


class Perturbed:
    """The input of one expert with delta on it: pixels, or what leaves the token embedding; delta starts at 0."""

    def __init__(self, expert: Expert) -> None:
        self.expert = expert
        place = next(expert.model.parameters()).device
        self.images = expert.bounds is not None
        if expert.bounds is not None:
            self.low, self.high = (bound.to(place) for bound in expert.bounds)
            self.delta = torch.zeros_like(next(expert.batches(np.arange(1), 1))[0]["pixel_values"][0])
        else:
            self.embedding: Any = expert.model.get_input_embeddings()  # type: ignore[operator]
            width = self.embedding.weight.shape[1]
            self.delta = torch.zeros(int(expert.rows.lengths.max()), width, device=place)

    def logits(self, batch: Mapping[str, Any], delta: Tensor | None = None, *, clamp: bool = False) -> Tensor:
        """Return the logits [B, K] of a batch, with delta on its input where it is given."""
        if delta is None:
            return self.expert.model(**batch).logits
        if self.images:
            x = batch["pixel_values"] + delta * (self.high - self.low)
            x = x.clamp(self.low, self.high) if clamp else x
            return self.expert.model(**{**batch, "pixel_values": x}).logits
        with self._embedded(delta):
            return self.expert.model(**batch).logits

    @contextmanager
    def _embedded(self, delta: Tensor) -> Iterator[None]:
        hook = self.embedding.register_forward_hook(lambda module, given, x: x + delta[: x.shape[1]])
        try:
            yield
        finally:
            hook.remove()


@dataclass
class Search:
    """The state of one run: what is learned (m, lam, delta), and the experts whose weights are overwritten with theta.

    names: the tensors that are merged, sorted; m: for each mask, a list of logits by tensor; lam [T, P], on the CPU.
    """

    config: Config
    experts: Sequence[Expert]
    names: list[str]
    base: list[Tensor]
    taus: list[list[Tensor]]  # [P][T]
    history: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        config, count = self.config, len(self.experts)
        self.m = [[torch.full_like(t, config.mask_init) for t in self.base] for _ in range(config.masks)]
        self.solver = [torch.optim.Adam(logits, lr=config.mask_lr, foreach=True) for logits in self.m]
        self.inputs = [Perturbed(expert) for expert in self.experts]
        self.adversary = [torch.optim.Adam([i.delta], lr=config.adversary_lr) for i in self.inputs]
        self.draws = [Draws(len(e.rows), config.rows, config.seed) for e in self.experts]
        self.noise = torch.Generator().manual_seed(config.seed)
        self.parameters = [[e.parameters[name] for name in self.names] for e in self.experts]
        for expert in self.experts:
            expert.model.eval().requires_grad_(False)
        self.lam = self.start(count)

    def start(self, count: int) -> Tensor:
        """Return lam as it starts: [T, P]."""
        return torch.full((count, len(self.names)), self.config.lam_init)

    def uniform(self) -> list[list[Tensor]]:
        """Draw noise for each mask, in the order of the names and on the CPU: the same for any order of the tasks."""
        draw = lambda t: torch.rand(t.shape, generator=self.noise).to(t)  # noqa: E731
        return [[draw(t) for t in self.base] for _ in self.m]

    def sampled(self, noise: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Return M of each mask and tensor."""
        pairs = zip(self.m, noise, strict=True)
        return [[relaxed(m, u, self.config.temperature) for m, u in zip(*pair, strict=True)] for pair in pairs]

    def kept(self, masks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Return Mbar of each tensor, from the product of the masks."""
        return [normalised(torch.stack(parts).prod(0)) for parts in zip(*masks, strict=True)]

    @torch.no_grad()
    def write(self, kept: Sequence[Tensor | float]) -> None:
        """Write theta into every expert's model."""
        for p, (base, taus, mask) in enumerate(zip(self.base, self.taus, kept, strict=True)):
            theta = combine(base, taus, self.lam[:, p], mask)
            for parameters in self.parameters:
                parameters[p].copy_(theta)

    def batches(self) -> list[dict[str, Any]]:
        """Draw a batch of every task."""
        return [next(e.batches(d.next(), d.batch))[0] for e, d in zip(self.experts, self.draws, strict=True)]

    def slope(self, batches: Sequence[Mapping[str, Any]], *, clean: float, perturbed: float) -> list[Tensor]:
        """Return dL/dtheta by tensor of L = sum_t [clean H(f(x_t)) + perturbed H(f(clamp(x_t + delta_t)))]."""
        total = [torch.zeros_like(t) for t in self.base]
        value = seen = 0.0
        for given, batch, parameters in zip(self.inputs, batches, self.parameters, strict=True):
            with _open(parameters):
                loss = torch.zeros((), device=total[0].device)
                if clean:
                    plain = entropy(given.logits(batch))
                    loss, seen = loss + clean * plain, seen + float(plain.detach())
                if perturbed:
                    loss = loss + perturbed * entropy(given.logits(batch, given.delta.detach(), clamp=True))
                found = torch.autograd.grad(loss, parameters, allow_unused=True)
            value += float(loss.detach())
            used = [(t, g) for t, g in zip(total, found, strict=True) if g is not None]
            torch._foreach_add_([t for t, _ in used], [g for _, g in used])
        if not np.isfinite(value):
            raise NotFinite(f"dam: the entropy is {value}; take smaller rates, or inner=sgd.")
        if clean:  # of inputs as they are: with the adversary's term no two phases could be compared
            self.history.append(seen / len(self.experts))
        return total

    def lam_slope(self, g: Sequence[Tensor], kept: Sequence[Tensor]) -> Tensor:
        """Return dL/dlam [T, P]; task by task where one scale serves all tensors, summed over them."""
        by = [torch.stack([(g_p * k_p * tau).sum() for tau in taus]) for g_p, k_p, taus in zip(g, kept, self.taus)]  # noqa: B905
        slope = torch.stack(by, dim=1).float().cpu()
        return slope.sum(1, keepdim=True).expand_as(slope) if self.config.lam == "task" else slope

    def inner(self, batches: Sequence[Mapping[str, Any]], kept: Sequence[Tensor]) -> None:
        """Step 1: start lam anew and take one step on it."""
        self.lam = self.start(len(self.experts))
        if self.config.lam == "fixed":
            return
        self.write(kept)
        slope = self.lam_slope(self.slope(batches, clean=1.0, perturbed=0.0), kept)
        # The first step of Adam: both moments are those of this one slope.
        slope = slope / (slope.abs() + _EPS) if self.config.inner == "adam" else slope
        self.lam = self.lam - self.config.inner_lr * slope

    def attack(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Step 2: move each delta so that predictions leave what they were; theta has no part in it."""
        for given, batch, solver in zip(self.inputs, batches, self.adversary, strict=True):
            with torch.no_grad():
                said = given.logits(batch).argmax(-1)
            delta = given.delta.detach().requires_grad_(True)
            loss = -nn.functional.cross_entropy(given.logits(batch, delta).float(), said)
            given.delta.grad = torch.autograd.grad(loss, delta)[0]
            solver.step()
            given.delta.grad = None

    def step(self) -> None:
        """Take one step on everything; see the file's head."""
        config, noise, batches = self.config, self.uniform(), self.batches()
        masks = self.sampled(noise)
        kept = self.kept(masks)
        self.inner(batches, kept)
        self.write(kept)
        if config.adversary_weight:
            self.attack(batches)
        if config.masks == 1:
            self.learn(0, self.slope(batches, clean=1.0, perturbed=config.adversary_weight), masks)
            return
        self.learn(0, self.slope(batches, clean=1.0, perturbed=0.0), masks)
        masks = self.sampled(noise)
        self.write(self.kept(masks))
        self.learn(1, self.slope(batches, clean=0.0, perturbed=config.adversary_weight), masks)

    def learn(self, which: int, g: Sequence[Tensor], masks: Sequence[Sequence[Tensor]]) -> None:
        """Step 3: a step of Adam on the logits of one mask."""
        for p, logits in enumerate(self.m[which]):
            mask, other = masks[which][p], masks[1 - which][p] if len(masks) > 1 else 1.0
            by_mask = mask_gradient(g[p], summed(self.taus[p], self.lam[:, p]), mask, other)
            logits.grad = logit_gradient(by_mask, mask, self.config.temperature)
        self.solver[which].step()
        self.solver[which].zero_grad()

    def last_masks(self) -> list[Tensor]:
        """Draw the mask that is kept."""
        noise = self.uniform()
        if self.config.discrete:
            pairs = zip(self.m, noise, strict=True)
            hard = [[(u < m.sigmoid()).float() for m, u in zip(*pair, strict=True)] for pair in pairs]
            return self.kept(hard)
        return self.kept(self.sampled(noise))

    def adapt(self, kept: Sequence[Tensor]) -> None:
        """Train lam alone, from its start, on the clean inputs: AdaMerging."""
        self.lam = self.start(len(self.experts))
        if self.config.lam == "fixed":
            return
        lam = self.lam[:, :1].clone() if self.config.lam == "task" else self.lam.clone()
        solver = torch.optim.Adam([lam], lr=self.config.lam_lr)
        for _ in range(self.config.adapt_steps):
            self.lam = lam.expand(-1, len(self.names)).clone()
            self.write(kept)
            slope = self.lam_slope(self.slope(self.batches(), clean=1.0, perturbed=0.0), kept)
            lam.grad = slope[:, : lam.shape[1]].contiguous()
            solver.step()
        self.lam = lam.expand(-1, len(self.names)).clone()

    def run(self) -> list[Tensor]:
        """Learn the mask, draw the one that is kept, adapt lam; return Mbar. The experts' models end as the merge."""
        for _ in range(self.config.steps):
            self.step()
        kept = self.last_masks()
        self.adapt(kept)
        self.write(kept)
        return kept


@contextmanager
def _open(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Let gradients flow to the parameters of one model for a while."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


@torch.no_grad()
def classes(expert: Expert, seed: int) -> np.ndarray:
    """Return the classes that an expert's model answers to some of its rows."""
    places = expert.drawn(_LOOKED_AT, seed)
    return np.concatenate([expert.model(**b).logits.argmax(-1).cpu().numpy() for b, _ in expert.batches(places, 64)])


def check_spread(before: np.ndarray, after: np.ndarray, label: str, data: str) -> None:
    """Raise RunFailed where the merge answers one class to rows for which its expert has several.

    A class that the expert gives to fewer than one row in twenty does not count.
    """
    counts = np.bincount(before)
    if int((counts >= len(before) / 20).sum()) > 1 and len(np.unique(after)) == 1:
        raise RunFailed(
            f"dam: the merge answers one class to all of {len(after)} rows of {data}, {label} does not: the entropy "
            "fell by giving up the task. Take fewer steps, smaller rates, or inner=sgd."
        )


@dataclass(frozen=True)
class Dam(Waiting):
    """DAM before its data are there; see `_from_data.OfData`."""

    config: Config
    kinds: tuple[str, ...] = RECORD.needs

    def check(self, models: int) -> None:
        """Raise UsageError for fewer than two models."""
        if models < 2:
            raise UsageError(
                f"dam: {models} model was given; its mask is shared by several. Give two or more --bricks."
            )

    def from_data(self, stage: Stage) -> Made:
        """Learn the mask and the scales on the unlabelled rows of all experts; return the merged tensors."""
        self.check(len(stage.experts))
        names = sorted(stage.experts[0].parameters)
        for expert in stage.experts:
            odd = sorted(set(names) ^ set(expert.parameters))
            if odd:
                raise Refused(f"dam: {expert.label} and {stage.experts[0].label} differ in {', '.join(odd[:10])}.")
        before = [classes(expert, self.config.seed) for expert in stage.experts]
        base = [stage.base[name] for name in names]
        taus = [[e.parameters[n].detach() - b for e in stage.experts] for n, b in zip(names, base, strict=True)]
        _average_buffers(stage.experts)
        search = Search(self.config, stage.experts, names, base, taus)
        kept = search.run()
        for expert, said in zip(stage.experts, before, strict=True):
            check_spread(said, classes(expert, self.config.seed), expert.label, expert.data)
        merged = [combine(b, t, search.lam[:, p], kept[p]) for p, (b, t) in enumerate(zip(base, taus, strict=True))]
        probability = [torch.cat([m.sigmoid().flatten() for m in logits]) for logits in search.m]
        history = search.history or [float("nan")]
        about = {
            "rows": [len(expert.rows) for expert in stage.experts],
            "entropy": [history[0], history[-1]] if search.history else [],
            "keep_probability": [[float(p.min()), float(p.mean()), float(p.max())] for p in probability],
            "lam": [[float(of_task.min()), float(of_task.mean()), float(of_task.max())] for of_task in search.lam],
            "perturbation": [float(given.delta.abs().max()) for given in search.inputs],
        }
        said = ", ".join(f"{e.label} {low:.2f} to {high:.2f}" for e, (low, _, high) in
                         zip(stage.experts, about["lam"], strict=True))  # fmt: skip
        about["detail"] = (
            f"a mask learned in {self.config.steps} steps keeps entries with probability "
            f"{about['keep_probability'][0][0]:.2f} to {about['keep_probability'][0][2]:.2f}; scales of {said}"
        )
        return Made(dict(zip(names, merged, strict=True)), about)


@torch.no_grad()
def _average_buffers(experts: Sequence[Expert]) -> None:
    """Give every model the mean of what they hold beside parameters (statistics of batch norms), as the merge has."""
    for name in sorted(experts[0].tensors.keys() - experts[0].parameters.keys()):
        mean = torch.stack([expert.tensors[name] for expert in experts]).mean(0)
        for expert in experts:
            expert.tensors[name].copy_(mean)


def rule(config: Config) -> Dam:
    """Return the DAM that a config describes."""
    return Dam(config)
