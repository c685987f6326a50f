"""The report as text: a table for costs that were measured together, each with its limits and peers below it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from cost_common import Cost, Ratio
from rich.table import Table
from rich.text import Text

from shmcache_tools.text import make_table, time_text

TIMES = ("wall", "CPU", "best")
OPTIONAL = ("ours", "goal", "")  # columns that are left out where they would be empty


def costs_table(costs: Sequence[Cost]) -> Table:
    """What all names end in, after a comma, is said once."""
    end = shared_end([cost.name for cost in costs])
    rows = [row for cost in costs for row in _rows(cost, cost.name.removesuffix(end))]
    used = [at for at, _ in enumerate(OPTIONAL) if any(row[4 + at] for row in rows)]
    table = make_table(f"cost of one {costs[0].unit}{end}", *TIMES, *(OPTIONAL[at] for at in used), right=TIMES)
    for row in rows:
        table.add_row(*row[:4], *(row[4 + at] for at in used))
    return table


def shared_end(names: Sequence[str]) -> str:
    """``, 4 MiB`` of ``put, 4 MiB`` and ``delete + put, 4 MiB``."""
    ends = {", ".join(("", *name.split(", ")[1:])) for name in names}
    return ends.pop() if len(ends) == 1 and len(names) > 1 else ""


def _rows(cost: Cost, name: str) -> Iterator[list[str | Text]]:
    """A goal stands with what it is about."""
    times = (time_text(ns / 1e9) for ns in (cost.median, cost.cpu, cost.best))
    beside = {**cost.limits, **cost.peers}
    yield [name, *times, "", _goals(cost, {""} | {goal.beside for goal in cost.goals} - set(beside)), cost.note]
    for other, ratio in beside.items():
        wall_cpu = ["", time_text(ratio.median / 1e9)]
        ours = _limit_text(ratio) if other in cost.limits else _peer_text(ratio)
        yield [
            Text(f"  {other}", style="dim"),
            *(Text(time, style="dim") for time in (wall_cpu if cost.by_cpu else reversed(wall_cpu))),
            Text(time_text(ratio.best / 1e9), style="dim"),
            ours,
            _goals(cost, {other}),
            "",
        ]


def _limit_text(ratio: Ratio) -> str:
    return f"{_number(1 / ratio.times)} x its time"


def _peer_text(ratio: Ratio) -> str:
    return f"{_number(ratio.times)} x faster" if ratio.times >= 1 else f"{_number(1 / ratio.times)} x slower"


def _number(times: float) -> str:
    """Four cells, or more where it must be."""
    return f"{times:4.{0 if times >= 100 else 1 if times >= 10 else 2}f}"


def _goals(cost: Cost, about: Iterable[str]) -> Text:
    """Those about one of these, one a line, each with what became of it."""
    lines = []
    for goal in (goal for goal in cost.goals if goal.beside in about):
        met = cost.met(goal)
        word, style = {None: ("-", "dim"), True: ("met", "green"), False: ("missed", "red")}[met]
        lines.append(Text.assemble((f"{word:<7}", style), goal.full if met is None else goal.text))
    return Text("\n").join(lines)
