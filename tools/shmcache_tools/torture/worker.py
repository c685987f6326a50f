"""A process of a torture run: random operations on few keys, each noted in the log before and after.

A worker checks no more than bytes, and what every single call promises whatever others do; what else is right or
wrong, its log shows (see ``check``). It lives until it is killed, or told to leave.
"""

from __future__ import annotations

import os
import random
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import shmcache
from shmcache import ArenaBusyError, Cache, GroupError, Layout, ReadBatch, Status, ViewInUseError, WriteBatch
from shmcache_tools.torture.log import (
    COLLECTIVE,
    FORCE,
    MOST_KEYS,
    MOST_NEW,
    PREFIX,
    RECORD_WORDS,
    TEMPORARY,
    Code,
    Log,
    Op,
)
from shmcache_tools.torture.objects import (
    BLOCK_BYTES,
    PART_BYTES,
    SIZES,
    WRITERS,
    bytes_of,
    key_of,
    nbytes_of,
    part_of,
    version_in,
)
from shmcache_tools.torture.plan import Plan, Seat

#: Commands: the low byte of the word that all workers look at; above it a serial number.
RUN: Final = 1
HOLD: Final = 2  #: begin nothing new, and keep what you have
DRAIN: Final = 3  #: give back all you have, and begin nothing new
LEAVE: Final = 4  #: close, and end

_OK: Final = Status.OK
_MOST_READS: Final = 2
_MOST_WRITES: Final = 2
_LAYOUTS: Final = {nbytes: Layout((nbytes,), "uint8") for nbytes in SIZES}
_NAP_S: Final = 0.0003


class FaultError(Exception):
    """A call broke its promise."""


class Left(Exception):  # noqa: N818 # not an error: it was told to
    """The worker has left the arena."""


@dataclass(slots=True)
class Read:
    """Objects that are being read: what was OK, with the versions that the bytes showed."""

    batch: ReadBatch
    record: int
    versions: dict[int, int]
    looked: bool  #: at the bytes; else nothing of the batch is borrowed


@dataclass(slots=True)
class Write:
    """Objects that are being written."""

    batch: WriteBatch
    keys: list[int]  #: all of the batch
    versions: dict[int, int]  #: those that are reserved
    filled: bool
    part: bool = False  #: others write it, too

    @property
    def flags(self) -> int:
        return COLLECTIVE * self.part


class Worker:
    """Sits in a seat. ``orders``: the word with the command."""

    def __init__(self, arena: str, plan: Plan, seat: Seat, log: Log, orders: memoryview, seed: str) -> None:
        self.cache: Cache
        self.arena = arena
        self.plan = plan
        self.seat = seat
        self.log = log
        self.chance = random.Random(seed)
        self.names = [key_of(number) for number in range(plan.keys)]
        self.reads: list[Read] = []
        self.writes: list[Write] = []
        self._orders = orders
        self._followed = 0
        weights = self.weights()
        self._operations = list(weights)
        self._shares = list(weights.values())

    def weights(self) -> dict[Callable[[], object], float]:
        """What it does, and how often."""
        weights: dict[Callable[[], object], float] = {
            self.reserve: 14,
            self.finish: 14,
            self.put: 14,
            self.read: 14,
            self.release: 16,
            self.grant: 2,
            self.finish_read: 5,
            self.cancel_read: 3,
            self.touch: 2,
            self.lookup: 3,
            self.status: 4,
            self.delete: 8,
            self.evict: 4,
            self.clear: 0.5,
            self.reap: 1,
            self.verify: 0.3,
            self.stats: 0.1,
            self.stray: 1,
            self.nap: 2,
        }
        if self.seat.collects:
            weights[self.join] = 6
        if self.plan.rejoins:
            weights[self.rejoin] = 0.3
        if self.plan.force:
            weights[self.delete_by_force] = 0.7
        return weights

    def run(self) -> None:
        """Works until it is killed, or told to leave (Left)."""
        self.attach()
        while True:
            for operation in self.chance.choices(self._operations, self._shares, k=64):
                while self._orders[0] != self._followed:
                    self._follow()
                if self.log.full:
                    time.sleep(_NAP_S)
                    continue
                operation()

    # Orders

    def _follow(self) -> None:
        order = self._orders[0]
        command = order & 0xFF
        if command == DRAIN:
            self.drain()
        elif command == LEAVE:
            self._close()
        held = sum(len(read.versions) for read in self.reads)
        writing = sum(len(write.versions) for write in self.writes if not write.part)
        self.log.report(order, held, writing, self.cache.lane)
        self._followed = order
        if command == LEAVE:
            raise Left
        while command != RUN and self._orders[0] == order:
            time.sleep(_NAP_S)

    def drain(self) -> None:
        """Gives back all that is its own, and what was granted to it."""
        while self.reads:
            self._release(self.reads[-1])
        while self.writes:
            self.abort(self.writes[-1])
        for key in range(self.plan.keys):
            while _OK in (self._each(Op.FINISH_READ, [key], self.cache.finish_read) or ()):
                pass

    # Coming and going

    def attach(self) -> None:
        """Joins, however long a stopped holder of the lock is in the way."""
        seat = self.seat
        while True:
            at = self.log.begin(Op.ATTACH)
            try:
                self.cache = shmcache.attach(self.arena, group=seat.group, rank=seat.rank, world_size=seat.world_size)
            except ArenaBusyError:
                self.log.end(at, result=Code.BUSY)
                continue
            self.log.end(at, result=_OK)
            return

    def rejoin(self) -> None:
        """Closes, with or without unlooked-at shares and writes, and attaches again."""
        if self.chance.random() < 0.2:
            self._try_to_close()
        while read := next((read for read in self.reads if read.looked), None):
            self._release(read)
        while write := next((write for write in self.writes if write.filled), None):
            self.abort(write)
        self._close()
        self.attach()

    def _try_to_close(self) -> None:
        """Where something is borrowed, nothing may happen."""
        if not any(read.looked for read in self.reads) and not any(write.filled for write in self.writes):
            return
        try:
            self.cache.close()
        except ViewInUseError:
            return
        raise FaultError("closed while views live")

    def _close(self) -> None:
        at = self.log.begin(Op.CLOSE)
        self.cache.close()
        self.log.end(at)
        self.reads.clear()
        self.writes.clear()

    # Writing

    def reserve(self) -> None:
        if len(self.writes) >= _MOST_WRITES:
            self.finish()
            return
        keys = self._some(MOST_NEW)
        versions = [self.log.next_version(i) for i in range(len(keys))]
        temporary = self.chance.random() < 0.15
        sizes: list[int | Layout] = [nbytes_of(version) for version in versions]
        if self.chance.random() < 0.3:
            sizes = [_LAYOUTS[nbytes_of(version)] for version in versions]
        at = self.log.begin(Op.RESERVE_WRITE, keys, flags=TEMPORARY * temporary, versions=versions)
        try:
            batch = self.cache.reserve_write([self.names[key] for key in keys], sizes, temporary=temporary)
        except ArenaBusyError:
            self.log.end(at, [Code.BUSY] * len(keys))
            return
        status = batch.status
        self.log.end(at, status)
        own = {key: version for key, version, code in zip(keys, versions, status, strict=True) if code == _OK}
        if not own:
            return
        filled = self.chance.random() < 0.95
        if filled:
            self.fill(batch, keys, own)
        self.writes.append(Write(batch, keys, own, filled))
        del batch  # it may be dropped
        if self.chance.random() < 0.5:
            self.finish()

    def fill(self, batch: WriteBatch, keys: list[int], own: dict[int, int]) -> None:
        for key, view in zip(keys, batch.views, strict=True):
            if view is not None:
                view[:] = bytes_of(key, own[key])

    def join(self) -> None:
        """Takes a part in the write of a key by both ranks. Mostly on the same terms as the other one."""
        if len(self.writes) >= _MOST_WRITES:
            self.finish()
            return
        rank = self.seat.rank or 0
        key = self.chance.randrange(min(2, self.plan.keys))
        version = self.log.next_version(0)
        temporary = bool(key) != (self.chance.random() < 0.03)
        flags = COLLECTIVE | TEMPORARY * temporary
        at = self.log.begin(Op.RESERVE_WRITE, [key], flags=flags, versions=[version])
        try:
            batch = self.cache.reserve_write(
                [self.names[key]], WRITERS * PART_BYTES, writers=WRITERS, temporary=temporary
            )
        except (ArenaBusyError, GroupError) as error:
            self.log.end(at, [Code.BUSY if isinstance(error, ArenaBusyError) else Code.UNLIKE])
            return
        status = batch.status
        self.log.end(at, status)
        (view,) = batch.views
        if view is not None:
            view[rank * PART_BYTES :][:PART_BYTES] = part_of(key, version)
            self.writes.append(Write(batch, [key], {key: version}, filled=True, part=True))

    def finish(self) -> None:
        """One of the open writes."""
        if not self.writes:
            return
        write = self.chance.choice(self.writes)
        if write.filled and self.chance.random() < 0.8:
            self.publish(write)
        else:
            self.abort(write)

    def publish(self, write: Write) -> None:
        """By the batch or by the keys, with or without grants."""
        ranks = self.chance.choice((0, 0, 0, self.chance.randint(1, self.seat.world_size)))
        by_key = self._by_key(write)
        keys = list(write.versions)
        at = self.log.begin(
            Op.FINISH_WRITE if by_key else Op.PUBLISH,
            keys,
            flags=write.flags,
            aux=ranks,
            versions=list(write.versions.values()),
        )
        if by_key:
            names = [self.names[key] for key in keys]
            found = (
                self.cache.finish_write_and_reserve_read(names, ranks - 1) if ranks else self.cache.finish_write(names)
            )
        else:
            all_found = write.batch.publish_and_reserve_read(ranks - 1) if ranks else write.batch.publish()
            found = self._own(write, all_found)
        self.log.end(at, found)
        self.writes.remove(write)
        if by_key:
            self._forget(write)

    def abort(self, write: Write) -> None:
        """By the batch, by the keys, or by dropping the batch."""
        keys = list(write.versions)
        versions = list(write.versions.values())
        if self._by_key(write):
            self._abort_by_key(write, keys, versions)
            return
        at = self.log.begin(Op.ABORT, keys, flags=write.flags, versions=versions)
        if self.plan.patient and self.chance.random() < 0.1:
            self.writes.remove(write)
            del write.batch
            self.log.end(at, [Code.DROPPED] * len(keys))
            return
        try:
            found = self._own(write, write.batch.abort())
        except ArenaBusyError:
            self.log.end(at, [Code.BUSY] * len(keys))
            return
        self.log.end(at, found)
        self.writes.remove(write)

    def _abort_by_key(self, write: Write, keys: list[int], versions: list[int]) -> None:
        at = self.log.begin(Op.ABORT_WRITE, keys, flags=write.flags, versions=versions)
        found = self.cache.abort_write([self.names[key] for key in keys])
        self.log.end(at, found)
        for key, code in zip(keys, found, strict=True):
            if code != Status.LOCKED:  # the lock could not be had: it stays
                del write.versions[key]
        if not write.versions:
            self.writes.remove(write)
            self._forget(write)

    def _by_key(self, write: Write) -> bool:
        """Whether to finish by key. Of two writes of one key, the elder of which was lost, only batches tell."""
        others = {key for other in self.writes if other is not write for key in other.versions}
        return self.chance.random() < 0.3 and others.isdisjoint(write.versions)

    def _own(self, write: Write, found: list[Status]) -> list[Status]:
        """Of what finishing a batch says, that of the keys that are still reserved."""
        return [code for key, code in zip(write.keys, found, strict=True) if key in write.versions]

    def _forget(self, write: Write) -> None:
        """All of the batch was finished by key: then it has nothing to abort any more."""
        try:
            found = write.batch.abort()
        except ArenaBusyError:
            return
        if _OK in found:
            raise FaultError(f"what was finished by key was aborted by its batch once more: {found}")

    def put(self) -> None:
        (key,) = keys = self._one()
        version = self.log.next_version(0)
        data = bytes_of(key, version)
        at = self.log.begin(Op.PUT, keys, versions=[version])
        try:
            found: int = self.cache.put(self.names[key], data)
        except ArenaBusyError:
            found = Code.BUSY
        self.log.end(at, [found])

    def stray(self) -> None:
        """Finishes what is not its own."""
        own = {key for write in self.writes for key in write.versions}
        keys = [key for key in self._one() if key not in own]
        if keys:
            how = self.chance.choice((self.cache.finish_write, self.cache.abort_write))
            self._each(Op.STRAY, keys, how)

    # Reading

    def read(self) -> None:
        if len(self.reads) >= _MOST_READS:
            self.release()
            return
        keys = self._some()
        prefix = len(keys) > 1 and self.chance.random() < 0.3
        wait_s = self.chance.choice((0.0,) * 9 + (0.002,))
        at = self.log.begin(Op.READ, keys, flags=PREFIX * prefix)
        batch = self.cache.read([self.names[key] for key in keys], prefix=prefix, wait_s=wait_s)
        status: list[int] = list(batch.status)
        if prefix:
            status[batch.hits + 1 :] = [Code.UNSEEN] * len(status[batch.hits + 1 :])
        self.log.end(at, status)
        held = [key for key, code in zip(keys, status, strict=True) if code == _OK]
        if not held:
            return
        read = Read(batch, at // RECORD_WORDS - 1, dict.fromkeys(held, 0), self.chance.random() < 0.95)
        if read.looked:
            self._look(read, keys, at)
        self.reads.append(read)
        many = len(held) > 2
        del batch, read  # a batch that is dropped gives back when nobody names it any more
        if many or self.chance.random() < 0.6:
            self.release()

    def _look(self, read: Read, keys: list[int], at: int) -> None:
        for i, (key, view) in enumerate(zip(keys, read.batch.views, strict=True)):
            if view is not None:
                read.versions[key], whole = version_in(view, key)
                self.log.saw(at, i, _OK if whole else Code.WRONG, read.versions[key])

    def release(self) -> None:
        """One of those that are open."""
        if self.reads:
            self._release(max(self.reads, key=lambda read: (len(read.versions) > 2, self.chance.random())))

    def _release(self, read: Read) -> None:
        """Every byte must still be what it was."""
        self.reads.remove(read)
        codes: list[int] = [_OK] * len(read.versions)
        if read.looked:
            views = [view for view in read.batch.views if view is not None]
            seen = [version_in(view, key) for view, key in zip(views, read.versions, strict=True)]
            codes = [
                _OK if found == (version, True) else Code.WRONG
                for found, version in zip(seen, read.versions.values(), strict=True)
            ]
            del views
        at = self.log.begin(Op.RELEASE, list(read.versions), ref=read.record, versions=list(read.versions.values()))
        if self.chance.random() < 0.1:
            del read.batch
        else:
            read.batch.release()
        self.log.end(at, codes)

    def grant(self) -> None:
        extra = self.chance.randrange(self.seat.world_size)
        self._each(Op.RESERVE_READ, self._some(), lambda names: self.cache.reserve_read(names, extra), aux=extra + 1)

    def finish_read(self) -> None:
        self._each(Op.FINISH_READ, self._some(), self.cache.finish_read)

    def cancel_read(self) -> None:
        extra = self.chance.randrange(self.seat.world_size)
        self._each(Op.CANCEL_READ, self._some(), lambda names: self.cache.cancel_read(names, extra), aux=extra + 1)

    def touch(self) -> None:
        self._each(Op.TOUCH, self._some(), self.cache.touch)

    def status(self) -> None:
        self._each(Op.STATUS, self._some(), self.cache.status)

    def lookup(self) -> None:
        keys = self._some()
        at = self.log.begin(Op.LOOKUP, keys)
        found = self.cache.lookup([self.names[key] for key in keys])
        codes = [int(_OK)] * found + [int(Code.NOT_READY)] + [int(Code.UNSEEN)] * MOST_KEYS
        self.log.end(at, codes[: len(keys)])

    # Removing, and the whole

    def delete(self) -> None:
        self._each(Op.DELETE, self._some(), self.cache.delete)

    def delete_by_force(self) -> None:
        self._each(Op.DELETE, self._one(), lambda names: self.cache.delete(names, force=True), flags=FORCE)

    def evict(self) -> None:
        nbytes = self.chance.choice((BLOCK_BYTES, 4 * BLOCK_BYTES, 1 << 40))
        self._whole(Op.EVICT, lambda: self.cache.evict(nbytes))

    def clear(self) -> None:
        self._whole(Op.CLEAR, self.cache.clear)

    def reap(self) -> None:
        self._whole(Op.REAP, lambda: self.cache.reap().lanes)

    def verify(self) -> None:
        findings: list[str] = []

        def verify() -> int:
            findings.extend(self.cache.verify())
            return len(findings)

        self._whole(Op.VERIFY, verify)
        if findings:
            raise FaultError("verify(): " + "; ".join(findings))

    def stats(self) -> None:
        self._whole(Op.STATS, lambda: self.cache.stats().lanes_alive)

    def nap(self) -> None:
        """Others go on meanwhile, and find what it has."""
        time.sleep(self.chance.choice((0.0, 0.0001, 0.001)))

    # What the above stand on

    def _one(self) -> list[int]:
        return [self.chance.randrange(self.plan.keys)]

    def _some(self, most: int = MOST_KEYS) -> list[int]:
        """One key, two, or many: then most of the time is the core's, where others come between."""
        chance = self.chance.random()
        if chance < 0.4:
            return self._one()
        return self.chance.sample(range(self.plan.keys), 2 if chance < 0.6 else min(most, self.plan.keys))

    def _each(
        self,
        op: Op,
        keys: list[int],
        call: Callable[[list[bytes]], Sequence[int]],
        *,
        flags: int = 0,
        aux: int = 0,
    ) -> Sequence[int] | None:
        """An operation that gives one status a key; None where the lock could not be had."""
        at = self.log.begin(op, keys, flags=flags, aux=aux)
        try:
            found = call([self.names[key] for key in keys])
        except ArenaBusyError:
            self.log.end(at, [Code.BUSY] * len(keys))
            return None
        self.log.end(at, found)
        return found

    def _whole(self, op: Op, call: Callable[[], int]) -> None:
        """An operation without keys."""
        at = self.log.begin(op)
        try:
            found = call()
        except ArenaBusyError:
            self.log.end(at, result=0)
            return
        self.log.end(at, result=found)


def live(worker: Worker) -> None:
    """The life of a process, to its end; what it dies of is in its log."""
    try:
        worker.run()
    except Left:
        os._exit(0)
    except BaseException as error:  # noqa: BLE001 # the supervisor is told
        text = f"{error}" if isinstance(error, FaultError) else traceback.format_exc()
        worker.log.complain(text)
    os._exit(1)
