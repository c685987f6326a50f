"""The checker of tools/torture, on histories written by hand: it finds what cannot be, and nothing else."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from shmcache import Counters, Status
from shmcache_tools.torture.check import check
from shmcache_tools.torture.counts import check_counters
from shmcache_tools.torture.history import Audit, History, history_of, history_text
from shmcache_tools.torture.log import COLLECTIVE, FORCE, RECORD_WORDS, TEMPORARY, Code, Log, Op, status_text
from shmcache_tools.torture.objects import (
    PART_BYTES,
    VERSION_BITS,
    WRITERS,
    bytes_of,
    key_of,
    nbytes_of,
    part_of,
    version_in,
)
from shmcache_tools.torture.plan import MOST_PROCESSES, Plan, plan_of, seats_of

OK, NOT_FOUND, IN_FLIGHT, EXISTS = Status.OK, Status.NOT_FOUND, Status.IN_FLIGHT, Status.EXISTS
NO_SHARE, LOCKED, NOT_OWNER = Status.NO_SHARE, Status.LOCKED, Status.NOT_OWNER

#: Slots of seats_of(8).
RANK_0, RANK_1, CONTROLLER, ALONE, OTHER_0, OTHER_1, OTHER_CONTROLLER, BESIDE = range(8)
_US = 1000
PLAN = Plan("test", "test", seats_of(8), keys=2, blocks=8, slots=4)
LEASE_US = 1000.0
SHORT = replace(PLAN, read_lease_s=LEASE_US / 1e6, write_lease_s=LEASE_US / 1e6)


class Script:
    """A history, written by hand. Times are microseconds; every process has attached before 0."""

    def __init__(self, plan: Plan = PLAN) -> None:
        self.plan = plan
        self.audits: list[Audit] = []
        self._logs: list[list[bytes]] = [[] for _ in plan.seats]
        for slot in range(len(plan.seats)):
            self.do(slot, Op.ATTACH, -10, -5)

    def do(
        self,
        slot: int,
        op: Op,
        begin: float,
        end: float | None,
        status: int = OK,
        version: int = 0,
        *,
        key: int = 0,
        flags: int = 0,
        aux: int = 0,
        ref: int = 0,
    ) -> int:
        """One operation, of one key; its record. Without an end its process died in it."""
        whole = op in (Op.ATTACH, Op.CLOSE, Op.DEATH, Op.EVICT, Op.CLEAR)
        origin = 1_000_000  # of all times
        head = op | (not whole) << 8 | flags << 16 | aux << 32
        word = 0 if whole else key | status << 8 | version << 16
        times = (int((begin + origin) * _US), 0 if end is None else int((end + origin) * _US))
        self._logs[slot].append(struct.pack("<16Q", *times, head, ref, word, *[0] * 11))
        return len(self._logs[slot]) - 1

    def put(self, begin: float, version: int, *, slot: int = ALONE, key: int = 0) -> None:
        self.do(slot, Op.PUT, begin, begin + 10, OK, version, key=key)

    def read(self, begin: float, until: float, version: int, *, slot: int = BESIDE, key: int = 0) -> None:
        """Holds it until then."""
        record = self.do(slot, Op.READ, begin, begin + 10, OK, version, key=key)
        self.do(slot, Op.RELEASE, until, until + 5, OK, version, key=key, ref=record)

    def look(self, begin: float, status: int, *, slot: int = BESIDE, op: Op = Op.STATUS, **more: Any) -> None:
        self.do(slot, op, begin, begin + 5, status, **more)

    def die(self, slot: int, begin: float) -> None:
        self.do(slot, Op.DEATH, begin, begin + 20)

    def write(self, begin: float, until: float, version: int, status: int = OK, **more: Any) -> None:
        """Reserved at first, published at last."""
        slot = more.pop("slot", ALONE)
        aux = more.pop("aux", 0)
        self.do(slot, Op.RESERVE_WRITE, begin, begin + 10, OK, version, **more)
        self.do(slot, Op.PUBLISH, until, until + 5, status, version, aux=aux, **more)

    def part(self, slot: int, begin: float, until: float, version: int, status: int = OK) -> None:
        self.write(begin, until, version, status, slot=slot, flags=COLLECTIVE)

    def audit(self, time: float, **reserved: int) -> None:
        seats = {"rank_0": RANK_0, "rank_1": RANK_1}
        at = int((time + 1_000_000) * _US)
        self.audits.append(Audit(at, {seats[name]: count for name, count in reserved.items()}))

    @property
    def history(self) -> History:
        return history_of(self.plan, [b"".join(log) for log in self._logs], self.audits)

    def found(self) -> list[str]:
        return [violation.text for violation in check(self.history)]


Act = Callable[[Script], None]
GOOD: dict[str, Act] = {}
BAD: dict[str, tuple[str, Act]] = {}


def good(act: Act) -> Act:
    GOOD[act.__name__] = act
    return act


def bad(rule: str) -> Callable[[Act], Act]:
    def note(act: Act) -> Act:
        BAD[act.__name__] = (rule, act)
        return act

    return note


def both(sides: str) -> int:
    """The version of an object of two parts."""
    first, second = sides.split()
    return int(first, 16) << VERSION_BITS | int(second, 16)


# What readers see


@good
def one_after_the_other(script: Script) -> None:
    for i in range(5):
        at = 1000 * i
        script.look(at, NOT_FOUND)
        script.put(at + 100, 0x10 + i)
        script.read(at + 200, at + 300, 0x10 + i)
        script.look(at + 400, EXISTS, op=Op.PUT, version=0x30 + i)
        script.look(at + 500, LOCKED if i == 3 else OK, op=Op.DELETE)
        if i == 3:
            script.do(ALONE, Op.EVICT, at + 600, at + 700)


@good
def a_read_at_the_time_of_its_removal(script: Script) -> None:
    script.put(0, 0x10)
    script.do(BESIDE, Op.READ, 100, 300, OK, 0x10)
    script.do(BESIDE, Op.RELEASE, 310, 312, OK, 0x10, ref=1)
    script.do(ALONE, Op.DELETE, 50, 400, OK)
    script.put(500, 0x20)


@bad("there at the same time")
def a_stale_read(script: Script) -> None:
    script.put(0, 0x10)
    script.do(ALONE, Op.DELETE, 100, 110)
    script.put(200, 0x20)
    script.read(300, 400, 0x10)


@bad("deleted an object that was there afterwards")
def a_deleted_version_read_later(script: Script) -> None:
    script.put(0, 0x10)
    script.do(ALONE, Op.DELETE, 100, 110)
    script.read(300, 400, 0x10)


@bad("deleted an object that was there afterwards")
def a_deleted_object_found_later(script: Script) -> None:
    script.put(0, 0x10)
    script.do(ALONE, Op.DELETE, 100, 110)
    script.look(200, OK)


@bad("deleted the same object twice")
def deleted_twice(script: Script) -> None:
    script.put(0, 0x10)
    script.do(ALONE, Op.DELETE, 100, 110)
    script.do(BESIDE, Op.DELETE, 105, 120)


@bad("a version that nobody wrote under this key")
def a_read_of_what_was_never_written(script: Script) -> None:
    script.read(0, 100, 0x10)


@bad("a version that nobody wrote under this key")
def a_read_of_another_key(script: Script) -> None:
    script.put(0, 0x10, key=1)
    script.put(100, 0x20)
    script.read(200, 300, 0x10)


@bad("a version that nobody had begun to publish")
def a_read_of_what_is_not_published(script: Script) -> None:
    script.do(BESIDE, Op.READ, 20, 30, OK, 0x10)
    script.do(BESIDE, Op.RELEASE, 200, 210, OK, 0x10, ref=1)
    script.write(0, 100, 0x10)


@bad("a version that nobody had begun to publish")
def a_read_of_what_was_aborted(script: Script) -> None:
    script.do(ALONE, Op.RESERVE_WRITE, 0, 10, OK, 0x10)
    script.do(ALONE, Op.ABORT, 100, 110, OK, 0x10)
    script.read(50, 90, 0x10)


@bad("bytes of no version of this key")
def wrong_bytes(script: Script) -> None:
    script.put(0, 0x10)
    record = script.do(BESIDE, Op.READ, 100, 110, Code.WRONG, 0x10)
    script.do(BESIDE, Op.RELEASE, 200, 210, OK, 0x10, ref=record)


@bad("bytes of no version of this key")
def bytes_that_change_while_they_are_held(script: Script) -> None:
    script.put(0, 0x10)
    record = script.do(BESIDE, Op.READ, 100, 110, OK, 0x10)
    script.do(BESIDE, Op.RELEASE, 200, 210, Code.WRONG, 0x10, ref=record)


@bad("there at the same time")
def two_versions_at_once(script: Script) -> None:
    script.put(0, 0x10)
    script.read(100, 500, 0x10)
    script.put(200, 0x20)


@bad("there at the same time")
def replaced_while_a_stopped_process_holds_it(script: Script) -> None:
    """It is stopped from 120 to 900, and not dead."""
    script.put(0, 0x10)
    script.read(100, 900, 0x10)
    script.do(ALONE, Op.RESERVE_WRITE, 300, 310, OK, 0x20)
    script.do(ALONE, Op.ABORT, 400, 410, OK, 0x20)


@good
def replaced_after_its_reader_died(script: Script) -> None:
    script.put(0, 0x10)
    script.do(BESIDE, Op.READ, 100, 110, OK, 0x10)
    script.die(BESIDE, 200)
    script.do(BESIDE, Op.ATTACH, 250, 260)
    script.put(210, 0x20)
    script.read(300, 310, 0x20)


@bad("there at the same time")
def replaced_before_its_reader_died(script: Script) -> None:
    script.put(0, 0x10)
    script.do(BESIDE, Op.READ, 100, 110, OK, 0x10)
    script.die(BESIDE, 200)
    script.put(150, 0x20)


@bad("deleted, and it was there all the time")
def deleted_while_held(script: Script) -> None:
    script.put(0, 0x10)
    script.read(100, 500, 0x10)
    script.do(ALONE, Op.DELETE, 200, 210)


@bad("not found, and it was there all the time")
def not_found_while_held(script: Script) -> None:
    script.put(0, 0x10)
    script.read(100, 500, 0x10)
    script.look(200, NOT_FOUND, slot=ALONE)


@bad("not readable, and it was ready all the time")
def in_flight_while_held(script: Script) -> None:
    script.put(0, 0x10)
    script.read(100, 500, 0x10)
    script.look(200, IN_FLIGHT, slot=ALONE)


@bad("not readable, and it was ready all the time")
def lookup_stops_at_what_is_held(script: Script) -> None:
    script.put(0, 0x10)
    script.read(100, 500, 0x10)
    script.look(200, Code.NOT_READY, slot=ALONE, op=Op.LOOKUP)


@bad("found in flight, and no object can have been being written")
def in_flight_without_a_writer(script: Script) -> None:
    script.put(0, 0x10)
    script.look(100, IN_FLIGHT)


@bad("found ready, and no object can have been")
def ready_before_it_was_published(script: Script) -> None:
    script.look(20, OK)
    script.write(0, 100, 0x10)


@bad("found locked or without share")
def locked_by_nothing(script: Script) -> None:
    script.look(0, LOCKED, op=Op.DELETE)
    script.put(100, 0x10)


@bad("left, or came, while there must have been a share")
def unlooked_at_and_replaced(script: Script) -> None:
    script.put(0, 0x10)
    script.read(100, 500, 0)
    script.put(200, 0x20)


@bad("no answer of this operation")
def no_such_answer(script: Script) -> None:
    script.put(0, 0x10)
    script.look(100, EXISTS)


# Writers


@good
def a_put_that_was_killed(script: Script) -> None:
    script.do(ALONE, Op.PUT, 100, None, Code.PENDING, 0x10)
    script.die(ALONE, 110)
    script.look(500, IN_FLIGHT)
    script.look(600, IN_FLIGHT, op=Op.READ)
    script.put(700, 0x20, slot=BESIDE)


@good
def a_write_that_was_killed(script: Script) -> None:
    """It may have happened, or not; later somebody reaps it."""
    script.look(0, NOT_FOUND)
    script.do(ALONE, Op.PUT, 100, None, Code.PENDING, 0x10)
    script.die(ALONE, 110)
    script.look(120, IN_FLIGHT)
    script.look(130, OK)
    script.read(140, 150, 0x10)
    script.look(160, NOT_FOUND)
    script.put(200, 0x20, slot=BESIDE)


@good
def a_publication_that_was_killed(script: Script) -> None:
    script.do(ALONE, Op.RESERVE_WRITE, 0, 10, OK, 0x10)
    script.do(ALONE, Op.PUBLISH, 100, None, Code.PENDING, 0x10)
    script.die(ALONE, 110)
    script.read(140, 150, 0x10)


@good
def a_dead_writer_is_in_nobodys_way(script: Script) -> None:
    script.do(ALONE, Op.RESERVE_WRITE, 0, 10, OK, 0x10)
    script.die(ALONE, 100)
    script.put(110, 0x20, slot=BESIDE)


@bad("there at the same time")
def a_stopped_writer_loses_its_key(script: Script) -> None:
    script.write(0, 900, 0x10, NOT_OWNER)
    script.put(100, 0x20, slot=BESIDE)


@bad("taken from its writer before its lease was over")
def a_writer_that_lost_its_key_early(script: Script) -> None:
    script.write(0, 900, 0x10, NOT_OWNER)


@good
def a_writer_beyond_its_lease(script: Script) -> None:
    script.plan = SHORT
    script.write(0, 2 * LEASE_US, 0x10, NOT_OWNER)
    script.look(LEASE_US - 50, IN_FLIGHT, op=Op.PUT, version=0x18)
    script.put(LEASE_US + 50, 0x20, slot=BESIDE)


@bad("there at the same time")
def a_writer_just_within_its_lease(script: Script) -> None:
    script.plan = SHORT
    script.write(0, 2 * LEASE_US, 0x10, NOT_OWNER)
    script.put(LEASE_US - 50, 0x20, slot=BESIDE)


@bad("found in flight, and no object can have been being written")
def a_writer_waits_for_one_beyond_its_lease(script: Script) -> None:
    script.plan = SHORT
    script.write(0, 2 * LEASE_US, 0x10)
    script.look(LEASE_US + 50, IN_FLIGHT, op=Op.PUT, version=0x18)


@bad("no answer of this operation")
def a_writer_finds_its_object_finished(script: Script) -> None:
    script.write(0, 100, 0x10, EXISTS)


@bad("no answer of this operation")
def somebody_elses_write_was_finished(script: Script) -> None:
    script.write(0, 100, 0x10)
    script.look(50, OK, op=Op.STRAY)


@bad("not found, and it was there all the time")
def not_found_while_it_is_being_written(script: Script) -> None:
    script.write(0, 100, 0x10)
    script.look(50, NOT_FOUND)


@bad("there at the same time")
def two_writers_of_one_key(script: Script) -> None:
    script.write(0, 100, 0x10)
    script.write(50, 150, 0x20, slot=BESIDE)


# Reserved shares


@good
def granted_claimed_returned_cancelled(script: Script) -> None:
    script.put(0, 0x10)
    script.look(100, OK, slot=CONTROLLER, op=Op.RESERVE_READ, aux=2)
    script.look(110, OK, slot=CONTROLLER, op=Op.RESERVE_READ, aux=1)
    script.audit(120, rank_0=2, rank_1=1)
    script.read(200, 210, 0x10, slot=RANK_0)
    script.look(230, OK, slot=RANK_0, op=Op.FINISH_READ)
    script.look(240, NO_SHARE, slot=RANK_0, op=Op.FINISH_READ)
    script.look(250, OK, slot=CONTROLLER, op=Op.CANCEL_READ, aux=2)
    script.look(260, NO_SHARE, slot=RANK_1, op=Op.FINISH_READ)
    script.look(300, OK, op=Op.DELETE)
    script.audit(400, rank_0=0, rank_1=0)


@bad("a reserved share was lost")
def a_lost_share(script: Script) -> None:
    script.put(0, 0x10)
    script.look(100, OK, slot=CONTROLLER, op=Op.RESERVE_READ, aux=2)
    script.look(200, OK, slot=RANK_0, op=Op.FINISH_READ)
    script.look(210, NO_SHARE, slot=RANK_1, op=Op.FINISH_READ)


@bad("a reserved share was lost")
def a_lost_share_of_a_publication(script: Script) -> None:
    script.write(0, 50, 0x10, slot=CONTROLLER, aux=2)
    script.look(210, NO_SHARE, slot=RANK_1, op=Op.FINISH_READ)


@bad("has 0 reserved shares, and there must be 1 at least")
def a_share_that_an_audit_misses(script: Script) -> None:
    script.put(0, 0x10)
    script.look(100, OK, slot=CONTROLLER, op=Op.RESERVE_READ, aux=2)
    script.audit(200, rank_0=1, rank_1=0)


@bad("gave back 2 reserved shares, was granted to it 1 times at most")
def a_doubled_share(script: Script) -> None:
    script.put(0, 0x10)
    script.look(100, OK, slot=CONTROLLER, op=Op.RESERVE_READ, aux=2)
    script.look(200, OK, slot=RANK_0, op=Op.FINISH_READ)
    script.look(210, OK, slot=RANK_0, op=Op.FINISH_READ)


@bad("not found, and it was there all the time")
def not_found_with_a_reserved_share(script: Script) -> None:
    script.put(0, 0x10)
    script.look(100, OK, slot=CONTROLLER, op=Op.RESERVE_READ, aux=1)
    script.look(200, NOT_FOUND)
    script.look(300, OK, slot=RANK_0, op=Op.FINISH_READ)


@bad("left, or came, while there must have been a share")
def replaced_with_a_reserved_share(script: Script) -> None:
    script.put(0, 0x10)
    script.look(100, OK, slot=CONTROLLER, op=Op.RESERVE_READ, aux=1)
    script.put(200, 0x20)
    script.look(300, OK, slot=RANK_0, op=Op.READ)


@good
def a_reserved_share_beyond_its_lease(script: Script) -> None:
    script.plan = SHORT
    script.put(0, 0x10)
    script.look(100, OK, slot=CONTROLLER, op=Op.RESERVE_READ, aux=1)
    script.put(150 + LEASE_US, 0x20)
    script.look(300 + LEASE_US, NO_SHARE, slot=RANK_0, op=Op.FINISH_READ)


@bad("left, or came, while there must have been a share")
def a_reserved_share_just_within_its_lease(script: Script) -> None:
    script.plan = SHORT
    script.put(0, 0x10)
    script.look(100, OK, slot=CONTROLLER, op=Op.RESERVE_READ, aux=1)
    script.put(50 + LEASE_US, 0x20)


@good
def a_share_of_a_dead_rank(script: Script) -> None:
    script.put(0, 0x10)
    script.look(100, OK, slot=CONTROLLER, op=Op.RESERVE_READ, aux=1)
    script.die(RANK_0, 200)
    script.put(230, 0x20)
    script.do(RANK_0, Op.ATTACH, 300, 400)
    script.look(500, NO_SHARE, slot=RANK_0, op=Op.FINISH_READ)


@good
def a_share_taken_by_force(script: Script) -> None:
    script.put(0, 0x10)
    script.look(100, OK, slot=CONTROLLER, op=Op.RESERVE_READ, aux=1)
    script.look(200, OK, op=Op.DELETE, flags=FORCE)
    script.look(300, NOT_FOUND, slot=RANK_0, op=Op.FINISH_READ)


@bad("left, or came, while there must have been a share")
def a_share_taken_by_force_in_vain(script: Script) -> None:
    script.put(0, 0x10)
    script.look(100, OK, slot=CONTROLLER, op=Op.RESERVE_READ, aux=1)
    script.look(200, LOCKED, op=Op.DELETE, flags=FORCE)
    script.put(300, 0x20)


@good
def a_cancel_in_the_middle_of_a_grant(script: Script) -> None:
    """It ends before the grant does, and took what that had granted by then."""
    script.put(0, 0x10)
    script.do(CONTROLLER, Op.RESERVE_READ, 100, 500, OK, aux=1)
    script.do(RANK_1, Op.CANCEL_READ, 200, 210, OK, aux=1)
    script.look(600, NO_SHARE, slot=RANK_0, op=Op.FINISH_READ)


@good
def a_cancel_that_took_the_later_share(script: Script) -> None:
    """The first is claimed in the middle of it."""
    script.put(0, 0x10)
    script.look(50, OK, slot=CONTROLLER, op=Op.RESERVE_READ, aux=1)
    script.do(RANK_1, Op.CANCEL_READ, 100, 500, OK, aux=1)
    script.read(150, 160, 0x10, slot=RANK_0)
    script.look(200, OK, slot=CONTROLLER, op=Op.RESERVE_READ, aux=1)
    script.look(600, NO_SHARE, slot=RANK_0, op=Op.FINISH_READ)


@good
def a_read_that_outlives_what_it_might_have_claimed(script: Script) -> None:
    """What it takes in the end is the share of the object that came after."""
    script.put(0, 0x10)
    script.look(50, OK, slot=CONTROLLER, op=Op.RESERVE_READ, aux=1)
    record = script.do(RANK_0, Op.READ, 100, 500, OK, 0x20)
    script.look(200, OK, op=Op.DELETE, flags=FORCE)
    script.write(220, 240, 0x20, aux=1, slot=CONTROLLER)
    script.do(RANK_0, Op.RELEASE, 510, 515, OK, 0x20, ref=record)
    script.look(600, NO_SHARE, slot=RANK_0, op=Op.FINISH_READ)


# Several writers


@good
def parts_of_one_object(script: Script) -> None:
    script.part(RANK_0, 0, 200, 0x10)
    script.part(RANK_1, 100, 300, 0x20)
    script.read(400, 500, both("10 20"))
    script.look(600, OK, op=Op.DELETE)
    script.part(RANK_1, 700, 800, 0x30)
    script.do(RANK_0, Op.RESERVE_WRITE, 750, 760, OK, 0x40, flags=COLLECTIVE)
    script.do(RANK_0, Op.ABORT, 820, 830, OK, 0x40, flags=COLLECTIVE)
    script.put(900, 0x50)


@good
def a_part_that_another_writers_end_lost(script: Script) -> None:
    script.do(RANK_0, Op.RESERVE_WRITE, 0, 10, OK, 0x10, flags=COLLECTIVE)
    script.part(RANK_1, 50, 300, 0x20, NOT_OWNER)
    script.die(RANK_0, 100)
    script.put(200, 0x30)


@bad("a version that nobody had begun to publish")
def a_part_that_is_not_published(script: Script) -> None:
    script.read(200, 220, both("10 20"))
    script.part(RANK_0, 0, 100, 0x10)
    script.part(RANK_1, 50, 300, 0x20)


@bad("one part was read in two objects")
def a_part_in_two_objects(script: Script) -> None:
    script.part(RANK_0, 0, 100, 0x10)
    script.part(RANK_1, 50, 150, 0x20)
    script.part(RANK_1, 60, 160, 0x30)
    script.read(200, 220, both("10 20"))
    script.read(300, 320, both("10 30"))


@bad("read parts of two groups")
def parts_of_two_groups(script: Script) -> None:
    script.part(RANK_0, 0, 100, 0x10)
    script.part(OTHER_1, 50, 150, 0x20)
    script.read(200, 220, both("10 20"))


@bad("there at the same time")
def a_part_while_another_object_is_held(script: Script) -> None:
    script.put(0, 0x10)
    script.read(50, 500, 0x10)
    script.part(RANK_0, 100, 200, 0x20)


@bad("there at the same time")
def an_object_while_its_parts_are_held(script: Script) -> None:
    script.part(RANK_0, 0, 100, 0x10)
    script.part(RANK_1, 50, 150, 0x20)
    script.read(200, 500, both("10 20"))
    script.put(300, 0x30)


@pytest.mark.parametrize("name", GOOD)
def test_what_can_be(name: str) -> None:
    script = Script()
    GOOD[name](script)
    assert script.found() == []


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be(name: str) -> None:
    rule, act = BAD[name]
    script = Script()
    act(script)
    assert any(rule in found for found in script.found()), script.found()


# Counters


def _counted(**counters: int) -> list[str]:
    script = Script()
    script.put(0, 0x10)
    script.look(50, OK, slot=CONTROLLER, op=Op.RESERVE_READ, aux=2)
    script.read(100, 200, 0x10, slot=RANK_0)
    script.look(300, OK, slot=RANK_1, op=Op.FINISH_READ)
    script.do(CONTROLLER, Op.RESERVE_READ, 400, None, Code.PENDING, aux=2)
    script.die(CONTROLLER, 410)
    right = {"read_hits": 1, "publishes": 1, "grants": 2, "releases": 1, "reserved_returned": 1, "claims": 1}
    return [found.text for found in check_counters(script.history, Counters(**{**right, **counters}))]


def test_counters_that_agree() -> None:
    assert _counted() == []
    assert _counted(grants=4) == [], "what was killed may have been counted"
    assert _counted(claims=3) == [], "or done, and not counted"


@pytest.mark.parametrize(
    ("counters", "rule"),
    [
        ({"grants": 1}, "counter grants is 1, and the history has 2 to 4"),
        ({"grants": 5}, "counter grants is 5"),
        ({"releases": 2}, "2 shares were released, and 1 were ever held"),
        ({"releases": 0}, "counter releases is 0"),
        ({"claims": 4}, "5 reserved shares were claimed or returned, and 2 granted"),
        ({"publishes": 2}, "counter publishes is 2"),
    ],
)
def test_counters_that_do_not(counters: dict[str, int], rule: str) -> None:
    assert any(rule in found for found in _counted(**counters))


def test_where_nobody_dies_all_shares_are_accounted_for() -> None:
    script = Script(replace(PLAN, kills=False, rejoins=False, force=False))
    script.put(0, 0x10)
    script.look(50, OK, slot=CONTROLLER, op=Op.RESERVE_READ, aux=2)
    counters = Counters(publishes=1, grants=2, claims=0, reserved_returned=0)
    assert any(
        "2 shares were granted, and 0 claimed" in found.text for found in check_counters(script.history, counters)
    )


def test_a_share_that_was_used_before_its_granter_looked_again() -> None:
    def accounts(end: int) -> list[str]:
        script = Script(replace(PLAN, kills=False, rejoins=False, force=False))
        script.put(0, 0x10)
        script.look(50, NOT_FOUND, slot=CONTROLLER, op=Op.RESERVE_READ, aux=1)
        script.look(end, OK, slot=RANK_0, op=Op.FINISH_READ)
        counters = Counters(publishes=1, grants=0, reserved_returned=1)
        return [found.text for found in check_counters(script.history, counters)]

    assert accounts(50) == []
    assert any("0 shares were granted, and 1 claimed or returned" in text for text in accounts(5000))


# Logs


def test_a_log_outlives_its_process() -> None:
    log = Log(3, 4000)
    at = log.begin(Op.READ, [1, 2])
    log.end(at, [OK, NOT_FOUND])
    log.saw(at, 0, OK, 0x123456)
    assert log.pending() is None
    log.begin(Op.DELETE, [0], flags=FORCE)
    assert log.pending() is not None
    assert log.pending() == (Op.DELETE, log.words[2 * RECORD_WORDS])
    log.settle()
    log.note_death(log.words[2 * RECORD_WORDS] + 1)
    events = history_of(PLAN, [b""] * 3 + [log.data()] + [b""] * 4).events
    assert [(Op(op).name, status_text(status)) for op, status in zip(events.op, events.status, strict=True)] == [
        ("DELETE", "PENDING"),
        ("READ", "OK"),
        ("READ", "NOT_FOUND"),
    ]
    assert events.version.tolist() == [0, 0x123456, 0]
    assert (events.end[0] > events.begin[0], events.cut[0] == events.begin[0] + 1) == (True, True)
    log.clear()
    assert log.data() == b""


def test_a_record_that_was_begun_and_not_counted() -> None:
    log = Log(0, 4000)
    log.end(log.begin(Op.PUT, [0]), [OK])
    log.begin(Op.READ, [0])
    log.words[0] = 1  # as where the process died just before it counted it
    log.settle()
    pending = log.pending()
    assert pending is not None
    assert pending[0] == Op.READ


def test_who_did_something_after_the_signal_was_sent_died_later() -> None:
    log = Log(0, 4000)
    sent_ns = time.monotonic_ns()
    at = log.begin(Op.READ, [0])
    log.end(at, [OK])
    log.note_death(sent_ns)
    history = history_of(PLAN, [log.data()] + [b""] * 7)
    assert history.events.cut.tolist() == history.events.end.tolist()


def test_a_complaint_is_kept() -> None:
    log = Log(0, 4000)
    log.complain("what a pity")
    assert log.text() == "what a pity"


def test_the_history_in_words() -> None:
    script = Script()
    script.put(0, 0x10)
    script.do(ALONE, Op.RESERVE_WRITE, 100, None, Code.PENDING, 0x20, flags=TEMPORARY)
    script.die(ALONE, 110)
    begin = 1_000_000 * _US
    lines = history_text(script.history, 0, begin, begin + 200 * _US)
    assert [" ".join(line.split()) for line in lines] == [
        "0.0 .. 10.0 us private 3 put version 10 -> OK",
        "100.0 .. 130.0 us private 3 reserve_write KILLED IN IT version 20 temporary -> PENDING",
        "110.0 .. 130.0 us private 3 death",
    ]


# Objects


def test_objects_tell_what_they_are() -> None:
    for version in range(1, 200):
        data = bytes_of(3, version)
        assert version_in(memoryview(data), 3) == (version, True)
        assert len(data) == nbytes_of(version)
        assert version_in(memoryview(data), 4)[1] is False
        for at in (0, 8, len(data) // 2, len(data) - 1):
            data[at] ^= 1
            assert version_in(memoryview(data), 3)[1] is False
            data[at] ^= 1


def test_parts_tell_what_they_are() -> None:
    data = bytearray(part_of(1, 0x10) + part_of(1, 0x20))
    assert len(data) == WRITERS * PART_BYTES
    assert version_in(memoryview(data), 1) == (both("10 20"), True)
    data[PART_BYTES + 100] ^= 1
    assert version_in(memoryview(data), 1) == (both("10 20"), False)


def test_keys_differ() -> None:
    keys = [key_of(number) for number in range(64)]
    assert len(set(keys)) == 64
    assert {len(key) for key in keys} >= {1, 64}


# Plans


def test_a_plan_follows_from_its_seed() -> None:
    assert plan_of(7, 3, 8) == plan_of(7, 3, 8)
    assert len({plan_of(7, number, 8) for number in range(24)}) > 12
    assert {plan_of(seed, number, 8).name for seed in range(2) for number in range(6)} >= {"storm", "stops"}


@pytest.mark.parametrize("processes", [4, 7, 8, 11, MOST_PROCESSES])
def test_groups_are_whole(processes: int) -> None:
    seats = seats_of(processes)
    assert len(seats) == processes
    for group in ("left", "right") if processes >= 8 else ("left",):
        ranks = [seat.rank for seat in seats if seat.group == group and seat.rank is not None]
        assert sorted(ranks) == [0, 1]
