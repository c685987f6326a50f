"""What tests of arenas share beside fixtures: other processes, and bytes that tell which object they belong to."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shmcache import Cache, ReadBatch
from shmcache.segment import path_of

Join = Callable[..., Cache]  #: the fixture ``join``

TIMEOUT_S = 60  #: after which something hangs


def pattern(tag: bytes, nbytes: int) -> bytes:
    """Bytes that nothing but ``tag`` gives."""
    return hashlib.shake_128(tag).digest(nbytes)


def run_all(jobs: list[Callable[[], object]]) -> None:
    """Runs each job in a thread; raises the first error of any."""
    errors: list[BaseException] = []

    def guarded(job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:  # noqa: BLE001 # raised below
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def contents(batch: ReadBatch) -> list[bytes | None]:
    """Copies of what a batch read, or None a key."""
    return [None if view is None else bytes(view) for view in batch.views]


def run_python(program: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Runs a Python program to its end, whatever that is."""
    command = [sys.executable, "-c", program, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


@contextmanager
def started(program: str, *args: str) -> Iterator[subprocess.Popen[str]]:
    """A Python program that has printed its first line, ``ready``; killed at the end."""
    command = [sys.executable, "-c", program, *args]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


def mappings(name: str) -> list[tuple[int, int, str]]:
    """Where this process has mapped the arena's segment: begin, end, permissions."""
    found = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].removesuffix(" (deleted)") == str(path_of(name)):
            begin, end = (int(number, 16) for number in fields[0].split("-"))
            found.append((begin, end, fields[1]))
    return found


def mapped_as(name: str, address: int, nbytes: int) -> str | None:
    """The permissions of the mapping that holds these bytes; None where they lie outside the arena."""
    spans = [found for found in mappings(name) if found[0] <= address and address + nbytes <= found[1]]
    return spans[0][2] if spans else None


def descriptors() -> int:
    """How many descriptors this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))
