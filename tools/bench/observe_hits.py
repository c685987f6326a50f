"""What an engine notices of being looked at: its reads beside scrapes of its arena by another process.

The engine (observe_engine.py) reads for some seconds while nobody looks, while the arena is scraped once a second, and
so on, in turn and several times over; each phase is compared with the quiet one of its own round.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Final

import observe_engine
from observe_scrape import large_arena, scrape_of

ENGINE: Final = Path(observe_engine.__file__)
QUIET: Final = "while nobody looks"
PERIODS: Final = {QUIET: None, "while scraped 1 / s": 1.0, "while scraped 10 / s": 0.1, "scraped all the time": 0.0}


@dataclass
class Phase:
    """All rounds of one way of being looked at. Times are nanoseconds a batch."""

    name: str
    scrapes: int = 0
    rounds: list[dict[str, float]] = field(default_factory=list)

    def of(self, what: str) -> float:
        """The median over the rounds."""
        return median(found[what] for found in self.rounds)

    def times(self, what: str, quiet: Phase) -> float:
        """As a multiple of the quiet phases, round by round."""
        pairs = zip(self.rounds, quiet.rounds, strict=True)
        return median(found[what] / still[what] for found, still in pairs)


def phases(objects: int, rounds: int, seconds: float, tick: Callable[[], object]) -> list[Phase]:
    """The quiet one first. ``tick`` is called after each."""
    found = [Phase(name) for name in PERIODS]
    with large_arena(objects) as name, _engine(name) as ask:
        scrape = scrape_of(name)
        ask(seconds)  # warms up
        for _ in range(rounds):
            for phase in found:
                with _scraping(scrape, PERIODS[phase.name], phase):
                    phase.rounds.append(ask(seconds))
                tick()
    return found


@contextmanager
def _engine(name: str) -> Iterator[Callable[[float], dict[str, float]]]:
    """Has another process read for so many seconds: what it measured."""
    command = [sys.executable, str(ENGINE), name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as engine:
        assert engine.stdin is not None  # noqa: S101 # as asked for above
        assert engine.stdout is not None  # noqa: S101
        orders, answers = engine.stdin, engine.stdout

        def ask(seconds: float) -> dict[str, float]:
            orders.write(f"{seconds}\n")
            orders.flush()
            return dict(json.loads(answers.readline()))

        try:
            if answers.readline() != "ready\n":
                raise RuntimeError("the engine could not start; see its message above")
            yield ask
        finally:
            engine.kill()


@contextmanager
def _scraping(scrape: Callable[[], object], period: float | None, phase: Phase) -> Iterator[None]:
    """Scrapes every ``period`` seconds for the time of the block; None: not at all."""
    over = threading.Event()

    def go_on() -> None:
        following = time.perf_counter()
        while not over.wait(max(0.0, following - time.perf_counter())):
            scrape()
            phase.scrapes += 1
            following += period or 0.0

    if period is None:
        yield
        return
    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
