"""The comparison itself: probe every arm, fix the plan, search, retrain with several seeds, judge, write the result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from brickyard.compare import plan as planning
from brickyard.compare import privacy
from brickyard.compare.ledger import Ledger
from brickyard.compare.plan import Contestant, Request
from brickyard.compare.results import UNTOUCHED, assemble, slug
from brickyard.core import measure
from brickyard.core.arm import parse
from brickyard.core.base import Base, open_base
from brickyard.core.batches import encode
from brickyard.core.build import resolve
from brickyard.core.checkpoint import same_or_refuse
from brickyard.core.data import Data, read_data
from brickyard.core.errors import BadData, Refused
from brickyard.core.files import Lock, write_json
from brickyard.core.influence import MINIMUM_EXAMPLES
from brickyard.core.jobs import Engine, Job, Outcome, engine
from brickyard.core.registry import code_digest
from brickyard.core.split import assert_shots
from brickyard.core.task import Task, task_of

LIMIT = 15.0  # a trial may take this many times the seconds predicted for it
FLOOR = 900.0  # seconds; no trial's limit is below

Listener = Callable[[dict[str, Any]], None]


def compare(
    request: Request,
    out: Path | None = None,
    *,
    arms: list[Contestant] | None = None,
    listen: Listener = lambda event: None,
    allow_change: Sequence[str] = (),
    command: str = "",
) -> tuple[dict[str, Any], Path]:
    """Run or resume a comparison; return its result and the folder that holds it.

    `arms` stands in place of the contestants that the request's methods would give (claims bring their own).
    `listen` gets events {"event": "plan"|"start"|"trial"|"done", ...} for a progress display. Raises Changed when the
    folder was made with another request, data or code, and Locked when another process is using it.
    """
    arms = planning.contestants(request) if arms is None else arms
    data = read_data(
        request.data,
        task=request.task,
        metric=request.metric,
        need=("train", "test"),
        allow_overlap=request.allow_overlap,
    )
    task = task_of(data, kind=request.task, metric=request.metric)
    if len(data.splits["test"]) < MINIMUM_EXAMPLES and task.kind != "causal-lm":
        raise BadData(
            f"{data.name} has {len(data.splits['test'])} test rows, too few to tell methods apart; "
            f"expected at least {MINIMUM_EXAMPLES}. Move rows from train to test."
        )
    if request.shots:
        labels = data.splits["train"]["label"] if task.labels else None
        assert_shots(labels, task.labels, request.shots, request.train_rows)
    base = open_base(request.base, trust_remote_code=request.trust_remote_code)
    _refuse_few_pieces(data, task, base, request.max_length)
    folder = out or planning.default_folder(request, data.fingerprint)
    folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder / "run.lock"):
        identity = {
            "request": json.loads(json.dumps(asdict(request))),
            "data": data.fingerprint,
            "base": base.fingerprint,
            "code": code_digest(),
            "versions": versions(),
        }
        run = _Run(request, arms, folder, listen)
        run.refuse(task)
        plan = run.fix_plan(identity, allow_change)
        listen({"event": "plan", "plan": plan, "folder": str(folder), "data": data, "base": base, "task": task})
        run.search(plan)
        run.final(plan)
        searched = run.ledger.seconds("search")
        said, failed = run.untouched(plan)
        untouched = None if said is None else _answers(said)["prediction"]
        rows = [*run.rows(plan), *failed]
        result = assemble(rows, plan, data, base, task, command, search_seconds=searched, untouched=untouched)
        if (spent := privacy.total(run.ledger.started())) is not None:
            result["privacy"] = spent
        run.keep_best(result, said)
        write_json(folder / "result.json", result)
        listen({"event": "done", "result": result})
    return result, folder


def _refuse_few_pieces(data: Data, task: Task, base: Base, max_length: int | None) -> None:
    """Raise BadData where a language model's test documents are too few, cut into pieces too."""
    if task.kind != "causal-lm" or len(data.splits["test"]) >= MINIMUM_EXAMPLES:
        return
    found = encode(data.splits["test"], base, task, max_length=max_length).report
    if found["units"] < MINIMUM_EXAMPLES:
        raise BadData(
            f"{data.name} has {found['documents']} test documents, {found['units']} pieces of at most "
            f"{found['longest']} tokens, too few to tell methods apart; expected at least {MINIMUM_EXAMPLES} documents "
            "or pieces. Move text from train to test, or give a smaller --max-length."
        )


def versions() -> dict[str, Any]:
    """Return the versions of what decides numbers beside this package."""
    return {k: v for k, v in measure.environment().items() if k in ("python", "torch", "transformers", "peft", "numpy")}


class _Run:
    """One run folder while it is being filled."""

    def __init__(self, request: Request, arms: list[Contestant], folder: Path, listen: Listener) -> None:
        self.request, self.arms, self.folder, self.listen = request, arms, folder, listen
        self.ledger = Ledger(folder)
        self.refused: dict[str, str] = {}
        self.workers = planning.workers_of(request)
        self.engine: Engine = engine(request.engine, self.workers, request.threads)

    def _goodness(self, score: float | None) -> float:
        return -np.inf if score is None else self.task.goodness(score)

    def refuse(self, task: Task) -> None:
        """Find out, before anything runs, which arms do not fit the task or themselves."""
        self.task = task
        for arm in list(self.arms):
            try:
                resolve(parse(arm.arm), task)
            except Refused as error:
                if arm.trivial:
                    self.arms.remove(arm)  # a baseline that joined by itself and has no meaning here
                else:
                    self.refused[arm.name] = str(error)

    def _probe_of(self, arm: Contestant, key: str) -> Job:
        return Job(
            key=key,
            function="brickyard.core.trial:probe",
            argument={"setting": self.request.setting(arm.arm, 0, **arm.changes)},
            threads=self.request.threads,
            seconds=600,
            memory=self.request.memory,
            log=str(self.folder / "probe.log"),
            alone=True,
        )

    def fix_plan(self, identity: dict[str, Any], allow_change: Sequence[str]) -> dict[str, Any]:
        """Return the stored plan if there is one (refusing other requests), else probe, decide and store it."""
        path = self.folder / "plan.json"
        if path.is_file():
            plan = json.loads(path.read_text(encoding="utf-8"))
            allowed = same_or_refuse(plan["identity"], identity, allow_change, str(path))
            if allowed:
                plan.setdefault("allowed_changes", []).append({"at": _now(), "changes": allowed})
                write_json(path, plan)
            return self._probe_again(plan, path)
        probes, failed = self._probe([arm for arm in self.arms if arm.name not in self.refused])
        shares, trials = dict.fromkeys(probes, 1.0), self.request.trials
        sentence = "full training"
        if self.request.minutes is not None and probes:
            shares, trials, sentence = planning.shorten(self.request, probes, self.workers)
        predicted = planning.parts(self.request, probes, shares, trials, self.workers)
        if self.request.minutes is None:
            settings = "1 setting" if trials == 1 else f"up to {trials} settings"
            minutes = sum(predicted.values()) / 60
            about = f"about {minutes:.0f} minutes" if minutes >= 1.5 else f"about {60 * minutes:.0f} seconds"
            sentence = f"{sentence}, {settings} an arm; {about} predicted"
        plan = {
            "identity": identity,
            "created": _now(),
            "shares": shares,
            "trials": trials,
            "search": self.request.search,
            "seeds": self.request.seeds,
            "shots": self.request.shots,
            "threads": self.request.threads,
            "workers": self.workers,
            "sentence": sentence,
            "predicted_seconds": predicted,
            "probes": probes,
            "failed": failed,
            "refused": self.refused,
            "environment": measure.environment(),
            "arms": [
                {
                    "name": a.name,
                    "arm": a.arm,
                    "settings": a.settings[:trials],
                    "seeds": a.seeds,
                    "trivial": a.trivial,
                    "changes": a.changes,
                }
                for a in self.arms
            ],
        }
        write_json(path, plan)
        return json.loads(path.read_text(encoding="utf-8"))

    def _probe(self, arms: Sequence[Contestant]) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
        """Probe the arms one at a time; return what was measured and, of the others, status and reason."""
        probes: dict[str, Any] = {}
        failed: dict[str, dict[str, str]] = {}
        jobs: dict[str, Job] = {}
        # The copy in an A/A comparison costs what its twin costs.
        twin = {arm.name: str((arm.arm, sorted(arm.changes.items()))) for arm in arms}
        for arm in arms:
            jobs.setdefault(twin[arm.name], self._probe_of(arm, key=twin[arm.name]))
        self.listen({"event": "probe", "arms": len(jobs)})
        ended = {outcome.key: outcome for outcome in self.engine.run(list(jobs.values()))}
        for name, key in twin.items():
            if ended[key].status == "done":
                probes[name] = ended[key].value
            else:
                failed[name] = {"status": ended[key].status, "reason": ended[key].reason}
        return probes, failed

    def _probe_again(self, plan: dict[str, Any], path: Path) -> dict[str, Any]:
        """Give arms whose probe crashed or ran out of time another try; what was planned for the others stays."""
        ended = {name: failed["status"] for name, failed in plan["failed"].items()}
        again = [arm for arm in self.arms if ended.get(arm.name) in ("failed", "timeout")]
        if again:
            probes, failed = self._probe(again)
            plan["probes"] |= probes
            plan["failed"] = {k: v for k, v in plan["failed"].items() if k not in probes} | failed
            # Its time was not reserved, so it is trained no longer than the arm that was shortened most.
            plan["shares"] |= dict.fromkeys(probes, min(plan["shares"].values(), default=1.0))
            known = plan["probes"], plan["shares"], plan["trials"], plan["workers"]
            plan["predicted_seconds"] = planning.parts(self.request, *known)
            write_json(path, plan)
        return plan

    @staticmethod
    def _limit(plan: dict[str, Any], name: str) -> float:
        """Return the seconds that one run of an arm may take; it may have to build its states and its curriculum."""
        # The untouched base has no probe: reading the test set takes no longer than a run that trains before it does.
        probes = {name: plan["probes"][name]} if name in plan["probes"] else plan["probes"]
        once = max(
            planning.trial_seconds(probe, plan["shares"][arm], plan["workers"])
            + planning.states_seconds({arm: probe})
            + probe.get("curriculum_seconds", 0.0)
            for arm, probe in probes.items()
        )
        return max(FLOOR, LIMIT * once)

    def _argument(
        self, plan: dict[str, Any], arm: dict[str, Any], point: dict[str, Any], seed: int, role: str, rung: float = 1.0
    ) -> dict[str, Any]:
        text = planning.with_setting(arm["arm"], point)
        known = plan["probes"][arm["name"]]
        setting = self.request.setting(text, seed, **arm["changes"])
        share = rung * plan["shares"][arm["name"]]
        if share < 1.0:
            training = known["training"]
            per_epoch = -(-known["rows"] // known["batch"])
            steps = training["steps"] or training["epochs"] * per_epoch
            setting["training"] = {**setting["training"], "steps": max(1, round(steps * share))}
        return {"setting": setting, "role": role}

    def _go(
        self, plan: dict[str, Any], wanted: list[tuple[dict[str, Any], dict[str, Any]]]
    ) -> dict[str, dict[str, Any]]:
        """Run the jobs among `wanted` (arm, argument) that are not finished yet; return key -> ledger row for all."""
        rows: dict[str, dict[str, Any]] = {}
        jobs: list[Job] = []
        about: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
        for arm, argument in wanted:
            key = planning.key_of({"argument": argument, "name": arm["name"]})
            about[key] = (arm, argument)
            done = self.ledger.finished(key)
            # A refusal is final; what crashed or ran out of time or memory deserves another try under the same command.
            if done is not None and done["status"] in ("done", "refused"):
                rows[key] = done
                continue
            folder = self.ledger.begin(key)
            jobs.append(
                Job(
                    key=key,
                    function="brickyard.core.trial:run",
                    threads=plan["threads"],
                    memory=self.request.memory,
                    argument={**argument, "folder": str(folder), "code": plan["identity"]["code"]},
                    seconds=self._limit(plan, arm["name"]),
                    log=str(folder / "log.txt"),
                )
            )
        self.listen({"event": "start", "jobs": len(jobs), "finished": len(rows)})
        for outcome in self.engine.run(jobs):
            arm, argument = about[outcome.key]
            row = self._row(outcome, arm, argument)
            self.ledger.write(outcome.key, row)
            rows[outcome.key] = row
            self.listen({"event": "trial", "row": row})
        return rows

    @staticmethod
    def _row(outcome: Outcome, arm: dict[str, Any], argument: dict[str, Any]) -> dict[str, Any]:
        return {
            "name": arm["name"],
            "role": argument["role"],
            "seed": argument["setting"]["seed"],
            "arm": argument["setting"]["arm"],
            "status": outcome.status,
            "reason": outcome.reason,
            "seconds": outcome.seconds,
            "peak_resident_bytes": outcome.peak,
            "finished": _now(),
            "value": outcome.value,
        }

    def _able(self, plan: dict[str, Any]) -> list[dict[str, Any]]:
        return [arm for arm in plan["arms"] if arm["name"] in plan["probes"]]

    def search(self, plan: dict[str, Any]) -> None:
        """Choose a setting for each arm on validation with seed 0; write choices.json."""
        path = self.folder / "choices.json"
        chosen = self.choices() if path.is_file() else {}
        arms = [arm for arm in self._able(plan) if arm["name"] not in chosen]
        shares = planning.RUNGS if plan["search"] == "halving" else (1.0,)
        alive = {arm["name"]: list(range(len(arm["settings"]))) for arm in arms}
        scores: dict[str, dict[str, Any]] = {name: {} for name in alive}
        for share in shares:
            wanted, places = [], []
            for arm in arms:
                if len(alive[arm["name"]]) > 1:
                    for i in alive[arm["name"]]:
                        wanted.append((arm, self._argument(plan, arm, arm["settings"][i], 0, "search", share)))
                        places.append((arm["name"], i))
            rows = self._go(plan, wanted)
            for (name, i), (arm, argument) in zip(places, wanted, strict=True):
                row = rows[planning.key_of({"argument": argument, "name": arm["name"]})]
                value = row["value"] if row["status"] == "done" else {}
                scores[name][str(i)] = {
                    "share": share,
                    "validation": value.get("validation"),
                    "validation_loss": value.get("validation_loss"),
                    "status": row["status"],
                    "reason": row["reason"],
                }
            for name, left in alive.items():
                if len(left) > 1:
                    # A stable sort, so that equals keep the earlier setting: the default stands first.
                    best = sorted(left, key=lambda i, n=name, s=share: rank(scores[n][str(i)], s, self.task))
                    alive[name] = best[: max(1, -(-len(best) // planning.KEEP))] if share != shares[-1] else best[:1]
        for arm in arms:
            best = alive[arm["name"]][0]
            chosen[arm["name"]] = {"setting": arm["settings"][best], "tried": scores[arm["name"]]}
        if arms or not path.is_file():
            self._measure(chosen)
            write_json(path, chosen)

    def _measure(self, chosen: dict[str, Any]) -> None:
        """Add the probe of each setting that costs other than the arm's own: of other options or rows a step."""
        dear = {name: {k: v for k, v in c["setting"].items() if "." in k or k == "batch"} for name, c in chosen.items()}
        again = [
            replace(arm, arm=planning.with_setting(arm.arm, dear[arm.name]))
            for arm in self.arms
            if dear.get(arm.name) and "probe" not in chosen[arm.name]
        ]
        for name, probe in self._probe(again)[0].items() if again else ():
            chosen[name]["probe"] = probe

    def choices(self) -> dict[str, Any]:
        """Return what the search chose."""
        return json.loads((self.folder / "choices.json").read_text(encoding="utf-8"))

    def _finals(self, plan: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        chosen = self.choices()
        # Seeds outermost, so that every arm has its first seed early and a failing arm is known soon.
        able = self._able(plan)
        most = max((len(arm["seeds"]) for arm in able), default=0)
        return [
            (arm, self._argument(plan, arm, chosen[arm["name"]]["setting"], arm["seeds"][k], "final"))
            for k in range(most)
            for arm in able
            if k < len(arm["seeds"])
        ]

    def final(self, plan: dict[str, Any]) -> None:
        """Retrain every arm's chosen setting with all its seeds."""
        self._go(plan, self._finals(plan))

    def untouched(self, plan: dict[str, Any]) -> tuple[Path | None, list[dict[str, Any]]]:
        """Write what the base says without any training, where it can answer: language models.

        Returns the file, or None and, of a run that did not end well, one entry as `rows` gives them.
        """
        able = self._able(plan)
        if not (self.task.generative and self.task.kind != "preference" and self.request.baselines and able):
            return None, []
        arm = {**able[0], "name": UNTOUCHED}
        argument = {"setting": self.request.setting(able[0]["arm"], 0), "role": "untouched"}
        [(key, row)] = self._go(plan, [(arm, argument)]).items()
        if row["status"] == "done":
            return self.ledger.trial(key) / "answers.parquet", []
        # It is no arm of the command; its row says so by a name that no method has.
        known = {"name": UNTOUCHED, "arm": UNTOUCHED.replace(" ", "-"), "trivial": True, "trials": []}
        return None, [{**known, "status": row["status"], "reason": row["reason"], "trained_share": 1.0}]

    def rows(self, plan: dict[str, Any]) -> list[dict[str, Any]]:
        """Return one entry per contestant: its status, its final trials in the order of the seeds, their answers."""
        chosen, out = self.choices(), []
        finals: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        for arm, argument in self._finals(plan):
            key = planning.key_of({"argument": argument, "name": arm["name"]})
            row = self.ledger.finished(key)
            assert row is not None
            finals.setdefault(arm["name"], []).append((key, row))
        for arm in plan["arms"]:
            name = arm["name"]
            entry: dict[str, Any] = {
                "name": name,
                "arm": arm["arm"],
                "trivial": arm["trivial"],
                "trials": [],
                "status": "done",
                "reason": "",
                "trained_share": plan["shares"].get(name, 1.0),
            }
            if name in plan["refused"]:
                entry |= {"status": "refused", "reason": plan["refused"][name]}
            elif name in plan["failed"]:
                entry |= plan["failed"][name]
            else:
                entry["setting"], entry["tried"] = chosen[name]["setting"], chosen[name]["tried"]
                entry["keys"] = [key for key, _ in finals[name]]
                entry["trials"] = [row for _, row in finals[name]]
                bad = next((row for row in entry["trials"] if row["status"] != "done"), None)
                if bad is not None:
                    entry |= {"status": bad["status"], "reason": f"seed {bad['seed']}: {bad['reason']}"}
                else:
                    entry["answers"] = [_answers(self.ledger.trial(key) / "answers.parquet") for key, _ in finals[name]]
                entry["probe"] = chosen[name].get("probe", plan["probes"][name])
            out.append(entry)
        return out

    def keep_best(self, result: dict[str, Any], untouched: Path | None) -> None:
        """Move the best seed's brick (by validation) of each arm to bricks/, drop all others, and keep all answers.

        An arm with a seed that the same command would try again keeps the bricks of all seeds until then.
        """
        plan = json.loads((self.folder / "plan.json").read_text(encoding="utf-8"))
        kept = {row["arm"]: row for row in result["methods"]}
        held: set[str] = set()
        for entry in self.rows(plan):
            if entry["status"] != "done":
                held.update(entry.get("keys", ()) if entry["status"] != "refused" else ())
                continue
            best = max(
                range(len(entry["keys"])), key=lambda i, e=entry: self._goodness(e["trials"][i]["value"]["validation"])
            )
            target = self.folder / "bricks" / slug(entry["name"], entry["arm"])
            source = self.ledger.trial(entry["keys"][best]) / "brick"
            if source.is_dir():
                target.parent.mkdir(exist_ok=True)
                shutil.rmtree(target, ignore_errors=True)
                source.replace(target)
            if target.is_dir():
                kept[entry["name"]]["brick"] = str(target.relative_to(self.folder))
            answers = self.folder / "answers" / target.name
            answers.mkdir(parents=True, exist_ok=True)
            for key, row in zip(entry["keys"], entry["trials"], strict=True):
                shutil.copyfile(self.ledger.trial(key) / "answers.parquet", answers / f"seed{row['seed']}.parquet")
        if untouched is not None and UNTOUCHED in kept:  # it has no row where no arm is done
            answers = self.folder / kept[UNTOUCHED]["answers"]
            answers.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(untouched, answers / "seed0.parquet")
        self.ledger.forget_bricks(held)


def rank(found: dict[str, Any], share: float, task: Task) -> tuple[float, float]:
    """Order settings by what training with them gave, the best first: by score, then by loss.

    Where training was cut short (`share` < 1), by loss first: it has often not left the majority class yet, so that
    all settings score alike, while their losses differ. What failed comes last.
    """
    score = np.inf if found["validation"] is None else -task.goodness(found["validation"])
    loss = np.inf if found["validation_loss"] is None else found["validation_loss"]
    return (score, loss) if share == 1.0 else (loss, score)


def _answers(path: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(path, columns=["label", "prediction"])
    return {name: table[name].to_numpy() for name in ("label", "prediction")}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
