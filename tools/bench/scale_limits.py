"""What breaks first: each limit beside what a case needs of it, how far away it is, and what would be changed.

Some limits are the format's or the core's (slots, lanes, the lock); others are goals, stated here: what a person who
runs such a host would not put up with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf, log

from scale_costs import UnitCosts
from scale_host import POPULATE_THREADS, Case, Host, Needs, needs
from scale_layout import LOCK_TIMEOUT_S, MAX_BLOCK_NUMBERS, MAX_LANES, MAX_SLOTS, REGIONS, STALE_S, victims
from scale_lock import Rules, Wait, capacity_of, simulate

from shmcache_tools.text import percent_text, size_text, time_text

START_S = 60.0  # until an engine serves: to populate, to pin
WAIT_S = 10e-3  # for the lock, p99: a step that decodes
HOLD_S = 10e-3  # a hold of the lock: likewise
METADATA = 0.05  # of the arena
MEMORY_SHARE = 0.5  # of the memory's bandwidth
LOOK_S = 1.0  # of shmcache-stat, or a scrape
READING = 0.1  # of the host's cores


@dataclass(frozen=True)
class Limit:
    name: str
    need: str
    limit: str
    headroom: float  # times as much of ``axis`` as described until it breaks; below 1: it is broken there
    axis: str  # what may grow: "memory", "load", "engines"
    change: str


@dataclass(frozen=True)
class Outlook:
    """All that is known of one case."""

    label: str
    need: Needs
    waits: list[Wait]
    changed: dict[str, Wait]  # at the described load, were the core changed so
    limits: list[Limit]  # the nearest first


def outlook(
    case: Case, host: Host, costs: UnitCosts, sizes: Sequence[int], loads: Sequence[float], seed: int
) -> Outlook:
    need = needs(case, host, costs)
    waits = [simulate(case, need, costs, sizes, load, seed) for load in loads]
    changed = {
        "lists of victims kept until used up": simulate(case, need, costs, sizes, 1, seed, Rules(stale_s=inf)),
        "the same, one list for all": simulate(case, need, costs, sizes, 1, seed, Rules(stale_s=inf, one_list=True)),
        "scans outside the lock": simulate(case, replace(need, scan=0.0), costs, sizes, 1, seed),
    }
    return Outlook(case.label, need, waits, changed, limits(host, need, costs, waits))


def limits(host: Host, need: Needs, costs: UnitCosts, waits: Sequence[Wait]) -> list[Limit]:
    """``waits`` has the described load, 1, among others."""
    found = (*_of_format(host, need), *_of_lock(need, costs, waits), *_of_host(host, need, costs))
    return sorted(found, key=lambda limit: limit.headroom)


def _of_format(host: Host, need: Needs) -> Iterator[Limit]:
    fits = need.capacity * MAX_SLOTS / need.objects
    yield Limit(
        "objects",
        f"{need.objects:,}",
        f"{MAX_SLOTS:,} slots",
        MAX_SLOTS / need.objects,
        "memory",
        f"with objects of {size_text(need.object_bytes)} the slots fill {size_text(int(fits))}. An index entry has 24 "
        "bits for the slot, so the limit could be 2**24; or more tokens an object "
        f"({_power(need.objects / MAX_SLOTS * host.token_block)} would do)",
    )
    yield Limit(
        "lanes",
        f"{need.lanes}",
        f"{MAX_LANES}",
        MAX_LANES / need.lanes,
        "engines",
        f"a lane costs {size_text(12 * need.slots + 2048)} here: one for an engine's scheduler and storage, or rows "
        "for live lanes only",
    )
    yield Limit(
        "metadata",
        f"{size_text(need.metadata)}, {percent_text(need.metadata / need.capacity)}",
        percent_text(METADATA),
        METADATA * need.capacity / need.metadata,
        "objects of the same memory",
        "lanes by the processes that there are; larger objects; the time since when a share is held (4 of 12 bytes) in "
        "an arena that wants it",
    )
    numbers = need.capacity // need.block_size * (1 + REGIONS)
    yield Limit(
        "block numbers",
        f"{numbers:,}",
        f"{MAX_BLOCK_NUMBERS:,}",
        MAX_BLOCK_NUMBERS / numbers,
        "memory",
        f"blocks are of {size_text(need.block_size)} here; 64 bits a block number where they must be small",
    )


def _power(tokens: float) -> int:
    """The next power of two."""
    return 1 << max(0, int(tokens - 1e-9)).bit_length()


def _of_lock(need: Needs, costs: UnitCosts, waits: Sequence[Wait]) -> Iterator[Limit]:
    now = next(wait for wait in waits if wait.load == 1)
    yield Limit(
        "the arena lock, held",
        f"{percent_text(now.utilisation)} of the time, {percent_text(now.scans * need.scan)} in scans, "
        f"{now.scans:.1f} a second",
        "all of the time",
        capacity_of(waits),
        "load",
        f"a process throws its list of {victims(need.slots):,} victims away after {time_text(STALE_S * need.slots)}: "
        "keep it until it is used up, or one list for all in the segment; then a lock a shard of the slots",
    )
    yield Limit(
        "the arena lock, p99 wait",
        time_text(now.p99) + (", and too much at the lightest load tried" if waits[0].p99 > WAIT_S else ""),
        time_text(WAIT_S),
        _until(waits, WAIT_S),
        "load",
        "most that wait do so for somebody's scan: see one hold. Reserving a step ahead hides the wait",
    )
    walk = costs.scan_slot.a_lane * need.lanes / max(costs.scan_slot.at(need.lanes), 1e-15)
    yield Limit(
        "one hold: a scan for victims",
        f"{time_text(now.longest_hold)}, {percent_text(walk)} of a scan is looking at {need.lanes} lanes",
        time_text(HOLD_S),
        HOLD_S / now.longest_hold,
        "objects",
        "scan a part of the slots at a time, outside the lock (a victim is looked at again anyway); look at its shares "
        "when it is taken, not when it is listed",
    )
    yield Limit(
        "a lock holder's death",
        f"{time_text(need.rebuild)} in which nobody can change anything",
        f"{time_text(LOCK_TIMEOUT_S)} (lock_timeout_s)",
        LOCK_TIMEOUT_S / need.rebuild,
        "objects",
        "rebuild shards of the slots by several threads, each its own part of the index",
    )
    yield Limit(
        "verify()",
        f"{time_text(need.verify)} under the lock",
        f"{time_text(LOCK_TIMEOUT_S)} (lock_timeout_s)",
        LOCK_TIMEOUT_S / need.verify,
        "objects",
        "verify a part of the slots a hold; nobody calls it while engines serve",
    )


def _until(waits: Sequence[Wait], most: float) -> float:
    """The load at which the p99 reaches ``most``, between those that were tried on a logarithmic scale; the lightest
    where it is reached there."""
    for low, high in pairwise(waits):
        if low.p99 > most:
            return low.load
        if high.p99 > most:
            floor = max(low.p99, 1e-9)
            return low.load * (high.load / low.load) ** (log(most / floor) / log(high.p99 / floor))
    return waits[-1].load


def _of_host(host: Host, need: Needs, costs: UnitCosts) -> Iterator[Limit]:
    gib = need.capacity / 2**30
    yield Limit(
        "pin, each worker",
        time_text(need.pin),
        time_text(START_S),
        START_S / need.pin,
        "memory",
        f"{host.pin_gib:.2f} s/GiB is paid page by page for {gib:,.0f} GiB: huge pages are 512 times fewer; or pin in "
        "the background, part by part, and copy through a staging buffer until then",
    )
    bound = need.capacity / (host.nodes * host.node_rate)
    yield Limit(
        "populate, once",
        time_text(need.populate),
        time_text(START_S),
        START_S / need.populate,
        "memory",
        f"at most {POPULATE_THREADS} threads do it, {costs.populate_rate / 1e9:.1f} GB/s each; the nodes' memory "
        f"allows {time_text(bound)}: a thread a core, bound to each node; in the background; huge pages",
    )
    yield Limit(
        "memory bandwidth",
        percent_text(need.memory_share),
        percent_text(MEMORY_SHARE),
        MEMORY_SHARE / need.memory_share,
        "load",
        "what is saved only if asked for twice; fewer bytes a token (fp8)",
    )
    if host.nodes > 1:
        yield Limit(
            "between NUMA nodes",
            f"{need.remote_rate / 1e9:.1f} GB/s into each",
            f"{host.link_rate / 1e9:.0f} GB/s",
            host.link_rate / max(need.remote_rate, 1.0),
            "load",
            "pages lie where they were first touched, so all but one of so many nodes are remote: an arena a node for "
            "its GPUs, or blocks by the node of who reserves",
        )
    yield Limit(
        "copies to and from a GPU",
        f"{need.gpu_rate / 1e9:.1f} GB/s",
        f"{host.gpu_rate / 1e9:.0f} GB/s",
        host.gpu_rate / need.gpu_rate,
        "load",
        "fewer bytes a token (fp8); replicated objects once for each switch, then between GPUs",
    )
    yield Limit(
        "lookups, grants and reads",
        f"{need.reading_cores:.3f} cores",
        f"{READING * host.cores:.0f} cores",
        READING * host.cores / need.reading_cores,
        "load",
        "nothing: they take no lock, and each process reads for itself",
    )
    yield Limit(
        "one look of shmcache-stat",
        time_text(need.inspect),
        time_text(LOOK_S),
        LOOK_S / need.inspect,
        "objects",
        "count shares when they are taken, not by walking all rows; a scrape each 15 s takes "
        f"{percent_text(need.inspect / 15)} of a core",
    )
