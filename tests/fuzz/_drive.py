"""A program: damages arenas of its own, uses them by everything that the package has, and fails where anything but an
error of ours or service comes of it.

    python -m fuzz._drive FIRST COUNT [SECONDS]

One arena a seed, FIRST and up; stops after SECONDS. It is run by test_package.py, in an interpreter whose shmcache was
built with sanitizers.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import io
import os
import random
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from fuzz._damage import Damage
from fuzz._segment import Bytes

import shmcache
from shmcache import Layout, Status, segment
from shmcache._binding import lib
from shmcache_tools.cleanup import __main__ as cleanup
from shmcache_tools.stat import __main__ as stat

LIMIT_S: Final = 30  #: one seed
KEYS: Final = [b"a", b"bb", b"c" * 8, b"d" * 9, b"e" * 32, b"f" * 33, b"g" * 64]
LAYOUTS: Final = [Layout((8, 32), "float16"), Layout([((3,), "int64"), ((700,), "bfloat16")], None)]
CONFIG: Final = {"capacity": 24 * 4096, "block_size": 4096, "slots": 12, "lanes": 6}
MEMBERS: Final = [(None, None, 1), ("engine", 0, 2), ("engine", 1, 2), ("engine", None, 2)]


class Wrong(Exception):  # noqa: N818 # a finding
    """What must not be."""


@dataclass
class Version:
    """What was written once."""

    key: bytes
    nbytes: int
    published: bool = False


class World:
    """One arena, who uses it, and what they wrote."""

    def __init__(self, name: str, chance: random.Random) -> None:
        self.name = name
        self.chance = chance
        lease_s = chance.choice([0.000_001, 100.0])
        config = shmcache.ArenaConfig(**CONFIG, lock_timeout_s=0.003, read_lease_s=lease_s, write_lease_s=lease_s)
        shmcache.create(name, config)
        self.segment = Bytes(segment.path_of(name), name)
        self.damage = Damage(self.segment, chance)
        self.caches: list[shmcache.Cache] = []
        self.writes: list[tuple[shmcache.WriteBatch, list[int | None]]] = []
        self.reads: list[shmcache.ReadBatch] = []
        self.versions: list[Version] = []
        self.done: list[str] = []
        #: What two ranks write together: each writes all of it, so that whoever is first, the bytes are the same.
        self.together = {key: self.new(key, 1000 + len(key))[1] for key in KEYS}
        for version in self.versions:
            version.published = True

    def end(self) -> None:
        """Lets go of all that is left, by whatever way is left."""
        self.writes.clear()
        self.reads.clear()
        gc.collect()
        for cache in self.caches:
            with contextlib.suppress(shmcache.ShmcacheError):
                cache.close()
            if not cache.closed:
                lib.sc_segment_shut(cache._handle)
                cache._attachment.forked = True  # as a child's: to close it drops the mappings only
                cache.close()
        self.segment.close()
        with contextlib.suppress(shmcache.ArenaNotFoundError):
            shmcache.destroy(self.name, force=True)

    def cache(self) -> shmcache.Cache | None:
        return self.chance.choice(self.caches) if self.caches else None

    def keys(self) -> list[bytes]:
        return self.chance.choices(KEYS, k=self.chance.randrange(1, 5))

    def new(self, key: bytes, nbytes: int) -> tuple[int, bytes]:
        """A version and its bytes, which tell it."""
        self.versions.append(Version(key, nbytes))
        number = len(self.versions)
        word = (number << 32 | number * 0x9E3779B1 & 0xFFFFFFFF).to_bytes(8, "little")
        return number - 1, (word * (nbytes // 8 + 1))[:nbytes]

    def check_bytes(self, key: bytes, found: bytes) -> None:
        """What was read under a key: whole, and published under it."""
        if self.damage.cut:
            return  # and made longer again, perhaps: zeros
        number = int.from_bytes(found[4:8], "little") - 1
        if len(found) < 8 or not 0 <= number < len(self.versions):
            raise Wrong(f"{key!r}: bytes that nobody wrote: {found[:16].hex()}")
        version = self.versions[number]
        if version.key != key or not version.published or version.nbytes != len(found):
            raise Wrong(f"{key!r}: {len(found)} bytes of {version}")
        if found != (found[:8] * (len(found) // 8 + 1))[: len(found)]:
            raise Wrong(f"{key!r}: torn bytes of {version}")


# Each of these may raise errors of ours.


def attach(world: World) -> None:
    if len(world.caches) < 4:
        group, rank, size = world.chance.choice(MEMBERS)
        world.caches.append(shmcache.attach(world.name, group=group, rank=rank, world_size=size))


def close(world: World) -> None:
    cache = world.cache()
    if cache and world.chance.random() < 0.5:
        cache.close()
        world.caches.remove(cache)
    elif cache:
        lib.sc_segment_shut(cache._handle)  # as a death: the lane's byte is free, and nothing was given back


def demand(world: World) -> tuple[Any, int]:
    if world.chance.random() < 0.3:
        layout = world.chance.choice(LAYOUTS)
        return layout, layout.nbytes
    nbytes = world.chance.randrange(8, 3 * 4096)
    return nbytes, nbytes


def reserve(world: World) -> None:
    cache, keys = world.cache(), world.keys()
    if not cache or len(world.writes) > 4:
        return
    if cache.world_size > 1 and world.chance.random() < 0.3:
        reserve_together(world, cache, keys)
        return
    layout, nbytes = demand(world)
    batch = cache.reserve_write(keys, layout, temporary=world.chance.random() < 0.2)
    numbers: list[int | None] = []
    world.writes.append((batch, numbers))
    for key, view in zip(batch.keys, batch.views, strict=True):
        numbers.append(None)
        if view is not None:
            number, content = world.new(key, nbytes)
            view[:] = content
            numbers[-1] = number


def reserve_together(world: World, cache: shmcache.Cache, keys: list[bytes]) -> None:
    batch = cache.reserve_write(keys, [len(world.together[key]) for key in keys], writers=2)
    world.writes.append((batch, [None] * len(keys)))
    for key, view in zip(keys, batch.views, strict=True):
        if view is not None:
            view[:] = world.together[key]


def publish(world: World) -> None:
    if not world.writes:
        return
    batch, numbers = world.writes.pop(world.chance.randrange(len(world.writes)))
    how = world.chance.randrange(4)
    found = batch.abort() if how == 0 else batch.publish() if how < 3 else batch.publish_and_reserve_read(0)
    for number, status in zip(numbers, found, strict=True):
        if number is not None and how:
            world.versions[number].published |= status == Status.OK


def finish(world: World) -> None:
    cache, keys = world.cache(), world.keys()
    if not cache:
        return
    found = cache.finish_write_and_reserve_read(keys) if world.chance.random() < 0.5 else cache.finish_write(keys)
    for key, status in zip(keys, found, strict=True):
        for _, numbers in world.writes if status == Status.OK else []:
            for number in numbers:
                if number is not None and world.versions[number].key == key:
                    world.versions[number].published = True


def put(world: World) -> None:
    cache, key = world.cache(), world.chance.choice(KEYS)
    if cache:
        number, content = world.new(key, world.chance.randrange(8, 3 * 4096))
        world.versions[number].published = cache.put(key, content) == Status.OK


def read(world: World) -> None:
    cache, keys = world.cache(), world.keys()
    if not cache:
        return
    wait_s = world.chance.choice([0.0, 0.0, 0.0, 0.001])
    batch = cache.read(keys, prefix=world.chance.random() < 0.3, wait_s=wait_s)
    for key, view in zip(keys, batch.views, strict=True):
        if view is not None:
            world.check_bytes(key, bytes(view))
    kept = batch
    if world.chance.random() < 0.5:
        flat = [np.ravel(one).view(np.uint8).sum() for one in batch.arrays() if isinstance(one, np.ndarray)]
        del flat
    if world.chance.random() < 0.5 or len(world.reads) > 3:
        batch.release()
    else:
        world.reads.append(kept)


def release(world: World) -> None:
    if world.reads:
        world.reads.pop(world.chance.randrange(len(world.reads))).release()


def by_keys(world: World) -> None:
    cache, keys = world.cache(), world.keys()
    if not cache:
        return
    calls: list[Callable[[], Any]] = [
        lambda: cache.lookup(keys),
        lambda: cache.status(keys),
        lambda: cache.touch(keys),
        lambda: cache.reserve_read(keys, cache.world_size - 1),
        lambda: cache.cancel_read(keys, cache.world_size - 1),
        lambda: cache.finish_read(keys),
        lambda: cache.abort_write(keys),
        lambda: cache.delete(keys),
        lambda: cache.delete(keys, force=True),
    ]
    world.chance.choice(calls)()


def whole(world: World) -> None:
    cache = world.cache()
    if not cache:
        return
    calls: list[Callable[[], Any]] = [
        lambda: cache.evict(world.chance.randrange(1 << 16)),
        lambda: cache.evict(1 << 40),
        cache.clear,
        cache.reap,
        cache.verify,
        cache.stats,
        lambda: repr(cache),
    ]
    world.chance.choice(calls)()


def look(world: World) -> None:
    shmcache.inspect(world.name, objects=True, shares=True).as_dict()
    shmcache.arenas()


stat.NOW_S = 0.0  # no time to wait for what goes on


def program(world: World) -> None:
    """The two programs, in this process: an exit code of 0 or 1, and no exception."""
    runs: list[tuple[Callable[[list[str]], int], list[str]]] = [
        (stat.main, [world.name]),
        (stat.main, ["--json", world.name]),
        (stat.main, ["--json", "--shares", world.name]),
        (stat.main, ["--json", "--map", world.name]),
        (stat.main, []),
        (stat.main, ["--shares"]),
        (stat.main, ["--map"]),
        (cleanup.main, ["--dry-run", world.name]),
        (cleanup.main, ["--dry-run", "--stale"]),
        (cleanup.main, ["--reap", world.name]),
        (cleanup.main, ["--reap", "--dry-run", world.name]),
    ]
    main, arguments = world.chance.choice(runs)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = main(arguments)
    if code not in (0, 1):
        raise Wrong(f"{main.__module__} {arguments} gives {code}")


def remove(world: World) -> None:
    """At the end: by the API, or by the program with each of its options."""
    ways: list[Callable[[], Any]] = [
        lambda: shmcache.destroy(world.name),
        lambda: shmcache.destroy(world.name, force=True),
        lambda: cleanup.main(["--stale", "--yes"]),
        lambda: cleanup.main(["--yes", world.name]),
        lambda: cleanup.main(["--force", "--yes", world.name]),
    ]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        world.chance.choice(ways)()


OPERATIONS: Final = [
    *[attach] * 2,
    close,
    *[reserve] * 4,
    *[publish] * 3,
    finish,
    *[put] * 3,
    *[read] * 5,
    *[release] * 2,
    *[by_keys] * 3,
    *[whole] * 3,
    look,
    program,
]


def operate(world: World, operation: Callable[[World], None]) -> None:
    """One operation: service, or an error of ours that names the arena."""
    world.done.append(operation.__name__)
    try:
        operation(world)
    except shmcache.ShmcacheError as error:
        world.done[-1] += f": {type(error).__name__}"
        if world.name not in str(error):
            raise Wrong(f"{type(error).__name__} does not name the arena: {error}") from error


def run(seed: int) -> None:
    chance = random.Random(seed)
    world = World(f"s{seed}", chance)
    try:
        for operation in [attach, attach, *chance.choices(OPERATIONS, k=chance.randrange(30))]:
            operate(world, operation)
        attached = chance.random() < 0.7
        if not attached:
            world.writes.clear()
            world.reads.clear()
            for cache in world.caches:
                cache.close()
            world.caches.clear()
        for _ in range(chance.randrange(1, 12)):
            world.damage.some(attached=attached or bool(world.caches))
            if chance.random() < 0.03:
                world.damage.size()
            for _ in range(chance.randrange(6)):
                operate(world, chance.choice(OPERATIONS))
        operate(world, remove)
    except BaseException:
        print(f"seed {seed}: damage {world.damage.said}; operations {world.done}", file=sys.stderr)
        raise
    finally:
        world.end()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("seconds", type=float, nargs="?", default=float("inf"))
    options = parser.parse_args()
    segment._PREFIX = f"shmcache.{os.geteuid()}.fuzz-{os.getpid()}."  # type: ignore[misc] # nobody else's arenas
    warnings.simplefilter("ignore", ResourceWarning)
    gc.freeze()  # what is imported need not be looked through after each seed
    failures: list[Any] = []
    sys.unraisablehook = failures.append
    end, seeds = time.monotonic() + options.seconds, 0
    for seed in range(options.first, options.first + options.count):
        if time.monotonic() > end:
            break
        faulthandler.dump_traceback_later(LIMIT_S, exit=True)
        print(f"seed {seed}", file=sys.stderr, flush=True)
        try:
            run(seed)
        except BaseException:  # noqa: BLE001 # told
            traceback.print_exc()
            return 1
        gc.collect()
        if failures:
            print(f"unraisable: {failures}", file=sys.stderr)
            return 1
        seeds += 1
    faulthandler.cancel_dump_traceback_later()
    left = [path.name for path in Path("/dev/shm").glob(segment._PREFIX + "*")]  # noqa: S108
    print(f"{seeds} seeds", f"left: {left}" if left else "")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
