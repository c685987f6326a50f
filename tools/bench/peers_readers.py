"""Readers in processes of their own, one crew for all systems: ``python peers_readers.py`` is one of them.

Each joins every store by its address, and reads as it is told by lines of JSON on its standard input. It ends with that
input, so that no reader outlives the program, however the program ends.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from typing import Any

from peers_common import Work
from peers_loop import READERS, Timing, read_for, start_time


class Crew:
    """The readers, as the program sees them."""

    def __init__(self, processes: Sequence[subprocess.Popen[str]]) -> None:
        self.processes = processes

    def read(self, module: str, keys: Sequence[bytes], lasts_s: float) -> list[Timing]:
        """One reader for each of ``keys`` reads it from the system of that module, all at the same time."""
        at = start_time()
        readers = self.processes[: len(keys)]
        for reader, key in zip(readers, keys, strict=True):
            _tell(reader, {"module": module, "key": key.hex(), "at": at, "lasts_s": lasts_s})
        return [Timing(**_hear(reader)) for reader in readers]


@contextmanager
def crew(addresses: Mapping[str, Any]) -> Iterator[Crew]:
    """Starts readers that have joined the stores: an address a module."""
    with ExitStack() as stack:
        processes = [stack.enter_context(_process()) for _ in range(READERS)]
        for process in processes:
            _tell(process, dict(addresses))
        for process in processes:
            _hear(process)
        yield Crew(processes)


@contextmanager
def _process() -> Iterator[subprocess.Popen[str]]:
    # A session of its own: Ctrl-C is for the program, which ends its readers itself.
    command = [sys.executable, __file__]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _tell(process: subprocess.Popen[str], message: dict[str, Any]) -> None:
    assert process.stdin is not None  # noqa: S101 # as asked for above
    process.stdin.write(json.dumps(message) + "\n")
    process.stdin.flush()


def _hear(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None  # noqa: S101 # as asked for above
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("a reader has ended; see its message above")
    said: dict[str, Any] = json.loads(line)
    return said


def main() -> None:
    first = sys.stdin.readline()
    with ExitStack() as stack:
        hits: dict[str, Work] = {}
        for module, address in json.loads(first or "{}").items():
            hits[module] = stack.enter_context(importlib.import_module(module).join(address))
        stack.enter_context(suppress(BrokenPipeError))  # the program has ended
        _say({})
        for line in sys.stdin:
            told = json.loads(line)
            _say(asdict(read_for(hits[told["module"]], bytes.fromhex(told["key"]), told["at"], told["lasts_s"])))


def _say(message: dict[str, Any]) -> None:
    """Without a buffer, which nobody may be there to take at the end."""
    os.write(sys.stdout.fileno(), json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main()
