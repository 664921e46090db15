"""The comparison in a terminal: one table, the reasons of what did not finish, and the verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from brickyard.compare import shown
from brickyard.compare.shown import Metric, number, visible

WIDTH = 120  # cells, where the terminal's width is not known
_NARROWEST = 16  # cells that the arm's name keeps before a column is dropped


@dataclass(frozen=True)
class _Column:
    """A column: its heading, its text for a method, and the order in which columns give way (highest first)."""

    title: str
    show: Callable[[Mapping[str, Any]], str]
    gives_way: int


def _cost(key: str, show: Callable[[float | None], str]) -> Callable[[Mapping[str, Any]], str]:
    return lambda method: show(number((method.get("cost") or {}).get(key)))


def _plain(value: float | None) -> str:
    return shown.MISSING if value is None else shown.digits(value)


def _columns(metric: Metric) -> tuple[_Column, ...]:
    def with_interval(method: Mapping[str, Any]) -> str:
        s = shown.score(method)
        return f"{metric.show(s.mean, unit=False)} {metric.interval(s.low, s.high)}".rstrip()

    def in_nats(method: Mapping[str, Any]) -> str:
        found = number((method.get("score") or {}).get("nats_per_token"))
        return shown.MISSING if found is None else f"{found:.3f}"

    name = f"{metric.title}{', ' + metric.unit if metric.unit else ''}"
    return (
        _Column(name, with_interval, 0),
        _Column("nats/token", in_nats, 3),
        _Column("trainable", _cost("trainable_parameters", shown.count), 1),
        _Column("saved MiB", _cost("saved_for_backward_bytes", shown.mebibytes), 2),
        _Column("peak MiB", _cost("peak_bytes", shown.mebibytes), 5),
        _Column("step ms", _cost("step_ms", _plain), 6),
        _Column("train s", _cost("train_seconds", _plain), 4),
        _Column("brick", _cost("brick_bytes", shown.size), 3),
    )


def terminal_table(result: Mapping[str, Any], width: int = WIDTH, *, ascii_only: bool = False) -> Table:
    """Return the arms, best first, in at most `width` cells: columns that do not fit are left out, figures never wrap.

    The recommended arm is marked and bold, trivial baselines are marked; the arm's name folds before a column goes.
    """
    metric, methods = shown.metric_of(result), shown.in_order(result)
    recommended = (result.get("verdict") or {}).get("recommended")
    plain = _ascii if ascii_only else str
    cells = {c: [plain(c.show(m)) for m in methods] for c in _columns(metric)}
    nothing = {plain(shown.MISSING)}
    cells = {c: texts for c, texts in cells.items() if c.gives_way == 0 or set(texts) != nothing}
    names = [plain(visible(m["arm"])) for m in methods]
    tags = [_tag(m, recommended) for m in methods]
    room = {c: max(map(shown.width, (c.title, *texts))) + 2 for c, texts in cells.items()}
    wanted = min(max(map(shown.width, names), default=3), 34)
    left_out = []
    while len(room) > 1 and 4 + sum(room.values()) + max(_NARROWEST, min(wanted, 24)) > width:
        column = max(room, key=lambda c: c.gives_way)
        left_out.append(column.title)
        del room[column]
    note = "[95 % interval]" + (f"; too narrow for {', '.join(reversed(left_out))}" if left_out else "")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_edge=False)
    table.caption, table.caption_justify, table.caption_style = Text(note, "dim"), "left", ""
    table.add_column("", no_wrap=True, width=1)
    table.add_column("arm", overflow="fold", max_width=max(width - 3 - sum(room.values()), 3))
    for c, cells_wide in room.items():
        table.add_column(c.title, justify="right", no_wrap=True, min_width=cells_wide - 2)
    for i, method in enumerate(methods):
        mark, style = tags[i]
        name = Text(names[i])
        if method.get("trivial"):
            name.append(" (baseline)", "dim")
        if method.get("status", "done") != "done":
            name.append(f" ({method['status']})", "red")
        row = [Text(cells[c][i]) for c in room]
        table.add_row(Text(plain(mark)), name, *row, style=style)
    return table


def _tag(method: Mapping[str, Any], recommended: Any) -> tuple[str, str]:
    if recommended is not None and method["arm"] == recommended:
        return "▸", "bold"
    return "", "dim" if method.get("status", "done") != "done" else ""


def _ascii(text: str) -> str:
    """Return `text` for a terminal that can show ASCII only."""
    for fine, plain in (("\u00a0", " "), ("–", "-"), ("−", "-"), ("▸", ">"), ("…", "..."), ("≈", "~")):
        text = text.replace(fine, plain)
    return text.encode("ascii", "backslashreplace").decode("ascii")


def show(result: Mapping[str, Any], console: Console) -> None:
    """Write the table, the reason of each arm that did not finish, and the verdict to `console`."""
    ascii_only = console.options.ascii_only
    plain = _ascii if ascii_only else str
    verdict = result.get("verdict") or {}
    console.print(terminal_table(result, console.width, ascii_only=ascii_only))
    if nats := shown.in_nats(result):
        console.print(Text(nats, "dim"))
    lost = [m for m in result["methods"] if m.get("status", "done") != "done"]
    if lost:
        console.print()
    for m in lost:
        line = Text.assemble((plain(f"{visible(m['status'])} "), "red"), (plain(visible(m["arm"])), "bold"))
        line.append(plain(f": {visible(m.get('reason') or 'no reason was recorded')}"))
        console.print(line, soft_wrap=False)
    console.print()
    console.print(Text(plain(visible(verdict.get("sentence") or "No verdict was reached.")), "bold"))
    tied = [plain(visible(arm)) for arm in verdict.get("indistinguishable") or ()]
    if tied and verdict.get("recommended") is not None:
        console.print(Text(f"Cannot be told apart from it: {', '.join(tied)}."))
    apart = shown.without_overlap(result)
    if apart:
        console.print(Text(plain(visible(apart))))
    private = (result.get("privacy") or {}).get("sentence")
    if private:
        console.print(Text(plain(visible(private))))
