"""One process's hold on an arena: its lane, its mappings of the payload, the layouts it knows; and its end."""

from __future__ import annotations

import mmap
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from shmcache import device, errors, segment
from shmcache._binding import Handle, check, ffi, lib
from shmcache.later import Later
from shmcache.layout import Layout
from shmcache.regions import Regions
from shmcache.status import OK
from shmcache.views import ALONE, managed_buffer

__all__ = ["Attachment", "Membership"]

# What an attachment that was dropped without close leaves behind while views of it are alive: to close it would
# give their shares back. The process's end does.
_kept: list[Attachment] = []

_STREAMS_S: Final = 60.0  #: how long close waits for streams
_NAP_S: Final = 0.0005

_attachments: weakref.WeakSet[Attachment] = weakref.WeakSet()


def _disown() -> None:
    """In a forked child: what it inherited is its parent's. A lock may be held by a thread that is not here."""
    for attachment in _attachments:
        attachment.forked = True
        attachment.lock = threading.RLock()
        attachment.later.waiting.clear()


os.register_at_fork(after_in_child=_disown)


@dataclass(frozen=True)
class Membership:
    """Who a process is in an arena."""

    group: str  #: empty for a group of one process alone
    rank: int | None  #: None for a controller
    world_size: int

    def __str__(self) -> str:
        if not self.group:
            return "a process of its own"
        who = "a controller" if self.rank is None else f"rank {self.rank}"
        return f"{who} of group {self.group!r} of {self.world_size}"


class Attachment:
    """Made by ``attach``; a :class:`Cache` and its batches share it. ``handle`` is the core's."""

    def __init__(self, name: str, member: Membership, handle: Handle, fd: int, *, prefault: bool) -> None:
        self.name: Final = name
        self.member: Final = member
        self.handle: Final = handle
        self.fd: Final = fd
        self.closed = False
        self.forked = False  # whether this is a child that inherited it
        self._prefault: Final = prefault
        self._mappings: dict[bool, mmap.mmap] = {}
        self._views: dict[bool, memoryview] = {}
        self._address: Any = None
        self._pinned: device.Pinned | None = None
        self._layouts: dict[int, Layout] = {}
        self._numbers: dict[Layout, int] = {}
        self._plain: dict[int, Layout] = {}
        self.lock = threading.RLock()
        self.later: Final = Later(self.lock, self._settle)
        self.regions: Final = Regions(name, handle, self.later.watch)
        #: Each is called with the keys that this process has just published, in the thread that did.
        self.listeners: tuple[Callable[[list[bytes]], None], ...] = ()
        _attachments.add(self)

    def check(self, code: int) -> int:
        """``code`` itself, or the exception that it stands for."""
        return code if code >= 0 else check(self.name, self.handle, code)

    def tell(self, keys: list[bytes], codes: bytes) -> None:
        """Tells the listeners which of ``keys`` were published, by the core's codes."""
        published = [key for key, code in zip(keys, codes, strict=True) if code == OK]
        for listener in self.listeners:
            listener(published)

    def check_open(self) -> None:
        """ClosedError after close and in a forked child."""
        if self.closed or self.forked:
            check(self.name, self.handle, lib.SC_E_CLOSED)

    def close(self, *, wait: bool = True) -> None:
        """Leaves the arena; ViewInUseError while a view of it is alive, and then nothing is done. ``wait``: for
        streams; else ArenaBusyError where one has not passed yet."""
        with self.lock:
            if self.closed:
                return
            if not self.forked:
                if self._views_live():
                    raise errors.ViewInUseError(
                        f"arena {self.name!r}: batches, tensors, arrays or views of this cache are alive; release "
                        "and drop them, then close"
                    )
                self._await_streams(_STREAMS_S if wait else 0.0)
                self.regions.check_unused()
                self.regions.close()
                self.check(lib.sc_close(self.handle))
            self.closed = True
            self._unmap()
            os.close(self.fd)
        self.later.wake()

    def _await_streams(self, most_s: float) -> None:
        """Pages stay locked, and mapped, until no stream copies from them any more."""
        deadline = time.monotonic() + most_s
        while self.later.waits():
            if time.monotonic() > deadline:
                raise errors.ArenaBusyError(
                    f"arena {self.name!r}: a stream has not reached the point at which release_after was called within "
                    f"{most_s:g} s; synchronize the stream, then close"
                )
            time.sleep(_NAP_S)

    def _settle(self) -> bool:
        """The chores of ``later``, which has the lock."""
        try:
            return self.regions.settle()
        except errors.ShmcacheError:  # whoever calls is told
            return False

    def keep(self) -> None:
        """Stays attached until the process ends: something still looks at the payload."""
        _kept.append(self)

    def number_of(self, layout: Layout) -> int:
        """The number of a layout in the arena's table, where it is added if it is new."""
        number = self._numbers.get(layout)
        if number is None:
            spec = layout.encode()
            number = self.check(lib.sc_layout_number(self.handle, spec, len(spec), layout.nbytes))
            self._numbers[layout] = number
        return number

    def layout_of(self, number: int, nbytes: int) -> Layout:
        """The layout of an object that was read; uint8 where the number is 0, a plain byte count. ArenaDamagedError."""
        if number == 0:
            plain = self._plain.get(nbytes)
            if plain is None:
                plain = self._plain[nbytes] = Layout((nbytes,), "uint8")
            return plain
        layout = self._layouts.get(number)
        if layout is None:
            layout = self._layouts[number] = self._layout_at(number)
        if layout.nbytes != nbytes:
            raise errors.ArenaDamagedError(
                f"arena {self.name!r}: an object of {nbytes} bytes has a layout of {layout.nbytes}; destroy the arena "
                "and make it anew"
            )
        return layout

    def _layout_at(self, number: int) -> Layout:
        spec, nbytes = ffi.new("char[512]"), ffi.new("uint32_t *")
        self.check(lib.sc_layout_spec(self.handle, number, spec, nbytes))
        try:
            return Layout.decode(ffi.buffer(spec, nbytes[0])[:])
        except ValueError as error:
            raise errors.ArenaDamagedError(
                f"arena {self.name!r}: layout {number} of its table cannot be read ({error}); destroy the arena "
                "and make it anew"
            ) from None

    def payload(self, *, writable: bool) -> memoryview:
        """This process's mapping of region 0, made when first needed."""
        view = self._views.get(writable)
        if view is not None and not self.closed and not self.forked:
            return view
        with self.lock:
            self.check_open()
            if writable not in self._views:
                mapping = segment.map_payload(self.name, self.handle, self.fd, writable=writable)
                self._mappings[writable] = mapping
                self._views[writable] = memoryview(mapping)
                if self._prefault:
                    segment.prefault(self.handle, self.fd, mapping)
            return self._views[writable]

    def write_address(self) -> Any:
        """Where the writable mapping of the payload begins, for the core, which checks that nobody closes meanwhile."""
        if self._address is None:
            with self.lock:
                buffer = ffi.from_buffer("char[]", self.payload(writable=True))
                self._address = ffi.cast("char *", buffer)
                ffi.release(buffer)  # the address alone counts as no view
        return self._address

    def pin(self) -> int:
        """Page-locks both mappings of region 0, after all of it has memory; the bytes that were not locked before."""
        with self.lock:
            self.check_open()
            if self._pinned is not None:
                return 0
            ranges = [self._range(writable=writable) for writable in (True, False)]
            nbytes = ranges[0].nbytes
            segment.populate(self.name, self.handle, self.write_address())
            with segment.progress(f"pinning {self.name}", 2 * nbytes) as advance:
                self._pinned = device.pin(self.regions.driver, ranges, device.PIECE_BYTES, advance)
            return nbytes

    def unpin(self) -> int:
        """Ends that; the bytes that were locked."""
        with self.lock:
            self.check_open()
            return self._let_go_of_pages()

    def _let_go_of_pages(self) -> int:
        if self._pinned is None:
            return 0
        self._pinned.release()
        self._pinned = None
        return len(self._mappings[True])

    def _range(self, *, writable: bool) -> device.Range:
        view = self.payload(writable=writable)
        buffer = ffi.from_buffer("char[]", view)
        address = int(ffi.cast("uintptr_t", buffer))
        ffi.release(buffer)  # the address alone counts as no view
        return device.Range(address, len(view), writable)

    def _views_live(self) -> bool:
        """Whether somebody else shares the buffers that all views, arrays and tensors are made from."""
        return any(sys.getrefcount(managed_buffer(view)) > ALONE for view in self._views.values())

    def _unmap(self) -> None:
        if not self.forked:  # in a child the driver does not work, and nothing of its parent's is its to end
            self._let_go_of_pages()
        for writable, view in self._views.items():
            view.release()
            with suppress(BufferError):  # a forked child's views; the mapping goes with the last of them
                self._mappings[writable].close()
        self._views.clear()
        self._mappings.clear()
