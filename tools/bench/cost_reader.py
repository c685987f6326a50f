"""A process that reads when it is told to: ``python cost_reader.py SHARED OWN NUMBER``, started by cost_readers.py.

Each line of its input names what is read, when to begin and for how long (nanoseconds of CLOCK_MONOTONIC), so that
all that are told the same read at the same time. It answers with the hits, and the wall and CPU time that they took.
"""

from __future__ import annotations

import sys
import time

import shmcache

BATCH = 256  # shares at a time
OBJECT = 4096  # bytes
ONE, EACH, OWN = "one object", "an object each", "an arena each"
CALLS = 16  # between two looks at the clock


def key_of(number: int) -> bytes:
    """Keys that this process and its parent must agree on."""
    return b"%032d" % number


def read(cache: shmcache.Cache, key: bytes, begin_ns: int, lasting_ns: int) -> tuple[int, int, int]:
    """Takes shares of one object and gives them back, over and over."""
    keys, hits = [key] * BATCH, 0
    time.sleep(max(0, begin_ns - time.monotonic_ns()) / 1e9)
    wall, cpu = time.monotonic_ns(), time.thread_time_ns()
    while time.monotonic_ns() < begin_ns + lasting_ns or not hits:
        for _ in range(CALLS):
            batch = cache.read(keys)
            hits += batch.hits
            batch.release()
    return hits, time.monotonic_ns() - wall, time.thread_time_ns() - cpu


def main() -> None:
    shared, own, number = sys.argv[1:]
    with shmcache.attach(shared) as together, shmcache.attach(own) as alone:
        places = {ONE: (together, key_of(0)), EACH: (together, key_of(int(number))), OWN: (alone, key_of(0))}
        print("ready", flush=True)
        for line in sys.stdin:
            what, begin, lasting = line.rstrip("\n").split("\t")
            print(*read(*places[what], int(begin), int(lasting)), flush=True)


if __name__ == "__main__":
    main()
