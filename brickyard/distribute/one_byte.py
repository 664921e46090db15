"""Just one byte: machines that train one model together and send each other one byte per gradient.

All members start from the same weights theta. Round t has n estimates, dealt out among the members; of estimate j

    z_j = noise(key(seed, t, j))                         everybody can draw it, so it never travels
    p_j = (L(theta + eps z_j) - L(theta - eps z_j)) / (2 eps)      on a batch of the member's own; what travels is p_j
    theta <- theta - lr / sqrt(n) sum_j clip(p_j) z_j    by every member, in the order of j     (`reduction`: or 1 / n)

The byte: a sign bit and seven bits e + 64, e = clip(round(8 ln |p|), -63, 63), restored as sign exp(e / 8): 3.8e-4 to
2.6e3 with a relative error of at most exp(1/16) - 1 = 6.5 %. The byte 0 is zero, and what is nearer to zero than to
the smallest step. Base + bytes + seed are the whole fine-tuning: the log (`.zolog`) rebuilds the weights.

Estimates are numbered in the round, not in their member, so a member that leaves or joins changes who computes, not
what is applied. Under torchrun's elastic restart every member opens its log again, and replaying the rounds that at
least two of them hold alike brings each to the same weights. A round is on the disk before it is applied, and the next
begins only when all have sent theirs: so an interruption leaves at most one round that a single member holds. It is
dropped and computed again; nothing is lost with it, for weights are always rebuilt from the log.

Detected, on all members: another base, configuration, seed or release; logs that forked; weights that differ
(`hash_every`); a log that is more than that one round longer than any other, which one member could have invented.
Bounded: a member that sends false scalars. Of every p no more counts than `clip` times the median |p| of the last
rounds, which holds as long as less than half of the estimates are false. Neither: false scalars within that bound, and
two members that hold the same invented rounds. A loss that is no number travels as minus zero, which moves nothing.
`lora + one-byte:estimates=16` trains with it (each estimate asks about the member's whole batch), alone, or together
with the others where RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say so, each on data of its own. Its brick holds the
log beside the weights: `brickyard export BRICK --to log` leaves only that, `--to brick` rebuilds the weights from it.

Not private: seed and p together are a directional derivative of a member's loss.

Source: Zelikman et al., "Just One Byte (per gradient): A Note on Low-Bandwidth Decentralized Language Model Finetuning
Using Shared Randomness", 2023. Headline claim: one byte per gradient instead of 4 d, with the same course of the loss.
Differences: the released codec takes 9 bits (16 steps per e-fold and a sign) and is not what its code sends; drift of
+eps, -2 eps is undone from a copy (2x the memory of the weights). Left out: the learned eps, scaling by tensor.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

import brickyard
from brickyard.core import noise
from brickyard.core.errors import NotFinite, ParityBroken, Refused, RunFailed, UnknownName, UsageError, WrongBase
from brickyard.core.forwards import refuse_unlike_forwards
from brickyard.core.method import Claim, Record
from brickyard.distribute._arm_step import OneByteStep, named
from brickyard.distribute._members import Members
from brickyard.distribute._zolog import LogFile, same_header

if TYPE_CHECKING:
    from brickyard.core.attached import Attached
    from brickyard.core.loop import Step, Training
    from brickyard.core.task import Task

RECORD = Record(
    name="one-byte",
    family="distribute",
    slot="step",
    search={"lr": (1e-5, 1e-4, 1e-3)},
    training={"lr": 1e-4, "wd": 0.0, "schedule": "constant", "warmup": 0.0},
    title="Decentralised zeroth-order training at one byte per gradient",
    paper="Just One Byte (per gradient), 2023, arXiv 2306.10015",
    claims=(
        Claim(
            text="Members send one byte per estimate and nothing else; an all-reduce of gradients sends 4 d.",
            measure="wire",
            kind="counted",
        ),
        Claim(
            text="Replicas stay equal bit for bit, equal to one machine alone, and the log rebuilds them.",
            measure="replicas",
            kind="counted",
        ),
        Claim(
            text="With the byte the final loss is within 3 % of that with full-precision scalars.",
            measure="quality",
            seeds=20,
            control_seeds=3,
            full={"seeds": 40},
        ),
    ),
)

WIDTH = {"byte": 1, "f16": 2, "f32": 4}
REDUCTIONS = ("sqrt", "mean")
STEPS = 8  # of the byte's exponent per e-fold
_FLOATS = {"f16": torch.float16, "f32": torch.float32}
_SIGN, _BIAS, _LARGEST = 128, 64, 63
_OVERFLOW = 0.01  # share of the scalars at the upper end of the codec's range that is too many
_ENOUGH = 200  # scalars to judge that share by
_IN_A_ROW = 20  # rounds without a finite scalar before a run is given up: such weights do not recover
_MOST_BYTES = 2**30  # of a log that a member may claim to hold


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of a run; they are the same for all members and stand in the log."""

    lr: float = 1e-4
    """learning rate (an arm takes its own); with `reduction=sqrt` that of one estimate, so it goes with `estimates`"""
    eps: float = 1e-3
    """smoothing radius of the two-point estimate"""
    estimates: int = 16
    """estimates a round, n, over all members together"""
    reduction: Literal["sqrt", "mean"] = "sqrt"
    """what the sum of a round is divided by: `sqrt` of n (as released), or n (`mean`)"""
    codec: Literal["byte", "f16", "f32"] = "byte"
    """how a scalar travels: one byte, two or four"""
    unit: float = 1.0
    """the scalars are sent in this unit; raise it where too many exceed the codec's range"""
    clip: float = 5.0
    """times the median |p| of the last rounds that one p may count; 0: no bound"""
    window: int = 16
    """rounds behind that median, the present one included"""
    hash_every: int = 64
    """rounds between two comparisons of all members' weights; 0: never"""

    def __post_init__(self) -> None:
        for what, given, known in (("codec", self.codec, WIDTH), ("reduction", self.reduction, REDUCTIONS)):
            if given not in known:
                raise UnknownName.among(f"one-byte {what}", str(given), known)
        checks = {
            "eps": math.isfinite(self.eps) and self.eps > 0,
            "lr": math.isfinite(self.lr) and self.lr >= 0,
            "estimates": self.estimates >= 1,
            "unit": math.isfinite(self.unit) and self.unit > 0,
            "clip": self.clip == 0 or self.clip >= 1,
            "window": self.window >= 1,
            "hash_every": self.hash_every >= 0,
        }
        for name, ok in checks.items():
            if not ok:
                raise UsageError(f"one-byte: {name}={getattr(self, name)!r} is out of range.")

    @property
    def backward(self) -> bool:
        """It never runs a backward pass."""
        return False


def encode(p_n: Sequence[float], codec: str = "byte") -> Tensor:
    """Return the codes of scalars: uint8 [n x width], floats in little-endian order. NotFinite for NaN and infinity."""
    p = torch.tensor(list(p_n), dtype=torch.float64)
    if not p.isfinite().all():
        raise NotFinite(f"p of estimate {int((~p.isfinite()).nonzero()[0])} is {float(p[~p.isfinite()][0])}.")
    if codec in _FLOATS:
        dtype = _FLOATS[codec]
        most = torch.finfo(dtype).max
        return (p.clamp(-most, most).to(dtype) + 0.0).view(torch.uint8)  # minus zero, which is no scalar, becomes zero
    smallest = math.exp(-_LARGEST / STEPS)
    exponent = (STEPS * p.abs().clamp(min=smallest).log()).round().clamp(-_LARGEST, _LARGEST)
    code = exponent.to(torch.int64) + _BIAS + _SIGN * (p < 0)
    return torch.where(p.abs() < smallest / 2, 0, code).to(torch.uint8)


def encode_found(p_n: Sequence[float], codec: str = "byte") -> Tensor:
    """Return the codes of what was found: as `encode`, but what is no number becomes minus zero and moves nothing."""
    codes = encode([p if math.isfinite(p) else 0.0 for p in p_n], codec).view(-1, WIDTH[codec])
    for j, p in enumerate(p_n):
        if not math.isfinite(p):
            codes[j, -1] = _SIGN  # which is in the last byte of every codec
    return codes.view(-1)


def skipped(p: Tensor) -> Tensor:
    """Return which scalars stand for a loss that was no number: bool, in the shape of `p`."""
    return (p == 0) & p.signbit()


def decode(codes: Tensor, codec: str = "byte") -> Tensor:
    """Return the scalars of codes [n x width]: float32 [n], the same bits on every machine."""
    if codec in _FLOATS:
        return codes.cpu().contiguous().view(_FLOATS[codec]).float()
    return _byte_values()[codes.cpu().long()]


def largest(codec: str = "byte") -> float:
    """Return the upper end of a codec's range."""
    return float(decode(encode([1e300], codec), codec))


def bound_of(history: Tensor, clip: float) -> float:
    """Return the most that one |p| may count: `clip` times the lower median of the |p| that are not 0; 0: no bound.

    A median moves no further than the honest values reach, as long as less than half of all values are false.
    """
    sizes = history.abs()
    sizes = sizes[sizes > 0]
    return clip * float(sizes.median()) if clip and len(sizes) else math.inf


def terms_of(p_n: Tensor, bound: float, seed: int, t: int, lr: float, reduction: str) -> list[tuple[int, float]]:
    """Return what round `t` adds to the weights: (key of z_j, scale) in the order of j."""
    share = lr / (math.sqrt(len(p_n)) if reduction == "sqrt" else len(p_n))
    clipped = [max(-bound, min(bound, p)) for p in p_n.tolist()]
    return [(noise.key(seed, t, j), -share * p) for j, p in enumerate(clipped) if p]


def digests(parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the SHA-256 of each tensor, its type and its shape."""
    out = {}
    for name, tensor in parameters.items():
        flat: Any = tensor.detach().cpu().contiguous().view(-1)
        sha = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
        sha.update(memoryview(flat.view(torch.uint8).numpy()))
        out[name] = sha.hexdigest()
    return out


def fingerprint(parameters: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of all tensors in their order."""
    return hashlib.sha256(" ".join(digests(parameters).values()).encode()).hexdigest()


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a model that train, by name, each once.

    Raises UsageError where there are none, Refused where dropout or moving batch statistics would make the two losses
    of an estimate differ by more than the weights: call `model.eval()` first.
    """
    refuse_unlike_forwards(model)
    found = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise UsageError("no parameter of the model trains; leave requires_grad on where it should.")
    return found


def header_of(parameters: Mapping[str, Tensor], config: Config, seed: int) -> dict[str, Any]:
    """Return all that members must share, and that a log begins with. `parameters` are those of the base."""
    drawn = noise.normal(noise.key(1, 2), 3, 0, 1024)
    return {
        "base": fingerprint(parameters),
        "config": asdict(config),
        "seed": seed,
        "noise": digests({"": drawn})[""][:16],
        "version": brickyard.__version__,
    }


class Log(LogFile):
    """The scalars of a run, as they travelled; see `LogFile` for what a file may hold."""

    def __init__(self, path: Path, header: dict[str, Any] | None = None) -> None:
        super().__init__(path, header, self._round_bytes)

    def _round_bytes(self, header: dict[str, Any]) -> int:
        self.config, self.seed = Config(**header["config"]), int(header["seed"])
        return self.config.estimates * WIDTH[self.config.codec]

    def scalars(self, first: int, end: int) -> Tensor:
        """Return p of the rounds [first, end): float32 [rounds, n]."""
        raw = bytearray(self.body[first * self.round_bytes : end * self.round_bytes])
        codes = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
        return (decode(codes, self.config.codec) * self.config.unit).view(-1, self.config.estimates)


def replay(parameters: Mapping[str, Tensor], log: Log, *, first: int = 0, end: int | None = None) -> None:
    """Apply the rounds [first, end) of a log, in place, to weights that contain those before `first`.

    No data are needed. Raises WrongBase where `first` is 0 and the weights are not those the run began with, Refused
    where this release draws other noise than the one that wrote the log.
    """
    if first == 0 and fingerprint(parameters) != log.header["base"]:
        raise WrongBase(
            f"{log.path} was made on the base {log.header['base'][:12]}, these weights are "
            f"{fingerprint(parameters)[:12]}; start from the base of the run, and train the same parameters."
        )
    noise_here = header_of({}, log.config, log.seed)["noise"]
    if noise_here != log.header["noise"]:
        raise Refused(f"{log.path} was made with noise {log.header['noise']}; this release draws {noise_here}.")
    _apply(parameters, log, first, log.rounds if end is None else end)


def _apply(parameters: Mapping[str, Tensor], log: Log, first: int, end: int) -> None:
    config = log.config
    for t in range(first, end):
        bound = _bound(log, t)
        terms = terms_of(log.scalars(t, t + 1)[0], bound, log.seed, t, config.lr, config.reduction)
        for number, theta in enumerate(parameters.values()):
            noise.add_(theta, terms, parameter=number)


def _bound(log: Log, t: int) -> float:
    return bound_of(log.scalars(max(0, t + 1 - log.config.window), t + 1), log.config.clip)


def step(config: Config, attached: Attached, training: Training, *, rows: int, task: Task) -> Step:
    """Return the step of an arm; Refused where members disagree on its length, or a log could not rebuild it."""
    return OneByteStep(config, attached, training, rows, Member)


def rebuild(attached: Attached, path: Path) -> None:
    """Replay the log at `path` onto an arm as its run attached it, in place; WrongBase where it began elsewhere."""
    replay(named(attached), Log(path))


class Member:
    """One member of a run. Constructing it agrees with the others on everything and catches up with their log.

    Args:
        parameters: the weights that train, by name, as they are in the base (see `trainable`); changed in place.
        model: held, in every round, to answer alike twice; without it nobody sees that it was put to training mode.
        log: this member's own file; members with files of one run, or with none yet, can stand in for each other.
        group: a process group of torch.distributed (gloo or NCCL); without one, torch's own default if there is one,
            else this member is alone.
        rounds: where the run of which this is a part stands; what this member's log holds beyond it is dropped.

    Raises Refused, on every member, where one has another base, configuration, version or log.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        config: Config,
        *,
        seed: int,
        log: Path,
        group: dist.ProcessGroup | None = None,
        model: nn.Module | None = None,
        rounds: int | None = None,
    ) -> None:
        self.parameters, self.config, self.model = dict(parameters), config, model
        if model is not None:
            refuse_unlike_forwards(model)
        self.members = Members(group, next(iter(self.parameters.values())).device)
        if self.members.world > config.estimates:
            raise UsageError(
                f"{self.members.world} members share {config.estimates} estimates a round; raise estimates."
            )
        header = header_of(self.parameters, config, seed)
        for rank, text in enumerate(self.members.texts(json.dumps(header, sort_keys=True))):
            same_header(f"member {rank}", json.loads(text), header)
        self.log = Log(log, header)
        if rounds is not None:
            self.log.drop(max(0, self.log.rounds - rounds))
        self.payload_bytes = 0
        """bytes of the tensors that this member has handed to collectives in rounds"""
        self.clipped = 0
        """scalars of all members that exceeded the bound so far, in this process"""
        self.skipped = 0
        """estimates of all members whose loss was no number so far, in this process"""
        self._catch_up()
        # Of all rounds, as it is compared with all of them: a member that was started again must stop with the others.
        self._overflowed = sum(self._beyond(t) for t in range(self.log.rounds))
        replay(self.parameters, self.log)
        self.compare()
        self._kept = [theta.clone() for theta in self.parameters.values()]

    def round(self, loss: Callable[[int, int], Tensor]) -> float:
        """Run one round; return the mean loss of this member's estimates (NaN if none of them is a number).

        loss: (round, estimate) -> scalar, called twice for each of this member's estimates, on the same batch; the
        model in evaluation mode. An estimate whose loss is no number is skipped and counted. Raises, on every member
        alike, NotFinite where no scalar of 20 rounds in a row is a number, ParityBroken where the weights of two
        members differ, RunFailed where the codec's range is too small for the scalars.
        """
        if self.model is not None:
            refuse_unlike_forwards(self.model)
        t, config = self.log.rounds, self.config
        dealt, width = [self.dealt(rank) for rank in range(self.members.world)], WIDTH[config.codec]
        mine = dealt[self.members.rank]
        found = [self._estimate(noise.key(self.log.seed, t, j), lambda j=j: loss(t, j)) for j in mine]
        codes = encode_found([p / config.unit for p, _ in found], config.codec)
        # Some members may have one estimate fewer; a collective takes equal sizes.
        sent = torch.zeros(max(map(len, dealt)) * width, dtype=torch.uint8)
        sent[: len(codes)] = codes
        self.payload_bytes += sent.numel()
        every = [codes[: len(js) * width] for js, codes in zip(dealt, self.members.gather(sent), strict=True)]
        self.log.append(torch.cat(every).numpy().tobytes())
        self._judge(self.log.scalars(t, t + 1)[0], _bound(self.log, t))
        _apply(self.parameters, self.log, t, t + 1)
        self.remember()
        if config.hash_every and (t + 1) % config.hash_every == 0:
            self.compare()
        values = [value for p, value in found if math.isfinite(p)]
        return sum(values) / len(values) if values else math.nan

    def dealt(self, rank: int) -> range:
        """Return which estimates of a round are a member's: at least one, and no two members' numbers differ by two."""
        n, world = self.config.estimates, self.members.world
        return range(rank * n // world, (rank + 1) * n // world)

    def remember(self) -> None:
        """Take the weights as they are now for those that estimates return to; `round` does it itself."""
        for kept, theta in zip(self._kept, self.parameters.values(), strict=True):
            kept.copy_(theta)

    def compare(self) -> None:
        """Compare the weights of all members; ParityBroken, on every one, names the first tensor that differs."""
        mine = digests(self.parameters)
        whole = hashlib.sha256(" ".join(mine.values()).encode()).hexdigest()
        found = self.members.texts(whole)
        if len(set(found)) == 1:
            return
        every = [json.loads(text) for text in self.members.texts(json.dumps(list(mine.values())))]
        number, name = next((i, n) for i, n in enumerate(mine) if len({digest[i] for digest in every}) > 1)
        values = [digest[number] for digest in every]
        usual = max(values, key=values.count)
        odd = [rank for rank, value in enumerate(values) if value != usual]
        raise ParityBroken(
            f"after {self.log.rounds} rounds the weights of members {odd} are not those of the others, from {name} on; "
            "start these members again: they will replay the log from the base."
        )

    def _estimate(self, key: int, loss: Callable[[], Tensor]) -> tuple[float, float]:
        """Return p and the mean of the two losses; the weights end exactly where they began, also if a loss raises."""
        with torch.no_grad():
            try:
                self._perturb(key, self.config.eps)
                plus = float(loss())
                self._perturb(key, -2 * self.config.eps)
                minus = float(loss())
            finally:
                for kept, theta in zip(self._kept, self.parameters.values(), strict=True):
                    theta.copy_(kept)
        return (plus - minus) / (2 * self.config.eps), (plus + minus) / 2

    def _perturb(self, key: int, scale: float) -> None:
        for number, theta in enumerate(self.parameters.values()):
            noise.add_(theta, [(key, scale)], parameter=number)

    def _judge(self, p_n: Tensor, bound: float) -> None:
        """Count what is skipped and clipped, and refuse to go on where honest scalars exceed the codec's range."""
        config = self.config
        self.skipped += int(skipped(p_n).sum())
        # Of the log, so that all members, and those that were started again, come to the same answer.
        last = self.log.scalars(max(0, self.log.rounds - _IN_A_ROW), self.log.rounds)
        if len(last) == _IN_A_ROW and bool(skipped(last).all()):
            raise NotFinite(
                f"no loss of any member was finite in {_IN_A_ROW} rounds in a row, up to round {self.log.rounds}; "
                "lower lr or eps, or check the data."
            )
        self.clipped += int((p_n.abs() > bound).sum())
        self._overflowed += self._beyond(self.log.rounds - 1)
        seen = self.log.rounds * config.estimates
        if seen >= _ENOUGH and self._overflowed > _OVERFLOW * seen:
            raise RunFailed(
                f"{self._overflowed} of {seen} scalars exceed the range of codec {config.codec!r}; "
                f"raise unit (now {config.unit:g}), or lower the loss's scale."
            )

    def _beyond(self, t: int) -> int:
        """Return how many scalars of round `t` reach the end of the codec's range, within the bound."""
        sizes = self.log.scalars(t, t + 1).abs()
        return int(((sizes >= largest(self.config.codec) * self.config.unit) & (sizes <= _bound(self.log, t))).sum())

    def _catch_up(self) -> None:
        """Bring this log to the rounds that two members hold; Refused, on every member, where their logs disagree."""
        counts = self._claimed()
        source = counts.index(max(counts))
        agreed = sorted(counts)[-2] if len(counts) > 1 else counts[0]
        alone = counts[source] - agreed
        if alone > 1:
            raise Refused(
                f"the log of member {source} holds {alone} rounds more than any other's, which it could have invented. "
                f"Copy that file to another member if you trust it, else delete it at member {source}; then start all "
                "members again."
            )
        size = agreed * self.log.round_bytes
        body = self.members.from_one(source, bytes(self.log.body), size)
        fits = body.startswith(bytes(self.log.body[:size]))
        forked = [rank for rank, text in enumerate(self.members.texts(str(int(fits)))) if text == "0"]
        if forked:
            raise Refused(
                f"the logs of members {forked} are not the beginning of member {source}'s, the longest: they belong "
                "to other runs, or forked. Delete them and start these members again."
            )
        # An interrupted round, which nobody else has, is computed again.
        self.log.drop(max(0, self.log.rounds - agreed))
        if len(body) > len(self.log.body):
            self.log.append(body[len(self.log.body) :])

    def _claimed(self) -> list[int]:
        """Return how many rounds each member says it holds; Refused where that is no number, or one of no run."""
        most, counts = _MOST_BYTES // self.log.round_bytes, []
        for rank, text in enumerate(self.members.texts(str(self.log.rounds))):
            if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) <= most):
                raise Refused(f"member {rank} claims a log of {text[:30]!r} rounds; expected at most {most:,}.")
            counts.append(int(text))
        return counts


@functools.cache
def _byte_values() -> Tensor:
    """Return what each byte stands for: float32 [256].

    None of the exponentials lies so near to the middle of two float32 that another machine could round it elsewhere.
    """
    sizes = [0.0] + [math.exp((code - _BIAS) / STEPS) for code in range(1, _SIGN)]
    return torch.tensor(sizes + [-size for size in sizes], dtype=torch.float32)
