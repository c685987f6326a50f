"""What a replay counted, and the words, or the JSON document, in which it says so.

``Tally`` is filled by the engine's threads; everything else here only reads it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shmcache.stats import Stats
from shmcache_tools.run_report import l2_failures, l2_progress_rows, l2_rows, moved_text, progress_bars, verdict_text
from shmcache_tools.samples import Samples
from shmcache_tools.text import (
    count_text,
    gigabytes_text,
    make_facts,
    make_table,
    percent_text,
    plural,
    time_text,
)

#: Raised when a field of the JSON document changes its meaning or goes away; new fields may appear.
JSON_SCHEMA = 1

_PERCENTS = (50, 99, 100)


@dataclass(frozen=True, slots=True)
class Served:
    """What became of one request."""

    chunks: int
    l1_hits: int  #: chunks that the prefetch found in the arena
    l2_hits: int  #: chunks that the prefetch loaded
    written: int  #: chunks that neither had
    there: int  #: chunks that the prefetch did not reach, and that the arena had when they were to be written
    wrong: int  #: chunks with other bytes than their key says
    prefetch_s: float  #: from submit to the result
    first_key_s: float | None  #: from submit to the first readable key; None where there was none, or it is not known
    late_s: float  #: behind the time at which the trace has it
    error: str | None  #: of the prefetch


@dataclass(slots=True)
class Times:
    """The times of requests of one kind."""

    prefetch: Samples = field(default_factory=Samples)
    first_key: Samples = field(default_factory=Samples)


@dataclass(slots=True)
class Tally:
    """Everything that a replay counts."""

    requests: int  #: of the whole run
    readers: int
    chunk_bytes: int
    best_hit_rate: float  #: of a cache without end
    paced: bool = False  #: at the trace's own times
    finished: int = 0
    chunks: int = 0  #: of the finished requests, as all below
    l1_hits: int = 0
    l2_hits: int = 0
    written: int = 0
    there: int = 0
    wrong: int = 0
    waits: int = 0  #: times that a chunk to be written found no room at once
    error: str | None = None  #: the first of any prefetch
    began: float = field(default_factory=time.perf_counter)
    l1_alone: Times = field(default_factory=Times)  #: requests that found all in the arena
    l2_missed: Times = field(
        default_factory=Times
    )  #: requests that missed, and for which L2, if there is one, had nothing
    l2_loaded: Times = field(default_factory=Times)  #: requests that loaded at least one chunk
    late: Samples = field(default_factory=Samples)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, served: Served) -> None:
        """Count one request. Any thread may."""
        with self._lock:
            self.finished += 1
            self.chunks += served.chunks
            self.l1_hits += served.l1_hits
            self.l2_hits += served.l2_hits
            self.written += served.written
            self.there += served.there
            self.wrong += served.wrong
            self.error = self.error or served.error
            times = self._times_of(served)
            times.prefetch.add(served.prefetch_s)
            if served.first_key_s is not None:
                times.first_key.add(served.first_key_s)
            if self.paced:
                self.late.add(served.late_s)

    def _times_of(self, served: Served) -> Times:
        if served.l2_hits:
            return self.l2_loaded
        return self.l1_alone if served.l1_hits == served.chunks else self.l2_missed

    def waited(self) -> None:
        """Count a wait for room."""
        with self._lock:
            self.waits += 1

    def rate(self, chunks: int) -> float | None:
        """Of all chunks."""
        return chunks / self.chunks if self.chunks else None

    @property
    def hits(self) -> int:
        return self.l1_hits + self.l2_hits

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self.began


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a replay ended: the arena after the last request, and after the last store to L2."""

    tally: Tally
    l2: str | None  #: in words; None: there is none
    elapsed_s: float  #: until the last request was finished
    flush_s: float  #: from then until L2 had all
    stats: Stats
    problems: list[str]  #: what verify() found

    @property
    def shares(self) -> int:
        return self.stats.reserved + self.stats.held

    @property
    def faults(self) -> list[str]:
        """Why the run is not good; empty where it is."""
        tally, counters = self.tally, self.stats.counters
        checks = [
            (tally.finished != tally.requests, f"{tally.finished} of {tally.requests} requests finished"),
            (tally.wrong > 0, f"{plural(tally.wrong, 'chunk')} held wrong bytes"),
            (self.shares > 0, f"{plural(self.shares, 'share')} left"),
            (counters.l2_damaged > 0, f"L2 had {plural(counters.l2_damaged, 'damaged object')}"),
            (l2_failures(counters) > 0, f"L2 failed {plural(l2_failures(counters), 'time')}"),
            (tally.error is not None, f"a prefetch failed: {tally.error}"),
        ]
        return [fault for bad, fault in checks if bad] + [f"verify(): {problem}" for problem in self.problems]


# The report


def report(outcome: Outcome) -> RenderableType:
    """The report at the end."""
    verdict = verdict_text(outcome.faults)
    return Group(make_facts(_rows(outcome)), Text(), times_table(outcome.tally), Text(), verdict)


def times_table(tally: Tally) -> Table:
    """How long requests waited, those that loaded from L2 apart from those that did not."""
    numbers = ("p50", "p99", "max", "requests")
    table = make_table("time to", *numbers, right=numbers)
    kinds = (("all in L1", tally.l1_alone), ("nothing loaded", tally.l2_missed), ("loads", tally.l2_loaded))
    rows = [
        *((f"prefetch, {kind}", times.prefetch) for kind, times in kinds),
        *((f"first key, {kind}", times.first_key) for kind, times in kinds),
        ("submit, behind the trace", tally.late),
    ]
    for name, samples in rows:
        if samples.items:
            cells = [time_text(samples.percentile(percent)) for percent in _PERCENTS]
            table.add_row(name, *cells, count_text(len(samples.items)))
    return table


def _rows(outcome: Outcome) -> list[tuple[str, str | Text]]:
    """The facts, each short enough for a terminal of 80 columns."""
    tally, stats = outcome.tally, outcome.stats
    rows: list[tuple[str, str | Text]] = [
        ("requests", _requests_text(outcome)),
        ("chunks", f"{count_text(tally.chunks)}, {gigabytes_text(tally.chunks * tally.chunk_bytes)}"),
        ("hit rate", _hits_text(tally)),
        *_hit_rows(tally),
        *l2_rows(outcome.l2, stats, outcome.flush_s),
        ("evictions, L1", moved_text(stats.counters.evictions, stats.counters.evicted_bytes)),
        ("waited for room", plural(tally.waits, "time")),
        ("wrong bytes", f"in {plural(tally.wrong, 'chunk')}; every hit was compared, in place"),
        ("shares left", count_text(outcome.shares)),
        ("verify()", "clean" if not outcome.problems else plural(len(outcome.problems), "problem")),
    ]
    return rows


def _requests_text(outcome: Outcome) -> str:
    tally = outcome.tally
    finished = f"{count_text(tally.finished)} of {count_text(tally.requests)}"
    return f"{finished}, each by {plural(tally.readers, 'reader')}, in {outcome.elapsed_s:.1f} s"


def _hits_text(tally: Tally) -> str:
    endless = percent_text(tally.best_hit_rate)
    return f"{percent_text(tally.rate(tally.hits))}; {endless} in an endless cache, empty at first"


def _hit_rows(tally: Tally) -> list[tuple[str, str | Text]]:
    parts = [("L1", tally.l1_hits), ("L2", tally.l2_hits), ("none", tally.written)]
    if tally.there:
        parts.append(("L1, past the prefix", tally.there))
    return [(f"  {name}", f"{percent_text(tally.rate(chunks))}, {plural(chunks, 'chunk')}") for name, chunks in parts]


# The live display


def progress(tally: Tally, stats: Stats) -> RenderableType:
    """How far the replay is, what it hits, and what goes on with L2."""
    l1, l2 = percent_text(tally.rate(tally.l1_hits)), percent_text(tally.rate(tally.l2_hits))
    evictions = f"L1 {count_text(stats.counters.evictions)}, L2 {count_text(stats.counters.l2_evictions)}"
    facts = make_facts(
        [
            ("hit rate", f"{percent_text(tally.rate(tally.hits))}: L1 {l1}, L2 {l2}"),
            *l2_progress_rows(stats),
            ("evictions", evictions),
        ]
    )
    bars = progress_bars(tally.finished, tally.requests, tally.elapsed_s, stats)
    return Group(bars, Text(), facts, Text(), times_table(tally))


# The document


def document(outcome: Outcome, options: dict[str, Any]) -> dict[str, Any]:
    """What ``--json`` prints. Times are seconds."""
    tally, stats = outcome.tally, outcome.stats
    counters = stats.counters
    parts = {"l1": tally.l1_hits, "l2": tally.l2_hits, "none": tally.written, "past_prefix": tally.there}
    return {
        "schema": JSON_SCHEMA,
        "options": options,
        "requests": tally.finished,
        "elapsed_s": outcome.elapsed_s,
        "flush_s": outcome.flush_s,
        "chunks": {"total": tally.chunks, **parts},
        "hit_rate": {
            "total": tally.rate(tally.hits),
            "l1": tally.rate(tally.l1_hits),
            "l2": tally.rate(tally.l2_hits),
            "endless": tally.best_hit_rate,
        },
        "l1": {
            "capacity": stats.capacity,
            "evictions": counters.evictions,
            "evicted_bytes": counters.evicted_bytes,
            "waits": tally.waits,
        },
        "l2": {
            "description": outcome.l2,
            "loads": counters.l2_loads,
            "loaded_bytes": counters.l2_loaded_bytes,
            "load_misses": counters.l2_load_misses,
            "stores": counters.l2_stores,
            "stored_bytes": counters.l2_stored_bytes,
            "no_space": counters.l2_store_no_space,
            "evictions": counters.l2_evictions,
            "evicted_bytes": counters.l2_evicted_bytes,
            "damaged": counters.l2_damaged,
            "failures": l2_failures(counters),
        },
        "times": {
            "l1_alone": _times(tally.l1_alone),
            "l2_missed": _times(tally.l2_missed),
            "l2_loaded": _times(tally.l2_loaded),
            "late": _summary(tally.late),
        },
        "wrong_chunks": tally.wrong,
        "shares_left": outcome.shares,
        "problems": outcome.problems,
        "faults": outcome.faults,
    }


def _times(times: Times) -> dict[str, Any]:
    return {"prefetch": _summary(times.prefetch), "first_key": _summary(times.first_key)}


def _summary(samples: Samples) -> dict[str, Any] | None:
    if not samples.items:
        return None
    p50, p99, most = (samples.percentile(percent) for percent in _PERCENTS)
    return {"requests": len(samples.items), "p50_s": p50, "p99_s": p99, "max_s": most}


def facts_of(options: Any, names: Sequence[str]) -> dict[str, Any]:
    """The options named, for the document."""
    return {name: getattr(options, name) for name in names}
