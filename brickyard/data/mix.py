"""Mix domains: weights by size, by temperature or by DoReMi, and the training set that has them.

    proportional   w_i ~ n_i              temperature   w_i ~ n_i^(1/T)          uniform   w_i = 1 / D
    doremi         a reference of fixed uniform weights is trained first; then, at each step of a proxy on
                   sum_i w_i L_i, with the excess loss of a batch  e_i = max(mean of (L_proxy,i - L_reference,i), 0):
                   w_i <- w_i exp(eta e_i),   w <- w / sum w,   w <- (1 - c) w + c / D;     result: mean of w over steps

Reference and proxy are small byte-level models (an MLP on the last `context` bytes), trained here and not kept. Their
weights are shares of bytes, so rows are drawn in shares ~ w_i / (mean bytes of a row); the report gives the shares of
rows and of bytes. Where more rows are wanted than a domain has, its rows are repeated; the report says how often, and
what that is worth: U unique rows seen R more times are worth U + U R* (1 - exp(-R / R*)) rows, R* about 15.

Source: Xie et al. (DoReMi), arXiv 2305.10429, algorithm 1; Muennighoff et al., "Scaling data-constrained language
models", arXiv 2305.16264, section 3.1 (R* = 15.4); Hoffmann et al., arXiv 2203.15556, section 3.3 (the law that
`fit_scaling` fits); boxes of the survey arXiv 2312.01700. Survey: no measured claim. Departures: excess is clipped per
domain and batch, not per token; the reference's weights are uniform. Left out: DoGE; data-mixing laws.

Shapes: D domains, B rows of a batch, C bytes of context, R runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax
from torch import Tensor, nn
from torch.nn import functional as F

from brickyard.core.errors import BadData, UsageError
from brickyard.core.method import Record
from brickyard.core.pool import Outcome, Pool
from brickyard.data._options import belong

RECORD = Record(
    name="mix",
    family="data",
    title="weigh domains by size, temperature or DoReMi, and write the mixture",
    paper="arXiv 2305.10429",
    needs=("text-classification", "pair-classification", "regression", "causal-lm"),
    part_of="data-management",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of mixing; UsageError outside their ranges."""

    by: Literal["proportional", "temperature", "uniform", "doremi"] = "proportional"
    """what sets the weights"""
    rows: int = 0
    """rows of the mixture; 0: as many as are given"""
    temperature: float = 3.0
    """temperature: 1 is proportional, infinity uniform"""
    eta: float = 1.0
    """doremi: step size of the weights"""
    smoothing: float = 1e-3
    """doremi: share c of uniform weights at each step"""
    steps: int = 600
    """doremi: steps of the proxy"""
    reference_steps: int = 0
    """doremi: steps of the reference; 0: those of the proxy"""
    batch: int = 64
    """doremi: windows of each domain at a step"""
    context: int = 12
    """doremi: bytes that the byte models look back"""
    width: int = 256
    """doremi: width of their hidden layer"""
    lr: float = 3e-3
    """doremi: their learning rate (Adam)"""

    def __post_init__(self) -> None:
        if (
            self.rows < 0
            or self.reference_steps < 0
            or self.steps < 1
            or self.batch < 1
            or self.context < 1
            or self.width < 1
        ):
            raise UsageError(
                "rows and reference_steps must not be negative; steps, batch, context and width must be positive."
            )
        if not self.temperature > 0 or not self.eta > 0 or not self.lr > 0 or not 0 <= self.smoothing < 1:
            raise UsageError(
                f"temperature={self.temperature}, eta={self.eta}, lr={self.lr}, smoothing={self.smoothing}: positive "
                "numbers, and a smoothing from 0 to below 1, were expected."
            )
        belong(self, ("temperature",), "by=temperature", used=self.by == "temperature")
        proxy = ("eta", "smoothing", "steps", "reference_steps", "batch", "context", "width", "lr")
        belong(self, proxy, "by=doremi", used=self.by == "doremi")


REPEATS = 15.4  # R*, Muennighoff et al., section 3.1


def tempered(sizes_D: np.ndarray, temperature: float) -> np.ndarray:
    """Return weights ~ n^(1/T) [D] that sum to 1; T = 1 is proportional, T = infinity uniform."""
    log_D = np.log(sizes_D) / temperature
    return softmax(log_D)


def doremi_update(w_D: np.ndarray, excess_D: np.ndarray, *, eta: float, smoothing: float) -> np.ndarray:
    """Return the weights [D] after one step of exponentiated gradient ascent on the excess losses [D] (nats)."""
    log_D = np.log(w_D) + eta * np.maximum(excess_D, 0)
    return (1 - smoothing) * softmax(log_D) + smoothing / len(w_D)


def worth(unique: np.ndarray, seen: np.ndarray, repeats: float = REPEATS) -> np.ndarray:
    """Return how many unique rows the `seen` rows drawn from `unique` ones are worth (Muennighoff et al., eq. 5)."""
    more = np.maximum(np.asarray(seen) / unique - 1, 0)
    return np.where(more > 0, unique + unique * repeats * (1 - np.exp(-more / repeats)), seen)


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^a + B / D^b: the loss of N parameters after D tokens."""

    floor: float
    by_size: float
    size_exponent: float
    by_data: float
    data_exponent: float

    def loss(self, size: np.ndarray, data: np.ndarray) -> np.ndarray:
        """Return the predicted loss, in the unit of the fitted ones."""
        return self.floor + self.by_size / size**self.size_exponent + self.by_data / data**self.data_exponent


def fit_scaling(size_R: np.ndarray, data_R: np.ndarray, loss_R: np.ndarray, delta: float = 1e-3) -> Law:
    """Fit the law to R runs: Huber loss of log L with log-sum-exp of the three terms, L-BFGS from a grid of starts.

    Raises BadData for fewer than 6 runs, sizes or data that do not vary, or a value that is not positive.
    """
    given = [np.asarray(v, np.float64) for v in (size_R, data_R, loss_R)]
    if len(given[2]) < 6 or not all(((v > 0) & np.isfinite(v)).all() for v in given):
        raise BadData("a scaling law has five unknowns: at least 6 runs, all positive, were expected.")
    n, d, target = map(np.log, given)
    if np.ptp(n) == 0 or np.ptp(d) == 0:
        raise BadData("every run has the same size, or the same data; vary both.")
    n0, d0 = n.mean(), d.mean()  # centred, so that a change of an exponent does not throw its coefficient off

    def huber(p: np.ndarray) -> tuple[float, np.ndarray]:
        terms = np.stack([np.full_like(n, p[0]), p[1] - p[2] * (n - n0), p[3] - p[4] * (d - d0)])
        guess = logsumexp(terms, axis=0)
        error = guess - target
        pull = np.clip(error, -delta, delta)
        share = np.exp(terms - guess) * pull
        gradient = [share[0], share[1], -share[1] * (n - n0), share[2], -share[2] * (d - d0)]
        value = np.where(abs(error) <= delta, error**2 / 2, delta * (abs(error) - delta / 2)).sum()
        return float(value) / delta**2, np.array([g.sum() for g in gradient]) / delta**2

    low = float(target.min())
    starts = [
        np.array([low + floor, low + part, a, low + part, b])
        for floor in (-0.1, -0.5)
        for part in (-1.0, -2.0)
        for a in (0.2, 0.5)
        for b in (0.2, 0.5)
    ]
    found = [minimize(huber, start, jac=True, method="L-BFGS-B", options={"maxiter": 200}) for start in starts]
    best = min(found, key=lambda result: result.fun).x
    options = {"maxiter": 5000, "maxfun": 20000, "ftol": 1e-15, "gtol": 1e-10}
    e, la, a, lb, b = minimize(huber, best, jac=True, method="L-BFGS-B", options=options).x
    return Law(float(np.exp(e)), float(np.exp(la + a * n0)), float(a), float(np.exp(lb + b * d0)), float(b))


class ByteModel(nn.Module):
    """The next byte from the last C: embedding, one hidden GELU layer, 256 logits (Bengio et al. 2003).

    Takes windows [B, C + 1] of byte values (256 stands before the text) and returns the losses [B] of their last bytes.
    """

    def __init__(self, context: int, width: int, *, channels: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(257, channels)
        self.hidden = nn.Linear(context * channels, width)
        self.output = nn.Linear(width, 256)

    def forward(self, window_BC: Tensor) -> Tensor:
        x = self.embedding(window_BC[:, :-1]).flatten(1)
        return F.cross_entropy(self.output(F.gelu(self.hidden(x))), window_BC[:, -1], reduction="none")


def byte_stream(texts: list[str], context: int) -> Tensor:
    """Return the bytes of all texts, int16, each behind `context` marks 256 that stand for nothing before it."""
    parts = [np.concatenate([np.full(context, 256), np.frombuffer(t.encode(), np.uint8)]) for t in texts]
    return torch.from_numpy(np.concatenate(parts).astype(np.int16))


def windows(stream: Tensor, draw: torch.Generator, count: int, context: int) -> Tensor:
    """Draw windows [count, context + 1] that end in a byte of text, with replacement."""
    ends = torch.randint(context, len(stream), (2 * count + 32,), generator=draw)
    ends = ends[stream[ends] < 256]
    while len(ends) < count:
        more = torch.randint(context, len(stream), (2 * count + 32,), generator=draw)
        ends = torch.cat([ends, more[stream[more] < 256]])
    return stream[ends[:count, None] + torch.arange(-context, 1)].long()


def train_bytes(
    streams: list[Tensor],
    config: Config,
    seed: int,
    weigh: Callable[[np.ndarray, list[Tensor]], np.ndarray],
    *,
    steps: int = 0,
) -> ByteModel:
    """Train a byte model on sum_i w_i L_i; each step draws the same number of windows from every domain.

    `weigh(losses [D], windows of each domain)` returns the weights [D] of the step.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ByteModel(config.context, config.width)
    draw = torch.Generator().manual_seed(seed + 1)
    optimiser = torch.optim.Adam(model.parameters(), lr=config.lr)
    for _ in range(steps or config.steps):
        batch = [windows(stream, draw, config.batch, config.context) for stream in streams]
        losses_D = model(torch.cat(batch)).view(len(streams), -1).mean(1)
        w_D = weigh(losses_D.detach().double().numpy(), batch)
        optimiser.zero_grad()
        (losses_D * torch.from_numpy(w_D).float()).sum().backward()
        optimiser.step()
    return model


def doremi(streams: list[Tensor], config: Config, seed: int) -> tuple[np.ndarray, np.ndarray, ByteModel]:
    """Return the mean weights [D], those of each step [steps, D], and the reference model."""
    uniform_D = np.full(len(streams), 1 / len(streams))
    reference = train_bytes(streams, config, seed, lambda losses, batch: uniform_D, steps=config.reference_steps)
    path = [uniform_D]

    def weigh(losses_D: np.ndarray, batch: list[Tensor]) -> np.ndarray:
        with torch.no_grad():
            known_D = reference(torch.cat(batch)).view(len(streams), -1).mean(1).double().numpy()
        path.append(doremi_update(path[-1], losses_D - known_D, eta=config.eta, smoothing=config.smoothing))
        return path[-1]

    train_bytes(streams, config, seed + 2, weigh)
    steps_SD = np.stack(path[1:])
    return steps_SD.mean(0), steps_SD, reference


def mix(config: Config, domains: dict[str, list[str]], seed: int) -> np.ndarray:
    """Return the weights [D] of domains, each with its texts, in the order given; they sum to 1.

    DoReMi's are shares of bytes, the others of rows.
    """
    sizes_D = np.array([len(texts) for texts in domains.values()], np.float64)
    if config.by == "doremi":
        empty = [name for name, texts in domains.items() if not any(text.strip() for text in texts)]
        if empty:
            raise BadData(f"domain {empty[0]!r} holds no text; a model cannot be trained on it. Leave it out.")
        return doremi([byte_stream(texts, config.context) for texts in domains.values()], config, seed)[0]
    temperature = {"proportional": 1.0, "uniform": np.inf, "temperature": config.temperature}[config.by]
    return tempered(sizes_D, temperature)


def drawn(rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return `count` of `rows`: whole shuffled passes over them, then a part of one, so that no row is seen twice more
    often than another."""
    passes = -(-count // len(rows))
    raw = np.random.PCG64(np.random.SeedSequence([seed, len(rows)])).random_raw(passes * len(rows))
    return rows[np.argsort(raw.reshape(passes, -1), axis=1, kind="stable")].ravel()[:count]


def run(config: Config, pool: Pool) -> Outcome:
    """Write the mixture of a pool's domains: the column named by --domain-column, else its labels."""
    values = pool.domains if pool.domains is not None else pool.labels
    if values is None:
        raise BadData("these data have no domains: name the column that holds them with --domain-column.")
    names = sorted(set(map(str, values)))
    if len(names) < 2:
        raise BadData(f"there is one domain only, {names[0]!r}; a mixture needs two or more.")
    members = {name: np.flatnonzero([str(value) == name for value in values]) for name in names}
    w_D = mix(config, {name: [pool.texts[i] for i in rows] for name, rows in members.items()}, pool.seed)
    total = config.rows or len(pool)
    bytes_N = np.array([len(text.encode()) for text in pool.texts])
    share_D = w_D
    if config.by == "doremi":
        share_D = w_D / np.array([bytes_N[rows].mean() for rows in members.values()])
        share_D = share_D / share_D.sum()
    ideal = share_D * total
    count_D = np.floor(ideal).astype(np.int64)
    count_D[np.argsort(count_D - ideal, kind="stable")[: total - count_D.sum()]] += 1
    lost = [name for name, count in zip(names, count_D, strict=True) if not count]
    if lost:
        raise UsageError(f"{total} rows leave none for domain {lost[0]!r}; ask for more rows.")
    pairs = zip(members.values(), count_D.tolist(), strict=True)
    taken = [drawn(rows, count, pool.seed + i) for i, (rows, count) in enumerate(pairs)]
    rows, byte_D = np.concatenate(taken), np.array([bytes_N[part].sum() for part in taken])
    order = np.argsort(np.random.PCG64(np.random.SeedSequence([pool.seed, total])).random_raw(total), kind="stable")
    unique_D = np.array([len(r) for r in members.values()])
    report = {
        "weights": dict(zip(names, map(float, w_D), strict=True)),
        "rows": dict(zip(names, count_D.tolist(), strict=True)),
        "row_shares": dict(zip(names, (count_D / total).tolist(), strict=True)),
        "byte_shares": dict(zip(names, (byte_D / max(byte_D.sum(), 1)).tolist(), strict=True)),
        "passes": dict(zip(names, (count_D / unique_D).tolist(), strict=True)),
        "worth_of_unique_rows": dict(zip(names, worth(unique_D, count_D).tolist(), strict=True)),
    }
    domain = {int(row): name for name, r in members.items() for row in r}
    gone = {int(row): f"domain {domain[int(row)]}" for row in np.setdiff1d(np.arange(len(pool)), rows)}
    return Outcome(rows[order], {"not drawn": gone} if gone else {}, {}, report)
