"""The rules of the house that a test can hold: direction of imports, file sizes, names, records, silence."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from brickyard.core import registry
from brickyard.core.method import FAMILIES

ROOT = registry.ROOT
FILES = sorted(ROOT.rglob("*.py"))
ORDER = {**dict.fromkeys(FAMILIES, 2), "core": 0, "embedded": 0, "models": 1, "compare": 3, "checks": 4}


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("brickyard"):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("brickyard")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_in_one_direction(path: Path) -> None:
    part = path.relative_to(ROOT).parts[0]
    if part not in ORDER:
        return  # the command line and the Python interface stand above everything
    for name in imports(path):
        other = name.split(".")[1] if "." in name else ""
        if other in ORDER and other != part:
            assert ORDER[other] < ORDER[part] or {other, part} <= {"core", "embedded"}, f"{path} imports {name}"
        if part in FAMILIES and other in FAMILIES and other != "models":  # layers, which anyone may import
            target = name.split(".")[2] if name.count(".") >= 2 else "_"
            assert target.startswith("_"), f"{path}: methods never import methods ({name})"


@pytest.mark.parametrize("path", sorted([*FILES, *Path(__file__).parent.rglob("*.py")]), ids=lambda p: p.name)
def test_files_are_short_and_named_after_what_they_hold(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500
    assert path.stem not in ("utils", "util", "common", "helpers", "helper", "misc", "contrib", "experimental")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_code_from_data_and_no_print(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "print"), f"{path}:{node.lineno}"
        if isinstance(node, ast.Global):
            raise AssertionError(f"{path}:{node.lineno} rebinds a module global")
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert not re.search(r"(^|\.)pickle\.|(^|\.)torch\.load$|Unpickler", called), f"{path}:{node.lineno}"
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert given.get("shell") != "True" and given.get("weights_only") != "False", f"{path}:{node.lineno}"
        assert not (isinstance(node, ast.Import) and {"pickle", "dill"} & {a.name for a in node.names}), path


def test_every_method_file_declares_records_of_literals() -> None:
    entries = registry.records()
    assert len(entries) >= 8
    for entry in entries:
        assert entry.record.title, entry.record.name
        assert entry.record.claims or registry.find(entry.record.part_of).record.claims, entry.record.name
        assert entry.record.slot or entry.record.family not in ("tune", "optim", "private", "objective")
        for option in entry.options.values():
            assert option.doc, f"{entry.record.name}: option {option.name} has no docstring"
        for preset in entry.record.presets.values():
            assert preset.keys() <= entry.options.keys()
        for key in entry.record.search:
            assert key in entry.options or key in ("lr", "wd", "batch", "epochs")
        equation = "\n".join(entry.path.read_text(encoding="utf-8").splitlines()[:60])
        assert (
            re.search(r"=|<-", ast.get_docstring(ast.parse(entry.path.read_text(encoding="utf-8"))) or "")
            and '"""' in equation
        )


@pytest.mark.parametrize(
    "command",
    [
        ["--help"],
        ["methods"],
        ["show", "lora"],
        ["methods", "--json"],
        ["tune", "--help"],
        ["grow", "--help"],
        ["merge", "--help"],
        ["route", "--help"],
        ["run", "--help"],
        ["bricks", "--help"],
    ],
)
def test_reading_commands_never_import_torch(command: list[str]) -> None:
    code = (
        "import sys; from brickyard.cli import main; code = main(sys.argv[1:]);"
        "bad = {'torch', 'numpy', 'peft', 'transformers'} & sys.modules.keys();"
        "sys.stderr.write(str(sorted(bad))); sys.exit(code or bool(bad))"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
