"""What the peers of the benchmark have in common: a system, its store of objects, and what is found.

A system does the same work as shmcache, or a limit of it. It is started once, and gives a ``Store`` for objects of one
size; what it can do is in ``Store.works``, by the name of the workload. A system that is not there raises ``Missing``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, ClassVar

from cost_common import Run
from typing_extensions import Self

OURS = "shmcache"
FOOTPRINT = 64 << 20  # bytes of objects in a store, and as much room for new ones
BATCH = 256  # keys, where the footprint has so many objects

Work = Callable[[Any], object]


class Missing(Exception):  # noqa: N818 # it is not wrong
    """What this system needs is not there."""


@dataclass
class Store:
    """Objects of one size in one system, each filled, as this process sees them."""

    works: dict[str, Work]
    forget: Callable[[Sequence[Any]], object] = lambda _: None  # takes new objects away again
    native: Callable[[bytes], Any] = lambda key: key  # what the works take for a key: made before the clock runs
    cycle: Callable[[int], AbstractContextManager[Work]] | None = None  # for so many ranks: takes a batch of keys
    address: Any = None  # JSON, for the function ``join`` of the system's module in another process

    def each(self, work: str) -> Work:
        """The batch's version of a work that a system has for one key only."""
        one = self.works[work]

        def of_many(keys: Iterable[Any]) -> None:
            for key in keys:
                one(key)

        return of_many

    @contextmanager
    def cycle_by_key(self, ranks: int) -> Iterator[Work]:
        """Where there are no shares to grant: every rank reads the values by key."""
        hits = self.works["hits"]

        def work(keys: Any) -> None:
            for _ in range(ranks):
                hits(keys)

        yield work


class System(ABC):
    """A context manager: servers run inside it, and nothing is left afterwards."""

    name: ClassVar[str]
    about: ClassVar[str]  #: what of it is compared: a line of the report
    limit: ClassVar[bool] = False  #: no peer, but what nobody can beat
    module: ClassVar[str] = ""  #: whose ``join`` gives another process a way to read, where there is one

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()

    def start(self) -> None:  # noqa: B027 # most need no server
        """Starts what the system needs. Missing where that cannot be."""

    @abstractmethod
    def store(self, keys: Sequence[bytes], value: bytes) -> AbstractContextManager[Store]:
        """A store that has ``value`` under each of ``keys``, and room for FOOTPRINT bytes more."""

    def crew(self, store: Store) -> AbstractContextManager[Any] | None:  # noqa: ARG002 # Ray's takes it
        """Readers of its own, where those of peers_readers.py cannot join."""
        return None


@dataclass
class Finding:
    """What one system took in one column of a workload's table. Times are nanoseconds for one unit."""

    workload: str
    column: str  # "4 KiB", "2 readers", "TP 4"
    system: str
    limit: bool
    median: float
    best: float
    cpu: float  # of the process that does it, median
    times: float  # as long as shmcache: median over pairs of repeats
    cpu_times: float | None  # likewise; None where shmcache's is below the clock's resolution
    repeats: int = field(default=0)


def found(workload: str, column: str, runs: dict[System, Run]) -> Iterator[Finding]:
    """Compares runs that took their repeats in turn."""
    ours = next((run for system, run in runs.items() if system.name == OURS), None)
    for system, run in runs.items():
        beside = run if ours is None else ours
        cpu = _ratio(run.cpu, beside.cpu) if min(beside.cpu) > 0 else None
        yield Finding(
            workload,
            column,
            system.name,
            system.limit,
            median(run.wall),
            min(run.wall),
            median(run.cpu),
            _ratio(run.wall, beside.wall),
            cpu,
            len(run.wall),
        )


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    return median(their_ns / our_ns for their_ns, our_ns in zip(theirs, ours, strict=True))
