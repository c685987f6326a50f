"""Ray's object store on this host: ``ray.get`` gives numpy arrays over its shared memory, without a copy.

Ray's objects are immutable and have references, not keys: a dict from key to reference stands for what a program would
have, a put over is a put and a new reference, and there is no miss. References live in one Ray program, so the readers
are actors of it.
"""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import peers_loop
from peers_common import Missing, Store, System, Work

STORE = 768 << 20  # bytes; what is dropped is freed a little later


class Ray(System):
    name = "Ray"
    about = "object store, ray.get of numpy arrays in place by reference: it knows no keys, so it has no miss"
    ray: Any

    def start(self) -> None:
        if find_spec("ray") is None:
            raise Missing("needs Ray: pip install '.[peers]'")
        # Nothing is reported to anybody, and no token is written into the user's home.
        os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
        self.ray = import_module("ray")
        self.stack.callback(self.ray.shutdown)
        before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
        try:
            self.ray.init(
                num_cpus=1,
                num_gpus=0,
                object_store_memory=STORE,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                _temp_dir=str(self.folder),  # its sockets bear no longer path
                _node_ip_address="127.0.0.1",
            )
        except SystemExit:
            raise KeyboardInterrupt from None  # SIGTERM came to its handler
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    @contextmanager
    def store(self, keys: Sequence[bytes], value: bytes) -> Iterator[Store]:
        get, put, array = self.ray.get, self.ray.put, np.frombuffer(value, np.uint8)
        references = {key: put(array) for key in keys}

        def put_one(key: bytes) -> None:
            references[key] = put(array)

        def forget(some: Sequence[bytes]) -> None:
            for key in some:
                references.pop(key, None)

        works: dict[str, Work] = {
            "hit": lambda key: get(references[key]) is not None,
            "hits": lambda some: get([references[key] for key in some]),
            "put_new": put_one,
            "put_over": put_one,
        }
        store = Store(works, forget)
        store.cycle = store.cycle_by_key
        store.address = references
        yield store
        references.clear()

    @contextmanager
    def crew(self, store: Store) -> Iterator[RayCrew]:
        crew = RayCrew(self.ray, store.address)
        try:
            yield crew
        finally:
            crew.end()


class RayCrew:
    """Readers as actors, by the protocol of peers_readers.Crew."""

    def __init__(self, ray: Any, references: dict[bytes, Any]) -> None:
        self.ray, self.references = ray, references
        self.actors = [ray.remote(num_cpus=0)(_Reader).remote() for _ in range(peers_loop.READERS)]
        ray.get([actor.ready.remote() for actor in self.actors])

    def read(self, keys: Sequence[bytes], lasts_s: float) -> list[peers_loop.Timing]:
        at = peers_loop.start_time()
        readers = zip(self.actors, keys, strict=False)
        going = [actor.read.remote([self.references[key]], at, lasts_s) for actor, key in readers]
        return [peers_loop.Timing(*timing) for timing in self.ray.get(going)]

    def end(self) -> None:
        for actor in self.actors:
            self.ray.kill(actor)


class _Reader:
    """In an actor. The reference comes in a list, since Ray would give the array for it otherwise."""

    def ready(self) -> None:
        pass

    def read(self, references: list[Any], at: float, lasts_s: float) -> tuple[float, float, int]:
        get = import_module("ray").get
        timing = peers_loop.read_for(get, references[0], at, lasts_s)
        return timing.wall, timing.cpu, timing.hits
