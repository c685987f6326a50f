"""py-lmdb as a peer: a memory-mapped store of the same host, on tmpfs, with all durability off.

What it is given: ``writemap`` (values are written straight into the map), no syncing, no read-ahead, no
zeroing, reads with ``buffers=True`` (no copy), and a map that was touched before. Each put is a transaction
of its own, as each put of ours is readable by other processes when it returns.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

lmdb: Any = None
with suppress(ImportError):
    lmdb = import_module("lmdb")

MISSING = "lmdb is not installed, so there is no peer to compare with; pip install '.[bench]'"


@contextmanager
def environment(nbytes: int) -> Iterator[Any]:
    """An lmdb environment on tmpfs with room for ``nbytes`` of values; None where lmdb is not installed."""
    if lmdb is None:
        yield None
        return
    folder = tempfile.mkdtemp(prefix=f"shmcache-bench-{os.getpid()}-", dir="/dev/shm")  # tmpfs is what is compared
    try:
        env = lmdb.open(
            folder,
            map_size=2 * nbytes + (64 << 20),
            sync=False,
            metasync=False,
            writemap=True,
            map_async=True,
            readahead=False,
            meminit=False,
        )
        try:
            yield env
        finally:
            env.close()
    finally:
        shutil.rmtree(folder)


def fill(env: Any, keys: Sequence[bytes], value: bytes) -> None:
    for start in range(0, len(keys), 1024):
        with env.begin(write=True) as txn:
            for key in keys[start : start + 1024]:
                txn.put(key, value)


def get_each(env: Any, keys: Sequence[bytes]) -> None:
    """All values in one read transaction, as buffers."""
    with env.begin(buffers=True) as txn:
        get = txn.get
        for key in keys:
            get(key)


def get_many(env: Any, keys: Sequence[bytes]) -> None:
    """The same by ``getmulti``, which is one call for all keys."""
    with env.begin(buffers=True) as txn, txn.cursor() as cursor:
        cursor.getmulti(keys)


def replace(env: Any, old: bytes, new: bytes, value: bytes) -> None:
    """A new object where one has to go for it, in one transaction."""
    with env.begin(write=True) as txn:
        txn.delete(old)
        txn.put(new, value)
