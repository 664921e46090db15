"""One run of one arm: open base and data, train, evaluate, prove, measure, and leave a brick with its receipt.

These functions take and return plain dictionaries, because `jobs` runs them in processes of their own.
"""

from __future__ import annotations

import functools
import itertools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from brickyard.core import brick as bricks
from brickyard.core import measure
from brickyard.core.answers import Answers, Examples, answer, nats, score_of, to_device
from brickyard.core.arm import parse
from brickyard.core.attached import Attached
from brickyard.core.base import Base, open_base
from brickyard.core.batches import Encoded, Order, encode
from brickyard.core.build import Plan, build, for_blocks, resolve, step_of, training_of
from brickyard.core.chosen import (
    chosen_by,
    curriculum_of,
    initialise,
    joined_by,
    refuse_unaccounted,
    settle,
    with_options,
    with_prepared,
    with_unlabelled,
)
from brickyard.core.completions import EncodedCompletions
from brickyard.core.data import Data, overlap_sentence, read_data
from brickyard.core.loop import Training, batch_loss, train, train_mode
from brickyard.core.objective import check_head, model_inputs
from brickyard.core.receipt import assert_effect, receipt, snapshot
from brickyard.core.retention import watched
from brickyard.core.spent import announced
from brickyard.core.split import drawn, places
from brickyard.core.states import States
from brickyard.core.task import Task, task_of

FEW_STEPS = 100  # three epochs of a few rows are a handful of steps, after which nothing is learned
_PROBE_ROWS = 16
_SLOW = 0.3  # seconds of a step
_CHARGED = ("states_seconds", "prepare_seconds", "curriculum_seconds", "structure_seconds")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything that decides a run; JSON-like. `training` holds only what the command fixed."""

    arm: str
    base: str = "embedded:minilm"
    data: Any = "embedded:stdlib-topics"
    seed: int = 0
    task: str | None = None
    metric: str | None = None
    max_length: int | None = None
    batch: int | None = None
    training: dict[str, Any] = field(default_factory=dict)
    train_rows: int = 0
    shots: int = 0
    attention: str = "sdpa"
    device: str | None = None
    cache: bool = True
    allow_overlap: bool = False
    trust_remote_code: bool = False
    retain: Any = None
    shuffle_labels: bool = False


@dataclass
class Prepared:
    """What a setting opens to: the base, the data, the task, the arm's plan and the encoded splits.

    `train_index` says which encoded rows of `data.splits["train"]` are trained on, in the order of `encoded["train"]`.
    """

    setting: Setting
    base: Base
    data: Data
    task: Task
    plan: Plan
    training: Training
    encoded: dict[str, Encoded]
    train_index: np.ndarray

    @property
    def device(self) -> torch.device:
        """Where the run computes: what the setting says, else an accelerator where there is one."""
        if self.setting.device:
            return torch.device(self.setting.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepare(setting: Setting, splits: Sequence[str] = ("train", "validation", "test")) -> Prepared:
    """Open and check everything that `setting` names; any fault is one clear error before training starts."""
    need = tuple(split for split in splits if split != "validation")
    data = read_data(
        setting.data, task=setting.task, metric=setting.metric, need=need, allow_overlap=setting.allow_overlap
    )
    task = task_of(data, kind=setting.task, metric=setting.metric)
    plan = resolve(parse(setting.arm), task)
    given = {**setting.training, "seed": setting.seed}
    if setting.batch is not None:
        given["batch"] = setting.batch
    training = training_of(plan, given, Training())
    base = open_base(setting.base, trust_remote_code=setting.trust_remote_code)
    options = {"max_length": setting.max_length, "template": plan.template}
    rows, index = {name: data.splits[name] for name in splits}, np.empty(0, dtype=np.int64)
    asked = {"train_rows": setting.train_rows, "shots": setting.shots}
    packed = task.kind == "causal-lm"  # documents become blocks, of which training takes some
    if not packed:  # nobody reads the others, so that only these are tokenised, decoded and counted
        rows, index = drawn(rows, task.labels, seed=setting.seed, **asked)
    encoded = {name: encode(split, base, task, **options) for name, split in rows.items()}
    if packed and "train" in encoded:
        index = places(len(encoded["train"]), None, None, seed=setting.seed, **asked)
        if len(index) < len(encoded["train"]):
            encoded["train"] = encoded["train"].take(index)
        training = training_of(plan, given, for_blocks(int(encoded["train"].lengths.max())))
    if setting.shuffle_labels:
        encoded["train"].shuffle(setting.seed)
    ready = with_unlabelled(Prepared(setting, base, data, task, plan, training, encoded, index), **options)
    said = {**given, **plan.arm.training}
    if not task.generative and "train" in encoded and not (said.get("epochs") or said.get("steps")):
        ready = replace(ready, training=_long_enough(training, len(ready.encoded["train"]), setting.shots > 0))
    return ready


def _long_enough(training: Training, rows: int, shots: bool) -> Training:
    """Return it with at least `FEW_STEPS` steps, and evaluations a tenth of these apart, not an epoch of few rows."""
    total = training.total_steps(rows)
    if shots or total >= FEW_STEPS:  # of shots validation is as small as train
        return replace(training, steps=max(FEW_STEPS, total)) if shots else training
    return replace(training, steps=FEW_STEPS, evaluate_every=training.evaluate_every or FEW_STEPS // 10)


def examples(ready: Prepared, attached: Attached) -> tuple[Mapping[str, Examples], dict[str, Any]]:
    """Return what the loop reads, and what building it cost.

    Cached states where only a head trains; rows with the states that enter the first block that trains where the blocks
    below it are frozen; else the rows.
    """
    for rows in ready.encoded.values():
        if isinstance(rows, EncodedCompletions):
            rows.instructions = bool(getattr(attached.model, "reads_instructions", False))
    if attached.frozen_states:
        model: Any = attached.model  # a headed model over cached states
        pool = getattr(model.head, "frozen_pool", None)
        made = _states(ready, model.backbone.to(ready.device), pool=pool)
        return made, _known(made, str(pool))
    # States are kept by row, and a row of prompts with answers is several texts: there the bottom runs in every epoch.
    if attached.prefix is None or isinstance(ready.encoded["train"], EncodedCompletions):
        return ready.encoded, {}
    prefix = attached.prefix
    made = _states(ready, prefix.to(ready.device), of=f", {prefix.label}", dtype=prefix.store)
    kept = {name: rows.keeping(made[name]) for name, rows in ready.encoded.items()}
    few = np.arange(min(_few(ready.task, kept["train"]), len(kept["train"])))
    plain, entering = (_inputs(rows["train"].collate(few), ready.device) for rows in (ready.encoded, kept))
    prefix.agree(plain, entering)
    return kept, _known(made, prefix.label)


def _states(ready: Prepared, backbone: torch.nn.Module, of: str = "", **kept: Any) -> dict[str, States]:
    """Return the states of every split; `of` tells them apart from the base's final ones."""
    base, asked = ready.base.fingerprint + of, ready.setting
    return {
        name: States.of(backbone, rows, base=base, attention=asked.attention, cache=asked.cache, **kept)
        for name, rows in ready.encoded.items()
    }


def _known(made: Mapping[str, States], which: str) -> dict[str, Any]:
    """Return what building states cost and did; `states_of` says which they are.

    Of the seconds those of train are training; reading held-out rows is evaluation, which no arm is charged for.
    """
    held_out = sum(s.seconds for name, s in made.items() if name != "train")
    return {
        "states_seconds": sum(s.seconds for s in made.values()) - held_out,
        "states_held_out_seconds": held_out,
        "states_bytes": sum(s.bytes for s in made.values()),
        "streamed": [name for name, s in made.items() if s.streamed],
        "states_dtype": next(iter(made.values())).dtype,
        "states_overflowed": sum(s.report.overflowed for s in made.values()),
        "states_largest_rounding": max(s.report.largest_rounding for s in made.values()),
        "states_of": which,
    }


def _few(task: Task, rows: Examples) -> int:
    """Rows of a probe batch."""
    return max(1, 512 // int(rows.lengths.max())) if task.generative else _PROBE_ROWS  # a vocabulary is wide


def run(argument: dict[str, Any]) -> dict[str, Any]:
    """Train and evaluate one setting in `folder`; see `finish` for the result.

    argument: {"setting": dict of Setting, "folder": path, "role": "search"|"final"|"untouched", "code": digest of the
    code}. Of an untouched base only the answers are taken.
    """
    setting = Setting(**argument["setting"])
    folder = Path(argument["folder"])
    if argument.get("role") == "untouched":
        return _untouched(prepare(setting, ("test",)), folder)
    final = argument.get("role", "final") == "final"
    ready = prepare(setting, ("train", "validation", "test") if final else ("train", "validation"))
    return tune(ready, folder, evaluate="test" if final else None, code=argument.get("code", ""))


def _untouched(ready: Prepared, folder: Path) -> dict[str, Any]:
    model = ready.base.model(ready.task, seed=0, attention=ready.setting.attention).to(ready.device)
    rows = ready.encoded["test"]
    answers = answer(model, rows, ready.task, precision=ready.training.precision)  # as the arms beside it are read
    write_answers(folder / "answers.parquet", answers, rows.labels.numpy())
    return {"score": score_of(ready.task, rows, answers)}


def tune(
    ready: Prepared,
    folder: Path,
    *,
    evaluate: str | None = "test",
    code: str = "",
    callbacks: Sequence[Any] = (),
    allow_change: Sequence[str] = (),
    checkpoint_every: int = 0,
) -> dict[str, Any]:
    """Train a prepared setting, prove that it had an effect, evaluate, and write `folder/brick`."""
    asked = str(ready.plan.arm)
    ready, chosen = settle(ready)
    setting, task = ready.setting, ready.task
    attached = build(ready.plan, ready.base, task, seed=setting.seed, attention=setting.attention)
    attached.model.to(ready.device)
    sets, cost = examples(ready, attached)
    training = Training(**{**asdict(ready.training), "checkpoint_every": checkpoint_every})
    about: dict[str, Any] = {
        "data": {"name": ready.data.name, "fingerprint": ready.data.fingerprint, "rows": len(sets["train"])},
        "training": asdict(training),
        "max_length": setting.max_length,
    }
    base = {"spec": ready.base.spec, "fingerprint": ready.base.fingerprint}
    bricks.same_or_new(folder / "brick", {"arm": asked, "base": base, "seed": setting.seed, **about}, allow_change)
    few = min(_few(task, sets["train"]), len(sets["train"]))
    probe = _inputs(sets["train"].collate(np.arange(few)), ready.device)
    with attached.untouched():  # and before any first weights are set: an arm may start far from the base
        kept, base_logits = watched(ready, attached), _logits(attached, probe)
    chosen |= initialise(ready, attached)
    cost |= attached.cost
    curriculum = curriculum_of(ready, sets, attached)
    joined = joined_by(ready, attached)
    refuse_unaccounted(ready, chosen, joined)
    if attached.objective is not None and task.generative:
        check_head(attached.model, probe)
    _measure_reference(ready)
    train_rows, prepared, prepare_report = with_prepared(ready, sets["train"])
    before = snapshot(attached.model)
    identity = {"arm": str(ready.plan.arm), "base": ready.base.fingerprint, "code": code}
    if curriculum is not None:
        identity["curriculum"] = curriculum.digest
        cost["curriculum_seconds"] = curriculum.seconds
    if joined is not None:
        identity["joined"] = joined.digest
        attached.callbacks = (*attached.callbacks, joined)
    trained = train(
        attached,
        train_rows,
        sets.get("validation"),
        task,
        training,
        folder=folder / "checkpoints",
        identity=identity,
        allow_change=allow_change,
        callbacks=callbacks,
        curriculum=curriculum,
        make_step=announced(step_of(ready.plan, len(train_rows), task), folder),
        device=setting.device,
    )
    proof = receipt(before, attached.model, attached, probe, base_logits)
    assert_effect(proof)
    result: dict[str, Any] = {
        "arm": asked,
        "chosen": chosen,
        "seed": setting.seed,
        "training": asdict(training),
        "history": trained.history,
        "steps": trained.steps,
        "best_step": trained.best_step,
        "stopped": trained.stopped,
        "receipt": proof,
        "retained": kept.after(attached.model) if kept else None,
        "encoding": {name: rows.report for name, rows in ready.encoded.items()},
        **_kept(trained.history, trained.best_step),
        "prepared": prepare_report,
        "cost": {
            # Whoever reads states or a teacher's answers pays for them in full, even those that were found made.
            "train_seconds": trained.seconds
            + sum({**cost, **prepared}.get(k, 0.0) for k in _CHARGED)
            + _choosing(chosen),
            "trainable_parameters": sum(p.numel() for p in attached.parameters()),
            **cost,
            **prepared,
        },
    }
    if curriculum is not None:
        result["curriculum"] = curriculum.report(trained.steps, training.batch)
    if trained.report:
        result["step"] = trained.report
    if evaluate is not None:
        answers = answer(attached.model, sets[evaluate], task, precision=training.precision)
        labels = sets[evaluate].labels.numpy()
        result["score"] = score_of(task, sets[evaluate], answers)
        result["overlap"] = overlap_sentence(ready.data.report["overlap"], len(ready.data.splits[evaluate]))
        write_answers(folder / "answers.parquet", answers, labels)
    about |= {
        "environment": measure.environment(),
        "receipt": proof,
        "scores": {k: result[k] for k in ("score", "validation") if k in result},
        "parents": [],
        **({"asked": asked, "chosen": chosen} if chosen else {}),
        **{key: result[key] for key in ("curriculum", "step") if key in result},
    }
    made = bricks.save(folder / "brick", attached, ready.plan, ready.base, task, seed=setting.seed, about=about)
    result["cost"]["brick_bytes"] = made.bytes
    if trained.only_last and (folder / "checkpoints").is_dir():
        shutil.rmtree(folder / "checkpoints")
    return result


def _choosing(chosen: dict[str, Any]) -> float:
    """Seconds that the methods took to choose their options: training, like any other."""
    return sum(report["seconds"] for report in chosen.values())


def _measure_reference(ready: Prepared) -> None:
    """Let preference sets know what the untouched base thinks of their answers, by which a preference is judged."""
    if ready.task.kind != "preference":
        return
    model = ready.base.model(ready.task, seed=0, attention=ready.setting.attention).to(ready.device)
    for name, rows in ready.encoded.items():
        if name != "train" and isinstance(rows, EncodedCompletions):
            rows.reference = nats(model, rows, precision=ready.training.precision)


def _kept(history: list[dict[str, Any]], step: int) -> dict[str, float | None]:
    """Return score and loss of the evaluation whose weights were kept."""
    found = next((p for p in history if p["step"] == step and "validation_score" in p), {})
    return {"validation": found.get("validation_score"), "validation_loss": found.get("validation_loss")}


def _inputs(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return to_device(model_inputs(batch), device)


@torch.no_grad()
def _logits(attached: Attached, inputs: dict[str, Any]) -> torch.Tensor:
    attached.model.eval()
    return attached.model(**inputs).logits.float().cpu()


def write_answers(path: Path, answers: Answers, labels: np.ndarray, names: Sequence[str] | None = None) -> None:
    """Write one row per example in the order of the data: index, label, prediction, loss and, for classes, logits.

    With the `names` of classes, which are numbers here, label_name and prediction_name too. Of a language model, an
    example is a document, its label its bytes (or tokens) and its prediction its nats.
    """
    columns: dict[str, Any] = {
        "index": np.arange(len(labels)),
        "label": labels,
        "prediction": answers.predictions,
        "loss": answers.losses,
    }
    if names:
        columns |= {f"{name}_name": np.array(names)[columns[name].astype(int)] for name in ("label", "prediction")}
    if answers.logits is not None and answers.logits.shape[1] > 1:
        columns["logits"] = pa.array(list(answers.logits))
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), temporary)
    temporary.replace(path)


def probe(argument: dict[str, Any]) -> dict[str, Any]:
    """Count and measure one training step of a setting on its longest batch, with no other job beside it.

    Returns trainable_parameters, saved_for_backward_bytes and peak_bytes (on the longest batch, dropout off for the
    former), step_ms and mean_step_ms (median and mean over batches as training draws them; short steps are repeated),
    forward_flops (of such a batch), gradient and optimiser bytes, and for an arm on cached states the milliseconds a
    row's states take and which states they are (`states_of`: arms of one name share them). Where an option is chosen
    in training, all this is of its costliest value, and `choosing_seconds` what choosing takes. Of an arm with a
    curriculum, `curriculum_seconds` is what preparing it cost: it was done here in full, and runs find it in the cache
    if there is one.
    """
    setting = Setting(**argument["setting"])
    ordered = resolve(parse(setting.arm)).data is not None
    ready = prepare(setting, ("train", "validation") if ordered else ("train",))
    dear, choosing_steps = chosen_by(ready, "costliest", ready)
    ready = with_options(ready, dear)
    curriculum = curriculum_of(ready, ready.encoded)
    attached = build(ready.plan, ready.base, ready.task, seed=setting.seed, attention=setting.attention)
    device = ready.device
    attached.model.to(device)
    # A few of the batches that training would draw, and the longest one, tell all; only they need states.
    encoded, batch = ready.encoded["train"], ready.training.batch
    drawn = Order(encoded.lengths, batch, seed=setting.seed, bucket=ready.training.bucket).epoch(0)[
        : argument.get("batches", 5)
    ]
    longest = np.argsort(encoded.lengths, kind="stable")[-batch:]
    lengths = encoded.lengths
    picked = np.concatenate([*drawn, longest])
    ready.encoded, ready.train_index = {"train": encoded.take(picked)}, ready.train_index[picked]
    ready.setting = Setting(**{**argument["setting"], "cache": False})
    sets, states = examples(ready, attached)
    rows, prepared, _ = with_prepared(ready, sets["train"], probing=True)
    ends = np.cumsum([0, *map(len, drawn), len(longest)])
    # The longest batch is among the measured rows: a row's time goes by its tokens, and those of all rows are known.
    longer = float(lengths.mean() / rows.lengths.sum())
    *usual, long = (to_device(rows.collate(np.arange(a, b)), device) for a, b in itertools.pairwise(ends))
    step = step_of(ready.plan, len(lengths), ready.task)(attached, ready.training)
    state = _bare_state(attached, ready, device)
    with attached.saving():
        saved = measure.Saved(bytes=0, storages=0, hidden=())
        if step.backward:
            # A step that takes a batch in parts keeps what one part keeps; the longest rows come last.
            part = np.arange(ends[-1])[ends[-2] :][-getattr(step, "microbatch", len(longest)) :]
            kept = to_device(rows.collate(part), device)
            saved = measure.saved_for_backward(_Loss(attached, ready.task), {"batch": kept}, lambda loss: loss)
        train_mode(attached.model)
        peak = measure.peak_bytes(lambda: step(state, [(1.0, long)]), device)
        # The step that counted the peak was the warm-up. A slow step is little disturbed, and is not worth repeating.
        seconds = []
        for b in usual:
            one = functools.partial(step, state, [(1.0, b)])
            once = measure.step_time(one, warmup=0, repeats=1)
            seconds.append(once if once > _SLOW else measure.step_time(one, warmup=0, repeats=3))
    flops = measure.forward_flops(attached.model, _inputs(usual[0], device))
    return {
        "trainable_parameters": sum(p.numel() for p in attached.parameters()),
        "saved_for_backward_bytes": saved.bytes,
        "hidden_saves": [str(h) for h in saved.hidden],
        "peak_bytes": peak.bytes,
        "how": {"peak_bytes": peak.how},
        "gradient_bytes": 4 * sum(p.numel() for p in attached.parameters()) if step.backward else 0,
        "optimiser_bytes": measure.distinct_bytes(step.state_dict().values()),
        "step_ms": 1000 * float(np.median(seconds)),
        "mean_step_ms": 1000 * float(np.mean(seconds)),
        "choosing_seconds": sum(choosing_steps.values()) * float(np.mean(seconds)),
        "forward_flops": flops,
        "states_ms_per_row": 1000 * states["states_seconds"] * longer if states else 0.0,
        "states_of": states["states_of"] if states else "",
        "prepare_ms_per_row": 1000 * prepared.get("prepare_seconds", 0.0) * longer,
        "curriculum_seconds": curriculum.seconds if curriculum else 0.0,
        "rows": len(lengths),
        **{f"{split}_rows": _rows_like(ready, split, len(lengths)) for split in ("validation", "test")},
        "batch": batch,
        "longest": int(lengths.max()),
        "training": asdict(ready.training),
    }


class _Loss(torch.nn.Module):
    """The loss of a batch as a module's output, as `measure` takes it."""

    def __init__(self, attached: Attached, task: Task) -> None:
        super().__init__()
        self.model, self.attached, self.task = attached.model, attached, task

    def forward(self, batch: dict[str, Any]) -> SimpleNamespace:
        return SimpleNamespace(logits=batch_loss(self.attached, self.task, batch))


def _rows_like(ready: Prepared, split: str, rows: int) -> int:
    """Return the rows of a split that is not encoded; where rows are blocks of text, by its share of the bytes."""
    found = ready.data.splits.get(split)
    if found is None or ready.task.kind != "causal-lm":
        return len(found) if found else 0
    size = lambda texts: sum(map(len, texts["text"]))  # noqa: E731
    return round(rows * size(found) / size(ready.data.splits["train"]))


def _bare_state(attached: Attached, ready: Prepared, device: torch.device) -> Any:
    from accelerate import Accelerator

    from brickyard.core.loop import Hooks, State

    # A method's schedule has no meaning in a three-step probe, so its callbacks stay out.
    state = State(attached, ready.task, ready.training, 1000, Accelerator(cpu=device.type == "cpu"))
    state.hooks = Hooks([])
    return state
