"""A process that dies with the arena lock in its hand: ``python cost_holder.py NAME``.

It takes shares and reserves a few objects as any reader and writer does. Then it writes the lock word by hand, as
its lane would (native/lock.h), since the core holds the lock far too briefly to be killed inside on purpose.
It says ``holding`` and waits to be killed.
"""

from __future__ import annotations

import mmap
import os
import sys
import time

import shmcache

SHARES = 4096
WRITES = 16
LOCK_OFFSET = 512  # of header.lock, see native/layout.h
PAGE = 4096


def key_of(number: int) -> bytes:
    """The keys of the arena whose lock is held: this process and its parent must agree on them."""
    return b"%032d" % number


def hold_lock(name: str, lane: int) -> None:
    """Makes the lock word name this lane: lane + 1, and its incarnation in the upper half."""
    info = shmcache.inspect(name)
    incarnation = next(row.incarnation for row in info.lanes if row.index == lane)
    fd = os.open(info.path, os.O_RDWR)
    with mmap.mmap(fd, PAGE) as page, memoryview(page) as view, view.cast("Q") as words:
        words[LOCK_OFFSET // 8] = incarnation << 32 | lane + 1
    os.close(fd)


def main() -> None:
    name = sys.argv[1]
    cache = shmcache.attach(name)
    shares = cache.read([key_of(number) for number in range(SHARES)])
    writes = cache.reserve_write([b"half-written %d" % number for number in range(WRITES)], PAGE)
    if any(shares.status) or any(writes.status):
        sys.exit("the arena lacks the objects or the room that this program needs")
    hold_lock(name, cache.lane)
    print("holding", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main()
