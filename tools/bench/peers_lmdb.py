"""py-lmdb on tmpfs, set as in cost_peer.py: all durability off, values as buffers into the map, without a copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import cost_peer
from peers_common import FOOTPRINT, Missing, Store, System, Work


class Lmdb(System):
    name = "lmdb"
    about = "py-lmdb on tmpfs, nothing durable; reads are buffers into the map within a transaction, copied nowhere"
    module = "peers_lmdb"

    def start(self) -> None:
        if cost_peer.lmdb is None:
            raise Missing("needs py-lmdb: pip install '.[peers]'")

    @contextmanager
    def store(self, keys: Sequence[bytes], value: bytes) -> Iterator[Store]:
        with cost_peer.environment(len(keys) * len(value) + FOOTPRINT) as env:
            cost_peer.fill(env, keys, value)

            def put(key: bytes) -> None:
                with env.begin(write=True) as txn:
                    txn.put(key, value)

            hit = _get_one(env)
            works: dict[str, Work] = {
                "hit": hit,
                "hits": lambda some: cost_peer.get_each(env, some),
                "miss": hit,
                "misses": lambda some: cost_peer.get_each(env, some),
                "put_new": put,
                "put_over": put,
            }
            store = Store(works, forget=lambda some: _delete(env, some), address=env.path())
            store.cycle = store.cycle_by_key
            yield store


@contextmanager
def join(address: str) -> Iterator[Work]:
    with closing(cost_peer.lmdb.open(address, readonly=True, readahead=False)) as env:
        yield _get_one(env)


def _get_one(env: Any) -> Work:
    def work(key: bytes) -> bool:
        with env.begin(buffers=True) as txn:
            return txn.get(key) is not None

    return work


def _delete(env: Any, keys: Sequence[bytes]) -> None:
    with env.begin(write=True) as txn:
        for key in keys:
            txn.delete(key)
