"""What each verb of a recipe does: it runs a step in a folder of its own.

The work itself is that of the Python interface; a step hands over what it has resolved and keeps what a report needs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from brickyard import api
from brickyard.core import readers
from brickyard.core.arm import parse
from brickyard.core.brick import MANIFEST
from brickyard.core.data import read_data
from brickyard.core.errors import UsageError
from brickyard.core.export import export
from brickyard.core.files import read_json, write_json
from brickyard.core.generate import Decoding
from brickyard.core.registry import code_digest
from brickyard.core.task import LOWER_IS_BETTER
from brickyard.growing import grow
from brickyard.merge._from_data import OfData
from brickyard.merging.command import straight_lines
from brickyard.merging.merge import merge, resolve
from brickyard.recipe import audit
from brickyard.recipe.checks import tries
from brickyard.recipe.contents import digest_of, digest_of_rows
from brickyard.recipe.steps import Step
from brickyard.recipe.work import Thing, Work

MAIN = {"tune": "brick", "predict": "answers.parquet"}  # what a step leaves; elsewhere a folder of the step's name
_SCORE = ("metric", "mean", "low", "high", "nats_per_token")


def settings(work: Work, step: Step) -> dict[str, Any]:
    """Return all that decides what a step gives, with the contents of its inputs in the place of their names."""
    said: dict[str, Any] = {}
    for name, value in step.options.items():
        found = [[thing.kind, thing.digest] for thing in work.things(step, name)] if step.option(name).takes else value
        said[name] = found
    if step.verb == "audit":
        said["files"] = audit.files(work, step)
    return {"verb": step.verb, "options": said, "code": code_digest()}


def place(step: Step, folder: Path) -> Path:
    """Return where a step leaves its output in its folder."""
    return folder / MAIN.get(step.verb, step.name)


def perform(work: Work, step: Step, folder: Path, listen: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Run a step in `folder` and return what a report says of it; errors are those of its verb."""
    return _PERFORM[step.verb](work, step, folder, listen)


def _setting(work: Work, step: Step) -> dict[str, Any]:
    """Return the keywords that training takes, as `api.tune` calls them."""
    options = step.options
    named = {"max-length": "max_length", "batch-size": "batch", "train-rows": "train_rows", "shots": "shots"}
    plain = ("task", "metric", "device", "cache")
    out = {key: options[key] for key in plain if options.get(key) is not None}
    out |= {field: options[key] for key, field in named.items() if options.get(key) is not None}
    return {
        **out,
        "allow_overlap": options["allow-overlap"],
        "trust_remote_code": work.trust_remote_code,
        "base": work.spec(step, "base"),
        "data": work.spec(step, "data"),
        "dtype": options.get("dtype", "auto"),
        "threads": options.get("threads"),
        "training": {key: options[key] for key in ("epochs", "steps") if options.get(key) is not None},
    }


class _Told:
    """Hands each evaluation of a training on to whoever listens."""

    def __init__(self, listen: Callable[[dict[str, Any]], None]) -> None:
        self.listen = listen

    def evaluated(self, state: Any) -> None:
        """Tell the last point of the learning curve."""
        point = state.history[-1]
        said = f"step {point['step']} of {state.total}, {state.task.metric} {point['validation_score']:.4f}"
        self.listen({"event": "progress", "said": said})

    def phase(self, said: str) -> None:
        """Tell that a phase of several has ended."""
        self.listen({"event": "progress", "said": said})


def _tune(work: Work, step: Step, folder: Path, listen: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    options = step.options
    brick, result = api.tune(
        options["tune"],
        out=folder,
        seed=options["seed"],
        checkpoint_every=options["checkpoint-every"],
        callbacks=(_Told(listen),),
        **_setting(work, step),
    )
    proof = result["receipt"]
    shown = {key: result[key] for key in ("score", "validation", "steps", "best_step") if key in result}
    return {
        **shown,
        "train_seconds": result["cost"]["train_seconds"],
        "trainable_parameters": result["cost"]["trainable_parameters"],
        "tensors_moved": len(proof["moved"]),
        "logits_changed_by": proof["logits"]["mean"],
        "brick_bytes": brick.bytes,
        "encoding": result["encoding"],
    }


def _grow(work: Work, step: Step, folder: Path, listen: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    options = step.options
    result = grow(
        options["grow"],
        out=_fresh(place(step, folder)),
        seed=options["seed"],
        checkpoint_every=options["checkpoint-every"],
        callbacks=(_Told(listen),),
        **_setting(work, step),
    )
    return {key: result[key] for key in ("summary", "score") if key in result}


def _merge(work: Work, step: Step, folder: Path, listen: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    options, out = step.options, place(step, folder)
    given = {
        "base": work.spec(step, "base"),
        "bricks": [thing.spec for thing in work.things(step, "bricks")],
        "form": options["as"],
        "heads": options["heads"],
        "force": options["force"],
        "trust_remote_code": work.trust_remote_code,
        **{key: options[key] for key in ("dtype", "device", "threads", "task", "metric") if options.get(key)},
        **({"max_length": options["max-length"]} if options.get("max-length") else {}),
    }
    data = [thing.spec for thing in work.things(step, "data")]
    arms, found, metric = tries(step), [], ""
    arm = arms[0]
    if len(arms) > 1:
        # A merge of data reads the inputs' train rows for every candidate too; others need none before the last.
        needed = data if isinstance(resolve(arm).rule, OfData) else []
        for i, arm in enumerate(arms):
            tried = folder / f"candidate_{i + 1}"
            if not (tried / "merge.json").is_file():
                merge(arm, out=tried, data=needed, **given)
            digest = work.hashes.digest(tried)
            cells = [_validate(work, step, tried, digest, thing) for thing in work.things(step, "validate")]
            means = [cell["mean"] for cell in cells]
            metric = _one_metric(cells)
            found.append({"arm": arm, "scores": means, "mean": sum(means) / len(means)})
            listen({"event": "progress", "said": f"{i + 1} of {len(arms)}: {arm} {found[-1]['mean']:.4f}"})
        arm = arms[_best(found, metric)]
    result = merge(arm, out=_fresh(out), data=data, **given)
    for i in range(len(arms)):
        shutil.rmtree(folder / f"candidate_{i + 1}", ignore_errors=True)
    straight = straight_lines(result)
    shown = {key: result[key] for key in ("arm", "form", "scales", "scores") if key in result}
    if straight:
        shown["straight"] = {"tensors": len(straight), "along_a_line": sum(straight)}
    if found:
        names = [thing.label for thing in work.things(step, "validate")]
        shown["search"] = {"validate": names, "metric": metric, "tried": found, "chosen": arm}
    return shown


def _one_metric(cells: Sequence[Mapping[str, Any]]) -> str:
    """Return the metric of a candidate's scores; UsageError where they have several, of which no mean says anything."""
    metrics = sorted({cell["metric"] for cell in cells})
    if len(metrics) > 1:
        raise UsageError(
            f"validate: the data are scored by {', '.join(metrics)}, whose mean says nothing; give data of one kind, "
            "or one metric that fits all."
        )
    return metrics[0]


def _best(found: Sequence[Mapping[str, Any]], metric: str) -> int:
    """Return the place of the best mean; of equal ones the first."""
    means = [row["mean"] if metric in LOWER_IS_BETTER else -row["mean"] for row in found]
    return means.index(min(means))


def _validate(work: Work, step: Step, model: Path, digest: str, data: Thing) -> dict[str, Any]:
    """Return a candidate's score on the validation rows of one data set; without any, on those cut from train."""
    source = readers.read(data.spec)
    if "validation" in source.splits:
        rows = source.splits["validation"]
    else:
        rows = read_data(source, task=step.options.get("task"), need=("train",)).splits["validation"].columns
    digest_rows = digest_of_rows({"validation": rows})
    thing = Thing("model", str(model), digest, "a candidate")
    return _cell(work, step, thing, {"test": rows}, digest_rows, step.options.get("max-length"))["score"]


def _cell(work: Work, step: Step, model: Thing, data: Any, digest: str, length: int | None) -> dict[str, Any]:
    """Score one model on one data set, or find it scored: what is known lies in the folder `cells`."""
    options = {key: step.options.get(key) for key in ("task", "metric", "dtype", "device")}
    key = digest_of([model.kind, model.digest, digest, options, length, code_digest()])
    path = work.folder / "cells" / f"{key[:24]}.json"
    if path.is_file():
        return read_json(path)
    is_model = model.kind == "model"
    found = api.evaluate(
        base=model.spec if is_model else model.base,
        brick=None if is_model else model.spec,
        data=data,
        task=options["task"],
        metric=options["metric"],
        max_length=length,
        dtype=options["dtype"] or "auto",
        device=options["device"],
        trust_remote_code=work.trust_remote_code,
    )
    kept = {"score": {k: found["score"][k] for k in _SCORE if k in found["score"]}, "examples": found["examples"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, kept)
    return kept


def _evaluate(work: Work, step: Step, folder: Path, listen: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    models, data = work.things(step, "evaluate"), work.things(step, "data")
    length, rows = _same_length(step, models), []
    for i, model in enumerate(models):
        cells = []
        for j, thing in enumerate(data):
            listen({"event": "progress", "said": f"{i * len(data) + j + 1} of {len(models) * len(data)}"})
            cells.append(_cell(work, step, model, thing.spec, thing.digest, length))
        metrics = {cell["score"]["metric"] for cell in cells}
        mean = sum(cell["score"]["mean"] for cell in cells) / len(cells) if len(metrics) == 1 else None
        rows.append({"model": model.label, "scores": cells, "mean": mean})
    return {"data": [thing.label for thing in data], "rows": rows, "max_length": length}


def _same_length(step: Step, models: Sequence[Thing]) -> int | None:
    """Return to how many tokens every model of a table reads a row; None: to its context.

    A brick reads as many as it was trained with; beside it no other may read more, or the table would not be fair.
    """
    own = (read_json(Path(model.spec) / MANIFEST).get("max_length") for model in models if model.kind == "brick")
    return step.options.get("max-length") or min((length for length in own if length), default=None)


def _predict(work: Work, step: Step, folder: Path, listen: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    (model,), options = work.things(step, "predict"), step.options
    tokens = options.get("new-tokens")
    result = api.predict(
        out=place(step, folder),
        base=model.spec if model.kind == "model" else model.base,
        brick=model.spec if model.kind == "brick" else None,
        data=work.spec(step, "data"),
        dtype=options.get("dtype", "auto"),
        device=options.get("device"),
        max_length=options.get("max-length"),
        decoding=Decoding(new_tokens=tokens) if tokens else None,
        trust_remote_code=work.trust_remote_code,
    )
    return {"rows": result["rows"]}


def _data(work: Work, step: Step, folder: Path, listen: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    piece, options = parse(step.options["data"]).pieces[0], step.options
    card = api.data(
        piece.name,
        data=work.spec(step, "from"),
        out=_fresh(place(step, folder)),
        options=piece.options,
        text_column=options["text-column"],
        domain_column=options["domain-column"],
        base=work.spec(step, "base"),
        seed=options["seed"],
        contamination=options["contamination"],
        device=options.get("device"),
    )
    return {"rows": card["rows"], "dropped": {rule: found["dropped"] for rule, found in card["rules"].items()}}


def _shrink(work: Work, step: Step, folder: Path, listen: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    options, out = step.options, place(step, folder)
    result = api.shrink(
        options["shrink"],
        base=work.spec(step, "base") or "",
        bricks=[thing.spec for thing in work.things(step, "bricks")],
        data=work.spec(step, "data"),
        text=work.spec(step, "text"),
        out=folder / "shrink_run",
        threads=options.get("threads"),
        dtype=options.get("dtype", "auto"),
        trust_remote_code=work.trust_remote_code,
        seed=options["seed"],
        batch=options["batch-size"],
        max_length=options.get("max-length"),
        device=options.get("device"),
    )
    Path(result["model"]).rename(_fresh(out))
    return {key: result[key] for key in ("score", "stages") if key in result}


def _export(work: Work, step: Step, folder: Path, listen: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    (brick,), options = work.things(step, "export"), step.options
    return export(
        brick.spec,
        options["to"],
        _fresh(place(step, folder)),
        base=brick.base,
        rank=options.get("rank"),
        max_rank=options.get("max-rank"),
    )


def _verify(work: Work, step: Step, folder: Path, listen: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    base, adapter = work.spec(step, "base") or "", work.spec(step, "verify") or ""
    found = api.verify(base, adapter, merged=work.spec(step, "merged"), data=work.spec(step, "data"))
    return {"holds": found["holds"], "findings": found["findings"]}


def _compare(work: Work, step: Step, folder: Path, listen: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    options = step.options
    result = api.compare(
        methods=options["compare"],
        out=folder,
        seeds=options["seeds"],
        trials=options["trials"],
        baselines=options["baselines"],
        **_setting(work, step),
    )
    rows = [{key: row.get(key) for key in ("arm", "status", "reason", "score")} for row in result["methods"]]
    if not any(row["status"] == "done" for row, m in zip(rows, result["methods"], strict=True) if not m["trivial"]):
        raise UsageError(f"no arm finished: {rows[0]['reason']}")
    return {"methods": rows, "verdict": result["verdict"]["sentence"], "report": str(folder / "report.html")}


def _fresh(out: Path) -> Path:
    """Clear what a run that was killed just before its end has left in the place of an output."""
    if out.exists():
        shutil.rmtree(out) if out.is_dir() else out.unlink()
    return out


_PERFORM = {
    "tune": _tune,
    "grow": _grow,
    "merge": _merge,
    "shrink": _shrink,
    "data": _data,
    "evaluate": _evaluate,
    "predict": _predict,
    "export": _export,
    "verify": _verify,
    "compare": _compare,
    "audit": audit.perform,
}
