"""The command line. The verb and the method are parsed without importing torch; what runs is imported afterwards."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from brickyard import __version__
from brickyard.core.errors import BrickyardError, UsageError
from brickyard.option_types import positive, size

VERBS = {
    "compare": "run several methods side by side on your model and data, and say which to use",
    "tune": "train one arm and keep it as a brick",
    "grow": "train a new model that grows: under a sparse mask that is lifted later (grow spdf), or part by part (grow "
    "model-assembling)",
    "merge": "combine models fine-tuned from one base into one, and say which tasks it kept",
    "route": "keep several fine-tuned models of one base in one folder and choose among them prompt by prompt",
    "data": "filter, de-duplicate, mix or select the rows of a data set, with a card of what was dropped and why",
    "shrink": "make a smaller model of the same kind that keeps what a larger one can do",
    "evaluate": "score a base, with or without a brick, on test data",
    "predict": "write predictions for unlabelled rows",
    "audit": "measure what a change did to a model, layer by layer or tensor by tensor",
    "verify": "check anybody's PEFT adapter, and a merged model, for silent failures",
    "plan": "estimate memory and time of arms from a three-step probe",
    "run": "run a recipe: a graph of steps in one YAML file, of which only what changed runs again",
    "methods": "list the methods",
    "show": "explain one method: equation, options, measured claims",
    "check": "re-measure methods' headline claims here",
    "report": "write the HTML report of a finished comparison again",
    "export": "turn a brick into a plain PEFT adapter or a merged model",
    "bricks": "list the bricks made for a base: what each costs, improves and damages; find, replace or remove some",
    "cache": "list or clear the cache",
}


class Parser(argparse.ArgumentParser):
    """argparse that names the nearest option and never abbreviates."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. See: {self.prog} --help")

    def known(self) -> list[str]:
        """Return the long options."""
        return [text for action in self._actions for text in action.option_strings if text.startswith("--")]


def _input(p: Parser, *, data: bool = True) -> None:
    p.add_argument("--base", default="embedded:minilm", help="a model folder, a hub id, or embedded:NAME")
    if data:
        p.add_argument("--data", help="a folder with train/validation/test files, a hub id, or embedded:NAME")
    p.add_argument("--trust-remote-code", action="store_true", help="let a hub model run its own Python here")


def _common(p: Parser) -> None:
    g = p.add_argument_group("common")
    g.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    g.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="compute type of training")
    g.add_argument("--threads", type=positive(int), help="threads a trial (compare) or in all")
    g.add_argument("--batch-size", type=positive(int), help="rows an optimiser step")
    g.add_argument("--max-length", type=positive(int), help="tokens a row; longer rows are truncated and counted")
    g.add_argument("--task", help="override the task that the columns imply")
    g.add_argument("--metric", help="accuracy, macro-f1, matthews or spearman")
    g.add_argument("--config", metavar="FILE", help="a YAML or TOML file of these options; the command line wins")
    g.add_argument("--no-cache", action="store_true", help="keep hidden states in memory only (private data)")
    g.add_argument("--allow-overlap", action="store_true", help="go on although many test rows also stand in train")


def _training(p: Parser) -> None:
    g = p.add_argument_group("training")
    g.add_argument("--epochs", type=positive(float), help="default: the method's, and of few rows at least 100 steps")
    g.add_argument("--steps", type=positive(int), help="optimiser steps, in place of --epochs")
    g.add_argument("--train-rows", type=positive(int), help="train on a fixed random subset of this many rows")
    g.add_argument("--shots", type=positive(int), help="train on this many rows of each class, others for every seed")
    g.add_argument("--allow-change", nargs="+", default=[], metavar="KEY", help="resume with these settings changed")


def _compare(p: Parser) -> None:
    _input(p)
    p.add_argument("--methods", nargs="+", metavar="ARM", help="e.g. lora:r=16 moment-probing 'lora + moment-probing'")
    p.add_argument("--minutes", type=positive(float), help="fit everything into about this time")
    p.add_argument("--memory", type=size, help="limit of a trial's private memory, e.g. 4GiB")
    p.add_argument("--seeds", type=positive(int), default=3, help="final runs of each arm (default 3)")
    p.add_argument(
        "--trials", type=positive(int), default=1, help="settings searched for each arm (default 1: its default)"
    )
    p.add_argument("--search", choices=("random", "halving"), default="random")
    p.add_argument("--retain", metavar="D2", help="measure what is forgotten of this data set")
    p.add_argument("--engine", choices=("local", "ray"), default="local")
    p.add_argument("--workers", type=positive(int), help="trials side by side (default: cores / threads)")
    p.add_argument("--out", metavar="DIR", help="default: runs/<hash of the command and data>")
    p.add_argument("--no-baselines", action="store_true", help="leave out the linear probe that joins every table")
    p.add_argument("--json", action="store_true", help="print result.json instead of the table")
    _training(p)
    _common(p)


def _tune(p: Parser) -> None:
    p.add_argument("arm", metavar="ARM", help="e.g. lora:r=16,lr=1e-3; a method's options may also follow as --r 16")
    _input(p)
    p.add_argument("--out", metavar="DIR", help="folder of the run; the brick is OUT/brick")
    _one_run(p)


def _grow(p: Parser) -> None:
    p.add_argument("arm", metavar="ARM", help="e.g. spdf:sparsity=0.75; its options may also follow as --sparsity 0.75")
    p.add_argument(
        "--base",
        required=True,
        help="a model's folder, a hub id, or embedded:NAME; it gives the architecture and the tokenizer (or image "
        "processor), and its weights are drawn anew (with spdf:start=base they are the start)",
    )
    p.add_argument("--data", required=True, help="a folder with train files, a hub id, or embedded:NAME")
    p.add_argument("--trust-remote-code", action="store_true", help="let a hub model run its own Python here")
    p.add_argument("--out", metavar="DIR", required=True, help="a new folder; it becomes a model for any --base")
    _one_run(p)


def _merge(p: Parser, package: str = "merging") -> None:
    _input(p, data=False)
    importlib.import_module(f"brickyard.{package}.command").options(p, positive(int))


def _route(p: Parser) -> None:
    _merge(p, "routing")


def _run(p: Parser) -> None:
    importlib.import_module("brickyard.recipe.command").options(p)


def _one_run(p: Parser) -> None:
    p.add_argument("--minutes", type=positive(float), help="train about this long, in place of --epochs")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--checkpoint-every", type=positive(int), default=200, help="steps between checkpoints")
    p.add_argument("--json", action="store_true")
    _training(p)
    _common(p)


def _data(p: Parser) -> None:
    p.add_argument("step", metavar="STEP", help="dedup, quality-filter, select, mix, meta-tuning, fix-commits, ...")
    p.add_argument(
        "--data",
        help="a folder of split files, a file, a hub id, embedded:NAME, a task file, or a git repository",
        required=True,
    )
    p.add_argument("--out", metavar="DIR", required=True, help="the new data folder, which compare and tune read")
    p.add_argument("--text-column", default="", metavar="NAME", help="the column of the text, where not called text")
    p.add_argument("--domain-column", default="", metavar="NAME", help="the column that names each row's domain")
    p.add_argument("--base", default="embedded:minilm", help="the base whose states or losses a step asks for")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--contamination",
        choices=("remove", "report"),
        default="remove",
        help="what is done with rows of train that stand in test, exactly or nearly (default remove)",
    )
    p.add_argument(
        "--baseline",
        metavar="DIR",
        help="write random rows beside it, as many tokens as are left: what the step must beat",
    )
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    p.add_argument("--no-cache", action="store_true", help="keep hidden states in memory only (private data)")
    p.add_argument("--config", metavar="FILE", help="a YAML or TOML file of these options; the command line wins")
    p.add_argument("--json", action="store_true", help="print data_card.json")


def _shrink(p: Parser) -> None:
    p.add_argument("arm", metavar="ARM", help="e.g. pretrained-distillation:layers=2; options may also follow")
    _input(p)
    p.add_argument("--bricks", nargs="+", default=[], metavar="DIR", help="bricks on the base: the teacher")
    p.add_argument("--text", metavar="D2", help="more rows of the data's kind, of which no label is read")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", metavar="DIR", required=True, help="folder of the run; the model is OUT/student")
    p.add_argument("--checkpoint-every", type=positive(int), default=200, help="steps between checkpoints")
    p.add_argument("--allow-change", nargs="+", default=[], metavar="KEY", help="resume although these changed")
    p.add_argument("--json", action="store_true")
    g = p.add_argument_group("common")
    g.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    g.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="compute type of training")
    g.add_argument("--threads", type=positive(int))
    g.add_argument("--batch-size", type=positive(int), default=32, help="rows an optimiser step")
    g.add_argument("--max-length", type=positive(int), help="tokens a row; longer rows are truncated and counted")
    g.add_argument("--config", metavar="FILE", help="a YAML or TOML file of these options; the command line wins")
    g.add_argument("--no-cache", action="store_true", help="keep the teacher's answers in memory only")


def _evaluate(p: Parser) -> None:
    _input(p)
    p.add_argument("--brick", metavar="DIR", help="a brick folder; without it, the base's own head")
    p.add_argument("--split", choices=("test", "validation"), default="test", help="rows to score on (test)")
    p.add_argument("--scale", metavar="LOW:HIGH:STEP", help="sweep the strength of the brick's change")
    p.add_argument("--predictions", metavar="FILE.parquet", help="one row per scored example, classes by name too")
    p.add_argument("--force", action="store_true", help="use a brick on another base than its own")
    p.add_argument("--json", action="store_true")
    _common(p)


def _predict(p: Parser) -> None:
    _input(p)
    p.add_argument("--brick", metavar="DIR")
    p.add_argument("--out", metavar="FILE.parquet", required=True)
    p.add_argument("--force", action="store_true", help="use a brick on another base than its own")
    d = p.add_argument_group("continuations of a language model")
    d.add_argument("--new-tokens", type=int, metavar="N", help="at most so many (128)")
    d.add_argument("--temperature", type=float, metavar="T", help="sample; 0 takes the most probable token (0)")
    d.add_argument("--top-p", type=float, metavar="P", help="sample among the tokens that make up this probability (1)")
    d.add_argument("--beams", type=int, metavar="N", help="beam search (1: none)")
    d.add_argument("--seed", type=int, metavar="S", help="of the sampling (0)")
    _common(p)


def _audit(p: Parser) -> None:
    p.add_argument(
        "arm", metavar="METHOD", help="e.g. similarity:sample=500; its options may also follow as --sample 500"
    )
    _input(p)
    p.add_argument("--brick", metavar="DIR", help="what is looked at beside the base: a brick, or another checkpoint")
    p.add_argument("--force", action="store_true", help="use a brick on another base than its own")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    p.add_argument("--json", action="store_true")


def _verify(p: Parser) -> None:
    _input(p)
    p.add_argument("--adapter", required=True, metavar="DIR", help="a PEFT adapter folder or a brick")
    p.add_argument("--merged", metavar="DIR", help="the model into which it was merged")
    p.add_argument("--json", action="store_true")


def _plan(p: Parser) -> None:
    _input(p)
    p.add_argument("--methods", nargs="+", metavar="ARM")
    p.add_argument("--json", action="store_true")
    _training(p)
    _common(p)


def _methods(p: Parser) -> None:
    p.add_argument("family", nargs="?", help="list one family only")
    p.add_argument("--json", action="store_true")


def _show(p: Parser) -> None:
    p.add_argument("method")


def _check(p: Parser) -> None:
    p.add_argument("methods", nargs="+", metavar="METHOD")
    p.add_argument("--base", help="default: the claim's own")
    p.add_argument("--data", help="default: the claim's own (embedded)")
    p.add_argument("--full", action="store_true", help="all arms and seeds of the paper's check")
    p.add_argument("--claim", type=positive(int), action="append", default=[], help="measure claim N of show alone")
    p.add_argument("--out", metavar="DIR", help="where results are written (default: claims/results)")
    p.add_argument("--json", action="store_true")


def _report(p: Parser) -> None:
    p.add_argument("folder", metavar="DIR", help="the folder of a finished comparison")


def _export(p: Parser) -> None:
    p.add_argument("brick", metavar="BRICK")
    p.add_argument("--to", choices=("peft", "merged", "log", "brick"), required=True)
    p.add_argument("--rank", type=positive(int), help="rank of the exported LoRA, where the brick serves several")
    p.add_argument("--max-rank", type=positive(int), help="limit where the change is not low-rank (SVD, error printed)")
    p.add_argument("--base", help="default: the brick's own")
    p.add_argument("--out", required=True, metavar="DIR")


def _bricks(p: Parser) -> None:
    importlib.import_module("brickyard.bricks.command").options(p, positive)


def _cache(p: Parser) -> None:
    p.add_argument("action", choices=("list", "clear"))


def parser_of(verb: str) -> Parser:
    """Build the parser of one verb."""
    p = Parser(prog=f"brickyard {verb}", description=VERBS[verb][0].upper() + VERBS[verb][1:] + ".")
    globals()[f"_{verb}"](p)
    return p


def _overview() -> str:
    width = max(map(len, VERBS)) + 2
    lines = [f"  {verb:<{width}}{text}" for verb, text in VERBS.items()]
    return "\n".join(
        [
            f"Brickyard {__version__}: which way of adapting a pre-trained model should I use here,",
            "and did it really work?",
            "",
            "usage: brickyard VERB [options]        brickyard VERB --help explains one",
            "",
            *lines,
            "",
            "Start with: brickyard compare --data YOUR_FOLDER --methods linear-probe lora moment-probing",
        ]
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command; UsageError with the nearest name for what is unknown."""
    verb, rest = argv[0], list(argv[1:])
    if verb not in VERBS:
        near = get_close_matches(verb, VERBS, n=2, cutoff=0.5)
        advice = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(VERBS)}."
        raise UsageError(f"unknown command {verb!r}; {advice}")
    parser = parser_of(verb)
    if verb in ("tune", "grow", "merge", "route", "shrink", "audit") and rest and not rest[0].startswith("-"):
        rest = _own_options(parser, rest, verb)
    if verb == "data" and rest and not rest[0].startswith("-"):
        _step_options(parser, rest[0])
    if "--config" in rest and rest.index("--config") + 1 < len(rest):
        _from_file(parser, rest[rest.index("--config") + 1])
    args, unknown = parser.parse_known_args(rest)
    if unknown:
        flag = next((text for text in unknown if text.startswith("-")), None)
        near = get_close_matches(flag.split("=")[0], parser.known(), n=2, cutoff=0.5) if flag else []
        what = f"unknown option {flag!r}" if flag else f"{unknown[0]!r} belongs to no option"
        advice = f"; did you mean {' or '.join(near)}?" if near else "."
        raise UsageError(f"{what}{advice} See: {parser.prog} --help")
    args.verb = verb
    if verb == "data":
        _read_step(args)
    if verb == "run":
        from brickyard.recipe import steps

        steps.read(args.recipe)
    one = [args.arm] if "arm" in args else []
    _check_arms([*(getattr(args, "methods", None) or ()), *one, *getattr(args, "others", ())])
    return args


def _check_arms(texts: Sequence[str]) -> None:
    """Refuse unknown methods and options at once: importing torch to say so would take seconds."""
    from brickyard.core import arm, registry

    for text in texts:
        for piece in arm.parse(text).pieces:
            registry.check_options(piece.name, piece.options)


def _own_options(parser: Parser, rest: list[str], family: str) -> list[str]:
    """Move `--r 16` behind `tune lora` into the arm, so that a method's options read like any other."""
    from brickyard.core import arm as arms
    from brickyard.core import registry

    arm = arms.parse(rest[0])
    if len(arm.pieces) != 1:
        return rest
    options = registry.find(arm.pieces[0].name, family).options
    own, left, i = {}, [rest[0]], 1
    while i < len(rest):
        flag, equals, value = rest[i].partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if (
            flag.startswith("--")
            and flag not in parser.known()
            and (name in options or name in arms.TRAINING or name == "preset")
        ):
            if not equals:
                i += 1
                if i == len(rest):
                    raise UsageError(f"option {flag} lacks its value.")
                value = rest[i]
            own[name] = arms.literal(value, f"option {flag}")
        else:
            left.append(rest[i])
        i += 1
    training = {k: own.pop(k) for k in list(own) if k in arms.TRAINING}
    piece = arms.Piece(arm.pieces[0].name, {**arm.pieces[0].options, **own, **arm.training, **training})
    return [str(piece), *left[1:]]


def _step_options(parser: Parser, text: str) -> None:
    """Add the options of a data step to the parser, so that they read, and are explained, like any other."""
    from brickyard.core import arm, registry

    name = arm.parse(text).pieces[0].name
    group = parser.add_argument_group(f"options of {name}")
    kinds: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "bool": _truth}
    for option in registry.find(name, "data").options.values():
        group.add_argument(
            "--" + option.name.replace("_", "-"),
            type=kinds.get(option.annotation, str),
            nargs="+" if option.annotation.startswith("tuple") else None,
            default=None,
            metavar="V",
            help=f"{option.doc} (default {option.default})".replace("%", "%%"),
        )


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


_truth.__name__ = "bool"


def _read_step(args: argparse.Namespace) -> None:
    """Split `dedup:threshold=0.7` into `args.step` and `args.options`, and take in the options that follow it."""
    from brickyard.core import arm, registry

    found = arm.parse(args.step)
    piece = found.pieces[0]
    if len(found.pieces) > 1:
        raise UsageError(f"{args.step!r} names several steps; run one after the other, each on the other's folder.")
    given = {**piece.options, **found.training}
    for name in registry.find(piece.name, "data").options:
        if (value := getattr(args, name, None)) is not None:
            if name in given:
                raise UsageError(f"the option {name} of {piece.name} is given twice; give it once.")
            given[name] = value
    registry.check_options(piece.name, given)
    args.step, args.options = piece.name, given


def _from_file(parser: Parser, path: str) -> None:
    from brickyard.core.settings import Wanted, read

    wanted: dict[str, Any] = {}
    for action in parser._actions:
        # A run file is data: consent to run foreign code can only be given on the command line.
        if not action.option_strings or action.dest in ("help", "config", "trust_remote_code"):
            continue
        kind = (
            bool
            if action.nargs == 0
            else {"int": int, "float": float, "size": str, "bool": bool}.get(getattr(action.type, "__name__", ""), str)
        )
        wanted[action.dest] = Wanted(kind, action.nargs == "+", tuple(action.choices or ()))
    values = read(path, wanted)
    for action in parser._actions:
        if action.dest in values:
            value = values[action.dest]
            if action.type is not None and not isinstance(value, bool | list):
                try:
                    value = action.type(str(value))  # type: ignore[operator]
                except argparse.ArgumentTypeError as error:
                    raise UsageError(f"--config {path}: {action.dest.replace('_', '-')}: {error}.") from None
            action.default, action.required = value, False


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 bad usage or input, 3 a proof does not hold."""
    own_process, argv = argv is None, list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(_overview() + "\n")
        return 0
    if argv[0] in ("-V", "--version"):
        sys.stdout.write(__version__ + "\n")
        return 0
    try:
        args = parse(argv)
        if args.verb in ("methods", "show", "cache"):
            from brickyard import listing as verbs
        elif args.verb == "merge":
            from brickyard.merging import command as verbs
        else:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            from brickyard import commands as verbs

            verbs.quiet_libraries()
            verbs.check_device(getattr(args, "device", None))
            if own_process:
                from brickyard.core import process

                process.settle()
            if args.verb in (apart := {"run": "recipe", "route": "routing", "bricks": "bricks"}):
                verbs: Any = importlib.import_module(f"brickyard.{apart[args.verb]}.command")
        return getattr(verbs, args.verb)(args, argv)
    except BrickyardError as error:
        sys.stderr.write(f"brickyard: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("\nbrickyard: interrupted; run the same command again to go on where it stopped.\n")
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except SystemExit as error:  # argparse's --help
        return int(error.code or 0)


if __name__ == "__main__":
    sys.exit(main())
