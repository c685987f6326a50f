"""iceoryx2, by its Python binding. Two of its patterns come near to the work, and each is measured where it does.

A blackboard holds a value under each key and any process reads the newest: hits, misses and puts over. Its reader gets
a copy of the value (``get``); keys are fixed when the blackboard is made, so nothing is put new. Handles of entries are
kept, as its users keep them. Publish and subscribe hands samples to N subscribers, who look at them in place and give
them back, but in order and not by key: the cycle, in which samples are loaned and sent without being filled.
"""

from __future__ import annotations

import ctypes
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cost_common import WIDTH
from peers_common import Missing, Store, System, Work
from peers_loop import READERS

_SHM = Path("/dev/shm")  # noqa: S108 # where it keeps them
_SERVICE = "objects"


class Key(ctypes.Structure):
    _fields_ = (("data", ctypes.c_ubyte * WIDTH),)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and bytes(self.data) == bytes(other.data)

    __hash__ = None  # type: ignore[assignment]


class Iceoryx(System):
    name = "iceoryx2"
    about = "blackboard (by key, get copies, keys are fixed: no new ones); the cycle by publish-subscribe, in place"
    module = "peers_iceoryx"

    def start(self) -> None:
        if find_spec("iceoryx2") is None:
            raise Missing("needs iceoryx2: pip install '.[peers]'")
        self.root = self.folder / "iceoryx2"
        self.root.mkdir()
        self.prefix = f"shmcache-bench-{os.getpid()}-{secrets.token_hex(2)}-"
        self.stack.callback(self._sweep)

    def _sweep(self) -> None:
        """iceoryx2 leaves one file of its own behind."""
        for path in _SHM.glob(f"{self.prefix}*"):
            path.unlink()

    @contextmanager
    def store(self, keys: Sequence[bytes], value: bytes) -> Iterator[Store]:
        iox, kind = import_module("iceoryx2"), value_type(len(value))
        filled = kind.from_buffer_copy(value)
        address = {"root": str(self.root), "prefix": self.prefix, "size": len(value)}
        node = _node(address)
        creator = node.service_builder(iox.ServiceName.new(_SERVICE)).blackboard_creator(Key)
        creator = creator.max_readers(READERS + 1).max_nodes(READERS + 1)
        for key in keys:
            creator = creator.add(Key.from_buffer_copy(key), filled)
        service = creator.create()
        reader, writer = service.reader_builder().create(), service.writer_builder().create()
        entries = {key: reader.entry(Key.from_buffer_copy(key), kind) for key in keys}
        written = {key: writer.entry(Key.from_buffer_copy(key), kind) for key in keys}

        def miss(key: bytes) -> None:
            try:
                reader.entry(Key.from_buffer_copy(key), kind)
            except iox.EntryHandleError:
                return
            raise RuntimeError("expected no such entry")

        works: dict[str, Work] = {
            "hit": lambda key: entries[key].get(),
            "miss": miss,
            "put_over": lambda key: written[key].update_with_copy(filled),
        }
        store = Store(works, address=address)
        works["hits"] = store.each("hit")
        store.cycle = lambda ranks: _cycle(node, kind, ranks, len(keys))
        yield store
        works.clear()  # what still has a port keeps the service's files
        entries.clear()
        written.clear()


@contextmanager
def join(address: dict[str, Any]) -> Iterator[Work]:
    iox, kind = import_module("iceoryx2"), value_type(address["size"])
    node = _node(address)
    service = node.service_builder(iox.ServiceName.new(_SERVICE)).blackboard_opener(Key).open()
    reader = service.reader_builder().create()
    entries: dict[bytes, Any] = {}

    def work(key: bytes) -> None:
        if key not in entries:
            entries[key] = reader.entry(Key.from_buffer_copy(key), kind)
        entries[key].get()

    yield work


@contextmanager
def _cycle(node: Any, kind: Any, ranks: int, batch: int) -> Iterator[Work]:
    """One publisher and a subscriber a rank."""
    iox = import_module("iceoryx2")
    service = (
        node.service_builder(iox.ServiceName.new(f"cycle-{ranks}"))
        .publish_subscribe(kind)
        .history_size(0)
        .subscriber_max_buffer_size(batch)
        .subscriber_max_borrowed_samples(batch)
        .max_subscribers(ranks)
        .enable_safe_overflow(False)
        .create()
    )
    publisher = service.publisher_builder().max_loaned_samples(1).create()
    subscribers = [service.subscriber_builder().buffer_size(batch).create() for _ in range(ranks)]

    def work(keys: Sequence[Any]) -> None:
        for _ in keys:
            publisher.loan_uninit().assume_init().send()
        for subscriber in subscribers:
            samples = [subscriber.receive() for _ in keys]
            for sample in samples:
                sample.payload()
            for sample in samples:
                sample.delete()

    yield work
    subscribers.clear()


def value_type(size: int) -> Any:
    """All processes must call it by one name."""
    return type("Value", (ctypes.Structure,), {"_fields_": (("data", ctypes.c_ubyte * size),)})


def _node(address: dict[str, Any]) -> Any:
    """With files of its own, in the folder and under the prefix that all of its processes know."""
    iox = import_module("iceoryx2")
    iox.set_log_level(iox.LogLevel.Fatal)
    config = iox.config.default()
    config.global_cfg.root_path = iox.Path.new(address["root"] + "/")
    config.global_cfg.prefix = iox.FileName.new(address["prefix"])
    builder = iox.NodeBuilder.new().config(config).signal_handling_mode(iox.SignalHandlingMode.Disabled)
    return builder.create(iox.ServiceType.Ipc)
