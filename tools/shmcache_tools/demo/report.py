"""What a run of the demo counted, and the words in which it says so, while it runs and at its end.

``Tally`` is filled by the scheduler; everything else here only reads it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shmcache.stats import Histogram, Stats
from shmcache.storage import PrefetchResult
from shmcache_tools.demo.crew import Worker
from shmcache_tools.run_report import l2_progress_rows, l2_rows, moved_text, progress_bars, verdict_text
from shmcache_tools.samples import Samples
from shmcache_tools.stat.render import times_table
from shmcache_tools.text import (
    count_text,
    gigabytes_text,
    make_facts,
    make_table,
    percent_text,
    plural,
    time_text,
)

#: The operations that are timed, in the order of a chunk's life.
RESERVE, FILL, GRANT = "reserve to write", "fill", "grant what was there"
PUBLISH, READ, ARRAYS, RELEASE = "publish and grant", "read", "make arrays", "release"
OPERATIONS = (RESERVE, FILL, PUBLISH, GRANT, READ, ARRAYS, RELEASE)


@dataclass(frozen=True, slots=True)
class Loss:
    """One worker that died, and what came of its shares."""

    rank: int
    seconds: float  #: from SIGKILL until reap() had returned
    reap_s: float  #: what reap() took of it
    left: int  #: shares that it still had after that; must be 0


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
    l1_hits: int = 0  #: chunks of those that the arena had
    l2_hits: int = 0  #: chunks of those that were loaded from L2
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

    def prefetched(self, result: PrefetchResult, chunks: int) -> None:
        """Note what became of one request's chain."""
        self.chunks += chunks
        self.l1_hits += result.l1_hits
        self.l2_hits += result.l2_hits

    def rate(self, chunks: int) -> float | None:
        """Of all chunks."""
        return chunks / self.chunks if self.chunks else None

    @property
    def hits(self) -> int:
        return self.l1_hits + self.l2_hits

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
    flush_s: float  #: from then until L2 had all
    pipe_bytes: int
    l2: str | None  #: in words; None: there is none
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
    parts: list[RenderableType] = [make_facts(_report_rows(outcome)), Text(), _times_table(outcome.tally), Text()]
    if storage_times := times_table(outcome.stats.histograms):
        parts += [storage_times, Text()]
    return Group(*parts, verdict_text(outcome.faults))


def progress(tally: Tally, stats: Stats, workers: Iterable[Worker], unfinished: Iterable[int]) -> RenderableType:
    """The live display: how far the run is, the arena, and a line a worker."""
    elapsed_s = tally.elapsed_s
    rate = tally.bytes_in_place / elapsed_s if elapsed_s else 0
    facts = make_facts(
        [
            ("hit rate", _rates_text(tally)),
            ("in place", f"{gigabytes_text(tally.bytes_in_place)}, {gigabytes_text(int(rate))} a second"),
            ("shares", f"{count_text(stats.reserved)} reserved, {count_text(stats.held)} held"),
            ("objects", f"{count_text(stats.objects)}, {count_text(stats.counters.evictions)} evicted"),
            ("deaths", count_text(len(tally.losses))),
            *l2_progress_rows(stats),
            ("prefetch took", _prefetch_text(stats.histograms.prefetch_total)),
        ]
    )
    bars = progress_bars(tally.finished, tally.requests, elapsed_s, stats)
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
        ("evictions", moved_text(outcome.stats.counters.evictions, outcome.stats.counters.evicted_bytes)),
        ("waited for room", plural(tally.waits, "time")),
    ]
    rows += l2_rows(outcome.l2, outcome.stats, outcome.flush_s)
    if tally.losses:
        rows += _loss_rows(tally, outcome.stats)
    rows.append(("verify()", "clean" if not outcome.problems else plural(len(outcome.problems), "problem")))
    return rows


def _requests_text(outcome: Outcome) -> str:
    tally = outcome.tally
    finished = f"{count_text(tally.finished)} of {count_text(tally.requests)}"
    return f"{finished}, by each of {plural(tally.world_size, 'worker')}, in {outcome.elapsed_s:.1f} s"


def _hits_text(tally: Tally) -> str:
    return f"{_rates_text(tally)} (endless cache: {percent_text(tally.best_hit_rate)})"


def _rates_text(tally: Tally) -> str:
    l1, l2 = percent_text(tally.rate(tally.l1_hits)), percent_text(tally.rate(tally.l2_hits))
    return f"{percent_text(tally.rate(tally.hits))}: L1 {l1}, L2 {l2}"


def _prefetch_text(times: Histogram) -> str:
    """Quantiles of a histogram are bounds from above."""
    p50, p99 = times.quantile_s(0.5), times.quantile_s(0.99)
    return "-" if p50 is None or p99 is None else f"at most {time_text(p50)} (p50), {time_text(p99)} (p99)"


def _in_place_text(outcome: Outcome) -> str:
    tally = outcome.tally
    per_second = gigabytes_text(int(tally.bytes_in_place / outcome.elapsed_s))
    chunks = f"{count_text(sum(tally.read_chunks))} chunks"
    return f"{chunks}, {gigabytes_text(tally.bytes_in_place)}, {per_second} a second"


def _copied_text(outcome: Outcome) -> str:
    return f"0 GB of chunks; {outcome.pipe_bytes / 1e6:.1f} MB of keys and answers, by pipe"


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
            chunks, batches = sum(samples.items), len(samples.items)
            table.add_row(operation, *times, count_text(chunks), count_text(batches))
    return table
