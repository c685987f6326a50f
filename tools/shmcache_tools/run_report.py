"""What programs that run requests through an arena and L2 report alike: how far they are, what was moved, a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from shmcache.stats import Counters, Stats
from shmcache_tools.text import count_text, gigabytes_text, plural, printable, size_text, time_text

Rows = list[tuple[str, str | Text]]

_BAR_WIDTH: Final = 40


def progress_bars(finished: int, requests: int, elapsed_s: float, stats: Stats) -> Table:
    """How many requests are done, with the time that is left at this pace, and how full the arena is."""
    left = f", {elapsed_s / finished * (requests - finished):.0f} s left" if finished else ""
    bars = Table.grid(padding=(0, 2, 0, 0))
    bars.add_row(
        Text("requests", style="bold"),
        ProgressBar(requests, finished, width=_BAR_WIDTH),
        f"{count_text(finished)} of {count_text(requests)}, {elapsed_s:.0f} s{left}",
    )
    bars.add_row(
        Text("arena", style="bold"),
        ProgressBar(stats.capacity, stats.used_bytes, width=_BAR_WIDTH, finished_style="bar.complete"),
        f"{size_text(stats.used_bytes)} of {size_text(stats.capacity)}",
    )
    return bars


def verdict_text(faults: Sequence[str]) -> Text:
    """Whether a run was good, and else why not."""
    if faults:
        return Text("FAILED: " + printable("; ".join(faults)), style="bold red")
    return Text("All good: every chunk right, no share left, the arena is sound.", style="green")


def moved_text(chunks: int, nbytes: int) -> str:
    """``1,204 chunks, 0.08 GB``."""
    return f"{plural(chunks, 'chunk')}, {gigabytes_text(nbytes)}"


def l2_failures(counters: Counters) -> int:
    """Calls of L2 that failed, and chunks that it did not take in time."""
    calls = counters.l2_lookup_errors + counters.l2_load_errors + counters.l2_store_errors
    return calls + counters.l2_timeouts + counters.l2_store_drops


def l2_rows(l2: str | None, stats: Stats, flush_s: float) -> Rows:
    """An L2 at the end of a run, which then waited ``flush_s`` for the last stores. ``l2``: in words, None for none."""
    if l2 is None:
        return [("L2", "none")]
    counters = stats.counters
    stored = moved_text(counters.l2_stores, counters.l2_stored_bytes)
    rows: Rows = [
        ("L2", printable(l2)),
        ("  loads", moved_text(counters.l2_loads, counters.l2_loaded_bytes)),
        ("  stores", f"{stored}, the last {time_text(flush_s)} after the end"),
        ("  evictions", moved_text(counters.l2_evictions, counters.l2_evicted_bytes)),
    ]
    rare = [
        ("  not loaded for want of room", counters.prefetch_no_space, "request"),
        ("  not stored for want of room", counters.l2_store_no_space, "chunk"),
        ("  gone before the load", counters.l2_load_misses, "chunk"),
    ]
    rows += [(name, plural(count, noun)) for name, count, noun in rare if count]
    if failures := l2_failures(counters) + counters.l2_damaged:
        rows.append(("  failures", Text(f"{count_text(failures)}", style="red")))
    return rows


def l2_progress_rows(stats: Stats) -> Rows:
    """What goes on with L2 at this moment."""
    counters, gauges = stats.counters, stats.gauges
    requests, loading = plural(gauges.prefetch_in_flight, "request"), plural(gauges.l2_loading, "chunk")
    return [
        ("in flight", f"{requests}, {loading} loading"),
        ("loaded from L2", moved_text(counters.l2_loads, counters.l2_loaded_bytes)),
        (
            "stored to L2",
            f"{gigabytes_text(counters.l2_stored_bytes)}, {size_text(gauges.l2_backlog_bytes)} on the way",
        ),
    ]
