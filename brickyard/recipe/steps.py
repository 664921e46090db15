"""What a recipe may say: its verbs with their options, read strictly and checked as a graph. Imports no torch.

    recipe: a title
    defaults: {base: embedded:pylm-small}       for every step whose verb takes the option
    steps:
      expert: {tune: lora, data: my-data}       a step: a name, one verb with what it takes, options
      merged: {merge: average, bricks: [$expert, other-brick]}     $NAME is what the step NAME leaves

Values are literals. A path is meant from the recipe's own folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from brickyard.core import arm as arms
from brickyard.core import registry
from brickyard.core.errors import BrickyardError, UnknownName, UsageError
from brickyard.core.settings import read_placed

RECIPES = Path(__file__).parent / "embedded"
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*\Z")
_LONGEST_NAME = 40
_WORDS = {"model": "a model", "brick": "a brick", "adapter": "an adapter", "data": "data", "scores": "scores"}


@dataclass(frozen=True)
class Option:
    """What one key of a step takes.

    kind: bool, int, float, str, or dict for a mapping to lists of literals; `many` a list of them; `takes` the kinds of
    output (model, brick, adapter, data) that a $reference may be; empty: it takes no reference.
    """

    kind: type = str
    many: bool = False
    takes: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    needed: bool = False
    default: Any = None


@dataclass(frozen=True)
class Verb:
    """A verb: what stands behind its own name, its further options, what it leaves."""

    head: Option
    options: dict[str, Option]
    leaves: str
    family: str = ""  # of the method that an arm's pieces must be; empty: any that trains
    arm: bool = True


def _of(kind: type = str, **given: Any) -> Option:
    return Option(kind, **given)


_MODEL = _of(takes=("model",))
_NEEDED_MODEL = _of(takes=("model",), needed=True)
_DATA = _of(takes=("data",), needed=True)
_READING = {"task": _of(), "metric": _of(), "max-length": _of(int)}
_RUNNING = {"device": _of(choices=("cpu", "cuda")), "dtype": _of(choices=("auto", "float32", "bfloat16"))}
_TRAINING = {
    "base": _of(takes=("model",), default="embedded:minilm"),
    "data": _DATA,
    "epochs": _of(float),
    "steps": _of(int),
    "seed": _of(int, default=0),
    "batch-size": _of(int),
    "train-rows": _of(int),
    "shots": _of(int),
    "threads": _of(int),
    "checkpoint-every": _of(int, default=200),
    "allow-overlap": _of(bool, default=False),
    "cache": _of(bool, default=True),
    **_READING,
    **_RUNNING,
}

VERBS: dict[str, Verb] = {
    "tune": Verb(_of(needed=True), _TRAINING, "brick"),
    "grow": Verb(_of(needed=True), {**_TRAINING, "base": _NEEDED_MODEL}, "model", family="grow"),
    "merge": Verb(
        _of(needed=True),
        {
            "base": _NEEDED_MODEL,
            "bricks": _of(many=True, takes=("brick", "model", "adapter"), needed=True),
            "as": _of(choices=("model", "adapter"), default="model"),
            "data": _of(many=True, takes=("data",)),
            "search": _of(dict),
            "validate": _of(many=True, takes=("data",)),
            "heads": _of(choices=("own", "base"), default="own"),
            "force": _of(bool, default=False),
            "threads": _of(int),
            "dtype": _of(choices=("float32", "bfloat16", "float16")),
            "device": _RUNNING["device"],
            **_READING,
        },
        "model",
        family="merge",
    ),
    "shrink": Verb(
        _of(needed=True),
        {
            "base": _of(takes=("model",), default="embedded:minilm"),
            "bricks": _of(many=True, takes=("brick",), default=[]),
            "data": _DATA,
            "text": _of(takes=("data",)),
            "seed": _of(int, default=0),
            "batch-size": _of(int, default=32),
            "max-length": _of(int),
            "threads": _of(int),
            **_RUNNING,
        },
        "model",
        family="shrink",
    ),
    "data": Verb(
        _of(needed=True),
        {
            "from": _DATA,
            "text-column": _of(default=""),
            "domain-column": _of(default=""),
            "base": _of(takes=("model",), default="embedded:minilm"),
            "seed": _of(int, default=0),
            "contamination": _of(choices=("remove", "report"), default="remove"),
            "device": _RUNNING["device"],
        },
        "data",
        family="data",
    ),
    "evaluate": Verb(
        _of(many=True, takes=("model", "brick"), needed=True),
        {"data": _of(many=True, takes=("data",), needed=True), **_READING, **_RUNNING},
        "scores",
        arm=False,
    ),
    "predict": Verb(
        _of(takes=("model", "brick"), needed=True),
        {"data": _DATA, "max-length": _of(int), "new-tokens": _of(int), **_RUNNING},
        "scores",
        arm=False,
    ),
    "export": Verb(
        _of(takes=("brick",), needed=True),
        {"to": _of(choices=("peft", "merged"), needed=True), "rank": _of(int), "max-rank": _of(int)},
        "model",
        arm=False,
    ),
    "verify": Verb(
        _of(takes=("brick", "adapter"), needed=True),
        {"base": _NEEDED_MODEL, "merged": _MODEL, "data": _of(takes=("data",))},
        "scores",
        arm=False,
    ),
    "audit": Verb(
        _of(needed=True),
        {
            "base": _NEEDED_MODEL,
            "brick": _of(many=True, takes=("brick", "model")),
            "data": _of(takes=("data",), default="embedded:stdlib-topics"),
            "force": _of(bool, default=False),
            "device": _RUNNING["device"],
        },
        "scores",
        family="audit",
    ),
    "compare": Verb(
        _of(many=True, needed=True),
        {
            **{k: v for k, v in _TRAINING.items() if k not in ("seed", "checkpoint-every")},
            "seeds": _of(int, default=3),
            "trials": _of(int, default=1),
            "threads": _of(int, default=1),
            "baselines": _of(bool, default=True),
        },
        "scores",
    ),
}


@dataclass(frozen=True)
class Step:
    """One step as written: its verb, its options by name (the verb's own value under the verb), and their lines."""

    name: str
    verb: str
    options: dict[str, Any]
    line: int
    lines: dict[str, int] = field(default_factory=dict)

    @property
    def leaves(self) -> str:
        """The kind of thing that the step leaves."""
        if (self.verb, self.options.get("to")) == ("export", "peft") or self.options.get("as") == "adapter":
            return "adapter"
        return VERBS[self.verb].leaves

    @property
    def what(self) -> str:
        """The verb and what it works with, in a few words."""
        head = self.options[self.verb]
        said = ", ".join(map(str, head)) if isinstance(head, list) else str(head)
        if self.verb == "evaluate":
            counts = (len(head), "models"), (len(self.options["data"]), "data sets")
            return "evaluate " + " on ".join(f"{n} {w if n > 1 else w[:-1]}" for n, w in counts)
        return f"{self.verb} {said}" + (f" to {self.options['to']}" if self.verb == "export" else "")

    def option(self, name: str) -> Option:
        """Return what the option of that name takes."""
        return VERBS[self.verb].head if name == self.verb else VERBS[self.verb].options[name]

    def inputs(self) -> Iterator[tuple[str, str]]:
        """Yield (option, value) of everything that the step reads: references and what lies outside."""
        for name, value in self.options.items():
            if self.option(name).takes and value is not None:
                for item in value if isinstance(value, list) else [value]:
                    yield name, item

    @property
    def needs(self) -> list[str]:
        """The steps whose output this one reads, each once."""
        return list(dict.fromkeys(value[1:] for _, value in self.inputs() if value.startswith("$")))


@dataclass(frozen=True)
class Recipe:
    """A recipe that was read and whose graph holds; `steps` in an order in which each comes after what it needs."""

    title: str
    file: Path
    text: str
    steps: dict[str, Step]

    def fault(self, step: Step, option: str, said: object) -> UsageError:
        """Return the error for one option of a step, with its line."""
        return UsageError(f"{self.file}, line {step.lines.get(option, step.line)}: step {step.name}: {said}")

    def outside(self, value: str) -> str:
        """Return a model, data set or brick that no step makes: an embedded one, a hub id, or a path from here."""
        path = Path(value).expanduser()
        beside = path if path.is_absolute() else self.file.parent / path
        return str(beside.resolve()) if beside.exists() else value


def find(spec: str | Path) -> Path:
    """Return the file that a recipe's name means: a path, or `embedded:NAME` for one that comes along."""
    text = str(spec)
    if text.startswith("embedded:"):
        known = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
        name = text.removeprefix("embedded:")
        if name not in known:
            raise UnknownName.among("embedded recipe", name, known)
        return known[name]
    if not Path(text).expanduser().is_file():
        raise UsageError(f"{text}: no such file; expected a recipe (YAML), or embedded:NAME such as embedded:mediphi.")
    return Path(text).expanduser()


def read(spec: str | Path) -> Recipe:
    """Read a recipe and check everything that can be known without opening models or data.

    Raises UsageError, or UnknownName with the nearest names: one sentence with the line.
    """
    path = find(spec)
    values, lines = read_placed(path)
    for key in values:
        if key not in ("recipe", "defaults", "steps"):
            raise UnknownName.among(f"key in {path}, line {lines[key,]}:", key, ("recipe", "defaults", "steps"))
    title = values.get("recipe", path.stem)
    if not isinstance(title, str):
        raise UsageError(f"{path}, line {lines['recipe',]}: recipe: a title was expected, as text.")
    given = values.get("steps")
    if not isinstance(given, dict) or not given:
        raise UsageError(f"{path}: no steps; expected a mapping steps: of names to steps.")
    defaults = values.get("defaults") or {}
    if not isinstance(defaults, dict):
        raise UsageError(f"{path}, line {lines['defaults',]}: defaults: expected option: value lines.")
    steps, used = {}, set()
    for name, body in given.items():
        steps[name] = _step(path, name, body, lines)
        options = VERBS[steps[name].verb].options
        for key in (defaults.keys() & options.keys()) - steps[name].options.keys():
            used.add(key)
            steps[name].options[key] = defaults[key]
            steps[name].lines[key] = lines["defaults", key]
        used |= defaults.keys() & steps[name].lines.keys()
    for key in defaults.keys() - used:
        known = {option for step in steps.values() for option in VERBS[step.verb].options}
        raise UnknownName.among(f"default in {path}, line {lines['defaults', key]}:", key, known)
    recipe = Recipe(title, path, path.read_text(encoding="utf-8"), steps)
    for step in steps.values():
        _complete(recipe, step)
    return Recipe(title, path, recipe.text, {name: steps[name] for name in ordered(recipe)})


def _step(path: Path, name: str, body: Any, lines: Mapping[tuple[str | int, ...], int]) -> Step:
    where = f"{path}, line {lines['steps', name]}"
    if not _NAME.match(name) or len(name) > _LONGEST_NAME:
        raise UsageError(
            f"{where}: {name!r} is no name of a step; use up to {_LONGEST_NAME} small letters, digits and hyphens."
        )
    if not isinstance(body, dict) or not body:
        raise UsageError(f"{where}: step {name}: expected a verb and its options, such as {{tune: lora, data: D}}.")
    # `data` is a verb of its own and an option of the others.
    verbs = [key for key in body if key in VERBS and key != "data"] or [
        k for k in body if k == "data" and "from" in body
    ]
    if len(verbs) > 1:
        raise UsageError(f"{where}: step {name} names {' and '.join(verbs)}; a step does one thing.")
    if not verbs:
        options = {option for verb in VERBS.values() for option in verb.options}
        odd = next((key for key in body if key not in options), None)
        if odd is None:
            raise UsageError(f"{where}: step {name} has no verb; one of {', '.join(VERBS)} is needed.")
        raise UnknownName.among(f"verb in {path}, line {lines['steps', name, odd]}: step {name}:", odd, VERBS)
    (verb,) = verbs
    places = {key: lines["steps", name, key] for key in body}
    for key in body:
        if key != verb and key not in VERBS[verb].options:
            what = f"option of {verb} in {path}, line {places[key]}: step {name}:"
            raise UnknownName.among(what, key, VERBS[verb].options)
    return Step(name, verb, dict(body), lines["steps", name], places)


def _complete(recipe: Recipe, step: Step) -> None:
    """Check the types of a step's options, its references and its arms, and fill in the defaults."""
    verb = VERBS[step.verb]
    for name, option in {step.verb: verb.head, **verb.options}.items():
        value = step.options.get(name)
        if value is None:
            if option.needed:
                raise recipe.fault(step, name, f"{name} is missing.")
            if option.default is not None:
                step.options[name] = option.default
            continue
        step.options[name] = value = _typed(recipe, step, name, value, option)
        for item in value if isinstance(value, list) else [value]:
            if option.takes and str(item).startswith("$"):
                _reference(recipe, step, name, item, option)
    if step.options.get("epochs") and step.options.get("steps"):
        raise recipe.fault(step, "steps", "epochs and steps both say how long to train; give one.")
    if verb.arm:
        head = step.options[step.verb]
        for text in head if isinstance(head, list) else [head]:
            _arm(recipe, step, text, verb.family)
    if step.verb == "merge":
        _search(recipe, step)


def _typed(recipe: Recipe, step: Step, name: str, value: Any, option: Option) -> Any:
    if option.many:
        items = value if isinstance(value, list) else [value]
        if not items:
            raise recipe.fault(step, name, f"{name} is empty.")
        one = Option(option.kind, takes=option.takes, choices=option.choices)
        return [_typed(recipe, step, name, item, one) for item in items]
    if option.kind is float and type(value) is int:
        value = float(value)
    if type(value) is not option.kind:
        expected = {dict: "a mapping", str: "text", int: "a whole number", float: "a number", bool: "true or false"}
        raise recipe.fault(step, name, f"{name}: {value!r} was given; {expected[option.kind]} was expected.")
    if option.kind in (int, float) and value <= 0 and name != "seed":
        raise recipe.fault(step, name, f"{name}: {value} was given; a number above 0 was expected.")
    if option.choices and value not in option.choices:
        raise recipe.fault(step, name, UnknownName.among(name, value, option.choices))
    return value


def _reference(recipe: Recipe, step: Step, name: str, value: str, option: Option) -> None:
    other = recipe.steps.get(value[1:])
    if other is None:
        raise recipe.fault(step, name, UnknownName.among(f"step in {name}:", value[1:], recipe.steps))
    if other.leaves not in option.takes:
        wanted = " or ".join(_WORDS[kind] for kind in option.takes)
        hint = (
            " Merge it or export it (to: merged) first." if other.leaves == "brick" and "model" in option.takes else ""
        )
        raise recipe.fault(step, name, f"{name}: {value} leaves {_WORDS[other.leaves]}; {wanted} was expected.{hint}")


def _arm(recipe: Recipe, step: Step, text: str, family: str) -> None:
    try:
        found = arms.parse(text)
        for piece in found.pieces:
            registry.check_options(registry.find(piece.name, family or None).record.name, piece.options)
    except BrickyardError as error:
        raise recipe.fault(step, step.verb, error) from None


def _search(recipe: Recipe, step: Step) -> None:
    """Check what a merge searches: options of its first piece, each with several literals, and data to validate on."""
    search = step.options.get("search")
    if (search is None) != (step.options.get("validate") is None):
        raise recipe.fault(step, "search", "search and validate belong together: options to try, data to choose on.")
    if search is None:
        return
    first = arms.parse(step.options["merge"]).pieces[0]
    for key, values in search.items():
        if not isinstance(values, list) or not values or any(isinstance(v, dict | list) for v in values):
            raise recipe.fault(step, "search", f"search: {key}: expected a list of values to try.")
        if key in first.options:
            raise recipe.fault(step, "search", f"search: {key} is fixed in {step.options['merge']} already.")
        try:
            registry.check_options(first.name, {key: values[0]})
        except BrickyardError as error:
            raise recipe.fault(step, "search", f"search: {error}") from None
    if step.options["as"] != "model":
        raise recipe.fault(step, "as", "a search tries models; leave out as: adapter.")


def ordered(recipe: Recipe) -> list[str]:
    """Return the steps' names so that each comes after what it needs, otherwise as written; a cycle is an error."""
    done: list[str] = []
    under: list[str] = []

    def visit(name: str) -> None:
        if name in done:
            return
        if name in under:
            circle = [*under[under.index(name) :], name]
            step = recipe.steps[circle[-2]]
            option = next(key for key, value in step.inputs() if value == f"${name}")
            raise recipe.fault(step, option, f"the steps need each other in a circle: {' <- '.join(circle)}.")
        under.append(name)
        for other in recipe.steps[name].needs:
            visit(other)
        done.append(under.pop())

    for name in recipe.steps:
        visit(name)
    return done
