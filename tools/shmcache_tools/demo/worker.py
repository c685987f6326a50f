"""One TP worker of the demo: reads in place what the scheduler names, verifies it, gives its share back.

A process of its own, started by ``crew``.  It ends when its pipe does, so it outlives a scheduler
that was SIGKILLed by no more than the request it is reading.
"""

from __future__ import annotations

import sys
import time
import traceback
from multiprocessing.connection import Connection

import shmcache
from shmcache_tools.chunks import Pattern, words_of
from shmcache_tools.demo.wire import Done, Failed, Ready, Task

GROUP = "demo"


def main() -> int:
    """``ARENA RANK WORLD_SIZE CHUNK_BYTES PIPE_FD`` on the command line, as ``crew`` gives them."""
    arena = sys.argv[1]
    rank, world_size, chunk_bytes, fd = map(int, sys.argv[2:])
    with Connection(fd) as pipe:
        try:
            with shmcache.attach(arena, group=GROUP, rank=rank, world_size=world_size) as cache:
                _serve(pipe, cache, Pattern(chunk_bytes))
        except (EOFError, ConnectionError):
            pass  # the scheduler is gone, or wants nothing more
        except Exception:  # noqa: BLE001 # whatever it is, the scheduler tells of it and ends the run
            pipe.send_bytes(Failed(traceback.format_exc()).encode())
            return 1
    return 0


def _serve(pipe: Connection, cache: shmcache.Cache, pattern: Pattern) -> None:
    pipe.send_bytes(Ready().encode())
    while True:
        task = Task.decode(pipe.recv_bytes())
        pipe.send_bytes(_read_and_verify(cache, pattern, task).encode())


def _read_and_verify(cache: shmcache.Cache, pattern: Pattern, task: Task) -> Done:
    began = time.perf_counter()
    batch = cache.read(task.keys)
    read = time.perf_counter()
    chunks = batch.arrays()
    shown = time.perf_counter()

    found = [
        pattern.matches(chunk, word)
        for chunk, word in zip(chunks, words_of(task.keys), strict=True)
        if chunk is not None
    ]

    del chunks  # no array may outlive the share it was read under
    verified = time.perf_counter()
    batch.release()
    released = time.perf_counter()
    return Done(
        request=task.request,
        chunks=len(found),
        missing=len(task.keys) - len(found),
        mismatches=found.count(False),
        read_s=read - began,
        arrays_s=shown - read,
        release_s=released - verified,
    )


if __name__ == "__main__":
    sys.exit(main())
