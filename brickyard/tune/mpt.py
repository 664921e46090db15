"""MPT, mix prompt tuning: prompts in words and prompts in vectors label a pool of texts, and a plain model learns it.

    1  p = (template t_p, label words):  q_p(y | x) = softmax over classes of z_p,  z_p(y) = logit at the gap of t_p(x)
       of the word of y; trained with CE on the k labelled rows, for P templates, each as a change of one masked LM
    2  s(y | x) = sum_p w_p z_p(y | x) / sum_p w_p         w_p = 1, or the accuracy of p on the k rows before training
       qhat = softmax(s / T)                                                           x in the unlabelled pool U
    3  U' = { x : max_y qhat >= tau }, at most `cap` rows of a class, the surest ones; a class without a row is an error
    4  a fresh model with an ordinary head:   loss = mean_i T_i^2 CE(qhat_i, softmax(logits_i / T_i))
       over U' with T_i = T (soft) or with its argmax and T_i = 1 (hard), and over the k rows with their labels, T_i = 1

A template in vectors is one in words whose tokens (not the gap) are trained vectors e_1..e_m [m, d], which begin at the
words' embeddings or at N(0, 0.02). Step 4 is the arm's own model: `full + mpt`, `lora + mpt`, `linear-probe + mpt`, and
the only thing that a brick holds. U is what --shots or --train-rows leaves of train, or `unlabelled=DATA`; the labels
of U are gone before this file sees a row.

The masked LM is the base's own. A base without an output layer (a sentence encoder) is lent the one that Brickyard has
for it (`embedded:minilm`: its card is in brickyard/embedded/minilm_masked_head). Where there is none, and with
`head=new`, it gets a new one, tied to its word embeddings, and learns it by masked language modelling on all texts of
train, without labels, with the lower blocks frozen: `head_steps` steps, charged to the arm. Prompt models are LoRA
changes of that one masked LM, one after another.

Source: "Low-Resource Multi-Granularity Academic Function Recognition Based on Multiple Prompt Knowledge", arXiv
2305.03287; steps 2 to 4 are PET's, arXiv 2001.07676, whose T and weights are the defaults. Headline claim: +5 macro-F1
over fine-tuning and +6 over another semi-supervised method with few labels. Left out: PET's auxiliary MLM loss (weight
1e-4), iPET's generations, calibration by the words' prior, and decoders (a gap at the end read as the next token).
Shapes: P prompts, N rows, B of a batch, C classes.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from brickyard.core.answers import predict
from brickyard.core.batches import encode
from brickyard.core.encoded import IGNORED
from brickyard.core.errors import BadData, UsageError
from brickyard.core.loop import Training, train
from brickyard.core.method import Claim, Record
from brickyard.core.objective import PREPARED, Found
from brickyard.core.template import Template
from brickyard.core.trial import Prepared
from brickyard.tune._cloze import LabelRows, Verbalizer, attach_prompt, masked_model

RECORD = Record(
    name="mpt",
    family="tune",
    title="Mixed prompts label a pool of texts, and a plain model learns from that",
    paper="arXiv 2305.03287",
    needs=("text-classification",),
    because="it reads a class where a sentence around one text has a gap",
    slot="objective",
    presets={"pet": {"continuous": [], "weights": "accuracy", "temperature": 2.0, "soft": True}},
    claims=(
        Claim(
            text="With 16 labels a class MPT beats fine-tuning by 3 points of macro-F1 and self-training by 1.",
            measure="few_labels",
            part="gain",
            data="sst2|embedded:stdlib-topics",
            seeds=5,
            shots=16,
            full={"seeds": 9},
        ),
        Claim(
            text="The mixture labels at most 0.5 points worse than words or vectors alone, and the model that learns "
            "from it is at most 2 points below its labels.",
            measure="few_labels",
            part="mixture",
            data="sst2|embedded:stdlib-topics",
            seeds=5,
            shots=16,
            full={"seeds": 9},
        ),
    ),
)
WITH_REFERENCE = False
SPREAD = 0.02  # of vectors that begin at random, as BERT's own embeddings


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of mpt; UsageError for a template or number out of range."""

    unlabelled: str = ""
    """data set whose train rows are labelled by the prompts; empty: what --shots or --train-rows leaves of train"""
    words: tuple[str, ...] = ()
    """label words in the order of the classes, several of one class joined by |; empty: the classes' names"""
    manual: tuple[str, ...] = ("[MASK] : {text}", "{text} This is about [MASK] .")
    """templates in words"""
    continuous: tuple[str, ...] = ("[MASK] is the topic : {text}", "{text} In short , it is about [MASK] .")
    """templates whose words are the start of trained vectors"""
    start: Literal["words", "normal"] = "words"
    """where the vectors begin: at the embeddings of their words, or at N(0, 0.02)"""
    steps: int = 250
    """optimiser steps of each prompt model on the labelled rows"""
    batch: int = 8
    """rows of such a step"""
    lr: float = 1e-3
    """learning rate of the prompt models"""
    vector_scale: float = 5.0
    """learning rate of the vectors, in terms of lr"""
    rank: int = 8
    """rank of the LoRA change that a prompt model is"""
    head: Literal["known", "new"] = "known"
    """where a base without a masked-language layer gets one: Brickyard's for that base if there is one, or a new one"""
    head_steps: int = 200
    """steps of masked language modelling that teach a new layer"""
    head_blocks: int = 2
    """top blocks that train in these steps"""
    head_lr: float = 5e-4
    """learning rate of these steps"""
    weights: Literal["uniform", "accuracy"] = "accuracy"
    """weights of the prompts: equal, or their accuracy on the labelled rows before training"""
    temperature: float = 2.0
    """divides the ensemble's scores, and the logits of the model that learns from them"""
    soft: bool = True
    """learn the probabilities; false: the most probable class"""
    tau: float = 0.0
    """least probability of a row's most probable class; rows below it are not learned from"""
    cap: int = 0
    """most rows of one class by their most probable class, the surest ones; 0: no limit"""
    init_seed: int | None = None
    """seed of new weights and vectors; none: the run's seed"""
    order_seed: int | None = None
    """seed of the order of rows in training prompts; none: the run's seed"""

    def __post_init__(self) -> None:
        for name in ("words", "manual", "continuous"):
            object.__setattr__(self, name, tuple(str(item) for item in getattr(self, name)))
        patterns = (*self.manual, *self.continuous)
        if not patterns:
            raise UsageError("mpt: no template; give manual=[...] or continuous=[...].")
        if len(gaps := {Template(pattern).masks for pattern in patterns}) > 1:
            raise UsageError(f"mpt: templates with {sorted(gaps)} gaps; all need as many, for they share label words.")
        checks = {
            "steps": self.steps >= 1,
            "batch": self.batch >= 1,
            "lr": self.lr > 0,
            "vector_scale": self.vector_scale >= 0,
            "rank": self.rank >= 1,
            "head_steps": self.head_steps >= 1,
            "head_blocks": self.head_blocks >= 0,
            "head_lr": self.head_lr > 0,
            "temperature": self.temperature > 0,
            "tau": 0 <= self.tau < 1,
            "cap": self.cap >= 0,
            "init_seed": self.init_seed is None or self.init_seed >= 0,
            "order_seed": self.order_seed is None or self.order_seed >= 0,
        }
        for name, ok in checks.items():
            if not ok:
                raise UsageError(f"mpt: {name}={getattr(self, name)!r} is out of range.")

    @property
    def prompts(self) -> list[tuple[Template, bool]]:
        """The templates, and whether their words are trained vectors."""
        return [(Template(p), False) for p in self.manual] + [(Template(p), True) for p in self.continuous]


def ensemble(scores_PNC: np.ndarray, weight_P: np.ndarray) -> np.ndarray:
    """Return the weighted mean of the prompts' scores [N, C]; equal weights where all are 0."""
    weight_P = np.asarray(weight_P, dtype=np.float64)
    if not weight_P.any():
        weight_P = np.ones_like(weight_P)
    return np.einsum("p,pnc->nc", weight_P / weight_P.sum(), scores_PNC)


def softened(scores_NC: np.ndarray, temperature: float) -> np.ndarray:
    """Return softmax(s / T) over the classes, [N, C] in float64."""
    return torch.from_numpy(np.asarray(scores_NC, dtype=np.float64) / temperature).softmax(1).numpy()


def kept(q_NC: np.ndarray, tau: float, cap: int) -> np.ndarray:
    """Return which rows are learned from [N]: sure enough, and among the `cap` surest of their class (0: all of them).

    Of rows equally sure the earlier ones stay.
    """
    sure_N, class_N = q_NC.max(1), q_NC.argmax(1)
    inside_N = sure_N >= tau
    for c in range(q_NC.shape[1] if cap else 0):
        rows = np.flatnonzero(inside_N & (class_N == c))
        inside_N[rows[np.argsort(-sure_N[rows], kind="stable")[cap:]]] = False
    return inside_N


def soft_losses(logits_BC: Tensor, q_BC: Tensor, temperature_B: Tensor) -> Tensor:
    """Return T^2 CE(q, softmax(logits / T)) of each row [B]; with one-hot q and T = 1 the ordinary cross entropy."""
    log_p_BC = (logits_BC / temperature_B[:, None]).log_softmax(1)
    return -(q_BC * log_p_BC).sum(1) * temperature_B.square()


@dataclass(frozen=True)
class Prompted:
    """What the prompt models say of every row of train: scores [P, N, C]; their accuracy on the labelled rows [P]."""

    scores_PNC: np.ndarray
    before_P: np.ndarray
    after_P: np.ndarray
    head: dict[str, Any]


class PseudoLabels:
    """Targets q [N, C], weights [N] with mean 1 and temperatures [N] of train's rows, by which the arm's model learns.

    A row that is not learned from has weight 0.
    """

    def __init__(self, q_NC: Tensor, weight_N: Tensor, temperature_N: Tensor, report: dict[str, Any]) -> None:
        self.columns, self.report, self.seconds = (q_NC, weight_N, temperature_N), report, 0.0

    @property
    def digest(self) -> str:
        """Of the targets: a run that is resumed must have the same."""
        return hashlib.sha256(b"".join(t.numpy().tobytes() for t in self.columns)).hexdigest()

    def collate(self, index: np.ndarray) -> tuple[Tensor, ...]:
        """Return targets, weights and temperatures of some rows."""
        rows = torch.from_numpy(np.asarray(index, dtype=np.int64))
        return tuple(column[rows] for column in self.columns)


def ask(config: Config, ready: Prepared) -> Prompted:
    """Train the P prompt models on the labelled rows of train, one after another, and let each score all rows.

    Raises UsageError where label words do not fit, BadData where a labelled row is missing, as `_cloze.masked_model`.
    """
    task, setting, base, tokenizer = ready.task, ready.setting, ready.base, ready.base.tokenizer
    words = config.words or task.labels or ()
    if len(words) != task.width:
        raise UsageError(f"mpt: {len(words)} label words for {task.width} classes; give one for each.")
    labels = ready.encoded["train"].labels
    few = np.flatnonzero(labels.numpy() != IGNORED)
    if absent := sorted(set(range(task.width)) - set(labels[few].tolist())):
        raise BadData(f"mpt: class {(task.labels or ())[absent[0]]!r} has no labelled row; label one, or more --shots.")
    init = setting.seed if config.init_seed is None else config.init_seed
    order = setting.seed if config.order_seed is None else config.order_seed
    verbalizer = Verbalizer.of(words, tokenizer, config.prompts[0][0].masks)
    longest = setting.max_length
    rows = ready.data.splits["train"]
    common = {"seed": order, "precision": ready.training.precision}
    with torch.random.fork_rng(devices=[]):
        model, head = masked_model(
            base,
            encode(rows, base, task, max_length=longest),
            task,
            Training(lr=config.head_lr, steps=config.head_steps, batch=32, **common),
            top=config.head_blocks,
            seed=init,
            new=config.head == "new",
            attention=setting.attention,
            device=setting.device,
        )
        model.set_output_embeddings(  # type: ignore[operator]
            LabelRows(model.get_output_embeddings(), verbalizer.tokens)  # type: ignore[operator]
        )
        model.to(ready.device)
        scores, before, after = [], [], []
        for number, (template, trained) in enumerate(config.prompts):
            filled = encode(rows, base, task, template=template, max_length=longest)
            filled.labels = labels
            support = filled.take(few)
            torch.manual_seed(int(np.random.SeedSequence([init, number]).generate_state(1)[0]))
            attached = attach_prompt(
                model,
                template,
                verbalizer,
                tokenizer,
                trained=trained,
                rank=config.rank,
                spread=SPREAD if config.start == "normal" else None,
                vector_scale=config.vector_scale,
            )
            right = labels[few].numpy()
            before.append(float((predict(attached.model, support).argmax(1) == right).mean()))
            training = Training(lr=config.lr, steps=config.steps, batch=config.batch, **common)
            train(attached, support, None, task, training, device=setting.device)
            found = predict(attached.model, filled, precision=training.precision)
            after.append(float((found[few].argmax(1) == right).mean()))
            scores.append(found)
            attached.detach()
    return Prompted(np.stack(scores), np.array(before), np.array(after), head)


def decide(
    config: Config, prompted: Prompted, labels: Tensor, names: tuple[str, ...], *, every_class: bool = True
) -> PseudoLabels:
    """Return the targets of every row from the prompts' scores; `labels` [N] is IGNORED where a row has none.

    Raises BadData where a class is left without a row, unless `every_class` is false.
    """
    weight_P = prompted.before_P if config.weights == "accuracy" else np.ones(len(prompted.before_P))
    q_NC = softened(ensemble(prompted.scores_PNC, weight_P), config.temperature)
    given_N = labels.numpy() != IGNORED
    inside_N = given_N.copy()
    inside_N[~given_N] = kept(q_NC[~given_N], config.tau, config.cap)
    counts_C = np.bincount(q_NC[inside_N & ~given_N].argmax(1), minlength=len(names))
    if every_class and not counts_C.all():
        raise BadData(
            f"mpt: no unlabelled row was given to class {names[int(counts_C.argmin())]!r} "
            f"(rows by class: {counts_C.tolist()}); lower tau={config.tau:g}, or give other words or templates."
        )
    target = torch.from_numpy(np.eye(len(names))[np.where(given_N, labels.numpy(), q_NC.argmax(1))])
    temperature = torch.ones(len(labels))
    if config.soft:
        target[~given_N] = torch.from_numpy(q_NC[~given_N])
        temperature[~given_N] = config.temperature
    sure_U = q_NC[~given_N].max(1)
    report = {
        "head": prompted.head,
        "prompts": [
            {"template": t.pattern, "vectors": v, "weight": float(w), "accuracy_before": float(b), "accuracy": float(a)}
            for (t, v), w, b, a in zip(config.prompts, weight_P, prompted.before_P, prompted.after_P, strict=True)
        ],
        "labelled": int(given_N.sum()),
        "unlabelled": int((~given_N).sum()),
        "pseudo_labelled": dict(zip(names, counts_C.tolist(), strict=True)),
        "left_out": int((~inside_N).sum()),
        "surest": np.quantile(sure_U, (0.0, 0.25, 0.5, 0.75, 1.0)).tolist(),
    }
    weight = torch.from_numpy(inside_N / inside_N.mean()).float()
    return PseudoLabels(target.float(), weight, temperature, report)


def prepare(config: Config, ready: Prepared) -> PseudoLabels:
    """Train the prompts, and return what they say of the rows without labels; its seconds are the arm's."""
    started = time.monotonic()
    made = decide(config, ask(config, ready), ready.encoded["train"].labels, ready.task.labels or ())
    labels = ready.encoded["train"].labels.numpy()
    if "test" in ready.data.splits:
        pool = np.flatnonzero(labels == IGNORED)
        tested, texts = set(ready.data.splits["test"]["text"]), ready.data.splits["train"]["text"]
        made.report["unlabelled_in_test"] = sum(texts[i] in tested for i in pool.tolist())
    made.seconds = time.monotonic() - started
    return made


def stand_in(config: Config, ready: Prepared) -> PseudoLabels:
    """Return targets that hold nothing, for a probe, which counts the prompts' training by `costliest`."""
    rows, classes = len(ready.encoded["train"]), ready.task.width
    return PseudoLabels(torch.full((rows, classes), 1 / classes), torch.ones(rows), torch.ones(rows), {})


def costliest(config: Config, ready: Prepared) -> tuple[dict[str, Any], int]:
    """Return how many steps training the prompts takes, and that of masked language modelling where it is needed."""
    known = ready.base.masked or (config.head == "known" and ready.base.lent_head is not None)
    return {}, (0 if known else config.head_steps) + config.steps * len(config.prompts)


def loss_of_logits(config: Config, logits: Tensor, batch: dict[str, Any]) -> Found:
    """Return the loss of a batch from logits [B, C], and the divergence from the targets at T = 1 to log."""
    q_BC, weight_B, temperature_B = batch[PREPARED]
    loss = (weight_B * soft_losses(logits, q_BC, temperature_B)).mean()
    return loss, {"divergence": F.kl_div(logits.detach().log_softmax(1), q_BC, reduction="batchmean")}
