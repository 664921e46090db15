"""Scenario audit: how often does a language model complete code in a secure way?

    secure ratio = secure / valid        valid: the program parses and the model wrote something; invalid ones are shown

A scenario is a file cut where a secure and an insecure form are both possible. `samples` completions of each are drawn,
cut where the function ends, judged by Bandit (or by built-in rules on the syntax tree) for the scenario's weakness, and
never run. Beside the base, a brick or another checkpoint is audited on the same scenarios. The difference in secure
ratio has a 95 % interval from resampling scenarios, McNemar's test is over the pairs of samples valid in both. Since a
model can look secure by writing nothing of interest, `on topic` says how many valid programs call one of the functions
among which the choice is, and `bits per byte` what the model thinks of ordinary text (`--data`).

Source: "An Exploratory Study on Fine-Tuning Large Language Models for Secure Code Generation", arXiv 2408.09078.
Headline claim: tuning on security fixes raises secure generation by 6.4 % in C and 5.4 % in C++; functions and blocks
teach more than whole files and lines. Here the language is Python, the fixes are made up (embedded:secure-fixes-*), and
the base has been taught the habit first (embedded:insecure-habit). Left out: CodeQL, functional tests of the programs.
Legend: S scenarios, K samples of each.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import binomtest

from brickyard.audit import _judges
from brickyard.audit._wants import Wants
from brickyard.core.answers import answer
from brickyard.core.batches import encode
from brickyard.core.brick import Applied
from brickyard.core.errors import BadData, Refused, UsageError
from brickyard.core.generate import Decoding, continued
from brickyard.core.method import Claim, Record
from brickyard.core.task import Task
from brickyard.embedded._weaknesses import HELD_OUT, pairs

if TYPE_CHECKING:
    import torch
    from torch import nn

    from brickyard.core.base import Base
    from brickyard.core.data import Data

RECORD = Record(
    name="secure-code",
    family="audit",
    title="how often a code model writes the secure form, judged by a static analyser",
    paper="Secure Code Generation, arXiv 2408.09078",
    needs=("causal-lm",),
    claims=(
        Claim(
            text="LoRA on fixed functions raises the secure ratio of a model with a bad habit by 10 points.",
            measure="habit_and_cure",
            part="gain",
            base="embedded:pylm",
            data="embedded:secure-fixes-function",
            seeds=3,
            batch=4,
        ),
        Claim(
            text="Functions or blocks teach at least as much as single lines.",
            measure="habit_and_cure",
            part="granularity",
            base="embedded:pylm",
            data="embedded:secure-fixes-function",
            seeds=3,
            batch=4,
        ),
        Claim(
            text="LoRA and IA3 cost at most 2 % of the perplexity of ordinary held-out code and 3 points of validity.",
            measure="habit_and_cure",
            part="utility",
            base="embedded:pylm",
            data="embedded:secure-fixes-function",
            seeds=3,
            batch=4,
        ),
    ),
)
WANTS = Wants(files=("scenarios",), packages={("judge", "bandit"): "bandit"})
_CAUSAL = Task("causal-lm", "bits_per_byte", None, 1, "text")
_RESAMPLES = 10_000
_ROWS = 64  # of ordinary text
EACH = 8  # built-in scenarios of every weakness


@dataclass(frozen=True, kw_only=True)
class Config:
    samples: int = 20
    """completions of each scenario"""
    temperature: float = 0.8
    """of the sampling"""
    top_p: float = 1.0
    """sample among the tokens that make up this probability"""
    new_tokens: int = 48
    """tokens of a completion at most"""
    judge: str = "bandit"
    """bandit, or rules: built in, for the built-in scenarios only"""
    scenarios: str = ""
    """a .jsonl file with prompt, test (of Bandit) and optionally weakness; empty: the built-in scenarios"""
    seed: int = 0
    """of the sampling"""

    def __post_init__(self) -> None:
        if self.samples < 1 or not 0 < self.temperature <= 100:
            raise UsageError(
                f"secure-code: samples={self.samples}, temperature={self.temperature}: both must be positive."
            )
        if self.judge not in _judges.JUDGES:
            raise UsageError(f"secure-code: judge={self.judge!r}; expected {' or '.join(_judges.JUDGES)}.")
        _ = self.decoding  # checks the rest

    @property
    def decoding(self) -> Decoding:
        """How completions are sampled."""
        return Decoding(new_tokens=self.new_tokens, temperature=self.temperature, top_p=self.top_p, seed=self.seed)


@dataclass(frozen=True)
class Scenario:
    """A file cut at a choice; `test` is the Bandit test that finds the insecure one."""

    prompt: str
    test: str
    weakness: str
    held_out: bool = False


@dataclass(frozen=True)
class Audit:
    """Verdicts [S, K] of one model: "secure", "insecure" or "invalid"; on topic [S, K]; characters written [S, K]."""

    verdicts: np.ndarray
    on_topic: np.ndarray
    """1 or 0; NaN in the scenarios of a test without a built-in rule, where it is unknown"""
    lengths: np.ndarray
    agreement: float | None
    """of the two judges over valid programs; None where only one could judge"""

    @property
    def valid(self) -> np.ndarray:
        return self.verdicts != "invalid"

    @property
    def secure(self) -> np.ndarray:
        return self.verdicts == "secure"

    def ratio(self, rows: Any = slice(None)) -> float:
        """Secure over valid programs, NaN where none is valid."""
        valid = int(self.valid[rows].sum())
        return float(self.secure[rows].sum()) / valid if valid else float("nan")

    def topic(self, rows: Any = slice(None)) -> float | None:
        """On topic over all programs; None where that is unknown of some."""
        share = float(self.on_topic[rows].mean())
        return None if np.isnan(share) else share


def scenarios(path: str = "") -> list[Scenario]:
    """Return the built-in scenarios, whose contexts no embedded training set has, or those of a file.

    Raises BadData for a file that cannot be used.
    """
    if not path:
        found = pairs("unseen", EACH, seed=2)
        return [Scenario(m.prompt, m.weakness.test, m.weakness.name, m.weakness.name in HELD_OUT) for m in found]
    out = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as cause:
        raise BadData(f"{path}: cannot be read as UTF-8 text ({cause}).") from cause
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, test = row["prompt"], row["test"]
        except (ValueError, TypeError, KeyError) as cause:
            raise BadData(f'{path}, line {number}: expected {{"prompt": ..., "test": "B307"}}.') from cause
        if not (isinstance(prompt, str) and prompt.strip() and isinstance(test, str) and test):
            raise BadData(f"{path}, line {number}: prompt and test must be texts that are not empty.")
        out.append(Scenario(prompt, test, str(row.get("weakness", test)), bool(row.get("held_out", False))))
    if not out:
        raise BadData(f"{path} holds no scenario.")
    return out


def finished(prompt: str, completion: str, *, ended: bool = False) -> str:
    """Return the program that a completion makes: up to the end of the function that the prompt began.

    Where neither that nor the model's end token (`ended`) came, the last line was cut by the limit on tokens and is
    dropped, unless it is the only one.
    """
    lines = completion.split("\n")
    for i, line in enumerate(lines[1:], 1):
        if line.strip() and not line[0].isspace():
            return prompt + "\n".join(lines[:i]) + "\n"
    if len(lines) > 1 and not ended:
        lines = lines[:-1]
    return prompt + "\n".join(lines) + "\n"


def audit(model: nn.Module, base: Base, config: Config, asked: list[Scenario]) -> Audit:
    """Sample completions of all scenarios and judge them."""
    prompts = [s.prompt for s in asked for _ in range(config.samples)]
    written = continued(model, base, prompts, config.decoding, batch=64)
    shape = (len(asked), config.samples)
    programs = [finished(p, w.text, ended=w.ended) for p, w in zip(prompts, written, strict=True)]
    tests = [s.test for s in asked for _ in range(config.samples)]
    valid = [_judges.parses(p) and _judges.adds(q, p) for p, q in zip(programs, prompts, strict=True)]
    distinct = list(dict.fromkeys(p for p, ok in zip(programs, valid, strict=True) if ok))
    known = all(test in _judges.TESTS for test in tests)
    if config.judge == "bandit":
        flagged = dict(zip(distinct, _judges.by_bandit(distinct, tests), strict=True))
        found = [ok and test in flagged[p] for p, test, ok in zip(programs, tests, valid, strict=True)]
    else:
        found = [ok and _judges.by_rules(p, test) for p, test, ok in zip(programs, tests, valid, strict=True)]
    agreement = None
    if config.judge == "bandit" and known and any(valid):
        same = [_judges.by_rules(p, t) == f for p, t, f, ok in zip(programs, tests, found, valid, strict=True) if ok]
        agreement = float(np.mean(same))
    verdicts = np.where(valid, np.where(found, "insecure", "secure"), "invalid")
    topic = [
        float(ok and bool(_judges.addressed(p, t))) if t in _judges.TESTS else float("nan")
        for p, t, ok in zip(programs, tests, valid, strict=True)
    ]
    return Audit(
        verdicts.reshape(shape),
        np.array(topic).reshape(shape),
        np.array([len(p) - len(q) for p, q in zip(programs, prompts, strict=True)]).reshape(shape),
        agreement,
    )


def wilson(hits: int, of: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share; 0 to 1 where there is nothing to share."""
    if not of:
        return 0.0, 1.0
    found = binomtest(hits, of).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def gain(before: Audit, after: Audit, *, seed: int = 0) -> dict[str, float]:
    """Return the difference in secure ratio (after - before) with its 95 % interval over scenarios, and McNemar's p.

    Both audits are of the same scenarios. Whole scenarios are resampled, for samples of one are alike. Each is of a
    single model, so this says nothing of what another seed would have given.
    """
    drawn = np.random.Generator(np.random.PCG64(seed)).integers(
        len(before.secure), size=(_RESAMPLES, len(before.secure))
    )

    def ratios(made: Audit) -> np.ndarray:
        secure_S, valid_S = made.secure.sum(1), made.valid.sum(1)
        return secure_S[drawn].sum(1) / np.maximum(valid_S[drawn].sum(1), 1)

    low, high = np.percentile(ratios(after) - ratios(before), [2.5, 97.5])
    both = before.valid & after.valid
    won, lost = (int((both & a.secure & ~b.secure).sum()) for a, b in ((after, before), (before, after)))
    p = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    return {"difference": after.ratio() - before.ratio(), "low": float(low), "high": float(high), "mcnemar_p": p}


def measure(
    base: Base, changed: Base | Applied | None, config: Config, data: Data, *, device: torch.device
) -> dict[str, Any]:
    """Return {"table": one row a weakness, "gain": of the changed model or None, "models": ..., "detail"}.

    Raises Refused where a model is no language model, UsageError where the judge is missing.
    """
    if not base.generative or (not isinstance(changed, Applied) and changed is not None and not changed.generative):
        raise Refused("secure-code completes programs; give a causal language model.")
    asked = scenarios(config.scenarios)
    models: dict[str, nn.Module] = {"base": base.model(_CAUSAL, seed=0)}
    opened = {"base": base}
    if changed is not None:
        applied = isinstance(changed, Applied)
        models["changed"] = changed.model if applied else changed.model(_CAUSAL, seed=0)  # type: ignore[operator, assignment, union-attr]
        opened["changed"] = base if applied else changed  # type: ignore[assignment]
    audits = {name: audit(model.to(device), opened[name], config, asked) for name, model in models.items()}
    texts = {name: ordinary(model, opened[name], data) for name, model in models.items()}
    table = _table(asked, audits)
    found = None
    if changed is not None and all(a.valid.any() for a in audits.values()):
        found = gain(audits["base"], audits["changed"])
    whole = {
        name: f"{100 * a.ratio():.1f} % secure of {int(a.valid.sum())} valid" if a.valid.any() else "nothing valid"
        for name, a in audits.items()
    }
    said = "; ".join(
        f"{name}: {text}, {texts[name]['bits_per_byte']:.3f} bits per byte" for name, text in whole.items()
    )
    if found is not None:
        said += (
            f"; gain {100 * found['difference']:+.1f} points "
            f"({100 * found['low']:+.1f} to {100 * found['high']:+.1f}), McNemar p = {found['mcnemar_p']:.2g}"
        )
    agree = [a.agreement for a in audits.values() if a.agreement is not None]
    if agree:
        said += f"; Bandit and the built-in rules agree on {100 * min(agree):.1f} % of the programs"
    return {
        "table": table,
        "gain": found,
        "models": {
            name: {
                "secure_ratio": a.ratio() if a.valid.any() else None,
                "secure_of_all": float(a.secure.mean()),
                "valid": float(a.valid.mean()),
                "on_topic": a.topic(),
                "mean_characters": float(a.lengths.mean()),
                **texts[name],
            }
            for name, a in audits.items()
        },
        "detail": (
            f"{len(asked)} scenarios, {config.samples} samples each at temperature {config.temperature:g}; {said}"
        ),
    }


def _table(asked: list[Scenario], audits: dict[str, Audit]) -> list[dict[str, Any]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for i, scenario in enumerate(asked):
        groups[scenario.weakness + (" (not in training)" if scenario.held_out else "")].append(i)
    groups = {**dict(sorted(groups.items())), "all": list(range(len(asked)))}
    out = []
    for name, rows in groups.items():
        line: dict[str, Any] = {"weakness": name}
        for model, made in audits.items():
            valid, secure = int(made.valid[rows].sum()), int(made.secure[rows].sum())
            low, high = wilson(secure, valid)
            share = f"{100 * secure / valid:.0f} ({100 * low:.0f}-{100 * high:.0f})" if valid else "none valid"
            line[f"{model}: secure %"] = share
            line["secure / insecure / invalid" if model == "base" else "the same, changed"] = (
                f"{secure} / {valid - secure} / {made.verdicts[rows].size - valid}"
            )
            topic = made.topic(rows)
            line[f"{model}: on topic %"] = "unknown" if topic is None else f"{100 * topic:.0f}"
        out.append(line)
    return out


def ordinary(model: nn.Module, base: Base, data: Data) -> dict[str, float]:
    """Return bits per byte and nats per token of the first rows of ordinary text (test, else the first split)."""
    split = data.splits["test"] if "test" in data.splits else next(iter(data.splits.values()))
    if "text" not in split.columns:
        raise UsageError("secure-code reads ordinary text from --data; rows with a column text were expected.")
    rows = encode(split.take(np.arange(min(_ROWS, len(split)))), base, _CAUSAL)
    found = answer(model, rows, _CAUSAL)
    return {
        "bits_per_byte": float(_CAUSAL.score(rows.labels.numpy(), found.predictions)),
        "nats_per_token": float(np.average(found.losses, weights=found.weights)),
    }
