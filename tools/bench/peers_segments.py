"""``multiprocessing.shared_memory``, a segment an object: what is made by hand where nothing else is at hand.

A hit opens the segment by its name, looks at its buffer and closes it. There is no index, no lock, no eviction, and who
reads while another writes sees both. Python's resource tracker, which would remove segments under other processes when
a reader ends, is left out, as programs that share segments do.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import shared_memory
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from peers_common import Store, System, Work

_SHM = Path("/dev/shm")  # noqa: S108 # where Linux keeps them


class Segments(System):
    name = "shared_memory"
    about = "multiprocessing.shared_memory, a segment an object, opened by name for each hit; no index, no locks"
    module = "peers_segments"

    @contextmanager
    def store(self, keys: Sequence[bytes], value: bytes) -> Iterator[Store]:
        prefix = f"shmcache-bench-{os.getpid()}-{secrets.token_hex(4)}-"

        def native(key: bytes) -> str:
            return prefix + key.hex()

        def put_new(name: str) -> None:
            segment = shared_memory.SharedMemory(name, create=True, size=len(value))
            segment.buf[: len(value)] = value
            segment.close()

        def put_over(name: str) -> None:
            segment = shared_memory.SharedMemory(name)
            segment.buf[: len(value)] = value
            segment.close()

        names = [native(key) for key in keys]
        works: dict[str, Work] = {"hit": _read, "miss": _miss, "put_new": put_new, "put_over": put_over}
        store = Store(works, forget=_unlink, native=native, address=prefix)
        works.update(hits=store.each("hit"), misses=store.each("miss"))
        store.cycle = store.cycle_by_key
        with untracked():
            try:
                for name in names:
                    put_new(name)
                yield store
            finally:
                _unlink(path.name for path in _SHM.glob(f"{prefix}*"))


@contextmanager
def join(address: str) -> Iterator[Work]:
    with untracked():
        yield lambda key: _read(address + key.hex())


@contextmanager
def untracked() -> Iterator[None]:
    """No resource tracker for what is opened here."""
    nobody = SimpleNamespace(register=lambda *_: None, unregister=lambda *_: None)
    with mock.patch.object(shared_memory, "resource_tracker", nobody):
        yield


def _read(name: str) -> bool:
    segment = shared_memory.SharedMemory(name)
    found = segment.buf is not None  # the view in hand
    segment.close()
    return found


def _miss(name: str) -> None:
    try:
        shared_memory.SharedMemory(name)
    except FileNotFoundError:
        return
    raise RuntimeError("expected no such segment")


def _unlink(names: Iterable[str]) -> None:
    for name in names:
        (_SHM / name).unlink()
