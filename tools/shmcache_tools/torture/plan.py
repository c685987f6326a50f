"""What one round of a torture run is: an arena, who is in it, and what happens to them. All of it follows from the
run's seed and the round's number."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from shmcache import ArenaConfig
from shmcache_tools.torture.objects import BLOCK_BYTES, WRITERS

LEAST_PROCESSES: Final = 4
MOST_PROCESSES: Final = 32

_LONG_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class Seat:
    """A part that one process plays, and, when it is killed, its successor."""

    slot: int
    group: str | None
    rank: int | None
    world_size: int

    @property
    def text(self) -> str:
        if self.group is None:
            return f"private {self.slot}"
        return f"{self.group} {'controller' if self.rank is None else f'rank {self.rank}'}"

    @property
    def team(self) -> str:
        """Whose ranks it grants to."""
        return self.group or f"private {self.slot}"

    @property
    def collects(self) -> bool:
        """Whether it writes objects together with another rank."""
        return self.rank is not None and self.world_size == WRITERS

    @property
    def granted_as(self) -> int | None:
        """The rank as which it is granted shares; None: nobody can."""
        return 0 if self.group is None else self.rank


@dataclass(frozen=True, slots=True)
class Plan:
    """One round."""

    seed: str
    name: str
    seats: tuple[Seat, ...]
    keys: int
    blocks: int
    slots: int
    read_lease_s: float = _LONG_S
    write_lease_s: float = _LONG_S
    lock_timeout_s: float = 5.0
    kills: bool = True
    kill_gap_ms: float = 12.0  #: the mean time between two kills
    stop_gap_ms: float = 4.0  #: the mean time between two stops
    stop_ms: float = 8.0  #: processes are stopped for at most so long
    rejoins: bool = True  #: processes close and attach again
    force: bool = True  #: objects are deleted by force

    @property
    def config(self) -> ArenaConfig:
        return ArenaConfig(
            self.blocks * BLOCK_BYTES,
            block_size=BLOCK_BYTES,
            slots=self.slots,
            lanes=len(self.seats) + 2,
            read_lease_s=self.read_lease_s,
            write_lease_s=self.write_lease_s,
            lock_timeout_s=self.lock_timeout_s,
        )

    @property
    def exact(self) -> bool:
        """Whether nobody dies or leaves, and no share ends but by being used: then each one can be accounted for."""
        return not (self.kills or self.rejoins or self.force) and self.read_lease_s == _LONG_S

    @property
    def patient(self) -> bool:
        """Whether the arena lock is always had in the end: no process is stopped for as long as others wait."""
        return self.lock_timeout_s * 1000 > 4 * self.stop_ms

    @property
    def text(self) -> str:
        return f"{self.name}: {self.keys} keys, {self.slots} slots, {self.blocks} blocks"


def seats_of(processes: int) -> tuple[Seat, ...]:
    """Groups of two ranks and a controller, and processes of their own: each group is whole."""
    parts: list[tuple[str | None, int | None]] = [("left", 0), ("left", 1), ("left", None), (None, None)]
    if processes >= 8:
        parts += [("right", 0), ("right", 1), ("right", None), (None, None)]
        more: list[tuple[str | None, int | None]] = [("left", None), (None, None), ("right", None), (None, None)]
        parts += [more[i % len(more)] for i in range(processes - len(parts))]
    parts += [(None, None)] * (processes - len(parts))
    return tuple(Seat(slot, group, rank, WRITERS if group else 1) for slot, (group, rank) in enumerate(parts))


def plan_of(seed: int, number: int, processes: int) -> Plan:
    """The round of this number. Which kind it is goes by turns; the arena is small, in one way or another."""
    name = f"{seed}-{number}"
    chance = random.Random(name)
    slots, blocks = chance.choice([(2, 8), (3, 4), (5, 16), (8, 8), (8, 32), (24, 24)])
    kind, given = _KINDS[number % len(_KINDS)]
    keys = slots + chance.randint(0, slots + 2)
    return Plan(name, kind, seats_of(processes), keys, blocks, slots, **given)  # type: ignore[arg-type]


_KINDS: Final[tuple[tuple[str, dict[str, object]], ...]] = (
    ("storm", {}),
    ("short leases", {"read_lease_s": 0.02, "write_lease_s": 0.02, "stop_ms": 60.0, "stop_gap_ms": 6.0}),
    ("storm", {"kill_gap_ms": 5.0, "stop_ms": 1.0, "force": False}),
    ("stops", {"kills": False, "rejoins": False, "force": False, "stop_gap_ms": 1.0, "stop_ms": 3.0}),
    ("impatience", {"lock_timeout_s": 0.02, "stop_ms": 80.0, "stop_gap_ms": 10.0}),
    ("long stops", {"stop_ms": 200.0, "write_lease_s": 0.1, "stop_gap_ms": 20.0}),
)
