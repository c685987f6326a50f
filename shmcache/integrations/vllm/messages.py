"""What the scheduler's side and the workers' side tell each other, once a step."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

__all__ = ["Load", "Report", "Save", "Shape", "Step"]


@dataclass(frozen=True)
class Shape:
    """How an object, one block of all layers and ranks, is made up of parts.

    ``replicas`` consecutive ranks hold the same bytes, and have one part between them: MLA's latent vectors, or KV
    heads that are fewer than the ranks.
    """

    ranks: int
    replicas: int
    part_bytes: int

    @property
    def parts(self) -> int:
        """Of an object."""
        return self.ranks // self.replicas

    @property
    def object_bytes(self) -> int:
        """Of all parts, one after the other."""
        return self.parts * self.part_bytes

    @property
    def writers(self) -> int:
        """Of an object: a rank for each part, and the scheduler, which reserves and publishes it."""
        return self.parts + 1

    def writes(self, rank: int) -> bool:
        """Whether a rank saves its part; its replicas do not."""
        return rank % self.replicas == 0

    def part(self, rank: int) -> slice:
        """The bytes of an object that are a rank's."""
        start = rank // self.replicas * self.part_bytes
        return slice(start, start + self.part_bytes)


@dataclass(frozen=True)
class Load:
    """Objects to be copied into blocks of the engine, one each; shares of them are granted to every rank."""

    request_id: str
    keys: list[bytes]
    blocks: list[int]
    between_steps: bool


@dataclass(frozen=True)
class Save:
    """Blocks of the engine to be copied into objects that the scheduler has reserved."""

    job: int
    keys: list[bytes]
    blocks: list[int]


@dataclass
class Step:
    """From the scheduler to every worker, for one step of the engine."""

    epoch: int  #: grows once the scheduler knows of failed loads
    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    flush: list[int] = field(default_factory=list)  #: jobs whose blocks this step writes over
    closed: list[str] = field(default_factory=list)  #: finished requests that need their blocks no longer


@dataclass
class Report:
    """From the workers to the scheduler: of one rank, or of all, added up."""

    done: Counter[int] = field(default_factory=Counter)  #: jobs, and how many ranks are through with each
    failed: set[int] = field(default_factory=set)  #: of these, jobs that a rank could not do
    bad_epoch: int = -1  #: the last epoch in which a rank could not load something

    def __bool__(self) -> bool:
        return bool(self.done) or self.bad_epoch >= 0

    def add(self, other: Report) -> None:
        """What another rank said."""
        self.done.update(other.done)
        self.failed |= other.failed
        self.bad_epoch = max(self.bad_epoch, other.bad_epoch)
