"""What the processes of a stress test do: random operations on a few hot keys, with every byte that is read checked."""

from __future__ import annotations

import hashlib
import random
import time

from shmcache import Cache, ReadBatch, Status, WriteBatch

OK = Status.OK
BLOCK = 4096
MOST_BYTES = 3 * BLOCK
_TAG = 8
_HEAD = 2 * _TAG


def _tag(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=_TAG).digest()


def fill(view: memoryview, key: bytes, chance: random.Random) -> None:
    """Writes an object: its key's tag, a number that no other object has, and what only this key and number give."""
    nonce = chance.randbytes(_HEAD - _TAG)
    view[:_HEAD] = _tag(key) + nonce
    view[_HEAD:] = hashlib.shake_128(key + nonce).digest(len(view) - _HEAD)


def check(view: memoryview, key: bytes) -> bytes:
    """Every byte is of one object of that key; its number."""
    nonce = bytes(view[_TAG:_HEAD])
    assert view[:_TAG] == _tag(key), f"another object under {key!r}"
    assert view[_HEAD:] == hashlib.shake_128(key + nonce).digest(len(view) - _HEAD), f"wrong bytes under {key!r}"
    return nonce


def check_all(batch: ReadBatch) -> list[bytes | None]:
    """The same for each object of a batch."""
    return [None if view is None else check(view, key) for key, view in zip(batch.keys, batch.views, strict=True)]


class Worker:
    """Random operations by one cache. ``operations`` are names of methods; ``done`` counts what was checked."""

    def __init__(self, cache: Cache, keys: list[bytes], seed: int) -> None:
        self.cache = cache
        self.keys = keys
        self.chance = random.Random(seed)
        self.done = 0
        self._many = keys * 24
        self._tags = [_tag(key) for key in self._many]

    def work(self, operations: list[str], seconds: float) -> int:
        """Does them for so long: how many objects were checked."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            getattr(self, self.chance.choice(operations))()
        return self.done

    def _some(self) -> list[bytes]:
        return self.chance.sample(self.keys, self.chance.randint(1, 3))

    def _one(self) -> list[bytes]:
        return [self.chance.choice(self.keys)]

    def _pause(self) -> None:
        time.sleep(self.chance.choice((0, 0, 0, 0.0001, 0.001)))

    def _filled(self, *, temporary: bool = False) -> WriteBatch:
        keys = self._some()
        sizes: list[int] = [self.chance.randint(_HEAD, MOST_BYTES) for _ in keys]
        batch = self.cache.reserve_write(keys, sizes, temporary=temporary)
        for key, view in zip(keys, batch.views, strict=True):
            if view is not None:
                fill(view, key, self.chance)
        self._pause()
        return batch

    def write(self) -> None:
        batch = self._filled()
        assert batch.publish() == batch.status

    def write_and_read(self) -> None:
        """What is published with a share cannot go before the share was used."""
        batch = self._filled(temporary=self.chance.random() < 0.5)
        assert batch.publish_and_reserve_read() == batch.status
        keys = [key for key, status in zip(batch.keys, batch.status, strict=True) if status == OK]
        self._pause()
        with self.cache.read(keys) as read:
            assert read.hits == len(keys), "a reserved share did not protect its object"
            self.done += len(check_all(read))

    def abandon(self) -> None:
        batch = self._filled()
        assert batch.abort() == batch.status

    def put(self) -> None:
        (key,) = self._one()
        data = bytearray(self.chance.randint(_HEAD, MOST_BYTES))
        fill(memoryview(data), key, self.chance)
        self.cache.put(key, data)

    def delete(self) -> None:
        self.cache.delete(self._some())

    def delete_by_force(self) -> None:
        self.cache.delete(self._some(), force=True)

    def evict(self) -> None:
        self.cache.evict(self.chance.randint(1, MOST_BYTES))

    def reap(self) -> None:
        self.cache.reap()

    def verify(self) -> None:
        assert self.cache.verify() == []

    def read(self) -> None:
        """The same objects for as long as they are held."""
        with self.cache.read(self._some(), prefix=self.chance.random() < 0.5) as batch:
            first = check_all(batch)
            self._pause()
            assert check_all(batch) == first, "an object changed under a reader"
            self.done += sum(nonce is not None for nonce in first)

    def read_many(self) -> None:
        """Most of the time is the core's, so that this is where others come between."""
        with self.cache.read(self._many) as batch:
            for view, tag in zip(batch.views, self._tags, strict=True):
                assert view is None or view[:_TAG] == tag, "another object"

    def grant_many(self) -> None:
        granted = self.cache.reserve_read(self._many).count(OK)
        assert self.cache.finish_read(self._many).count(OK) == granted, "a reserved share was lost"

    def read_twice(self) -> None:
        """What is held stays what its key finds."""
        keys = self._some()
        with self.cache.read(keys) as batch:
            held = {key: nonce for key, nonce in zip(keys, check_all(batch), strict=True) if nonce is not None}
            self._pause()
            with self.cache.read(list(held) or keys) as again:
                found = dict(zip(again.keys, check_all(again), strict=True))
                assert {key: found.get(key) for key in held} == held, "a held object left"
            self.done += len(held)

    def wait_and_read(self) -> None:
        with self.cache.read(self._one(), wait_s=0.005) as batch:
            self.done += sum(nonce is not None for nonce in check_all(batch))

    def grant_and_read(self) -> None:
        keys = self._some()
        granted = [key for key, status in zip(keys, self.cache.reserve_read(keys), strict=True) if status == OK]
        self._pause()
        with self.cache.read(granted) as batch:
            assert batch.hits == len(granted), "a reserved share did not protect its object"
            self.done += len(check_all(batch))

    def grant_and_give_back(self) -> None:
        keys = self._some()
        granted = [key for key, status in zip(keys, self.cache.reserve_read(keys), strict=True) if status == OK]
        self._pause()
        assert self.cache.finish_read(granted) == [OK] * len(granted), "a reserved share was lost"

    # Among others of a group, whose shares these are

    def grant(self) -> None:
        self.cache.reserve_read(self._some(), self.cache.world_size - 1)

    def write_and_grant(self) -> None:
        batch = self._filled(temporary=self.chance.random() < 0.5)
        assert batch.publish_and_reserve_read(self.cache.world_size - 1) == batch.status

    def take_back(self) -> None:
        self.cache.cancel_read(self._some(), self.cache.world_size - 1)

    def give_back(self) -> None:
        self.cache.finish_read(self._some())
