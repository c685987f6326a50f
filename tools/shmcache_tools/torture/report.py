"""What a torture run counted, and the words, or the JSON document, in which it says so."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final

import numpy as np
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from shmcache import Counters
from shmcache_tools.text import count_text, make_facts, make_table, percent_text, plural, printable
from shmcache_tools.torture.crew import Toll
from shmcache_tools.torture.history import History
from shmcache_tools.torture.log import Op, status_text

#: Raised when a field of the JSON document changes its meaning or goes away; new fields may appear.
JSON_SCHEMA: Final = 1

_BAR_WIDTH = 30
_SHOWN_COUNTERS = (
    "lock_steals",
    "rebuilds",
    "reaped_shares",
    "reaped_writes",
    "evictions",
    "leases_revoked",
    "writes_detached",
    "claims",
    "grants",
)


@dataclass(slots=True)
class Finding:
    """A violation, and what there is to see of it."""

    text: str
    history: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Tally:
    """Everything that a run counts."""

    seed: int
    seconds: float
    processes: int
    began: float = field(default_factory=time.perf_counter)
    rounds: int = 0
    round_text: str = ""
    operations: int = 0
    answers: Counter[tuple[str, str]] = field(default_factory=Counter)  #: by operation and status, one a key
    reads: int = 0  #: objects read, every byte of which was compared
    releases: int = 0  #: of these, compared once more before their release
    audits: int = 0
    toll: Toll = field(default_factory=Toll)
    counters: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    command: str = ""  #: repeats the last round

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self.began

    @property
    def deaths(self) -> int:
        return sum(self.toll.deaths.values())

    @property
    def deaths_inside(self) -> int:
        return self.deaths - self.toll.deaths[""]

    def add(self, history: History, counters: Counters | None) -> None:
        """Count what a round did."""
        records, events = history.records, history.events
        self.operations += int(np.count_nonzero(records.op != Op.DEATH))
        pairs, counts = np.unique(events.op << 8 | events.status, return_counts=True)
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
            self.answers[Op(pair >> 8).name.lower(), status_text(pair & 0xFF)] += count
        alone = records.op[(records.keys == 0) & (records.op != Op.DEATH)]
        for op, count in zip(*(column.tolist() for column in np.unique(alone, return_counts=True)), strict=True):
            self.answers[Op(op).name.lower(), ""] += count
        self.reads += int(np.count_nonzero(events.of(Op.READ) & (events.version > 0)))
        self.releases += int(np.count_nonzero(events.of(Op.RELEASE) & (events.version > 0)))
        self.audits += len(history.audits)
        if counters is not None:
            self.counters.update({column.name: getattr(counters, column.name) for column in fields(counters)})


# The report


def document(tally: Tally) -> dict[str, Any]:
    """The report for JSON."""
    operations: dict[str, dict[str, int]] = {}
    for (op, status), count in sorted(tally.answers.items()):
        operations.setdefault(op, {})[status or "calls"] = count
    return {
        "schema": JSON_SCHEMA,
        "seed": tally.seed,
        "seconds": tally.elapsed_s,
        "processes": tally.processes,
        "rounds": tally.rounds,
        "operations": tally.operations,
        "answers": operations,
        "reads_checked": tally.reads,
        "releases_checked": tally.releases,
        "audits": tally.audits,
        "kills": tally.deaths,
        "kills_inside": tally.deaths_inside,
        "kills_of_stopped": tally.toll.killed_stopped,
        "kills_by_operation": {op or "between": count for op, count in sorted(tally.toll.deaths.items())},
        "stops": tally.toll.stops,
        "counters": {name: tally.counters[name] for name in _SHOWN_COUNTERS},
        "violations": [{"text": finding.text, "history": finding.history} for finding in tally.findings],
        "command": tally.command,
    }


def report(tally: Tally) -> RenderableType:
    """The report at the end."""
    parts: list[RenderableType] = [make_facts(_rows(tally)), Text(), _operations(tally), Text()]
    if not tally.findings:
        parts.append(Text("violations: 0", style="green"))
    for finding in tally.findings:
        parts.append(Text(f"VIOLATION: {printable(finding.text)}", style="bold red"))
        parts += [Text(line) for line in finding.history]
    if tally.findings:
        parts.append(Text(f"violations: {len(tally.findings)}, in round {tally.rounds - 1}: {tally.round_text}"))
        parts.append(Text(f"to repeat that round: {tally.command}"))
    return Group(*parts)


def _rows(tally: Tally) -> list[tuple[str, str | Text]]:
    counters, toll = tally.counters, tally.toll
    per_s = tally.operations / tally.elapsed_s if tally.elapsed_s else 0
    inside = percent_text(tally.deaths_inside / tally.deaths if tally.deaths else None)
    return [
        ("seed", str(tally.seed)),
        ("ran", f"{plural(tally.rounds, 'round')} of {tally.processes} processes, {tally.elapsed_s:.1f} s"),
        ("operations", f"{count_text(tally.operations)}, {per_s:,.0f} a second, checking included"),
        (
            "objects read",
            f"{count_text(tally.reads)}, each byte compared; {count_text(tally.releases)} again at release",
        ),
        ("killed", f"{count_text(tally.deaths)}, {inside} inside an operation"),
        ("stopped", f"{plural(toll.stops, 'time')}; {count_text(toll.killed_stopped)} killed so"),
        ("lock steals", f"{count_text(counters['lock_steals'])}, {plural(counters['rebuilds'], 'rebuild')}"),
        ("reaped", f"{plural(counters['reaped_shares'], 'share')}, {plural(counters['reaped_writes'], 'write')}"),
        ("evictions", count_text(counters["evictions"])),
        ("leases", f"{plural(counters['leases_revoked'], 'share')}, {plural(counters['writes_detached'], 'write')}"),
        ("audits", f"{count_text(tally.audits)}, while all stood still"),
    ]


def _operations(tally: Tally) -> Table:
    table = make_table("operation", "keys or calls", "died in it", "answers", right=("keys or calls", "died in it"))
    for op in (op.name.lower() for op in Op if op != Op.DEATH):
        answers = {status: count for (name, status), count in tally.answers.items() if name == op}
        shown = ", ".join(f"{status} {count_text(count)}" for status, count in sorted(answers.items()) if status)
        table.add_row(op, count_text(sum(answers.values())), count_text(tally.toll.deaths[op]), shown)
    table.add_row("between two", "", count_text(tally.toll.deaths[""]), "")
    return table


# The live display


def progress(tally: Tally, begun: Sequence[int]) -> RenderableType:
    """How far the run is. ``begun``: operations of this round by log."""
    rows = Table.grid(padding=(0, 2, 0, 0))
    elapsed_s = min(tally.elapsed_s, tally.seconds)
    rows.add_row(
        Text("time", style="bold"),
        ProgressBar(tally.seconds, elapsed_s, width=_BAR_WIDTH),
        f"{elapsed_s:.0f} of {tally.seconds:.0f} s",
    )
    facts: list[tuple[str, str | Text]] = [
        ("round", f"{tally.rounds}, {tally.round_text}"),
        ("operations", count_text(tally.operations + sum(begun))),
        ("killed", f"{count_text(tally.deaths)}, {count_text(tally.deaths_inside)} inside an operation"),
        ("stopped", plural(tally.toll.stops, "time")),
        ("objects read", f"{count_text(tally.reads)}, up to the last round"),
    ]
    return Group(rows, make_facts(facts))
