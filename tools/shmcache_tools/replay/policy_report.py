"""What a study of eviction policies found, as tables, as a JSON document and as a picture."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from shmcache_tools.text import count_text, make_facts, make_table, percent_text, printable, time_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Raised when a field of the JSON document changes its meaning or goes away; new fields may appear.
POLICY_SCHEMA = 1

_BOUND = "optimum"  # nobody reaches it without knowing the future
_ARENA = "arena-"  # what the names of real arenas begin with
_TITLES = {
    "arena-segmented": "arena, segmented",
    "arena-lru": "arena, LRU",
    "lru": "LRU, suffix first",
    "segmented": "segmented",
    "sieve": "SIEVE",
    "s3-fifo": "S3-FIFO",
    "arc": "ARC",
    _BOUND: "offline optimum",
}
_COLOURS = {
    "arena-segmented": "#1f5fd0",
    "segmented": "#1f5fd0",
    "arena-lru": "#d0551f",
    "lru": "#d0551f",
    "sieve": "#3a9d5d",
    "s3-fifo": "#8a63c9",
    "arc": "#c99a2e",
    _BOUND: "#444444",
}
_BAR_WIDTH = 40
_PANEL_INCHES = (5.2, 4.2)


@dataclass(slots=True)
class SpanFindings:
    """Hit rates on a trace, or on a part of it."""

    trace: str
    span: str
    requests: int
    chunks: int
    distinct: int  #: chunks of the whole trace
    slots: dict[float, int]  #: by percent of ``distinct``
    endless: float  #: what a cache without end hits
    speed: float  #: of the arenas' run, times the trace's
    late_s: float | None = None  #: the most that a request of that run came behind its time
    hit_rates: dict[str, list[float]] = field(default_factory=dict)  #: by policy; one a size
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Findings:
    """All of a study."""

    policies: list[str]
    spans: list[SpanFindings]

    @property
    def faults(self) -> list[str]:
        return [f"{Path(span.trace).name}, {span.span}: {fault}" for span in self.spans for fault in span.faults]


@dataclass(slots=True)
class Step:
    """How far a study is."""

    spans: int
    finished: int = 0
    what: str = ""
    requests: int = 1
    served: int = 0
    began: float = field(default_factory=time.perf_counter)

    def begin(self, what: str, requests: int) -> None:
        self.what, self.requests, self.served = what, requests, 0

    def finish(self) -> None:
        self.finished += 1


def progress(step: Step) -> RenderableType:
    """The live display."""
    elapsed = f"{time.perf_counter() - step.began:.0f} s"
    bars = Table.grid(padding=(0, 2, 0, 0))
    for name, done, of, text in (
        ("spans", step.finished, step.spans, f"{step.finished} of {step.spans}, {elapsed}"),
        ("requests", step.served, step.requests, f"{count_text(step.served)} of {count_text(step.requests)}"),
    ):
        bars.add_row(Text(name, style="bold"), ProgressBar(of, done, width=_BAR_WIDTH), text)
    return Group(bars, Text(step.what))


# The tables


def report(findings: Findings) -> RenderableType:
    """The report at the end."""
    parts: list[RenderableType] = []
    for span in findings.spans:
        parts += [_heading(span), _table(findings.policies, span), Text()]
    if findings.faults:
        parts.append(Text("FAILED: " + printable("; ".join(findings.faults)), style="bold red"))
    elif any(span.late_s is not None for span in findings.spans):
        parts.append(Text("All good: no share left, every arena is sound.", style="green"))
    return Group(*parts)


def _heading(span: SpanFindings) -> RenderableType:
    rows: list[tuple[str, str | Text]] = [
        (span.span, f"{count_text(span.requests)} requests, {count_text(span.chunks)} chunks"),
        ("distinct", f"{count_text(span.distinct)} chunks in the whole trace"),
        ("endless cache", percent_text(span.endless)),
    ]
    if span.late_s is not None:
        late = f"{time_text(span.late_s)}, {time_text(span.late_s * span.speed)} of its time"
        paced = f"at {span.speed:g} times its speed, late at most {late}"
        rows.append(("arenas", paced))
    return Group(Text(printable(Path(span.trace).name), style="bold underline"), make_facts(rows), Text())


def _table(policies: Sequence[str], span: SpanFindings) -> Table:
    """A row a policy, a column a size; the best that is no bound is bold."""
    sizes = [f"{percent:g} %" for percent in span.slots]
    table = make_table("prefix hits of all chunks, %", *sizes, right=sizes)
    best = [max(rates, default=1.0) for rates in zip(*_attainable(span), strict=True)]
    table.add_row("  chunks in the cache", *(count_text(slots) for slots in span.slots.values()), style="dim")
    for policy in policies:
        cells = [
            Text(f"{100 * rate:.1f}", style="bold" if policy != _BOUND and f"{rate:.3f}" == f"{top:.3f}" else "")
            for rate, top in zip(span.hit_rates[policy], best or span.hit_rates[policy], strict=True)
        ]
        table.add_row(_TITLES[policy], *cells)
    return table


def _attainable(span: SpanFindings) -> list[list[float]]:
    return [rates for policy, rates in span.hit_rates.items() if policy != _BOUND]


# The document


def document(findings: Findings) -> dict[str, Any]:
    """What ``--json`` prints. Rates are of all chunks; times are seconds."""
    return {
        "schema": POLICY_SCHEMA,
        "spans": [_span_document(findings.policies, span) for span in findings.spans],
        "faults": findings.faults,
    }


def _span_document(policies: Sequence[str], span: SpanFindings) -> dict[str, Any]:
    return {
        "trace": span.trace,
        "span": span.span,
        "requests": span.requests,
        "chunks": span.chunks,
        "distinct": span.distinct,
        "endless": span.endless,
        "arenas": None if span.late_s is None else {"speed": span.speed, "late_max_s": span.late_s},
        "sizes": [{"percent": percent, "slots": slots} for percent, slots in span.slots.items()],
        "hit_rates": {policy: span.hit_rates[policy] for policy in policies},
    }


# The picture


def save_plot(path: Path, findings: Findings) -> None:
    """A panel a span, traces below each other. ImportError without matplotlib; OSError where it cannot be written."""
    from matplotlib.figure import Figure  # noqa: PLC0415 # an extra

    traces = list(dict.fromkeys(span.trace for span in findings.spans))
    rows = [[span for span in findings.spans if span.trace == trace] for trace in traces]
    width, height = _PANEL_INCHES
    columns = max(map(len, rows))
    figure = Figure(figsize=(width * columns, height * len(rows) + 0.7), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for panels, spans in zip(grid, rows, strict=True):
        for axes in panels[len(spans) :]:
            axes.set_visible(False)
        for axes, span in zip(panels, spans, strict=False):
            _draw(axes, findings.policies, span)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3 * columns, 5), fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def _draw(axes: Axes, policies: Sequence[str], span: SpanFindings) -> None:
    percents = list(span.slots)
    for policy in policies:
        real, bound = policy.startswith(_ARENA), policy == _BOUND
        axes.plot(
            percents,
            [100 * rate for rate in span.hit_rates[policy]],
            color=_COLOURS[policy],
            linestyle="--" if bound else "-",
            linewidth=2.2 if real else 1.1,
            marker="o" if real else None,
            markersize=4,
            label=_TITLES[policy],
        )
    axes.axhline(100 * span.endless, color="#999999", linewidth=1, linestyle=":", label="endless cache")
    axes.set_xscale("log")
    axes.set_xticks(percents, [f"{percent:g}" for percent in percents], fontsize=8)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_title(f"{Path(span.trace).name}\n{span.span}", fontsize=9)
    axes.set_xlabel("size of the cache, % of the trace's distinct chunks", fontsize=8)
    axes.set_ylabel("prefix hits, % of all chunks", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
