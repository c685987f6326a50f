"""What a run of the demo counted, and the words in which it says so, while it runs and at its end.

``Tally`` is filled by the scheduler; everything else here only reads it.
"""

from __future__ import annotations

import time
from array import array
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

import numpy as np
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from shmcache.stats import Stats
from shmcache_tools.demo_crew import Worker
from shmcache_tools.text import (
    count_text,
    gigabytes_text,
    make_facts,
    make_table,
    percent_text,
    plural,
    printable,
    size_text,
    time_text,
)

#: The operations that are timed, in the order of a chunk's life.
LOOKUP, GRANT, RESERVE, FILL = "lookup", "grant on a hit", "reserve to write", "fill"
PUBLISH, READ, ARRAYS, RELEASE = "publish and grant", "read", "make arrays", "release"
OPERATIONS = (LOOKUP, GRANT, RESERVE, FILL, PUBLISH, READ, ARRAYS, RELEASE)

_BAR_WIDTH = 40


@dataclass(frozen=True, slots=True)
class Loss:
    """One worker that died, and what came of its shares."""

    rank: int
    seconds: float  #: from SIGKILL until reap() had returned
    reap_s: float  #: what reap() took of it
    left: int  #: shares that it still had after that; must be 0


@dataclass(slots=True)
class Samples:
    """The times of one operation, a batch each; a percentile counts a batch once for each of its chunks."""

    seconds: array[float] = field(default_factory=lambda: array("d"))  #: a chunk, in this batch
    chunks: array[int] = field(default_factory=lambda: array("q"))

    def add(self, seconds: float, chunks: int) -> None:
        self.seconds.append(seconds / chunks)
        self.chunks.append(chunks)

    def percentile(self, percent: float) -> float:
        """The time that ``percent`` of all chunks took at most, seconds."""
        seconds, chunks = np.frombuffer(self.seconds), np.frombuffer(self.chunks, dtype=np.int64)
        order = np.argsort(seconds)
        reached = np.cumsum(chunks[order])
        place = np.searchsorted(reached, percent / 100 * reached[-1])
        return float(seconds[order[place]])


@dataclass(slots=True)
class Tally:
    """Everything that a run counts."""

    requests: int  #: of the whole run
    world_size: int
    chunk_bytes: int
    best_hit_rate: float  #: with an arena without end
    handed_out: int = 0  #: requests
    finished: int = 0  #: requests that every worker has read and verified
    chunks: int = 0  #: of the requests handed out
    hits: int = 0  #: chunks of those that lookup found
    read_chunks: list[int] = field(init=False)  #: a rank
    mismatches: int = 0
    missing: int = 0  #: chunks that a restarted worker came too late for
    waits: int = 0  #: times the scheduler waited for shares to come back to have room
    losses: list[Loss] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)
    samples: dict[str, Samples] = field(default_factory=lambda: defaultdict(Samples))

    def __post_init__(self) -> None:
        self.read_chunks = [0] * self.world_size

    def sample(self, operation: str, seconds: float, chunks: int) -> None:
        """Note the time of one batch."""
        if chunks:
            self.samples[operation].add(seconds, chunks)

    @property
    def hit_rate(self) -> float | None:
        return self.hits / self.chunks if self.chunks else None

    @property
    def bytes_in_place(self) -> int:
        return sum(self.read_chunks) * self.chunk_bytes

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self.began


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: the arena after every worker had detached."""

    tally: Tally
    elapsed_s: float
    pipe_bytes: int
    stats: Stats
    problems: list[str]  #: what verify() found

    @property
    def shares(self) -> int:
        return self.stats.reserved + self.stats.held

    @property
    def faults(self) -> list[str]:
        """Why the run is not good; empty where it is."""
        tally = self.tally
        wanted = tally.chunks * tally.world_size
        checks = [
            (tally.finished != tally.requests, f"{tally.finished} of {tally.requests} requests finished"),
            (sum(tally.read_chunks) != wanted, f"{sum(tally.read_chunks)} of {wanted} chunks read"),
            (tally.mismatches > 0, f"{tally.mismatches} chunks held wrong bytes"),
            (self.shares > 0, f"{self.shares} shares outstanding"),
            (any(loss.left for loss in tally.losses), "shares left on a dead worker's lane after reap()"),
        ]
        return [fault for bad, fault in checks if bad] + [f"verify(): {problem}" for problem in self.problems]


def report(outcome: Outcome) -> RenderableType:
    """The report at the end of a run."""
    facts = make_facts(_report_rows(outcome))
    times = _times_table(outcome.tally)
    faults = outcome.faults
    if faults:
        verdict = Text("FAILED: " + printable("; ".join(faults)), style="bold red")
    else:
        verdict = Text("All good: every chunk right, no share left, the arena is sound.", style="green")
    return Group(facts, Text(), times, Text(), verdict)


def progress(tally: Tally, stats: Stats, workers: Iterable[Worker], unfinished: Iterable[int]) -> RenderableType:
    """The live display: how far the run is, the arena, and a line a worker."""
    elapsed_s = tally.elapsed_s
    rest_s = elapsed_s / tally.finished * (tally.requests - tally.finished) if tally.finished else None
    left = "" if rest_s is None else f", {rest_s:.0f} s left"
    bars = Table.grid(padding=(0, 2, 0, 0))
    bars.add_row(
        Text("requests", style="bold"),
        ProgressBar(tally.requests, tally.finished, width=_BAR_WIDTH),
        f"{count_text(tally.finished)} of {count_text(tally.requests)}, {elapsed_s:.0f} s{left}",
    )
    bars.add_row(
        Text("arena", style="bold"),
        ProgressBar(stats.capacity, stats.used_bytes, width=_BAR_WIDTH, finished_style="bar.complete"),
        f"{size_text(stats.used_bytes)} of {size_text(stats.capacity)}, {plural(stats.objects, 'object')}",
    )
    rate = tally.bytes_in_place / elapsed_s if elapsed_s else 0
    facts = make_facts(
        [
            ("hit rate", percent_text(tally.hit_rate)),
            ("in place", f"{gigabytes_text(tally.bytes_in_place)}, {gigabytes_text(int(rate))} a second"),
            ("shares", f"{count_text(stats.reserved)} reserved, {count_text(stats.held)} held"),
            ("evictions", count_text(stats.counters.evictions)),
            ("deaths", count_text(len(tally.losses))),
        ]
    )
    return Group(bars, Text(), facts, Text(), _workers_table(tally, workers, unfinished))


def _workers_table(tally: Tally, workers: Iterable[Worker], unfinished: Iterable[int]) -> Table:
    numbers = ("rank", "pid", "chunks read", "in place", "requests waiting", "deaths")
    table = make_table(*numbers, "", right=numbers)
    for worker, waiting in zip(workers, unfinished, strict=True):
        chunks = tally.read_chunks[worker.rank]
        table.add_row(
            str(worker.rank),
            str(worker.process.pid),
            count_text(chunks),
            gigabytes_text(chunks * tally.chunk_bytes),
            str(waiting),
            count_text(sum(loss.rank == worker.rank for loss in tally.losses)),
            Text("attached", style="green") if worker.ready else Text("starting", style="yellow"),
        )
    return table


def _report_rows(outcome: Outcome) -> list[tuple[str, str | Text]]:
    """The facts, each short enough for a terminal of 80 columns."""
    tally = outcome.tally
    rows: list[tuple[str, str | Text]] = [
        ("requests", _requests_text(outcome)),
        ("hit rate", _hits_text(tally)),
        ("read in place", _in_place_text(outcome)),
        ("wrong bytes", f"in {count_text(tally.mismatches)} chunks; every byte was compared"),
        ("copied between processes", _copied_text(outcome)),
        ("shares outstanding", count_text(outcome.shares)),
        ("evictions", _evictions_text(outcome.stats)),
        ("waited for room", f"{count_text(tally.waits)} times"),
    ]
    if tally.losses:
        rows += _loss_rows(tally, outcome.stats)
    rows.append(("verify()", "clean" if not outcome.problems else plural(len(outcome.problems), "problem")))
    return rows


def _requests_text(outcome: Outcome) -> str:
    tally = outcome.tally
    finished = f"{count_text(tally.finished)} of {count_text(tally.requests)}"
    return f"{finished}, by each of {plural(tally.world_size, 'worker')}, in {outcome.elapsed_s:.1f} s"


def _hits_text(tally: Tally) -> str:
    hits = f"{count_text(tally.hits)} of {count_text(tally.chunks)} chunks"
    return f"{percent_text(tally.hit_rate)}, {hits} ({percent_text(tally.best_hit_rate)} without evictions)"


def _in_place_text(outcome: Outcome) -> str:
    tally = outcome.tally
    per_second = gigabytes_text(int(tally.bytes_in_place / outcome.elapsed_s))
    chunks = f"{count_text(sum(tally.read_chunks))} chunks"
    return f"{chunks}, {gigabytes_text(tally.bytes_in_place)}, {per_second} a second"


def _copied_text(outcome: Outcome) -> str:
    return f"0 GB of chunks; {outcome.pipe_bytes / 1e6:.1f} MB of keys and answers, by pipe"


def _evictions_text(stats: Stats) -> str:
    return f"{count_text(stats.counters.evictions)} objects, {gigabytes_text(stats.counters.evicted_bytes)}"


def _loss_rows(tally: Tally, stats: Stats) -> list[tuple[str, str]]:
    seconds = [loss.seconds for loss in tally.losses]
    reap_s = median(loss.reap_s for loss in tally.losses)
    shares = plural(stats.counters.reaped_shares, "share")
    times = f"{time_text(median(seconds))} (p50), {time_text(max(seconds))} (max)"
    return [
        ("workers died", f"{count_text(len(seconds))}, with {shares}"),
        ("their shares were back", f"after {times}, of it reap() {time_text(reap_s)}"),
        ("chunks written again", f"{count_text(tally.missing)}, evicted before the new worker came"),
    ]


def _times_table(tally: Tally) -> Table:
    numbers = ("p50", "p99", "chunks", "batches")
    table = make_table("time a chunk", *numbers, right=numbers)
    for operation in OPERATIONS:
        if samples := tally.samples.get(operation):
            times = (time_text(samples.percentile(percent)) for percent in (50, 99))
            chunks, batches = sum(samples.chunks), len(samples.chunks)
            table.add_row(operation, *times, count_text(chunks), count_text(batches))
    return table
