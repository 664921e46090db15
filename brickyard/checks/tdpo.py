"""What TDPO's paper claims, measured on a small code model: the frontier of reward against divergence from the base.

A language model is first tuned on docstring summaries. For each prompt two continuations are drawn from it, and the one
with the larger rule reward is the chosen one. DPO, TDPO1 and TDPO2 then start from that model with the same pairs, data
order, steps and learning rate; so does the control, TDPO2 without its divergence (alpha=0). On held-out prompts, at
several steps: the rule reward of fresh samples, their divergence from the start and their entropy, and the divergence k
on held-out chosen and rejected answers.

The rule: the share of a text's words that have at most `SHORT` letters. It can be computed, both sides of most pairs
differ in it, and no model was trained for it.

Shapes: S seeds, N held-out prompts or pairs, E evaluations.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats as scipy_stats
from torch import nn

from brickyard.checks._place import finished, place_of
from brickyard.checks._takes import takes
from brickyard.core.answers import to_device
from brickyard.core.arm import parse
from brickyard.core.attached import Attached
from brickyard.core.base import Base, open_base
from brickyard.core.build import build, resolve
from brickyard.core.completions import EncodedCompletions, encode_completions
from brickyard.core.data import read_data
from brickyard.core.generate import Decoding, continuations
from brickyard.core.jobs import Job
from brickyard.core.loop import State, Training, train
from brickyard.core.method import Claim
from brickyard.core.objective import Reference, states
from brickyard.core.split import Split
from brickyard.core.stats import paired
from brickyard.core.task import Task
from brickyard.objective._pairs import pair_terms

SHORT = 4  # letters
ARMS = {"dpo": "full + dpo", "tdpo1": "full + tdpo:variant=1", "tdpo2": "full + tdpo"}
CONTROL = "full + tdpo:alpha=0.0"  # one seed: it must be DPO
INSTRUCT = Task("instruct", "nats_per_token", None, 1, "completion")
PREFERENCE = Task("preference", "accuracy", None, 1, "preference")
TUNING_ROWS = 2000
GAIN = 0.8  # of DPO's gain in reward that TDPO2 must have, or less divergence only says that it learned less
KEPT = 0.95  # of DPO's reward that TDPO2's samples must have where their entropy is compared
_WORD = re.compile(r"[A-Za-z]+")


@dataclass(frozen=True)
class Scale:
    """How large the measurement is."""

    base: str
    prompts: int = 600
    held_out: int = 120
    steps: int = 250
    every: int = 50
    new_tokens: int = 48
    batch: int = 8
    lr: float = 5e-5
    seeds: int = 3
    tuning_epochs: float = 1.0

    @classmethod
    def of(cls, claim: Claim) -> Scale:
        """Read it off a claim's fields."""
        sizes = {"prompts": claim.train_rows or 2000, "batch": claim.batch or 16, "seeds": claim.seeds}
        # The card's own evaluations and length of answers cost half of the time again.
        more = {"every": 25, "new_tokens": 64} if sizes["prompts"] >= 2000 else {}
        return cls(claim.base, **sizes, **more)


@dataclass(frozen=True)
class Curve:
    """One run: at each evaluation the reward of fresh samples, their divergence and entropy; at its end k by pair."""

    reward_EN: np.ndarray
    divergence_E: np.ndarray
    entropy_E: np.ndarray
    chosen_N: np.ndarray
    rejected_N: np.ndarray


def reward(text: str) -> float:
    """Return the share of words with at most `SHORT` letters, 0 where there is no word."""
    words = _WORD.findall(text)
    return sum(len(w) <= SHORT for w in words) / len(words) if words else 0.0


def preferences(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Split:
    """Return the pairs whose two texts differ in reward, the larger one chosen; the others prefer nothing."""
    rows = [
        (p, *sorted((a, b), key=reward, reverse=True))
        for p, a, b in zip(prompts, first, second, strict=True)
        if reward(a) != reward(b) and a.strip() and b.strip()
    ]
    return Split({name: [row[i] for row in rows] for i, name in enumerate(("prompt", "chosen", "rejected"))})


def at_equal_reward(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> float:
    """Return the divergence of a minus that of b at the largest reward that both reach.

    Each is (reward [E], divergence [E]) with the start as first entry. On the way up a run passes every reward between
    its evaluations, so the divergence is interpolated along the running maximum.
    """
    tops = [np.maximum.accumulate(reward_E) for reward_E, _ in (a, b)]
    level = min(top[-1] for top in tops)
    found = []
    for top, (_, divergence_E) in zip(tops, (a, b), strict=True):
        after = int(np.argmax(top >= level))
        if after == 0:
            found.append(float(divergence_E[0]))
            continue
        share = (level - top[after - 1]) / (top[after] - top[after - 1])
        found.append(float((1 - share) * divergence_E[after - 1] + share * divergence_E[after]))
    return found[0] - found[1]


def verdict(differences_S: Sequence[float] | np.ndarray, margin: float = 0.0) -> dict[str, Any]:
    """Judge `mean < margin` over seeds: the mean with its 95 % t interval."""
    values = np.asarray(differences_S, dtype=np.float64)
    mean = float(values.mean())
    reach = float(scipy_stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    holds: Any = True if mean + reach <= margin else False if mean - reach > margin else "undecided"
    return {"measured": mean, "low": mean - reach, "high": mean + reach, "holds": holds, "per_seed": values.tolist()}


class Watch:
    """Evaluates a run on held-out prompts and pairs every so many steps; step 0 is the start."""

    def __init__(self, scale: Scale, base: Base, prompts: Sequence[str], pairs: EncodedCompletions) -> None:
        self.scale, self.base, self.prompts, self.pairs = scale, base, prompts, pairs
        self.start = base.model(PREFERENCE, seed=0)
        self.points: list[tuple[np.ndarray, float, float]] = []
        self.ends: tuple[np.ndarray, np.ndarray] | None = None

    def begin(self, state: State) -> None:
        """Measure the start."""
        self._measure(state.attached.model, seed=state.training.seed)

    def after_step(self, state: State) -> None:
        """Measure now and then, and at the end the held-out pairs too."""
        step = state.step + 1
        if step % self.scale.every == 0 or step == state.total:
            self._measure(state.attached.model, seed=state.training.seed + 1000 * step)
        if step == state.total:
            k_S = np.concatenate([self._divergence(state.attached.model, rows) for rows in self.pairs.parts(4096)])
            order = np.concatenate(self.pairs.parts(4096))
            k_S = k_S[np.argsort(order)]
            self.ends = k_S[0::2], k_S[1::2]

    def _measure(self, model: nn.Module, seed: int) -> None:
        decoding = Decoding(new_tokens=self.scale.new_tokens, temperature=1.0, seed=seed)
        texts = continuations(model, self.base, self.prompts, decoding, batch=64)
        split = Split({"prompt": list(self.prompts), "completion": texts})
        made = encode_completions(split, self.base, INSTRUCT, None)
        divergence, entropy = 0.0, 0.0
        for rows in made.parts(4096):
            batch = made.texts(rows)
            asked_BT = batch["labels"] >= 0
            with torch.no_grad():
                ids, mask = batch["input_ids"], batch["attention_mask"]
                log_p, log_q = (
                    m(input_ids=ids, attention_mask=mask).logits[asked_BT].log_softmax(-1) for m in (model, self.start)
                )
                divergence += float((log_p.exp() * (log_p - log_q)).sum())
                entropy -= float((log_p.exp() * log_p).sum())
        self.points.append(
            (np.array([reward(t) for t in texts]), divergence / len(texts), entropy / float(made.tokens.sum()))
        )

    @torch.no_grad()
    def _divergence(self, model: nn.Module, rows: np.ndarray) -> np.ndarray:
        batch = to_device(self.pairs.texts(rows), next(model.parameters()).device)
        reference = Reference(states(self.start, batch), self.start.get_output_embeddings())  # type: ignore[operator]
        head = model.get_output_embeddings()  # type: ignore[operator]
        _, k = pair_terms(states(model, batch), head, batch["labels"], reference, divergence=True)
        return k.numpy()

    def curve(self) -> Curve:
        """Return what was measured."""
        assert self.ends is not None
        rewards, divergences, entropies = zip(*self.points, strict=True)
        return Curve(np.stack(rewards), np.array(divergences), np.array(entropies), *self.ends)


def tuned_base(scale: Scale, folder: Path) -> Base:
    """Tune the base on docstring summaries and write it to `folder`: the common start of all arms."""
    base = open_base(scale.base)
    data = read_data("embedded:docstrings")
    some = data.splits["train"].take(range(min(TUNING_ROWS, len(data.splits["train"]))))
    rows = encode_completions(some, base, INSTRUCT, 160)
    attached = build(resolve(parse("full"), INSTRUCT), base, INSTRUCT, seed=0)
    train(attached, rows, None, INSTRUCT, Training(lr=3e-4, epochs=scale.tuning_epochs, batch=16), device="cpu")
    attached.model.save_pretrained(folder)  # type: ignore[operator]
    base.tokenizer.save_pretrained(folder)
    return open_base(str(folder))


@cache
def runs(scale: Scale) -> tuple[dict[str, list[Curve]], dict[str, Any]]:
    """Train every arm with every seed; return their curves and the facts of the set-up."""
    with place_of("tdpo", scale) as folder:
        base = tuned_base(scale, folder)
        data = read_data("embedded:docstrings")
        sets = {}
        for split, count in (("train", scale.prompts), ("test", scale.held_out)):
            prompts = sorted(set(data.splits[split]["prompt"]))
            order = np.random.Generator(np.random.PCG64(0)).permutation(len(prompts))[:count]
            prompts = [prompts[i] for i in order]
            model = base.model(INSTRUCT, seed=0)
            first, second = (
                continuations(
                    model, base, prompts, Decoding(new_tokens=scale.new_tokens, temperature=1.0, seed=s), batch=64
                )
                for s in (1, 2)
            )
            sets[split] = (prompts, preferences(prompts, first, second))
        jobs = [
            Job(
                key=f"{arm}/{seed}",
                function=f"{__name__}:one",
                argument={
                    "scale": asdict(scale),
                    "base": str(folder),
                    "arm": text,
                    "seed": seed,
                    "prompts": sets["test"][0],
                    "pairs": {split: dict(rows.columns) for split, (_, rows) in sets.items()},
                },
            )
            for seed in range(1, scale.seeds + 1)
            for arm, text in {**ARMS, **({"control": CONTROL} if seed == 1 else {})}.items()
        ]
        done: dict[str, Curve] = {}
        for key, found in finished(jobs, 2, folder).items():
            done[key] = Curve(**{name: np.asarray(values) for name, values in found.items()})
        curves: dict[str, list[Curve]] = {}
        for job in jobs:
            curves.setdefault(job.key.split("/")[0], []).append(done[job.key])
        pairs = {split: rows for split, (_, rows) in sets.items()}
        about = {
            "base": scale.base,
            "rule": f"share of words with at most {SHORT} letters",
            "pairs": {split: len(rows) for split, rows in pairs.items()},
            "steps": scale.steps,
            "lr": scale.lr,
        }
    return curves, about


def one(argument: dict[str, Any]) -> dict[str, list]:
    """Train one arm with one seed; return the fields of its curve as lists."""
    scale, base = Scale(**argument["scale"]), open_base(argument["base"])
    pairs = {
        split: encode_completions(Split(columns), base, PREFERENCE, None)
        for split, columns in argument["pairs"].items()
    }
    attached: Attached = build(resolve(parse(argument["arm"]), PREFERENCE), base, PREFERENCE, seed=argument["seed"])
    watch = Watch(scale, base, argument["prompts"], pairs["test"])
    training = Training(lr=scale.lr, steps=scale.steps, batch=scale.batch, seed=argument["seed"], clip=10.0)
    train(attached, pairs["train"], None, PREFERENCE, training, device="cpu", callbacks=[watch])
    return {name: values.tolist() for name, values in vars(watch.curve()).items()}


@takes("base")
def frontier(claim: Claim) -> dict[str, Any]:
    """At the largest reward that both reach, TDPO2 has diverged no more than DPO."""
    curves, about = runs(Scale.of(claim))
    paths = {arm: [(c.reward_EN.mean(axis=1), c.divergence_E) for c in found] for arm, found in curves.items()}
    found = verdict([at_equal_reward(a, b) for a, b in zip(paths["tdpo2"], paths["dpo"], strict=True)])
    one = verdict([at_equal_reward(a, b) for a, b in zip(paths["tdpo1"], paths["dpo"], strict=True)])
    return _with_gate(curves, about, found, "KL(tdpo2) - KL(dpo) at equal reward <= 0", "nats a sample", {"tdpo1": one})


@takes("base")
def rejected(claim: Claim) -> dict[str, Any]:
    """At the end, TDPO2 has diverged less than DPO on held-out rejected answers."""
    curves, about = runs(Scale.of(claim))
    found = _pairs(*(np.stack([c.rejected_N for c in curves[arm]]) for arm in ("tdpo2", "dpo")))
    return _with_gate(curves, about, found, "k_rejected(tdpo2) < k_rejected(dpo)", "nats an answer")


@takes("base")
def difference(claim: Claim) -> dict[str, Any]:
    """At the end, TDPO2's divergence differs less between rejected and chosen answers than DPO's."""
    curves, about = runs(Scale.of(claim))
    gaps = (np.stack([np.abs(c.rejected_N - c.chosen_N) for c in curves[arm]]) for arm in ("tdpo2", "dpo"))
    return _with_gate(curves, about, _pairs(*gaps), "|k_l - k_w|: tdpo2 < dpo", "nats a pair")


@takes("base")
def entropy(claim: Claim) -> dict[str, Any]:
    """At the end, TDPO2's samples have at least DPO's entropy less 0.02 nats a token, at 0.95 of its reward or more."""
    curves, about = runs(Scale.of(claim))
    last = {arm: np.array([c.entropy_E[-1] for c in found]) for arm, found in curves.items()}
    found = verdict(last["dpo"] - last["tdpo2"], 0.02)
    kept = [np.mean([c.reward_EN[-1].mean() for c in curves[arm]]) for arm in ("tdpo2", "dpo")]
    share = float(kept[0] / kept[1])
    if share < KEPT:
        found["holds"] = False
    inequality = f"entropy(dpo) - entropy(tdpo2) <= 0.02 and reward(tdpo2) >= {KEPT:g} reward(dpo)"
    return _with_gate(curves, about, found, inequality, "nats a token", {"share_of_reward": share})


def _pairs(ours_SN: np.ndarray, theirs_SN: np.ndarray) -> dict[str, Any]:
    found = paired(None, ours_SN, theirs_SN, "loss")
    holds: Any = True if found.high < 0 else False if found.low > 0 else "undecided"
    return {"measured": found.difference, "low": found.low, "high": found.high, "holds": holds}


def _with_gate(
    curves: dict[str, list[Curve]],
    about: dict[str, Any],
    found: dict[str, Any],
    inequality: str,
    unit: str,
    more: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Add the gate (both arms learned, and TDPO2 at least `GAIN` of what DPO did) and every arm's figures."""
    gain = {
        arm: np.array([c.reward_EN[-1].mean() - c.reward_EN[0].mean() for c in each]) for arm, each in curves.items()
    }
    last, first = (np.stack([c.reward_EN[at] for c in curves["dpo"]]) for at in (-1, 0))
    learned = paired(None, last, first, "loss")  # of samples on the same prompts
    share = float(gain["tdpo2"].mean() / gain["dpo"].mean()) if gain["dpo"].mean() > 0 else 0.0
    gate = {
        "inequality": f"DPO gains reward, and TDPO2 gains at least {GAIN:.0%} of that",
        "dpo_gain": learned.difference,
        "low": learned.low,
        "high": learned.high,
        "tdpo2_share": share,
        "holds": bool(learned.low > 0 and share >= GAIN),
    }
    arms = {
        arm: {
            "reward": [float(c.reward_EN[-1].mean()) for c in each],
            "divergence_of_samples": [float(c.divergence_E[-1]) for c in each],
            "entropy": [float(c.entropy_E[-1]) for c in each],
            "k_chosen": [float(c.chosen_N.mean()) for c in each],
            "k_rejected": [float(c.rejected_N.mean()) for c in each],
        }
        for arm, each in curves.items()
    }
    apart = float(np.abs(curves["control"][0].rejected_N - curves["dpo"][0].rejected_N).max())
    control = {
        "what": "without the divergence (alpha=0) TDPO2 is DPO, so no advantage can be left",
        "measured": apart,
        "destroyed": apart < 1e-3,
    }
    result = {
        "inequality": inequality,
        **found,
        **about,
        "arms": arms,
        "gate": gate,
        "control": control,
        **(more or {}),
    }
    if not gate["holds"]:
        result["holds"] = "set-up invalid"
    result["detail"] = (
        f"measured {found['measured']:+.3f} {unit} ({found['low']:+.3f} to {found['high']:+.3f}); reward gained: DPO "
        f"{gain['dpo'].mean():+.3f}, TDPO1 {gain['tdpo1'].mean():+.3f}, TDPO2 {gain['tdpo2'].mean():+.3f}"
    )
    return result
