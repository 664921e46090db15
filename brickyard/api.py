"""The Python interface; each function is the command of the same name.

import brickyard
result = brickyard.compare(data="my-data", methods=["linear-probe", "lora", "mos:r=7,e=2"])
brick = brickyard.tune("lora:r=16", data="my-data", out="runs/mine")
model = brickyard.load("runs/mine/brick").apply().model
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from brickyard.auditing import audit
from brickyard.compare.plan import Request, key_of
from brickyard.compare.run import Listener
from brickyard.compare.run import compare as run_compare
from brickyard.core import brick as bricks
from brickyard.core import readers, registry, trial
from brickyard.core.answers import Answers, answer, nats, score_of
from brickyard.core.answers import predict as logits_of
from brickyard.core.arm import parse
from brickyard.core.base import Base, open_base
from brickyard.core.batches import Encoded, encode
from brickyard.core.brick import Brick
from brickyard.core.build import build, resolve
from brickyard.core.completions import EncodedCompletions
from brickyard.core.curate import Request as Curation
from brickyard.core.curate import curate
from brickyard.core.data import Data, read_data
from brickyard.core.errors import UsageError
from brickyard.core.files import Lock
from brickyard.core.generate import Decoding, continuations
from brickyard.core.measure import environment, precision
from brickyard.core.method import FOREIGN_TASKS
from brickyard.core.registry import code_digest
from brickyard.core.retention import inner
from brickyard.core.scale import scaled, sweep_points
from brickyard.core.stats import interval
from brickyard.core.task import Task, task_of
from brickyard.core.trial import Setting
from brickyard.core.verify import verify
from brickyard.planning import plan
from brickyard.route._routed_model import is_routed
from brickyard.routing import routed

__all__ = [
    "audit",
    "check",
    "compare",
    "data",
    "evaluate",
    "load",
    "plan",
    "precision",
    "predict",
    "shrink",
    "tune",
    "verify",
]


def load(folder: str | Path) -> Brick:
    """Open a brick; `brick.apply().model` is the adapted model."""
    return bricks.load(folder)


def compare(
    *,
    out: str | Path | None = None,
    dtype: str = "auto",
    training: dict[str, Any] | None = None,
    listen: Listener = lambda event: None,
    allow_change: Sequence[str] = (),
    command: str = "",
    **request: Any,
) -> dict[str, Any]:
    """Run several arms side by side; see `compare.plan.Request` for the keywords. Returns result.json as a dictionary.

    The folder (`out`, or one named after the request) also gets report.html, plan.json, the ledger and the bricks.
    """
    from brickyard.compare.report import render

    if "methods" in request:
        request["methods"] = tuple(request["methods"])
    unknown = sorted(request.keys() - Request.__dataclass_fields__.keys())
    if unknown:
        from brickyard.core.errors import UnknownName

        raise UnknownName.among("keyword of compare", unknown[0], Request.__dataclass_fields__)
    training = {"precision": precision(dtype, request.get("device")), **(training or {})}
    asked = Request(training=training, **request)
    result, folder = run_compare(
        asked, Path(out) if out else None, listen=listen, allow_change=allow_change, command=command
    )
    render(result, folder / "report.html")
    return result | {"folder": str(folder)}


def tune(
    arm: str,
    *,
    base: str = "embedded:minilm",
    data: Any,
    out: str | Path | None = None,
    seed: int = 0,
    minutes: float | None = None,
    dtype: str = "auto",
    training: dict[str, Any] | None = None,
    threads: int | None = None,
    checkpoint_every: int = 200,
    callbacks: Sequence[Any] = (),
    allow_change: Sequence[str] = (),
    **setting: Any,
) -> tuple[Brick, dict[str, Any]]:
    """Train one arm; return its brick and the result (scores on validation and, where there is one, test).

    An interrupted run that is called again with the same `out` goes on where it stopped.
    """
    if threads:
        torch.set_num_threads(threads)
    training = {"precision": precision(dtype, setting.get("device")), **(training or {})}
    asked = Setting(arm=str(parse(arm)), base=base, data=data, seed=seed, training=training, **setting)
    known = read_data(data, task=asked.task, metric=asked.metric, need=("train",), allow_overlap=asked.allow_overlap)
    tested = "test" in known.splits
    splits = ("train", "validation", "test") if tested else ("train", "validation")
    ready = trial.prepare(asked, splits)
    folder = Path(out) if out else Path("runs") / key_of({**asdict(asked), "data": known.fingerprint})
    folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder / "run.lock"):
        if minutes is not None:
            ready.training = replace(ready.training, steps=steps_for(minutes, asked, folder))
        result = trial.tune(
            ready,
            folder,
            evaluate="test" if tested else None,
            code=code_digest(),
            callbacks=callbacks,
            allow_change=allow_change,
            checkpoint_every=checkpoint_every,
        )
    return load(folder / "brick"), result


def data(step: str, *, data: Any, out: str | Path, **options: Any) -> dict[str, Any]:
    """Run a data step (dedup, quality-filter, select, mix, data-management) on the train split of a data set.

    The step meta-tuning makes its rows from a task file instead.

    Args:
        step: the name of the step.
        data: a folder, one file, a hub id, `embedded:NAME`, or a dict of splits; for meta-tuning a task file.
        out: the new data folder.
        options: fields of `core.curate.Request`: options (of the step), text_column, domain_column, base, seed, ...

    Returns the data card, which is also OUT/data_card.json. Raises as `core.curate.curate`.
    """
    return curate(Curation(step=step, data=data, out=out, **options))


def steps_for(minutes: float, setting: Setting, folder: Path) -> int:
    """Turn minutes into steps once; a resumed run reads the number, never the clock."""
    path = folder / "steps.txt"
    if path.is_file():
        return int(path.read_text())
    probe = trial.probe({"setting": asdict(setting)})
    steps = max(1, int(60_000 * minutes / max(probe["step_ms"], 1e-3)))
    path.write_text(str(steps))
    return steps


def shrink(
    arm: str,
    *,
    base: str = "embedded:minilm",
    bricks: Sequence[str | Path] = (),
    data: Any,
    text: Any = None,
    out: str | Path,
    dtype: str = "auto",
    threads: int | None = None,
    trust_remote_code: bool = False,
    **running: Any,
) -> dict[str, Any]:
    """Make a smaller model as the shrink method `arm` says; return its report, and where it is under "model".

    An interrupted run goes on where it stopped. `running` are keywords of the method's `Running`.
    """
    if threads:
        torch.set_num_threads(threads)
    wanted = parse(arm)
    if len(wanted.pieces) != 1 or wanted.training:
        raise UsageError(f"{arm!r}: shrink takes one method, whose own options say how each of its stages trains.")
    piece = wanted.pieces[0]
    module = registry.load(registry.find(piece.name, "shrink").record.name)
    folder = Path(out)
    with Lock(folder / "run.lock"):
        report = module.run(
            open_base(base, trust_remote_code=trust_remote_code),
            [load(brick) for brick in bricks],
            registry.config(piece.name, piece.options),
            data,
            folder=folder,
            text=text,
            precision=precision(dtype, running.get("device")),
            **running,
        )
    return {**report, "model": str(folder / module.STUDENT)}


def evaluate(
    *,
    base: str | None = None,
    brick: str | Path | None = None,
    data: Any,
    split: str = "test",
    scale: str | None = None,
    predictions: str | Path | None = None,
    dtype: str = "auto",
    force: bool = False,
    device: str | None = None,
    max_length: int | None = None,
    task: str | None = None,
    metric: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Score a base (with its own trained head) or a brick on the test (or validation) rows of `data`.

    Returns {"score": {"metric", "mean", "low", "high"}, "examples", "environment"}; with `scale` ("0:2:0.25") also
    {"scale": [{"scale", "mean", "low", "high"}, ...]} for the strength of the brick's change. Of classes the score also
    has "majority", that of always giving the commonest; of texts "nats_per_token". `brick` may be a folder of
    `brickyard route` too: see `routed.evaluate`.
    """
    if split not in ("test", "validation"):
        raise UsageError(f"split={split!r}: test or validation was expected.")
    if brick is not None and is_routed(brick):
        if split != "test":
            raise UsageError("a routed folder is scored on test rows alone; leave out --split.")
        given = {"base": base, "scale": scale, "predictions": predictions, "dtype": dtype, "force": force}
        return routed.evaluate(brick, data, device=device, max_length=max_length, task=task, metric=metric, **given)
    opened = open_base(base, trust_remote_code=trust_remote_code) if base else None
    model, opened, known, made = _model(opened, brick, force, device)
    source = readers.read(data)
    task = task or _kind(source, known)
    rows = read_data(source, task=task, metric=metric, need=(split,))
    wanted = _same_task(task_of(rows, kind=task, metric=metric), known, metric, made)
    if made is None and wanted.kind in FOREIGN_TASKS:
        raise UsageError(
            f"no base reads {wanted.input} by itself; give --brick, of a method that works on {wanted.kind}."
        )
    encoded = encode(
        rows.splits[split],
        opened,
        wanted,
        max_length=max_length or (made.manifest.get("max_length") if made else None),
        template=made.template if made else None,
    )
    encoded.labels = _in_order(encoded, rows, known)
    labels, kind = encoded.labels.numpy(), precision(dtype, device)
    if wanted.kind == "preference" and isinstance(encoded, EncodedCompletions):
        if made is None:
            raise UsageError("a preference is judged against the untouched base; add --brick to have what changed it.")
        bare = opened.model(wanted, seed=0).to(next(model.parameters()).device)
        encoded.reference = nats(bare, encoded, precision=kind)

    def scored() -> tuple[Answers, dict[str, Any]]:
        answers = answer(model, encoded, wanted, precision=kind)
        found = interval(labels, answers.predictions[None], wanted.metric)
        return answers, {"metric": wanted.metric, "mean": found.mean, "low": found.low, "high": found.high}

    answers, score = scored()
    if predictions is not None:
        trial.write_answers(Path(predictions), answers, labels, wanted.labels)
    score |= score_of(wanted, encoded, answers)
    out: dict[str, Any] = {
        "score": score,
        "examples": len(labels),
        "encoding": encoded.report,
        "environment": environment(),
    }
    if scale is not None:
        if brick is None:
            raise UsageError("--scale sweeps the strength of a brick; give one with --brick.")
        out["scale"] = []
        for s in sweep_points(scale):
            with scaled(model, opened, made, s):
                out["scale"].append({"scale": s, **scored()[1]})
    return out


def _kind(source: readers.Source, known: Task | None) -> str | None:
    """Say for which task data are read: a brick's own, except that any text can be put to a language model."""
    if known is None or not known.generative:
        return None if known is None else known.kind
    return "causal-lm" if any("text" in names for names in source.found.values()) else None


def _model(
    base: Base | None, brick: str | Path | None, force: bool, device: str | None
) -> tuple[Any, Base, Task | None, Brick | None]:
    if brick is None:
        base = base or open_base("embedded:minilm")
        own = base.model(base.own_task, seed=0, stored_head=True)
        return own.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), base, None, None
    made = load(brick)
    base = base or open_base(made.manifest["base"]["spec"])
    model = made.apply(base, force=force).model
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), base, made.task, made


def _same_task(found: Task, known: Task | None, metric: str | None, made: Brick | None) -> Task:
    if known is None:
        return found
    if found.generative != known.generative or (
        not found.generative and (found.input, found.labels is None) != (known.input, known.labels is None)
    ):
        raise UsageError(f"the brick was trained for {known.kind}; the data is for {found.kind}.")
    if found.generative and found.kind != known.kind:
        for piece in parse(made.manifest["arm"]).pieces if made else ():
            record = registry.find(piece.name).record
            if record.slot == "tuner" and found.kind not in record.needs:
                raise UsageError(
                    f"the data is for {found.kind}, and a brick of {piece.name} answers {', '.join(record.needs)}"
                    f"{f': {record.because}' if record.because else ''}."
                )
        return found
    extra = sorted(set(found.labels or ()) - set(known.labels or ()))
    if extra:
        raise UsageError(
            f"the data has labels that the brick never saw: {extra[:5]}; it knows {list(known.labels or ())[:20]}."
        )
    return replace(known, metric=metric or known.metric)


def _in_order(encoded: Encoded, rows: Any, known: Task | None) -> torch.Tensor:
    """Number the labels as the brick does, whatever classes this data happens to hold."""
    if known is None or known.labels is None or rows.labels == known.labels:
        return encoded.labels
    place = torch.tensor([known.labels.index(name) for name in rows.labels])
    return place[encoded.labels]


def predict(
    *,
    out: str | Path,
    base: str | None = None,
    brick: str | Path | None = None,
    data: Any,
    dtype: str = "auto",
    force: bool = False,
    device: str | None = None,
    max_length: int | None = None,
    decoding: Decoding | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write predictions for rows that need no labels: index, prediction (the class's name, or a number), logits.

    A language model continues each row's text instead, as `decoding` says (greedy by default). Of a folder of
    `brickyard route`, each row also gets its task and the router's uncertainty.
    """
    if brick is not None and is_routed(brick):
        asked = {"dtype": dtype, "force": force, "device": device, "max_length": max_length, "decoding": decoding}
        return routed.predict(brick, data, out=out, base=base, **asked)
    opened = open_base(base, trust_remote_code=trust_remote_code) if base else None
    model, opened, task, made = _model(opened, brick, force, device)
    if task is None and opened.generative:
        task = Task("causal-lm", "bits_per_byte", None, 1, "text")
    if task is None:
        names = tuple(str(v) for v in model.config.id2label.values())
        task = Task(
            kind="image-classification" if opened.input == "image" else "text-classification",
            metric="accuracy",
            labels=names,
            width=len(names),
            input=opened.input,
        )
    if decoding is not None and not task.generative:
        raise UsageError(f"decoding options belong to language models; this task is {task.kind}.")
    rows = read_data(data, need=("test",), labelled=False)
    if task.generative:
        if max_length is not None:
            raise UsageError("max_length cuts no prompt of a language model; shorten the prompts themselves.")
        return _continue(model, opened, rows, decoding, out)
    if rows.input != task.input:
        raise UsageError(f"the brick reads {task.input}; the data holds {rows.input}.")
    encoded = encode(
        rows.splits["test"],
        opened,
        task,
        max_length=max_length or (made.manifest.get("max_length") if made else None),
        template=made.template if made else None,
    )
    logits = logits_of(model, encoded, precision=precision(dtype, device))
    answers = task.predict(logits)
    columns: dict[str, Any] = {
        "index": np.arange(len(answers)),
        "prediction": [task.labels[int(a)] for a in answers] if task.labels is not None else answers,
    }
    if task.labels is not None:
        columns["logits"] = pa.array(list(logits))
    _write(out, columns)
    return {"rows": len(answers), "out": str(out), "encoding": encoded.report}


def _continue(model: Any, base: Base, rows: Data, decoding: Decoding | None, out: str | Path) -> dict[str, Any]:
    """Write what a language model says of each row: a continuation of its text or prompt, or the choice it makes."""
    test = rows.splits["test"]
    if rows.input == "choice":
        if decoding is not None:
            raise UsageError("decoding options have no meaning where the model chooses among given answers.")
        task = Task("multiple-choice", "accuracy", None, 1, "choice")
        encoded = encode(test, base, task)
        chosen = answer(model, encoded, task).predictions
        texts = [test["choices"][i][int(c)] for i, c in enumerate(chosen)]
        _write(out, {"index": np.arange(len(chosen)), "prediction": chosen, "choice": texts})
        return {"rows": len(chosen), "out": str(out), "encoding": encoded.report}
    prompts = test["prompt" if rows.input == "prompt" else "text"]
    texts = continuations(model, base, prompts, decoding or Decoding(), chat=rows.input == "prompt")
    _write(out, {"index": np.arange(len(texts)), "prediction": texts})
    return {"rows": len(texts), "out": str(out), "encoding": {}}


def _write(out: str | Path, columns: dict[str, Any]) -> None:
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), out)


def check(names: Sequence[str], **options: Any) -> list[dict[str, Any]]:
    """Re-measure the claims of methods; see `brickyard.checks.run.check`."""
    from brickyard.checks.run import check as run_check

    return [run_check(name, **options) for name in names]


def apply(brick: str | Path, base: str | None = None) -> Any:
    """Return the adapted model of a brick, in evaluation mode."""
    return load(brick).apply(open_base(base) if base else None).model


def backbone(model: Any) -> Any:
    """Return the backbone inside an adapted model, adapters included."""
    return inner(model)


def fingerprint(base: str) -> str:
    """Return the fingerprint of a base."""
    return open_base(base).fingerprint


def build_arm(arm: str, base: str, task: Task, seed: int = 0) -> Any:
    """Attach an arm to a base without training it; for those who bring their own loop."""
    return build(resolve(parse(arm), task), open_base(base), task, seed=seed)


def bricks_in(folder: str | Path, base: str, *, data: Sequence[Any] = (), **scoring: Any) -> list[dict[str, Any]]:
    """List the bricks under `folder` that were made for `base`: what they are, what they cost, their scores and place.

    With `data` each is scored on each data set against the bare base; see `bricks.scores.scored` for the keywords.
    """
    from brickyard.bricks.scores import scored

    return scored(folder, base, data, **scoring)
