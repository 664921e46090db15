"""Zero-shot audit: how well do answers to questions that a model never saw tell the texts that they describe?

    score(q, x) = log p(yes | q, x) = log softmax([z_no, z_yes])[yes]          q a question, x a text
    AUC(q)      = P( score(q, x) > score(q, x') ),   x a text that q describes, x' one that it does not

z are the two outputs of a brick trained on yes/no rows (see meta-tuning) or, of a language model without a brick, the
logits of " yes" and " no" behind "answer:". Any other base without a brick is scored by the cosine of the mean states
of q and x; of a brick that is the column `before`. The area needs no threshold, so nothing is tuned on the test.

Data: yes/no rows as meta-tuning writes them (their test split), or with `tasks=FILE` any classified texts and the
questions of a task file for their labels; then the accuracy of argmax over classes of the mean score is said too. Of
each question the nearest one of the train split is shown, by the cosine of the base's mean states: what stands near
was not unseen. A question of which all texts are described, or none, has no area: it is left out and counted.

Source: "Adapting Language Models for Zero-shot Learning by Meta-tuning", arXiv 2104.04670, sections 2 and 3. Left out:
the zero-shot pipeline on entailment models; keeping the keys and values of a shared text.
Shapes: N rows, D questions, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from brickyard.audit._wants import Wants
from brickyard.core.answers import predict
from brickyard.core.batches import encode
from brickyard.core.brick import Applied
from brickyard.core.documents import boundary
from brickyard.core.errors import BadData, Refused, UsageError
from brickyard.core.method import Record
from brickyard.core.objective import language_model, states
from brickyard.core.questions import NO, YES, auc, chosen, parts, read_tasks, row
from brickyard.core.similarity import layer_means
from brickyard.core.split import Split
from brickyard.core.task import Task

if TYPE_CHECKING:
    from brickyard.core.base import Base
    from brickyard.core.data import Data

RECORD = Record(
    name="zero-shot",
    family="audit",
    title="how well answers to unseen questions tell the texts that they describe",
    paper="arXiv 2104.04670",
    needs=("text-classification", "pair-classification"),
    part_of="meta-tuning",
)
WANTS = Wants(kinds=("brick",), labelled=True, files=("tasks",))
ANSWER = "\nanswer:"
_PLAIN = Task("regression", "spearman", None, 1, "text")
_PAIR = Task("regression", "spearman", None, 1, "pair")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the audit; UsageError for a length out of range."""

    tasks: str = ""
    """task file with questions for the labels of the data; empty: the data are yes/no rows"""
    length: int = 0
    """tokens a row is cut to, its question never; 0: the base's context"""

    def __post_init__(self) -> None:
        if self.length and self.length < 8:
            raise UsageError(f"zero-shot: length={self.length}; give at least 8 tokens, or 0 for the base's context.")


@dataclass(frozen=True)
class Asked:
    """Questions about texts: for each pair [N] its question, its text and whether yes is right."""

    questions: list[str]
    question_N: np.ndarray
    texts: list[str]
    yes_N: np.ndarray
    classes: tuple[np.ndarray, np.ndarray] | None = None  # of each question [D], and of each text

    @property
    def rows(self) -> list[tuple[str, str]]:
        """What a model reads, as pairs."""
        return [row(self.questions[q], text) for q, text in zip(self.question_N, self.texts, strict=True)]


def asked_of(data: Data, tasks: str) -> Asked:
    """Return the questions about the test texts of `data`; BadData where it has no labels, or others than expected."""
    split = data.splits.get("test") or next(iter(data.splits.values()))
    wanted, what = ("text", "texts with classes") if tasks else ("pair", "pairs of question and text, or tasks=FILE,")
    if data.input != wanted or data.labels is None:
        raise BadData(f"zero-shot: {data.name} is {data.kind}; {what} were expected.")
    label_N = np.array(split["label"])
    if not tasks:
        if data.labels != (NO, YES):
            raise BadData(f"zero-shot: the labels are {list(data.labels)[:6]}; expected no and yes, or tasks=FILE.")
        pairs = _pairs(split)
        questions = sorted({question for question, _ in pairs})
        place = {question: i for i, question in enumerate(questions)}
        which = np.array([place[question] for question, _ in pairs])
        return Asked(questions, which, [text for _, text in pairs], label_N == 1)
    described = read_tasks(tasks)
    known = {label: (task, asked) for task in described for label, asked in task.labels.items()}
    if len(known) < sum(len(task.labels) for task in described):
        raise UsageError(f"zero-shot: {tasks} describes a label twice; give a task file of this data set alone.")
    if missing := [label for label in data.labels if label not in known]:
        raise UsageError(f"zero-shot: {tasks} has no question for the label {missing[0]!r}.")
    found = np.array(data.labels)[label_N]
    questions, which, texts, yes, owner = [], [], [], [], []
    for c, label in enumerate(data.labels):
        task, several = known[label]
        answer_N = task.answers(label, found)
        for question in several:
            which += [len(questions)] * len(found)
            questions.append(question)
            owner.append(c)
            texts += split["text"]
            yes.append(answer_N)
    return Asked(questions, np.array(which), texts, np.concatenate(yes), (np.array(owner), label_N))


def measure(
    base: Base, changed: Base | Applied | None, config: Config, data: Data, *, device: torch.device
) -> dict[str, Any]:
    """Return {"table": a row for each question, "auc", "before", "improved", "skipped", "truncated", "detail", ...}.

    `truncated` counts the rows whose text was cut before they were scored (by cosine: the texts). Raises UsageError or
    BadData where data and questions do not fit, Refused where the model has no yes and no.
    """
    asked = asked_of(data, config.tasks)
    cut = config.length or base.context
    _must_fit(asked.questions, base, cut)
    short = 0
    if isinstance(changed, Applied):
        _answers_pairs(changed)
        score_N, short = by_brick(changed.model.to(device), base, asked.rows, config.length or None)
    elif changed is not None:
        raise UsageError("zero-shot: --brick must be a brick that was trained on yes/no rows.")
    elif base.generative:
        score_N, short = by_words(base, asked, config.length or None, device)
    else:
        score_N = None
    cosine_N, near = None, {}
    if not base.generative:
        cosine_N, near, texts_short = _cosines(base, asked, data, config.length or None, device)
        short = texts_short if score_N is None else short
    found = {"auc": score_N if score_N is not None else cosine_N}
    if isinstance(changed, Applied) and cosine_N is not None:
        found["before"] = cosine_N
    table, skipped = [], 0
    for q, question in enumerate(asked.questions):
        inside = (asked.question_N == q) & (asked.yes_N >= 0)
        yes = asked.yes_N[inside].astype(bool)
        if yes.all() or not yes.any():
            skipped += 1
            continue
        areas = {name: auc(score[inside], yes) for name, score in found.items() if score is not None}
        table.append({"question": question, "rows": len(yes), "yes": int(yes.sum()), **areas, **near.get(question, {})})
    if not table:
        raise BadData("zero-shot: no question has texts of both answers; give more rows.")
    means = {name: float(np.mean([line[name] for line in table])) for name in found}
    out: dict[str, Any] = {"table": table, **means, "skipped": skipped, "rows": len(asked.texts), "truncated": short}
    detail = f"mean AUC {means['auc']:.3f} over {len(table)} questions"
    if "before" in means:
        out["improved"] = float(np.mean([line["auc"] > line["before"] for line in table]))
        detail += f", by cosine {means['before']:.3f}; {out['improved']:.0%} of them improved"
    if asked.classes is not None and found["auc"] is not None:
        owner_D, label_N = asked.classes
        guess_N = chosen(found["auc"].reshape(len(owner_D), -1).T, owner_D)
        out["accuracy"] = float((guess_N == label_N).mean())
        detail += f"; accuracy {out['accuracy']:.3f} among {len(np.unique(owner_D))} classes"
    detail += f"; {skipped} questions had texts of one answer only" if skipped else ""
    what = "texts" if score_N is None else "rows"
    out["detail"] = detail + (f"; {short} {what} were cut to fit" if short else "")
    return out


def _must_fit(questions: list[str], base: Base, limit: int | None) -> None:
    """Raise BadData where a question would be cut: of a row the text alone is, as long as it has a token to give."""
    # With the separator behind a text.
    sizes = [len(ids) + 1 for ids in base.tokenizer(questions, verbose=False)["input_ids"]]
    if limit is not None and max(sizes) >= limit:
        long = questions[int(np.argmax(sizes))]
        raise BadData(f"zero-shot: the question {long[:60]!r} alone has {max(sizes)} tokens of {limit}; shorten it.")


def _pairs(split: Split) -> list[tuple[str, str]]:
    """Return question and text of each row."""
    return [parts(*pair) for pair in zip(split["text"], split["text_pair"], strict=True)]


def _answers_pairs(changed: Applied) -> None:
    """Raise Refused for a brick that was tuned on anything but pairs with two classes."""
    task = changed.brick.task if changed.brick is not None else None
    if task is not None and (task.kind != "pair-classification" or task.width != 2):
        classes = f" with {task.width} classes" if task.labels else ""
        raise Refused(
            f"zero-shot: the brick was tuned on {task.kind}{classes}; one for pairs with the classes no and yes is "
            "needed."
        )


def by_brick(model: nn.Module, base: Base, rows: list[tuple[str, str]], length: int | None) -> tuple[np.ndarray, int]:
    """Return log p(yes) of each row [N] by a classifier with the outputs no and yes, and the number of rows cut.

    Refused for a classifier with other outputs.
    """
    first, second = (list(column) for column in zip(*rows, strict=True))
    encoded = encode(Split({"text": first, "text_pair": second}), base, _PAIR, max_length=length)
    logits_N2 = predict(model, encoded)
    if logits_N2.shape[1] != 2:
        raise Refused(
            f"zero-shot: the brick has {logits_N2.shape[1]} outputs; one with the classes no and yes is needed."
        )
    return torch.from_numpy(logits_N2).log_softmax(1)[:, 1].numpy(), encoded.report["truncated"]


@torch.no_grad()
def by_words(base: Base, asked: Asked, length: int | None, device: torch.device) -> tuple[np.ndarray, int]:
    """Return log p(yes) of each row [N] by a language model's next word behind "answer:", and the number of rows cut.

    A row begins with the token that stands before every text in training, and p is that of yes among yes and no. Of the
    vocabulary only the rows of the two words are multiplied. Raises UsageError where one of them is not a token.
    """
    tokenizer = base.tokenizer
    pair = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in (NO, YES)]
    if any(len(ids) != 1 or ids[0] == tokenizer.unk_token_id for ids in pair) or pair[0] == pair[1]:
        raise UsageError(
            f"zero-shot: {NO} and {YES} are the tokens {pair[0]} and {pair[1]} of this vocabulary; one token each is "
            "needed."
        )
    tail = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    limit = min((n for n in (length, base.context) if n is not None), default=10**9) - len(tail) - 1
    _must_fit(asked.questions, base, limit)
    lines = ["".join(pair) for pair in asked.rows]
    start, _ = boundary(base)
    whole = tokenizer(lines, verbose=False, add_special_tokens=False)["input_ids"]
    rows = [[start, *ids[:limit], *tail] for ids in whole]
    model = base.model(Task("causal-lm", "bits_per_byte", None, 1, "text"), seed=0).to(device)
    plain = language_model(model)
    head: Any = plain.get_output_embeddings()  # type: ignore[operator]
    words = [ids[0] for ids in pair]
    weight_2D = head.weight[words]
    bias_2 = None if head.bias is None else head.bias[words]
    order = np.argsort([len(ids) for ids in rows], kind="stable")
    out = np.empty(len(rows))
    for part in np.array_split(order, -(-len(order) // 32)):
        ids = [torch.tensor(rows[i]) for i in part]
        last = torch.tensor([len(i) - 1 for i in ids], device=device)
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)
        mask = torch.arange(padded.shape[1], device=device) <= last[:, None]
        x_BTD = states(plain, {"input_ids": padded, "attention_mask": mask.long()})
        logits_B2 = F.linear(x_BTD[torch.arange(len(part), device=device), last], weight_2D, bias_2)
        out[part] = logits_B2.float().log_softmax(1)[:, 1].cpu().numpy()
    return out, sum(len(ids) > limit for ids in whole)


def _cosines(
    base: Base, asked: Asked, data: Data, length: int | None, device: torch.device
) -> tuple[np.ndarray, dict[str, dict[str, Any]], int]:
    """Return the cosine of question and text of each row [N], each question's nearest one of train, and texts cut."""
    model = base.backbone().to(device)

    def embedded(texts: list[str]) -> tuple[torch.Tensor, int]:
        rows = encode(Split({"text": texts}), base, _PLAIN, max_length=length)
        made = F.normalize(layer_means(model, rows, np.arange(len(texts)))[-1], dim=1)
        return made, rows.report["truncated"]

    texts = list(dict.fromkeys(asked.texts))
    place = {text: i for i, text in enumerate(texts)}
    (x_ND, short), (q_DD, _) = embedded(texts), embedded(asked.questions)  # questions fit, see _must_fit
    which = torch.from_numpy(asked.question_N)
    cosine_N = (q_DD[which] * x_ND[[place[text] for text in asked.texts]]).sum(1).numpy()
    train = data.splits.get("train")
    if asked.classes is not None or train is None:
        return cosine_N, {}, short
    seen = sorted({question for question, _ in _pairs(train)})
    similar = q_DD @ embedded(seen)[0].T
    best = similar.max(1)
    near = {
        question: {"nearest": seen[int(best.indices[i])], "similarity": float(best.values[i])}
        for i, question in enumerate(asked.questions)
    }
    return cosine_N, near, short
