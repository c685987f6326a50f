"""A program: cuts the segment of an arena under everything that the package can do, one thing after the other.

    python -m fuzz._cut each NAME SIZE  each call of the package, each on an arena whose file was cut to SIZE bytes
    python -m fuzz._cut storm NAME      threads that work in an arena until it is found cut; prints ready when they do
    python -m fuzz._cut look NAME       inspects an arena until it is told to end

Exit 0: nothing but errors of ours, or service. It never looks at payload itself: to do so ends a process by SIGBUS.
"""

from __future__ import annotations

import io
import os
import random
import select
import sys
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, Final

import shmcache
from shmcache.segment import path_of
from shmcache_tools.cleanup import __main__ as cleanup
from shmcache_tools.stat import __main__ as stat

CONFIG: Final = shmcache.ArenaConfig("96KiB", block_size="4KiB", slots=12, lanes=6, lock_timeout_s=5.0)
THREADS: Final = 3
LIMIT_S: Final = 30.0


class Crew:
    """An arena in which a controller and a rank are at work: objects, shares and a write of each."""

    def __init__(self, name: str) -> None:
        self.name = name
        shmcache.create(name, CONFIG)
        self.cache = shmcache.attach(name, group="engine", world_size=2)
        self.rank = shmcache.attach(name, group="engine", rank=0, world_size=2)
        for key in (b"a", b"b", b"c"):
            self.cache.put(key, key * 5000)
        self.cache.reserve_read([b"a", b"b"], 1)
        self.held = self.rank.read([b"a"])
        self.fresh = self.cache.read([b"c"])
        self.write = self.rank.reserve_write([b"w", b"x"], 5000)

    def cut(self, size: int) -> None:
        os.truncate(path_of(self.name), size)


def _program(main: Callable[[list[str]], int], *arguments: str) -> int:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return main(list(arguments))


#: Each with what is expected where not even the first page of the metadata is left.
CALLS: Final[dict[str, tuple[Callable[[Crew], Any], Any]]] = {
    "reserve_write": (lambda crew: crew.cache.reserve_write([b"n"], 9000), shmcache.ArenaDamagedError),
    "collective": (lambda crew: crew.rank.reserve_write([b"n"], 90, writers=2), shmcache.ArenaDamagedError),
    "put": (lambda crew: crew.cache.put(b"n", b"n" * 9000), shmcache.ArenaDamagedError),
    "publish": (lambda crew: crew.write.publish(), shmcache.ArenaDamagedError),
    "publish_and_reserve_read": (lambda crew: crew.write.publish_and_reserve_read(1), shmcache.ArenaDamagedError),
    "abort": (lambda crew: crew.write.abort(), shmcache.ArenaDamagedError),
    "finish_write": (lambda crew: crew.rank.finish_write([b"w"]), shmcache.ArenaDamagedError),
    "finish_write_and_reserve_read": (
        lambda crew: crew.rank.finish_write_and_reserve_read([b"w"], 1),
        shmcache.ArenaDamagedError,
    ),
    "abort_write": (lambda crew: crew.rank.abort_write([b"w"]), shmcache.ArenaDamagedError),
    "lookup": (lambda crew: crew.cache.lookup([b"a", b"b"]), shmcache.ArenaDamagedError),
    "status": (lambda crew: crew.cache.status([b"a", b"w", b"n"]), shmcache.ArenaDamagedError),
    "touch": (lambda crew: crew.cache.touch([b"a"]), shmcache.ArenaDamagedError),
    "reserve_read": (lambda crew: crew.cache.reserve_read([b"a", b"c"], 1), shmcache.ArenaDamagedError),
    "read": (lambda crew: crew.rank.read([b"a", b"b", b"c"]), shmcache.ArenaDamagedError),
    "read_and_wait": (lambda crew: crew.cache.read([b"w"], wait_s=0.2), shmcache.ArenaDamagedError),
    "finish_read": (lambda crew: crew.rank.finish_read([b"b"]), shmcache.ArenaDamagedError),
    "cancel_read": (lambda crew: crew.cache.cancel_read([b"b"], 1), shmcache.ArenaDamagedError),
    "release": (lambda crew: crew.held.release(), None),
    "delete": (lambda crew: crew.cache.delete([b"c"]), shmcache.ArenaDamagedError),
    "delete_by_force": (lambda crew: crew.cache.delete([b"b"], force=True), shmcache.ArenaDamagedError),
    "evict": (lambda crew: crew.cache.evict(1 << 30), shmcache.ArenaDamagedError),
    "clear": (lambda crew: crew.cache.clear(), shmcache.ArenaDamagedError),
    "reap": (lambda crew: crew.cache.reap(), shmcache.ArenaDamagedError),
    "verify": (lambda crew: crew.cache.verify(), shmcache.ArenaDamagedError),
    "stats": (lambda crew: crew.cache.stats(), shmcache.ArenaDamagedError),
    "layout": (
        lambda crew: crew.cache.reserve_write([b"n"], shmcache.Layout((3,), "int8")),
        shmcache.ArenaDamagedError,
    ),
    "close": (lambda crew: (crew.fresh.release(), crew.cache.close()), None),
    "attach": (lambda crew: shmcache.attach(crew.name), shmcache.ArenaDamagedError),
    "attach_or_create": (lambda crew: shmcache.attach(crew.name, create=CONFIG), shmcache.ArenaDamagedError),
    "inspect": (lambda crew: shmcache.inspect(crew.name).problem is not None or "sound", True),
    "stat": (lambda crew: _program(stat.main, crew.name), 1),
    "stat_json": (lambda crew: _program(stat.main, "--json", crew.name), 1),
    "cleanup_dry": (lambda crew: _program(cleanup.main, "--dry-run", crew.name), 1),
    "cleanup": (lambda crew: _program(cleanup.main, "--yes", crew.name), 1),
    "cleanup_reap": (lambda crew: _program(cleanup.main, "--reap", crew.name), 1),
    "cleanup_by_force": (lambda crew: _program(cleanup.main, "--yes", "--force", crew.name), 0),
    "destroy": (lambda crew: shmcache.destroy(crew.name), shmcache.ArenaDamagedError),
    "destroy_by_force": (lambda crew: shmcache.destroy(crew.name, force=True), None),
}


def outcome(crew: Crew, call: Callable[[Crew], Any]) -> Any:
    """What a call gives, or the class of the error of ours that it raises, which names the arena."""
    try:
        return call(crew)
    except shmcache.ShmcacheError as error:
        if crew.name not in str(error):
            raise AssertionError(f"the arena is not named: {error}") from error
        return type(error)


def _leave(crew: Crew) -> None:
    """To leave what was cut is always possible."""
    del crew.write
    crew.held.release()
    crew.fresh.release()
    crew.cache.close()
    crew.rank.close()
    if crew.name in shmcache.arenas():
        shmcache.destroy(crew.name, force=True)


def each_call(name: str, size: int) -> None:
    for what, (call, gone) in CALLS.items():
        print(what, file=sys.stderr, flush=True)
        crew = Crew(f"{name}-{what}")
        crew.cut(size)
        found = outcome(crew, call)
        if size <= 4096 and gone is not None:
            assert found == gone, found
        assert not isinstance(found, type) or found is shmcache.ArenaDamagedError, found
        # Once it was found, it stays so, and for all that this process does there.
        if found is shmcache.ArenaDamagedError and size <= 4096:
            assert outcome(crew, CALLS["lookup"][0]) is shmcache.ArenaDamagedError
        _leave(crew)


def _work(cache: shmcache.Cache, seed: int, end: float, ends: list[str]) -> None:
    """Random work, none of which looks at the payload, until the arena is found cut."""
    chance = random.Random(seed)
    keys = [b"%d" % i for i in range(8)]
    work: list[Callable[[list[bytes]], Any]] = [
        lambda some: cache.put(some[0], bytes(chance.randrange(1, 9000))),
        lambda some: cache.reserve_write(some, chance.randrange(1, 9000)).publish_and_reserve_read(),
        lambda some: cache.reserve_write(some, chance.randrange(1, 9000)).abort(),
        lambda some: cache.read(some).release(),
        cache.reserve_read,
        cache.finish_read,
        cache.lookup,
        cache.status,
        cache.touch,
        cache.delete,
        lambda _: cache.evict(chance.randrange(1 << 16)),
        lambda _: cache.reap(),
        lambda _: cache.verify(),
        lambda _: cache.stats(),
        lambda _: cache.clear(),
    ]
    try:
        while time.monotonic() < end:
            chance.choice(work)(chance.sample(keys, 3))
        ends.append("it was never found cut")
    except shmcache.ArenaDamagedError:
        ends.append("cut")
    except BaseException as error:  # noqa: BLE001 # told
        ends.append(repr(error))


def storm(name: str) -> None:
    cache = shmcache.attach(name)
    ends: list[str] = []
    end = time.monotonic() + LIMIT_S
    threads = [threading.Thread(target=_work, args=(cache, i, end, ends)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    print("ready", flush=True)
    for thread in threads:
        thread.join(LIMIT_S)
    assert ends == ["cut"] * THREADS, ends
    cache.close()


def look(name: str) -> None:
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        try:
            shmcache.inspect(name).as_dict()
            _program(stat.main, name)
        except shmcache.ArenaNotFoundError:
            pass


if __name__ == "__main__":
    if sys.argv[1] == "storm":
        storm(sys.argv[2])
    elif sys.argv[1] == "look":
        look(sys.argv[2])
    else:
        each_call(sys.argv[2], int(sys.argv[3]))
