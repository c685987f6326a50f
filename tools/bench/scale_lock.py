"""The arena lock as a queue: engines whose ranks come in bursts, one at a time, first come first served.

A burst is a step of an engine: all its ranks reserve the same keys at about the same time; the first makes room, the
others join. Steps come as a Poisson process, so an engine does not slow down when it waits: beyond what the lock can
give, waits grow without end. A process whose list of victims is older than a tenth of a second, or used up by
everybody's evictions, makes it anew while it holds the lock. A waiter spins first; one that slept holds the lock up
until it runs. Readers take no lock, and are not here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scale_costs import UnitCosts
from scale_host import Case, Host, Needs
from scale_layout import HOLD_KEYS, LOCK_TIMEOUT_S, SPIN_S, STALE_S, victims

from shmcache_tools.trace import TraceRequest, best_hit_rate, read_trace

HOLD_S = 0.2e-6  # to take and give the lock, and what a hold does once: about
JITTER_S = 50e-6  # within which the ranks of an engine come
MEDIAN_TOKENS, SIGMA, MOST_TOKENS = 4096, 1.2, 131072  # new in a request, where there is no trace: lognormal
TRACE_CHUNK = 512  # tokens of a chunk of Mooncake's traces
BURSTS = 3000
SATURATED = 0.95  # of the time that the lock is held, or on its way to a sleeper
Floats = Any  # an array of float64


@dataclass(frozen=True)
class Traffic:
    """New tokens of requests, and where that comes from."""

    tokens: Sequence[int]
    hit_rate: float | None
    source: str


@dataclass(frozen=True)
class Wait:
    """How long changes waited for the lock at so many times the described load, in seconds."""

    load: float
    utilisation: float
    mean: float
    p50: float
    p99: float
    most: float
    longest_hold: float
    scans: float  # a second
    holds: float  # a second
    timed_out: float  # share that waited longer than lock_timeout_s

    @property
    def saturated(self) -> bool:
        return self.utilisation >= SATURATED


def traffic_of(trace: Path | None, seed: int) -> Traffic:
    """TraceError where the file is no trace."""
    if trace is None:
        drawn = np.random.default_rng(seed).lognormal(np.log(MEDIAN_TOKENS), SIGMA, 4096)
        source = f"lognormal, median {MEDIAN_TOKENS:,} tokens, sigma {SIGMA}, at most {MOST_TOKENS:,}"
        return Traffic(np.clip(drawn, 1, MOST_TOKENS).astype(int).tolist(), None, source)
    requests = read_trace(trace)
    tokens = [chunks * TRACE_CHUNK for chunks in _new_chunks(requests) if chunks]
    return Traffic(tokens, best_hit_rate(requests), f"{trace.name}, {len(requests):,} requests")


def _new_chunks(requests: Iterable[TraceRequest]) -> Iterable[int]:
    """Of each request: how many chunks nobody had before."""
    seen: set[int] = set()
    for request in requests:
        before = len(seen)
        seen.update(request.hash_ids.tolist())
        yield len(seen) - before


def bursts(traffic: Traffic, host: Host) -> list[int]:
    """Keys that a step saves, of every step of every request."""
    pieces: list[int] = []
    for tokens in traffic.tokens:
        whole, rest = divmod(tokens, host.step_tokens)
        pieces += [host.step_tokens] * whole + [rest] * (rest > 0)
    return [max(1, piece // host.token_block) for piece in pieces]


def serve(arrivals: Iterable[tuple[float, Any]], hold: Callable[[float, Any], float], wake: float = 0.0) -> Floats:
    """Rows of waited, held and lost to waking, for arrivals in order of time; ``hold(start, who)`` says how long."""
    free_at, rows = 0.0, []
    for at, who in arrivals:
        waited = max(free_at - at, 0.0)
        lost = wake if waited > SPIN_S else 0.0
        start = at + waited + lost
        held = hold(start, who)
        free_at = start + held
        rows.append((waited + lost, held, lost))
    return np.array(rows).reshape(-1, 3)


@dataclass(frozen=True)
class Rules:
    """Of lists of victims: how long one is used, in seconds a slot, and whether there is one for all processes."""

    stale_s: float = STALE_S
    one_list: bool = False


TODAY = Rules()


class Holds:
    """How long each hold takes, with the lists of victims that ``rules`` allow."""

    def __init__(self, case: Case, need: Needs, costs: UnitCosts, rules: Rules) -> None:
        self._case, self._costs = case, costs
        self._reserve = costs.reserve_key + costs.evict_key.at(need.lanes)
        self._scan, self._victims = need.scan, victims(need.slots)
        self._rules, self._stale_s = rules, rules.stale_s * need.slots
        self._listed = np.full(case.engines * case.tp, -np.inf)
        self._left = np.zeros(case.engines * case.tp)
        self._evicted_at = np.zeros(case.engines * case.tp)
        self._evicted = 0
        self._made: set[int] = set()
        self.scans = 0

    def __call__(self, start: float, who: tuple[int, int, int]) -> float:
        process, burst, keys = who
        if self._case.writers > 1 and burst in self._made:
            return HOLD_S + keys * self._costs.join_key
        self._made.add(burst)
        return HOLD_S + keys * self._reserve + self._scans(start, process, keys) * self._scan

    def _scans(self, start: float, process: int, keys: int) -> int:
        """Lists that are made for so many evictions. What others evicted since was in this list, too."""
        process = 0 if self._rules.one_list else process
        left = self._left[process] - (self._evicted - self._evicted_at[process])
        if start - self._listed[process] >= self._stale_s:
            left, self._listed[process] = 0, start
        missing = max(keys - max(left, 0), 0)
        scans = int(-(-missing // self._victims))
        self._evicted += keys
        self._left[process] = max(left, 0) + scans * self._victims - keys
        self._evicted_at[process] = self._evicted
        self.scans += scans
        return scans


def simulate(
    case: Case,
    need: Needs,
    costs: UnitCosts,
    sizes: Sequence[int],
    load: float,
    seed: int,
    rules: Rules = TODAY,
) -> Wait:
    rng = np.random.default_rng(seed)
    drawn = rng.choice(np.array(sizes), BURSTS)
    rate = load * need.saved / float(np.mean(sizes))  # bursts a second, of all engines
    times = np.cumsum(rng.exponential(1 / rate, BURSTS))
    arrivals = _arrivals(case, times, drawn, rng)
    holds = Holds(case, need, costs, rules)
    rows = serve(arrivals, holds, costs.wake)
    waited, held, lost = rows.T
    ends = max(at + row[0] + row[1] for (at, _), row in zip(arrivals, rows, strict=True))
    return Wait(
        load=load,
        utilisation=float((held.sum() + lost.sum()) / ends),
        mean=float(waited.mean()),
        p50=float(np.quantile(waited, 0.5)),
        p99=float(np.quantile(waited, 0.99)),
        most=float(waited.max()),
        longest_hold=float(held.max()),
        scans=float(holds.scans / ends),
        holds=float(len(rows) / ends),
        timed_out=float((waited > LOCK_TIMEOUT_S).mean()),
    )


def _arrivals(
    case: Case, times: Floats, sizes: Floats, rng: np.random.Generator
) -> list[tuple[float, tuple[int, int, int]]]:
    """A burst comes from one engine, from as many of its ranks as write; more keys than a hold has come as several."""
    engines = rng.integers(0, case.engines, len(times))
    jitter = rng.uniform(0, JITTER_S, (len(times), case.writers))
    found = []
    for burst, (at, keys, engine) in enumerate(zip(times, sizes, engines, strict=True)):
        for part, done in enumerate(range(0, int(keys), HOLD_KEYS)):
            size = min(HOLD_KEYS, int(keys) - done)
            for rank in range(case.writers):
                who = (int(engine) * case.tp + rank, burst << 8 | part, size)
                found.append((float(at + jitter[burst, rank]), who))
    return sorted(found)


def capacity_of(waits: Sequence[Wait]) -> float:
    """Times the described load at which the lock is always held: by the heaviest load that it still bears."""
    borne = [wait.load / wait.utilisation for wait in waits if not wait.saturated]
    return borne[-1] if borne else waits[0].load / max(waits[0].utilisation, 1.0)
