"""The engine that is looked at: ``python observe_engine.py NAME``.

It attaches to the arena and says ``ready``. For each line with a number of seconds on its standard input it reads and
releases batches of random keys for so long, and answers with one line of JSON: how many, and their times in ns.
"""

from __future__ import annotations

import json
import random
import sys
import time

import numpy as np

import shmcache

BATCH = 256
BATCHES = 64  # different ones
OBJECT = 4096  # bytes


def key_of(number: int) -> bytes:
    """The keys that this process and its parent agree on."""
    return b"%032d" % number


def measure(cache: shmcache.Cache, batches: list[list[bytes]], seconds: float) -> dict[str, float]:
    """Reads for a while."""
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for keys in batches:
            began = time.perf_counter_ns()
            batch = cache.read(keys)
            batch.release()
            times.append(time.perf_counter_ns() - began)
    found = np.array(times)
    p50, p99, p999 = (float(quantile) for quantile in np.percentile(found, (50, 99, 99.9)))
    return {"batches": len(times), "median": p50, "mean": float(found.mean()), "p99": p99, "p999": p999}


def main() -> None:
    with shmcache.attach(sys.argv[1]) as cache:
        objects = shmcache.inspect(sys.argv[1]).stats
        count = 0 if objects is None else objects.objects
        batches = [[key_of(number) for number in random.sample(range(count), BATCH)] for _ in range(BATCHES)]
        with cache.read(batches[0]) as first:
            if first.hits != BATCH:
                sys.exit("the arena lacks the objects that this program reads")
        print("ready", flush=True)
        for line in sys.stdin:
            print(json.dumps(measure(cache, batches, float(line))), flush=True)


if __name__ == "__main__":
    main()
